r"""The same thing in another form: "x = 5" as 5, x > 3 as (3, ∞), "y = 2, x = 1" as (1, 2).

values_said(read("m+n = 12+30 = 42"))  -> [the value of "42"]
as_interval(read("x > 3"))             -> the value of "(3, \\infty)"
"""

from __future__ import annotations

import math
import re
from fractions import Fraction
from typing import Any

from rewards.expressions import has_root
from rewards.sentences import REFUSED
from rewards.values import Value, read

# --------------------------------------------------------------------------------------- closeness

TOLERANCE = Fraction(1, 10**5)  # relative, where a decimal, a power of ten or a root stands
AT_ZERO = Fraction(1, 10**9)  # absolute, where the reference is 0
ROUNDING = Fraction(1, 10**9)  # relative, of float arithmetic with roots and π


def close(a: Any, b: Any, relative: Fraction = TOLERANCE) -> bool:
    """|a − b| ≤ relative·|b|, or |a| ≤ AT_ZERO if b is 0; an infinity equals only itself.

    >>> close(3.00002, 3), close(3.00004, 3), close(0, 1e-19), close(1e-12, 0)
    (True, False, False, True)
    >>> close(math.inf, 5), close(math.inf, math.inf)
    (False, True)
    """
    try:
        if a == b:
            return True
        limit = relative * abs(b) if b else AT_ZERO
        return bool(abs(a - b) <= limit < math.inf)
    except OverflowError:  # a fraction too large for a float
        return False


def same_number(a: Value, b: Value) -> bool:
    """Whether two numbers are equal; b is the reference.

    Integers and fractions are compared exactly. Where a decimal (but 12.0) or a power of ten stands
    on either side the value may be rounded, and also where a root is compared with a fraction. Two
    closed forms, like √8 and 2√2, or 2π and 44/7, are compared as far as floats reach.

    >>> same_number(read("100001"), read("100000")), same_number(read("3.00002"), read("3"))
    (False, True)
    >>> root = read(r"\\sqrt{1000001}")
    >>> same_number(root, read("1000")), same_number(root, read(r"\\sqrt{1000000}"))
    (True, False)
    """
    x = a.number
    y = b.number
    if a.rounded or b.rounded:
        return close(x, y)
    fractions = [isinstance(value, Fraction) for value in (x, y)]
    if all(fractions):
        return x == y
    if any(fractions) and (has_root(a.tree) or has_root(b.tree)):
        return close(x, y)
    return close(x, y, ROUNDING)


# ---------------------------------------------------------------------------- a value behind a name

# What may stand left of "=" without being a statement of its own: x, f(x), A_1, \theta, \angle abc.
NAME = re.compile(r"(?:[a-z]|\\(?!frac|sqrt|sin|cos|tan|ln|log|exp))[a-z0-9\\ _'{}(),]*")
# "the answer for x = 4" says under which condition, not what.
CONDITION = re.compile(r"\b(?:for|with|by|at|when|where)\s+\S+$")

SEGMENT = r"(?:\\(?:tri)?angle\s*)?(?:[A-Z]{1,3}|[a-zA-Z](?:_\{?\w+\}?)?)(?:_\{[^{}]*\})?"
# A quantity is asked for as it stands, like a name; in a line of this list, and nothing else in it.
QUANTITIES = [
    re.compile(pattern)
    for pattern in (
        r"\|[A-Z]{2}\|",  # |AB|
        rf"\\frac\s*\{{{SEGMENT}\}}\s*\{{{SEGMENT}\}}",  # \frac{AE}{EC}
        rf"{SEGMENT}\s*/\s*{SEGMENT}",  # AE/EC
        rf"{SEGMENT}(?:\s*:\s*{SEGMENT})+",  # S_1:S_2
        r"\\(?:sin|cos|tan|cot)\s*\(?(?:\\angle\s*)?(?:[A-Z]{1,3}|\\[a-z]+)\)?",  # \sin A
        r"\|?(?:[-+*\s]|\\vec\s*(?:\{[A-Za-z]{1,2}\}|[a-z]))*\\vec\s*(?:\{[A-Za-z]{1,2}\}|[a-z])\|?",
        r"(?:P|Pr|E|Var|D)\s*[(\[].*[)\]]",  # P(X > 1)
        r"[a-zA-Z]\^\{?-1\}?\s*\([^()]*\)",  # f^{-1}(2)
        r"\\frac\s*\{d\w?\}\s*\{d\w\}",  # \frac{dy}{dx}
    )
]


# At the end of a side: what begins a second equation, x = 1 y = 2.
ANOTHER_NAME = re.compile(r"[0-9)}]\s+[A-Za-z](?:_\{?\w+\}?)?\s*$")


def is_name(side: Value) -> bool:
    r"""Whether a side of an equation is a name, names in brackets, or a quantity.

    >>> [is_name(read(text)) for text in ("x", "(p,q)", "|AB|", r"\frac{AE}{EC}", "S_1:S_2")]
    [True, True, True, True, True]
    >>> [is_name(read(text)) for text in ("2x", "x^2", "x+y", "|x|", "5")]
    [False, False, False, False, False]
    """
    if side.kind in ("()", "{}", "list"):
        return all(NAME.fullmatch(item.words) for item in side.items)
    if NAME.fullmatch(side.words):
        return not REFUSED.search(side.words) and not CONDITION.search(side.words)
    return any(quantity.fullmatch(side.source.strip()) for quantity in QUANTITIES)


def is_sum_of_names(side: Value) -> bool:
    """Whether a side holds several variables, m+n or 10a+b: in a chain it is what is computed."""
    return (
        side.kind == "expression" and len(set(re.findall(r"'var', '([^']*)'", str(side.tree)))) > 1
    )


def values_said(value: Value) -> list[Value]:
    r"""What "x = 5", "f(x) = A = 5", "m+n = 12+30 = 42" and "7 + 5 = 12" say: the last member.

    "x = 1/3 = 0.333" says both, and what says no value is left as it is.

    >>> for text in ("x = 5", "7 + 5 = 12", "m+n = 12+30 = 42", "x = 1/3 = 0.333", "x = 5 = 6"):
    ...     print([said.words for said in values_said(read(text))])
    ['5']
    ['12']
    ['42']
    ['0.333', '1/3']
    ['x = 5 = 6']
    """
    if value.kind != "relation" or set(value.signs) != {"="}:
        return [value]
    first, *steps = value.items
    if any(ANOTHER_NAME.search(step.source) for step in steps[:-1]):
        return [value]
    if len(steps) == 1 and first.kind == "number" and is_name(steps[0]):
        first, steps = steps[0], [first]  # 5 = x
    numbers = [step for step in steps if step.kind == "number"]
    if not all(follows(a, b) for a, b in zip(numbers, numbers[1:], strict=False)):
        return [value]

    last = steps[-1]
    computed = len(numbers) == len(steps)
    sequence = first.kind in ("()", "{}", "list")
    if sequence and len(first.items) != len(last.items):
        return [value]
    chain = len(steps) > 1 and computed and is_sum_of_names(first)
    calculation = computed and first.kind == "number" and follows(first, steps[0])
    if not (is_name(first) or chain or calculation):
        return [value]
    chain_of_numbers = [first, *numbers] if calculation else numbers
    if last.kind == "number" and len(chain_of_numbers) > 1:
        before = chain_of_numbers[-2]
        if not same_number(last, before) and is_rounding(before, last):
            return [last, before]
    return [last]


def follows(a: Value, b: Value) -> bool:
    """Whether the number b may stand after a in a chain of equalities."""
    if a.unit != b.unit and (a.unit and b.unit):
        return True  # a conversion, 5 m = 500 cm, which is not checked
    if same_number(a, b) or is_rounding(a, b):
        return True
    percent = (("%", 1),)
    if percent in (a.unit, b.unit):
        return close(100 * a.number, b.number) or close(a.number, 100 * b.number)
    return False


def is_rounding(exact: Value, rounded: Value) -> bool:
    """Whether a decimal as it is written is the exact value, rounded.

    >>> is_rounding(read("2/3"), read("0.67")), is_rounding(read("2/3"), read("0.66"))
    (True, False)
    """
    decimal = re.fullmatch(r"-?[0-9]*\.([0-9]+)(?:\s.*)?", rounded.source)
    if not decimal or isinstance(exact.number, complex):
        return False
    half = Fraction(1, 2 * 10 ** len(decimal[1]))
    return abs(exact.number - rounded.number) <= half * (1 + TOLERANCE)


def as_tuple(value: Value) -> Value:
    """The list "y = 2, x = 1" as the tuple (1, 2), in the order of the names.

    >>> [item.words for item in as_tuple(read("y = 2, x = 1")).items]
    ['1', '2']
    """
    if value.kind != "list":
        return value
    by_name = {}
    for item in value.items:
        equation = item.kind == "relation" and item.signs == ("=",)
        if not equation or not re.fullmatch(r"[A-Za-z](?:_\{?\w+\}?)?", item.items[0].source):
            return value
        by_name[item.items[0].source] = item.items[1]
    if len(by_name) < len(value.items):
        return value
    return value._replace(kind="()", items=tuple(by_name[name] for name in sorted(by_name)))


# ----------------------------------------------------------------------- inequalities and intervals

INTERVALS = ("()", "(]", "[)", "[]", "∪")
PLUS_INFINITY = read(r"\infty")
MINUS_INFINITY = read(r"-\infty")


def as_interval(value: Value) -> tuple[str | None, Value] | None:
    r"""The variable of an inequality and its interval; None for what is no inequality of a number.

    >>> as_interval(read("x > 3"))[1].kind, as_interval(read("-1 < x ≤ 2"))[1].kind
    ('()', '(]')
    >>> as_interval(read("x < 1 or x > 2"))[1].kind, as_interval(read("x < 1 and x > 2"))
    ('∪', None)
    """
    if value.kind == "list":
        return _joined(value)
    if value.kind != "relation":
        return None
    if value.signs == ("=",) and value.items[0].tree[:1] == ("var",):  # x ∈ (1, 2)
        interval = value.items[1]
        return (value.items[0].tree[1], interval) if interval.kind in INTERVALS else None
    unknown = [i for i, side in enumerate(value.items) if side.tree[:1] == ("var",)]
    numbers = [side for side in value.items if side.kind == "number"]
    if len(unknown) != 1 or len(numbers) != len(value.items) - 1:
        return None
    at = unknown[0]
    variable = value.items[at].tree[1]
    if value.signs == ("≠",):
        below = Value("()", items=(MINUS_INFINITY, numbers[0]))
        above = Value("()", items=(numbers[0], PLUS_INFINITY))
        return variable, Value("∪", items=(below, above))
    if not set(value.signs) <= {"<", "≤"} or at > 1 or at < len(value.items) - 2:
        return None

    low, high, left, right = MINUS_INFINITY, PLUS_INFINITY, "(", ")"
    if at == 1:
        low = value.items[0]
        left = "[" if value.signs[0] == "≤" else "("
    if at == len(value.items) - 2:
        high = value.items[-1]
        right = "]" if value.signs[-1] == "≤" else ")"
    return variable, Value(left + right, items=(low, high))


def _joined(value: Value) -> tuple[str | None, Value] | None:
    """Of "x < 1 or x > 2" and of "(1, 2) or (3, 4)" the union, of "x > 1 and x < 2" (1, 2)."""
    parts = [as_interval(item) for item in value.items if item.kind == "relation"]
    if not parts and "or" in value.signs:
        parts = [(None, item) for item in value.items if item.kind in INTERVALS]
    if None in parts or len(parts) < len(value.items):
        return None
    variables = {variable for variable, _ in parts}
    if len(variables) > 1:
        return None
    intervals = tuple(interval for _, interval in parts)
    if set(value.signs) <= {"or", "或"}:
        joined = Value("∪", items=intervals)
    elif value.signs == ("and",):
        joined = _between(*intervals)
    else:
        return None
    return (variables.pop(), joined) if joined else None


def _between(first: Value, second: Value) -> Value | None:
    """Of (1, ∞) and (-∞, 2) the interval (1, 2); None for all other pairs of intervals."""
    for below, above in ((first, second), (second, first)):
        if below.items[1:] != (PLUS_INFINITY,) or above.items[:1] != (MINUS_INFINITY,):
            continue
        low = below.items[0]
        high = above.items[1]
        if not isinstance(low.number, complex) and low.number < high.number:
            return Value(below.kind[0] + above.kind[1], items=(low, high))
    return None


# ----------------------------------------------------------------------------------------- matrices


def as_matrix(value: Value) -> Value | None:
    """A matrix from [[1, 2], [3, 4]]; None for what is no matrix.

    >>> [len(row.items) for row in as_matrix(read("[[1, 2], [3, 4]]")).items]
    [2, 2]
    """
    if value.kind == "matrix":
        return value
    rows = value.kind == "[]" and all(item.kind == "[]" for item in value.items)
    if not rows:
        return None
    return value._replace(
        kind="matrix", items=tuple(row._replace(kind="row") for row in value.items)
    )


def as_vector(value: Value) -> tuple[Value, ...] | None:
    """The items of a tuple, of a row or of a column; None for all else."""
    if value.kind == "()":
        return value.items
    if value.kind != "matrix":
        return None
    if len(value.items) == 1:
        return value.items[0].items
    if all(len(row.items) == 1 for row in value.items):
        return tuple(row.items[0] for row in value.items)
    return None


# ------------------------------------------------------------------------------------------- ratios

TIME_OF_DAY = re.compile(r"[0-9]{1,2}:[0-5][0-9]")


def has_two_units(value: Value) -> bool:
    """Whether a ratio names two units, 3 cm : 2 m."""
    return len({item.unit for item in value.items if item.unit}) > 1


def ratio_terms(value: Value) -> list[Any] | None:
    """The numbers of 3:2 and of 3/2; None for what is neither.

    >>> ratio_terms(read("3:2")), ratio_terms(read("3/2")), ratio_terms(read("1.5"))
    ([Fraction(3, 1), Fraction(2, 1)], [Fraction(3, 2), Fraction(1, 1)], None)
    >>> ratio_terms(read("3 cm : 2 cm")), ratio_terms(read("3:20 pm"))
    ([Fraction(3, 1), Fraction(2, 1)], None)
    """
    if value.kind == ":" and all(item.kind == "number" for item in value.items):
        units = {item.unit for item in value.items}
        return [item.number for item in value.items] if len(units) == 1 else None
    if value.kind == "number" and value.tree[0] == "/" and not value.unit:
        return [value.number, Fraction(1)]
    return None
