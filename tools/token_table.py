"""token_table.py: one response as a table for the terminal, with what DyCo sees in each token.

`evaluate.py ask --tokens` prints it. What a model writes may hold anything, also what a terminal
would obey rather than show; each token is shown as Python writes it, so none of that gets there.
"""

from __future__ import annotations

import unicodedata
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from evaluate import TokenReading

TOKEN_WIDTH = 22  # columns of the terminal
COLUMNS = (
    ("visual", "mass", "eq. 1"),
    ("text", "mass", "eq. 1"),
    ("visual", "shift", "eq. 3"),
    ("text", "shift", "eq. 3"),
    ("", "role", "eq. 5"),
    ("", "score", "eq. 4, 6"),
    ("", "weight", "eq. 7"),
    ("proba-", "bility", ""),
)
LEGEND = """\
mass: share of the attention; shift: radians by which it moved since the token before; role: where
it moved more, – if about equally; score: relative mass of the role's modality; weight: mean 1"""


def token_table(reading: TokenReading) -> str:
    """A line for each token, within 100 columns, below a header with the numbers of equations."""
    role_names = {1: "visual", -1: "text", 0: "–"}
    roles = [role_names[role] for role in reading.roles.tolist()]
    numbers = (*reading.signals, reading.scores, reading.weights, reading.probabilities)
    columns = [[f"{value:.3f}" for value in values.tolist()] for values in numbers]
    columns.insert(4, roles)
    lines = []
    for place, name in enumerate(("", "token", "")):
        titles = "".join(f"{column[place]:>9}" for column in COLUMNS)
        lines.append((name.ljust(TOKEN_WIDTH) + titles).rstrip())
    for token, *values in zip(reading.tokens, *columns, strict=True):
        lines.append(fit(repr(token), TOKEN_WIDTH) + "".join(f"{value:>9}" for value in values))
    return "\n".join([*lines, LEGEND])


def fit(text: str, width: int) -> str:
    """The text cut or filled up to a number of columns, at least one of them blank."""
    shown = ""
    columns = 0
    for character in text:
        columns_more = character_width(character)
        if columns + columns_more > width - 2:
            shown += "…"
            columns += 1
            break
        shown += character
        columns += columns_more
    return shown + " " * (width - columns)


def character_width(character: str) -> int:
    """Columns of the terminal: a Chinese character takes two, an accent on another none."""
    if unicodedata.combining(character):
        return 0
    return 2 if unicodedata.east_asian_width(character) in "WF" else 1
