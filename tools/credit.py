"""credit.py: which tokens each rule weighs, and what its weights do to the gradient.

    python -m tools.credit --model toy --data toy --out runs/credit [section.key=value ...]
    python -m tools.credit --model DIR --data FILE.jsonl --responses RECORDED.jsonl --out DIR
    python -m tools.credit --model toy --data toy --out runs/mine --rules mine,paper

All rules of dyco.RULES, or those of --rules, see the same batches. Each is compared with its own
*shuffled* control: the same factors on other tokens of the same response. What a rule gains over
that, it gains because it finds the tokens that matter. On the toy it is known which tokens decide
something, and which decisions are wrong, so *oracles* show how much could be gained.

Every figure is computed for each batch of the second half and averaged over these batches. The
intervals are 95 % bootstrap intervals over batches. The settings are those of `gradient`. Writes
credit.json, the table credit.md and the figure credit.svg.

Shapes: B responses, T response tokens.
"""

import math
from dataclasses import asdict
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor
from tqdm import tqdm

import dyco
import train
from config import Config, load_config
from model import Policy
from run_folder import make_folder, write_file
from tools.command import command
from tools.credit_view import credit_figure, credit_table
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
    ratio_estimates,
    recorded_batches,
    reference_gradient,
    sample_batches,
    unit,
)
from tools.observed import (
    AnalysisError,
    command_line,
    load,
    prompt_of_each,
    read_recorded,
    split_at_commas,
    write_json,
)
from tools.toy_decisions import all_decisions

BEST_ORACLE = "oracle, blame"  # whose gain is 100 %


def all_rules() -> dict[str, Weighting]:
    """Every rule but the host, and the authors' later code with its own masses."""
    rules = {}
    for name in dyco.RULES:
        if name != "off":
            rules[name] = Weighting(name)
        if name == "signed":
            rules["signed minmax"] = Weighting(name, ratio="minmax")
    return rules


def chosen_rules(names: list[str]) -> dict[str, Weighting]:
    """Raises AnalysisError for a name that `all_rules` has not."""
    rules = all_rules()
    unknown = [name for name in names if name not in rules]
    if unknown:
        raise AnalysisError(
            f"--rules: no rule {', '.join(unknown)}; expected some of {', '.join(rules)}"
        )
    return {name: rules[name] for name in names}


# ------------------------------------------------------------------------------ what a rule weighs


class Decisions(NamedTuple):
    """The tokens that decide something in toy responses, rightly or wrongly: [B, T] bool each."""

    right: Tensor
    wrong: Tensor


def mark_decisions(batch: train.Batch, samples, tokenizer) -> Decisions:
    rollout = batch.rollout
    marks = Decisions(torch.zeros_like(rollout.mask), torch.zeros_like(rollout.mask))
    places = [prompt.index for prompt in prompt_of_each(rollout)]
    decisions = all_decisions(
        places, rollout.tokens, rollout.mask, samples=samples, tokenizer=tokenizer
    )
    for row, token, _, is_right in decisions:
        outcome = marks.right if is_right else marks.wrong
        outcome[row, token] = True
    return marks


def area_under_roc(positives: Tensor, negatives: Tensor) -> float:
    """How often a positive value exceeds a negative one, over all pairs; ties count half.

    NaN where there are no pairs.

    >>> area_under_roc(torch.tensor([3., 1.]), torch.tensor([1., 0.]))
    0.875
    """
    pairs = len(positives) * len(negatives)
    if pairs == 0:
        return math.nan
    kinds, kind = torch.cat([positives, negatives]).unique(return_inverse=True)
    of_positives = kind[: len(positives)].bincount(minlength=len(kinds)).double()
    of_negatives = kind[len(positives) :].bincount(minlength=len(kinds)).double()
    below = of_negatives.cumsum(0) - of_negatives
    return float((of_positives * (below + of_negatives / 2)).sum() / pairs)


def token_factors(advantages: Tensor, host_advantages: Tensor) -> Tensor:
    """What multiplies the host's advantages, [B, T]; NaN where these are 0."""
    factors = advantages / host_advantages
    # Factors that are equal shall not differ by the rounding of the division.
    return torch.where(host_advantages != 0, factors, math.nan).round(decimals=5)


def describe_factors(
    factors: Tensor, roles: Tensor, host_advantages: Tensor, decisions: Decisions | None
) -> dict[str, float]:
    """What a rule weighs in one batch, from its factors (as of `token_factors`).

    Only tokens whose response has an advantage count. "factor" and "spread" are the factors' mean
    and standard deviation, "raised" is the share of tokens whose factor is above the mean of their
    response. "visual", "text" and "neutral" are shares of the sum of all factors.

    "deciding" is the area under the ROC curve of the factor, for tokens that decide something
    against the rest, and "wrong" that for wrong decisions against right ones, in responses whose
    advantage is negative. The tokens of all responses are pooled.
    """
    counts = host_advantages != 0
    chosen = factors[counts]
    raised = factors > factors.nanmean(1, keepdim=True) + 1e-5
    figures = {
        "factor": float(chosen.mean()),
        "spread": float(chosen.std()),
        "raised": float(raised[counts].float().mean()),
    }
    for name, role in (("visual", 1), ("text", -1), ("neutral", 0)):
        figures[name] = float(factors[counts & (roles == role)].sum() / chosen.sum())
    if decisions is not None:
        decides = decisions.right | decisions.wrong
        figures["deciding"] = area_under_roc(factors[counts & decides], factors[counts & ~decides])
        bad = host_advantages < 0
        figures["wrong"] = area_under_roc(
            factors[bad & decisions.wrong], factors[bad & decisions.right]
        )
    return figures


# --------------------------------------------------------------------------- what its gradient does


def compare_gradients(
    mine: Tensor, shuffled: Tensor, host: Tensor, reference: Tensor
) -> dict[str, float]:
    """The figures of one batch's gradient: by a rule, by its shuffled control, and by the host."""
    direction = unit(reference)
    gain = float((unit(mine) - unit(host)) @ direction)
    of_control = float((unit(shuffled) - unit(host)) @ direction)
    return {
        "angle": float(degrees(mine, host)),
        "reference": float(unit(mine) @ direction),
        "gain": gain,
        "control's gain": of_control,
        "over shuffled": gain - of_control,
    }


def compare_batch(
    config: Config,
    policy: Policy,
    batch: train.Batch,
    weightings: dict[str, Weighting],
    reference: Tensor,
    decisions: Decisions | None,
    place: int,
) -> dict[str, dict[str, float]]:
    """{"off" or weighting: its figures} of one batch; empty where the host's gradient is zero."""

    def gradient(weighting: Weighting) -> Tensor:
        return batch_gradient(config, policy, batch, weighting, place=place)

    host = gradient(HOST)
    host_advantages = batch.advantages
    if not host.any():
        return {}
    rows = {}
    for name, weighting in {"off": HOST, **weightings}.items():
        is_host = name == "off"
        shuffled = host if is_host else gradient(weighting._replace(control="shuffled"))
        # The rule comes last, since the batch keeps the advantages, which tell the factors.
        mine = gradient(weighting)
        factors = token_factors(batch.advantages, host_advantages)
        rows[name] = {
            **describe_factors(factors, batch.roles, host_advantages, decisions=decisions),
            **compare_gradients(mine, shuffled, host, reference=reference),
        }
    return rows


def describe_credit(
    config: Config,
    policy: Policy,
    batches: list[train.Batch],
    weightings: dict[str, Weighting],
    decisions: list[Decisions] | None = None,
) -> tuple[dict[str, dict], int]:
    """{"off" or weighting: {figure: [estimate, low, high]}} over the second half of the batches,
    and how many of these have a gradient.

    Besides the figures of `describe_factors` there are "angle", in degrees between the gradient and
    the host's; "reference", the cosine with the sum of the host's gradients over the first half of
    the batches; "gain", how much larger this cosine is than the host's; "control's gain", that of
    the rule's shuffled control; and "over shuffled", the difference of the last two. With oracles,
    "share" is the part that "over shuffled" is of the best oracle's, if that is surely above 0.

    decisions: of each batch. Raises AnalysisError if all gradients are zero.
    """
    reference, places = reference_gradient(config, policy, batches)
    if not reference.any():
        raise AnalysisError(NO_GRADIENT)
    rows: dict[str, list[dict]] = {}
    for place in tqdm(places, desc="gradients"):
        compared = compare_batch(
            config,
            policy,
            batches[place],
            weightings=weightings,
            reference=reference,
            decisions=decisions[place] if decisions else None,
            place=place,
        )
        for name, row in compared.items():
            rows.setdefault(name, []).append(row)
    if not rows:
        raise AnalysisError(NO_GRADIENT)
    columns = {name: columns_of(of_batches) for name, of_batches in rows.items()}
    described = {name: mean_estimates(figures) for name, figures in columns.items()}
    if BEST_ORACLE in columns:
        whole = columns[BEST_ORACLE]["over shuffled"]
        parts = torch.stack([figures["over shuffled"] for figures in columns.values()])
        shares = ratio_estimates(parts, whole.expand_as(parts))
        low = described[BEST_ORACLE]["over shuffled"][1]
        for name, share in zip(columns, shares, strict=True):
            # A share of what may be nothing is no number.
            is_known = low is not None and low > 0
            described[name]["share"] = share if is_known else [None, None, None]
    return described, len(rows["off"])


# ------------------------------------------------------------------------------------ the command


def prepare_batches(
    options, config: Config, weightings: dict[str, Weighting]
) -> tuple[Policy, list, list[train.Batch]]:
    """(policy, samples, batches) that the options ask for; the folder for the results is made."""
    policy, samples, ids, count = load(options, config, trainable=True)
    needed = needed_by(weightings.values())
    out = Path(options.out)
    if options.responses is None:
        check_samples(config, count)
        make_folder(out, "--out")
        batches = sample_batches(config, policy, samples, count=count, needed=needed)
    else:
        recorded = read_recorded(Path(options.responses), ids, policy)
        make_folder(out, "--out")
        batches = recorded_batches(config, policy, samples, recorded=recorded, needed=needed)
    return policy, samples, batches


def run_credit(options) -> None:
    config = at_first_update(load_config(options.config, options.overrides))
    weightings = chosen_rules(options.rules)
    policy, samples, batches = prepare_batches(options, config, weightings)
    decisions = None
    if options.data == "toy":
        weightings |= oracle_weightings(batches, samples, policy.tokenizer)
        decisions = [mark_decisions(batch, samples, policy.tokenizer) for batch in batches]
    rules, compared = describe_credit(config, policy, batches, weightings, decisions=decisions)
    content = {
        "model": options.model,
        "data": options.data,
        "level": config.toy.level if options.data == "toy" else None,
        "responses": options.responses,
        "algo": config.algo.name,
        "dyco": asdict(config.dyco),
        "batches": len(batches),
        "compared": compared,
        "prompts": sum(len(batch.rollout.prompts) for batch in batches),
        "group_sizes": sorted({batch.rollout.group_size for batch in batches}),
        "rules": rules,
    }
    out = Path(options.out)
    table = credit_table(content)
    print(table)
    write_json(out / "credit.json", content)
    write_file(out / "credit.md", table.encode())
    write_file(out / "credit.svg", credit_figure(rules).encode())
    print(f"wrote {out / 'credit.json'}, credit.md and credit.svg")


@command(ValueError, OSError, train.RunError)
def main(arguments: list[str] | None = None) -> None:
    parser = command_line("credit", "Which tokens each rule weighs, and what that does.")
    parser.add_argument(
        "--responses",
        help="JSONL of responses to look at instead of sampling: id and response in each row",
    )
    parser.add_argument(
        "--rules",
        type=split_at_commas,
        default=list(all_rules()),
        help="of dyco.RULES, or 'signed minmax', separated by commas; all by default",
    )
    run_credit(parser.parse_args(arguments))


if __name__ == "__main__":
    main()
