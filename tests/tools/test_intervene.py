"""intervene.py: the bias moves what it says it moves, a step is computed twice, the command."""

import doctest
import json
import math
from functools import partial

import pytest
import torch
from observations import DYCO, prepare
from torch.nn.functional import pad

import dyco
from rollout import Rollout, generate
from tools import intervene, observed
from tools.intervene import IntervenedDecoding, Intervention, mass_bias, random_plan


def test_examples_in_docstrings():
    result = doctest.testmod(intervene)
    assert result.attempted == 1
    assert result.failed == 0


# --------------------------------------------------------------------------------------- the bias


@pytest.mark.parametrize("factor", [0.0, 0.1, 0.5, 0.999, 1.0, 1.5, 4.0, 1e6])
def test_the_bias_moves_the_mass_to_the_target(factor):
    """Applied to logits, the softmax has the mass min(λr, 0.99), or r where r is above 0.99 and
    should rise."""
    generator = torch.Generator().manual_seed(0)
    scores = 4 * torch.randn(500, 12, dtype=torch.float64, generator=generator)
    members = torch.arange(12) < 5
    # masses that are nearly 1, 0 and 1
    scores[0, :5] = 60
    scores[1, :5] = -60
    scores[2, 5:] = -60
    attention = scores.softmax(-1)
    mass = attention[:, members].sum(-1)
    rest = attention[:, ~members].sum(-1)
    bias, capped = mass_bias(mass, rest, factor)
    moved = torch.where(members, scores + bias[:, None], scores).softmax(-1)
    target = torch.minimum(factor * mass, mass.clamp(min=0.99))
    torch.testing.assert_close(moved[:, members].sum(-1), target, rtol=1e-9, atol=1e-12)
    assert torch.equal(capped, factor * mass > mass.clamp(min=0.99))
    # within a modality nothing moves: the bias is one number
    if factor:
        within = moved[:, :5] / target[:, None]
        expected = attention[:, :5] / mass[:, None]
        torch.testing.assert_close(within, expected, rtol=1e-6, atol=1e-12)
    if factor == 1:
        assert bias.eq(0).all()
        assert not capped.any()


def logit(x: float) -> float:
    return math.log(x / (1 - x))


@pytest.mark.parametrize("factor", [0.5, 1.7])
def test_the_bias_is_the_difference_of_logits_and_nothing_at_the_ends(factor):
    mass = torch.tensor([0.2, 0.5, 0.0, 1.0])
    bias, _ = mass_bias(mass, 1 - mass, factor)
    expected = [logit(0.2 * factor) - logit(0.2), logit(0.5 * factor) - logit(0.5), 0, 0]
    assert bias.tolist() == pytest.approx(expected, rel=1e-6)


def test_the_bias_ends_at_the_cap():
    bias, capped = mass_bias(torch.tensor([0.6]), torch.tensor([0.4]), 2.0)
    assert bias.tolist() == pytest.approx([logit(0.99) - logit(0.6)])
    assert capped.all()


# --------------------------------------------------------------------------------- while decoding


def generate_with(intervention, policy, prompts, group_size, length, **options) -> Rollout:
    return generate(
        policy,
        prompts,
        group_size,
        max_new_tokens=length,
        key=(0, 0),
        capture=DYCO,
        decoding=partial(IntervenedDecoding, intervention),
        **options,
    )


def roles_of(rollout: Rollout) -> torch.Tensor:
    signals = rollout.signals
    return dyco.assign_roles(signals.visual_shift, signals.text_shift, rollout.mask)


class Watched(Intervention):
    """Notes each head's mass before and after the bias, and the natural signals of each step."""

    def __init__(self, *arguments, **options):
        super().__init__(*arguments, **options)
        self.steps = {}  # (prompt and response, step): (was it chosen, its natural signals)
        self.heads = []  # (layer, masses before, masses after) of the chosen rows

    def choose(self, names, step, signals, going):
        super().choose(names, step, signals, going)
        for i, name in enumerate(names):
            natural = [float(signal[i]) for signal in signals]
            self.steps[name, step] = (bool(self.chosen[i]), natural)

    def shift(self, layer, scores, visual, text):
        moved = super().shift(layer, scores, visual, text)
        members = (visual if self.modality > 0 else text)[:, None, None]

        def chosen_mass(scores):
            return torch.where(members, scores.softmax(-1), 0).sum(-1)[self.chosen]

        self.heads.append((layer, chosen_mass(scores), chosen_mass(moved)))
        assert torch.equal(moved[~self.chosen], scores[~self.chosen])
        return moved


@pytest.mark.parametrize("modality", [1, -1])
@pytest.mark.parametrize(
    "tokens",
    [{"role": 1}, {"role": -1}, {"plan": {(0, 0): {1, 4}, (2, 1): set(range(12))}}],
)
def test_a_factor_of_1_changes_nothing(make_policy, prompts, tokens, modality):
    """Bit for bit: the second computation of each step is the first one. Signals are sums over keys
    that are padded otherwise."""
    policy = make_policy()
    plain = generate(policy, prompts, 3, 12, (0, 0), DYCO)
    unchanged = Intervention(1.0, modality, depth=2, **tokens)
    again = generate_with(unchanged, policy, prompts, 3, 12)
    assert torch.equal(plain.tokens, again.tokens)
    assert torch.equal(plain.logprobs, again.logprobs)
    for a, b in zip(plain.signals, again.signals, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=2e-6)


@pytest.mark.parametrize("factor", [0.0, 0.4, 1.25, 3.0])
@pytest.mark.parametrize("modality", [1, -1])
def test_every_head_moves_by_the_factor(make_policy, prompts, factor, modality):
    watched = Watched(factor, modality, role=modality, depth=2)
    rollout = generate_with(watched, make_policy(), [prompts[0], prompts[2]], 8, 24)
    assert {layer for layer, *_ in watched.heads} == {0, 1}
    before = torch.cat([mass for _, mass, _ in watched.heads])
    after = torch.cat([mass for _, _, mass in watched.heads])
    assert len(before) > 30
    highest = before.clamp(min=0.99)
    target = torch.minimum(factor * before, highest)
    torch.testing.assert_close(after, target, rtol=1e-4, atol=1e-6)
    assert watched.moved == int((before > 0).sum())
    assert watched.capped == int((factor * before > highest).sum())
    # the roles that were acted on are those of the recorded signals
    roles = roles_of(rollout)
    for ((place, response), step), (was_chosen, _) in watched.steps.items():
        row = place // 2 * 8 + response
        if rollout.mask[row, step]:
            assert was_chosen == (roles[row, step] == modality)


def test_the_recorded_mass_is_the_moved_one(make_policy, prompts):
    """In the captured layer alone lower layers are untouched, so the head-averaged mass is λ times
    the natural one."""
    watched = Watched(0.5, 1, role=1, layers=[-1], depth=2)
    rollout = generate_with(watched, make_policy(), [prompts[0], prompts[2]], 8, 24)
    chosen = 0
    for ((place, response), step), (was_chosen, natural) in watched.steps.items():
        row = place // 2 * 8 + response
        if rollout.mask[row, step]:
            visual_mass, _, *shifts = natural
            recorded = [float(signal[row, step]) for signal in rollout.signals]
            factor = 0.5 if was_chosen else 1
            assert recorded[0] == pytest.approx(factor * visual_mass, rel=1e-5, abs=1e-7)
            assert recorded[2:] == shifts
            chosen += was_chosen
    assert chosen > 10
    assert watched.capped == 0


class Reference:
    """One row, every query over all keys before it, the bias written as the formula says.

    A layout to check decoding against. Leaves the head-averaged attention rows of the last layer,
    `natural` and `moved`.
    """

    hooks = True

    def __init__(self, chosen: list[int], members, factor: float, layers=(0, 1)):
        """chosen: the positions of the chosen tokens' queries; members [K] bool."""
        self.chosen = chosen
        self.members = members
        self.factor = factor
        self.layers = layers

    def attend(self, layer, query, key, value, scale):
        repeats = query.shape[1] // key.shape[1]
        key = key.repeat_interleave(repeats, dim=1)
        value = value.repeat_interleave(repeats, dim=1)
        scores = (query @ key.transpose(-1, -2) * scale)[0]
        ahead = torch.ones_like(scores[0], dtype=torch.bool).triu(1)
        scores = scores.masked_fill(ahead, -math.inf)
        self.natural = scores.softmax(-1).mean(0)
        for position in self.chosen if layer in self.layers else ():
            attention = scores[:, position].softmax(-1)
            mass = attention[:, self.members].sum(-1, keepdim=True)
            target = (self.factor * mass).clamp(max=0.99)
            bias = torch.where(mass > 0, torch.logit(target) - torch.logit(mass), 0)
            scores[:, position, self.members] += bias
        self.moved = scores.softmax(-1).mean(0)
        return (scores.softmax(-1) @ value[0]).transpose(0, 1)[None]


def members_of(policy, prompt, length: int) -> list[torch.Tensor]:
    """[image, text]: which keys are theirs, of a prompt and `length` response tokens."""
    visual, text = policy.tap(DYCO).prompt_members(prompt, "cpu")
    return [pad(visual, (0, length)), pad(text, (0, length), value=True)]


def forward_with_bias(policy, prompt, ids, chosen, modality, factor, **options):
    """The explicit forward of a prompt and response tokens: its layout, and logits [T + 1, V].

    chosen [T + 1] bool: the tokens whose queries carry the bias.
    """
    visual, text = members_of(policy, prompt, len(ids))
    last = len(prompt.input_ids) - 1
    layout = Reference(
        [last + int(step) for step in chosen.nonzero()],
        visual if modality > 0 else text,
        factor,
        **options,
    )
    before = policy.prompt_positions(prompt)
    following = int(before.max()) + 1
    after = torch.arange(following, following + len(ids)).expand(3, -1)
    positions = torch.cat([before, after], 1)[:, None]
    hidden = policy.decoder(policy.embed([prompt], [[ids]]), policy.rotary(positions), layout)
    return layout, policy.next_token_logits(hidden[0, last:], policy.hf.lm_head.weight)


@pytest.mark.parametrize(
    "role, modality, factor", [(1, 1, 0.3), (1, -1, 0.5), (-1, -1, 1.2), (-1, 1, 2.0)]
)
def test_decoding_equals_one_forward_with_the_bias(make_policy, prompts, role, modality, factor):
    """Log-probabilities of the sampled tokens under a single explicit forward whose queries of
    chosen tokens carry the bias: keys and values of later tokens see the second computation of
    earlier ones, in every layer."""
    policy = make_policy()
    intervention = Intervention(factor, modality, role=role, depth=2)
    rollout = generate_with(intervention, policy, prompts, 4, 20)
    roles = roles_of(rollout)
    acted = 0
    for row in (0, 1, 2, 3, 8, 9, 10, 11):  # the prompts with images
        mask = rollout.mask[row]
        tokens = rollout.tokens[row][mask]
        chosen = roles[row][mask] == role
        _, logits = forward_with_bias(
            policy, prompts[row // 4], tokens[:-1], chosen, modality, factor
        )
        logprobs = logits.log_softmax(-1).gather(-1, tokens[:, None])[:, 0]
        torch.testing.assert_close(rollout.logprobs[row][mask], logprobs, rtol=0, atol=1e-4)
        acted += int(chosen.sum())
    assert acted >= 8


def test_roles_come_from_attention_before_it_is_changed(make_policy, prompts):
    """In the last layer alone the natural rows can be read off the explicit forward: the shifts are
    theirs, the masses those of the changed rows."""
    policy = make_policy()
    prompt = prompts[0]
    intervention = Intervention(0.1, -1, role=-1, layers=[-1], depth=2)
    rollout = generate_with(intervention, policy, [prompt], 6, 20)
    roles = roles_of(rollout)
    last = len(prompt.input_ids) - 1
    for row in range(6):
        mask = rollout.mask[row]
        ids = rollout.tokens[row][mask][:-1]
        layout, _ = forward_with_bias(policy, prompt, ids, roles[row] == -1, -1, 0.1, layers=(1,))
        visual, text = members_of(policy, prompt, len(ids))

        def signals(rows, visual=visual, text=text):
            rows = rows[None, last:]
            return dyco.attention_signals(rows, visual[None], text.expand(rows.shape))

        natural = signals(layout.natural)
        moved = signals(layout.moved)
        expected = (*moved[:2], *natural[2:])
        for mine, theirs in zip(rollout.signals, expected, strict=True):
            torch.testing.assert_close(mine[row][mask], theirs[0], rtol=0, atol=1e-4)
        assert (natural.text_mass - moved.text_mass).abs().max() > 0.1


@pytest.mark.parametrize("factor", [0.0, 3.0])
def test_text_alone_is_left_alone(make_policy, prompts, factor):
    """Without an image all attention is on text: there is nowhere to move it from or to, and
    nothing is NaN."""
    policy = make_policy()
    plain = generate(policy, [prompts[1]], 3, 10, (0, 0), DYCO)
    intervention = Intervention(factor, -1, role=-1, depth=2)
    again = generate_with(intervention, policy, [prompts[1]], 3, 10)
    assert torch.equal(plain.tokens, again.tokens)
    assert intervention.capped == 0
    assert not any(signal.isnan().any() for signal in again.signals)


def test_waves_and_neighbours_do_not_change_an_intervention(make_policy, prompts):
    policy = make_policy()
    plan = {(prompt.index, i): {1, 2, 5, 9} for prompt in prompts for i in range(3)}

    def tokens(prompts, **options) -> torch.Tensor:
        intervention = Intervention(0.2, 1, plan=plan, depth=2)
        return generate_with(intervention, policy, prompts, 3, 12, **options).tokens

    whole = tokens(prompts)
    alone = tokens([prompts[2]])
    assert torch.equal(tokens(prompts, max_cache_tokens=1), whole)
    assert torch.equal(whole[6:, : alone.shape[1]], alone)


def test_an_intervention_needs_signals(make_policy, prompts):
    decoding = partial(IntervenedDecoding, Intervention(0.5, 1, role=1, depth=2))
    with pytest.raises(ValueError, match="pass `capture`"):
        generate(make_policy(), prompts, 3, 12, (0, 0), decoding=decoding)


def test_the_random_control_draws_as_many_tokens():
    names = [(place, response) for place in range(40) for response in range(3)]
    lengths = torch.randint(1, 30, (120,), generator=torch.Generator().manual_seed(1))
    touched = (lengths - 1) // 2
    plan = random_plan(touched, lengths, names, seed=0)
    for name, count, length in zip(names, touched.tolist(), lengths.tolist(), strict=True):
        assert len(plan[name]) == count
        assert all(1 <= step < length for step in plan[name])
    assert plan == random_plan(touched, lengths, names, seed=0)
    assert plan != random_plan(touched, lengths, names, seed=1)
    some = random_plan(touched[3:6], lengths[3:6], names[3:6], seed=0)
    assert some == {name: plan[name] for name in names[3:6]}


# ------------------------------------------------------------------------------------ the command


@pytest.fixture
def start(make_policy, tmp_path, monkeypatch):
    return prepare(intervene.main, make_policy(seed=1), tmp_path, monkeypatch)


def read_rows(path) -> dict[tuple, dict]:
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    return {(row["role"], row["arm"], row["factor"]): row for row in rows}


def test_intervene_writes_every_arm(start, capsys):
    out = start("--factors", "0.5,2", "--role", "visual")
    arms = json.loads((out / "intervene.json").read_text())["arms"]
    assert [(row["arm"], row["factor"]) for row in arms] == [
        (arm, factor)
        for arm in ("role tokens", "random tokens", "other modality")
        for factor in (0.5, 1.0, 2.0)
    ]
    for row in arms:
        if row["factor"] == 1:
            assert row["change"] == row["against random"] == [0.0, 0.0, 0.0]
    assert "against random" in capsys.readouterr().out

    rows = read_rows(out / "intervene.jsonl")
    assert sum(rows[None, "none", 1.0]["touched"]) == 0
    for factor in (0.5, 2.0):
        main = rows["visual", "role tokens", factor]
        control = rows["visual", "random tokens", factor]
        assert sum(main["touched"]) > 10
        assert main["touched"] == main["visual tokens"]
        # the control touches as many, but for what a shorter response has no place for
        for i in range(24):
            shorter = control["length"][i] < main["length"][i]
            assert control["touched"][i] == main["touched"][i] or shorter

    def accuracy(arm: str) -> float:
        return sum(rows["visual", arm, 2.0]["correct"]) / 24

    expected = accuracy("role tokens") - accuracy("random tokens")
    assert arms[2]["against random"][0] == pytest.approx(expected, abs=1e-5)


def test_intervene_goes_on_where_it_stopped(start, monkeypatch):
    """Cut in the middle of a row: what is whole is kept, the rest is made again, no arm twice."""
    asked = ("--factors", "0.5,2", "--role", "visual")
    log = start(*asked) / "intervene.jsonl"
    content = log.read_text()
    log.write_text(content[: content.rfind("\n", 0, -1) + 40])
    made = []
    sample_responses = intervene.sample_responses

    def noted(*arguments, **options):
        made.append(options["what"])
        return sample_responses(*arguments, **options)

    monkeypatch.setattr(intervene, "sample_responses", noted)
    start(*asked)
    assert made == ["pass 7 of 7: visual, other modality, λ = 2"]
    assert len(log.read_text().splitlines()) == 7
    with pytest.raises(SystemExit, match="another layers"):
        start(*asked, "--layers=-1")


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
        start(*more)
    assert message in str(caught.value)
    assert not (tmp_path / "out").exists()


def test_files_are_looked_at_before_the_model(start, tmp_path, monkeypatch):
    monkeypatch.setattr(observed, "policy_from_config", None)  # which would be a TypeError
    with pytest.raises(SystemExit, match="nowhere.jsonl"):
        start(data="nowhere.jsonl")
    for out in ("rows.jsonl", "rows.jsonl/deeper/out"):  # a file is no folder
        with pytest.raises(SystemExit, match="--out: expected a folder that can be written to"):
            start(out=out)


def test_other_rows_or_pictures_are_another_analysis(start, tmp_path):
    asked = ("--factors", "2", "--role", "visual", "--layers", "0")
    start(*asked)
    with pytest.raises(SystemExit, match="another max_pixels .1003520, now 4000"):
        start(*asked, "data.max_pixels=4000")
    path = tmp_path / "rows.jsonl"
    path.write_text(path.read_text().replace("cross 1.", "square."))
    with pytest.raises(SystemExit, match="another rows "):
        start(*asked)


def test_text_only_data_cannot_be_intervened_on(start, tmp_path):
    (tmp_path / "text.jsonl").write_text('{"question": "Sum.", "answer": "2"}\n')
    with pytest.raises(SystemExit, match="no sample has an image"):
        start(data="text.jsonl")
