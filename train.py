"""train.py: reinforcement learning with verifiable rewards, and DyCo-RL's token advantages.

    python train.py config.yaml [section.key=value ...]                          # one process
    torchrun --nproc-per-node=8 train.py config.yaml [section.key=value ...]     # several

One step, top to bottom (`train_step`):

    1. rollout    G responses to each prompt, one prefill per prompt; attention is read
                  while decoding                                                 eq. 1, 2, 3
    2. reward     accuracy and format of each response
    3. logprobs   of the behaviour policy, if those of the rollout will not do; of the reference
                  policy, if algo.kl > 0; without the image, if the rule asks
    4. advantage  each response against its group
    5. DyCo       the role of each token, the fit of its attention, its weight,
                  its own advantage                                              eq. 4 to 8
    6. update     a few optimizer steps, each on its own groups: packed forward, loss,
                  backward, clip, step

What it leaves out: a value model, asynchronous rollouts. Everything that a
run writes is under run.dir, but for the toy's cached warm start. The same command resumes it.

Shapes: P prompts of this process, G responses per prompt, B = P·G, T response tokens. What is
*group-major* has the responses of a prompt in consecutive rows. A *packed* row holds a prompt once,
and then its responses (attention.py). A function that is *collective* must be called by all
processes.
"""

import contextlib
import functools
import hashlib
import math
import signal
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import NamedTuple

import torch
from torch import Tensor
from tqdm import tqdm

import distributed
import dyco
import evaluate
import lora
import metrics
import rewards
import rl_algos
import run_folder
import toy
from config import Config, ConfigError, load_config, split_arguments
from data import DataError, JsonlDataset, Prompt, Sampler, check_lengths
from distributed import ALONE, World
from model import Policy, is_out_of_memory, policy_from_config
from rollout import (
    RECORDABLE,
    Rollout,
    generate,
    join,
    keyed_generator,
    pad_and_stack,
    runs_within,
)
from rows import excerpt, first_line, printable
from run_folder import RunError, RunFolder

USAGE = f"""usage: {{python|torchrun}} train.py CONFIG.yaml [section.key=value ...]

Every key, with its meaning, is in config.yaml; for example algo.name=gspo dyco.rule=signed.

{__doc__}"""
STOP_SIGNALS = (signal.SIGTERM, signal.SIGHUP, signal.SIGINT)
MAX_FAILURES = 5  # steps in a row with a loss or gradient that is not finite, before the run stops


# ---------- what the stages work with and on


class SampleError(RunError):
    """A sample or its reward failed, before anything was learned from the step."""


class Training(NamedTuple):
    """What the stages of a step work with."""

    config: Config
    world: World
    policy: Policy
    reference: Policy | None = None  # only where algo.kl > 0; with LoRA the policy itself
    optimizer: torch.optim.Optimizer | None = None
    dataset: Sequence = ()  # of Sample
    sampler: Sampler | None = None
    held_out: Sequence | None = None  # of Sample
    custom_reward: Callable | None = None
    inputs: dict[str, str] = {}  # config key -> fingerprint of what it names


@dataclass
class Batch:
    """One rollout batch of this process, and what the stages add to it; group-major."""

    rollout: Rollout
    rewards: Tensor  # [P, G]
    accuracy: Tensor  # [P, G]
    format: Tensor  # [P, G]
    custom: Tensor | None = None  # [P, G]
    advantages: Tensor | None = None  # [B, T], of every token
    roles: Tensor | None = None  # [B, T]
    scores: Tensor | None = None  # [B, T], s_t of eq. 6
    old_logprobs: Tensor | None = None  # [B, T]
    blind_logprobs: Tensor | None = None  # [B, T], where the rule asks for them
    ref_logprobs: Tensor | None = None  # [B, T]
    loss_mask: Tensor | None = None  # [B, T]

    @property
    def positions(self) -> list[int]:
        """Each prompt's place in the order in which the step drew them, over all processes."""
        return [prompt.index for prompt in self.rollout.prompts]

    def select(self, prompts: list[int]) -> "Batch":
        """The groups of some prompts, before any stage has added to them."""
        return Batch(
            self.rollout.select(prompts),
            rewards=self.rewards[prompts],
            accuracy=self.accuracy[prompts],
            format=self.format[prompts],
            custom=None if self.custom is None else self.custom[prompts],
        )


def join_batches(batches: list[Batch]) -> Batch:
    """One batch of several, before any stage has added to them."""

    def stack(name: str) -> Tensor:
        return torch.cat([getattr(batch, name) for batch in batches])

    return Batch(
        join([batch.rollout for batch in batches]),
        rewards=stack("rewards"),
        accuracy=stack("accuracy"),
        format=stack("format"),
        custom=None if batches[0].custom is None else stack("custom"),
    )


# ---------- 1. rollout, 2. reward


def needs(config: Config) -> tuple[str, ...]:
    """What the weighting rule needs besides roles and scores: fields of dyco.Tokens."""
    return dyco.RULES[config.dyco.rule].needs if config.dyco.enabled else ()


def collect(training: Training, drawn: list[tuple[int, int]], step: int) -> Batch:
    """Stages 1 and 2: responses to some (position, sample index) pairs, and their rewards."""
    config, policy = training.config, training.policy
    samples, prompts = [], []
    for position, index in drawn:
        sample = training.dataset[index]
        template, most = config.data.prompt_template, config.data.max_prompt_tokens
        samples.append(sample)
        prompts.append(policy.encode(sample, position, template, max_prompt_tokens=most))
    while_decoding = config.dyco.enabled and config.dyco.capture == "rollout"
    with memory_for(describe_sampling, config, prompts):
        rollout = generate(
            policy,
            prompts,
            config.rollout.group_size,
            max_new_tokens=config.rollout.max_new_tokens,
            key=(config.train.seed, step),
            capture=config.dyco if while_decoding else None,
            max_cache_tokens=config.rollout.max_cache_tokens,
            record=[name for name in needs(config) if name in RECORDABLE],
        )
    return give_rewards(training, rollout, samples)


def give_rewards(training: Training, rollout: Rollout, samples: list) -> Batch:
    """Stage 2. samples: those of the prompts."""
    config = training.config
    sample_of_row = [sample for sample in samples for _ in range(rollout.group_size)]
    rows = list(zip(rollout.texts, sample_of_row, strict=True))

    def grouped(values: list[float] | Tensor) -> Tensor:
        return torch.as_tensor(values).view(len(samples), rollout.group_size)

    accuracy = grouped([rewards.accuracy(text, sample.answer) for text, sample in rows])
    form = grouped([rewards.format(text) for text, _ in rows])
    total = config.reward.accuracy_weight * accuracy + config.reward.format_weight * form
    custom = None
    if training.custom_reward is not None:
        custom = grouped([ask_custom(training, text, sample) for text, sample in rows])
        total = total + config.reward.custom_weight * custom
    penalty = rl_algos.overlong_penalty(
        rollout.mask.sum(1).cpu(), config.rollout.max_new_tokens, config.algo.overlong_buffer
    )
    total = total + config.algo.overlong_weight * grouped(penalty)
    return Batch(rollout, rewards=total, accuracy=accuracy, format=form, custom=custom)


def ask_custom(training: Training, text: str, sample) -> float:
    """The user's own reward of one response. Raises RunError, or gives 0 if the config says so."""
    settings = training.config.reward
    try:
        return rewards.call_custom(
            training.custom_reward,
            text,
            sample.answer,
            sample=sample,
            limit=settings.custom_timeout,
        )
    except rewards.RewardError as error:
        where = excerpt(f"{error}, on a response to {sample.id}")
        if settings.custom_on_error == "raise":
            advice = "reward.custom_on_error=zero goes on with a reward of 0"
            raise SampleError(f"{where}; {advice}") from error
        tqdm.write(f"{where}: its reward is 0", file=sys.stderr)
        return 0.0


def collect_useful(training: Training, step: int) -> tuple[Batch, list[Batch]]:
    """`collect` for this process's share of rollout.prompts_per_step.

    Under dynamic sampling (DAPO), groups whose accuracy is constant are dropped, and replaced in at
    most algo.max_refills further rounds, each of rollout.prompts_per_step prompts.

    Returns the groups to learn from, possibly none, and all that was collected on the way.
    """
    config, world = training.config, training.world
    prompts_per_round = config.rollout.prompts_per_step
    quota = prompts_per_round  # of all processes together
    rounds = 1
    if config.algo.dynamic_sampling:
        rounds += config.algo.max_refills
    kept, collected = [], []
    for round_number in range(rounds):
        indices = training.sampler.take(prompts_per_round)
        drawn = list(enumerate(indices, start=round_number * prompts_per_round))
        batch = collect(training, drawn[world.rank :: world.size], step)
        collected.append(batch)
        useful = batch.positions
        if config.algo.dynamic_sampling:
            varies = (batch.accuracy != batch.accuracy[:, :1]).any(1).tolist()
            useful = [p for p, keep in zip(batch.positions, varies, strict=True) if keep]
        # The first drawn are the first kept, whichever process has them.
        accepted = sorted(flatten(world.gather(useful)))[:quota]
        quota -= len(accepted)
        mine = [i for i, position in enumerate(batch.positions) if position in accepted]
        kept.append(batch.select(mine))
        if quota == 0:
            break
    return join_batches(kept), collected


def flatten(lists: list[list]) -> list:
    return [item for items in lists for item in items]


# ---------- 3. logprobs


def split(training: Training, batch: Batch, step: int) -> list[list[int]]:
    """This process's groups of each of the step's mini-batches.

    The split is seeded, and the same for any number of processes.
    """
    settings = training.config.train
    positions = sorted(flatten(training.world.gather(batch.positions)))
    order = torch.randperm(len(positions), generator=keyed_generator(settings.seed, step, "split"))
    count = max(1, min(settings.updates_per_rollout, len(positions)))
    minibatches = []
    for chunk in order.tensor_split(count):
        wanted = {positions[i] for i in chunk.tolist()}
        minibatches.append([i for i, place in enumerate(batch.positions) if place in wanted])
    return minibatches


def packed_rows(training: Training, rollout: Rollout, groups: list[int]) -> list[list[int]]:
    """Groups, in packed rows of at most train.micro_batch_tokens; a larger one is a row of its own.

    All processes get the same number of rows, since sharded layers need all of them. One with less
    work gets empty rows, for which `policy.idle` makes a pass whose gradients are 0.
    """
    lengths = rollout.mask.sum(1).view(len(rollout.prompts), rollout.group_size).sum(1).tolist()
    sizes = [len(rollout.prompts[group].input_ids) + lengths[group] for group in groups]
    runs = runs_within(sizes, training.config.train.micro_batch_tokens)
    rows = [[groups[i] for i in run] for run in runs]
    idle = max(training.world.gather(len(rows))) - len(rows)
    return rows + [[] for _ in range(idle)]


@torch.no_grad()
def compute_logprobs(
    training: Training,
    policy: Policy,
    rollout: Rollout,
    minibatches: list[list[int]],
    capture: bool = False,
    blind: bool = False,
) -> tuple[Tensor, dyco.Signals | None]:
    """Log-probabilities [B, T] by the packed forward, and with `capture` DyCo's signals.

    blind: those that the policy would have given if it had not seen the images.
    The rows are packed as the update will pack them, since a GPU may round another row otherwise.
    """
    config = training.config
    logprobs = torch.zeros_like(rollout.logprobs)
    signals = None
    if capture:
        signals = dyco.Signals(*(torch.zeros_like(logprobs) for _ in dyco.Signals._fields))
    for groups in flatten([packed_rows(training, rollout, chosen) for chosen in minibatches]):
        if not groups:
            policy.idle()
            continue
        part, rows = rollout.select(groups), rollout.rows(groups)
        tap = policy.tap(config.dyco) if capture else None
        with memory_for(describe_packed_row, config, rollout, groups):
            output = policy(part.prompts, part.tokens, part.mask, tap=tap, blind=blind)
        width = part.mask.shape[1]
        logprobs[rows, :width] = output.logprobs
        if capture:
            for whole, values in zip(signals, output.signals, strict=True):
                whole[rows, :width] = values
    return logprobs, signals


def add_logprobs(training: Training, batch: Batch, minibatches: list[list[int]]) -> dict:
    """Stage 3: the old and the reference log-probabilities; signals too, if not read while
    decoding.

    Returns what to log.
    """
    policy, reference, rollout = training.policy, training.reference, batch.rollout
    logged = {}
    # In 16 bits the kernels of decoding and of the packed forward differ by more than GSPO's clip
    # range, so what was recorded while decoding is not what the first update starts from.
    how = training.config.train.old_logprobs
    again = how == "scored" or (how == "auto" and policy.dtype != torch.float32)
    capture = training.config.dyco.enabled and training.config.dyco.capture == "scoring"
    batch.old_logprobs = rollout.logprobs
    if again or capture:
        logprobs, signals = compute_logprobs(
            training, policy, rollout, minibatches=minibatches, capture=capture
        )
        if capture:
            rollout.signals = signals
        gap = (logprobs - rollout.logprobs).abs()
        largest = float(gap.max()) if gap.numel() else 0.0
        logged["policy/rollout_gap"] = max(training.world.gather(largest))
        if again:
            batch.old_logprobs = logprobs
    if "blind_logprobs" in needs(training.config):
        batch.blind_logprobs = blind_logprobs(training, batch, minibatches)
    if reference is not None:
        with lora.off(reference):
            batch.ref_logprobs, _ = compute_logprobs(
                training, reference, rollout, minibatches=minibatches
            )
    return logged


def blind_logprobs(training: Training, batch: Batch, minibatches: list[list[int]]) -> Tensor:
    """The log-probabilities of the responses, [B, T], where no text sees the image."""
    rollout = batch.rollout
    logprobs, _ = compute_logprobs(
        training, training.policy, rollout, minibatches=minibatches, blind=True
    )
    # Without an image both looks are the same; what they differ by is rounding.
    has_image = [prompt.pixel_values is not None for prompt in rollout.prompts]
    has_image = torch.tensor(has_image, dtype=torch.bool, device=rollout.mask.device)
    sees = has_image.repeat_interleave(rollout.group_size)[:, None]
    return torch.where(sees, logprobs, batch.old_logprobs)


# ---------- 4. advantage, 5. DyCo


def shuffle_generators(
    config: Config, step: int, positions: list[int], group_size: int
) -> list[torch.Generator]:
    """For dyco.control "shuffled": a generator for each response, group-major."""
    return [
        keyed_generator(config.train.seed, step, "shuffle", position, response)
        for position in positions
        for response in range(group_size)
    ]


def assign_advantages(config: Config, batch: Batch, step: int, world: World = ALONE) -> None:
    """Stages 4 and 5: group advantages, then one advantage for each token.

    Collective where the rule compares responses of different groups.
    """
    rollout, settings = batch.rollout, config.dyco
    advantages = rl_algos.group_advantages(batch.rewards, config.algo.scale)  # [P, G]
    advantages = advantages.flatten().to(rollout.mask.device)
    if not settings.enabled:
        batch.advantages = torch.where(rollout.mask, advantages[:, None], 0)
        return
    batch.roles, batch.scores = dyco.roles_and_scores(rollout.signals, rollout.mask, settings)
    seen = {
        "advantages": advantages[:, None].expand(rollout.mask.shape),
        "scores": batch.scores,
        "roles": batch.roles,
        "mask": rollout.mask,
        "logprobs": batch.old_logprobs,
        "entropy": rollout.entropy,
        "blind_logprobs": batch.blind_logprobs,
        "image_similarity": rollout.image_similarity,
        "tokens": rollout.tokens,
        # [B, 1], as of_all_processes wants it
        "rewards": batch.rewards.view(-1, 1).to(rollout.mask.device),
    }
    seen = {name: values for name, values in seen.items() if values is not None}
    positions = batch.positions
    if dyco.RULES[settings.rule].over_batch:
        seen, positions = of_all_processes(world, seen, positions, rollout.group_size)
    rewards_of_rows = seen.pop("rewards").squeeze(1)
    token_advantages = dyco.reweight_advantages(  # eq. 7 and 8
        **seen,
        alpha=settings.alpha,
        rule=settings.rule,
        control=settings.control,
        generator=shuffle_generators(config, step, positions, rollout.group_size),
        group_size=rollout.group_size,
        rewards=rewards_of_rows,
    )
    place_of = {position: place for place, position in enumerate(positions)}
    places = [place_of[position] for position in batch.positions]
    mine = token_advantages.unflatten(0, (-1, rollout.group_size))[places].flatten(0, 1)
    batch.advantages = mine[:, : rollout.mask.shape[1]].to(rollout.mask.device)


def of_all_processes(
    world: World, seen: dict[str, Tensor], positions: list[int], group_size: int
) -> tuple[dict[str, Tensor], list[int]]:
    """The groups of all processes on the CPU, in the order in which the step drew them. Collective.

    seen: name -> [B, …] of this process; positions: of its groups. Returns both for all groups.
    """
    on_cpu = {name: values.cpu() for name, values in seen.items()}
    everyone = world.gather((positions, on_cpu))
    drawn = flatten([of_one for of_one, _ in everyone])
    order = sorted(range(len(drawn)), key=drawn.__getitem__)
    whole = {}
    for name in seen:
        stacked = pad_and_stack([of_one[name] for _, of_one in everyone])
        whole[name] = stacked.unflatten(0, (-1, group_size))[order].flatten(0, 1)
    return whole, [drawn[place] for place in order]


def loss_mask(config: Config, rollout: Rollout) -> Tensor:
    """[B, T] bool: the response tokens that enter the loss."""
    if config.algo.mask_truncated:
        return rollout.mask & ~rollout.truncated[:, None]
    return rollout.mask


# ---------- 6. update


def update(training: Training, batch: Batch, groups: list[int]) -> dict:
    """Stage 6: one optimizer step on some groups of the batch. Returns what to log of it."""
    config, policy, optimizer = training.config, training.policy, training.optimizer
    world, rollout = training.world, batch.rollout
    mask = batch.loss_mask[rollout.rows(groups)]
    # Of all processes, so that their losses add up to that of the whole optimizer step.
    normalizer = rl_algos.loss_normalizer(config.algo.name, mask)
    normalizer = float(world.sum(normalizer.double().cpu()))
    sums: dict[str, Tensor] = {}
    for row in packed_rows(training, rollout, groups):
        if not row:
            policy.idle().backward()
            continue
        for name, value in backward_of(training, batch, row, normalizer=normalizer).items():
            sums[name] = sums.get(name, 0) + value
    parameters = [p for p in policy.parameters() if p.requires_grad]
    norm = torch.nn.utils.clip_grad_norm_(parameters, config.optim.grad_clip)
    norm = float(distributed.whole(norm))
    values = sums_over_processes(sums, with_kl=batch.ref_logprobs is not None, world=world)
    is_finite = math.isfinite(norm) and math.isfinite(values["loss"])
    if is_finite:
        with memory_for(describe_optimizer):
            optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    if is_finite:
        return {**values, "grad_norm": norm}
    ids = [rollout.prompts[group].id for group in groups]
    return {"skipped_updates": 1.0, "skipped_prompts": flatten(world.gather(ids))}


def backward_of(
    training: Training, batch: Batch, groups: list[int], normalizer: float
) -> dict[str, Tensor]:
    """Forward and backward of one packed row. Returns sums to log."""
    config, rollout = training.config, batch.rollout
    part, rows = rollout.select(groups), rollout.rows(groups)
    width = part.mask.shape[1]
    settings = SimpleNamespace(**vars(config.algo), max_new_tokens=config.rollout.max_new_tokens)

    def cut(x: Tensor | None) -> Tensor | None:
        return None if x is None else x[rows, :width]

    with memory_for(describe_packed_row, config, rollout, groups):
        output = training.policy(part.prompts, part.tokens, part.mask)
        loss, logged = rl_algos.policy_loss(
            config.algo.name,
            output.logprobs,
            cut(batch.old_logprobs),
            advantages=cut(batch.advantages),
            mask=cut(batch.loss_mask),
            settings=settings,
            ref_logprobs=cut(batch.ref_logprobs),
            normalizer=normalizer,
        )
        loss.backward()
    entropy, tokens = output.entropy.sum(), part.mask.sum()
    return {**logged, "loss": loss.detach(), "entropy": entropy, "tokens": tokens}


def sums_over_processes(sums: dict[str, Tensor], with_kl: bool, world: World) -> dict[str, float]:
    """The figures of an update over all processes; the entropy per token.

    A figure that `policy_loss` is to log besides must be named here.
    """
    names = ["loss", "clip_fraction", "ratio_deviation", "entropy", "tokens"]
    if with_kl:
        names += ["kl", "kl_capped"]
    # A process without groups of this mini-batch adds nothing.
    mine = [float(sums[name]) if sums else 0.0 for name in names]
    totals = world.sum(torch.tensor(mine, dtype=torch.float64)).tolist()
    values = dict(zip(names, totals, strict=True))
    values["entropy"] /= max(values.pop("tokens"), 1)
    return values


def learning_rate(config: Config, updates_taken: int) -> float:
    """The learning rate of the update that follows `updates_taken` others.

    The warm-up rises linearly, and its last update has the full rate, optim.lr. The update after it
    has the full rate, too. From there optim.schedule takes the rate down to its floor, which it
    would reach one update after the last of the run: so the last one still moves the weights.
    """
    settings, warmup = config.optim, config.optim.warmup_steps
    if updates_taken < warmup:
        return settings.lr * ((updates_taken + 1) / warmup)
    if settings.schedule == "constant":
        return settings.lr
    updates_of_run = config.train.steps * config.train.updates_per_rollout
    # More than all of them have been taken where a resumed run has fewer updates per rollout.
    progress = min(1.0, (updates_taken - warmup) / max(updates_of_run - warmup, 1))
    if settings.schedule == "linear":
        height = 1 - progress
    else:
        height = (1 + math.cos(math.pi * progress)) / 2
    return settings.lr * (settings.floor + (1 - settings.floor) * height)


def set_learning_rate(config: Config, optimizer) -> float:
    """Set the learning rate of the next optimizer step, and return it."""
    state = next(iter(optimizer.state.values()), None)
    # Counts those of earlier processes of a resumed run; skipped updates are none.
    updates_taken = int(state["step"]) if state else 0
    rate = learning_rate(config, updates_taken)
    for group in optimizer.param_groups:
        group["lr"] = rate
    return rate


# ---------- the step


def train_step(training: Training, step: int) -> tuple[dict, Batch | None]:
    """One row of metrics.jsonl, and the batch that it came from.

    The batch is None if dynamic sampling left nothing to learn from.
    """
    config, world = training.config, training.world
    clock = metrics.Clock(world.device)

    # 1. rollout, 2. reward
    with distributed.gathered(training.policy):
        batch, collected = collect_useful(training, step)
    row = metrics.describe_responses(collected, world)
    clock.lap("rollout")
    has_groups = len(batch.rollout.prompts) > 0
    if not any(world.gather(has_groups)):  # no process has anything to learn from
        skipped = float(config.train.updates_per_rollout)
        return {**row, "policy/skipped_updates": skipped, **clock.seconds}, None

    # 3. logprobs
    minibatches = split(training, batch, step)
    row |= add_logprobs(training, batch, minibatches)

    # 4. advantage, 5. DyCo
    assign_advantages(config, batch, step, world)
    batch.loss_mask = loss_mask(config, batch.rollout)
    if batch.roles is not None:
        row |= metrics.describe_tokens(batch, world)
    clock.lap("logprobs")  # of stages 3 to 5

    # 6. update
    updates = []
    for groups in minibatches:
        rate = set_learning_rate(config, training.optimizer)
        updates.append(update(training, batch, groups))
    clock.lap("update")
    row |= metrics.describe_updates(updates)
    row["optim/lr"] = rate  # of the last update
    row |= clock.seconds
    tokens = sum(int(b.rollout.mask.sum()) for b in collected)
    row["time/tokens_per_second"] = sum(world.gather(tokens)) / sum(clock.seconds.values())
    row |= metrics.describe_memory(world)
    return row, batch


# ---------- running out of memory


@contextlib.contextmanager
def memory_for(describe: Callable[..., str], *arguments):
    """Running out of memory inside is a RunError; describe(*arguments) says at what."""
    try:
        yield
    except RuntimeError as error:
        if not is_out_of_memory(error):
            raise
        where = describe(*arguments)
        raise RunError(f"out of memory at {where} ({first_line(error)})") from error


def describe_sampling(config: Config, prompts: list[Prompt]) -> str:
    longest = max(prompts, key=lambda prompt: len(prompt.input_ids))
    return (
        f"sampling {config.rollout.group_size} responses to each of {len(prompts)} prompts, "
        f"the longest of {len(longest.input_ids)} tokens (id {longest.id}); lower "
        "rollout.max_cache_tokens, rollout.max_new_tokens or data.max_pixels"
    )


def describe_evaluation(samples: list) -> str:
    return (
        f"the evaluation of {len(samples)} held-out samples; lower rollout.max_cache_tokens, "
        "rollout.max_new_tokens or data.max_pixels"
    )


def describe_packed_row(config: Config, rollout: Rollout, groups: list[int]) -> str:
    tokens = int(rollout.mask[rollout.rows(groups)].sum())
    tokens += sum(len(rollout.prompts[group].input_ids) for group in groups)
    ids = ", ".join(rollout.prompts[group].id for group in groups)
    if len(groups) > 1:
        keys = f"train.micro_batch_tokens (now {config.train.micro_batch_tokens})"
    else:
        keys = (
            "rollout.group_size, rollout.max_new_tokens or data.max_pixels, "
            "or set model.gradient_checkpointing=true"
        )
    return f"a packed row of {tokens} tokens, the groups of the prompts {ids}; lower {keys}"


def describe_optimizer() -> str:
    return (
        "the optimizer step (AdamW keeps 8 bytes a trained weight from the first one on); use more "
        "processes, model.freeze_vision=true or lora.rank=16"
    )


# ---------- the run


def build(config: Config, world: World) -> Training:
    """Load everything, and find what can be wrong with it before anything long starts.

    Raises ConfigError or DataError.
    """
    custom_reward = read_custom_reward(config)
    dataset, held_out = read_data(config, world)
    try:
        path = model_folder(config, world)
        policy = policy_from_config(
            config,
            path,
            world.device,
            trainable=not config.lora.rank,
            freeze_vision=config.model.freeze_vision,
            gradient_checkpointing=config.model.gradient_checkpointing,
        )
        policy.tap(config.dyco)  # raises where dyco.layers names a layer that the model lacks
        if config.lora.rank:
            lora.add(policy, config.lora, config.train.seed)
        distributed.shard(policy, world)
        reference = None
        if config.algo.kl > 0:
            reference = reference_policy(config, policy, path, world=world)
    except ValueError as error:
        raise ConfigError(str(error)) from error
    check_prompts(config, policy, dataset)
    if held_out is not None:
        check_prompts(config, policy, held_out)
    inputs = {"data.path": dataset.fingerprint}
    if held_out is not None:
        inputs["data.eval_path"] = held_out.fingerprint
    # What goes on from here when a run is resumed, and not from its checkpoint.
    if reference is not None or config.lora.rank:
        inputs["model.path"] = evaluate.weights_of(str(path))
    if custom_reward is not None:
        file = Path(config.reward.custom.rpartition(":")[0])
        inputs["reward.custom"] = hashlib.sha256(file.read_bytes()).hexdigest()
    optimizer = torch.optim.AdamW(
        [p for p in policy.parameters() if p.requires_grad],
        lr=config.optim.lr,
        weight_decay=config.optim.weight_decay,
        fused=world.device.type == "cuda",
    )
    return Training(
        config,
        world,
        policy,
        reference=reference,
        optimizer=optimizer,
        dataset=dataset,
        sampler=Sampler(len(dataset), config.train.seed),
        held_out=held_out,
        custom_reward=custom_reward,
        inputs=inputs,
    )


def reference_policy(config: Config, policy: Policy, path: str | Path, world: World) -> Policy:
    """What the policy is held near to: the model that training begins with. Collective."""
    if config.lora.rank:
        return policy  # whose frozen weights are that model, see lora.off
    reference = policy_from_config(config, path, world.device, trainable=False)
    distributed.shard(reference, world)
    return reference


def read_custom_reward(config: Config) -> Callable | None:
    """The user's own reward, if the config names one. Raises ConfigError."""
    if not config.reward.custom:
        return None
    try:
        return rewards.load_custom(config.reward.custom)
    except ValueError as error:
        raise ConfigError(str(error)) from error


def model_folder(config: Config, world: World) -> str | Path:
    """Where the model is. The toy's warm start is made by one process, for all."""
    if config.model.path != "toy":
        return config.model.path
    distributed.on_main(world, toy.warm_start_folder, config)
    # Machines that share no disk have a cache each.
    return toy.warm_start_folder(config, progress=world.is_main)


@functools.cache
def reference_of(answer: str) -> str:
    """The reference that a row's answer holds. Raises DataError for one that nothing can match."""
    reference = rewards.read_reference(answer)
    if not rewards.is_satisfiable(reference):
        raise DataError("no response can match it, not even this text itself")
    return reference


def read_data(config: Config, world: World) -> tuple[Sequence, Sequence | None]:
    """The training set and the held-out samples. No model is needed. Raises DataError."""

    def read(path: str, root: str | None, root_key: str) -> JsonlDataset:
        return JsonlDataset(
            path,
            root,
            config.data.on_error,
            progress=world.is_main,
            root_key=root_key,
            check_answer=reference_of,
        )

    if config.data.path == "toy":
        dataset, held_out = toy.splits(config)
    else:
        dataset = read(config.data.path, config.data.image_root, "data.image_root")
        held_out = None
    if config.data.eval_path is not None:
        held_out = read(config.data.eval_path, config.data.eval_image_root, "data.eval_image_root")
    return dataset, held_out


def check_prompts(config: Config, policy: Policy, dataset: Sequence) -> None:
    """Find every prompt that is too long, or that the tokenizer cannot take. Raises DataError."""
    template, most = config.data.prompt_template, config.data.max_prompt_tokens
    if isinstance(dataset, JsonlDataset):
        check_lengths(
            dataset,
            policy.tokenizer,
            policy.image_processor,
            template=template,
            max_prompt_tokens=most,
        )
    else:  # the toy's prompts are all alike
        policy.encode(dataset[0], 0, template, max_prompt_tokens=most)


def evaluation(training: Training) -> dict[str, float]:
    """The eval/ figures of metrics.jsonl; none where there are no held-out samples. Collective."""
    config, held_out = training.config, training.held_out
    if held_out is None:
        return {}
    samples = [held_out[i] for i in range(min(config.eval.samples, len(held_out)))]
    started = time.perf_counter()
    with memory_for(describe_evaluation, samples), distributed.gathered(training.policy):
        figures = evaluate.held_out(
            training.policy,
            samples,
            config.data.prompt_template,
            max_new_tokens=config.rollout.max_new_tokens,
            seed=config.train.seed,
            max_cache_tokens=config.rollout.max_cache_tokens,
            swapped=config.eval.swapped,
            world=training.world,
        )
    row = {f"eval/{name}": value for name, value in figures.items()}
    return {**row, "time/eval": time.perf_counter() - started}


def refresh_report(training: Training, folder: RunFolder, step: int, evaluated: bool) -> None:
    """Write report.html, and after an evaluation the responses that it shows. Collective.

    A report that cannot be made stops no run, but is not missed silently.
    """
    from tools import examples, report

    policy, config = training.policy, training.config
    with distributed.gathered(policy) if evaluated else contextlib.nullcontext():
        if not training.world.is_main:
            return
        try:
            if evaluated:
                source = training.dataset if training.held_out is None else training.held_out
                samples = [source[i] for i in range(min(examples.EXAMPLES, len(source)))]
                shown = examples.make_examples(policy, samples, config)
                run_folder.save_examples(folder.path, step, shown)
            report.write(folder.path)
        except Exception as error:
            folder.say(f"warning: no report at step {step}: {type(error).__name__}: {error}")


def run(config: Config, world: World) -> None:
    """Train to train.steps, from the newest checkpoint of run.dir on."""
    check_division(config, world)
    if config.train.threads:
        torch.set_num_threads(config.train.threads)
    folder = RunFolder(config, world)
    if folder.is_finished:
        folder.say(
            f"{folder.path}: finished at step {folder.step}; nothing to do. Raise train.steps to "
            "go on, or set run.dir to a new folder"
        )
        return
    training = build(config, world)
    folder.restore(training)
    folder.begin(training)
    say_where_images_are_missing(config, training.dataset, folder)
    stop = Stop(config, folder)
    if folder.step == 0:
        folder.record({"step": 0, **evaluation(training)})
        refresh_report(training, folder, step=0, evaluated=True)
    elif misses_evaluation(training, folder):
        folder.amend(evaluation(training))
        refresh_report(training, folder, folder.step, evaluated=True)
    failures, watch = 0, run_folder.Watch(config)
    with tqdm(
        total=config.train.steps, initial=folder.step, disable=not world.is_main, desc="train"
    ) as bar:
        for step in range(folder.step + 1, config.train.steps + 1):
            is_last = step == config.train.steps
            evaluated = is_evaluated(config, step)
            stop.step = step
            with profiled(training, folder, step), save_first(training, folder, step):
                row, batch = train_step(training, step)
            if batch is not None:
                folder.record_samples(metrics.sample_rows(training, batch, step))
            row = {"step": step, **row}
            if evaluated:
                row |= evaluation_or_save(training, folder, row)
            folder.record(row)
            warn(watch.warnings(row), folder, batch)
            bar.update()
            # A step with nothing to learn from is no failure.
            failed = batch is not None and row.get("policy/skipped_updates")
            failures = failures + 1 if failed else 0
            if failures >= MAX_FAILURES:
                raise RunError(
                    f"step {step}: {failures} steps in a row had a loss or gradient that is not "
                    f"finite; those updates were left out, and the weights in "
                    f"{folder.path / 'checkpoints'} are finite; lower optim.lr"
                )
            stopping = any(world.gather(stop.asked))
            # Before the checkpoint, so that a run that is resumed there has its examples.
            if evaluated or stopping:
                refresh_report(training, folder, step, evaluated=evaluated)
            if is_last or stopping or step % config.checkpoint.every == 0:
                folder.save(training, step)
            if stopping and not is_last:
                folder.say(f"stopped at step {step}; the same command resumes it")
                return
    folder.finish(training)


def is_evaluated(config: Config, step: int) -> bool:
    """Whether an evaluation follows a step."""
    return step == config.train.steps or step % config.eval.every == 0


def misses_evaluation(training: Training, folder: RunFolder) -> bool:
    """Whether the newest checkpoint's step should have been evaluated. Collective.

    The run may have ended because that failed, or has got its held-out set only now.
    """
    due = training.held_out is not None and is_evaluated(training.config, folder.step)
    return due and not distributed.on_main(training.world, folder.has_evaluation)


def check_division(config: Config, world: World) -> None:
    """Every process has as many prompts in every mini-batch. Raises ConfigError."""
    prompts, updates = config.rollout.prompts_per_step, config.train.updates_per_rollout
    if prompts % (updates * world.size):
        raise ConfigError(
            "rollout.prompts_per_step: expected a multiple of train.updates_per_rollout × "
            f"processes ({updates} × {world.size}), found {prompts}"
        )


def say_where_images_are_missing(config: Config, dataset: Sequence, folder: RunFolder) -> None:
    """A rule that asks what an image changes has nothing to go by without one."""
    looks = {"blind_logprobs", "image_similarity"} & set(needs(config))
    if not looks or not isinstance(dataset, JsonlDataset):
        return
    without = sum(not row.images for row in dataset.rows)
    if without:
        folder.say(
            f"warning: {without} of {len(dataset)} prompts have no image, by which "
            f"dyco.rule={config.dyco.rule} weighs tokens; docs/credit.md says what it does there"
        )


class Stop:
    """SIGTERM, SIGHUP or Ctrl-C: finish the step, save, leave. A second one leaves at once."""

    def __init__(self, config: Config, folder: RunFolder):
        self.asked = False
        self.step = folder.step
        self.folder = folder
        for number in STOP_SIGNALS:
            signal.signal(number, self)

    def __call__(self, number: int, frame) -> None:
        if self.asked or distributed.another_has_failed():
            raise KeyboardInterrupt
        self.asked = True
        saved = run_folder.checkpoints(self.folder.path / "checkpoints")
        last_saved = int(saved[-1].name.removeprefix("step-")) if saved else 0
        lost = max(self.step - last_saved, 0)
        self.folder.say(
            f"finishing step {self.step}, then saving; once more to stop now, losing {lost} steps"
        )


@contextlib.contextmanager
def save_first(training: Training, folder: RunFolder, step: int):
    """A sample that cannot be read ends the run, but not before the steps so far are saved.

    Nothing was learned from this step yet, so the weights are those of the step before. With
    several processes the others would wait for this one: there the last checkpoint has to do.
    """
    drawn = training.sampler.state_dict()
    try:
        yield
    except (DataError, SampleError):
        if training.world.size == 1 and step > folder.step + 1:
            training.sampler.load_state_dict(drawn)
            folder.save(training, step - 1)
            folder.say(f"saved step {step - 1}; the same command goes on from there")
        raise


def evaluation_or_save(training: Training, folder: RunFolder, row: dict) -> dict[str, float]:
    """`evaluation`; one that fails ends the run, but not before this step is saved.

    row: of the step, without its eval/ figures. With several processes the others would wait for
    this one: there the last checkpoint has to do.
    """
    try:
        return evaluation(training)
    except (DataError, RunError):
        if training.world.size == 1:
            folder.record(row)
            folder.save(training, row["step"])
            folder.say(f"saved step {row['step']}; the same command goes on with its evaluation")
        raise


def warn(warnings: list[str], folder: RunFolder, batch: Batch | None) -> None:
    """Say what is unhealthy, with one response beside its reference."""
    for warning in warnings:
        folder.say(warning)
    if warnings and batch is not None:
        response = excerpt(batch.rollout.texts[0])
        reference = excerpt(batch.rollout.prompts[0].answer)
        folder.say(f"  a response: {response}\n  its reference: {reference}")


@contextlib.contextmanager
def profiled(training: Training, folder: RunFolder, step: int):
    """A trace of each of the first train.profile_steps steps, for ui.perfetto.dev."""
    steps_since_start = step - folder.step
    wanted = steps_since_start <= training.config.train.profile_steps
    if not wanted or not training.world.is_main:
        yield
        return
    with torch.profiler.profile() as profiler:
        yield
    profiler.export_chrome_trace(str(folder.path / f"profile-{step}.json"))


def main(arguments: Sequence[str] | None = None) -> None:
    arguments = sys.argv[1:] if arguments is None else arguments
    if {"-h", "--help"} & set(arguments):
        print(USAGE)
        return
    if not arguments:
        sys.exit(USAGE)
    handlers = {number: signal.getsignal(number) for number in STOP_SIGNALS}
    expected = (ConfigError, DataError, RunError, distributed.SharedError, OSError)
    try:
        with distributed.said_once(*expected):
            path, overrides = split_arguments(arguments)
            config = load_config(path, overrides)
            world = distributed.start()
            with contextlib.ExitStack() as stack:
                lock = run_folder.exclusive(Path(config.run.dir), "run.dir")
                distributed.on_main(world, stack.enter_context, lock)
                run(config, world)
            # Not after an error: it would wait for processes that wait for this one.
            distributed.stop()
    except expected as error:
        print(printable(f"error: {error}"), file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        print("stopped; the same command goes on from the last checkpoint", file=sys.stderr)
        sys.exit(130)
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)


if __name__ == "__main__":
    main()
