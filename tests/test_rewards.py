"""rewards/__init__.py: accuracy, format, and a reward of one's own. Examples in docstrings run."""

import doctest
import importlib
import pkgutil

import pytest

import rewards
from rewards import (
    RewardError,
    accuracy,
    extract_answer,
    is_satisfiable,
    load_custom,
    read_reference,
)


@pytest.mark.parametrize(
    "response, content",
    [
        ("<answer>5</answer>", "5"),
        ("<answer>5</answer> no: <answer>6</answer>", "6"),
        ("<answer>5</answer> and <answer>6", "5"),
        ("<answer>5<answer>6</answer>", "6"),
        ("<answer>5</answer></answer>", "5"),
        ("<answer></answer>", ""),
        ("</answer>5<answer>", None),
        ("5", None),
        ("", None),
    ],
)
def test_extract_answer(response, content):
    assert extract_answer(response) == content


def test_accuracy_counts_the_last_block_alone():
    assert accuracy("<answer>5</answer><answer>6</answer>", "6") == 1.0
    assert accuracy("<answer>6</answer><answer>5</answer>", "6") == 0.0
    assert accuracy("6", "6") == 0.0


@pytest.mark.parametrize(
    "response, expected",
    [
        ("<think>2+2</think><answer>4</answer>", 1.0),
        (" \n<think>a\nb</think>\n\n<answer>4</answer>\n", 1.0),
        ("<think></think><answer>4</answer>", 1.0),
        ("<think>a < b > c</think><answer>4</answer>", 1.0),
        ("<think>a</think><answer></answer>", 0.0),
        ("<think>a</think><answer> \n</answer>", 0.0),
        ("<think>a</think> so <answer>4</answer>", 0.0),
        ("Well <think>a</think><answer>4</answer>", 0.0),
        ("<think>a</think><answer>4</answer>.", 0.0),
        ("<think>a</think>", 0.0),
        ("<answer>4</answer>", 0.0),
        ("<answer>4</answer><think>a</think>", 0.0),
        ("<think>a<answer>4</answer></think>", 0.0),
        ("<think>a<think>b</think><answer>4</answer>", 0.0),
        ("<think>a</think><think>b</think><answer>4</answer>", 0.0),
        ("<think>a</think><answer>4</answer><answer>5</answer>", 0.0),
        ("<think>a</think></answer><answer>4", 0.0),
        ("<think>a<answer>4</answer>", 0.0),
        ("", 0.0),
    ],
)
def test_format(response, expected):
    assert rewards.format(response) == expected


# --------------------------------------------------------------------------------------- references


@pytest.mark.parametrize(
    "answer, inside",
    [
        ("<answer> 3 </answer>", "3"),
        ("<answer>D</answer>", "D"),
        ("<think>I count twelve.</think><answer>12</answer>", "12"),
        ("<think>so</think>\n12", "12"),
        ("3 + 4 = <<3+4=7>>7\n#### 7", "7"),
        ("#### 1,234", "1,234"),
        (r"We add and get $\boxed{\frac{1}{2}}$.", r"\frac{1}{2}"),
        (r"<answer>\boxed{5}</answer>", "5"),
        (r"<answer> \boxed{(B) 12} </answer>", "B"),
        ("(B) 12 cm", "B"),
        ("B) 12 cm", "B"),
        ("B. 12", "B"),
        ("C: yes", "C"),
        ("B. Paris", "B"),
        # what is plain stays as it is
        ("12 cm", "12 cm"),
        ("B", "B"),
        ("(B)", "(B)"),
        ("E. coli", "E. coli"),
        ("(1, 2)", "(1, 2)"),
        ("A) 12 or (b) 13", "A) 12 or (b) 13"),
        ("A cat", "A cat"),
        (" 5 ", " 5 "),
        ("#1", "#1"),
        ("x<answer", "x<answer"),
        ("", ""),
    ],
)
def test_read_reference(answer, inside):
    assert read_reference(answer) == inside
    assert read_reference(inside) == inside
    if inside:
        assert is_satisfiable(answer)
        assert accuracy(f"<answer>{inside}</answer>", answer) == 1.0
    assert accuracy("<answer>another</answer>", answer) == 0.0


@pytest.mark.parametrize("answer", ["", " ", "<answer></answer>", "<think>5</think>", "$$", ","])
def test_references_that_no_response_matches(answer):
    assert not is_satisfiable(answer)


@pytest.mark.parametrize(
    "answer",
    ["5", "(1, 2]", "x^2+1", r"\{1,2\}", "a, b", "H2O", "B or C", "3-5", "?", "1/0", "x" * 9999],
)
def test_a_plain_reference_matches_itself(answer):
    assert is_satisfiable(answer) is (answer != "?")


# ----------------------------------------------------------------------------------------- examples


MODULES = ["rewards"] + [
    f"rewards.{module.name}" for module in pkgutil.iter_modules(rewards.__path__)
]


@pytest.mark.parametrize("name", MODULES)
def test_the_examples_of_the_docstrings(name):
    outcome = doctest.testmod(importlib.import_module(name))
    assert outcome.attempted > 0 and outcome.failed == 0


# ----------------------------------------------------------------------------------- custom rewards


def test_load_custom(tmp_path):
    file = tmp_path / "mine.py"
    file.write_text(
        "SCALE = 2\n"
        "def length(response, answer, sample):\n"
        "    return SCALE * len(response) / sample\n"
    )
    assert load_custom(f"{file}:length")("abc", "", 3) == 2.0


@pytest.mark.parametrize(
    "suffix, message",
    [
        ("mine.py", "expected path/to/file.py:function"),
        ("mine.py:", "expected path/to/file.py:function"),
        ("mine:length", "expected path/to/file.py:function"),
        ("mime.py:length", "no file .*nearest there: mine.py"),
        ("mine.py:lenght", "found nothing of that name.*nearest in the file: length"),
        ("mine.py:SCALE", "found int SCALE, expected a function.*length"),
    ],
)
def test_load_custom_names_what_is_wrong(tmp_path, suffix, message):
    (tmp_path / "mine.py").write_text(
        "SCALE = 2\ndef length(response, answer, sample):\n    return 1.0\n"
    )
    with pytest.raises(ValueError, match=message):
        load_custom(str(tmp_path / suffix))


@pytest.mark.parametrize(
    "content, message",
    [
        (
            "\nimport nothing_of_this_name\n",
            "ModuleNotFoundError: .*nothing_of_this_name.*, line 2",
        ),
        ("import sys\nsys.exit(3)\n", r"SystemExit: 3 \(.*broken.py, line 2\)"),
        ("x = [][0]\n", r"IndexError: .* \(.*broken.py, line 1\)"),
        ("def f(:\n", r"SyntaxError: invalid syntax \(broken.py, line 1\)"),
        ("x = '\0'", r"broken\.py"),
    ],
)
def test_a_file_that_cannot_be_imported_is_a_clear_error(tmp_path, content, message):
    (tmp_path / "broken.py").write_text(content)
    with pytest.raises(RewardError, match=f"^custom reward .*cannot be imported: .*{message}"):
        load_custom(f"{tmp_path / 'broken.py'}:f")
