"""folder.py: the folder of a run: run.json says of what, responses.jsonl holds the responses.

A run that was stopped goes on from what its folder holds. Each process but the main one writes to
a file of its own, which `merge` takes into responses.jsonl.
"""

import contextlib
import json
from pathlib import Path

import run_folder
from benchmarks.files import BenchmarkError
from benchmarks.responses import (
    RESPONSES,
    Responses,
    read_responses,
    read_settings,
    response_row,
)

# Keys of run.json that stand for the content of something whose name may change: a copy of a
# model is the same model.
HASHED = {"weights": "model", "rows": "data"}


def responses_path(folder: Path, rank: int) -> Path:
    """Where a process writes."""
    return folder / (RESPONSES if rank == 0 else f"responses.rank{rank}.jsonl")


def open_folder(
    folder: Path, settings: dict, order: list[str], stack: contextlib.ExitStack
) -> dict[str, list[int]]:
    """Begin a run in its folder, or go on with it.

    order: the indices of the benchmark's rows. The folder is this process's until the stack is
    left. Returns {index: samples} of the responses that it holds. Raises BenchmarkError if it
    holds another run, FolderError if another process writes there.
    """
    stack.enter_context(run_folder.exclusive(folder, "--out"))
    responses_there = any(path.stat().st_size for path in folder.glob("responses*.jsonl"))
    # A folder without any response holds no run yet: a command that failed may have left it.
    if (folder / "run.json").exists() and responses_there:
        before = read_settings(folder)
        # What an earlier version left out is not known of the responses that are there.
        settings = {key: value for key, value in settings.items() if key in before}
        changes = _changes(before, settings)
        if changes:
            raise BenchmarkError(
                f"{folder} holds a run with another {', '.join(changes)}; set --out to a new folder"
            )
    elif responses_there:
        raise BenchmarkError(
            f"{folder} holds responses but no run.json that says of what; set --out to a new folder"
        )
    content = json.dumps(settings, indent=1) + "\n"
    run_folder.write_file(folder / "run.json", content.encode())
    responses = merge(folder, order, settings["sample"])
    return {index: list(texts) for index, texts in responses.items()}


def _changes(before: dict, settings: dict) -> list[str]:
    """What differs from the run that the folder holds, in words."""
    changes = []
    for key in settings:
        if key in HASHED.values() or before.get(key) == settings[key]:
            continue
        name = HASHED.get(key, key)
        if before.get(name) == settings[name]:
            changes.append(f"{name} ({settings[name]!r} has another content now)")
        else:
            changes.append(f"{name} ({before.get(name)!r}, now {settings[name]!r})")
    return changes


def merge(folder: Path, order: list[str], count: int) -> Responses:
    """All responses of a run, which become one file in the order of the rows.

    Half-written last lines are dropped. Nothing is lost if this is interrupted. count: responses to
    each row.
    """
    responses: Responses = {}
    parts = sorted(folder.glob("responses.rank*.jsonl"))
    for path in [folder / RESPONSES, *parts]:
        if path.exists():
            for index, texts in read_responses(path, growing=True).items():
                responses[index] = texts | responses.get(index, {})
    lines = []
    for index in order:
        for sample, text in sorted(responses.get(index, {}).items()):
            lines.append(json.dumps(response_row(index, sample, text, count=count)) + "\n")
    run_folder.write_file(folder / RESPONSES, "".join(lines).encode())
    for path in parts:
        path.unlink()
    return responses
