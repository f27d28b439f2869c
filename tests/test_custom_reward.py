"""custom.py: a reward of the user's own runs in a process that ends at its limit, come what may."""

import os
import signal
import subprocess
import sys
import threading
import time

import pytest
from helpers import ROOT, small_run
from PIL import Image

import rewards
import run_folder
import train
from data import Sample
from rewards import RewardError, call_custom
from rewards.custom import MOST_WORKERS, WORKERS
from rewards.prover import PROVER

SAMPLE = Sample("7", (Image.new("RGB", (84, 84), "red"),), "<image>How many?", "3")


@pytest.fixture(autouse=True)
def no_worker_is_left():
    yield
    for worker in list(WORKERS.values()):
        worker.stop()


def ask(function, sample=SAMPLE, limit: float = 10.0) -> float:
    return call_custom(function, "response", "answer", sample, limit=limit)


def process_of(response, answer, sample):
    return os.getpid()


def is_alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return True


def test_it_runs_in_another_process_which_is_kept():
    asked = []

    def count(response, answer, sample):
        asked.append(response)
        return len(asked)

    assert [ask(count) for _ in range(3)] == [1, 2, 3]
    assert asked == []
    assert ask(process_of) == ask(process_of) != os.getpid()


@pytest.mark.parametrize(
    "code, problem",
    [
        ("def f(response, answer): return 1", r"arguments \(response, answer\) \(too many"),
        ("def f(a, b, c, *, limit): return 1", "missing a required argument: 'limit'"),
        ("class f: pass", "too many positional arguments"),
    ],
)
def test_a_function_of_other_arguments_is_refused_at_once(tmp_path, code, problem):
    (tmp_path / "mine.py").write_text(code)
    with pytest.raises(RewardError, match=problem):
        rewards.load_custom(f"{tmp_path / 'mine.py'}:f")


@pytest.mark.parametrize(
    "code",
    [
        "def f(*what): return 1",
        "def f(a, b, c, d=1): return 1",
        "f = max",
        "f = lambda a, b, c: 1",
        "import functools\ndef of_two(a, b): return 1\n"
        "@functools.wraps(of_two)\ndef f(a, b, c): return of_two(a, b)",
    ],
)
def test_a_function_that_can_be_called_with_three_arguments_is_taken(tmp_path, code):
    (tmp_path / "mine.py").write_text(code)
    assert callable(rewards.load_custom(f"{tmp_path / 'mine.py'}:f"))


def test_code_in_c_ends_at_the_limit():
    def computes(response, answer, sample):
        return sum(range(10**12))

    started = time.monotonic()
    with pytest.raises(RewardError, match="custom reward computes: no result after 0.2 s"):
        ask(computes, limit=0.2)
    assert time.monotonic() - started < 5


def test_an_alarm_that_the_function_takes_away_does_not_save_it(monkeypatch):
    """The parent ends it a little later."""
    monkeypatch.setattr("rewards.custom.GRACE", 0.1)

    def ignores(response, answer, sample):
        signal.signal(signal.SIGALRM, signal.SIG_IGN)
        time.sleep(1000)

    with pytest.raises(RewardError, match="no result after 0.1 s"):
        ask(ignores, limit=0.1)


@pytest.mark.parametrize(
    "end, message",
    [
        (lambda: os._exit(3), "it ended its process with exit status 3"),
        (lambda: os.kill(os.getpid(), signal.SIGKILL), "ended by signal 9 .Killed."),
        (lambda: os.kill(os.getpid(), signal.SIGTERM), "ended by signal 15 .Terminated."),
        (lambda: os.closerange(3, 200), "ended "),
    ],
)
def test_a_process_that_ends_is_a_clear_error_and_replaced(end, message):
    ends = []

    def may_end(response, answer, sample):
        ends.append(response)
        if sample is None:
            end()
        return len(ends)

    assert ask(may_end) == 1
    with pytest.raises(RewardError, match=f"custom reward may_end: .*{message}"):
        ask(may_end, sample=None)
    assert ask(may_end) == 1


def test_a_signal_to_the_whole_group_ends_no_run():
    """The parent has its own handler; a worker that the signal ended is asked again."""
    first = ask(process_of)
    os.kill(int(first), signal.SIGTERM)
    assert ask(process_of) != first

    def waits(response, answer, sample):
        time.sleep(0.3 if WAITING.is_set() else 0)
        return os.getpid()

    WAITING.set()
    worker = ask(waits)
    timer = threading.Timer(0.1, os.kill, (int(worker), signal.SIGHUP))
    timer.start()
    assert ask(waits) != worker
    timer.join()


WAITING = threading.Event()


def test_what_cannot_be_pickled_or_is_large_arrives():
    assert ask(lambda response, answer, sample: sample(), sample=lambda: 7) == 7
    large = Sample("8", (Image.new("RGB", (2000, 2000)),), "", "")
    assert ask(lambda response, answer, sample: sample.images[0].width, sample=large) == 2000


def test_its_handlers_are_not_those_of_the_parent():
    handlers = {}

    def shown(response, answer, sample):
        ignored = signal.getsignal(signal.SIGINT) is signal.SIG_IGN
        return ignored and signal.getsignal(signal.SIGTERM) is signal.SIG_DFL

    for number in (signal.SIGTERM, signal.SIGINT):
        handlers[number] = signal.signal(number, lambda *_: None)
    try:
        assert ask(shown) == 1
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)


def test_computations_on_several_threads_do_not_hang():
    import torch

    threads = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        torch.randn(400, 400).softmax(1)  # the pool of threads is there before the fork

        def computes(response, answer, sample):
            return torch.randn(400, 400).softmax(1).sum() + torch.get_num_threads()

        assert ask(computes) == pytest.approx(401, abs=1e-2)
    finally:
        torch.set_num_threads(threads)


def test_the_accuracy_inside_a_reward_has_its_own_prover():
    assert PROVER.equal(("num", 1, 1), ("num", 1, 1), rewards.prover.Budget(5.0))
    pid = PROVER.process.pid

    def right(response, answer, sample):
        return rewards.accuracy(r"<answer>\sin(x)^2+\cos(x)^2</answer>", "1")

    assert ask(right) == 1
    assert PROVER.process.pid == pid and PROVER.process.poll() is None


def test_what_it_prints_reaches_the_terminal_once(capfd):
    print("before", end="")

    def prints(response, answer, sample):
        print(", inside", end="")
        return 1

    assert ask(prints) == 1
    assert capfd.readouterr().out == "before, inside"


def test_a_call_costs_little():
    def trivial(response, answer, sample):
        return 1

    ask(trivial)
    started = time.perf_counter()
    for _ in range(100):
        ask(trivial)
    assert (time.perf_counter() - started) / 100 < 0.005  # 0.2 ms on an idle machine


ENDS = """
import os, sys, time
from rewards import call_custom
def process(response, answer, sample): return os.getpid()
print(int(call_custom(process, "", "", None, 10.0)), flush=True)
if sys.argv[1] == "killed": os.kill(os.getpid(), 9)
"""


@pytest.mark.parametrize("how", ["ends", "killed"])
def test_no_worker_outlives_its_parent(how):
    command = [sys.executable, "-c", ENDS, how]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    worker = int(done.stdout)
    for _ in range(100):
        if not is_alive(worker):
            break
        time.sleep(0.05)
    assert not is_alive(worker)


@pytest.mark.parametrize("line", ["import sys; sys.exit(0)", "1 / 0", "def f(:"])
def test_a_file_that_cannot_be_imported_stops_a_run_at_once(tmp_path, capsys, line):
    """In one line, before any data are read."""
    (tmp_path / "reward.py").write_text(f"\n{line}\n")
    with pytest.raises(SystemExit) as caught:
        train.main(small_run(tmp_path, "run", "data.path=no/such/file.jsonl"))
    assert caught.value.code == 2
    (error,) = capsys.readouterr().err.splitlines()
    assert error.startswith("error: custom reward ") and "line 2)" in error


def test_a_worker_does_not_hold_the_lock_of_the_run(tmp_path):
    with run_folder.exclusive(tmp_path / "run", "run.dir"):
        first = ask(process_of)
    with run_folder.exclusive(tmp_path / "run", "run.dir"):
        assert ask(process_of) == first


def test_few_workers_are_kept():
    for number in range(10):
        assert ask(lambda *_, number=number: number) == number
    assert len(WORKERS) == MOST_WORKERS
