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
# Brackets that are functions: what closes them, and the operation.
FUNCTION_BRACKETS = {
    "|": ("|", "abs"),
    r"\lfloor": (r"\rfloor", "floor"),
    r"\lceil": (r"\rceil", "ceiling"),
}
CLOSING_COMMANDS = {r"\rfloor", r"\rceil"}
CONSTANTS = {r"\pi": ("pi",), r"\infty": ("oo",), "e": ("E",)}
FUNCTIONS = {
    r"\sin": "sin",
    r"\cos": "cos",
    r"\tan": "tan",
    r"\sec": "sec",
    r"\csc": "csc",
    r"\cot": "cot",
    r"\arcsin": "arcsin",
    r"\arccos": "arccos",
    r"\arctan": "arctan",
    r"\sinh": "sinh",
    r"\cosh": "cosh",
    r"\tanh": "tanh",
    r"\ln": "log",
    r"\log": "log",
    r"\lg": "lg",
    r"\exp": "exp",
}
INVERSE = {"sin": "arcsin", "cos": "arccos", "tan": "arctan"}  # what ^{-1} makes of them
ACCENTS = {r"\vec", r"\bar", r"\hat", r"\overline"}
CAPITAL_GREEK = [
    "Gamma",
    "Delta",
    "Theta",
    "Lambda",
    "Xi",
    "Pi",
    "Sigma",
    "Upsilon",
    "Phi",
    "Psi",
    "Omega",
]
GREEK_COMMANDS = {f"\\{name}" for name in [*GREEK.values(), "mu", *CAPITAL_GREEK]}

# Four letters in a row, or letters alone, are words: "no" must not become n·o, which equals "on".
WORDS = re.compile(r"(?<![A-Za-z\\])(?<!_\{)[A-Za-z]{4,} | ^[A-Za-z\s]{2,}!*\Z", re.VERBOSE)


DECIMAL = re.compile(r"\.[0-9]*[1-9]|(?<![0-9.])10\s*\^")  # 12.0 is as exact as 12


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
        self.bars = 0  # open |
        self.names: set[str] = set()  # of the variables seen
        # Whether a decimal or a power of ten stands in it: then its value may be rounded.
        self.rounded = bool(DECIMAL.search(text))
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
        closing = token == END or token in CLOSING_COMMANDS or (token == "|" and self.bars)
        # Letters, commands and brackets multiply without a sign. Digits do so only after a
        # factorial, 7!3!, for 5 6 is not 30.
        after_factorial = self.tokens[self.at - 1] == "!" and token[0].isdigit()
        if not closing and (after_factorial or re.match(r"[A-Za-z\\({\[|]", token)):
            return JUXTAPOSED
        return token

    def joined(self, left: tuple) -> tuple:
        """The left operand, the operator after it and its right operand as one tree."""
        sign = self.operator()
        if sign != JUXTAPOSED:
            self.at += 1
        # Operators of one level are done from the left, 5-2-1 is (5-2)-1, powers from the right.
        in_brackets = self.tokens[self.at] in BRACKETS
        right = self.operation(POWER if sign == "^" else BINDING[sign] + 1)
        number_before = is_plain_number(left) or left[0] == "!"
        if sign == JUXTAPOSED and number_before and is_plain_number(right):
            raise ValueError("two values side by side are no product: (1)(3)")
        if sign == JUXTAPOSED and in_brackets and is_zero(right):
            raise ValueError("a factor 0 that nobody would write: f(0/2) is no f times 0")
        if sign == "-":
            return ("+", left, ("-", right))
        return (sign or "*", left, right)

    def operand(self) -> tuple:
        tree = self.without_factorial()
        if not self.take("!"):
            return tree
        if self.take("!"):
            raise ValueError("found '!!', expected one '!'")
        return ("!", tree)

    def without_factorial(self) -> tuple:
        token = self.tokens[self.at]
        if token != END:
            self.at += 1
        if re.match(r"\.?[0-9]", token):
            return ("num", *Fraction(token.rstrip(".")).as_integer_ratio())
        if token in BRACKETS:
            return self.whole(BRACKETS[token])
        if token in FUNCTION_BRACKETS:
            return self.function_brackets(*FUNCTION_BRACKETS[token])
        if token in CONSTANTS:
            return CONSTANTS[token]
        if token in FUNCTIONS:
            return self.call(token)
        if token in self.COMMANDS:
            return self.COMMANDS[token](self)
        if token in ACCENTS:
            return self.accented(token)
        if self.is_variable(token):
            return self.variable(token)
        raise ValueError(f"found {token!r}, expected a number, a variable, a function or a bracket")

    @staticmethod
    def is_variable(token: str) -> bool:
        letter = len(token) == 1 and token.isalpha()
        subscripted = token[1:2] == "_"
        return letter or subscripted or token in GREEK_COMMANDS

    def variable(self, token: str) -> tuple:
        name = re.sub(r"[\\{}]", "", token) + self.applied_to()
        self.names.add(name)
        return ("var", name)

    def applied_to(self) -> str:
        """The bracket after f in f(0), f(-1) and f(x), which is read; "" if it is a factor, x(x+1).

        Nobody writes a product in this way, and I(0) as I times 0 would equal nothing.
        """
        for length in (3, 4):
            bracket = self.tokens[self.at : self.at + length]
            inside = "".join(bracket[1:-1])
            enclosed = bracket[:1] == ["("] and bracket[-1:] == [")"]
            if enclosed and re.fullmatch(r"-?(?:[0-9.]+|[A-Za-z]\w*|\\[a-z]+)", inside):
                self.at += length
                return f"({inside})"
        return ""

    def accented(self, accent: str) -> tuple:
        r"""After \vec and the like: letters, which together are one name."""
        letters = []
        braces = self.take("{")
        while self.tokens[self.at].isalnum() and self.tokens[self.at] != END:
            letters.append(self.tokens[self.at])
            self.at += 1
            if not braces:
                break
        if not letters or (braces and not self.take("}")):
            raise ValueError(f"expected letters after {accent}")
        name = f"{accent[1:]} {''.join(letters)}"
        self.names.add(name)
        return ("var", name)

    def function_brackets(self, closing: str, function: str) -> tuple:
        """After an opening | or \\lfloor: what stands in the brackets, and the closing one."""
        bars = self.bars
        self.bars = bars + 1 if closing == "|" else 0
        tree = self.operation(SUM)
        self.bars = bars
        if not self.take(closing):
            raise ValueError(f"found {self.tokens[self.at]!r}, expected {closing!r}")
        return (function, tree)

    def fraction(self) -> tuple:
        r"""After \frac: two operands."""
        return ("/", self.operation(OPERAND), self.operation(OPERAND))

    def binomial(self) -> tuple:
        r"""After \binom: two operands."""
        return ("binomial", self.operation(OPERAND), self.operation(OPERAND))

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
        name = FUNCTIONS[function]
        if name in INVERSE and exponent == ("-", ("num", 1, 1)):
            name = INVERSE[name]
            exponent = None
        tree = (name, self.argument())
        if base is not None:
            tree = ("/", tree, ("log", base))
        return tree if exponent is None else ("^", tree, exponent)

    def argument(self) -> tuple:
        """What a function applies to: the bracket after it, or a number times letters."""
        if self.tokens[self.at] in ("(", "{"):
            return self.operation(OPERAND)
        argument = self.operation(SIGN)
        while self.is_letter(self.tokens[self.at]):
            argument = ("*", argument, self.operation(SIGN))
        return argument

    @staticmethod
    def is_letter(token: str) -> bool:
        latin = len(token) == 1 and token.isalpha()
        return latin or token == r"\pi" or token in GREEK_COMMANDS

    # Commands with operands of their own; a new one is a method and a line here.
    COMMANDS = {r"\frac": fraction, r"\sqrt": root, r"\binom": binomial}


def is_plain_number(tree: tuple) -> bool:
    """Whether a tree is a number or a fraction of numbers as they are written: 3, -3, 3/4."""
    if tree[0] in ("-", "/"):
        return all(is_plain_number(operand) for operand in tree[1:])
    return tree[0] == "num"


def is_zero(tree: tuple) -> bool:
    """Whether a tree without variables has the value 0."""
    return "var" not in operations(tree) and evaluate(tree) == 0


def operations(tree: tuple) -> set[str]:
    """The names of all operations of a tree.

    >>> sorted(operations(Parser("1+2!").whole()))
    ['!', '+', 'num']
    """
    parts = [operations(operand) for operand in tree[1:] if isinstance(operand, tuple)]
    return {tree[0]}.union(*parts)


def has_root(tree: tuple) -> bool:
    r"""Whether a root stands in a tree, as a sign or as an exponent that is a fraction.

    >>> has_root(Parser(r"1+\sqrt{2}").whole()), has_root(Parser("2^{1/3}").whole())
    (True, True)
    >>> has_root(Parser(r"2\pi").whole()), has_root(Parser("2^{-3}").whole())
    (False, False)
    """
    if tree[0] == "sqrt" or (tree[0] == "^" and "/" in operations(tree[2])):
        return True
    return any(has_root(operand) for operand in tree[1:] if isinstance(operand, tuple))


# --------------------------------------------------------------------------------------- evaluation


def bounded(value: Any, power: Any = 1) -> Any:
    """The value; ValueError if its power would have more than MAX_BITS, which is not computed."""
    bits = 0
    if isinstance(value, Fraction):
        bits = max(value.numerator.bit_length(), value.denominator.bit_length())
    if bits * power > MAX_BITS:
        raise ValueError("number too large")
    return value


def real(value: Any) -> Any:
    """The value without an imaginary part of nothing but rounding; ValueError for other parts."""
    if not isinstance(value, complex):
        return value
    if abs(value.imag) > 1e-12 * abs(value):
        raise ValueError("not a real number")
    return value.real


def raised(base: Any, exponent: Any) -> Any:
    """The power. Odd roots of negative numbers are negative, as in school: (-8)^(1/3) is -2."""
    if not isinstance(exponent, Fraction):
        return bounded(base) ** exponent
    if exponent.denominator == 1:
        return bounded(base, abs(exponent)) ** exponent
    negative = not isinstance(base, complex) and base < 0
    if negative and exponent.denominator % 2 == 1:
        sign = -1 if exponent.numerator % 2 == 1 else 1
        return sign * float(-base) ** exponent
    return bounded(base) ** exponent


MAX_FACTORIAL = 400  # its factorial has about 2,900 bits


def factorial(value: Any) -> Any:
    """n!, by the gamma function between the whole numbers."""
    value = real(value)
    if abs(value) > MAX_FACTORIAL:
        raise ValueError("number too large")
    if isinstance(value, Fraction) and value.denominator == 1:
        return Fraction(math.factorial(int(value)))  # ValueError for a negative number
    return math.gamma(float(value) + 1)


def binomial(n: Any, k: Any) -> Any:
    """n over k; n may be any number if k is whole."""
    n = real(n)
    k = real(k)
    whole = isinstance(k, Fraction) and k.denominator == 1
    if not whole:
        return factorial(n) / factorial(k) / factorial(n - k)
    if not 0 <= k <= MAX_FACTORIAL:
        raise ValueError("number too large or negative")
    value = Fraction(1)
    for i in range(int(k)):
        value = bounded(value * (n - i) / (i + 1))
    return value


def floor(value: Any) -> Fraction:
    return Fraction(math.floor(real(value)))


def ceiling(value: Any) -> Fraction:
    return Fraction(math.ceil(real(value)))


def secant(value: Any) -> Any:
    return 1 / cmath.cos(value)


def cosecant(value: Any) -> Any:
    return 1 / cmath.sin(value)


def cotangent(value: Any) -> Any:
    return 1 / cmath.tan(value)


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
    "sec": secant,
    "csc": cosecant,
    "cot": cotangent,
    "arcsin": cmath.asin,
    "arccos": cmath.acos,
    "arctan": cmath.atan,
    "sinh": cmath.sinh,
    "cosh": cmath.cosh,
    "tanh": cmath.tanh,
    "log": cmath.log,
    "lg": cmath.log10,
    "exp": cmath.exp,
    "abs": abs,
    "floor": floor,
    "ceiling": ceiling,
    "!": factorial,
    "binomial": binomial,
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
    if undefined:
        return None
    try:
        return real(value)
    except ValueError:
        return value


# Where expressions are evaluated: how far from 0, in fourteenths, and with which signs. The far
# points tell |x + 5| from x + 5, the positive ones give √x enough points at which it is real.
POINTS = [
    (39, (-1, 1)),
    (39, (-1, 1)),
    (39, (-1, 1)),
    (39, (1,)),
    (39, (1,)),
    (39, (-1,)),
    (299, (-1, 1)),
    (2999, (-1,)),
]


def coordinate(name: str, seed: int) -> Fraction:
    """An odd number of fourteenths, so never 0, 1 or another whole number."""
    reach, signs = POINTS[seed]
    generator = random.Random(f"{name} {seed}")
    return Fraction(generator.choice(signs) * generator.randrange(1, reach + 1, 2), 14)
