"""rule_table.py: does a rule of token credit beat its own factors on other tokens?

The question and its test were fixed before the runs, see docs/credit.md: one figure for each rule,
an exact test, Holm's correction for the number of rules.
"""

import itertools
from typing import NamedTuple

from tools.estimates import bootstrap_mean

LIMIT = 0.05  # of the corrected p-value
SEEDS = 8  # that were planned; a test of fewer would be another one than was announced


class Answer(NamedTuple):
    """What the runs say of one rule."""

    rule: str
    # level, or "both" -> (mean, low, high):
    gains: dict[str, tuple]  # rule − its shuffled control
    over_host: dict[str, tuple]  # rule − host
    pairs: int  # of runs, over both levels
    p: float | None  # not corrected; None before all planned runs are there


def sign_flip(differences: list[float]) -> float:
    """The exact two-sided p-value of a mean of paired differences.

    If rule and control were alike, each difference could as well have the other sign. This is the
    share of all 2ⁿ choices of signs whose mean is at least as far from 0.

    >>> sign_flip([1.0, 2.0, 3.0]), sign_flip([1.0, -1.0])
    (0.25, 1.0)
    """
    limit = abs(sum(differences)) * (1 - 1e-12)  # sums in another order differ by rounding
    sums = [0.0]
    for value in differences:
        sums = [total + sign * value for total in sums for sign in (1, -1)]
    return sum(abs(total) >= limit for total in sums) / len(sums)


def holm(p_values: list[float]) -> list[float]:
    """Holm's correction for the number of tests: each is below 5 % only where it would be
    rejected.

    >>> holm([0.01, 0.04, 0.03])
    [0.03, 0.06, 0.06]
    """
    order = sorted(range(len(p_values)), key=p_values.__getitem__)
    corrected = [0.0] * len(p_values)
    highest = 0.0
    for rank, index in enumerate(order):
        highest = max(highest, min(1.0, (len(p_values) - rank) * p_values[index]))
        corrected[index] = highest
    return corrected


def answer_of(
    rule: str, over_control: dict[str, list[float]], over_host: dict[str, list[float]]
) -> Answer:
    """over_control, over_host: level -> rule − its shuffled control, or − host, for each seed."""
    pairs = list(itertools.chain.from_iterable(over_control.values()))
    is_complete = all(len(values) >= SEEDS for values in over_control.values())
    return Answer(
        rule,
        gains=with_both(over_control),
        over_host=with_both(over_host),
        pairs=len(pairs),
        p=sign_flip(pairs) if is_complete else None,
    )


def with_both(differences: dict[str, list[float]]) -> dict[str, tuple]:
    """The means of each level and of both together, with their intervals."""
    both = list(itertools.chain.from_iterable(differences.values()))
    return {
        level: bootstrap_mean(values) for level, values in {**differences, "both": both}.items()
    }


def gain_text(gain: tuple | None) -> str:
    """
    >>> gain_text((1.25, -0.5, 3.0)), gain_text((2.0, None, None)), gain_text(None)
    ('+1.2 (−0.5 … +3.0)', '+2.0', '–')
    """
    if gain is None:
        return "–"
    form = "{:+.1f}" if gain[1] is None else "{:+.1f} ({:+.1f} … {:+.1f})"
    return form.format(*gain).replace("-", "−")


def p_text(p: float) -> str:
    """
    >>> p_text(0.0204), p_text(0.0004)
    ('0.020', '< 0.001')
    """
    return "< 0.001" if p < 0.001 else f"{p:.3f}"


def rule_lines(answers: list[Answer], planned: int) -> list[str]:
    """A table in Markdown: every rule against its own shuffled control; last, against the host.

    planned: how many rules are tested together. There are no p-values before all of them have run.
    """
    levels = list(answers[0].gains)
    heads = ["rule − its shuffled control", "pairs", *levels, "p", "p, corrected", "rule − host"]
    lines = [f"| {' | '.join(heads)} |", "|---" * len(heads) + "|"]
    tested = {answer.rule: answer.p for answer in answers if answer.p is not None}
    corrected = dict(zip(tested, holm(list(tested.values())), strict=True))
    for answer in answers:
        cells = [gain_text(answer.gains[level]) for level in levels]
        p_values = ["–", "–"]
        # Holm's correction is for all of them together.
        if len(tested) == planned:
            p_values = [p_text(answer.p), p_text(corrected[answer.rule])]
        cells = [answer.rule, str(answer.pairs), *cells, *p_values]
        lines.append(f"| {' | '.join(cells)} | {gain_text(answer.over_host['both'])} |")
    return lines
