"""decoder.py: the decoder's layers, as this project runs them.

The weights are those of transformers' modules, and so is every step of the arithmetic. What differs
is how often it is done. The residual stream is float32: here its normalised rows are cast once for
the projections that read them, norms are fused, and the rotary embedding is worked out once for all
layers. For a rollout weights are cast and joined beforehand (`prepared`). On a GPU a layer of a
decoding step launches half as many kernels as in transformers.

Attention is left to a *layout* (attention.py), which knows what a query may see. A layer that is
called without one runs as it came, so `generate` and `forward` of transformers stay what they are.

Two things are Qwen3-VL's alone, and are done where the model has them: norms of queries and keys
(`project`), and features of images that are added behind the first layers (`Embedded.deep`).

Shapes: R rows, N tokens of a row, D hidden width, H heads, H_kv heads of keys and values, W width
of a head.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Sequence
from functools import partial
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

# Whether float32 products of a rollout go to oneDNN, and up to how many rows a product on a CPU is
# quicker by MKL with the weight in front. Measured in docs/performance.md.
HAS_AVX512 = torch.backends.cpu.get_cpu_capability() == "AVX512"
USES_ONEDNN = HAS_AVX512 and hasattr(torch.ops.mkldnn, "_linear_pointwise")
FEW_ROWS = 4 if USES_ONEDNN else 64
BLOCK_ROWS = 128  # of a weight that a single row meets in blocks


class Embedded(NamedTuple):
    """What the decoder reads."""

    tokens: Tensor  # [R, N, D] float32, images included
    places: Tensor | None = None  # [n] of the image tokens in the row; of one row only
    deep: Sequence[Tensor] = ()  # what is added at these places behind the first layers, [n, D]


class Rotary(NamedTuple):
    """The rotary embedding of some positions, [R, 1, N, W] float32 each.

    `sin` has its first half negated, so that x·cos + roll(x, W/2)·sin turns each pair of x.
    """

    cos: Tensor
    sin: Tensor

    def turn(self, x: Tensor) -> Tensor:
        """[R, heads, N, W], turned by the angles of its positions."""
        # In place: autocast would cast what an addcmul out of place is given.
        other_half = x.roll(x.shape[-1] // 2, dims=-1)
        return (x * self.cos).addcmul_(other_half, self.sin)

    def at(self, positions: Tensor) -> Rotary:
        """The embedding of rows with one token each, at positions [R].

        Only of a table: one row, whose tokens stand at the positions 0, 1, 2, ….
        """
        cos, sin = (table[0, 0].index_select(0, positions) for table in self)
        return Rotary(cos[:, None, None], sin[:, None, None])


def rotary_of(model: nn.Module, positions: Tensor) -> Rotary:
    """positions [3, R, N], the three axes of M-RoPE: time, height and width.

    model: the language model, whose own module gives cosines and sines. The axes are mixed in it.
    """
    reference = positions.new_empty((), dtype=torch.float32)  # says the dtype and the device
    cos, sin = model.rotary_emb(reference, positions)
    first, second = sin.chunk(2, dim=-1)
    return Rotary(cos[:, None], torch.cat([-first, second], dim=-1)[:, None])


def rms_norm(norm: nn.Module, x: Tensor) -> Tensor:
    """The module's norm by one kernel. x [..., D] -> the same shape and dtype."""
    # A sharded weight is gathered in 16 bits, and the kernel wants one dtype.
    weight = norm.weight.to(x.dtype)
    return F.rms_norm(x, weight.shape, weight, norm.variance_epsilon)


# ----------------------------------------------------------------------------------------- products


def few_rows_product(x: Tensor, weight: Tensor) -> Tensor:
    """x [R, in] times the transposed weight [out, in] -> [R, out], a view of a tensor [out, R].

    In the usual order the threads of a CPU share out the few rows. With the weight in front they
    share out its own rows, which are many. A single row may be left to one thread either way, but
    not as one batch of small products.
    """
    if len(x) > 1 or len(weight) % BLOCK_ROWS:
        return (weight @ x.T).T
    blocks = weight.unflatten(0, (-1, BLOCK_ROWS))
    products = torch.bmm(blocks, x.T.expand(len(blocks), -1, -1))
    return products.flatten(0, 1).T


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """F.linear of x [..., in] -> [..., out], quicker in float32 on a CPU.

    PyTorch gives such products to MKL, which leaves AVX-512 unused on AMD's CPUs. oneDNN does not.
    """
    if x.is_cpu and x.dtype == torch.float32:
        has_few_rows = x.shape[:-1].numel() <= FEW_ROWS
        if has_few_rows and bias is None:  # to add a bias costs what the order would gain
            return few_rows_product(x.flatten(0, -2), weight).view(*x.shape[:-1], -1)
        if USES_ONEDNN and not torch.is_grad_enabled():
            # What torch.compile puts in the place of a linear layer on a CPU. It has no gradient.
            return torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], "")
    return F.linear(x, weight, bias)


def side_by_side(*modules: nn.Module) -> Callable[[Tensor], Tensor]:
    """One function for linear layers that read the same: [R, N, in] -> [R, N, sum of out]."""
    if len(modules) == 1:
        return modules[0]

    def outputs(x: Tensor) -> Tensor:
        return torch.cat([module(x) for module in modules], dim=-1)

    return outputs


def joined(*modules: nn.Module, dtype: torch.dtype) -> Callable[[Tensor], Tensor]:
    """`side_by_side` as one product, of the weights in dtype, which are copied where need be.

    Layers that are more than a product, such as those with adapters, stay what they are.
    """
    are_plain = all(type(module) is nn.Linear for module in modules)
    have_bias = [module.bias is not None for module in modules]
    if not are_plain or any(have_bias) != all(have_bias):
        return side_by_side(*modules)

    def join(tensors: list[Tensor]) -> Tensor:
        return tensors[0] if len(tensors) == 1 else torch.cat(tensors)

    weight = join([module.weight.to(dtype) for module in modules])
    bias = None
    if all(have_bias):
        bias = join([module.bias.to(dtype) for module in modules])
    return partial(linear, weight=weight, bias=bias)


# ------------------------------------------------------------------------------------------- layers


class Parts(NamedTuple):
    """What a layer computes with. A function of linear layers takes [R, N, in] to [R, N, out]."""

    number: int  # of the layer
    head_width: int  # W
    shared_by: int  # H / H_kv, the heads that share a head of keys and values
    scale: float  # of queries · keys
    input_norm: nn.Module
    query_key_value: Callable[[Tensor], Tensor]
    query_norm: nn.Module | None
    key_norm: nn.Module | None
    output: Callable[[Tensor], Tensor]
    mlp_norm: nn.Module
    gate: Callable[[Tensor], Tensor]
    activation: nn.Module
    up: Callable[[Tensor], Tensor]
    down: Callable[[Tensor], Tensor]


def parts_of(layer: nn.Module, as_one: Callable = side_by_side) -> Parts:
    """as_one: makes one function of linear layers that read the same."""
    attention, mlp = layer.self_attn, layer.mlp
    return Parts(
        number=attention.layer_idx,
        head_width=attention.head_dim,
        shared_by=attention.num_key_value_groups,
        scale=attention.scaling,
        input_norm=layer.input_layernorm,
        query_key_value=as_one(attention.q_proj, attention.k_proj, attention.v_proj),
        query_norm=getattr(attention, "q_norm", None),
        key_norm=getattr(attention, "k_norm", None),
        output=as_one(attention.o_proj),
        mlp_norm=layer.post_attention_layernorm,
        gate=as_one(mlp.gate_proj),
        activation=mlp.act_fn,
        up=as_one(mlp.up_proj),
        down=as_one(mlp.down_proj),
    )


@contextlib.contextmanager
def prepared(layers: nn.ModuleList, dtype: torch.dtype):
    """Inside, the layers are ready for many passes without gradients, such as those of a rollout.

    What a layer computes with is looked up once, weights are cast once, and those of queries, keys
    and values are joined: a step of decoding spends more time on calls than on numbers. So weights
    must not change inside.
    """
    try:
        for layer in layers:
            layer.parts = parts_of(layer, partial(joined, dtype=dtype))
        yield
    finally:
        for layer in layers:
            layer.parts = None


def project(parts: Parts, hidden: Tensor, turns: Rotary, dtype: torch.dtype):
    """Queries [R, H, N, W], keys and values [R, H_kv, N, W] of hidden states [R, N, D]."""
    projected = parts.query_key_value(rms_norm(parts.input_norm, hidden).to(dtype))
    heads = projected.view(*projected.shape[:-1], -1, parts.head_width).transpose(1, 2)
    key_heads = heads.shape[1] // (parts.shared_by + 2)
    query_heads = key_heads * parts.shared_by
    to_turn, value = heads.split((query_heads + key_heads, key_heads), dim=1)
    if value.requires_grad:
        # A view would keep the queries and keys that it lies among until the backward.
        value = value.clone()
    if parts.query_norm is not None:
        query, key = to_turn.split((query_heads, key_heads), dim=1)
        # In float32, as the rotary embedding that follows.
        query = rms_norm(parts.query_norm, query.float())
        key = rms_norm(parts.key_norm, key.float())
        to_turn = torch.cat([query, key], dim=1)
    query, key = turns.turn(to_turn).to(dtype).split((query_heads, key_heads), dim=1)
    return query, key, value


def finish(parts: Parts, hidden: Tensor, attended: Tensor, dtype: torch.dtype) -> Tensor:
    """What follows attention in a layer: hidden [R, N, D], attended [R, N, H, W] -> [R, N, D]."""
    hidden = hidden + parts.output(attended.flatten(2))
    normalised = rms_norm(parts.mlp_norm, hidden).to(dtype)
    gate = parts.activation(parts.gate(normalised))
    return hidden + parts.down(gate * parts.up(normalised))


class PackedLayer:
    """The forward that a decoder layer is given. Mixed into its class, before the library's own."""

    parts: Parts | None = None  # looked up beforehand, see `prepared`

    def forward(self, hidden, *args, layout=None, turns=None, dtype=None, wanted=None, **kwargs):
        if layout is None:
            return super().forward(hidden, *args, **kwargs)
        parts = self.parts or parts_of(self)
        query, key, value = project(parts, hidden, turns, dtype)
        attended = layout.attend(parts.number, query, key, value=value, scale=parts.scale)
        if wanted is not None:
            hidden, attended = hidden[:, wanted], attended[:, wanted]
        return finish(parts, hidden, attended, dtype)


def mix_in(module: nn.Module, ours: type) -> None:
    """Let the methods of a class of ours go before a module's own. Its weights and hooks stay."""
    own = type(module)
    if not issubclass(own, ours):
        module.__class__ = type(f"{ours.__name__}{own.__name__}", (ours, own), {})


def take_layouts(layers: nn.ModuleList) -> None:
    """Let decoder layers run with a layout. Their weights, hooks and checkpointing stay."""
    for layer in layers:
        mix_in(layer, PackedLayer)


def run(
    model: nn.Module,
    embedded: Embedded,
    turns: Rotary,
    layout,
    dtype: torch.dtype,
    wanted: Tensor | None = None,
) -> Tensor:
    """The last hidden states [R, N, D] of embedded tokens.

    model: the language model, whose layers were given to `take_layouts`. turns: the rotary
    embedding of the tokens' positions. layout.hooks: whether the layers' hooks run, which gather
    sharded weights and start checkpoints. dtype: of the arithmetic between the float32 residuals.
    wanted: places [n] of the tokens whose states are asked for, [R, n, D]; by default all. Nobody
        reads the others behind the last attention, so the rest of the last layer leaves them out.
    """
    hidden = embedded.tokens
    last = len(model.layers) - 1
    # Features that are added behind the last layer, too, are added at places of the whole row.
    needs_whole_row = len(embedded.deep) > last
    of_last = None if needs_whole_row else wanted
    for number, layer in enumerate(model.layers):
        run_layer = layer if layout.hooks else layer.forward
        of_layer = of_last if number == last else None
        hidden = run_layer(hidden, layout=layout, turns=turns, dtype=dtype, wanted=of_layer)
        if number < len(embedded.deep):
            hidden = hidden.index_add(1, embedded.places, embedded.deep[number][None])
    if needs_whole_row and wanted is not None:
        hidden = hidden[:, wanted]
    return rms_norm(model.norm, hidden)
