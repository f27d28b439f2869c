"""distributed.py: the processes of a run, sums over them, and weights that they share out.

Every process works on whole groups: its share of the step's prompts. Where there are several, each
also holds a share of every weight, gradient and optimizer state (FSDP2, `shard`). The weights of a
layer are gathered while it runs, and all weights at once for a rollout (`gathered`).

Collective calls must be the same on every process. One that has no work for a pass makes an idle
pass instead (model.Policy.idle).
"""

import contextlib
import os
from dataclasses import dataclass
from datetime import timedelta

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor


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


# -------------------------------------------------------------------------------- sharded weights


def shard(policy, world: World) -> None:
    """FSDP2: keep this process's share of the policy's weights. Alone, nothing changes. Collective.

    Each decoder layer is a unit of its own, gathered while it runs. Embeddings, head, last norm and
    vision tower are one more unit, gathered for a whole forward and again for the backward, so that
    passes with and without images gather the same. Gradients are summed and not averaged, because
    losses are divided by normalisers of all processes.
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
