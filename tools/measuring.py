"""What the rows of the bench measure with: tiny policies and prompts, seconds, memory, ratios."""

from __future__ import annotations

import gc
import os
import statistics
import threading
import time
from collections.abc import Callable
from functools import lru_cache

import torch
from PIL import Image

import toy
from config import load_config
from data import Prompt, Sample, encode_prompt
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
