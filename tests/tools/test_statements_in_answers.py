"""Mode "final" takes what is stated, in full-width marks, numbered parts, among other letters."""

import time

import pytest
from benchmark_rows import MATHVISION, score_rows

from benchmarks import Row, find
from benchmarks.answers import boxed_values, stated_letters

OPTIONS = {"A": "20°", "B": "40°", "C": "30°", "D": "60°"}


def hit_of(name: str, response: str, **cells) -> bool | None:
    """What mode "final" makes of a response to a row with these cells."""
    benchmark = find(name)
    row = Row("x.tsv, line 2", "1", cells)
    for text in benchmark.readings(response):
        hit = benchmark.check(row, text)
        if hit is not None:
            return hit
    return None


@pytest.mark.parametrize(
    "response, letter",
    [
        ("答案：B", "B"),
        ("答案是（B）", "B"),
        ("答案是B", "B"),
        ("答案为：B，而不是A", "B"),
        ("A不对，答案是B，因为C太大", "B"),
        ("应选择 C，因为A不对。", "C"),
        ("故选Ｄ", "D"),
        ("选B", "B"),
        ("【答案】B", "B"),
        ("正确答案是：B. 40°，A 是错的", "B"),
        ("B。", "B"),
        ("Ｂ", "B"),
        ("（Ｂ）", "B"),
        ("D．60°", "D"),
        ("40°。", "B"),
        ("A is wrong and B too small. Answer: D. It is large", "D"),
        ("The answer is B, since A and C are too small for what is asked", "B"),
        ("Final Answer: C\nA and B are wrong as I said above, not at all", "C"),
        ("The correct option is C. A and B are not right here, not at all", "C"),
        ("**Answer:** B because A was not it, not at all", "B"),
        ("The answer is $B$ because $A = 3$ and so on and so on", "B"),
        ("1) too small 2) too large. Answer: B", "B"),
        # The box comes first, and settles it.
        (r"The answer is C, not \boxed{A}", "A"),
        # Two letters, or none.
        ("答案：A、C", None),
        ("(1) 5 (2) 7", None),
        ("The answers are A and B, and what else", None),
    ],
)
@pytest.mark.parametrize("name", ["MMBench", "WeMath", "MathVision"])
def test_an_explicit_statement_wins(name, response, letter):
    cells = OPTIONS | {"answer": letter or "A", "choices": str(list(OPTIONS.values()))}
    assert hit_of(name, response, **cells) is (None if letter is None else True)


@pytest.mark.parametrize(
    "text",
    ["The answer is B = 30", "the answer is A square", "The answer is AB", "Option A: 3", ""],
)
def test_what_is_no_statement(text):
    assert stated_letters(text) is None


@pytest.mark.parametrize(
    "response, answer",
    [
        ("答案：B", "B"),
        ("B。", "B"),
        ("Ｂ", "B"),
        ("A、C", "A, C"),
        ("Ａ，Ｃ", "A, C"),
        ("答案：A、C", "A, C"),
        ("答案是A和C", "A, C"),
        ("1) A 2) B", "A, B"),
        ("(1) B (2) C", "B, C"),
        ("３", "3"),
        ("The answer is (3).", "3"),
        ("答案：3，不是1", "3"),
        ("1) is too small. **Answer:** 3", "3"),
    ],
)
def test_letters_of_logicvista(response, answer):
    assert hit_of("LogicVista", response, answer=answer) is True


@pytest.mark.parametrize(
    "response", ["(1) 5 (2) 3", "The answer is 3.5", "The answer is 3 cm or 4", "The answer is 35"]
)
def test_other_numbers_of_logicvista(response):
    assert hit_of("LogicVista", response, answer="5") is not True


@pytest.mark.parametrize(
    "response, answer",
    [
        ("Yes。", "Yes"),
        ("答案：Yes", "Yes"),
        ("Ｎｏ", "No"),
        ("No，it is not", "No"),
        ("是：No！", "No"),
    ],
)
def test_yes_and_no(response, answer):
    assert hit_of("MME", response, answer=answer) is True


@pytest.mark.parametrize(
    "text, hit", [("(1) 5", None), ("(1)", True), ("1", True), ("1) 7 2) 8", None)]
)
def test_the_number_of_a_part_is_no_option(text, hit):
    cells = {"question_type": "multi-choice", "question_for_eval": "Choices:\nA:1\nB:3\nC:x"}
    assert hit_of("MathVerse_MINI", text, answer="A", **cells) is hit


def test_a_boxed_reference_matches_in_final_and_as_a_number_in_raw(tmp_path):
    """VLMEvalKit reads boxed numbers on both sides; anything else it compares as it stands."""

    def value(answer, response, mode):
        row = dict(index=1, choices="[]", answer=answer, category="x", response=response)
        return score_rows(tmp_path, "MathVision_MINI", [row], mode)["headline"]["value"]

    with pytest.warns(UserWarning, match="rows; the released"):
        assert value(r"$\boxed{7}$", "7", "raw") == 100
        assert value(r"$\boxed{7}$", r"So \boxed{7}.", "final") == 100
        assert value(r"$\boxed{2\sqrt{3}}$", r"\boxed{2\sqrt{3}}", "final") == 100
        assert value(r"$\boxed{2\sqrt{3}}$", r"2\sqrt{3}", "raw") == 0
        assert (
            score_rows(
                tmp_path,
                "MathVision_MINI",
                [dict(MATHVISION[0], answer=r"\boxed{\text{B}}", response="B")],
                "final",
            )["headline"]["value"]
            == 100
        )


@pytest.mark.parametrize(
    "part",
    ["answer is ", "答案是", "选", "A,", "\\boxed", "\\boxed{", "^ ", "{", "B 和", "answer: A, "],
)
def test_hostile_text_takes_linear_time(part):
    text = part * (200_000 // len(part))
    started = time.perf_counter()
    for name in ("MMBench", "LogicVista", "MME"):
        find(name).readings(text)
    boxed_values(text)
    assert time.perf_counter() - started < 5
