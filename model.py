"""model.py: the policy: Qwen2.5-VL through transformers, one shared prompt for a whole group, the attention tap.

A group of G responses shares its prompt, and the prompt is where the image is. So a group is *packed* into one row,

    [ prompt | o_1 | o_2 | … | o_G ]

in which a token attends to the prompt and, causally, to its own response. Vision tower, linear layers and norms see the
prompt once instead of G times, and no padding; only inside attention are responses padded to the longest of their group, and
the prompt's keys stand beside each response's own. The result is that of G separate rows, up to rounding.

What makes it work is one attention function, `attend`, registered with transformers for the decoder. It asks a *layout*
which keys a query may see: `PackedGroups` here (scoring and update, and without responses the prefill), `Decoding` in
rollout.py. In the captured layers the layout also hands queries and keys to a `Tap`, which computes the softmax rows
that DyCo needs and reduces them at once to four numbers per token. No library code is patched.

Shapes: G responses per prompt, B responses, T response tokens, N packed length, K keys, M predicted tokens, H heads,
D head or hidden width, V vocabulary.
"""
import contextlib
import math
import os
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import dyco
from data import Prompt
from dyco import Signals

ATTENTION = "dyco_layout"
WINDOWS = "dyco_flash_windows"  # transformers calls what has flash in its name once per layer, with the borders of all windows


# ----------------------------------------------------------------------------------- attention: one function, two layouts


def attend(module, query: Tensor, key: Tensor, value: Tensor, attention_mask, layout=None, **kwargs):
    """Attention function of the decoder layers: [1 or rows, H, N, D] -> [1 or rows, N, H, D].

    Without a layout (stock `generate`, say) it is transformers' own sdpa attention.
    """
    if layout is None:
        from transformers.integrations.sdpa_attention import sdpa_attention_forward

        return sdpa_attention_forward(module, query, key, value, attention_mask, **kwargs)
    query, key = query.to(value.dtype), key.to(value.dtype)  # under autocast, rotary positions made them float32
    return layout.attend(module.layer_idx, query, key, value, module.scaling), None


def attend_windows(module, query: Tensor, key: Tensor, value: Tensor, attention_mask, scaling: float, cu_seq_lens_q: Tensor, **kwargs):
    """Attention function of the vision tower: windows of one length are one batch, not one call each. [1, H, N, D] -> [1, N, H, D].

    cu_seq_lens_q [windows + 1]: where the windows begin and the last one ends.
    """
    lengths = cu_seq_lens_q.diff()
    kinds, counts = (x.tolist() for x in lengths.unique(return_counts=True))
    if several := len(kinds) > 1:
        order = lengths.repeat_interleave(lengths).argsort(stable=True)  # patches, windows of one length side by side
        query, key, value = (x.index_select(2, order) for x in (query, key, value))
    sizes = [length * count for length, count in zip(kinds, counts)]
    split = lambda x: x[0].split(sizes, dim=1)
    parts = [F.scaled_dot_product_attention(*(x.unflatten(1, (-1, length)).transpose(0, 1) for x in qkv), scale=scaling)
             for length, *qkv in zip(kinds, *map(split, (query, key, value)))]                       # [windows, H, length, D] each
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
        return torch.bmm(a.flatten(0, -3), b.flatten(0, -3), out_dtype=torch.float32).unflatten(0, a.shape[:-2])


def _eager_attention(query, key, value, scale, mask) -> Tensor:
    with torch.autocast(query.device.type, enabled=False):
        scores = (query.float() @ key.float().transpose(-1, -2) * scale).masked_fill(~mask, -math.inf)
    return torch.softmax(scores, dim=-1).to(value.dtype) @ value


def grouped_query_attention(query: Tensor, key: Tensor, value: Tensor, scale: float, kernel: str = "sdpa") -> Tensor:
    """Causal attention, the last query aligned with the last key. query [B, H, T, D], key and value [B, H_kv, K, D].

    The H / H_kv query heads that share a key head meet it without copies of it: by the kernel where it can, else folded into the
    query length.
    """
    batch, heads, queries, width = query.shape
    key_heads, keys = key.shape[1:3]
    repeats = heads // key_heads
    if kernel == "sdpa" and queries == keys:
        return F.scaled_dot_product_attention(query, key, value, is_causal=True, scale=scale, enable_gqa=repeats > 1)
    mask = torch.ones(queries, keys, dtype=torch.bool, device=query.device).tril(keys - queries).repeat(repeats, 1)
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

    def __init__(self, prompts: list[Prompt], branches: list[list[int]], kernel: str = "sdpa", tap: "Tap | None" = None,
                 keep_keys: bool = False, first_group: int = 0):
        self.first_group = first_group  # the tap's number of the first of these groups
        self.kernel, self.tap, self.branches = kernel, tap, branches
        self.prompts = prompts
        self.sections = [n for prompt, group in zip(prompts, branches) for n in (len(prompt.input_ids), sum(group))]
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
        sections = [x[0].transpose(0, 1).split(self.sections) for x in (query, key, value)]              # [tokens, H, D] each
        outputs = []
        for index, (prompt, group) in enumerate(zip(self.prompts, self.branches)):
            q, k, v = (x[2 * index].transpose(0, 1)[None] for x in sections)                            # the prompt
            outputs.append(grouped_query_attention(q, k, v, scale, self.kernel)[0].transpose(0, 1))
            if self.kept is not None:
                self.kept.setdefault(layer, []).append((k, v))
            predictors = q[:, :, -1:].expand(max(len(group), 1), -1, -1, -1)                            # of the first tokens
            k, v = (x.expand(len(predictors), -1, -1, -1) for x in (k, v))
            if any(group):
                padded, real = self.places[index]
                q, own_k, own_v = (x[2 * index + 1].index_select(0, padded).unflatten(0, (len(group), -1)).transpose(1, 2)
                                   for x in sections)                                                   # the responses, [G, H, longest, D]
                k, v = torch.cat([k, own_k], dim=2), torch.cat([v, own_v], dim=2)
                out = grouped_query_attention(q, k, v, scale, self.kernel).transpose(1, 2)
                outputs.append(out.flatten(0, 1).index_select(0, real))
                predictors = torch.cat([predictors, q], dim=2)                                          # and of those after them
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

    MAX_ELEMENTS = 2**25  # of one block of attention rows before heads are averaged: 128 MB in float32
    STEPS = 16            # decoding steps reduced at once

    def __init__(self, layers: list[int], depth: int, shift: str = "fisher_rao", text_scope: str = "after_image",
                 signals=dyco.attention_signals, keep_images: bool = False):
        wrong = [layer for layer in layers if not -depth <= layer < depth]
        if wrong:
            raise ValueError(f"dyco.layers: {wrong} out of range; the model has {depth} decoder layers: {-depth} … {depth - 1}")
        self.layers = sorted({layer % depth for layer in layers})
        self.shift, self.text_scope, self.signals = shift, text_scope, signals
        self.images: dict[int, Tensor] | None = {} if keep_images else None  # group -> [G, T, visual tokens]
        self.sums: dict[int, list[Tensor]] = {}   # group -> sums over layers, each [G, T]
        self.prefill_rows: dict[int, dict[int, Tensor]] = {}  # layer -> group -> the row that predicts its first token
        self.steps: dict[int, list[Tensor]] = {}  # decoding: layer -> the rows [R, K] of the steps not yet reduced, after the last reduced one

    def prompt_members(self, prompt: Prompt, device) -> tuple[Tensor, Tensor]:
        """[P] bool each: the prompt's visual keys and its text keys in scope (everything of a response is text)."""
        visual = prompt.visual_mask.to(device)
        text = ~visual
        if self.text_scope == "after_image" and bool(prompt.visual_mask.any()):
            text = text & (torch.arange(len(visual), device=device) >= int(prompt.visual_mask.int().argmax()))
        return visual, text

    @torch.no_grad()
    def read_group(self, layer: int, group: int, prompt: Prompt, query: Tensor, key: Tensor, scale: float) -> None:
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
            attention = attention_rows(query[:, :, before:start + block], key, scale, first=keys - queries + before)
            signals = self.signals(attention, visual.expand(rows, keys), text.expand(*attention.shape), self.shift)
            parts.append([x[:, start - before:] for x in signals])
            if self.images is not None:
                seen.append(attention[:, start - before:, visual])
        if self.images is not None:
            self.images[group] = self.images.get(group, 0) + torch.cat(seen, dim=1) / len(self.layers)
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
            padded = rows + rows[-1:] * (1 + self.STEPS - len(rows))  # one shape, so that a compiled function is compiled once
            attention = torch.stack([F.pad(row, (0, visual.shape[1] - row.shape[1])) for row in padded], dim=1)
            signals = self.signals(attention, visual, text[:, None].expand(attention.shape), self.shift)
            self._add(0, [x[:, 1:len(rows)] for x in signals])
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
    scores = float32_product(query, key.transpose(-1, -2)).mul_(scale).view(batch, heads, queries, keys)
    ahead = torch.arange(keys, device=key.device) > torch.arange(first, first + queries, device=key.device)[:, None]
    return torch.softmax(scores.masked_fill_(ahead, -math.inf), dim=-1).mean(dim=1)


# ------------------------------------------------------------------------------------------------- log-probabilities


def scaled_logits(hidden: Tensor, weight: Tensor, temperature: float, suppressed: Tensor) -> Tensor:
    """Logits of the one distribution of this project, sampled and scored: float32, with temperature, and some ids at the
    lowest float32 (−∞ would make the entropy NaN).

    hidden [M, D], weight [V, D], suppressed [n] ids -> [M, V].
    """
    logits = float32_product(hidden, weight.T)
    if temperature != 1.0:
        logits = logits / temperature
    return logits.index_fill_(1, suppressed, torch.finfo(torch.float32).min)


def _chunk_forward(hidden, weight, targets, temperature, suppressed):
    logits = scaled_logits(hidden, weight, temperature, suppressed)
    highest = logits.amax(dim=-1, keepdim=True)
    shares = (logits - highest).exp_()  # one exponential serves the total and the entropy
    total = shares.sum(-1)
    log_total = highest.squeeze(-1) + total.log()
    logprobs = logits.gather(-1, targets[:, None]).squeeze(-1) - log_total
    entropy = log_total - torch.linalg.vecdot(shares, logits) / total
    return logprobs, entropy, log_total


def _chunk_backward(hidden, weight, targets, temperature, suppressed, log_total, gradient):
    logits = scaled_logits(hidden, weight, temperature, suppressed)
    gradient = gradient[:, None] / temperature
    slope = logits.sub_(log_total[:, None]).exp_().mul_(-gradient)
    slope = slope.scatter_add_(1, targets[:, None], gradient).to(weight.dtype)
    return slope @ weight, float32_product(slope.T, hidden)


class TokenLogprobs(torch.autograd.Function):
    """Log-probabilities of target tokens and entropies, with only `chunk` rows of [M, V] alive, forward and backward.

    The backward pass computes the logits again: ∂logp/∂logit = 1[target] − softmax. Entropies carry no gradient.
    The product runs in the dtype of `hidden`; the weight's gradient is summed in float32.
    """

    @staticmethod
    def forward(ctx, hidden, weight, targets, temperature, suppressed, chunk, forward_chunk, backward_chunk):
        rounded = weight.detach().to(hidden.dtype)  # detached: a compiled function is compiled once for scoring and update
        parts = [forward_chunk(h, rounded, t, temperature, suppressed)
                 for h, t in zip(hidden.detach().split(chunk), targets.split(chunk))]
        logprobs, entropy, log_total = (torch.cat(x) for x in zip(*parts))
        ctx.save_for_backward(hidden, weight, targets, suppressed, log_total)
        ctx.temperature, ctx.chunk, ctx.backward_chunk = temperature, chunk, backward_chunk
        ctx.mark_non_differentiable(entropy)
        return logprobs, entropy

    @staticmethod
    def backward(ctx, gradient, _):
        hidden, weight, targets, suppressed, log_total = ctx.saved_tensors
        hidden_gradient, weight_gradient = torch.empty_like(hidden), torch.zeros_like(weight, dtype=torch.float32)
        rounded = weight.to(hidden.dtype)
        for start in range(0, len(hidden), ctx.chunk):
            part = slice(start, start + ctx.chunk)
            hidden_gradient[part], added = ctx.backward_chunk(
                hidden[part], rounded, targets[part], ctx.temperature, suppressed, log_total[part], gradient[part])
            weight_gradient += added
        return hidden_gradient, weight_gradient.to(weight.dtype), *[None] * 6


# --------------------------------------------------------------------------------------------------------- the policy


class PackedOutput(NamedTuple):
    logprobs: Tensor           # [B, T] float32, of each response token at the sampling temperature; 0 on padding
    entropy: Tensor            # [B, T] float32, nats, without gradient; 0 on padding
    signals: Signals | None    # [B, T] each, if a tap was given; 0 on padding


class Policy(nn.Module):
    """Qwen2.5-VL as a policy over responses. `forward` is the packed group forward."""

    CHUNK = 512  # predicted tokens whose logits are alive at once: 300 MB for Qwen's vocabulary

    def __init__(self, hf, tokenizer, image_processor, temperature: float = 1.0, kernel: str = "sdpa",
                 dtype: torch.dtype = torch.float32, compiled: bool = False):
        super().__init__()
        register_attention()
        self.hf, self.tokenizer, self.image_processor = hf, tokenizer, image_processor
        self.temperature, self.kernel, self.dtype = temperature, kernel, dtype
        hf.model.language_model.config._attn_implementation = ATTENTION
        hf.model.visual.config._attn_implementation = WINDOWS if kernel == "sdpa" else kernel
        self.eos_ids = set(_as_list(hf.generation_config.eos_token_id) or [tokenizer.eos_token_id])
        # a sampled image or video placeholder would ask the model for an image that is not there
        placeholders = sorted({hf.config.image_token_id, hf.config.video_token_id})
        self.register_buffer("suppressed", torch.tensor(placeholders), persistent=False)
        optimise = (lambda f: torch.compile(f, dynamic=True)) if compiled else (lambda f: f)
        self.forward_chunk, self.backward_chunk = optimise(_chunk_forward), optimise(_chunk_backward)
        self.signals = optimise(dyco.attention_signals)

    @property
    def device(self) -> torch.device:
        return self.suppressed.device

    @property
    def depth(self) -> int:
        return self.hf.config.text_config.num_hidden_layers

    def autocast(self):
        """bfloat16 arithmetic over float32 weights where the policy's dtype asks for it."""
        if self.dtype == torch.float32:
            return contextlib.nullcontext()
        return torch.autocast(self.device.type, dtype=self.dtype)

    def tap(self, settings, keep_images: bool = False) -> Tap:
        """A tap for one forward, or for one prefill and its decoding steps; `settings` has layers, shift and text_scope."""
        return Tap(settings.layers, self.depth, settings.shift, settings.text_scope, self.signals, keep_images)

    # -- inputs

    def look_up(self, ids: Tensor) -> Tensor:
        """Embeddings of token ids, float32: the residual stream is float32 also where weights are of 16 bits."""
        return self.hf.get_input_embeddings()(ids).float()

    def embed(self, prompts: list[Prompt], responses: list[list[Tensor]] | None = None) -> Tensor:
        """Input embeddings of packed groups, [N, D]: ids looked up at once, images where their placeholders stand.

        responses: [prompts][G] input ids of each response, [tokens]; without them the row holds prompts alone.
        """
        pieces, at_images = [], []
        for prompt, group in zip(prompts, responses or [[]] * len(prompts)):
            pieces += [prompt.input_ids.to(self.device), *group]
            at_images += [prompt.visual_mask, torch.zeros(sum(map(len, group)), dtype=torch.bool)]
        embedded = self.look_up(torch.cat(pieces))
        seeing = [p for p in prompts if p.pixel_values is not None]
        seen_by = [parameter for parameter in self.hf.model.visual.parameters() if parameter.requires_grad]
        if not seeing:  # zeros, not nothing, for the vision tower's gradient: it is the same on every process
            return embedded + 0 * sum(parameter.sum() for parameter in seen_by) if torch.is_grad_enabled() else embedded
        pixels = torch.cat([p.pixel_values for p in seeing]).to(self.device, self.hf.model.visual.dtype)
        grid = torch.cat([p.image_grid_thw for p in seeing]).to(self.device)
        with contextlib.nullcontext() if seen_by else torch.no_grad():
            images = torch.cat(tuple(self.hf.model.get_image_features(pixels, grid, return_dict=True).pooler_output))
        return embedded.masked_scatter(torch.cat(at_images).to(self.device)[:, None], images.to(embedded.dtype))

    def prompt_positions(self, prompt: Prompt) -> Tensor:
        """M-RoPE positions of a prompt, [3, P]. A response goes on at the maximum + 1 on all three axes."""
        if prompt.image_grid_thw is None:
            return torch.arange(len(prompt.input_ids)).expand(3, -1)
        ids = prompt.input_ids[None]
        positions, _ = self.hf.model.get_rope_index(ids, mm_token_type_ids=prompt.visual_mask[None].int(),
                                                    image_grid_thw=prompt.image_grid_thw)
        return positions[:, 0]

    def decoder(self, embedded: Tensor, positions: Tensor, layout) -> Tensor:
        """The decoder's last hidden states, [rows, N, D]; embedded [rows, N, D], positions [3, rows, N]."""
        masks = {"full_attention": None, "sliding_attention": None}  # the layout decides what is seen
        return self.hf.model.language_model(inputs_embeds=embedded, position_ids=positions.to(self.device),
                                            attention_mask=masks, use_cache=False, layout=layout).last_hidden_state

    # -- outputs

    def next_token_logits(self, hidden: Tensor, weight: Tensor, temperature: float | None = None) -> Tensor:
        """[M, D] -> [M, V] float32, the distribution that is sampled; `weight` is the head's, in the policy's dtype."""
        return scaled_logits(hidden.to(self.dtype), weight, temperature or self.temperature, self.suppressed)

    def forward(self, prompts: list[Prompt], tokens: Tensor, mask: Tensor, tap: Tap | None = None) -> PackedOutput:
        """Score responses in packed groups.

        prompts: P prompts; tokens [P·G, T] long, group-major; mask [P·G, T] bool, True on the first tokens of each row,
        end token included. With a tap the output holds DyCo's signals too.
        """
        group_size = len(tokens) // len(prompts)
        lengths = mask.sum(1).tolist()
        branches = [[max(n - 1, 0) for n in lengths[i:i + group_size]] for i in range(0, len(lengths), group_size)]
        layout = PackedGroups(prompts, branches, self.kernel, tap)
        positions, predictors, responses, offset = [], [], [], 0
        for index, prompt in enumerate(prompts):
            positions.append(self.prompt_positions(prompt))
            following = int(positions[-1].max()) + 1
            offset += len(prompt.input_ids)
            last_of_prompt = offset - 1
            responses.append([])
            for row, inputs in zip(range(index * group_size, (index + 1) * group_size), branches[index]):
                responses[-1].append(tokens[row, :inputs].to(self.device))
                positions.append(torch.arange(following, following + inputs).expand(3, -1))
                if lengths[row]:
                    predictors += [last_of_prompt, *range(offset, offset + inputs)]
                offset += inputs
        with self.autocast():
            embedded = self.embed(prompts, responses)
            hidden = self.decoder(embedded[None], torch.cat(positions, dim=1)[:, None], layout)[0]
            hidden = hidden[torch.tensor(predictors, dtype=torch.long, device=self.device)]
        mask = mask.to(self.device)
        logprobs, entropy = TokenLogprobs.apply(
            hidden.to(self.dtype), self.hf.lm_head.weight, tokens.to(self.device)[mask], self.temperature, self.suppressed,
            self.CHUNK, self.forward_chunk, self.backward_chunk)
        unpack = lambda flat: torch.zeros(mask.shape, device=self.device).masked_scatter(mask, flat)
        signals = None
        if tap is not None:
            width = mask.shape[1]
            groups = [tap.take(index) for index in range(len(prompts))]
            signals = Signals(*(torch.cat([F.pad(x, (0, width - x.shape[1])) for x in field]) for field in zip(*groups)))
            signals = Signals(*(torch.where(mask, x, 0) for x in signals))
        return PackedOutput(unpack(logprobs), unpack(entropy), signals)

    def idle(self) -> Tensor:
        """A pass over a single token, without an image: a loss of 0 whose gradients are 0."""
        nothing = Prompt(0, "", "", "", torch.zeros(1, dtype=torch.long), torch.zeros(1, dtype=torch.bool), None, None)
        return self([nothing], torch.zeros(1, 1, dtype=torch.long), torch.zeros(1, 1, dtype=torch.bool)).logprobs.sum()


def _as_list(value) -> list:
    return [] if value is None else list(value) if isinstance(value, (list, tuple)) else [value]


# --------------------------------------------------------------------------------------------------- load and save


def load_policy(path: str | Path, device: torch.device, dtype: str = "auto", kernel: str = "sdpa", temperature: float = 1.0,
                compile: str = "auto", trainable: bool = True, freeze_vision: bool = False, gradient_checkpointing: bool = False,
                max_pixels: int | None = None) -> Policy:
    """A Policy from a Qwen2.5-VL directory or hub id. `dtype` ("auto", "float32", "bfloat16") is what arithmetic runs in;
    the weights of a trainable policy are float32 all the same, those of another one are of `dtype`.

    Raises ValueError where the path is not a Qwen2.5-VL.
    """
    from transformers import AutoConfig, AutoTokenizer, Qwen2_5_VLForConditionalGeneration
    from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

    try:
        kind = AutoConfig.from_pretrained(path).model_type
    except (OSError, ValueError) as error:
        raise ValueError(f"model.path: {str(path)!r} is neither a Hugging Face directory nor a hub id: {error}") from None
    if kind != "qwen2_5_vl":
        raise ValueError(f"model.path: {str(path)!r} is a {kind!r}; expected a Qwen2.5-VL (model_type 'qwen2_5_vl')")
    if dtype == "auto":
        dtype = "bfloat16" if device.type == "cuda" else "float32"
    dtype = getattr(torch, dtype)
    if device.type == "cuda":
        torch.backends.cuda.enable_cudnn_sdp(False)  # NaN gradients for some masked shapes on H100; and it plans each new shape
        torch.backends.cudnn.allow_tf32 = False      # float32 is float32: the patch embedding is a convolution
    hf = Qwen2_5_VLForConditionalGeneration.from_pretrained(path, dtype="auto" if trainable else dtype, attn_implementation="sdpa")
    hf.requires_grad_(trainable)
    image_processor = Qwen2VLImageProcessorPil.from_pretrained(path)
    if max_pixels is not None:
        least = image_processor.size["shortest_edge"]  # of this processor, both edges are areas in pixels
        if max_pixels < least:
            raise ValueError(f"data.max_pixels: expected at least {least}, the smallest image of this model, found {max_pixels}")
        image_processor.size["longest_edge"] = max_pixels  # an argument of from_pretrained loses to released files
    if freeze_vision:
        hf.model.visual.requires_grad_(False)
    if gradient_checkpointing:
        hf.gradient_checkpointing_enable({"use_reentrant": False})
    compiled = compile == "on" or compile == "auto" and device.type == "cuda"
    policy = Policy(hf, AutoTokenizer.from_pretrained(path), image_processor, temperature, kernel, dtype, compiled)
    policy.to(device)
    if trainable:
        policy.float()  # on the device: 16 bits a weight are enough in host memory
    return policy.train()  # gradient checkpointing asks for training mode; there is no dropout


def save_policy(policy: Policy, folder: Path, weights: dict[str, Tensor] | None = None) -> None:
    """Write a normal Hugging Face directory: weights (those given, or the policy's), tokenizer with chat template, image processor."""
    policy.hf.save_pretrained(folder, state_dict=weights)
    policy.tokenizer.save_pretrained(folder)
    policy.image_processor.save_pretrained(folder)
