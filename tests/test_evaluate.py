"""evaluate.py: held-out accuracy, single questions, and what importing it brings in."""

import subprocess
import sys
import warnings
from pathlib import Path

import pytest
import torch
from conftest import TEMPLATE, picture

import evaluate
import rewards
import toy
from config import load_config
from data import Sample
from distributed import World
from dyco import Signals
from model import save_policy
from rows import printable
from tools.token_table import token_table


def test_images_swap_among_samples_with_as_many():
    pictures = [picture(28, 28, seed) for seed in range(6)]
    samples = [
        Sample("a", (pictures[0],), "<image>?", "1"),
        Sample("b", (), "?", "2"),
        Sample("c", (pictures[1],), "<image>?", "3"),
        Sample("d", (pictures[2], pictures[3]), "<image><image>?", "4"),
        Sample("e", (pictures[4],), "<image>?", "5"),
    ]
    swapped = evaluate.swap_images(samples)
    assert [s.images for s in swapped] == [
        (pictures[1],),
        (),
        (pictures[4],),
        (pictures[2], pictures[3]),
        (pictures[0],),
    ]
    assert [(s.id, s.question, s.answer) for s in swapped] == [
        (s.id, s.question, s.answer) for s in samples
    ]


def test_held_out_counts_every_sample_once_on_any_number_of_processes(make_policy, monkeypatch):
    """The sums of two processes' shares are the whole; waves do not change them."""
    policy = make_policy()
    samples = [toy.make_sample(toy.LEVELS[1], 0, "test", index) for index in range(7)]
    monkeypatch.setattr(rewards, "accuracy", lambda text, answer: float(len(text) % 2))

    def measure(world, tokens):
        return evaluate.held_out(
            policy,
            samples,
            TEMPLATE,
            max_new_tokens=6,
            seed=0,
            max_cache_tokens=tokens,
            world=world,
        )

    whole = measure(World(0, 1, torch.device("cpu")), 10**6)
    assert whole.keys() == {"accuracy", "format", "length", "accuracy_greedy", "accuracy_swapped"}
    assert measure(World(0, 1, torch.device("cpu")), 120) == pytest.approx(whole)
    monkeypatch.setattr(evaluate, "SAMPLES_AT_ONCE", 3)
    assert measure(World(0, 1, torch.device("cpu")), 10**6) == pytest.approx(whole)

    class Share(World):
        def sum(self, values):
            return values

    parts = [measure(Share(rank, 2, torch.device("cpu")), 10**6) for rank in range(2)]
    assert {name: parts[0][name] + parts[1][name] for name in whole} == pytest.approx(whole)


def test_a_text_only_set_has_no_swapped_accuracy(make_policy):
    found = evaluate.held_out(
        make_policy(), [Sample("a", (), "Sum circle.", "1")], TEMPLATE, max_new_tokens=4, seed=0
    )
    assert "accuracy_swapped" not in found
    assert found["accuracy"] in (0.0, 1.0)


def run_python(code: str) -> str:
    """What a fresh interpreter prints. It finds the modules of the project."""
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=Path(evaluate.__file__).parent,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_importing_it_imports_neither_benchmarks_nor_torch():
    """train.py needs `held_out` alone, and scoring needs no torch."""
    assert (
        run_python(
            "import evaluate, sys; print({'benchmarks', 'torch', 'tools'} & set(sys.modules))"
        )
        == "set()\n"
    )


# ----------------------------------------------------------------------------- single questions


@pytest.fixture
def ask(tmp_path, make_policy, capsys):
    """ask(*options) asks a tiny random policy and returns what is printed."""
    folder = tmp_path / "final"
    save_policy(make_policy(), folder)
    picture(112, 84, 0).save(tmp_path / "picture.png")

    def call(*options: str, question: str = "Sum circle, cross.") -> str:
        given = ["--model", str(folder), "--image", str(tmp_path / "picture.png")]
        evaluate.main(["ask", *given, "--max-new-tokens", "6", *options, question])
        return capsys.readouterr().out

    return call


def test_ask_prints_the_response_and_only_with_tokens_the_table(ask, tmp_path):
    """The table has a line for each token of the response, between a header and a legend."""
    plain = ask()
    told = ask("--tokens")
    assert told.startswith(plain)
    lines = told.removeprefix(plain).splitlines()
    assert lines[0] == ""
    assert lines[1].split() == ["visual", "text", "visual", "text", "proba-"]
    titles = ["token", "mass", "mass", "shift", "shift", "role", "score", "weight", "bility"]
    assert lines[2].split() == titles
    assert " ".join(lines[3].split()) == "eq. 1 eq. 1 eq. 3 eq. 3 eq. 5 eq. 4, 6 eq. 7"
    assert lines[-2].startswith("mass: share of the attention")
    tokens = lines[4:-2]
    assert 1 <= len(tokens) <= 6
    for line in tokens:
        assert len(line) == len(lines[2])
        visual, text, _, _, role, score, weight, probability = line.split()[-8:]
        assert 0 <= float(visual) + float(text) <= 1.001
        assert role in ("visual", "text", "–")
        assert (float(score) == 0) == (role == "–")
        assert 0 <= float(probability) <= 1
        assert float(weight) > 0
    # The first token has no predecessor, so its attention did not move (eq. 3).
    assert tokens[0].split()[-6:-3] == ["0.000", "0.000", "–"]
    # A mean of 1 (eq. 7), up to the rounding to three digits.
    weights = [float(line.split()[-2]) for line in tokens]
    assert sum(weights) / len(weights) == pytest.approx(1, abs=1e-3)
    assert all(len(line) <= 100 for line in lines)


def test_the_tokens_are_read_as_the_training_run_read_them(ask, tmp_path):
    """A model in RUN_DIR/final has its settings and its template in RUN_DIR/config.yaml."""
    (tmp_path / "config.yaml").write_text("dyco: {tau: 100}\n")
    neutral = ask("--tokens").splitlines()[-3]
    assert neutral.split()[-4:-1] == ["–", "0.000", "1.000"]
    (tmp_path / "config.yaml").write_text(
        "data: {prompt_template: '{question} Say it in a word.'}\n"
    )
    assert evaluate.config_of(str(tmp_path / "final")).data.prompt_template.endswith("a word.")
    assert ask() == ask("--template", "{question} Say it in a word.")
    (tmp_path / "config.yaml").write_text("dyco: {layers: [7]}\n")
    with pytest.raises(SystemExit, match="^error: .*dyco.layers"):
        ask("--tokens")
    # final/ has the limits of the released model; the run's own stands in its settings.
    (tmp_path / "config.yaml").write_text("data: {max_pixels: 100}\n")
    with pytest.raises(SystemExit, match="^error: data.max_pixels: expected at least 3136"):
        ask()
    # The folder of another model beside a config.yaml is no run.
    assert evaluate.config_of(str(tmp_path / "other")) == load_config()


def test_nothing_that_a_model_writes_reaches_the_terminal_raw():
    """Escape sequences, and marks that turn the direction of text, are shown and not obeyed."""
    text = "a\x1b[2J\x07\x9b1m\u202eb\r\ud800\nsecond\tline é 圖"
    assert printable(text) == ("a\\x1b[2J\\x07\\x9b1m\\u202eb\\r\\ud800\nsecond\tline é 圖")
    tokens = [text, "\n", "圖" * 40, "'", "\\n", "", "x" * 19]
    blank = torch.zeros(len(tokens))
    reading = evaluate.TokenReading(
        tokens=tokens,
        signals=Signals(blank, blank, blank, blank),
        roles=torch.zeros(len(tokens), dtype=torch.int8),
        scores=blank,
        weights=blank + 1,
        probabilities=blank,
        images=torch.zeros(len(tokens), 0),
    )
    lines = token_table(reading).splitlines()[3:-2]
    assert all(line.isprintable() for line in lines)
    shown = [line.split("    ")[0] for line in lines]
    assert shown[0].startswith("'a\\x1b[2J\\x07")
    assert shown[1:2] + shown[3:6] == [r"'\n'", '"\'"', r"'\\n'", "''"]
    assert shown[2].startswith("'" + "圖" * 9 + "…")
    assert shown[6].startswith("'" + "x" * 19)


def test_a_question_has_as_many_markers_as_images(ask, tmp_path):
    more = ("--image", str(tmp_path / "picture.png"))
    with pytest.raises(SystemExit, match="the question has 1 <image> markers; expected 2"):
        ask(*more, question="Sum <image>.")


def test_pictures_are_looked_at_before_the_model_is(ask, monkeypatch):
    monkeypatch.setattr("model.load_policy", None)  # which would be a TypeError
    with pytest.raises(SystemExit, match="image 'nowhere.png' is not a file"):
        ask("--image", "nowhere.png")


def test_errors_and_warnings_are_not_obeyed_by_the_terminal(capsys, monkeypatch):
    """Whatever text of a file they hold; a message of several lines keeps them."""

    def fail(arguments):
        warnings.warn("of \x1b]0;title\x07", stacklevel=1)
        raise ValueError("row \x1b[2J\n\u202esecond")

    monkeypatch.setattr(evaluate, "score", fail)
    with pytest.raises(SystemExit) as caught:
        evaluate.main(["score", "--benchmark", "MME", "--responses", "x"])
    assert str(caught.value) == "error: row \\x1b[2J\n\\u202esecond"
    assert capsys.readouterr().err == "warning: of \\x1b]0;title\\x07\n"


@pytest.mark.parametrize(
    "option", ["--max-new-tokens=0", "--max-new-tokens=-3", "--temperature=nan", "--temperature=-1"]
)
def test_ask_refuses_numbers_out_of_range_before_it_loads_a_model(option, capsys):
    with pytest.raises(SystemExit, match=f"{option.split('=')[0]}: expected"):
        evaluate.main(["ask", "--model", "nowhere", option, "Sum circle."])
