"""attention.py: who sees whom, and what DyCo reads off it."""

import math

import torch
import torch.nn.functional as F
from torch import Tensor

import dyco
from data import Prompt
from dyco import Signals

ATTENTION = "dyco_layout"
WINDOWS = "dyco_flash_windows"  # transformers calls what has flash in its name once per layer, with the borders of all windows


# ----------------------------------------------------------------------------------- attention: one function, two layouts


def attend(
    module, query: Tensor, key: Tensor, value: Tensor, attention_mask, layout=None, **kwargs
):
    """Attention function of the decoder layers: [1 or rows, H, N, D] -> [1 or rows, N, H, D].

    Without a layout (stock `generate`, say) it is transformers' own sdpa attention.
    """
    if layout is None:
        from transformers.integrations.sdpa_attention import sdpa_attention_forward

        return sdpa_attention_forward(module, query, key, value, attention_mask, **kwargs)
    query, key = (
        query.to(value.dtype),
        key.to(value.dtype),
    )  # under autocast, rotary positions made them float32
    return layout.attend(module.layer_idx, query, key, value, module.scaling), None


def attend_windows(
    module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask,
    scaling: float,
    cu_seq_lens_q: Tensor,
    **kwargs,
):
    """Attention function of the vision tower: windows of one length are one batch, not one call each. [1, H, N, D] -> [1, N, H, D].

    cu_seq_lens_q [windows + 1]: where the windows begin and the last one ends.
    """
    lengths = cu_seq_lens_q.diff()
    kinds, counts = (x.tolist() for x in lengths.unique(return_counts=True))
    if several := len(kinds) > 1:
        order = lengths.repeat_interleave(lengths).argsort(
            stable=True
        )  # patches, windows of one length side by side
        query, key, value = (x.index_select(2, order) for x in (query, key, value))
    sizes = [length * count for length, count in zip(kinds, counts)]
    split = lambda x: x[0].split(sizes, dim=1)
    parts = [
        F.scaled_dot_product_attention(
            *(x.unflatten(1, (-1, length)).transpose(0, 1) for x in qkv), scale=scaling
        )
        for length, *qkv in zip(kinds, *map(split, (query, key, value)))
    ]  # [windows, H, length, D] each
    out = torch.cat([part.transpose(0, 1).flatten(1, 2) for part in parts], dim=1)
    return (out.index_select(1, order.argsort()) if several else out).transpose(0, 1)[None], None


def register_attention() -> None:
    """Make `attend` and `attend_windows` known to transformers, with the masks of sdpa."""
    from transformers import AttentionInterface, AttentionMaskInterface
    from transformers.masking_utils import sdpa_mask

    AttentionInterface.register(ATTENTION, attend)
    AttentionInterface.register(WINDOWS, attend_windows)
    AttentionMaskInterface.register(ATTENTION, sdpa_mask)


def float32_product(a: Tensor, b: Tensor) -> Tensor:
    """a @ b with a float32 result, whatever the inputs: attention scores and logits rounded to bfloat16 would drown
    shifts of τ = 0.05 and the ratios that GSPO clips at 3e-4. Without gradient: CUDA's 16-bit product into float32 has none."""
    with torch.autocast(a.device.type, enabled=False):
        if a.dtype == torch.float32 and b.dtype == torch.float32:
            return a @ b
        if not a.is_cuda:  # only CUDA multiplies 16 bits into 32
            return a.float() @ b.float()
        if a.dim() == 2:
            return torch.mm(a, b, out_dtype=torch.float32)
        return torch.bmm(a.flatten(0, -3), b.flatten(0, -3), out_dtype=torch.float32).unflatten(
            0, a.shape[:-2]
        )


def _eager_attention(query, key, value, scale, mask) -> Tensor:
    with torch.autocast(query.device.type, enabled=False):
        scores = (query.float() @ key.float().transpose(-1, -2) * scale).masked_fill(
            ~mask, -math.inf
        )
    return torch.softmax(scores, dim=-1).to(value.dtype) @ value


def grouped_query_attention(
    query: Tensor, key: Tensor, value: Tensor, scale: float, kernel: str = "sdpa"
) -> Tensor:
    """Causal attention, the last query aligned with the last key. query [B, H, T, D], key and value [B, H_kv, K, D].

    The H / H_kv query heads that share a key head meet it without copies of it: by the kernel where it can, else folded into the
    query length.
    """
    batch, heads, queries, width = query.shape
    key_heads, keys = key.shape[1:3]
    repeats = heads // key_heads
    if kernel == "sdpa" and queries == keys:
        return F.scaled_dot_product_attention(
            query, key, value, is_causal=True, scale=scale, enable_gqa=repeats > 1
        )
    mask = (
        torch.ones(queries, keys, dtype=torch.bool, device=query.device)
        .tril(keys - queries)
        .repeat(repeats, 1)
    )
    query = query.reshape(batch, key_heads, repeats * queries, width)
    if kernel == "sdpa":
        out = F.scaled_dot_product_attention(query, key, value, attn_mask=mask, scale=scale)
    else:
        out = _eager_attention(query, key, value, scale, mask)
    return out.reshape(batch, heads, queries, width)


class PackedGroups:
    """The layout of packed groups: [prompt_1 | o_11 … o_1G | prompt_2 | …], in one row.

    prompts: the prompts. branches: [prompts][G] number of *input* tokens of each response: its last token is predicted
    and never read, so it is not packed. Cost per group: P²/2 + G·T·(P + T/2) query–key pairs.
    """

    def __init__(
        self,
        prompts: list[Prompt],
        branches: list[list[int]],
        kernel: str = "sdpa",
        tap: "Tap | None" = None,
        keep_keys: bool = False,
        first_group: int = 0,
    ):
        self.first_group = first_group  # the tap's number of the first of these groups
        self.kernel, self.tap, self.branches = kernel, tap, branches
        self.prompts = prompts
        self.sections = [
            n
            for prompt, group in zip(prompts, branches)
            for n in (len(prompt.input_ids), sum(group))
        ]
        self.places: list[tuple[Tensor, Tensor]] | None = None
        self.kept: dict[int, list[tuple[Tensor, Tensor]]] | None = {} if keep_keys else None

    @staticmethod
    def _places(group: list[int], device) -> tuple[Tensor, Tensor]:
        """Packed place of each padded token [G·longest], and padded place of each packed token [tokens]. Padding reads
        whatever stands there: it is behind every real query, and its own output is dropped."""
        lengths = torch.tensor(group)
        steps = torch.arange(max(group, default=0))
        padded = (lengths.cumsum(0) - lengths)[:, None] + steps
        real = (steps < lengths[:, None]).flatten().nonzero().squeeze(-1)
        return padded.flatten().clamp(max=sum(group) - 1).to(device), real.to(device)

    def attend(self, layer: int, query: Tensor, key: Tensor, value: Tensor, scale: float) -> Tensor:
        if self.places is None:
            self.places = [self._places(group, query.device) for group in self.branches]
        sections = [
            x[0].transpose(0, 1).split(self.sections) for x in (query, key, value)
        ]  # [tokens, H, D] each
        outputs = []
        for index, (prompt, group) in enumerate(zip(self.prompts, self.branches)):
            q, k, v = (x[2 * index].transpose(0, 1)[None] for x in sections)  # the prompt
            outputs.append(grouped_query_attention(q, k, v, scale, self.kernel)[0].transpose(0, 1))
            if self.kept is not None:
                self.kept.setdefault(layer, []).append((k, v))
            predictors = q[:, :, -1:].expand(max(len(group), 1), -1, -1, -1)  # of the first tokens
            k, v = (x.expand(len(predictors), -1, -1, -1) for x in (k, v))
            if any(group):
                padded, real = self.places[index]
                q, own_k, own_v = (
                    x[2 * index + 1]
                    .index_select(0, padded)
                    .unflatten(0, (len(group), -1))
                    .transpose(1, 2)
                    for x in sections
                )  # the responses, [G, H, longest, D]
                k, v = torch.cat([k, own_k], dim=2), torch.cat([v, own_v], dim=2)
                out = grouped_query_attention(q, k, v, scale, self.kernel).transpose(1, 2)
                outputs.append(out.flatten(0, 1).index_select(0, real))
                predictors = torch.cat([predictors, q], dim=2)  # and of those after them
            if self.tap is not None and layer in self.tap.layers:
                self.tap.read_group(layer, self.first_group + index, prompt, predictors, k, scale)
        return torch.cat(outputs)[None]


# ------------------------------------------------------------------------------------------------ the attention tap


class Tap:
    """Reduces attention to DyCo's signals where it arises, in the captured layers only.

    layers: decoder layers, negatives count from the end; each is reduced by itself and the signals are averaged.
    `read_group` serves the packed forward, `read_step` and `reduce_steps` serve decoding; both end in dyco.attention_signals.
    With `keep_images`, `read_group` also leaves the rows' attention to the image, averaged over the layers, in `images`.
    """

    MAX_ELEMENTS = (
        2**25
    )  # of one block of attention rows before heads are averaged: 128 MB in float32
    STEPS = 16  # decoding steps reduced at once

    def __init__(
        self,
        layers: list[int],
        depth: int,
        shift: str = "fisher_rao",
        text_scope: str = "after_image",
        signals=dyco.attention_signals,
        keep_images: bool = False,
    ):
        wrong = [layer for layer in layers if not -depth <= layer < depth]
        if wrong:
            raise ValueError(
                f"dyco.layers: {wrong} out of range; the model has {depth} decoder layers: {-depth} … {depth - 1}"
            )
        self.layers = sorted({layer % depth for layer in layers})
        self.shift, self.text_scope, self.signals = shift, text_scope, signals
        self.images: dict[int, Tensor] | None = (
            {} if keep_images else None
        )  # group -> [G, T, visual tokens]
        self.sums: dict[int, list[Tensor]] = {}  # group -> sums over layers, each [G, T]
        self.prefill_rows: dict[
            int, dict[int, Tensor]
        ] = {}  # layer -> group -> the row that predicts its first token
        self.steps: dict[
            int, list[Tensor]
        ] = {}  # decoding: layer -> the rows [R, K] of the steps not yet reduced, after the last reduced one

    def prompt_members(self, prompt: Prompt, device) -> tuple[Tensor, Tensor]:
        """[P] bool each: the prompt's visual keys and its text keys in scope (everything of a response is text)."""
        visual = prompt.visual_mask.to(device)
        text = ~visual
        if self.text_scope == "after_image" and bool(prompt.visual_mask.any()):
            text = text & (
                torch.arange(len(visual), device=device) >= int(prompt.visual_mask.int().argmax())
            )
        return visual, text

    @torch.no_grad()
    def read_group(
        self, layer: int, group: int, prompt: Prompt, query: Tensor, key: Tensor, scale: float
    ) -> None:
        """query [G, H, T, D]: of the last prompt token and the response tokens; key [G, H_kv, K, D]: prompt, then own."""
        (rows, heads, queries, _), keys = query.shape, key.shape[2]
        visual, text = self.prompt_members(prompt, key.device)
        visual = F.pad(visual, (0, keys - len(visual)))
        text = F.pad(text, (0, keys - len(text)), value=True)
        # blocks of queries, each with the query before it, so that its first shift has a predecessor
        block = max(1, self.MAX_ELEMENTS // (rows * heads * keys))
        parts, seen = [], []
        for start in range(0, queries, block):
            before = max(start - 1, 0)
            attention = attention_rows(
                query[:, :, before : start + block], key, scale, first=keys - queries + before
            )
            signals = self.signals(
                attention, visual.expand(rows, keys), text.expand(*attention.shape), self.shift
            )
            parts.append([x[:, start - before :] for x in signals])
            if self.images is not None:
                seen.append(attention[:, start - before :, visual])
        if self.images is not None:
            self.images[group] = self.images.get(group, 0) + torch.cat(seen, dim=1) / len(
                self.layers
            )
        self._add(group, [torch.cat(x, dim=1) for x in zip(*parts)])
        if queries == 1:
            self.prefill_rows.setdefault(layer, {})[group] = attention[:, 0]

    @property
    def waiting(self) -> int:
        """Decoding steps kept by `read_step` and not yet reduced."""
        return len(self.steps[self.layers[0]]) - 1

    def read_step(self, layer: int, attention: Tensor) -> None:
        """Decoding: keep attention [R, K] of this step, over the keys of the step before and one new one."""
        self.steps[layer].append(attention)

    @torch.no_grad()
    def reduce_steps(self, visual: Tensor, text: Tensor) -> Signals:
        """The signals [R, steps] of the steps kept since the last call, at most STEPS; visual and text [R, K], over the keys
        of the last step."""
        for layer, rows in self.steps.items():
            padded = rows + rows[-1:] * (
                1 + self.STEPS - len(rows)
            )  # one shape, so that a compiled function is compiled once
            attention = torch.stack(
                [F.pad(row, (0, visual.shape[1] - row.shape[1])) for row in padded], dim=1
            )
            signals = self.signals(
                attention, visual, text[:, None].expand(attention.shape), self.shift
            )
            self._add(0, [x[:, 1 : len(rows)] for x in signals])
            self.steps[layer] = rows[-1:]
        return self.take(0)

    def _add(self, group: int, signals: list[Tensor]) -> None:
        sums = self.sums.get(group)
        self.sums[group] = list(signals) if sums is None else [a + b for a, b in zip(sums, signals)]

    def take(self, group: int) -> Signals:
        """The signals of a group, averaged over the captured layers; they are forgotten here."""
        return Signals(*(x / len(self.layers) for x in self.sums.pop(group)))


def attention_rows(query: Tensor, key: Tensor, scale: float, first: int) -> Tensor:
    """Softmaxed causal attention averaged over heads: [B, H, T, D], [B, H_kv, K, D] -> [B, T, K] float32.

    `first` is the key position of the first query.
    """
    (batch, heads, queries, width), (key_heads, keys) = query.shape, key.shape[1:3]
    query = query.reshape(batch, key_heads, heads // key_heads * queries, width)
    scores = (
        float32_product(query, key.transpose(-1, -2)).mul_(scale).view(batch, heads, queries, keys)
    )
    ahead = (
        torch.arange(keys, device=key.device)
        > torch.arange(first, first + queries, device=key.device)[:, None]
    )
    return torch.softmax(scores.masked_fill_(ahead, -math.inf), dim=-1).mean(dim=1)


# --- decoding


class Decoding:
    """The layout of decoding: every row sees its prompt's keys, shared by the group, and its own."""

    def __init__(
        self,
        prompts: list[Prompt],
        kept: dict,
        group_size: int,
        capacity: int,
        tap: Tap | None,
        device,
    ):
        """kept: layer -> (keys, values) of each prompt, [1, H_kv, P, D] each; emptied here."""
        self.tap, self.capacity, self.length = tap, capacity, 0
        count, lengths = (
            len(prompts),
            torch.tensor([len(p.input_ids) for p in prompts], device=device),
        )
        self.prompt_width = int(lengths.max())
        pad = lambda x: F.pad(x, (0, 0, 0, self.prompt_width - x.shape[2]))
        # layer -> keys and values of the prompts [P, H_kv, prompt_width, D]; of the rows' own tokens [R, H_kv, capacity, D]
        self.shared = {
            layer: tuple(torch.cat([pad(x) for x in part]) for part in zip(*kept.pop(layer)))
            for layer in list(kept)
        }
        self.own: dict[int, tuple[Tensor, Tensor]] = {}
        self.count, self.padding = count, None
        if int(lengths.min()) < self.prompt_width:
            self.padding = (torch.arange(self.prompt_width, device=device) >= lengths[:, None])[
                :, None, None
            ]  # [P, 1, 1, prompt_width]
        self.prompt_of = torch.arange(count, device=device).repeat_interleave(group_size)
        self._place()
        if tap is not None:
            members = [tap.prompt_members(p, device) for p in prompts]
            fit = lambda x: F.pad(x, (0, self.prompt_width - x.shape[-1]))
            self.visual, self.text = (
                torch.stack([fit(m[i]) for m in members])[self.prompt_of] for i in (0, 1)
            )
            tap.steps = {
                layer: [torch.cat([fit(rows[i]) for i in range(count)])[self.prompt_of]]
                for layer, rows in tap.prefill_rows.items()
            }

    def _place(self) -> None:
        """Where each row stands in the grid [P, slots] in which the rows of a prompt meet its keys together."""
        counts = torch.bincount(self.prompt_of, minlength=self.count)
        first = counts.cumsum(0) - counts
        self.slots = int(counts.max())
        slot = torch.arange(len(self.prompt_of), device=counts.device) - first[self.prompt_of]
        self.place = self.prompt_of * self.slots + slot
        self.full = len(self.prompt_of) == self.count * self.slots

    def _to_grid(self, x: Tensor) -> Tensor:
        """[R, H_kv, n, D] -> [P, H_kv, slots·n, D], zeros where a slot is empty."""
        if not self.full:
            x = x.new_zeros(self.count * self.slots, *x.shape[1:]).index_copy_(0, self.place, x)
        x = x.unflatten(0, (self.count, self.slots)).transpose(1, 2)
        return x.flatten(2, 3)

    def _from_grid(self, x: Tensor) -> Tensor:
        x = x.unflatten(2, (self.slots, -1)).transpose(1, 2).flatten(0, 1)
        return x if self.full else x[self.place]

    def attend(self, layer: int, query: Tensor, key: Tensor, value: Tensor, scale: float) -> Tensor:
        rows, heads, _, dim = query.shape
        key_heads = key.shape[1]
        if layer not in self.own:
            self.own[layer] = tuple(
                x.new_empty(rows, key_heads, self.capacity, dim) for x in (key, value)
            )
        for cache, new in zip(self.own[layer], (key, value)):
            cache[:, :, self.length] = new[:, :, 0]
        own_keys, own_values = (cache[:, :, : self.length + 1] for cache in self.own[layer])
        shared_keys, shared_values = self.shared[layer]

        query = query.reshape(rows, key_heads, heads // key_heads, dim)
        shared_scores = float32_product(self._to_grid(query), shared_keys.transpose(-1, -2))
        if self.padding is not None:
            shared_scores.masked_fill_(self.padding, float("-inf"))
        scores = torch.cat(
            [self._from_grid(shared_scores), float32_product(query, own_keys.transpose(-1, -2))],
            dim=-1,
        ).mul_(scale)
        attention = torch.softmax(self.adjust_scores(layer, scores), dim=-1)  # [R, H_kv, H/H_kv, K]
        if self.tap is not None and layer in self.tap.layers:
            self.tap.read_step(layer, attention.mean(dim=(1, 2)))
        attention = attention.to(value.dtype)
        out = self._from_grid(self._to_grid(attention[..., : self.prompt_width]) @ shared_values)
        out = out + attention[..., self.prompt_width :] @ own_values
        return out.reshape(rows, 1, heads, dim)

    def keep(self, rows: Tensor) -> None:
        """Only these rows go on, [rows] positions in the present batch."""
        for layer, pair in self.own.items():
            self.own[layer] = tuple(x[rows] for x in pair)
        self.prompt_of = self.prompt_of[rows]
        self._place()
        if self.tap is not None:
            self.visual, self.text = self.visual[rows], self.text[rows]
            self.tap.steps = {
                layer: [x[rows] for x in steps] for layer, steps in self.tap.steps.items()
            }

    def members(self, own: int) -> tuple[Tensor, Tensor]:
        """[R, K] bool each: visual keys and text keys in scope, of the prompts and `own` tokens of the rows."""
        return F.pad(self.visual, (0, own)), F.pad(self.text, (0, own), value=True)

    @property
    def waiting(self) -> int:
        """How many steps `signals` would return now."""
        return 0 if self.tap is None else self.tap.waiting

    def signals(self) -> Signals:
        """The signals [R, steps] of the steps since the last call; only with a tap."""
        return self.tap.reduce_steps(*self.members(self.length))

    def advance(self, compute, going: Tensor) -> Tensor:
        """One decoding step: compute() passes the new token of each row through the decoder. Returns its result.

        going [R] bool: the rows that have not ended. This and `adjust_scores` are what a layout that changes attention overrides.
        """
        result = compute()
        self.length += 1
        return result

    def adjust_scores(self, layer: int, scores: Tensor) -> Tensor:
        """The attention scores [R, H_kv, H/H_kv, K] of one step and layer on their way to the softmax: here as they are."""
        return scores
