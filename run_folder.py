"""run_folder.py: a run's folder: logs, checkpoints, resume, files that are whole or absent."""

import contextlib
import fcntl
import json
import os
import re
import shutil
import tempfile
import warnings
from pathlib import Path

import torch


class RowError(ValueError):
    """A file of rows that cannot be read."""


def read_jsonl(path: str | Path, growing: bool = False) -> list[tuple[int, dict]]:
    """(line number, object) of each line that is not blank; the last line of a `growing` file may be half-written and is left out
    then. Raises RowError."""
    content = Path(path).read_bytes()
    if growing:
        content = content[: content.rfind(b"\n") + 1]
    rows = []
    for line, raw in enumerate(content.split(b"\n"), start=1):
        try:
            row = json.loads(raw) if raw.strip() else {}
        except (ValueError, RecursionError) as error:
            raise RowError(f"{path}, line {line}: {error}; expected a JSON object") from None
        if not isinstance(row, dict):
            raise RowError(f"{path}, line {line}: found {row!r:.60}; expected a JSON object")
        if raw.strip():
            rows.append((line, row))
    return rows


def append_jsonl(path: str | Path, rows: list[dict]) -> None:
    """Add rows to a file, over what a crash may have left half-written at its end."""
    with open(path, "ab+") as file:
        if file.tell():
            file.seek(-1, os.SEEK_END)
            if file.read() != b"\n":
                file.truncate(Path(path).read_bytes().rfind(b"\n") + 1)
        file.writelines(json.dumps(row).encode() + b"\n" for row in rows)


def save_examples(folder: str | Path, step: int, examples: list[dict]) -> None:
    path = Path(folder) / "examples" / f"step-{step:08d}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    write_file(path, json.dumps({"step": step, "examples": examples}).encode())


def drop_examples(folder: str | Path, step: int) -> None:
    """Remove the examples of evaluations after `step`, which will be made again."""
    for path in (Path(folder) / "examples").glob("step-" + 8 * "[0-9]" + ".json"):
        if int(path.stem.removeprefix("step-")) > step:
            path.unlink()


# -------------------------------------------------------------------------------------------------------- checkpoints


def sync(path: Path) -> None:
    """Flush a file or a folder to the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_folder(target: Path, fill) -> None:
    """Make the folder `target` in one step: fill(path) writes a folder beside it, which is flushed and renamed."""
    target.parent.mkdir(parents=True, exist_ok=True)
    beside = Path(tempfile.mkdtemp(dir=target.parent, prefix=f"{target.name}.partial-"))
    beside.chmod(0o755)
    fill(beside)
    for path in sorted(beside.rglob("*")):
        sync(path)
    sync(beside)
    if target.exists():
        remove_folder(target)
    os.rename(beside, target)
    sync(target.parent)


def write_file(target: Path, content: bytes) -> None:
    """Replace a file in one step."""
    beside = target.with_name(f"{target.name}.partial-file")
    beside.write_bytes(content)
    sync(beside)
    os.replace(beside, target)


class FolderError(OSError):
    """A folder that cannot be written to, or that another process writes to."""


@contextlib.contextmanager
def exclusive(folder: Path, option: str):
    """Have a folder to oneself, until the block or the process ends. Raises FolderError, which names the option that sets it."""
    with contextlib.ExitStack() as stack:
        try:
            folder.mkdir(parents=True, exist_ok=True)
            fcntl.flock(
                stack.enter_context(open(folder / ".lock", "w")), fcntl.LOCK_EX | fcntl.LOCK_NB
            )
        except BlockingIOError:
            raise FolderError(
                f"{folder}: another process is writing there; set {option} to a new folder"
            ) from None
        except OSError as error:
            raise FolderError(
                f"{option}: expected a folder that can be written to and locked, found {str(folder)!r} ({error})"
            ) from error
        yield


def remove_folder(path: Path) -> None:
    """Remove a folder such that, cut short, it is no longer taken for a whole one."""
    doomed = path.with_name(f"{path.name}.partial-removed")
    os.rename(path, doomed)
    _remove(doomed)


def _remove(folder: Path) -> None:
    try:
        shutil.rmtree(folder)
    except OSError as error:  # a file that some process on a network file system has open: no reason to end a run
        warnings.warn(
            f"{folder} cannot be removed now ({error}); the next start tries again", stacklevel=3
        )


def save_checkpoint(folder: Path, step: int, tensors: dict, facts: dict, keep_last: int) -> None:
    """Write folder/step-N with tensors.pt and facts.json, then remove all but the newest `keep_last`."""

    def fill(path: Path) -> None:
        torch.save(tensors, path / "tensors.pt")
        (path / "facts.json").write_text(json.dumps(facts))

    write_folder(folder / f"step-{step:08d}", fill)
    for old in checkpoints(folder)[:-keep_last]:
        remove_folder(old)


def checkpoints(folder: Path) -> list[Path]:
    """Complete checkpoints, oldest first; what else is there, such as a copy of one under another name, is nobody's business."""
    return sorted(
        path
        for path in folder.glob("step-*")
        if path.is_dir() and re.fullmatch(r"step-\d{8,}", path.name)
    )


def remove_partial(folder: Path) -> None:
    """Remove what saves that were cut short left behind."""
    for path in folder.glob("*.partial-*"):
        _remove(path) if path.is_dir() else path.unlink()


def read_facts(checkpoint: Path) -> dict:
    return json.loads((checkpoint / "facts.json").read_text())


def read_tensors(checkpoint: Path) -> dict:
    """The tensors of a checkpoint, on the CPU. Nothing in it is executed."""
    return torch.load(checkpoint / "tensors.pt", map_location="cpu", weights_only=True, mmap=True)
