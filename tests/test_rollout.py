"""rollout.py: shared-prompt decoding against transformers' generate, the packed forward, and itself in other batches."""

import doctest
from types import SimpleNamespace

import pytest
import torch

import model
import rollout
from rollout import generate, join, keyed_generator, sample_tokens

DYCO = SimpleNamespace(layers=[0, -1], shift="fisher_rao", text_scope="after_image")


def eager_to_end(policy):
    """Make the end token likely, so that responses end at many different lengths."""
    policy.eos_ids = set(range(0, 40))
    return policy


def test_examples():
    assert doctest.testmod(rollout).failed == 0 < doctest.testmod(rollout).attempted


def test_greedy_equals_generate_of_transformers(make_policy, prompts):
    """Token for token, one prompt at a time, with the placeholder ids suppressed there too."""
    policy = make_policy(seed=5)
    ours = generate(policy, prompts, 2, 20, key=None)
    for index, prompt in enumerate(prompts):
        policy.hf.model.rope_deltas = None
        policy.hf.model.language_model.config._attn_implementation = "eager"
        images = (
            {}
            if prompt.pixel_values is None
            else {"pixel_values": prompt.pixel_values, "image_grid_thw": prompt.image_grid_thw}
        )
        theirs = policy.hf.generate(
            input_ids=prompt.input_ids[None],
            mm_token_type_ids=prompt.visual_mask[None].int(),
            **images,
            attention_mask=torch.ones(1, len(prompt.input_ids), dtype=torch.long),
            max_new_tokens=20,
            do_sample=False,
            suppress_tokens=policy.suppressed.tolist(),
        )[0, len(prompt.input_ids) :]
        policy.hf.model.language_model.config._attn_implementation = model.ATTENTION
        for row in (2 * index, 2 * index + 1):
            assert ours.tokens[row][ours.mask[row]].tolist() == theirs.tolist()


def test_one_prefill_serves_sampled_and_greedy_responses(make_policy, prompts):
    """The last response of a group is the greedy one, the others those that are sampled without it."""
    policy = eager_to_end(make_policy(seed=5))
    both, sampled, greedy = (
        generate(policy, prompts, size, 20, key, greedy_last=last)
        for size, key, last in ((3, (0, 1), True), (2, (0, 1), False), (1, None, False))
    )
    texts = [both.texts[i : i + 3] for i in range(0, len(both.texts), 3)]
    assert [text for group in texts for text in group[:2]] == sampled.texts
    assert [group[2] for group in texts] == greedy.texts
    assert both.texts[2] not in both.texts[:2]


@pytest.mark.parametrize("scope", ["after_image", "all"])
def test_decoding_equals_scoring(make_policy, prompts, scope):
    """Behaviour log-probabilities and signals recorded while decoding are those of the packed forward. 1e-4 as the
    design asks; shifts are the least precise, a square root of small probabilities."""
    policy, settings = (
        eager_to_end(make_policy(temperature=0.8)),
        SimpleNamespace(**vars(DYCO) | {"text_scope": scope}),
    )
    found = generate(policy, prompts, 5, 25, (0, 1), settings)
    lengths = found.mask.sum(1)
    assert lengths.unique().numel() > 4, (
        "the test wants rows that leave the batch at different steps"
    )
    scored = policy(prompts, found.tokens, found.mask, policy.tap(settings))
    torch.testing.assert_close(found.logprobs, scored.logprobs, rtol=0, atol=1e-4)
    for name, a, b in zip(found.signals._fields, found.signals, scored.signals):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-4, msg=name)
    assert (
        found.signals.visual_mass[:5].sum() > 0 and found.signals.visual_mass[5:10].sum() == 0
    )  # the second has no image
    assert found.signals.text_shift[0, 1 : int(lengths[0])].ne(0).any()


def test_bfloat16_decoding_is_close_to_scoring(make_policy, prompts):
    """Two kernels round differently: with 8 bits, log-probabilities of order 6 agree to some 0.1. Keys are cached in 16 bits."""
    policy = make_policy(dtype=torch.bfloat16)
    found = generate(policy, prompts, 4, 12, (0, 0), DYCO)
    scored = policy(prompts, found.tokens, found.mask, policy.tap(DYCO))
    assert 0 < (found.logprobs - scored.logprobs).abs().max() < 0.15
    for a, b in zip(found.signals, scored.signals):
        assert a.dtype == torch.float32 and (a - b).abs().max() < 0.1


def test_masks_end_tokens_and_truncation(make_policy, prompts):
    policy = eager_to_end(make_policy())
    found = generate(policy, prompts, 6, 15, (0, 0), DYCO)
    assert found.truncated.any() and not found.truncated.all()
    for row in range(len(found.tokens)):
        length = int(found.mask[row].sum())
        ids = found.tokens[row, :length].tolist()
        assert found.mask[row].tolist() == [True] * length + [False] * (
            found.mask.shape[1] - length
        )
        assert not any(token in policy.eos_ids for token in ids[:-1])
        assert (ids[-1] in policy.eos_ids) == (not found.truncated[row])
        assert length == 15 or not found.truncated[row]
        assert found.texts[row] == policy.tokenizer.decode(
            ids[:-1] if not found.truncated[row] else ids
        )
        for x in (found.tokens, found.logprobs, *found.signals):
            assert x[row, length:].eq(0).all()
        assert found.logprobs[row, :length].lt(0).all()


def test_nothing_depends_on_the_batch(make_policy, prompts, monkeypatch):
    """The same prompt and response index give the same tokens alone, in another order, in waves, and never compacted."""
    policy = eager_to_end(make_policy())
    whole = generate(policy, prompts, 4, 20, (3, 7), DYCO)

    def check(part, order):
        for place, index in enumerate(order):
            for response in range(4):
                a, b = whole.mask[4 * index + response], part.mask[4 * place + response]
                assert (
                    whole.tokens[4 * index + response][a].tolist()
                    == part.tokens[4 * place + response][b].tolist()
                )
                for x, y in zip(whole.signals, part.signals):
                    torch.testing.assert_close(
                        x[4 * index + response][a], y[4 * place + response][b], rtol=0, atol=1e-5
                    )

    check(generate(policy, [prompts[2]], 4, 20, (3, 7), DYCO), [2])
    check(generate(policy, [prompts[2], prompts[0]], 4, 20, (3, 7), DYCO), [2, 0])
    check(generate(policy, prompts, 4, 20, (3, 7), DYCO, max_cache_tokens=1), [0, 1, 2])
    monkeypatch.setattr(rollout, "PREFILL_TOKENS", 1)
    check(generate(policy, prompts, 4, 20, (3, 7), DYCO), [0, 1, 2])
    monkeypatch.setattr(rollout, "COMPACT_BELOW", 0.0)
    check(generate(policy, prompts, 4, 20, (3, 7), DYCO), [0, 1, 2])
    monkeypatch.setattr(rollout, "COMPACT_BELOW", 1.0)
    check(generate(policy, prompts, 4, 20, (3, 7), DYCO), [0, 1, 2])
    assert not torch.equal(
        generate(policy, prompts, 4, 20, (3, 8)).tokens[:, 0], whole.tokens[:, 0]
    )


def test_responses_of_a_group_differ(make_policy, prompts):
    found = generate(make_policy(), prompts, 8, 12, (0, 0))
    assert len(set(found.texts[:8])) > 4


def test_another_temperature_than_the_policys(make_policy, prompts):
    cool, warm = make_policy(temperature=0.5), make_policy(temperature=1.5)
    a, b = (
        generate(cool, prompts, 2, 8, (0, 0), temperature=1.5),
        generate(warm, prompts, 2, 8, (0, 0)),
    )
    assert a.texts == b.texts and a.texts != generate(cool, prompts, 2, 8, (0, 0)).texts


def test_sampling_follows_the_distribution():
    """20,000 draws over 8 ids: the chi-square statistic with 6 degrees of freedom exceeds 35 once in 200,000 runs."""
    logits = torch.tensor(
        [0.3, -1.0, 1.5, torch.finfo(torch.float32).min, 0.0, 2.0, -0.5, -torch.inf]
    )
    draws = 20_000
    found = sample_tokens(
        logits.expand(draws, -1), torch.rand(draws, generator=torch.Generator().manual_seed(0))
    )
    counts, expected = torch.bincount(found, minlength=8), draws * logits.softmax(-1)
    assert counts[3] == counts[7] == 0
    seen = expected > 0
    assert ((counts - expected)[seen] ** 2 / expected[seen]).sum() < 35


def test_sampling_at_the_ends_of_the_unit_interval():
    """The largest float32 below 1, and 0, draw the last and first ids that have any probability."""
    logits = torch.tensor([[-torch.inf, 0.0, 1.0, -torch.inf]] * 2)
    assert sample_tokens(logits, torch.tensor([0.0, 1 - 2**-24])).tolist() == [1, 2]


def test_placeholders_are_never_sampled(make_policy, prompts):
    """A policy that wants nothing but image placeholders cannot have them."""
    policy = make_policy()
    with torch.no_grad():
        policy.hf.lm_head.weight[policy.suppressed] = 50 * torch.sign(
            policy.hf.lm_head.weight[policy.suppressed]
        )
    found = generate(policy, prompts, 4, 10, (0, 0))
    assert not torch.isin(found.tokens[found.mask], policy.suppressed).any()
    scored = policy(prompts, found.tokens, found.mask)
    torch.testing.assert_close(found.logprobs, scored.logprobs, rtol=0, atol=1e-4)


def test_select_and_join_are_inverse(make_policy, prompts):
    found = generate(eager_to_end(make_policy()), prompts, 3, 15, (0, 0), DYCO)
    again = join([found.select([0]), found.select([1, 2])])
    width = again.tokens.shape[1]
    assert again.texts == found.texts and again.prompts == found.prompts
    for a, b in zip(
        (again.tokens, again.mask, again.logprobs, *again.signals),
        (found.tokens, found.mask, found.logprobs, *found.signals),
    ):
        assert torch.equal(a, b[:, :width])
    assert torch.equal(again.truncated, found.truncated)


def test_keyed_generators_depend_on_the_whole_key():
    draw = lambda *key: torch.rand(4, generator=keyed_generator(*key)).tolist()
    assert draw(0, 1, 2) == draw(0, 1, 2)
    keys = [(0, 1, 2), (0, 1, 3), (0, 2, 2), (1, 1, 2), (0, 12), (0, "1", 2)]
    assert len({tuple(draw(*key)) for key in keys}) == len(keys)
