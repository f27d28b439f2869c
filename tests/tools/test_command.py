"""Every command ends in one line or without a word, and never in a traceback."""

import contextlib
import importlib
import io
import os
import runpy
import sys
from pathlib import Path

import pytest
import torch

from tools.command import command

ROOT = Path(__file__).parents[2]
OBSERVED = ["--model", "toy", "--data", "toy", "--out", "nowhere"]
# Command -> its arguments, and the function in which it then does its work.
WORK = {
    "tools.ablate": (["--dry-run", "--out", "nowhere"], "run_grid"),
    "tools.agreement": ([], "installed"),
    "tools.bench": (["step"], "measure"),
    "tools.credit": (OBSERVED, "run_credit"),
    "tools.estimate": ([], "plan"),
    "tools.export": (["checkpoint", "folder"], "export"),
    "tools.gradient": (OBSERVED, "run_gradient"),
    "tools.import_dataset": (["x.parquet", "--out", "nowhere"], "import_files"),
    "tools.intervene": (OBSERVED, "run_intervene"),
    "tools.report": (["folder"], "write"),
    "tools.roles": (OBSERVED, "run_roles"),
    "tools.trl_peer": (["3M", "600", "4", "2"], "step_seconds"),
    "tools.walkthrough": ([], "prepare"),
    "evaluate": (["score", "--benchmark", "MME", "--data", "x", "--responses", "y"], "score"),
}


def interrupt(*_, **__):
    raise KeyboardInterrupt


def print_much(*_, **__):
    """More than a buffer holds, so that a closed output is noticed here."""
    for _ in range(10_000):
        print("a line of text")


def call(module_name: str, monkeypatch, work) -> None:
    """Run a command that does `work` instead of its own."""
    if module_name == "tools.trl_peer":
        pytest.importorskip("trl")
    module = importlib.import_module(module_name)
    arguments, function = WORK[module_name]
    monkeypatch.setattr(module, function, work)
    module.main(arguments)


@contextlib.contextmanager
def closed_output(monkeypatch):
    """Standard output is a pipe that nobody reads any more."""
    reader, writer = os.pipe()
    os.close(reader)
    file = os.fdopen(writer, "w")
    monkeypatch.setattr(sys, "stdout", file)
    yield
    file.close()  # raises BrokenPipeError if it still holds something for the reader


def test_all_tools_are_tried():
    files = (ROOT / "tools").glob("*.py")
    tools = {f"tools.{path.stem}" for path in files if "__main__" in path.read_text()}
    assert WORK.keys() == tools | {"evaluate"}


@pytest.mark.parametrize("module", WORK)
def test_ctrl_c_is_one_line(module, monkeypatch, capsys):
    with pytest.raises(SystemExit) as leaving:
        call(module, monkeypatch, interrupt)
    assert leaving.value.code == 130
    (line,) = capsys.readouterr().err.splitlines()
    assert line in ("stopped", "stopped; the same command goes on")


@pytest.mark.parametrize("module", WORK)
def test_a_closed_output_ends_a_command_without_a_word(module, monkeypatch, capsys):
    with closed_output(monkeypatch):
        call(module, monkeypatch, print_much)
    assert capsys.readouterr().err == ""


class Interrupted(io.StringIO):
    def write(self, text):
        raise KeyboardInterrupt


@pytest.mark.parametrize("file", ["dyco.py", "toy.py"])
def test_files_of_the_core_that_print_something_end_as_well(file, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", [file])
    with closed_output(monkeypatch):
        runpy.run_path(str(ROOT / file), run_name="__main__")
    monkeypatch.setattr(sys, "stdout", Interrupted())
    with pytest.raises(SystemExit) as leaving:
        runpy.run_path(str(ROOT / file), run_name="__main__")
    assert leaving.value.code == 130
    assert capsys.readouterr().err == "stopped\n"


def test_a_lack_of_memory_is_one_line_and_another_runtime_error_is_not():
    on_cpu = "[enforce fail at alloc_cpu.cpp:127] err == 0. can't allocate memory"
    on_gpu = torch.OutOfMemoryError("Tried to allocate 2 GiB.")
    for error in (on_gpu, RuntimeError(on_cpu), MemoryError("Unable to allocate 2 GiB")):
        with pytest.raises(SystemExit, match="^error: out of memory .*take less$"), command():
            raise error
    with pytest.raises(RuntimeError, match="shapes"), command(ValueError):
        raise RuntimeError("shapes do not match")


def test_an_expected_error_is_one_line_and_another_is_not():
    with pytest.raises(SystemExit, match="^error: no such folder$"), command(ValueError):
        raise ValueError("no such folder")
    with pytest.raises(TypeError), command(ValueError):
        raise TypeError("a bug")
