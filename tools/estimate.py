"""Memory and time of the released models, on paper: nothing here is measured.

    python -m tools.estimate          # the plans
    python -m tools.bench estimate    # the memory formula against measured peaks, then the plans

The settings are those of config_3b.yaml, the prompts those of SCENARIO below.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch

from config import DEFAULTS, load_config
from model import Policy
from tools.command import command

SETUPS = {
    "Qwen2.5-VL-3B on one GPU of 80 GB": {
        "gpus": 1,
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
    "Qwen2.5-VL-7B on eight": {
        "gpus": 8,
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

# The scenario: what is asked in a step, and how long the responses are.
PROMPTS = 16  # per GPU and step
VISUAL = 600  # image tokens of a prompt
PROMPT = 700  # all tokens of a prompt
GROUP = 8  # responses of a prompt
MEAN = 400  # tokens of a response
LONGEST = 2048  # tokens of a response, at worst
EPOCH = 11000  # prompts of the data
SCENARIO = (
    f"{PROMPTS} prompts per GPU and step, prompts of {VISUAL} image and {PROMPT - VISUAL} text "
    f"tokens, {GROUP} responses of {MEAN} tokens, {LONGEST} at worst"
)

# The GPU: an A100.
FLOPS = 312e12  # in bfloat16
USED = 0.4  # the share of it that is used
DECODE_STEP = 0.030  # seconds of a decoding step, which the start of kernels bounds
DECODE_STEPS = 1000  # until most rows of a wave have ended

BFLOAT16 = 2  # bytes
FLOAT32 = 4  # bytes
ADAMW = 16  # bytes a trained weight: weight, gradient and two moments in float32

Line = tuple[str, float, str]  # what it is, how much, the unit


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
) -> tuple[float, float]:
    """What one group's forward and backward hold beyond weights and their gradients, in bytes.

    The first number is kept from forward to backward, the second is at work in the backward pass.
    prompt and visual: tokens of the prompt, and those of them that are the image's. group and new:
    responses, and tokens of each. width: bytes of a number in the arithmetic's dtype; the residual
    stream and the norms are float32 in any case. frozen: the vision tower is not trained.
    """
    text = config.text_config
    vision = config.vision_config
    tokens = prompt + group * (new - 1)  # packed: the last token of a response is not fed
    patches = 4 * visual

    layer = layer_bytes(text, prompt, group=group, new=new, width=width)
    block = block_bytes(vision, patches, width)
    pixels = pixel_bytes(vision, patches, width)
    head = head_bytes(text, group * new)
    if checkpointing:
        # The inputs of all layers are kept, and at any one time one layer or the head is at work.
        inputs = text.num_hidden_layers * tokens * 4 * text.hidden_size
        image = pixels + vision.depth * patches * 4 * vision.hidden_size
        working = max(layer, block, head)
    else:
        inputs = text.num_hidden_layers * layer
        image = pixels + vision.depth * block
        working = head
    return inputs + (0 if frozen else image), working


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


def head_bytes(text, tokens: int) -> float:
    """The logits of a chunk, and the gradient of the head's weight twice, in float32."""
    logits = 4 * min(tokens, Policy.CHUNK) * text.vocab_size
    return logits + 8 * text.vocab_size * text.hidden_size


# ------------------------------------------------------------------------------ the released models


@dataclass
class Weights:
    """How many weights a model has."""

    whole: int
    tower: int  # of the vision tower, which is frozen
    layer: int  # of one decoder layer
    looked_up: int  # of embeddings that are not the head's, too

    @property
    def trained(self) -> int:
        return self.whole - self.tower

    @property
    def multiplied(self) -> int:
        """Those that a token is multiplied by; embeddings are looked up."""
        return self.trained - self.looked_up


def released_model(text: dict, tied: bool):
    """The configuration of a released model and its numbers of weights, without its memory."""
    from transformers import Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration

    vision = VISION | {"out_hidden_size": text["hidden_size"]}
    config = Qwen2_5_VLConfig(text_config=text, vision_config=vision, tie_word_embeddings=tied)
    with torch.device("meta"):
        hf = Qwen2_5_VLForConditionalGeneration(config)

    def count(module) -> int:
        return sum(parameter.numel() for parameter in module.parameters())

    weights = Weights(
        whole=count(hf),
        tower=count(hf.model.visual),
        layer=count(hf.model.language_model.layers[0]),
        looked_up=0 if tied else text["vocab_size"] * text["hidden_size"],
    )
    return config, weights


def billions(number: float) -> str:
    return f"{number / 1e9:.2f} B"


def group_bytes(config, checkpointing: bool) -> tuple[float, float]:
    """update_bytes of a group at worst, in bfloat16, with the vision tower frozen."""
    return update_bytes(
        config,
        PROMPT,
        VISUAL,
        group=GROUP,
        new=LONGEST,
        width=BFLOAT16,
        checkpointing=checkpointing,
        frozen=True,
    )


def update_memory(config, weights: Weights, gpus: int) -> list[tuple[str, float]]:
    """What a GPU holds at the update, in bytes."""
    shared = f" / {gpus}" if gpus > 1 else ""
    kept, working = group_bytes(config, checkpointing=True)
    copies, copied = bfloat16_copies(config, weights, gpus)
    lines = [
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
        (f"bfloat16 copies of the weights in use: {copied}", copies),
    ]
    if gpus > 1:
        # Both for the weights in use that are trained: 2 bytes of bfloat16 and 4 of float32, where
        # `copies` counts 2 a weight.
        gradients = 3 * (copies - BFLOAT16 * weights.tower)
        lines.append(("their gradients before they are scattered, bfloat16 and float32", gradients))
    lines += [
        (f"activations, checkpointed, one group of {GROUP} responses of {LONGEST} tokens", kept),
        (
            "one layer while it is computed again, "
            "or a chunk of logits and the gradient of the head",
            working,
        ),
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


def rollout_memory(config, weights: Weights, gpus: int, cached: int) -> tuple[str, float]:
    """What a GPU holds in the rollout, in bytes, with so many tokens in the cache."""
    text = config.text_config
    head_size = text.hidden_size // text.num_attention_heads
    # Key and value, of each layer and key head.
    a_token = 2 * BFLOAT16 * text.num_hidden_layers * text.num_key_value_heads * head_size
    # There are no gradients in the rollout, which are 4 of AdamW's 16 bytes.
    states = (ADAMW - FLOAT32) * weights.trained / gpus + FLOAT32 * weights.tower / gpus
    reference = BFLOAT16 * weights.whole / gpus
    copies = BFLOAT16 * (weights.trained if gpus == 1 else weights.whole)
    label = (
        "in the rollout: states and reference, weights in bfloat16, "
        f"{cached} cached tokens of {a_token} bytes"
    )
    return label, states + reference + copies + cached * a_token


def step_seconds(weights: Weights, cached: int) -> list[tuple[str, float]]:
    """How long the parts of a step take."""
    tokens = PROMPTS * (PROMPT + GROUP * MEAN)
    waves = math.ceil(PROMPTS * (PROMPT + GROUP * LONGEST) / cached)
    operations = tokens * weights.multiplied / (FLOPS * USED)
    return [
        (
            f"rollout: {waves} waves, about {DECODE_STEPS} decoding steps each until most rows "
            "have ended",
            waves * DECODE_STEPS * DECODE_STEP,
        ),
        (
            f"score, behaviour and reference: 2 · 2 · {tokens} tokens · "
            f"{billions(weights.multiplied)}",
            4 * operations,
        ),
        (
            f"update, forward, again, backward: 8 · {tokens} tokens · "
            f"{billions(weights.multiplied)}",
            8 * operations,
        ),
    ]


def plan(gpus: int, text: dict, tied: bool) -> list[Line]:
    """Memory per GPU and time of a step, on paper."""
    config, weights = released_model(text, tied)
    cached = load_config(DEFAULTS.with_name("config_3b.yaml")).rollout.max_cache_tokens

    at_update = update_memory(config, weights, gpus)
    in_bytes = [
        *at_update,
        ("together, at the update", sum(amount for _, amount in at_update)),
        (
            "activations of that group without checkpointing",
            group_bytes(config, checkpointing=False)[0],
        ),
        rollout_memory(config, weights, gpus, cached),
    ]
    in_seconds = step_seconds(weights, cached)
    steps = math.ceil(EPOCH / (PROMPTS * gpus))
    hours = steps * sum(amount for _, amount in in_seconds) / 3600
    return [
        *((label, amount / 1e9, "GB") for label, amount in in_bytes),
        *((label, amount, "s") for label, amount in in_seconds),
        (f"one epoch of {EPOCH // 1000} {EPOCH % 1000:03d} prompts: {steps} steps", hours, "hours"),
    ]


@command()
def print_plans() -> None:
    for name, setup in SETUPS.items():
        print(f"\n{name}, {SCENARIO}")
        for label, amount, unit in plan(**setup):
            print(f"  {label:<98} {amount:8.1f} {unit}")


if __name__ == "__main__":
    print_plans()
