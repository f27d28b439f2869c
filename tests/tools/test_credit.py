"""credit.py: areas and factors by hand, gains of the right sign, recorded responses, the command.

The table and the figure have a row for each rule of the registry, whatever rules there are.
"""

import json
import math
import random
import xml.etree.ElementTree as ElementTree

import pytest
import torch
from observations import DYCO, prepare

import dyco
import toy
import train
from config import DEFAULTS, load_config
from rollout import generate
from tools import credit, gradients
from tools.credit import Decisions, area_under_roc, describe_factors, token_factors
from tools.credit_view import by_gain, credit_figure, credit_table, label
from tools.gradients import ORACLES, Weighting
from tools.observed import AnalysisError

RULES = {*dyco.RULES, "signed minmax"}
SMALL = ["rollout.prompts_per_step=2", "rollout.group_size=4", "rollout.max_new_tokens=10"]


# ------------------------------------------------------------------------------ what a rule weighs


def test_area_under_roc_counts_pairs():
    positives = torch.tensor([0.5, 2.0, 2.0, 3.0])
    negatives = torch.tensor([2.0, 0.5, 0.5, 1.0, 7.0])
    won = 0.0
    for positive in positives:
        for negative in negatives:
            won += 1.0 if positive > negative else 0.5 if positive == negative else 0.0
    assert area_under_roc(positives, negatives) == pytest.approx(won / 20)
    assert won == 1 + 3.5 + 3.5 + 4
    assert area_under_roc(positives, positives) == 0.5
    assert math.isnan(area_under_roc(positives, negatives[:0]))


def test_factors_of_a_batch_by_hand():
    """A good response, a bad one with two tokens and a padding, and one of a group of equals."""
    host = torch.tensor([[1.0, 1.0, 1.0], [-2.0, -2.0, 0.0], [0.0, 0.0, 0.0]])
    mine = torch.tensor([[1.0, 2.0, 3.0], [-2.0, -6.0, 0.0], [0.0, 0.0, 0.0]])
    roles = torch.tensor([[1, -1, 0], [1, 1, 0], [1, 1, 1]])
    right = torch.tensor([[False, True, False], [True, False, False], [True, False, False]])
    wrong = torch.tensor([[False, False, True], [False, True, False], [False, True, False]])
    factors = token_factors(mine, host)
    assert factors[host != 0].tolist() == [1, 2, 3, 1, 3]
    assert factors[host == 0].isnan().all()

    figures = describe_factors(factors, roles, host, Decisions(right, wrong))
    assert figures["factor"] == pytest.approx(2)
    assert figures["spread"] == pytest.approx(1)
    assert figures["raised"] == pytest.approx(2 / 5)  # 3 above a mean of 2, in each response
    assert figures["visual"] == pytest.approx((1 + 1 + 3) / 10)
    assert figures["text"] == pytest.approx(2 / 10)
    assert figures["neutral"] == pytest.approx(3 / 10)
    # Those that decide have 2, 3, 1 and 3; the only other one has 1.
    assert figures["deciding"] == pytest.approx(3.5 / 4)
    assert figures["wrong"] == 1  # in the bad response the wrong decision has 3, the right one 1
    assert "wrong" not in describe_factors(factors, roles, host, None)


def test_equal_factors_stay_equal_in_spite_of_rounding():
    host = torch.rand(1, 100) + 0.1
    factors = token_factors(host * 5, host)
    assert len(factors.unique()) == 1
    assert describe_factors(factors, torch.zeros(1, 100), host, None)["raised"] == 0


# ------------------------------------------------------------------------ what its gradient does


def test_a_gain_is_positive_towards_the_reference():
    host = torch.tensor([1.0, 1.0])
    nearer = torch.tensor([2.0, 0.0])
    farther = torch.tensor([0.0, 3.0])
    figures = credit.compare_gradients(nearer, farther, host, reference=torch.tensor([5.0, 0.0]))
    assert figures["angle"] == pytest.approx(45, abs=1e-4)
    assert figures["reference"] == pytest.approx(1)
    assert figures["gain"] == pytest.approx(1 - math.sqrt(0.5))
    assert figures["control's gain"] == pytest.approx(-math.sqrt(0.5))
    assert figures["over shuffled"] == pytest.approx(1)


@pytest.fixture
def planted(make_policy, prompts):
    """(config, policy, batches): responses to one prompt, whose reward is that of their first
    token, while all other tokens are noise."""
    policy = make_policy()
    config = load_config(DEFAULTS, ["algo.kl=0", "optim.grad_clip=1e9", "dyco.alpha=1"])
    batches = []
    for step in range(8):
        rollout = generate(policy, prompts[:1], 96, 4, (0, step), DYCO)
        rewards = (rollout.tokens[:, :1].T % 2).float()
        batch = train.Batch(rollout, rewards=rewards, accuracy=rewards, format=rewards)
        batch.old_logprobs = rollout.logprobs
        batch.loss_mask = rollout.mask
        batches.append(batch)
    return config, policy, batches


def test_weight_on_what_decides_the_reward_gains(planted):
    """The best oracle is the one that weighs the first token. It has 100 % of its own gain."""
    config, policy, batches = planted
    first = []
    others = []
    for batch in batches:
        scores = torch.zeros(batch.rollout.mask.shape)
        scores[:, 0] = 4
        first.append(scores)
        others.append(4 - scores)
    weightings = {
        "oracle, blame": Weighting("paper", scores=first),
        "oracle": Weighting("paper", scores=others),
    }
    described, _ = credit.describe_credit(config, policy, batches, weightings)
    for figure in ("gain", "over shuffled"):
        assert described["oracle, blame"][figure][1] > 0
        assert described["oracle"][figure][2] < 0
    assert described["oracle, blame"]["share"] == [1, 1, 1]
    assert described["oracle"]["share"][0] < 0
    assert described["off"]["gain"] == described["off"]["spread"] == [0, 0, 0]


def test_a_rule_without_any_gradient_is_shown_and_batches_without_one_are_counted(planted):
    """Of the three batches that are compared one has equal rewards. Three have no interval."""
    config, policy, batches = planted
    batches = batches[:6]
    batches[3].rewards = torch.ones_like(batches[3].rewards)
    nothing = dyco.RULES["off"]._replace(factor=lambda t: torch.zeros_like(t.advantages))
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(dyco.RULES, "nothing", nothing)
        weightings = {"nothing": Weighting("nothing"), "paper": Weighting("paper")}
        rules, compared = credit.describe_credit(config, policy, batches, weightings)
        content = {
            "model": "m",
            "data": "d",
            "level": None,
            "algo": "grpo",
            "group_sizes": [96],
            "prompts": 6,
            "batches": 6,
            "compared": compared,
            "rules": rules,
        }
        page = credit_table(content)
        figure = ElementTree.fromstring(credit_figure(rules))
    assert compared == 2
    assert "Model m, data d, host grpo" in page
    assert "means over 2 batches (1 more have no gradient: equal rewards)" in page
    assert rules["nothing"]["over shuffled"] == [None, None, None]
    assert rules["paper"]["gain"][1:] == [None, None]
    assert by_gain(rules) == ["paper", "nothing"]
    assert len(figure.findall(".//{*}circle")) == 2  # of paper alone


def test_equal_rewards_have_no_gradient(planted):
    config, policy, batches = planted
    for batch in batches:
        batch.rewards = torch.ones_like(batch.rewards)
    with pytest.raises(AnalysisError, match="all gradients are zero"):
        credit.describe_credit(config, policy, batches, {"paper": Weighting("paper")})


# ---------------------------------------------------------------------------- recorded responses


@pytest.fixture
def start(make_policy, tmp_path, monkeypatch):
    return prepare(credit.main, make_policy(seed=1), tmp_path, monkeypatch)


def test_recorded_responses_are_read_as_sampled_ones(make_policy, start, tmp_path):
    """Whatever rules need is the same for both, and the entropy is that of the rollout."""
    policy = make_policy(seed=1)
    settings = [*SMALL, "rollout.prompts_per_step=4", "dyco.rule=tor"]
    config = gradients.at_first_update(load_config(DEFAULTS, settings))
    samples = toy.splits(config)[1]
    needed = {"logprobs", "entropy", "blind_logprobs", "image_similarity"}
    (sampled,) = gradients.sample_batches(config, policy, samples, count=4, needed=needed)
    rollout = sampled.rollout
    drawn = generate(
        policy,
        rollout.prompts,
        4,
        max_new_tokens=10,
        key=(config.train.seed, 0),
        capture=config.dyco,
        record=("entropy", "image_similarity"),
    )
    torch.testing.assert_close(drawn.tokens, rollout.tokens)
    torch.testing.assert_close(drawn.entropy, rollout.entropy, rtol=1e-4, atol=1e-5)
    similarity = rollout.image_similarity
    torch.testing.assert_close(drawn.image_similarity, similarity, rtol=1e-4, atol=1e-4)

    recorded = []
    for row, text in enumerate(rollout.texts):
        recorded.append((row // 4, rollout.tokens[row][rollout.mask[row]].tolist(), text))
    config = gradients.at_first_update(load_config(DEFAULTS, SMALL))
    batches = gradients.recorded_batches(config, policy, samples, recorded, needed=needed)
    assert [batch.positions for batch in batches] == [[0, 2], [1, 3]]
    for batch in batches:
        again = batch.rollout
        rows = rollout.rows(batch.positions)
        width = again.mask.shape[1]
        assert again.truncated.tolist() == rollout.truncated[rows].tolist()
        pairs = [
            (again.entropy, rollout.entropy),
            (again.image_similarity, rollout.image_similarity),
            (again.signals.visual_mass, rollout.signals.visual_mass),
            (again.signals.text_shift, rollout.signals.text_shift),
            (batch.old_logprobs, sampled.old_logprobs),
            (batch.blind_logprobs, sampled.blind_logprobs),
        ]
        for mine, theirs in pairs:
            torch.testing.assert_close(mine, theirs[rows, :width], rtol=1e-3, atol=1e-3)
            assert mine.abs().sum() > 0


# ------------------------------------------------------------------------------------ the command


def rows_of_table(folder) -> list[list[str]]:
    lines = (folder / "credit.md").read_text().splitlines()
    table = [line.strip("| ").split(" | ") for line in lines if line.startswith("| ")]
    assert table[0][0] == "rule"
    return table[1:]


def test_sampled_responses_of_any_model(start):
    """Without the toy nothing is known about decisions, so their columns and oracles are left
    out."""
    out = start("rollout.prompts_per_step=3", "train.updates_per_rollout=1")
    content = json.loads((out / "credit.json").read_text())
    assert content["rules"].keys() == RULES
    assert content["batches"] == 2
    assert content["group_sizes"] == [4]
    assert "deciding" not in content["rules"]["paper"]
    rows = rows_of_table(out)
    assert [row[0] for row in rows] == ["host", *map(label, by_gain(content["rules"]))]
    assert len(rows) == len(RULES)
    for name, row in content["rules"].items():
        difference = row["gain"][0] - row["control's gain"][0]
        assert row["over shuffled"][0] == pytest.approx(difference, abs=2e-5), name
        shares = row["visual"][0] + row["text"][0] + row["neutral"][0]
        assert shares == pytest.approx(1, abs=1e-4), name
    assert content["rules"]["paper"]["factor"][0] == pytest.approx(1.2, abs=1e-4)
    assert content["rules"]["response"]["over shuffled"] == [0, None, None]
    assert content["rules"]["surprise"]["angle"][0] > 0


def write_toy_responses(path, samples) -> None:
    """Traces with slips: four to each of two samples, three to two others, one to another one."""
    rng = random.Random(0)
    rows = []
    for place, count in enumerate([4, 4, 3, 3, 1]):
        for _ in range(count):
            text = toy.write_trace(samples[place], toy.LEVELS[1], rng)
            rows.append({"id": f"test-{place}", "response": text})
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def test_recorded_responses_on_the_toy(make_policy, start, tmp_path, capsys):
    """Groups of two sizes are two kinds of batches. Oracles find all that decides."""
    sizes = ["toy.eval_size=5", "toy.train_size=4", *SMALL]
    samples = toy.splits(load_config(DEFAULTS, sizes))[1]
    write_toy_responses(tmp_path / "own.jsonl", samples)
    out = tmp_path / "toy"
    files = {
        "--model": tmp_path / "model",
        "--data": "toy",
        "--out": out,
        "--responses": tmp_path / "own.jsonl",
    }
    credit.main([*(str(part) for pair in files.items() for part in pair), *sizes])
    printed = capsys.readouterr().out
    assert "1 prompts with a single response are left out" in printed
    content = json.loads((out / "credit.json").read_text())
    assert content["group_sizes"] == [3, 4]
    assert content["batches"] == 2
    assert content["prompts"] == 4
    rules = content["rules"]
    assert rules.keys() == {*RULES, *ORACLES}
    assert rules["oracle"]["deciding"] == [1, None, None]
    assert rules["oracle, blame"]["wrong"] == [1, None, None]
    assert rules["oracle"]["wrong"][0] < 0.7
    assert rules["off"]["deciding"] == rules["off"]["wrong"] == [0.5, None, None]
    rows = rows_of_table(out)
    assert len(rows) == len(rules)
    assert {len(row) for row in rows} == {10}
    assert (out / "credit.md").read_text() in printed
    assert "data toy (level 1), host" in printed

    figure = ElementTree.parse(out / "credit.svg").getroot()
    space = "{http://www.w3.org/2000/svg}"
    texts = [text.text for text in figure.iter(f"{space}text")]
    names = [name for name in rules if name != "off"]
    for name in names:
        assert texts.count(label(name)) == 1, name
    marks = [group for group in figure.iter(f"{space}g") if group.get("class") == "gain"]
    assert len(marks) == len(names)


@pytest.mark.parametrize(
    "more, message",
    [
        (["rollout.prompts_per_step=4"], "6 samples make 1 batches of rollout.prompts_per_step=4"),
        (["--responses", "nothing.jsonl"], "nothing.jsonl"),
        (["--rules", "paper,mine"], "--rules: no rule mine; expected some of paper, signed, "),
    ],
)
def test_credit_refuses(start, tmp_path, more, message):
    with pytest.raises(SystemExit) as caught:
        start(*more)
    assert message in str(caught.value)
    assert not (tmp_path / "out").exists()


def test_chosen_rules_and_their_labels(monkeypatch):
    assert list(credit.chosen_rules(["entropy", "signed minmax"])) == ["entropy", "signed minmax"]
    mine = dyco.RULES["paper"]._replace(source="Doe 2027")
    monkeypatch.setitem(dyco.RULES, "mine", mine)
    assert "mine" in credit.all_rules()
    assert label("mine") == "mine"
    monkeypatch.setitem(dyco.RULES, "mine", mine._replace(source="Doe 2027 (DOE)"))
    assert label("mine") == "DOE (mine)"


def test_too_few_recorded_groups(start, tmp_path):
    rows = [{"id": "row 0", "response": f"Sum {i}."} for i in range(3)]
    (tmp_path / "own.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    with pytest.raises(SystemExit, match="1 recorded groups make 1 batches of rollout"):
        start("--responses", str(tmp_path / "own.jsonl"))
