"""A reward of your own: a function in a file of yours, called in a process of its own.

    short = load_custom("mine.py:short")
    call_custom(short, "<answer>4</answer>", "4", sample, limit=10.0)    -> 1.0

The process is a fork, so the function need not be pickled. It is kept from call to call, so what
the function remembers is there at the next one; what it changes in memory stays there. An alarm
has its default effect in the fork: the kernel ends it at the limit, even inside C code, in which
Python looks at no signal. Its next call gets a new fork.
"""

from __future__ import annotations

import atexit
import contextlib
import difflib
import gc
import importlib.util
import inspect
import json
import math
import os
import pickle
import reprlib
import signal
import socket
import sys
import traceback
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any, NoReturn

from rewards.prover import PROVER

FLOAT32_MAX = 1e38  # about: rewards are stored as float32
GRACE = 1.0  # seconds after the limit, then a worker is killed that its own alarm did not end
MOST_WORKERS = 4  # a further function takes the place of the one that was the first
SIZE_BYTES = 8  # before each request, its length
SIGNALS = {signal.SIGALRM, signal.SIGTERM, signal.SIGHUP, signal.SIGINT}


class RewardError(ValueError):
    """A custom reward could not be imported, raised, took too long, ended its process, or returned
    something other than a finite number."""


# ----------------------------------------------------------------------------- loading the function


def load_custom(spec: str, what: str = "custom reward") -> Callable[[str, str, Any], Any]:
    """The function named by ``path/to/file.py:function``; `what` it is for is said in errors.

    A reward is called as function(response, answer, sample) and returns a number.
    Raises ValueError if there is no such file or function, if the file cannot be imported, or if
    the function cannot be called with three arguments.
    """
    path, _, name = spec.rpartition(":")
    if not path.endswith(".py") or not name:
        raise ValueError(f"{what} {spec!r}: expected path/to/file.py:function")
    file = Path(path)
    if not file.is_file():
        siblings = [other.name for other in file.parent.glob("*.py")]
        nearest = ", ".join(difflib.get_close_matches(file.name, siblings)) or "none"
        raise ValueError(f"{what} {spec!r}: no file {path!r}; nearest there: {nearest}")

    try:
        module = _import_file(file)
    except (Exception, SystemExit) as error:
        raise RewardError(f"{what} {spec!r}: {_import_problem(file, error)}") from error
    function = getattr(module, name, None)
    if callable(function):
        _check_arguments(function, f"{what} {spec!r}")
        return function
    there = "nothing of that name"
    if hasattr(module, name):
        there = f"{type(function).__name__} {name}"
    raise ValueError(
        f"{what} {spec!r}: found {there}, expected a function; "
        f"nearest in the file: {_nearest_functions(module, name)}"
    )


def _check_arguments(function: Callable, where: str) -> None:
    """Raise RewardError where the function does not take a response, an answer and a sample."""
    try:
        # What is called is the wrapper, whatever it wraps.
        signature = inspect.signature(function, follow_wrapped=False)
    except (TypeError, ValueError):  # some that are written in C do not tell
        return
    try:
        signature.bind("response", "answer", "sample")
    except TypeError as error:
        raise RewardError(
            f"{where}: found the arguments {signature} ({error}); "
            "expected a function that is called with three"
        ) from error


def _import_file(file: Path) -> ModuleType:
    spec = importlib.util.spec_from_file_location(f"custom_reward_{file.stem}", file)
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


def _import_problem(file: Path, error: BaseException) -> str:
    """Where in the file its import ended, and why."""
    frames = traceback.extract_tb(error.__traceback__)
    lines = [frame.lineno for frame in frames if frame.filename == str(file.absolute())]
    place = f"{file}, line {lines[-1]}" if lines else str(file)
    reason = f"{type(error).__name__}: {error}"  # a SyntaxError names its file and line itself
    return f"the file cannot be imported: {reason} ({place})"


def _nearest_functions(module: ModuleType, name: str) -> str:
    functions = [
        key for key, value in vars(module).items() if callable(value) and not key.startswith("_")
    ]
    return ", ".join(difflib.get_close_matches(name, functions) or functions) or "none"


# ------------------------------------------------------------------------------- the side that asks


class _Ended(Exception):
    """A worker ended before it replied. `status` is its exit status, or minus a signal."""

    def __init__(self, status: int) -> None:
        self.status = status

    def __str__(self) -> str:
        if self.status < 0:
            name = signal.strsignal(-self.status)
            return f"its process was ended by signal {-self.status} ({name})"
        return f"it ended its process with exit status {self.status}"


def call_custom(
    function: Callable[[str, str, Any], float],
    response: str,
    answer: str,
    sample: Any,
    limit: float,
) -> float:
    """What a custom reward gives for a response, within `limit` seconds. Raises RewardError.

    The function gets a copy of the sample. One thread at a time may ask.
    """
    name = getattr(function, "__name__", repr(function))
    request = (limit, response, answer, sample)
    try:
        try:
            reply = _ask(function, request)
        except _Ended as ended:
            # These signals go to whole groups of processes. What they mean for the run, the parent
            # decides, so the question is asked again.
            if ended.status not in (-signal.SIGTERM, -signal.SIGHUP):
                raise
            reply = _ask(function, request)
    except TimeoutError:
        raise RewardError(f"custom reward {name}: no result after {limit} s") from None
    except _Ended as ended:
        raise RewardError(f"custom reward {name}: {ended}") from None
    if "error" in reply:
        raise RewardError(f"custom reward {name}: {reply['error']}")
    return reply["number"]


def _ask(function: Callable, request: tuple) -> dict:
    """The reply to (limit, response, answer, sample). Raises TimeoutError and _Ended."""
    try:
        content = pickle.dumps(request, pickle.HIGHEST_PROTOCOL)
    except Exception:
        # What cannot be pickled reaches a new fork together with the rest of the memory.
        content = None
    # A fork of this process must not use the workers that this process has started.
    worker = WORKERS.get((os.getpid(), id(function)))
    if worker is not None and (content is None or worker.has_ended()):
        worker.stop()
        worker = None
    if worker is None:
        worker = Worker(function, inherited=request if content is None else None)
    try:
        return worker.ask(content, request[0] + GRACE)
    except (OSError, ValueError) as error:
        status = worker.stop()
        if isinstance(error, TimeoutError) or status == -signal.SIGALRM:
            raise TimeoutError from None
        raise _Ended(status) from None
    except BaseException:  # a reply that nobody read must not answer the next question
        worker.stop()
        raise


class Worker:
    """A fork of this process that calls one function. It ends with its parent.

    A request is a pickle behind its length, a reply one line of JSON.
    """

    def __init__(self, function: Callable, inherited: tuple | None = None) -> None:
        """inherited: a request that the fork need not read, since it has the parent's memory."""
        for oldest in list(WORKERS.values())[: 1 - MOST_WORKERS]:
            oldest.stop()
        self.function = function  # as long as it is kept here, no other function gets its id
        self.owner = os.getpid()
        self.status: int | None = None  # once it has ended
        self.connection, connection_of_fork = socket.socketpair()
        self.replies = self.connection.makefile("rb")
        WORKERS[self.owner, id(function)] = self
        _flush()  # or the fork would print once more what waits to be printed
        # The parent's handlers must not run in the fork: signals wait until it has its own.
        mask = signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS)
        try:
            self.pid = os.fork()
            if self.pid == 0:
                _work(function, connection_of_fork, mask, inherited=inherited)
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, mask)
        connection_of_fork.close()
        atexit.register(self.stop)

    def ask(self, content: bytes | None, seconds: float) -> dict:
        """The reply to a pickled request, or to the inherited one.

        Raises OSError or ValueError if there is none, of which TimeoutError is one.
        """
        self.connection.settimeout(seconds)
        if content is not None:
            self.connection.sendall(len(content).to_bytes(SIZE_BYTES, "big"))
            self.connection.sendall(content)
        return json.loads(self.replies.readline())

    def has_ended(self) -> bool:
        if self.status is None:
            pid, status = os.waitpid(self.pid, os.WNOHANG)
            if pid:
                self.status = os.waitstatus_to_exitcode(status)
        return self.status is not None

    def stop(self) -> int:
        """End the worker at once. Returns its exit status, or minus the signal that ended it."""
        if self.owner != os.getpid():  # in a fork of the parent, which ends as well
            return 0
        if not self.has_ended():
            os.kill(self.pid, signal.SIGKILL)
            _, status = os.waitpid(self.pid, 0)
            self.status = os.waitstatus_to_exitcode(status)
        self.hang_up()
        WORKERS.pop((self.owner, id(self.function)), None)
        atexit.unregister(self.stop)
        return self.status

    def hang_up(self) -> None:
        self.replies.close()
        self.connection.close()


WORKERS: dict[tuple[int, int], Worker] = {}  # (process, id of the function) -> its worker


def _flush() -> None:
    for stream in (sys.stdout, sys.stderr):
        # A terminal that has gone ends nothing.
        with contextlib.suppress(OSError, ValueError, AttributeError):
            stream.flush()


# --------------------------------------------------------------------------------------- the worker


def _work(
    function: Callable, connection: socket.socket, mask: set, inherited: tuple | None
) -> NoReturn:
    """The fork's life: it replies to requests until the parent hangs up."""
    status = 1
    try:
        _leave_the_parent(mask)
        requests = connection.makefile("rb")
        if inherited is not None:
            connection.sendall(_reply(function, inherited))
        while size := int.from_bytes(requests.read(SIZE_BYTES), "big"):
            connection.sendall(_reply(function, requests.read(size)))
        status = 0
    finally:
        os._exit(status)  # nothing that the parent does at its end may happen here


def _leave_the_parent(mask: set) -> None:
    """Take over nothing from the parent that could disturb it, or outlive it, or hang."""
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    signal.signal(signal.SIGHUP, signal.SIG_DFL)
    # Ctrl-C goes to all processes of a terminal, and the parent decides what it means.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGALRM, signal.SIG_DFL)
    signal.pthread_sigmask(signal.SIG_SETMASK, mask - {signal.SIGALRM})
    # The parent's ends of all connections. While the fork holds that of its own, it would never see
    # the parent's end as an end of file.
    for worker in WORKERS.values():
        worker.hang_up()
    WORKERS.clear()
    PROVER.forget()
    gc.freeze()  # what the parent has left for collection may belong to its GPU
    if "torch" in sys.modules:
        # OpenMP's threads are not there in a fork, and a computation on several waits for them.
        sys.modules["torch"].set_num_threads(1)


def _reply(function: Callable, request: bytes | tuple) -> bytes:
    """{"number": …} or {"error": …} as a line of JSON. The alarm rings at the limit."""
    # A function with alarms of its own may have changed what this one does.
    signal.signal(signal.SIGALRM, signal.SIG_DFL)
    try:
        if isinstance(request, bytes):
            request = pickle.loads(request)
        limit, response, answer, sample = request
        signal.setitimer(signal.ITIMER_REAL, limit)
        value = function(response, answer, sample)
        number = _as_number(value)
        reply = {"number": number}
        if not abs(number) < FLOAT32_MAX:
            expected = "expected a finite number that float32 holds"
            reply = {"error": f"{expected}, found {reprlib.repr(value)}"}
    except BaseException as error:
        place = traceback.extract_tb(error.__traceback__)[-1]
        where = f"{place.filename}, line {place.lineno}"
        reply = {"error": f"{type(error).__name__}: {error} ({where})"}
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
    _flush()
    return json.dumps(reply).encode() + b"\n"


def _as_number(value: Any) -> float:
    """The value as a float. Text and None give NaN, a reward that returns them is a mistake.

    >>> _as_number(True), _as_number("1")
    (1.0, nan)
    """
    if value is None or isinstance(value, str):
        return math.nan
    return float(value)
