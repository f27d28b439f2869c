"""distributed.py: two processes do what one does, and none waits for another that has failed."""

import json
import signal
import threading
from types import SimpleNamespace

import pytest
from helpers import ROOT, launch, rows_of, same_run, torchrun

import distributed
import train
from config import load_config
from distributed import SharedError, said_once


@pytest.mark.parametrize(
    "extra",
    [
        [],
        ["algo.name=dapo", "algo.dynamic_sampling=false", "algo.mask_truncated=false"],
        # Compares the tokens of the whole batch, and has a forward without images.
        ["dyco.rule=tor", "dyco.control=shuffled"],
    ],
)
def test_two_processes_do_what_one_does(start, tmp_path, extra):
    """Same global batch, weights whole on one process and sharded over two."""
    one = start("optim.warmup_steps=1", *extra, folder="one")
    torchrun(tmp_path, "two", "optim.warmup_steps=1", *extra)
    same_run(tmp_path, one, tmp_path / "two")


@pytest.mark.slow
@pytest.mark.parametrize("family", ["qwen3_vl"])
def test_another_family_on_two_processes(start, tmp_path):
    """Norms of queries and keys are sharded, and the deeper layers' features pass by the units."""
    one = start("optim.warmup_steps=1", folder="one")
    torchrun(tmp_path, "two", "optim.warmup_steps=1")
    same_run(tmp_path, one, tmp_path / "two")


# Every other answer of the first process is right, and none of the second one's.
ONE_SIDED = f"""
import os, sys
sys.path.insert(0, {str(ROOT)!r})
import train
turn = iter(range(10**6))
on_first = os.environ["RANK"] == "0"
train.rewards.accuracy = lambda text, answer: float(on_first and next(turn) % 2)
train.main(sys.argv[1:])
"""

# It fails on the second process alone.
BAD_REWARD = """
import os
def f(response, answer, sample):
    if os.environ["RANK"] == "1":
        raise ValueError("rank one is ill")
    return 0.0
"""

# Two prompts a process, as few tokens as possible.
TINY = [
    "rollout.prompts_per_step=4",
    "rollout.group_size=2",
    "rollout.max_new_tokens=4",
    "eval.samples=2",
]


def test_a_process_without_a_useful_group_goes_along(start, tmp_path):
    """Dynamic sampling drops all groups of the second process.

    Both end well, with what the first one learned.
    """
    (tmp_path / "one_sided.py").write_text(ONE_SIDED)
    start("train.steps=1", folder="warm")
    done = launch(
        str(tmp_path / "one_sided.py"),
        "config.yaml",
        f"model.path={tmp_path / 'model'}",
        f"run.dir={tmp_path / 'run'}",
        "algo.name=dapo",
        "algo.mask_truncated=false",
        "algo.max_refills=0",
        "train.steps=2",
        *TINY,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    rows = rows_of(tmp_path / "run")
    assert [row["step"] for row in rows] == [0, 1, 2]
    assert all(row["policy/grad_norm"] > 0 for row in rows[1:])
    assert rows[1]["reward/accuracy"] == 0.25
    assert rows[1]["reward/constant_groups"] == 0.5


def test_the_error_of_one_process_ends_all(start, tmp_path):
    """A rank that fails must not leave the other waiting."""
    (tmp_path / "bad.py").write_text(BAD_REWARD)
    start("train.steps=1", folder="warm")
    done = launch(
        "train.py",
        "config.yaml",
        f"model.path={tmp_path / 'model'}",
        f"reward.custom={tmp_path / 'bad.py'}:f",
        f"run.dir={tmp_path / 'ill'}",
        "train.steps=1",
        *TINY,
        timeout=120,
    )
    assert done.returncode != 0
    said = [line for line in done.stderr.splitlines() if "rank one is ill" in line]
    by_launcher = [line for line in said if "traceback :" in line]
    assert len(said) - len(by_launcher) == 1
    assert all("error: process 1: custom reward f: " in line for line in (said[0], by_launcher[-1]))
    assert "finishing step" not in done.stdout


# ---------------------------------------------------------------- an error is said once


@pytest.fixture
def become(tmp_path, monkeypatch):
    """become(rank): be one of two processes that torchrun has started. Returns its error file."""
    monkeypatch.setattr(distributed.dist, "is_initialized", lambda: True)
    monkeypatch.setattr(distributed, "SECONDS_TO_LISTEN", 0.2)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    handler = signal.getsignal(signal.SIGTERM)

    def be(rank: int):
        file = tmp_path / str(rank) / "error.json"
        file.parent.mkdir(exist_ok=True)
        monkeypatch.setenv("RANK", str(rank))
        monkeypatch.setenv("TORCHELASTIC_ERROR_FILE", str(file))
        return file

    yield be
    signal.signal(signal.SIGTERM, handler)


def fail(error: BaseException) -> None:
    with said_once(ValueError):
        raise error


def test_the_first_error_of_several_processes_is_said_and_no_other(become):
    """The second process loses its connection, since the first has gone."""
    file = become(1)
    assert not distributed.another_has_failed()
    with pytest.raises(SharedError, match="^process 1: image gone$"):
        fail(ValueError("image gone"))
    assert json.loads(file.read_text())["message"] == "error: process 1: image gone"
    file = become(0)
    assert distributed.another_has_failed()
    with pytest.raises(SystemExit) as leaving:
        fail(RuntimeError("Connection closed by peer"))
    assert leaving.value.code == 1
    assert json.loads(file.read_text())["message"] == "error: image gone"


def test_an_error_that_all_processes_meet_names_none_of_them(become, tmp_path):
    become(1)
    line = json.dumps({"rank": 0, "error": "no tokenizer"}) + "\n"

    def note_the_same():
        with open(tmp_path / "errors.jsonl", "a") as file:
            file.write(line)

    other = threading.Timer(0.05, note_the_same)
    other.start()
    with pytest.raises(ValueError, match="^no tokenizer$"):
        fail(ValueError("no tokenizer"))
    other.join()
    become(0)
    with pytest.raises(SystemExit):
        fail(ValueError("no tokenizer"))


def test_a_process_that_was_killed_is_missed_in_one_line(become):
    become(0)
    expected = "^process 0: another process has ended without a word, or fails .*closed by peer.$"
    with pytest.raises(SharedError, match=expected):
        fail(
            RuntimeError("[gloo/transport/tcp/pair.cc:5] Connection closed by peer. Read the logs")
        )


@pytest.mark.parametrize("error", [TypeError("a bug"), KeyboardInterrupt()])
def test_what_is_not_expected_leaves_one_process_as_it_is(become, error):
    become(0)
    with pytest.raises(type(error)):
        fail(error)
    become(1)
    with pytest.raises(SystemExit):
        fail(error)


def test_a_process_that_is_alone_says_its_own_error(monkeypatch):
    monkeypatch.delenv("TORCHELASTIC_ERROR_FILE", raising=False)
    with pytest.raises(ValueError, match="^image gone$"):
        fail(ValueError("image gone"))
    assert not distributed.another_has_failed()


def test_a_run_whose_other_process_has_failed_stops_at_the_first_signal(
    become, tmp_path, monkeypatch
):
    """It would wait for that process in vain, and has nothing to say."""
    monkeypatch.setattr(train.signal, "signal", lambda number, handler: None)
    said = []
    folder = SimpleNamespace(path=tmp_path, step=0, say=said.append)
    become(0)
    stop = train.Stop(load_config(), folder)
    become(1)
    with pytest.raises(SharedError):
        fail(ValueError("image gone"))
    become(0)
    with pytest.raises(KeyboardInterrupt):
        stop(signal.SIGTERM, None)
    assert said == []
