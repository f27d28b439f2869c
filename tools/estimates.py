"""estimates.py: every interval that the tools state comes from the bootstrap in this file.

A *replicate* is the estimate from as many prompts as there are, drawn with replacement (or from
runs, or batches, where a value is about these). The 95 % interval lies between two quantiles of the
replicates. All draws are seeded, so the same values always give the same interval.

Shapes: S statistics, B responses, P prompts, N replicates.
"""

import math
import statistics

import torch
from torch import Tensor

REPLICATES = 2000  # of ratios over prompts
FEWEST = 4  # values with an interval: below, too few draws differ for quantiles to mean anything


# ---------------------------------------------------------------------------------- the bootstrap


def draw(count: int, replicates: int, seed: int = 0) -> Tensor:
    """Which of `count` things each replicate draws: [replicates, count] long, with replacement."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(count, (replicates, count), generator=generator)


def interval_of(replicates: Tensor, low: float = 0.025) -> list[float]:
    """The quantiles `low` and 1 − `low` of replicates [N]; those that are NaN are left out."""
    ends = torch.tensor([low, 1 - low], dtype=replicates.dtype)
    return replicates.nanquantile(ends).tolist()


def expanded_percentile(n: int) -> float:
    """The quantile at which the 95 % interval of a mean of n values begins; it ends at 1 − this.

    The plain 2.5 % makes intervals of few values too short: of eight normal values they hold the
    true mean in 89 % of cases. This quantile makes the interval as long as Student's for normal
    values: Φ(−t √(n/(n−1))), the "expanded percentile" of Hesterberg, What Teachers Should Know
    About the Bootstrap, 2015. Student's t is computed by its expansion in the degrees of freedom.
    """
    normal = statistics.NormalDist()
    freedom = n - 1
    z = normal.inv_cdf(0.975)
    t = (
        z
        + (z**3 + z) / (4 * freedom)
        + (5 * z**5 + 16 * z**3 + 3 * z) / (96 * freedom**2)
        + (3 * z**7 + 19 * z**5 + 17 * z**3 - 15 * z) / (384 * freedom**3)
    )
    return normal.cdf(-t * (n / freedom) ** 0.5)


# ------------------------------------------------------------------------------- means of values


def bootstrap_mean(
    values: list[float], replicates: int = 10000
) -> tuple[float, float | None, float | None]:
    """(mean, low, high) of values that are drawn one by one; less than FEWEST have no interval."""
    x = torch.tensor(values, dtype=torch.float64)
    mean = float(x.mean())
    if len(values) < FEWEST:
        return mean, None, None
    means = x[draw(len(values), replicates)].mean(1)
    low, high = interval_of(means, expanded_percentile(len(values)))
    return mean, low, high


# ------------------------------------------------------------- ratios of sums over the responses


def sums_by_prompt(values: Tensor, prompt: Tensor) -> Tensor:
    """Sums over the responses to each prompt: values [S, B], prompt [B] -> [S, P] float64."""
    # Prompts without responses would count as prompts; `place` numbers those that occur.
    _, place = prompt.unique(return_inverse=True)
    sums = torch.zeros(len(values), int(place.max()) + 1, dtype=torch.float64)
    return sums.index_add_(1, place, values.double())


def _ratio(numerator: Tensor, denominator: Tensor) -> Tensor:
    return torch.where(denominator > 0, numerator / denominator, torch.nan)


def bootstrap(numerators: Tensor, denominators: Tensor, prompt: Tensor) -> tuple[Tensor, Tensor]:
    """Ratios of sums over responses, and their replicates over prompts.

    The responses to one prompt are not independent, so whole prompts are drawn. One draw serves
    all statistics, so differences between their replicates are paired.

    numerators, denominators [S, B] of S statistics; prompt [B], the prompt of each response
    -> ratios [S] and replicates [S, N], NaN where a denominator is 0.
    """
    numerators = sums_by_prompt(numerators, prompt)
    denominators = sums_by_prompt(denominators, prompt)
    prompts = numerators.shape[1]
    # How often a replicate drew each prompt is all that its sums depend on.
    times_drawn = [row.bincount(minlength=prompts) for row in draw(prompts, REPLICATES)]
    times_drawn = torch.stack(times_drawn, dim=1).double()  # [P, N]
    ratios = _ratio(numerators.sum(1), denominators.sum(1))
    replicates = _ratio(numerators @ times_drawn, denominators @ times_drawn)
    return ratios, replicates


def within_prompts(
    right: tuple[Tensor, Tensor], wrong: tuple[Tensor, Tensor], prompt: Tensor
) -> tuple[Tensor, Tensor]:
    """Differences of ratios of sums, wrong − right, within prompts that have both.

    Harder prompts have more wrong responses and may differ for other reasons. Comparing within
    prompts keeps that out. A prompt has the weight m·n / (m + n), where m and n are its two
    denominators, as in a difference of means.

    right and wrong (numerators, denominators), [S, B] each; prompt [B] -> as `bootstrap`.
    """
    right_sum = sums_by_prompt(right[0], prompt)
    right_count = sums_by_prompt(right[1], prompt)
    wrong_sum = sums_by_prompt(wrong[0], prompt)
    wrong_count = sums_by_prompt(wrong[1], prompt)
    has_both = (right_count > 0) & (wrong_count > 0)
    weight = right_count * wrong_count / (right_count + wrong_count)
    difference = wrong_sum / wrong_count - right_sum / right_count
    # A prompt without both has a weight or a difference of 0/0, which must not reach the sums.
    weight = torch.where(has_both, weight, 0)
    weighted = torch.where(has_both, weight * difference, 0)
    # Each prompt is one value now, so what is drawn is again prompts.
    return bootstrap(weighted, weight, torch.arange(weight.shape[1]))


# -------------------------------------------------------------------- numbers for people and JSON


def _rounded(value: float | Tensor) -> float | None:
    return round(float(value), 5) if math.isfinite(value) else None


def estimate(value: Tensor, replicates: Tensor, low: float = 0.025) -> list[float | None]:
    """[value, low, high], each None where it is undefined.

    value: a scalar; replicates [N]; low: the quantile of the replicates at which the interval
    begins.
    """
    if not math.isfinite(value) or not replicates.isfinite().any():
        return [_rounded(value), None, None]
    return [_rounded(value), *map(_rounded, interval_of(replicates, low))]


def estimate_each(
    values: Tensor, replicates: Tensor, low: float = 0.025
) -> list[list[float | None]]:
    """`estimate` of each of S statistics: values [S], replicates [S, N]."""
    return [estimate(*pair, low) for pair in zip(values, replicates, strict=True)]
