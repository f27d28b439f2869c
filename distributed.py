"""distributed.py: start-up under torchrun or alone, reductions, and checkpoints that are whole or absent.

Every process holds the whole policy and works on whole groups; what crosses processes are gradients and a few scalars.
"""
import json
import os
import shutil
import tempfile
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor


@dataclass(frozen=True)
class World:
    """This process among all of the run."""
    rank: int
    size: int
    device: torch.device

    @property
    def is_main(self) -> bool:
        return self.rank == 0

    def sum(self, values: Tensor) -> Tensor:
        """Elementwise sum over all processes, in place."""
        if self.size > 1:
            dist.all_reduce(values)
        return values

    def gather(self, value) -> list:
        """Every process's value, in the order of ranks."""
        if self.size == 1:
            return [value]
        values = [None] * self.size
        dist.all_gather_object(values, value)
        return values

    def barrier(self) -> None:
        if self.size > 1:
            dist.barrier()

    def sum_gradients(self, parameters) -> None:
        """Sum gradients over processes; the loss was already divided by the global normaliser."""
        if self.size == 1:
            return
        for parameter in parameters:
            if parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)
            dist.all_reduce(parameter.grad)


ALONE = World(0, 1, torch.device("cpu"))


def start() -> World:
    """Join the process group that torchrun announces, or be alone. One GPU per process where there are any."""
    size, local = int(os.environ.get("WORLD_SIZE", 1)), int(os.environ.get("LOCAL_RANK", 0))
    device = torch.device("cuda", local) if torch.cuda.is_available() else torch.device("cpu")
    if device.type == "cuda":
        torch.cuda.set_device(device)
    if size > 1:
        dist.init_process_group("cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo", timeout=timedelta(hours=1))
    return World(int(os.environ.get("RANK", 0)), size, device)


def stop() -> None:
    if dist.is_initialized():
        dist.destroy_process_group()


# -------------------------------------------------------------------------------------------------------- checkpoints


def _sync(path: Path) -> None:
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
        _sync(path)
    _sync(beside)
    if target.exists():
        shutil.rmtree(target)
    os.rename(beside, target)
    _sync(target.parent)


def save_checkpoint(folder: Path, step: int, tensors: dict, facts: dict, keep_last: int) -> None:
    """Write folder/step-N with tensors.pt and facts.json, then remove all but the newest `keep_last`."""
    def fill(path: Path) -> None:
        torch.save(tensors, path / "tensors.pt")
        (path / "facts.json").write_text(json.dumps(facts))

    write_folder(folder / f"step-{step:08d}", fill)
    for old in checkpoints(folder)[:-keep_last]:
        shutil.rmtree(old)


def checkpoints(folder: Path) -> list[Path]:
    """Complete checkpoints, oldest first."""
    return sorted(path for path in folder.glob("step-*") if path.is_dir() and ".partial-" not in path.name)


def remove_partial(folder: Path) -> None:
    """Remove what saves that were cut short left behind."""
    for path in folder.glob("*.partial-*"):
        shutil.rmtree(path)


def read_facts(checkpoint: Path) -> dict:
    return json.loads((checkpoint / "facts.json").read_text())


def read_tensors(checkpoint: Path) -> dict:
    """The tensors of a checkpoint, on the CPU. Nothing in it is executed."""
    return torch.load(checkpoint / "tensors.pt", map_location="cpu", weights_only=True)
