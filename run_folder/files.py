"""files.py: files and folders that are whole or absent, locks, and rows that belong to steps."""

import contextlib
import fcntl
import json
import math
import os
import re
import shutil
import tempfile
import warnings
from collections.abc import Callable, Iterable
from pathlib import Path

from rows import append_jsonl


class RunError(RuntimeError):
    """A run that cannot start or go on."""


class FolderError(OSError):
    """A folder that cannot be written to, or that another process writes to."""


# ---------- files that are whole or absent


def sync(path: Path) -> None:
    """Flush a file or a folder to the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_file(target: Path, content: bytes) -> None:
    """Replace a file in one step."""
    beside = target.with_name(f"{target.name}.partial-file")
    beside.write_bytes(content)
    sync(beside)
    os.replace(beside, target)


def write_folder(target: Path, fill: Callable[[Path], None], replace: bool = True) -> None:
    """Make the folder `target` in one step.

    fill(path) writes a folder beside it, which is flushed to the disk and then renamed. Where there
    is a target already, it is replaced, or with replace=False kept.
    """
    target.parent.mkdir(parents=True, exist_ok=True)
    beside = Path(tempfile.mkdtemp(dir=target.parent, prefix=f"{target.name}.partial-"))
    fill(beside)
    umask = os.umask(0)
    os.umask(umask)
    beside.chmod(0o777 & ~umask)  # mkdtemp and safetensors allow nobody but the owner
    for path in sorted(beside.rglob("*")):
        path.chmod((0o777 if path.is_dir() else 0o666) & ~umask)
        sync(path)
    sync(beside)
    if replace and target.exists():
        remove_folder(target)
    try:
        os.rename(beside, target)
    except OSError:  # of a target that is there
        if replace or not target.exists():
            raise
        _remove(beside)
    sync(target.parent)


def remove_folder(path: Path) -> None:
    """Remove a folder such that, cut short, it is no longer taken for a whole one."""
    doomed = path.with_name(f"{path.name}.partial-removed")
    os.rename(path, doomed)
    _remove(doomed)


def _remove(folder: Path) -> None:
    try:
        shutil.rmtree(folder)
    except OSError as error:
        # On a network file system some process may have a file of it open: no reason to end a run.
        message = f"{folder} cannot be removed now ({error}); the next start tries again"
        warnings.warn(message, stacklevel=3)


def remove_partial(folder: Path) -> None:
    """Remove what writes that were cut short left behind."""
    for path in folder.glob("*.partial-*"):
        if path.is_dir():
            _remove(path)
        else:
            path.unlink()


def make_folder(folder: Path, option: str) -> None:
    """Make a folder, and find out now whether it can be written to, not after the work.

    Raises FolderError, which names the option that sets the folder.
    """
    with _refusal(folder, option):
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass


def check_place(folder: Path, option: str) -> None:
    """Find out whether `make_folder` could make a folder, without leaving one behind.

    Raises FolderError, as `make_folder` would.
    """
    with _refusal(folder, option):
        existing = folder
        while not existing.exists():
            existing = existing.parent
        with tempfile.TemporaryFile(dir=existing):
            pass


@contextlib.contextmanager
def _refusal(folder: Path, option: str):
    """Say an OSError as a FolderError of the option that sets the folder."""
    try:
        yield
    except OSError as error:
        raise FolderError(
            f"{option}: expected a folder that can be written to, found {str(folder)!r} ({error})"
        ) from error


@contextlib.contextmanager
def exclusive(folder: Path, option: str):
    """Have a folder to oneself, until the block or the process ends.

    Raises FolderError, which names the option that sets the folder.
    """
    with contextlib.ExitStack() as stack:
        try:
            folder.mkdir(parents=True, exist_ok=True)
            lock = stack.enter_context(open(folder / ".lock", "a"))
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            # A fork, such as the one of a custom reward, would hold it beyond this process's end.
            os.register_at_fork(after_in_child=lock.close)
        except BlockingIOError:
            raise FolderError(
                f"{folder}: another process is writing there; set {option} to a new folder"
            ) from None
        except OSError as error:
            raise FolderError(
                f"{option}: expected a folder that can be written to and locked, "
                f"found {str(folder)!r} ({error})"
            ) from error
        yield


# ---------- rows


def append_finite(path: Path, rows: Iterable[dict]) -> None:
    """`append_jsonl`, without figures that are not finite."""

    def is_finite(value) -> bool:
        return not isinstance(value, float) or math.isfinite(value)

    append_jsonl(
        path, [{key: value for key, value in row.items() if is_finite(value)} for row in rows]
    )


def supersede(path: Path, step: int) -> None:
    """Before the steps after `step` are computed again: move their rows to NAME.superseded.jsonl.

    Half a line at the end goes. Raises RunError for a line that is no row of a step.
    """
    lines = path.read_bytes().splitlines(keepends=True) if path.exists() else []
    kept, superseded = [], []
    for number, line in enumerate(lines, start=1):
        if not line.endswith(b"\n"):
            continue
        try:
            is_later = json.loads(line)["step"] > step
        except (ValueError, TypeError, KeyError):
            raise RunError(
                f"{path}, line {number}: expected an object with a step, found {line[:60]!r}; "
                "take the line out"
            ) from None
        if is_later:
            superseded.append(line)
        else:
            kept.append(line)
    if superseded:
        with open(path.with_suffix(".superseded.jsonl"), "ab") as file:
            file.writelines(superseded)
    if len(kept) < len(lines):
        write_file(path, b"".join(kept))


def last_step(path: Path) -> int | None:
    """The step of the last whole line of a file of steps; −1 if there is none.

    None if that line cannot be read: what to do then is `supersede`'s to say.
    """
    lines = path.read_bytes().splitlines(keepends=True) if path.exists() else []
    whole = [line for line in lines if line.endswith(b"\n")]
    if not whole:
        return -1
    try:
        return int(json.loads(whole[-1])["step"])
    except (ValueError, TypeError, KeyError):
        return None


def save_examples(folder: str | Path, step: int, examples: list[dict]) -> None:
    """Write the held-out responses of an evaluation, for the report."""
    path = Path(folder) / "examples" / f"step-{step:08d}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    write_file(path, json.dumps({"step": step, "examples": examples}).encode())


def drop_examples(folder: str | Path, step: int) -> None:
    """Remove the examples of evaluations after `step`, which will be made again."""
    for path in (Path(folder) / "examples").glob("step-*.json"):
        number = re.fullmatch(r"step-(\d{8})\.json", path.name)
        if number and int(number[1]) > step:
            path.unlink()
