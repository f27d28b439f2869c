r"""What an answer says: from clean text to a value.

    read("5 cm")     -> a number with a unit
    read("1 < x")    -> a relation of a number and an expression
    read("red")      -> words

READERS is the list of the notations that are understood. The first reader that knows the notation
of a text makes its value, from parts that are read in turn. What no reader knows is mere words.
"""

from __future__ import annotations

import re
from typing import Any, NamedTuple

from rewards import spelling, units
from rewards.expressions import MAX_DEPTH, POINTS, Parser, evaluate

MAX_MATH = 512  # characters; a longer answer is compared as text
MAX_ITEMS = 32  # of a list or tuple, rows of a matrix
MAX_ENTRIES = 128  # of a matrix
SAMPLES = len(POINTS)  # at which expressions with variables are evaluated


# ------------------------------------------------------------------------------------------- values


class Value(NamedTuple):
    """What an answer says. Of the fields after `words`, each kind uses its own."""

    kind: str  # "number", "expression", "relation", "matrix", "range", "text", or a sequence:
    # a key of ORDERED
    words: str = ""  # the text, without what makes no difference in words
    source: str = ""  # the text as it was read
    items: tuple[Value, ...] = ()  # of a sequence; the sides of a relation; the rows of a matrix
    signs: tuple[str, ...] = ()  # between the sides of a relation or the items of a list
    tree: tuple = ()  # of a number or expression
    rounded: bool = False  # of a number: a decimal or a power of ten stands in it
    samples: tuple = ()  # values of the tree at SAMPLES points, all the same for a number
    unit: tuple | None = None  # of a number: ((symbol, power), …)

    @property
    def number(self) -> Any:
        return self.samples[0]


# The kinds of sequences, and whether the order of their items counts.
ORDERED = {
    "list": False,  # 1, 2
    "{}": False,
    "∪": False,
    ":": True,  # 1:2
    "date": True,
    "()": True,
    "[]": True,
    "(]": True,
    "[)": True,
}
TEXT = Value("text")


def read(text: str, grouped: bool = True) -> Value:
    """What a clean answer says; `grouped`: "1,234" is one number.

    >>> read("5 cm").kind, read("5 cm").number, read("5 cm").unit
    ('number', Fraction(5, 1), (('cm', 1),))
    >>> read("1 < x").kind, read("(1, 2]").kind, read("x or y").kind, read("The cat!").kind
    ('relation', '(]', 'list', 'text')
    """
    text = bare(text)
    words = plain_words(text)
    if not text or len(text) > MAX_MATH:
        return TEXT._replace(words=words)
    return recognised(spelling.as_mathematics(text, grouped), words, depth=0)


def read_part(text: str, depth: int) -> Value:
    """What an item or a side of an answer says; its mathematics is spelled out already."""
    text = bare(text)
    words = plain_words(text)
    if not text or len(text) > MAX_MATH or depth > MAX_DEPTH:
        return TEXT._replace(words=words)
    return recognised(text, words, depth)


def recognised(text: str, words: str, depth: int) -> Value:
    """The value by the first reader that knows the notation."""
    for reader in READERS:
        value = reader(text, depth)
        if value is not None:
            return value._replace(words=words, source=text)
    return TEXT._replace(words=words, source=text)


def bare(text: str) -> str:
    """Without the punctuation around it."""
    return text.strip().lstrip(",;:=").rstrip(" .,;:?")


def plain_words(text: str) -> str:
    """Words without case, outer article, subscript marks and exclamation marks.

    >>> plain_words("The H_2O!"), plain_words("An  apple"), plain_words("5!")
    ('h2o', 'apple', '5!')
    """
    text = " ".join(text.casefold().split())
    if "\\" not in text:
        text = re.sub(r"_\{?([a-z0-9]+)\}?", r"\1", text)
    text = re.sub(r"(?<=[^\W\d])!+$", "", text)  # after a digit it is a factorial
    return re.sub(r"^an? (?=\S)|\bthe (?=\S)", "", text)


# ------------------------------------------------------------------------------------------ readers

# A reader gets a text and how many brackets and separators it stands within. It returns a value, or
# None if the text is not in its notation, or TEXT if it is but says nothing there.

OPENING = "([{⦃"
CLOSING = ")]}⦄"


def read_list(text: str, depth: int) -> Value | None:
    """1, 2 and 3."""
    pieces, separators = split(text, r",\s*(?:and|or)\b|[,;]|\b(?:and|or)\b|[或和]")
    if len(pieces) < 2:
        return None
    words = tuple(re.sub(r"[^a-z或]", "", separator) for separator in separators)
    return sequence("list", pieces, depth)._replace(signs=words)


SET_BUILDER = re.compile(r"⦃\s*([a-z])\s*(?:=[^|:]*)?[|:](.+)⦄")


def read_set_builder(text: str, depth: int) -> Value | None:
    """{x | x > 3} says x > 3."""
    match = SET_BUILDER.fullmatch(text)
    return read_part(match[2], depth + 1) if match and match[1] in match[2] else None


MATRIX = re.compile(
    r"""
    [(\[]? \s* \\begin\{(p|b|B|small|)(?:matrix|array)\} (?:\s*\{[lcr|\s]*\})?
    ((?: (?!\\begin|\\end) . )*)
    \\end\{\1(?:matrix|array)\} \s* [)\]]?
    """,
    re.VERBOSE | re.DOTALL,
)


def read_matrix(text: str, depth: int) -> Value | None:
    r"""\begin{pmatrix} 1 & 2 \\ 3 & 4 \end{pmatrix}, whatever its brackets: a matrix of rows.

    Bars around it are left alone, since they make a number of it, the determinant.
    """
    match = MATRIX.fullmatch(text)
    if not match:
        return None
    rows = match[2].strip().removesuffix(spelling.ROW_END).split(spelling.ROW_END)
    values = tuple(sequence("row", row.split("&"), depth) for row in rows[:MAX_ITEMS])
    entries = sum(len(row.items) for row in values)
    if len(rows) > MAX_ITEMS or entries > MAX_ENTRIES or TEXT in values:
        return TEXT
    return Value("matrix", items=values)


def read_relation(text: str, depth: int) -> Value | None:
    """x = 2y, 1 < x ≤ 2. With > and ≥ alone it is turned round: x > 3 reads like 3 < x."""
    sides, signs = split(text, "[=<>≤≥≠]")
    if len(sides) < 2:
        return None
    if set(signs) <= {">", "≥"}:
        sides = sides[::-1]
        signs = ["<" if sign == ">" else "≤" for sign in signs[::-1]]
    value = sequence("relation", sides, depth)
    return value if value is TEXT else value._replace(signs=tuple(signs))


def read_union(text: str, depth: int) -> Value | None:
    r"""(1,2)\cup(3,4)."""
    pieces, _ = split(text, r"\\cup(?![A-Za-z])")
    return sequence("∪", pieces, depth) if len(pieces) > 1 else None


def read_ratio(text: str, depth: int) -> Value | None:
    """3:4, also a time of day."""
    pieces, _ = split(text, ":")
    return sequence(":", pieces, depth) if len(pieces) > 1 else None


def read_brackets(text: str, depth: int) -> Value | None:
    """(1, 2], {1, 2}; around a single item brackets say nothing."""
    if not enclosed(text):
        return None
    pieces, _ = split(text[1:-1], "[,;]")
    if len(pieces) == 1:
        return read_part(pieces[0], depth + 1)
    kind = "{}" if text[0] in "{⦃" else text[0] + text[-1]
    return sequence(kind, pieces, depth) if kind in ORDERED else TEXT


def read_plus_minus(text: str, depth: int) -> Value | None:
    r"""2\pm 3 are two numbers."""
    if text.count(r"\pm") != 1:
        return None
    return sequence("list", [text.replace(r"\pm", "+"), text.replace(r"\pm", "-")], depth)


POINT = re.compile(r"([A-Z](?:_[0-9]|')?)\s*(\([^()]*,[^()]*\))")


def read_point(text: str, depth: int) -> Value | None:
    """A(1, 2), a point with its name, says what A = (1, 2) says."""
    match = POINT.fullmatch(text)
    if not match:
        return None
    return sequence("relation", list(match.groups()), depth)._replace(signs=("=",))


DATE = re.compile(r"[0-9]{4}([-/])[0-9]{1,2}\1[0-9]{1,2}|[0-9]{1,2}([-/])[0-9]{1,2}\2[0-9]{4}")


def read_date(text: str, depth: int) -> Value | None:
    """2020-03-05 and 5/3/2020 are neither differences nor fractions."""
    return sequence("date", re.split("[-/]", text), depth) if DATE.fullmatch(text) else None


RANGE = re.compile(r"([0-9]+(?:\.[0-9]+)?)\s*-\s*([0-9]+(?:\.[0-9]+)?)(?:\s+([a-z].*)|%)?")


def read_range(text: str, depth: int) -> Value | None:
    """3-5 is a range and not −2; 5-3 is a difference."""
    match = RANGE.fullmatch(text)
    if not match or float(match[1]) >= float(match[2]):
        return None
    return Value("range", items=tuple(read_part(end, depth + 1) for end in match.groups()[:2]))


def read_quantity(text: str, depth: int) -> Value | None:
    """A number with its unit, 5 cm. Only a constant takes one: "2x m" is an expression."""
    text = with_one_unit(degrees_as_radians(text))
    # The unit begins at the first letter that does not belong to a command.
    letter = re.search(r"(?<![A-Za-z\\])[A-Za-zμΩ%€£¥₹\u4e00-\u9fff]", text)
    if not letter or letter.start() == 0:
        return None
    number = text[: letter.start()]
    unit = units.unit(text[letter.start() :], spaced=number.endswith(" "))
    value = expression(number) if unit else None
    return value._replace(unit=unit) if value and value.kind == "number" else None


LAST_UNIT = re.compile(r"[0-9)}]\s*([A-Za-zμ%]+(?:\^\{?[23]\}?)?)$")


def with_one_unit(text: str) -> str:
    """A sum whose terms have all one unit with the unit at its end only.

    >>> with_one_unit("90 deg - 5 deg"), with_one_unit("5 cm - 3 mm"), with_one_unit("2h - 3")
    ('90 - 5 deg', '5 cm - 3 mm', '2h - 3')
    """
    last = LAST_UNIT.search(text)
    terms, signs = split(text, "[-+]")
    if not last or not signs or not all(term.strip().endswith(last[1]) for term in terms):
        return text
    numbers = [term.strip().removesuffix(last[1]).strip() for term in terms]
    total = numbers[0]
    for sign, number in zip(signs, numbers[1:], strict=True):
        total += f" {sign} {number}"
    return f"{total} {last[1]}"


def read_expression(text: str, depth: int) -> Value | None:
    """A number or an expression with variables."""
    return expression(degrees_as_radians(text))


READERS = [
    read_set_builder,
    read_matrix,
    read_list,
    read_relation,
    read_union,
    read_ratio,
    read_brackets,
    read_point,
    read_plus_minus,
    read_date,
    read_range,
    read_quantity,
    read_expression,
]


def sequence(kind: str, pieces: list[str], depth: int) -> Value:
    r"""The pieces as a value of this kind, TEXT if they are too many; 1\pm 2 makes two items."""
    if len(pieces) > MAX_ITEMS or not all(piece.strip() for piece in pieces):
        return TEXT
    items: list[Value] = []
    for piece in pieces:
        item = read_part(piece, depth + 1)
        several = kind in ("list", "{}") and item.kind == "list" and r"\pm" in item.source
        items += item.items if several else [item]
    return Value(kind, items=tuple(items))


def split(text: str, separator: str) -> tuple[list[str], list[str]]:
    """The pieces between separators outside brackets, and these separators.

    >>> split("a,(b,c);d", "[,;]")
    (['a', '(b,c)', 'd'], [',', ';'])
    """
    pieces = []
    separators = []
    start = 0
    depth = 0
    for match in re.finditer(rf"([(\[{{⦃])|([)\]}}⦄])|(?:{separator})", text):
        opening, closing = match[1], match[2]
        if opening:
            depth += 1
        elif closing:
            depth -= 1
        if depth == 0 and not closing:
            pieces.append(text[start : match.start()])
            separators.append(match[0])
            start = match.end()
    return [*pieces, text[start:]], separators


def enclosed(text: str) -> bool:
    """Whether the first bracket closes at the end.

    >>> enclosed("(1, 2]"), enclosed("(x)(y)"), enclosed("x")
    (True, False, False)
    """
    depth = 0
    for i, character in enumerate(text):
        if character in OPENING:
            depth += 1
        elif character in CLOSING:
            depth -= 1
        if depth == 0:
            return 0 < i == len(text) - 1
    return False


def degrees_as_radians(text: str) -> str:
    """sin 30° is a half; degrees that stand alone are a unit."""
    if not re.search(r"\\(?:sin|cos|tan|sec|csc|cot)", text):
        return text
    return re.sub(r"([0-9.]+) deg", r"(\1\\pi/180)", text)


def expression(text: str) -> Value | None:
    """A number or an expression; None if it is no mathematics, or undefined like 1/0."""
    try:
        parser = Parser(text)
        tree = parser.whole()
    except ValueError:
        return None
    if parser.names:
        samples = tuple(evaluate(tree, parser.names, seed) for seed in range(SAMPLES))
        return Value("expression", tree=tree, samples=samples)
    value = evaluate(tree)
    if value is None:
        return None
    return Value("number", tree=tree, samples=(value,) * SAMPLES, rounded=parser.rounded)
