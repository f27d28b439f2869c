r"""Reference answers as data sets bring them: in tags, after ####, at the end of a solution.

read_reference("3 + 4 = <<3+4=7>>7\n#### 7")  -> "7"
read_reference("(B) 12 cm")                   -> "B"
"""

from __future__ import annotations

import re

from rewards.answers import MAX_TEXT, equivalent
from rewards.choices import choice
from rewards.spelling import clean, unbox

MAX_SOLUTION = 100_000  # characters; in a longer text no box is looked for

# ------------------------------------------------------------------------------------ the wrappings


def in_answer_tags(text: str) -> str:
    """The content of the last <answer>…</answer>; the closing tag may be missing."""
    _, tag, content = text.rpartition("<answer>")
    return content.partition("</answer>")[0] if tag else text


def after_thinking(text: str) -> str:
    """What follows </think>."""
    return text.rpartition("</think>")[2]


def after_hashes(text: str) -> str:
    """The line after the last ####, as in GSM8K."""
    _, hashes, rest = text.rpartition("####")
    lines = rest.strip().splitlines()
    return lines[0] if hashes and lines else text


def boxed(text: str) -> str:
    r"""What is in the last \boxed{…}."""
    return unbox(text) if len(text) <= MAX_SOLUTION else text


# A letter before the text of its option. After a dot comes what may begin an option: not "E. coli".
LETTER_WITH_TEXT = re.compile(
    r"\(([A-H])\)\s*\S.*|([A-H])[):]\s*\S.*|([A-H])\.\s*[-0-9A-Z$\\(].*", re.DOTALL
)


def letter_alone(text: str) -> str:
    """The letter of "(B) 12 cm"."""
    match = LETTER_WITH_TEXT.fullmatch(text.strip()) if len(text) <= MAX_TEXT else None
    if match and choice(clean(text)) == match[match.lastindex]:
        return match[match.lastindex]
    return text


# In this order: tags stand outermost. A new wrapping is one function and its line here.
WRAPPINGS = [in_answer_tags, after_thinking, after_hashes, boxed, letter_alone]


def read_reference(text: str) -> str:
    r"""What a reference says inside its wrapping; a plain reference as it stands.

    >>> read_reference("<think>so</think><answer> 3 </answer>"), read_reference("12 cm")
    ('3', '12 cm')
    >>> read_reference(r"We add and get $\boxed{\frac12}$."), read_reference("B. Paris")
    ('\\frac12', 'B')
    """
    for unwrap in WRAPPINGS:
        unwrapped = unwrap(text)
        if unwrapped != text:
            text = unwrapped.strip()
    return text


def is_satisfiable(answer: str) -> bool:
    """Whether a response that gives the reference's own text as its answer is accepted.

    A reference for which it is False gets reward 0 for ever. It costs a proof only where the text
    does not equal itself as it stands.

    >>> is_satisfiable("12 cm"), is_satisfiable("<answer></answer>"), is_satisfiable(" ")
    (True, False, False)
    """
    reference = read_reference(answer)
    if "<answer>" in reference or "</answer>" in reference:
        return False
    return equivalent(reference, reference)
