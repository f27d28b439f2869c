"""distributed.py: two processes do what one does, and none waits for another that has failed."""

import pytest
from helpers import ROOT, launch, rows_of, same_run, torchrun


@pytest.mark.parametrize(
    "extra", [[], ["algo.name=dapo", "algo.dynamic_sampling=false", "algo.mask_truncated=false"]]
)
def test_two_processes_do_what_one_does(start, tmp_path, extra):
    """Same global batch, weights whole on one process and sharded over two."""
    one = start("optim.warmup_steps=1", *extra, folder="one")
    torchrun(tmp_path, "two", "optim.warmup_steps=1", *extra)
    same_run(tmp_path, one, tmp_path / "two")


# Every other answer of the first process is right, and none of the second one's.
ONE_SIDED = f"""
import os, sys
sys.path.insert(0, {str(ROOT)!r})
import train
turn = iter(range(10**6))
on_first = os.environ["RANK"] == "0"
train.rewards.accuracy = lambda text, answer: float(on_first and next(turn) % 2)
train.main(sys.argv[1:])
"""

# It fails on the second process alone.
BAD_REWARD = """
import os
def f(response, answer, sample):
    if os.environ["RANK"] == "1":
        raise ValueError("rank one is ill")
    return 0.0
"""

# Two prompts a process, as few tokens as possible.
TINY = [
    "rollout.prompts_per_step=4",
    "rollout.group_size=2",
    "rollout.max_new_tokens=4",
    "eval.samples=2",
]


def test_a_process_without_a_useful_group_goes_along(start, tmp_path):
    """Dynamic sampling drops all groups of the second process.

    Both end well, with what the first one learned.
    """
    (tmp_path / "one_sided.py").write_text(ONE_SIDED)
    start("train.steps=1", folder="warm")
    done = launch(
        str(tmp_path / "one_sided.py"),
        "config.yaml",
        f"model.path={tmp_path / 'model'}",
        f"run.dir={tmp_path / 'run'}",
        "algo.name=dapo",
        "algo.mask_truncated=false",
        "algo.max_refills=0",
        "train.steps=2",
        *TINY,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    rows = rows_of(tmp_path / "run")
    assert [row["step"] for row in rows] == [0, 1, 2]
    assert all(row["policy/grad_norm"] > 0 for row in rows[1:])
    assert rows[1]["reward/accuracy"] == 0.25
    assert rows[1]["reward/constant_groups"] == 0.5


def test_the_error_of_one_process_ends_all(start, tmp_path):
    """A rank that fails must not leave the other waiting."""
    (tmp_path / "bad.py").write_text(BAD_REWARD)
    start("train.steps=1", folder="warm")
    done = launch(
        "train.py",
        "config.yaml",
        f"model.path={tmp_path / 'model'}",
        f"reward.custom={tmp_path / 'bad.py'}:f",
        f"run.dir={tmp_path / 'ill'}",
        "train.steps=1",
        *TINY,
        timeout=120,
    )
    assert done.returncode != 0
    assert "rank one is ill" in done.stderr
