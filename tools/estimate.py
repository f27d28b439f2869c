"""Memory and time of the released models, on paper: nothing here is measured.

    python -m tools.estimate          # the plans
    python -m tools.bench estimate    # the memory formula against measured peaks, then the plans

The settings are those of config_3b.yaml, the prompts those of SCENARIO below. A decoding step as a
CUDA graph is as long as its weights, keys and values take to read at 70 % of the bandwidth; nothing
else that it reads or writes is counted.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch

from attention import ON_GPU, Pace, Tap, round_up
from config import DEFAULTS, load_config
from model import PRODUCT_CHUNKS, Policy
from rollout import waves_within
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
BANDWIDTH = 2.04e12  # bytes a second
REACHED = 0.7  # the share of it that a decoding step reaches as a CUDA graph: an assumption
DECODE_STEP = 0.030  # seconds of a decoding step without graphs, which the start of kernels bounds
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
    head = head_bytes(text, group * new, width)
    if checkpointing:
        # The inputs of all layers are kept, and at any one time one layer or the head is at work.
        # The gradient of a head that is the embedding, too, waits for that of the embedding.
        waiting = FLOAT32 * text.vocab_size * text.hidden_size if config.tie_word_embeddings else 0
        inputs = text.num_hidden_layers * tokens * 4 * text.hidden_size
        image = pixels + vision.depth * patches * 4 * vision.hidden_size
        working = max(layer + waiting, block + waiting, head)
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


def head_bytes(text, tokens: int, width: int) -> float:
    """What the head's backward holds: logits, their slopes, and the gradient of the head's weight.

    The gradient is float32 and there twice. In float32 a slope takes the place of its logits. In 16
    bits the slopes of several chunks are kept, and laid side by side for one product.
    """
    logits = FLOAT32 * min(tokens, Policy.CHUNK) * text.vocab_size
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
    def cached(self) -> int:
        """Tokens in the caches, as rollout.max_cache_tokens counts them."""
        return self.prompts * (self.prompt + self.group * self.own)

    def cache_bytes(self) -> int:
        return self.cached * cached_token_bytes(self.text, self.width)

    def row_bytes(self) -> int:
        """The bias and the captured attention rows, over all keys, and what is kept of tokens."""
        keys = self.prompt + self.own
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
        seen = self.prompts * (self.prompt + self.group * own)
        return self.width * multiplied + seen * cached_token_bytes(self.text, self.width)


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
    return config, weights_of(hf)


def weights_of(hf) -> Weights:
    def count(module) -> int:
        return sum(parameter.numel() for parameter in module.parameters())

    embeddings = hf.get_input_embeddings()
    return Weights(
        whole=count(hf),
        tower=count(hf.model.visual),
        layer=count(hf.model.language_model.layers[0]),
        looked_up=0 if hf.config.tie_word_embeddings else count(embeddings),
    )


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
            "or slopes of logits and the gradient of the head",
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


def waves_of(config) -> list[Decoding]:
    """The waves of the scenario's rollout, with the cache of config_3b.yaml."""
    settings = load_config(DEFAULTS.with_name("config_3b.yaml"))
    own = GROUP * round_up(LONGEST, ON_GPU.own_keys)
    return [
        Decoding(
            config.text_config,
            prompts=len(wave),
            prompt=PROMPT,
            group=GROUP,
            new=LONGEST,
            width=BFLOAT16,
            captured=len(settings.dyco.layers),
        )
        for wave in waves_within([PROMPT] * PROMPTS, own, settings.rollout.max_cache_tokens)
    ]


def rollout_memory(
    config, weights: Weights, gpus: int, waves: list[Decoding]
) -> list[tuple[str, float]]:
    """What a GPU holds in the rollout, in bytes."""
    # There are no gradients in the rollout, which are 4 of AdamW's 16 bytes.
    states = (ADAMW - FLOAT32) * weights.trained / gpus + FLOAT32 * weights.tower / gpus
    reference = BFLOAT16 * weights.whole / gpus
    copies = BFLOAT16 * (weights.trained if gpus == 1 else weights.whole)
    wave = max(waves, key=Decoding.cache_bytes)
    a_token = cached_token_bytes(config.text_config, BFLOAT16)
    return [
        ("in the rollout: states, reference, weights in bfloat16", states + reference + copies),
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


def learning_seconds(weights: Weights) -> list[tuple[str, float]]:
    """How long what follows the rollout takes."""
    tokens = PROMPTS * (PROMPT + GROUP * MEAN)
    operations = tokens * weights.multiplied / (FLOPS * USED)
    return [
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
    waves = waves_of(config)

    at_update = update_memory(config, weights, gpus)
    in_rollout = rollout_memory(config, weights, gpus, waves)
    in_bytes = [
        *at_update,
        ("together, at the update", sum(amount for _, amount in at_update)),
        (
            "activations of that group without checkpointing",
            group_bytes(config, checkpointing=False)[0],
        ),
        *in_rollout,
        ("together, in the rollout", sum(amount for _, amount in in_rollout)),
    ]
    rollouts = rollout_seconds(weights, waves)
    learning = learning_seconds(weights)
    steps = math.ceil(EPOCH / (PROMPTS * gpus))
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


@command()
def print_plans() -> None:
    for name, setup in SETUPS.items():
        print(f"\n{name}, {SCENARIO}")
        for label, amount, unit in plan(**setup):
            print(f"  {label:<98} {amount:8.1f} {unit}")


if __name__ == "__main__":
    print_plans()
