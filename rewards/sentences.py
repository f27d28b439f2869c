r"""The one value of a sentence.

    value_of("The area is 5 cm^2")            -> "5 cm^2"
    value_of("So we find $x=5$ as the root")  -> "x=5"

A sentence with two values, with "or", or with a word that denies or changes its value has none.
"""

from __future__ import annotations

import re

MAX_SENTENCE = 300  # characters

# After these words a number is not what is said, or not alone.
REFUSED = re.compile(
    r"""
    \b (?: not | no | never | neither | nor | none | cannot | wrong | incorrect | false | isn't
         | or | either | between | from | (?<!equal\ )to | at\ least | at\ most
         | if | unless | except | without
         | more | less | greater | fewer | than | over | under | above | below
         | twice | double | half | times | thrice | third | quarter | minus | plus | opposite
         | fails? | otherwise
         | maybe | perhaps | possibly | might | could | guess | assume | suppose | instead | but
       ) \b | n't\b
  | ^\s* (?: when | where | with | using | let | since | because | given | as | for | at | by
           | is | say | consider | take | (?:check|try|test|suppos|assum)\w* ) \b
  # not, or, if, times, about, two; at least, the largest, more than, half, the square is
  | [不非未没或若倍约两] | 如果 | 至[少多] | 最[大小多少] | [大小多少高低]于 | 超过
  | 一半 | 分之 | 平方[是为]
    """,
    re.IGNORECASE | re.VERBOSE,
)
# What stands before the value are words, without a number or a sign, and one of these endings.
SUBJECT = re.compile(
    r"""
    (?: (?:so|thus|hence|therefore|finally|then) ,? \s+ )?
    (?: [A-Za-z][^0-9=<>≤≥≠,;?!|+*/^$]*? \s+
        (?: is\ equal\ to | equals | is | are | was | were | becomes
          | has | have | takes | costs | measures ) \s+
        (?: equal\ to\s+ | exactly\s+ | given\ by\s+ | simply\s+ )? :? \s*
      | [A-Za-z][A-Za-z\ ]*[a-z] : \s+                             # Area: 5
      | [A-Za-z\u4e00-\u9fff\ ]*[\u4e00-\u9fff] (?: 是|为|等于|有|: ) \s*   # 面积是5
    )
    (?P<value> \S.* )
    """,
    re.VERBOSE | re.DOTALL | re.IGNORECASE,
)
# After other clauses, "AC = 12, so the answer is 12".
CONCLUSION = re.compile(
    r"""
    [.,;] \s* (?: (?:so|thus|hence|therefore) ,? )? \s*
    the \s+ (?:final|correct)? \s* answer \s+ is \b :?
    """,
    re.IGNORECASE | re.VERBOSE,
)
FORMULA = re.compile(r"\$\$?([^$]+)\$\$?|\\\((.+?)\\\)|\\\[(.+?)\\\]", re.DOTALL)
PREPOSITION = re.compile(
    r"\b(?:of|by|with|for|from|in|on|at|per|after|before|first|last|when|where)\s*$", re.IGNORECASE
)
WORDS_AROUND = re.compile(r"(?=.*[A-Za-z]{2})[A-Za-z\s,.:'-]*", re.DOTALL)


def value_of(clean: str) -> str | None:
    """The end of a clean sentence after "is" or the like; None if it is no sentence of this form.

    >>> value_of("The area is 5 cm^2"), value_of("The area is not 5"), value_of("It is 5 or 6")
    ('5 cm^2', None, None)
    >>> value_of("Area: 5"), value_of("AC = 12, so the answer is 12")
    ('5', '12')
    """
    if len(clean) > MAX_SENTENCE or REFUSED.search(clean):
        return None
    match = SUBJECT.fullmatch(clean)
    return conclusion(clean) or (match["value"] if match else None)


def conclusion(clean: str) -> str | None:
    """What stands after the one "the answer is" of a longer sentence; None for all else.

    >>> conclusion("A and C are wrong, so the answer is B"), conclusion("AC = 2; the answer is B")
    (None, 'B')
    """
    if len(clean) > MAX_SENTENCE or REFUSED.search(clean):
        return None
    before, *values = CONCLUSION.split(clean)
    if len(values) != 1 or "answer" in before.casefold():
        return None
    return values[0].strip()


def formula_of(raw: str) -> str | None:
    """The one formula between dollars or \\\\( \\\\) among words; None if there are none or two.

    A formula after a preposition is none: "the square of $4$", "the answer for $x=4$".

    >>> formula_of("So $x=5$ holds."), formula_of("$3$ and $5$ hold"), formula_of("$5$")
    ('x=5', None, None)
    """
    formulas = list(FORMULA.finditer(raw)) if len(raw) <= MAX_SENTENCE else []
    if len(formulas) != 1:
        return None
    match = formulas[0]
    before = raw[: match.start()]
    around = f"{before} {raw[match.end() :]}"
    if not WORDS_AROUND.fullmatch(around) or REFUSED.search(raw) or PREPOSITION.search(before):
        return None
    return match[match.lastindex].strip()
