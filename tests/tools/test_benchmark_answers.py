"""benchmarks/answers.py: what each rule reads out of a text.

The expectations were written from the description of VLMEvalKit's behaviour, not from its code or
ours.
"""

import time

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

import rewards
from benchmarks import (
    answer_letters,
    final_answer,
    is_equal,
    letter_after_answer,
    match_option,
    yes_or_no,
)

ABC = {
    "A": "red square",
    "B": "blue",
    "C": "the green one",
}  # 27 characters: the text rule reads up to 54


@pytest.mark.parametrize(
    "text, expected",
    [
        ("C", "C"),
        ("C. blue", "C"),
        ("(C)", "C"),
        ("**C**", "C"),
        (r"\boxed{C}", "C"),
        ("<answer> C </answer>", "C"),
        ("{B}", "B"),
        ("B:", "B"),
        ("<answer>C</answer>", None),
        ("c", None),
        ("A or B", None),
        ("Option A is wrong, so C", None),
        ("", None),
        ("$C$", None),
        ("-C", None),
        ("C is one two", "C"),
        ("C is one two three", None),  # among the last four words, or not
        ("C one two three four C", None),  # its first occurrence counts
        ("A square of some red square", "A"),
        ("A red square", "A"),  # too early for its letter, but its text is there
        ("it is BLUE", "B"),
        ("a blue red square", None),
        ("red square" + " " * 44, "A"),
        ("red square" + " " * 45, None),
        ("Z", "Z"),
        ("none: Z.", "Z"),
        ("A Z", "A"),
        ("Z one two three four five", "Z"),
        ("A is Cannot determine the answer", "Z"),
        ("Sorry, I can't help with images of people yet. A", "Z"),
        ("I can't process this file.", "Z"),
        ("I'm sorry, but without the image provided I say B", "Z"),
        ("Failed to obtain answer via API. B", None),
        ("Failed to obtain answer via API blue", "B"),
        ("D", None),
        ("A\tB", None),
        ("B\n", "B"),
        ("AB", None),
        ("A/B", None),
        ("A,B", None),
    ],
)
def test_match_option(text, expected):
    assert match_option(text, ABC) == expected


def test_match_option_has_vlmevalkits_later_rule_as_a_switch():
    """ "answer is", stars, a letter a-d without a word boundary: with its known bug."""
    long = " and so on and so on and so on and so on and so on"
    for text, expected in (
        ("The answer is approximately 3", "A"),
        ("the ANSWER IS because", "B"),
        ("answer is clearly", "C"),
        ("answer is **C**", "C"),
        ("answer  is b", "B"),
        ("answer is \t\n b", "B"),
        ("answer is**B**", None),
        ("answer is ** B**", None),
        ("answer is definitely", None),
        ("answer isn't", None),
    ):
        assert match_option(text + long, ABC) is None
        assert match_option(text + long, ABC, answer_is=True) == expected
    assert (
        match_option("Z. The answer is bad" + long, ABC, answer_is=True) == "Z"
    )  # the earlier rules come first


@pytest.mark.parametrize(
    "text, expected",
    [
        ("Yes", "Yes"),
        ("no.", "No"),
        ("YES, it is.", "Yes"),
        ("I think yes", "Yes"),
        ("yes or no", None),
        ("", None),
        ("nothing", None),
        ("yess", None),
        ("**Yes**", None),
        ("Yes:", None),
        ("A:No", None),
        ("'yes'", None),
        ("#yes", None),
        ("<answer>Yes</answer>", "Yes"),
        ("<think>a.</think> <answer>No</answer>", None),
        ("<think>yes or no? ...</think> <answer>Yes</answer>", "No"),
        ("yes?no", None),
        ("yes?maybe", "Yes"),
        ("yes?maybe ?", None),  # a mark beside a space anywhere is deleted everywhere
        ("yes-maybe", "Yes"),
        ("1,000 yes-maybe", None),
        ("1, 000 yes-maybe", "Yes"),  # so are all marks where digits are joined by a comma
        ("3.yes", None),
        ("yes.3", None),
        ("a.yes", None),
        ("yes...", "Yes"),
        ("yes . no3", "Yes"),
        (". " * 31 + "yes.", "Yes"),
        (". " * 32 + "yes.", None),
        (".3" * 40 + " yes.", "Yes"),  # 32 periods are deleted, those before digits not
        ("1.\n" * 31 + "yes.", "Yes"),
        ("1. " * 32 + "yes.", "Yes"),  # periods that touch a digit are neither deleted nor counted
        ("1.\n" * 32 + "yes.", "Yes"),
    ],
)
def test_yes_or_no(text, expected):
    assert yes_or_no(text) == expected


@pytest.mark.parametrize(
    "text, expected",
    [
        ("  B\n", "B"),
        ("<think>A?</think>B", "B"),
        ("</think>A</think> C ", "C"),
        ("<answer>A</answer> or <answer> B </answer>.", "B"),
        ("<think><answer>A</answer></think>B", "B"),
        ("<think>x</think><answer>A</answer>", "A"),
        ("<answer>A", "<answer>A"),
        ("A</answer>", "A</answer>"),
        (r"so \boxed{5}", "5"),
        (r"\boxed{1}, no, \boxed{2}", "2"),
        (r"\boxed{\frac{1}{2}}", r"\frac{1}{2}"),
        (r"\boxed{2} \boxed{3", "2"),
        (r"\boxed{\boxed{7}}", "7"),
        (r"\boxed{ \text{B} }", "B"),
        (r"\boxed{\mathrm{C}}", "C"),
        (r"\boxed{\text{a}\text{b}}", r"\text{a}\text{b}"),
        (r"\text{B}", r"\text{B}"),
        (r"\boxed{\text{\text{B}}}", r"\text{B}"),
        (r"{ \boxed{7}", "7"),
        (r"} \boxed{7}", "7"),
        (r"\boxed{}", ""),
        ("", ""),
        ("<answer></answer>", ""),
        (r"\boxed{1}<think>\boxed{2}</think><answer>\boxed{3} cm</answer>", "3"),
        (r"\boxed{1}</think>4", "4"),
    ],
)
def test_final_answer(text, expected):
    assert final_answer(text) == expected


@pytest.mark.parametrize(
    "text, expected",
    [
        ("<Thought process>: <<x>> <Answer>: <<B>>", "B"),
        ("B", "B"),
        ("B. 24 cm", "B"),
        ("Answer: B", "B"),
        ("Answer: A. Answer: C", "C"),
        ("H", "H"),
        ("The answer is B", None),
        ("(B)", None),
        (r"\boxed{B}", None),
        ("Answer: **B**", None),
        ("I", None),
        ("", None),
        ("Answer", None),
        ("A triangle has", "A"),
        ("Between", "B"),
        ("b", None),
    ],
)
def test_letter_after_answer(text, expected):
    assert letter_after_answer(text) == expected


@pytest.mark.parametrize(
    "text, expected",
    [
        ("B", "B"),
        ("A, C", "AC"),
        ("C,A", "AC"),
        ("A and C", "AC"),
        ("A; C/E & I", "ACEI"),
        ("A C", "AC"),
        ("A, B, and D", "ABD"),
        ("(B)", "B"),
        ("A.", "A"),
        ("**I**", "I"),
        ("B, B", "B"),
        ("The answer is A.", "A"),
        ("The answers are A and I, I believe", "AI"),
        ("Option: C", "C"),
        ("The correct choice is:\n\n**D**", "D"),
        ("The answer is A. No, the answer is C, D!", "CD"),
        ("ANSWER: (E)", "E"),
        ("the options are A, B; the answer is B because A is", "B"),
        ("It must be C.", "C"),
        ("C, yes, C", "C"),
        ("D-shaped", "D"),
        ("C or D", None),
        ("It is A", None),
        ("I think so", None),
        ("J", None),
        ("b", None),
        ("BD", "BD"),
        ("A. 1", "A"),
        ("(A) True", "A"),
        ("A) True", "A"),
        ("**A**: True", "A"),
        ("Option A", "A"),
        ("B. A, B, D, F", "B"),
        ("The correct answer is option A", "A"),
        ("The answer is: **option** B", "B"),
        ("Option B, since C is not", None),
        ("A. B. C.", None),
        ("A is the answer", None),
        ("A. Einstein", "A"),
        ("the answer is Because", None),
        ("", None),
        ("3", None),
        ("answer is 3", None),
        ("The answer is unknown. Banana", None),
    ],
)
def test_answer_letters(text, expected):
    assert answer_letters(text) == (None if expected is None else set(expected))


@pytest.mark.parametrize(
    "answer, reference, expected",
    [
        ("1/2", "0.5", True),
        (r"\frac{1}{2}", "0.5", True),
        ("$5$", "5", True),
        ("5^2", "25", True),
        ("1,000", "1000", True),
        ("2**3", "8", True),
        ("-1e3", "-1000", True),
        (" X = 2 ", "x = 2", True),
        ("0.3333334", "1/3", True),
        ("0.33333", "1/3", False),
        (r"\dfrac{3}{4}", "0.75", True),
        (r"The answer is \boxed{225}.", "225", True),
        ("7", r"$\boxed{7}$", True),
        (r"So \boxed{0.5}", r"$\boxed{\frac{1}{2}}$", True),
        (r"\boxed{45^\circ}", "45", True),
        (r"45^{\circ}", "45", True),
        (r"\boxed{\$5}", "5", True),
        (r"\boxed {7}", "7", True),
        (r"\boxed 7", "7", True),
        (r"\fbox{7}", "7", True),
        (r"\boxed{\boxed{7}}", "7", True),
        (r"\boxed{2}, yes, \boxed{2}", "2", True),
        (r"\boxed{1}, \boxed{2}", "2", False),
        (r"\boxed{7", "7", False),
        (r"\boxed{7} \boxed{}", "7", False),
        (r"so \boxed{7} or \boxed{8", "7", False),
        (r"\boxed{\sqrt{3}}", r"\sqrt{3}", False),
        (r"\boxed{\pi}", r"\pi", False),
        (r"\boxed{5\text{ cm}}", "5", False),
        (r"\boxed{x=5}", "5", False),
        (r"\boxed{12\%}", "12", False),
        ("The answer is 225.", "225", False),
        (r"2\sqrt{3}", r"\sqrt{12}", False),
        (r"\sqrt{4}", "2", False),
        ("5 cm", "5", False),
        ("x=5", "5", False),
        (r"\pi", "3.14", False),
        ("1,2", "1.2", False),
        ("", "", True),
        ("5 6", "30", False),
        ("__import__('os')", "1", False),
        ("9**9**9**9", "1", False),
        ("1/0", "2/0", False),
        ("(2+3)*4", "20", True),
        ("e", "2.718281828459045", False),
        ("i", "1", False),
    ],
)
def test_is_equal(answer, reference, expected):
    assert is_equal(answer, reference) is expected
    assert is_equal(reference, answer) is expected


def test_rational_is_exact_and_bounded():
    assert rewards.rational("0.1+0.2") == rewards.rational("3/10")
    begin = time.process_time()
    assert rewards.rational("9^" * 90 + "9") is None
    assert rewards.rational("1+" * 1000 + "1") is None
    assert rewards.rational("(" * 60 + "1" + ")" * 60) is None
    assert time.process_time() - begin < 0.5


HOSTILE = (
    "{",
    "}",
    r"\boxed{",
    r"\boxed{1}",
    "</think>",
    "<answer>",
    "<answer>A</answer>",
    " ",
    "\n",
    "A, ",
    "A and ",
    "and",
    "answer is ",
    "answer is *",
    "option:   ",
    "answer: A ,;/& ",
    ". ",
    "?!",
    "1,2",
    "Answer<",
    "yes ",
    "x",
    "Z B ",
    "\0",
    "9^",
    "((",
)


@pytest.mark.parametrize("pattern", HOSTILE)
def test_a_megabyte_cannot_stall_a_rule(pattern):
    """Each rule reads a million characters that are made to backtrack in well under a second."""
    many = pattern * (10**6 // len(pattern))
    for text in (many, f"the answer is A{many}!"):
        for rule in (
            final_answer,
            yes_or_no,
            letter_after_answer,
            answer_letters,
            lambda text: match_option(text, ABC, True),
            lambda text: is_equal(text, "5"),
            lambda text: is_equal("5", text),
        ):
            begin = time.process_time()
            rule(text)
            assert time.process_time() - begin < 1.0


words = [
    "A",
    "B",
    "Z",
    "yes",
    "no",
    "Answer",
    "answer is ",
    "option: ",
    "and",
    " ",
    "\n",
    ",",
    ".",
    "*",
    "<",
    ">",
    "{",
    "}",
    r"\boxed{",
    r"\text{",
    "<answer>",
    "</answer>",
    "</think>",
    "1",
    "/",
    "0",
    "^",
    r"\frac",
    "$",
    "\\",
    "\u0661",
    "İ",
    "\0",
    "\U0001f600",
]


texts = st.lists(st.sampled_from(words) | st.text(max_size=4), max_size=30).map("".join)


@settings(max_examples=300, deadline=None)
@given(texts, texts)
@example("\ud800", "\ud800")
def test_no_text_breaks_a_rule(text, other):
    final = final_answer(text)
    assert final == final.strip()
    assert match_option(text, ABC, True) in (*"ABCZ", None)
    assert match_option(text, {}) in (
        "Z",
        None,
    )
    assert yes_or_no(text) in ("Yes", "No", None)
    assert letter_after_answer(text) in (
        *"ABCDEFGH",
        None,
    )
    letters = answer_letters(text)
    assert letters is None or letters and letters <= set("ABCDEFGHI")
    assert is_equal(text, other) == is_equal(other, text)
    assert is_equal(text, text)
