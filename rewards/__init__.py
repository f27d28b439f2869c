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
two rewards, set their weights to 0.

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

import difflib
import importlib.util
import math
import reprlib
import signal
import sys
import traceback
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

from rewards.answers import equivalent, rational
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
FLOAT32_MAX = 1e38  # about: rewards are stored as float32


# ------------------------------------------------------------------------------ accuracy and format


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


# ----------------------------------------------------------------------------- a reward of your own


class RewardError(ValueError):
    """A custom reward raised, took too long, or returned something other than a finite number."""


def load_custom(spec: str, what: str = "custom reward") -> Callable[[str, str, Any], Any]:
    """The function named by ``path/to/file.py:function``; `what` it is for is said in errors.

    A reward is called as function(response, answer, sample) and returns a number.
    Raises ValueError if there is no such file or function. Errors inside the file pass through.
    """
    path, _, name = spec.rpartition(":")
    if not path.endswith(".py") or not name:
        raise ValueError(f"{what} {spec!r}: expected path/to/file.py:function")
    file = Path(path)
    if not file.is_file():
        siblings = [other.name for other in file.parent.glob("*.py")]
        nearest = ", ".join(difflib.get_close_matches(file.name, siblings)) or "none"
        raise ValueError(f"{what} {spec!r}: no file {path!r}; nearest there: {nearest}")

    module = _import_file(file)
    function = getattr(module, name, None)
    if callable(function):
        return function
    there = "nothing of that name"
    if hasattr(module, name):
        there = f"{type(function).__name__} {name}"
    raise ValueError(
        f"{what} {spec!r}: found {there}, expected a function; "
        f"nearest in the file: {_nearest_functions(module, name)}"
    )


def _import_file(file: Path) -> ModuleType:
    spec = importlib.util.spec_from_file_location(f"custom_reward_{file.stem}", file)
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


def _nearest_functions(module: ModuleType, name: str) -> str:
    functions = [
        key for key, value in vars(module).items() if callable(value) and not key.startswith("_")
    ]
    return ", ".join(difflib.get_close_matches(name, functions) or functions) or "none"


def call_custom(
    function: Callable[[str, str, Any], float],
    response: str,
    answer: str,
    sample: Any,
    limit: float,
) -> float:
    """What a custom reward gives for a response, within `limit` seconds.

    In the main thread only: the limit is an alarm signal. Python looks at signals between its own
    instructions and in `re`; other C code is interrupted when it returns. Raises RewardError.
    """
    name = getattr(function, "__name__", repr(function))

    def ask() -> tuple[Any, float]:
        value = function(response, answer, sample)
        return value, _as_number(value)

    try:
        value, number = _within(limit, ask)
    except _TooLong:
        raise RewardError(f"custom reward {name}: no result after {limit} s") from None
    except (Exception, SystemExit) as error:
        where = traceback.extract_tb(error.__traceback__)[-1]
        raise RewardError(
            f"custom reward {name}: {type(error).__name__}: {error} "
            f"({where.filename}, line {where.lineno})"
        ) from error
    if not abs(number) < FLOAT32_MAX:
        raise RewardError(
            f"custom reward {name}: expected a finite number that float32 holds, "
            f"found {reprlib.repr(value)}"
        )
    return number


def _as_number(value: Any) -> float:
    """The value as a float. Text and None give NaN, a reward that returns them is a mistake."""
    if value is None or isinstance(value, str):
        return math.nan
    return float(value)


class _TooLong(BaseException):
    """Not an Exception: a reward that catches those must not catch this."""


def _within(seconds: float, function: Callable[[], Any]) -> Any:
    """What a function returns, or _TooLong raised inside it when the time is over."""

    def ring(*_):
        raise _TooLong

    before = signal.signal(signal.SIGALRM, ring)
    try:
        try:
            # It rings again every second, should the function catch what is raised.
            signal.setitimer(signal.ITIMER_REAL, seconds, 1.0)
            return function()
        finally:
            signal.setitimer(signal.ITIMER_REAL, 0)
    finally:
        signal.signal(signal.SIGALRM, before)
