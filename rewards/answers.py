r"""When two answers are equal.

    equivalent(r"2\sqrt{2}", r"\sqrt{8}") -> True
    equivalent("5 cm", "5 m")             -> False

An answer is untrusted text: it is never evaluated as code. It goes through three stages, each of
them a list of small rules:
    clean      spelling.CLEANING    one spelling: "$\dfrac12$ cm" -> "\frac12 cm"
    read       values.READERS       what it says: a list, a relation, a number with its unit, words
    compare    COMPARISONS          whether two values are equal
A new kind of answer is one reader, one comparison, and their lines in these lists.

What counts as equal, where tastes differ:
- Numbers are equal if |a − b| ≤ max(1e-6, 1e-5·|b|), where b is the reference. Expressions with
  variables have no tolerance.
- A unit (also %, °, a currency, "apples") may be missing on one side. None is converted:
  5 cm ≠ 0.05 m, 50% ≠ 0.5.
- (1, 2), [1, 2) and 1:2 are ordered; {1, 2} and the bare "1, 2" or "1 or 2" are not. A bare list
  may stand for a tuple or a closed interval, and then its order counts.
- "1,234" and "1 234" are numbers. But a comma next to a bracket separates, "(1,234)", and if the
  reference is a sequence, the prediction "1,234" may be one, too.
- "x = 5" equals "5" but not "y = 5". Equations and inequalities are compared side by side, never
  solved.
- A reference that is one capital letter is a choice. A prediction that names two choices is wrong.

Everything that is computed is bounded: in length, in depth, in the bits of a number, and in time.
Constants are computed here, as fractions where possible. Expressions with variables are evaluated
at a few rational points, which refutes most wrong ones; the others must be proved (prover.py).
"""

from __future__ import annotations

import math
import re
from fractions import Fraction
from typing import Any

from rewards import prover, spelling
from rewards.expressions import Parser, evaluate
from rewards.prover import PROVER, Budget
from rewards.values import MAX_MATH, ORDERED, Value, read

MAX_TEXT = 4096  # characters; a longer answer is compared as it stands


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
        # A small letter may be a variable as well. Then what is no choice is compared below.
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
    r"""The exact value of numbers under + − · / ^ and \frac, None for all else.

    All else is: words, units, variables, roots, π, what is too long or too large.

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


# ------------------------------------------------------------------------------------------ choices

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


# -------------------------------------------------------------------------------------- comparisons

# A comparison gets the prediction, the reference and the time that is left for proofs. It returns a
# verdict, or None if it does not apply, and then the next one is asked.


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


ENCLOSED_LISTS = ("{}", "()", "[]")


def bare_list_for(a: Value, b: Value) -> bool:
    """Whether a is "1, 2" and b such a list in brackets."""
    return a.kind == "list" and b.kind in ENCLOSED_LISTS


# What may stand left of "=" without being a statement of its own: x, f(x), A_1, \theta, \angle abc.
NAME = re.compile(r"(?:[a-z]|\\(?!frac|sqrt|sin|cos|tan|ln|log|exp))[a-z0-9\\ _'{}()]*")


def assigned(value: Value) -> Value:
    r"""The last side of "x = 5", "f(x) = A = 5" and "7 + 5 = 12"; of all else the value itself.

    >>> [assigned(read(text)).words for text in ("x = 5", "7 + 5 = 12", "2x = 6")]
    ['5', '12', '2x = 6']
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
