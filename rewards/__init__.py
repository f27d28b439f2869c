"""The rewards of a response: is the answer right, is the format kept, and a reward of your own.

    accuracy("<think>…</think><answer>50 %</answer>", "50%") -> 1.0
    format("<think>…</think><answer>B</answer>")             -> 1.0

The reward of a response is their weighted sum (reward.accuracy_weight, reward.format_weight). Both
are verifiable: rules decide, no model does. Source: DyCo-RL (arXiv 2606.08035).

A reward of your own needs no change here. Write a function into a file, say mine.py,

    def short(response, answer, sample):
        return 1.0 if len(response) < 400 else 0.0

and train with `reward.custom=mine.py:short reward.custom_weight=0.5`. What it returns, times its
weight, is added to the sum; `sample` is the data.Sample that was asked. To do without the paper's
two rewards, set their weights to 0. custom.py loads the function and calls it in a process of its
own, which can be killed.

The rest of this folder decides whether an answer is right:
    answers.py       when two answers are equal; the rules where tastes differ
    references.py    what a reference says inside tags, after ####, in a whole solution
    choices.py       letters of options
    sentences.py     the one value of a sentence
    forms.py         the same thing in another form: x > 3 and (3, ∞)
    values.py        what an answer says: a number, a relation, a list, words
    spelling.py      one spelling for Unicode, LaTeX and Markdown
    units.py         units and currencies
    expressions.py   mathematics: from text to trees, and their values
    prover.py        proofs that expressions are equal, by SymPy in a process that can be killed
"""

from __future__ import annotations

from rewards.answers import equivalent, rational
from rewards.custom import RewardError, call_custom, load_custom
from rewards.references import is_satisfiable, read_reference

__all__ = [
    "RewardError",
    "accuracy",
    "call_custom",
    "equivalent",
    "extract_answer",
    "format",
    "is_satisfiable",
    "load_custom",
    "rational",
    "read_reference",
]

TAGS = ("<think>", "</think>", "<answer>", "</answer>")


def accuracy(response: str, answer: str) -> float:
    """1.0 if the last ``<answer>…</answer>`` of the response equals the reference answer, else 0.0.

    The reference may be wrapped itself, see read_reference.

    >>> accuracy("<answer>50 %</answer>", "50%"), accuracy("50%", "50%")
    (1.0, 0.0)
    >>> accuracy("<answer>7</answer>", "3 + 4 = 7 #### 7")
    1.0
    """
    prediction = extract_answer(response)
    if prediction is None:
        return 0.0
    return float(equivalent(prediction, read_reference(answer)))


def format(response: str) -> float:
    """1.0 if the response is one think block and then one non-empty answer block, else 0.0.

    >>> format("<think>2+2</think> <answer>4</answer>"), format("<answer>4</answer>")
    (1.0, 0.0)
    """
    text = response.strip()
    if any(text.count(tag) != 1 for tag in TAGS):
        return 0.0
    thought, _, rest = text.partition("</think>")
    between, _, rest = rest.partition("<answer>")
    content, _, after = rest.partition("</answer>")
    kept = thought.startswith("<think>") and not between.strip() and content.strip() and not after
    return 1.0 if kept else 0.0


def extract_answer(response: str) -> str | None:
    """The content of the last complete ``<answer>…</answer>`` block, None without one.

    It takes linear time, whatever the response is.

    >>> extract_answer("<answer>5</answer> no: <answer>6</answer>"), extract_answer("5")
    ('6', None)
    """
    last_end = response.rfind("</answer>")
    if last_end < 0:
        return None
    start = response.rfind("<answer>", 0, last_end)
    if start < 0:
        return None
    start += len("<answer>")
    return response[start : response.index("</answer>", start)]
