"""gradient.py: how far the rules of DyCo turn the gradient of a batch, and in which direction.

    python -m tools.gradient --model toy --data toy --out runs/analysis [section.key=value ...]

Batches are sampled once; then each rule assigns the advantages, and the gradient of the first
optimizer step is compared with the host's. On the toy the scores of *oracles*, which know what
every token decides, go through eq. 7 and 8 as well. Besides the shared settings algo.* and reward.*
are read. Writes gradient.json.

Intervals are 95 % bootstrap intervals over batches.

Shapes: B responses, T response tokens.
"""

import math
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path

import torch
from torch import Tensor
from tqdm import tqdm

import dyco
import rewards
import train
from config import Config, load_config
from data import Sample
from distributed import ALONE
from model import Policy
from tools.charts import interval
from tools.command import command
from tools.estimates import bootstrap, estimate_each, expanded_percentile
from tools.observed import (
    AnalysisError,
    command_line,
    load,
    prompt_of_each,
    write_json,
)
from tools.toy_decisions import all_decisions

# The two presets, each followed by what it must be compared with, and the response-level idea.
DEFAULT_RULES = [
    *("paper", *dyco.RULES["paper"].controls),
    *("signed", *dyco.RULES["signed"].controls),
    "response",
]
ORACLES = {"oracle": False, "oracle, blame": True}  # what `oracle_scores` is called with


# ------------------------------------------------------------------------------- single gradients


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


def batch_gradient(
    config: Config,
    policy: Policy,
    batch: train.Batch,
    rule: str,
    step: int,
    scores: Tensor | None = None,
) -> Tensor:
    """The gradient [parameters] of one optimizer step on the whole batch, before any clipping.

    Advantages are assigned by `rule`, or, where scores [B, T] are given, by eq. 7 and 8 with these.
    """
    # The roles are assigned along with the advantages, under "off" as well.
    assigned_by = rule if scores is None else "off"
    config = replace(config, dyco=replace(config.dyco, rule=assigned_by))
    train.assign_advantages(config, batch, step)
    if scores is not None:
        batch.advantages = dyco.reweight_advantages(
            batch.advantages,
            scores,
            batch.roles,
            mask=batch.rollout.mask,
            alpha=config.dyco.alpha,
        )
    recorder = Recorder(policy)
    groups = list(range(len(batch.rollout.prompts)))
    training = train.Training(config, ALONE, policy, optimizer=recorder)
    train.update(training, batch, groups)
    if recorder.gradient is None:
        raise AnalysisError(f"batch {step}, rule {rule}: the loss or its gradient is not finite")
    return recorder.gradient


# ------------------------------------------------------------------------------------ comparisons


def unit(x: Tensor) -> Tensor:
    return x / x.norm()


def degrees(a: Tensor, b: Tensor) -> Tensor:
    """The angle between two gradients, by the chord: exact where the cosine rounds to 1."""
    chord = (unit(a) - unit(b)).norm()
    return (2 * (chord / 2).asin()).rad2deg()


def compare(mine: Tensor, host: Tensor, reference: Tensor, factors: Tensor) -> dict[str, float]:
    """The figures of `describe_gradients` that a single batch has.

    factors: what the host's advantages were multiplied by, of the tokens where they are not 0.
    """
    direction = unit(reference)
    return {
        "factor": float(factors.mean()),
        "spread": float(factors.std()),
        "length": float(mine.norm() / host.norm()),
        "angle": float(degrees(mine, host)),
        "reference": float(unit(mine) @ direction),
        "gain": float((unit(mine) - unit(host)) @ direction),
    }


def compare_batches(
    config: Config,
    policy: Policy,
    batches: list[train.Batch],
    rules: list[str],
    oracles: dict[str, list[Tensor]],
) -> tuple[dict[str, list[dict]], dict[str, Tensor]]:
    """For the host, each rule and each oracle: `compare` of each batch of the second half, and the
    sum of its gradients. Batches whose gradient is zero are left out."""

    def gradient(place: int, rule: str) -> Tensor:
        scores = oracles[rule][place] if rule in oracles else None
        return batch_gradient(config, policy, batches[place], rule=rule, step=place, scores=scores)

    # The reference is made of other batches than those that are compared with it: a batch would
    # otherwise be close to a sum that it is part of.
    half = len(batches) // 2
    reference = sum(gradient(place, "off") for place in tqdm(range(half), desc="reference"))
    names = ["off", *rules, *oracles]
    compared: dict[str, list[dict]] = {name: [] for name in names}
    sums: dict[str, Tensor] = {}
    for place in tqdm(range(half, len(batches)), desc="gradients"):
        host = gradient(place, "off")
        if not host.any() or not reference.any():
            continue  # a direction is what a zero gradient lacks
        host_advantages = batches[place].advantages
        for name in names:
            # Computing a gradient assigns the batch's advantages, which the factors are read from.
            mine = host if name == "off" else gradient(place, name)
            factors = batches[place].advantages / host_advantages
            factors = factors[host_advantages != 0]
            compared[name].append(compare(mine, host, reference, factors))
            sums[name] = sums.get(name, 0) + mine.cpu()
    return compared, sums


def describe_gradients(
    config: Config,
    policy: Policy,
    batches: list[train.Batch],
    rules: list[str],
    oracles: dict[str, list[Tensor]] | None = None,
) -> dict[str, dict]:
    """{rule or oracle: {figure: [estimate, low, high]}} over the second half of the batches.

    "factor" and "spread" are the mean and the standard deviation over tokens of what advantages
    are multiplied by. "length" is the gradient's length over that of the host's on the same batch,
    "angle" the angle between the two in degrees. "summed" is the angle between the sums over all
    these batches, where the noise of single ones cancels; it has no interval. "reference" is the
    cosine with the sum of the host's gradients on the first half of the batches, which stands for
    the direction that one batch is a noisy sample of. "gain" is how much larger this cosine is than
    the host's own, and "over NAME" how much larger it is than that of the control NAME.

    The intervals hold for that reference; those of few batches are as long as Student's.

    oracles: name -> scores [B, T] of each batch. Raises AnalysisError if all gradients are zero.
    """
    oracles = oracles or {}
    compared, sums = compare_batches(config, policy, batches, rules=rules, oracles=oracles)
    if not compared["off"]:
        raise AnalysisError(
            "all gradients are zero: no group with unequal rewards; "
            "take more samples (eval.samples)"
        )
    figures = {name: _columns(rows) for name, rows in compared.items()}
    described = {}
    for name, columns in figures.items():
        controls = dyco.RULES[name].controls if name in dyco.RULES else ()
        over_controls = {
            f"over {control}": columns["gain"] - figures[control]["gain"]
            for control in controls
            if control in figures
        }
        described[name] = _mean_estimates({**columns, **over_controls})
        summed = round(float(degrees(sums[name], sums["off"])), 5)
        described[name]["summed"] = [summed, None, None]
    return described


def _columns(rows: list[dict[str, float]]) -> dict[str, Tensor]:
    """{figure: its values over the batches} from one row per batch."""
    return {
        figure: torch.tensor([row[figure] for row in rows], dtype=torch.float64)
        for figure in rows[0]
    }


def _mean_estimates(columns: dict[str, Tensor]) -> dict[str, list[float | None]]:
    """[estimate, low, high] of the mean of each column [batches]."""
    values = torch.stack(list(columns.values()))
    batches = values.shape[1]
    low = expanded_percentile(batches) if batches > 1 else 0.025
    means, replicates = bootstrap(values, torch.ones_like(values), torch.arange(batches))
    return dict(zip(columns, estimate_each(means, replicates, low), strict=True))


def gradients_text(described: dict[str, dict]) -> str:
    """`describe_gradients` as lines for the terminal."""
    columns = {
        "factor": ("factor", 1),
        "spread": ("its spread", 1),
        "length": ("length / host's", 1),
        "angle": ("angle to host's, degrees", 1),
        "summed": ("of the sums", 1),
        "reference": ("100 · cosine, reference", 100),
        "gain": ("minus the host's", 100),
    }

    def line(label: str, cells: list[str]) -> str:
        return (f"{label:<16}" + "".join(f"{cell:<29}" for cell in cells)).rstrip()

    lines = [line("rule", [head for head, _ in columns.values()])]
    for name, row in described.items():
        cells = [interval(row[figure], factor) for figure, (_, factor) in columns.items()]
        lines.append(line(name, cells))
    for name, row in described.items():
        for figure in row:
            if figure.startswith("over "):
                lines.append(f"100 · cosine, {name} {figure}: {interval(row[figure], 100)}")
    return "\n".join(lines)


# ------------------------------------------------------------------------------------ the command


def at_first_update(config: Config) -> Config:
    """The config of a step's first update, where all ratios are 1, the reference policy is the
    policy and nothing is clipped."""
    return replace(
        config,
        algo=replace(config.algo, kl=0.0),
        optim=replace(config.optim, grad_clip=math.inf),
        dyco=replace(config.dyco, enabled=True, capture="rollout"),
    )


def sample_batches(
    config: Config, policy: Policy, samples: Sequence, count: int
) -> list[train.Batch]:
    """The first `count` samples as batches of rollout.prompts_per_step, with rewards and old
    log-probabilities."""
    size = config.rollout.prompts_per_step
    custom = rewards.load_custom(config.reward.custom) if config.reward.custom else None
    training = train.Training(config, ALONE, policy, dataset=samples, custom_reward=custom)
    batches = []
    for place in tqdm(range(count // size), desc="sampling"):
        drawn = [(index, index) for index in range(place * size, (place + 1) * size)]
        batch = train.collect(training, drawn, step=0)
        batch.loss_mask = train.loss_mask(config, batch.rollout)
        groups = list(range(size))
        batch.old_logprobs, _ = train.compute_logprobs(training, policy, batch.rollout, [groups])
        batches.append(batch)
    return batches


def run_gradient(options) -> None:
    config = load_config(options.config, options.overrides)
    unknown = [rule for rule in options.rules if rule not in dyco.RULES]
    if unknown:
        raise AnalysisError(
            f"--rules: no rule {', '.join(unknown)}; expected some of {', '.join(dyco.RULES)}"
        )
    config = at_first_update(config)
    policy, samples, _, count = load(options, config, trainable=True)
    size = config.rollout.prompts_per_step
    if count < 2 * size:
        raise AnalysisError(
            f"{count} samples make {count // size} batches of rollout.prompts_per_step={size}; "
            "expected 2 or more (eval.samples, toy.eval_size)"
        )
    out = Path(options.out)
    out.mkdir(parents=True, exist_ok=True)
    batches = sample_batches(config, policy, samples, count)
    oracles = {}
    if options.data == "toy":
        for name, blame in ORACLES.items():
            oracles[name] = [
                oracle_scores(batch, samples, policy.tokenizer, blame=blame) for batch in batches
            ]
    rules = [rule for rule in dict.fromkeys(options.rules) if rule != "off"]
    described = describe_gradients(config, policy, batches, rules=rules, oracles=oracles)
    content = {
        "model": options.model,
        "data": options.data,
        "algo": config.algo.name,
        "dyco": asdict(config.dyco),
        "batches": len(batches),
        "prompts_per_batch": size,
        "rules": described,
    }
    write_json(out / "gradient.json", content)
    print(gradients_text(described))
    print(f"wrote {out / 'gradient.json'}")


def split_at_commas(text: str) -> list[str]:
    return text.split(",")


@command(ValueError, OSError, train.RunError)
def main(arguments: list[str] | None = None) -> None:
    parser = command_line(
        "gradient",
        "How far the rules of DyCo turn the gradient of a batch, and in which direction.",
    )
    parser.add_argument(
        "--rules",
        type=split_at_commas,
        default=DEFAULT_RULES,
        help="of dyco.RULES, separated by commas",
    )
    run_gradient(parser.parse_args(arguments))


if __name__ == "__main__":
    main()
