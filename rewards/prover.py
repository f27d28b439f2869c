"""Proofs that two expressions are equal, by SymPy in a process of its own that can be killed.

    x = ("var", "x")
    PROVER.equal(("+", x, x), ("*", ("num", 2, 1), x), Budget(0.8))    -> True

SymPy may think about a short expression for hours, and in gigabytes. So one worker process imports
it once, and each proof is a fork of that worker, which an alarm ends. The worker runs this file as
a script, by its path. It imports no other module of ours, and the folders of this project are not
on its search path, so that no file in them can be taken for a part of SymPy.
"""

from __future__ import annotations

import atexit
import json
import operator
import os
import select
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

PROOF_LIMIT = 0.6  # seconds of one proof, then it ends
SYMBOLIC_LIMIT = 0.8  # seconds of all proofs for one answer, then the worker is killed and replaced
START_LIMIT = 60.0  # seconds for the worker to import SymPy, not part of the limits above
WORKER_MEMORY = 2 << 30  # bytes

# What the worker writes, one byte at a time.
READY = b"R"
EQUAL = b"1"
NOT_EQUAL = b"0"


@dataclass
class Budget:
    """What is left for the proofs of one answer; each proof takes its time from it."""

    seconds: float


def fold(tree: Any, operations: dict[str, Callable]) -> Any:
    """The value of a tree (operation, operand, …); `operations` has a function for each operation.

    The main process computes numbers with it, the worker SymPy's objects.

    >>> fold(("+", ("num", 2, 1), ("num", 3, 1)), {"num": lambda a, b: a / b, "+": operator.add})
    5.0
    """
    name, *operands = tree
    values = []
    for operand in operands:
        is_tree = isinstance(operand, (tuple, list))  # JSON makes lists of tuples
        values.append(fold(operand, operations) if is_tree else operand)
    return operations[name](*values)


# ------------------------------------------------------------------------------- the side that asks


class Prover:
    """One worker, started by the first question, and replaced when it overruns or dies.

    It is a plain subprocess: the children of `multiprocessing` would import the caller's main
    script again.
    """

    def __init__(self) -> None:
        self.lock = threading.Lock()  # one question at a time, whichever thread asks
        self.process: subprocess.Popen | None = None

    def start(self) -> None:
        """Raises RuntimeError if the worker does not come up; no answer is wrong for that."""
        # PYTHONSAFEPATH: the folder of this file is not searched for modules.
        environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONSAFEPATH": "1"}
        self.process = subprocess.Popen(
            [sys.executable, os.path.abspath(__file__)],
            bufsize=0,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            env=environment,
        )
        atexit.register(self.stop)
        if self.reply(START_LIMIT) != READY:
            raise RuntimeError(
                f"the symbolic worker did not start; does {sys.executable} -c 'import sympy' work?"
            )

    def stop(self) -> None:
        process = self.process
        self.process = None
        atexit.unregister(self.stop)
        if process is not None:
            process.kill()
            with process:  # closes the pipes and waits for the end
                pass

    def forget(self) -> None:
        """In a fork of the process that asks: leave the worker to that process."""
        process = self.process
        self.process = None
        atexit.unregister(self.stop)
        if process is not None:
            process.returncode = 0  # it is not this process's to wait for
            process.stdin.close()
            process.stdout.close()

    def reply(self, seconds: float) -> bytes:
        """One byte from the worker, b"" if it is dead or late."""
        poll = select.poll()
        poll.register(self.process.stdout, select.POLLIN)
        if not poll.poll(1000 * seconds):
            return b""
        return os.read(self.process.stdout.fileno(), 1)

    def equal(self, first: tuple, second: tuple, budget: Budget) -> bool:
        """Whether two trees are proved equal within the budget."""
        question = json.dumps([first, second]).encode() + b"\n"
        with self.lock:
            for _ in range(2):  # a worker that was killed from outside is replaced and asked again
                if budget.seconds <= 0:
                    return False
                reply = self.ask(question, budget)
                if reply:
                    return reply == EQUAL
                self.stop()
        return False

    def ask(self, question: bytes, budget: Budget) -> bytes:
        """The worker's reply, b"" without one. A start of the worker costs no budget."""
        try:
            if self.process is None:
                self.start()
            begin = time.monotonic()
            self.process.stdin.write(question)
            reply = self.reply(budget.seconds)
            budget.seconds -= time.monotonic() - begin
            return reply
        except BrokenPipeError:
            return b""
        except BaseException:  # a reply that nobody read must not answer the next question
            self.stop()
            raise


PROVER = Prover()  # starts nothing before the first question


# --------------------------------------------------------------------------------------- the worker


def sympy_operations() -> dict[str, Callable]:
    import sympy

    def variable(name: str) -> Any:
        return sympy.Symbol(name, real=True)

    def power(base: Any, exponent: Any) -> Any:
        """As in expressions.raised: odd roots of negative numbers are negative."""
        if exponent.is_Rational and exponent.q > 1 and exponent.q % 2 == 1:
            return sympy.sign(base) ** exponent.p * sympy.Abs(base) ** exponent
        return base**exponent

    def logarithm_to_ten(value: Any) -> Any:
        return sympy.log(value, 10)

    return {
        "num": sympy.Rational,
        "var": variable,
        "pi": lambda: sympy.pi,
        "E": lambda: sympy.E,
        "oo": lambda: sympy.oo,
        "-": operator.neg,
        "+": operator.add,
        "*": operator.mul,
        "/": operator.truediv,
        "^": power,
        "sqrt": sympy.sqrt,
        "sin": sympy.sin,
        "cos": sympy.cos,
        "tan": sympy.tan,
        "sec": sympy.sec,
        "csc": sympy.csc,
        "cot": sympy.cot,
        "arcsin": sympy.asin,
        "arccos": sympy.acos,
        "arctan": sympy.atan,
        "sinh": sympy.sinh,
        "cosh": sympy.cosh,
        "tanh": sympy.tanh,
        "log": sympy.log,
        "lg": logarithm_to_ten,
        "exp": sympy.exp,
        "abs": sympy.Abs,
        "floor": sympy.floor,
        "ceiling": sympy.ceiling,
        "!": sympy.factorial,
        "binomial": sympy.binomial,
    }


def prove(first: Any, second: Any, operations: dict[str, Callable]) -> bool:
    """Whether the difference of two trees is 0, by what is cheap first.

    It may be so for positive variables only: √(1/m) and 1/√m are real for no other m. Whoever asks
    has seen that the two agree at negative numbers as well, where they are real.
    """
    import sympy

    difference = fold(first, operations) - fold(second, operations)
    positive = difference.subs(
        {symbol: sympy.Symbol(symbol.name, positive=True) for symbol in difference.free_symbols}
    )
    return any(step(difference, positive) for step in PROOFS)


def by_expanding(difference: Any, positive: Any) -> bool:
    import sympy

    return difference == 0 or sympy.expand(difference) == 0


def by_cancelling(difference: Any, positive: Any) -> bool:
    """Fractions, and roots of positive numbers."""
    import sympy

    return 0 in (sympy.expand(positive), sympy.cancel(difference))


def by_gamma_functions(difference: Any, positive: Any) -> bool:
    """Factorials and binomial coefficients."""
    import sympy

    counted = difference.has(sympy.factorial, sympy.binomial)
    return counted and sympy.gammasimp(difference) == 0


def by_exponentials(difference: Any, positive: Any) -> bool:
    """Trigonometric and hyperbolic functions as exponentials, of which they are fractions."""
    import sympy

    return sympy.cancel(positive.rewrite(sympy.exp)) == 0


def by_simplifying(difference: Any, positive: Any) -> bool:
    import sympy

    return sympy.simplify(difference) == 0 or sympy.simplify(positive) == 0


PROOFS = [by_expanding, by_cancelling, by_gamma_functions, by_exponentials, by_simplifying]


def prove_in_fork(question: bytes, operations: dict[str, Callable]) -> bool:
    """A proof in a fork, which an alarm ends whatever SymPy is doing.

    In the worker itself SymPy stays loaded and its caches stay clean.
    """
    child = os.fork()
    if child == 0:
        signal.setitimer(signal.ITIMER_REAL, PROOF_LIMIT)
        try:
            first, second = json.loads(question)
            os._exit(0 if prove(first, second, operations) else 1)
        finally:
            os._exit(1)
    _, status = os.waitpid(child, 0)
    return status == 0


def work() -> None:
    """Reads a JSON pair of trees per line, writes EQUAL or NOT_EQUAL, and ends with its input."""
    import resource

    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the process that asks
    operations = sympy_operations()
    resource.setrlimit(resource.RLIMIT_AS, (WORKER_MEMORY, WORKER_MEMORY))
    # SymPy imports more at its first use. Let it do so before the clock runs.
    prove(("sqrt", ("var", "x")), ("!", ("sin", ("var", "x"))), operations)
    os.write(1, READY)
    for question in sys.stdin.buffer:
        os.write(1, EQUAL if prove_in_fork(question, operations) else NOT_EQUAL)


if __name__ == "__main__":
    work()
