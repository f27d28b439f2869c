"""gradient.py: how far the rules of DyCo turn the gradient of a batch, and in which direction.

    python -m tools.gradient --model toy --data toy --out runs/analysis [section.key=value ...]

Batches are sampled once; then each rule assigns the advantages, and the gradient of the first
optimizer step is compared with the host's. On the toy the scores of *oracles*, which know what
every token decides, go through eq. 7 and 8 as well. Besides the shared settings algo.* and reward.*
are read. Writes gradient.json. A rule with a control is RULE/CONTROL, such as paper/shuffled.

`credit` asks the same of all rules at once, and what they weigh.

Intervals are 95 % bootstrap intervals over batches; fewer than four batches have none.
"""

from dataclasses import asdict
from pathlib import Path

from torch import Tensor
from tqdm import tqdm

import dyco
import train
from config import Config, load_config
from model import Policy
from run_folder import make_folder
from tools.charts import interval
from tools.command import command
from tools.gradients import (
    HOST,
    NO_GRADIENT,
    Weighting,
    at_first_update,
    batch_gradient,
    check_samples,
    columns_of,
    degrees,
    mean_estimates,
    needed_by,
    oracle_weightings,
    reference_gradient,
    sample_batches,
    unit,
)
from tools.observed import AnalysisError, command_line, load, split_at_commas, write_json

# The two presets, each followed by what it must be compared with, and the response-level idea.
DEFAULT_RULES = [
    *("paper", "paper/uniform", "paper/shuffled"),
    *("signed", "signed/uniform", "signed/shuffled"),
    "response",
]


def weighting_of(name: str) -> Weighting:
    """The weighting that RULE or RULE/CONTROL names. Raises AnalysisError."""
    if name in dyco.FORMER_NAMES:
        new_name = "/".join(dyco.FORMER_NAMES[name])
        raise AnalysisError(f"--rules: {name} is called {new_name} now")
    rule, _, control = name.partition("/")
    if rule not in dyco.RULES:
        raise AnalysisError(
            f"--rules: no rule {rule}; expected some of {', '.join(dyco.RULES)}, each alone or "
            "followed by /CONTROL"
        )
    if control not in ("", *dyco.CONTROLS):
        raise AnalysisError(
            f"--rules: {name}: no control {control}; expected one of {', '.join(dyco.CONTROLS)}"
        )
    return Weighting(rule, control or "none")


# ------------------------------------------------------------------------------------ comparisons


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
    weightings: dict[str, Weighting],
) -> tuple[dict[str, list[dict]], dict[str, Tensor]]:
    """For the host and each weighting: `compare` of each batch of the second half, and the sum of
    its gradients. Batches whose gradient is zero are left out."""
    reference, places = reference_gradient(config, policy, batches)
    weightings = {"off": HOST, **weightings}
    compared: dict[str, list[dict]] = {name: [] for name in weightings}
    sums: dict[str, Tensor] = {}
    for place in tqdm(places, desc="gradients"):
        batch = batches[place]
        host = batch_gradient(config, policy, batch, HOST, place=place)
        if not host.any() or not reference.any():
            continue  # a direction is what a zero gradient lacks
        host_advantages = batch.advantages
        for name, weighting in weightings.items():
            # Computing a gradient assigns the batch's advantages, which the factors are read from.
            mine = host
            if name != "off":
                mine = batch_gradient(config, policy, batch, weighting, place=place)
            factors = batch.advantages / host_advantages
            factors = factors[host_advantages != 0]
            compared[name].append(compare(mine, host, reference, factors))
            sums[name] = sums.get(name, 0) + mine.cpu()
    return compared, sums


def describe_gradients(
    config: Config,
    policy: Policy,
    batches: list[train.Batch],
    weightings: dict[str, Weighting],
) -> dict[str, dict]:
    """{"off" or weighting: {figure: [estimate, low, high]}} over the second half of the batches.

    "factor" and "spread" are the mean and the standard deviation over tokens of what advantages
    are multiplied by. "length" is the gradient's length over that of the host's on the same batch,
    "angle" the angle between the two in degrees. "summed" is the angle between the sums over all
    these batches, where the noise of single ones cancels; it has no interval. "reference" is the
    cosine with the sum of the host's gradients on the first half of the batches, which stands for
    the direction that one batch is a noisy sample of. "gain" is how much larger this cosine is than
    the host's own, and "over RULE/CONTROL" how much larger it is than that of this control, which
    is one of the rule's own.

    The intervals hold for that reference; those of few batches are as long as Student's.

    Raises AnalysisError if all gradients are zero.
    """
    compared, sums = compare_batches(config, policy, batches, weightings)
    if not compared["off"]:
        raise AnalysisError(NO_GRADIENT)
    figures = {name: columns_of(rows) for name, rows in compared.items()}
    described = {}
    for name, columns in figures.items():
        over_controls = {
            f"over {other}": columns["gain"] - figures[other]["gain"]
            for other in figures
            if other in [f"{name}/{control}" for control in dyco.CONTROLS]
        }
        described[name] = mean_estimates({**columns, **over_controls})
        summed = round(float(degrees(sums[name], sums["off"])), 5)
        described[name]["summed"] = [summed, None, None]
    return described


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


def run_gradient(options) -> None:
    config = load_config(options.config, options.overrides)
    weightings = {name: weighting_of(name) for name in options.rules if name != "off"}
    config = at_first_update(config)
    policy, samples, _, count = load(options, config, trainable=True)
    check_samples(config, count)
    out = Path(options.out)
    make_folder(out, "--out")
    needed = needed_by(weightings.values())
    batches = sample_batches(config, policy, samples, count=count, needed=needed)
    if options.data == "toy":
        weightings |= oracle_weightings(batches, samples, policy.tokenizer)
    content = {
        "model": options.model,
        "data": options.data,
        "algo": config.algo.name,
        "dyco": asdict(config.dyco),
        "batches": len(batches),
        "prompts_per_batch": config.rollout.prompts_per_step,
        "rules": describe_gradients(config, policy, batches, weightings),
    }
    write_json(out / "gradient.json", content)
    print(gradients_text(content["rules"]))
    print(f"wrote {out / 'gradient.json'}")


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
        help="RULE or RULE/CONTROL of dyco.RULES and dyco.CONTROLS, separated by commas",
    )
    run_gradient(parser.parse_args(arguments))


if __name__ == "__main__":
    main()
