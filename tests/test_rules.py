"""The rules of token credit and their controls: numbers by hand, an independent loop, properties.

A new rule is tested here as soon as it is in dyco.RULES. It needs a reference, see ref_factors.
"""

import itertools
import math
from fractions import Fraction

import pytest
import torch

import dyco
from config import ConfigError, load_config, load_run_config

ALPHA = 0.2
F64 = dict(rtol=1e-12, atol=1e-12)  # a few thousand roundings of float64
LN2 = math.log(2)
TOKENWISE = ("scores", "roles", "logprobs", "entropy", "blind_logprobs", "image_similarity")


def rng(seed):
    return torch.Generator().manual_seed(seed)


def padded(rows, dtype=torch.float64):
    """Lists of different lengths -> [B, T]."""
    width = max(len(row) for row in rows)
    return torch.tensor([row + [0] * (width - len(row)) for row in rows], dtype=dtype)


def factors_of(rule, lengths, advantages=None, **given):
    """What the rule multiplies Â by, as lists without padding; rows of `given` are lists."""
    rows = len(lengths)
    mask = torch.arange(max(lengths)) < torch.tensor(lengths)[:, None]
    advantages = torch.tensor(advantages or [1.0] * rows, dtype=torch.float64)
    nothing = torch.zeros(mask.shape, dtype=torch.float64)
    for name, values in given.items():
        if name == "rewards":
            given[name] = torch.tensor(values, dtype=torch.float64)
        else:
            dtype = torch.long if name == "tokens" else torch.float64
            given[name] = padded(values, dtype)
    result = dyco.reweight_advantages(
        advantages, nothing, nothing.to(torch.int8), mask, rule=rule, group_size=rows, **given
    )
    factors = result / advantages[:, None]
    return [factors[row, :length].tolist() for row, length in enumerate(lengths)]


def close(actual, expected):
    for mine, theirs in zip(actual, expected, strict=True):
        assert mine == pytest.approx(theirs, abs=1e-5)


# ---------------------------------------------------------------- by hand


def test_entropy_by_hand():
    """Five tokens, of which one is kept: the first of two equal ones. 5 / 1 = 5."""
    entropy = [[0.1, 0.9, 0.5], [0.9, 0.2]]
    close(factors_of("entropy", [3, 2], entropy=entropy), [[0, 5, 0], [0, 0]])


def test_shares_are_rounded_up_exactly():
    """⌈0.2 · 35⌉ is 7. In floating point 0.2 · 35 is a little more than 7."""
    (factors,) = factors_of("entropy", [35], entropy=[[float(i) for i in range(35)]])
    assert sum(factor > 0 for factor in factors) == 7
    assert factors[-1] == pytest.approx(5)


def test_vppo_by_hand():
    """d = ln 2, 0, −ln 2: k3 = 2 − ln 2 − 1 = 0.306853, 0, ½ + ln 2 − 1 = 0.193147; mean 1/6.

    ⌈0.4 · 3⌉ = 2 tokens are kept. The second response does not depend on the image: of its two
    equal tokens the first is kept. Over responses the means become 1 and 0, whose mean is ½:
    f = 0.9 + 0.1 / ½ = 1.1 and 0.9.
    """
    logprobs = [[-1.0, -1.0, -1.0], [-1.0, -1.0]]
    blind = [[-1 + LN2, -1.0, -1 - LN2], [-1.0, -1.0]]
    factors = factors_of("vppo", [3, 2], logprobs=logprobs, blind_logprobs=blind)
    close(factors, [[1.1, 0, 1.1], [0.9, 0]])
    # Two responses that depend on the image equally: f = 1.
    twice = {"logprobs": logprobs[:1] * 2, "blind_logprobs": blind[:1] * 2}
    close(factors_of("vppo", [3, 3], **twice), [[1, 0, 1], [1, 0, 1]])


def test_pgpo_by_hand():
    """k3 as above. log(1 + k3) = 0.267622, 0, 0.176594, by minmax 1, 0, 0.659864.

    w = 1 + 2 = 3, 0 and 1 + 2 · 0.259864 / 0.6 = 1.866213; their mean is 1.622071. A response that
    does not depend on the image keeps Â. Below the threshold, w = I / 0.4.
    """
    logprobs = [[-1.0, -1.0, -1.0], [-1.0, -1.0]]
    blind = [[-1 + LN2, -1.0, -1 - LN2], [-1.0, -1.0]]
    factors = factors_of("pgpo", [3, 2], logprobs=logprobs, blind_logprobs=blind)
    close(factors, [[1.849487, 0, 1.150513], [1, 1]])
    # d = 20 (where it is held), 1, 0: log(1 + e^d − 1 − d) = log(e^20 − 20) = 20, log(e − 1)
    # = 0.541325: I = 1, 0.0270662, 0; w = 3, 0.0676656, 0; their mean is 1.0225552.
    held = {"logprobs": [[-30.0, -2.0, -1.0]], "blind_logprobs": [[-1.0, -1.0, -1.0]]}
    close(factors_of("pgpo", [3], **held), [[2.933827, 0.066173, 0]])


def test_tor_by_hand():
    """Five tokens, ⌈1.5⌉ = 2 of each kind. A token that is of both counts 1."""
    factors = factors_of(
        "tor",
        [3, 2],
        entropy=[[0.1, 0.9, 0.5], [0.9, 0.2]],
        logprobs=[[-1.0, -1.0, -1.0], [-1.0, -1.0]],
        blind_logprobs=[[-1.0, -3.0, -1.5], [-1.0, -0.2]],
    )
    close(factors, [[0, 1, 0], [1, 0.5]])


def test_vgpo_by_hand():
    """minmax 0, 1, ½ with the mean ½. Of twenty tokens a single low one has 1 − 0.95, held at 0.1;
    the others have 1.05."""
    close(factors_of("vgpo", [3], image_similarity=[[0.2, 0.4, 0.3]]), [[0.5, 1.5, 1]])
    low = [[-0.5] + [0.5] * 19]
    close(factors_of("vgpo", [20], image_similarity=low), [[0.1] + [1.05] * 19])
    close(factors_of("vgpo", [2], image_similarity=[[0.7, 0.7]]), [[1, 1]])


def test_surprise_by_hand():
    """s = ½ and 0. w = 2 √e / (√e + 1) = 1.244919 and 0.755081."""
    close(factors_of("surprise", [2], logprobs=[[-LN2, 0.0]]), [[1.248984, 1.151016]])


def eq_8(scores):
    exponentials = [math.exp(score) for score in scores]
    total = sum(exponentials)
    return [1 + ALPHA * len(scores) * x / total for x in exponentials]


def test_siblings_by_hand():
    """Four responses, two of them right: their mean is ½. Those that begin with 1 are worth ⅔.

    The first goes ½ → ⅔ → ½ → 1, the second ½ → ⅔ → ½ → 0, the third ½ → ⅔ → 1, the last ½ → 0.
    """
    factors = factors_of(
        "siblings",
        [3, 3, 2, 1],
        advantages=[1.0, -1.0, 1.0, -1.0],
        tokens=[[1, 2, 3], [1, 2, 4], [1, 5], [6]],
        rewards=[1.0, 0.0, 1.0, 0.0],
    )
    scores = [[0.5, 0, 1.5], [0, 0.5, 1.5], [0.5, 1], [1.5]]
    close(factors, [eq_8(row) for row in scores])


def test_siblings_in_units_of_the_groups_spread_and_without_one():
    settings = {"tokens": [[1, 2], [1, 3]], "advantages": [1.0, -1.0]}
    wide = factors_of("siblings", [2, 2], rewards=[10.0, 0.0], **settings)
    close(wide, [eq_8([0, 1.5]), eq_8([0, 1.5])])
    equal = factors_of("siblings", [2, 2], rewards=[1.0, 1.0], **settings)
    close(equal, [[1.2, 1.2]] * 2)


def test_phrases_by_hand():
    """Both hold "1 2", at other places: its worth is ½. What follows makes it 1 and 0.

    The first tokens follow two places before the response, which both hold, too.
    """
    factors = factors_of(
        "phrases",
        [4, 5],
        advantages=[1.0, -1.0],
        tokens=[[7, 1, 2, 3], [8, 9, 1, 2, 4]],
        rewards=[1.0, 0.0],
    )
    close(factors, [eq_8([1.5, 0, 0, 1.5]), eq_8([1.5, 0, 0, 0, 1.5])])


# ---------------------------------------------------------------- the independent implementation


def batch(seed, group_size=3, groups=2, dtype=torch.float64):
    """Everything that a rule may need, with many ties. -> (advantages, mask, given)"""
    g = rng(seed)
    lengths = torch.randint(1, 9, (groups * group_size,), generator=g)
    lengths[0], lengths[1] = 8, 1
    mask = torch.arange(8) < lengths[:, None]

    def drawn(steps):
        return torch.randint(0, steps + 1, mask.shape, generator=g) / torch.tensor(float(steps))

    roles = torch.randint(-1, 2, mask.shape, generator=g, dtype=torch.int8)
    given = {
        "scores": (drawn(50).to(dtype) * (roles != 0)),
        "roles": roles,
        "logprobs": -drawn(20).to(dtype) * 3,
        "entropy": drawn(6).to(dtype),
        "blind_logprobs": -drawn(20).to(dtype) * 4,
        "image_similarity": drawn(30).to(dtype) - 0.5,
        "tokens": torch.randint(0, 3, mask.shape, generator=g),
        "rewards": torch.randint(0, 3, (len(lengths),), generator=g).to(dtype),
    }
    advantages = torch.randn(len(lengths), generator=g, dtype=torch.float64).to(dtype)
    return advantages, mask, given


def reweight(advantages, mask, given, rule, control="none", seed=0, group_size=3, rows=None):
    """rows: whose generators the responses have."""
    generators = [rng(1000 * seed + row) for row in rows or range(len(mask))]
    return dyco.reweight_advantages(
        advantages,
        mask=mask,
        rule=rule,
        generator=generators,
        group_size=group_size,
        control=control,
        **given,
    )


def highest(values, percent):
    """The places of the ⌈percent / 100 · n⌉ highest, of equal ones the first."""
    count = math.ceil(Fraction(percent, 100) * len(values))
    order = sorted(range(len(values)), key=lambda place: (-values[place], place))
    return set(order[:count])


def minmax(values):
    low, high = min(values), max(values)
    return [(v - low) / (high - low) if high > low else 0.0 for v in values]


def blindness(row):
    pairs = zip(row["blind_logprobs"], row["logprobs"], strict=True)
    differences = [min(20, max(-20, blind - seeing)) for blind, seeing in pairs]
    return [math.exp(d) - d - 1 for d in differences]


def weights(scores):
    total = sum(math.exp(score) for score in scores)
    return [len(scores) * math.exp(score) / total for score in scores]


def mean(values):
    return sum(values) / len(values)


def worth_of_prefix(group, tokens, length):
    alike = [row["reward"] for row in group if row["tokens"][:length] == tokens[:length]]
    return mean(alike)


def holds(row, phrase):
    """Whether a response holds a phrase; two places before it count as −1."""
    tokens = [-1, -1, *row["tokens"]]
    ends = 0 if len(phrase) == 3 else 1  # a beginning must have a token behind it
    pieces = [tokens[i : i + len(phrase)] for i in range(len(tokens) - len(phrase) + 1 - ends)]
    return phrase in pieces


def worth_of_phrase(group, phrase):
    return mean([row["reward"] for row in group if holds(row, phrase)])


def change(rule, group, row, t):
    tokens = row["tokens"]
    if rule == "siblings":
        return worth_of_prefix(group, tokens, t + 1) - worth_of_prefix(group, tokens, t)
    phrase = [-1, -1, *tokens][t : t + 3]
    return worth_of_phrase(group, phrase) - worth_of_phrase(group, phrase[:2])


def ref_scores_of_change(rule, rows, index, group_size):
    first = index // group_size * group_size
    group = rows[first : first + group_size]
    rewards = [row["reward"] for row in group]
    spread = max(rewards) - min(rewards)
    row = rows[index]
    if spread == 0 or row["advantage"] == 0:
        return [0.0] * len(row["tokens"])
    sign = math.copysign(1, row["advantage"])
    changes = [change(rule, group, row, t) for t in range(len(row["tokens"]))]
    return [3 * max(0.0, sign * c) / spread for c in changes]


def ref_response(rows, index, group_size):
    def mean_score(row):
        scores = [s for s, role in zip(row["scores"], row["roles"], strict=True) if role]
        return mean(scores) if scores else 0.0

    first = index // group_size * group_size
    means = [mean_score(row) for row in rows[first : first + group_size]]
    middle = mean(means)
    deviation = math.sqrt(sum((m - middle) ** 2 for m in means) / (group_size - 1))
    z = (means[index - first] - middle) / deviation if deviation > 1e-9 else 0.0
    return [1 + ALPHA * math.tanh(z)] * len(rows[index]["tokens"])


def ref_vppo(rows, index):
    dependence = [[min(10, s) for s in blindness(row)] for row in rows]
    height = minmax([mean(row) for row in dependence])
    f = 0.9 + 0.1 * height[index] / mean(height) if any(height) else 1.0
    kept = highest(dependence[index], 40)
    return [f if t in kept else 0.0 for t in range(len(dependence[index]))]


def ref_pgpo(row):
    intensities = minmax([math.log(1 + s) for s in blindness(row)])
    w = [i / 0.4 if i < 0.4 else 1 + 2 * (i - 0.4) / 0.6 for i in intensities]
    return [len(w) * x / sum(w) for x in w] if sum(w) else [1.0] * len(w)


def over_batch(rows, values):
    """[(row, token)] of all tokens, and the values at them."""
    places = [(b, t) for b, row in enumerate(rows) for t in range(len(row["tokens"]))]
    return places, [values(rows[b])[t] for b, t in places]


def kept_of_batch(rows, values, percent):
    places, flat = over_batch(rows, values)
    return {places[place] for place in highest(flat, percent)}, len(places)


def ref_factors(rule, rows, index, group_size):
    """The factors of one response among others, by loops over Python floats."""
    row = rows[index]
    count = len(row["tokens"])
    sign = math.copysign(1, row["advantage"])
    active = [t for t in range(count) if row["roles"][t]]
    if rule == "off":
        return [1.0] * count
    if rule == "paper":
        return [1 + ALPHA * w for w in weights(row["scores"])]
    if rule in ("signed", "centered"):
        less = 1 if rule == "centered" else 0
        of_active = weights([row["scores"][t] for t in active])
        factors = [1.0] * count
        for t, w in zip(active, of_active, strict=True):
            factors[t] = 1 + ALPHA * sign * (w - less)
        return factors
    if rule == "response":
        return ref_response(rows, index, group_size)
    if rule == "entropy":
        kept, total = kept_of_batch(rows, lambda row: row["entropy"], 20)
        return [total / len(kept) if (index, t) in kept else 0.0 for t in range(count)]
    if rule == "vppo":
        return ref_vppo(rows, index)
    if rule == "pgpo":
        return ref_pgpo(row)
    if rule == "tor":
        uncertain, _ = kept_of_batch(rows, lambda row: row["entropy"], 30)
        looking, _ = kept_of_batch(rows, absolute_change, 30)
        places = [(index, t) for t in range(count)]
        return [1.0 if p in uncertain else 0.5 if p in looking else 0.0 for p in places]
    if rule == "vgpo":
        similar = minmax(row["image_similarity"])
        return [min(2, max(0.1, 1 + s - mean(similar))) for s in similar]
    if rule == "surprise":
        return [1 + ALPHA * w for w in weights([1 - math.exp(x) for x in row["logprobs"]])]
    if rule in ("siblings", "phrases"):
        scores = ref_scores_of_change(rule, rows, index, group_size)
        return [1 + ALPHA * w for w in weights(scores)]
    raise NotImplementedError(
        f"rule {rule!r} has no reference in tests/test_rules.py: "
        "write it as a loop over Python floats in ref_factors"
    )


def absolute_change(row):
    pairs = zip(row["blind_logprobs"], row["logprobs"], strict=True)
    return [abs(blind - seeing) for blind, seeing in pairs]


def as_rows(advantages, mask, given):
    rows = []
    for b in range(len(mask)):
        row = {
            name: values[b][mask[b]].tolist() for name, values in given.items() if values.dim() > 1
        }
        rows.append(
            {**row, "reward": float(given["rewards"][b]), "advantage": float(advantages[b])}
        )
    return rows


@pytest.mark.parametrize("rule", dyco.RULES)
def test_rules_match_the_loop(rule):
    for seed in range(25):
        advantages, mask, given = batch(seed)
        result = reweight(advantages, mask, given, rule)
        assert result.shape == mask.shape
        assert result[~mask].eq(0).all()
        rows = as_rows(advantages, mask, given)
        for b in range(len(rows)):
            expected = ref_factors(rule, rows, b, group_size=3)
            expected = torch.tensor(expected, dtype=torch.float64) * advantages[b]
            torch.testing.assert_close(result[b][mask[b]], expected, rtol=1e-9, atol=1e-9)


def test_a_rule_without_a_reference_is_named():
    rows = as_rows(*batch(0))
    with pytest.raises(NotImplementedError, match="'mine' has no reference.*write it"):
        ref_factors("mine", rows, 0, group_size=3)


# ---------------------------------------------------------------- controls


MOVABLE = ("signed", "centered")  # their controls touch the tokens with a role alone


def movable(rule, mask, given):
    """The tokens that a control of the rule touches."""
    if rule in MOVABLE:
        return mask & (given["roles"] != 0)
    if dyco.RULES[rule].among is not dyco.RULES["off"].among:
        raise NotImplementedError(f"{rule!r} has an `among` of its own: repeat it here")
    return mask


@pytest.mark.parametrize("rule", dyco.RULES)
def test_shuffled_moves_the_factors_of_each_response_as_its_generator_says(rule):
    for seed in range(5):
        advantages, mask, given = case = batch(seed)
        factors = reweight(*case, rule) / advantages[:, None]
        shuffled = reweight(*case, rule, control="shuffled", seed=seed) / advantages[:, None]
        moves = movable(rule, mask, given)
        for b in range(len(mask)):
            places = moves[b].nonzero().squeeze(-1)
            order = torch.randperm(len(places), generator=rng(1000 * seed + b))
            expected = factors[b].clone()
            expected[places] = factors[b][places[order]]
            torch.testing.assert_close(shuffled[b], expected, **F64)


@pytest.mark.parametrize("rule", dyco.RULES)
def test_uniform_gives_each_response_its_mean_factor(rule):
    advantages, mask, given = case = batch(3)
    factors = reweight(*case, rule) / advantages[:, None]
    uniform = reweight(*case, rule, control="uniform") / advantages[:, None]
    moves = movable(rule, mask, given)
    for b in range(len(mask)):
        expected = factors[b].clone()
        if moves[b].any():
            expected[moves[b]] = factors[b][moves[b]].mean()
        torch.testing.assert_close(uniform[b], expected, **F64)


def test_shuffled_by_one_generator_for_all_is_reproducible():
    advantages, mask, given = batch(1)

    def shuffled(seed):
        return dyco.reweight_advantages(
            advantages, mask=mask, generator=rng(seed), control="shuffled", **given
        )

    assert torch.equal(shuffled(5), shuffled(5))
    assert not torch.equal(shuffled(5), shuffled(6))


@pytest.mark.parametrize("former, now", dyco.FORMER_NAMES.items())
def test_former_names_mean_rule_and_control(former, now):
    case = batch(2)
    rule, control = now
    assert torch.equal(reweight(*case, former), reweight(*case, rule, control=control))
    with pytest.raises(ConfigError, match=f"dyco.rule={rule} dyco.control={control}"):
        load_config(overrides=[f"dyco.rule={former}"])


# ---------------------------------------------------------------- properties of all of them

ALL = list(itertools.product(dyco.RULES, dyco.CONTROLS))


def with_garbage(mask, values, garbage):
    if not values.is_floating_point():
        return values.where(mask, torch.full_like(values, 1))
    noise = garbage * torch.randn(mask.shape, generator=rng(9), dtype=values.dtype)
    return values.where(mask, noise)


@pytest.mark.parametrize("rule, control", ALL)
@pytest.mark.parametrize("garbage", [50.0, math.inf, math.nan])
def test_what_stands_on_padding_does_not_matter(rule, control, garbage):
    advantages, mask, given = batch(4)
    clean = reweight(advantages, mask, given, rule, control)
    wider = torch.nn.functional.pad(mask, (0, 3))
    dirty = {"rewards": given["rewards"]}
    for name in (*TOKENWISE, "tokens"):
        values = torch.nn.functional.pad(given[name], (0, 3))
        dirty[name] = with_garbage(wider, values, garbage)
    of_tokens = torch.nn.functional.pad(advantages[:, None].expand(mask.shape), (0, 3))
    of_tokens = with_garbage(wider, of_tokens, garbage)
    result = reweight(of_tokens, wider, dirty, rule, control)
    torch.testing.assert_close(result[:, : mask.shape[1]], clean, **F64)
    assert result[:, mask.shape[1] :].eq(0).all()


@pytest.mark.parametrize("rule, control", ALL)
def test_whole_groups_may_change_places_and_most_rules_need_no_others(rule, control):
    advantages, mask, given = batch(5)
    swapped = [3, 4, 5, 0, 1, 2]
    parts = [[3, 4, 5]] if not dyco.RULES[rule].over_batch else []
    # Where tokens of the batch are equal, the earlier rows are taken: no ties here.
    for name in ("entropy", "logprobs", "blind_logprobs"):
        given[name] = given[name] + torch.rand(mask.shape, generator=rng(6), dtype=torch.float64)
    whole = reweight(advantages, mask, given, rule, control)
    for rows in (swapped, *parts):
        some = {name: values[rows] for name, values in given.items()}
        result = reweight(advantages[rows], mask[rows], some, rule, control, rows=rows)
        torch.testing.assert_close(result, whole[rows], **F64)


@pytest.mark.parametrize("rule, control", ALL)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64])
def test_dtypes_are_kept_but_never_below_float32(rule, control, dtype):
    advantages, mask, given = batch(7, dtype=dtype)
    out = torch.promote_types(dtype, torch.float32)
    exact = {
        name: values.to(out) if values.is_floating_point() else values
        for name, values in given.items()
    }
    low = reweight(advantages, mask, given, rule, control)
    assert low.dtype == out
    assert torch.equal(low, reweight(advantages.to(out), mask, exact, rule, control))


@pytest.mark.parametrize("rule, control", ALL)
def test_no_advantage_stays_none_and_nothing_is_learned_through_weights(rule, control):
    advantages, mask, given = batch(8)
    assert reweight(0 * advantages, mask, given, rule, control).eq(0).all()
    nothing = reweight(advantages, mask & False, given, rule, control)
    assert nothing.eq(0).all()
    leaves = {
        name: values.requires_grad_() if values.is_floating_point() else values
        for name, values in given.items()
    }
    assert not reweight(advantages, mask, leaves, rule, control).requires_grad


@pytest.mark.parametrize("rule, control", ALL)
def test_a_process_without_responses_has_no_advantages(rule, control):
    """Dynamic sampling may leave a process of several without any group."""
    advantages, mask, given = batch(0)
    nothing = {name: values[:0] for name, values in given.items()}
    assert reweight(advantages[:0], mask[:0], nothing, rule, control).shape == mask[:0].shape


def test_there_is_a_generator_for_each_response():
    advantages, mask, given = batch(0)
    with pytest.raises(ValueError, match="2 generators; expected one for all, or 6"):
        dyco.reweight_advantages(
            advantages, mask=mask, generator=[rng(0), rng(1)], control="shuffled", **given
        )


@pytest.mark.parametrize("rule", ["off", "response"])
def test_a_control_that_would_change_nothing_is_refused(rule):
    with pytest.raises(ConfigError, match=f"dyco.control: expected none.*dyco.rule={rule}"):
        load_config(overrides=[f"dyco.rule={rule}", "dyco.control=shuffled"])


def test_a_file_that_a_run_wrote_may_have_a_former_name(tmp_path):
    file = tmp_path / "config.yaml"
    file.write_text("dyco: {rule: signed_shuffled, alpha: 0.3}\n")
    config = load_run_config(file, ["dyco.tau=0.1"])
    assert (config.dyco.rule, config.dyco.control) == ("signed", "shuffled")
    assert (config.dyco.alpha, config.dyco.tau) == (0.3, 0.1)
    with pytest.raises(ConfigError, match="dyco.rule=signed dyco.control=shuffled"):
        load_config(file)


@pytest.mark.parametrize("content", [b"dyco: [", b"dyco: 3", b"- 1", b"\xff", b"dyco:\n"])
def test_a_damaged_file_of_a_run_is_said_as_any_other(tmp_path, content):
    file = tmp_path / "config.yaml"
    file.write_bytes(content)
    with pytest.raises(ConfigError, match="config.yaml") as caught:
        load_run_config(file)
    with pytest.raises(ConfigError) as of_any_other:
        load_config(file)
    assert str(caught.value) == str(of_any_other.value)


@pytest.mark.parametrize("rule", dyco.RULES)
def test_what_is_missing_is_named(rule):
    advantages, mask, given = batch(0)
    given["group_size"] = 3
    for name in dyco.RULES[rule].needs:
        without = {key: value for key, value in given.items() if key != name}
        with pytest.raises(ValueError, match=f"rule '{rule}' needs {name}"):
            dyco.reweight_advantages(advantages, mask=mask, rule=rule, **without)
    with pytest.raises(ValueError, match="needs a generator"):
        dyco.reweight_advantages(advantages, mask=mask, rule=rule, control="shuffled", **given)
    if "group_size" in dyco.RULES[rule].needs:
        given["group_size"] = 4
        with pytest.raises(ValueError, match="6 responses are not whole groups of 4"):
            dyco.reweight_advantages(advantages, mask=mask, rule=rule, **given)


@pytest.mark.parametrize("rule", dyco.RULES)
def test_a_rule_names_all_that_it_reads(rule):
    """In training the rest is None, which would be found out at the first step."""
    advantages, mask, given = batch(0)
    whole = reweight(advantages, mask, given, rule)
    given["group_size"] = 3
    names = {"scores", "roles", *dyco.RULES[rule].needs}
    needed = {name: values for name, values in given.items() if name in names}
    alone = dyco.reweight_advantages(advantages, mask=mask, rule=rule, **needed)
    assert torch.equal(alone, whole)


@pytest.mark.parametrize(
    "name, change, message",
    [
        ("scores", lambda x: x[0], r"scores is \[8\]; expected \[6, 8\], as the mask is"),
        ("entropy", lambda x: x[:, :1], r"entropy is \[6, 1\]; expected \[6, 8\]"),
        ("tokens", lambda x: x[:4], r"tokens is \[4, 8\]; expected \[6, 8\]"),
        ("rewards", lambda x: x[:, None], r"rewards is \[6, 1\]; expected \[6\]"),
        ("group_size", lambda x: 0, "group_size is 0; expected at least 1"),
        ("mask", lambda x: x.float(), r"mask is \[6, 8\] torch.float32; expected \[B, T\] bool"),
        ("advantages", lambda x: x[:1], r"advantages is \[1\]; expected \[6, 8\]"),
    ],
)
def test_a_wrong_shape_is_named_and_not_broadcast(name, change, message):
    advantages, mask, given = batch(0)
    given |= {"advantages": advantages, "mask": mask, "group_size": 3}
    given[name] = change(given[name])
    with pytest.raises(ValueError, match=message):
        dyco.reweight_advantages(rule="phrases", **given)


@pytest.mark.parametrize("name", dyco.RULES)
def test_every_rule_says_what_it_is(name):
    rule = dyco.RULES[name]
    for text in (rule.what, rule.source, rule.average):
        assert text.strip()
        assert "\n" not in text  # it stands on a line of its own in reports and headers
    assert set(rule.needs) <= set(dyco.Tokens._fields)
    assert name not in dyco.FORMER_NAMES
