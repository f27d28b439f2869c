"""How far verifiers of answers agree with what is right, by kind of answer: ours and the field's.

    python -m tools.agreement

prints for each kind of pairs in tools/answer_pairs.py how many verdicts are as expected, and then
the wrong answers that each verifier accepts. Such an answer is what a policy learns to give, while
a right one that is refused only costs reward. Other verifiers are asked where they are installed:
pip install -r requirements-bench.txt.
"""

from __future__ import annotations

import argparse
import signal
import time
from collections.abc import Callable

from rewards import accuracy
from tools.answer_pairs import PAIRS, Pair
from tools.command import command

LIMIT = 5  # seconds for one question to a verifier of others; ours has its own second

Verifier = Callable[[str, str], bool]  # of an answer and the reference


# ----------------------------------------------------------------------------------- the verifiers

# Each import stands in its function, so that a verifier that is not installed is left out.


def ours() -> Verifier:
    def verdict(answer: str, reference: str) -> bool:
        return accuracy(f"<answer>{answer}</answer>", reference) == 1.0

    return verdict


def math_verify() -> Verifier:
    from math_verify import parse, verify

    def verdict(answer: str, reference: str) -> bool:
        # Its alarm would switch off the one of this file.
        options = {"parsing_timeout": None}
        gold = parse(rf"\boxed{{{reference}}}", **options)
        return verify(gold, parse(rf"\boxed{{{answer}}}", **options), timeout_seconds=None)

    return verdict


def mathruler() -> Verifier:
    from mathruler.grader import grade_answer

    return grade_answer


def latex2sympy() -> Verifier:
    from latex2sympy2_extended import latex2sympy as read
    from sympy import simplify

    def verdict(answer: str, reference: str) -> bool:
        first = read(answer)
        second = read(reference)
        return bool(first == second or simplify(first - second) == 0)

    return verdict


VERIFIERS = {
    "ours": ours,
    "math-verify": math_verify,
    "mathruler": mathruler,
    "latex2sympy2_extended": latex2sympy,
}


def installed() -> dict[str, Verifier]:
    """The verifiers that can be imported, by name; a line for each that cannot."""
    verifiers = {}
    for name, load in VERIFIERS.items():
        try:
            verifiers[name] = load()
        except ImportError as error:
            print(f"{name} is left out: {error}")
    return verifiers


# -------------------------------------------------------------------------------------- comparing


class _TooLong(BaseException):
    """Not an Exception: a verifier that catches those must not catch this."""


def _ring(*_) -> None:
    raise _TooLong


def ask(verifier: Verifier, answer: str, reference: str) -> bool:
    """The verdict; False where the verifier raises or takes longer than LIMIT."""
    before = signal.signal(signal.SIGALRM, _ring)
    signal.alarm(LIMIT)
    try:
        return bool(verifier(answer, reference))
    except (Exception, _TooLong):
        return False
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


def mistakes(verifier: Verifier, pairs: list[Pair]) -> list[Pair]:
    """The pairs whose verdict is not the expected one."""
    return [pair for pair in pairs if ask(verifier, pair[0], pair[1]) is not pair[2]]


def table(wrong: dict[str, dict[str, list[Pair]]]) -> str:
    """Markdown: a row for each kind, a column for each verifier with its number of right verdicts.

    `wrong` has the mistakes by verifier and kind. The last row counts wrong answers accepted.
    """
    names = list(wrong)
    rows = [["kind", "pairs", *names], ["---", *["---:"] * (1 + len(names))]]
    for kind, pairs in PAIRS.items():
        right = [str(len(pairs) - len(wrong[name][kind])) for name in names]
        rows.append([kind, str(len(pairs)), *right])
    total = sum(len(pairs) for pairs in PAIRS.values())
    missed = {name: sum(map(len, kinds.values())) for name, kinds in wrong.items()}
    shares = [f"{total - missed[name]} ({1 - missed[name] / total:.0%})" for name in names]
    rows.append(["**all**", str(total), *shares])
    unequal = sum(not equal for pairs in PAIRS.values() for *_, equal in pairs)
    counts = [str(len(accepted(kinds))) for kinds in wrong.values()]
    rows.append(["**wrong answers accepted**", f"of {unequal}", *counts])
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)


def accepted(wrong: dict[str, list[Pair]]) -> list[Pair]:
    """Of the mistakes of one verifier those where a wrong answer was accepted."""
    return [pair for pairs in wrong.values() for pair in pairs if not pair[2]]


@command()
def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        prog="python -m tools.agreement",
        description="Compare the rules of rewards/ with other verifiers, where they are installed.",
    )
    parser.parse_args(arguments)
    wrong = {}
    seconds = {}
    for name, verifier in installed().items():
        begin = time.monotonic()
        wrong[name] = {kind: mistakes(verifier, pairs) for kind, pairs in PAIRS.items()}
        seconds[name] = time.monotonic() - begin
    print(table(wrong))
    for name, kinds in wrong.items():
        pairs = accepted(kinds)
        print(f"\n{name}, {seconds[name]:.0f} s: {len(pairs)} wrong answers accepted")
        for answer, reference, _ in pairs:
            print(f"    {answer!r} for {reference!r}")


if __name__ == "__main__":
    main()
