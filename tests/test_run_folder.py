"""run_folder: files that are whole or absent, and what a run says and notes of itself."""

import json
import os
import pickle
import platform
import re
import shlex
import shutil
import subprocess
import sys
import tempfile
from datetime import datetime
from pathlib import Path

import pytest
import torch
from helpers import ROOT, launch

import dyco
import run_folder
import train
from rows import append_jsonl, read_jsonl
from run_folder import python_command
from run_folder.console import (
    _fit,
    _step_fields,
    describe_commit,
    held_out_curve,
    launch_command,
    step_lines,
)

# ---------------------------------------------------------------- files and checkpoints


def test_a_folder_appears_whole_or_not_at_all(tmp_path):
    def broken(path):
        (path / "half").write_text("x")
        raise OSError("disk full")

    def filled_with(text):
        return lambda path: (path / "file").write_text(text)

    run_folder.write_folder(tmp_path / "a", filled_with("old"))
    with pytest.raises(OSError):
        run_folder.write_folder(tmp_path / "a", broken)
    assert (tmp_path / "a" / "file").read_text() == "old"
    assert len(list(tmp_path.iterdir())) == 2
    run_folder.remove_partial(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["a"]
    run_folder.write_folder(tmp_path / "a", filled_with("new"))
    assert (tmp_path / "a" / "file").read_text() == "new"


def test_checkpoints_round_trip_and_are_bounded(tmp_path):
    for step in (2, 9, 10):
        tensors = {"w": torch.full((3,), float(step))}
        run_folder.save_checkpoint(tmp_path, step, tensors, facts={"step": step}, keep_last=2)
    (tmp_path / "step-00000011.partial-x").mkdir()
    saved = run_folder.checkpoints(tmp_path)
    assert [path.name for path in saved] == ["step-00000009", "step-00000010"]
    newest = saved[-1]
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


# ---------------------------------------------------------------- the line of a step

ROW = {
    "step": 120,
    "reward/mean": 1.234,
    "reward/accuracy": 0.5,
    "reward/format": 1.0,
    "reward/custom": 0.125,
    "response/length": 1024.0,
    "response/truncated": 0.25,
    "policy/entropy": 0.345,
    "policy/kl": 0.0123,
    "policy/clip_fraction": 0.012,
    "policy/grad_norm": 1.23,
    "dyco/visual_share": 0.25,
    "dyco/text_share": 0.5,
    "dyco/alignment": 0.44,
    "time/rollout": 8.0,
    "time/logprobs": 1.0,
    "time/update": 3.5,
}
HUGE = {
    **ROW,
    "step": 99_999,
    "reward/mean": -1234.567,
    "response/length": 32_768.0,
    "policy/kl": 123.4567,
    "policy/grad_norm": 123_456.78,
    "time/rollout": 12_345.6,
}
EVALUATED = {
    "step": 120,
    "eval/accuracy": 0.5,
    "eval/accuracy_greedy": 0.625,
    "eval/accuracy_swapped": 0.125,
}


def test_fields_stand_in_their_order_and_go_in_the_order_of_their_importance():
    assert _fit([(0, "a"), (2, "bb"), (1, "ccc")], width=12) == "a  bb  ccc"
    assert _fit([(0, "a"), (2, "bb"), (1, "ccc")], width=9) == "a  ccc"
    assert _fit([(0, "a"), (2, "bb"), (2, "ccc")], width=9) == "a  bb"  # the last of equals
    assert _fit([(0, "long"), (0, "words")], width=3) == "long  words"  # the most important stay


def test_a_step_line_loses_the_least_important_fields_first():
    fields = _step_fields(ROW, steps=120)
    whole = _fit(fields, width=1000).split("  ")
    assert whole == [
        "step 120/120",
        "reward 1.234",
        "right 50%",
        "format 100%",
        "custom 0.125",
        "len 1024",
        "cut 25%",
        "ent 0.345",
        "kl 0.0123",
        "clip 0.012",
        "grad 1.23",
        "vis/txt 25/50%",
        "align 0.44",
        "12.5 s",
    ]
    lost = []
    for width in range(200, 0, -1):
        shown = _fit(fields, width).split("  ")
        lost += [text for text in whole if text not in shown and text not in lost]
    assert lost == [
        "clip 0.012",
        "align 0.44",
        "vis/txt 25/50%",
        "grad 1.23",
        "kl 0.0123",
        "ent 0.345",
        "12.5 s",
        "cut 25%",
        "len 1024",
        "custom 0.125",
        "format 100%",
    ]
    assert shown == ["step 120/120", "reward 1.234", "right 50%"]


@pytest.mark.parametrize("row", [ROW, HUGE], ids=["usual", "huge"])
@pytest.mark.parametrize("columns, width", [(80, 80), (100, 100), (120, 120), (300, 120)])
def test_a_step_line_fits_the_terminal_and_120_columns(monkeypatch, row, columns, width):
    monkeypatch.setenv("COLUMNS", str(columns))
    (line,) = step_lines(row, steps=100_000)
    assert len(line) <= width
    for label in ("step ", "reward ", "right "):
        assert label in line
    assert row is HUGE or "  format 100%  custom 0.125  len 1024" in line


def test_without_a_terminal_a_step_line_fits_120_columns(monkeypatch):
    monkeypatch.delenv("COLUMNS", raising=False)
    (line,) = step_lines(HUGE, steps=100_000)
    assert len(line) <= 120


def test_an_evaluation_has_a_line_of_its_own():
    step, held_out = step_lines({**ROW, **EVALUATED}, steps=120)
    assert step == step_lines(ROW, steps=120)[0]
    assert held_out == (
        "held out at step 120: 50.0% right sampled, 62.5% greedy, 12.5% images swapped"
    )
    all_right = {**EVALUATED, "step": 1000, "eval/accuracy": 1.0, "eval/accuracy_greedy": 1.0}
    assert len(step_lines(all_right, steps=1000)[0]) <= 80
    # Before the first step there is nothing but the evaluation.
    assert step_lines(EVALUATED, steps=120) == [held_out]
    # eval.swapped=false leaves one figure out.
    two_figures = {key: EVALUATED[key] for key in ("step", "eval/accuracy", "eval/accuracy_greedy")}
    (line,) = step_lines(two_figures, steps=120)
    assert line.endswith("62.5% greedy")


# ---------------------------------------------------------------- what a run says of itself


def greeting(output: str) -> dict[str, str]:
    """The five lines with which a run begins: first word -> the rest, in their order."""
    lines = output.splitlines()
    first = next(place for place, line in enumerate(lines) if line.startswith("method "))
    return dict(line.split(maxsplit=1) for line in lines[first : first + 5])


def test_a_run_greets_with_what_it_is(start, tmp_path, capsys):
    start("train.steps=1", "eval.every=1")
    output = capsys.readouterr().out
    said = greeting(output)
    assert list(said) == ["method", "model", "data", "step", "run"]
    assert said["method"].startswith(f"grpo, DyCo rule paper: {dyco.RULES['paper'].what}; ")
    assert said["model"].startswith(str(tmp_path / "model"))
    assert "all trained; float32 on CPU" in said["model"]
    assert said["model"].endswith("1 process")
    assert re.search(r"^toy, [\d,]+ rows, [\d,]+ held out$", said["data"])
    assert said["step"] == "4 prompts × 3 responses, 2 updates; 1 steps"
    assert said["run"].startswith(f"{tmp_path / 'run'}; open {tmp_path / 'run' / 'report.html'}")
    lines = output.splitlines()
    assert sum(line.startswith("held out at step 0: ") for line in lines) == 1
    assert sum(line.startswith("held out at step 1: ") for line in lines) == 1
    assert sum(line.startswith("step 1/1  ") for line in lines) == 1


def test_a_run_without_held_out_data_says_so(start, tmp_path, capsys):
    (tmp_path / "rows.jsonl").write_text('{"question": "Sum circle.", "answer": "4"}\n' * 3)
    start(
        f"data.path={tmp_path / 'rows.jsonl'}",
        "train.steps=1",
        "dyco.enabled=false",
        "model.freeze_vision=true",
    )
    output = capsys.readouterr().out
    said = greeting(output)
    assert said["method"] == "grpo, DyCo off"
    assert re.search(r"weights, \d+% of them trained", said["model"])
    assert said["data"].endswith(
        "3 rows, none held out: there will be no held-out accuracy (see data.eval_path)"
    )
    assert "held out at step" not in output


def test_a_model_without_its_checkpoints_is_not_trained_away(start, capsys):
    folder = start("train.steps=1")
    model = (folder / "final" / "model.safetensors").read_bytes()
    shutil.rmtree(folder / "checkpoints")
    with pytest.raises(SystemExit):
        start("train.steps=2")
    assert "holds final/ but no checkpoint" in capsys.readouterr().err
    assert (folder / "final" / "model.safetensors").read_bytes() == model


def test_a_folder_of_somebody_else_keeps_its_files(start, tmp_path):
    folder = tmp_path / "run"
    (folder / "film.partial-1").mkdir(parents=True)
    (folder / "thesis.partial-2.docx").write_text("mine")
    (folder / ".lock").write_text("mine, too")
    start("train.steps=1")
    assert (folder / "film.partial-1").is_dir()
    assert (folder / "thesis.partial-2.docx").read_text() == "mine"
    assert (folder / ".lock").read_text() == "mine, too"


def test_a_control_is_said(start, capsys):
    start("train.steps=0", "dyco.control=shuffled", "eval.samples=2")
    assert greeting(capsys.readouterr().out)["method"].endswith("; control shuffled")


# ---------------------------------------------------------------- starts.jsonl


def test_every_start_is_a_row(start):
    start("train.steps=1")
    folder = start("train.steps=2")
    rows = [row for _, row in read_jsonl(folder / "starts.jsonl")]
    keys = [
        "step",
        "date",
        "command",
        "device",
        "dtype",
        "processes",
        "python",
        "torch",
        "transformers",
        "commit",
    ]
    assert [list(row) for row in rows] == [keys, keys]
    assert [row["step"] for row in rows] == [0, 1]
    newest = rows[1]
    assert datetime.fromisoformat(newest["date"]).tzinfo is not None
    assert shlex.split(newest["command"])[1:] == sys.argv
    assert newest["device"].startswith("CPU")
    assert newest["dtype"] == "float32"
    assert newest["processes"] == 1
    assert newest["python"] == platform.python_version()
    assert newest["torch"] == torch.__version__
    assert newest["commit"] == describe_commit()


def test_a_start_without_git_has_no_commit(monkeypatch):
    monkeypatch.setenv("PATH", "")
    assert describe_commit() is None


@pytest.mark.parametrize(
    "folder, on_path, expected",
    [
        ("my project", False, ".venv/bin/python"),
        ("elsewhere", True, "python"),
        ("elsewhere", False, "'{tmp_path}/my project/.venv/bin/python'"),
    ],
)
def test_the_python_command_runs_from_here(tmp_path, monkeypatch, folder, on_path, expected):
    """The command is tried in a shell; an environment that says its own name stands for Python."""
    executable = tmp_path / "my project" / ".venv" / "bin" / "python"
    executable.parent.mkdir(parents=True)
    executable.write_text('#!/bin/sh\necho this one, with "$@"\n')
    executable.chmod(0o755)
    (tmp_path / folder).mkdir(exist_ok=True)
    monkeypatch.chdir(tmp_path / folder)
    monkeypatch.setattr(sys, "executable", str(executable))
    if on_path:
        monkeypatch.setenv("PATH", str(executable.parent), prepend=os.pathsep)
    command = python_command()
    assert command == expected.format(tmp_path=tmp_path)
    done = subprocess.run(f"{command} train.py", shell=True, capture_output=True, text=True)
    assert done.stdout == "this one, with train.py\n"


@pytest.mark.parametrize(
    "environment, expected",
    [
        ({}, "bin/python train.py 'a b.yaml'"),
        (
            {"TORCHELASTIC_RUN_ID": "none", "LOCAL_WORLD_SIZE": "2", "GROUP_WORLD_SIZE": "1"},
            "bin/torchrun --nproc-per-node 2 train.py 'a b.yaml'",
        ),
        (
            {"TORCHELASTIC_RUN_ID": "none", "LOCAL_WORLD_SIZE": "8", "GROUP_WORLD_SIZE": "3"},
            "bin/torchrun --nnodes 3 --nproc-per-node 8 train.py 'a b.yaml'",
        ),
    ],
)
def test_the_command_of_a_start_can_be_typed_again(tmp_path, monkeypatch, environment, expected):
    """It starts as many processes, and its file names stay whole."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "executable", str(tmp_path / "bin" / "python"))
    monkeypatch.setattr(sys, "argv", ["train.py", "a b.yaml"])
    monkeypatch.delenv("TORCHELASTIC_RUN_ID", raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    assert launch_command() == expected


@pytest.mark.parametrize("last_step", [0, 9, 400, 123_456])
def test_the_held_out_curve_fits_80_columns(tmp_path, last_step):
    """Its first and last columns are the first and the last evaluation."""
    steps = range(0, last_step + 1, max(1, last_step // 40))
    rows = [{"step": step, "eval/accuracy": 0.5, "eval/accuracy_greedy": 1.0} for step in steps]
    append_jsonl(tmp_path / "metrics.jsonl", rows)
    head, *lines = held_out_curve(tmp_path / "metrics.jsonl").splitlines()
    assert {len(line) for line in lines} == {len(head)}
    assert len(head) <= 80
    columns = head.partition("at step")[2].split()
    assert columns[0] == "0"
    assert columns[-1] == str(steps[-1])
    assert len(columns) == min(len(steps), 10 if last_step < 10_000 else 7)


@pytest.mark.parametrize(
    "content, kept",
    [
        (b'{"a": 1}\n{"a": 2}', 2),  # an editor left the last line end out
        (b'{"a": 1}\n{"a": 2', 1),  # a crash cut the line short
        (b'{"a": 1}\n2', 1),
        (b'{"a": 1}', 1),
        (b"", 0),
    ],
)
def test_a_last_line_without_its_end_stays_if_it_is_whole(tmp_path, content, kept):
    file = tmp_path / "rows.jsonl"
    file.write_bytes(content)
    rows = [{"a": 1}, {"a": 2}][:kept]
    assert [row for _, row in read_jsonl(file, growing=True)] == rows
    append_jsonl(file, [{"a": 3}])
    assert [row for _, row in read_jsonl(file)] == [*rows, {"a": 3}]


def test_a_folder_is_tried_before_the_work(tmp_path, monkeypatch):
    run_folder.make_folder(tmp_path / "new" / "one", "--out")
    assert list((tmp_path / "new" / "one").iterdir()) == []
    (tmp_path / "file").touch()
    with pytest.raises(run_folder.FolderError, match="--out: expected a folder.*file.*File exists"):
        run_folder.make_folder(tmp_path / "file", "--out")

    def refuse(dir):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(tempfile, "TemporaryFile", refuse)
    with pytest.raises(run_folder.FolderError, match="--out: .*new'.*Permission denied"):
        run_folder.make_folder(tmp_path / "new", "--out")


def test_a_place_is_tried_without_a_folder_left_behind(tmp_path, monkeypatch):
    (tmp_path / "file").touch()
    run_folder.check_place(tmp_path, "--out")
    run_folder.check_place(tmp_path / "new" / "one", "--out")
    assert [path.name for path in tmp_path.iterdir()] == ["file"]
    monkeypatch.chdir(tmp_path)
    run_folder.check_place(Path("new"), "--out")
    for wrong in ("file", "file/below"):
        with pytest.raises(run_folder.FolderError, match=f"--out: .*found '{wrong}' .*directory"):
            run_folder.check_place(Path(wrong), "--out")


# ---------------------------------------------------------------- errors under torchrun


def run_with_a_mistake() -> None:
    with pytest.raises(SystemExit) as caught:
        train.main([str(ROOT / "config.yaml"), "tran.steps=3"])
    assert caught.value.code == 2


def test_an_error_is_left_for_the_launcher(tmp_path, monkeypatch, capsys):
    """torchrun shows what it finds in TORCHELASTIC_ERROR_FILE, which it sets for each process."""
    file = tmp_path / "0" / "error.json"
    file.parent.mkdir()
    monkeypatch.setenv("TORCHELASTIC_ERROR_FILE", str(file))
    run_with_a_mistake()
    left = json.loads(file.read_text())
    assert left["message"] == capsys.readouterr().err.splitlines()[-1]
    assert "did you mean 'train'?" in left["message"]
    assert left["timestamp"].isdigit()


def test_an_error_that_cannot_be_left_is_said_all_the_same(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("TORCHELASTIC_ERROR_FILE", str(tmp_path / "nowhere" / "error.json"))
    run_with_a_mistake()
    assert "did you mean 'train'?" in capsys.readouterr().err


def test_the_launchers_last_lines_hold_the_error():
    done = launch("train.py", "config.yaml", "tran.steps=3", processes=1)
    assert done.returncode != 0
    last_lines = "\n".join(done.stderr.splitlines()[-12:])
    assert "error: command line: unknown section 'tran'; did you mean 'train'?" in last_lines
