"""rewards/: what equals what, what does not, and that no text stalls, crashes or runs as code.

The tables are (prediction, reference, expected). Near misses stand beside the hits they resemble.
"""

import time

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import rewards
from rewards import accuracy, equivalent
from rewards.answers import MAX_TEXT
from rewards.expressions import Parser
from rewards.prover import PROVER
from rewards.values import MAX_MATH

YES = True
NO = False

CHOICES = [
    ("B", "B", YES),
    ("b", "B", YES),
    ("B", "b", YES),
    ("(B)", "B", YES),
    ("B", "(B)", YES),
    ("B.", "B", YES),
    ("B", "B.", YES),
    ("B) 12 cm", "B", YES),
    ("b) 12 cm", "b", YES),
    ("(B) 12", "B", YES),
    ("B. 12", "B", YES),
    ("C: 50°", "C", YES),
    ("[C]", "C", YES),
    ("**B**", "B", YES),
    (r"\textbf{(B)}\ 12", "B", YES),
    (r"\boxed{\text{C}}", "C", YES),
    ("$C$", "C", YES),
    ("The answer is B", "B", YES),
    ("Answer: (B)", "B", YES),
    ("The correct option is C.", "C", YES),
    ("option b", "B", YES),
    ("(B) Points A and C", "B", YES),
    ("C", "B", NO),
    ("A) 12 cm", "B", NO),
    ("12 cm", "B", NO),
    ("Banana", "B", NO),
    ("Because of it", "B", NO),
    ("b c", "B", NO),
    ("A cat", "A", NO),
    ("A = B", "B", NO),
    ("AC", "C", NO),
    ("C1", "C", NO),
    ("8", "B", NO),
    ("A or B", "B", NO),
    ("B or A", "B", NO),
    ("B, C", "B", NO),
    ("B) or C)", "B", NO),
    ("B) or C", "B", NO),
    ("(B), C", "B", NO),
    ("B) C", "B", NO),
    ("(A) (B)", "A", NO),
    ("A. B. C. D.", "A", NO),
    ("The answer is not B", "B", NO),
    ("i.e. none", "I", NO),
    ("The answer is option B", "B", YES),
    ("The correct answer is option (B)", "B", YES),
    ("B,", "B", YES),
    ("The answer is **B**", "B", YES),
    ("**B**. 12", "B", YES),
    ("**(B)** 12", "B", YES),
    ("**A** or **B**", "A", NO),
    ("The option is option B or C", "B", NO),
    ("a, b and c", "A", NO),
]
NUMBERS = [
    ("1,234", "1234", YES),
    ("1234", "1,234", YES),
    ("1 234", "1234", YES),
    ("1 234 567", "1234567", YES),
    ("1{,}234", "1234", YES),
    (r"1\,234", "1234", YES),
    ("1,234,567.89", "1234567.89", YES),
    ("12,34", "1234", NO),
    ("1 000", "1", NO),
    ("1.000", "1000", NO),
    ("1.2e3", "1200", YES),
    ("1E3", "1000", YES),
    ("1e-3", "0.001", YES),
    (r"1.2\times10^3", "1200", YES),
    ("1.2×10³", "1200", YES),
    (r"1.2 \cdot 10^{3}", "1200", YES),
    ("1.2 x 10^3", "1200", YES),
    ("1.2e3", "1.2e4", NO),
    ("10^3", "1000", YES),
    ("10^-3", "0.001", YES),
    ("10^3", "10^-3", NO),
    ("+5", "5", YES),
    ("-2", "− 2", YES),
    ("- 2", "-2", YES),
    ("-5", "5", NO),
    ("5.", "5", YES),
    (".5", "0.5", YES),
    ("3.0", "3", YES),
    ("３", "3", YES),
    ("-0", "0", YES),
    ("1..2", "1.2", NO),
    ("1.2.3", "1.2", NO),
    ("5 6", "30", NO),
    ("five", "5", NO),
    ("5!", "5", NO),
    ("2^{10}", "1024", YES),
    ("2^3^2", "512", YES),
    ("2**3**2", "512", YES),
    ("(-2)^2", "4", YES),
    ("-2^2", "4", NO),
    ("0.1+0.2", "0.3", YES),
    ("2/0", "5", NO),
    # the tolerance: max(1e-6, 1e-5 of the reference)
    ("3.00002", "3", YES),
    ("3.00004", "3", NO),
    ("100001", "100000", YES),
    ("1001", "1000", NO),
    ("0.0000009", "0", YES),
    ("0.000002", "0", NO),
    ("0.333", "1/3", NO),
    ("0.33333", "1/3", YES),
    ("0.33332", "1/3", NO),
    ("22/7", r"\pi", NO),
    ("1e400", "2e400", NO),
    (r"\infty", "∞", YES),
    (r"-\infty", r"\infty", NO),
    ("5", r"\infty", NO),
    (r"\infty", "5", NO),
    (r"\sqrt{-1}", "1", NO),
]
FRACTIONS = [
    ("3/4", "0.75", YES),
    (r"\frac{3}{4}", "3/4", YES),
    (r"\dfrac{3}{4}", "3/4", YES),
    (r"\tfrac34", "3/4", YES),
    (r"\frac34", "0.75", YES),
    (r"\frac{3}4", "3/4", YES),
    (r"-\frac{1}{2}", r"\frac{-1}{2}", YES),
    ("1 1/2", "3/2", YES),
    (r"1\frac{1}{2}", "1.5", YES),
    ("-1 1/2", "-1.5", YES),
    ("1½", "1.5", YES),
    ("½", "0.5", YES),
    ("6/8", "3/4", YES),
    (r"\frac{\frac{1}{2}}{3}", "1/6", YES),
    ("3/4", "4/3", NO),
    ("1 1/2", "11/2", NO),
    ("1 1/2", "1/2", NO),
    (r"1\frac{1}{2}", "1/2", NO),
    ("1/2 3/4", "5/4", NO),
    ("0.75", "3/5", NO),
]
UNITS = [
    ("50%", "50%", YES),
    ("50%", r"50\%", YES),
    (r"50\%", "50%", YES),
    ("50", "50%", YES),
    ("50%", "50", YES),
    ("50 percent", "50%", YES),
    ("50 per cent", "50%", YES),
    ("50%", "0.5", NO),
    ("0.5", "50%", NO),
    ("0.5%", "0.005", NO),
    ("49%", "50%", NO),
    ("50%", "50 cm", NO),
    ("5 cm", "5", YES),
    ("5", "5 cm", YES),
    ("5cm", "5 cm", YES),
    ("5 centimeters", "5 cm", YES),
    ("5 KM", "5 km", YES),
    ("5 cm", "5 m", NO),
    ("5 cm", "0.05 m", NO),
    ("5 mW", "5 MW", NO),
    ("6 cm", "5 cm", NO),
    ("12 cm^2", "12", YES),
    ("12 cm²", r"12\text{ cm}^2", YES),
    ("12 square centimeters", "12 cm^2", YES),
    ("12 cm^2", "12 cm", NO),
    ("3 m^3", "3 cubic meters", YES),
    ("3 m^3", "3 m^2", NO),
    ("60 km/h", "60 kilometers per hour", YES),
    ("60 km/h", "60 m/h", NO),
    ("9.8 m/s^2", "9.8 m s^{-2}", YES),
    ("9.8 m/s", "9.8 m/s^2", NO),
    ("5 μm", "5 micrometers", YES),
    ("12 in", "12 inches", YES),
    ("12 in", "12 ft", NO),
    ("5 apples", "5", YES),
    ("5 apples", "5 oranges", NO),
    ("5 or more", "5", NO),
    ("5 squared", "5", NO),
    ("5 million", "5", NO),
    ("5 point two", "5", NO),
    ("not 5", "5", NO),
    ("1st", "1", NO),
    ("2n", "2", NO),
    ("5x", "5", NO),
    ("10 am", "10 pm", NO),
    ("5 ft 3 in", "5 ft", NO),
    ("$5", "5", YES),
    (r"\$5", "$5", YES),
    ("-$5", "-5", YES),
    ("$1,234.50", "1234.5", YES),
    ("5 dollars", "$5", YES),
    ("£5", "5", YES),
    ("$5", "€5", NO),
    ("$5", "5 cm", NO),
    ("$6", "5", NO),
    (r"45^\circ", "45", YES),
    (r"45^{\circ}", "45°", YES),
    ("45°", "45 degrees", YES),
    ("45°", "46°", NO),
    ("45°", "45 cm", NO),
    ("25°C", "25 degrees Celsius", YES),
    ("25°C", "25°F", NO),
    (r"\sin 30^\circ", "1/2", YES),
    (r"30^\circ", r"\frac{\pi}{6}", NO),
    ("12º", "12", YES),
    ("12˚", "12°", YES),
    ("12 sq. cm", "12 cm²", YES),
    ("5 mph", "5 miles per hour", YES),
    ("5 mph", "5 m per h", NO),
    ("60 kph", "60 km/h", YES),
    ("8:00 AM", "8:00 a.m.", YES),
    ("10:30am", "10:30 AM", YES),
    ("8 a.m.", "8", YES),
    ("8:00 AM", "8:00 PM", NO),
    ("8 AM", "8 PM", NO),
    ("3 fourths", "3", NO),
    ("2 thirds", "2", NO),
    ("3 halves", "3", NO),
    ("5 millions", "5", NO),
]
LATEX = [
    (r"\boxed{5}", "5", YES),
    (r"The answer is \boxed{\frac{1}{2}}.", "0.5", YES),
    (r"\boxed{3} \boxed{5}", "3", NO),
    ("$5$", "5", YES),
    (r"\(5\)", "5", YES),
    (r"\[5\]", "5", YES),
    ("$$5$$", "5", YES),
    (r"\text{True}", "true", YES),
    (r"\mathrm{C}", "C", YES),
    (r"\left(1,2\right)", "(1,2)", YES),
    (r"2\sqrt{2}", r"\sqrt{8}", YES),
    (r"2\sqrt{2}", r"\sqrt{6}", NO),
    ("2√3", "√12", YES),
    (r"\sqrt[3]{8}", "2", YES),
    (r"\sqrt[3]{9}", "2", NO),
    (r"\frac{\sqrt{2}}{2}", r"\frac{1}{\sqrt{2}}", YES),
    (r"\frac{1}{2}\pi", r"\frac{\pi}{2}", YES),
    (r"\frac{\pi}{2}", "pi/2", YES),
    (r"2\pi", "6.283185", YES),
    (r"2\pi", "6.28", NO),
    ("12 π", r"12\pi", YES),
    (r"9\pi \text{ cm}^2", r"9\pi", YES),
    (r"9\pi \text{ cm}^2", r"9\pi\text{ cm}", NO),
    (r"6+2\sqrt{3}", r"2(3+\sqrt{3})", YES),
    (r"6+2\sqrt{3}", r"6-2\sqrt{3}", NO),
    (r"2\cdot 3", "6", YES),
    (r"\log_2 8", "3", YES),
    (r"\ln e", "1", YES),
]
SYMBOLIC = [
    ("x^2+2x+1", "(x+1)^2", YES),
    ("x^2+2x+1", "(x+1)^3", NO),
    ("x^2+2x+2", "(x+1)^2", NO),
    ("(x+1)(x+2)", "x^2+3x+2", YES),
    ("x+y", "y+x", YES),
    ("x-y", "y-x", NO),
    (r"\frac{x}{2}", "0.5x", YES),
    ("1/2x", "x/2", YES),
    ("a^2b", "b a^2", YES),
    ("2x", "x*2", YES),
    ("2x", "2y", NO),
    (r"\frac{1}{12x}", r"\frac{11}{2x}", NO),
    (r"\frac{1}{x+1}+\frac{1}{x-1}", r"\frac{2x}{x^2-1}", YES),
    (r"\sin^2 x+\cos^2 x", "1", YES),
    (r"\sin 2x", r"2\sin x\cos x", YES),
    (r"\sin x", r"\cos x", NO),
    ("e^{2x}", "(e^x)^2", YES),
    (r"\sqrt{x^2}", "x", NO),
    (r"\ln(x^2)", r"2\ln x", NO),
    ("x_1+x_2", "x_2+x_1", YES),
    ("x_1", "x_2", NO),
    ("x_{1}+1", "1+x_1", YES),
    (r"\theta", "θ", YES),
    ("2+3i", "3i+2", YES),
    ("X", "x", YES),
    ("1.41421x", r"\sqrt{2}x", NO),
    ("x + 1 + y - y", "x + 1", YES),
    ("$$x+1$$", "1+x", YES),
    (r"\frac{n(n+1)}{2}", r"\frac{n^2+n}{2}", YES),
]
RELATIONS = [
    ("7+5 = 12", "12", YES),
    ("x = 7+5 = 12", "12", YES),
    ("2+3 = 6", "6", NO),
    ("2+3 = 6", "5", NO),
    (r"x \geqslant 5", r"x \geq 5", YES),
    ("x = 5", "5", YES),
    ("5", "x=5", YES),
    ("x = 6", "5", NO),
    ("x = 5", "y = 5", NO),
    ("5 = x", "x = 5", YES),
    ("x=5 cm", "5", YES),
    (r"\angle ABC = 45^\circ", "45", YES),
    ("f(x)=x^2", "x^2", YES),
    ("A = 3 * 4 = 12", "12", YES),
    ("y=2x+1", "2x+1", YES),
    ("y=2x+1", "2x+2", NO),
    ("y=2x+1", "2x+1=y", YES),
    ("x^2 = 9", "9", NO),
    ("2x+y=3", "3", NO),
    ("2x = 6", "6", NO),
    ("x>3", "3<x", YES),
    (r"x \geq 3", "x >= 3", YES),
    ("x>3", "x<3", NO),
    ("x>3", "x≥3", NO),
    ("x>3", "3", NO),
    ("1<x<2", "2>x>1", YES),
    ("1<x<2", "1<x≤2", NO),
    (r"x\in(1,2)", "(1,2)", YES),
    ("x=", "x", NO),
]
SEQUENCES = [
    ("(1,2]", "(1,2]", YES),
    ("(1,2]", "[1,2]", NO),
    ("(1,2)", "[1,2]", NO),
    ("(1,2)", "( 1 , 2 )", YES),
    ("(1,2)", "(2,1)", NO),
    ("(0.5,2)", "(1/2,2)", YES),
    ("(2,1]", "(1,2]", NO),
    ("(1,2,3)", "(1,2)", NO),
    (r"(-\infty,3]", "(-∞, 3]", YES),
    (r"[0,\infty)", r"(0,\infty)", NO),
    ("((1,2),(3,4))", "((1,2),(4,3))", NO),
    (r"(-\infty,1)\cup(2,\infty)", "(2,∞)U(-∞,1)", YES),
    (r"(-\infty,1)\cup(2,\infty)", r"(-\infty,1)", NO),
    ("(1,2),(3,4)", "(3,4),(1,2)", YES),
    ("(1,2),(3,4)", "(2,1),(3,4)", NO),
    ("1, 2, 3", "1,2,3", YES),
    ("3, 2, 1", "1, 2, 3", YES),
    ("1, 2", "1, 2, 3", NO),
    ("1, 1, 2", "1, 2, 2", NO),
    (r"\{1,2\}", r"\{2, 1\}", YES),
    ("{1, 2}", r"\{1,2\}", YES),
    (r"\{1,2\}", "(1,2)", NO),
    (r"\{1,2\}", r"\{1,3\}", NO),
    ("1,2", "(1,2)", YES),
    ("2,1", "(1,2)", NO),
    ("[2007, 2008]", "2007, 2008", YES),
    ("x=3 or x=5", "5, 3", YES),
    ("x=3 or x=5", "5", NO),
    ("3 and 5", "3, 5", YES),
    ("x=1, y=2", "y=2, x=1", YES),
    ("x=1, y=2", "x=2, y=1", NO),
    (r"\pm 3", "3, -3", YES),
    ("±3", "3", NO),
    ("3:4", "3 : 4", YES),
    ("3:4", "4:3", NO),
    ("12:30", "0.4", NO),
    ("(3, 4)", "3/4", NO),
    ("3/4", "(3,4)", NO),
    ("12 cm × 5 cm", "12", NO),
    # a comma: the reference decides
    ("1,234", "1, 234", YES),
    ("1,234", "(1, 234)", YES),
    ("1, 234", "1,234", NO),
    ("(1,234)", "1234", NO),
    ("1234", "(1,234)", NO),
    ("(1, 234, 5)", "(1,234, 5)", YES),
    ("3,14", "3.14", NO),
    ("1, 2, 3, 4", "1234", NO),
]
TEXT = [
    ("True", "true", YES),
    ("Yes.", "yes", YES),
    ("yes!", "Yes", YES),
    ("yes", "no", NO),
    ("True", "yes", NO),
    ("the cat", "cat", YES),
    ("A circle", "circle", YES),
    ("an apple", "Apple", YES),
    ("New  York", "new york", YES),
    ("H₂O", "H2O", YES),
    ("“red”", "red", YES),
    ("T-shirt", "t-shirt", YES),
    ("no", "on", NO),
    ("blue", "red", NO),
    ("apple", "apples", NO),
    ("vitamin A", "vitamin", NO),
    ("isosceles", "isosceles triangle", NO),
    ("Paris, France", "Paris", NO),
    ("xy", "yx", NO),
    ("room/2", "moor/2", NO),
    ("2019", "2020", NO),
    ("null", "0", NO),
    ("", "", NO),
    ("", "5", NO),
    ("5", "", NO),
    (" ", "5", NO),
    (",", "()", NO),
    ("5'", "5", NO),
]


@pytest.mark.parametrize(
    "prediction, reference, expected",
    CHOICES + NUMBERS + FRACTIONS + UNITS + LATEX + SYMBOLIC + RELATIONS + SEQUENCES + TEXT,
)
def test_equivalent(prediction, reference, expected):
    assert equivalent(prediction, reference) is expected
    assert accuracy(f"<think>…</think><answer> {prediction}\n</answer>", reference) == float(
        expected
    )


def test_constants_need_no_worker():
    PROVER.stop()
    for prediction, reference, expected in CHOICES + NUMBERS + FRACTIONS + UNITS + LATEX + TEXT:
        assert equivalent(prediction, reference) is expected
    assert equivalent("x + 1", "x+1")
    assert not equivalent("x+1", "x+2")
    assert not equivalent("x^2+2x+2", "(x+1)^2")
    assert PROVER.process is None


# ------------------------------------------------------------------------------------- hostile text


@pytest.mark.parametrize(
    "unit",
    [
        "{",
        "(",
        "<answer>",
        "</answer>",
        "<answer></answer>",
        r"\frac{",
        r"\boxed{",
        "9",
        "-",
        " ",
        "\x00",
        "\ud800",
        "\ufdfa",
        "1 ",
    ],
    ids=ascii,
)
def test_ten_megabytes_end_at_once(unit):
    text = unit * (10_000_000 // len(unit))
    begin = time.monotonic()
    assert accuracy(text, "5") == 0.0
    assert accuracy(f"<answer>{text}</answer>", "5") == 0.0
    assert accuracy("<answer>5</answer>", text) == 0.0
    assert rewards.format(text) == 0.0
    assert rewards.format(f"<think>{text}</think><answer>5</answer>") in (0.0, 1.0)
    assert time.monotonic() - begin < 5  # five calls, each well under a second


@pytest.mark.parametrize(
    "unit",
    [
        "{",
        "(",
        "[",
        "-",
        "^",
        "x^",
        "9^",
        "2^(",
        r"\frac{",
        r"\frac",
        r"\sqrt",
        r"\text{",
        r"\text ",
        r"\sin",
        r"\log_",
        "(x+1)^99",
        "1,",
        "1, ",
        "1 ",
        "1",
        "1 1/",
        "1e",
        "x=",
        "<",
        ":",
        " or ",
        "cm",
        "cm ",
        "per ",
        "the ",
        "a ",
        "B) ",
        "^ ",
        "$",
        "**",
        "|",
        r"\pm",
        "\u0301",
        "\ufdfa",
        "½",
        "\x00",
        "\ud800",
    ],
)
def test_repetition_of_a_pattern_is_no_trap(unit):
    """At the longest text that is read as mathematics and the longest that is read as words."""
    begin = time.monotonic()
    for size in (MAX_MATH, MAX_TEXT):
        text = (unit * size)[:size]
        for prediction, reference in (
            (text, "5"),
            ("5", text),
            (text, text[:-1] + "y"),
            ("5" + text[1:], "(1,2)"),
            (text, text[::-1]),
        ):
            assert equivalent(prediction, reference) in (True, False)
    assert time.monotonic() - begin < 5  # ten calls


@pytest.mark.parametrize(
    "prediction",
    [
        "9^9^9^9",
        "9^{9^{9^{9}}}",
        "(9^999)^999",
        "10^{10^{10}}",
        "2^{99999999}",
        r"\exp(\exp(\exp(99)))",
        "1/0",
        "0^{-1}",
        "x^{99999999999}",
        r"\sqrt" * 60 + "2",
        "9" * 500 + "^" + "9" * 5,
        "0/0",
    ],
)
def test_monstrous_numbers_are_never_computed(prediction):
    begin = time.monotonic()
    assert not equivalent(prediction, "5")
    assert not equivalent("5", prediction)
    assert not equivalent(prediction, "x+1")
    assert time.monotonic() - begin < 3


def test_what_is_too_long_or_too_deep_is_no_mathematics():
    assert equivalent("(" * 9 + "5" + ")" * 9, "5")
    assert not equivalent("(" * 99 + "5" + ")" * 99, "5")
    assert equivalent("+".join("1" * 50), "50")
    assert not equivalent("+".join("1" * 150), "150")
    assert equivalent("0" * 400 + "5", "5")
    assert not equivalent("0" * MAX_MATH + "5", "5")
    assert equivalent(",".join("12" * 8), ",".join("21" * 8))
    assert not equivalent(",".join("12" * 32), ",".join("21" * 32))
    assert equivalent("Word " * 300, "word " * 300)
    assert not equivalent("Word " * 3000, "word " * 3000)
    with pytest.raises(ValueError):
        Parser("(" * 60 + "x" + ")" * 60).whole()


@pytest.mark.parametrize(
    "code",
    [
        "__import__('os').system('touch {}')",
        "open('{}', 'w')",
        "(lambda: open('{}', 'w'))()",
        "exec(\"open('{}', 'w')\")",
        "x + __import__('os').system('touch {}')",
        "{{0.__class__}} open('{}','w')",
    ],
)
def test_an_answer_is_never_run(code, tmp_path):
    sentinel = tmp_path / "s"
    text = code.format(sentinel)
    assert len(text) < MAX_MATH
    for reference in ("5", "x+1", "x^2+2x+1", "(1,2)"):
        assert accuracy(f"<answer>{text}</answer>", reference) == 0.0
        assert accuracy(f"<answer>{reference}</answer>", text) == 0.0
    assert not sentinel.exists()


MATH_TEXT = st.lists(
    st.sampled_from(
        list("0123456789xyB+-*/^(){}[],.:=<>%$| ")
        + [
            r"\frac",
            r"\sqrt",
            r"\pi",
            r"\pm",
            r"\{",
            r"\}",
            r"\text{",
            r"\boxed{",
            r"\sin",
            " or ",
            " cm",
            "°",
            "½",
            "²",
            "\x00",
            "\ud800",
        ]
    ),
    max_size=40,
).map("".join)


@settings(max_examples=200, deadline=None, database=None, derandomize=True)
@given(st.text() | MATH_TEXT, st.text() | MATH_TEXT)
def test_any_text_gets_a_verdict(text, other):
    assert accuracy(text, other) in (0.0, 1.0)
    assert accuracy(f"<answer>{text}</answer>", other) in (0.0, 1.0)
    assert rewards.format(text) in (0.0, 1.0)


@settings(max_examples=200, deadline=None, database=None, derandomize=True)
@given(st.fractions(max_denominator=10**4), st.fractions(max_denominator=10**4))
def test_fractions_agree_with_the_rule(a, b):
    expected = abs(a - b) <= max(1e-6, 1e-5 * abs(b))
    prediction = rf"\frac{{{a.numerator}}}{{{a.denominator}}}"
    assert equivalent(prediction, f"{b.numerator}/{b.denominator}") is expected
    assert equivalent(prediction, str(a)) is True
