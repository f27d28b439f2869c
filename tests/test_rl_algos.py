"""rl_algos.py: numbers by hand, an independent loop with its own gradients, and invariances.

A new algorithm is tested here as soon as it is registered. It needs an entry in REFERENCES.
"""

import doctest
import math
from types import SimpleNamespace
from typing import NamedTuple

import pytest
import torch

import config as config_module
import rl_algos
from config import ConfigError, load_config
from rl_algos import ALGORITHMS

BUDGET = 16  # max_new_tokens
F64 = dict(rtol=1e-12, atol=1e-13)  # a few hundred float64 roundings of numbers near 1


def tensor(values, dtype=torch.float64):
    return torch.tensor(values, dtype=dtype)


def close(actual, expected, **tolerance):
    expected = torch.as_tensor(expected, dtype=actual.dtype)
    torch.testing.assert_close(actual, expected, **(tolerance or F64))


def make_settings(**changes):
    values = dict(
        clip_low=0.2,
        clip_high=0.28,
        kl=0.0,
        temperature_pos=1.0,
        temperature_neg=1.05,
        max_new_tokens=BUDGET,
    )
    return SimpleNamespace(**{**values, **changes})


def make_case(seed, lengths=(6, 1, 9, 0, 4), spread=0.3, dtype=torch.float64):
    """Log-ratios of size `spread`; row 3 is fully masked.

    Returns logprobs, old, advantages, mask, ref.
    """
    generator = torch.Generator().manual_seed(seed)
    shape = len(lengths), max(lengths)
    mask = torch.arange(shape[1]) < torch.tensor(lengths)[:, None]

    def normal():
        return torch.randn(shape, generator=generator, dtype=torch.float64)

    old = -3 * torch.rand(shape, generator=generator, dtype=torch.float64) - 1
    logprobs = old + spread * normal()
    ref = logprobs + 0.3 * normal()
    advantages = normal()
    return logprobs.to(dtype), old.to(dtype), advantages.to(dtype), mask, ref.to(dtype)


def run(name, case, settings, normalizer=None, with_ref=True):
    """-> loss (detached), gradient with respect to logprobs, metrics."""
    logprobs, old, advantages, mask, ref = case
    leaf = logprobs.detach().clone().requires_grad_()
    loss, metrics = rl_algos.policy_loss(
        name,
        leaf,
        old,
        advantages,
        mask,
        settings,
        ref_logprobs=ref if with_ref else None,
        normalizer=normalizer,
    )
    assert loss.dim() == 0
    loss.backward()
    return loss.detach(), leaf.grad, metrics


def one_token(name, ratio, advantage, **changes):
    """Loss and gradient of one response of one token, whose current log-probability is -1."""
    case = (
        tensor([[-1.0]]),
        tensor([[-1.0 - math.log(ratio)]]),
        tensor([[advantage]]),
        torch.tensor([[True]]),
        None,
    )
    loss, gradient, _ = run(name, case, make_settings(**changes), with_ref=False)
    return loss.item(), gradient.item()


# ---------------------------------------------------------------- the independent implementation


class Token(NamedTuple):
    """What the objective of one token may depend on, as floats."""

    logprob: float
    ratio: float  # of the token
    sequence_ratio: float  # the geometric mean of the response's
    advantage: float


# Each returns the objective (maximised) of one token and its derivative with respect to the
# token's log-probability, with what the algorithm holds constant held constant.


def ref_bounded(ratio, settings):
    return min(max(ratio, 1 - settings.clip_low), 1 + settings.clip_high)


def ref_surrogate(ratio, advantage, settings):
    free = ratio * advantage
    bounded = ref_bounded(ratio, settings) * advantage
    return (free, free) if free <= bounded else (bounded, 0.0)


def ref_clipped(token, settings):
    return ref_surrogate(token.ratio, token.advantage, settings)


def ref_gspo(token, settings):
    return ref_surrogate(token.sequence_ratio, token.advantage, settings)


def ref_sapo(token, settings):
    good = token.advantage > 0
    temperature = settings.temperature_pos if good else settings.temperature_neg
    gate = 1 / (1 + math.exp(-temperature * (token.ratio - 1)))
    value = 4 / temperature * gate * token.advantage
    return value, 4 * gate * (1 - gate) * token.ratio * token.advantage


def ref_cispo(token, settings):
    weighted = ref_bounded(token.ratio, settings) * token.advantage
    return weighted * token.logprob, weighted


# Name: the objective of a token, and what a token's share is averaged over.
REFERENCES = {
    "grpo": (ref_clipped, "response"),
    "dapo": (ref_clipped, "token"),
    "dr_grpo": (ref_clipped, "budget"),
    "gspo": (ref_gspo, "response"),
    "sapo": (ref_sapo, "response"),
    "cispo": (ref_cispo, "token"),
}
each_algorithm = pytest.mark.parametrize("name", ALGORITHMS)


def reference(name):
    """-> objective, average. A name that nobody wrote a reference for must not pass for another."""
    if name not in REFERENCES:
        raise NotImplementedError(
            f"algorithm {name!r} has no reference in tests/test_rl_algos.py: write the objective "
            "of one token and its derivative as plain Python, and enter them in REFERENCES"
        )
    return REFERENCES[name]


def ref_normalizer(name, mask):
    """What is divided by in a step of these responses: their tokens, or their number."""
    _, average = reference(name)
    return int(mask.sum()) if average == "token" else len(mask)


def ref_share(name, length):
    """What a token of a response of `length` tokens is divided by, before the normalizer."""
    _, average = reference(name)
    return {"response": max(length, 1), "token": 1, "budget": BUDGET}[average]


def ref_loss(name, case, settings, normalizer=None):
    """Loss and gradient, token by token over Python floats."""
    objective, _ = reference(name)
    if normalizer is None:
        normalizer = max(ref_normalizer(name, case[3]), 1)
    logprobs, old, advantages, mask, ref = (x.tolist() for x in case)
    total = 0.0
    gradient = [[0.0] * len(row) for row in mask]
    for b, row in enumerate(mask):
        real = [t for t, inside in enumerate(row) if inside]
        share = ref_share(name, len(real)) * normalizer
        log_ratios = {t: logprobs[b][t] - old[b][t] for t in real}
        sequence_ratio = math.exp(sum(log_ratios.values()) / max(len(real), 1))
        for t in real:
            token = Token(
                logprobs[b][t], math.exp(log_ratios[t]), sequence_ratio, advantage=advantages[b][t]
            )
            value, slope = objective(token, settings)
            gap = ref[b][t] - logprobs[b][t]
            k3 = math.exp(gap) - gap - 1
            total -= (value - settings.kl * k3) / share
            gradient[b][t] = -(slope - settings.kl * (1 - math.exp(gap))) / share
    return total, gradient


def test_an_algorithm_without_a_reference_is_named():
    with pytest.raises(NotImplementedError, match="'mine' has no reference.*REFERENCES"):
        ref_loss("mine", make_case(0), make_settings())


@each_algorithm
@pytest.mark.parametrize("kl", [0.0, 0.04])
@pytest.mark.parametrize("normalizer", [None, 37])
def test_losses_match_the_loop_in_value_and_gradient(name, kl, normalizer):
    for seed in range(10):
        case = make_case(seed)
        settings = make_settings(kl=kl)
        if name == "gspo" and seed % 2:  # the recipe's own, narrow clip range
            case = make_case(seed, spread=1e-3)
            settings = make_settings(kl=kl, clip_low=3e-4, clip_high=4e-4)
        loss, gradient, metrics = run(name, case, settings, normalizer)
        expected, expected_gradient = ref_loss(name, case, settings, normalizer)
        close(loss, expected)
        close(gradient, tensor(expected_gradient))
        assert {"kl", "clip_fraction"} <= metrics.keys()
        assert not any(isinstance(m, torch.Tensor) and m.requires_grad for m in metrics.values())


@pytest.mark.parametrize("name", ["grpo", "dapo", "sapo", "dr_grpo"])
def test_gradient_is_that_of_the_value(name):
    """Central differences, for objectives without stop-gradients. Kinks, 1e-6 wide, are missed."""
    logprobs, old, advantages, mask, ref = make_case(11)

    def loss(x):
        return rl_algos.policy_loss(
            name, x, old, advantages, mask, make_settings(kl=0.1), ref_logprobs=ref
        )[0]

    assert torch.autograd.gradcheck(loss, logprobs.requires_grad_())


# ---------------------------------------------------------------- signs and clipping of one token


@pytest.mark.parametrize("name", ["grpo", "dapo", "gspo", "sapo", "cispo"])
def test_a_single_token_at_ratio_one(name):
    """The objective is maximised: the loss has slope -A in the token's log-probability."""
    assert one_token(name, 1.0, 2.0)[1] == pytest.approx(-2.0, rel=1e-12)
    assert one_token(name, 1.0, -3.0)[1] == pytest.approx(3.0, rel=1e-12)
    value = -2.0
    if name == "sapo":
        value = -4 * 0.5 * 2.0  # 4 / temperature * sigmoid(0) * A
    if name == "cispo":
        value = -2.0 * -1.0  # A * logprob
    assert one_token(name, 1.0, 2.0)[0] == pytest.approx(value, rel=1e-12)


@pytest.mark.parametrize("name", ["grpo", "dapo", "gspo", "dr_grpo"])
@pytest.mark.parametrize(
    "ratio, advantage, low, high, objective, flows",
    [
        (1.25, 1, 0.2, 0.20, 1.20, False),  # encouraged far enough already
        (1.25, 1, 0.2, 0.28, 1.25, True),  # clip-higher leaves room
        (0.75, -1, 0.20, 0.28, -0.80, False),  # discouraged far enough already
        (0.75, -1, 0.28, 0.20, -0.75, True),
        (1.25, -1, 0.2, 0.20, -1.25, True),  # moved the wrong way: never clipped
        (0.75, 1, 0.2, 0.20, 0.75, True),
    ],
)
def test_clipping_on_either_side(name, ratio, advantage, low, high, objective, flows):
    loss, gradient = one_token(
        name, ratio, advantage, clip_low=low, clip_high=high, max_new_tokens=1
    )
    assert loss == pytest.approx(-objective, rel=1e-12)
    expected = -ratio * advantage if flows else 0.0
    assert gradient == pytest.approx(expected, rel=1e-12, abs=0)


def test_cispo_clips_the_weight_and_keeps_the_gradient():
    """r = 1.5 is weighted 1.28, r = 0.5 is weighted 0.8; logp = -1, so the loss is weight * A."""
    assert one_token("cispo", 1.5, 2.0) == pytest.approx((2.56, -2.56), rel=1e-12)
    assert one_token("cispo", 0.5, -1.0) == pytest.approx((-0.8, 0.8), rel=1e-12)
    assert one_token("cispo", 1.1, 1.0) == pytest.approx((1.1, -1.1), rel=1e-12)


def test_sapo_gate_and_temperatures():
    """tau 2, r = 1 + ln(3)/2: sigmoid(ln 3) = 3/4. Value 4/2 * 3/4; slope 4 * 3/4 * 1/4 * r.

    tau 4 for bad tokens, r = 1 - ln(3)/4: sigmoid(-ln 3) = 1/4. Value -4/4 * 1/4; slope -0.75 r.
    """
    temperatures = dict(temperature_pos=2.0, temperature_neg=4.0)
    up = 1 + math.log(3) / 2
    encouraged = one_token("sapo", up, 1.0, **temperatures)
    assert encouraged == pytest.approx((-1.5, -0.75 * up), rel=1e-12)
    down = 1 - math.log(3) / 4
    discouraged = one_token("sapo", down, -1.0, **temperatures)
    assert discouraged == pytest.approx((0.25, 0.75 * down), rel=1e-12)


def test_gspo_token_form_by_hand():
    """Log-ratios 0.3 and -0.1: s = e^0.1 for both tokens, whatever their own ratios.

    A = (1, -2): value -(s - 2 s) / 2, gradient -(s, -2 s) / 2. Clipped at 1.1, the first has value
    -(1.1 - 2 s) / 2.
    """
    s, mask = math.exp(0.1), torch.ones(1, 2, dtype=torch.bool)
    case = tensor([[-1.0, -2.0]]), tensor([[-1.3, -1.9]]), tensor([[1.0, -2.0]]), mask, None
    loss, gradient, _ = run("gspo", case, make_settings(), with_ref=False)
    close(loss, s / 2)
    close(gradient, [[-s / 2, s]])
    loss, gradient, _ = run("gspo", case, make_settings(clip_high=0.1), with_ref=False)
    close(loss, -(1.1 - 2 * s) / 2)
    close(gradient, [[0.0, s]])


def test_gspo_averages_log_ratios_before_anything_is_cut():
    """Log-ratios 40 and -39.8 have mean 0.1.

    One extreme token does not move the sequence out of the clip range.
    """
    ones = tensor([[1.0, 1.0]])
    case = tensor([[-1.0, -50.0]]), tensor([[-41.0, -10.2]]), ones, ones.bool(), None
    loss, gradient, _ = run("gspo", case, make_settings(), with_ref=False)
    close(loss, -math.exp(0.1))
    close(gradient, [[-math.exp(0.1) / 2] * 2])


def test_gspo_token_form_equals_the_sequence_form_when_the_advantage_is_one_per_response():
    logprobs, old, advantages, mask, ref = make_case(5, spread=0.05)
    advantages = advantages[:, :1].expand_as(advantages)
    loss, gradient, _ = run("gspo", (logprobs, old, advantages, mask, ref), make_settings())
    leaf = logprobs.clone().requires_grad_()
    s = (((leaf - old) * mask).sum(1) / mask.sum(1).clamp(min=1)).exp()
    a = advantages[:, 0] * mask.any(1)
    sequence = -torch.minimum(s * a, s.clamp(0.8, 1.28) * a).mean()
    sequence.backward()
    close(loss, sequence.detach())
    close(gradient, leaf.grad)


# ---------------------------------------------------------------- KL


@each_algorithm
def test_kl_is_k3_added_to_the_loss_unscaled_by_ratio_and_advantage(name):
    """ref / pi = 2: k3 = 2 - ln 2 - 1 = 0.306853, its slope in logp 1 - 2 = -1.

    A = 0 and ratio 3 leave it alone. The second response is empty: it counts as a response and not
    as a token.
    """
    case = (
        tensor([[-1.0], [0.0]]),
        tensor([[-1.0 - math.log(3)], [0.0]]),
        tensor([[0.0], [0.0]]),
        torch.tensor([[True], [False]]),
        tensor([[-1.0 + math.log(2)], [0.0]]),
    )
    # The one token's share; two responses, but one token, where tokens are counted.
    share = {"response": 2, "token": 1, "budget": 2 * BUDGET}[reference(name)[1]]
    loss, gradient, metrics = run(name, case, make_settings(kl=0.5))
    close(loss, 0.5 * 0.306852819440055 / share)
    close(gradient, [[-0.5 / share], [0.0]])
    assert "kl" in metrics
    # Where the policy is e^30 times as likely as the reference, k3 grows linearly, 30 - 1 + e^-30,
    # and still pulls back.
    far = case[:4] + (tensor([[-31.0], [0.0]]),)
    loss, gradient, _ = run(name, far, make_settings(kl=0.5))
    close(loss, 0.5 * 29 / share)
    close(gradient, [[0.5 / share], [0.0]])


@each_algorithm
def test_kl_is_capped_per_token(name):
    """One response of four tokens, d = ref - logp = (ln 2, 3, -20, 0), A = 0.

    k3 is 0.306853, e^3 - 4 = 16.0855, e^-20 + 19 and 0. A cap of 10 holds the second and the third,
    and takes their gradients, e^3 - 1 and 1 - e^-20, away. The logged mean is that of k3 itself.
    """
    zero = torch.zeros(1, 4, dtype=torch.float64)
    difference = tensor([[math.log(2), 3.0, -20.0, 0.0]])
    case = zero - 1, zero - 1, zero, torch.ones(1, 4, dtype=torch.bool), difference - 1
    share = {"response": 4, "token": 4, "budget": BUDGET}[reference(name)[1]]
    k3 = [0.306852819440055, math.exp(3) - 4, 19 + math.exp(-20), 0.0]

    loss, gradient, metrics = run(name, case, make_settings(kl=0.5, kl_cap=10.0))
    close(loss, 0.5 * (k3[0] + 10 + 10) / share)
    close(gradient, [[-0.5 / share, 0.0, 0.0, 0.0]])
    close(metrics["kl"], sum(k3) / 4)
    close(metrics["kl_capped"], 2 / 4)

    loss, gradient, metrics = run(name, case, make_settings(kl=0.5))  # as with kl_cap=0: no cap
    close(loss, 0.5 * sum(k3) / share)
    slopes = [-1.0, 1 - math.exp(3), 1 - math.exp(-20), 0.0]
    close(gradient, [[0.5 * slope / share for slope in slopes]])
    close(metrics["kl"], sum(k3) / 4)
    assert metrics["kl_capped"] == 0


def share_of_squared_gradient(difference, **options):
    """What the first of 8 x 400 tokens has of it, with ref - logp = difference there alone.

    The weight of KL is grpo's own, 0.04. The ratios are 1, the advantages 1 and -1.
    """
    zero = torch.zeros(8, 400, dtype=torch.float64)
    advantages = torch.ones_like(zero)
    advantages[4:] = -1
    ref = zero.clone()
    ref[0, 0] = difference
    case = zero, zero, advantages, zero == 0, ref
    _, gradient, _ = run("grpo", case, make_settings(kl=0.04, **options))
    return float(gradient[0, 0] ** 2 / gradient.square().sum())


def test_why_kl_is_capped():
    """Without the cap one token outweighs the others: (1 + 0.04 (e^8 - 1))^2 against 3199."""
    assert share_of_squared_gradient(8.0) == pytest.approx(0.82, abs=0.005)
    assert share_of_squared_gradient(12.0) > 0.9999
    for difference in (8.0, 12.0):
        share = share_of_squared_gradient(difference, kl_cap=10.0)
        assert share == pytest.approx(1 / 3200)


@pytest.mark.parametrize("kl_cap", [0.0, 10.0])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("difference", [25.0, 100.0, 800.0, math.inf])
def test_a_token_far_below_the_reference_has_no_kl_gradient(difference, dtype, kl_cap):
    """exp(800) overflows; and the gradient of -d alone would push the policy further away."""
    zero = torch.zeros(1, 2, dtype=dtype)
    ref = tensor([[difference, 1.0]], dtype)
    case = zero, zero, zero, torch.ones(1, 2, dtype=torch.bool), ref
    loss, gradient, metrics = run("grpo", case, make_settings(kl=0.5, kl_cap=kl_cap))
    assert torch.isfinite(loss)
    close(gradient, [[0.0, 0.25 * (1 - math.e)]], rtol=1e-6, atol=1e-7)
    assert all(math.isfinite(float(m)) for m in metrics.values())


@each_algorithm
def test_kl_needs_reference_logprobs(name):
    case = make_case(0)
    with pytest.raises(ValueError):
        run(name, case, make_settings(kl=0.04), with_ref=False)
    _, _, metrics = run(name, case, make_settings(kl=0.0), with_ref=False)
    assert "clip_fraction" in metrics


# ---------------------------------------------------------------- normalisers, masks, micro-batches


@each_algorithm
def test_micro_batches_add_up_to_the_whole(name):
    """Uneven splits, an empty response alone; the normalizer is that of the whole."""
    for seed in range(5):
        case, settings = make_case(seed), make_settings(kl=0.04)
        normalizer = ref_normalizer(name, case[3])
        loss, gradient, _ = run(name, case, settings)
        for sizes in ((1, 1, 1, 1, 1), (2, 3), (3, 1, 1)):
            micro_batches = zip(*(x.split(sizes) for x in case), strict=True)
            parts = [run(name, part, settings, normalizer) for part in micro_batches]
            close(sum(loss for loss, _, _ in parts), loss)
            close(torch.cat([gradient for _, gradient, _ in parts]), gradient)


@each_algorithm
def test_normalizer_semantics_with_a_fully_masked_response(name):
    """Responses of 2, 1 and 0 tokens at ratio 1, A = (3, 3 | 5): sums 6 and 5, means 3 and 5.

    An average over responses is one of 3 means, over tokens one of 3 tokens, and over the budget
    sums are divided by 3 * 16. Gradients are compared, since sapo's value is another.
    """
    zero = torch.zeros(3, 2, dtype=torch.float64)
    mask = torch.tensor([[1, 1], [1, 0], [0, 0]], dtype=torch.bool)
    case = zero, zero, tensor([[3.0, 3.0], [5.0, 0.0], [9.0, 9.0]]), mask, zero
    _, gradient, _ = run(name, case, make_settings())
    by_average = {
        "response": [[0.5, 0.5], [5 / 3, 0], [0, 0]],
        "token": [[1, 1], [5 / 3, 0], [0, 0]],
        "budget": [[1 / 16, 1 / 16], [5 / 48, 0], [0, 0]],
    }
    expected = tensor(by_average[reference(name)[1]])
    close(gradient, -expected)
    # Four times as many in the whole step.
    _, gradient, _ = run(name, case, make_settings(), normalizer=12)
    close(gradient, -expected / 4)


@each_algorithm
def test_an_empty_mask_gives_zero_and_still_has_a_backward(name):
    logprobs, old, advantages, mask, ref = make_case(0)
    case = logprobs, old, advantages, mask & False, ref
    loss, gradient, metrics = run(name, case, make_settings(kl=0.04))
    assert loss == 0
    assert gradient.eq(0).all()
    assert all(math.isfinite(float(m)) for m in metrics.values())


@each_algorithm
@pytest.mark.parametrize("garbage", [math.inf, -math.inf, math.nan, 1e30])
def test_padding_may_hold_anything(name, garbage):
    """0 * inf is NaN: masked positions must be replaced before the arithmetic."""
    for dtype in (torch.float32, torch.float64):
        case, settings = make_case(2, dtype=dtype), make_settings(kl=0.04)
        mask = case[3]
        loss, gradient, _ = run(name, case, settings)
        # one argument at a time, two, and all
        for dirty in [(0,), (1,), (2,), (4,), (0, 1), (0, 1, 2, 4)]:
            filled = list(case)
            for i in dirty:
                filled[i] = filled[i].masked_fill(~mask, garbage)
            dirty_loss, dirty_gradient, metrics = run(name, filled, settings)
            assert torch.equal(dirty_loss, loss)
            assert torch.equal(dirty_gradient, gradient)
            assert dirty_gradient[~mask].eq(0).all()
            assert all(math.isfinite(float(m)) for m in metrics.values())


@each_algorithm
def test_extra_padding_columns_do_not_matter(name):
    case, settings = make_case(4), make_settings(kl=0.04)
    loss, gradient, _ = run(name, case, settings)
    padded = tuple(torch.nn.functional.pad(x, (2, 3)) for x in case)
    padded_loss, padded_gradient, _ = run(name, padded, settings)
    close(padded_loss, loss)
    close(padded_gradient[:, 2:-3], gradient)


@each_algorithm
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("log_ratio", [100.0, -100.0, 800.0, -800.0])
@pytest.mark.parametrize("advantage", [1.0, -1.0, 0.0])
def test_extreme_log_ratios_stay_finite(name, dtype, log_ratio, advantage):
    """exp(100) overflows float32 and exp(800) float64.

    The unused branch of a minimum then has the gradient 0 * inf.
    """
    logprobs = tensor([[-1.0, -1.0, -1.0]], dtype)
    old = logprobs - tensor([[log_ratio, 0, 0]], dtype)
    advantages = torch.full_like(logprobs, advantage)
    mask = torch.ones(1, 3, dtype=torch.bool)
    case = logprobs, old, advantages, mask, old.clone()
    for kl in (0.0, 0.04):
        loss, gradient, metrics = run(name, case, make_settings(kl=kl))
        assert torch.isfinite(loss)
        assert torch.isfinite(gradient).all()
        assert all(math.isfinite(float(m)) for m in metrics.values())
    # Far on the clipped side there is no push at all.
    if name in ("grpo", "dapo") and log_ratio * advantage > 0:
        _, gradient, _ = run(name, case, make_settings())
        assert gradient[0, 0] == 0


# ---------------------------------------------------------------- relations between the algorithms


def test_grpo_gspo_and_sapo_share_their_gradient_at_ratio_one():
    for seed in range(10):
        logprobs, _, advantages, mask, ref = make_case(seed)
        case = logprobs, logprobs.clone(), advantages, mask, ref
        settings = make_settings(kl=0.02)
        gradients = {name: run(name, case, settings)[1] for name in REFERENCES}
        close(gradients["gspo"], gradients["grpo"])
        close(gradients["sapo"], gradients["grpo"])
        narrow = make_settings(kl=0.02, clip_high=0.2)
        close(run("dapo", case, narrow)[1], gradients["dapo"])  # clip-higher does nothing
        close(gradients["cispo"], gradients["dapo"])
        # lengths differ, so the normaliser matters
        assert not torch.allclose(gradients["dapo"], gradients["grpo"])
        off_policy = logprobs, logprobs - 0.1, advantages, mask, ref
        moved = run("sapo", off_policy, settings)[1]
        assert not torch.allclose(moved, gradients["sapo"])


@each_algorithm
def test_a_group_of_equal_rewards_has_exactly_no_gradient(name):
    rewards = torch.full((1, 5), 0.1)
    logprobs, old, _, mask, ref = make_case(1, dtype=torch.float32)
    advantages = rl_algos.group_advantages(rewards).reshape(-1, 1).expand(mask.shape)
    case = logprobs, old, advantages, mask, ref
    loss, gradient, _ = run(name, case, make_settings(), with_ref=False)
    assert loss == 0
    assert gradient.eq(0).all()


@each_algorithm
def test_advantages_are_constants(name):
    logprobs, old, advantages, mask, ref = make_case(3)
    advantages.requires_grad_()
    loss, _ = rl_algos.policy_loss(
        name,
        logprobs.requires_grad_(),
        old,
        advantages,
        mask,
        make_settings(kl=0.1),
        ref_logprobs=ref,
    )
    gradient, none = torch.autograd.grad(loss, (logprobs, advantages), allow_unused=True)
    assert gradient.ne(0).any() and (none is None or none.eq(0).all())


@each_algorithm
def test_half_precision_is_computed_in_float32(name):
    """The same numbers in float32 give the same loss.

    A bfloat16 ratio, of 8 bits, could not even hold 1 + 4e-4.
    """
    half = make_case(7, dtype=torch.bfloat16)
    single = tuple(x.float() if x.is_floating_point() else x for x in half)
    settings = make_settings(kl=0.04)
    low, low_gradient, _ = run(name, half, settings)
    high, high_gradient, _ = run(name, single, settings)
    assert low.dtype == torch.float32
    assert torch.equal(low, high)
    # It is rounded once, when it is handed back.
    assert torch.equal(low_gradient, high_gradient.bfloat16())
    mixed, _, _ = run(name, (half[0],) + single[1:], settings)
    assert mixed.dtype == torch.float32
    assert torch.equal(mixed, high)


@each_algorithm
def test_every_algorithm_has_a_recipe_an_average_and_a_source(name):
    algorithm = ALGORITHMS[name]
    assert algorithm.average in rl_algos.AVERAGES
    assert algorithm.source.strip()
    assert load_config(config_module.DEFAULTS, [f"algo.name={name}"]).algo.name == name


def test_an_algorithm_without_a_recipe_is_named(monkeypatch):
    """Whoever registers one and forgets config.yaml is told what is missing."""
    monkeypatch.setitem(ALGORITHMS, "mine", ALGORITHMS["grpo"])
    with pytest.raises(ConfigError, match="mine.*recipe|recipe.*mine"):
        load_config(config_module.DEFAULTS, ["algo.name=mine"])


def test_unknown_algorithm_names_the_choices():
    assert {"grpo", "dapo", "gspo", "sapo", "dr_grpo", "cispo"} <= ALGORITHMS.keys()
    with pytest.raises(ValueError) as error:
        run("grppo", make_case(0), make_settings())
    assert all(name in str(error.value) for name in ALGORITHMS)


# ---------------------------------------------------------------- group advantages


def test_group_advantages_by_hand():
    """The std is unbiased, and 1e-4 is added to it.

    (1, 0, 0, 1): mean 1/2, std sqrt(4 * .25 / 3) = .57735, so .5 / .57745 = .865875 (not .9998).
    (3, 1, 2, 2): mean 2, std sqrt(2/3) = .816497, so 1 / .816597 = 1.224595.
    """
    rewards = tensor([[1, 0, 0, 1], [3, 1, 2, 2]])
    close(
        rl_algos.group_advantages(rewards),
        [
            [0.8658754297607, -0.8658754297607, -0.8658754297607, 0.8658754297607],
            [1.2245948897605, -1.2245948897605, 0, 0],
        ],
        rtol=0,
        atol=1e-12,
    )
    close(rl_algos.group_advantages(rewards, scale="none"), [[0.5, -0.5, -0.5, 0.5], [1, -1, 0, 0]])
    # eps 1 beside the std .816497
    close(
        rl_algos.group_advantages(rewards, eps=1.0)[1],
        [0.550510257216822, -0.550510257216822, 0, 0],
    )
    single = rl_algos.group_advantages(rewards.float())
    close(single, rl_algos.group_advantages(rewards), rtol=1e-6, atol=1e-6)  # float32 rounding


@pytest.mark.parametrize("scale", ["std", "none"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_equal_rewards_are_exactly_zero(scale, dtype):
    """The mean of three times 0.1 is not 0.1 in floating point.

    Over eps = 1e-4 the rest would be 1e-4 in float32.
    """
    for value in (0.1, 0.3, 0.7, 1 / 3, -1.1, 1e6 + 0.1, 0.0, 1.0):
        for size in range(2, 17):
            rewards = torch.full((2, size), value, dtype=dtype)
            rewards[1, 0] += 1  # the neighbour is not constant
            advantages = rl_algos.group_advantages(rewards, scale=scale)
            assert advantages[0].eq(0).all(), (value, size)
            assert advantages[1, 0] > 0, (value, size)


def test_groups_are_independent_and_shift_does_not_matter():
    rewards = torch.rand(6, 5, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    whole = rl_algos.group_advantages(rewards)
    for p in range(6):
        close(rl_algos.group_advantages(rewards[p : p + 1]), whole[p : p + 1])
    close(rl_algos.group_advantages(rewards + 3), whole)
    close(whole.sum(1), torch.zeros(6))


def test_group_advantages_refuse_what_has_no_meaning():
    not_finite = [tensor([[0.0, 1.0], [bad, 0.0]]) for bad in (math.nan, math.inf, -math.inf)]
    for rewards in (torch.ones(3, 1), *not_finite):
        for scale in ("std", "none"):
            with pytest.raises(ValueError):
                rl_algos.group_advantages(rewards, scale=scale)
    with pytest.raises(ValueError) as error:
        rl_algos.group_advantages(tensor([[0.0, 1.0]]), scale="sdt")
    assert "std" in str(error.value) and "none" in str(error.value)


# ---------------------------------------------------------------- DAPO's soft overlong punishment


def test_overlong_penalty_by_hand():
    """100 tokens at most, buffer 20: free up to 80, then linear, -1 from 100 on."""
    lengths = torch.tensor([0, 1, 80, 81, 85, 90, 99, 100, 120])
    penalty = rl_algos.overlong_penalty(lengths, 100, 20)
    assert penalty.is_floating_point()
    # 1e-7: float32 quotients of small integers
    close(penalty, [0, 0, 0, -0.05, -0.25, -0.5, -0.95, -1, -1], rtol=0, atol=1e-7)
    close(rl_algos.overlong_penalty(lengths.reshape(3, 3), 100, 20), penalty.reshape(3, 3))
    assert rl_algos.overlong_penalty(lengths, 100, 0).eq(0).all()


def test_examples_in_the_docstrings_are_true():
    assert doctest.testmod(rl_algos, extraglobs={"torch": torch}).failed == 0
