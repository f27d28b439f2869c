"""tools/bench.py and tools/estimate.py: what is compared is equal work, and ratios are ratios."""

import itertools
import json
import mmap
import re
import time
from functools import partial
from types import SimpleNamespace

import pytest
import torch

import rollout
from attention import ON_CPU, Decoding
from tools import bench, estimate, measuring


@pytest.fixture
def fresh_policy():
    """Rows share one policy and change it, so that tests start and end without it."""
    measuring.policy_of.cache_clear()
    yield measuring.policy_of
    measuring.policy_of.cache_clear()


# -------------------------------------------------------------------------------------- measuring


def test_the_ratio_is_theirs_over_ours(monkeypatch):
    times = iter([1.0, 3.0, 2.0, 2.0, 1.0, 2.0])  # by turns: ours, theirs
    monkeypatch.setattr(measuring, "seconds", lambda way: next(times))
    calls = []
    measured = measuring.compare(
        "row",
        "setting",
        ours=lambda: calls.append("ours"),
        theirs=lambda: calls.append("theirs"),
        rounds=3,
        target="> 1",
    )
    assert calls == ["ours", "theirs"]  # the warm-up, which is not timed
    assert (measured["ours"], measured["theirs"]) == (1.0, 2.0)
    assert (measured["low"], measured["ratio"], measured["high"]) == (1.0, 2.0, 3.0)
    assert "ratio  2.00 (1.00 … 3.00)" in measuring.line(measured)


def test_memory_that_is_held_for_a_moment_is_seen():
    def job():
        # Straight from the system: what earlier tests freed could serve a tensor without growth.
        with mmap.mmap(-1, 50 << 20) as block:
            for _ in range(50):
                block.write(bytes([1]) * (1 << 20))
            time.sleep(0.1)  # fifty looks

    assert 45 < measuring.growth_of_memory(job) < 100


@pytest.mark.parametrize("visual", [100, 200, 600])
def test_prompts_have_the_visual_tokens_that_are_asked_for(fresh_policy, visual):
    first, second = measuring.prompts_of(fresh_policy("3M"), visual, 2)
    assert int(first.visual_mask.sum()) == int(second.visual_mask.sum()) == visual
    assert len(first.input_ids) == len(second.input_ids)
    assert not torch.equal(first.pixel_values, second.pixel_values)


# ------------------------------------------------------------------------------------------- rows


def test_both_ways_of_an_update_give_the_same(fresh_policy):
    gradients = []
    logprobs = []
    for way in ("packed", "padded"):
        logprobs.append(bench.one_update("3M", 100, way)())
        head = fresh_policy("3M").hf.lm_head.weight
        gradients.append(head.grad.clone())
    torch.testing.assert_close(*logprobs, rtol=0, atol=1e-4)  # float32, sums in another order
    torch.testing.assert_close(*gradients, rtol=1e-3, atol=1e-3 * float(gradients[0].abs().max()))


def test_both_ways_of_scoring_run_and_leave_gradients_only_if_asked():
    for way, backward in itertools.product(("chunked", "full"), (False, True)):
        bench.one_scoring(way, tokens=8, vocabulary=50, backward=backward)()


def test_all_ways_of_the_signals_of_credit_run(fresh_policy, monkeypatch):
    monkeypatch.setattr(bench, "NEW", 3)
    blind = bench.one_signal_of_credit("3M", 100, "blind")()
    seeing = bench.one_signal_of_credit("3M", 100, "seeing")()
    assert blind.shape == seeing.shape == (bench.GROUP, 3)
    assert (blind - seeing).abs().min() > 0
    recorded = bench.one_signal_of_credit("3M", 100, "recording")()
    plain = bench.one_signal_of_credit("3M", 100, "sampling")()
    assert torch.equal(recorded.tokens, plain.tokens)
    assert recorded.entropy is not None and plain.entropy is None


@pytest.mark.parametrize("way", ["ours", "generate", "naive"])
def test_all_ways_of_a_rollout_run(fresh_policy, way):
    bench.one_rollout("3M", 100, way, new=3)()


def test_operations_of_packed_and_padded_rows(fresh_policy):
    policy = fresh_policy("3M")

    def counted(group: int, packed: bool) -> float:
        return bench.operations(policy, 100, 120, new=64, group=group, packed=packed)

    # Padded rows cost the same each; packed ones share the image and the prompt.
    assert counted(8, packed=False) == pytest.approx(8 * counted(1, packed=False))
    assert counted(1, packed=True) < counted(1, packed=False) < 1.1 * counted(1, packed=True)
    assert 2 < counted(8, packed=False) / counted(8, packed=True) < 8


def test_the_growth_of_a_power_is_its_exponent():
    axis = (2, 4, 8)
    assert bench.exponent(axis, tuple(3 * x**0.5 for x in axis)) == pytest.approx(0.5)
    for points in bench.GROWING.values():
        changing = [values for values in zip(*points, strict=True) if len(set(values)) > 1]
        assert len(changing) == 1


def test_without_trl_the_row_says_so(monkeypatch, capsys):
    monkeypatch.setattr(bench.importlib.util, "find_spec", lambda name: None)
    assert list(bench.step()) == []
    assert "pip install -r requirements-bench.txt" in capsys.readouterr().out


# ------------------------------------------------------------------------------------ command line


def test_an_unknown_row_is_named_with_those_there_are():
    with pytest.raises(SystemExit, match="no row updat; rows: update, rollout"):
        bench.main(["updat"])


def test_rows_are_printed_and_written(tmp_path, monkeypatch, capsys):
    def row():
        yield measuring.measurement(
            "mine", "here", ours=1.0, theirs=2.0, ratio=2.0, low=1.5, high=2.5, target=">= 2"
        )

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(bench, "ROWS", {"mine": row, "other": None})
    threads = torch.get_num_threads()
    bench.main(["mine"])
    torch.set_num_threads(threads)
    written = json.loads((tmp_path / "bench.json").read_text())
    assert written["torch"] == torch.__version__
    assert [measured["row"] for measured in written["rows"]] == ["mine"]
    assert "target >= 2" in capsys.readouterr().out


@pytest.mark.slow
def test_a_job_measures_in_a_process_of_its_own():
    logits = 512 * 20000 * 4 / 2**20  # in MB, of 512 tokens over 20000 words
    assert bench.peak_megabytes("scoring", "full", 512, 20000, 1) > logits
    with pytest.raises(RuntimeError, match="no job 'nothing'"):
        bench.peak_megabytes("nothing", "3M", 100, "ours")


# ---------------------------------------------------------------------------------------- on paper


def amounts(name: str) -> dict[str, float]:
    return {label: amount for label, amount, _ in estimate.plan(**estimate.SETUPS[name])}


@pytest.mark.parametrize(
    "name, trained, update, rollout, hours",
    [
        ("Qwen2.5-VL-3B on one GPU of 80 GB", 3.09, 74.5, 64.0, (4.8, 9.3)),
        ("Qwen2.5-VL-7B on eight", 7.62, 43.9, 47.5, (1.3, 1.7)),
        ("Qwen2.5-VL-3B on one GPU of 24 GB, by LoRA", 0.03, 12.0, 10.8, (5.1, 14.4)),
    ],
)
def test_the_plans_of_the_released_models(name, trained, update, rollout, hours):
    planned = amounts(name)
    labels = list(planned)
    assert any(f"16 · {trained:.2f} B" in label for label in labels[:2])
    together = labels.index("together, at the update")
    assert planned["together, at the update"] == pytest.approx(update, abs=0.05)
    parts = [planned[label] for label in labels[:together]]
    assert sum(parts) == pytest.approx(planned["together, at the update"])
    together = labels.index("together, in the rollout")
    assert planned["together, in the rollout"] == pytest.approx(rollout, abs=0.05)
    parts = [planned[label] for label in labels[together - 3 : together]]
    assert sum(parts) == pytest.approx(planned["together, in the rollout"])
    assert [label.rpartition(", ")[2] for label in labels[-2:]] == ["with graphs", "without"]
    assert [planned[label] for label in labels[-2:]] == pytest.approx(hours, abs=0.05)


@pytest.mark.parametrize(
    "name, billions",
    [("Qwen2.5-VL-3B on one GPU of 80 GB", 3.75), ("Qwen2.5-VL-7B on eight", 8.29)],
)
def test_released_models_have_as_many_weights(name, billions):
    """In billions, vision tower included, as their pages on the hub say."""
    setup = estimate.SETUPS[name]
    _, weights = estimate.released_model(setup["text"], setup["tied"])
    assert weights.whole / 1e9 == pytest.approx(billions, abs=0.005)


# As far as known, those of Qwen/Qwen3-VL-…-Instruct: of the text model hidden size, intermediate
# size, layers, query heads; of the vision tower depth, hidden size, intermediate size.
QWEN3 = {
    "2B": ((2048, 6144, 28, 16), (24, 1024, 4096), True, 2.13),
    "4B": ((2560, 9728, 36, 32), (24, 1024, 4096), True, 4.44),
    "8B": ((4096, 12288, 36, 32), (27, 1152, 4304), False, 8.77),
}


@pytest.mark.parametrize("name", QWEN3)
def test_the_weights_of_qwen3_vl_are_counted(name):
    from transformers import Qwen3VLConfig, Qwen3VLForConditionalGeneration

    (hidden, inner, layers, heads), tower, tied, billions = QWEN3[name]
    config = Qwen3VLConfig(
        text_config={
            "hidden_size": hidden,
            "intermediate_size": inner,
            "num_hidden_layers": layers,
            "num_attention_heads": heads,
            "num_key_value_heads": 8,
            "head_dim": 128,
            "vocab_size": 151936,
        },
        vision_config={
            "depth": tower[0],
            "hidden_size": tower[1],
            "intermediate_size": tower[2],
            "out_hidden_size": hidden,
            "num_heads": 16,
            "num_position_embeddings": 2304,
            "deepstack_visual_indexes": [8, 16, 24] if name == "8B" else [5, 11, 17],
        },
        tie_word_embeddings=tied,
    )
    with torch.device("meta"):
        hf = Qwen3VLForConditionalGeneration(config)
    assert estimate.weights_of(hf).whole / 1e9 == pytest.approx(billions, abs=0.005)


def test_what_an_update_holds_on_paper(fresh_policy):
    config = fresh_policy("3M").hf.config

    def held(**changes) -> float:
        usual = {"group": 8, "new": 64, "width": 4, "checkpointing": False}
        return sum(estimate.update_bytes(config, 120, 100, **usual | changes))

    assert held(checkpointing=True) < held() / 2
    assert held(frozen=True) < held()
    assert held(width=2) < held() < held(group=9) < held(group=9, new=80)


def test_the_caches_on_paper_are_those_of_a_rollout(fresh_policy, monkeypatch):
    """As many bytes as decoding allocates, and as many tokens as max_cache_tokens counts."""
    policy = fresh_policy("3M")
    prompts = measuring.prompts_of(policy, 100, 2)
    policy.eos_ids = set()
    made = []

    class Kept(Decoding):
        def __init__(self, *arguments, **options):
            super().__init__(*arguments, **options)
            made.append(self)

    rollout.generate(policy, prompts, 3, 20, (0, 0), bench.CAPTURE, decoding=Kept)
    (layout,) = made
    wave = estimate.Decoding(
        policy.hf.config.text_config,
        prompts=2,
        prompt=len(prompts[0].input_ids),
        group=3,
        new=20,
        width=4,
        pace=ON_CPU,
    )
    pairs = (*layout.shared.values(), *layout.own.values())
    allocated = sum(tensor.nbytes for pair in pairs for tensor in pair)
    assert wave.cache_bytes() == allocated
    attention = layout.bias.nbytes + sum(rows.nbytes for rows in layout.tap.rows.values())
    of_tokens = 6 * 20 * (8 + 1 + 4 + 4 + 4 * 4)  # ids, mask, log-probs, uniforms, signals
    assert wave.row_bytes() == attention + of_tokens
    count = partial(rollout.waves_within, [wave.prompt] * 2, 3, 20, pace=ON_CPU)
    one_wave = count(budget=wave.cached)
    two_waves = count(budget=wave.cached - 1)
    assert (len(one_wave), len(two_waves)) == (1, 2)


def test_the_head_holds_more_in_16_bits_where_slopes_of_chunks_are_kept():
    text = SimpleNamespace(vocab_size=1000, hidden_size=10)
    gradient = 4 * 1000 * 10
    assert estimate.head_bytes(text, 512, width=4) == 4 * 512 * 1000 + 2 * gradient
    slopes = 2 * 4 * 512 * 1000  # of four chunks; they are laid side by side once more
    assert estimate.head_bytes(text, 10_000, width=2) == 2 * slopes + 2 * gradient


def test_what_an_update_holds_beside_frozen_weights(fresh_policy):
    """By LoRA an update holds neither the head's gradient nor the vision tower's rows."""
    config = fresh_policy("40M").hf.config

    def held(**changes) -> float:
        usual = {"group": 4, "new": 64, "width": 4, "checkpointing": True, "rank": 16}
        return sum(estimate.update_bytes(config, 120, 100, **usual | changes))

    assert held() == held(frozen=True) < held(rank=0, frozen=True) < held(rank=0)
    assert held(checkpointing=False) < held(checkpointing=False, rank=64)


def test_the_adapters_of_the_released_model_by_hand():
    """3B: rank 16 times the widths of seven linear layers, in 36 layers."""
    _, weights = estimate.released_model(**estimate.MODELS["3B"], rank=16)
    attention = (2048 + 2048) + 2 * (2048 + 256) + (2048 + 2048)
    mlp = 3 * (2048 + 11008)
    assert weights.adapters == weights.trained == 36 * 16 * (attention + mlp) == 29_933_568


def printed(capsys, *arguments: str) -> str:
    estimate.main(list(arguments))
    return capsys.readouterr().out


def test_the_plan_of_ones_own_figures_says_what_fits(capsys):
    lora = ["--model", "3B", "--memory", "24", "--lora-rank", "16"]
    told = printed(capsys, *lora, "--prompt", "700", "--response", "1024", "--group", "8")
    assert "on 1 × 24 GB, LoRA of rank 16, 8 prompts per GPU and step" in told
    assert "It fits: 13.5 GB of 24 GB, 1.5 GB of it for CUDA." in told
    limits = dict(re.findall(r"^  (rollout\.\w+) +up to (\d+), with", told, re.MULTILINE))
    # The largest values that it names fit, and the next ones do not.
    longest, group = int(limits["rollout.max_new_tokens"]), int(limits["rollout.group_size"])
    assert longest > 1024 and group > 8
    assert "It fits" in printed(capsys, *lora, "--response", str(longest))
    assert "It does not fit" in printed(capsys, *lora, "--response", str(longest + 256))
    assert "It fits" in printed(capsys, *lora, "--group", str(group))
    assert "It does not fit" in printed(capsys, *lora, "--group", str(group + 1))


def test_a_plan_that_cannot_fit_says_so(capsys):
    told = printed(capsys, "--model", "3B", "--memory", "24")
    assert "all weights but the vision tower" in told
    assert "It does not fit: 76.0 GB of 24 GB" in told
    assert told.count("no value is small enough") == 3
    assert "LoRA needs less: --lora-rank 16" in told
    with pytest.raises(SystemExit):
        estimate.main(["--model", "3B", "--group", "0"])
    assert "--group: expected more than 0, found 0" in capsys.readouterr().err
