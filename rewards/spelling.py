r"""One spelling for what can be written in many ways: in Unicode, LaTeX, Markdown, in a sentence.

    clean(r"The answer is $\boxed{\dfrac{1}{2}}$.")  -> r"\frac{1}{2}"
    as_mathematics(r"1\frac{1}{2}")                  -> "(1+1/2)"

`clean` leaves an answer that people can read. `as_mathematics` writes it as the parser reads it.

A new notation is one pair in LATEX or NOTATION, or one small function and its line in CLEANING.
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Callable

Rewrite = tuple[re.Pattern, str | Callable[[re.Match], str]]


# -------------------------------------------------------------------------------- single characters

# Without μ, which is a prefix of units, too.
GREEK = {
    "α": "alpha",
    "β": "beta",
    "γ": "gamma",
    "δ": "delta",
    "ε": "epsilon",
    "ζ": "zeta",
    "η": "eta",
    "θ": "theta",
    "ι": "iota",
    "κ": "kappa",
    "λ": "lambda",
    "ν": "nu",
    "ξ": "xi",
    "ο": "omicron",
    "π": "pi",
    "ρ": "rho",
    "σ": "sigma",
    "τ": "tau",
    "υ": "upsilon",
    "φ": "phi",
    "χ": "chi",
    "ψ": "psi",
    "ω": "omega",
}
LOOK_ALIKES = {
    "-": "−–—‐‑",
    "/": "⁄∕÷",
    "*": "×✕·⋅∗",
    "=": "≈∈",
    "'": "’",
    '"': "“”",
}
COMMANDS = {"√": r"\sqrt ", "∞": r"\infty ", "±": r"\pm ", "∪": r"\cup ", "∠": r"\angle "}

# One character each: what is said with signs of ASCII, or with a LaTeX command.
CHARACTERS = str.maketrans(
    {letter: f"\\{name} " for letter, name in GREEK.items()}
    | {sign: plain for plain, signs in LOOK_ALIKES.items() for sign in signs}
    | COMMANDS
)
RAISED = str.maketrans("⁰¹²³⁴⁵⁶⁷⁸⁹⁺⁻ⁿ", "0123456789+-n")
LOWERED = str.maketrans("₀₁₂₃₄₅₆₇₈₉", "0123456789")


# ------------------------------------------------------------------------------- tables of rewrites


def _compiled(
    *rewrites: tuple[str | re.Pattern, str | Callable[[re.Match], str]],
) -> list[Rewrite]:
    return [(re.compile(pattern), replacement) for pattern, replacement in rewrites]


def rewrite(text: str, rewrites: list[Rewrite]) -> str:
    """The text after all rewrites, each applied to what the one before has left."""
    for pattern, replacement in rewrites:
        text = pattern.sub(replacement, text)
    return text


# A name ends where no further letter follows: "\le" is not the start of "\left".
END = r"(?![A-Za-z])"

AM_OR_PM = re.compile(
    r"""
    (?<=[0-9])                      # only after a digit
    (?: \s*([ap])\.m\b\.?           # 8 a.m., 8:00 P.M.
      | \s+([ap])m\b                # 8 AM, 8:00 pm
      | (?<=:[0-9]{2})([ap])m\b     # 8:00pm
    )
    """,
    re.IGNORECASE | re.VERBOSE,
)


def _am_or_pm(match: re.Match) -> str:
    return f" {match[match.lastindex].lower()}m"


def _celsius_or_fahrenheit(match: re.Match) -> str:
    return " deg" + match[1].upper()


# LaTeX in one spelling and without decoration.
LATEX = _compiled(
    # What nobody sees: control characters, spaces without width, marks of direction.
    (r"[\x00-\x08\x0e-\x1f\x7f\u200b-\u200f\u2060\ufeff]", ""),
    # Upright words: \text{cm}, \textbf{B}, \mathrm{C}, \operatorname{lcm}.
    (
        r"\\(?:text(?:bf|it|rm|normal)?|math(?:rm|bf|it|sf)|mbox|operatorname)\s*\{([^{}]*)\}",
        r" \1 ",
    ),
    (rf"\\[dtc]frac{END}", r"\\frac"),
    # The size of brackets: \left( and \bigr], and of formulas.
    (rf"\\(?:left|right|[bB]igg?[lr]?|displaystyle){END}", ""),
    # A comma between thousands, 1{,}234 or 1\,234; elsewhere \, is a space like the others.
    (r"\{,\}|\\,(?=[0-9]{3})", ","),
    (rf"\\[,;:! ]|\\q?quad{END}|~", " "),
    # Degrees: 45^\circ, 45^{\circ}, 45\degree, 45°, and then 25 deg C, 25 degrees Celsius.
    (rf"\^\s*(?:\{{\s*\\circ\s*\}}|\\circ)|\\degrees?{END}|°", " deg "),
    (AM_OR_PM, _am_or_pm),
    (
        r"(?i)(?<![a-z])deg(?:rees?)?\s*(c|f)(?:elsius|ahrenheit)?(?![a-z])",
        _celsius_or_fahrenheit,
    ),
    # Relations.
    (rf"\\leq?(?:slant)?{END}|<=", "≤"),
    (rf"\\geq?(?:slant)?{END}|>=", "≥"),
    (rf"\\neq?{END}|!=", "≠"),
    (rf"\\lt{END}", "<"),
    (rf"\\gt{END}", ">"),
    (rf"\\(?:approx|in){END}", "="),
    # Operators.
    (rf"\\(?:times|cdot){END}", "*"),
    (rf"\\div{END}", "/"),
    # The braces of a set, as signs of their own: plain braces only group.
    (r"\\\{", "⦃"),
    (r"\\\}", "⦄"),
    # Delimiters of formulas and of code; escaped signs; what is left of "\$" is money.
    (r"\\[()\[\]]|`", ""),
    (r"\\([%_#&])", r"\1"),
    (r"(?:US)?\\\$", " USD "),
)

# "1,234" and "1 234" are one number. A comma next to a bracket separates: "(1,234)" is a pair.
THOUSANDS = re.compile(
    r"""
    (?<![0-9.,(\[⦃]) [0-9]{1,3} (?:,[0-9]{3})+ (?! [0-9)\]⦄] | ,[0-9] )
  | (?<![0-9.,/^]) (?<![0-9]\ ) [0-9]{1,3} (?:\ [0-9]{3})+ (?! [0-9/] | \ [0-9] )
    """,
    re.VERBOSE,
)


def _without_separators(match: re.Match) -> str:
    return re.sub("[, ]", "", match[0])


JOINED_THOUSANDS: list[Rewrite] = [(THOUSANDS, _without_separators)]

SCIENTIFIC = re.compile(
    r"""
    (?<![0-9.])
    ( [0-9]+ (?:\.[0-9]*)? | \.[0-9]+ )     # 1.2
    [eE] ( [+-]?[0-9]{1,4} )                # e-3
    (?![0-9A-Za-z.])
    """,
    re.VERBOSE,
)

# Mathematics, spelled out with the few signs that the parser of expressions knows.
NOTATION = _compiled(
    (r"(?<![\\A-Za-z])(pi|sqrt|sin|cos|tan|ln|log|exp)(?![A-Za-z])", r"\\\1 "),
    (r"(?<![\\A-Za-z])(?:infinity|inf)(?![A-Za-z])", r"\\infty "),
    # Braces that LaTeX does not need: \frac34, \frac3{4}, \frac{3}4.
    (r"\\frac\s*([0-9])\s*(?=[0-9{])", r"\\frac{\1}"),
    (r"(\\frac\s*\{[^{}]*\})\s*([0-9])", r"\1{\2}"),
    # Powers of ten: 1.2e3, 2 x 10^3.
    (SCIENTIFIC, r"(\1*10^{\2})"),
    (r"(?<=[0-9])\s*[xX]\s*(?=10\s*\^)", "*"),
    # Mixed numbers, which a product without a sign would misread: 1 1/2, 1\frac{1}{2}.
    (r"(?<![0-9.^_/])([0-9]+)\s+([0-9]+)\s*/\s*([0-9]+)(?![0-9.])", r"(\1+\2/\3)"),
    (r"(?<![0-9.^_/])([0-9]+)\s*\\frac\s*\{([0-9]+)\}\s*\{([0-9]+)\}", r"(\1+\2/\3)"),
    (r"\*\*", "^"),
    # A currency is a unit, and units come last: -$5.
    (r"^([+-]?)\s*(USD|[€£¥₹])\s*(.+)$", r"\1\3 \2"),
    # The union of intervals, (1,2)U(3,4).
    (r"([)\]])\s*U\s*([(\[])", r"\1\\cup \2"),
)


def as_mathematics(text: str, grouped: bool = True) -> str:
    r"""A clean answer with its mathematics spelled out; `grouped`: "1,234" is one number, not two.

    >>> as_mathematics(r"2\frac34 cm")
    '(2+3/4) cm'
    >>> as_mathematics("USD 1,234.5e3")
    '(1234.5*10^{3}) USD'
    >>> as_mathematics("1,234", grouped=False)
    '1,234'
    """
    if grouped:
        text = rewrite(text, JOINED_THOUSANDS)
    return rewrite(text, NOTATION)


# ----------------------------------------------------------------------------- the steps of `clean`


def separate_fractions(text: str) -> str:
    """A space before ½, else Unicode's normal form makes 11/2 of 1½, and 52 of 5²."""
    return re.sub(r"([½¼¾⅐-⅞])", r" \1", text)


def raise_and_lower(text: str) -> str:
    """x² as x^{2}, x₁ as x_{1}."""
    text = re.sub(r"[⁰¹²³⁴-⁹⁺⁻ⁿ]+", lambda m: "^{" + m[0].translate(RAISED) + "}", text)
    return re.sub(r"[₀-₉]+", lambda m: "_{" + m[0].translate(LOWERED) + "}", text)


def normalize_unicode(text: str) -> str:
    """Full-width digits, ligatures, fractions and the like as plain characters; CHARACTERS."""
    text = re.sub("[º˚]", "°", text)  # the normal form makes an o of º
    return unicodedata.normalize("NFKC", text).translate(CHARACTERS)


def unbox(text: str) -> str:
    r"""The content of the last \boxed{…} with balanced braces, or the text itself without one.

    >>> unbox(r"so \boxed{\frac{1}{2}}, done")
    '\\frac{1}{2}'
    >>> unbox(r"\boxed{1")
    '\\boxed{1'
    """
    before, box, after = text.rpartition(r"\boxed{")
    if not box:
        return text
    depth = 1
    for i, character in enumerate(after):
        if character == "{":
            depth += 1
        elif character == "}":
            depth -= 1
        if depth == 0:
            return after[:i]
    return text


def clean_latex(text: str) -> str:
    return rewrite(text, LATEX)


def resolve_dollars(text: str) -> str:
    """One dollar sign is money, "$5"; several enclose formulas, "$5$", and say nothing."""
    if text.count("$") == 1:
        return re.sub(r"(?:US)?\$", " USD ", text)
    return text.replace("$", "")


def collapse_spaces(text: str) -> str:
    return " ".join(text.split())


# Bold words stand alone; 2**3**2 is a power.
BOLD = re.compile(r"(?<![\w)\]}*])\*\*(?=\S)([^*]*[^*\s])\*\*(?![\w(*])")


def drop_emphasis(text: str) -> str:
    """Without Markdown's bold and without quotation marks around the whole: **B**, __B__, "B"."""
    text = BOLD.sub(r"\1", text)
    return re.sub(r"^(__|[\"'])(.+)\1$", r"\2", text)


INTRODUCTION = re.compile(
    r"""
    (?:so|thus|hence|therefore)? ,? \s*
    (?:the\s+)? (?:final\s+|correct\s+)?
    (?: (?:answer|option|choice) \s* (?:is\b|:|=) \s* :?    # the answer is   answer:
      | (?:option|choice) \s                                # option B
    )
    \s* (?=\S)
    """,
    re.IGNORECASE | re.VERBOSE,
)


def drop_introduction(text: str) -> str:
    """Without "The answer is …" in front; twice, for "The answer is option B"."""
    for _ in range(2):
        introduction = INTRODUCTION.match(text)
        if introduction:
            text = text[introduction.end() :]
    return text


# In this order: Unicode comes first, since the later steps look for plain characters.
CLEANING = [
    separate_fractions,
    raise_and_lower,
    normalize_unicode,
    unbox,
    clean_latex,
    resolve_dollars,
    collapse_spaces,
    drop_emphasis,
    drop_introduction,
]


def clean(text: str) -> str:
    r"""An answer in one spelling, without decoration.

    >>> clean(r"The answer is $\boxed{\dfrac{1}{2}}$.")
    '\\frac{1}{2}'
    >>> clean("**x² \\leq 3**")
    'x^{2} ≤ 3'
    >>> clean("25 °C at 8:00 A.M.")
    '25 degC at 8:00 am'
    """
    for step in CLEANING:
        text = step(text)
    return text
