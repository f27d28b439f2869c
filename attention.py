"""attention.py: who sees whom, and what DyCo reads off it.

A layer of the decoder (decoder.py) hands its queries, keys and values to a *layout*, which knows
which keys a query may see. There are two of them:

- `PackedGroups` for scoring and for the update. A group is packed into one row,

      [ prompt | o_1 | o_2 | … | o_G ]

  in which a token attends to the prompt and, causally, to its own response. The prompt, where the
  image is, is computed once instead of G times, and there is no padding outside of attention.
  Without responses it is the prefill of a rollout.
- `Decoding` for one step of a rollout: the newest token of every response.

In the captured layers a layout also hands its attention to a `Tap`, which reduces the rows to four
numbers per token: the two masses and the two shifts of dyco.py (eq. 1 to 3). A packed forward does
that within the call, block after block of queries. Decoding keeps the rows of up to `Tap.STEPS`
steps and reduces them together. No other layer pays.

Shapes: P prompts, L tokens of a prompt, G responses per prompt, R rows that are decoded, S slots
for rows of a prompt, T response tokens, N packed length, B sequences side by side, Q queries, K
keys, H heads, H_kv heads of keys and values, W width of a head.
"""

import math
from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention.bias import causal_lower_right

import dyco
from data import Prompt
from dyco import Signals

# transformers calls a function with flash in its name once per layer, and passes the borders of all
# windows to it. Any other function it calls once for each window.
WINDOWS = "dyco_flash_windows"


# ----------------------------------------------------------------------------- the vision tower


def attend_windows(module, query, key, value, attention_mask, scaling, cu_seq_lens_q, **kwargs):
    """Attention of the vision tower: query [1, H, N, W] -> ([1, N, H, W], None).

    A patch attends within its window. All windows of one length are one batch, instead of a call
    for each of them. cu_seq_lens_q [windows + 1]: where the windows begin, and the last one ends.
    """
    kinds, counts, order = _kinds_of_windows(cu_seq_lens_q)
    if order is not None:
        query, key, value = (x.index_select(2, order) for x in (query, key, value))
    sizes = [length * count for length, count in zip(kinds, counts, strict=True)]
    queries, keys, values = (x[0].split(sizes, dim=1) for x in (query, key, value))

    outputs = []
    for length, *qkv in zip(kinds, queries, keys, values, strict=True):
        # [H, patches, W] -> [windows, H, length, W]
        q, k, v = (x.unflatten(1, (-1, length)).transpose(0, 1) for x in qkv)
        output = F.scaled_dot_product_attention(q, k, v, scale=scaling)
        outputs.append(output.transpose(0, 1).flatten(1, 2))
    output = torch.cat(outputs, dim=1)
    if order is not None:
        output = output.index_select(1, order.argsort())
    return output.transpose(0, 1)[None], None


def _kinds_of_windows(borders: Tensor) -> tuple[list[int], list[int], Tensor | None]:
    """The lengths of windows, how many there are of each, and the patches sorted by them.

    The order is None where all windows are equally long. The answer waits for the device, so it
    stays on the tensor of borders, which the layers of a forward share.
    """
    if not hasattr(borders, "kinds"):
        lengths = borders.diff()
        kinds, counts = (x.tolist() for x in lengths.unique(return_counts=True))
        order = None
        if len(kinds) > 1:
            order = lengths.repeat_interleave(lengths).argsort(stable=True)
        borders.kinds = (kinds, counts, order)
    return borders.kinds


def register_windows() -> None:
    """Make `attend_windows` known to transformers."""
    from transformers import AttentionInterface

    AttentionInterface.register(WINDOWS, attend_windows)


# ----------------------------------------------------------------------------- products and kernels


def float32_product(a: Tensor, b: Tensor) -> Tensor:
    """a @ b with a float32 result, whatever the dtype of the inputs. Without gradient.

    Attention and logits rounded to bfloat16 would drown shifts of τ = 0.05, and the ratios that
    GSPO clips at 3e-4. CUDA's product of 16 bits into float32 has no derivative.
    """
    if torch.is_autocast_enabled(a.device.type):
        # Only then: leaving autocast takes as long as a small product.
        with torch.autocast(a.device.type, enabled=False):
            return float32_product(a, b)
    if a.dtype == torch.float32 and b.dtype == torch.float32:
        return a @ b
    if not a.is_cuda:  # only CUDA multiplies 16 bits into 32
        return a.float() @ b.float()
    if a.dim() == 2:
        return torch.mm(a, b, out_dtype=torch.float32)
    product = torch.bmm(a.flatten(0, -3), b.flatten(0, -3), out_dtype=torch.float32)
    return product.unflatten(0, a.shape[:-2])


def grouped_query_attention(query: Tensor, key: Tensor, value: Tensor, scale: float) -> Tensor:
    """Causal attention in which the last query is aligned with the last key.

    query [B, H, Q, W], key and value [B, H_kv, K, W] -> [B, H, Q, W]. The H / H_kv query heads that
    share a head of keys meet it without copies of it: by the kernel where it can do that, else as
    more queries.
    """
    batch, heads, queries, width = query.shape
    key_heads, keys = key.shape[1:3]
    repeats = heads // key_heads
    if queries == keys:
        return F.scaled_dot_product_attention(
            query, key, value, is_causal=True, scale=scale, enable_gqa=repeats > 1
        )
    if query.is_cuda and query.dtype != torch.float32:
        # A kernel that knows of the corner itself needs no mask in memory. It takes 16 bits only.
        corner = causal_lower_right(queries, keys)
        return F.scaled_dot_product_attention(
            query, key, value, attn_mask=corner, scale=scale, enable_gqa=repeats > 1
        )
    visible = torch.ones(queries, keys, dtype=torch.bool, device=query.device)
    visible = visible.tril(keys - queries).repeat(repeats, 1)
    query = query.reshape(batch, key_heads, repeats * queries, width)
    output = F.scaled_dot_product_attention(query, key, value, attn_mask=visible, scale=scale)
    return output.reshape(batch, heads, queries, width)


def attention_rows(query: Tensor, key: Tensor, scale: float, first: int) -> Tensor:
    """The softmaxed rows of causal attention, averaged over heads.

    query [B, H, Q, W], key [B, H_kv, K, W] -> [B, Q, K] float32. `first`: the place of the first
    query among the keys.
    """
    batch, heads, queries, width = query.shape
    key_heads, keys = key.shape[1:3]
    query = query.reshape(batch, key_heads, heads // key_heads * queries, width)
    logits = float32_product(query, key.transpose(-1, -2)).mul_(scale)
    logits = logits.view(batch, heads, queries, keys)
    places = torch.arange(first, first + queries, device=key.device)
    ahead = torch.arange(keys, device=key.device) > places[:, None]
    return torch.softmax(logits.masked_fill_(ahead, -math.inf), dim=-1).mean(dim=1)


# ------------------------------------------------------------------------------------ packed groups


class PackedGroups:
    """The layout of one row that holds packed groups: [prompt_1 | o_11 … o_1G | prompt_2 | …].

    A group costs L²/2 + G·T·(L + T/2) pairs of query and key: no response meets the keys of
    another one, not even to be masked.
    """

    hooks = True  # of the layers, see decoder.run

    def __init__(
        self,
        prompts: list[Prompt],
        branches: list[list[int]],
        tap: "Tap | None" = None,
        keep_keys: bool = False,
        first_group: int = 0,
    ):
        """
        branches: [prompts][G] number of *input* tokens of each response. The last token of a
            response is predicted and never read, so it is not packed.
        keep_keys: keep the prompts' keys and values in `kept`, for decoding.
        first_group: the number by which the tap knows the first of these groups.
        """
        self.prompts = prompts
        self.branches = branches
        self.tap = tap
        self.first_group = first_group
        self.sections: list[int] = []  # lengths of prompt_1, its responses, prompt_2, …
        for prompt, group in zip(prompts, branches, strict=True):
            self.sections += [len(prompt.input_ids), sum(group)]
        self.places: list[tuple[Tensor, Tensor]] | None = None  # of each group, made on the device
        # layer -> keys and values of each prompt, [1, H_kv, L, W] each
        self.kept: dict[int, list[tuple[Tensor, Tensor]]] | None = {} if keep_keys else None

    @staticmethod
    def _places(group: list[int], device) -> tuple[Tensor, Tensor]:
        """Where the tokens of a group are: packed behind one another, or in a padded [G, longest].

        Returns the packed place of each padded token [G·longest], and the padded place of each
        packed token [tokens]. A padded token reads whatever stands at its place: it lies behind
        every real query, and its own output is dropped.
        """
        lengths = torch.tensor(group)
        steps = torch.arange(max(group, default=0))
        starts = lengths.cumsum(0) - lengths
        packed_place = (starts[:, None] + steps).flatten().clamp(max=sum(group) - 1)
        is_real = steps < lengths[:, None]
        padded_place = is_real.flatten().nonzero().squeeze(-1)
        return packed_place.to(device), padded_place.to(device)

    def attend(self, layer: int, query: Tensor, key: Tensor, value: Tensor, scale: float) -> Tensor:
        """query [1, H, N, W], key and value [1, H_kv, N, W] -> [1, N, H, W]."""
        if self.places is None:
            self.places = [self._places(group, query.device) for group in self.branches]
        # [tokens, heads, W] of each section
        sections = [x[0].transpose(0, 1).split(self.sections) for x in (query, key, value)]
        outputs = []
        for index in range(len(self.prompts)):
            of_prompt = [x[2 * index] for x in sections]
            of_responses = [x[2 * index + 1] for x in sections]
            outputs += self._attend_group(layer, index, of_prompt, of_responses, scale=scale)
        return torch.cat(outputs)[None]

    def _attend_group(
        self,
        layer: int,
        index: int,
        of_prompt: list[Tensor],
        of_responses: list[Tensor],
        scale: float,
    ) -> list[Tensor]:
        """The outputs [tokens, H, W] of a prompt and of its responses."""
        group = self.branches[index]
        query, key, value = (x.transpose(0, 1)[None] for x in of_prompt)
        outputs = [grouped_query_attention(query, key, value, scale)[0].transpose(0, 1)]
        if self.kept is not None:
            # Copies, because these are views of tensors that hold queries as well.
            self.kept.setdefault(layer, []).append((key.clone(), value.clone()))

        # The last token of the prompt predicts the first token of every response.
        rows = max(len(group), 1)
        predictors = query[:, :, -1:].expand(rows, -1, -1, -1)
        key = key.expand(rows, -1, -1, -1)
        value = value.expand(rows, -1, -1, -1)
        if any(group):
            packed_place, padded_place = self.places[index]

            def pad(x: Tensor) -> Tensor:  # [tokens, heads, W] -> [G, heads, longest, W]
                padded = x.index_select(0, packed_place).unflatten(0, (len(group), -1))
                return padded.transpose(1, 2)

            query, own_key, own_value = map(pad, of_responses)
            key = torch.cat([key, own_key], dim=2)
            value = torch.cat([value, own_value], dim=2)
            output = grouped_query_attention(query, key, value, scale).transpose(1, 2)
            outputs.append(output.flatten(0, 1).index_select(0, padded_place))
            predictors = torch.cat([predictors, query], dim=2)
        if self.tap is not None and layer in self.tap.layers:
            group_number = self.first_group + index
            self.tap.read_group(
                layer, group_number, self.prompts[index], query=predictors, key=key, scale=scale
            )
        return outputs


# -------------------------------------------------------------------------------- the attention tap


class Tap:
    """Reduces attention to DyCo's signals where it arises, in the captured layers only.

    `read_group` serves the packed forward; `rows` and `reduce_rows` serve decoding. Both end in
    dyco.attention_signals. Each captured layer is reduced by itself, and `take` averages the
    signals of the layers.
    """

    MAX_ELEMENTS = 2**25  # of one block of rows before heads are averaged: 128 MB in float32
    STEPS = 16  # decoding steps that are reduced together

    def __init__(
        self,
        layers: list[int],
        depth: int,
        shift: str = "fisher_rao",
        text_scope: str = "after_image",
        signals=dyco.attention_signals,
        keep_images: bool = False,
    ):
        """
        layers: decoder layers, of `depth` in all; negatives count from the end. Raises ValueError
            where there is no such layer.
        signals: dyco.attention_signals, or its compiled form.
        keep_images: `read_group` also leaves the rows' attention to the image, averaged over the
            layers, in `images`: group -> [G, T, visual tokens].
        """
        wrong = [layer for layer in layers if not -depth <= layer < depth]
        if wrong:
            raise ValueError(
                f"dyco.layers: {wrong} out of range; the model has {depth} decoder layers: "
                f"{-depth} … {depth - 1}"
            )
        self.layers = sorted({layer % depth for layer in layers})
        self.shift = shift
        self.text_scope = text_scope
        self.signals = signals
        self.images: dict[int, Tensor] | None = {} if keep_images else None
        self.sums: dict[int, list[Tensor]] = {}  # group -> sums over layers, [G, T] each
        # layer -> group -> the row that predicts the group's first token
        self.prefill_rows: dict[int, dict[int, Tensor]] = {}
        # Decoding: layer -> [R, 1 + STEPS, K], the row that was reduced last, and those since.
        self.rows: dict[int, Tensor] = {}

    def prompt_members(self, prompt: Prompt, device) -> tuple[Tensor, Tensor]:
        """Which keys of a prompt are visual, and which are text in scope, [L] bool each.

        Text before the first image is out of scope by default, and with it the attention sink of
        Qwen's system prompt. Everything of a response is text.
        """
        visual = prompt.visual_mask.to(device)
        text = ~visual
        if self.text_scope == "after_image" and bool(prompt.visual_mask.any()):
            first_visual = int(prompt.visual_mask.int().argmax())
            text = text & (torch.arange(len(visual), device=device) >= first_visual)
        return visual, text

    @torch.no_grad()
    def read_group(
        self, layer: int, group: int, prompt: Prompt, query: Tensor, key: Tensor, scale: float
    ) -> None:
        """Reduce the attention of a packed group.

        query [G, H, T, W]: of the last prompt token, then of the response tokens; key
        [G, H_kv, K, W]: of the prompt, then of the response itself.
        """
        rows, heads, queries, _ = query.shape
        keys = key.shape[2]
        visual, text = self.prompt_members(prompt, key.device)
        visual = F.pad(visual, (0, keys - len(visual)))
        text = F.pad(text, (0, keys - len(text)), value=True)
        # Blocks of queries bound the memory. Each block begins with the query before it, so that
        # its first shift has a predecessor.
        block = max(1, self.MAX_ELEMENTS // (rows * heads * keys))
        signals, images = [], []
        for start in range(0, queries, block):
            before = max(start - 1, 0)
            attention = attention_rows(
                query[:, :, before : start + block], key, scale, first=keys - queries + before
            )
            of_block = self.signals(
                attention,
                visual.expand(rows, keys),
                text.expand(*attention.shape),
                shift=self.shift,
            )
            signals.append([x[:, start - before :] for x in of_block])
            if self.images is not None:
                images.append(attention[:, start - before :, visual])
        if self.images is not None:
            share = torch.cat(images, dim=1) / len(self.layers)
            self.images[group] = self.images.get(group, 0) + share
        self._add(group, [torch.cat(x, dim=1) for x in zip(*signals, strict=True)])
        if queries == 1:  # a prefill: decoding goes on from this row
            self.prefill_rows.setdefault(layer, {})[group] = attention[:, 0]

    @torch.no_grad()
    def reduce_rows(self, count: int, visual: Tensor, text: Tensor) -> Signals:
        """The signals [R, count] of the rows 1 … count, the last of which becomes row 0.

        visual and text [R, K] bool: the members among the keys.
        """
        for rows in self.rows.values():
            # Always all rows, and a copy without gaps, so that a compiled function is compiled
            # once. What stands behind `count` is of earlier steps; its signals are cut off.
            attention = rows[:, :, : visual.shape[1]].clone()
            signals = self.signals(
                attention, visual, text[:, None].expand(attention.shape), shift=self.shift
            )
            self._add(0, [x[:, 1 : 1 + count] for x in signals])
            rows[:, 0] = rows[:, count]
        return self.take(0)

    def _add(self, group: int, signals: list[Tensor]) -> None:
        if group in self.sums:
            signals = [a + b for a, b in zip(self.sums[group], signals, strict=True)]
        self.sums[group] = list(signals)

    def take(self, group: int) -> Signals:
        """The signals of a group, averaged over the captured layers. They are forgotten here."""
        return Signals(*(x / len(self.layers) for x in self.sums.pop(group)))


# ----------------------------------------------------------------------------------------- decoding


class Pace(NamedTuple):
    """How often the CPU looks at a rollout, and in which steps the shapes of decoding change.

    Between two looks a step has the same shapes, and nothing waits for the device. `look` divides
    Tap.STEPS.
    """

    look: int  # steps of decoding between two looks at which responses have ended
    own_keys: int  # the space for own keys grows by so many
    leave: float  # ended responses leave when at most this share goes on: leaving copies the cache


# On a CPU a look costs nothing, and neither do new shapes. On a GPU a look waits for the device,
# and new shapes are a new graph (rollout.py).
ON_CPU = Pace(look=1, own_keys=16, leave=0.75)
ON_GPU = Pace(look=16, own_keys=256, leave=0.5)


# Keys of a prompt are stored in steps of so many: a GPU's fast products of 16 bits want rows that
# begin at multiples of 16 bytes.
ALIGNED = 8


def pace_on(device: torch.device) -> Pace:
    return ON_CPU if device.type == "cpu" else ON_GPU


class Decoding:
    """The layout of decoding: every row sees the keys of its prompt and its own.

    The keys of a prompt are never copied to its G rows. The G queries meet them together, as one
    small matrix product, and each row brings only its own keys. The softmax over both parts is
    explicit, so the attention row that DyCo reads is there anyway.

    All that a step reads and writes is allocated beforehand, and the place where it writes is a
    tensor, `position`. A row meets the whole space for own keys: what it may not see, its own later
    keys and the padding of its prompt, has a bias of −∞. So a step is the same work whatever the
    tokens are, which can be recorded once and replayed.
    """

    # A layout whose steps must not be replayed, because the CPU takes part in them, says False.
    static = True
    # Hooks of layers gather sharded weights. A rollout has gathered all of them beforehand, and a
    # step that is recorded must not hold the waits between streams that hooks make.
    hooks = False

    def __init__(
        self,
        prompts: list[Prompt],
        kept: dict[int, list[tuple[Tensor, Tensor]]],
        group_size: int,
        capacity: int,
        tap: Tap | None,
        device,
    ):
        """
        kept: layer -> keys and values of each prompt, as PackedGroups left them; emptied here.
        capacity: tokens that a response may have.
        """
        self.tap = tap
        self.pace = pace_on(device)
        self.capacity = round_up(capacity, self.pace.own_keys)
        self.width = 0  # the space for own keys that steps use at present
        self.position = torch.zeros(1, dtype=torch.long, device=device)  # where the next key goes
        self.count = len(prompts)
        self.prompt_of = torch.arange(self.count, device=device).repeat_interleave(group_size)
        lengths = torch.tensor([len(prompt.input_ids) for prompt in prompts], device=device)
        self.prompt_width = round_up(int(lengths.max()), ALIGNED)
        # layer -> of the prompts, keys [P, H_kv, W, prompt_width], which are multiplied the quicker
        # for being stored like this, and values [P, H_kv, prompt_width, W]
        self.shared: dict[int, tuple[Tensor, Tensor]] = {}
        # layer -> keys and values of the rows' own tokens, [P, H_kv, S, capacity, W] each
        self.own: dict[int, tuple[Tensor, Tensor]] = {}
        for layer in list(kept):
            keys, values = (self._stack(x) for x in zip(*kept.pop(layer), strict=True))
            self.shared[layer] = (keys.mT.contiguous(), values)
            # Zeros, because 0 · NaN would be NaN where nobody looks yet.
            shape = (self.count, keys.shape[1], group_size, self.capacity, keys.shape[3])
            self.own[layer] = (keys.new_zeros(shape), values.new_zeros(shape))
        places = torch.arange(self.prompt_width + self.capacity, device=device)
        bias = torch.where(places < lengths[:, None], 0.0, -math.inf)
        # [P, 1, S, 1, K] float32
        self.bias = bias[:, None, None, None].repeat(1, 1, group_size, 1, 1)
        self._place()
        if tap is not None:
            self._prepare_tap(prompts, device)

    def _stack(self, tensors: tuple[Tensor, ...]) -> Tensor:
        """[1, H_kv, L_i, W] of each prompt -> [P, H_kv, prompt_width, W]."""
        width = self.prompt_width
        return torch.cat([F.pad(x, (0, 0, 0, width - x.shape[2])) for x in tensors])

    def _prepare_tap(self, prompts: list[Prompt], device) -> None:
        """The members among the prompts' keys for each row, and the rows of the prefill."""

        def fit(x: Tensor) -> Tensor:
            return F.pad(x, (0, self.prompt_width - x.shape[-1]))

        members = [self.tap.prompt_members(prompt, device) for prompt in prompts]
        self.visual = torch.stack([fit(visual) for visual, _ in members])[self.prompt_of]
        self.text = torch.stack([fit(text) for _, text in members])[self.prompt_of]
        # The place of the next row among those that the tap keeps.
        self.next_row = torch.ones(1, dtype=torch.long, device=device)
        shape = (len(self.prompt_of), 1 + Tap.STEPS, self.prompt_width + self.capacity)
        for layer, rows in self.tap.prefill_rows.items():
            of_prompts = torch.cat([fit(rows[prompt]) for prompt in range(self.count)])
            self.tap.rows[layer] = torch.zeros(shape, device=device)
            self.tap.rows[layer][:, 0, : self.prompt_width] = of_prompts[self.prompt_of]

    def _place(self) -> None:
        """Give each row a slot in the grid [P, S] of prompts and their rows.

        Where prompts have different numbers of rows, some slots are empty. They show row 0, and
        what they compute is dropped.
        """
        counts = torch.bincount(self.prompt_of)  # of each prompt: one without rows has left
        first = counts.cumsum(0) - counts
        self.slots = int(counts.max())
        rows = torch.arange(len(self.prompt_of), device=counts.device)
        self.slot_of_row = self.prompt_of * self.slots + rows - first[self.prompt_of]
        self.row_of_slot = rows.new_zeros(self.count * self.slots)
        self.row_of_slot[self.slot_of_row] = rows
        self.full = len(rows) == len(self.row_of_slot)

    def to_grid(self, x: Tensor) -> Tensor:
        """[R, heads, n, W] -> [P, heads, S, n, W]."""
        if not self.full:
            x = x.index_select(0, self.row_of_slot)
        return x.view(self.count, self.slots, *x.shape[1:]).transpose(1, 2)

    def from_grid(self, x: Tensor) -> Tensor:
        """[P, heads, S, n, W] -> [R, heads, n, W]."""
        x = x.transpose(1, 2).flatten(0, 1)
        return x if self.full else x.index_select(0, self.slot_of_row)

    def attend(self, layer: int, query: Tensor, key: Tensor, value: Tensor, scale: float) -> Tensor:
        """query [R, H, 1, W], key and value [R, H_kv, 1, W] of the newest token -> [R, 1, H, W]."""
        rows, heads, _, width = query.shape
        own_keys, own_values = (x[:, :, :, : self.width] for x in self.own[layer])
        own_keys.index_copy_(3, self.position, self.to_grid(key))
        own_values.index_copy_(3, self.position, self.to_grid(value))
        shared_keys, shared_values = self.shared[layer]

        # [P, H_kv, S, n, W], where n = H / H_kv heads share a head of keys
        query = self.to_grid(query.reshape(rows, key.shape[1], -1, width)).contiguous()
        shared_logits = float32_product(query.flatten(2, 3), shared_keys)
        own_logits = float32_product(query, own_keys.mT)
        shared_logits = shared_logits.view(*query.shape[:-1], -1)
        logits = torch.cat([shared_logits, own_logits], dim=-1)
        # In place: on a CPU, fresh memory of this size costs as much as what is computed in it.
        torch.add(self.bias[..., : logits.shape[-1]], logits, alpha=scale, out=logits)
        logits = self.adjust_logits(layer, logits)
        attention = torch.softmax(logits, dim=-1, out=logits)  # [P, H_kv, S, n, K]
        if self.tap is not None and layer in self.tap.layers:
            # Over all heads; a mean over both dimensions at once takes a CPU 3 to 5 times as long.
            row = self.from_grid(attention.mean(3, keepdim=True).mean(1, keepdim=True))[:, 0]
            self.tap.rows[layer][:, :, : row.shape[-1]].index_copy_(1, self.next_row, row)

        attention = attention.to(value.dtype)
        output = attention[..., self.prompt_width :] @ own_values
        to_prompt = attention[..., : self.prompt_width].flatten(2, 3)
        output = output + (to_prompt @ shared_values).view_as(output)
        return self.from_grid(output).reshape(rows, 1, heads, width)

    def make_room(self, keys: int) -> None:
        """Let the next steps use the space for so many own keys."""
        self.width = round_up(keys, self.pace.own_keys)

    def keep(self, rows: Tensor) -> None:
        """Only these rows go on: [rows] places in the present batch, in their order."""
        old_slots = self.slots
        old_slot_of_row = self.slot_of_row[rows]
        # Prompts without rows leave, too.
        prompts, self.prompt_of = self.prompt_of[rows].unique(return_inverse=True)
        if len(prompts) < self.count:
            self.count = len(prompts)
            for layer, (keys, values) in self.shared.items():
                self.shared[layer] = (keys[prompts], values[prompts])
        self._place()
        # Where what a slot shows now was before, [P, 1, S] each.
        before = old_slot_of_row[self.row_of_slot].view(self.count, 1, self.slots)
        prompt, slot = before // old_slots, before % old_slots

        def pick(x: Tensor) -> Tensor:  # [old P, heads, old S, …] -> [P, heads, S, …]
            head = torch.arange(x.shape[1], device=x.device)[:, None]
            return x[prompt, head, slot]

        for layer, (keys, values) in self.own.items():
            self.own[layer] = (pick(keys), pick(values))
        self.bias = pick(self.bias)
        if self.tap is not None:
            self.visual = self.visual[rows]
            self.text = self.text[rows]
            for layer, attention in self.tap.rows.items():
                self.tap.rows[layer] = attention[rows]

    def members(self) -> tuple[Tensor, Tensor]:
        """Which keys are visual, and which are text in scope, [R, K] bool each.

        The keys are those of the prompts, and the space for own keys.
        """
        own = (0, self.width)
        return F.pad(self.visual, own), F.pad(self.text, own, value=True)

    def signals(self, count: int) -> Signals:
        """The signals [R, count] of the last `count` steps, at most Tap.STEPS; only with a tap."""
        self.next_row.fill_(1)
        return self.tap.reduce_rows(count, *self.members())

    # Two methods to override, for layouts that change attention (tools/intervene.py).

    def advance(self, compute: Callable[[], Tensor], going: Tensor) -> Tensor:
        """One decoding step: compute() passes the new token of each row through the decoder.

        going [R] bool: the rows that have not ended. Returns what compute() returns.
        """
        self.bias.index_fill_(-1, self.prompt_width + self.position, 0.0)
        hidden = compute()
        self.position += 1
        if self.tap is not None:
            self.next_row += 1
        return hidden

    def adjust_logits(self, layer: int, logits: Tensor) -> Tensor:
        """The attention logits [P, H_kv, S, H / H_kv, K] of a step on their way to the softmax.

        `from_grid` gives them by rows, [R, H_kv, H / H_kv, K], and `to_grid` takes these back.
        """
        return logits


def round_up(number: int, step: int) -> int:
    """The next multiple of a step.

    >>> round_up(33, 16)
    48
    """
    return -(-number // step) * step
