"""lora.py: adapters beside frozen weights, what they cost, and what a run writes of them."""

import json
import re
import shutil
from types import SimpleNamespace

import pytest
import torch
from conftest import random_responses
from helpers import Products, rows_of, same_run, torchrun, weights_of
from safetensors.torch import load_file
from torch import nn

import config as config_module
import lora
import model
import run_folder
import train
from config import ConfigError, load_config
from distributed import ALONE
from model import TokenLogprobs, load_policy, save_policy
from rollout import generate
from tools import export

SETTINGS = SimpleNamespace(rank=4, alpha=8.0, targets=list(lora.TARGETS))
# Adapters in a run of seconds. The rate is high, so that two steps show.
ADAPTED = ["lora.rank=4", "lora.alpha=8", "optim.lr=1e-2", "optim.warmup_steps=1"]


@pytest.fixture
def adapted(make_policy):
    """adapted(settings, shaken=False, **options of Policy) -> a policy with adapters.

    shaken: B is not zero, so that the adapters do something.
    """

    def make(settings=SETTINGS, shaken: bool = False, **options):
        policy = make_policy(**options)
        lora.add(policy, settings, seed=0)
        if shaken:
            generator = torch.Generator().manual_seed(1)
            with torch.no_grad():
                for name, weight in lora.state(policy).items():
                    if name.endswith("lora_B"):
                        weight.normal_(std=0.05, generator=generator)
        return policy

    return make


def logprobs_of(policy, prompts):
    tokens, mask = random_responses(prompts, 2, 6, 300)
    return policy(prompts, tokens, mask).logprobs


# ---------------------------------------------------------------- the layer


def test_the_product_by_hand():
    """W·x + (α / r)·B·A·x with r = 1, α = 3, and a bias."""
    linear = nn.Linear(2, 2)
    settings = SimpleNamespace(rank=1, alpha=3.0)
    lora._adapt(linear, settings, torch.Generator())
    with torch.no_grad():
        linear.weight.copy_(torch.tensor([[1.0, 0.0], [0.0, 2.0]]))
        linear.bias.copy_(torch.tensor([0.5, 0.0]))
        linear.lora_A.copy_(torch.tensor([[1.0, 1.0]]))
        linear.lora_B.copy_(torch.tensor([[1.0], [-1.0]]))
    x = torch.tensor([1.0, 2.0])
    # A·x = 3, so B·A·x = [3, −3], three times that is [9, −9]; W·x + b = [1.5, 4].
    assert linear(x).tolist() == [10.5, -5.0]
    linear.is_on = False
    assert linear(x).tolist() == [1.5, 4.0]


def test_training_begins_with_the_model_as_it_came(make_policy, adapted, prompts):
    plain = logprobs_of(make_policy(), prompts)
    assert torch.equal(logprobs_of(adapted(), prompts), plain)
    assert not torch.equal(logprobs_of(adapted(shaken=True), prompts), plain)


def test_off_is_the_base_and_only_inside(make_policy, adapted, prompts):
    plain = make_policy()
    policy = adapted(shaken=True)
    before = logprobs_of(policy, prompts)
    with lora.off(policy):
        assert torch.equal(logprobs_of(policy, prompts), logprobs_of(plain, prompts))
    assert torch.equal(logprobs_of(policy, prompts), before)
    with pytest.raises(KeyError), lora.off(policy):
        raise KeyError
    assert torch.equal(logprobs_of(policy, prompts), before)
    with lora.off(plain):  # has no adapters
        logprobs_of(plain, prompts)


def test_what_a_begins_with_is_seeded_and_of_the_papers_size(make_policy, adapted):
    def down(policy) -> list[torch.Tensor]:
        return [w for name, w in lora.state(policy).items() if name.endswith("lora_A")]

    one, two = down(adapted()), down(adapted())
    assert all(map(torch.equal, one, two))
    other = make_policy()
    lora.add(other, SETTINGS, seed=1)
    assert not any(map(torch.equal, one, down(other)))
    for weight in one:
        bound = weight.shape[1] ** -0.5
        assert 0.9 * bound < float(weight.detach().abs().max()) <= bound


@pytest.mark.parametrize("targets", [["q_proj"], ["v_proj", "down_proj"], list(lora.TARGETS)])
def test_only_the_chosen_layers_of_the_decoder_have_adapters(adapted, targets):
    """The vision tower has layers of the same names, which stay as they are."""
    policy = adapted(SimpleNamespace(rank=2, alpha=1.0, targets=targets))
    names = set(lora.state(policy))
    expected = set()
    for layer in range(policy.depth):
        for target in targets:
            part = "self_attn" if target[0] in "qkvo" else "mlp"
            for letter in "AB":
                path = f"model.language_model.layers.{layer}.{part}.{target}.lora_{letter}"
                expected.add(path)
    assert names == expected


@pytest.mark.parametrize("checkpointing", [False, True])
def test_only_adapters_have_gradients(adapted, prompts, checkpointing):
    """Also where the first layer's input needs none, which checkpointing must bear."""
    policy = adapted(shaken=True).train()
    if checkpointing:
        policy.hf.gradient_checkpointing_enable({"use_reentrant": False})
    logprobs_of(policy, prompts).sum().backward()
    adapter = lora.state(policy)
    for name, weight in policy.hf.named_parameters():
        assert weight.requires_grad == (name in adapter), name
        assert (weight.grad is not None) == (name in adapter), name
    assert all(bool(weight.grad.any()) for weight in adapter.values())


def test_gradients_are_those_of_the_merged_weights(make_policy, adapted, prompts):
    """∂L/∂B = (α / r)·∂L/∂W·Aᵀ and ∂L/∂A = (α / r)·Bᵀ·∂L/∂W, where W is the sum."""
    policy = adapted(shaken=True)
    logprobs_of(policy, prompts).sum().backward()
    whole = make_policy()
    with torch.no_grad():
        sums = lora.merged(dict(policy.hf.named_parameters()), SETTINGS)
        for name, weight in whole.hf.named_parameters():
            weight.copy_(sums[name])
    logprobs_of(whole, prompts).sum().backward()
    of_whole = dict(whole.hf.named_parameters())
    for name, weight in lora.state(policy).items():
        layer, _, letter = name.rpartition(".lora_")
        gradient = 2 * of_whole[f"{layer}.weight"].grad
        if letter == "A":
            expected = policy.hf.get_parameter(f"{layer}.lora_B").T @ gradient
        else:
            expected = gradient @ policy.hf.get_parameter(f"{layer}.lora_A").T
        scale = float(expected.detach().abs().max())
        torch.testing.assert_close(weight.grad, expected, rtol=1e-4, atol=1e-4 * scale, msg=name)


def test_sixteen_bits_of_base_and_float32_adapters_meet(start, tmp_path, prompts):
    """As on a GPU: the base in bfloat16, decoded and scored under autocast."""
    start("train.steps=0")
    overrides = [f"model.path={tmp_path / 'model'}", "model.dtype=bfloat16", *ADAPTED]
    policy = train.build(load_config(overrides=overrides), ALONE).policy
    dtypes = {name: weight.dtype for name, weight in policy.hf.named_parameters()}
    for name, dtype in dtypes.items():
        expected = torch.float32 if lora.is_of_adapter(name) else torch.bfloat16
        assert dtype == expected, name
    rollout = generate(policy, prompts, 2, 5, key=(0, 0))
    scored = policy.train()(prompts, rollout.tokens, rollout.mask).logprobs
    scored.sum().backward()
    assert all(weight.grad.dtype == torch.float32 for weight in lora.state(policy).values())
    # Rounding to 8 bits, in a few layers.
    torch.testing.assert_close(scored.detach(), rollout.logprobs, rtol=0, atol=0.1)


def test_a_rollout_samples_from_what_is_scored(adapted, prompts):
    policy = adapted(shaken=True)
    rollout = generate(policy, prompts, 2, 5, key=(0, 0))
    scored = policy(prompts, rollout.tokens, rollout.mask).logprobs
    torch.testing.assert_close(rollout.logprobs, scored.detach(), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("trained", ["hidden", "weight"])
def test_a_gradient_that_nobody_needs_is_not_computed(trained):
    """Of log-probabilities, where the head or what is below it is frozen."""
    generator = torch.Generator().manual_seed(0)
    tensors = {
        "hidden": torch.randn(4, 8, generator=generator),
        "weight": torch.randn(30, 8, generator=generator),
    }
    targets = torch.tensor([3, 7, 29, 0])
    nothing = torch.tensor([], dtype=torch.long)
    chunks = (model._chunk_forward, model._chunk_slope)

    def products_of_backward() -> list[tuple[int, ...]]:
        logprobs, _ = TokenLogprobs.apply(*tensors.values(), targets, 1.0, nothing, 4, *chunks)
        with Products() as products:
            logprobs.sum().backward()
        return products.shapes

    tensors[trained].requires_grad_()
    logits, gradient = (4, 30), tuple(tensors[trained].shape)
    assert products_of_backward() == [logits, gradient]
    alone = tensors[trained].grad.clone()
    tensors[trained].grad = None
    for tensor in tensors.values():
        tensor.requires_grad_()
    assert len(products_of_backward()) == 3
    assert torch.equal(tensors[trained].grad, alone)


# ---------------------------------------------------------------- a run


def adapter_of(folder) -> dict:
    return load_file(folder / "final" / "adapter" / "adapter_model.safetensors")


def test_a_run_with_adapters(start, tmp_path, capsys):
    """Two steps against the frozen base: what is said, trained, saved and written."""
    folder = start(*ADAPTED)
    said = capsys.readouterr().out
    assert re.search(
        r"weights, frozen, LoRA of rank 4: \d\d,\d{3} numbers trained; float32 on CPU", said
    )
    rows = rows_of(folder)
    assert all(row["policy/grad_norm"] > 0 for row in rows[1:])
    # The base is the reference: the KL is 0 before the first update, and not after it.
    assert rows[1]["policy/kl"] > 1e-6 and rows[2]["policy/kl"] > rows[1]["policy/kl"]

    before = load_file(tmp_path / "model" / "model.safetensors")
    after = weights_of(folder)
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    expected = {
        name for name in before if ".layers." in name and name.split(".")[-2] in lora.TARGETS
    }
    assert changed == {
        name for name in expected if name.endswith("weight") and "visual" not in name
    }

    (checkpoint,) = (folder / "checkpoints").iterdir()
    tensors = run_folder.read_tensors(checkpoint)
    assert all(map(lora.is_of_adapter, tensors["policy"]))
    assert tensors["optimizer"]["state"].keys() == set(range(len(tensors["policy"])))
    size = (checkpoint / "tensors.pt").stat().st_size
    assert size < (folder / "final" / "model.safetensors").stat().st_size / 4


def test_the_reference_is_the_base(start):
    """One update a step: the KL is 0 at the first, where B is 0, and not at the second."""
    rows = rows_of(start("train.updates_per_rollout=1", "algo.kl=0.04", *ADAPTED))
    assert rows[1]["policy/kl"] == 0 < 1e-6 < rows[2]["policy/kl"]


@pytest.mark.parametrize("algorithm", ["dapo", "gspo", "sapo"])
def test_every_host_trains_adapters(start, algorithm):
    extra = []
    if algorithm == "dapo":  # which would find nothing to learn from here
        extra = ["algo.dynamic_sampling=false", "algo.mask_truncated=false"]
    rows = rows_of(start(f"algo.name={algorithm}", *extra, *ADAPTED))
    assert all(row["policy/grad_norm"] > 0 for row in rows[1:])
    assert ("policy/kl" in rows[2]) == (algorithm != "dapo")
    assert rows[1]["policy/ratio_deviation"] > 0  # the second update of a step is off policy


@pytest.mark.parametrize("family", ["qwen2_5_vl", "qwen3_vl"])
def test_a_run_with_adapters_resumes_exactly(start, family):
    whole = start("train.steps=3", *ADAPTED, folder="whole")
    start("train.steps=2", *ADAPTED, folder="cut")
    cut = start("train.steps=3", "model.gradient_checkpointing=true", *ADAPTED, folder="cut")
    assert rows_of(cut)[3] == rows_of(whole)[3]
    a, b = adapter_of(whole), adapter_of(cut)
    assert a.keys() == b.keys()
    assert all(torch.equal(a[name], b[name]) for name in a)


def test_another_adapter_or_base_cannot_resume(start, tmp_path, capsys):
    start(*ADAPTED)
    start(folder="full")

    def refused(*overrides: str, folder: str = "run") -> str:
        with pytest.raises(SystemExit):
            start("train.steps=3", *overrides, folder=folder)
        (line,) = capsys.readouterr().err.splitlines()[-1:]
        return line

    assert "another lora.rank (4, now 0)" in refused("lora.alpha=8", "optim.lr=1e-2")
    assert "another lora.rank (4, now 2)" in refused(*ADAPTED, "lora.rank=2")
    assert "another lora.alpha (8.0, now 9.0)" in refused(*ADAPTED, "lora.alpha=9")
    assert "another lora.targets (" in refused(*ADAPTED, "lora.targets=[q_proj]")
    assert "another lora.rank (0, now 4)" in refused("lora.rank=4", folder="full")
    # As a run of an earlier version, which had no such section.
    (checkpoint,) = (tmp_path / "full" / "checkpoints").iterdir()
    facts = json.loads((checkpoint / "facts.json").read_text())
    del facts["config"]["lora"]
    (checkpoint / "facts.json").write_text(json.dumps(facts))
    (checkpoint / "checksums.json").unlink()
    run_folder.write_checksums(checkpoint)
    assert "another lora.rank (0, now 4)" in refused("lora.rank=4", folder="full")
    # What the adapter was trained beside: no reference policy is needed to miss it.
    start(*ADAPTED, "algo.kl=0", folder="alone")
    save_policy(load_policy(tmp_path / "full" / "final", torch.device("cpu")), tmp_path / "model")
    assert "model.path: what is there is not what" in refused(*ADAPTED, "algo.kl=0", folder="alone")


def test_wrong_settings_are_named():
    for override, message in {
        "lora.targets=[q_prj]": "lora.targets: unknown layer 'q_prj'; did you mean 'q_proj'?",
        "lora.targets=[]": "lora.targets: expected at least one linear layer, found []",
        "lora.rank=-1": "lora.rank: expected 0 or more, found -1",
        "lora.alpha=0": "lora.alpha: expected more than 0, found 0.0",
    }.items():
        with pytest.raises(ConfigError) as caught:
            load_config(overrides=[override])
        assert str(caught.value) == f"command line: {message}"


def test_the_file_for_one_small_gpu_is_complete_but_for_the_data():
    file = config_module.DEFAULTS.with_name("config_lora.yaml")
    config = load_config(file, ["data.path=rows.jsonl"])
    assert config.lora.rank == 16 and config.model.gradient_checkpointing
    assert config.dyco == load_config().dyco


def test_a_small_checkpoint_needs_little_room(start, monkeypatch, capsys):
    """Room for final/ and for checkpoints of the adapter, but for none of the whole model."""
    needed = []
    monkeypatch.setattr(
        run_folder.shutil, "disk_usage", lambda path: SimpleNamespace(free=needed[-1])
    )
    weights = 1.5e6
    needed.append(2 * 4 * weights)
    start("train.steps=0", *ADAPTED)
    assert "warning: checkpoints and final/ will need" not in capsys.readouterr().out
    start("train.steps=0", folder="full")
    assert "warning: checkpoints and final/ will need" in capsys.readouterr().out


# ---------------------------------------------------------------- what a run leaves


def stock_logits(hf, prompt) -> torch.Tensor:
    """The logits of transformers, or of PEFT around it."""
    with torch.no_grad():
        return hf(
            input_ids=prompt.input_ids[None],
            mm_token_type_ids=prompt.visual_mask[None].int(),
            pixel_values=prompt.pixel_values,
            image_grid_thw=prompt.image_grid_thw,
            use_cache=False,
        ).logits[0]


def stock_model(folder):
    from transformers import AutoModelForImageTextToText

    return AutoModelForImageTextToText.from_pretrained(folder, dtype="auto").eval()


@pytest.fixture
def resumed(start, tmp_path):
    """A run with adapters: (its folder, the policy at its end)."""
    folder = start("train.steps=1", *ADAPTED)
    config = load_config(folder / "config.yaml")
    training = train.build(config, ALONE)
    (checkpoint,) = (folder / "checkpoints").iterdir()
    tensors = run_folder.read_tensors(checkpoint)
    run_folder.saving.load_tensors(training.policy, training.optimizer, tensors)
    return folder, training.policy.eval()


@pytest.mark.parametrize("family", ["qwen2_5_vl", "qwen3_vl"])
def test_final_is_the_policy_in_transformers(resumed, tmp_path, prompts, family):
    """1e-5: sums of order 1 in float32, in another order."""
    folder, policy = resumed
    ours = stock_logits(policy.hf, prompts[0])
    base = stock_logits(stock_model(tmp_path / "model"), prompts[0])
    assert float((ours - base).abs().max()) > 1e-2
    merged = stock_logits(stock_model(folder / "final"), prompts[0])
    torch.testing.assert_close(merged, ours, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("family", ["qwen2_5_vl", "qwen3_vl"])
def test_final_adapter_is_the_policy_in_peft(resumed, tmp_path, prompts, family):
    """Beside the model that training began with, and under the names that PEFT writes itself."""
    folder, policy = resumed
    ours = stock_logits(policy.hf, prompts[0])
    peft = pytest.importorskip("peft", reason="peft is not installed (requirements-dev.txt)")
    adapter = folder / "final" / "adapter"
    beside = peft.PeftModel.from_pretrained(stock_model(tmp_path / "model"), adapter).eval()
    torch.testing.assert_close(stock_logits(beside, prompts[0]), ours, rtol=1e-5, atol=1e-5)
    written = json.loads((adapter / "adapter_config.json").read_text())
    assert written["base_model_name_or_path"] == str(tmp_path / "model")
    beside.save_pretrained(tmp_path / "by_peft")
    theirs = load_file(tmp_path / "by_peft" / "adapter_model.safetensors")
    for name, weight in load_file(adapter / "adapter_model.safetensors").items():
        assert torch.equal(weight, theirs.pop(name)), name
    assert not theirs


def test_a_base_of_16_bits_is_merged_in_float32(start, tmp_path):
    """Added to bfloat16, what was learned in a step would be lost."""
    rounding = ["model.dtype=bfloat16", "run.final_dtype=float32"]
    folder = start("train.steps=1", *ADAPTED, "optim.lr=1e-4", *rounding)
    base = load_file(tmp_path / "model" / "model.safetensors")
    loaded = dict(stock_model(folder / "final").named_parameters())
    assert all(weight.dtype == torch.float32 for weight in loaded.values())
    after = weights_of(folder)
    name = next(name for name in after if name.endswith("layers.0.mlp.up_proj.weight"))
    before = base[name].bfloat16()
    assert not torch.equal(after[name], before.float())
    kept = after[name].bfloat16() == before
    assert kept.float().mean() > 0.9


def test_a_checkpoint_of_adapters_becomes_a_model_folder(start, tmp_path):
    folder = start("checkpoint.every=1", *ADAPTED)
    checkpoint = folder / "checkpoints" / "step-00000002"
    exported = tmp_path / "exported"
    export.main([str(checkpoint), str(exported)])
    for name in ("model.safetensors", "adapter/adapter_model.safetensors"):
        ours, theirs = load_file(exported / name), load_file(folder / "final" / name)
        assert ours.keys() == theirs.keys()
        assert all(torch.equal(ours[key], theirs[key]) for key in ours)
    # Beside another base the adapter is worth nothing.
    shutil.rmtree(tmp_path / "model")
    shutil.copytree(exported, tmp_path / "model")
    with pytest.raises(SystemExit, match="model.path: what is there is not what"):
        export.main([str(checkpoint), str(tmp_path / "again")])


# ---------------------------------------------------------------- two processes


@pytest.mark.parametrize("dtype", ["float32", pytest.param("bfloat16", marks=pytest.mark.slow)])
def test_two_processes_train_the_adapters_that_one_trains(start, tmp_path, dtype):
    """Adapters are sharded with a base of another dtype; from one process to two, and back."""
    overrides = [*ADAPTED, "eval.every=1", f"model.dtype={dtype}"]
    one = start("train.steps=3", *overrides, folder="one")
    start("train.steps=1", *overrides, folder="two")
    torchrun(tmp_path, "two", "train.steps=2", *overrides)
    two = start("train.steps=3", *overrides, folder="two")
    if dtype == "float32":
        same_run(tmp_path, one, two)
        return
    # Sums in another order are rounded to 8 bits, which changes a draw now and then.
    for a, b in zip(rows_of(one)[1:], rows_of(two)[1:], strict=True):
        assert a["reward/mean"] == pytest.approx(b["reward/mean"], abs=0.1)
        assert a["policy/grad_norm"] == pytest.approx(b["policy/grad_norm"], rel=0.2)
