"""metrics.py: the figures of a step, as rows of metrics.jsonl and samples.jsonl.

docs/metrics.md says what each of them means, and where it is healthy. Means are over the tokens,
responses or groups of all processes.
"""

import os
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from torch import Tensor

from distributed import World


class Clock:
    """Seconds of each stage, the device's work included."""

    def __init__(self, device: torch.device):
        self.device = device
        self.seconds: dict[str, float] = {}
        self.last = time.perf_counter()
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats()

    def lap(self, stage: str) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize()
        now = time.perf_counter()
        self.seconds[f"time/{stage}"] = now - self.last
        self.last = now


def means(pairs: dict[str, tuple], world: World) -> dict[str, float]:
    """{name: (sum, count)} of each process -> {name: sum / count} over all processes.

    Names whose count is 0 are left out.
    """
    mine = [[float(total), float(count)] for total, count in pairs.values()]
    sums = world.sum(torch.tensor(mine, dtype=torch.float64)).tolist()
    return {
        name: total / count for name, (total, count) in zip(pairs, sums, strict=True) if count > 0
    }


def describe_responses(collected: list, world: World) -> dict[str, float]:
    """Means over all responses of a step, those included that dynamic sampling dropped."""
    responses = sum(batch.rewards.numel() for batch in collected)
    groups = sum(len(batch.rewards) for batch in collected)

    def total(measure: Callable[..., Tensor]) -> float:
        return sum(float(measure(batch).sum()) for batch in collected)

    def constant_groups(batch) -> Tensor:
        return (batch.rewards == batch.rewards[:, :1]).all(1)

    pairs = {
        "reward/mean": (total(lambda batch: batch.rewards.double()), responses),
        "reward/accuracy": (total(lambda batch: batch.accuracy), responses),
        "reward/format": (total(lambda batch: batch.format), responses),
        "reward/constant_groups": (total(constant_groups), groups),
        "response/length": (total(lambda batch: batch.rollout.mask), responses),
        "response/truncated": (total(lambda batch: batch.rollout.truncated), responses),
    }
    if all(batch.custom is not None for batch in collected):
        pairs["reward/custom"] = (total(lambda batch: batch.custom), responses)
    return means(pairs, world)


def describe_tokens(batch, world: World) -> dict[str, float]:
    """DyCo's own figures: means over the response tokens of the batch."""
    mask, signals = batch.rollout.mask, batch.rollout.signals
    has_role = batch.roles != 0
    values = {
        "visual_share": batch.roles > 0,
        "text_share": batch.roles < 0,
        "neutral_share": mask & ~has_role,
        **signals._asdict(),
    }
    pairs = {f"dyco/{name}": (x.sum(), mask.sum()) for name, x in values.items()}
    pairs["dyco/alignment"] = (batch.scores.sum(), has_role.sum())
    return means(pairs, world)


def describe_updates(updates: list[dict]) -> dict:
    """Means over the updates of a step; what was skipped is added up."""
    row = {}
    for name in sorted({name for logged in updates for name in logged}):
        values = [logged[name] for logged in updates if name in logged]
        if name == "skipped_prompts":
            row[f"policy/{name}"] = [prompt for prompts in values for prompt in prompts]
        elif name == "skipped_updates":
            row[f"policy/{name}"] = sum(values)
        else:
            row[f"policy/{name}"] = sum(values) / len(values)
    return row


def describe_memory(world: World) -> dict[str, float]:
    row = {}
    resident = resident_bytes()
    if resident is not None:
        row["memory/resident_gb"] = resident / 1e9
    if world.device.type == "cuda":
        row["memory/peak_gb"] = torch.cuda.max_memory_allocated() / 1e9
    return row


def sample_rows(training, batch, step: int) -> Iterator[dict]:
    """Some responses for samples.jsonl, with the role and score of each token.

    The first response of each group comes first, then the second of each, and so on.
    """
    rollout, tokenizer = batch.rollout, training.policy.tokenizer
    count = training.config.log.samples_per_step
    order = [
        row
        for response in range(rollout.group_size)
        for row in range(response, len(rollout.texts), rollout.group_size)
    ]
    for row in order[:count]:
        group, response = divmod(row, rollout.group_size)
        prompt, mask = rollout.prompts[group], rollout.mask[row]
        described = {
            "step": step,
            "id": prompt.id,
            "question": prompt.question,
            "answer": prompt.answer,
            "response": rollout.texts[row],
            "reward": float(batch.rewards[group, response]),
            "accuracy": float(batch.accuracy[group, response]),
            "tokens": [tokenizer.decode(token) for token in rollout.tokens[row][mask].tolist()],
        }
        if batch.custom is not None:
            described["custom"] = float(batch.custom[group, response])
        if batch.roles is not None:
            described["roles"] = batch.roles[row][mask].tolist()
            described["scores"] = [round(x, 4) for x in batch.scores[row][mask].tolist()]
        yield described


def resident_bytes() -> int | None:
    """Memory of this process that is in RAM; None where there is no /proc."""
    statm = Path("/proc/self/statm")
    if not statm.exists():
        return None
    pages = int(statm.read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE")
