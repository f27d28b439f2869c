r"""Mathematical expressions: from text to a tree, and from a tree to its value.

    Parser("2x").whole()                -> ("*", ("num", 2, 1), ("var", "x"))
    evaluate(Parser("1/2").whole())     -> Fraction(1, 2)

A tree is a tuple (operation, operand, …) of trees, numbers and names. It is data: nothing here runs
what an answer says, and the length, the depth and the size of all numbers are bounded.
"""

from __future__ import annotations

import cmath
import math
import operator
import random
import re
from collections.abc import Iterable
from fractions import Fraction
from typing import Any

from rewards.prover import fold
from rewards.spelling import GREEK

MAX_TOKENS = 200  # of an expression
MAX_DEPTH = 40  # nested operations
MAX_BITS = 4096  # of a numerator or denominator


# ------------------------------------------------------------------------------------------ parsing

TOKEN = re.compile(
    r"""
    \s* (?:
        ( [0-9]+\.?[0-9]* | \.[0-9]+ )                              # a number: 12, 1.5, .5
      | ( \\[A-Za-z]+ )                                             # a command: \frac
      | ( [A-Za-z] (?: _[A-Za-z0-9] | _\{[A-Za-z0-9]+\} )? )        # a variable: x, x_1, x_{12}
      | ( \S )                                                      # any other sign
    )
    """,
    re.VERBOSE,
)
END = "end"  # follows the last token
JUXTAPOSED = ""  # the product without a sign: 2x, (x+1)(x+2)

# How strongly operators bind. The minus of a number stands between: -2^2 is -4, -2*x is (-2)*x.
SUM = 1
PRODUCT = 2
SIGN = 3
POWER = 4
OPERAND = 5
BINDING = {
    "+": SUM,
    "-": SUM,
    "*": PRODUCT,
    "/": PRODUCT,
    JUXTAPOSED: PRODUCT,
    "^": POWER,
}
BRACKETS = {"(": ")", "[": "]", "{": "}"}
CONSTANTS = {r"\pi": ("pi",), r"\infty": ("oo",), "e": ("E",)}
FUNCTIONS = {
    r"\sin": "sin",
    r"\cos": "cos",
    r"\tan": "tan",
    r"\ln": "log",
    r"\log": "log",
    r"\exp": "exp",
}
GREEK_COMMANDS = {f"\\{name}" for name in GREEK.values()}

# Four letters in a row, or letters alone, are words: "no" must not become n·o, which equals "on".
WORDS = re.compile(r"(?<![A-Za-z\\])(?<!_\{)[A-Za-z]{4,} | ^[A-Za-z\s]{2,}\Z", re.VERBOSE)


class Parser:
    r"""LaTeX or ASCII mathematics as a tree, by operator precedence; ValueError for all else.

    >>> Parser("2x").whole()
    ('*', ('num', 2, 1), ('var', 'x'))
    >>> Parser("2+").whole()
    Traceback (most recent call last):
    ValueError: found 'end', expected a number, a variable, a function or a bracket
    >>> parser = Parser("x_1 - e")
    >>> parser.whole(), parser.names
    (('+', ('var', 'x_1'), ('-', ('E',))), {'x_1'})
    """

    def __init__(self, text: str) -> None:
        self.tokens = [match[match.lastindex] for match in TOKEN.finditer(text)] + [END]
        self.at = 0  # the token that is read next
        self.depth = 0
        self.names: set[str] = set()  # of the variables seen
        if WORDS.search(text) or len(self.tokens) > MAX_TOKENS:
            raise ValueError("no expression")

    def take(self, token: str) -> bool:
        """Whether this token is next; if so, it is read."""
        if self.tokens[self.at] != token:
            return False
        self.at += 1
        return True

    def whole(self, end: str = END) -> tuple:
        """The expression up to a closing token, which is read, too."""
        tree = self.operation(SUM)
        if not self.take(end):
            raise ValueError(f"found {self.tokens[self.at]!r}, expected {end!r}")
        return tree

    def operation(self, level: int) -> tuple:
        """An operand with all operators after it that bind at least as strongly as the level."""
        self.depth += 1
        if self.depth > MAX_DEPTH:
            raise ValueError("nested too deeply")
        tree = self.signed()
        while BINDING.get(self.operator(), 0) >= level:
            tree = self.joined(tree)
        self.depth -= 1
        return tree

    def signed(self) -> tuple:
        if self.take("-"):
            return ("-", self.operation(SIGN))
        if self.take("+"):
            return self.operation(SIGN)
        return self.operand()

    def operator(self) -> str:
        """The operator that comes next, or a token that is none."""
        token = self.tokens[self.at]
        # Letters, commands and brackets multiply without a sign, digits do not: 5 6 is not 30.
        if token != END and re.match(r"[A-Za-z\\({\[]", token):
            return JUXTAPOSED
        return token

    def joined(self, left: tuple) -> tuple:
        """The left operand, the operator after it and its right operand as one tree."""
        sign = self.operator()
        if sign != JUXTAPOSED:
            self.at += 1
        # Operators of one level are done from the left, 5-2-1 is (5-2)-1, powers from the right.
        right = self.operation(POWER if sign == "^" else BINDING[sign] + 1)
        if sign == "-":
            return ("+", left, ("-", right))
        return (sign or "*", left, right)

    def operand(self) -> tuple:
        token = self.tokens[self.at]
        if token != END:
            self.at += 1
        if re.match(r"\.?[0-9]", token):
            return ("num", *Fraction(token.rstrip(".")).as_integer_ratio())
        if token in BRACKETS:
            return self.whole(BRACKETS[token])
        if token in CONSTANTS:
            return CONSTANTS[token]
        if token in FUNCTIONS:
            return self.call(token)
        if token in self.COMMANDS:
            return self.COMMANDS[token](self)
        if self.is_variable(token):
            return self.variable(token)
        raise ValueError(f"found {token!r}, expected a number, a variable, a function or a bracket")

    @staticmethod
    def is_variable(token: str) -> bool:
        letter = len(token) == 1 and token.isalpha()
        subscripted = token[1:2] == "_"
        return letter or subscripted or token in GREEK_COMMANDS

    def variable(self, token: str) -> tuple:
        name = re.sub(r"[\\{}]", "", token)
        self.names.add(name)
        return ("var", name)

    def fraction(self) -> tuple:
        r"""After \frac: two operands."""
        return ("/", self.operation(OPERAND), self.operation(OPERAND))

    def root(self) -> tuple:
        r"""After \sqrt: an index in brackets, if there is one, and the radicand."""
        index = self.whole("]") if self.take("[") else None
        radicand = self.operation(OPERAND)
        if index is None:
            return ("sqrt", radicand)
        return ("^", radicand, ("/", ("num", 1, 1), index))

    def call(self, function: str) -> tuple:
        r"""After a function's name: \log_2 8, \sin^2 x, \sin(x), and \sin 2x, which is sin(2x)."""
        base = self.operation(OPERAND) if function == r"\log" and self.take("_") else None
        exponent = self.operation(OPERAND) if self.take("^") else None
        tree = (FUNCTIONS[function], self.argument())
        if base is not None:
            tree = ("/", tree, ("log", base))
        return tree if exponent is None else ("^", tree, exponent)

    def argument(self) -> tuple:
        """What a function applies to: the bracket after it, or a number times letters."""
        if self.tokens[self.at] in ("(", "{"):
            return self.operation(OPERAND)
        argument = self.operation(SIGN)
        while re.match(r"[A-Za-z]$|\\pi", self.tokens[self.at]):
            argument = ("*", argument, self.operation(SIGN))
        return argument

    # Commands with operands of their own; a new one is a method and a line here.
    COMMANDS = {r"\frac": fraction, r"\sqrt": root}


# --------------------------------------------------------------------------------------- evaluation


def bounded(value: Any, power: Any = 1) -> Any:
    """The value; ValueError if its power would have more than MAX_BITS, which is not computed."""
    bits = 0
    if isinstance(value, Fraction):
        bits = max(value.numerator.bit_length(), value.denominator.bit_length())
    if bits * power > MAX_BITS:
        raise ValueError("number too large")
    return value


def raised(base: Any, exponent: Any) -> Any:
    whole = isinstance(exponent, Fraction) and exponent.denominator == 1
    return bounded(base, abs(exponent) if whole else 1) ** exponent


def added(a: Any, b: Any) -> Any:
    return bounded(a + b)


def multiplied(a: Any, b: Any) -> Any:
    return bounded(a * b)


def divided(a: Any, b: Any) -> Any:
    return bounded(a / b)


# Fractions stay exact. A root or π makes floats of them, or complex numbers.
ARITHMETIC = {
    "num": Fraction,
    "pi": lambda: math.pi,
    "E": lambda: math.e,
    "oo": lambda: math.inf,
    "-": operator.neg,
    "+": added,
    "*": multiplied,
    "/": divided,
    "^": raised,
    "sqrt": cmath.sqrt,
    "sin": cmath.sin,
    "cos": cmath.cos,
    "tan": cmath.tan,
    "log": cmath.log,
    "exp": cmath.exp,
}


def evaluate(tree: tuple, names: Iterable[str] = (), seed: int = 0) -> Any:
    """The value of a tree; that of a variable is rational and depends on its name and the seed.

    The result is a Fraction as long as it is rational, else a float or a complex number, and None
    where it is undefined or too large.

    >>> evaluate(("/", ("num", 3, 1), ("num", 6, 1)))
    Fraction(1, 2)
    >>> evaluate(("/", ("num", 3, 1), ("num", 0, 1))) is None
    True
    """
    point = {name: coordinate(name, seed) for name in names}
    try:
        value = fold(tree, ARITHMETIC | {"var": point.__getitem__})
    except (ArithmeticError, TypeError, ValueError):
        return None
    undefined = value != value  # true of NaN alone
    return None if undefined else value


def coordinate(name: str, seed: int) -> Fraction:
    """An odd number of fourteenths from -39/14 to 39/14, so never 0, 1 or another whole number."""
    return Fraction(random.Random(f"{name} {seed}").randrange(-39, 40, 2), 14)
