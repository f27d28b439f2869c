"""Runs that are left alone.

Killed at any moment, interrupted, starved, poisoned, fed with nonsense.
"""

import json
import os
import random
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
import yaml
from helpers import ROOT, rows_of, same_run, torchrun, weights_of
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import config as config_module
import rewards
import run_folder
import train
from config import ConfigError, load_config
from model import load_policy
from tools import examples

# Runs train.main again and again until it ends well. Each attempt is a fork, so that it costs no
# start-up, and is killed with SIGKILL: by turns as it is about to touch the log or a file of a
# checkpoint for the n-th time, as it touches any file, and after a while.
KILLER = """
import os, random, shutil, signal, sys, threading
import train, toy, transformers
import transformers.models.qwen2_5_vl.modeling_qwen2_5_vl

folder, kills, seed, *arguments = sys.argv[1:]
killed = 0
die = lambda: os.kill(os.getpid(), signal.SIGKILL)

def strike_at(name, number):
    seen = [0]
    def watch(event, args):
        touches = ("open", "os.rename", "os.remove", "os.mkdir", "os.rmdir", "os.truncate")
        if event in touches and folder in str(args[0]) and name in str(args[0]):
            seen[0] += 1
            if seen[0] == number:
                die()
    sys.addaudithook(watch)

while True:
    child = os.fork()
    if child == 0:
        if killed < int(kills):
            chance = random.Random(f"{seed} {killed}")
            name = ("metrics.jsonl", "facts.json", "tensors.pt", "partial", "", None)[killed % 6]
            if name is None:
                threading.Timer(chance.uniform(0.3, 1.5), die).start()
            else:
                strike_at(name, chance.randint(4, 12))
        code = 1
        try:
            train.main(arguments)
            code = 0
        finally:
            os._exit(code)
    code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    if code == -signal.SIGKILL:
        killed += 1
        if killed <= int(kills):
            continue
    print("killed", killed, "ended", code)
    sys.exit(code)
"""


@pytest.mark.parametrize("kills", [3, pytest.param(20, marks=pytest.mark.slow)])
def test_a_killed_run_ends_like_any_other(start, tmp_path, kills):
    """SIGKILL at random moments, most of them between two operations on files.

    The same metrics, samples and bits.
    """
    more = [
        f"train.steps={4 + 4 * kills}",
        "checkpoint.every=1",
        "checkpoint.keep_last=2",
        "eval.every=3",
        "rollout.max_new_tokens=6",
    ]
    whole = start(*more, folder="whole")
    (tmp_path / "killer.py").write_text(KILLER)
    arguments = [
        str(config_module.DEFAULTS),
        f"run.dir={tmp_path / 'killed'}",
        f"model.path={tmp_path / 'model'}",
        f"reward.custom={tmp_path / 'reward.py'}:vowels",
        "rollout.prompts_per_step=4",
        "rollout.group_size=3",
        "eval.samples=5",
        "optim.lr=1e-3",
        *more,
    ]
    done = subprocess.run(
        [
            sys.executable,
            str(tmp_path / "killer.py"),
            str(tmp_path / "killed"),
            str(kills),
            str(kills),
            *arguments,
        ],
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=500,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    survived = int(re.search(r"killed (\d+) ended 0", done.stdout)[1])
    assert survived == kills, done.stdout[-500:]
    killed = tmp_path / "killed"
    assert rows_of(killed) == rows_of(whole)
    assert (killed / "samples.jsonl").read_text() == (whole / "samples.jsonl").read_text()
    a, b = weights_of(whole), weights_of(killed)
    assert all(torch.equal(a[name], b[name]) for name in a)

    def names(folder: Path) -> list[str]:
        paths = [path for path in folder.rglob("*") if "superseded" not in path.name]
        return sorted(str(path.relative_to(folder)) for path in paths)

    assert names(killed) == names(whole)  # nothing half-written is left


def test_stop_signal_saves_and_the_same_command_goes_on(start, tmp_path):
    whole = start("train.steps=40", "eval.every=40", "rollout.max_new_tokens=6", folder="whole")
    command = [
        sys.executable,
        "train.py",
        "config.yaml",
        f"run.dir={tmp_path / 'cut'}",
        f"model.path={tmp_path / 'model'}",
        f"reward.custom={tmp_path / 'reward.py'}:vowels",
        "rollout.prompts_per_step=4",
        "rollout.group_size=3",
        "eval.samples=5",
        "optim.lr=1e-3",
        "train.steps=40",
        "eval.every=40",
        "rollout.max_new_tokens=6",
        "checkpoint.every=1000",
    ]
    process = subprocess.Popen(
        command,
        cwd=ROOT,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        stdout=subprocess.PIPE,
        text=True,
    )
    metrics = tmp_path / "cut" / "metrics.jsonl"
    while not metrics.exists() or len(metrics.read_text().splitlines()) < 3:
        assert process.poll() is None
        time.sleep(0.02)
    # Paused, or it could be done before a second process has started.
    process.send_signal(signal.SIGSTOP)
    second = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    refusal = f"error: {tmp_path / 'cut'}: another process is writing there; set run.dir to a new"
    assert second.returncode == 2 and refusal in second.stderr
    process.terminate()
    process.send_signal(signal.SIGCONT)
    output, _ = process.communicate(timeout=60)
    assert process.returncode == 0
    assert re.search(r"stopped at step \d+; the same command resumes it", output)
    start(
        "train.steps=40",
        "eval.every=40",
        "rollout.max_new_tokens=6",
        "checkpoint.every=1000",
        folder="cut",
    )
    assert rows_of(tmp_path / "cut") == rows_of(whole)
    a, b = weights_of(whole), weights_of(tmp_path / "cut")
    assert all(torch.equal(a[name], b[name]) for name in a)


# ---------- many processes


def test_checkpoints_cross_numbers_of_processes(start, tmp_path):
    """One step on two processes and one on one, and the other way round, are two steps on one.

    Same samples, weights as close as sums in another order are. The rows differ in how many images
    they hold, and layers are recomputed.
    """
    from conftest import picture

    picture(84, 56, 1).save(tmp_path / "a.png")
    rows = [
        {"images": ["a.png"], "question": "<image>How many?", "answer": "3"},
        {"question": "Sum circle, cross.", "answer": "4"},
        {"question": "And now?", "answer": "5"},
        {"images": ["a.png"] * 2, "question": "<image>Is it <image>?", "answer": "yes"},
    ]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    # 217: the groups' sizes are such that the processes have different numbers of micro-batches
    settings = [
        f"data.path={tmp_path / 'rows.jsonl'}",
        "train.micro_batch_tokens=217",
        "model.gradient_checkpointing=true",
        "optim.warmup_steps=1",
        "eval.every=2",
    ]
    whole = start(*settings, folder="whole")
    torchrun(tmp_path, "one", *settings, "train.steps=1")
    start(*settings, folder="one")
    start(*settings, "train.steps=1", folder="two")
    torchrun(tmp_path, "two", *settings)
    for folder in ("one", "two"):
        same_run(tmp_path, whole, tmp_path / folder)


@pytest.mark.slow
def test_mixed_precision_on_two_processes(start, tmp_path):
    """bfloat16 arithmetic over sharded float32 weights is close to autocast on one process.

    It is not equal: where weights are sharded, embeddings and norms are rounded, too, and gradients
    are rounded before they are summed.
    """
    settings = [
        "model.dtype=bfloat16",
        "train.steps=1",
        "train.old_logprobs=rollout",
        "rollout.max_new_tokens=2",
    ]
    one = start(*settings, folder="one")
    torchrun(tmp_path, "two", *settings)
    a, b = rows_of(one)[1], rows_of(tmp_path / "two")[1]
    assert a["reward/mean"] == b["reward/mean"]
    for name, tolerance in (("policy/entropy", 1e-2), ("policy/grad_norm", 0.1)):
        assert a[name] == pytest.approx(b[name], rel=tolerance) and a[name] != pytest.approx(
            b[name], rel=1e-5
        )


# ---------- numbers


def poisoned(monkeypatch, steps):
    """Losses that are NaN on the given calls of the loss."""
    plain, calls = train.rl_algos.policy_loss, iter(range(10**6))

    def loss(*args, **kwargs):
        value, metrics = plain(*args, **kwargs)
        return (value * float("nan") if next(calls) in steps else value), metrics

    monkeypatch.setattr(train.rl_algos, "policy_loss", loss)


def test_a_poisoned_update_is_skipped_and_named(start, monkeypatch, capsys):
    poisoned(monkeypatch, {2, 3})  # both updates of step 2
    folder = start(
        "train.steps=3", "checkpoint.every=1", "checkpoint.keep_last=9", "optim.warmup_steps=8"
    )
    rows = rows_of(folder)
    assert rows[2]["policy/skipped_updates"] == 2 and len(rows[2]["policy/skipped_prompts"]) == 4
    assert "policy/skipped_updates" not in rows[1] and rows[3]["policy/grad_norm"] > 0
    assert (
        "update skipped, loss or gradient not finite, prompts "
        + ", ".join(rows[2]["policy/skipped_prompts"])
        in capsys.readouterr().out
    )
    saved = [
        run_folder.read_tensors(path) for path in run_folder.checkpoints(folder / "checkpoints")
    ]
    assert [tensors["optimizer"]["param_groups"][0]["lr"] for tensors in saved] == pytest.approx(
        [2e-3 / 8, 3e-3 / 8, 4e-3 / 8]
    )  # of the last update tried
    assert [row["optim/lr"] for row in rows[1:]] == pytest.approx([2e-3 / 8, 3e-3 / 8, 4e-3 / 8])
    first, second, third = (tensors["policy"] for tensors in saved)
    assert all(torch.equal(first[name], second[name]) for name in first)
    assert any(not torch.equal(first[name], third[name]) for name in first)


def test_too_many_poisoned_steps_end_the_run(start, monkeypatch, capsys):
    poisoned(monkeypatch, range(2, 10**6))
    with pytest.raises(SystemExit) as caught:
        start("train.steps=20", "checkpoint.every=1", "eval.every=20")
    assert caught.value.code == 2 and "step 6: 5 steps in a row" in capsys.readouterr().err


def test_out_of_memory_names_the_groups(start, monkeypatch, capsys):

    plain, calls = train.Policy.forward, iter(range(10**6))

    def forward(self, prompts, *args, **kwargs):
        if next(calls) == 1:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")
        return plain(self, prompts, *args, **kwargs)

    monkeypatch.setattr(train.Policy, "forward", forward)
    monkeypatch.setattr(
        examples, "make_examples", lambda *_: []
    )  # which needs forward passes, too, and would go on without
    with pytest.raises(SystemExit):
        start("train.micro_batch_tokens=1")
    error = capsys.readouterr().err.splitlines()[-1]
    assert re.match(
        r"error: out of memory at a packed row of \d+ tokens, "
        r"the groups of the prompts .*; lower rollout.group_size, ",
        error,
    )


@pytest.mark.parametrize(
    "name, extra",
    [
        ("dapo", ["algo.dynamic_sampling=false", "algo.mask_truncated=true"]),
        ("grpo", ["algo.kl=0"]),
    ],
)
def test_nothing_to_learn_from(start, tmp_path, name, extra):
    """All responses truncated and left out of the loss, or all rewards equal.

    No gradient, finite figures, the run goes on.
    """
    folder = start(
        f"algo.name={name}", *extra, "reward.custom_weight=0", "rollout.max_new_tokens=1"
    )
    for row in rows_of(folder)[1:]:
        assert (
            row["policy/grad_norm"] == 0 and row["policy/loss"] == 0 and row["response/length"] == 1
        )
    before = load_policy(tmp_path / "model", torch.device("cpu")).state_dict()
    after = load_policy(folder / "final", torch.device("cpu")).state_dict()
    assert all(torch.equal(before[key], after[key]) for key in before)


def test_empty_responses(start, monkeypatch):
    """A policy that ends at once.

    One token, no text, and with a reward that differs still something to learn.
    """
    plain, turn = train.policy_from_config, iter(range(10**6))

    def ending(*args, **kwargs):
        policy = plain(*args, **kwargs)
        policy.eos_ids = set(range(policy.hf.config.text_config.vocab_size))
        return policy

    monkeypatch.setattr(train, "policy_from_config", ending)
    monkeypatch.setattr(train.rewards, "call_custom", lambda *_, **__: next(turn) % 2)
    for row in rows_of(start())[1:]:
        assert (
            row["response/length"] == 1
            and row["response/truncated"] == 0
            and row["policy/grad_norm"] > 0
        )


# ---------- custom rewards

BAD_REWARDS = """
import re, time
def raises(response, answer, sample): return [][0]
def sleeps(response, answer, sample): time.sleep(1000)
def spins(response, answer, sample):
    while True:
        try: time.sleep(0.01)
        except Exception: pass
def backtracks(response, answer, sample): return bool(re.match(r"(a+)+$", "a" * 40 + "b"))
def nan(response, answer, sample): return float("nan")
def none(response, answer, sample): return None
def huge(response, answer, sample): return -1e100
def leaves(response, answer, sample): raise SystemExit(0)
"""


@pytest.mark.parametrize(
    "name, message",
    [
        ("raises", "IndexError: list index out of range"),
        ("sleeps", "no result after 0.2 s"),
        ("spins", "no result"),
        ("backtracks", "no result"),
        ("nan", "a finite number .*, found nan"),
        ("none", "a finite number .*, found None"),
        ("huge", "that float32 holds, found -1e"),
        ("leaves", "SystemExit"),
    ],
)
def test_a_bad_reward_is_a_clear_error(tmp_path, name, message):
    (tmp_path / "bad.py").write_text(BAD_REWARDS)
    function = rewards.load_custom(f"{tmp_path / 'bad.py'}:{name}")
    with pytest.raises(rewards.RewardError, match=message):
        rewards.call_custom(function, "x", "y", None, 0.2)
    assert rewards.call_custom(lambda *_: 1, "x", "y", None, 0.2) == 1.0  # and no alarm is left


def test_a_bad_reward_in_a_run(start, tmp_path, capsys):
    (tmp_path / "bad.py").write_text(BAD_REWARDS)
    bad = f"reward.custom={tmp_path / 'bad.py'}:raises"
    with pytest.raises(SystemExit) as caught:
        start(bad, folder="stopped")
    error = capsys.readouterr().err.splitlines()[-1]
    assert (
        caught.value.code == 2
        and error.startswith("error: custom reward raises: IndexError")
        and "custom_on_error=zero" in error
    )
    folder = start(bad, "reward.custom_on_error=zero", folder="went on")
    assert len(rows_of(folder)) == 3 and "its reward is 0" in capsys.readouterr().err


# ---------- bad config

KEYS = st.sampled_from(
    [
        "run",
        "model",
        "data",
        "algo",
        "recipes",
        "dyco",
        "rollout",
        "train",
        "optim",
        "dir",
        "name",
        "kl",
        "alpha",
        "layers",
        "grpo",
        "steps",
        "lr",
        "path",
        "toy",
        "?",
        "a.b",
        "",
    ]
)
LEAVES = KEYS | st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=6)
TREES = st.recursive(
    LEAVES,
    lambda x: st.lists(x, max_size=3) | st.dictionaries(KEYS | LEAVES, x, max_size=4),
    max_leaves=10,
)
OVERRIDES = st.lists(
    st.text(max_size=12)
    | st.tuples(KEYS, KEYS, st.text(max_size=6) | LEAVES.map(str)).map(
        lambda x: f"{x[0]}.{x[1]}={x[2]}"
    ),
    max_size=3,
)
FUZZ = settings(
    max_examples=300, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)


def only_config_errors(path: Path, content: bytes, overrides: list[str]) -> None:
    path.write_bytes(content)
    try:
        config = load_config(path, overrides)
    except ConfigError as error:
        assert str(error)
    else:
        assert load_config_text(config.to_yaml(), path) == config


def load_config_text(text: str, path: Path):
    path.write_text(text)
    return load_config(path)


@FUZZ
@given(
    st.binary(max_size=60) | st.text(max_size=60).map(lambda x: x.encode(errors="surrogatepass")),
    OVERRIDES,
)
@pytest.mark.filterwarnings("ignore")
def test_random_text_as_config(tmp_path, content, overrides):
    only_config_errors(tmp_path / "c.yaml", content, overrides)


@FUZZ
@given(TREES, OVERRIDES)
@pytest.mark.filterwarnings("ignore")
def test_random_trees_as_config(tmp_path, tree, overrides):
    only_config_errors(tmp_path / "c.yaml", yaml.safe_dump(tree).encode(), overrides)


def test_yaml_cannot_run_code_or_grow(tmp_path):
    bomb = "a: &a [x,x,x,x,x,x,x,x,x]\n" + "".join(
        f"{n}: &{n} [{','.join(['*' + p] * 9)}]\n"
        for p, n in zip("abcdefgh", "bcdefghi", strict=True)
    )
    for content in (
        f"run: !!python/object/apply:os.mkdir ['{tmp_path / 'ran'}']",
        bomb,
        "run: " + "[" * 3000,
        "run: {dir: *x}",
    ):
        started = time.process_time()
        with pytest.raises(ConfigError) as caught:
            (tmp_path / "c.yaml").write_text(content)
            load_config(tmp_path / "c.yaml")
        assert time.process_time() - started < 5 and len(str(caught.value)) < 5000
    assert not (tmp_path / "ran").exists()


# ---------- no file but the data


def test_image_paths_stay_below_the_root(tmp_path):
    """Thousands of hostile image paths: no file outside the data root is opened."""
    from conftest import picture

    from data import DataError, load_image

    root, seen = tmp_path / "data", []
    (root / "sub").mkdir(parents=True)
    picture(8, 8, 0).save(root / "in.png")
    picture(8, 8, 0).save(tmp_path / "out.png")
    (root / "link.png").symlink_to(tmp_path / "out.png")
    (root / "linked").symlink_to(tmp_path)
    watching = [True]

    def watch(event, args):
        if watching and watching[0] and event == "open" and isinstance(args[0], str):
            seen.append(args[0])

    sys.addaudithook(watch)
    parts = [
        "..",
        ".",
        "sub",
        "in.png",
        "out.png",
        "link.png",
        "linked",
        "",
        "/",
        str(tmp_path),
        "etc",
        "passwd",
        "~",
        "\0",
        "%2e%2e",
        "a" * 300,
    ]
    chance, opened = random.Random(0), 0
    for _ in range(3000):
        path = "/".join(chance.choice(parts) for _ in range(chance.randint(1, 5)))
        try:
            load_image(path, root)
            opened += 1
        except DataError:
            pass
    watching.clear()
    files = [os.path.realpath(path) for path in seen if not path.endswith((".py", ".pyc", ".so"))]
    assert opened > 10 and all(path.startswith(str(root.resolve())) for path in files), [
        p for p in files if str(root) not in p
    ][:3]
