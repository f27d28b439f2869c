"""tools/counting.py and the rows that count: what a GPU would be given, counted without one."""

import pytest
import torch

import attention
import decoder
import rollout
from attention import Pace
from rollout import StepGraphs, generate
from tools import bench, counted, decoded, measuring
from tools.counting import Counting, as_on_cuda, without_numbers

# A layer of a decoding step: 7 products, 6 casts, 12 element-wise kernels with its two norms, and
# 15 for attention. A cast or a norm in pieces would be seen in each layer.
KERNELS_OF_A_LAYER = 40
# Once a step: the look-up, the rotary embedding, the last norm, and what the tap keeps.
KERNELS_OF_NO_LAYER = 21


# ------------------------------------------------------------------------------------- counting


def test_a_function_that_can_be_counted_by_hand():
    a = torch.ones(4, 8)
    weight = torch.ones(8, 8)
    with Counting([weight]) as counting:
        product = a @ weight
        product.view(8, 4)  # no kernel
        (product + a).to(torch.bfloat16)
    multiplied, added, cast = counting.kernels
    assert (multiplied.name, added.name, cast.name) == ("mm", "add", "_to_copy")
    assert (multiplied.part, added.part, cast.part) == ("products", "element-wise", "casts")
    assert (multiplied.read, multiplied.written) == (4 * (32 + 64), 4 * 32)
    assert multiplied.weights == 4 * 64
    assert multiplied.operations == 2 * 4 * 8 * 8
    assert (added.read, added.written, added.operations) == (4 * 64, 4 * 32, 0)
    assert (cast.read, cast.written) == (4 * 32, 2 * 32)
    assert not counting.waits


def test_look_ups_and_writes_touch_what_they_need():
    table = torch.ones(1000, 8)
    places = torch.tensor([3, 5])
    with Counting() as counting:
        table.index_select(0, places)
        table.index_copy_(0, places, torch.ones(2, 8))
        torch.ones(1, 8).expand(50, 8).clone()
    looked_up, _, copied, _, cloned = counting.kernels
    assert looked_up.read == 2 * 8 + 2 * 8 * 4
    assert looked_up.written == 2 * 8 * 4
    assert (copied.read, copied.written) == (2 * 8 + 2 * 8 * 4, 2 * 8 * 4)
    assert (cloned.read, cloned.written) == (8 * 4, 50 * 8 * 4)


def test_where_a_result_is_put_is_not_read():
    a, b = torch.ones(4, 8), torch.ones(8)
    with Counting() as counting:
        torch.add(b, a, out=a)
    (added,) = counting.kernels
    assert (added.read, added.written) == (4 * (32 + 8), 4 * 32)


def test_casts_of_weights_are_weights():
    weight = torch.ones(8, 8)
    a = torch.ones(4, 8, dtype=torch.bfloat16)
    with Counting([weight]) as counting:
        a @ weight.to(torch.bfloat16).T
    cast, product = counting.kernels
    assert (cast.weights, product.weights) == (4 * 64, 2 * 64)


def test_joined_weights_are_weights_and_what_is_joined_with_others_is_not():
    weight, other = torch.ones(8, 8), torch.ones(8, 8)
    a = torch.ones(4, 8)
    with Counting([weight]) as counting:
        a @ torch.cat([weight, weight]).T
        a @ torch.cat([weight, other]).T
    _, of_weights, _, of_both = counting.kernels
    assert (of_weights.weights, of_both.weights) == (4 * 128, 0)


def test_waits_are_seen():
    numbers = torch.tensor([1.0, 0.0])
    with Counting() as counting:
        numbers.sum().item()
        numbers.nonzero()
        numbers[numbers > 0]
        torch.tensor([1, 2])
    assert counting.waits == ["_local_scalar_dense", "nonzero", "index", "lift_fresh"]


def test_as_on_cuda_takes_the_ways_of_a_gpu():
    with without_numbers():
        a = torch.ones(2, 4, 16, 64, dtype=torch.bfloat16, requires_grad=True)
        weight = torch.ones(64, requires_grad=True)
    with as_on_cuda(), Counting() as counting:
        attended = attention.grouped_query_attention(a[:, :, :4], a[:, :2], a[:, :2], 1.0)
        torch.nn.functional.rms_norm(attended.float(), (64,), weight, 1e-6).sum().backward()
    names = [kernel.name for kernel in counting.kernels]
    assert names.count("_scaled_dot_product_flash_attention") == 1
    assert names.count("_scaled_dot_product_flash_attention_backward") == 1
    assert names.count("native_layer_norm") == 1


# ------------------------------------------------------------------------------ a decoding step


@pytest.fixture
def policy_without_numbers(make_policy):
    with without_numbers():
        return make_policy(dtype=torch.bfloat16)


def test_a_step_launches_few_kernels_and_never_more(policy_without_numbers):
    """Neither casts nor unfused norms come back, and a later step is no more work."""
    policy = policy_without_numbers
    with as_on_cuda():
        waves = [counted.wave_of(policy, 4, 2, length=30, visual=20, own=own) for own in (16, 300)]
        early, late = (counted.step_of(wave) for wave in waves)
    in_decoder = [kernel for kernel in early if kernel.part != "sampling"]
    assert len(in_decoder) <= policy.depth * KERNELS_OF_A_LAYER + KERNELS_OF_NO_LAYER
    assert [kernel.name for kernel in early] == [kernel.name for kernel in late]
    assert sum(kernel.part == "casts" for kernel in early) <= 6 * policy.depth + 1


def test_products_of_a_policy_on_a_cpu_are_counted(make_policy, monkeypatch):
    """A CPU may compute them by a function whose operations nobody counts."""
    monkeypatch.setattr(decoder, "USES_ONEDNN", True)
    monkeypatch.setattr(decoder, "FEW_ROWS", 4)
    policy = make_policy()
    kernels = counted.step_of(counted.wave_of(policy, 4, 2, length=30, visual=20, own=16))
    modules = policy.hf.model.language_model.layers.modules()
    weights = sum(x.weight.numel() for x in modules if isinstance(x, torch.nn.Linear))
    # Two operations for each multiply-add, of 8 rows.
    assert sum(x.operations for x in kernels if x.part == "products") == 2 * 8 * weights


def test_nothing_waits_between_two_looks(make_policy, prompts, monkeypatch):
    """32 steps of decoding look twice at which responses have ended, and wait for nothing else."""
    monkeypatch.setattr(attention, "ON_CPU", Pace(look=16, own_keys=16, leave=0.5))
    policy = make_policy()
    policy.eos_ids = set()
    counting = Counting()
    waits = []  # of the host, before each step and behind it

    class Watched(StepGraphs):
        def __init__(self, *args, **kwargs):
            super().__init__(*args, **kwargs)
            counting.waits.clear()  # those of the prefill

        def run(self, shape: int) -> None:
            before = len(counting.waits)
            super().run(shape)
            waits.append((before, len(counting.waits)))

    monkeypatch.setattr(rollout, "StepGraphs", Watched)
    with counting:
        generate(policy, prompts, 2, 33, key=(0, 0), capture=counted.CAPTURE)
    assert waits == [(1, 1)] * 16 + [(2, 2)] * 16


# ------------------------------------------------------------------------------------- the rows


def test_rows_that_count_print_tables_and_write_numbers(monkeypatch, capsys, make_policy):
    def settings():
        wave = counted.wave_of(make_policy(), 4, 2, length=30, visual=20, own=16, leaving=True)
        yield "tiny", counted.step_of(wave)

    monkeypatch.setattr(counted, "settings", settings)
    (row,) = bench.measure(["count"])
    assert row["setting"] == "tiny"
    *parts, together = row["counted"].values()
    assert together["kernels"] == sum(part["kernels"] for part in parts) > 100
    assert "together" in capsys.readouterr().out


def test_an_update_is_counted_in_both_directions(policy_without_numbers, monkeypatch):
    monkeypatch.setattr(counted, "PROMPT", 30)
    monkeypatch.setattr(counted, "VISUAL", 20)
    monkeypatch.setattr(counted, "NEW", 10)
    with as_on_cuda():
        forward, backward = map(counted.sums, counted.update_of(policy_without_numbers))
    assert 2 * forward["teraflop"] == pytest.approx(backward["teraflop"], rel=0.3)
    assert forward["kernels"] < backward["kernels"]


def test_speed_is_measured_beside_its_bound(monkeypatch, capsys):
    measuring.policy_of.cache_clear()
    monkeypatch.setattr(decoded, "SIZES", {"3M": measuring.SIZES["3M"]})
    monkeypatch.setattr(decoded, "NEW", 4)
    monkeypatch.setattr(decoded, "ROUNDS", 1)
    with without_numbers():
        tiny = measuring.policy_of("3M")
    monkeypatch.setattr(decoded, "released_policy", lambda name: tiny)
    measuring.policy_of.cache_clear()
    measured, on_paper = bench.measure(["decode"])
    assert measured["counted"]["weights"] > 0.005
    assert measured["bound"] > 0
    assert "tokens_per_second" not in on_paper
    assert "tokens/s" in capsys.readouterr().out
    measuring.policy_of.cache_clear()
