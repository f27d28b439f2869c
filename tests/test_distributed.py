"""distributed.py: checkpoints that are whole or absent, and two processes that do what one does."""

import os
import pickle
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from helpers import rows_of, same_run, torchrun

import run_folder
import train


def test_a_folder_appears_whole_or_not_at_all(tmp_path):
    def broken(path):
        (path / "half").write_text("x")
        raise OSError("disk full")

    run_folder.write_folder(tmp_path / "a", lambda path: (path / "file").write_text("old"))
    with pytest.raises(OSError):
        run_folder.write_folder(tmp_path / "a", broken)
    assert (tmp_path / "a" / "file").read_text() == "old"
    assert len(list(tmp_path.iterdir())) == 2
    run_folder.remove_partial(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["a"]
    run_folder.write_folder(tmp_path / "a", lambda path: (path / "file").write_text("new"))
    assert (tmp_path / "a" / "file").read_text() == "new"


def test_checkpoints_round_trip_and_are_bounded(tmp_path):
    for step in (2, 9, 10):
        run_folder.save_checkpoint(
            tmp_path, step, {"w": torch.full((3,), float(step))}, {"step": step}, keep_last=2
        )
    (tmp_path / "step-00000011.partial-x").mkdir()
    assert [path.name for path in run_folder.checkpoints(tmp_path)] == [
        "step-00000009",
        "step-00000010",
    ]
    newest = run_folder.checkpoints(tmp_path)[-1]
    assert run_folder.read_facts(newest) == {"step": 10}
    assert torch.equal(run_folder.read_tensors(newest)["w"], torch.full((3,), 10.0))


def test_a_checkpoint_cannot_run_code(tmp_path):
    class Evil:
        def __reduce__(self):
            return os.mkdir, (str(tmp_path / "ran"),)

    folder = tmp_path / "step-00000001"
    folder.mkdir()
    torch.save({"w": Evil()}, folder / "tensors.pt")
    with pytest.raises(pickle.UnpicklingError):
        run_folder.read_tensors(folder)
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize(
    "extra", [[], ["algo.name=dapo", "algo.dynamic_sampling=false", "algo.mask_truncated=false"]]
)
def test_two_processes_do_what_one_does(start, tmp_path, extra):
    """Same global batch, weights whole on one process and sharded over two."""
    one = start("optim.warmup_steps=1", *extra, folder="one")
    torchrun(tmp_path, "two", "optim.warmup_steps=1", *extra)
    same_run(tmp_path, one, tmp_path / "two")


def test_a_process_without_a_useful_group_goes_along(start, tmp_path):
    """Dynamic sampling drops all groups of the second process.

    Both end well, with what the first one learned.
    """
    (tmp_path / "one_sided.py").write_text(
        "import os, sys, train\n"
        "turn = iter(range(10**6))\n"
        "on_first = os.environ['RANK'] == '0'\n"
        "train.rewards.accuracy = lambda text, answer: float(on_first and next(turn) % 2)\n"
        "train.main(sys.argv[1:])\n"
    )
    start("train.steps=1", folder="warm")
    command = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--standalone",
        "--nproc-per-node=2",
        str(tmp_path / "one_sided.py"),
        str(Path(train.__file__).with_name("config.yaml")),
        f"model.path={tmp_path / 'model'}",
        f"run.dir={tmp_path / 'run'}",
        "algo.name=dapo",
        "algo.mask_truncated=false",
        "algo.max_refills=0",
        "train.steps=2",
        "rollout.prompts_per_step=4",
        "rollout.group_size=2",
        "rollout.max_new_tokens=4",
        "eval.samples=2",
    ]
    environment = {
        **os.environ,
        "OMP_NUM_THREADS": "1",
        "PYTHONPATH": str(Path(train.__file__).parent),
    }
    done = subprocess.run(
        command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr
    rows = rows_of(tmp_path / "run")
    assert [row["step"] for row in rows] == [0, 1, 2] and all(
        row["policy/grad_norm"] > 0 for row in rows[1:]
    )
    assert rows[1]["reward/accuracy"] == 0.25 and rows[1]["reward/constant_groups"] == 0.5


def test_the_error_of_one_process_ends_all(start, tmp_path):
    """A rank that fails must not leave the other waiting."""
    (tmp_path / "bad.py").write_text(
        "import os\ndef f(response, answer, sample):\n    if os.environ['RANK'] == '1':\n"
        "        raise ValueError('rank one is ill')\n    return 0.0\n"
    )
    start("train.steps=1", folder="warm")
    command = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--standalone",
        "--nproc-per-node=2",
        "train.py",
        "config.yaml",
        f"model.path={tmp_path / 'model'}",
        f"reward.custom={tmp_path / 'bad.py'}:f",
        f"run.dir={tmp_path / 'ill'}",
        "train.steps=1",
        "rollout.prompts_per_step=4",
        "rollout.group_size=2",
        "rollout.max_new_tokens=4",
        "eval.samples=2",
    ]
    done = subprocess.run(
        command,
        cwd=Path(train.__file__).parent,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode != 0 and "rank one is ill" in done.stderr
