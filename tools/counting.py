"""What a GPU would be given, counted without one: kernels, bytes, operations and waits.

`Counting` sees every call of PyTorch's kernels. `without_numbers` makes models of which nothing but
the shapes is there, so that they need not fit into memory. `as_on_cuda` takes the ways of a GPU.

What is counted, and what is not:

- A call of aten is one kernel, unless it makes a view or an empty tensor. A few launch several.
- A kernel reads each tensor that it is given and writes each that it returns, as large as they are.
  A tensor expanded over a dimension counts once. Look-ups and writes at indices touch what they
  look up and write. Nothing is served from a cache.
- Operations are those of products and attention, two for each multiply-add. Of causal attention the
  half that is masked counts as well.
- Nothing is compiled, as under model.compile=off.
"""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from unittest.mock import patch

import torch
import torch.nn.functional as F
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry

import attention

ROOT = str(Path(__file__).parent.parent)

WITHOUT_KERNEL = {
    "_unsafe_view",
    "device",
    "empty",
    "empty_like",
    "empty_strided",
    "lift_fresh",
    "new_empty",
    "new_empty_strided",
}
# Calls in which the host waits for the device. An index of truth values is another one.
WAITS = {
    "_local_scalar_dense",
    "_unique2",
    "bincount",
    "equal",
    "is_nonzero",
    "item",
    "lift_fresh",  # torch.tensor: the host hands a number over
    "masked_select",
    "nonzero",
    "repeat_interleave",
    "unique_consecutive",
    "unique_dim",
}
PRODUCTS = {"_scaled_mm", "addmm", "addmm_", "baddbmm", "bmm", "mm"}
LOOK_UPS = {"embedding", "gather", "index", "index_select"}
FILLS = {
    "arange",
    "fill_",
    "full",
    "new_zeros",
    "ones",
    "ones_like",
    "zero_",
    "zeros",
    "zeros_like",
}
# In these the tensor that is returned is that of the first argument, of which a part is written.
WRITES_AT_INDICES = {"index_copy_", "index_fill_", "index_put_", "scatter_add_"}
# What a kernel belongs to, by the innermost of these functions that called it. What the host
# computes for itself is not counted.
HOST = "host"
PART_OF_FUNCTION = {
    "Policy._pack": HOST,
    "PackedGroups._places": HOST,
    "_Wave._choose": "sampling",
    "Decoding.attend": "attention",
    "PackedGroups.attend": "attention",
    "TokenLogprobs.forward": "head",
    "TokenLogprobs.backward": "head",
}


@dataclass
class Kernel:
    """One call. Bytes are those of the memory of the device."""

    name: str  # of the call in aten
    part: str  # as in PART_OF_FUNCTION, or else "products", "casts" or "element-wise"
    place: str  # "file.py: function" of ours which asked for it, or the gradient of what it is
    read: int  # bytes
    written: int  # bytes
    weights: int  # bytes of weights among those read
    operations: int


def name_of(function) -> str:
    return function._schema.name.split("::")[1]


def bytes_of(tensor: Tensor) -> int:
    """What a tensor takes in memory; a dimension over which it was expanded counts once."""
    elements = 1
    for size, stride in zip(tensor.shape, tensor.stride(), strict=True):
        if stride or not size:
            elements *= size
    return elements * tensor.element_size()


def tensors_in(values) -> list[Tensor]:
    return [x for x in tree_leaves(values) if isinstance(x, Tensor)]


class Counting(TorchDispatchMode):
    """Keeps a Kernel of each call, in `kernels`, and the waits of the host, in `waits`."""

    def __init__(self, weights: Iterator[Tensor] = ()):
        super().__init__()
        self.kernels: list[Kernel] = []
        self.waits: list[str] = []
        # Of weights, and of what is cast from them or joined of them. They are kept, so that no
        # other tensor takes their place.
        self.weights = {self._key(weight): weight for weight in weights}

    @staticmethod
    def _key(tensor: Tensor) -> int:
        return tensor.untyped_storage()._cdata

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        output = function(*args, **kwargs)
        name = name_of(function)
        # `out` is only written to.
        given = tensors_in((args, {key: x for key, x in kwargs.items() if key != "out"}))
        if name in WAITS or _looks_for_truth(name, args):
            self.waits.append(name)
        if not function.is_view and name not in WITHOUT_KERNEL:
            self._count(function, name, given, output=output, args=args, kwargs=kwargs)
        return output

    def _count(self, function, name: str, given: list[Tensor], *, output, args, kwargs) -> None:
        part, place = _asked_by(sys._getframe(1))
        if part == HOST:
            return
        returned = tensors_in(output)
        read, written = _traffic(name, given, returned)
        weights = [x for x in given if self._key(x) in self.weights]
        if name in ("_to_copy", "cat") and len(weights) == len(given):
            self.weights |= {self._key(x): x for x in returned}
        operations = 0
        if function._overloadpacket in flop_registry:
            formula = flop_registry[function._overloadpacket]
            # The third argument of a product is the dtype of the result, which no formula knows.
            known = args[:2] if name in ("mm", "bmm") else args
            operations = formula(*known, **kwargs, out_val=output)
        self.kernels.append(
            Kernel(
                name=name,
                part=part or _part_of(name),
                place=place,
                read=read,
                written=written,
                weights=0 if name in LOOK_UPS else sum(map(bytes_of, weights)),
                operations=operations,
            )
        )


def _looks_for_truth(name: str, args) -> bool:
    """Whether an index is of truth values, whose number only the device knows."""
    if name not in ("index", "index_put_"):
        return False
    return any(x.dtype == torch.bool for x in tensors_in(args[1]))


def _traffic(name: str, given: list[Tensor], returned: list[Tensor]) -> tuple[int, int]:
    """Bytes that are read and written."""
    written = sum(map(bytes_of, returned))
    if name in FILLS:
        return 0, written
    if name in LOOK_UPS:
        return sum(map(bytes_of, given[1:])) + written, written
    if name in WRITES_AT_INDICES:
        others = sum(map(bytes_of, given[1:]))
        return others, max((bytes_of(x) for x in given[1:]), default=0)
    if name == "copy_":
        return bytes_of(given[-1]), bytes_of(given[0])
    return sum(map(bytes_of, given)), written


def _part_of(name: str) -> str:
    if "attention" in name:
        return "attention"
    if name in PRODUCTS:
        return "products"
    return "casts" if name == "_to_copy" else "element-wise"


def _asked_by(frame: FrameType | None) -> tuple[str | None, str]:
    """The part and the place of the innermost functions of ours, looking outwards from a frame."""
    part, place = None, None
    while frame is not None and part is None:
        code = frame.f_code
        if code.co_filename.startswith(ROOT) and f"{ROOT}/tools" not in code.co_filename:
            place = place or f"{Path(code.co_filename).name}: {code.co_qualname}"
            part = PART_OF_FUNCTION.get(code.co_qualname)
        frame = frame.f_back
    if place is None:
        # Gradients are not asked for by a function of ours.
        node = torch._C._current_autograd_node()
        place = "elsewhere" if node is None else f"gradient: {node.name()}"
    return part, place


# --------------------------------------------------------------------------------- without a GPU


@contextlib.contextmanager
def as_on_cuda() -> Iterator[None]:
    """Tensors say that they are on a GPU, and calls take the ways that they take there.

    PyTorch for CPUs has no autograd for tensors of CUDA, so these are tensors of the CPU. Where
    PyTorch itself chooses between the two, the choice is made here.
    """
    with (
        patch.object(Tensor, "is_cuda", True),
        patch.object(F, "scaled_dot_product_attention", _flash),
        patch.object(F, "rms_norm", _norm),
        patch.object(torch, "addcmul", _promoting_addcmul),
        # The object that asks for that kernel cannot be made while calls are counted.
        patch.object(attention, "causal_lower_right", _corner),
        patch.object(attention, "ON_CPU", attention.ON_GPU),
    ):
        yield


def _flash(query, key, value, attn_mask=None, is_causal=False, scale=None, enable_gqa=False):
    """Attention as one kernel, causal from the upper left or from the lower right corner."""
    causal = is_causal or attn_mask is not None
    kernel = torch.ops.aten._scaled_dot_product_flash_attention
    return kernel(query, key, value, 0.0, causal, scale=scale)[0]


def _corner(queries: int, keys: int) -> str:
    return "causal from the lower right corner"


def _norm(hidden: Tensor, shape, weight: Tensor, epsilon: float) -> Tensor:
    """A norm as one kernel. On a CPU F.rms_norm is six, and this one reads and writes the same."""
    return F.layer_norm(hidden, shape, weight, eps=epsilon)


def _promoting_addcmul(*tensors: Tensor) -> Tensor:
    """addcmul under CUDA's autocast, which casts its arguments to the widest dtype among them."""
    if torch.is_autocast_enabled("cpu"):
        widest = max((x.dtype for x in tensors), key=lambda dtype: dtype.itemsize)
        tensors = [x.to(widest) for x in tensors]
    return torch.ops.aten.addcmul(*tensors)


def without_numbers() -> FakeTensorMode:
    """What is made in here has shapes and no numbers, and so has what is computed from it.

    Real tensors may take part. What is computed of them alone is computed.
    """
    return FakeTensorMode(allow_non_fake_inputs=True)
