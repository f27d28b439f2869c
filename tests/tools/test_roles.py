"""roles.py: statistics by hand, what toy responses decide, sampled and recorded responses."""

import json

import pytest
import torch
from observations import SCENE, observed, prepare

import dyco
from dyco import Signals
from tools import roles
from tools.observed import Observed
from tools.toy_decisions import decisions_text, describe_decisions, toy_decisions

# ------------------------------------------------------------------------------------ statistics


def test_statistics_of_a_response_by_hand():
    seen = observed(
        [[0, 1, 0, -1, -1, 1, 0, 0]],
        [[0, 0.2, 0, 0.8, 0.6, 0.4, 0, 9]],
        mask=[[True] * 7 + [False]],
        visual_shift=[[9.0] + [1.0] * 6 + [9.0]],
        visual_mass=[[0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 9.0]],
    )
    means = {
        name: float(numerator[0] / denominator[0])
        for name, (numerator, denominator) in roles.statistics(seen).items()
        if denominator[0]
    }
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
        assert means[name] == pytest.approx(value), name


def test_right_and_wrong_stand_side_by_side(tokenizer):
    """Wrong responses look less: the difference is found, and its interval leaves out 0."""
    generator = torch.Generator().manual_seed(0)
    prompts, size = 60, 8
    right = torch.arange(prompts * size) % 2 == 0
    noise = 0.1 * torch.randn(prompts * size, 20, generator=generator)
    scores = 0.5 + noise - 0.2 * (~right)[:, None]
    seen = observed(
        torch.ones(prompts * size, 20, dtype=torch.long).tolist(),
        scores.tolist(),
        right.tolist(),
        prompt=[i // size for i in range(prompts * size)],
    )
    described = roles.describe_roles(seen, tokenizer)
    statistics = described["statistics"]
    value, low, high = statistics["alignment of visual tokens"]["difference"]
    assert low < value < high < 0
    assert value == pytest.approx(-0.2, abs=0.02)
    assert statistics["alignment of text tokens"]["correct"] == [None, None, None]
    assert described["counts"]["correct"] == {"responses": 240, "prompts": 60}
    assert described["strings"]["visual"][0]["occurrences"] == prompts * size * 20
    assert described["strings"]["text"] == []
    assert "alignment of visual tokens" in roles.roles_text(described)
    assert json.dumps(described, allow_nan=False)


def test_without_a_right_response(tokenizer):
    described = roles.describe_roles(observed([[1, -1, 0]], correct=(False,)), tokenizer)
    assert described["statistics"]["image mass"]["correct"] == [None, None, None]
    assert "–" in roles.roles_text(described)


# ------------------------------------------------------------------------------ the toy's decisions

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


def test_decisions_of_a_toy_response_by_hand():
    """A wrong total does not make the next one wrong; a wrong colour makes neither its value nor
    its total wrong."""
    assert toy_decisions(TRACE, SCENE) == {
        2: ("colour", True),
        3: ("value", True),
        5: ("total", True),
        6: ("value", True),
        7: ("total", False),  # the token 6 holds the circle's colour, too: its last decision stays
        9: ("colour", True),
        10: ("total", True),
    }
    pieces = [" ", *"cross is red 1, total 1."]
    assert toy_decisions(pieces, SCENE)[10] == ("colour", False)


@pytest.mark.parametrize(
    "text",
    [
        "",
        "circle is",
        "cross is \u0661 \u0661, total 1.",
        "ring is mauve 99, total " + "9" * 60 + ".",
    ],
)
def test_odd_responses_decide_nothing_right(text):
    assert not any(is_right for _, is_right in toy_decisions([text], SCENE).values())


def test_decisions_are_counted_by_hand(tokenizer):
    """Two responses to one prompt; roles, shares and weights of the tokens that name colours."""
    text = "cross is blue 3, total 3. circle is red 1, total 4."
    ids = tokenizer(text).input_ids
    pieces = [tokenizer.decode([token]) for token in ids]
    blue = pieces.index(" blue")
    red = pieces.index(" red")
    token_roles = torch.zeros(2, len(ids), dtype=torch.long)
    token_roles[0, blue] = 1
    token_roles[1, blue] = -1
    token_roles[:, red] = -1
    scores = torch.zeros(2, len(ids))
    scores[0, blue] = 0.8
    scores[1, blue] = 0.4
    scores[:, red] = 0.3
    visual = torch.full((2, len(ids)), 0.1)
    visual[:, blue] = 0.3
    seen = Observed(
        prompt=torch.zeros(2, dtype=torch.long),
        correct=torch.tensor([True, False]),
        tokens=torch.tensor([ids, ids]),
        mask=torch.ones(2, len(ids)).bool(),
        signals=Signals(
            visual_mass=visual,
            text_mass=torch.full_like(visual, 0.1),
            visual_shift=torch.zeros_like(visual),
            text_shift=torch.ones_like(visual),
        ),
        roles=token_roles,
        scores=scores,
    )
    described = describe_decisions(seen, [SCENE], tokenizer)

    colour = described["colour"]["right"]
    assert colour["tokens"] == 2
    assert colour["visual, %"][0] == colour["text, %"][0] == 50
    assert colour["alignment"][0] == pytest.approx(0.6)
    assert colour["image's share"][0] == pytest.approx(0.75)
    assert colour["text shift"][0] == 1
    weights = dyco.token_weights(scores, seen.mask)
    assert colour["weight"][0] == pytest.approx(float(weights[:, blue].mean()), abs=1e-4)
    assert described["colour"]["difference"]["weight"][0] is None

    assert described["circle's colour"]["wrong"]["tokens"] == 2
    assert described["circle's colour"]["right"]["alignment"] == [None, None, None]
    assert described["value"]["right"]["tokens"] == 4
    assert described["total"]["right"]["tokens"] == 4
    assert described["other"]["right"]["tokens"] == 2 * len(ids) - 12
    assert described["other"]["right"]["text, %"] == [0, 0, 0]
    assert "circle's colour, wrong" in decisions_text(described)
    assert json.dumps(described, allow_nan=False)


# ------------------------------------------------------------------------------------ the command


@pytest.fixture
def start(make_policy, tmp_path, monkeypatch):
    return prepare(roles.main, make_policy(seed=1), tmp_path, monkeypatch)


def test_sampled_and_recorded_agree(start, capsys):
    """The same responses, decoded and teacher-forced, have the same roles but for shifts within
    1e-4 of τ, so the same statistics."""
    out = start()
    sampled = json.loads((out / "roles.json").read_text())
    assert "within prompts" in capsys.readouterr().out
    assert sampled["counts"]["correct"]["responses"] == 12
    responses = [json.loads(line) for line in (out / "responses.jsonl").read_text().splitlines()]
    assert len(responses) == 24
    ids = {"row 0", "row 1", "row 2", "row 3", "two", "5"}
    assert {row["id"] for row in responses} == ids

    again = start("--responses", str(out / "responses.jsonl"), out="again")
    read = json.loads((again / "roles.json").read_text())
    for name, row in sampled["statistics"].items():
        for outcome in ("correct", "incorrect"):
            expected = row[outcome][0]
            tolerance = 2e-3 * max(1, abs(expected or 0))
            actual = read["statistics"][name][outcome][0]
            assert actual == pytest.approx(expected, abs=tolerance), name
    with pytest.raises(SystemExit, match="holds responses that were sampled before"):
        start()


def test_recorded_text_is_tokenized(start, tmp_path):
    """The last row has no end of line, but is whole."""
    (tmp_path / "own.jsonl").write_text(
        '{"id": "two", "response": "circle is red"}\n\n'
        '{"id": "row 1", "response": "", "token_ids": null}\n'
        '{"id": 5, "response": "</script>", "truncated": true}'
    )
    out = start("--responses", str(tmp_path / "own.jsonl"))
    counts = json.loads((out / "roles.json").read_text())["counts"]
    assert sum(counts[outcome]["responses"] for outcome in ("correct", "incorrect")) == 3


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
    good = '{"id": "two", "response": "circle"}\n'
    (tmp_path / "own.jsonl").write_text(f"{good}{line}\n" if line else "")
    with pytest.raises(SystemExit) as caught:
        start("--responses", str(tmp_path / "own.jsonl"))
    assert message in str(caught.value)
    if line:
        assert "line 2" in str(caught.value)
    assert not (tmp_path / "out").exists()


def test_data_without_an_image_has_roles(start, tmp_path):
    (tmp_path / "text.jsonl").write_text('{"question": "Sum.", "answer": "2"}\n')
    start(data="text.jsonl")


def test_a_reference_that_nothing_matches_is_refused_as_in_training(start, tmp_path):
    (tmp_path / "empty.jsonl").write_text('{"question": "Sum.", "answer": "<answer></answer>"}\n')
    with pytest.raises(SystemExit, match="line 1.*no response can match it"):
        start(data="empty.jsonl")


def test_the_toy_has_its_decisions_beside_the_roles(start, tmp_path, capsys):
    plain = start(out="plain")
    assert "decisions" not in json.loads((plain / "roles.json").read_text())
    files = ["--model", str(tmp_path / "model"), "--data", "toy", "--out", str(tmp_path / "toy")]
    sizes = ["eval.samples=3", "rollout.group_size=2", "rollout.max_new_tokens=6"]
    roles.main([*files, *sizes, "train.threads=0"])
    described = json.loads((tmp_path / "toy" / "roles.json").read_text())["decisions"]
    assert 6 <= described["other"]["right"]["tokens"] <= 36
    assert list(described)[0] == "colour"
    assert "tokens that decide" in capsys.readouterr().out
