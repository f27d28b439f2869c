r"""What an answer says, and when two answers are equal.

    equivalent(r"2\sqrt{2}", r"\sqrt{8}") -> True
    equivalent("5 cm", "5 m")             -> False

An answer is untrusted text: it is never evaluated as code. It goes through three stages, each a list of small rules:
    clean    spelling.CLEANING      one spelling: "$\dfrac12$ cm" -> "\frac12 cm"
    read     READERS                what it says: a list, a relation, a number with its unit, …, or mere words
    compare  COMPARISONS            whether two values are equal
A new kind of answer is one reader, one comparison, and their lines in these lists.

What counts as equal, where tastes differ:
- numbers: |a − b| ≤ max(1e-6, 1e-5·|b|), b the reference; expressions with variables have no tolerance;
- a unit (also %, °, a currency, "apples") may be missing on one side; none is converted: 5 cm ≠ 0.05 m, 50% ≠ 0.5;
- (1, 2), [1, 2) and 1:2 are ordered, {1, 2} and the bare "1, 2" or "1 or 2" are not; a bare list may stand for a
  tuple or a closed interval, then in order;
- "1,234" and "1 234" are numbers, but a comma next to a bracket separates, "(1,234)", and if the reference is a
  sequence the prediction "1,234" is read as one, too;
- "x = 5" equals "5" but not "y = 5"; equations and inequalities are compared side by side, never solved;
- a reference that is one capital letter is a choice; a prediction that names two choices is wrong.

Everything that is computed is bounded: in length, depth, the bits of a number, and in time. Constants are computed
here, as fractions where possible. Expressions with variables are evaluated at a few rational points, which refutes
wrong ones; the others must be proved (prover.py).
"""

from __future__ import annotations

import math
import re
from fractions import Fraction
from typing import Any, NamedTuple

from rewards import prover, spelling, units
from rewards.expressions import MAX_DEPTH, Parser, evaluate
from rewards.prover import PROVER, Budget

MAX_TEXT = 4096  # characters; a longer answer is compared as it stands
MAX_MATH = 512  # characters; a longer answer is compared as text
MAX_ITEMS = 32  # of a list or tuple
SAMPLES = 5  # points at which expressions with variables are evaluated


def equivalent(prediction: str, reference: str) -> bool:
    r"""Whether a predicted answer equals the reference, by the rules at the top of this file.

    >>> equivalent(r"\frac{1}{2}", "0.5"), equivalent("5 cm", "5 m"), equivalent("", "")
    (True, False, False)
    >>> equivalent("The answer is (B).", "B"), equivalent("B or C", "B")
    (True, False)
    """
    prediction = prediction.strip()
    reference = reference.strip()
    if not prediction or not reference:
        return False
    if max(len(prediction), len(reference)) > MAX_TEXT:
        return prediction == reference

    prediction = spelling.clean(prediction)
    reference = spelling.clean(reference)
    letter = LETTER.fullmatch(reference)
    if letter:
        chosen = choice(prediction) == letter[1].upper()
        # A small letter may be a variable as well, so that a prediction which is no choice is compared below.
        if chosen or letter[1].isupper():
            return chosen

    target = read(reference)
    budget = Budget(prover.SYMBOLIC_LIMIT)
    if same(read(prediction), target, budget):
        return True
    # "1,234" may be two numbers where the reference is a sequence.
    if spelling.THOUSANDS.search(prediction) and target.kind in ORDERED:
        return same(read(prediction, grouped=False), target, budget)
    return False


def rational(text: str) -> Fraction | None:
    r"""The exact value of numbers under + − · / ^ and \frac. None for all else: words, units, variables, roots, π.

    >>> rational(r"$\frac{1}{2}$"), rational("1,000")
    (Fraction(1, 2), Fraction(1000, 1))
    >>> rational(r"2\sqrt{4}") is None, rational("5 cm") is None
    (True, True)
    """
    if len(text) > MAX_MATH:
        return None
    text = text.translate(spelling.CHARACTERS).replace("$", "")
    for rewrite in (*spelling.LATEX, *spelling.JOINED_THOUSANDS, *spelling.NOTATION):
        text = spelling.rewrite(text.strip(), [rewrite])
    try:
        parser = Parser(text)
        tree = parser.whole()
    except ValueError:
        return None
    if parser.names:
        return None
    value = evaluate(tree)
    return value if isinstance(value, Fraction) else None


# ------------------------------------------------------------------------------------------------------------ choices

LETTER = re.compile(r"[(\[]?([A-Za-z])[)\].:]*")  # of a reference: B, (B), B., [b]:

CHOICE = re.compile(
    r"""
    (?: \( ([A-Za-z]) \)            # (B)
      | \[ ([A-Za-z]) \]            # [B]
      | ([A-Za-z]) (?:
            \)                      # B)
          | [.:] (?=\s|$)           # B. and B: before a space or the end, not "i.e."
          | ,?$                     # B and "B," at the end, not "Banana"
        )
    )
    [.:]? \s*
    """,
    re.VERBOSE,
)
# In what follows the choice: a second one.
ANOTHER_CHOICE = re.compile(
    r"""
    (?<![A-Za-z]) [A-Z] (?: \) | [.:]\s+\S )    # … C) …   … C. something
  | ^(?: (?:or|and)\b | [,/&] )                 # or …   , …
  | ^[A-Z]\W*$                                  # C
    """,
    re.VERBOSE,
)


def choice(text: str) -> str | None:
    """The letter that an answer chooses, in upper case; None if it is no choice, or two.

    >>> choice("(b)"), choice("B) 12 cm"), choice("Banana"), choice("B) or C)")
    ('B', 'B', None, None)
    """
    match = CHOICE.match(text)
    if not match or ANOTHER_CHOICE.search(text[match.end() :]):
        return None
    return match[match.lastindex].upper()


# ------------------------------------------------------------------------------------------------------------- values


class Value(NamedTuple):
    """What an answer says. Of the fields after `words`, each kind uses its own."""

    kind: str  # "number", "expression", "relation", "text", or a sequence: a key of ORDERED
    words: str = ""  # the text, without what makes no difference in words
    items: tuple[Value, ...] = ()  # of a sequence; the sides of a relation
    signs: tuple[str, ...] = ()  # between the sides of a relation
    tree: tuple = ()  # of a number or expression
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
    "()": True,
    "[]": True,
    "(]": True,
    "[)": True,
}
# For these a bare list may stand.
ENCLOSED_LISTS = ("{}", "()", "[]")
TEXT = Value("text")


def read(text: str, grouped: bool = True) -> Value:
    """What a clean answer says; `grouped`: "1,234" is one number.

    >>> read("5 cm").kind, read("5 cm").number, read("5 cm").unit
    ('number', Fraction(5, 1), (('cm', 1),))
    >>> read("1 < x").kind, read("(1, 2]").kind, read("x or y").kind, read("The cat!")
    ('relation', '(]', 'list', Value(kind='text', words='cat', items=(), signs=(), tree=(), samples=(), unit=None))
    """
    text = bare(text)
    words = plain_words(text)
    if not text or len(text) > MAX_MATH:
        return TEXT._replace(words=words)
    return recognised(spelling.as_mathematics(text, grouped), words, depth=0)


def read_part(text: str, depth: int) -> Value:
    """What a part of an answer says, an item or a side, whose mathematics is spelled out already."""
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
            return value._replace(words=words)
    return TEXT._replace(words=words)


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


# ------------------------------------------------------------------------------------------------------------ readers

# A reader gets a text and its depth in brackets. It returns a value, None if the text is not in its notation, or
# TEXT if it is, but says nothing there.

OPENING = "([{⦃"
CLOSING = ")]}⦄"


def read_list(text: str, depth: int) -> Value | None:
    """1, 2 and 3."""
    pieces, _ = split(text, r",\s*(?:and|or)\b|[,;]|\b(?:and|or)\b")
    return sequence("list", pieces, depth) if len(pieces) > 1 else None


def read_relation(text: str, depth: int) -> Value | None:
    """x = 2y, 1 < x ≤ 2. Those with > and ≥ alone are turned round: x > 3 and 3 < x say the same."""
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


def read_quantity(text: str, depth: int) -> Value | None:
    """A number with its unit, 5 cm. Only a constant takes one: "2x m" is an expression."""
    text = degrees_as_radians(text)
    # The unit begins at the first letter that does not belong to a command.
    letter = re.search(r"(?<![A-Za-z\\])[A-Za-zμΩ%€£¥₹]", text)
    if not letter or letter.start() == 0:
        return None
    number = text[: letter.start()]
    unit = units.unit(text[letter.start() :], spaced=number.endswith(" "))
    value = expression(number) if unit else None
    return value._replace(unit=unit) if value and value.kind == "number" else None


def read_expression(text: str, depth: int) -> Value | None:
    """A number or an expression with variables."""
    return expression(degrees_as_radians(text))


READERS = [
    read_list,
    read_relation,
    read_union,
    read_ratio,
    read_brackets,
    read_plus_minus,
    read_quantity,
    read_expression,
]


def sequence(kind: str, pieces: list[str], depth: int) -> Value:
    if len(pieces) > MAX_ITEMS or not all(piece.strip() for piece in pieces):
        return TEXT
    return Value(kind, items=tuple(read_part(piece, depth + 1) for piece in pieces))


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
    if not re.search(r"\\(?:sin|cos|tan)", text):
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
    return None if value is None else Value("number", tree=tree, samples=(value,) * SAMPLES)


# -------------------------------------------------------------------------------------------------------- comparisons

# A comparison gets the prediction, the reference and the time that is left for proofs. It returns a verdict, or None
# if it does not apply, and then the next one is asked.


def same(prediction: Value, reference: Value, budget: Budget) -> bool:
    """Whether two values are equal, by the first comparison that applies; False if none does."""
    for comparison in COMPARISONS:
        verdict = comparison(prediction, reference, budget)
        if verdict is not None:
            return verdict
    return False


def compare_numbers(a: Value, b: Value, budget: Budget) -> bool | None:
    """Close, and of one unit if both have one."""
    if not a.kind == b.kind == "number":
        return None
    if a.unit and b.unit and a.unit != b.unit:
        return False
    return close(a.number, b.number)


def compare_words(a: Value, b: Value, budget: Budget) -> bool | None:
    """The same words are equal, whatever they say; other words may still say the same."""
    return True if a.words and a.words == b.words else None


def compare_relations(a: Value, b: Value, budget: Budget) -> bool | None:
    """Side by side; an equation may also be turned round."""
    if not a.kind == b.kind == "relation":
        return None
    if a.signs != b.signs:
        return False
    if all_same(a.items, b.items, budget):
        return True
    return a.signs == ("=",) and all_same(a.items[::-1], b.items, budget)


def compare_assigned(a: Value, b: Value, budget: Budget) -> bool | None:
    """ "x = 5" and "5"; any other relation equals no value."""
    if "relation" not in (a.kind, b.kind):
        return None
    a = assigned(a)
    b = assigned(b)
    if "relation" in (a.kind, b.kind):
        return False
    return same(a, b, budget)


def compare_expressions(a: Value, b: Value, budget: Budget) -> bool | None:
    """Close at two sample points at least, refuted at none, and the same tree or proved equal."""
    mathematics = {a.kind, b.kind} <= {"number", "expression"}
    if not mathematics or a.unit or b.unit:
        return None
    points = zip(a.samples, b.samples, strict=True)
    defined = [(x, y) for x, y in points if x is not None and y is not None]
    if len(defined) < 2 or not all(close(x, y, ROUNDING, ROUNDING) for x, y in defined):
        return False
    return a.tree == b.tree or PROVER.equal(a.tree, b.tree, budget)


def compare_sequences(a: Value, b: Value, budget: Budget) -> bool | None:
    """Item by item if one of them is ordered; a bare list may stand for brackets around it."""
    if a.kind not in ORDERED or b.kind not in ORDERED:
        return None
    if a.kind != b.kind and not bare_list_for(a, b) and not bare_list_for(b, a):
        return False
    if ORDERED[a.kind] or ORDERED[b.kind]:
        return all_same(a.items, b.items, budget)
    return same_set(a.items, b.items, budget)


COMPARISONS = [
    compare_numbers,
    compare_words,
    compare_relations,
    compare_assigned,
    compare_expressions,
    compare_sequences,
]


def all_same(a: tuple[Value, ...], b: tuple[Value, ...], budget: Budget) -> bool:
    if len(a) != len(b):
        return False
    return all(same(x, y, budget) for x, y in zip(a, b, strict=True))


def same_set(a: tuple[Value, ...], b: tuple[Value, ...], budget: Budget) -> bool:
    """Whether each item of a has a partner of its own in b, and none is left over."""
    rest = list(b)
    for item in a:
        partner = next((i for i, other in enumerate(rest) if same(item, other, budget)), None)
        if partner is None:
            return False
        del rest[partner]
    return not rest


def bare_list_for(a: Value, b: Value) -> bool:
    return a.kind == "list" and b.kind in ENCLOSED_LISTS


# What may stand left of "=" without being a statement of its own: x, f(x), A_1, \theta, \angle abc.
NAME = re.compile(r"(?:[a-z]|\\(?!frac|sqrt|sin|cos|tan|ln|log|exp))[a-z0-9\\ _'{}()]*")


def assigned(value: Value) -> Value:
    r"""What an equation sets: the last side of "x = 5", "f(x) = A = 5" and "7 + 5 = 12". Else the value itself.

    >>> assigned(read("x = 5")).words, assigned(read("7 + 5 = 12")).words, assigned(read("2x = 6")).words
    ('5', '12', '2x = 6')
    """
    if value.kind != "relation" or set(value.signs) != {"="}:
        return value
    *sides, last = value.items
    named = NAME.fullmatch(sides[0].words)
    return last if named or is_computation(sides, last) else value


def is_computation(sides: list[Value], last: Value) -> bool:
    """Whether all sides are numbers that equal the last: 7 + 5 = 12, not 2 + 3 = 6."""
    return all(
        side.kind == last.kind == "number" and close(side.number, last.number) for side in sides
    )


ABSOLUTE = Fraction(1, 10**6)
RELATIVE = Fraction(1, 10**5)
ROUNDING = Fraction(1, 10**7)  # of float arithmetic at sample points; the proof decides


def close(a: Any, b: Any, absolute: Fraction = ABSOLUTE, relative: Fraction = RELATIVE) -> bool:
    """|a − b| ≤ max(absolute, relative·|b|), exact for fractions; an infinity equals only itself.

    >>> close(3.00002, 3), close(3.00004, 3), close(math.inf, 5), close(math.inf, math.inf)
    (True, False, False, True)
    """
    try:
        return bool(a == b or abs(a - b) <= max(absolute, relative * abs(b)) < math.inf)
    except OverflowError:  # a fraction too large for a float
        return False
