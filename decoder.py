"""decoder.py: the decoder's layers, as this project runs them.

The weights are those of transformers' modules, and so is every step of the arithmetic. What differs
is how often it is done. The residual stream is float32: here its normalised rows are cast once for
the projections that read them, norms are fused, and the rotary embedding is worked out once for all
layers. On a GPU a layer of a decoding step launches half as many kernels.

Attention is left to a *layout* (attention.py), which knows what a query may see. A layer that is
called without one runs as it came, so `generate` and `forward` of transformers stay what they are.

Two things are Qwen3-VL's alone, and are done where the model has them: norms of queries and keys
(`project`), and features of images that are added behind the first layers (`Embedded.deep`).

Shapes: R rows, N tokens of a row, D hidden width, H heads, H_kv heads of keys and values, W width
of a head.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

FEW_ROWS = 64  # up to so many rows, a product on a CPU is quicker with the weight in front


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


def has_few_rows(x: Tensor) -> bool:
    """Whether x [R, D] is float32 on a CPU, with as few rows as a step of decoding has."""
    on_cpu = x.device.type == "cpu"
    return on_cpu and x.dtype == torch.float32 and len(x) <= FEW_ROWS


def few_rows_product(x: Tensor, weight: Tensor) -> Tensor:
    """x [R, in] times the transposed weight [out, in] -> [R, out], a view of a tensor [out, R].

    The usual order of the product takes two threads of a CPU 1.2 to 2 times as long, because they
    share out the few rows. With the weight in front they share out its own rows, which are many.
    """
    return (weight @ x.T).T


def linear(module: nn.Module, x: Tensor) -> Tensor:
    """module(x) of x [R, N, in] -> [R, N, out], the quick way where there are few rows."""
    rows = x.flatten(0, -2)
    is_plain = type(module) is nn.Linear and module.bias is None
    if is_plain and module.weight.dtype == x.dtype and has_few_rows(rows):
        return few_rows_product(rows, module.weight).unflatten(0, x.shape[:-1])
    return module(x)


def project(layer: nn.Module, hidden: Tensor, turns: Rotary, dtype: torch.dtype):
    """Queries [R, H, N, W], keys and values [R, H_kv, N, W] of hidden states [R, N, D]."""
    attention = layer.self_attn
    normalised = rms_norm(layer.input_layernorm, hidden).to(dtype)

    def heads(projection: nn.Module) -> Tensor:
        projected = linear(projection, normalised)
        return projected.unflatten(-1, (-1, attention.head_dim)).transpose(1, 2)

    query = heads(attention.q_proj)
    key = heads(attention.k_proj)
    value = heads(attention.v_proj)
    if hasattr(attention, "q_norm"):
        # In float32, as the rotary embedding that follows.
        query = rms_norm(attention.q_norm, query.float())
        key = rms_norm(attention.k_norm, key.float())
    return turns.turn(query).to(dtype), turns.turn(key).to(dtype), value


def finish(layer: nn.Module, hidden: Tensor, attended: Tensor, dtype: torch.dtype) -> Tensor:
    """What follows attention in a layer: hidden [R, N, D], attended [R, N, H, W] -> [R, N, D]."""
    hidden = hidden + linear(layer.self_attn.o_proj, attended.flatten(2))
    normalised = rms_norm(layer.post_attention_layernorm, hidden).to(dtype)
    mlp = layer.mlp
    gate = mlp.act_fn(linear(mlp.gate_proj, normalised))
    return hidden + linear(mlp.down_proj, gate * linear(mlp.up_proj, normalised))


class PackedLayer:
    """The forward that a decoder layer is given. Mixed into its class, before the library's own."""

    def forward(self, hidden, *args, layout=None, turns=None, dtype=None, **kwargs):
        if layout is None:
            return super().forward(hidden, *args, **kwargs)
        query, key, value = project(self, hidden, turns, dtype)
        attention = self.self_attn
        attended = layout.attend(
            attention.layer_idx, query, key, value=value, scale=attention.scaling
        )
        return finish(self, hidden, attended, dtype)


def mix_in(module: nn.Module, ours: type) -> None:
    """Let the methods of a class of ours go before a module's own. Its weights and hooks stay."""
    own = type(module)
    if not issubclass(own, ours):
        module.__class__ = type(f"{ours.__name__}{own.__name__}", (ours, own), {})


def take_layouts(layers: nn.ModuleList) -> None:
    """Let decoder layers run with a layout. Their weights, hooks and checkpointing stay."""
    for layer in layers:
        mix_in(layer, PackedLayer)


def run(model: nn.Module, embedded: Embedded, positions: Tensor, layout, dtype: torch.dtype):
    """The last hidden states [R, N, D] of embedded tokens at positions [3, R, N].

    model: the language model, whose layers were given to `take_layouts`. layout.hooks: whether the
    layers' hooks run, which gather sharded weights and start checkpoints. dtype: of the arithmetic
    between the float32 residuals.
    """
    turns = rotary_of(model, positions)
    hidden = embedded.tokens
    for number, layer in enumerate(model.layers):
        run_layer = layer if layout.hooks else layer.forward
        hidden = run_layer(hidden, layout=layout, turns=turns, dtype=dtype)
        if number < len(embedded.deep):
            hidden = hidden.index_add(1, embedded.places, embedded.deep[number][None])
    return rms_norm(model.norm, hidden)
