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

from rewards import units

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
    "*": "×✕·⋅∗∙•",
    "=": "≈∈",
    "≤": "⩽≦",
    "≥": "⩾≧",
    ":": "∶",
    "'": "’",
    '"': "“”",
    ".": "。",
    ",": "、",
}
COMMANDS = {
    "√": r"\sqrt ",
    "∛": r"\sqrt[3] ",
    "Δ": r"\Delta ",
    "∆": r"\Delta ",
    "Φ": r"\Phi ",
    "Ψ": r"\Psi ",
    "Θ": r"\Theta ",
    "∞": r"\infty ",
    "±": r"\pm ",
    "∪": r"\cup ",
    "∩": r"\cap ",
    "∠": r"\angle ",
    "△": r"\triangle ",
    "∅": r"\emptyset ",
    "ℝ": r"\mathbb{R} ",
    "⟨": "(",
    "⟩": ")",
}

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


def _siunitx(match: re.Match) -> str:
    r"""The unit \kilo\meter\per\second as words: kilometer per second."""
    text = re.sub(r"\\(kilo|centi|milli|micro|nano|deci|mega|giga)\s*\\", r"\\\1", match[2])
    text = re.sub(r"\\squared", "^2", text)
    text = re.sub(r"\\cubed", "^3", text)
    return f"{match[1] or ''} " + re.sub(r"\\([a-z]+)", r" \1 ", text)


def _rows_of_cases(match: re.Match) -> str:
    r"""The rows of a system of equations, \begin{cases}, as a list; a piecewise function stays."""
    if "&" in match[1]:
        return match[0]
    return match[1].strip().removesuffix(ROW_END).replace(ROW_END, ";")


def _repeating(match: re.Match) -> str:
    r"""0.1\overline{6} as the fraction it is."""
    whole, before, period = match.groups()
    nines = "9" * len(period) + "0" * len(before)
    numerator = int(whole + before + period) - int(whole + before or "0")
    return rf"\frac{{{numerator}}}{{{nines}}}"


ROW_END = "⏎"  # of a matrix, for \\

FONTS = "bf|bfseries|it|itshape|rm|sf|tt|sc|em|boldsymbol|bm|mathrm|mathbf|mathit|mathsf|mathcal"
WITHOUT_A_POINT = re.compile(
    r"\\mathbb\s*\{?\s*R\s*\}?\s*(?:\\setminus|\\backslash|-)\s*\\\{([^{},]*)\\\}"  # R∖{0}
)
SIZES = "tiny|small|normalsize|large|Large|LARGE|huge|Huge"


# LaTeX in one spelling and without decoration.
LATEX = _compiled(
    # What nobody sees: control characters, spaces without width, marks of direction.
    (r"[\x00-\x08\x0e-\x1f\x7f\u200b-\u200f\u2060\ufeff]", ""),
    # Groups of nothing, as in 30{}^\circ.
    (r"(?<!\\)\{\s*\}", ""),
    # Numbers and units of siunitx: \num{24}, \qty{18}{cm}.
    (rf"\\(?:number|num|ang){END}\s*\{{([^{{}}]*)\}}", r" \1 "),
    (
        rf"\\(?:quantity|qty|SI|unit|si){END}\s*(?:\{{([^{{}}]*)\}}\s*)?\{{([^{{}}]*)\}}",
        _siunitx,
    ),
    # Boxes, lines, colours and sizes around a part, and what takes room and is not seen.
    (rf"\\(?:underline|fbox|framebox|emph|ensuremath){END}\s*\{{([^{{}}]*)\}}", r" \1 "),
    (rf"\\(?:(?:text)?color|colorbox|[hv]?phantom|[hv]space){END}\s*\{{[^{{}}]*\}}", " "),
    (rf"\\(?:{SIZES}){END}", " "),
    (r"<(b|i|em|strong|u|p)>([^<>]*)</\1>", r" \2 "),
    # Upright words: \text{cm}, \textbf{B}, \mathrm{C}, {\bf B}, \operatorname{lcm}.
    (
        r"\\(?:text(?:bf|it|rm|sf|tt|sc|up|normal)?|math(?:rm|bf|it|sf|cal)|[mh]box|boldsymbol|bm|operatorname)"
        r"\s*\{([^{}]*)\}",
        r" \1 ",
    ),
    (rf"\{{\s*\\(?:{FONTS}){END}([^{{}}]*)\}}", r" \1 "),
    (rf"\\(?:{FONTS}){END}", " "),
    # Other names of the same sign.
    (rf"\\(?:[dtcsx]|nice)frac{END}", r"\\frac"),
    (rf"\{{([^{{}}]*)\\over{END}([^{{}}]*)\}}", r"\\frac{\1}{\2}"),
    (rf"\\[dt]binom{END}", r"\\binom"),
    (rf"\{{([^{{}}]*)\\choose{END}([^{{}}]*)\}}", r"\\binom{\1}{\2}"),
    (rf"\\overrightarrow{END}", r"\\vec"),
    (rf"\\widehat{END}", r"\\hat"),
    (rf"\\var(?=(?:phi|theta|epsilon|rho|sigma){END})", r"\\"),
    (rf"\\varnothing{END}", r"\\emptyset"),
    (rf"\\(?:lvert|rvert|vert|mid){END}", "|"),
    (rf"\\mp{END}", r"\\pm"),
    (rf"\\colon{END}", ":"),
    # Brackets by name: the size of \left( and \bigr], invisible ones, and those of vectors.
    (r"\\(?:left|right)\s*\.", ""),
    (rf"\\(?:langle|lparen){END}|\\left\s*<", "("),
    (rf"\\(?:rangle|rparen){END}|\\right\s*>", ")"),
    (r"(?:^|(?<=[$=]))<([^<>]*,[^<>]*)>(?=[\s$.]*$)", r"(\1)"),
    (rf"\\lbrack{END}", "["),
    (rf"\\rbrack{END}", "]"),
    (rf"\\lbrace{END}", r"\\{"),
    (rf"\\rbrace{END}", r"\\}"),
    (rf"\\(?:left|right|[bB]igg?[lrm]?|displaystyle|textstyle|limits){END}", ""),
    # Between thousands, 1{,}234, 1,\!234, 1\,234 and 1'234; elsewhere \, is a space as others are.
    (r"(?<=[0-9])(?:\s*\{\s*,\s*\}\s*|,\s*\\!\s*)(?=[0-9]{3}(?![0-9]))", ""),
    (r"(?<=[0-9])'(?=[0-9]{3}(?![0-9]))", ""),
    (r"(?<=[0-9])\{,\}(?=[0-9])", "."),
    (r"\{,\}|\\,(?=[0-9]{3})", ","),
    # A period that repeats: 0.\overline{3}, 0.1\dot{6}.
    (r"\\bar\s*([0-9])", r"\\bar{\1}"),
    (r"(?<![0-9])([0-9]*)\.([0-9]*)\\(?:overline|bar|dot)\s*\{([0-9]+)\}", _repeating),
    # A wide space separates values and equations; elsewhere it is a space.
    (r"(?<=[0-9)}])\s*\\q?quad(?=\s*(?:[-+]?[0-9(]|\\frac|\\sqrt|[A-Za-z]\w?\s*=))", "; "),
    (rf"\\[,;:! ]|\\q?quad{END}|~", " "),
    # Degrees: 45^\circ, 45^{\circ}, 45^o, 45\degree, and then 25 deg C, 25 degrees Celsius.
    (rf"\^\s*(?:\{{\s*\\circ\s*\}}|\\circ)|\\degrees?{END}|°", " deg "),
    (r"(?<=[0-9])\^\s*(?:\{\s*o\s*\}|o(?![A-Za-z]))", " deg "),
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
    # Sets of numbers, and the base of a number.
    (WITHOUT_A_POINT, r"(-\\infty,\1)\\cup(\1,\\infty)"),
    (r"(?i)\\mathbb\s*\{?\s*R\s*\}?|^(?:all )?real numbers$", r"(-\\infty,\\infty)"),
    (r"\\mathbb\s*\{?\s*([A-Z])\s*\}?", r"\\mathbb{\1}"),
    (r"(?<=[0-9])_\{\(([0-9]+)\)\}", r"_{\1}"),
    (r"(?<=[A-Za-z])\s+in\s+(?=[(\[])", " = "),
    (r"\bRs\.?\s*(?=[0-9])", "₹"),
    (r"^\s*\$?\\sim(?=\s*[0-9])", ""),
    # Operators.
    (rf"\\(?:times|cdot){END}", "*"),
    (rf"\\div{END}", "/"),
    # The braces of a set, as signs of their own: plain braces only group.
    (r"\\\{", "⦃"),
    (r"\\\}", "⦄"),
    # A system of equations.
    (r"\\begin\{(?:cases|aligned)\}((?:(?!\\begin).)*?)\\end\{(?:cases|aligned)\}", _rows_of_cases),
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


def _ratio_in_words(match: re.Match) -> str:
    first, second = match.groups()
    return f"{first}:{second}" if int(first) > int(second) else match[0]


FUNCTION_NAMES = "arcsin|arccos|arctan|sinh|cosh|tanh|sin|cos|tan|sec|csc|cot|ln|log|lg|exp"

# Mathematics, spelled out with the few signs that the parser of expressions knows.
NOTATION = _compiled(
    (rf"(?<![\\A-Za-z])(pi|sqrt|{FUNCTION_NAMES})(?![A-Za-z])", r"\\\1 "),
    (r"(?<![A-Za-z])abs\s*\(([^()]*)\)", r"|\1|"),
    (r"(?<![\\A-Za-z])(?:infinity|inf)(?![A-Za-z])", r"\\infty "),
    # A product of letters after a slash is the whole divisor: t/RC. But 1/2x is half of x.
    (r"/\s*([A-Za-z]{2,3})(?![A-Za-z(_^])", r"/(\1)"),
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
    # The letter μ, but as a prefix it stands before a unit.
    (r"μ(?![A-Za-zΩ])", r"\\mu "),
    # A currency is a unit, and units come last: -$5.
    (r"^([+-]?)\s*(USD|[€£¥₹])\s*(.+)$", r"\1\3 \2"),
    (r"(?<=[0-9])\s*([kM]?)\s*\\Omega$", r" \1Ω"),
    # A ratio in words, 3 to 2. But 2 to 3 may be a range.
    (r"^([0-9]{1,9}) to ([0-9]{1,9})$", _ratio_in_words),
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
    r"""What is in the last \boxed{…}, the text itself without one; boxes side by side are a list.

    >>> unbox(r"so \boxed{\frac{1}{2}}, done"), unbox(r"\boxed{1")
    ('\\frac{1}{2}', '\\boxed{1')
    >>> unbox(r"\boxed{1} and \boxed{2}"), unbox(r"\boxed{1}, so it is \boxed{2}")
    ('1, 2', '2')
    >>> unbox(r"\boxed{5} cm"), unbox(r"\boxed{5} follows")
    ('5 cm', '5')
    """
    text = UNBRACED_BOX.sub(r"\\boxed{\1}", text)
    for _ in range(MAX_BOXES_IN_BOXES):
        contents = _last_boxes(text)
        if not contents:
            break
        text = ", ".join(contents)
    return text


MAX_BOXES_IN_BOXES = 3
BOX = re.compile(r"\\f?boxed\s*\{")
UNBRACED_BOX = re.compile(r"\\f?boxed(?:\s+|(?=[0-9]))([^\s{}$\\]+)")  # \boxed 5, as TeX has it
BRACE = re.compile(r"[{}]")
UNIT_AFTER_BOX = re.compile(
    r"""
    [\s$~]* (?: \\[,;!:\ ] \s* )? (?: \\(?:text|mathrm) \s* \{ )? \s*
    ( [A-Za-zμΩ%]{1,12} (?: \^ \{? [23] \}? )? )
    \s* \}? [\s$.]*
    """,
    re.VERBOSE,
)
NUMBER_BEGINS = re.compile(r"\s*(?:[0-9.(]|\\(?:frac|sqrt|pi))")
BETWEEN_BOXES = re.compile(r"[\s$,;]*(?:\\text\s*\{)?[\s$]*(?:and|or)?[\s$,}]*")


def _last_boxes(text: str) -> list[str]:
    """The contents of the last box and of those right before it."""
    contents: list[str] = []
    end = 0  # of the last box
    for box in BOX.finditer(text):
        if box.start() < end:  # a box in a box
            continue
        closing = _closing_brace(text, box.end())
        if closing is None:
            break
        if not BETWEEN_BOXES.fullmatch(text, end, box.start()):
            contents = []
        content = text[box.end() : closing]
        negative = text.endswith("-", 0, box.start()) and NUMBER_BEGINS.match(content)
        contents.append("-" + content if negative else content)
        end = closing + 1
    unit = UNIT_AFTER_BOX.fullmatch(text, end)
    if contents and unit and units.unit(unit[1], spaced=False):
        contents[-1] += f" {unit[1]}"
    return contents


def _closing_brace(text: str, start: int) -> int | None:
    """Where the brace is that closes one opened right before `start`."""
    depth = 1
    for brace in BRACE.finditer(text, start):
        depth += 1 if brace[0] == "{" else -1
        if depth == 0:
            return brace.start()
    return None


def mark_rows(text: str) -> str:
    r"""The double backslash as ROW_END in a matrix; elsewhere a command was escaped twice.

    >>> mark_rows(r"\begin{pmatrix}1\\2\end{pmatrix}"), mark_rows(r"\\frac12")
    ('\\begin{pmatrix}1 ⏎ 2\\end{pmatrix}', '\\frac12')
    """
    if "\\begin" in text:
        return re.sub(r"\\\\(?:\s*\[[0-9.a-z]{1,9}\])?", f" {ROW_END} ", text)
    return re.sub(r"\\\\(?=[a-zA-Z()\[\]%$])", lambda match: "\\", text)


def clean_latex(text: str) -> str:
    return rewrite(text, LATEX)


VALUE_BEGINS = r"(?=\s*(?:[-+]?[0-9(]|\\(?:frac|sqrt|pi)))"
ADJACENT_FORMULAS = re.compile(r"(?:\$\s+\$|(?<=[0-9])\$\$(?=[0-9])|\\\)\s*\\\()" + VALUE_BEGINS)
LINE_BETWEEN_VALUES = re.compile(
    r"""
    (?<=[0-9)}%$]) [ \t]* \n \s* (?= \$? (?: [-+]?[0-9(] | \\frac | \\sqrt ) )     # 1 ⏎ 2
  | (?<=[\w)}%$]) [ \t]* \n \s* (?= \$? [A-Za-z]\w? \s* = )                       # x = 1 ⏎ y = 2
    """,
    re.VERBOSE,
)


def separate_values(text: str) -> str:
    r"""A comma between formulas side by side and values on lines of their own: they are several.

    >>> separate_values(r"$\frac34$ $\frac12$"), separate_values("1\n234")
    ('$\\frac34, \\frac12$', '1; 234')
    """
    return LINE_BETWEEN_VALUES.sub("; ", ADJACENT_FORMULAS.sub(", ", text))


def resolve_dollars(text: str) -> str:
    """One dollar sign is money, "$5"; several enclose formulas, "$5$", and say nothing."""
    if text.count("$") == 1:
        return re.sub(r"(?:US)?\$", " USD ", text)
    return text.replace("$", "")


def collapse_spaces(text: str) -> str:
    """One space at a time, and none within brackets or before the punctuation of a sentence."""
    text = " ".join(text.split())
    text = re.sub(r"(?<=[(\[]) ", "", text)
    return re.sub(r" (?=[.,;:)\]](?![0-9]))", "", text)


# Emoji, headings and bullets of Markdown: ✅ 41, ### 41, * 41.
DECORATION = re.compile(
    r"^(?:\*(?=\s)|[\u2600-\u27bf\U0001f300-\U0001faff\ufe0f]|#{1,6}(?=\s))+\s*(?=\S)"
)


def drop_decoration(text: str) -> str:
    return DECORATION.sub("", text)


# Bold words stand alone; 2**3**2 is a power.
BOLD = re.compile(r"(?<![\w)\]}*])\*\*(?=\S)([^*]*[^*\s])\*\*(?![\w(*])")


def drop_emphasis(text: str) -> str:
    """Without Markdown's bold and without quotation marks around the whole: **B**, __B__, "B"."""
    text = re.sub(r"^\*\*\s*([^*]*[^*\s])\s*\*\*$", r"\1", text)
    text = BOLD.sub(r"\1", text)
    return re.sub(r"^(__|[\"'])(.+)\1$", r"\2", text)


LEAD = r"(?: (?:so|thus|hence|therefore)\b | 所以|因此|故 )? ,? \s*"
INTRODUCTION = re.compile(
    rf"""
    {LEAD} (?:the\s+)? (?:(?:final|correct|right|best)\s+)?
    (?: (?:answer|option|choice) \s* (?:is\b|:|=) \s* :?    # the answer is   answer:
      | (?:option|choice|answer) \s (?= \(?[A-Za-z]\b | [-0-9$(\\] )           # option B
      | (?:approximately|approx\.?|about|around|roughly) \s (?=[0-9])
    )
    \s* (?=\S)
  | {LEAD} (?:it\ is|it's|i\ (?:choose|pick|select)|we\ (?:have|get|obtain|find)) \s+ (?=\S)
  | (?: so|thus|hence|therefore ) (?: ,\s* | \s+ ) (?=\S)
  | {LEAD}
    (?: (?:正确|最终|最后)? 【?(?:正确)?答案?】? \s*
        (?: [是为] \s* :? | : | (?=[^\u4e00-\u9fff]) )      # 答案是 "the answer is"
      | (?:选项|选择|故?选) \s* :? (?=[A-Z(])              # 选 "choose"
    )
    \s* (?=\S)
    """,
    re.IGNORECASE | re.VERBOSE,
)


REMARK = re.compile(
    r"\s*(?:\((?:approx(?:imately|\.)?|exact(?:ly)?|rounded[a-z0-9 .,]{0,40})\)|选项)$",
    re.IGNORECASE,
)


def drop_remark(text: str) -> str:
    """Without "(approximately)" or "(rounded to two decimals)" at the end."""
    return REMARK.sub("", text)


ANSWER_IS = re.compile(r"\banswer\s*(?:is\b|:)", re.IGNORECASE)


def drop_introduction(text: str) -> str:
    """Without "The answer is …" in front; twice, for "The answer is option B".

    Where a second answer follows, the text stays as it is: then it says none.
    """
    rest = text
    for _ in range(2):
        introduction = INTRODUCTION.match(rest)
        if introduction:
            rest = rest[introduction.end() :]
    return text if rest != text and ANSWER_IS.search(rest) else rest


# In this order: Unicode comes first, since the later steps look for plain characters.
CLEANING = [
    separate_fractions,
    raise_and_lower,
    normalize_unicode,
    mark_rows,
    unbox,
    separate_values,
    clean_latex,
    resolve_dollars,
    collapse_spaces,
    drop_decoration,
    drop_emphasis,
    drop_introduction,
    drop_remark,
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
