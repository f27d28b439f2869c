"""toy_decisions.py: which tokens of a toy response decide something, and whether they decide right.

Only the author of the toy can know this. `roles` describes these tokens, and `gradient` gives them
the scores of oracles.

Shapes: B responses, T response tokens, S statistics.
"""

import re
from collections.abc import Iterator, Sequence

import numpy as np
import torch
from torch import Tensor

import dyco
import toy
from data import Sample
from tools.charts import interval
from tools.estimates import bootstrap, estimate_each, within_prompts
from tools.observed import Observed

STEP = re.compile(r"([a-z]+) is ([a-z]+) ([0-9]+), total ([0-9]+)\.")  # of toy.write_trace
HABIT = f"{toy.SHAPES[0]}'s colour"  # the warm start has a bad habit with the first shape alone
KINDS = ("colour", HABIT, "value", "total")


# --------------------------------------------------------------------------------- which tokens


def toy_decisions(pieces: list[str], sample: Sample) -> dict[int, tuple[str, bool]]:
    """Which tokens of a toy response decide what: {place: (kind, is it right)}.

    A "colour", or that of the shape with the bad habit, is right if it is the picture's. A "value"
    is right if it is that of the named colour. A "total" is right if it is the total before plus
    the named value. So a step is not wrong because an earlier one was.

    pieces: the response's tokens as text.
    """
    # Where each token ends in the text, to find the token that a match begins in.
    ends = np.cumsum([len(piece) for piece in pieces])
    colors = sample.extra["colors"]
    values = sample.extra["values"]
    decisions: dict[int, tuple[str, bool]] = {}
    total = 0
    for step in STEP.finditer("".join(pieces)):
        shape, color, value, total_after = step.groups()
        kinds = (HABIT if shape == toy.SHAPES[0] else "colour", "value", "total")
        are_right = (
            color == colors.get(shape),
            int(value) == values.get(color),
            int(total_after) == total + int(value),
        )
        for group, kind, is_right in zip((2, 3, 4), kinds, are_right, strict=True):
            place = int(np.searchsorted(ends, step.start(group), side="right"))
            decisions[place] = (kind, is_right)  # of two in one token the last one stays
        total = int(total_after)
    return decisions


def all_decisions(
    places: list[int], tokens: Tensor, mask: Tensor, samples: Sequence[Sample], tokenizer
) -> Iterator[tuple[int, int, str, bool]]:
    """(row, token, kind, is it right) of all that toy responses decide.

    places [B]: of the responses' samples; tokens, mask [B, T].
    """
    for row, place in enumerate(places):
        ids = tokens[row][mask[row]].tolist()
        pieces = [tokenizer.decode([token]) for token in ids]
        for token, (kind, is_right) in toy_decisions(pieces, samples[place]).items():
            yield row, token, kind, is_right


# ------------------------------------------------------------------------------ what they are like


def mark_decisions(
    seen: Observed, samples: Sequence[Sample], tokenizer
) -> dict[tuple[str, str], Tensor]:
    """{(kind, "right" or "wrong"): its tokens, [B, T] bool}; ("other", "right") are the rest."""
    marks = {
        (kind, outcome): torch.zeros_like(seen.mask)
        for kind in KINDS
        for outcome in ("right", "wrong")
    }
    other = seen.mask.clone()
    decisions = all_decisions(
        seen.prompt.tolist(), seen.tokens, seen.mask, samples=samples, tokenizer=tokenizer
    )
    for row, token, kind, is_right in decisions:
        marks[kind, "right" if is_right else "wrong"][row, token] = True
        other[row, token] = False
    marks["other", "right"] = other
    return marks


def token_values(seen: Observed) -> dict[str, Tensor]:
    """{statistic: its value at each token, [B, T]}."""
    signals = seen.signals
    either_mass = (signals.visual_mass + signals.text_mass).clamp(min=1e-12)
    return {
        "visual, %": 100.0 * (seen.roles > 0),
        "text, %": 100.0 * (seen.roles < 0),
        "visual shift": signals.visual_shift,
        "text shift": signals.text_shift,
        "image's share": signals.visual_mass / either_mass,
        "alignment": seen.scores,
        "weight": dyco.token_weights(seen.scores, seen.mask),
    }


def describe_decisions(
    seen: Observed, samples: Sequence[Sample], tokenizer
) -> dict[str, dict[str, dict]]:
    """What the tokens that decide are like: {kind: {"right": …, "wrong": …, "difference": …}}.

    Each of the three is {statistic: [estimate, low, high]}; the first two also say how many
    "tokens" there are. The difference is wrong − right, within prompts. The kinds are those of
    `toy_decisions`; tokens that decide nothing are ("other", "right").
    """
    values = token_values(seen)

    def sums(marked: Tensor) -> tuple[Tensor, Tensor]:
        """Sum of each statistic over a response's marked tokens, and their number: [S, B]."""
        totals = [torch.where(marked, value, 0).sum(1) for value in values.values()]
        return torch.stack(totals), marked.sum(1).expand(len(values), -1)

    def named(estimates) -> dict[str, list]:
        return dict(zip(values, estimate_each(*estimates), strict=True))

    marks = mark_decisions(seen, samples, tokenizer)
    table: dict[str, dict[str, dict]] = {}
    for (kind, outcome), marked in marks.items():
        estimates = named(bootstrap(*sums(marked), seen.prompt))
        table.setdefault(kind, {})[outcome] = {"tokens": int(marked.sum()), **estimates}
    for kind in KINDS:
        right = sums(marks[kind, "right"])
        wrong = sums(marks[kind, "wrong"])
        table[kind]["difference"] = named(within_prompts(right, wrong, seen.prompt))
    return table


def decisions_text(table: dict) -> str:
    """`describe_decisions` as lines for the terminal, without most of the intervals."""
    names = [name for name in table["other"]["right"] if name != "tokens"]
    lines = [_line("tokens that decide", "tokens", names)]
    for kind, outcomes in table.items():
        for outcome, row in outcomes.items():
            if outcome != "difference":
                label = kind if kind == "other" else f"{kind}, {outcome}"
                cells = [interval([row[name][0], None, None]) for name in names]
                lines.append(_line(label, row["tokens"], cells))
    for kind, outcomes in table.items():
        if "difference" in outcomes:
            difference = interval(outcomes["difference"]["alignment"])
            lines.append(f"alignment, wrong − right within prompts: {kind} {difference}")
    return "\n".join(lines)


def _line(label: str, tokens, cells: list[str]) -> str:
    return (f"{label:<24}{tokens:<9}" + "".join(f"{cell:<15}" for cell in cells)).rstrip()
