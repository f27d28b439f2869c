"""roles.py: how the tokens of right responses differ from those of wrong ones.

    python -m tools.roles --model toy --data toy --out runs/analysis [section.key=value ...]
    python -m tools.roles --model DIR --data FILE.jsonl --responses RECORDED.jsonl --out DIR

This is the paper's observation: roles, alignment and shifts are compared. On the toy, where it is
known which tokens look and which read, it also describes those, right and wrong. Writes roles.json,
which tools/report.py reads, and responses.jsonl where responses were sampled.

Intervals are 95 % bootstrap intervals over prompts, since the responses to one prompt are not
independent. Right and wrong are compared within prompts.

Shapes: B responses, T response tokens.
"""

import math
from collections import Counter
from dataclasses import asdict
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from config import load_config
from rollout import Rollout
from rows import append_jsonl
from run_folder import make_folder
from tools.charts import interval
from tools.command import command
from tools.estimates import bootstrap, estimate_each, within_prompts
from tools.observed import (
    ROLES,
    AnalysisError,
    Observed,
    command_line,
    load,
    prompt_of_each,
    read_recorded,
    read_responses,
    sample_responses,
    write_json,
)
from tools.toy_decisions import decisions_text, describe_decisions

SHIFT_BINS = 32  # of the histograms over 0 … π


# ------------------------------------------------------------------------------------ statistics


def _count(marked: Tensor) -> Tensor:
    return marked.sum(1).double()


def _mean_over(values: Tensor, marked: Tensor) -> tuple[Tensor, Tensor]:
    """Numerator and denominator, [B] each, of the mean of values over marked tokens [B, T]."""
    return torch.where(marked, values, 0).double().sum(1), _count(marked)


def role_switches(roles: Tensor) -> Tensor:
    """[B, T] bool: tokens that have a role, and another one than the last token before them with a
    role."""
    has_role = roles != 0
    # Places count from 1, so that 0 can say: no token so far has a role.
    place = torch.arange(1, roles.shape[1] + 1)
    last_place = torch.where(has_role, place, 0).cummax(1).values
    before = F.pad(last_place, (1, 0))[:, :-1]
    previous = torch.where(before > 0, roles.gather(1, (before - 1).clamp(min=0)), 0)
    return has_role & (previous != 0) & (previous != roles)


def statistics(seen: Observed) -> dict[str, tuple[Tensor, Tensor]]:
    """{name: (numerator, denominator)}, [B] each.

    Summed over responses they give means over tokens, or shares of tokens.
    """
    mask = seen.mask
    roles = seen.roles
    signals = seen.signals
    visual = roles > 0
    text = roles < 0
    has_role = roles != 0
    not_first = mask.clone()
    not_first[:, 0] = False  # the first token has no shift
    tokens = _count(mask)
    table = {
        "visual tokens, %": (100 * _count(visual), tokens),
        "text tokens, %": (100 * _count(text), tokens),
        "neutral tokens, %": (100 * _count(mask & ~has_role), tokens),
        "alignment of visual tokens": _mean_over(seen.scores, visual),
        "alignment of text tokens": _mean_over(seen.scores, text),
        "alignment of both": _mean_over(seen.scores, has_role),
        "image mass at visual tokens": _mean_over(signals.visual_mass, visual),
        "text mass at text tokens": _mean_over(signals.text_mass, text),
        "image mass": _mean_over(signals.visual_mass, mask),
        "text mass": _mean_over(signals.text_mass, mask),
        "visual shift, radians": _mean_over(signals.visual_shift, not_first),
        "text shift, radians": _mean_over(signals.text_shift, not_first),
        "role switches per 100 tokens": (100 * _count(role_switches(roles)), tokens),
        "tokens per response": (tokens, torch.ones_like(tokens)),
    }
    # Where in a response alignment is high or low: responses of all lengths are cut into tenths.
    lengths = mask.sum(1, keepdim=True).clamp(min=1)
    tenth = (torch.arange(mask.shape[1]) * 10 // lengths).clamp(max=9)
    for part in range(10):
        name = f"alignment at {10 * part}–{10 * part + 10} % of the response"
        table[name] = _mean_over(seen.scores, has_role & (tenth == part))
    return table


def shift_distribution(values: Tensor) -> dict:
    """Histogram over 0 … π and quantiles of the shifts of some tokens."""
    quantiles = [None, None, None]
    if values.numel():
        quantiles = np.quantile(values.numpy(), [0.1, 0.5, 0.9]).tolist()
        quantiles = [round(quantile, 4) for quantile in quantiles]
    return {
        "counts": torch.histc(values, SHIFT_BINS, 0, math.pi).int().tolist(),
        "quantiles": dict(zip(("10", "50", "90"), quantiles, strict=True)),
    }


def shift_distributions(seen: Observed) -> dict[str, dict[str, dict]]:
    """{shift: {outcome: its distribution}}; first tokens, which have no shift, are left out."""
    table: dict[str, dict[str, dict]] = {}
    for name in ("visual_shift", "text_shift"):
        shifts = getattr(seen.signals, name)[:, 1:]
        table[name] = {}
        for outcome, chosen in (("correct", seen.correct), ("incorrect", ~seen.correct)):
            marked = (seen.mask & chosen[:, None])[:, 1:]
            table[name][outcome] = shift_distribution(shifts[marked])
    return table


def token_strings(seen: Observed, tokenizer, shown: int = 10) -> dict[str, list[dict]]:
    """For each role the strings whose tokens have it most often; rare tokens are left out."""
    occurrences = Counter(seen.tokens[seen.mask].tolist())
    enough = max(10, occurrences.total() // 1000)
    table: dict[str, list[dict]] = {}
    for name, role in ROLES.items():
        with_role = Counter(seen.tokens[seen.mask & (seen.roles == role)].tolist())
        ranked = sorted(
            (-count / occurrences[token], -occurrences[token], token)
            for token, count in with_role.items()
            if occurrences[token] >= enough
        )
        table[name] = [
            {
                "token": tokenizer.decode(token),
                "occurrences": occurrences[token],
                "share": round(with_role[token] / occurrences[token], 4),
            }
            for _, _, token in ranked[:shown]
        ]
    return table


def describe_roles(seen: Observed, tokenizer) -> dict:
    """What roles.json holds: [estimate, low, high] of each statistic for right and for wrong
    responses, and of their difference within prompts."""
    pairs = statistics(seen)
    numerators, denominators = (torch.stack(part) for part in zip(*pairs.values(), strict=True))
    # Times `correct`, the wrong responses add nothing to either sum, and the other way round.
    right = (numerators * seen.correct, denominators * seen.correct)
    wrong = (numerators * ~seen.correct, denominators * ~seen.correct)
    columns = {
        "correct": estimate_each(*bootstrap(*right, seen.prompt)),
        "incorrect": estimate_each(*bootstrap(*wrong, seen.prompt)),
        "difference": estimate_each(*within_prompts(right, wrong, seen.prompt)),
    }

    def count(chosen: Tensor) -> dict[str, int]:
        return {"responses": int(chosen.sum()), "prompts": len(seen.prompt[chosen].unique())}

    return {
        "counts": {"correct": count(seen.correct), "incorrect": count(~seen.correct)},
        "statistics": {
            name: {column: estimates[i] for column, estimates in columns.items()}
            for i, name in enumerate(pairs)
        },
        "shifts": shift_distributions(seen),
        "strings": token_strings(seen, tokenizer),
    }


# ------------------------------------------------------------------------------- for the terminal


def _line(label: str, cells: list[str]) -> str:
    return (f"{label:<42}" + "".join(f"{cell:<26}" for cell in cells)).rstrip()


def roles_text(described: dict) -> str:
    """What roles.json holds, as lines for the terminal."""
    outcomes = ("correct", "incorrect")
    counts = described["counts"]
    heads = [f"{outcome} ({counts[outcome]['responses']})" for outcome in outcomes]
    lines = [_line("", [*heads, "within prompts"])]
    for name, row in described["statistics"].items():
        cells = [interval(row[column]) for column in (*outcomes, "difference")]
        lines.append(_line(name, cells))
    for name, by_outcome in described["shifts"].items():
        cells = [_quantiles_text(by_outcome[outcome]["quantiles"]) for outcome in outcomes]
        lines.append(_line(f"{name.replace('_', ' ')}, quantiles 10/50/90 %", cells))
    for name, strings in described["strings"].items():
        shares = [
            f"{row['token']!r} {100 * row['share']:.0f} % of {row['occurrences']}"
            for row in strings
        ]
        lines.append(f"most often {name}: {', '.join(shares)}".rstrip())
    if "decisions" in described:
        lines += ["", decisions_text(described["decisions"])]
    return "\n".join(lines)


def _quantiles_text(quantiles: dict[str, float | None]) -> str:
    return " / ".join("–" if value is None else f"{value:.2f}" for value in quantiles.values())


# ------------------------------------------------------------------------------------ the command


def run_roles(options) -> None:
    config = load_config(options.config, options.overrides)
    out = Path(options.out)
    sampled = out / "responses.jsonl"
    if options.responses is None and sampled.exists():
        raise AnalysisError(
            f"{sampled} holds responses that were sampled before; analyse them with "
            f"--responses {sampled}, or choose another --out"
        )
    policy, samples, ids, count = load(options, config)

    def keep(rollout: Rollout) -> None:
        """Write responses down as they come: what was sampled is never lost."""
        rows = [
            {"id": prompt.id, "response": text, "token_ids": tokens[mask].tolist()}
            for prompt, text, tokens, mask in zip(
                prompt_of_each(rollout), rollout.texts, rollout.tokens, rollout.mask, strict=True
            )
        ]
        append_jsonl(sampled, rows)

    if options.responses is None:
        make_folder(out, "--out")
        seen = sample_responses(policy, samples, count, config=config, what="sampling", each=keep)
    else:
        recorded = read_recorded(Path(options.responses), ids, policy)
        make_folder(out, "--out")
        seen = read_responses(policy, samples, recorded, config)
    described = {
        "model": options.model,
        "data": options.data,
        "responses": options.responses,
        "dyco": asdict(config.dyco),
        **describe_roles(seen, policy.tokenizer),
    }
    if options.data == "toy":
        described["decisions"] = describe_decisions(seen, samples, policy.tokenizer)
    write_json(out / "roles.json", described)
    print(roles_text(described))
    print(f"wrote {out / 'roles.json'}")


@command(ValueError, OSError)
def main(arguments: list[str] | None = None) -> None:
    parser = command_line("roles", "Compare the tokens of right and wrong responses.")
    parser.add_argument(
        "--responses",
        help="JSONL of responses to analyse instead of sampling: id and response in each row",
    )
    run_roles(parser.parse_args(arguments))


if __name__ == "__main__":
    main()
