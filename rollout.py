"""rollout.py: sampling G responses per prompt from one prefill, with DyCo's signals read while decoding.

Vision tower and prompt run once per prompt (`PackedGroups` without responses, model.py). The prompt's keys and values are
never copied to its G responses: at each step the G queries meet them together, as one small matrix product, and each
response brings only its own keys (`Decoding`). The softmax over both parts is explicit, so the attention row that DyCo
reads is there anyway. Rows leave the batch once enough of them have ended.

What is sampled is what is scored: temperature only, no top-k, no top-p, and the same suppressed tokens (model.py,
scaled_logits). Each response draws its uniforms from a generator of its own, keyed by (seed, step, the prompt's place in
the step, response): neither batch composition nor the number of processes nor rows that leave early change it.

Shapes: P prompts, G responses per prompt, B = P·G, T response tokens, R rows still decoding, K keys, H heads, D width.
"""

import hashlib
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from attention import Decoding, PackedGroups, Tap
from data import Prompt
from dyco import Signals
from model import Policy

PREFILL_TOKENS = 16384  # prompt tokens in one prefill
COMPACT_BELOW = 0.75  # finished rows leave the batch when at most this share is alive: each leaving copies the cache


@dataclass
class Rollout:
    """P prompts and their P·G responses, group-major. `mask` is made here; later stages pass it on."""

    prompts: list[Prompt]
    group_size: int
    tokens: Tensor  # [B, T] long
    mask: Tensor  # [B, T] bool: the response's tokens, end token included
    logprobs: Tensor  # [B, T] float32: behaviour log-probabilities, 0 on padding
    truncated: Tensor  # [B] bool: no end token within max_new_tokens
    signals: Signals | None  # [B, T] each, 0 on padding
    texts: list[str]  # decoded, without the end token

    def rows(self, prompts: list[int]) -> list[int]:
        """The rows of some prompts' groups."""
        return [i * self.group_size + j for i in prompts for j in range(self.group_size)]

    def select(self, prompts: list[int]) -> "Rollout":
        """The groups of some prompts, cut to their longest response."""
        rows = self.rows(prompts)
        width = max([1, *self.mask[rows].sum(1).tolist()])
        cut = lambda x: x[rows, :width]
        return Rollout(
            [self.prompts[i] for i in prompts],
            self.group_size,
            cut(self.tokens),
            cut(self.mask),
            cut(self.logprobs),
            self.truncated[rows],
            None if self.signals is None else Signals(*map(cut, self.signals)),
            [self.texts[i] for i in rows],
        )


def join(rollouts: list[Rollout]) -> Rollout:
    """One rollout of several with the same group size, padded to the longest response."""
    width = max(r.tokens.shape[1] for r in rollouts)
    stack = lambda tensors: torch.cat([F.pad(x, (0, width - x.shape[1])) for x in tensors])
    signals = None
    if rollouts[0].signals is not None:
        signals = Signals(*(stack(field) for field in zip(*(r.signals for r in rollouts))))
    return Rollout(
        [p for r in rollouts for p in r.prompts],
        rollouts[0].group_size,
        stack([r.tokens for r in rollouts]),
        stack([r.mask for r in rollouts]),
        stack([r.logprobs for r in rollouts]),
        torch.cat([r.truncated for r in rollouts]),
        signals,
        [text for r in rollouts for text in r.texts],
    )


def runs_within(sizes: list[int], budget: int) -> list[list[int]]:
    """Consecutive indices in runs whose sizes add up to at most `budget`; a larger one is a run of its own.

    >>> runs_within([3, 3, 5, 9, 1], budget=8)
    [[0, 1], [2], [3], [4]]
    """
    runs, room = [], 0
    for index, size in enumerate(sizes):
        if not runs or size > room:
            runs.append([])
            room = budget
        runs[-1].append(index)
        room -= size
    return runs


def keyed_generator(*key) -> torch.Generator:
    """A CPU generator whose stream depends on the key alone, say (seed, step, place of the prompt, response)."""
    digest = hashlib.blake2b(repr(key).encode(), digest_size=8).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest, "big"))


def sample_tokens(logits: Tensor, uniforms: Tensor) -> Tensor:
    """Inverse-CDF sampling: [R, V] logits, [R] uniforms in [0, 1) -> [R] ids. Ids of probability 0 are never drawn."""
    cumulative = torch.softmax(logits.double(), dim=-1).cumsum(-1)
    threshold = uniforms.double()[:, None] * cumulative[:, -1:]
    return (
        torch.searchsorted(cumulative, threshold, right=True)
        .squeeze(-1)
        .clamp(max=logits.shape[-1] - 1)
    )


@torch.no_grad()
def generate(
    policy: Policy,
    prompts: list[Prompt],
    group_size: int,
    max_new_tokens: int,
    key: tuple | None,
    capture=None,
    max_cache_tokens: int = 131072,
    temperature: float | None = None,
    greedy_last: bool = False,
    decoding: Callable[..., Decoding] = Decoding,
) -> Rollout:
    """Sample G responses to each prompt, in waves of at most `max_cache_tokens` prompt and response tokens.

    key: what the random streams depend on besides Prompt.index and the response's place in its group, say (seed, step);
    None decodes greedily. greedy_last: the last response of each group is greedy, whatever the key. capture: settings with
    layers, shift and text_scope, to record DyCo's signals. temperature: by default the policy's. decoding: makes the layout
    of a wave, Decoding or a subclass of it that changes attention.
    """
    waves = runs_within(
        [len(prompt.input_ids) + group_size * max_new_tokens for prompt in prompts],
        max_cache_tokens,
    )
    training = policy.training
    policy.eval()  # in training mode each layer would prepare to be checkpointed
    try:
        return join(
            [
                _decode(
                    policy,
                    [prompts[i] for i in wave],
                    group_size,
                    max_new_tokens,
                    key,
                    capture,
                    temperature,
                    greedy_last,
                    decoding,
                )
                for wave in waves
            ]
        )
    finally:
        policy.train(training)


def _prefill(
    policy: Policy, prompts: list[Prompt], positions: list[Tensor], tap: Tap | None
) -> tuple[Tensor, dict, list]:
    """Every prompt once, as many in a row as PREFILL_TOKENS allow.

    Returns the last hidden state of each prompt [P, D], layer -> keys and values of each prompt, and their first signals.
    """
    hidden, kept, signals = [], {}, []
    for run in runs_within([len(p.input_ids) for p in prompts], PREFILL_TOKENS):
        part = [prompts[i] for i in run]
        layout = PackedGroups(
            part, [[] for _ in part], policy.kernel, tap, keep_keys=True, first_group=run[0]
        )
        row = policy.decoder(
            policy.embed(part)[None], torch.cat([positions[i] for i in run], dim=1)[:, None], layout
        )[0]
        last = torch.tensor([len(p.input_ids) for p in part]).cumsum(0) - 1
        hidden.append(row[last.to(policy.device)])
        for layer, pairs in layout.kept.items():
            kept.setdefault(layer, []).extend(pairs)
        if tap is not None:
            signals += [tap.take(index) for index in run]
    return torch.cat(hidden), kept, signals


def _decode(
    policy: Policy,
    prompts: list[Prompt],
    group_size: int,
    max_new_tokens: int,
    key,
    capture,
    temperature,
    greedy_last: bool = False,
    make_layout: Callable[..., Decoding] = Decoding,
) -> Rollout:
    rows, device = len(prompts) * group_size, policy.device
    tap = None if capture is None else policy.tap(capture)
    tokens = torch.zeros(rows, max_new_tokens, dtype=torch.long, device=device)
    mask = torch.zeros(rows, max_new_tokens, dtype=torch.bool, device=device)
    logprobs = torch.zeros(rows, max_new_tokens, device=device)
    signals = (
        None
        if tap is None
        else Signals(*(torch.zeros(rows, max_new_tokens, device=device) for _ in range(4)))
    )
    uniforms = (
        None
        if key is None
        else torch.stack(
            [
                torch.rand(max_new_tokens, generator=keyed_generator(*key, prompt.index, response))
                for prompt in prompts
                for response in range(group_size)
            ]
        ).to(device)
    )
    end_ids = torch.tensor(sorted(policy.eos_ids), device=device)
    alive = torch.arange(rows, device=device)  # rows of the batch -> rows of the result
    ended = torch.zeros(rows, dtype=torch.bool, device=device)

    def record(found: Signals, end: int) -> None:
        """Signals [R, n] of the n tokens before place `end` of the rows that are alive."""
        for buffer, values in zip(signals, found):
            buffer[alive, end - values.shape[1] : end] = values

    with policy.autocast():
        positions = [policy.prompt_positions(prompt) for prompt in prompts]
        hidden, kept, first = _prefill(policy, prompts, positions, tap)
        hidden = hidden.repeat_interleave(group_size, dim=0)
        if tap is not None:
            record(
                Signals(*(torch.cat(x).repeat_interleave(group_size, dim=0) for x in zip(*first))),
                1,
            )
        decoding = make_layout(prompts, kept, group_size, max_new_tokens, tap, device)
        head = policy.hf.lm_head.weight.to(policy.dtype)
        following = torch.tensor(
            [int(p.max()) + 1 for p in positions], device=device
        ).repeat_interleave(group_size)

        for step in range(max_new_tokens):
            logits = policy.next_token_logits(hidden, head, temperature)
            chosen = (
                logits.argmax(-1)
                if uniforms is None
                else sample_tokens(logits, uniforms[alive, step])
            )
            if greedy_last:
                chosen = torch.where(
                    alive % group_size == group_size - 1, logits.argmax(-1), chosen
                )
            going = ~ended[alive]
            tokens[alive, step] = torch.where(going, chosen, 0)
            mask[alive, step] = going
            logprobs[alive, step] = torch.where(
                going, logits.log_softmax(-1).gather(-1, chosen[:, None])[:, 0], 0
            )
            ended[alive] |= torch.isin(chosen, end_ids)
            going = ~ended[alive]
            count = int(going.sum())
            last, leave = (
                count == 0 or step + 1 == max_new_tokens,
                count <= COMPACT_BELOW * len(alive),
            )
            if decoding.waiting and (last or leave or decoding.waiting == Tap.STEPS):
                record(decoding.signals(), step + 1)
            if last:
                break
            if leave:
                places = going.nonzero().squeeze(-1)
                decoding.keep(places)
                alive, chosen, going = alive[places], chosen[places], going[places]
            embedded = policy.look_up(chosen)[:, None]
            position = (following[alive] + step)[None, :, None].expand(3, -1, -1)
            compute = lambda: policy.decoder(embedded, position, decoding)[:, 0]
            hidden = decoding.advance(compute, going)

    width = int(mask.sum(1).max())
    ids = tokens.tolist()
    lengths, truncated = mask.sum(1), ~ended
    content = (lengths - ended.long()).tolist()
    texts = [
        policy.tokenizer.decode(row[:n], skip_special_tokens=False) for row, n in zip(ids, content)
    ]
    cut = lambda x: x[:, :width]
    return Rollout(
        prompts,
        group_size,
        cut(tokens),
        cut(mask),
        cut(logprobs),
        truncated,
        None if signals is None else Signals(*(torch.where(cut(mask), cut(x), 0) for x in signals)),
        texts,
    )
