"""rewards/prover.py: proofs end in time, and a worker that overruns or dies costs no answer."""

import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

import rewards
from rewards import accuracy, equivalent, prover
from rewards.prover import PROVER, Prover

IDENTITY = ("x^2+2x+1", "(x+1)^2")
# Equal, but the expansion takes SymPy seconds.
SLOW = ("(x+y+z)^{98}", "(x+y+z)^{96}(x^2+y^2+z^2+2xy+2yz+2xz)")


@pytest.fixture
def worker():
    """A fresh worker that has answered once."""
    PROVER.stop()
    assert equivalent(*IDENTITY)
    yield PROVER
    PROVER.stop()


def test_a_slow_proof_ends_in_time_and_leaves_the_worker_sound(worker, monkeypatch):
    # Long enough that it is the proof's own limit that acts.
    monkeypatch.setattr(prover, "SYMBOLIC_LIMIT", 20.0)
    before = worker.process
    begin = time.monotonic()
    assert not equivalent(*SLOW)
    assert prover.PROOF_LIMIT <= time.monotonic() - begin < 3.0
    # The proof was ended, the process that holds SymPy was not.
    assert worker.process is before and before.poll() is None
    assert equivalent(*IDENTITY)


def test_many_slow_proofs_in_one_answer_share_one_budget(worker):
    begin = time.monotonic()
    assert not equivalent(", ".join([SLOW[0]] * 6), ", ".join([SLOW[1]] * 6))
    assert time.monotonic() - begin < 2.0  # six limits of one proof would be 3.6 s


def test_a_worker_that_overruns_is_killed_and_replaced(worker):
    stuck = worker.process
    os.kill(stuck.pid, signal.SIGSTOP)
    begin = time.monotonic()
    assert not equivalent(*IDENTITY)
    assert prover.SYMBOLIC_LIMIT - 0.1 < time.monotonic() - begin < 2.0
    assert stuck.poll() == -signal.SIGKILL
    assert equivalent(*IDENTITY)
    assert worker.process.pid != stuck.pid


def test_a_worker_killed_from_outside_costs_no_answer(worker):
    dead = worker.process
    os.kill(dead.pid, signal.SIGKILL)
    dead.wait()
    assert equivalent(*IDENTITY)
    assert worker.process.pid != dead.pid


def test_the_start_of_the_worker_costs_no_answer(monkeypatch):
    """The first proof waits for the import of SymPy outside its own limit."""
    PROVER.stop()
    start = Prover.start

    def late_start(self):
        time.sleep(prover.SYMBOLIC_LIMIT + 0.2)
        start(self)

    monkeypatch.setattr(Prover, "start", late_start)
    assert accuracy(f"<answer>{IDENTITY[0]}</answer>", IDENTITY[1]) == 1.0


def test_a_worker_that_cannot_start_is_an_error_and_not_a_wrong_answer(monkeypatch):
    PROVER.stop()
    monkeypatch.setattr(sys, "executable", "/bin/false")
    with pytest.raises(RuntimeError, match="did not start"):
        equivalent(*IDENTITY)
    monkeypatch.undo()
    assert equivalent(*IDENTITY)


def test_an_interrupted_question_does_not_answer_the_next(worker, monkeypatch):
    def interrupt(self, seconds):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(Prover, "reply", interrupt)
        with pytest.raises(KeyboardInterrupt):
            equivalent(*IDENTITY)
    assert worker.process is None
    assert not equivalent(*SLOW) and equivalent(*IDENTITY)


def test_threads_share_the_worker(worker):
    verdicts = []
    tasks = [IDENTITY, ("x^2+2x", "x(x+2)"), ("x+x", "2x"), ("x^2+2x+1", "x^2+2x+2")] * 3

    def ask(task):
        verdicts.append((task, equivalent(*task)))

    threads = [threading.Thread(target=ask, args=(task,)) for task in tasks]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(verdicts) == len(tasks)
    assert all(verdict == (task != tasks[3]) for task, verdict in verdicts)


def test_the_worker_ends_with_its_parent_and_does_not_run_the_script_again(tmp_path):
    """The script has no `if __name__` guard, and ends without good-bye. Beside it, and beside the
    worker's file, lies a module with a name that SymPy imports."""
    package = tmp_path / "rewards"
    shutil.copytree(Path(rewards.__file__).parent, package)
    for folder in (tmp_path, package):
        (folder / "mpmath.py").write_text("raise RuntimeError('imported from beside rewards')\n")
    script = tmp_path / "script.py"
    script.write_text(
        "import os, sys, rewards\n"
        "from rewards.prover import PROVER\n"
        f"assert rewards.__file__.startswith({str(package)!r})\n"
        "assert 'sympy' not in sys.modules and PROVER.process is None\n"
        f"assert rewards.equivalent({IDENTITY[0]!r}, {IDENTITY[1]!r})\n"
        "assert 'sympy' not in sys.modules and 'torch' not in sys.modules\n"
        "print(PROVER.process.pid, flush=True)\n"
        "os._exit(0)\n"
    )
    run = subprocess.run(
        [sys.executable, str(script)], capture_output=True, text=True, timeout=60, cwd="/"
    )
    assert run.returncode == 0, run.stderr
    (pid,) = run.stdout.split()
    status = Path(f"/proc/{pid}/status")
    for _ in range(50):
        if not status.exists() or "\nState:\tZ" in status.read_text():
            return
        time.sleep(0.1)
    pytest.fail("the worker outlived its parent")
