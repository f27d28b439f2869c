"""train.py end to end, on a tiny random policy.

Every algorithm with and without DyCo, logs, resume, interruption.
"""

import json
import math
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import transformers
from helpers import REWARD, rows_of, weights_of
from safetensors.torch import load_file, save_file

import config as config_module
import dyco
import run_folder
import train
from config import load_config
from data import Sample, count_prompt_tokens
from distributed import ALONE
from model import FAMILIES, load_policy
from rollout import generate, keyed_generator
from tools import export


@pytest.mark.parametrize("dyco", [True, False])
@pytest.mark.parametrize("algorithm", ["grpo", "dapo", "gspo", "sapo", "dr_grpo", "cispo"])
def test_two_steps(start, tmp_path, algorithm, dyco):
    # dapo's own dynamic sampling would find no group with both right and wrong answers here, and
    # it would leave truncated responses out of the loss.
    extra = (
        ["algo.dynamic_sampling=false", "algo.mask_truncated=false"] if algorithm == "dapo" else []
    )
    folder = start(f"algo.name={algorithm}", f"dyco.enabled={dyco}", *extra)
    rows = rows_of(folder, timeless=False)
    assert [row["step"] for row in rows] == [0, 1, 2]
    assert {"eval/accuracy", "eval/accuracy_greedy", "eval/accuracy_swapped"} <= rows[
        0
    ].keys() & rows[2].keys()
    for row in rows[1:]:
        assert {
            "reward/mean",
            "reward/accuracy",
            "reward/format",
            "response/length",
            "response/truncated",
            "policy/entropy",
            "policy/loss",
            "policy/grad_norm",
            "policy/clip_fraction",
            "time/tokens_per_second",
            "time/rollout",
        } <= row.keys()
        assert row["policy/grad_norm"] > 0 and row["response/length"] <= 12
        assert row["policy/ratio_deviation"] > 0  # the second update of a step is off policy
        assert ("dyco/alignment" in row) == dyco
        assert ("policy/kl" in row) == (algorithm in ("grpo", "gspo", "sapo"))
        if dyco:
            assert row["dyco/visual_share"] + row["dyco/text_share"] + row[
                "dyco/neutral_share"
            ] == pytest.approx(1)
    before, after = load_file(tmp_path / "model" / "model.safetensors"), weights_of(folder)
    assert all(torch.isfinite(w).all() for w in after.values())
    assert any(not torch.equal(before[name], after[name]) for name in before)
    samples = [json.loads(line) for line in (folder / "samples.jsonl").read_text().splitlines()]
    assert [s["step"] for s in samples] == [1] * 4 + [2] * 4 and all(
        len(s["response"]) for s in samples
    )
    for sample in samples:
        assert 1 <= len(sample["tokens"]) <= 12 and ("roles" in sample) == dyco
        assert not dyco or len(sample["tokens"]) == len(sample["roles"]) == len(sample["scores"])
    assert (folder / "config.yaml").exists() and len(list((folder / "checkpoints").iterdir())) == 1


@pytest.mark.parametrize(
    "rule, control",
    [("paper", "none"), ("paper", "shuffled"), ("response", "none"), ("siblings", "uniform")],
)
def test_every_setting_reaches_its_stage(make_policy, prompts, monkeypatch, rule, control):
    """All knobs off their defaults.

    Rewards by hand, shifts by what Fisher–Rao and Hellinger have in common, the chord |√p − √q|,
    advantages from the pure functions, whose own tests have numbers.
    """
    config = load_config(
        config_module.DEFAULTS,
        [
            f"dyco.rule={rule}",
            f"dyco.control={control}",
            "dyco.alpha=0.7",
            "dyco.tau=0.3",
            "dyco.ratio=minmax",
            "dyco.shift=hellinger",
            "dyco.text_scope=all",
            "dyco.layers=[0]",
            "algo.scale=none",
            "algo.overlong_buffer=4",
            "algo.overlong_weight=0.5",
            "reward.accuracy_weight=2",
            "reward.format_weight=3",
            "reward.custom_weight=5",
            "rollout.group_size=4",
            "rollout.max_new_tokens=8",
            "train.seed=11",
        ],
    )
    policy = make_policy()
    samples = [Sample(p.id, (), p.question, p.answer) for p in prompts]

    def encode(self, sample, position, template, max_prompt_tokens):
        return replace(next(p for p in prompts if p.id == sample.id), index=position)

    monkeypatch.setattr(train.Policy, "encode", encode)
    turn = iter(range(100))
    monkeypatch.setattr(train.rewards, "accuracy", lambda text, answer: float(len(text) % 2))
    monkeypatch.setattr(train.rewards, "format", lambda text: float(len(text) % 3 == 0))
    training = train.Training(
        config,
        ALONE,
        policy,
        dataset=samples,
        custom_reward=lambda text, answer, sample: next(turn) / 10,
    )
    batch = train.collect(training, [(7, 0), (8, 1), (9, 2)], step=3)
    lengths, texts = batch.rollout.mask.sum(1).tolist(), batch.rollout.texts
    total = [
        2 * (len(text) % 2) + 3 * (len(text) % 3 == 0) + 5 * i / 10 - 0.5 * max(0, n - 4) / 4
        for i, (text, n) in enumerate(zip(texts, lengths, strict=True))
    ]
    assert batch.rewards.flatten().tolist() == pytest.approx(total) and max(lengths) > 4

    default = generate(
        policy, batch.rollout.prompts, 4, 8, (11, 3), load_config().dyco
    )  # the same tokens, other signals
    assert torch.equal(default.tokens, batch.rollout.tokens)
    mine = generate(
        policy, batch.rollout.prompts, 4, 8, (11, 3), replace(config.dyco, shift="fisher_rao")
    ).signals
    chord = batch.rollout.signals.text_shift / math.pi * math.sqrt(2) / 2  # half of |√p − √q|
    torch.testing.assert_close(
        4 * chord.clamp(max=math.sqrt(0.5)).asin(), mine.text_shift, rtol=1e-4, atol=1e-4
    )
    assert not torch.allclose(
        mine.text_mass, default.signals.text_mass, atol=1e-3
    )  # another layer, another scope

    train.assign_advantages(config, batch, 3)
    signals, mask = batch.rollout.signals, batch.rollout.mask
    group = (batch.rewards - batch.rewards.mean(1, keepdim=True)).flatten()
    roles = dyco.assign_roles(signals.visual_shift, signals.text_shift, mask, 0.3)
    scores = dyco.alignment_scores(signals.visual_mass, signals.text_mass, roles, mask, "minmax")
    streams = [
        keyed_generator(11, 3, "shuffle", position, i) for position in (7, 8, 9) for i in range(4)
    ]
    expected = dyco.reweight_advantages(
        group,
        scores,
        roles,
        mask,
        alpha=0.7,
        rule=rule,
        generator=streams,
        group_size=4,
        control=control,
        tokens=batch.rollout.tokens,
        rewards=batch.rewards.flatten(),
    )
    torch.testing.assert_close(batch.advantages, expected)
    assert torch.equal(batch.roles, roles) and torch.equal(batch.scores, scores)


OF_RESPONSES = ("logprobs", "entropy", "blind_logprobs", "image_similarity", "tokens")


@pytest.mark.parametrize("rule", [name for name, rule in dyco.RULES.items() if rule.needs])
def test_a_rule_is_given_what_it_needs_and_nothing_is_computed_for_it_beyond(
    start, monkeypatch, rule
):
    given = {}
    reweight = dyco.reweight_advantages

    def watched(*args, **kwargs):
        given.update(kwargs)
        return reweight(*args, **kwargs)

    monkeypatch.setattr(dyco, "reweight_advantages", watched)
    folder = start(f"dyco.rule={rule}", "train.steps=1")
    assert rows_of(folder)[1]["policy/grad_norm"] > 0
    needs = dyco.RULES[rule].needs
    for name in set(needs) & set(OF_RESPONSES):
        values = given[name]
        assert values.shape == given["mask"].shape
        assert values[given["mask"]].ne(0).any()
    for name in ("entropy", "blind_logprobs", "image_similarity"):
        assert (name in given) == (name in needs)
    assert given["rewards"].shape == given["mask"].shape[:1]


def test_the_reference_is_the_policy_that_training_began_with(start):
    """One update a step.

    KL is 0 at the first, where the policy is its reference, and not at the second.
    """
    rows = rows_of(start("train.updates_per_rollout=1", "algo.kl=0.04"))
    assert rows[1]["policy/kl"] < 1e-10 < 1e-6 < rows[2]["policy/kl"]


def test_the_model_is_built_as_the_config_says(start, tmp_path):
    start("train.steps=0")
    settings = load_config(
        tmp_path / "run" / "config.yaml",
        [
            "rollout.temperature=0.7",
            "model.freeze_vision=true",
            "model.gradient_checkpointing=true",
            "algo.kl=0",
        ],
    )
    training = train.build(settings, ALONE)
    policy = training.policy
    assert policy.temperature == 0.7 and training.reference is None
    assert (
        not any(p.requires_grad for p in policy.hf.model.visual.parameters())
        and policy.hf.lm_head.weight.requires_grad
    )
    assert policy.hf.model.language_model.layers[0].gradient_checkpointing


def test_capture_in_rollout_and_in_scoring_train_the_same_policy(start):
    """The signals agree to 1e-4, so a step's figures do, too.

    A role at the edge of τ may differ, hence not exactly.
    """
    one, two = (
        start(folder="one"),
        start("dyco.capture=scoring", "train.old_logprobs=scored", folder="two"),
    )
    for a, b in zip(rows_of(one)[1:2], rows_of(two)[1:2], strict=True):
        assert b.pop("policy/rollout_gap") < 1e-4
        assert a.keys() == b.keys()
        for key in a:
            assert a[key] == pytest.approx(b[key], rel=2e-2, abs=1e-3), key


def test_a_run_repeats_and_resumes_exactly(start):
    """Same config, same numbers.

    A run cut after step 2 and resumed ends with the same metrics and the same bits.
    """
    whole = start("train.steps=4", folder="whole")
    again = start("train.steps=4", folder="again")
    assert rows_of(whole) == rows_of(again)
    start("train.steps=2", folder="cut")
    cut = start("train.steps=4", folder="cut")
    assert (
        rows_of(cut)[:2] + rows_of(cut)[3:] == rows_of(whole)[:2] + rows_of(whole)[3:]
    )  # step 2 also holds an evaluation
    assert rows_of(cut) == rows_of(whole)
    a, b = weights_of(whole), weights_of(cut)
    assert all(torch.equal(a[name], b[name]) for name in a)


def rates(*overrides, taken):
    """The learning rates of a run of 5 · 4 = 20 updates, after so many were taken; lr is 2."""
    settings = ["train.steps=5", "train.updates_per_rollout=4", "optim.lr=2", *overrides]
    config = load_config(config_module.DEFAULTS, settings)
    return [train.learning_rate(config, updates) for updates in taken]


@pytest.mark.parametrize(
    "schedule, expected",
    [
        ("constant", [2, 2, 2, 2]),
        # Of the 16 updates after the warm-up: none, a quarter, half of them, and all but the last.
        ("linear", [2, 1.5, 1, 2 / 16]),
        ("cosine", [2, 1 + math.sqrt(0.5), 1, 1 + math.cos(math.pi * 15 / 16)]),
    ],
)
def test_learning_rates_by_hand(schedule, expected):
    keys = [f"optim.schedule={schedule}", "optim.warmup_steps=4"]
    assert rates(*keys, taken=(0, 1, 2, 3)) == [0.5, 1, 1.5, 2]
    falling = (4, 8, 12, 19)
    assert rates(*keys, taken=falling) == pytest.approx(expected)
    # The floor is a share of the rate, and the rest of it falls. It has no say in the warm-up.
    floored = rates(*keys, "optim.floor=0.2", taken=falling)
    if schedule == "constant":
        assert floored == expected
    else:
        assert floored == pytest.approx([0.2 * 2 + 0.8 * rate for rate in expected])
    assert rates(*keys, "optim.floor=0.2", taken=(0, 3)) == [0.5, 2]


@pytest.mark.parametrize("schedule", ["linear", "cosine"])
def test_learning_rates_at_the_edges(schedule):
    key = f"optim.schedule={schedule}"
    assert rates(key, "optim.warmup_steps=0", taken=(0, 10, 20)) == pytest.approx([2, 1, 0])
    # A resumed run with fewer updates per rollout may have taken more than it now has.
    assert rates(key, "optim.floor=0.5", taken=(20, 99)) == pytest.approx([1, 1])
    assert rates(key, "optim.floor=1", taken=(5, 12, 19)) == pytest.approx([2, 2, 2])
    # A warm-up as long as the run leaves nothing to fall.
    assert rates(key, "optim.warmup_steps=20", taken=(9, 19, 20)) == pytest.approx([1, 2, 2])


def test_a_skipped_update_does_not_move_the_schedule():
    config = load_config(
        config_module.DEFAULTS,
        ["train.steps=2", "optim.schedule=linear", "optim.lr=1", "optim.warmup_steps=0"],
    )
    weight = torch.nn.Parameter(torch.ones(1))
    optimizer = torch.optim.AdamW([weight])
    seen = []
    for is_skipped in (False, False, True, False):
        seen.append(train.set_learning_rate(config, optimizer))
        assert optimizer.param_groups[0]["lr"] == seen[-1]
        weight.grad = torch.ones(1)
        if not is_skipped:
            optimizer.step()
    assert seen == pytest.approx([1, 0.75, 0.5, 0.5])


def test_the_schedule_goes_on_after_a_resume(start, tmp_path):
    """Six updates, the first of them a warm-up; cut after the second of three steps."""
    settings = ["train.steps=3", "optim.schedule=cosine", "optim.floor=0.1"]
    settings += ["optim.warmup_steps=1", "eval.every=9", "checkpoint.every=1"]
    whole = start(*settings, "checkpoint.keep_last=3", folder="whole")
    cut = tmp_path / "cut"
    shutil.copytree(whole, cut)
    shutil.rmtree(cut / "checkpoints" / "step-00000003")
    shutil.rmtree(cut / "final")
    start(*settings, "checkpoint.keep_last=3", folder="cut")
    assert rows_of(cut) == rows_of(whole)
    a, b = weights_of(whole), weights_of(cut)
    assert all(torch.equal(a[name], b[name]) for name in a)
    # Logged is the rate of a step's last update: none, two and four of the five have gone before.
    heights = [(1 + math.cos(math.pi * gone / 5)) / 2 for gone in (0, 2, 4)]
    logged = [row["optim/lr"] for row in rows_of(whole)[1:]]
    assert logged == pytest.approx([1e-3 * (0.1 + 0.9 * height) for height in heights])


def test_a_cap_that_no_token_reaches_changes_nothing(start):
    plain = start("algo.name=sapo", "train.steps=3", "algo.kl_cap=0", folder="plain")
    capped = start("algo.name=sapo", "train.steps=3", folder="capped")
    assert rows_of(plain) == rows_of(capped)
    assert all(row["policy/kl_capped"] == 0 for row in rows_of(capped)[1:])
    a, b = weights_of(plain), weights_of(capped)
    assert all(torch.equal(a[name], b[name]) for name in a)


def test_the_cap_reaches_the_loss(start):
    """A cap far below the k3 of the second step holds nearly every token of it."""
    settings = ["algo.kl=0.5", "train.updates_per_rollout=1", "eval.every=9"]
    row = rows_of(start(*settings, "algo.kl_cap=1e-12"))[2]
    assert row["policy/kl_capped"] > 0.9
    assert row["policy/kl"] > 1e-6  # the mean is logged without the cap


@pytest.mark.parametrize("family", ["qwen3_vl", "qwen2_vl"])
def test_another_family_trains_and_resumes(start, tmp_path, family):
    """All of a Qwen3-VL learns, what its deeper vision layers feed to the decoder too.

    The stock class loads what the run leaves.
    """
    whole = start(folder="whole")
    start("train.steps=1", folder="cut")
    cut = start(folder="cut")
    assert rows_of(cut)[-1] == rows_of(whole)[-1]
    a, b = weights_of(whole), weights_of(cut)
    assert all(torch.equal(a[name], b[name]) for name in a)
    before = load_file(tmp_path / "model" / "model.safetensors")
    still = {name for name in a if torch.equal(a[name], before[name])}
    assert not still
    assert any("deepstack" in name for name in a) == (family == "qwen3_vl")
    loader = getattr(transformers, FAMILIES[family].loader)
    loaded, report = loader.from_pretrained(whole / "final", output_loading_info=True)
    assert not any(report.values())
    (embeddings,) = (a[name] for name in a if name.endswith("embed_tokens.weight"))
    assert torch.equal(loaded.lm_head.weight, embeddings)


def test_a_finished_run_adds_nothing(start, capsys):
    folder = start()
    before = {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    start()
    assert "finished at step 2; nothing to do" in capsys.readouterr().out
    assert before == {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_a_broken_log_is_named(start, capsys):
    folder = start()
    with open(folder / "metrics.jsonl", "a") as file:
        file.write("\0\0\n")
    with pytest.raises(SystemExit):
        start("train.steps=3")
    assert "metrics.jsonl, line 4: expected an object with a step" in capsys.readouterr().err


def test_a_log_longer_than_the_checkpoint_is_neither_cut_nor_repeated(start, tmp_path):
    """A crash after step 3 leaves rows past the checkpoint of step 2, and half a line.

    They are the rows of the rerun.
    """
    whole = start("train.steps=4", folder="whole")
    folder = start("train.steps=2", folder="crashed")
    row_3 = json.dumps(json.loads((whole / "metrics.jsonl").read_text().splitlines()[3]))
    with open(folder / "metrics.jsonl", "a") as file:
        file.write(row_3 + "\n" + '{"step": 4, "rewa')
    partial = folder / "checkpoints" / "step-00000003.partial-abc"
    partial.mkdir()
    later = folder / "examples" / "step-00000003.json"
    later.write_text("of a step that is no more")
    start("train.steps=4", folder="crashed")
    assert not later.exists()
    assert [row["step"] for row in rows_of(folder)] == [0, 1, 2, 3, 4]
    assert rows_of(folder) == rows_of(whole) and not partial.exists()


def test_another_run_cannot_resume(start, capsys):
    start()
    for key, before, after in [
        ("train.seed", 0, 1),
        ("algo.kl", 0.04, 0.5),
        ("dyco.rule", "paper", "signed"),
        ("dyco.control", "none", "shuffled"),
        ("reward.format_weight", 1.0, 0.5),
    ]:
        with pytest.raises(SystemExit):
            start(f"{key}={after}", "train.steps=3")
        assert (
            f"holds a run with another {key} ({before!r}, now {after!r})" in capsys.readouterr().err
        )
    # A run of earlier versions, which had no such key, or one name for both.
    (checkpoint,) = (start() / "checkpoints").iterdir()
    facts = json.loads((checkpoint / "facts.json").read_text())

    def rewrite(facts: dict) -> None:
        (checkpoint / "facts.json").write_text(json.dumps(facts))
        (checkpoint / "checksums.json").unlink()
        run_folder.write_checksums(checkpoint)

    for rule, wanted in (("paper", "shuffled"), ("shuffled", "none")):
        earlier = json.loads(json.dumps(facts))
        del earlier["config"]["dyco"]["control"]
        earlier["config"]["dyco"]["rule"] = rule
        rewrite(earlier)
        with pytest.raises(SystemExit):
            start(f"dyco.control={wanted}", "train.steps=3")
        assert "holds a run with another dyco.control" in capsys.readouterr().err
    rewrite(facts)
    start(
        "optim.lr=1e-4", "reward.custom_on_error=zero", "train.steps=3"
    )  # what the error of a failing reward advises
    assert "changed since the checkpoint: optim.lr 0.001 -> 0.0001" in capsys.readouterr().out


def test_dynamic_sampling_skips_a_step_without_a_useful_group(start, tmp_path):
    """A random policy is never right, so every group's accuracy is constant.

    Refills are tried and the step is skipped.
    """
    folder = start("algo.name=dapo", "algo.max_refills=1", "train.steps=1")
    row = rows_of(folder)[1]
    assert (
        row["policy/skipped_updates"] == 2
        and "policy/loss" not in row
        and row["reward/accuracy"] == 0
    )
    before, after = load_file(tmp_path / "model" / "model.safetensors"), weights_of(folder)
    assert all(torch.equal(before[name], after[name]) for name in before)
    facts = json.loads((folder / "checkpoints" / "step-00000001" / "facts.json").read_text())
    assert facts["sampler"] == {"consumed": 8}  # dropped prompts count as consumed


def test_dynamic_sampling_keeps_mixed_groups_up_to_the_quota(start, monkeypatch):
    """Right by turns where the answer is odd, never where it is even.

    Only odd prompts are learned from, four at most.
    """
    turn, learned = iter(range(10**6)), []
    monkeypatch.setattr(
        train.rewards, "accuracy", lambda text, answer: float(int(answer) % 2 and next(turn) % 2)
    )
    monkeypatch.setattr(
        train,
        "assign_advantages",
        lambda config, batch, step, world, plain=train.assign_advantages: (
            learned.append(batch) or plain(config, batch, step, world)
        ),
    )
    folder = start("algo.name=dapo", "algo.mask_truncated=false", "eval.every=100", "train.steps=1")
    (batch,) = learned
    assert len(batch.positions) == len(batch.rollout.prompts) == 4
    assert all(int(prompt.answer) % 2 for prompt in batch.rollout.prompts)
    assert all(0 < row.sum() < 3 for row in batch.accuracy)
    facts = json.loads((folder / "checkpoints" / "step-00000001" / "facts.json").read_text())
    assert (
        facts["sampler"]["consumed"] in (8, 12, 16) and rows_of(folder)[1]["reward/accuracy"] < 0.5
    )


def test_rows_of_another_run_are_not_mixed_in(start, capsys):
    """A crash before the first checkpoint leaves a log.

    Another config in that folder is refused, the same one goes on.
    """
    folder = start("train.steps=1", "checkpoint.every=100")
    for path in (folder / "checkpoints", folder / "final"):
        shutil.rmtree(path)
    with pytest.raises(SystemExit):
        start("train.steps=1", "checkpoint.every=100", "train.seed=7")
    assert "holds a run with another train.seed (0, now 7)" in capsys.readouterr().err
    first = rows_of(folder)
    start("train.steps=1", "checkpoint.every=100", "optim.lr=1e-4")
    assert "optim.lr 0.001 -> 0.0001" in capsys.readouterr().out
    assert [row["step"] for row in rows_of(folder)] == [0, 1]
    superseded = [
        json.loads(line) for line in (folder / "metrics.superseded.jsonl").read_text().splitlines()
    ]
    assert (
        [row["step"] for row in superseded] == [0, 1]
        and first[0] == rows_of(folder)[0]
        and first[1] != rows_of(folder)[1]
    )


def test_an_extended_run_has_no_old_final(start, monkeypatch):
    """A run is extended, and killed between its last checkpoint and `final/`.

    It must not take the `final/` of the shorter run for its own.
    """
    folder = start("train.steps=1", "checkpoint.every=1")
    old = weights_of(folder)

    class Killed(BaseException):
        pass

    def killed(*_, **__):
        raise Killed

    with monkeypatch.context() as patch, pytest.raises(Killed):
        patch.setattr(run_folder, "save_final", killed)
        start("train.steps=2", "checkpoint.every=1")
    assert not (folder / "final").exists()
    start("train.steps=2", "checkpoint.every=1")
    assert any(not torch.equal(old[name], weight) for name, weight in weights_of(folder).items())


def test_the_final_model_has_the_dtype_of_the_first(start, tmp_path):
    """Training and its checkpoints are in float32; final/ and tools.export round to bfloat16."""
    file = tmp_path / "model" / "model.safetensors"
    released = {name: weight.bfloat16() for name, weight in load_file(file).items()}
    save_file(released, file, metadata={"format": "pt"})
    config = tmp_path / "model" / "config.json"
    config.write_text(config.read_text().replace('"float32"', '"bfloat16"'))

    folder = start("train.steps=1", "checkpoint.every=1")
    (checkpoint,) = run_folder.checkpoints(folder / "checkpoints")
    trained = run_folder.read_tensors(checkpoint)["policy"]
    export.main([str(checkpoint), str(tmp_path / "exported")])
    for written in (folder / "final", tmp_path / "exported"):
        final = load_policy(written, torch.device("cpu"))
        assert final.released_dtype == torch.bfloat16
        for name, weight in final.hf.named_parameters():
            assert trained[name].dtype == torch.float32
            assert torch.equal(weight, trained[name].bfloat16().float())

    whole = start("train.steps=1", "run.final_dtype=float32", folder="whole")
    final = load_policy(whole / "final", torch.device("cpu"))
    for name, weight in final.hf.named_parameters():
        assert torch.equal(weight, trained[name])


def test_other_inputs_cannot_resume(start, tmp_path, capsys):
    rows = tmp_path / "rows.jsonl"
    rows.write_text('{"question": "Sum circle.", "answer": "4"}\n' * 3)
    start(f"data.path={rows}", folder="text")
    rows.write_text('{"question": "Sum cross.", "answer": "4"}\n' * 3)
    with pytest.raises(SystemExit):
        start(f"data.path={rows}", "train.steps=3", folder="text")
    assert (
        "data.path: what is there is not what this run's checkpoint was made with"
        in capsys.readouterr().err
    )
    start(folder="copied")
    kept = tmp_path / "copied" / "checkpoints"
    shutil.copytree(kept / "step-00000002", kept / "step-best")  # somebody's copy, no checkpoint
    (tmp_path / "reward.py").write_text(REWARD + "\n")
    start("train.steps=3", folder="copied")
    assert "changed since the checkpoint: the file of reward.custom" in capsys.readouterr().out
    assert [path.name for path in run_folder.checkpoints(kept)] == [
        "step-00000002",
        "step-00000003",
    ] and (kept / "step-best").exists()
    shutil.copytree(
        tmp_path / "copied" / "final", tmp_path / "model", dirs_exist_ok=True
    )  # the reference would be another
    with pytest.raises(SystemExit):
        start("train.steps=4", folder="copied")
    assert "model.path: what is there is not what this run's checkpoint" in capsys.readouterr().err


def test_a_held_out_set_may_come_and_go_but_not_change(start, tmp_path, capsys):
    rows, held_out = tmp_path / "rows.jsonl", tmp_path / "held_out.jsonl"
    rows.write_text('{"question": "Sum circle.", "answer": "4"}\n' * 3)
    held_out.write_text('{"question": "Sum cross.", "answer": "4"}\n' * 3)
    without = (f"data.path={rows}", "checkpoint.every=1")
    start(*without, "train.steps=1", folder="text")
    folder = start(*without, f"data.eval_path={held_out}", "train.steps=2", folder="text")
    assert "changed since the checkpoint: data.eval_path None ->" in capsys.readouterr().out
    assert ["eval/accuracy" in row for row in rows_of(folder)] == [False, False, True]
    start(*without, "train.steps=3", folder="text")
    held_out.write_text('{"question": "Sum square.", "answer": "4"}\n' * 3)
    with pytest.raises(SystemExit):
        start(*without, f"data.eval_path={held_out}", "train.steps=4", folder="text")
    assert "data.eval_path: what is there is not what" in capsys.readouterr().err


def test_a_prompt_drawn_twice_in_a_step_is_answered_twice(start, tmp_path):
    """Three rows, four prompts a step: the two groups of the same row must not be copies."""
    (tmp_path / "rows.jsonl").write_text('{"question": "Sum circle.", "answer": "4"}\n' * 3)
    folder = start(f"data.path={tmp_path / 'rows.jsonl'}", "log.samples_per_step=12", folder="text")
    texts = [
        json.loads(line)["response"] for line in (folder / "samples.jsonl").read_text().splitlines()
    ]
    assert len(set(texts)) == len(texts) == 24


def test_mistakes_end_with_one_line(start, capsys, tmp_path):
    for override, message in [
        ("dyco.layers=[5]", "dyco.layers: [5] out of range"),
        ("model.path=/nowhere", "model.path: '/nowhere'"),
        ("reward.custom=/nowhere.py:f", "/nowhere.py"),
        ("data.path=/nowhere.jsonl", "/nowhere.jsonl"),
        ("trian.steps=1", "did you mean 'train'?"),
        ("data.max_pixels=100", "data.max_pixels: expected at least 3136"),
    ]:
        with pytest.raises(SystemExit) as caught:
            start(override)
        error = capsys.readouterr().err
        assert caught.value.code == 2 and "Traceback" not in error
        assert error.splitlines()[-1].startswith("error: ") and message in error.splitlines()[-1]


def test_own_jsonl_with_held_out_rows(start, tmp_path, capsys):
    """The authors' rows and plain ones, one, two and no images.

    With images exchanged a prompt may be longer than any of its own. A rule that weighs tokens by
    the image has nothing to go by without one, which is said.
    """
    from conftest import picture

    picture(84, 56, 1).save(tmp_path / "a.png")
    picture(280, 280, 2).save(tmp_path / "b.png")
    long = "<image>How many?" + " Count." * 10
    rows = [
        {
            "id": "1",
            "image": "a.png",
            "conversations": [{"from": "human", "value": long}, {"from": "gpt", "value": "3"}],
        },
        {
            "images": ["a.png", "b.png"],
            "question": "<image>Is it larger than <image>?",
            "answer": "yes",
        },
        {"question": "Sum circle, cross.", "answer": "4"},
        {"images": ["b.png"], "question": "How many?", "answer": 2},
    ]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    policy = load_policy(tmp_path / "model", torch.device("cpu"))

    def count(question: str, *sizes: tuple[int, int]) -> int:
        template = load_config().data.prompt_template
        tokenizer, processor = policy.tokenizer, policy.image_processor
        return count_prompt_tokens(
            question, sizes, tokenizer, image_processor=processor, template=template
        )

    longest = count(rows[1]["question"], (84, 56), (280, 280))
    assert count(long, (84, 56)) < longest < count(long, (280, 280))
    folder = start(
        f"data.path={tmp_path / 'rows.jsonl'}",
        f"data.eval_path={tmp_path / 'rows.jsonl'}",
        "train.updates_per_rollout=1",
        f"data.max_prompt_tokens={longest}",
        "dyco.rule=vppo",
    )
    told = capsys.readouterr()
    assert "1 of 4 prompts have no image, by which dyco.rule=vppo weighs" in told.out + told.err
    assert [row["step"] for row in rows_of(folder)] == [0, 1, 2] and rows_of(folder)[2][
        "policy/grad_norm"
    ] > 0


def test_torchrun_and_ask(start, tmp_path):
    """The command lines of the README, on a tiny policy."""
    from conftest import picture

    root = Path(train.__file__).parent
    start("train.steps=1", folder="seen")
    common = dict(cwd=root, capture_output=True, text=True, timeout=300)
    command = [
        "train.py",
        "config.yaml",
        f"run.dir={tmp_path / 'seen'}",
        f"model.path={tmp_path / 'model'}",
        "rollout.prompts_per_step=4",
        "rollout.group_size=3",
        "rollout.max_new_tokens=12",
        "train.steps=2",
        "eval.samples=5",
        f"reward.custom={tmp_path / 'reward.py'}:vowels",
        "optim.lr=1e-3",
    ]
    done = subprocess.run(
        [sys.executable, "-m", "torch.distributed.run", "--standalone", *command], **common
    )
    assert done.returncode == 0, done.stderr
    assert "resumed" in done.stdout and "step 2/2" in done.stdout
    picture(112, 112, 0).save(tmp_path / "p.png")
    asked = subprocess.run(
        [
            sys.executable,
            "evaluate.py",
            "ask",
            "--model",
            str(tmp_path / "seen" / "final"),
            "--max-new-tokens",
            "5",
            "--image",
            str(tmp_path / "p.png"),
            "Sum circle, cross.",
        ],
        **common,
    )
    assert asked.returncode == 0 and asked.stdout.strip(), asked.stderr


@pytest.mark.slow
def test_the_default_run_learns(tmp_path):
    """What the README claims of the default.

    Bad habits at first, cured within the run, and no answer without the picture.
    """
    folder = tmp_path / "run"
    train.main([str(config_module.DEFAULTS), f"run.dir={folder}", f"toy.cache_dir={tmp_path}"])
    rows = rows_of(folder)
    first, last = rows[0], rows[-1]
    assert (
        0.10 <= first["eval/accuracy"] <= 0.40
        and first["eval/accuracy_greedy"] <= 0.60
        and first["eval/format"] > 0.9
    )
    assert last["eval/accuracy"] >= first["eval/accuracy"] + 0.50
    assert last["eval/accuracy_greedy"] >= first["eval/accuracy_greedy"] + 0.20
    # Chance is 580/4096 = 0.14, as two shapes of three agree now and then. The standard error of
    # 200 samples is 0.025.
    assert all(row["eval/accuracy_swapped"] < 0.24 for row in (first, last))


def test_profile_and_curve(start, capsys):
    """A trace of the first steps that a viewer can open, and the evaluations as a table."""
    folder = start("train.profile_steps=1")
    trace = json.loads((folder / "profile-1.json").read_text())
    assert any("addmm" in event.get("name", "") for event in trace["traceEvents"])
    assert not (folder / "profile-2.json").exists()
    assert "at step     0     2" in capsys.readouterr().out
