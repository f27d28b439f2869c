"""rollout.py: sampling G responses to each prompt from one prefill.

The vision tower and the prompt run once per prompt (`PackedGroups` without responses,
attention.py). Then each step decodes one token of every response (`Decoding`), and DyCo's signals
are read off the attention while it is there. Responses leave the batch once enough of them have
ended.

What is sampled is what is scored later: there is a temperature, but no top-k and no top-p, and the
same ids are suppressed (model.py, scaled_logits). Each response draws its uniform numbers from a
generator of its own, keyed by the seed, the step, the prompt's place in the step and the response's
place in the group. So neither the composition of a batch, nor the number of processes, nor
responses that leave early change what is sampled.

Shapes: P prompts, G responses per prompt, B = P·G responses, T response tokens, R rows that are
still decoded, V vocabulary.
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
# Finished responses leave the batch when at most this share still goes on: leaving copies the
# cache.
COMPACT_BELOW = 0.75


@dataclass
class Rollout:
    """P prompts and their B responses, group-major. `mask` is made here; later stages pass it
    on."""

    prompts: list[Prompt]
    group_size: int
    tokens: Tensor  # [B, T] long
    mask: Tensor  # [B, T] bool: the tokens of the response, end token included
    logprobs: Tensor  # [B, T] float32: what each token was sampled with, 0 on padding
    truncated: Tensor  # [B] bool: no end token within max_new_tokens
    signals: Signals | None  # [B, T] each, 0 on padding
    texts: list[str]  # decoded, without the end token

    def rows(self, prompts: list[int]) -> list[int]:
        """The rows of the groups of some prompts."""
        return [i * self.group_size + j for i in prompts for j in range(self.group_size)]

    def select(self, prompts: list[int]) -> "Rollout":
        """The groups of some prompts, cut to their longest response."""
        rows = self.rows(prompts)
        width = max([1, *self.mask[rows].sum(1).tolist()])

        def cut(x: Tensor) -> Tensor:
            return x[rows, :width]

        return Rollout(
            prompts=[self.prompts[i] for i in prompts],
            group_size=self.group_size,
            tokens=cut(self.tokens),
            mask=cut(self.mask),
            logprobs=cut(self.logprobs),
            truncated=self.truncated[rows],
            signals=None if self.signals is None else Signals(*map(cut, self.signals)),
            texts=[self.texts[i] for i in rows],
        )


def pad_and_stack(tensors: list[Tensor]) -> Tensor:
    """[B_i, T_i] of several batches -> [ΣB_i, longest T], with zeros behind shorter rows."""
    width = max(x.shape[1] for x in tensors)
    return torch.cat([F.pad(x, (0, width - x.shape[1])) for x in tensors])


def join(rollouts: list[Rollout]) -> Rollout:
    """One rollout of several with the same group size, padded to the longest response."""
    signals = None
    if rollouts[0].signals is not None:
        fields = zip(*(r.signals for r in rollouts), strict=True)
        signals = Signals(*(pad_and_stack(field) for field in fields))
    return Rollout(
        prompts=[prompt for r in rollouts for prompt in r.prompts],
        group_size=rollouts[0].group_size,
        tokens=pad_and_stack([r.tokens for r in rollouts]),
        mask=pad_and_stack([r.mask for r in rollouts]),
        logprobs=pad_and_stack([r.logprobs for r in rollouts]),
        truncated=torch.cat([r.truncated for r in rollouts]),
        signals=signals,
        texts=[text for r in rollouts for text in r.texts],
    )


def runs_within(sizes: list[int], budget: int) -> list[list[int]]:
    """Consecutive indices, in runs whose sizes add up to at most `budget`.

    An index whose size is larger than that is a run of its own.

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
    """A CPU generator whose stream depends on the key alone, such as (seed, step, prompt,
    response)."""
    digest = hashlib.blake2b(repr(key).encode(), digest_size=8).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest, "big"))


def sample_tokens(logits: Tensor, uniforms: Tensor) -> Tensor:
    """Inverse-CDF sampling: logits [R, V], uniforms [R] in [0, 1) -> ids [R].

    Ids of probability 0 are never drawn.
    """
    cumulative = torch.softmax(logits.double(), dim=-1).cumsum(-1)
    # Rounding may leave a total that is not 1.
    threshold = uniforms.double()[:, None] * cumulative[:, -1:]
    ids = torch.searchsorted(cumulative, threshold, right=True).squeeze(-1)
    return ids.clamp(max=logits.shape[-1] - 1)


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
    """Sample G responses to each prompt.

    key: what the random streams depend on besides Prompt.index and the response's place in its
        group, such as (seed, step). None decodes greedily.
    capture: settings with layers, shift and text_scope, to record DyCo's signals.
    max_cache_tokens: prompt and response tokens at once; more prompts are done in several waves.
    temperature: by default the policy's.
    greedy_last: the last response of each group is greedy, whatever the key.
    decoding: makes the layout of a wave; experiments pass a subclass that changes attention.
    """
    sizes = [len(prompt.input_ids) + group_size * max_new_tokens for prompt in prompts]
    training = policy.training
    policy.eval()  # in training mode each layer would prepare to be checkpointed
    try:
        rollouts = []
        for wave in runs_within(sizes, max_cache_tokens):
            of_wave = _Wave(
                policy,
                [prompts[i] for i in wave],
                group_size,
                max_new_tokens=max_new_tokens,
                key=key,
                capture=capture,
                temperature=temperature,
                greedy_last=greedy_last,
                decoding=decoding,
            )
            rollouts.append(of_wave.run())
        return join(rollouts)
    finally:
        policy.train(training)


class _Wave:
    """A part of a rollout: one prefill, and then one token of every response at each step."""

    def __init__(
        self,
        policy: Policy,
        prompts: list[Prompt],
        group_size: int,
        max_new_tokens: int,
        key: tuple | None,
        capture=None,
        temperature: float | None = None,
        greedy_last: bool = False,
        decoding: Callable[..., Decoding] = Decoding,
    ):
        self.policy = policy
        self.prompts = prompts
        self.group_size = group_size
        self.max_new_tokens = max_new_tokens
        self.temperature = temperature
        self.greedy_last = greedy_last
        self.make_layout = decoding
        self.tap: Tap | None = None if capture is None else policy.tap(capture)
        device = policy.device
        rows = len(prompts) * group_size
        shape = (rows, max_new_tokens)
        self.tokens = torch.zeros(shape, dtype=torch.long, device=device)
        self.mask = torch.zeros(shape, dtype=torch.bool, device=device)
        self.logprobs = torch.zeros(shape, device=device)
        self.signals: Signals | None = None
        if self.tap is not None:
            self.signals = Signals(*(torch.zeros(shape, device=device) for _ in Signals._fields))
        self.uniforms: Tensor | None = None  # [B, T]
        if key is not None:
            self.uniforms = self._draw_uniforms(key).to(device)
        self.end_ids = torch.tensor(sorted(policy.eos_ids), device=device)
        self.alive = torch.arange(rows, device=device)  # rows of the batch -> rows of the result
        self.ended = torch.zeros(rows, dtype=torch.bool, device=device)

    def _draw_uniforms(self, key: tuple) -> Tensor:
        streams = []
        for prompt in self.prompts:
            for response in range(self.group_size):
                generator = keyed_generator(*key, prompt.index, response)
                streams.append(torch.rand(self.max_new_tokens, generator=generator))
        return torch.stack(streams)

    def run(self) -> Rollout:
        """Decode to the end."""
        with self.policy.autocast():
            hidden = self._prefill()
            for step in range(self.max_new_tokens):
                chosen = self._choose(hidden, step)
                going = ~self.ended[self.alive]
                count = int(going.sum())
                last = count == 0 or step + 1 == self.max_new_tokens
                # Removing finished rows copies the cache, so wait until a quarter of them has
                # ended.
                leave = count <= COMPACT_BELOW * len(self.alive)
                full = self.layout.waiting == Tap.STEPS
                if self.layout.waiting and (last or leave or full):
                    self._record(self.layout.signals(), end=step + 1)
                if last:
                    break
                if leave:
                    places = going.nonzero().squeeze(-1)
                    self.layout.keep(places)
                    self.alive = self.alive[places]
                    chosen = chosen[places]
                    going = going[places]
                hidden = self._pass(chosen, step, going)
        return self._result()

    def _prefill(self) -> Tensor:
        """Every prompt once, as many in a row as PREFILL_TOKENS allow.

        Makes the layout of decoding and records the first signals. Returns the hidden state that
        predicts the first token of each response, [B, D].
        """
        policy, tap = self.policy, self.tap
        positions = [policy.prompt_positions(prompt) for prompt in self.prompts]
        hidden, first_signals = [], []
        kept: dict[int, list[tuple[Tensor, Tensor]]] = {}
        for run in runs_within([len(p.input_ids) for p in self.prompts], PREFILL_TOKENS):
            prompts = [self.prompts[i] for i in run]
            no_responses = [[] for _ in prompts]
            layout = PackedGroups(
                prompts, no_responses, tap=tap, keep_keys=True, first_group=run[0]
            )
            row_positions = torch.cat([positions[i] for i in run], dim=1)[:, None]
            row = policy.decoder(policy.embed(prompts)[None], row_positions, layout)[0]
            last = torch.tensor([len(p.input_ids) for p in prompts]).cumsum(0) - 1
            hidden.append(row[last.to(policy.device)])
            for layer, pairs in layout.kept.items():
                kept.setdefault(layer, []).extend(pairs)
            if tap is not None:
                first_signals += [tap.take(index) for index in run]

        if tap is not None:
            fields = zip(*first_signals, strict=True)
            of_rows = (torch.cat(x).repeat_interleave(self.group_size, dim=0) for x in fields)
            self._record(Signals(*of_rows), end=1)
        self.layout = self.make_layout(
            self.prompts,
            kept,
            self.group_size,
            capacity=self.max_new_tokens,
            tap=tap,
            device=policy.device,
        )
        self.head = policy.hf.lm_head.weight.to(policy.dtype)
        # M-RoPE: a response goes on behind the largest position of its prompt.
        following = torch.tensor([int(p.max()) + 1 for p in positions], device=policy.device)
        self.following = following.repeat_interleave(self.group_size)
        return torch.cat(hidden).repeat_interleave(self.group_size, dim=0)

    def _choose(self, hidden: Tensor, step: int) -> Tensor:
        """Draw the next token of every row [R], and write it down where the response goes on."""
        alive = self.alive
        logits = self.policy.next_token_logits(hidden, self.head, self.temperature)
        if self.uniforms is None:
            chosen = logits.argmax(-1)
        else:
            chosen = sample_tokens(logits, self.uniforms[alive, step])
        if self.greedy_last:
            is_last = alive % self.group_size == self.group_size - 1
            chosen = torch.where(is_last, logits.argmax(-1), chosen)
        going = ~self.ended[alive]
        logprobs = logits.log_softmax(-1).gather(-1, chosen[:, None])[:, 0]
        self.tokens[alive, step] = torch.where(going, chosen, 0)
        self.mask[alive, step] = going
        self.logprobs[alive, step] = torch.where(going, logprobs, 0)
        self.ended[alive] |= torch.isin(chosen, self.end_ids)
        return chosen

    def _pass(self, chosen: Tensor, step: int, going: Tensor) -> Tensor:
        """The decoder's pass over the tokens chosen at this step: [R] -> [R, D]."""
        embedded = self.policy.look_up(chosen)[:, None]
        position = (self.following[self.alive] + step)[None, :, None].expand(3, -1, -1)

        def compute() -> Tensor:
            return self.policy.decoder(embedded, position, self.layout)[:, 0]

        return self.layout.advance(compute, going)

    def _record(self, signals: Signals, end: int) -> None:
        """Signals [R, n] of the n tokens before place `end`, of the rows that are alive."""
        for whole, values in zip(self.signals, signals, strict=True):
            whole[self.alive, end - values.shape[1] : end] = values

    def _result(self) -> Rollout:
        lengths = self.mask.sum(1)
        width = int(lengths.max())
        mask = self.mask[:, :width]
        without_end = (lengths - self.ended.long()).tolist()
        texts = []
        for ids, length in zip(self.tokens.tolist(), without_end, strict=True):
            texts.append(self.policy.tokenizer.decode(ids[:length], skip_special_tokens=False))
        signals = None
        if self.signals is not None:
            # Rows that have ended are decoded on until they leave: what they left there goes.
            signals = Signals(*(torch.where(mask, x[:, :width], 0) for x in self.signals))
        return Rollout(
            prompts=self.prompts,
            group_size=self.group_size,
            tokens=self.tokens[:, :width],
            mask=mask,
            logprobs=self.logprobs[:, :width],
            truncated=~self.ended,
            signals=signals,
            texts=texts,
        )
