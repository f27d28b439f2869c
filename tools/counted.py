"""The row `count` of the bench: decoding and the update of the released models, without a GPU.

Decoding: 16 prompts of 700 tokens, every response at its 512th token, the last layer captured.
The update: one group of 8 responses of 1024 tokens with gradient checkpointing, and without the
vision tower. Both in bfloat16 over float32 weights. How it is counted: tools/counting.py.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterator
from types import SimpleNamespace
from unittest.mock import patch

import torch

import decoder
from attention import Decoding
from data import Prompt
from model import Policy
from rollout import _Wave
from tools.counting import Counting, Kernel, as_on_cuda, without_numbers
from tools.estimate import MODELS, released_config

PROMPTS = 16
PROMPT = 700  # tokens of a prompt
VISUAL = 600  # of them, those of the image
OWN = 512  # tokens of a response so far, in decoding
GROUP = 8  # responses, in the update
NEW = 1024  # tokens of a response, in the update
CAPTURE = SimpleNamespace(layers=[-1], shift="fisher_rao", text_scope="after_image")
PARTS = ("products", "element-wise", "casts", "attention", "sampling", "head")
PLACES = 6  # of the largest traffic, which are printed


def released_policy(name: str, dtype: torch.dtype = torch.bfloat16) -> Policy:
    """A released model, "3B" or "7B". To be called in `without_numbers()`."""
    from transformers import Qwen2_5_VLForConditionalGeneration

    hf = Qwen2_5_VLForConditionalGeneration(released_config(**MODELS[name]))
    hf.model.visual.requires_grad_(False)
    hf.gradient_checkpointing_enable({"use_reentrant": False})
    tokenizer = SimpleNamespace(eos_token_id=0)
    return Policy(hf, tokenizer, image_processor=None, dtype=dtype)


def prompts_of(count: int, length: int, visual: int) -> list[Prompt]:
    """Prompts in which the places of an image are marked, without the image."""
    mask = torch.arange(length) < visual
    ids = torch.zeros(length, dtype=torch.long)
    return [Prompt(i, str(i), "", "", ids, mask, None, None) for i in range(count)]


# ----------------------------------------------------------------------------------------- decoding


def wave_of(
    policy: Policy,
    group: int,
    prompts: int = PROMPTS,
    length: int = PROMPT,
    visual: int = VISUAL,
    own: int = OWN,
    leaving: bool = False,
) -> _Wave:
    """A wave in the middle of decoding, each of whose responses has `own` tokens.

    leaving: of each group another number of responses goes on.
    """
    of_prompts = prompts_of(prompts, length, visual)
    wave = _Wave(policy, of_prompts, group, own, key=(0, 0), capture=CAPTURE)
    wave.head = policy.hf.lm_head.weight.to(policy.dtype)
    wave.following = torch.zeros(prompts * group, dtype=torch.long)
    wave.turns = policy.rotary(torch.arange(own).expand(3, 1, -1))
    # What the prefill leaves, which itself would need the image.
    for layer in wave.tap.layers:
        row = torch.zeros(1, length)
        wave.tap.prefill_rows[layer] = dict.fromkeys(range(prompts), row)
    kept = keys_of(policy, prompts, length)
    wave.layout = Decoding(of_prompts, kept, group, own, tap=wave.tap, device=policy.device)
    wave.layout.make_room(own)
    if leaving:
        going = [i for i in range(prompts * group) if i % group <= i // group % group]
        wave._keep(torch.tensor(going))
    return wave


def keys_of(policy: Policy, prompts: int, length: int) -> dict:
    """Layer -> keys and values of each prompt, as a prefill leaves them, without numbers."""
    text = policy.hf.config.text_config
    width = text.hidden_size // text.num_attention_heads
    shape = (1, text.num_key_value_heads, length, width)
    weight = policy.hf.lm_head.weight
    key = weight.new_empty(shape, dtype=policy.dtype)
    return {layer: [(key, key)] * prompts for layer in range(policy.depth)}


def step_of(wave: _Wave) -> list[Kernel]:
    """The kernels of one decoding step."""
    policy = wave.policy.eval()
    with (
        torch.no_grad(),
        policy.autocast(),
        Counting([*policy.parameters(), wave.head]) as counting,
        policy.prepared(),
        # Also of a policy on a CPU the products that a GPU would be given are counted.
        patch.object(decoder, "USES_ONEDNN", False),
    ):
        counting.kernels.clear()  # the casts of weights, once a rollout
        wave._step()
    return counting.kernels


# --------------------------------------------------------------------------------------- the update


def update_of(policy: Policy) -> tuple[list[Kernel], list[Kernel]]:
    """The kernels of an update's forward and backward, of one group."""
    policy.train()
    prompts = prompts_of(1, PROMPT, VISUAL)
    tokens = torch.zeros(GROUP, NEW, dtype=torch.long)
    mask = torch.ones_like(tokens, dtype=torch.bool)
    with Counting(policy.parameters()) as forward:
        loss = policy(prompts, tokens, mask).logprobs.sum()
    with Counting(policy.parameters()) as backward:
        loss.backward()
    return forward.kernels, backward.kernels


# ----------------------------------------------------------------------------------------- the row


def settings() -> Iterator[tuple[str, list[Kernel]]]:
    """What is counted, and the kernels of it."""
    with without_numbers():
        policies = {name: released_policy(name) for name in ("3B", "7B")}
    with as_on_cuda():
        for name, group, leaving in (
            ("3B", 4, False),
            ("3B", 4, True),
            ("3B", 8, False),
            ("3B", 8, True),
            ("7B", 4, False),
        ):
            wave = wave_of(policies[name], group, leaving=leaving)
            unequal = ", left unequally" if leaving else ""
            yield f"{name}, a step of {len(wave.alive)} rows{unequal}", step_of(wave)
        forward, backward = update_of(policies["3B"])
        yield f"3B, update of {GROUP} × {NEW} tokens, forward", forward
        yield f"3B, update of {GROUP} × {NEW} tokens, backward", backward


def sums(kernels: list[Kernel]) -> dict:
    """Kernels; gigabytes touched, read, and of weights among those read; 10^12 operations."""
    return {
        "kernels": len(kernels),
        "gigabytes": sum(kernel.read + kernel.written for kernel in kernels) / 1e9,
        "read": sum(kernel.read for kernel in kernels) / 1e9,
        "weights": sum(kernel.weights for kernel in kernels) / 1e9,
        "teraflop": sum(kernel.operations for kernel in kernels) / 1e12,
    }


def grouped(kernels: list[Kernel], key: Callable[[Kernel], str]) -> dict[str, list[Kernel]]:
    """The kernels under the name that `key` gives them."""
    groups = defaultdict(list)
    for kernel in kernels:
        groups[key(kernel)].append(kernel)
    return groups


def place_and_name(kernel: Kernel) -> str:
    return f"{kernel.name} in {kernel.place}"


def largest_places(kernels: list[Kernel]) -> list[tuple[str, dict]]:
    """The calls without operations that touch most bytes, each with who asks for it."""
    others = [kernel for kernel in kernels if not kernel.operations]
    counted = [(place, sums(group)) for place, group in grouped(others, place_and_name).items()]
    counted.sort(key=lambda pair: pair[1]["gigabytes"], reverse=True)
    return counted[:PLACES]


def count() -> Iterator[dict]:
    """Kernels, bytes and operations of the released models, by what they belong to."""
    for setting, kernels in settings():
        print(f"\n{setting}", flush=True)
        parts = grouped(kernels, lambda kernel: kernel.part)
        counted = {part: sums(parts[part]) for part in PARTS if part in parts}
        counted["together"] = sums(kernels)
        for part, numbers in counted.items():
            print("  " + line(part, numbers))
        print("  the largest traffic that is neither products nor attention kernels:")
        for place, numbers in largest_places(kernels):
            print("    " + line(place, numbers))
        yield {"row": "count", "setting": setting, "counted": counted}


def line(name: str, numbers: dict) -> str:
    return (
        "{name:<56} {kernels:6d} kernels {gigabytes:7.1f} GB, of weights {weights:5.1f} "
        "{teraflop:7.2f} TFLOP"
    ).format(name=name, **numbers)
