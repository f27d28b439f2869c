"""gradients.py: what `gradient` and `credit` share: batches, ways to weigh, and their gradients.

A batch is prepared once. Then each *weighting* assigns the advantages of its tokens anew, and the
gradient of the first optimizer step is taken.

Shapes: B responses, T response tokens.
"""

import math
from collections.abc import Iterable, Sequence
from dataclasses import replace
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from tqdm import tqdm

import dyco
import train
from config import Config
from data import Sample
from distributed import ALONE
from model import Policy
from rollout import Rollout
from tools.estimates import FEWEST, bootstrap, estimate_each, expanded_percentile
from tools.observed import AnalysisError, encode, prompt_of_each
from tools.toy_decisions import all_decisions

ORACLES = {"oracle": False, "oracle, blame": True}  # what `oracle_scores` is called with


# ----------------------------------------------------------------------------------- the batches


def at_first_update(config: Config) -> Config:
    """The config of a step's first update, where all ratios are 1, the reference policy is the
    policy and nothing is clipped."""
    return replace(
        config,
        algo=replace(config.algo, kl=0.0),
        optim=replace(config.optim, grad_clip=math.inf),
        dyco=replace(config.dyco, enabled=True, capture="rollout"),
    )


def training_of(config: Config, policy: Policy, samples: Sequence = ()) -> train.Training:
    """What the stages of a step work with, in one process and without an optimizer."""
    custom = train.read_custom_reward(config)
    return train.Training(config, ALONE, policy, dataset=samples, custom_reward=custom)


@torch.no_grad()
def read_off(training: train.Training, batch: train.Batch, needed: set[str]) -> None:
    """Put what the weightings need on a batch: old log-probabilities, and signals of the tokens.

    One packed forward gives all but the blind log-probabilities, which take another one. DyCo's
    signals are read as well where they were not read while decoding. needed: fields of dyco.Tokens.
    """
    policy = training.policy
    rollout = batch.rollout
    groups = list(range(len(rollout.prompts)))
    tap = policy.tap(training.config.dyco) if rollout.signals is None else None
    width = rollout.mask.shape[1]
    outputs = []
    for row in train.packed_rows(training, rollout, groups):
        part = rollout.select(row)
        output = policy(
            part.prompts,
            part.tokens,
            part.mask,
            tap=tap,
            similarity="image_similarity" in needed,
        )
        outputs.append(output)

    def whole(parts: Iterable[Tensor]) -> Tensor:
        """The rows of all parts, padded to the width of the batch."""
        padded = [F.pad(part, (0, width - part.shape[1])) for part in parts]
        return torch.cat(padded)

    batch.loss_mask = train.loss_mask(training.config, rollout)
    batch.old_logprobs = whole(output.logprobs for output in outputs)
    rollout.entropy = whole(output.entropy for output in outputs)
    if "image_similarity" in needed:
        rollout.image_similarity = whole(output.image_similarity for output in outputs)
    if tap is not None:
        fields = zip(*(output.signals for output in outputs), strict=True)
        rollout.signals = dyco.Signals(*map(whole, fields))
    if "blind_logprobs" in needed:
        batch.blind_logprobs = train.blind_logprobs(training, batch, minibatches=[groups])


def sample_batches(
    config: Config, policy: Policy, samples: Sequence, count: int, needed: set[str]
) -> list[train.Batch]:
    """The first `count` samples as batches of rollout.prompts_per_step, with rewards and what
    `read_off` gives."""
    size = config.rollout.prompts_per_step
    training = training_of(config, policy, samples)
    batches = []
    for place in tqdm(range(count // size), desc="sampling"):
        drawn = [(index, index) for index in range(place * size, (place + 1) * size)]
        batch = train.collect(training, drawn, step=0)
        read_off(training, batch, needed)
        batches.append(batch)
    return batches


def check_count(config: Config, batches: int, what: str, keys: str) -> None:
    """Raises AnalysisError where there is no batch to compare with the reference.

    what: the batches are made of; keys: of the config that would give more of them.
    """
    if batches < 2:
        raise AnalysisError(
            f"{what} make {batches} batches of "
            f"rollout.prompts_per_step={config.rollout.prompts_per_step}; "
            f"expected 2 or more ({keys})"
        )


def check_samples(config: Config, count: int) -> None:
    """`check_count` before `count` samples are sampled from."""
    batches = count // config.rollout.prompts_per_step
    check_count(config, batches, f"{count} samples", "eval.samples, toy.eval_size")


def recorded_batches(
    config: Config,
    policy: Policy,
    samples: Sequence[Sample],
    recorded: list[tuple[int, list[int], str]],
    needed: set[str],
) -> list[train.Batch]:
    """Recorded responses (as of `read_recorded`) as batches like those of `sample_batches`.

    The responses to one prompt are a group. The groups of a batch are equally large, so prompts
    with equally many responses come together, at most rollout.prompts_per_step of them. A group of
    one has no advantage and is left out. Raises AnalysisError if there are fewer than two batches.
    """
    responses_to: dict[int, list] = {}
    for place, ids, text in recorded:
        responses_to.setdefault(place, []).append((ids, text))
    places_with: dict[int, list[int]] = {}
    for place, responses in responses_to.items():
        places_with.setdefault(len(responses), []).append(place)
    alone = len(places_with.pop(1, []))
    if alone:
        print(f"{alone} prompts with a single response are left out: a group needs two or more")

    size = config.rollout.prompts_per_step
    parts = []
    for places in places_with.values():
        number = math.ceil(len(places) / size)
        parts += [places[start::number] for start in range(number)]
    prompts = sum(len(places) for places in places_with.values())
    check_count(config, len(parts), f"{prompts} recorded groups", "rollout.prompts_per_step")
    # Both halves of the batches shall hold groups of all sizes.
    parts = parts[::2] + parts[1::2]
    training = training_of(config, policy, samples)
    batches = []
    for places in tqdm(parts, desc="recorded responses"):
        groups = {place: responses_to[place] for place in places}
        rollout = recorded_rollout(config, policy, samples, groups)
        batch = train.give_rewards(training, rollout, [samples[place] for place in places])
        read_off(training, batch, needed)
        batches.append(batch)
    return batches


def recorded_rollout(
    config: Config,
    policy: Policy,
    samples: Sequence[Sample],
    groups: dict[int, list[tuple[list[int], str]]],
) -> Rollout:
    """Recorded responses as if they had been sampled, still without log-probabilities and signals.

    groups: place of the sample -> (token ids, text) of each response to it, equally many.
    """
    responses = [response for group in groups.values() for response in group]
    lengths = torch.tensor([len(ids) for ids, _ in responses])
    rows = [torch.tensor(ids) for ids, _ in responses]
    tokens = pad_sequence(rows, batch_first=True).to(policy.device)
    mask = (torch.arange(tokens.shape[1]) < lengths[:, None]).to(policy.device)
    return Rollout(
        prompts=[encode(policy, samples, place, config) for place in groups],
        group_size=len(responses) // len(groups),
        tokens=tokens,
        mask=mask,
        logprobs=torch.zeros(tokens.shape, device=policy.device),
        truncated=torch.tensor(
            [ids[-1] not in policy.eos_ids for ids, _ in responses], device=policy.device
        ),
        signals=None,
        texts=[text for _, text in responses],
    )


# -------------------------------------------------------------------------------- the weightings


class Weighting(NamedTuple):
    """A way to spread the advantages of responses over their tokens."""

    rule: str
    control: str = "none"
    ratio: str | None = None  # dyco.ratio, if it is not that of the config
    # Of each batch, [B, T]: an oracle's scores, which the rule takes instead of the attention's.
    scores: Sequence[Tensor] | None = None


HOST = Weighting("off")


def needed_by(weightings: Iterable[Weighting]) -> set[str]:
    """The fields of dyco.Tokens that some weightings need."""
    return {need for weighting in weightings for need in dyco.RULES[weighting.rule].needs}


def oracle_scores(batch: train.Batch, samples: Sequence[Sample], tokenizer, blame: bool) -> Tensor:
    """Alignment scores [B, T] that only the author of the toy can give.

    They are 1 at the tokens that decide something, 0 at the others. With `blame`, a response that
    is worse than the mean of its group has 1 only where it decides wrongly.
    """
    rollout = batch.rollout
    worse = (batch.rewards < batch.rewards.mean(1, keepdim=True)).flatten().tolist()
    places = [prompt.index for prompt in prompt_of_each(rollout)]
    scores = torch.zeros(rollout.mask.shape)
    decisions = all_decisions(
        places, rollout.tokens, rollout.mask, samples=samples, tokenizer=tokenizer
    )
    for row, token, _, is_right in decisions:
        blameless = blame and worse[row] and is_right
        scores[row, token] = 0 if blameless else 1
    return scores.to(rollout.mask.device)


def oracle_weightings(
    batches: list[train.Batch], samples: Sequence[Sample], tokenizer
) -> dict[str, Weighting]:
    """Eq. 7 and 8 with the scores of each oracle."""
    weightings = {}
    for name, blame in ORACLES.items():
        scores = [oracle_scores(batch, samples, tokenizer, blame=blame) for batch in batches]
        weightings[name] = Weighting("paper", scores=scores)
    return weightings


def assign(config: Config, batch: train.Batch, weighting: Weighting, place: int) -> Tensor:
    """Give the batch the advantages of a weighting. Returns those of its tokens, [B, T].

    place: of the batch among all. It seeds the shuffled control, and the scores of an oracle are
    given for each place.
    """
    by_oracle = weighting.scores is not None
    settings = replace(
        config.dyco,
        # The roles are assigned along with the advantages, under "off" as well.
        rule="off" if by_oracle else weighting.rule,
        control="none" if by_oracle else weighting.control,
        ratio=weighting.ratio or config.dyco.ratio,
    )
    train.assign_advantages(replace(config, dyco=settings), batch, place)
    if by_oracle:
        batch.advantages = dyco.reweight_advantages(
            batch.advantages,
            weighting.scores[place],
            batch.roles,
            mask=batch.rollout.mask,
            alpha=settings.alpha,
            rule=weighting.rule,
            control=weighting.control,
            generator=train.shuffle_generators(
                config, place, batch.positions, batch.rollout.group_size
            ),
        )
    return batch.advantages


# --------------------------------------------------------------------------------- the gradients


class Recorder:
    """Stands where train.update has its optimizer: keeps the gradient and takes no step."""

    def __init__(self, policy: Policy):
        self.parameters = [p for p in policy.parameters() if p.requires_grad]
        self.gradient: Tensor | None = None

    def step(self) -> None:
        gradients = [
            torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
            for parameter in self.parameters
        ]
        self.gradient = torch.cat([gradient.flatten() for gradient in gradients])

    def zero_grad(self, set_to_none: bool = True) -> None:
        for parameter in self.parameters:
            parameter.grad = None


def batch_gradient(
    config: Config, policy: Policy, batch: train.Batch, weighting: Weighting, place: int
) -> Tensor:
    """The gradient [parameters] of one optimizer step on the whole batch, before any clipping.

    The batch keeps the advantages of the weighting. place: as for `assign`.
    """
    assign(config, batch, weighting, place)
    recorder = Recorder(policy)
    groups = list(range(len(batch.rollout.prompts)))
    training = train.Training(config, ALONE, policy, optimizer=recorder)
    train.update(training, batch, groups)
    if recorder.gradient is None:
        raise AnalysisError(
            f"batch {place}, rule {weighting.rule}: the loss or its gradient is not finite"
        )
    return recorder.gradient


def reference_gradient(
    config: Config, policy: Policy, batches: list[train.Batch]
) -> tuple[Tensor, range]:
    """(sum of the host's gradients over the first half, places of the batches to compare with it).

    The reference is made of other batches than those that are compared with it: a batch would
    otherwise be close to a sum that it is part of.
    """
    half = len(batches) // 2
    reference = sum(
        batch_gradient(config, policy, batches[place], HOST, place=place)
        for place in tqdm(range(half), desc="reference")
    )
    return reference, range(half, len(batches))


def unit(x: Tensor) -> Tensor:
    return x / x.norm()


def degrees(a: Tensor, b: Tensor) -> Tensor:
    """The angle between two gradients, by the chord: exact where the cosine rounds to 1."""
    chord = (unit(a) - unit(b)).norm()
    return (2 * (chord / 2).asin()).rad2deg()


# ------------------------------------------------------------------------- means over the batches

NO_GRADIENT = (
    "all gradients are zero: no group with unequal rewards; take more samples (eval.samples), or "
    "more recorded responses"
)


def columns_of(rows: list[dict[str, float]]) -> dict[str, Tensor]:
    """{figure: its values over the batches} from one row per batch."""
    return {
        figure: torch.tensor([row[figure] for row in rows], dtype=torch.float64)
        for figure in rows[0]
    }


def ratio_estimates(numerators: Tensor, denominators: Tensor) -> list[list[float | None]]:
    """[estimate, low, high] of each ratio of sums over batches: [figures, batches] each.

    Less than FEWEST batches have no interval.
    """
    batches = numerators.shape[1]
    ratios, replicates = bootstrap(numerators, denominators, torch.arange(batches))
    estimates = estimate_each(ratios, replicates, expanded_percentile(max(batches, 2)))
    counts = (denominators != 0).sum(1).tolist()
    return [
        estimate if count >= FEWEST else [estimate[0], None, None]
        for estimate, count in zip(estimates, counts, strict=True)
    ]


def mean_estimates(columns: dict[str, Tensor]) -> dict[str, list[float | None]]:
    """[estimate, low, high] of the mean of each column [batches]; what is NaN is left out."""
    values = torch.stack(list(columns.values()))
    is_number = values.isfinite()
    numbers = torch.where(is_number, values, 0)
    return dict(zip(columns, ratio_estimates(numbers, is_number.double()), strict=True))
