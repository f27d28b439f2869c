"""Answers that are letters: the option of a multiple-choice question, or several of them.

choice("(B) 12 cm")  -> "B"
letters("A, C, D")   -> "ACD"
"""

from __future__ import annotations

import re

# Of a reference: B, (B), B., [b]:, {B}.
LETTER = re.compile(r"[(\[{]?\s*([A-Za-z])\s*[)\]}.:]*")

CHOICE = re.compile(
    r"""
    \{? (?:
        \( ([A-Za-z]) \)            # (B)
      | \[ ([A-Za-z]) \]            # [B]
      | ([A-Za-z]) (?:
            \)                      # B)
          | [.:] (?= \s | $ | [-0-9\\(] )     # B. and B: before a space or a value, not "i.e."
          | ,?\}?$                  # B and "B," at the end, not "Banana"
          | (?= \s+ is \s+ (?:the\s+)? (?:correct|right) (?:\s+(?:answer|option|choice))? \.?$ )
          | (?= \s+ is \s+ the \s+ (?:answer|option|choice) \.?$ )
        )
    ) \}?
    [.:]? \s*
    """,
    re.VERBOSE,
)
# In what follows the choice: a second one, or that it is none.
ANOTHER_CHOICE = re.compile(
    r"""
    (?<![A-Za-z]) [A-Z] (?: \) | [.:]\s+\S )        # … C) …   … C. something
  | (?: ^ | [\s,;/&] ) [(\[] [A-Ha-h] [)\]]         # … (c) …
  | \b or \s+ \(? [A-Ha-h] (?: [).:] | \W*$ )       # … or c) …   … or C
  | ^(?: (?:or|and)\b | [,;/&|+或和] )              # or …   , …
  | ^[A-E]\W*$                                      # C; a later letter may be what the option says
  | ^is \s+ (?:not|wrong|incorrect|false)\b
  # The answer is C
  | \b (?:answer|option|choice) (?:\s+is\b)? \s* :? \s* \(? [A-Ha-h] (?![A-Za-z])
    """,
    re.VERBOSE,
)


def choice(text: str) -> str | None:
    """The letter that an answer chooses, in upper case; None if it is no choice, or two.

    >>> choice("(b)"), choice("B) 12 cm"), choice("Banana"), choice("B) or C)")
    ('B', 'B', None, None)
    >>> choice("(D) G"), choice("A.12"), choice("B is correct."), choice("A) 12 or (b) 13")
    ('D', 'A', 'B', None)
    """
    match = CHOICE.match(text)
    if not match or ANOTHER_CHOICE.search(text[match.end() :]):
        return None
    return match[match.lastindex].upper()


TOGETHER = re.compile(r"[A-J]{2,10}")
APART = re.compile(r"\(?[A-J]\)?(?:(?:\s*[,;]\s*(?:and\s+)?|\s+and\s+|\s*和\s*)\(?[A-J]\)?)+")


def same_letters(first: str, second: str) -> bool:
    """Whether one is "A, C, D" and the other "ACD": several options, in the same order.

    Both in one way of writing are no case for this function: AC and CA may be segments.

    >>> same_letters("A, C and D", "ACD"), same_letters("A, C", "CA"), same_letters("AC", "AC")
    (True, False, False)
    """
    for together, apart in ((first, second), (second, first)):
        if TOGETHER.fullmatch(together) and APART.fullmatch(apart):
            return together == "".join(re.findall(r"[A-J]", apart))
    return False
