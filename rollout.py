"""rollout.py: sampling G responses to each prompt from one prefill.

The vision tower and the prompt run once per prompt (`PackedGroups` without responses,
attention.py). Then each step decodes one token of every response (`Decoding`), and DyCo's signals
are read off the attention while it is there. Now and then the CPU looks which responses have
ended, and lets them leave the batch once there are enough of them. Between two looks a step has
static shapes and waits for nothing: on a GPU it is replayed as a CUDA graph (`StepGraphs`).

What is sampled is what is scored later: there is a temperature, but no top-k and no top-p, and the
same ids are suppressed (model.py, scaled_logits). Each response draws its uniform numbers from a
generator of its own, keyed by the seed, the step, the prompt's place in the step and the response's
place in the group. So neither the composition of a batch, nor the number of processes, nor
responses that leave early change what is sampled.

Shapes: P prompts, G responses per prompt, B = P·G responses, T response tokens, R rows that are
still decoded, D hidden width, V vocabulary.
"""

import hashlib
import itertools
import math
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from attention import ALIGNED, Decoding, Pace, PackedGroups, Tap, pace_on, round_up
from data import Prompt
from decoder import Embedded
from dyco import Signals
from model import Policy, image_similarity
from rows import first_line

PREFILL_TOKENS = 16384  # prompt tokens in one prefill
RECORDABLE = ("entropy", "image_similarity")  # what `generate` can record
BLOCK = 256  # at most so many ids of the vocabulary are one block for sampling


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
    # If asked for, [B, T] float32, 0 on padding:
    entropy: Tensor | None = None  # of the distribution that each token was drawn from, in nats
    image_similarity: Tensor | None = None  # of the state that predicts it, see model.py

    def rows(self, prompts: list[int]) -> list[int]:
        """The rows of the groups of some prompts."""
        return [i * self.group_size + j for i in prompts for j in range(self.group_size)]

    def select(self, prompts: list[int]) -> "Rollout":
        """The groups of some prompts, cut to their longest response."""
        rows = self.rows(prompts)
        width = max([1, *self.mask[rows].sum(1).tolist()])

        def cut(x: Tensor | None) -> Tensor | None:
            return None if x is None else x[rows, :width]

        return Rollout(
            prompts=[self.prompts[i] for i in prompts],
            group_size=self.group_size,
            tokens=cut(self.tokens),
            mask=cut(self.mask),
            logprobs=cut(self.logprobs),
            truncated=self.truncated[rows],
            signals=None if self.signals is None else Signals(*map(cut, self.signals)),
            texts=[self.texts[i] for i in rows],
            entropy=cut(self.entropy),
            image_similarity=cut(self.image_similarity),
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

    def stack_if_there(tensors: list[Tensor | None]) -> Tensor | None:
        return None if tensors[0] is None else pad_and_stack(tensors)

    return Rollout(
        prompts=[prompt for r in rollouts for prompt in r.prompts],
        group_size=rollouts[0].group_size,
        tokens=pad_and_stack([r.tokens for r in rollouts]),
        mask=pad_and_stack([r.mask for r in rollouts]),
        logprobs=pad_and_stack([r.logprobs for r in rollouts]),
        truncated=torch.cat([r.truncated for r in rollouts]),
        signals=signals,
        texts=[text for r in rollouts for text in r.texts],
        entropy=stack_if_there([r.entropy for r in rollouts]),
        image_similarity=stack_if_there([r.image_similarity for r in rollouts]),
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


def waves_within(
    lengths: list[int], group_size: int, max_new_tokens: int, budget: int, pace: Pace
) -> list[list[int]]:
    """Consecutive prompts, in waves that take at most `budget` tokens of cache.

    lengths: of the prompts, which are stored as long as the longest of a wave, in steps of ALIGNED.
    Each response takes the space of max_new_tokens, in steps of pace.own_keys. A prompt that is too
    large is a wave of its own.

    >>> pace = Pace(look=1, own_keys=16, leave=0.75)
    >>> waves_within([30, 30, 50, 90], group_size=1, max_new_tokens=9, budget=140, pace=pace)
    [[0, 1], [2], [3]]
    """
    own = group_size * round_up(max_new_tokens, pace.own_keys)
    waves, longest = [], 0
    for index, length in enumerate(lengths):
        length = round_up(length, ALIGNED)
        longest = max(longest, length)
        if not waves or (len(waves[-1]) + 1) * (longest + own) > budget:
            waves.append([])
            longest = length
        waves[-1].append(index)
    return waves


def keyed_generator(*key) -> torch.Generator:
    """A CPU generator whose stream depends on the key alone, such as (seed, step, prompt,
    response)."""
    digest = hashlib.blake2b(repr(key).encode(), digest_size=8).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest, "big"))


def sample_tokens(
    logits: Tensor, uniforms: Tensor, greedy: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Inverse-CDF sampling: logits [R, V], uniforms [R] in [0, 1) -> ids, log-probabilities [R].

    greedy [R] bool: the rows that take the likeliest id instead. Ids of probability 0 are never
    drawn. The vocabulary is large, so it is passed over as seldom as can be: sums of blocks of ids
    say in which block a uniform number falls, and only that block is looked into.
    """
    highest = logits.amax(dim=-1, keepdim=True)
    shares = (logits - highest).exp_()
    size = math.gcd(shares.shape[-1], BLOCK)
    # The sums of blocks, with the rows last: so it is quick, however the logits lie in memory.
    of_blocks = shares.T.unflatten(0, (-1, size)).sum(1).T
    # In float64, or what a large vocabulary adds up to would be lost in rounding.
    up_to = of_blocks.double().cumsum(-1)
    total = up_to[:, -1:]
    threshold = uniforms.double()[:, None] * total
    block = torch.searchsorted(up_to, threshold, right=True).clamp_(max=up_to.shape[1] - 1)

    blocks = shares.unflatten(-1, (-1, size))
    inside = blocks.gather(1, block[..., None].expand(-1, -1, size)).squeeze(1).double().cumsum(-1)
    of_block = inside[:, -1:]
    threshold = threshold - (up_to.gather(-1, block) - of_block)
    # Both sums of the block are rounded: stay within it, where some id has a probability.
    threshold = torch.minimum(threshold, of_block * (1 - 2**-52))
    ids = block * size + torch.searchsorted(inside, threshold, right=True)
    ids.clamp_(max=logits.shape[-1] - 1)  # logits that are not numbers give an id, too
    if greedy is not None:
        ids = torch.where(greedy[:, None], logits.argmax(dim=-1, keepdim=True), ids)
    logprobs = logits.gather(-1, ids) - highest - total.log().float()
    return ids.squeeze(-1), logprobs.squeeze(-1)


def entropy_of(logits: Tensor) -> Tensor:
    """The entropy [R] of the distributions of logits [R, V], in nats."""
    logprobs = logits.log_softmax(dim=-1)
    # A product of its own would be computed in 16 bits under autocast, where the lowest float32 of
    # suppressed ids is −∞.
    return -(logprobs.exp() * logprobs).sum(-1)


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
    record: Sequence[str] = (),
) -> Rollout:
    """Sample G responses to each prompt.

    key: what the random streams depend on besides Prompt.index and the response's place in its
        group, such as (seed, step). None decodes greedily.
    capture: settings with layers, shift and text_scope, to record DyCo's signals.
    max_cache_tokens: prompt and response tokens at once; more prompts are done in several waves.
    temperature: by default the policy's.
    greedy_last: the last response of each group is greedy, whatever the key.
    decoding: makes the layout of a wave; experiments pass a subclass that changes attention.
    record: of RECORDABLE, to have these fields of the result. Raises ValueError for another name.
    """
    unknown = sorted(set(record) - set(RECORDABLE))
    if unknown:
        raise ValueError(f"record: {unknown} cannot be recorded; expected {list(RECORDABLE)}")
    lengths = [len(prompt.input_ids) for prompt in prompts]
    pace = pace_on(policy.device)
    training = policy.training
    waves = waves_within(lengths, group_size, max_new_tokens, budget=max_cache_tokens, pace=pace)
    policy.eval()  # in training mode each layer would prepare to be checkpointed
    try:
        rollouts = []
        with policy.prepared():
            for wave in waves:
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
                    record=record,
                )
                rollouts.append(of_wave.run())
        return join(rollouts)
    finally:
        policy.train(training)


class StepGraphs:
    """Runs decoding steps, and on a GPU replays them as CUDA graphs, one for each shape.

    A step of a large model is more than a thousand kernels, and launching them from Python takes
    several times as long as running them. A graph launches them all at once. It holds the addresses
    of what it reads and writes, which stay the same until rows leave; then it is forgotten.
    """

    def __init__(self, step: Callable[[], None], enabled: bool, policy: Policy):
        """enabled: the step runs on a GPU, and may be recorded. policy: whose step it is."""
        self.step = step
        self.enabled = enabled
        self.policy = policy
        self.forget()

    def forget(self) -> None:
        self.prepared: set[int] = set()  # shapes of which a step has run as it is
        self.graphs: dict[int, torch.cuda.CUDAGraph] = {}
        # One pool of memory for all graphs, of which one runs at a time. A new one after each
        # forgetting: an old pool in which a library has kept its workspace cannot be opened again.
        self.pool = torch.cuda.graph_pool_handle() if self.enabled else None

    def run(self, shape: int) -> None:
        """One step; `shape` names what shapes it has."""
        # The first step of a shape runs as it is: libraries prepare themselves in it.
        if self.enabled and shape in self.prepared and shape not in self.graphs:
            self._capture(shape)
        if shape in self.graphs:
            self.graphs[shape].replay()
        else:
            self.step()
            self.prepared.add(shape)

    def _capture(self, shape: int) -> None:
        """Record the step. Nothing of it runs yet."""
        graph = torch.cuda.CUDAGraph()
        stream = torch.cuda.current_stream()
        try:
            # Other threads go on meanwhile, such as the one that watches over NCCL.
            with torch.cuda.graph(graph, pool=self.pool, capture_error_mode="thread_local"):
                self.step()
        except RuntimeError as error:
            self.enabled = False
            # Each wave has graphs of its own. What failed once would fail again and again, and may
            # leave memory behind each time.
            self.policy.graphs = False
            self.forget()  # a library's workspace can go with this graph, and others may use it
            torch.cuda.set_stream(stream)  # a capture that fails can leave its own stream behind
            # The end of a failed capture complains, too. What went wrong is the error before it.
            before = error.__context__
            cause = before if isinstance(before, RuntimeError) else error
            reason = first_line(cause)
            warnings.warn(f"decoding goes on without CUDA graphs: {reason}", stacklevel=2)
        else:
            self.graphs[shape] = graph


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
        record: Sequence[str] = (),
    ):
        self.policy = policy
        self.prompts = prompts
        self.group_size = group_size
        self.max_new_tokens = max_new_tokens
        self.temperature = temperature
        self.make_layout = decoding
        self.tap: Tap | None = None if capture is None else policy.tap(capture)
        device = policy.device
        rows = len(prompts) * group_size
        shape = (rows, max_new_tokens)
        self.tokens = torch.zeros(shape, dtype=torch.long, device=device)
        self.mask = torch.zeros(shape, dtype=torch.bool, device=device)
        self.logprobs = torch.zeros(shape, device=device)
        self.recorded = {name: torch.zeros(shape, device=device) for name in record}
        self.images: Tensor | None = None  # [R, D], mean states of the prompts' image tokens
        self.signals: Signals | None = None
        if self.tap is not None:
            self.signals = Signals(*(torch.zeros(shape, device=device) for _ in Signals._fields))
        # [B, T], and the rows that are greedy, [B], if there are any
        self.uniforms = torch.zeros(shape, device=device)
        self.greedy: Tensor | None = None
        if key is None:
            self.greedy = torch.ones(rows, dtype=torch.bool, device=device)
        else:
            self.uniforms = self._draw_uniforms(key).to(device)
            if greedy_last:
                self.greedy = torch.arange(rows, device=device) % group_size == group_size - 1
        self.end_ids = torch.tensor(sorted(policy.eos_ids), dtype=torch.long, device=device)
        self.truncated = torch.ones(rows, dtype=torch.bool, device=device)
        # Of the rows that are still decoded: which row of the result each is, whether it goes on,
        # and its newest token.
        self.alive = torch.arange(rows, device=device)
        self.going = torch.ones(rows, dtype=torch.bool, device=device)
        self.newest = torch.zeros(rows, dtype=torch.long, device=device)
        self.column = torch.zeros(1, dtype=torch.long, device=device)  # where the next token goes
        self.waiting = 0  # steps whose signals are not written down yet

    def _draw_uniforms(self, key: tuple) -> Tensor:
        streams = []
        for prompt in self.prompts:
            for response in range(self.group_size):
                generator = keyed_generator(*key, prompt.index, response)
                streams.append(torch.rand(self.max_new_tokens, generator=generator))
        return torch.stack(streams)

    def run(self) -> Rollout:
        """Decode to the end."""
        # Launching the kernels of a small model takes longer than running them, and less long
        # without the books that are kept for gradients. A tensor that is made in inference mode
        # cannot be saved for a backward. So what is returned was allocated in `__init__`, and is
        # only written to here.
        with torch.inference_mode(), self.policy.autocast():
            self._choose(self._prefill())
            pace = self.layout.pace
            on_gpu = self.policy.device.type == "cuda"
            as_graphs = on_gpu and self.policy.graphs and self.layout.static
            graphs = StepGraphs(self._step, enabled=as_graphs, policy=self.policy)
            length = 1
            while length < self.max_new_tokens:
                count = int(self.going.sum())  # waits for the device
                if count == 0:
                    break
                if count <= pace.leave * len(self.alive):
                    self._write_waiting(length)
                    self._keep(self.going.nonzero().squeeze(-1))
                    graphs.forget()
                steps = min(pace.look, self.max_new_tokens - length)
                self.layout.make_room(length + steps - 1)
                for _ in range(steps):
                    graphs.run(shape=self.layout.width)
                length += steps
                self.waiting += steps
                if self.waiting == Tap.STEPS:
                    self._write_waiting(length)
            self._write_waiting(length)
            self.truncated[self.alive] = self.going
        return self._result()

    def _prefill(self) -> Tensor:
        """Every prompt once, as many in a row as PREFILL_TOKENS allow.

        Makes the layout of decoding and records the first signals. Returns the hidden state that
        predicts the first token of each response, [B, D].
        """
        policy, tap = self.policy, self.tap
        positions = [policy.prompt_positions(prompt) for prompt in self.prompts]
        hidden, first_signals = [], []
        with_images = "image_similarity" in self.recorded
        images: list[Tensor | None] = []  # mean states, [prompts of a row, D]
        kept: dict[int, list[tuple[Tensor, Tensor]]] = {}
        for run in runs_within([len(p.input_ids) for p in self.prompts], PREFILL_TOKENS):
            prompts = [self.prompts[i] for i in run]
            no_responses = [[] for _ in prompts]
            layout = PackedGroups(
                prompts, no_responses, tap=tap, keep_keys=True, first_group=run[0]
            )
            turns = policy.rotary(torch.cat([positions[i] for i in run], dim=1)[:, None])
            ends = itertools.accumulate(len(p.input_ids) for p in prompts)
            states, of_images = policy.packed_states(
                policy.embed(prompts),
                turns,
                layout,
                places=[end - 1 for end in ends],
                with_images=with_images,
            )
            hidden.append(states)
            images.append(of_images)
            for layer, pairs in layout.kept.items():
                kept.setdefault(layer, []).extend(pairs)
            if tap is not None:
                first_signals += [tap.take(index) for index in run]

        if tap is not None:
            fields = zip(*first_signals, strict=True)
            of_rows = (torch.cat(x).repeat_interleave(self.group_size, dim=0) for x in fields)
            self._write(Signals(*of_rows), end=1)
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
        following = [int(p.max()) + 1 for p in positions]
        of_prompts = torch.tensor(following, device=policy.device)
        self.following = of_prompts.repeat_interleave(self.group_size)
        # All positions that a response may have. Text has the same one on all three axes.
        end = max(following) + self.max_new_tokens
        self.turns = policy.rotary(torch.arange(end).expand(3, 1, -1))
        if with_images:
            self.images = torch.cat(images).repeat_interleave(self.group_size, dim=0)
        return torch.cat(hidden).repeat_interleave(self.group_size, dim=0)

    def _step(self) -> None:
        """One more token of every row.

        No shape in here depends on what is sampled, and nothing waits for the device. All that is
        kept is written into tensors that are there already. So a graph can hold it.
        """
        embedded = Embedded(self.policy.look_up(self.newest)[:, None])
        turns = self.turns.at(self.following + self.layout.position)

        def compute() -> Tensor:
            return self.policy.decoder(embedded, turns, self.layout)[:, 0]

        self._choose(self.layout.advance(compute, self.going))

    def _choose(self, hidden: Tensor) -> None:
        """Draw the next token of every row from hidden [R, D], and write it down."""
        logits = self.policy.next_token_logits(hidden, self.head, self.temperature)
        uniforms = self.uniforms[self.alive, self.column]
        greedy = None if self.greedy is None else self.greedy[self.alive]
        tokens, logprobs = sample_tokens(logits, uniforms, greedy)
        place = (self.alive, self.column)
        for name, values in self.recorded.items():
            if name == "entropy":
                value = entropy_of(logits)
            else:
                value = image_similarity(hidden, self.images)
            values[place] = torch.where(self.going, value, 0)
        self.tokens[place] = torch.where(self.going, tokens, 0)
        self.logprobs[place] = torch.where(self.going, logprobs, 0)
        self.mask[place] = self.going
        self.newest.copy_(tokens)
        self.going &= (tokens[:, None] != self.end_ids).all(dim=-1)
        self.column += 1

    def _keep(self, rows: Tensor) -> None:
        """Only these rows go on: [rows] places among the present ones."""
        self.truncated[self.alive] = self.going
        self.alive = self.alive[rows]
        self.going = self.going[rows]
        self.newest = self.newest[rows]
        self.following = self.following[rows]
        if self.images is not None:
            self.images = self.images[rows]
        self.layout.keep(rows)

    def _write_waiting(self, length: int) -> None:
        """Write down the signals of the waiting steps, the last of which made token `length`."""
        if self.waiting and self.signals is not None:
            self._write(self.layout.signals(self.waiting), end=length)
        self.waiting = 0

    def _write(self, signals: Signals, end: int) -> None:
        """Signals [R, n] of the n tokens before place `end`, of the rows that are alive."""
        for whole, values in zip(self.signals, signals, strict=True):
            whole[self.alive, end - values.shape[1] : end] = values

    def _result(self) -> Rollout:
        lengths = self.mask.sum(1)
        width = int(lengths.max())
        mask = self.mask[:, :width]
        without_end = (lengths - (~self.truncated).long()).tolist()
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
            truncated=self.truncated,
            signals=signals,
            texts=texts,
            **{name: values[:, :width] for name, values in self.recorded.items()},
        )
