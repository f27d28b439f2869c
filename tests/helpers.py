"""What several test files share: how a test runs train.py, and how it reads what the run left."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from safetensors.torch import load_file

ROOT = Path(__file__).resolve().parents[1]

# A reward that a random policy can differ in: it has nothing to do with the task.
REWARD = '''
def vowels(response, answer, sample):
    """One twentieth for each vowel."""
    return sum(letter in "aeiou" for letter in response) / 20 + 0 * len(sample.images)
'''

SMALL_RUN = [
    "rollout.prompts_per_step=4",
    "rollout.group_size=3",
    "rollout.max_new_tokens=12",
    "train.steps=2",
    "eval.samples=5",
    "eval.every=2",
    "checkpoint.every=2",
    "optim.lr=1e-3",
]


def small_run(tmp_path: Path, folder: str, *overrides: str) -> list[str]:
    """The arguments of train.py for a run of seconds, tmp_path / folder.

    The fixture `start` puts the model and the reward that they name into tmp_path. Overrides win
    over SMALL_RUN.
    """
    return [
        str(ROOT / "config.yaml"),
        f"run.dir={tmp_path / folder}",
        f"model.path={tmp_path / 'model'}",
        f"reward.custom={tmp_path / 'reward.py'}:vowels",
        *SMALL_RUN,
        *overrides,
    ]


def launch(
    *command: str, processes: int = 2, timeout: float = 300
) -> subprocess.CompletedProcess[str]:
    """Run a script and its arguments under torchrun, in the project's folder."""
    launcher = ["torch.distributed.run", "--standalone", f"--nproc-per-node={processes}"]
    return subprocess.run(
        [sys.executable, "-m", *launcher, *command],
        cwd=ROOT,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=timeout,
    )


def torchrun(tmp_path: Path, folder: str, *overrides: str) -> None:
    """A small run on two gloo processes: what the fixture `start` does on one."""
    done = launch("train.py", *small_run(tmp_path, folder, *overrides))
    assert done.returncode == 0, done.stderr
    assert "warning: no report" not in done.stdout
    assert (tmp_path / folder / "report.html").exists()


def rows_of(folder: Path, timeless: bool = True) -> list[dict]:
    """The rows of a run's metrics.jsonl.

    Timeless rows are without times and memory, which do not repeat.
    """
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    if not timeless:
        return rows
    varying = ("time/", "memory/")
    return [
        {key: value for key, value in row.items() if not key.startswith(varying)} for row in rows
    ]


def weights_of(folder: Path) -> dict:
    """The weights that a run ended with, by name."""
    return load_file(folder / "final" / "model.safetensors")


def same_run(tmp_path: Path, one: Path, two: Path) -> None:
    """Assert that two runs from tmp_path / "model" drew the same samples and learned the same.

    Losses and gradient norms agree to 1e-3: sums in another order differ by rounding, and so do
    the steps that follow from them.
    """
    for a, b in zip(rows_of(one), rows_of(two), strict=True):
        assert a == pytest.approx(b, rel=1e-3, abs=1e-6)
        assert a.get("reward/mean") == b.get("reward/mean")
    before = load_file(tmp_path / "model" / "model.safetensors")
    a = weights_of(one)
    b = weights_of(two)
    moved = max(float((a[name] - before[name]).abs().max()) for name in a)
    # AdamW divides by the gradient's own size, so where a gradient is rounding, its step is too:
    # compare in the mean.
    difference = sum(float((a[name] - b[name]).abs().sum()) for name in a)
    apart = difference / sum(weights.numel() for weights in a.values())
    print(f"weights moved by up to {moved:.1e} and are {apart:.1e} apart in the mean")
    assert moved > 1e-3
    assert apart < 1e-4 * moved
