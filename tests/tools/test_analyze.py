"""analyze.py: the bias moves what it says it moves, an intervention is one step computed twice, the estimates, the commands."""

import doctest
import json
import math
from types import SimpleNamespace

import pytest
import torch
from conftest import picture
from torch.nn.functional import pad

import dyco
import train
from config import DEFAULTS, load_config
from data import Sample
from dyco import Signals
from model import save_policy
from rollout import Rollout, generate
from tools import analyze, report
from tools.analyze import Intervention, Observed, bootstrap, estimate, mass_bias, random_plan

DYCO = SimpleNamespace(
    layers=[-1], shift="fisher_rao", text_scope="after_image", tau=0.05, ratio="relative"
)


# -------------------------------------------------------------------------------------------------------- the bias


@pytest.mark.parametrize("factor", [0.0, 0.1, 0.5, 0.999, 1.0, 1.5, 4.0, 1e6])
def test_the_bias_moves_the_mass_to_the_target(factor):
    """Applied to logits, the softmax has the mass min(λr, 0.99), or r where r is above 0.99 and should rise."""
    scores = 4 * torch.randn(
        500, 12, dtype=torch.float64, generator=torch.Generator().manual_seed(0)
    )
    members = torch.arange(12) < 5
    scores[0, :5], scores[1, :5], scores[2, 5:] = 60, -60, -60  # masses that are nearly 1, 0 and 1
    attention = scores.softmax(-1)
    mass, rest = attention[:, members].sum(-1), attention[:, ~members].sum(-1)
    bias, capped = mass_bias(mass, rest, factor)
    moved = torch.where(members, scores + bias[:, None], scores).softmax(-1)
    target = torch.minimum(factor * mass, mass.clamp(min=0.99))
    torch.testing.assert_close(moved[:, members].sum(-1), target, rtol=1e-9, atol=1e-12)
    assert torch.equal(capped, factor * mass > mass.clamp(min=0.99))
    # within a modality nothing moves: the bias is one number
    if factor:
        torch.testing.assert_close(
            moved[:, :5] / target[:, None], attention[:, :5] / mass[:, None], rtol=1e-6, atol=1e-12
        )
    if factor == 1:
        assert bias.eq(0).all() and not capped.any()


def test_the_bias_is_the_difference_of_logits_and_nothing_at_the_ends():
    mass = torch.tensor([0.2, 0.5, 0.0, 1.0])
    logit = lambda x: math.log(x / (1 - x))
    for factor in (0.5, 1.7):
        bias, _ = mass_bias(mass, 1 - mass, factor)
        assert bias.tolist() == pytest.approx(
            [logit(0.2 * factor) - logit(0.2), logit(0.5 * factor) - logit(0.5), 0, 0], rel=1e-6
        )
    bias, capped = mass_bias(torch.tensor([0.6]), torch.tensor([0.4]), 2.0)
    assert bias.tolist() == pytest.approx([logit(0.99) - logit(0.6)]) and capped.all()


# ------------------------------------------------------------------------------------------------- while decoding


class Watched(Intervention):
    """Notes the masses of each head before and after the bias, and the natural signals of each step."""

    def choose(self, names, step, signals, going):
        super().choose(names, step, signals, going)
        self.steps = getattr(self, "steps", {}) | {
            (name, step): (bool(c), [float(x[i]) for x in signals])
            for i, (name, c) in enumerate(zip(names, self.chosen))
        }

    def shift(self, layer, scores, visual, text):
        moved = super().shift(layer, scores, visual, text)
        members = (visual if self.modality > 0 else text)[:, None, None]
        mass = lambda x: torch.where(members, x.softmax(-1), 0).sum(-1)
        self.heads = getattr(self, "heads", []) + [
            (layer, mass(scores)[self.chosen], mass(moved)[self.chosen])
        ]
        assert torch.equal(moved[~self.chosen], scores[~self.chosen])
        return moved


@pytest.mark.parametrize(
    "tokens", [dict(role=1), dict(role=-1), dict(plan={(0, 0): {1, 4}, (2, 1): set(range(12))})]
)
def test_a_factor_of_1_changes_nothing(make_policy, prompts, tokens):
    """Bit for bit: the second computation of each step is the first one. Signals are sums over keys that are padded otherwise."""
    policy = make_policy()
    plain = generate(policy, prompts, 3, 12, (0, 0), DYCO)
    for modality in (1, -1):
        again = generate(
            policy,
            prompts,
            3,
            12,
            (0, 0),
            DYCO,
            intervention=Intervention(1.0, modality, depth=2, **tokens),
        )
        assert torch.equal(plain.tokens, again.tokens) and torch.equal(
            plain.logprobs, again.logprobs
        )
        for a, b in zip(plain.signals, again.signals):
            torch.testing.assert_close(a, b, rtol=0, atol=2e-6)


@pytest.mark.parametrize("factor", [0.0, 0.4, 1.25, 3.0])
@pytest.mark.parametrize("modality", [1, -1])
def test_every_head_moves_by_the_factor(make_policy, prompts, factor, modality):
    policy, watched = make_policy(), Watched(factor, modality, role=modality, depth=2)
    found = generate(policy, [prompts[0], prompts[2]], 8, 24, (0, 0), DYCO, intervention=watched)
    assert {layer for layer, *_ in watched.heads} == {0, 1}
    before, after = (torch.cat([heads[i] for heads in watched.heads]) for i in (1, 2))
    assert len(before) > 30
    torch.testing.assert_close(
        after, torch.minimum(factor * before, before.clamp(min=0.99)), rtol=1e-4, atol=1e-6
    )
    assert watched.moved == int((before > 0).sum()) and watched.capped == int(
        (factor * before > before.clamp(min=0.99)).sum()
    )
    # the roles that were acted on are those of the recorded signals
    roles = dyco.assign_roles(found.signals.visual_shift, found.signals.text_shift, found.mask)
    for (place, response), step in watched.steps:
        row = place // 2 * 8 + response
        if found.mask[row, step]:
            assert watched.steps[(place, response), step][0] == (roles[row, step] == modality)


def test_the_recorded_mass_is_the_moved_one(make_policy, prompts):
    """In the captured layer alone lower layers are untouched, so the head-averaged mass is λ times the natural one."""
    policy, watched = make_policy(), Watched(0.5, 1, role=1, layers=[-1], depth=2)
    found = generate(policy, [prompts[0], prompts[2]], 8, 24, (0, 0), DYCO, intervention=watched)
    chosen = 0
    for ((place, response), step), (
        acted,
        (visual_mass, text_mass, *shifts),
    ) in watched.steps.items():
        row = place // 2 * 8 + response
        if found.mask[row, step]:
            chosen += acted
            assert float(found.signals.visual_mass[row, step]) == pytest.approx(
                (0.5 if acted else 1) * visual_mass, rel=1e-5, abs=1e-7
            )
            assert [float(x[row, step]) for x in found.signals[2:]] == shifts
    assert chosen > 10 and watched.capped == 0


class Reference:
    """One row, every query over all keys before it, the bias written as the formula says: to check decoding against."""

    def __init__(self, chosen, members, factor, layers=(0, 1)):
        self.chosen, self.members, self.factor, self.layers = chosen, members, factor, layers

    def attend(self, layer, query, key, value, scale):
        repeats = query.shape[1] // key.shape[1]
        key, value = (x.repeat_interleave(repeats, dim=1) for x in (key, value))
        scores = (query @ key.transpose(-1, -2) * scale)[0]
        scores = scores.masked_fill(torch.ones_like(scores[0], dtype=torch.bool).triu(1), -math.inf)
        self.natural = scores.softmax(-1).mean(0)
        for position in self.chosen if layer in self.layers else ():
            mass = scores[:, position].softmax(-1)[:, self.members].sum(-1, keepdim=True)
            target = (self.factor * mass).clamp(max=0.99)
            bias = torch.where(mass > 0, torch.logit(target) - torch.logit(mass), 0)
            scores[:, position, self.members] += bias
        self.moved = scores.softmax(-1).mean(0)
        return (scores.softmax(-1) @ value[0]).transpose(0, 1)[None]


def reference(
    policy, prompt, ids, role, roles, modality, factor, **more
) -> tuple[Reference, torch.Tensor]:
    """The explicit forward of a prompt and response tokens, [T + 1, V] logits of the tokens."""
    visual, text = policy.tap(DYCO).prompt_members(prompt, "cpu")
    members = pad(visual, (0, len(ids))) if modality > 0 else pad(text, (0, len(ids)), value=True)
    layout = Reference(
        [len(prompt.input_ids) - 1 + t for t, r in enumerate(roles.tolist()) if r == role],
        members,
        factor,
        **more,
    )
    positions = policy.prompt_positions(prompt)
    after = torch.arange(int(positions.max()) + 1, int(positions.max()) + 1 + len(ids)).expand(
        3, -1
    )
    hidden = policy.decoder(
        policy.embed([prompt], [[ids]])[None], torch.cat([positions, after], 1)[:, None], layout
    )
    return layout, policy.next_token_logits(
        hidden[0, len(prompt.input_ids) - 1 :], policy.hf.lm_head.weight
    )


@pytest.mark.parametrize(
    "role, modality, factor", [(1, 1, 0.3), (1, -1, 0.5), (-1, -1, 1.2), (-1, 1, 2.0)]
)
def test_decoding_equals_one_forward_with_the_bias(make_policy, prompts, role, modality, factor):
    """Log-probabilities of the sampled tokens under a single explicit forward whose queries of chosen tokens carry the bias: keys
    and values of later tokens see the second computation of earlier ones, in every layer."""
    policy = make_policy()
    found = generate(
        policy,
        prompts,
        4,
        20,
        (0, 0),
        DYCO,
        intervention=Intervention(factor, modality, role=role, depth=2),
    )
    roles = dyco.assign_roles(found.signals.visual_shift, found.signals.text_shift, found.mask)
    acted = 0
    for row in (0, 1, 2, 3, 8, 9, 10, 11):  # the prompts with images
        tokens, mine = found.tokens[row][found.mask[row]], roles[row][found.mask[row]]
        _, logits = reference(policy, prompts[row // 4], tokens[:-1], role, mine, modality, factor)
        logprobs = logits.log_softmax(-1).gather(-1, tokens[:, None])[:, 0]
        torch.testing.assert_close(
            found.logprobs[row][found.mask[row]], logprobs, rtol=0, atol=1e-4
        )
        acted += int((mine == role).sum())
    assert acted >= 8


def test_roles_come_from_attention_before_it_is_changed(make_policy, prompts):
    """In the last layer alone the natural rows can be read off the explicit forward: the shifts are theirs, the masses those of
    the changed rows."""
    policy, prompt = make_policy(), prompts[0]
    found = generate(
        policy,
        [prompt],
        6,
        20,
        (0, 0),
        DYCO,
        intervention=Intervention(0.1, -1, role=-1, layers=[-1], depth=2),
    )
    roles = dyco.assign_roles(found.signals.visual_shift, found.signals.text_shift, found.mask)
    size = len(prompt.input_ids)
    for row in range(6):
        ids = found.tokens[row][found.mask[row]][:-1]
        layout, _ = reference(policy, prompt, ids, -1, roles[row], -1, 0.1, layers=(1,))
        visual, text = (
            pad(m, (0, len(ids)), value=own)
            for m, own in zip(policy.tap(DYCO).prompt_members(prompt, "cpu"), (False, True))
        )
        natural, moved = (
            dyco.attention_signals(
                rows[None, size - 1 :], visual[None], text.expand(1, len(ids) + 1, -1)
            )
            for rows in (layout.natural, layout.moved)
        )
        for mine, theirs in zip(found.signals, (*moved[:2], *natural[2:])):
            torch.testing.assert_close(mine[row][found.mask[row]], theirs[0], rtol=0, atol=1e-4)
        assert (natural.text_mass - moved.text_mass).abs().max() > 0.1


def test_text_alone_is_left_alone(make_policy, prompts):
    """Without an image all attention is on text: there is nowhere to move it from or to, and nothing is NaN."""
    policy = make_policy()
    plain = generate(policy, [prompts[1]], 3, 10, (0, 0), DYCO)
    for factor in (0.0, 3.0):
        moved = Intervention(factor, -1, role=-1, depth=2)
        again = generate(policy, [prompts[1]], 3, 10, (0, 0), DYCO, intervention=moved)
        assert (
            torch.equal(plain.tokens, again.tokens)
            and moved.capped == 0
            and not any(x.isnan().any() for x in again.signals)
        )


def test_waves_and_neighbours_do_not_change_an_intervention(make_policy, prompts):
    policy = make_policy()
    run = lambda some, **more: generate(
        policy,
        some,
        3,
        12,
        (0, 0),
        DYCO,
        intervention=Intervention(
            0.2, 1, plan={(p.index, r): {1, 2, 5, 9} for p in prompts for r in range(3)}, depth=2
        ),
        **more,
    )
    whole, alone = run(prompts), run([prompts[2]])
    assert torch.equal(run(prompts, max_cache_tokens=1).tokens, whole.tokens)
    assert torch.equal(whole.tokens[6:, : alone.tokens.shape[1]], alone.tokens)


def test_examples_in_docstrings():
    assert doctest.testmod(analyze).attempted == 1 and doctest.testmod(report).attempted == 1
    assert doctest.testmod(analyze).failed == doctest.testmod(report).failed == 0


def test_the_random_control_draws_as_many_tokens():
    names = [(place, response) for place in range(40) for response in range(3)]
    lengths = torch.randint(1, 30, (120,), generator=torch.Generator().manual_seed(1))
    touched = (lengths - 1) // 2
    plan = random_plan(touched, lengths, names, seed=0)
    for name, count, length in zip(names, touched.tolist(), lengths.tolist()):
        assert len(plan[name]) == count and all(1 <= step < length for step in plan[name])
    assert (
        plan
        == random_plan(touched, lengths, names, seed=0)
        != random_plan(touched, lengths, names, seed=1)
    )
    assert random_plan(touched[3:6], lengths[3:6], names[3:6], 0) == {
        name: plan[name] for name in names[3:6]
    }


# ----------------------------------------------------------------------------------------------------- estimates


def test_bootstrap_over_prompts():
    """A mean over 400 prompts of 5 equal responses: the spread is that of 400 values, not of 2000."""
    value = torch.randn(
        400, dtype=torch.float64, generator=torch.Generator().manual_seed(0)
    ).repeat_interleave(5)
    prompt = torch.arange(400).repeat_interleave(5) * 7
    point, replicates = bootstrap(value[None], torch.ones(1, 2000), prompt)
    assert float(point) == pytest.approx(float(value.mean()))
    assert float(replicates.std()) == pytest.approx(
        float(value[::5].std()) / 20, rel=0.06
    )  # 2000 replicates: 1.6 % rounding, 3σ
    low, high = estimate(point[0], replicates[0])[1:]
    assert high - low == pytest.approx(2 * 1.96 * float(value[::5].std()) / 20, rel=0.1)
    same = bootstrap(torch.stack([value, value]), torch.ones(2, 2000), prompt)[1]
    assert torch.equal(same[0], same[1])  # differences are paired
    assert estimate(
        *[x[0] for x in bootstrap(torch.zeros(1, 4), torch.zeros(1, 4), torch.arange(4))]
    ) == [None, None, None]


def test_differences_are_within_prompts():
    """Prompt 0: right 1 of 2, wrong 6 of 4; prompt 1: right 8 of 2, wrong 9 of 2; prompt 2 has no wrong one. Weights 8/6 and 1:
    (4/3 · (1.5 − 0.5) + 1 · (4.5 − 4)) / (7/3). Prompts that differ alone make no difference."""
    prompt = torch.tensor([0, 0, 0, 1, 1, 2])
    right = torch.tensor([[1.0, 0, 0, 8, 0, 99]]), torch.tensor([[2.0, 0, 0, 2, 0, 1]])
    wrong = torch.tensor([[0, 2.0, 4, 0, 9, 0]]), torch.tensor([[0, 1.0, 3, 0, 2, 0]])
    value, replicates = analyze.within_prompts(right, wrong, prompt)
    assert float(value) == pytest.approx((4 / 3 + 0.5) / (7 / 3)) and replicates.shape == (
        1,
        analyze.REPLICATES,
    )
    assert {round(float(x), 6) for x in replicates[0] if x == x} <= {
        round((i * 4 / 3 + j * 0.5) / (i * 4 / 3 + j), 6)
        for i in range(4)
        for j in range(4)
        if i + j
    }
    level = (
        torch.arange(40).repeat_interleave(4).double()
    )  # harder prompts have higher values and more wrong responses
    chosen = torch.rand(160, generator=torch.Generator().manual_seed(0)) > level / 40
    value, replicates = analyze.within_prompts(
        (level[None] * chosen, chosen[None]), (level[None] * ~chosen, ~chosen[None]), level.long()
    )
    assert estimate(value[0], replicates[0]) == [0, 0, 0]


def observed(roles, scores=None, correct=(True,), prompt=None, **signals) -> Observed:
    roles = torch.tensor(roles)
    blank = lambda name: (
        torch.tensor(signals[name]) if name in signals else torch.zeros(roles.shape)
    )
    return Observed(
        torch.arange(len(roles)) if prompt is None else torch.tensor(prompt),
        torch.tensor(correct),
        roles + 5,
        torch.ones(roles.shape).bool() if "mask" not in signals else torch.tensor(signals["mask"]),
        Signals(*map(blank, Signals._fields)),
        roles,
        torch.zeros(roles.shape) if scores is None else torch.tensor(scores),
    )


def test_statistics_of_a_response_by_hand():
    seen = observed(
        [[0, 1, 0, -1, -1, 1, 0, 0]],
        [[0, 0.2, 0, 0.8, 0.6, 0.4, 0, 9]],
        mask=[[True] * 7 + [False]],
        visual_shift=[[9.0] + [1.0] * 6 + [9.0]],
        visual_mass=[[0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 9.0]],
    )
    found = {name: float(a[0] / b[0]) for name, (a, b) in analyze.statistics(seen).items() if b[0]}
    expected = {
        "visual tokens, %": 200 / 7,
        "text tokens, %": 200 / 7,
        "neutral tokens, %": 300 / 7,
        "alignment of visual tokens": 0.3,
        "alignment of text tokens": 0.7,
        "alignment of both": 0.5,
        "image mass at visual tokens": 0.4,
        "image mass": 0.4,
        "visual shift, radians": 1,
        "role switches per 100 tokens": 200 / 7,
        "tokens per response": 7,
        "alignment at 10–20 % of the response": 0.2,
        "alignment at 40–50 % of the response": 0.8,
        "alignment at 50–60 % of the response": 0.6,
        "alignment at 70–80 % of the response": 0.4,
    }
    for name, value in expected.items():
        assert found[name] == pytest.approx(value), name


def test_right_and_wrong_stand_side_by_side(tokenizer):
    """Wrong responses look less: the difference is found, and its interval leaves out 0."""
    generator = torch.Generator().manual_seed(0)
    prompts, size = 60, 8
    right = torch.arange(prompts * size) % 2 == 0
    scores = (
        0.5 + 0.1 * torch.randn(prompts * size, 20, generator=generator) - 0.2 * (~right)[:, None]
    )
    seen = observed(
        torch.ones(prompts * size, 20, dtype=torch.long).tolist(),
        scores.tolist(),
        right.tolist(),
        [i // size for i in range(prompts * size)],
    )
    found = analyze.describe_roles(seen, tokenizer)
    value, low, high = found["statistics"]["alignment of visual tokens"]["difference"]
    assert low < value < high < 0 and value == pytest.approx(-0.2, abs=0.02)
    assert found["statistics"]["alignment of text tokens"]["correct"] == [None, None, None]
    assert found["counts"]["correct"] == {"responses": 240, "prompts": 60}
    assert (
        found["strings"]["visual"][0]["occurrences"] == prompts * size * 20
        and found["strings"]["text"] == []
    )
    assert "alignment of visual tokens" in analyze.roles_text(found) and json.dumps(
        found, allow_nan=False
    )
    only = analyze.describe_roles(
        observed([[1, -1, 0]], correct=(False,)), tokenizer
    )  # no right response, one prompt
    assert only["statistics"]["image mass"]["correct"] == [
        None,
        None,
        None,
    ] and "–" in analyze.roles_text(only)


TRACE = [
    "<think>",
    "cross is",
    " bl",
    "ue 3",
    ", total ",
    "3",
    ". circle is red 1",
    ", total 5. square",
    " is ",
    "green",
    " 1, total 6",
    ".",
    "</think>",
]
SCENE = Sample(
    "0",
    (),
    "",
    "",
    {
        "asked": [],
        "colors": {"cross": "blue", "circle": "green", "square": "green"},
        "values": {"red": 1, "green": 2, "blue": 3},
    },
)


def test_decisions_of_a_toy_response_by_hand():
    """A wrong total does not make the next one wrong; a wrong colour makes neither its value nor its total wrong."""
    assert analyze.toy_decisions(TRACE, SCENE) == {
        2: ("colour", True),
        3: ("value", True),
        5: ("total", True),
        6: ("value", True),
        7: ("total", False),  # the token 6 holds the circle's colour, too: its last decision stays
        9: ("colour", True),
        10: ("total", True),
    }
    assert analyze.toy_decisions([" ", *"cross is red 1, total 1."], SCENE)[10] == ("colour", False)
    for text in (
        "",
        "circle is",
        "cross is \u0661 \u0661, total 1.",
        "ring is mauve 99, total " + "9" * 60 + ".",
    ):
        assert not any(right for _, right in analyze.toy_decisions([text], SCENE).values())


def test_decisions_are_counted_by_hand(tokenizer):
    """Two responses to one prompt; roles, shares and weights of the tokens at which colours are named."""
    text = "cross is blue 3, total 3. circle is red 1, total 4."
    ids = tokenizer(text).input_ids
    pieces = [tokenizer.decode([token]) for token in ids]
    blue, red = pieces.index(" blue"), pieces.index(" red")
    roles = torch.zeros(2, len(ids), dtype=torch.long)
    scores, visual = torch.zeros(2, len(ids)), torch.full((2, len(ids)), 0.1)
    roles[0, blue], roles[1, blue], roles[:, red] = 1, -1, -1
    scores[0, blue], scores[1, blue], scores[:, red] = 0.8, 0.4, 0.3
    visual[:, blue] = 0.3
    seen = Observed(
        torch.zeros(2, dtype=torch.long),
        torch.tensor([True, False]),
        torch.tensor([ids, ids]),
        torch.ones(2, len(ids)).bool(),
        Signals(
            visual, torch.full_like(visual, 0.1), torch.zeros_like(visual), torch.ones_like(visual)
        ),
        roles,
        scores,
    )
    found = analyze.describe_decisions(seen, [SCENE], tokenizer)
    colour = found["colour"]["right"]
    assert (
        colour["tokens"] == 2
        and colour["visual, %"][0] == colour["text, %"][0] == 50
        and colour["alignment"][0] == pytest.approx(0.6)
    )
    assert colour["image's share"][0] == pytest.approx(0.75) and colour["text shift"][0] == 1
    assert colour["weight"][0] == pytest.approx(
        float(dyco.token_weights(scores, seen.mask)[:, blue].mean()), abs=1e-4
    )
    assert found["circle's colour"]["wrong"]["tokens"] == 2 and found["circle's colour"]["right"][
        "alignment"
    ] == [None, None, None]
    assert (
        found["value"]["right"]["tokens"] == 4
        and found["total"]["right"]["tokens"] == 4
        and found["colour"]["difference"]["weight"][0] is None
    )
    assert found["other"]["right"]["tokens"] == 2 * len(ids) - 12 and found["other"]["right"][
        "text, %"
    ] == [0, 0, 0]
    assert "circle's colour, wrong" in analyze.decisions_text(found) and json.dumps(
        found, allow_nan=False
    )


# ------------------------------------------------------------------------------------------------------ commands


@pytest.fixture
def start(make_policy, tmp_path, monkeypatch):
    """start("roles", …) runs a command on a random policy and six rows: one, two and no images."""
    save_policy(make_policy(seed=1), tmp_path / "model")
    for seed in range(3):
        picture(84, 56 + 28 * seed, seed).save(tmp_path / f"{seed}.png")
    rows = [
        {
            "id": f"row {i}",
            "images": [f"{i % 3}.png"],
            "question": f"<image>Sum circle, cross {i}.",
            "answer": "4",
        }
        for i in range(4)
    ]
    rows += [
        {
            "id": "two",
            "images": ["0.png", "1.png"],
            "question": "<image>And <image>?",
            "answer": "yes",
        },
        {"id": 5, "question": "Sum.", "answer": 2},
    ]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    turn = iter(range(10**6))
    monkeypatch.setattr(
        analyze.rewards, "accuracy", lambda text, answer: float(next(turn) % 2)
    )  # a random policy is never right

    def run(command, *more, out="out", data="rows.jsonl"):
        analyze.main(
            [
                command,
                "--model",
                str(tmp_path / "model"),
                "--data",
                str(tmp_path / data),
                "--out",
                str(tmp_path / out),
                *more,
                "rollout.group_size=4",
                "rollout.max_new_tokens=10",
                "train.threads=0",
            ]
        )
        return tmp_path / out

    return run


def test_roles_sampled_and_recorded_agree(start, capsys):
    """The same responses, decoded and teacher-forced: the same roles but for shifts within 1e-4 of τ, so the same statistics."""
    out = start("roles")
    sampled = json.loads((out / "roles.json").read_text())
    assert (
        "within prompts" in capsys.readouterr().out
        and sampled["counts"]["correct"]["responses"] == 12
    )
    responses = [json.loads(line) for line in (out / "responses.jsonl").read_text().splitlines()]
    assert len(responses) == 24 and {row["id"] for row in responses} == {
        "row 0",
        "row 1",
        "row 2",
        "row 3",
        "two",
        "5",
    }
    again = json.loads(
        (
            start("roles", "--responses", str(out / "responses.jsonl"), out="again") / "roles.json"
        ).read_text()
    )
    for name, row in sampled["statistics"].items():
        for part in ("correct", "incorrect"):
            assert again["statistics"][name][part][0] == pytest.approx(
                row[part][0], abs=2e-3 * max(1, abs(row[part][0] or 0))
            ), name
    with pytest.raises(SystemExit, match="holds responses that were sampled before"):
        start("roles")


def test_recorded_text_is_tokenized(start, tmp_path):
    (tmp_path / "own.jsonl").write_text(
        '{"id": "two", "response": "circle is red"}\n\n{"id": "row 1", "response": "", "token_ids": null}\n'
        '{"id": 5, "response": "</script>", "truncated": true}'
    )  # without an end of line: a whole row
    found = json.loads(
        (start("roles", "--responses", str(tmp_path / "own.jsonl")) / "roles.json").read_text()
    )
    assert sum(found["counts"][o]["responses"] for o in ("correct", "incorrect")) == 3


@pytest.mark.parametrize(
    "line, message",
    [
        ("{", "expected a JSON object"),
        ("[1]", "expected a JSON object"),
        ('{"id": "nobody", "response": "a"}', "'nobody', which no rows of --data have"),
        ('{"id": "two"}', '"response" is None'),
        ('{"id": "two", "response": "\\ud800"}', "expected valid text"),
        ("", "is empty"),
        ('{"id": "two", "response": "a", "token_ids": [1, -3]}', '"token_ids" is [1, -3]'),
        ('{"id": "two", "response": "a", "token_ids": []}', "has 0 tokens"),
        (
            '{"id": "two", "response": "a", "token_ids": [1' + ", 1" * 5000 + "]}",
            "has 5001 tokens; expected 1 to 4096",
        ),
    ],
)
def test_broken_recordings_are_refused(start, tmp_path, line, message):
    good = '{"id": "two", "response": "circle"}\n' if line else ""
    (tmp_path / "own.jsonl").write_text(good + line + "\n" * bool(line))
    with pytest.raises(SystemExit) as caught:
        start("roles", "--responses", str(tmp_path / "own.jsonl"))
    assert (
        message in str(caught.value)
        and ("line 2" in str(caught.value) or not line)
        and not (tmp_path / "out").exists()
    )


def test_intervene_writes_every_arm_and_goes_on_where_it_stopped(start, capsys, monkeypatch):
    out = start("intervene", "--factors", "0.5,2", "--role", "visual")
    found = json.loads((out / "intervene.json").read_text())
    arms = ("role tokens", "random tokens", "other modality")
    assert [(row["arm"], row["factor"]) for row in found["arms"]] == [
        (arm, factor) for arm in arms for factor in (0.5, 1.0, 2.0)
    ]
    rows = {
        (row["role"], row["arm"], row["factor"]): row
        for row in map(json.loads, (out / "intervene.jsonl").read_text().splitlines())
    }
    for factor in (0.5, 2.0):
        main, control = (
            rows["visual", "role tokens", factor],
            rows["visual", "random tokens", factor],
        )
        assert sum(main["touched"]) > 10 and main["touched"] == main["visual tokens"]
        assert all(
            c == m or l < n
            for c, m, l, n in zip(
                control["touched"], main["touched"], control["length"], main["length"]
            )
        )
    base = rows[None, "none", 1.0]
    assert all(
        row["change"] == row["against random"] == [0.0, 0.0, 0.0]
        for row in found["arms"]
        if row["factor"] == 1
    )
    assert sum(base["touched"]) == 0 and "against random" in capsys.readouterr().out
    share = lambda arm: sum(rows["visual", arm, 2.0]["correct"]) / 24
    assert found["arms"][2]["against random"][0] == pytest.approx(
        share("role tokens") - share("random tokens"), abs=1e-5
    )

    # cut in the middle of a row: what is whole is kept, the rest is made again, and no arm twice
    content = (out / "intervene.jsonl").read_text()
    (out / "intervene.jsonl").write_text(content[: content.rfind("\n", 0, -1) + 40])
    made, plain = [], analyze.sample_responses
    monkeypatch.setattr(
        analyze, "sample_responses", lambda *a, **k: made.append(a[4]) or plain(*a, **k)
    )
    start("intervene", "--factors", "0.5,2", "--role", "visual")
    assert made == ["visual, other modality, λ = 2"]
    assert len((out / "intervene.jsonl").read_text().splitlines()) == 7
    with pytest.raises(SystemExit, match="another layers"):
        start("intervene", "--factors", "0.5,2", "--layers=-1")


@pytest.mark.parametrize(
    "more, message",
    [
        (["--factors", "1"], "one of them not 1"),
        (["--factors=-1,2"], "0 or more"),
        (["--layers", "7"], "out of range"),
        (["rollout.group_sise=2"], "did you mean 'group_size'?"),
        (["dyco.layers=[9]"], "dyco.layers: [9] out of range"),
    ],
)
def test_intervene_refuses(start, tmp_path, more, message):
    with pytest.raises(SystemExit) as caught:
        start("intervene", *more)
    assert message in str(caught.value) and not (tmp_path / "out").exists()


def test_text_only_data_cannot_be_intervened_on(start, tmp_path):
    (tmp_path / "text.jsonl").write_text('{"question": "Sum.", "answer": "2"}\n')
    with pytest.raises(SystemExit, match="no sample has an image"):
        start("intervene", data="text.jsonl")
    start("roles", data="text.jsonl", out="text")


# ------------------------------------------------------------------------------------------------- gradient


def test_gradients_and_angles_by_autograd(make_policy, prompts):
    """Against −mean over responses of the mean over tokens of (1 + α·w)·Â·log π, one response at a time, and acos of the cosine."""
    policy, config = (
        make_policy(),
        load_config(DEFAULTS, ["algo.kl=0", "optim.grad_clip=1e9", "rollout.group_size=3"]),
    )
    batches = []
    for k, some in enumerate((prompts, prompts[:2], prompts[1:], prompts[:1], prompts)):
        rollout = generate(policy, some, 3, 8, (0, k), DYCO)
        gains = (
            torch.rand(len(some), 3, generator=torch.Generator().manual_seed(k))
            if k != 3
            else torch.ones(1, 3)
        )
        batches.append(
            train.Batch(
                rollout, gains, gains, gains, old_logprobs=rollout.logprobs, loss_mask=rollout.mask
            )
        )

    def slow(batch, rule):
        rollout, signals = batch.rollout, batch.rollout.signals
        advantages = (
            (batch.rewards - batch.rewards.mean(1, keepdim=True))
            / (batch.rewards.std(1, keepdim=True) + 1e-6)
        ).flatten()
        roles = dyco.assign_roles(signals.visual_shift, signals.text_shift, rollout.mask, 0.05)
        scores = dyco.alignment_scores(signals.visual_mass, signals.text_mass, roles, rollout.mask)
        factor = 1 + 0.2 * dyco.token_weights(scores, rollout.mask) if rule == "paper" else 1
        policy.zero_grad()
        for i in range(len(advantages)):
            one = policy(
                [rollout.prompts[i // 3]], rollout.tokens[i : i + 1], rollout.mask[i : i + 1]
            ).logprobs[0]
            each = (
                (factor * advantages[:, None] * rollout.mask)[i]
                if rule == "paper"
                else advantages[i]
            )
            (
                -(each * one * rollout.mask[i]).sum() / rollout.mask[i].sum() / len(advantages)
            ).backward()
        return torch.cat(
            [p.grad.flatten().double() for p in policy.parameters() if p.requires_grad]
        )

    reference = slow(batches[0], "off") + slow(batches[1], "off")
    hosts, papers = ([slow(batches[k], rule) for k in (2, 4)] for rule in ("off", "paper"))
    policy.zero_grad()
    found = analyze.describe_gradients(config, policy, batches, ["paper"])[
        "paper"
    ]  # the fourth batch has nothing to say
    cosine = lambda a, b: float(torch.nn.functional.cosine_similarity(a, b, dim=0))
    mean = lambda values: pytest.approx(sum(values) / 2, rel=2e-3, abs=2e-5)
    assert found["length"][0] == mean([float(p.norm() / h.norm()) for p, h in zip(papers, hosts)])
    assert (
        found["angle"][0]
        == mean([math.degrees(math.acos(cosine(p, h))) for p, h in zip(papers, hosts)])
        and found["angle"][0] > 0.1
    )
    assert found["reference"][0] == mean([cosine(p, reference) for p in papers])
    assert found["gain"][0] == mean(
        [cosine(p, reference) - cosine(h, reference) for p, h in zip(papers, hosts)]
    )
    assert found["summed"] == [
        pytest.approx(math.degrees(math.acos(cosine(sum(papers), sum(hosts)))), rel=2e-3),
        None,
        None,
    ]
    assert found["factor"][0] == pytest.approx(1.2, abs=1e-4) and found["spread"][0] > 0.01
    with pytest.raises(analyze.AnalysisError, match="all gradients are zero"):
        analyze.describe_gradients(config, policy, batches[2:4], ["paper"])


def test_oracles_know_what_decides_and_whom_to_blame(tokenizer, prompts, monkeypatch):
    """Two responses with one wrong total: the better one is praised for all that it decides, the worse one blamed for the total."""
    text = "cross is blue 3, total 3. cross is blue 3, total 7."
    ids = tokenizer(text).input_ids
    pieces = [tokenizer.decode([token]) for token in ids]
    wrong = len(pieces) - 1 - pieces[::-1].index("7")
    tokens, mask = torch.tensor([ids, ids]), torch.ones(2, len(ids)).bool()
    zeros = torch.zeros(2, len(ids))
    batch = train.Batch(
        Rollout(
            prompts[:1],
            2,
            tokens,
            mask,
            zeros,
            zeros[:, 0].bool(),
            Signals(zeros, zeros, zeros, zeros),
            [text, text],
        ),
        *[torch.tensor([[1.0, 0.0]])] * 3,
        loss_mask=mask,
    )
    decides = sorted(analyze.toy_decisions(pieces, SCENE))
    assert len(decides) == 6 and wrong in decides
    plain, blame = (
        analyze.oracle_scores(batch, [SCENE], tokenizer, flag) for flag in (False, True)
    )
    assert [row.nonzero().flatten().tolist() for row in plain] == [decides, decides]
    assert [row.nonzero().flatten().tolist() for row in blame] == [decides, [wrong]]

    monkeypatch.setattr(
        train,
        "update",
        lambda config, policy, recorder, *rest: setattr(recorder, "gradient", batch.advantages),
    )
    found = analyze.batch_gradient(
        load_config(DEFAULTS), SimpleNamespace(parameters=list), batch, "oracle", 0, blame
    )
    host = analyze.batch_gradient(
        load_config(DEFAULTS), SimpleNamespace(parameters=list), batch, "off", 0
    )
    torch.testing.assert_close(found, (1 + 0.2 * dyco.token_weights(blame, mask)) * host)


def test_gradient_command(start, capsys):
    """The host against itself is 0 degrees away, exactly; `uniform` only makes its gradient 1.2 times as long."""
    out = start(
        "gradient",
        "--rules",
        "uniform,paper",
        "rollout.prompts_per_step=2",
        "algo.kl=0.5",
        "optim.grad_clip=0.1",
    )
    found = json.loads((out / "gradient.json").read_text())
    off, uniform, paper = (found["rules"][rule] for rule in ("off", "uniform", "paper"))
    assert (
        found["batches"] == 3
        and off["angle"] == off["gain"] == off["spread"] == [0, 0, 0]
        and off["length"] == [1, 1, 1]
    )
    assert (
        uniform["length"] == pytest.approx([1.2] * 3, abs=1e-4)
        and uniform["angle"][2] < 0.01
        and abs(uniform["gain"][0]) < 1e-4
    )
    assert (
        paper["over uniform"][0] == pytest.approx(paper["gain"][0] - uniform["gain"][0], abs=2e-5)
        and "over shuffled" not in paper
    )
    assert off["summed"] == [0, None, None] and paper["summed"][0] > 0.05
    assert paper["angle"][0] > 0.05 and paper["reference"][0] == pytest.approx(
        off["reference"][0] + paper["gain"][0], abs=2e-5
    )
    assert "angle to host's" in capsys.readouterr().out and set(found["rules"]) == {
        "off",
        "uniform",
        "paper",
    }


@pytest.mark.parametrize(
    "more, message",
    [
        (["--rules", "paper,papper"], "no rule papper; expected some of off, paper"),
        (
            ["rollout.prompts_per_step=4"],
            "6 samples make 1 batches of rollout.prompts_per_step=4; expected 2 or more",
        ),
    ],
)
def test_gradient_refuses(start, tmp_path, more, message):
    with pytest.raises(SystemExit) as caught:
        start("gradient", *more)
    assert message in str(caught.value) and not (tmp_path / "out").exists()


def test_the_toy_has_its_decisions_beside_the_roles(start, tmp_path, capsys):
    start("roles", data="rows.jsonl", out="plain")
    assert "decisions" not in json.loads((tmp_path / "plain" / "roles.json").read_text())
    analyze.main(
        [
            "roles",
            "--model",
            str(tmp_path / "model"),
            "--data",
            "toy",
            "--out",
            str(tmp_path / "toy"),
            "eval.samples=3",
            "rollout.group_size=2",
            "rollout.max_new_tokens=6",
            "train.threads=0",
        ]
    )
    found = json.loads((tmp_path / "toy" / "roles.json").read_text())["decisions"]
    assert (
        6 <= found["other"]["right"]["tokens"] <= 36
        and list(found)[0] == "colour"
        and "tokens that decide" in capsys.readouterr().out
    )
