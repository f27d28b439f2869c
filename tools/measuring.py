"""What the rows of the bench measure with: tiny policies and prompts, seconds, memory, ratios."""

from __future__ import annotations

import gc
import itertools
import os
import statistics
import threading
import time
from collections.abc import Callable
from functools import lru_cache
from types import SimpleNamespace

import torch
from PIL import Image

import toy
import train
from config import load_config
from data import Prompt, Sample, encode_prompt
from distributed import ALONE, World
from metrics import resident_bytes
from model import Policy

THREADS = int(os.environ.get("OMP_NUM_THREADS", 2))
GROUP = 8  # responses of a prompt
SIZES = {
    "3M": {"hidden": 192, "layers": 6},
    "40M": {"hidden": 512, "layers": 8, "vocabulary": 32000},
}
PIXELS = {100: (280, 280), 600: (700, 672)}  # visual tokens -> width, height
QUESTION = "Sum circle, cross, square."


# ----------------------------------------------------------------------------- policies and prompts


@lru_cache(maxsize=1)
def policy_of(size: str) -> Policy:
    """The policy of a size of SIZES; the last one is kept, and both ways of a row use it."""
    tokenizer = toy.build_tokenizer(toy.LEVELS[1], load_config().data.prompt_template)
    return Policy(toy.build_model(tokenizer, **SIZES[size]), tokenizer, toy.build_image_processor())


def sample_of(visual: int, index: int = 0) -> Sample:
    """A question about an image of noise that gives so many visual tokens."""
    # One visual token is 28 × 28 pixels; other numbers than those of PIXELS are multiples of 10.
    width, height = PIXELS.get(visual, (28 * visual // 10, 280))
    generator = torch.Generator().manual_seed(index)
    noise = torch.randint(0, 256, (height, width, 3), dtype=torch.uint8, generator=generator)
    image = Image.fromarray(noise.numpy())
    return Sample(str(index), (image,), f"<image>{QUESTION}", answer="6")


def prompts_of(policy: Policy, visual: int, count: int = 1) -> list[Prompt]:
    template = load_config().data.prompt_template
    return [
        encode_prompt(
            sample_of(visual, index),
            index,
            policy.tokenizer,
            image_processor=policy.image_processor,
            template=template,
        )
        for index in range(count)
    ]


def step_of(policy: Policy, samples: list[Sample], config, world: World = ALONE) -> Callable:
    """A function that runs one training step, always of the same samples, and returns metrics."""
    optimizer = torch.optim.AdamW(
        [weight for weight in policy.parameters() if weight.requires_grad],
        lr=1e-6,
        fused=world.device.type == "cuda",
    )
    sampler = SimpleNamespace(take=lambda n: list(range(n)))
    turn = itertools.count()

    def reward(*_) -> int:
        """Rewards that differ within each group, else there would be nothing to learn."""
        return next(turn) % 3

    training = train.Training(
        config,
        world,
        policy,
        optimizer=optimizer,
        dataset=samples,
        sampler=sampler,
        custom_reward=reward,
    )

    def run() -> dict:
        row, _ = train.train_step(training, step=1)
        return row

    return run


# ------------------------------------------------------------------------------ counting operations


def count(module: torch.nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


def operations(
    policy: Policy, visual: int, length: int, *, new: int, group: int, packed: bool
) -> float:
    """Multiply-adds of one forward: vision tower, linear layers, attention, language-model head.

    Each layer is counted for all tokens. Packed, the last one leaves a part of that out.

    length: tokens of the prompt, of which `visual` are the image's. new: tokens of a response.
    """
    text = policy.hf.config.text_config
    if packed:
        images = 1
        own = group * (new - 1)
        tokens = length + own
        pairs = length**2 / 2 + own * (length + new / 2)
    else:
        images = group
        tokens = group * (length + new)
        pairs = group * (length + new) ** 2 / 2
    linear = tokens * count(policy.hf.model.language_model.layers)
    attention = 2 * pairs * text.hidden_size * text.num_hidden_layers
    head = group * new * text.hidden_size * text.vocab_size
    return images * image_operations(policy, visual) + linear + attention + head


def image_operations(policy: Policy, visual: int) -> float:
    """Multiply-adds of the vision tower for one image."""
    vision = policy.hf.config.vision_config
    patches = 4 * visual
    # The merger runs once per four patches, all else once per patch.
    merger = count(policy.hf.model.visual.merger)
    tower = count(policy.hf.model.visual) - merger * 3 / 4
    # Most blocks attend within windows, some to the whole image.
    window = (vision.window_size // vision.patch_size) ** 2
    full = len(vision.fullatt_block_indexes)
    seen = full * patches + (vision.depth - full) * min(window, patches)
    return patches * tower + 2 * patches * vision.hidden_size * seen


# ---------------------------------------------------------------------------------- time and memory


def seconds(way: Callable[[], object]) -> float:
    gc.collect()
    started = time.perf_counter()
    way()
    return time.perf_counter() - started


def growth_of_memory(job: Callable[[], object]) -> float:
    """Megabytes by which resident memory rises while a job runs, seen every two milliseconds."""
    megabytes = [resident_bytes() / 2**20]
    done = threading.Event()

    def watch():
        while not done.wait(0.002):
            megabytes.append(resident_bytes() / 2**20)

    watcher = threading.Thread(target=watch)
    watcher.start()
    job()
    done.set()
    watcher.join()
    return max(megabytes) - megabytes[0]


# ------------------------------------------------------------------------------------- measurements


def measurement(
    row: str,
    setting: str,
    *,
    ours: float,
    theirs: float,
    ratio: float,
    low: float,
    high: float,
    target: str,
    note: str = "",
) -> dict:
    """One line of the bench: what was measured for a row, in one setting."""
    return {
        "row": row,
        "setting": setting,
        "ours": ours,
        "theirs": theirs,
        "ratio": ratio,
        "low": low,
        "high": high,
        "target": target,
        "note": note,
    }


def line(measured: dict) -> str:
    """The measurement in words."""
    return (
        "{row:<10} {setting:<34} ours {ours:8.3f}  theirs {theirs:8.3f}  "
        "ratio {ratio:5.2f} ({low:.2f} … {high:.2f})  target {target}  {note}"
    ).format(**measured)


def compare(
    row: str,
    setting: str,
    *,
    ours: Callable[[], object],
    theirs: Callable[[], object],
    rounds: int,
    target: str,
    note: str = "",
) -> dict:
    """Time two ways by turns. The ratio is theirs / ours, above 1 where ours is faster."""
    # The first call of each way is its warm-up.
    ours()
    theirs()
    pairs = [(seconds(ours), seconds(theirs)) for _ in range(rounds)]
    ratios = [theirs_seconds / ours_seconds for ours_seconds, theirs_seconds in pairs]
    return measurement(
        row,
        setting,
        ours=statistics.median(pair[0] for pair in pairs),
        theirs=statistics.median(pair[1] for pair in pairs),
        ratio=statistics.median(ratios),
        low=min(ratios),
        high=max(ratios),
        target=target,
        note=note,
    )
