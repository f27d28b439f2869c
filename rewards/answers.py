r"""When two answers are equal.

    equivalent(r"2\sqrt{2}", r"\sqrt{8}") -> True
    equivalent("5 cm", "5 m")             -> False

An answer is untrusted text: it is never evaluated as code. It goes through three stages, each of
them a list of small rules:
    clean      spelling.CLEANING    one spelling: "$\dfrac12$ cm" -> "\frac12 cm"
    read       values.READERS       what it says: a list, a relation, a number with its unit, words
    compare    COMPARISONS          whether two values are equal
A new kind of answer is one reader, one comparison, and their lines in these lists.

What counts as equal, where tastes differ (docs/rewards.md has the long list):
- Integers and fractions are compared exactly. Where a decimal or a power of ten stands on either
  side, or a root on one and a fraction on the other, |a − b| ≤ 1e-5·|b|, b being the reference.
  Closed forms are compared to nine digits, expressions with variables without any tolerance.
- A unit (also %, °, a currency, "apples") may be missing on one side. None is converted:
  5 cm ≠ 0.05 m, 50% ≠ 0.5.
- (1, 2) and [1, 2) are ordered; {1, 2} and the bare "1, 2" or "1 or 2" are not. A bare list
  may stand for a tuple or a closed interval, and then its order counts.
- "1,234" and "1 234" are numbers. But a comma next to a bracket separates, "(1,234)", and if the
  reference is a sequence, the prediction "1,234" may be one, too.
- "x = 5" equals "5" but not "y = 5". An equation equals its multiples, and no equation is solved.
- An inequality is its interval, a ratio its reduced form and its fraction.
- A reference that is one capital letter is a choice. A prediction that names two choices is wrong.

Everything that is computed is bounded: in length, in depth, in the bits of a number, and in time.
Constants are computed here, as fractions where possible. Expressions with variables are evaluated
at a few rational points, which refutes most wrong ones; the others must be proved (prover.py).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from fractions import Fraction

from rewards import prover, sentences, spelling
from rewards.choices import LETTER, choice, same_letters
from rewards.expressions import Parser, evaluate, operations
from rewards.forms import (
    INTERVALS,
    ROUNDING,
    TIME_OF_DAY,
    as_interval,
    as_matrix,
    as_tuple,
    as_vector,
    close,
    has_two_units,
    ratio_terms,
    same_number,
    values_said,
)
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

    raw_prediction = prediction
    raw_reference = reference
    prediction = spelling.clean(prediction)
    reference = spelling.clean(reference)
    letter = LETTER.fullmatch(reference)
    if letter:
        chosen = choice(sentences.conclusion(prediction) or prediction) == letter[1].upper()
        # A small letter may be a variable as well. Then what is no choice is compared below.
        if chosen or letter[1].isupper():
            return chosen
    if same_letters(prediction, reference):
        return True

    budget = Budget(prover.SYMBOLIC_LIMIT)
    targets = readings(raw_reference, reference)
    said = readings(raw_prediction, prediction)
    if any(same(said[0], target, budget) for target in targets):
        return True
    # "1,234" may be two numbers where the reference is a sequence.
    if spelling.THOUSANDS.search(prediction) and targets[0].kind in ORDERED:
        return same(read(prediction, grouped=False), targets[0], budget)
    mathematics = [target for target in targets if target.kind != "text"]
    return any(same(value, target, budget) for value in said[1:] for target in mathematics)


def readings(raw: str, clean: str) -> list[Value]:
    """What an answer says as it stands, and after that the one value in it if it is a sentence."""
    parts = [sentences.value_of(clean), sentences.formula_of(raw)]
    values = [read(spelling.clean(part)) for part in parts if part is not None]
    return [read(clean), *(value for value in values if value.kind != "text")]


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
    if not operations(tree) <= {"num", "+", "-", "*", "/", "^"}:
        return None
    value = evaluate(tree)
    return value if isinstance(value, Fraction) else None


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
    return same_number(a, b)


def compare_words(a: Value, b: Value, budget: Budget) -> bool | None:
    """The same words are equal, whatever they say; other words may still say the same."""
    return True if a.words and a.words == b.words else None


def compare_matrices(a: Value, b: Value, budget: Budget) -> bool | None:
    """Entry by entry; a single row or column may be written as a tuple."""
    if "matrix" not in (a.kind, b.kind):
        return None
    first = as_matrix(a)
    second = as_matrix(b)
    if first and second:
        rows = zip(first.items, second.items, strict=False)
        return len(first.items) == len(second.items) and all(
            all_same(x.items, y.items, budget) for x, y in rows
        )
    first = as_vector(a)
    second = as_vector(b)
    return bool(first and second) and all_same(first, second, budget)


def compare_ratios(a: Value, b: Value, budget: Budget) -> bool | None:
    """3:2 = 6:4 = 3/2. A reference that may be a time of day, 12:30, is no ratio."""
    if ":" not in (a.kind, b.kind):
        return None
    if has_two_units(a) != has_two_units(b):
        return False
    first = ratio_terms(a)
    second = ratio_terms(b)
    if TIME_OF_DAY.fullmatch(b.source) or not first or not second or 0 in first + second:
        return a.kind == b.kind and all_same(a.items, b.items, budget)
    if len(first) != len(second):
        return False
    return all(
        close(x * second[0], y * first[0], ROUNDING) for x, y in zip(first, second, strict=True)
    )


def compare_relations(a: Value, b: Value, budget: Budget) -> bool | None:
    """Side by side, turned round, as multiples of each other, or as what chains of "=" say."""
    if not a.kind == b.kind == "relation":
        return None
    if a.signs != b.signs:
        return set(a.signs) == set(b.signs) == {"="} and same_chain(a, b, budget)
    if all_same(a.items, b.items, budget):
        return True
    if a.signs in (("=",), ("≠",)) and all_same(a.items[::-1], b.items, budget):
        return True
    return len(a.items) == 2 and proportional(a, b, budget)


def compare_intervals(a: Value, b: Value, budget: Budget) -> bool | None:
    """x > 3 and (3, ∞), also as two inequalities side by side; the variables must be the same."""
    if {a.kind, b.kind} <= {*INTERVALS}:
        return None
    first = (None, a) if a.kind in INTERVALS else as_interval(a)
    second = (None, b) if b.kind in INTERVALS else as_interval(b)
    if not first or not second:
        return None
    if None not in (first[0], second[0]) and first[0] != second[0]:
        return False
    return same(first[1], second[1], budget)


def compare_values_said(a: Value, b: Value, budget: Budget) -> bool | None:
    """ "x = 5" and "5"; any other relation equals no value."""
    if "relation" not in (a.kind, b.kind):
        return None
    pairs = [(x, y) for x in values_said(a) for y in values_said(b)]
    return any(same(x, y, budget) for x, y in pairs if "relation" not in (x.kind, y.kind))


def compare_expressions(a: Value, b: Value, budget: Budget) -> bool | None:
    """Close at two sample points at least, refuted at none, and the same tree or proved equal."""
    mathematics = {a.kind, b.kind} <= {"number", "expression"}
    if not mathematics or a.unit or b.unit:
        return None
    if not agree(a.samples, b.samples):
        return False
    return a.tree == b.tree or PROVER.equal(a.tree, b.tree, budget)


def compare_sequences(a: Value, b: Value, budget: Budget) -> bool | None:
    """Item by item if one of them is ordered; a bare list may stand for brackets around it."""
    if a.kind not in ORDERED or b.kind not in ORDERED:
        return None
    if "()" in (a.kind, b.kind):
        a = as_tuple(a)
        b = as_tuple(b)
    if a.kind != b.kind and not bare_list_for(a, b) and not bare_list_for(b, a):
        return False
    if "or" in a.signs and len({name for item in a.items for name in named(item)}) > 1:
        return a.signs == b.signs and same_set(a.items, b.items, budget)
    if {*a.signs, *b.signs} >= {"and", "or"} and any(is_inequality(item) for item in b.items):
        return False
    if ORDERED[a.kind] or ORDERED[b.kind]:
        return all_same(a.items, b.items, budget)
    return same_set(a.items, b.items, budget)


def compare_ranges(a: Value, b: Value, budget: Budget) -> bool | None:
    """3-5 and 3–5; a range equals nothing else."""
    if "range" not in (a.kind, b.kind):
        return None
    return a.kind == b.kind and all_same(a.items, b.items, budget)


Comparison = Callable[[Value, Value, Budget], bool | None]

COMPARISONS: list[Comparison] = [
    compare_numbers,
    compare_words,
    compare_intervals,
    compare_relations,
    compare_values_said,
    compare_matrices,
    compare_ranges,
    compare_ratios,
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


def named(value: Value) -> list[str]:
    """The name before a value, x of "x = 5"."""
    return [value.items[0].words] if value.kind == "relation" and value.signs == ("=",) else []


def is_inequality(value: Value) -> bool:
    return value.kind == "relation" and "=" not in value.signs


def same_chain(a: Value, b: Value, budget: Budget) -> bool:
    """Whether two chains of "=" of different lengths begin with one name and say one value."""
    if not same(a.items[0], b.items[0], budget):
        return False
    pairs = [(x, y) for x in values_said(a) for y in values_said(b)]
    return any(same(x, y, budget) for x, y in pairs if "relation" not in (x.kind, y.kind))


def agree(a: tuple, b: tuple) -> bool:
    """Whether the values at the sample points are equal wherever they are real, at two at least.

    Where neither is real, or one is undefined, there is nothing to compare.
    """
    agreed = 0
    for x, y in zip(a, b, strict=True):
        if x is None or y is None or not is_finite(x) or not is_finite(y):
            continue
        if close(x, y, ROUNDING_AT_POINTS):
            agreed += 1
        elif not (isinstance(x, complex) and isinstance(y, complex)):
            return False
    return agreed >= 2


ROUNDING_AT_POINTS = Fraction(1, 10**7)  # of float arithmetic; the proof decides


def is_finite(value: Fraction | float | complex) -> bool:
    return isinstance(value, Fraction) or abs(value) < math.inf


def proportional(a: Value, b: Value, budget: Budget) -> bool:
    """Whether left minus right of one equation is a multiple of that of the other.

    For inequalities the multiple must be positive.
    """
    sides = (*a.items, *b.items)
    mathematics = all(side.kind in ("number", "expression") and not side.unit for side in sides)
    if not mathematics or not all(any(s.kind == "expression" for s in v.items) for v in (a, b)):
        return False
    first = differences(a)
    second = differences(b)
    factor = common_factor(first, second)
    if factor is None or (factor < 0 and is_inequality(a) and a.signs != ("≠",)):
        return False
    if not agree(first, tuple(None if y is None else factor * y for y in second)):
        return False
    multiple = ("*", ("num", factor.numerator, factor.denominator), difference(b))
    return PROVER.equal(difference(a), multiple, budget)


def difference(relation: Value) -> tuple:
    """Left minus right, as a tree."""
    left, right = relation.items
    return ("+", left.tree, ("-", right.tree))


def differences(relation: Value) -> tuple:
    """Left minus right at the sample points."""
    left, right = relation.items
    return tuple(
        None if x is None or y is None else x - y
        for x, y in zip(left.samples, right.samples, strict=True)
    )


def common_factor(a: tuple, b: tuple) -> Fraction | None:
    """The rational quotient of two tuples at the first point where there is one."""
    for x, y in zip(a, b, strict=True):
        if isinstance(x, Fraction) and isinstance(y, Fraction) and x and y:
            return x / y
        real = isinstance(x, (float, Fraction)) and isinstance(y, (float, Fraction))
        if real and is_finite(x) and is_finite(y) and x and y:
            return Fraction(x / y).limit_denominator(10**4)
    return None
