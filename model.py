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
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import dyco
from attention import ATTENTION, WINDOWS, PackedGroups, Tap, float32_product, register_attention
from data import Prompt, Sample, encode_prompt
from dyco import Signals

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
    def forward(
        ctx, hidden, weight, targets, temperature, suppressed, chunk, forward_chunk, backward_chunk
    ):
        rounded = weight.detach().to(
            hidden.dtype
        )  # detached: a compiled function is compiled once for scoring and update
        parts = [
            forward_chunk(h, rounded, t, temperature, suppressed)
            for h, t in zip(hidden.detach().split(chunk), targets.split(chunk))
        ]
        logprobs, entropy, log_total = (torch.cat(x) for x in zip(*parts))
        ctx.save_for_backward(hidden, weight, targets, suppressed, log_total)
        ctx.temperature, ctx.chunk, ctx.backward_chunk = temperature, chunk, backward_chunk
        ctx.mark_non_differentiable(entropy)
        return logprobs, entropy

    @staticmethod
    def backward(ctx, gradient, _):
        hidden, weight, targets, suppressed, log_total = ctx.saved_tensors
        hidden_gradient, weight_gradient = (
            torch.empty_like(hidden),
            torch.zeros_like(weight, dtype=torch.float32),
        )
        rounded = weight.to(hidden.dtype)
        for start in range(0, len(hidden), ctx.chunk):
            part = slice(start, start + ctx.chunk)
            hidden_gradient[part], added = ctx.backward_chunk(
                hidden[part],
                rounded,
                targets[part],
                ctx.temperature,
                suppressed,
                log_total[part],
                gradient[part],
            )
            weight_gradient += added
        return hidden_gradient, weight_gradient.to(weight.dtype), *[None] * 6


# --------------------------------------------------------------------------------------------------------- the policy


class PackedOutput(NamedTuple):
    logprobs: (
        Tensor  # [B, T] float32, of each response token at the sampling temperature; 0 on padding
    )
    entropy: Tensor  # [B, T] float32, nats, without gradient; 0 on padding
    signals: Signals | None  # [B, T] each, if a tap was given; 0 on padding


class Policy(nn.Module):
    """Qwen2.5-VL as a policy over responses. `forward` is the packed group forward."""

    CHUNK = 512  # predicted tokens whose logits are alive at once: 300 MB for Qwen's vocabulary

    def __init__(
        self,
        hf,
        tokenizer,
        image_processor,
        temperature: float = 1.0,
        kernel: str = "sdpa",
        dtype: torch.dtype = torch.float32,
        compiled: bool = False,
    ):
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
        self.forward_chunk, self.backward_chunk = (
            optimise(_chunk_forward),
            optimise(_chunk_backward),
        )
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
        return Tap(
            settings.layers,
            self.depth,
            settings.shift,
            settings.text_scope,
            self.signals,
            keep_images,
        )

    # -- inputs

    def encode(
        self, sample: Sample, index: int, template: str, max_prompt_tokens: int | None = None
    ) -> Prompt:
        """data.encode_prompt with this policy's tokenizer and image processor."""
        return encode_prompt(
            sample, index, self.tokenizer, self.image_processor, template, max_prompt_tokens
        )

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
        seen_by = [
            parameter for parameter in self.hf.model.visual.parameters() if parameter.requires_grad
        ]
        if (
            not seeing
        ):  # zeros, not nothing, for the vision tower's gradient: it is the same on every process
            return (
                embedded + 0 * sum(parameter.sum() for parameter in seen_by)
                if torch.is_grad_enabled()
                else embedded
            )
        pixels = torch.cat([p.pixel_values for p in seeing]).to(
            self.device, self.hf.model.visual.dtype
        )
        grid = torch.cat([p.image_grid_thw for p in seeing]).to(self.device)
        with contextlib.nullcontext() if seen_by else torch.no_grad():
            images = torch.cat(
                tuple(
                    self.hf.model.get_image_features(pixels, grid, return_dict=True).pooler_output
                )
            )
        return embedded.masked_scatter(
            torch.cat(at_images).to(self.device)[:, None], images.to(embedded.dtype)
        )

    def prompt_positions(self, prompt: Prompt) -> Tensor:
        """M-RoPE positions of a prompt, [3, P]. A response goes on at the maximum + 1 on all three axes."""
        if prompt.image_grid_thw is None:
            return torch.arange(len(prompt.input_ids)).expand(3, -1)
        ids = prompt.input_ids[None]
        positions, _ = self.hf.model.get_rope_index(
            ids,
            mm_token_type_ids=prompt.visual_mask[None].int(),
            image_grid_thw=prompt.image_grid_thw,
        )
        return positions[:, 0]

    def decoder(self, embedded: Tensor, positions: Tensor, layout) -> Tensor:
        """The decoder's last hidden states, [rows, N, D]; embedded [rows, N, D], positions [3, rows, N]."""
        masks = {
            "full_attention": None,
            "sliding_attention": None,
        }  # the layout decides what is seen
        return self.hf.model.language_model(
            inputs_embeds=embedded,
            position_ids=positions.to(self.device),
            attention_mask=masks,
            use_cache=False,
            layout=layout,
        ).last_hidden_state

    # -- outputs

    def next_token_logits(
        self, hidden: Tensor, weight: Tensor, temperature: float | None = None
    ) -> Tensor:
        """[M, D] -> [M, V] float32, the distribution that is sampled; `weight` is the head's, in the policy's dtype."""
        return scaled_logits(
            hidden.to(self.dtype), weight, temperature or self.temperature, self.suppressed
        )

    def forward(
        self, prompts: list[Prompt], tokens: Tensor, mask: Tensor, tap: Tap | None = None
    ) -> PackedOutput:
        """Score responses in packed groups.

        prompts: P prompts; tokens [P·G, T] long, group-major; mask [P·G, T] bool, True on the first tokens of each row,
        end token included. With a tap the output holds DyCo's signals too.
        """
        group_size = len(tokens) // len(prompts)
        lengths = mask.sum(1).tolist()
        branches = [
            [max(n - 1, 0) for n in lengths[i : i + group_size]]
            for i in range(0, len(lengths), group_size)
        ]
        layout = PackedGroups(prompts, branches, self.kernel, tap)
        positions, predictors, responses, offset = [], [], [], 0
        for index, prompt in enumerate(prompts):
            positions.append(self.prompt_positions(prompt))
            following = int(positions[-1].max()) + 1
            offset += len(prompt.input_ids)
            last_of_prompt = offset - 1
            responses.append([])
            for row, inputs in zip(
                range(index * group_size, (index + 1) * group_size), branches[index]
            ):
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
            hidden.to(self.dtype),
            self.hf.lm_head.weight,
            tokens.to(self.device)[mask],
            self.temperature,
            self.suppressed,
            self.CHUNK,
            self.forward_chunk,
            self.backward_chunk,
        )
        unpack = lambda flat: torch.zeros(mask.shape, device=self.device).masked_scatter(mask, flat)
        signals = None
        if tap is not None:
            width = mask.shape[1]
            groups = [tap.take(index) for index in range(len(prompts))]
            signals = Signals(
                *(
                    torch.cat([F.pad(x, (0, width - x.shape[1])) for x in field])
                    for field in zip(*groups)
                )
            )
            signals = Signals(*(torch.where(mask, x, 0) for x in signals))
        return PackedOutput(unpack(logprobs), unpack(entropy), signals)

    def idle(self) -> Tensor:
        """A pass over a single token, without an image: a loss of 0 whose gradients are 0."""
        nothing = Prompt(
            0,
            "",
            "",
            "",
            torch.zeros(1, dtype=torch.long),
            torch.zeros(1, dtype=torch.bool),
            None,
            None,
        )
        return self(
            [nothing], torch.zeros(1, 1, dtype=torch.long), torch.zeros(1, 1, dtype=torch.bool)
        ).logprobs.sum()


def _as_list(value) -> list:
    return [] if value is None else list(value) if isinstance(value, (list, tuple)) else [value]


# --------------------------------------------------------------------------------------------------- load and save


def load_policy(
    path: str | Path,
    device: torch.device,
    dtype: str = "auto",
    kernel: str = "sdpa",
    temperature: float = 1.0,
    compile: str = "auto",
    trainable: bool = True,
    freeze_vision: bool = False,
    gradient_checkpointing: bool = False,
    max_pixels: int | None = None,
) -> Policy:
    """A Policy from a Qwen2.5-VL directory or hub id. `dtype` ("auto", "float32", "bfloat16") is what arithmetic runs in;
    the weights of a trainable policy are float32 all the same, those of another one are of `dtype`.

    Raises ValueError where the path is not a Qwen2.5-VL.
    """
    from transformers import AutoConfig, AutoTokenizer, Qwen2_5_VLForConditionalGeneration
    from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

    try:
        kind = AutoConfig.from_pretrained(path).model_type
    except (OSError, ValueError) as error:
        raise ValueError(
            f"model.path: {str(path)!r} is neither a Hugging Face directory nor a hub id: {error}"
        ) from None
    if kind != "qwen2_5_vl":
        raise ValueError(
            f"model.path: {str(path)!r} is a {kind!r}; expected a Qwen2.5-VL (model_type 'qwen2_5_vl')"
        )
    if dtype == "auto":
        dtype = "bfloat16" if device.type == "cuda" else "float32"
    dtype = getattr(torch, dtype)
    if device.type == "cuda":
        torch.backends.cuda.enable_cudnn_sdp(
            False
        )  # NaN gradients for some masked shapes on H100; and it plans each new shape
        torch.backends.cudnn.allow_tf32 = (
            False  # float32 is float32: the patch embedding is a convolution
        )
    hf = Qwen2_5_VLForConditionalGeneration.from_pretrained(
        path, dtype="auto" if trainable else dtype, attn_implementation="sdpa"
    )
    hf.requires_grad_(trainable)
    image_processor = Qwen2VLImageProcessorPil.from_pretrained(path)
    if max_pixels is not None:
        least = image_processor.size[
            "shortest_edge"
        ]  # of this processor, both edges are areas in pixels
        if max_pixels < least:
            raise ValueError(
                f"data.max_pixels: expected at least {least}, the smallest image of this model, found {max_pixels}"
            )
        image_processor.size["longest_edge"] = (
            max_pixels  # an argument of from_pretrained loses to released files
        )
    if freeze_vision:
        hf.model.visual.requires_grad_(False)
    if gradient_checkpointing:
        hf.gradient_checkpointing_enable({"use_reentrant": False})
    compiled = compile == "on" or compile == "auto" and device.type == "cuda"
    policy = Policy(
        hf,
        AutoTokenizer.from_pretrained(path),
        image_processor,
        temperature,
        kernel,
        dtype,
        compiled,
    )
    policy.to(device)
    if trainable:
        policy.float()  # on the device: 16 bits a weight are enough in host memory
    return policy.train()  # gradient checkpointing asks for training mode; there is no dropout


def policy_from_config(config, path: str | Path, device: torch.device, **options) -> Policy:
    """`load_policy` with the settings of a Config; `options` as those of load_policy."""
    return load_policy(
        path,
        device,
        dtype=config.model.dtype,
        kernel=config.model.attention,
        temperature=config.rollout.temperature,
        compile=config.model.compile,
        max_pixels=config.data.max_pixels,
        **options,
    )


def save_policy(policy: Policy, folder: Path, weights: dict[str, Tensor] | None = None) -> None:
    """Write a normal Hugging Face directory: weights (those given, or the policy's), tokenizer with chat template, image processor."""
    policy.hf.save_pretrained(folder, state_dict=weights)
    policy.tokenizer.save_pretrained(folder)
    policy.image_processor.save_pretrained(folder)
