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
         | maybe | perhaps | possibly | might | could | guess | assume | suppose | instead | but
       ) \b | n't\b
    """,
    re.IGNORECASE | re.VERBOSE,
)
# The last word before the value; what stands before it are words, without a number or a sign.
SUBJECT = re.compile(
    r"""
    (?: (?:so|thus|hence|therefore|finally|then) ,? \s+ )?
    (?P<subject> [A-Za-z][^0-9=<>≤≥≠,;?!|+*/^$]*? ) \s+
    (?: is\ equal\ to | equals | is | are | was | were | becomes ) \s+
    (?: equal\ to\s+ | exactly\s+ | given\ by\s+ | simply\s+ )? :? \s*
    (?P<value> \S.* )
    """,
    re.VERBOSE | re.DOTALL | re.IGNORECASE,
)
FORMULA = re.compile(r"\$\$?([^$]+)\$\$?|\\\((.+?)\\\)|\\\[(.+?)\\\]", re.DOTALL)
WORDS_AROUND = re.compile(r"(?=.*[A-Za-z]{2})[A-Za-z\s,.:'-]*", re.DOTALL)


def value_of(clean: str) -> str | None:
    """The end of a clean sentence after "is" or the like; None if it is no sentence of this form.

    >>> value_of("The area is 5 cm^2"), value_of("The area is not 5"), value_of("It is 5 or 6")
    ('5 cm^2', None, None)
    """
    match = SUBJECT.fullmatch(clean) if len(clean) <= MAX_SENTENCE else None
    if not match or REFUSED.search(clean):
        return None
    return match["value"]


def formula_of(raw: str) -> str | None:
    """The one formula between dollars or \\\\( \\\\) among words; None if there are none or two.

    >>> formula_of("So $x=5$ holds."), formula_of("$3$ and $5$ hold"), formula_of("$5$")
    ('x=5', None, None)
    """
    formulas = list(FORMULA.finditer(raw)) if len(raw) <= MAX_SENTENCE else []
    if len(formulas) != 1:
        return None
    match = formulas[0]
    around = f"{raw[: match.start()]} {raw[match.end() :]}"
    if not WORDS_AROUND.fullmatch(around) or REFUSED.search(raw):
        return None
    return match[match.lastindex].strip()
