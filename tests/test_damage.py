"""Runs whose disk, checkpoints, samples or figures come to harm: said in one line, nothing lost."""

import errno
import json
import os
import stat
from types import SimpleNamespace

import pytest
import torch
from helpers import rows_of, small_run, weights_of
from safetensors.torch import load_file

import run_folder
import train
from config import load_config
from data import DataError
from rows import excerpt, read_jsonl
from tools import export


def flip_bytes(file) -> None:
    """64 bytes in the middle, as a bad disk or cable would."""
    content = bytearray(file.read_bytes())
    middle = len(content) // 2
    content[middle : middle + 64] = bytes(byte ^ 0xFF for byte in content[middle : middle + 64])
    file.write_bytes(bytes(content))


def cut(file) -> None:
    os.truncate(file, file.stat().st_size - 5000)


def empty(file) -> None:
    file.write_bytes(b"")


@pytest.mark.parametrize(
    "name, harm",
    [
        ("tensors.pt", flip_bytes),
        ("tensors.pt", cut),
        ("tensors.pt", empty),
        ("tensors.pt", os.remove),
        ("facts.json", empty),
        ("checksums.json", os.remove),
    ],
)
def test_a_damaged_checkpoint_is_named_and_the_same_command_goes_on(start, capsys, name, harm):
    folder = start("train.steps=2", "checkpoint.every=1")
    harm(folder / "checkpoints" / "step-00000002" / name)
    with pytest.raises(SystemExit) as caught:
        start("train.steps=3", "checkpoint.every=1")
    error = capsys.readouterr().err.splitlines()[-1]
    assert caught.value.code == 2
    assert error.startswith("error: ") and "step-00000002" in error and "step-00000001" in error
    assert (folder / "checkpoints" / "step-00000002.damaged").is_dir()
    start("train.steps=3", "checkpoint.every=1")
    assert "resumed" in capsys.readouterr().out
    assert [row["step"] for row in rows_of(folder)] == [0, 1, 2, 3]


def test_a_log_that_ends_before_the_checkpoint_is_said(start, capsys):
    folder = start()
    lines = (folder / "metrics.jsonl").read_text().splitlines(keepends=True)
    (folder / "metrics.jsonl").write_text("".join(lines[:-1]))
    with pytest.raises(SystemExit):
        start("train.steps=3")
    error = capsys.readouterr().err
    assert "metrics.jsonl ends at step 1, and the checkpoint is of step 2" in error


@pytest.mark.parametrize("name", ["config.yaml", "final", "report.html"])
def test_what_no_run_wrote_is_not_overwritten(start, tmp_path, capsys, name):
    (tmp_path / "mine").mkdir()
    if name == "final":
        (tmp_path / "mine" / name).mkdir()
    else:
        (tmp_path / "mine" / name).write_text("my own")
    with pytest.raises(SystemExit):
        start(folder="mine")
    assert f"holds {name} but no metrics.jsonl: no run wrote that" in capsys.readouterr().err
    assert not (tmp_path / "mine" / "metrics.jsonl").exists()


def test_a_full_disk_loses_nothing(start, monkeypatch, capsys):
    plain = run_folder.save_checkpoint

    def save(folder, step, tensors, facts, keep_last):
        if step == 2:
            raise OSError(errno.ENOSPC, "No space left on device")
        plain(folder, step, tensors, facts=facts, keep_last=keep_last)

    with monkeypatch.context() as patch, pytest.raises(SystemExit) as caught:
        patch.setattr(run_folder, "save_checkpoint", save)
        start("train.steps=3", "checkpoint.every=1")
    error = capsys.readouterr().err.splitlines()[-1]
    assert caught.value.code == 2
    assert "step 2: no checkpoint could be written to" in error
    assert "the same command goes on from step-00000001" in error
    broken = start("train.steps=3", "checkpoint.every=1")
    whole = start("train.steps=3", "checkpoint.every=1", folder="whole")
    assert rows_of(broken) == rows_of(whole)


def test_a_disk_that_will_not_do_is_said_at_the_start(start, monkeypatch, capsys):
    monkeypatch.setattr(run_folder.shutil, "disk_usage", lambda path: SimpleNamespace(free=1e6))
    start("train.steps=1")
    assert "warning: checkpoints and final/ will need" in capsys.readouterr().out


def test_final_has_the_modes_of_the_umask(start):
    old = os.umask(0o022)
    try:
        folder = start("train.steps=1")
    finally:
        os.umask(old)
    for path in (folder / "final").iterdir():
        assert stat.S_IMODE(path.stat().st_mode) == 0o644
    assert stat.S_IMODE((folder / "final").stat().st_mode) == 0o755


def test_a_sample_that_vanishes_does_not_cost_the_steps_before(start, monkeypatch, capsys):
    plain = train.collect

    def collect(training, drawn, step):
        if step == 3:
            raise DataError("image a.png is gone")
        return plain(training, drawn, step)

    settings = ("train.steps=4", "checkpoint.every=100", "eval.every=100")
    with monkeypatch.context() as patch, pytest.raises(SystemExit):
        patch.setattr(train, "collect", collect)
        start(*settings)
    said = capsys.readouterr()
    assert "saved step 2" in said.out
    assert said.err.splitlines()[-1] == "error: image a.png is gone"
    broken, whole = start(*settings), start(*settings, folder="whole")
    assert rows_of(broken) == rows_of(whole)
    for name, weight in weights_of(whole).items():
        assert torch.equal(weight, weights_of(broken)[name])


@pytest.mark.parametrize(
    "error, said_last",
    [
        (DataError("image b.png is gone"), "image b.png is gone"),
        (torch.OutOfMemoryError("no room"), "out of memory at the evaluation of"),
    ],
)
def test_an_evaluation_that_fails_does_not_cost_the_steps_before(
    error, said_last, start, monkeypatch, capsys
):
    plain = train.evaluate.held_out
    calls = []

    def held_out(*arguments, **options):
        calls.append(1)
        if len(calls) == 2:  # the first one is of step 0
            raise error
        return plain(*arguments, **options)

    settings = ("train.steps=4", "checkpoint.every=100", "eval.every=3")
    with monkeypatch.context() as patch, pytest.raises(SystemExit):
        patch.setattr(train.evaluate, "held_out", held_out)
        start(*settings)
    said = capsys.readouterr()
    assert "saved step 3; the same command goes on with its evaluation" in said.out
    assert said.err.splitlines()[-1].startswith(f"error: {said_last}")
    broken, whole = start(*settings), start(*settings, folder="whole")
    assert "held out at step 3" in capsys.readouterr().out
    assert rows_of(broken) == rows_of(whole)


def test_the_last_evaluation_is_made_up_for_if_it_fails(start, monkeypatch, capsys):
    settings = ("train.steps=2", "eval.every=100")
    whole = start(*settings, folder="whole")
    with monkeypatch.context() as patch, pytest.raises(SystemExit):
        patch.setattr(train, "evaluation_or_save", evaluation_without_images)
        start(*settings)
    broken = start(*settings)
    assert (broken / "final").exists()
    assert rows_of(broken) == rows_of(whole)
    examples = [sorted(path.name for path in (f / "examples").iterdir()) for f in (broken, whole)]
    assert examples[0] == examples[1]


def evaluation_without_images(training, folder, row):
    """What train.evaluation_or_save does where an image of the held-out set is gone."""
    folder.record(row)
    folder.save(training, row["step"])
    raise DataError("image b.png is gone")


def test_a_second_signal_stops_at_once(tmp_path, monkeypatch):
    said = []
    monkeypatch.setattr(train.signal, "signal", lambda number, handler: None)
    folder = SimpleNamespace(path=tmp_path, step=0, say=said.append)
    stop = train.Stop(load_config(), folder)
    stop.step = 7
    stop(2, None)
    assert stop.asked
    assert said == ["finishing step 7, then saving; once more to stop now, losing 7 steps"]
    with pytest.raises(KeyboardInterrupt):
        stop(2, None)


def test_an_interrupt_at_the_start_is_one_line(start, monkeypatch, capsys):
    def interrupted(config, world):
        raise KeyboardInterrupt

    monkeypatch.setattr(train, "build", interrupted)
    with pytest.raises(SystemExit) as caught:
        start()
    assert caught.value.code == 130
    assert capsys.readouterr().err.splitlines()[-1].startswith("stopped; the same command")


@pytest.mark.parametrize(
    "figure, unhealthy, healthy, cause",
    [
        ("reward/constant_groups", 1.0, 0.9, "the references match no answer"),
        ("response/truncated", 1.0, 0.5, "rollout.max_new_tokens (64) is too small"),
        ("policy/entropy", 1e-5, 0.1, "has collapsed"),
        ("policy/entropy", 9.0, 0.1, "the weights are damaged"),
        ("policy/kl", 2.0, 0.05, "optim.lr is too high"),
    ],
)
def test_figures_out_of_bounds_for_20_steps_are_one_warning(figure, unhealthy, healthy, cause):
    watch = run_folder.Watch(load_config())
    rows = [unhealthy] * 19 + [healthy] + [unhealthy] * 40
    said = [watch.warnings({figure: value}) for value in rows]
    assert [step for step, warnings in enumerate(said) if warnings] == [39]
    (warning,) = said[39]
    assert warning.startswith("warning: for 20 steps ") and cause in warning


def test_a_custom_reward_is_seen_everywhere(start, capsys):
    folder = start()
    row = rows_of(folder)[1]
    assert row["reward/custom"] == pytest.approx(row["reward/mean"], abs=1e-6)
    samples = [row for _, row in read_jsonl(folder / "samples.jsonl")]
    assert all("custom" in sample for sample in samples)
    assert "custom 0." in capsys.readouterr().out


def test_what_a_model_writes_does_not_reach_the_terminal_raw():
    assert excerpt("a\x1b[31m\x00b") == "a\\x1b[31m\\x00b"
    assert excerpt("x" * 400) == "x" * 300 + " …"


def test_a_checkpoint_becomes_a_model_folder(start, tmp_path, capsys):
    folder = start("checkpoint.every=1")
    checkpoint = folder / "checkpoints" / "step-00000002"
    export.main([str(checkpoint), str(tmp_path / "exported")])
    exported = load_file(tmp_path / "exported" / "model.safetensors")
    for name, weight in weights_of(folder).items():
        assert torch.equal(weight, exported[name])
    with pytest.raises(SystemExit, match="exists; expected the name of a new folder"):
        export.main([str(checkpoint), str(tmp_path / "exported")])
    flip_bytes(checkpoint / "tensors.pt")
    with pytest.raises(SystemExit, match="is not what was saved"):
        export.main([str(checkpoint), str(tmp_path / "again")])


def test_text_of_a_data_file_is_not_obeyed_by_the_terminal(tmp_path, capsys):
    """Neither in what ends a run, which is of several lines, nor in what it says."""
    row = {"id": "\x1b[2J", "image": "\x1b[31m\u202e.png", "question": "<image>?", "answer": "1"}
    (tmp_path / "rows.jsonl").write_text(json.dumps(row) + "\n")
    with pytest.raises(SystemExit) as caught:
        data = f"data.path={tmp_path / 'rows.jsonl'}"
        train.main(small_run(tmp_path, "run", "reward.custom=null", data))
    said = capsys.readouterr().err
    assert caught.value.code == 2
    assert "line 1: " in said and r"\x1b[31m\u202e.png" in said
    assert all(line.isprintable() for line in said.splitlines())
    run_folder.say("a \x1b[31m\nb")
    assert capsys.readouterr().out == "a \\x1b[31m\nb\n"
