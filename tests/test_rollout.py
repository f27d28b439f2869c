"""rollout.py: shared-prompt decoding against other ways to the same numbers.

These are transformers' generate, the packed forward, and the rollout itself in other batches.
"""

import contextlib
import doctest
import itertools
from types import SimpleNamespace

import pytest
import torch

import attention
import decoder
import rollout
from attention import Pace
from model import FAMILIES
from rollout import generate, join, keyed_generator, sample_tokens

DYCO = SimpleNamespace(layers=[0, -1], shift="fisher_rao", text_scope="after_image")


def eager_to_end(policy):
    """Make the end token likely, so that responses end at many different lengths."""
    policy.eos_ids = set(range(0, 40))
    return policy


def test_examples():
    assert doctest.testmod(rollout).failed == 0 < doctest.testmod(rollout).attempted


@pytest.mark.parametrize("family", FAMILIES)
def test_greedy_equals_generate_of_transformers(make_policy, prompts):
    """Token for token, one prompt at a time, with the placeholder ids suppressed there too."""
    policy = make_policy(seed=5)
    ours = generate(policy, prompts, 2, 20, key=None)
    for index, prompt in enumerate(prompts):
        policy.hf.model.rope_deltas = None
        policy.hf.model.language_model.config._attn_implementation = "eager"
        images = {}
        if prompt.pixel_values is not None:
            images = {"pixel_values": prompt.pixel_values, "image_grid_thw": prompt.image_grid_thw}
        prompt_and_response = policy.hf.generate(
            input_ids=prompt.input_ids[None],
            mm_token_type_ids=prompt.visual_mask[None].int(),
            **images,
            attention_mask=torch.ones(1, len(prompt.input_ids), dtype=torch.long),
            max_new_tokens=20,
            do_sample=False,
            suppress_tokens=policy.suppressed.tolist(),
        )
        theirs = prompt_and_response[0, len(prompt.input_ids) :]
        for row in (2 * index, 2 * index + 1):
            assert ours.tokens[row][ours.mask[row]].tolist() == theirs.tolist()


def test_one_prefill_serves_sampled_and_greedy_responses(make_policy, prompts):
    """The last response of a group is the greedy one, the others are as sampled without it."""
    policy = eager_to_end(make_policy(seed=5))
    both = generate(policy, prompts, 3, 20, key=(0, 1), greedy_last=True)
    sampled = generate(policy, prompts, 2, 20, key=(0, 1))
    greedy = generate(policy, prompts, 1, 20, key=None)
    for index in range(len(prompts)):
        *first_two, last = both.texts[3 * index : 3 * index + 3]
        assert first_two == sampled.texts[2 * index : 2 * index + 2]
        assert last == greedy.texts[index]
    assert both.texts[2] not in both.texts[:2]


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("scope", ["after_image", "all"])
def test_decoding_equals_scoring(make_policy, prompts, scope):
    """Log-probabilities and signals recorded while decoding are those of the packed forward.

    Both agree to 1e-4. Shifts are the least precise: a square root of small probabilities.
    """
    policy = eager_to_end(make_policy(temperature=0.8))
    settings = SimpleNamespace(**vars(DYCO) | {"text_scope": scope})
    decoded = generate(policy, prompts, 5, 25, (0, 1), settings)
    lengths = decoded.mask.sum(1)
    assert lengths.unique().numel() > 4, "rows should leave the batch at different steps"
    scored = policy(prompts, decoded.tokens, decoded.mask, policy.tap(settings))
    torch.testing.assert_close(decoded.logprobs, scored.logprobs, rtol=0, atol=1e-4)
    for name in decoded.signals._fields:
        a, b = getattr(decoded.signals, name), getattr(scored.signals, name)
        torch.testing.assert_close(a, b, rtol=0, atol=1e-4, msg=name)
    assert decoded.signals.visual_mass[:5].sum() > 0
    assert decoded.signals.visual_mass[5:10].sum() == 0  # the second has no image
    assert decoded.signals.text_shift[0, 1 : int(lengths[0])].ne(0).any()


@pytest.mark.parametrize("family", FAMILIES)
def test_recorded_while_decoding_equals_scoring(make_policy, prompts, family):
    """Entropies and similarities to the image, of rows that leave at different steps, in waves."""
    policy = eager_to_end(make_policy(temperature=0.8))
    names = ("entropy", "image_similarity")
    decoded = generate(policy, prompts, 5, 25, key=(0, 1), record=names, max_cache_tokens=400)
    scored = policy(prompts, decoded.tokens, decoded.mask, similarity=True)
    for name in names:
        recorded = getattr(decoded, name)
        torch.testing.assert_close(recorded, getattr(scored, name), rtol=0, atol=1e-4, msg=name)
        assert recorded[:5][decoded.mask[:5]].abs().min() > 0
    assert decoded.image_similarity[5:10].eq(0).all()  # the second prompt has no image
    without = generate(policy, prompts, 5, 25, key=(0, 1))
    assert torch.equal(without.tokens, decoded.tokens)
    assert without.entropy is None and without.image_similarity is None
    joined = join([decoded, decoded.select([1])])
    for name in names:
        again = getattr(joined, name)[-5:, : decoded.mask.shape[1]]
        torch.testing.assert_close(again, getattr(decoded, name)[5:10] * decoded.mask[5:10])


@pytest.mark.parametrize("family", FAMILIES)
def test_bfloat16_decoding_is_close_to_scoring(make_policy, prompts):
    """Two kernels round differently, and keys are cached in 16 bits.

    With 8 bits, log-probabilities of order 6 agree to some 0.1.
    """
    policy = make_policy(dtype=torch.bfloat16)
    decoded = generate(policy, prompts, 4, 12, (0, 0), DYCO)
    scored = policy(prompts, decoded.tokens, decoded.mask, policy.tap(DYCO))
    assert 0 < (decoded.logprobs - scored.logprobs).abs().max() < 0.15
    for a, b in zip(decoded.signals, scored.signals, strict=True):
        assert a.dtype == torch.float32
        assert (a - b).abs().max() < 0.1


def test_the_prefill_keeps_keys_and_values_and_nothing_else(make_policy, prompts):
    """They are cut from tensors with queries, which are several times as large."""
    policy = make_policy()
    layout = attention.PackedGroups(prompts, [[] for _ in prompts], keep_keys=True)
    positions = torch.cat([policy.prompt_positions(prompt) for prompt in prompts], dim=1)
    with torch.no_grad():
        policy.decoder(policy.embed(prompts), policy.rotary(positions[:, None]), layout)
    assert len(layout.kept) == policy.depth
    for pairs in layout.kept.values():
        for x in itertools.chain(*pairs):
            assert x.untyped_storage().nbytes() == x.nbytes


def test_what_a_rollout_returns_can_meet_a_backward(make_policy, prompts):
    decoded = generate(make_policy(), prompts, 2, 5, (0, 0), DYCO, record=rollout.RECORDABLE)
    returned = [value for value in vars(decoded).values() if isinstance(value, torch.Tensor)]
    assert len(returned) == 6
    for x in [*returned, *decoded.signals]:
        assert not x.is_inference()


@pytest.mark.parametrize("family", FAMILIES)
def test_what_is_recorded_in_bfloat16_is_float32_and_close_to_scoring(make_policy, prompts):
    """Entropies of order 7 of logits with 8 bits; suppressed ids have the lowest float32."""
    policy = make_policy(dtype=torch.bfloat16)
    decoded = generate(policy, prompts, 4, 12, (0, 0), record=rollout.RECORDABLE)
    scored = policy(prompts, decoded.tokens, decoded.mask, similarity=True)
    for name in rollout.RECORDABLE:
        recorded = getattr(decoded, name)
        assert recorded.dtype == torch.float32
        assert (recorded - getattr(scored, name)).abs().max() < 0.1, name
        assert recorded[:4][decoded.mask[:4]].abs().min() > 0


def test_masks_end_tokens_and_truncation(make_policy, prompts):
    policy = eager_to_end(make_policy())
    batch = generate(policy, prompts, 6, 15, (0, 0), DYCO)
    assert batch.truncated.any()
    assert not batch.truncated.all()
    for row, truncated in enumerate(batch.truncated.tolist()):
        length = int(batch.mask[row].sum())
        padding = batch.mask.shape[1] - length
        assert batch.mask[row].tolist() == [True] * length + [False] * padding

        ids = batch.tokens[row, :length].tolist()
        assert not any(token in policy.eos_ids for token in ids[:-1])
        assert (ids[-1] in policy.eos_ids) == (not truncated)
        assert length == 15 or not truncated
        said = ids if truncated else ids[:-1]
        assert batch.texts[row] == policy.tokenizer.decode(said)
        for x in (batch.tokens, batch.logprobs, *batch.signals):
            assert x[row, length:].eq(0).all()
        assert batch.logprobs[row, :length].lt(0).all()


def test_nothing_depends_on_the_batch(make_policy, prompts, monkeypatch):
    """The same prompt and response index give the same tokens.

    They do alone, in another order, in waves, and whether or not finished rows are removed.
    """
    policy = eager_to_end(make_policy())
    whole = generate(policy, prompts, 4, 20, (3, 7), DYCO)

    def check(order, **options):
        part = generate(policy, [prompts[i] for i in order], 4, 20, (3, 7), DYCO, **options)
        for place, index in enumerate(order):
            for response in range(4):
                before, after = 4 * index + response, 4 * place + response
                a, b = whole.mask[before], part.mask[after]
                assert whole.tokens[before][a].tolist() == part.tokens[after][b].tolist()
                for x, y in zip(whole.signals, part.signals, strict=True):
                    torch.testing.assert_close(x[before][a], y[after][b], rtol=0, atol=1e-5)

    check([2])
    check([2, 0])
    check([0, 1, 2], max_cache_tokens=1)
    monkeypatch.setattr(rollout, "PREFILL_TOKENS", 1)
    check([0, 1, 2])
    for pace in (
        Pace(look=1, own_keys=16, leave=0.0),
        Pace(look=1, own_keys=1, leave=1.0),
        Pace(look=16, own_keys=256, leave=0.5),
    ):
        monkeypatch.setattr(attention, "ON_CPU", pace)
        check([0, 1, 2])
    other_step = generate(policy, prompts, 4, 20, (3, 8))
    assert not torch.equal(other_step.tokens[:, 0], whole.tokens[:, 0])


def test_responses_of_a_group_differ(make_policy, prompts):
    batch = generate(make_policy(), prompts, 8, 12, (0, 0))
    assert len(set(batch.texts[:8])) > 4


def test_another_temperature_than_the_policys(make_policy, prompts):
    cool = make_policy(temperature=0.5)
    warm = make_policy(temperature=1.5)
    warmed = generate(cool, prompts, 2, 8, (0, 0), temperature=1.5)
    assert warmed.texts == generate(warm, prompts, 2, 8, (0, 0)).texts
    assert warmed.texts != generate(cool, prompts, 2, 8, (0, 0)).texts


def test_sampling_follows_the_distribution():
    """20,000 draws over 8 ids.

    The chi-square statistic with 6 degrees of freedom exceeds 35 once in 200,000 runs.
    """
    lowest = torch.finfo(torch.float32).min
    logits = torch.tensor([0.3, -1.0, 1.5, lowest, 0.0, 2.0, -0.5, -torch.inf])
    draws = 20_000
    uniforms = torch.rand(draws, generator=torch.Generator().manual_seed(0))
    tokens, logprobs = sample_tokens(logits.expand(draws, -1), uniforms)
    torch.testing.assert_close(logprobs, logits.log_softmax(-1)[tokens])
    counts = torch.bincount(tokens, minlength=8)
    expected = draws * logits.softmax(-1)
    assert counts[3] == counts[7] == 0
    seen = expected > 0
    assert ((counts - expected)[seen] ** 2 / expected[seen]).sum() < 35


def test_sampling_at_the_ends_of_the_unit_interval():
    """The largest float32 below 1, and 0, draw the last and first ids that have any probability."""
    logits = torch.tensor([[-torch.inf, 0.0, 1.0, -torch.inf]] * 2)
    ids, _ = sample_tokens(logits, torch.tensor([0.0, 1 - 2**-24]))
    assert ids.tolist() == [1, 2]


@pytest.mark.parametrize("vocabulary", [361, 512])
def test_logits_that_are_not_numbers_give_an_id(vocabulary):
    """The run says elsewhere that the policy is broken; an id out of range would end a GPU."""
    logits = torch.full((2, vocabulary), torch.nan)
    ids, _ = sample_tokens(logits, torch.tensor([0.0, 0.99]))
    assert (ids >= 0).all()
    assert (ids < vocabulary).all()


@pytest.mark.parametrize("vocabulary", [361, 512, 32000])
def test_blocks_of_the_vocabulary_draw_what_one_sum_would(vocabulary):
    generator = torch.Generator().manual_seed(0)
    logits = 3 * torch.randn(200, vocabulary, generator=generator)
    uniforms = torch.rand(200, generator=generator)
    cumulative = logits.double().softmax(-1).cumsum(-1)
    expected = torch.searchsorted(cumulative, uniforms.double()[:, None], right=True)[:, 0]
    ids, logprobs = sample_tokens(logits, uniforms)
    assert torch.equal(ids, expected)
    exact = logits.double().log_softmax(-1).gather(-1, ids[:, None])[:, 0]
    torch.testing.assert_close(logprobs.double(), exact, rtol=0, atol=1e-5)


def test_placeholders_are_never_sampled(make_policy, prompts):
    """A policy that wants nothing but image placeholders cannot have them."""
    policy = make_policy()
    head = policy.hf.lm_head.weight
    with torch.no_grad():
        head[policy.suppressed] = 50 * torch.sign(head[policy.suppressed])
    batch = generate(policy, prompts, 4, 10, (0, 0))
    assert not torch.isin(batch.tokens[batch.mask], policy.suppressed).any()
    scored = policy(prompts, batch.tokens, batch.mask)
    torch.testing.assert_close(batch.logprobs, scored.logprobs, rtol=0, atol=1e-4)


def test_select_and_join_are_inverse(make_policy, prompts):
    batch = generate(eager_to_end(make_policy()), prompts, 3, 15, (0, 0), DYCO)
    again = join([batch.select([0]), batch.select([1, 2])])
    width = again.tokens.shape[1]
    assert again.texts == batch.texts
    assert again.prompts == batch.prompts
    for name in ("tokens", "mask", "logprobs"):
        assert torch.equal(getattr(again, name), getattr(batch, name)[:, :width])
    for a, b in zip(again.signals, batch.signals, strict=True):
        assert torch.equal(a, b[:, :width])
    assert torch.equal(again.truncated, batch.truncated)


@pytest.mark.parametrize("family", FAMILIES)
def test_products_by_onednn_sample_the_same(make_policy, prompts, monkeypatch):
    if not hasattr(torch.ops.mkldnn, "_linear_pointwise"):
        pytest.skip("this PyTorch is built without oneDNN")
    policy = eager_to_end(make_policy())
    monkeypatch.setattr(decoder, "USES_ONEDNN", False)
    expected = generate(policy, prompts, 4, 16, (0, 1), DYCO)
    monkeypatch.setattr(decoder, "USES_ONEDNN", True)
    monkeypatch.setattr(decoder, "FEW_ROWS", 0)
    output = generate(policy, prompts, 4, 16, (0, 1), DYCO)
    assert torch.equal(output.tokens, expected.tokens)
    torch.testing.assert_close(output.logprobs, expected.logprobs, rtol=0, atol=1e-5)
    torch.testing.assert_close(output.signals, expected.signals, rtol=0, atol=1e-5)


def test_keyed_generators_depend_on_the_whole_key():
    def draw(*key) -> tuple[float, ...]:
        return tuple(torch.rand(4, generator=keyed_generator(*key)).tolist())

    assert draw(0, 1, 2) == draw(0, 1, 2)
    keys = [(0, 1, 2), (0, 1, 3), (0, 2, 2), (1, 1, 2), (0, 12), (0, "1", 2)]
    assert len({draw(*key) for key in keys}) == len(keys)


@pytest.mark.parametrize(
    "family, capture", [("qwen2_5_vl", None), ("qwen2_5_vl", DYCO), ("qwen3_vl", DYCO)]
)
def test_a_step_is_one_graph(make_policy, prompts, monkeypatch, capture):
    """A compiler takes a whole step without a break, and the rollout stays what it was.

    So neither its shapes nor its branches depend on data, before and after rows have left, of each
    prompt another number. That it reads no number either is a test of tests/tools/test_count.py.
    """
    policy = eager_to_end(make_policy())
    monkeypatch.setattr(attention, "ON_CPU", Pace(look=4, own_keys=32, leave=0.9))
    eager = generate(policy, prompts, 4, 25, (0, 1), capture)
    # Of each step: how many rows and prompts, and whether all prompts have as many rows.
    grids = []

    class Compiled(rollout.StepGraphs):
        def __init__(self, step, enabled, policy):
            torch.compiler.reset()
            wave = step.__self__
            compiled = torch.compile(step, fullgraph=True, backend="eager", dynamic=False)

            def watched():
                layout = wave.layout
                assert len(layout.shared[0][0]) == layout.count
                grids.append((len(wave.alive), layout.count, layout.full))
                compiled()

            super().__init__(watched, enabled, policy)

    monkeypatch.setattr(rollout, "StepGraphs", Compiled)
    compiled = generate(policy, prompts, 4, 25, (0, 1), capture)
    assert grids[0] == (12, 3, True)
    assert any(not is_full for *_, is_full in grids)
    assert grids[-1][1] < 3
    assert torch.equal(compiled.tokens, eager.tokens)
    assert torch.equal(compiled.mask, eager.mask)
    torch.testing.assert_close(compiled.logprobs, eager.logprobs, rtol=0, atol=1e-5)
    if capture is not None:
        for a, b in zip(compiled.signals, eager.signals, strict=True):
            torch.testing.assert_close(a, b, rtol=0, atol=1e-5)


# ------------------------------------------------------------------------------------- CUDA graphs


class FakeGraph:
    """What of torch.cuda a StepGraphs asks for, without a GPU."""

    def __init__(self, monkeypatch, capture):
        self.log = []
        handles = itertools.count()
        monkeypatch.setattr(torch.cuda, "graph_pool_handle", lambda: next(handles))
        monkeypatch.setattr(torch.cuda, "current_stream", lambda: "usual")
        monkeypatch.setattr(torch.cuda, "set_stream", lambda s: self.log.append(f"to {s}"))
        monkeypatch.setattr(torch.cuda, "CUDAGraph", lambda: self)
        monkeypatch.setattr(torch.cuda, "graph", capture)

    def replay(self):
        self.log.append("replay")


def test_a_shape_is_run_then_recorded_then_replayed(monkeypatch):
    pools = []

    @contextlib.contextmanager
    def capture(graph, pool, capture_error_mode):
        pools.append(pool)
        yield

    fake = FakeGraph(monkeypatch, capture)
    policy = SimpleNamespace(graphs=True)
    graphs = rollout.StepGraphs(lambda: fake.log.append("step"), enabled=True, policy=policy)
    for _ in range(3):
        graphs.run(shape=16)
    assert fake.log == ["step", "step", "replay", "replay"]  # the second is recorded alone
    graphs.run(shape=32)
    graphs.run(shape=32)
    graphs.forget()
    fake.log.clear()
    graphs.run(shape=16)
    assert fake.log == ["step"]
    graphs.run(shape=16)
    # What was forgotten may not be opened again, as long as anything of it is in use.
    assert pools == [0, 0, 1]


def test_a_step_that_cannot_be_recorded_runs_as_it_is(monkeypatch):
    capturing = []

    @contextlib.contextmanager
    def capture(graph, pool, capture_error_mode):
        capturing.append(True)
        try:
            yield
        finally:
            capturing.clear()
            raise RuntimeError("failed due to a previous error")

    def step():
        if capturing:
            raise RuntimeError("operation not permitted\nand more")
        fake.log.append("step")

    fake = FakeGraph(monkeypatch, capture)
    policy = SimpleNamespace(graphs=True)
    graphs = rollout.StepGraphs(step, enabled=True, policy=policy)
    graphs.run(shape=16)
    with pytest.warns(UserWarning, match="without CUDA graphs: operation not permitted$"):
        graphs.run(shape=16)
    graphs.run(shape=16)
    assert fake.log == ["step", "to usual", "step", "step"]
    assert not policy.graphs  # the next wave does not try it again


def test_a_policy_on_the_cpu_has_no_graphs_where_there_is_a_gpu(make_policy, prompts, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "graph_pool_handle", lambda: pytest.fail("a graph on a CPU"))
    generate(make_policy(), prompts, 1, 3, (0, 0))


def test_decoding_steps_run_no_hooks_of_layers(make_policy, prompts):
    """With sharded weights they would bring other streams into a step that is recorded."""
    policy = make_policy()
    calls = []
    policy.hf.model.language_model.layers[0].register_forward_pre_hook(
        lambda layer, arguments: calls.append(arguments)
    )
    generate(policy, prompts, 1, 6, (0, 0))
    assert len(calls) == 1  # the prefill
