"""distributed.py: the processes of a run, their errors, sums over them, and weights they share.

Every process works on whole groups: its share of the step's prompts. Where there are several, each
also holds a share of every weight, gradient and optimizer state (FSDP2, `shard`). The weights of a
layer are gathered while it runs, and all weights at once for a rollout (`gathered`).

Collective calls must be the same on every process. One that has no work for a pass makes an idle
pass instead (model.Policy.idle).
"""

import contextlib
import json
import os
import signal
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor

from rows import printable


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


ALONE = World(0, 1, torch.device("cpu"))


def start() -> World:
    """Join the process group that torchrun announces, or be alone.

    Where there are GPUs, each process has one of its own.
    """
    size = int(os.environ.get("WORLD_SIZE", 1))
    local_rank = int(os.environ.get("LOCAL_RANK", 0))
    has_gpu = torch.cuda.is_available()
    device = torch.device("cuda", local_rank) if has_gpu else torch.device("cpu")
    if device.type == "cuda":
        torch.cuda.set_device(device)
    if size > 1:
        dist.init_process_group(
            "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo", timeout=timedelta(hours=1)
        )
    return World(int(os.environ.get("RANK", 0)), size, device)


def stop() -> None:
    if dist.is_initialized():
        dist.destroy_process_group()


# ---------------------------------------------------------------------- errors of several processes


class SharedError(ValueError):
    """An error that one process met, raised on every process."""


def together(
    world: World,
    action: Callable,
    *arguments,
    expected: tuple[type[Exception], ...] = (ValueError, OSError),
) -> Any:
    """What action(*arguments) returns on this process. Collective.

    If an expected error is raised on any process, all of them raise a SharedError with its text,
    so that none goes on and waits for another that has left.
    """
    if world.size == 1:
        return action(*arguments)
    value = None
    problem = None
    try:
        value = action(*arguments)
    except expected as error:
        problem = str(error)
    problems = [text for text in world.gather(problem) if text is not None]
    if problems:
        raise SharedError(problems[0])
    return value


def on_main(world: World, action: Callable, *arguments, **options) -> Any:
    """What action(*arguments) returns on the main process, for all. `options`: of `together`."""

    def act_on_main():
        return action(*arguments) if world.is_main else None

    return world.gather(together(world, act_on_main, **options))[0]


# How long the process that says an error waits to hear whether the others have met the same one.
SECONDS_TO_LISTEN = 1.0


@contextlib.contextmanager
def said_once(*expected: type[Exception]):
    """Let an error out of one process alone; the others leave without a word.

    The processes that torchrun starts on one machine say one error between them: the first. What
    the others meet later follows from it, such as a lost connection. An expected error of one
    process becomes a SharedError that names it, unless all processes have met the same. So does a
    connection that is lost although no process has noted an error.
    """
    try:
        yield
    except (Exception, KeyboardInterrupt) as error:
        first = _first_note(error)
        if first is not None:
            leave_for_launcher(f"error: {first}")
            sys.exit(1)
        if _has_lost_another(error):
            reason = str(error).split(". ")[0]
            error = SharedError(f"another process has ended without a word, or fails ({reason})")
        elif not isinstance(error, expected):
            raise
        if dist.is_initialized() and not _all_met(error):
            error = SharedError(f"process {_rank()}: {error}")
        leave_for_launcher(f"error: {error}")
        raise error


def another_has_failed() -> bool:
    """Whether another process of this launch has noted an error, so that this one has to leave."""
    return any(note["rank"] != _rank() for note in _read_notes())


def _has_lost_another(error: BaseException) -> bool:
    """Whether a collective call failed because another process has gone."""
    # Gloo's errors have no class of their own.
    is_of_gloo = isinstance(error, RuntimeError) and "gloo/transport" in str(error)
    return is_of_gloo or isinstance(error, dist.DistError)


def _all_met(error: Exception) -> bool:
    """Whether all processes of this machine note this error, soon enough."""
    count = int(os.environ.get("LOCAL_WORLD_SIZE", 1))
    end = time.monotonic() + SECONDS_TO_LISTEN
    while time.monotonic() < end:
        if sum(note["error"] == _text(error) for note in _read_notes()) >= count:
            return True
        time.sleep(0.02)
    return False


def _first_note(error: BaseException) -> str | None:
    """Note an error for the other processes. Returns the first one, if another process met it."""
    path = _path_of_notes()
    if path is None:
        return None
    # torchrun ends the others as soon as one has left. What is to be said shall be said before.
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    line = json.dumps({"rank": _rank(), "error": _text(error)}) + "\n"
    with contextlib.suppress(OSError), open(path, "ab", buffering=0) as file:
        file.write(line.encode())  # one write: lines of several processes do not mix
    notes = _read_notes()
    if not notes or notes[0]["rank"] == _rank():
        return None
    return notes[0]["error"]


def _read_notes() -> list[dict]:
    """Rank and error of the processes of this launch that have met one, the first one first."""
    path = _path_of_notes()
    if path is None or not path.exists():
        return []
    return [json.loads(line) for line in path.read_text().splitlines()]


def _path_of_notes() -> Path | None:
    """A file that the processes of this machine share; None for a process that is alone.

    torchrun gives each one FOLDER/LOCAL_RANK/error.json, in a FOLDER that is new for each attempt.
    It is there before the processes have found each other, and after they have lost each other.
    """
    own = Path(os.environ.get("TORCHELASTIC_ERROR_FILE", ""))
    return own.parent.parent / "errors.jsonl" if own.name == "error.json" else None


def _text(error: BaseException) -> str:
    return str(error) or type(error).__name__


def _rank() -> int:
    return int(os.environ.get("RANK", 0))


def leave_for_launcher(message: str) -> None:
    """Leave an error where torchrun looks for it, so that the launcher's last lines show it."""
    path = os.environ.get("TORCHELASTIC_ERROR_FILE")
    if path:
        error = {"message": printable(message), "timestamp": str(int(time.time()))}
        with contextlib.suppress(OSError):
            Path(path).write_text(json.dumps(error))


# -------------------------------------------------------------------------------- sharded weights


def shard(policy, world: World) -> None:
    """FSDP2: keep this process's share of the policy's weights. Alone, nothing changes. Collective.

    Each decoder layer is a unit of its own, gathered while it runs. Embeddings, head, last norm and
    vision tower are one more unit, gathered for a whole forward and again for the backward, so that
    passes with and without images gather the same. Gradients are summed and not averaged, because
    losses are divided by normalisers of all processes. Only the trained weights of a unit must have
    one dtype: with LoRA the frozen ones beside them have 16 bits, and all are gathered in 16.
    """
    if world.size == 1:
        return
    mixed = MixedPrecisionPolicy(
        param_dtype=None if policy.dtype == torch.float32 else policy.dtype,
        reduce_dtype=torch.float32,
        cast_forward_inputs=False,
    )
    mesh = init_device_mesh(world.device.type, (world.size,))
    for unit in (*policy.hf.model.language_model.layers, policy):
        fully_shard(unit, mesh=mesh, mp_policy=mixed, reshard_after_forward=True)
        unit.set_gradient_divide_factor(1.0)
        unit.set_force_sum_reduction_for_comms(True)
    policy.idle()  # the module that runs first becomes FSDP's root


@contextlib.contextmanager
def gathered(policy):
    """The weights whole on every process, gathered once and not for each token. Collective."""
    units = [unit for unit in policy.modules() if isinstance(unit, FSDPModule)]
    for unit in units:
        unit.set_reshard_after_forward(False, recurse=False)
        unit.unshard()
    try:
        yield
    finally:
        for unit in units:
            unit.set_reshard_after_forward(True, recurse=False)
            unit.reshard()


def whole(tree, keep: bool = True):
    """A tree of dicts, lists and tensors, with whole tensors on the CPU. Collective.

    keep: False leaves None in place of each tensor, on processes that only help to gather.
    """
    if isinstance(tree, dict):
        return {key: whole(value, keep) for key, value in tree.items()}
    if isinstance(tree, list):
        return [whole(value, keep) for value in tree]
    if not isinstance(tree, Tensor):
        return tree
    tree = tree.full_tensor() if isinstance(tree, DTensor) else tree
    return tree.detach().cpu() if keep else None


def share(tensor: Tensor, like: Tensor) -> Tensor:
    """A whole tensor, or this process's share of it where `like` is sharded."""
    if not isinstance(like, DTensor):
        return tensor
    return distribute_tensor(
        tensor.to(like.device), like.device_mesh, like.placements, src_data_rank=None
    )
