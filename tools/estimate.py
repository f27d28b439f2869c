"""Memory and time of the released models, on paper: nothing here is measured.

    python -m tools.estimate          # the plans of docs/training.md
    python -m tools.estimate --model 3B --memory 24 --lora-rank 16 --response 1024 …
    python -m tools.bench estimate    # the memory formula against measured peaks, then the plans

The second prints the plan of your own figures, and what fits on your GPU. What you leave out is as
in config_3b.yaml, or with --lora-rank as in config_lora.yaml. Neither says how long prompts and
responses are: 600 image tokens and 100 of text, and 400 tokens of a response on average.

A decoding step as a CUDA graph is as long as its weights, keys and values take to read at 70 % of
the bandwidth; nothing else that it reads or writes is counted.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace

import torch

import lora
from attention import ALIGNED, ON_GPU, Pace, Tap, round_up
from config import DEFAULTS, load_config
from model import PRODUCT_CHUNKS, Policy
from rollout import waves_within
from tools.command import command

MODELS = {
    "3B": {
        "text": {
            "hidden_size": 2048,
            "intermediate_size": 11008,
            "num_hidden_layers": 36,
            "num_attention_heads": 16,
            "num_key_value_heads": 2,
            "vocab_size": 151936,
        },
        "tied": True,
    },
    "7B": {
        "text": {
            "hidden_size": 3584,
            "intermediate_size": 18944,
            "num_hidden_layers": 28,
            "num_attention_heads": 28,
            "num_key_value_heads": 4,
            "vocab_size": 152064,
        },
        "tied": False,
    },
}
VISION = {"depth": 32, "hidden_size": 1280, "intermediate_size": 3420, "num_heads": 16}
FULL = "config_3b.yaml"
LORA = "config_lora.yaml"
SETUPS = {
    "Qwen2.5-VL-3B on one GPU of 80 GB": {"gpus": 1, **MODELS["3B"]},
    "Qwen2.5-VL-7B on eight": {"gpus": 8, **MODELS["7B"]},
    "Qwen2.5-VL-3B on one GPU of 24 GB, by LoRA": {"gpus": 1, **MODELS["3B"], "file": LORA},
}

# What no file of settings says.
VISUAL = 600  # image tokens of a prompt
PROMPT = 700  # all tokens of a prompt
MEAN = 400  # tokens of a response
EPOCH = 11000  # prompts of the data

# The GPU: an A100.
FLOPS = 312e12  # in bfloat16
USED = 0.4  # the share of it that is used
BANDWIDTH = 2.04e12  # bytes a second
REACHED = 0.7  # the share of it that a decoding step reaches as a CUDA graph: an assumption
DECODE_STEP = 0.030  # seconds of a decoding step without graphs, which the start of kernels bounds
DECODE_STEPS = 1000  # until most rows of a wave have ended

RESERVE = 1.5e9  # bytes of a GPU that CUDA itself takes, and the gaps between tensors

BFLOAT16 = 2  # bytes
FLOAT32 = 4  # bytes
ADAMW = 16  # bytes a trained weight: weight, gradient and two moments in float32

Line = tuple[str, float, str]  # what it is, how much, the unit


@dataclass(frozen=True)
class Scenario:
    """What is asked in a step, and how long prompts and responses are, in tokens."""

    prompts: int  # per GPU and step
    group: int  # responses of a prompt
    longest: int  # of a response, at worst
    cached: int  # prompts and responses, in the cache at once
    rank: int  # of LoRA's adapters; 0: all weights of the decoder are trained
    visual: int = VISUAL  # of a prompt, those of its image
    prompt: int = PROMPT  # of a prompt, all
    mean: int = MEAN  # of a response

    def __str__(self) -> str:
        return (
            f"{self.prompts} prompts per GPU and step, prompts of {self.visual} image and "
            f"{self.prompt - self.visual} text tokens, {self.group} responses of {self.mean} "
            f"tokens, {self.longest} at worst"
        )


def scenario_of(file: str) -> Scenario:
    """What a file of settings asks for."""
    config = load_config(DEFAULTS.with_name(file))
    return Scenario(
        prompts=config.rollout.prompts_per_step,
        group=config.rollout.group_size,
        longest=config.rollout.max_new_tokens,
        cached=config.rollout.max_cache_tokens,
        rank=config.lora.rank,
    )


# ----------------------------------------------------------------------------- what an update holds


def update_bytes(
    config,
    prompt: int,
    visual: int,
    *,
    group: int,
    new: int,
    width: int,
    checkpointing: bool,
    frozen: bool = False,
    rank: int = 0,
) -> tuple[float, float]:
    """What one group's forward and backward hold beyond weights and their gradients, in bytes.

    The first number is kept from forward to backward, the second is at work in the backward pass.
    prompt and visual: tokens of the prompt, and those of them that are the image's. group and new:
    responses, and tokens of each. width: bytes of a number in the arithmetic's dtype; the residual
    stream and the norms are float32 in any case. frozen: the vision tower is not trained. rank: of
    LoRA's adapters, beside which all else is frozen.
    """
    text = config.text_config
    vision = config.vision_config
    tokens = prompt + group * (new - 1)  # packed: the last token of a response is not fed
    patches = 4 * visual

    layer = layer_bytes(text, prompt, group=group, new=new, width=width)
    layer += tokens * width * rank * len(lora.TARGETS)  # the narrow rows between A and B
    block = block_bytes(vision, patches, width)
    pixels = pixel_bytes(vision, patches, width)
    head = head_bytes(text, group * new, width, frozen=rank > 0)
    if checkpointing:
        # The inputs of all layers are kept, and at any one time one layer or the head is at work.
        # The gradient of a head that is the embedding, too, waits for that of the embedding.
        is_waiting = config.tie_word_embeddings and not rank
        waiting = FLOAT32 * text.vocab_size * text.hidden_size if is_waiting else 0
        inputs = text.num_hidden_layers * tokens * 4 * text.hidden_size
        image = pixels + vision.depth * patches * 4 * vision.hidden_size
        working = max(layer + waiting, block + waiting, head)
    else:
        inputs = text.num_hidden_layers * layer
        image = pixels + vision.depth * block
        working = head
    return inputs + (0 if frozen or rank else image), working


def layer_bytes(text, prompt: int, *, group: int, new: int, width: int) -> float:
    """What one decoder layer keeps of a packed group.

    Of each packed token in float32: two residuals and two normalised rows. In the arithmetic's
    dtype: two outputs of norms, query, attention output twice, key and value, and four rows of the
    MLP. Of each response token a query laid out for its group. Of each response the keys and values
    of prompt and response.
    """
    hidden = text.hidden_size
    key_value = 2 * text.num_key_value_heads * hidden // text.num_attention_heads
    own = group * (new - 1)
    of_token = 16 * hidden + width * (5 * hidden + key_value + 4 * text.intermediate_size)
    queries = own * width * hidden
    keys_and_values = group * (prompt + new) * width * key_value
    return (prompt + own) * of_token + queries + keys_and_values


def block_bytes(vision, patches: int, width: int) -> float:
    """What one block of the vision tower keeps."""
    in_width = 9 * vision.hidden_size + 4 * vision.intermediate_size
    return patches * (16 * vision.hidden_size + width * in_width)


def pixel_bytes(vision, patches: int, width: int) -> float:
    """What the vision tower keeps once: the pixels, their embedding, and what is merged."""
    pixels = 3 * vision.temporal_patch_size * vision.patch_size**2
    return patches * (width * pixels + 8 * width * vision.hidden_size)


def head_bytes(text, tokens: int, width: int, frozen: bool = False) -> float:
    """What the head's backward holds: logits, their slopes, and the gradient of the head's weight.

    The gradient is float32 and there twice. In float32 a slope takes the place of its logits. In 16
    bits the slopes of several chunks are kept, and laid side by side for one product. A frozen head
    has no gradient. Then most is held in the forward pass: logits, exponentials, and the products
    of both.
    """
    logits = FLOAT32 * min(tokens, Policy.CHUNK) * text.vocab_size
    if frozen:
        return 3 * logits
    gradient = FLOAT32 * text.vocab_size * text.hidden_size
    if width == FLOAT32:
        return logits + 2 * gradient
    slopes = width * min(tokens, PRODUCT_CHUNKS * Policy.CHUNK) * text.vocab_size
    return max(logits + slopes + gradient, 2 * slopes + 2 * gradient)


# ----------------------------------------------------------------------------- what a rollout holds


def cached_token_bytes(text, width: int) -> int:
    """Key and value of one token, in all layers."""
    head_size = text.hidden_size // text.num_attention_heads
    return 2 * width * text.num_hidden_layers * text.num_key_value_heads * head_size


@dataclass
class Decoding:
    """The decoding of one wave of prompts that are equally long, as attention.Decoding does it."""

    text: object  # the sizes of the text model
    prompts: int
    prompt: int  # tokens of a prompt
    group: int  # responses of a prompt
    new: int  # tokens of a response, at most
    width: int  # bytes of a number in the arithmetic's dtype
    captured: int = 1  # layers whose attention is captured
    pace: Pace = ON_GPU

    @property
    def rows(self) -> int:
        return self.prompts * self.group

    @property
    def own(self) -> int:
        """The space of a response, in tokens."""
        return round_up(self.new, self.pace.own_keys)

    @property
    def stored(self) -> int:
        """The space of a prompt, in tokens."""
        return round_up(self.prompt, ALIGNED)

    @property
    def cached(self) -> int:
        """Tokens in the caches, as rollout.max_cache_tokens counts them."""
        return self.prompts * (self.stored + self.group * self.own)

    def cache_bytes(self) -> int:
        return self.cached * cached_token_bytes(self.text, self.width)

    def row_bytes(self) -> int:
        """The bias and the captured attention rows, over all keys, and what is kept of tokens."""
        keys = self.stored + self.own
        attention = FLOAT32 * (1 + self.captured * (1 + Tap.STEPS)) * keys
        # id, mask, log-probability, uniform number, and four signals
        of_token = 8 + 1 + 6 * FLOAT32
        return self.rows * (attention + of_token * self.new)

    def sampling_bytes(self) -> int:
        """Logits and exponentials in float32, these once more and their sums in float64."""
        return self.rows * self.text.vocab_size * 24

    def step_bytes(self, multiplied: int, steps: int) -> float:
        """What one step has to read, on average over so many: weights, keys and values."""
        own = sum(round_up(step, self.pace.own_keys) for step in range(1, steps + 1)) / steps
        seen = self.prompts * (self.stored + self.group * own)
        return self.width * multiplied + seen * cached_token_bytes(self.text, self.width)


# ------------------------------------------------------------------------------ the released models


@dataclass
class Weights:
    """How many weights a model has."""

    whole: int
    tower: int  # of the vision tower, which is frozen
    layer: int  # of one decoder layer
    looked_up: int  # of embeddings that are not the head's, too
    joined: int  # of the projections to queries, keys and values, in all layers
    adapters: int = 0  # of LoRA, beside them

    @property
    def trained(self) -> int:
        return self.adapters or self.whole - self.tower

    @property
    def multiplied(self) -> int:
        """Those that a token is multiplied by; embeddings are looked up."""
        return self.whole - self.tower - self.looked_up


def released_config(text: dict, tied: bool):
    """The configuration of a model of MODELS."""
    from transformers import Qwen2_5_VLConfig

    vision = VISION | {"out_hidden_size": text["hidden_size"]}
    return Qwen2_5_VLConfig(text_config=text, vision_config=vision, tie_word_embeddings=tied)


def released_model(text: dict, tied: bool, rank: int = 0):
    """The configuration of a released model and its numbers of weights, without its memory."""
    from transformers import Qwen2_5_VLForConditionalGeneration

    config = released_config(text, tied)
    with torch.device("meta"):
        hf = Qwen2_5_VLForConditionalGeneration(config)
    return config, weights_of(hf, rank)


def weights_of(hf, rank: int = 0) -> Weights:
    layers = hf.model.language_model.layers
    layer = layers[0]

    def count(module) -> int:
        return sum(parameter.numel() for parameter in module.parameters())

    embeddings = hf.get_input_embeddings()
    attention = layer.self_attn
    projections = (attention.q_proj, attention.k_proj, attention.v_proj)
    return Weights(
        whole=count(hf),
        tower=count(hf.model.visual),
        layer=count(layer),
        looked_up=0 if hf.config.tie_word_embeddings else count(embeddings),
        joined=len(layers) * sum(map(count, projections)),
        adapters=len(layers) * adapter_size(layer, rank),
    )


def adapter_size(layer: torch.nn.Module, rank: int) -> int:
    """The numbers in the adapters of one decoder layer, A [r, in] and B [out, r] each."""
    linear = [part for part in layer.modules() if isinstance(part, torch.nn.Linear)]
    return sum(rank * (part.in_features + part.out_features) for part in linear)


def billions(number: float) -> str:
    return f"{number / 1e9:.2f} B"


def group_bytes(config, scenario: Scenario, checkpointing: bool) -> tuple[float, float]:
    """update_bytes of a group at worst, in bfloat16, with the vision tower frozen."""
    return update_bytes(
        config,
        scenario.prompt,
        scenario.visual,
        group=scenario.group,
        new=scenario.longest,
        width=BFLOAT16,
        checkpointing=checkpointing,
        frozen=True,
        rank=scenario.rank,
    )


def weights_memory(weights: Weights, gpus: int) -> list[tuple[str, float]]:
    """What a GPU holds all the time but in the rollout, in bytes."""
    shared = f" / {gpus}" if gpus > 1 else ""
    if weights.adapters:
        return [
            (
                f"frozen weights, bfloat16, reference, too: 2 · {billions(weights.whole)}{shared}",
                BFLOAT16 * weights.whole / gpus,
            ),
            (
                f"adapters, gradients, AdamW in float32: 16 · {billions(weights.trained)}{shared}",
                ADAMW * weights.trained / gpus,
            ),
        ]
    return [
        (
            f"weights, gradients, AdamW in float32: 16 · {billions(weights.trained)}{shared}",
            ADAMW * weights.trained / gpus,
        ),
        (
            f"frozen vision tower, float32: 4 · {billions(weights.tower)}{shared}",
            FLOAT32 * weights.tower / gpus,
        ),
        (
            f"reference policy, bfloat16 (algo.kl > 0): 2 · {billions(weights.whole)}{shared}",
            BFLOAT16 * weights.whole / gpus,
        ),
    ]


def update_memory(
    config, weights: Weights, gpus: int, scenario: Scenario
) -> list[tuple[str, float]]:
    """What a GPU holds at the update, in bytes."""
    kept, working = group_bytes(config, scenario, checkpointing=True)
    copies, copied = bfloat16_copies(config, weights, gpus)
    lines = weights_memory(weights, gpus)
    lines.append((f"bfloat16 copies of the weights in use: {copied}", copies))
    if gpus > 1 and not weights.adapters:
        # Both for the weights in use that are trained: 2 bytes of bfloat16 and 4 of float32, where
        # `copies` counts 2 a weight.
        gradients = 3 * (copies - BFLOAT16 * weights.tower)
        lines.append(("their gradients before they are scattered, bfloat16 and float32", gradients))
    head = "" if weights.adapters else " and the gradient of the head"
    lines += [
        (
            f"activations, checkpointed, one group of {scenario.group} responses of "
            f"{scenario.longest} tokens",
            kept,
        ),
        (f"one layer while it is computed again, or slopes of logits{head}", working),
    ]
    return lines


def bfloat16_copies(config, weights: Weights, gpus: int) -> tuple[float, str]:
    """Bytes of the weights that arithmetic uses at one time, and which these are."""
    if gpus == 1:
        return BFLOAT16 * weights.trained, "those that are trained"
    # Sharded weights are gathered layer by layer: one at work, the next on its way.
    elsewhere = weights.layer * (config.text_config.num_hidden_layers - 2)
    in_use = BFLOAT16 * (weights.whole - elsewhere)
    return in_use, "two layers, embeddings, head, vision tower"


def waves_of(config, scenario: Scenario) -> list[Decoding]:
    """The waves of the scenario's rollout."""
    lengths = [scenario.prompt] * scenario.prompts
    waves = waves_within(
        lengths, scenario.group, scenario.longest, budget=scenario.cached, pace=ON_GPU
    )
    return [
        Decoding(
            config.text_config,
            prompts=len(wave),
            prompt=scenario.prompt,
            group=scenario.group,
            new=scenario.longest,
            width=BFLOAT16,
        )
        for wave in waves
    ]


def rollout_memory(
    config, weights: Weights, gpus: int, scenario: Scenario
) -> list[tuple[str, float]]:
    """What a GPU holds in the rollout, in bytes."""
    # There are no gradients in the rollout, which are 4 of AdamW's 16 bytes.
    states = sum(amount for _, amount in weights_memory(weights, gpus))
    states -= FLOAT32 * weights.trained / gpus
    copies = BFLOAT16 * (weights.trained if gpus == 1 else weights.whole)
    if gpus > 1 and not weights.adapters:
        # Gathered weights have 16 bits already, and decoder.joined copies some of them. So it does
        # with adapters that leave out queries, keys and values, which is not counted.
        copies += BFLOAT16 * weights.joined
    wave = max(waves_of(config, scenario), key=Decoding.cache_bytes)
    a_token = cached_token_bytes(config.text_config, BFLOAT16)
    reference = "" if weights.adapters else ", reference"
    return [
        (f"in the rollout: states{reference}, weights in bfloat16", states + copies),
        (f"caches of {wave.cached} tokens of {a_token} bytes", wave.cache_bytes()),
        (
            f"attention rows, and sampling of {wave.rows} rows from the vocabulary",
            wave.row_bytes() + wave.sampling_bytes(),
        ),
    ]


def graph_seconds(weights: Weights, wave: Decoding) -> float:
    """Seconds of a decoding step as a CUDA graph, on average until most rows have ended."""
    return wave.step_bytes(weights.multiplied, DECODE_STEPS) / (REACHED * BANDWIDTH)


def rollout_seconds(weights: Weights, waves: list[Decoding]) -> list[tuple[str, float]]:
    """How long the rollout takes with CUDA graphs, and without."""
    step = sum(graph_seconds(weights, wave) for wave in waves) / len(waves)
    until = f"{len(waves)} × {DECODE_STEPS} steps until most rows have ended"
    return [
        (
            f"rollout with graphs: {until}, {1000 * step:.1f} ms each",
            len(waves) * DECODE_STEPS * step,
        ),
        (
            f"rollout without: {until}, {1000 * DECODE_STEP:.0f} ms each",
            len(waves) * DECODE_STEPS * DECODE_STEP,
        ),
    ]


def learning_seconds(weights: Weights, scenario: Scenario) -> list[tuple[str, float]]:
    """How long what follows the rollout takes."""
    tokens = scenario.prompts * (scenario.prompt + scenario.group * scenario.mean)
    # Frozen weights have no gradient, which takes as long as a forward.
    of_update = 6 if weights.adapters else 8
    operations = tokens * weights.multiplied / (FLOPS * USED)
    return [
        (
            f"score, behaviour and reference: 2 · 2 · {tokens} tokens · "
            f"{billions(weights.multiplied)}",
            4 * operations,
        ),
        (
            f"update, forward, again, backward: {of_update} · {tokens} tokens · "
            f"{billions(weights.multiplied)}",
            of_update * operations,
        ),
    ]


def plan(gpus: int, text: dict, tied: bool, file: str = FULL, **changes) -> list[Line]:
    """Memory per GPU and time of a step, on paper.

    The scenario is that of a file of settings, with `changes` of its fields.
    """
    scenario = replace(scenario_of(file), **changes)
    config, weights = released_model(text, tied, rank=scenario.rank)

    at_update = update_memory(config, weights, gpus, scenario)
    in_rollout = rollout_memory(config, weights, gpus, scenario)
    in_bytes = [
        *at_update,
        ("together, at the update", sum(amount for _, amount in at_update)),
        (
            "activations of that group without checkpointing",
            group_bytes(config, scenario, checkpointing=False)[0],
        ),
        *in_rollout,
        ("together, in the rollout", sum(amount for _, amount in in_rollout)),
    ]
    rollouts = rollout_seconds(weights, waves_of(config, scenario))
    learning = learning_seconds(weights, scenario)
    steps = math.ceil(EPOCH / (scenario.prompts * gpus))
    epoch = f"one epoch of {EPOCH // 1000} {EPOCH % 1000:03d} prompts: {steps} steps"
    in_hours = []
    for name, (_, decoding) in zip(("with graphs", "without"), rollouts, strict=True):
        step = decoding + sum(amount for _, amount in learning)
        in_hours.append((f"{epoch}, {name}", steps * step / 3600))
    return [
        *((label, amount / 1e9, "GB") for label, amount in in_bytes),
        *((label, amount, "s") for label, amount in (*rollouts, *learning)),
        *((label, amount, "hours") for label, amount in in_hours),
    ]


# ------------------------------------------------------------------------------------ what fits


def peak(config, weights: Weights, gpus: int, scenario: Scenario) -> float:
    """What a GPU holds at most, at the update or in the rollout, in bytes."""
    at_update = update_memory(config, weights, gpus, scenario)
    in_rollout = rollout_memory(config, weights, gpus, scenario)
    return max(sum(amount for _, amount in stage) for stage in (at_update, in_rollout))


def most(values: Iterable[int], fits: Callable[[int], bool]) -> int | None:
    """The last of rising values that fits, or None.

    >>> most(range(1, 100), lambda value: value * value < 50)
    7
    """
    largest = None
    for value in values:
        if not fits(value):
            break
        largest = value
    return largest


def verdict(model: str, gpus: int, gigabytes: float, scenario: Scenario) -> list[str]:
    """Whether a scenario fits on GPUs of so many GB, and how far each of its figures may go."""
    config, weights = released_model(**MODELS[model], rank=scenario.rank)
    room = gigabytes * 1e9 - RESERVE

    def fits(**changes) -> bool:
        return peak(config, weights, gpus, replace(scenario, **changes)) <= room

    needed = (peak(config, weights, gpus, scenario) + RESERVE) / 1e9
    answer = "fits" if fits() else "does not fit"
    lines = [
        f"It {answer}: {needed:.1f} GB of {gigabytes:g} GB, {RESERVE / 1e9} GB of it for CUDA."
    ]
    ranges = {
        "rollout.max_new_tokens": ("longest", range(256, 2**15 + 1, 256)),
        "rollout.group_size": ("group", range(2, 65)),
        "rollout.max_cache_tokens": ("cached", range(10_000, 1_000_001, 10_000)),
    }
    for key, (field, values) in ranges.items():
        largest = most(values, lambda value, field=field: fits(**{field: value}))
        limit = "no value is small enough" if largest is None else f"up to {largest}"
        if largest == values[-1]:
            limit += " and more"
        lines.append(f"  {key:<25} {limit}, with all else as above")
    if answer != "fits" and not scenario.rank:
        lines.append("  LoRA needs less: --lora-rank 16")
    return lines


# ---------------------------------------------------------------------------------- the command


def print_lines(title: str, lines: list[Line]) -> None:
    print(f"\n{title}")
    for label, amount, unit in lines:
        print(f"  {label:<98} {amount:8.1f} {unit}")


def print_plans() -> None:
    """Those of docs/training.md."""
    for name, setup in SETUPS.items():
        scenario = scenario_of(setup.get("file", FULL))
        print_lines(f"{name}, {scenario}", plan(**setup))


def print_own(options: argparse.Namespace) -> None:
    """The plan of the figures on the command line, and whether it fits."""
    file = LORA if options.lora_rank else FULL
    given = {
        "rank": options.lora_rank,
        "prompts": options.prompts,
        "group": options.group,
        "longest": options.response,
        "cached": options.cached,
        "visual": options.visual,
        "prompt": options.prompt,
        "mean": options.mean,
    }
    changes = {field: value for field, value in given.items() if value is not None}
    scenario = replace(scenario_of(file), **changes)
    how = f"LoRA of rank {scenario.rank}" if scenario.rank else "all weights but the vision tower"
    title = (
        f"Qwen2.5-VL-{options.model} on {options.gpus} × {options.memory:g} GB, {how}, {scenario}"
    )
    print_lines(title, plan(options.gpus, **MODELS[options.model], file=file, **changes))
    print()
    print("\n".join(verdict(options.model, options.gpus, options.memory, scenario)))


def parser() -> argparse.ArgumentParser:
    made = argparse.ArgumentParser(
        prog="python -m tools.estimate",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    made.add_argument("--model", choices=MODELS, help="whose plan; without it, those of the docs")
    made.add_argument("--gpus", type=int, default=1, help="how many share the model (1)")
    made.add_argument("--memory", type=float, default=80.0, help="GB of each GPU (80)")
    made.add_argument("--lora-rank", type=int, help="lora.rank; without it, all is trained")
    made.add_argument("--prompts", type=int, help="prompts per GPU and step")
    made.add_argument("--prompt", type=int, help="tokens of a prompt, the image's among them")
    made.add_argument("--visual", type=int, help="tokens of the image")
    made.add_argument("--group", type=int, help="rollout.group_size")
    made.add_argument("--response", type=int, help="rollout.max_new_tokens")
    made.add_argument("--mean", type=int, help="tokens of a response on average")
    made.add_argument("--cached", type=int, help="rollout.max_cache_tokens")
    return made


@command()
def main(arguments: list[str] | None = None) -> None:
    options = parser().parse_args(arguments)
    for name, value in vars(options).items():
        if name != "model" and value is not None and value <= 0:
            parser().error(f"--{name.replace('_', '-')}: expected more than 0, found {value:g}")
    if options.model is None:
        print_plans()
    else:
        print_own(options)


if __name__ == "__main__":
    main()
