r"""A letter inside an expression is a point or a quantity, and no option; what is stated wins."""

import time

import pytest

from benchmarks.answers import HIDDEN, hide_letters, match_option
from benchmarks.benchmark import Benchmark

OPTIONS = {"A": "20°", "B": "40°", "C": "30°", "D": "60°"}


def letter_of(response: str, options: dict[str, str] | None = None) -> str | None:
    """What mode "final" makes of a response: the box first, then the text around it."""
    benchmark = Benchmark("test")
    options = options or OPTIONS
    for unbox in (True, False):
        letter = match_option(benchmark.final(response, unbox), options, whole=True)
        if letter is not None:
            return letter
    return None


@pytest.mark.parametrize(
    "response, letter",
    [
        # An expression that equals an option's words.
        (r"So \boxed{\angle B = 30^{\circ}}", "C"),
        (r"So \boxed{\angle B = 30^{\circ}}, option C.", "C"),
        # Points and quantities beside an explicit statement.
        ("We get \\boxed{P \\ll \\Delta E}.\n\nAnswer: D", "D"),
        (r"Since $AB \perp C$ and $\angle A = x$, the answer is D", "D"),
        (r"In \(\triangle A\) we find \[ E = mc^2 \] so B", "B"),
        # Nothing but letters of points.
        (r"\boxed{\angle B = 99^{\circ}}", None),
        (r"\boxed{E = mc^2}", None),
        (r"The side $B + 1$", None),
        # Lone letters, however they are written.
        (r"\boxed{B}", "B"),
        (r"\boxed{\text{B}}", "B"),
        (r"\boxed{(B)}", "B"),
        (r"\boxed{\mathbf{B}}", "B"),
        (r"The answer is $B$.", "B"),
        (r"The answer is $\boxed{\text{(B)}}$.", "B"),
        (r"\(\text{B}\)", "B"),
        # A letter that labels what follows.
        (r"\boxed{\text{B. } 40^\circ}", "B"),
        (r"\boxed{(D)\ 60^{\circ}}", "D"),
        ("<answer>C</answer>", "C"),
    ],
)
def test_letters_in_expressions_are_no_options(response, letter):
    assert letter_of(response) == letter


def test_a_text_without_expressions_stays_as_it_is():
    for text in ("The answer is (B).", "B", "It costs 5 $ and B", "A, C", "Point B is right."):
        assert hide_letters(text) == text
        assert HIDDEN not in hide_letters("The option B", whole=True)


@pytest.mark.parametrize(
    "part", ["$", "$$", r"\(", r"\[", r"\boxed{", r"\text{", "{", "A ", "A and ", r"\(A\)"]
)
def test_hostile_text_takes_linear_time(part):
    text = part * (200_000 // len(part))
    started = time.perf_counter()
    hide_letters(text)
    hide_letters(text, whole=True)
    assert time.perf_counter() - started < 5
