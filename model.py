"""model.py: the policy: a Qwen-VL through transformers, and its log-probabilities.

`Policy.forward` is the packed group forward: the responses of a group stand behind one copy of
their prompt (attention.py, PackedGroups), so vision tower, linear layers and norms see the prompt
once instead of G times. The result is that of G separate rows, up to rounding.

Log-probabilities are taken only where a response token is predicted, and in chunks: the logits of
all tokens, [M, V], never exist as a whole, neither forward nor backward (`TokenLogprobs`).

Shapes: P prompts, L tokens of a prompt, G responses per prompt, B = P·G responses, T response
tokens, N packed length, M predicted tokens, D hidden width, V vocabulary.
"""

import contextlib
import copy
import json
import re
import shutil
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import decoder
import dyco
from attention import WINDOWS, PackedGroups, Tap, float32_product, register_windows
from data import Prompt, Sample, encode_prompt, without_images
from decoder import Embedded, Rotary
from dyco import Signals
from rows import first_line

# -------------------------------------------------------------------------------- log-probabilities

PRODUCT_CHUNKS = 4  # whose slopes are kept for one product in 16 bits: 600 MB for Qwen's vocabulary


def scaled_logits(logits: Tensor, temperature: float, suppressed: Tensor) -> Tensor:
    """The logits of the one distribution of this project, which is sampled and scored.

    logits [M, V] float32 as the head gives them, suppressed [n] ids -> [M, V]. Suppressed ids get
    the lowest float32: with −∞ the entropy would be NaN.
    """
    if temperature != 1.0:
        logits = logits / temperature
    return logits.index_fill_(1, suppressed, torch.finfo(torch.float32).min)


def _chunk_forward(hidden, weight, targets, temperature, suppressed):
    """Log-probability, entropy and log of the partition function of some tokens, [M] each."""
    logits = scaled_logits(float32_product(hidden, weight.T), temperature, suppressed)
    highest = logits.amax(dim=-1, keepdim=True)
    # One exponential serves the total and the entropy.
    shares = (logits - highest).exp_()
    total = shares.sum(-1)
    log_total = highest.squeeze(-1) + total.log()
    logprobs = logits.gather(-1, targets[:, None]).squeeze(-1) - log_total
    entropy = log_total - torch.linalg.vecdot(shares, logits) / total
    return logprobs, entropy, log_total


def _chunk_slope(hidden, weight, targets, temperature, suppressed, log_total, gradient):
    """The gradient of the logits, before the temperature: ∂logp / ∂logit = 1[target] − softmax.

    [M, V] in the weight's dtype.
    """
    logits = scaled_logits(float32_product(hidden, weight.T), temperature, suppressed)
    gradient = gradient[:, None] / temperature
    slope = logits.sub_(log_total[:, None]).exp_().mul_(-gradient)
    return slope.scatter_add_(1, targets[:, None], gradient).to(weight.dtype)


def _slices(length: int, size: int, together: int) -> list[list[slice]]:
    """0 … length cut into slices of `size`, and these in lists of `together`.

    >>> _slices(5, size=2, together=2)
    [[slice(0, 2, None), slice(2, 4, None)], [slice(4, 6, None)]]
    """
    slices = [slice(start, start + size) for start in range(0, length, size)]
    return [slices[i : i + together] for i in range(0, len(slices), together)]


def _add_product(total: Tensor, slopes: list[Tensor], hidden: Tensor) -> None:
    """total [V, D] float32 += slopesᵀ @ hidden, for slopes [m, V] of consecutive rows of hidden."""
    if hidden.dtype == torch.float32:
        (slope,) = slopes
        total.addmm_(slope.T, hidden)
    else:
        total += float32_product(torch.cat(slopes).T, hidden)


class TokenLogprobs(torch.autograd.Function):
    """Log-probabilities of target tokens, and entropies, [M] each.

    Only `chunk` rows of the logits [M, V] are alive at a time; the backward pass computes them
    again. Entropies carry no gradient. The product runs in the dtype of `hidden`, and the weight's
    gradient is summed in float32.
    """

    @staticmethod
    def forward(
        ctx, hidden, weight, targets, temperature, suppressed, chunk, forward_chunk, slope_chunk
    ):
        # Detached, so that a compiled function is compiled once for scoring and for the update.
        rounded = weight.detach().to(hidden.dtype)
        parts = []
        chunks = zip(hidden.detach().split(chunk), targets.split(chunk), strict=True)
        for hidden_part, targets_part in chunks:
            parts.append(forward_chunk(hidden_part, rounded, targets_part, temperature, suppressed))
        logprobs, entropy, log_total = (torch.cat(x) for x in zip(*parts, strict=True))
        ctx.save_for_backward(hidden, weight, targets, suppressed, log_total)
        ctx.temperature = temperature
        ctx.chunk = chunk
        ctx.slope_chunk = slope_chunk
        ctx.mark_non_differentiable(entropy)
        return logprobs, entropy

    @staticmethod
    def backward(ctx, gradient, _):
        hidden, weight, targets, suppressed, log_total = ctx.saved_tensors
        rounded = weight.to(hidden.dtype)
        # A frozen head has no gradient, and neither have the states below the first trained weight.
        for_hidden, for_weight = ctx.needs_input_grad[:2]
        hidden_gradient = torch.empty_like(hidden) if for_hidden else None
        total = torch.zeros_like(weight, dtype=torch.float32) if for_weight else None
        # In 16 bits a product cannot be added in place, and the sum over the whole vocabulary is
        # what costs: so there one product serves several chunks.
        together = 1 if rounded.dtype == torch.float32 else PRODUCT_CHUNKS
        for chunks in _slices(len(hidden), ctx.chunk, together):
            slopes = []
            for chunk in chunks:
                slope = ctx.slope_chunk(
                    hidden[chunk],
                    rounded,
                    targets[chunk],
                    ctx.temperature,
                    suppressed,
                    log_total[chunk],
                    gradient[chunk],
                )
                if for_hidden:
                    hidden_gradient[chunk] = slope @ rounded
                if for_weight:
                    slopes.append(slope)
            if for_weight:
                _add_product(total, slopes, hidden[chunks[0].start : chunks[-1].stop])
        weight_gradient = total.to(weight.dtype) if for_weight else None
        none_for_the_rest = [None] * 6
        return hidden_gradient, weight_gradient, *none_for_the_rest


# --------------------------------------------------------------------------------------- the policy


class PackedOutput(NamedTuple):
    """What the packed forward says of each response token, [B, T] each; 0 on padding."""

    logprobs: Tensor  # float32, at the sampling temperature
    entropy: Tensor  # float32, in nats, without gradient
    signals: Signals | None  # if a tap was given
    # of the state that predicts the token with the image, see image_similarity; if asked for
    image_similarity: Tensor | None = None


def image_similarity(hidden: Tensor, image: Tensor) -> Tensor:
    """The cosine of last hidden states [M, D] with the mean one of their prompt's image tokens.

    image [M, D]; 0 where a prompt has no image, whose mean is 0. The signal of VGPO
    (arXiv 2604.09349).
    """
    return F.cosine_similarity(hidden.float(), image.float(), dim=-1)


def mean_image_states(row: Tensor, layout: PackedGroups) -> Tensor:
    """The mean last hidden state of each prompt's image tokens: packed row [N, D] -> [prompts, D].

    0 where a prompt has no image.
    """
    means = []
    for hidden, prompt in zip(row.split(layout.sections)[::2], layout.prompts, strict=True):
        visual = prompt.visual_mask.to(row.device)
        means.append((hidden.float() * visual[:, None]).sum(0) / visual.sum().clamp(min=1))
    return torch.stack(means)


class PatchProduct:
    """The forward that a patch embedding is given, by decoder.mix_in.

    Patches do not overlap, so the library's convolution is a product. As a convolution it would ask
    cuDNN, some of whose versions lack one for 16 bits, or have one that takes seconds.
    """

    def forward(self, patches: Tensor | list[Tensor]) -> Tensor:
        """[patches, channels · frames · height · width] -> [patches, width of the tower].

        Or a list of such tensors, to spare the copy that would join them: they are large.
        """
        weight = self.proj.weight.flatten(1)
        parts = [patches] if isinstance(patches, Tensor) else patches
        embedded = [F.linear(x.to(weight.dtype), weight, self.proj.bias) for x in parts]
        return torch.cat(embedded)


class Policy(nn.Module):
    """A Qwen-VL as a policy over responses. `forward` is the packed group forward."""

    # Predicted tokens whose logits are alive at once: 300 MB for Qwen's vocabulary.
    CHUNK = 512

    def __init__(
        self,
        hf,
        tokenizer,
        image_processor,
        temperature: float = 1.0,
        dtype: torch.dtype = torch.float32,
        compiled: bool = False,
        graphs: bool = True,
        released_processor=None,
    ):
        """hf: a model of FAMILIES. dtype: of the arithmetic. compiled: the two scoring functions,
        log-probabilities and signals, go through torch.compile. graphs: on a GPU decoding is
        replayed as CUDA graphs. released_processor: the image processor that save_policy writes,
        by default image_processor.
        """
        super().__init__()
        register_windows()
        self.hf = hf
        self.tokenizer = tokenizer
        self.image_processor = image_processor
        self.released_processor = released_processor or image_processor
        self.released_dtype = hf.dtype  # of the weights that were loaded, which become float32
        self.temperature = temperature
        self.dtype = dtype
        self.graphs = graphs
        decoder.take_layouts(hf.model.language_model.layers)
        hf.model.visual.config._attn_implementation = WINDOWS
        decoder.mix_in(hf.model.visual.patch_embed, PatchProduct)
        # The tokenizer's end token counts, too: a generation_config.json that names only the end of
        # the text would let a response run on behind the end of its turn.
        end_ids = {*_as_list(hf.generation_config.eos_token_id), tokenizer.eos_token_id}
        self.eos_ids = end_ids - {None}
        # A sampled placeholder of an image or video would ask for an image that is not there.
        placeholders = sorted({hf.config.image_token_id, hf.config.video_token_id})
        self.register_buffer("suppressed", torch.tensor(placeholders), persistent=False)
        self.forward_chunk = _chunk_forward
        self.slope_chunk = _chunk_slope
        self.signals = dyco.attention_signals
        if compiled:
            self.forward_chunk = torch.compile(_chunk_forward, dynamic=True)
            self.slope_chunk = torch.compile(_chunk_slope, dynamic=True)
            self.signals = torch.compile(dyco.attention_signals, dynamic=True)

    @property
    def device(self) -> torch.device:
        return self.suppressed.device

    @property
    def depth(self) -> int:
        """Decoder layers."""
        return self.hf.config.text_config.num_hidden_layers

    def autocast(self):
        """bfloat16 arithmetic over float32 weights, where the policy's dtype asks for it."""
        if self.dtype == torch.float32:
            return contextlib.nullcontext()
        return torch.autocast(self.device.type, dtype=self.dtype)

    def tap(self, settings, keep_images: bool = False) -> Tap:
        """A tap for one forward, or for one prefill and its decoding steps.

        settings: has layers, shift and text_scope, as the section `dyco` of the config.
        """
        return Tap(
            settings.layers,
            self.depth,
            settings.shift,
            text_scope=settings.text_scope,
            signals=self.signals,
            keep_images=keep_images,
        )

    # --------------------------------------------------------------------------------------- inputs

    def encode(
        self, sample: Sample, index: int, template: str, max_prompt_tokens: int | None = None
    ) -> Prompt:
        """data.encode_prompt with this policy's tokenizer and image processor."""
        return encode_prompt(
            sample,
            index,
            self.tokenizer,
            image_processor=self.image_processor,
            template=template,
            max_prompt_tokens=max_prompt_tokens,
        )

    def look_up(self, ids: Tensor) -> Tensor:
        """Embeddings of token ids. The residual stream is float32 also where weights have 16
        bits."""
        return self.hf.get_input_embeddings()(ids).float()

    def embed(self, prompts: list[Prompt], responses: list[list[Tensor]] | None = None) -> Embedded:
        """Packed groups embedded as one row, with the images where their placeholders stand.

        responses: [prompts][G] input ids [tokens] of each response. Without them the row holds the
        prompts alone.
        """
        if responses is None:
            responses = [[] for _ in prompts]
        ids, is_image = [], []
        for prompt, group in zip(prompts, responses, strict=True):
            tokens_of_group = sum(len(response) for response in group)
            ids += [prompt.input_ids.to(self.device), *group]
            is_image += [prompt.visual_mask, torch.zeros(tokens_of_group, dtype=torch.bool)]
        embedded = self.look_up(torch.cat(ids))
        with_images = [prompt for prompt in prompts if prompt.pixel_values is not None]
        if not with_images:
            return Embedded(self._touch_vision_tower(embedded)[None])
        images, *deep = self._image_features(with_images)
        places = torch.cat(is_image).nonzero().squeeze(-1).to(self.device)
        return Embedded(embedded.index_copy(0, places, images)[None], places, deep)

    def _trained_vision_weights(self) -> list[nn.Parameter]:
        return [p for p in self.hf.model.visual.parameters() if p.requires_grad]

    def _touch_vision_tower(self, embedded: Tensor) -> Tensor:
        """Give the vision tower gradients of zero instead of none where a row has no image.

        Its gradients are then there on every process, whichever rows it got.
        """
        if not torch.is_grad_enabled():
            return embedded
        return embedded + 0 * sum(weight.sum() for weight in self._trained_vision_weights())

    def _image_features(self, prompts: list[Prompt]) -> list[Tensor]:
        """Features of all images of some prompts, [visual tokens, D] float32 each.

        The first are the input embeddings of the images. All others are what Qwen3-VL takes from
        deeper layers of its vision tower, for the first layers of the decoder.
        """
        visual = self.hf.model.visual
        patches = [p.pixel_values.to(self.device, visual.dtype) for p in prompts]
        grid = torch.cat([p.image_grid_thw for p in prompts]).to(self.device)
        trained = bool(self._trained_vision_weights())
        with contextlib.nullcontext() if trained else torch.no_grad():
            features = visual(patches, grid_thw=grid, return_dict=True)
        deep = getattr(features, "deepstack_features", None) or []
        return [x.float() for x in (features.pooler_output, *deep)]

    def prompt_positions(self, prompt: Prompt) -> Tensor:
        """M-RoPE positions of a prompt, [3, L].

        A response goes on at the largest of them plus 1, on all three axes.
        """
        if prompt.image_grid_thw is None:
            return torch.arange(len(prompt.input_ids)).expand(3, -1)
        positions, _ = self.hf.model.get_rope_index(
            prompt.input_ids[None],
            mm_token_type_ids=prompt.visual_mask[None].int(),
            image_grid_thw=prompt.image_grid_thw,
        )
        return positions[:, 0]

    def rotary(self, positions: Tensor) -> Rotary:
        """The rotary embedding of positions [3, rows, N]."""
        return decoder.rotary_of(self.hf.model.language_model, positions.to(self.device))

    def prepared(self):
        """A context in which the decoder's weights must not change, see decoder.prepared."""
        return decoder.prepared(self.hf.model.language_model.layers, self.dtype)

    def decoder(
        self, embedded: Embedded, turns: Rotary, layout, wanted: Tensor | None = None
    ) -> Tensor:
        """The decoder's last hidden states [rows, N, D]; turns: of the tokens' positions.

        wanted: places [n] of the tokens whose states are asked for, [rows, n, D]; by default all.
        """
        model = self.hf.model.language_model
        return decoder.run(model, embedded, turns, layout, dtype=self.dtype, wanted=wanted)

    def packed_states(
        self,
        embedded: Embedded,
        turns: Rotary,
        layout: PackedGroups,
        places: list[int],
        with_images: bool = False,
    ) -> tuple[Tensor, Tensor | None]:
        """The last hidden states [n, D] at n places of a packed row.

        with_images: also the mean one of each prompt's image tokens, [prompts, D] without gradient;
            else None.
        """
        places = torch.tensor(places, dtype=torch.long, device=self.device)
        if not with_images:
            return self.decoder(embedded, turns, layout, places)[0], None
        row = self.decoder(embedded, turns, layout)[0]
        return row[places], mean_image_states(row.detach(), layout)

    # -------------------------------------------------------------------------------------- outputs

    def next_token_logits(
        self, hidden: Tensor, weight: Tensor, temperature: float | None = None
    ) -> Tensor:
        """hidden [M, D] -> [M, V] float32: the distribution that is sampled.

        weight: that of the language-model head, in the policy's dtype.
        """
        hidden = hidden.to(self.dtype)
        if hidden.dtype == torch.float32:
            logits = decoder.linear(hidden, weight)
        else:
            logits = float32_product(hidden, weight.T)
        return scaled_logits(logits, temperature or self.temperature, self.suppressed)

    def forward(
        self,
        prompts: list[Prompt],
        tokens: Tensor,
        mask: Tensor,
        tap: Tap | None = None,
        blind: bool = False,
        similarity: bool = False,
    ) -> PackedOutput:
        """Log-probabilities of responses, computed in packed groups; with a tap DyCo's signals too.

        tokens [B, T] long, group-major; mask [B, T] bool, True on the first tokens of each row, the
        end token included.

        blind: no text sees an image, neither of the prompt nor of the responses. All of it stays at
            its positions. Nobody would read the states of the image tokens, so they are left out,
            and the vision tower does not run.
        similarity: image_similarity of each token as well.
        """
        group_size = len(tokens) // len(prompts)
        positions_of = [self.prompt_positions(prompt) for prompt in prompts]
        following = [int(positions.max()) + 1 for positions in positions_of]
        if blind:
            pairs = zip(positions_of, prompts, strict=True)
            positions_of = [positions[:, ~prompt.visual_mask] for positions, prompt in pairs]
            prompts = [without_images(prompt) for prompt in prompts]
        lengths = mask.sum(1).tolist()
        # The last token of a response is predicted, and never read.
        inputs = [max(length - 1, 0) for length in lengths]
        branches = [inputs[i : i + group_size] for i in range(0, len(inputs), group_size)]
        layout = PackedGroups(prompts, branches, tap)
        positions, predictors, responses = self._pack(
            positions_of, following, tokens=tokens, lengths=lengths, branches=branches
        )
        with self.autocast():
            embedded = self.embed(prompts, responses)
            turns = self.rotary(positions[:, None])
            hidden, images = self.packed_states(
                embedded, turns, layout, predictors, with_images=similarity
            )
        mask = mask.to(self.device)
        logprobs, entropy = TokenLogprobs.apply(
            hidden.to(self.dtype),
            self.hf.lm_head.weight,
            tokens.to(self.device)[mask],
            self.temperature,
            self.suppressed,
            self.CHUNK,
            self.forward_chunk,
            self.slope_chunk,
        )

        def unpack(flat: Tensor) -> Tensor:
            return torch.zeros(mask.shape, device=self.device).masked_scatter(mask, flat)

        signals = None if tap is None else self._take_signals(tap, len(prompts), mask)
        similar = None
        if similarity:
            lengths_of_groups = mask.sum(1).view(len(prompts), group_size).sum(1)
            of_tokens = images.repeat_interleave(lengths_of_groups, dim=0)
            similar = unpack(image_similarity(hidden.detach(), of_tokens))
        return PackedOutput(unpack(logprobs), unpack(entropy), signals, similar)

    def _pack(
        self,
        positions_of: list[Tensor],
        following: list[int],
        tokens: Tensor,
        lengths: list[int],
        branches: list[list[int]],
    ) -> tuple[Tensor, list[int], list[list[Tensor]]]:
        """Where everything stands in the packed row.

        positions_of: [3, L] of each prompt; following: the position at which its responses go on.
        Returns the positions [3, N], the places in the row that predict a token (in the order of
        the response tokens), and the input ids of the responses, [prompts][G].
        """
        positions, predictors, responses = [], [], []
        row, offset = 0, 0
        for of_prompt, start, group in zip(positions_of, following, branches, strict=True):
            positions.append(of_prompt)
            offset += of_prompt.shape[1]
            last_of_prompt = offset - 1
            responses.append([])
            for inputs in group:
                responses[-1].append(tokens[row, :inputs].to(self.device))
                positions.append(torch.arange(start, start + inputs).expand(3, -1))
                if lengths[row]:
                    predictors += [last_of_prompt, *range(offset, offset + inputs)]
                offset += inputs
                row += 1
        return torch.cat(positions, dim=1), predictors, responses

    def _take_signals(self, tap: Tap, groups: int, mask: Tensor) -> Signals:
        """The tap's signals of all groups, [B, T] each, 0 on padding."""
        width = mask.shape[1]
        of_groups = [tap.take(group) for group in range(groups)]
        fields = []
        for field in zip(*of_groups, strict=True):
            stacked = torch.cat([F.pad(x, (0, width - x.shape[1])) for x in field])
            fields.append(torch.where(mask, stacked, 0))
        return Signals(*fields)

    def idle(self) -> Tensor:
        """A pass over a single token without an image: a loss of 0, whose gradients are 0."""
        no_token = torch.zeros(1, dtype=torch.bool)
        prompt = Prompt(
            index=0,
            id="",
            answer="",
            question="",
            input_ids=torch.zeros(1, dtype=torch.long),
            visual_mask=no_token,
            pixel_values=None,
            image_grid_thw=None,
        )
        output = self([prompt], torch.zeros(1, 1, dtype=torch.long), no_token[None])
        return output.logprobs.sum()


def _as_list(value) -> list:
    if value is None:
        return []
    return list(value) if isinstance(value, (list, tuple)) else [value]


# ------------------------------------------------------------------------------------ load and save


class ModelError(ValueError):
    """A model that cannot be used. The message names the file, what was found, what was
    expected."""


class Family(NamedTuple):
    """Models that this project runs."""

    name: str
    loader: str  # the class of transformers


# By the model_type of config.json. Sizes, patches and the positions of images are read off the
# model itself; decoder.py says what else is different.
FAMILIES = {
    "qwen2_5_vl": Family("Qwen2.5-VL", "Qwen2_5_VLForConditionalGeneration"),
    "qwen3_vl": Family("Qwen3-VL", "Qwen3VLForConditionalGeneration"),
    "qwen2_vl": Family("Qwen2-VL", "Qwen2VLForConditionalGeneration"),
}


def load_policy(
    path: str | Path,
    device: torch.device,
    dtype: str = "auto",
    temperature: float = 1.0,
    compile: str = "off",
    graphs: str = "auto",
    trainable: bool = True,
    freeze_vision: bool = False,
    gradient_checkpointing: bool = False,
    max_pixels: int | None = None,
) -> Policy:
    """A Policy from the directory or hub id of a model of FAMILIES.

    dtype ("auto", "float32", "bfloat16") is what arithmetic runs in. The weights of a trainable
    policy are float32 all the same; those of another one have that dtype.
    compile: of the functions that score, "auto" (on a GPU, where a compiler works), "on" or "off".
    graphs: "auto" (on a GPU) or "off".
    max_pixels: larger images are shrunk to this area.

    Raises ModelError where the path is no such model, or a file of it is missing or damaged.
    """
    family = check_model(path)
    dtype = getattr(torch, resolve_dtype(dtype, device))
    choose_kernels(device)
    tokenizer = _load_tokenizer(path)
    released_processor = _load_image_processor(path)
    image_processor = _limit_pixels(released_processor, max_pixels)
    hf = _load_weights(path, family, dtype="auto" if trainable else dtype)
    _check_patches(path, image_processor, hf.config.vision_config)
    _check_tokens(path, tokenizer, hf)
    hf.requires_grad_(trainable)
    if freeze_vision:
        hf.model.visual.requires_grad_(False)
    if gradient_checkpointing:
        hf.gradient_checkpointing_enable({"use_reentrant": False})
    policy = Policy(
        hf,
        tokenizer,
        image_processor,
        temperature=temperature,
        dtype=dtype,
        compiled=_is_compiled(compile, device),
        graphs=graphs == "auto",
        released_processor=released_processor,
    )
    policy.to(device)
    if trainable:
        policy.float()  # only now, on the device: in host memory 16 bits a weight are enough
    return policy.train()  # gradient checkpointing asks for training mode; there is no dropout


def is_out_of_memory(error: RuntimeError) -> bool:
    """Whether an operation found no memory. Running out of the CPU's has no class of its own."""
    on_device = isinstance(error, torch.OutOfMemoryError)
    return on_device or "can't allocate memory" in str(error)


def resolve_dtype(dtype: str, device: torch.device) -> str:
    """What "auto" stands for on a device; other names stand for themselves."""
    if dtype != "auto":
        return dtype
    return "bfloat16" if device.type == "cuda" else "float32"


def _check_tokens(path: str | Path, tokenizer, hf) -> None:
    """The model has a row for each token, and knows the end of a turn, or a warning says so."""
    rows = hf.get_input_embeddings().num_embeddings
    if len(tokenizer) > rows:
        raise ModelError(
            f"model.path: the tokenizer of {str(path)!r} has {len(tokenizer)} tokens, and the "
            f"model has embeddings of {rows}; expected the tokenizer that it was trained with"
        )
    if tokenizer.eos_token_id not in _as_list(hf.generation_config.eos_token_id):
        warnings.warn(
            f"the generation_config.json of {str(path)!r} does not name the tokenizer's end token "
            f"{tokenizer.eos_token}; here it ends a response, too",
            stacklevel=3,
        )


def _is_compiled(compile: str, device: torch.device) -> bool:
    """Whether functions go through torch.compile. Where "auto" finds no compiler, it warns."""
    if compile != "auto" or device.type != "cuda":
        return compile == "on"
    problem = compiler_problem(device)
    if problem is not None:
        warnings.warn(
            f"model.compile: auto compiles nothing, since torch.compile fails: {problem}; on a GPU "
            "it needs a C compiler and Python's headers",
            stacklevel=3,
        )
    return problem is None


def compiler_problem(device: torch.device) -> str | None:
    """What torch.compile says of a small function, in one line; None where it works."""

    def small(x: Tensor) -> Tensor:
        return x.exp() + 1

    try:
        torch.compile(small)(torch.zeros(8, device=device))
    except Exception as error:  # of whichever compiler is behind it
        return first_line(error)
    return None


def choose_kernels(device: torch.device) -> None:
    """Leave out kernels of a GPU that are not what they should be."""
    if device.type == "cuda":
        # cuDNN's attention gives NaN gradients for some masked shapes on H100, and plans anew for
        # each shape that it meets.
        torch.backends.cuda.enable_cudnn_sdp(False)
        # float32 is float32.
        torch.backends.cudnn.allow_tf32 = False
        # Products of 16 bits add up in float32: the head's gradient is a sum over the vocabulary.
        torch.backends.cuda.matmul.allow_bf16_reduced_precision_reduction = False


def check_model(path: str | Path) -> Family:
    """Find in a second what is wrong with a model directory, or with a hub id.

    Returns what kind of model it is. Raises ModelError.
    """
    folder = Path(path)
    if folder.is_dir():
        _check_directory(folder)
    elif not re.fullmatch(r"[\w.-]+/[\w.-]+", str(path)) or folder.parent.is_dir():
        raise ModelError(f"model.path: {str(path)!r} is no folder; expected a model directory")
    else:
        _check_hub_id(str(path))
    return _check_family(path)


def _check_directory(folder: Path) -> None:
    if (folder / "tensors.pt").exists():
        raise ModelError(
            f"model.path: {str(folder)!r} is a checkpoint of a run; "
            f"python -m tools.export {folder} FOLDER makes a model directory of it"
        )
    if (folder / "metrics.jsonl").exists() or (folder / "final" / "config.json").exists():
        raise ModelError(
            f"model.path: {str(folder)!r} is the folder of a run; its model is in "
            f"{str(folder / 'final')!r} once the run has ended"
        )

    def need(names: tuple[str, ...], what: str) -> None:
        if not any((folder / name).is_file() for name in names):
            raise ModelError(
                f"model.path: {str(folder)!r} has no {names[0]} ({what}); "
                "take it from the model that this one was trained from"
            )

    need(("config.json",), "the model's sizes")
    need(("tokenizer.json", "vocab.json"), "the tokenizer")
    need(("preprocessor_config.json", "processor_config.json"), "the image processor")
    weights = [*folder.glob("*.safetensors"), *folder.glob("pytorch_model*.bin")]
    if not weights:
        raise ModelError(f"model.path: {str(folder)!r} holds no weights; expected *.safetensors")
    for index in folder.glob("*.index.json"):
        _check_index(index)
    for file in folder.glob("*.safetensors"):
        _check_safetensors(file)


def _check_index(index: Path) -> None:
    """The files that an index of shards names are there, and inside the folder."""
    try:
        names = set(json.loads(index.read_text())["weight_map"].values())
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise ModelError(f"model.path: {index} cannot be read ({error})") from None
    for name in sorted(map(str, names)):
        inside = (index.parent / name).parent.resolve() == index.parent.resolve()
        if not inside:
            raise ModelError(
                f"model.path: {index} names {name!r}; expected a file of the same folder"
            )
        if not (index.parent / name).is_file():
            raise ModelError(f"model.path: {index} names {name!r}, which is missing")


def _check_safetensors(file: Path) -> None:
    """The file is as long as its header says. No weight is read."""
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(file, framework="pt"):
            pass
    except (SafetensorError, OSError) as error:
        raise ModelError(
            f"model.path: {file} is damaged or cut short ({error}); copy it again"
        ) from None


def _check_hub_id(name: str) -> None:
    """The hub has it, or it was downloaded before. Without a network this fails at once."""
    from huggingface_hub import HfApi, try_to_load_from_cache

    if isinstance(try_to_load_from_cache(name, "config.json"), str):
        return
    try:
        HfApi().model_info(name, timeout=10)
    except Exception as error:  # of the hub's client, or of whichever transport it uses
        said = str(error).strip().splitlines()[:1]
        raise ModelError(
            f"model.path: {name!r} is no folder here, has not been downloaded, and the hub did not "
            f"give it ({type(error).__name__}: {''.join(said)})"
        ) from None


def _check_family(path: str | Path) -> Family:
    """Which family a model is of. Raises ModelError where it is of none."""
    from transformers import AutoConfig

    try:
        config = AutoConfig.from_pretrained(path)
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise ModelError(
            f"model.path: the config.json of {str(path)!r} cannot be used ({first_line(error)})"
        ) from None
    kind = config.model_type
    if kind in FAMILIES:
        return FAMILIES[kind]
    what = ""
    if "moe" in kind:
        what = "mixture of experts, "
    elif not hasattr(config, "vision_config"):
        what = "text-only model, "
    known = [f"a {family.name} ({name!r})" for name, family in FAMILIES.items()]
    raise ModelError(
        f"model.path: {str(path)!r} is a {what}{kind!r}; expected {' or '.join(known)}"
    )


def _check_patches(path: str | Path, image_processor, vision) -> None:
    """Images are cut as the vision tower expects it. vision: the tower's configuration."""
    cut = (image_processor.patch_size, image_processor.temporal_patch_size)
    expected = (vision.patch_size, vision.temporal_patch_size)
    if cut != expected or image_processor.merge_size != vision.spatial_merge_size:
        raise ModelError(
            f"model.path: the preprocessor_config.json of {str(path)!r} has patches of {cut[0]} "
            f"pixels, {cut[1]} frames, merged by {image_processor.merge_size}; its config.json "
            f"expects {expected[0]}, {expected[1]} and {vision.spatial_merge_size}; "
            "take it from the model that this one was trained from"
        )


def _load_weights(path: str | Path, family: Family, dtype):
    """The Hugging Face model, if the files hold exactly its weights, and finite ones."""
    import transformers
    from transformers import logging

    logging.disable_progress_bar()  # it would stand between the lines of a run
    verbosity = logging.get_verbosity()
    logging.set_verbosity(logging.CRITICAL)  # what its report says, the errors below say
    try:
        hf, report = getattr(transformers, family.loader).from_pretrained(
            path,
            dtype=dtype,
            attn_implementation="sdpa",
            output_loading_info=True,
            ignore_mismatched_sizes=True,  # so that they are reported, and refused here
        )
    except Exception as error:  # of safetensors, pickle or whatever a broken file makes stumble
        raise ModelError(
            f"model.path: the weights of {str(path)!r} cannot be read ({first_line(error)})"
        ) from error
    finally:
        logging.set_verbosity(verbosity)

    problems = {
        "missing": sorted(report["missing_keys"]),
        # Files of older versions also hold this constant of the rotary embedding.
        "unexpected": sorted(
            key for key in report["unexpected_keys"] if not key.endswith("inv_freq")
        ),
        "of another shape": sorted(str(key[0]) for key in report["mismatched_keys"]),
        "not finite": [
            name for name, weight in hf.named_parameters() if not weight.isfinite().all()
        ],
    }
    described = [_few(what, keys) for what, keys in problems.items() if keys]
    if described:
        raise ModelError(
            f"model.path: the weights of {str(path)!r} are not those of its config.json: "
            f"{'; '.join(described)}; expected exactly the weights of a {family.name}, all finite"
        )
    return hf


def _few(what: str, keys: list[str], most: int = 3) -> str:
    rest = f" and {len(keys) - most} more" if len(keys) > most else ""
    return f"{len(keys)} keys {what} ({', '.join(keys[:most])}{rest})"


def _load_tokenizer(path: str | Path):
    """The tokenizer with its chat template, which older folders keep in a JSON file of its own."""
    from transformers import AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(path)
    except Exception as error:  # of whatever a broken tokenizer.json makes stumble
        raise ModelError(
            f"model.path: the tokenizer of {str(path)!r} cannot be read ({first_line(error)})"
        ) from None
    template = Path(path) / "chat_template.json"
    if tokenizer.chat_template is None and template.is_file():
        try:
            tokenizer.chat_template = str(json.loads(template.read_text())["chat_template"])
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise ModelError(f"model.path: {template} cannot be read ({error!r})") from None
    if tokenizer.chat_template is None:
        raise ModelError(
            f"model.path: {str(path)!r} has no chat_template.jinja (how a prompt is written); "
            "take it from the model that this one was trained from"
        )
    return tokenizer


def _load_image_processor(path: str | Path):
    from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

    try:
        return Qwen2VLImageProcessorPil.from_pretrained(path)
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise ModelError(
            f"model.path: the preprocessor_config.json of {str(path)!r} cannot be used "
            f"({first_line(error)})"
        ) from None


def _limit_pixels(released_processor, max_pixels: int | None):
    """A copy of an image processor that shrinks larger images to an area of max_pixels."""
    processor = copy.deepcopy(released_processor)
    if max_pixels is None:
        return processor
    # Both edges of this processor are areas in pixels.
    smallest = processor.size["shortest_edge"]
    if max_pixels < smallest:
        raise ModelError(
            f"data.max_pixels: expected at least {smallest}, the smallest image of this model, "
            f"found {max_pixels}"
        )
    # Set here, since an argument of from_pretrained loses to what released files say.
    processor.size["longest_edge"] = max_pixels
    return processor


def policy_from_config(config, path: str | Path, device: torch.device, **options) -> Policy:
    """`load_policy` with the settings of a Config; `options` are those of load_policy."""
    return load_policy(
        path,
        device,
        dtype=config.model.dtype,
        temperature=config.rollout.temperature,
        compile=config.model.compile,
        graphs=config.rollout.graphs,
        max_pixels=config.data.max_pixels,
        **options,
    )


def save_policy(
    policy: Policy,
    folder: Path,
    weights: dict[str, Tensor] | None = None,
    dtype: str = "source",
) -> None:
    """Write a normal Hugging Face directory: weights, tokenizer with chat template, image
    processor.

    Other programs serve this folder, so it has the pixel limits of the model that was loaded, not
    those of the training. weights: name -> tensor, by default the policy's own. dtype: of the
    weights in the folder, "source" (as the loaded model had them) or "float32".
    """
    if weights is None:
        weights = dict(policy.hf.named_parameters())
    written_dtype = policy.released_dtype if dtype == "source" else torch.float32
    rounded = {name: weight.detach().to(written_dtype) for name, weight in weights.items()}
    policy.hf.save_pretrained(folder, state_dict=rounded)
    policy.tokenizer.save_pretrained(folder)
    policy.released_processor.save_pretrained(folder)
    _copy_video_processor(policy.hf.name_or_path, folder)
    _state_dtype(folder, str(written_dtype).removeprefix("torch."))
    _spell_for_transformers_4(folder)
    # Weight files are written for their owner alone; a server may run as somebody else.
    usual_mode = (folder / "config.json").stat().st_mode
    for file in folder.glob("*.safetensors"):
        file.chmod(usual_mode)


def _copy_video_processor(path: str, folder: Path) -> None:
    """Copy the settings for videos from the model that was loaded, where it has them.

    Nothing here reads them. Without them, other programs take those of images for videos.
    """
    from transformers.utils import cached_file

    name = "video_preprocessor_config.json"
    with contextlib.suppress(OSError):
        file = cached_file(
            path,
            name,
            _raise_exceptions_for_missing_entries=False,
            _raise_exceptions_for_connection_errors=False,
        )
        if file is not None:
            shutil.copyfile(file, folder / name)


def _edit_json(file: Path, edit: Callable[[dict], None]) -> None:
    content = json.loads(file.read_text())
    edit(content)
    file.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n")


def _state_dtype(folder: Path, dtype: str) -> None:
    """Write into config.json what the weights are: save_pretrained writes what the policy's are."""

    def edit(config: dict) -> None:
        for part in (config, config["text_config"], config["vision_config"]):
            part["dtype"] = dtype

    _edit_json(folder / "config.json", edit)


def _spell_for_transformers_4(folder: Path) -> None:
    """Write the settings that transformers 5 has renamed under their old names, too.

    Servers still run transformers 4, which ignores the new names: it fails for want of the rotary
    sections, gives a tied head random weights, and limits images to other sizes. Transformers 5
    takes the old names for the new ones. Tried with 4.57.6 in November 2026 for all of FAMILIES:
    pixels are equal, and logits to 1e-5.
    """

    def edit_config(config: dict) -> None:
        text = config["text_config"]
        rotary = dict(text["rope_parameters"])
        text["rope_theta"] = rotary.pop("rope_theta")
        text["rope_scaling"] = rotary
        text["tie_word_embeddings"] = config["tie_word_embeddings"]
        config["torch_dtype"] = config["dtype"]

    def edit_tokenizer(config: dict) -> None:
        # A list is an error there. Transformers 5 reads the old name where the new one is empty.
        tokens = config.get("extra_special_tokens")
        if isinstance(tokens, list):
            config["additional_special_tokens"] = tokens
            config["extra_special_tokens"] = {}

    def edit_processor(config: dict) -> None:
        config["min_pixels"] = config["size"]["shortest_edge"]
        config["max_pixels"] = config["size"]["longest_edge"]

    _edit_json(folder / "config.json", edit_config)
    _edit_json(folder / "tokenizer_config.json", edit_tokenizer)
    _edit_json(folder / "preprocessor_config.json", edit_processor)
