"""The row `decode` of the bench: how near decoding comes to what the machine could do.

A step decodes one token of each of 4 prompts × 8 responses, in the middle of responses of 64
tokens, behind 100 visual tokens. Its bound is the longer of two times: that of reading all weights,
keys and values once at the bandwidth of a large sum, and that of its products at the speed of a
large one. Both speeds are measured between the rollouts, with the same threads.
"""

from __future__ import annotations

import statistics
from collections.abc import Iterator
from functools import partial

import torch

import decoder
from model import Policy
from rollout import _Wave, generate
from tools.counted import CAPTURE, released_policy, step_of, sums, wave_of
from tools.counting import as_on_cuda, bytes_of, without_numbers
from tools.measuring import GROUP, SIZES, policy_of, prompts_of, seconds

PROMPTS = 4
VISUAL = 100
NEW = 64  # tokens of a response
ROUNDS = 3


def bandwidth() -> float:
    """Bytes per second of a sum over more memory than any cache holds."""
    numbers = torch.ones(2**26)
    return bytes_of(numbers) / min(seconds(numbers.sum) for _ in range(3))


def arithmetic() -> float:
    """Operations per second of a large product, two for each multiply-add."""
    size = 1024
    matrix = torch.ones(size, size)
    with torch.no_grad():
        times = [seconds(partial(decoder.linear, matrix, matrix)) for _ in range(3)]
    return 2 * size**3 / min(times)


def wave_in_the_middle(policy: Policy, length: int) -> _Wave:
    """A wave that has decoded half of the tokens; length: tokens of a prompt."""
    return wave_of(policy, GROUP, PROMPTS, length=length, visual=VISUAL, own=NEW // 2)


def least_bytes(wave: _Wave, weights: float) -> float:
    """What a step has to read: the weights, and the keys and values that are there."""
    cached = [*wave.layout.shared.values(), *wave.layout.own.values()]
    return weights + sum(bytes_of(x) for pair in cached for x in pair)


def seconds_of_a_step(policy: Policy, prompts: list) -> float:
    """The mean over the steps of a rollout, without its prefill."""

    def rollout(new: int) -> float:
        settings = {"key": (0, 0), "capture": CAPTURE}
        return seconds(partial(generate, policy, prompts, GROUP, new, **settings))

    # With one token there is a prefill and no step.
    return (rollout(NEW) - rollout(1)) / (NEW - 1)


def measured(size: str) -> dict:
    """The measurements of a policy of SIZES, in ROUNDS rounds."""
    policy = policy_of(size)
    policy.eos_ids = set()  # nobody stops early
    prompts = prompts_of(policy, VISUAL, PROMPTS)
    wave = wave_in_the_middle(policy, len(prompts[0].input_ids))
    counted = sums(step_of(wave))
    least = least_bytes(wave, counted["weights"] * 1e9)
    generate(policy, prompts, GROUP, 2, key=(0, 0), capture=CAPTURE)  # warm-up

    rows = PROMPTS * GROUP
    speeds, bounds = [], []
    for _ in range(ROUNDS):
        to_read = least / bandwidth()
        to_compute = counted["teraflop"] * 1e12 / arithmetic()
        bounds.append(rows / max(to_read, to_compute))
        speeds.append(rows / seconds_of_a_step(policy, prompts))
    shares = [speed / bound for speed, bound in zip(speeds, bounds, strict=True)]
    return {
        "counted": counted,
        "tokens_per_second": statistics.median(speeds),
        "bound": statistics.median(bounds),
        "share": statistics.median(shares),
        "low": min(shares),
        "high": max(shares),
    }


def decode() -> Iterator[dict]:
    """Kernels and bytes of a step; on this machine also tokens per second, beside the bound."""
    print(f"bandwidth {bandwidth() / 1e9:.1f} GB/s, products {arithmetic() / 1e9:.0f} GFLOP/s")
    for size in SIZES:
        row = measured(size)
        print(line(size, row["counted"]), in_words(row), flush=True)
        yield {"row": "decode", "setting": size, **row}
    with without_numbers():
        policy = released_policy("3B")
    with as_on_cuda():
        counted = sums(step_of(wave_in_the_middle(policy, length=VISUAL + 20)))
    print(line("3B, on a GPU", counted))
    yield {"row": "decode", "setting": "3B", "counted": counted}


def line(setting: str, counted: dict) -> str:
    """What a step of all rows launches and reads."""
    read = 1000 * counted["read"]
    weights = 1000 * counted["weights"]
    kernels = counted["kernels"]
    return f"{setting:<13} {kernels:5d} kernels, {read:6.0f} MB read, {weights:6.0f} of weights"


def in_words(row: dict) -> str:
    return (
        "{tokens_per_second:8.0f} tokens/s, bound {bound:6.0f}: "
        "{share:.0%} of it ({low:.0%} … {high:.0%})"
    ).format(**row)
