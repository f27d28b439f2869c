"""estimates.py: intervals are as long as they should be, paired, over prompts, and within them."""

import pytest
import torch

from tools import estimates
from tools.estimates import bootstrap, bootstrap_mean, estimate, within_prompts


def test_bootstrap_over_prompts():
    """A mean over 400 prompts of 5 equal responses spreads as one of 400 values, not of 2000."""
    generator = torch.Generator().manual_seed(0)
    of_prompts = torch.randn(400, dtype=torch.float64, generator=generator)
    value = of_prompts.repeat_interleave(5)
    prompt = torch.arange(400).repeat_interleave(5) * 7
    point, replicates = bootstrap(value[None], torch.ones(1, 2000), prompt)
    assert float(point) == pytest.approx(float(value.mean()))
    # of 2000 replicates a standard deviation is known to 1.6 %; this is three to four times that
    error = float(of_prompts.std()) / 20
    assert float(replicates.std()) == pytest.approx(error, rel=0.06)
    low, high = estimate(point[0], replicates[0])[1:]
    assert high - low == pytest.approx(2 * 1.96 * error, rel=0.1)


def test_differences_of_statistics_are_paired():
    value = torch.randn(1, 50, generator=torch.Generator().manual_seed(0))
    _, replicates = bootstrap(value.expand(2, -1), torch.ones(2, 50), torch.arange(50))
    assert torch.equal(replicates[0], replicates[1])


def test_a_ratio_over_nothing_is_undefined():
    point, replicates = bootstrap(torch.zeros(1, 4), torch.zeros(1, 4), torch.arange(4))
    assert estimate(point[0], replicates[0]) == [None, None, None]


def test_differences_are_within_prompts():
    """Prompt 0: right 1 of 2, wrong 6 of 4; prompt 1: right 8 of 2, wrong 9 of 2; prompt 2 has no
    wrong one. Weights 8/6 and 1: (4/3 · (1.5 − 0.5) + 1 · (4.5 − 4)) / (7/3)."""
    prompt = torch.tensor([0, 0, 0, 1, 1, 2])
    right = torch.tensor([[1.0, 0, 0, 8, 0, 99]]), torch.tensor([[2.0, 0, 0, 2, 0, 1]])
    wrong = torch.tensor([[0, 2.0, 4, 0, 9, 0]]), torch.tensor([[0, 1.0, 3, 0, 2, 0]])
    value, replicates = within_prompts(right, wrong, prompt)
    assert float(value) == pytest.approx((4 / 3 + 0.5) / (7 / 3))
    assert replicates.shape == (1, estimates.REPLICATES)
    possible = {
        round((i * 4 / 3 + j * 0.5) / (i * 4 / 3 + j), 6)
        for i in range(4)
        for j in range(4)
        if i + j
    }
    assert {round(float(x), 6) for x in replicates[0] if not x.isnan()} <= possible


def test_prompts_that_differ_alone_make_no_difference():
    """Harder prompts have higher values and more wrong responses."""
    level = torch.arange(40).repeat_interleave(4).double()
    chosen = torch.rand(160, generator=torch.Generator().manual_seed(0)) > level / 40
    right = level[None] * chosen, chosen[None]
    wrong = level[None] * ~chosen, ~chosen[None]
    value, replicates = within_prompts(right, wrong, level.long())
    assert estimate(value[0], replicates[0]) == [0, 0, 0]


def test_the_interval_of_a_mean_covers():
    """Of 1000 samples of eight normals the interval holds the true mean 95 % of the time (standard
    error 0.7 %); plain percentiles do for 89 %."""
    samples = torch.randn(1000, 8, generator=torch.Generator().manual_seed(1)) + 3
    inside = 0
    for sample in samples:
        _, low, high = bootstrap_mean(sample.tolist(), 1000)
        inside += low <= 3 <= high
    assert 0.93 < inside / 1000 < 0.97


def test_a_mean_of_equal_and_of_few_values():
    assert bootstrap_mean([2.0] * 4) == (2, 2, 2)
    assert bootstrap_mean([1.0, 3.0, 5.0]) == (3, None, None)
