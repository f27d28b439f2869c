"""dyco.py (eq. 1-8): hand-computed numbers, an independent float64 loop, and properties.

These are the equations and DyCo's own rules; all rules and their controls are in test_rules.py.
"""

import doctest
import itertools
import math
import subprocess
import sys

import mpmath
import pytest
import torch
from helpers import ROOT

import dyco

RULES = ["off", "paper", "signed", "centered", "response", *dyco.FORMER_NAMES]
SHIFTS = list(dyco.SHIFTS)
# These need a generator or a group, and have tests of their own.
NOT_IN_THE_LOOP = ("response", "shuffled", "signed_shuffled")
DTYPES = [torch.float32, torch.float64]
F64 = dict(rtol=1e-12, atol=1e-12)  # a few thousand float64 roundings
F32 = dict(rtol=2e-6, atol=2e-6)  # sums of at most 50 terms of size <= pi in float32 (eps 1.2e-7)


def rng(seed):
    return torch.Generator().manual_seed(seed)


def tensor(values, dtype=torch.float64):
    return torch.tensor(values, dtype=dtype)


def close(actual, expected, **tolerance):
    expected = torch.as_tensor(expected, dtype=actual.dtype)
    torch.testing.assert_close(actual, expected, **(tolerance or F64))


# ---------------------------------------------------------------- the independent implementation


def no_reference(kind, name, function):
    """A name that nobody wrote a reference for must not pass for another."""
    return NotImplementedError(
        f"{kind} {name!r} has no reference in tests/test_dyco.py: "
        f"write it as a loop over Python floats in {function}"
    )


def ref_distance(p, q, shift):
    overlap = sum(math.sqrt(a * b) for a, b in zip(p, q, strict=True))
    if shift == "fisher_rao":
        return 2 * math.acos(min(1.0, overlap))
    if shift == "hellinger":
        return math.pi * math.sqrt(max(0.0, 1 - overlap))  # |sqrt p - sqrt q|^2 / 2 = 1 - overlap
    if shift == "l1":
        return math.pi * sum(abs(a - b) for a, b in zip(p, q, strict=True)) / 2
    if shift != "js":
        raise no_reference("shift", shift, "ref_distance")

    def half(x, y):
        return sum(a * math.log2(2 * a / (a + b)) for a, b in zip(x, y, strict=True) if a > 0)

    return math.pi * math.sqrt(max(0.0, (half(p, q) + half(q, p)) / 2))


def ref_signals(rows, masks, shift):
    """rows, masks: T lists of K for one modality -> (masses, shifts)."""
    masses, shifts = [], []
    previous = None
    for row, keep in zip(rows, masks, strict=True):
        kept = [a if k else 0.0 for a, k in zip(row, keep, strict=True)]
        mass = sum(kept)
        within = [a / mass for a in kept] if mass > 0 else None
        moved = ref_distance(previous, within, shift) if previous and within else 0.0
        shifts.append(moved)
        masses.append(mass)
        previous = within
    return masses, shifts


def ref_scores(visual, text, roles, ratio):
    def minmax(masses):
        low, high = min(masses), max(masses)
        return [(a - low) / (high - low) if high > low else 0.0 for a in masses]

    def relative(masses, others):
        totals = [a + b for a, b in zip(masses, others, strict=True)]
        return [a / s if s > 0 else 0.0 for a, s in zip(masses, totals, strict=True)]

    if ratio == "minmax":
        visual, text = minmax(visual), minmax(text)
    elif ratio == "relative":
        visual, text = relative(visual, text), relative(text, visual)
    else:
        raise no_reference("ratio", ratio, "ref_scores")
    scores = []
    for of_visual, of_text, role in zip(visual, text, roles, strict=True):
        scores.append({1: of_visual, -1: of_text, 0: 0.0}[role])
    return scores


def ref_weights(scores):
    total = sum(math.exp(s) for s in scores)
    return [len(scores) * math.exp(s) / total for s in scores]


def ref_advantages(advantages, scores, roles, alpha, rule):
    """One response, lists of floats; the rules that need neither a generator nor a group."""
    if rule == "off":
        return list(advantages)
    if rule == "uniform":
        return [(1 + alpha) * a for a in advantages]
    if rule == "paper":
        weights = ref_weights(scores)
        return [(1 + alpha * w) * a for w, a in zip(weights, advantages, strict=True)]

    active = [t for t, role in enumerate(roles) if role != 0]
    weights = ref_weights([scores[t] for t in active])
    if rule == "signed_uniform":
        weights = [1.0] * len(active)
    elif rule == "centered":
        weights = [w - 1 for w in weights]
    elif rule != "signed":
        raise no_reference("rule", rule, "ref_advantages")
    result = list(advantages)
    for t, weight in zip(active, weights, strict=True):
        sign = math.copysign(1, advantages[t]) if advantages[t] else 0
        result[t] *= 1 + alpha * sign * weight
    return result


def test_what_has_no_reference_is_named():
    for call in (
        lambda: ref_distance([1.0], [1.0], "mine"),
        lambda: ref_scores([0.5], [0.5], [0], "mine"),
        lambda: ref_advantages([1.0], [0.0], [0], 0.2, "mine"),
    ):
        with pytest.raises(NotImplementedError, match="'mine' has no reference.*write it"):
            call()


# ---------------------------------------------------------------- inputs


def attention_case(seed, lengths=(7, 1, 4), keys=12, prompt=5, dtype=torch.float64):
    """Softmax rows: key 0 is a system token, 1-3 the image, 4 the question, then the response."""
    g, B, T = rng(seed), len(lengths), max(lengths)
    visible = torch.arange(keys) < prompt + torch.arange(T)[:, None]  # [T, K]
    logits = 2 * torch.randn(B, T, keys, generator=g, dtype=torch.float64)
    attention = logits.masked_fill(~visible, -math.inf).softmax(-1).to(dtype)
    visual = ((torch.arange(keys) >= 1) & (torch.arange(keys) <= 3)).expand(B, keys)
    text = (visible & (torch.arange(keys) >= 4)).expand(B, T, keys)
    mask = torch.arange(T) < torch.tensor(lengths)[:, None]
    return attention, visual, text, mask


def score_case(seed, lengths=(9, 1, 5, 12), dtype=torch.float64):
    """Roles, scores (0 on neutral tokens, sometimes on others too), advantages of both signs."""
    g, B, T = rng(seed), len(lengths), max(lengths)
    mask = torch.arange(T) < torch.tensor(lengths)[:, None]
    roles = torch.randint(-1, 2, (B, T), generator=g, dtype=torch.int8) * mask
    roles[:, 0] = 0
    scores = (
        torch.rand(B, T, generator=g, dtype=torch.float64)
        * (torch.rand(B, T, generator=g) < 0.8)
        * (roles != 0)
    )
    advantages = torch.randn(B, generator=g, dtype=torch.float64)
    return advantages.to(dtype), scores.to(dtype), roles, mask


def reweight(case, rule, alpha=0.2, seed=0, group_size=None):
    """One generator per row, as the trainer passes them."""
    generators = [rng(1000 * seed + b) for b in range(len(case[0]))]
    if rule == "response" and group_size is None:
        group_size = len(case[0])
    return dyco.reweight_advantages(
        *case, alpha=alpha, rule=rule, generator=generators, group_size=group_size
    )


# ---------------------------------------------------------------- eq. 1-8 by hand


def test_worked_example_of_equations_1_to_8():
    """One response of four tokens, K = 7 keys: system | two image keys | question | o_1 o_2 o_3.

    query      system  image       text (q, o_1, o_2, o_3)   within-modality distributions
    of o_1     .5      .1   .1     .3                        (.5, .5)  (1)
    of o_2     .3      .18  .02    .32 .18                   (.9, .1)  (.64, .36)
    of o_3     .2      .03  .27    .32 .18 0                 (.1, .9)  (.64, .36, 0)
    of o_4     .3      .09  .01    0   .6  0  0              (.9, .1)  (0, 1, 0, 0)

    Overlaps: o_2 image sqrt(.45) + sqrt(.05) = 2/sqrt(5), text sqrt(.64) = .8 (o_1 is zero-padded
    before); o_3 image 2 sqrt(.09) = .6, text 1; o_4 image .6, text sqrt(.36) = .6.
    Shift = 2 arccos(overlap).
    Roles: neutral (first), text (1.287 > .927), visual (1.855 > 0), neutral (both move equally).
    Scores: 0, .5/.7, .3/.8, 0; exp 1, 2.0427, 1.4550, 1; sum 5.4977; weight = 4 exp / sum.
    """
    attention = tensor(
        [
            [
                [0.5, 0.1, 0.1, 0.3, 0, 0, 0],
                [0.3, 0.18, 0.02, 0.32, 0.18, 0, 0],
                [0.2, 0.03, 0.27, 0.32, 0.18, 0, 0],
                [0.3, 0.09, 0.01, 0, 0.6, 0, 0],
            ]
        ]
    )
    visual = torch.tensor([[False, True, True, False, False, False, False]])
    text = (torch.arange(7) >= 3) & (torch.arange(7) <= 3 + torch.arange(4)[:, None])[None]
    mask = torch.ones(1, 4, dtype=torch.bool)
    signals = dyco.attention_signals(attention, visual, text)
    assert signals._fields == ("visual_mass", "text_mass", "visual_shift", "text_shift")
    close(signals.visual_mass, [[0.2, 0.2, 0.3, 0.1]])
    close(signals.text_mass, [[0.3, 0.5, 0.5, 0.6]])
    close(signals.visual_shift, [[0, 0.927295218001612, 1.854590436003225, 1.854590436003225]])
    # An unchanged distribution, whose masses .5 are rounded differently, may move by one rounding.
    close(signals.text_shift, [[0, 1.287002217586569, 0, 1.854590436003225]])

    roles = dyco.assign_roles(signals.visual_shift, signals.text_shift, mask, tau=0.05)
    assert roles.dtype == torch.int8 and roles.tolist() == [[0, -1, 1, 0]]
    scores = dyco.alignment_scores(
        signals.visual_mass, signals.text_mass, roles, mask, ratio="relative"
    )
    close(scores, [[0, 5 / 7, 3 / 8, 0]])
    weights = dyco.token_weights(scores, mask)
    close(weights, [[0.727574540420316, 1.486236209353026, 1.058614709806343, 0.727574540420316]])

    def rule(name):
        return dyco.reweight_advantages(tensor([-1.0]), scores, roles, mask, alpha=0.2, rule=name)

    close(
        rule("paper"),
        [[-1.145514908084063, -1.297247241870605, -1.211722941961269, -1.145514908084063]],
    )
    # two non-neutral tokens: w = 2 * 2.0427 / 3.4977 = 1.1680 and 0.8320, neutral tokens keep -1
    close(rule("signed"), [[-1, -0.766393198412743, -0.833606801587257, -1]])
    close(rule("centered"), [[-1, -0.966393198412743, -1.033606801587257, -1]])
    close(rule("uniform"), [[-1.2, -1.2, -1.2, -1.2]])
    close(rule("signed_uniform"), [[-1, -0.8, -0.8, -1]])
    close(rule("off"), [[-1, -1, -1, -1]])

    # minmax over the response: image (.2, .2, .3, .1): o_3 at 1; text (.3, .5, .5, .6): o_2 at 2/3
    scores = dyco.alignment_scores(
        signals.visual_mass, signals.text_mass, roles, mask, ratio="minmax"
    )
    close(scores, [[0, 2 / 3, 1, 0]])
    weights = dyco.token_weights(scores, mask)
    close(weights, [[0.600058577462072, 1.168754517949721, 1.631128327126134, 0.600058577462072]])


def test_each_shift_by_hand_from_one_hot_to_uniform():
    """p = (1, 0), q = (1/2, 1/2): overlap sqrt(1/2).

    JS = (log2(4/3) + log2(2/3)/2 + 1/2) / 2 = 0.311278.
    """
    attention = tensor([[[1, 0], [0.5, 0.5]]])
    none = torch.zeros(1, 2, 2, dtype=torch.bool)
    expected = dict(
        fisher_rao=math.pi / 2, hellinger=1.700217692370738, js=1.752766940333112, l1=math.pi / 2
    )
    for shift, value in expected.items():
        signals = dyco.attention_signals(
            attention, torch.ones(1, 2, dtype=torch.bool), none, shift=shift
        )
        close(signals.visual_shift, [[0, value]])
        assert signals.text_shift.eq(0).all() and signals.text_mass.eq(0).all()


# ---------------------------------------------------------------- distances


@pytest.mark.parametrize("dtype", DTYPES)
def test_distance_is_exact_at_both_ends(dtype):
    # roundings of pi and of sums of 50 terms
    tolerance = dict(rtol=0, atol=16 * torch.finfo(dtype).eps)
    for seed in range(20):
        p = torch.randn(3, 50, generator=rng(seed), dtype=dtype).softmax(-1)
        assert dyco.fisher_rao_distance(p, p.clone()).eq(0).all()
        left, right = torch.cat([p, 0 * p], -1), torch.cat([0 * p, p], -1)
        close(dyco.fisher_rao_distance(left, right), [math.pi] * 3, **tolerance)
        close(dyco.fisher_rao_distance(left.T, right.T, dim=0), [math.pi] * 3, **tolerance)


def test_distance_is_a_metric():
    for seed in range(50):
        sharpness = 10.0 ** (seed % 4 - 1)  # nearly uniform up to nearly one-hot
        logits = torch.randn(3, 40, 8, generator=rng(seed), dtype=torch.float64)
        p, q, r = (sharpness * logits).softmax(-1)
        d = dyco.fisher_rao_distance
        assert torch.equal(d(p, q), d(q, p))
        assert (d(p, q) >= 0).all()
        assert (d(p, q) <= math.pi + 1e-14).all()  # 1e-14: rounding of values <= pi
        assert (d(p, r) <= d(p, q) + d(q, r) + 1e-14).all()
        overlap = (p * q).sqrt().sum(-1).clamp(max=1)
        # arccos loses half of 16 digits near 1
        close(d(p, q), 2 * overlap.acos(), rtol=0, atol=1e-7)


@pytest.mark.parametrize("dtype, tolerance", [(torch.float32, 1e-6), (torch.float64, 2e-15)])
def test_distance_of_nearly_equal_distributions(dtype, tolerance):
    """Against 60 digits.

    The error of sqrt(p) - sqrt(q) is about eps; arccos in `dtype` would be off by sqrt(eps).
    """
    for exponent, seed in itertools.product(range(1, 7), range(5)):
        logits = torch.randn(2, 6, generator=rng(seed), dtype=torch.float64)
        p = logits[0].softmax(-1).to(dtype)
        q = (logits[0] + 10.0**-exponent * logits[1]).softmax(-1).to(dtype)
        with mpmath.workdps(60):
            exact_p = [mpmath.mpf(x) for x in p.tolist()]
            exact_q = [mpmath.mpf(x) for x in q.tolist()]
            overlap = sum(mpmath.sqrt(a * b) for a, b in zip(exact_p, exact_q, strict=True))
            exact = float(2 * mpmath.acos(overlap / mpmath.sqrt(sum(exact_p) * sum(exact_q))))
        assert abs(dyco.fisher_rao_distance(p, q).item() - exact) <= tolerance, (exponent, seed)


@pytest.mark.parametrize("shift", SHIFTS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_every_shift_is_zero_for_equal_and_pi_for_disjoint(shift, dtype):
    for seed in range(10):
        p = torch.randn(1, 1, 20, generator=rng(seed), dtype=dtype).softmax(-1)
        rows = torch.cat(
            [torch.cat([p, 0 * p], -1), torch.cat([p, 0 * p], -1), torch.cat([0 * p, p], -1)], 1
        )
        everything = torch.ones(1, 3, 40, dtype=torch.bool)
        signals = dyco.attention_signals(rows, everything[:, 0], everything, shift=shift)
        for values in (signals.visual_shift, signals.text_shift):
            assert values[0, 0] == 0
            assert values[0, 1] == 0
            # as above, plus one log
            close(values[0, 2], math.pi, rtol=0, atol=32 * torch.finfo(dtype).eps)
        close_to_p = p * (1 + 1e-6 * torch.rand(p.shape, generator=rng(seed), dtype=dtype))
        nearly = torch.cat([p, close_to_p], 1)
        everything = everything[:, :2, :20]
        signals = dyco.attention_signals(nearly, everything[:, 0], everything, shift=shift)
        # Not NaN: JS is the square root of a difference that rounding can make negative.
        assert 0 <= signals.visual_shift[0, 1] < 2e-3


# ---------------------------------------------------------------- signals


@pytest.mark.parametrize("shift", SHIFTS)
@pytest.mark.parametrize("dtype, tolerance", [(torch.float64, 1e-8), (torch.float32, 2e-5)])
def test_signals_match_the_loop(shift, dtype, tolerance):
    """1e-8: the reference takes arccos.

    2e-5 in float32: JS divides the rounding of a divergence by its root.
    """
    for seed in range(5):
        attention, visual, text, _ = attention_case(seed, dtype=dtype)
        signals = dyco.attention_signals(attention, visual, text, shift=shift)
        assert all(x.dtype == dtype and x.shape == attention.shape[:2] for x in signals)
        for b, rows in enumerate(attention.double().tolist()):
            mass, move = ref_signals(rows, [visual[b].tolist()] * len(rows), shift)
            text_mass, text_move = ref_signals(rows, text[b].tolist(), shift)
            expected = (mass, text_mass, move, text_move)
            for actual, numbers in zip(signals, expected, strict=True):
                close(actual[b], tensor(numbers), rtol=0, atol=tolerance)


def test_shifts_do_not_depend_on_the_scale_of_a_modality():
    """Also for masses of 1e-20: an epsilon in the denominator would show."""
    for seed in range(10):
        attention, visual, text, _ = attention_case(seed, dtype=torch.float32)
        before = dyco.attention_signals(attention, visual, text)
        scale = 10 ** -(20 * torch.rand(2, *attention.shape[:2], 1, generator=rng(seed)))
        scaled = attention * torch.where(visual[:, None], scale[0], scale[1])
        after = dyco.attention_signals(scaled, visual, text)
        close(after.visual_shift, before.visual_shift, **F32)
        close(after.text_shift, before.text_shift, **F32)
        close(after.visual_mass, before.visual_mass * scale[0, ..., 0], rtol=2e-6, atol=0)


def test_text_support_grows_by_one_key_and_the_new_key_is_not_cut_off():
    """Half of the text mass moves to the newest key.

    (1, 0) -> (1/2, 1/2) is pi/2; with the new key cut off, it would be 0.
    """
    attention = tensor([[[0.2, 0.4, 0.4, 0], [0.2, 0.4, 0.4, 0], [0.2, 0.4, 0.2, 0.2]]])
    attention[0, 0, 2] = 0.3  # outside X_1 (hidden key): must count as probability 0 there
    visual = torch.tensor([[True, False, False, False]])
    text = torch.tensor(
        [[[False, True, False, False], [False, True, True, False], [False, True, True, True]]]
    )
    signals = dyco.attention_signals(attention, visual, text)
    # (1, 0) -> (.5, .5): pi/2; then (.5, .5, 0) -> (.5, .25, .25): overlap .5 + sqrt(.125)
    close(signals.text_shift, [[0, math.pi / 2, 2 * math.acos(0.5 + math.sqrt(0.125))]])
    close(signals.text_mass, [[0.4, 0.8, 0.8]])
    # keys may also leave X_t, and count as 0 from then on: disjoint supports are pi apart
    text = torch.tensor([[[1, 1, 0, 0], [0, 0, 1, 1], [0, 1, 1, 0]]], dtype=torch.bool)
    uniform = torch.full((1, 3, 4), 0.25, dtype=torch.float64)
    signals = dyco.attention_signals(uniform, visual & False, text)
    close(signals.text_shift, [[0, math.pi, 2 * math.acos(0.5)]])


@pytest.mark.parametrize("shift", SHIFTS)
def test_empty_modalities_give_zeros_and_no_nan(shift):
    attention, visual, text, mask = attention_case(3)
    no_visual = dyco.attention_signals(attention, visual & False, text, shift=shift)
    assert no_visual.visual_mass.eq(0).all()
    assert no_visual.visual_shift.eq(0).all()
    roles = dyco.assign_roles(no_visual.visual_shift, no_visual.text_shift, mask)
    scores = dyco.alignment_scores(no_visual.visual_mass, no_visual.text_mass, roles, mask)
    assert roles.min() == -1
    assert roles.max() == 0
    assert torch.equal(scores, roles.abs().double())  # text has all of it

    no_text = dyco.attention_signals(attention, visual, text & False, shift=shift)
    assert no_text.text_mass.eq(0).all()
    assert no_text.text_shift.eq(0).all()
    assert no_text.visual_shift[:, 1:].gt(0).all()

    # A row without any attention: shift 0 there and at its successor, in both modalities.
    attention[0, 2] = 0
    gap = dyco.attention_signals(attention, visual, text, shift=shift)
    assert all(torch.isfinite(x).all() for x in gap)
    assert gap.visual_shift[0, 2:4].eq(0).all()
    assert gap.text_shift[0, 2:4].eq(0).all()
    assert gap.text_shift[0, 4] > 0
    nothing = torch.zeros(1, 3, dtype=torch.float64)
    roles = torch.tensor([[0, 1, -1]], dtype=torch.int8)
    for ratio in dyco.RATIOS:
        assert dyco.alignment_scores(nothing, nothing, roles, roles > -2, ratio).eq(0).all()


# ---------------------------------------------------------------- roles, scores, weights


def test_roles_compare_strictly_with_tau_on_both_sides():
    visual = tensor([[1.0, 1.0, 0.5, 0.5, 3.0]])
    text = tensor([[0.5, 0.25, 1.0, 1.25, 0.0]])
    mask = torch.tensor([[True, True, True, True, False]])
    roles = dyco.assign_roles(visual, text, mask, tau=0.5)
    assert roles.tolist() == [[0, 1, 0, -1, 0]]  # 0.5 > 0.5 is false
    assert dyco.assign_roles(visual, visual, mask, tau=0.0).tolist() == [[0, 0, 0, 0, 0]]
    # The default of tau is 0.05.
    assert dyco.assign_roles(tensor([[0.06]]), tensor([[0.0]]), mask[:, :1]).item() == 1
    assert dyco.assign_roles(tensor([[0.04]]), tensor([[0.0]]), mask[:, :1]).item() == 0


@pytest.mark.parametrize("ratio", dyco.RATIOS)
def test_scores_match_the_loop_and_ignore_padding(ratio):
    for seed in range(10):
        _, _, roles, mask = score_case(seed)
        visual, text = torch.rand(2, *mask.shape, generator=rng(seed), dtype=torch.float64)
        # It would win every min and max.
        noise = 100 * torch.randn(mask.shape, generator=rng(seed), dtype=torch.float64)
        noisy = visual.where(mask, noise), text.where(mask, -noise)
        scores = dyco.alignment_scores(*noisy, roles, mask, ratio)
        for b, n in enumerate(mask.sum(1).tolist()):
            response = (x[b, :n].tolist() for x in (visual, text, roles))
            close(scores[b, :n], tensor(ref_scores(*response, ratio)))
            assert scores[b, n:].eq(0).all()


def test_minmax_of_a_constant_or_of_one_token_is_zero():
    roles = torch.tensor([[1, 1, -1], [1, 0, 0]], dtype=torch.int8)
    mask = roles != 0
    visual = tensor([[0.3, 0.3, 0.3], [0.7, 0.1, 0.9]])
    text = tensor([[0.2, 0.4, 0.6], [0.3, 0.1, 0.9]])
    close(dyco.alignment_scores(visual, text, roles, mask, "minmax"), [[0, 0, 1], [0, 0, 0]])


@pytest.mark.parametrize("dtype, tolerance", [(torch.float64, 1e-14), (torch.float32, 2e-6)])
def test_weights_have_mean_one_and_are_a_softmax(dtype, tolerance):
    """Tolerances: 300 roundings of numbers near 1, which average out to about 10 eps."""
    _, scores, _, mask = score_case(1, lengths=(300, 1, 17, 0), dtype=dtype)
    weights = dyco.token_weights(scores, mask)
    assert weights.dtype == dtype and torch.isfinite(weights).all()
    assert weights[~mask].eq(0).all()
    assert weights[1, 0] == 1
    rounding = F32 if dtype == torch.float32 else F64
    for b, n in enumerate((300, 1, 17)):
        assert abs(weights[b, :n].double().mean().item() - 1) < tolerance
        expected = ref_weights(scores[b, :n].tolist())
        close(weights[b, :n], tensor(expected), **rounding)
    assert weights.max() < math.e


def test_first_token_is_neutral_and_a_one_token_response_has_weight_one():
    for seed, ratio in itertools.product(range(5), dyco.RATIOS):
        attention, visual, text, mask = attention_case(seed)
        signals = dyco.attention_signals(attention, visual, text)
        assert signals.visual_shift[:, 0].eq(0).all()
        assert signals.text_shift[:, 0].eq(0).all()
        roles = dyco.assign_roles(signals.visual_shift, signals.text_shift, mask)
        scores = dyco.alignment_scores(signals.visual_mass, signals.text_mass, roles, mask, ratio)
        assert roles[:, 0].eq(0).all()
        assert scores[:, 0].eq(0).all()
        # Row 1 of attention_case has one token.
        assert dyco.token_weights(scores, mask)[1].tolist() == [1] + [0] * 6
        reweighted = dyco.reweight_advantages(tensor([1.0, 2.0, 3.0]), scores, roles, mask)
        close(reweighted[1, 0], 2 * 1.2)


# ---------------------------------------------------------------- rules


@pytest.mark.parametrize("rule", [rule for rule in RULES if rule not in NOT_IN_THE_LOOP])
@pytest.mark.parametrize("alpha", [0.0, 0.2, 1.0])
def test_rules_match_the_loop(rule, alpha):
    for seed in range(10):
        advantages, scores, roles, mask = score_case(seed)
        per_token = torch.randn(mask.shape, generator=rng(seed), dtype=torch.float64)
        # Equal weights are the mean over a response, whose advantage has one sign.
        inputs = (advantages,) if rule == "signed_uniform" else (advantages, per_token)
        for given in inputs:
            result = dyco.reweight_advantages(given, scores, roles, mask, alpha=alpha, rule=rule)
            assert result.shape == mask.shape and result[~mask].eq(0).all()
            token_advantages = given if given.dim() == 2 else given[:, None].expand(mask.shape)
            for b, n in enumerate(mask.sum(1).tolist()):
                response = (x[b, :n].tolist() for x in (token_advantages, scores, roles))
                close(result[b, :n], tensor(ref_advantages(*response, alpha, rule)))


def test_signed_can_turn_a_punishment_into_a_reward_once_alpha_exceeds_one_over_e():
    """Seven tokens with a role score 0, one scores 1: w = 8e / (7 + e) = 2.2377.

    So its advantage is -(1 - 0.5 w) = +0.1188.
    """
    scores = tensor([[0] * 7 + [1]])
    roles = torch.ones(1, 8, dtype=torch.int8)
    case = tensor([-1.0]), scores, roles, roles.bool()
    above = dyco.reweight_advantages(*case, alpha=0.5, rule="signed")
    close(above[0, 7], 0.118832269506250)
    assert above[0, :7].lt(0).all()
    below = dyco.reweight_advantages(*case, alpha=1 / math.e, rule="signed")
    assert below.lt(0).all()


@pytest.mark.parametrize("rule, base", [("shuffled", "paper"), ("signed_shuffled", "signed")])
def test_shuffled_rules_permute_the_scores_of_each_response(rule, base):
    advantages, scores, roles, mask = case = score_case(4, lengths=(12, 1, 6, 9))
    movable = mask if rule == "shuffled" else mask & (roles != 0)
    expected = reweight(case, base)
    orders = set()
    for seed in range(30):
        result = reweight(case, rule, seed=seed)
        assert torch.equal(result, reweight(case, rule, seed=seed))
        assert result[~mask].eq(0).all()
        for b in range(len(advantages)):
            close(result[b][movable[b]].sort().values, expected[b][movable[b]].sort().values)
            untouched = result[b][mask[b] & ~movable[b]]
            close(untouched, advantages[b].expand(len(untouched)))
        orders.add(tuple(result[0].tolist()))
    # 12 tokens, a dozen distinct values at most: 30 seeds that often agree would permute nothing.
    assert len(orders) > 20
    # one generator for the whole batch is accepted as well, and reproducible
    first, second = (dyco.reweight_advantages(*case, rule=rule, generator=rng(5)) for _ in range(2))
    assert torch.equal(first, second)
    close(first[0][movable[0]].sort().values, expected[0][movable[0]].sort().values)


def test_shuffled_sends_the_top_score_to_every_token():
    """Neutral tokens included.

    300 draws over 5 tokens with fixed seeds: 60 expected each, standard deviation 6.9.
    """
    scores = tensor([[0, 0, 1, 0, 0]])
    roles = torch.tensor([[0, 0, 1, 0, 0]], dtype=torch.int8)
    mask = torch.ones(1, 5, dtype=torch.bool)
    case = tensor([1.0]), scores, roles, mask
    hits = [reweight(case, "shuffled", seed=s)[0].argmax() for s in range(300)]
    counts = torch.stack(hits).bincount(minlength=5)
    assert counts.min() > 30 and counts.max() < 95


def test_response_rule_by_hand_and_by_group():
    """Group 1 scores (.2 + .4)/2 = .3 and .7: z = -+1/sqrt(2), with the unbiased std.

    The factor is 1 -+ .2 tanh(z) = 1 -+ .1217717. Group 2: no token with a role (score 0) against
    .5 gives the same factors.
    """
    scores = tensor([[0, 0.2, 0.4], [0, 0.7, 0], [0, 0, 0], [0.5, 0.5, 0.5]])
    roles = torch.tensor([[0, 1, -1], [0, -1, 0], [0, 0, 0], [1, 1, 1]], dtype=torch.int8)
    mask = torch.tensor([[1, 1, 1], [1, 1, 0], [1, 1, 1], [1, 1, 1]], dtype=torch.bool)
    advantages = tensor([1.0, -1.0, 2.0, -2.0])
    result = dyco.reweight_advantages(
        advantages, scores, roles, mask, alpha=0.2, rule="response", group_size=2
    )
    low, high = 1 - 0.121771776, 1 + 0.121771776
    expected = advantages[:, None] * tensor([low, high, low, high])[:, None] * mask
    # It leaves room for a small constant (1e-4) beside the std.
    close(result, expected, rtol=0, atol=1e-4)


@pytest.mark.parametrize("dtype", DTYPES)
def test_response_rule_leaves_a_group_of_equal_scores_alone(dtype):
    """The mean of n equal scores differs from the score by a rounding.

    A z-score would blow that up to +-1.
    """
    for value, n in itertools.product((0.0, 0.1, 0.3, 0.7, 0.85), range(2, 12)):
        mask = torch.arange(n) < torch.tensor([1, n, n - 1, max(1, n // 2)])[:, None]
        scores = torch.full((4, n), value, dtype=dtype) * mask
        case = torch.ones(4, dtype=dtype), scores, mask.to(torch.int8), mask
        close(reweight(case, "response"), mask.to(dtype), **F32)


@pytest.mark.parametrize("rule", RULES)
def test_all_neutral_response_and_zero_advantage(rule):
    advantages, scores, roles, mask = score_case(6)
    # Shuffling changes nothing where all scores are equal.
    base = {"shuffled": "paper", "signed_shuffled": "signed", "response": "off"}.get(rule, rule)
    factor = ref_advantages([1.0, 1.0], [0.0, 0.0], [0, 0], 0.2, base)[0]
    neutral = reweight((advantages, 0 * scores, 0 * roles, mask), rule)
    close(neutral, factor * advantages[:, None] * mask)
    assert reweight((0 * advantages, scores, roles, mask), rule).eq(0).all()
    assert torch.isfinite(reweight((advantages, scores, roles, mask & False), rule)).all()


# ---------------------------------------------------------------- invariances and contracts


@pytest.mark.parametrize("rule", RULES)
def test_padding_and_batch_neighbours_do_not_matter(rule):
    """Garbage (every other time NaN) after the end, another padded length, other rows beside.

    The same rows come out, up to summation order.
    """

    def run(attention, visual, text, mask, advantages, rows, ratio):
        signals = dyco.attention_signals(attention, visual, text)
        roles = dyco.assign_roles(signals.visual_shift, signals.text_shift, mask)
        scores = dyco.alignment_scores(signals.visual_mass, signals.text_mass, roles, mask, ratio)
        return dyco.reweight_advantages(
            advantages,
            scores,
            roles,
            mask,
            rule=rule,
            generator=[rng(b) for b in rows],
            group_size=2,
        )

    for seed, ratio in itertools.product(range(4), dyco.RATIOS):
        attention, visual, text, mask = attention_case(seed, lengths=(7, 1, 4, 5))
        advantages = torch.randn(4, generator=rng(seed), dtype=torch.float64)
        whole = run(attention, visual, text, mask, advantages, range(4), ratio)
        # Padded tokens: garbage attention and masks. Padded keys on the left: hidden, but garbage.
        g = rng(seed + 100)
        attention = torch.nn.functional.pad(attention, (2, 0, 0, 3))
        text = torch.nn.functional.pad(text, (2, 0, 0, 3))
        visual = torch.nn.functional.pad(visual, (2, 0))
        mask = torch.nn.functional.pad(mask, (0, 3))
        garbage = torch.rand(attention.shape, generator=g, dtype=torch.float64)
        garbage *= math.nan if seed % 2 else 5
        hidden = ~mask[..., None] | (torch.arange(attention.shape[-1]) < 2)
        attention = attention.where(~hidden, garbage)
        text = text.where(mask[..., None], torch.rand(text.shape, generator=g) < 0.5)
        padded = run(attention, visual, text, mask, advantages, range(4), ratio)
        close(padded[:, :7], whole)
        assert padded[:, 7:].eq(0).all()
        for rows in ((2, 3), (2, 3, 0, 1)):  # whole groups of two, alone and in another order
            i = list(rows)
            part = run(attention[i], visual[i], text[i], mask[i], advantages[i], rows, ratio)
            close(part, padded[i])


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("garbage", [50.0, math.inf, math.nan])
def test_reweighting_ignores_what_stands_on_padding_and_its_side(rule, garbage):
    advantages, scores, roles, mask = case = score_case(8)
    clean = reweight(case, rule)
    garbage = garbage * torch.randn(mask.shape, generator=rng(9), dtype=torch.float64)
    token_advantages = advantages[:, None].expand(mask.shape).where(mask, garbage)
    dirty = (
        token_advantages,
        scores.where(mask, garbage),
        roles.where(mask, torch.ones_like(roles)),
        mask,
    )
    close(reweight(dirty, rule), clean)
    # Left padding: the same tokens at the end of the row.
    for b, n in enumerate(mask.sum(1).tolist()):
        dirty = tuple(torch.cat([x[:b], x[b : b + 1].roll(-n, 1), x[b + 1 :]]) for x in dirty)
    left = reweight(dirty, rule)
    for b, n in enumerate(mask.sum(1).tolist()):
        close(left[b, mask.shape[1] - n :], clean[b, :n])
        assert left[b, : mask.shape[1] - n].eq(0).all()


def test_no_gradient_flows_through_scores_or_weights():
    attention, visual, text, mask = attention_case(0)
    signals = dyco.attention_signals(attention.requires_grad_(), visual, text)
    roles = dyco.assign_roles(signals.visual_shift, signals.text_shift, mask)
    masses = [mass.clone().requires_grad_() for mass in signals[:2]]
    for ratio in dyco.RATIOS:
        scores = dyco.alignment_scores(*masses, roles, mask, ratio)
        assert not any(x.requires_grad for x in (*signals, scores))
    leaf = scores.clone().requires_grad_()
    assert not dyco.token_weights(leaf, mask).requires_grad
    for rule in RULES:
        result = reweight((tensor([1.0, -1.0, 0.5]), leaf, roles, mask), rule)
        assert not result.requires_grad, rule


@pytest.mark.parametrize(
    "dtype, out",
    [
        (torch.bfloat16, torch.float32),
        (torch.float16, torch.float32),
        (torch.float32, torch.float32),
        (torch.float64, torch.float64),
    ],
)
def test_dtypes_are_kept_but_never_below_float32(dtype, out):
    """Half precision in gives exactly what the same numbers in float32 give."""
    attention, visual, text, mask = attention_case(2, dtype=dtype)
    upcast = attention.to(out)
    for shift in SHIFTS:
        signals = [dyco.attention_signals(x, visual, text, shift) for x in (attention, upcast)]
        for low, high in zip(*signals, strict=True):
            assert low.dtype == out
            assert torch.equal(low, high)
    distance = dyco.fisher_rao_distance(attention[:, 1], attention[:, 2])
    assert distance.dtype == out
    assert torch.equal(distance, dyco.fisher_rao_distance(upcast[:, 1], upcast[:, 2]))
    advantages, scores, roles, mask = score_case(2, dtype=dtype)
    for ratio in dyco.RATIOS:
        assert dyco.alignment_scores(scores, scores, roles, mask, ratio).dtype == out
    assert torch.equal(dyco.token_weights(scores, mask), dyco.token_weights(scores.to(out), mask))
    for rule in RULES:
        low = reweight((advantages, scores, roles, mask), rule)
        high = reweight((advantages.to(out), scores.to(out), roles, mask), rule)
        assert low.dtype == out, rule
        assert torch.equal(low, high), rule


def test_unknown_choices_are_named_and_missing_arguments_refused():
    advantages, scores, roles, mask = score_case(0)
    attention, visual, text, _ = attention_case(0)
    for call, choices in [
        (
            lambda: dyco.reweight_advantages(advantages, scores, roles, mask, rule="papr"),
            dyco.RULES,
        ),
        (
            lambda: dyco.alignment_scores(scores, scores, roles, mask, ratio="relativ"),
            ["relative", "minmax"],
        ),
        (lambda: dyco.attention_signals(attention, visual, text, shift="fisher"), SHIFTS),
    ]:
        with pytest.raises(ValueError) as error:
            call()
        assert all(name in str(error.value) for name in choices)
    for rule in ("shuffled", "signed_shuffled", "response"):
        with pytest.raises(ValueError):
            dyco.reweight_advantages(advantages, scores, roles, mask, rule=rule)


# ---------------------------------------------------------------- the registry and the example


def numbers_of_the_readme(label: str) -> list[float]:
    """A row of the README's table of four tokens."""
    lines = (ROOT / "README.md").read_text(encoding="utf-8").splitlines()
    (row,) = (line for line in lines if line.startswith(f"| {label} |"))
    cells = row.strip("|").split("|")[1:]
    return [float(cell.strip().replace("−", "-")) for cell in cells]


def test_the_worked_example_is_the_readmes():
    """`python dyco.py` prints the numbers that the README shows, in 100 columns."""
    command = [sys.executable, "dyco.py"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, encoding="utf-8", timeout=120)
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    assert max(map(len, lines)) <= 100
    tokens = [line.split() for line in lines[-4:]]
    assert [token[0] for token in tokens] == ["1", "2", "3", "4"]

    def column(place: int) -> list[float]:
        return [float(token[place]) for token in tokens]

    # token, two masses, two shifts, role, score, weight, advantage if Â = +1, and if Â = −1
    assert [token[5] for token in tokens] == ["neutral", "visual", "text", "neutral"]
    assert column(6) == numbers_of_the_readme("score s") == [0, 0.5, 0.75, 0]
    assert column(7) == numbers_of_the_readme("weight w") == [0.69, 1.14, 1.47, 0.69]
    of_wrong = numbers_of_the_readme("token advantage")
    assert column(9) == of_wrong == [-1.14, -1.23, -1.29, -1.14]
    assert column(8) == [-advantage for advantage in of_wrong]


def test_examples_in_the_docstrings_are_true():
    assert doctest.testmod(dyco, extraglobs={"torch": torch}).failed == 0
