"""model.py and attention.py against the slow, obvious versions.

The packed group forward against one row at a time, the tap against the attention that transformers
returns, the chunked log-probabilities against a whole softmax.
"""

import json
from types import SimpleNamespace

import helpers
import pytest
import torch
from conftest import picture, random_responses
from torch.utils._python_dispatch import TorchDispatchMode

import attention
import decoder
import dyco
import model
from attention import Tap
from data import Sample
from model import FAMILIES, TokenLogprobs, load_policy, save_policy

DYCO = SimpleNamespace(layers=[-1], shift="fisher_rao", text_scope="after_image")


def one_row(policy, prompt, response, output_attentions=False):
    """The stock forward on [prompt | response] alone.

    It has transformers' eager attention and its own positions. Returns the logits that predict the
    response, [T, V], and the attentions of each layer.
    """
    hf = policy.hf
    hf.model.rope_deltas = None
    hf.model.language_model.config._attn_implementation = "eager"
    ids = torch.cat([prompt.input_ids, response])[None]
    image = torch.cat([prompt.visual_mask, torch.zeros(len(response), dtype=torch.bool)])[None]
    images = {}
    if prompt.pixel_values is not None:
        images = {"pixel_values": prompt.pixel_values, "image_grid_thw": prompt.image_grid_thw}
    output = hf(
        input_ids=ids,
        mm_token_type_ids=image.int(),
        use_cache=False,
        output_attentions=output_attentions,
        **images,
    )
    logits = output.logits[0].float() / policy.temperature
    logits[:, policy.suppressed] = -torch.inf
    return logits[len(prompt.input_ids) - 1 : -1], output.attentions


def one_blind_row(policy, prompt, response):
    """The stock forward on [prompt | response] alone, in which no text may look at image tokens.

    Image tokens stay in the row, but a mask hides them from all others. Returns log-probabilities
    of the response, [T].
    """
    hf = policy.hf
    hf.model.rope_deltas = None
    hf.model.language_model.config._attn_implementation = "eager"
    ids = torch.cat([prompt.input_ids, response])[None]
    image = torch.cat([prompt.visual_mask, torch.zeros(len(response), dtype=torch.bool)])
    hidden = ~image[:, None] & image
    allowed = torch.ones(len(image), len(image), dtype=torch.bool).tril() & ~hidden
    mask = torch.zeros(allowed.shape).masked_fill(~allowed, torch.finfo(torch.float32).min)
    positions = policy.prompt_positions(prompt)
    following = int(positions.max()) + 1
    own = torch.arange(following, following + len(response)).expand(3, -1)
    images = {}
    if prompt.pixel_values is not None:
        images = {"pixel_values": prompt.pixel_values, "image_grid_thw": prompt.image_grid_thw}
    output = hf(
        input_ids=ids,
        mm_token_type_ids=image[None].int(),
        attention_mask=mask[None, None],
        position_ids=torch.cat([positions, own], dim=1)[:, None],
        use_cache=False,
        **images,
    )
    logits = output.logits[0].float() / policy.temperature
    logits[:, policy.suppressed] = -torch.inf
    return logits[len(prompt.input_ids) - 1 : -1].log_softmax(-1).gather(1, response[:, None])[:, 0]


def entropy_of(distribution):
    """-Σ p·log p, where suppressed tokens have p = 0 and log p = -inf."""
    return -(distribution.probs * distribution.logits.clamp(min=-1e9)).sum(-1)


def one_by_one(policy, prompts, tokens, mask):
    """Log-probabilities and entropies [B, T], one row at a time."""
    group = len(tokens) // len(prompts)
    logprobs, entropies = [], []
    for row in range(len(tokens)):
        response = tokens[row][mask[row]]
        logits, _ = one_row(policy, prompts[row // group], response)
        distribution = torch.distributions.Categorical(logits=logits)
        padding = torch.zeros(int((~mask[row]).sum()))
        logprobs.append(torch.cat([distribution.log_prob(response), padding]))
        entropies.append(torch.cat([entropy_of(distribution), padding]))
    return torch.stack(logprobs), torch.stack(entropies)


def gradients(policy, logprobs, weights):
    """The gradient of Σ weights·logprobs for every parameter, by name; 0 where there is none."""
    policy.zero_grad()
    (logprobs * weights).sum().backward()
    result = {}
    for name, parameter in policy.named_parameters():
        gradient = parameter.grad
        result[name] = torch.zeros_like(parameter) if gradient is None else gradient.clone()
    return result


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("chosen", [[0], [1], [2], [0, 1, 2]])
def test_packed_equals_one_row_at_a_time(make_policy, prompts, chosen):
    """Log-probabilities, entropies and gradients, with 1, 0 and 2 images and different lengths.

    1e-5: float32 sums of a hundred terms of order 1 in another order. Gradients are compared
    relative to the largest of their tensor.
    """
    policy = make_policy(temperature=0.7)
    some = [prompts[i] for i in chosen]
    tokens, mask = random_responses(some, 3, 9, 300)
    weights = torch.randn(mask.shape, generator=torch.Generator().manual_seed(1))
    packed = policy(some, tokens, mask)
    packed_gradients = gradients(policy, packed.logprobs, weights)
    logprobs, entropy = one_by_one(policy, some, tokens, mask)
    torch.testing.assert_close(packed.logprobs, logprobs, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(packed.entropy, entropy, rtol=1e-5, atol=1e-5)
    slow_gradients = gradients(policy, logprobs, weights)
    assert sum(bool(gradient.any()) for gradient in slow_gradients.values()) > 20
    for name, gradient in slow_gradients.items():
        scale = gradient.abs().max().clamp(min=1e-3)
        tolerance = 1e-5 * scale.clamp(min=1) + 1e-5 * scale
        assert (packed_gradients[name] - gradient).abs().max() < tolerance, name


@pytest.mark.parametrize("family", ["qwen3_vl"])
def test_image_features_behind_the_last_layer(make_policy, prompts):
    """As tiny checkpoints have them, with as few layers as image features."""
    policy = make_policy()
    del policy.hf.model.language_model.layers[2]
    policy.hf.config.text_config.num_hidden_layers = 2
    tokens, mask = random_responses(prompts, 2, 9, 300)
    logprobs, _ = one_by_one(policy, prompts, tokens, mask)
    packed = policy(prompts, tokens, mask).logprobs
    torch.testing.assert_close(packed, logprobs, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("family", FAMILIES)
def test_micro_batches_add_up(make_policy, prompts):
    """Any split into groups gives the same numbers and gradients as one packed forward of all."""
    policy = make_policy()
    tokens, mask = random_responses(prompts, 2, 7, 300)
    whole = policy(prompts, tokens, mask)
    whole_gradients = gradients(policy, whole.logprobs, mask.float())
    for split in ([[0], [1], [2]], [[0, 1], [2]], [[2, 0], [1]]):
        policy.zero_grad()
        for part in split:
            rows = [i * 2 + j for i in part for j in range(2)]
            output = policy([prompts[i] for i in part], tokens[rows], mask[rows])
            torch.testing.assert_close(output.logprobs, whole.logprobs[rows], rtol=1e-5, atol=1e-5)
            output.logprobs.sum().backward()
        parts = {name: p.grad for name, p in policy.named_parameters() if p.grad is not None}
        assert parts.keys() == whole_gradients.keys()
        for name, gradient in parts.items():
            expected = whole_gradients[name]
            torch.testing.assert_close(gradient, expected, rtol=1e-4, atol=1e-4, msg=name)


def test_a_response_does_not_see_its_neighbours(make_policy, prompts):
    """Another response's tokens, or what stands on padding, change nothing, not a bit."""
    policy = make_policy()
    tokens, mask = random_responses(prompts, 3, 8, 300)
    before = policy(prompts, tokens, mask, policy.tap(DYCO))
    changed = torch.where(mask, tokens, 17)
    changed[4] = changed[4].flip(0)
    after = policy(prompts, changed, mask, policy.tap(DYCO))
    others = torch.arange(len(tokens)) != 4
    assert torch.equal(before.logprobs[others], after.logprobs[others])
    assert not torch.equal(before.logprobs[4], after.logprobs[4])
    for a, b in zip(before.signals, after.signals, strict=True):
        assert torch.equal(a[others], b[others])


@pytest.mark.parametrize("family", FAMILIES)
def test_blind_forward_equals_a_mask_over_the_image(make_policy, prompts, family):
    """Leaving image tokens out equals hiding them from all text, with 1, 0 and 2 images."""
    policy = make_policy(temperature=0.7)
    tokens, mask = random_responses(prompts, 3, 9, 300)
    with torch.no_grad():
        blind = policy(prompts, tokens, mask, blind=True).logprobs
        seeing = policy(prompts, tokens, mask).logprobs
        for row in range(len(tokens)):
            expected = one_blind_row(policy, prompts[row // 3], tokens[row][mask[row]])
            torch.testing.assert_close(blind[row][mask[row]], expected, rtol=1e-5, atol=1e-5)
    assert blind[~mask].eq(0).all()
    # The first token of a response, too; the second prompt has no image.
    assert (blind - seeing)[[0, 6], 0].abs().min() > 1e-3
    torch.testing.assert_close(blind[3:6], seeing[3:6], rtol=0, atol=0)


@pytest.mark.parametrize("family", FAMILIES)
def test_image_similarity_equals_hidden_states_of_transformers(make_policy, prompts, family):
    """The cosine of each predicting state with the mean one of the image, row by row."""
    policy = make_policy()
    tokens, mask = random_responses(prompts, 2, 9, 300)
    similarity = policy(prompts, tokens, mask, similarity=True).image_similarity
    assert not similarity.requires_grad
    for row in range(len(tokens)):
        prompt, response = prompts[row // 2], tokens[row][mask[row]]
        hidden = last_hidden_states(policy, prompt, response)
        expected = torch.zeros(len(response))
        if prompt.visual_mask.any():
            image = hidden[: len(prompt.input_ids)][prompt.visual_mask].mean(0)
            states = hidden[len(prompt.input_ids) - 1 : -1]
            expected = torch.cosine_similarity(states, image[None])
        torch.testing.assert_close(similarity[row][mask[row]], expected, rtol=1e-5, atol=1e-5)
        assert similarity[row][~mask[row]].eq(0).all()


@pytest.mark.parametrize("similarity", [False, True])
def test_the_last_layer_ends_with_the_tokens_that_are_read(make_policy, prompts, similarity):
    """With similarities the image tokens are read, too, and so is the whole row."""
    policy = make_policy()
    tokens, mask = random_responses(prompts, 2, 9, 300)
    lengths = mask.sum(1)
    # The last token of a response is predicted, and never read.
    whole = sum(len(prompt.input_ids) for prompt in prompts) + int((lengths - 1).clamp(min=0).sum())
    predicted = int(lengths.sum())
    assert predicted < whole - 20
    seen = []
    hooks = [
        layer.mlp.down_proj.register_forward_hook(lambda *call: seen.append(call[2].shape[1]))
        for layer in policy.hf.model.language_model.layers
    ]
    policy(prompts, tokens, mask, similarity=similarity)
    for hook in hooks:
        hook.remove()
    assert seen == [whole, whole if similarity else predicted]


def last_hidden_states(policy, prompt, response):
    """Behind the last norm, of the stock forward on [prompt | response] alone: [N, D]."""
    kept = []
    norm = policy.hf.model.language_model.norm
    hook = norm.register_forward_hook(lambda module, inputs, output: kept.append(output[0]))
    try:
        with torch.no_grad():
            one_row(policy, prompt, response)
    finally:
        hook.remove()
    return kept[0]


def test_empty_response_is_scored_as_nothing(make_policy, prompts):
    policy = make_policy()
    tokens, mask = random_responses(prompts[:1], 3, 5, 300)
    mask[1] = False
    output = policy(prompts[:1], tokens, mask, policy.tap(DYCO))
    assert output.logprobs[1].eq(0).all()
    assert all(signal[1].eq(0).all() for signal in output.signals)
    others = policy(prompts[:1], tokens[[0, 2]], mask[[0, 2]])
    torch.testing.assert_close(output.logprobs[[0, 2]], others.logprobs)


# ---------------------------------------------------------------- the tap


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("scope", ["after_image", "all"])
@pytest.mark.parametrize("layers", [[-1], [0, -1]])
def test_tap_equals_the_attention_that_transformers_returns(make_policy, prompts, layers, scope):
    """Signals of the tap against output_attentions=True of the stock forward, row by row."""
    policy = make_policy()
    tokens, mask = random_responses(prompts, 2, 9, 300)
    tap = Tap(layers, policy.depth, "fisher_rao", scope)
    tapped = policy(prompts, tokens, mask, tap).signals
    for row in range(len(tokens)):
        prompt, response = prompts[row // 2], tokens[row][mask[row]]
        _, attentions = one_row(policy, prompt, response, output_attentions=True)
        # The query of a token is the position before it.
        first = len(prompt.input_ids) - 1
        visual = torch.cat([prompt.visual_mask, torch.zeros(len(response), dtype=torch.bool)])
        text = ~visual
        if scope == "after_image" and visual.any():
            text[: int(visual.nonzero()[0])] = False
        by_layer = []
        for layer in layers:
            rows = attentions[layer][0].mean(0)[None, first:-1]
            by_layer.append(dyco.attention_signals(rows, visual[None], text.expand_as(rows)))
        for name in tapped._fields:
            expected = sum(getattr(signals, name)[0] for signals in by_layer) / len(layers)
            signal = getattr(tapped, name)[row]
            where = f"{name} of row {row}"
            torch.testing.assert_close(signal[mask[row]], expected, rtol=1e-5, atol=2e-5, msg=where)
            assert signal[~mask[row]].eq(0).all()


def test_tap_in_blocks_of_queries(make_policy, prompts, monkeypatch):
    """Splitting the queries into blocks changes nothing, not even at the block borders."""
    policy = make_policy()
    tokens, mask = random_responses(prompts, 2, 9, 300)
    whole = policy(prompts, tokens, mask, policy.tap(DYCO)).signals
    monkeypatch.setattr(Tap, "MAX_ELEMENTS", 1)
    in_blocks = policy(prompts, tokens, mask, policy.tap(DYCO)).signals
    for a, b in zip(whole, in_blocks, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-6)


def test_tap_names_a_layer_that_does_not_exist():
    with pytest.raises(ValueError, match=r"dyco.layers: \[2\] out of range.*-2 … 1"):
        Tap([0, 2], depth=2)


# ---------------------------------------------------------------- log-probabilities


class LargestTensor(TorchDispatchMode):
    """The largest number of elements of any tensor made inside."""

    elements = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        for x in out if isinstance(out, (tuple, list)) else [out]:
            if isinstance(x, torch.Tensor):
                self.elements = max(self.elements, x.numel())
        return out


def test_chunked_logprobs_equal_log_softmax():
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(50, 8, generator=generator, dtype=torch.float32)
    weight = torch.randn(97, 8, generator=generator)
    targets = torch.randint(0, 90, (50,), generator=generator)
    suppressed = torch.tensor([91, 95])
    slope = torch.randn(50, generator=generator)

    def chunked(hidden, weight):
        chunks = model._chunk_forward, model._chunk_slope
        return TokenLogprobs.apply(hidden, weight, targets, 0.6, suppressed, 7, *chunks)

    def whole(hidden, weight):
        logits = hidden @ weight.T / 0.6
        logits[:, suppressed] = -torch.inf
        distribution = torch.distributions.Categorical(logits=logits)
        return distribution.log_prob(targets), entropy_of(distribution)

    results = []
    for function in (chunked, whole):
        h, w = hidden.clone().requires_grad_(), weight.clone().requires_grad_()
        logprobs, entropy = function(h, w)
        (logprobs * slope).sum().backward()
        results.append((logprobs, entropy, h.grad, w.grad))
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)


def test_logits_never_exist_as_a_whole(make_policy, prompts, monkeypatch):
    """No tensor of [predicted tokens, vocabulary] elements appears, forward or backward."""
    policy = make_policy()
    monkeypatch.setattr(type(policy), "CHUNK", 16)
    tokens, mask = random_responses(prompts[1:2], 40, 30, 300)
    predicted = int(mask.sum())
    vocabulary = policy.hf.config.text_config.vocab_size
    hidden = torch.randn(predicted, 4).requires_grad_()
    weight = torch.randn(vocabulary, 4).requires_grad_()
    with LargestTensor() as largest:
        logprobs, _ = TokenLogprobs.apply(
            hidden,
            weight,
            tokens[mask],
            1.0,
            policy.suppressed,
            policy.CHUNK,
            policy.forward_chunk,
            policy.slope_chunk,
        )
        logprobs.sum().backward()
    assert 16 * vocabulary <= largest.elements < predicted * vocabulary / 10


def test_suppressed_tokens_have_no_probability(make_policy):
    policy = make_policy()
    logits = policy.next_token_logits(torch.randn(3, 128), policy.hf.lm_head.weight)
    assert logits.softmax(-1)[:, policy.suppressed].eq(0).all()
    assert set(policy.suppressed.tolist()) == {
        policy.hf.config.image_token_id,
        policy.hf.config.video_token_id,
    }


# ---------------------------------------------------------------- dtype, compile, folders


@pytest.mark.parametrize("family", FAMILIES)
def test_bfloat16_arithmetic_over_float32_weights(make_policy, prompts):
    """bf16 has 8 bits: log-probabilities of order 6 agree to about 6 · 2⁻⁷."""
    tokens, mask = random_responses(prompts, 2, 6, 300)
    exact = make_policy()(prompts, tokens, mask).logprobs
    policy = make_policy(dtype=torch.bfloat16)
    rough = policy(prompts, tokens, mask, policy.tap(DYCO))
    rough.logprobs.sum().backward()
    assert rough.logprobs.dtype == rough.signals.visual_mass.dtype == torch.float32
    for parameter in policy.parameters():
        if parameter.grad is not None:
            assert parameter.dtype == torch.float32
            assert torch.isfinite(parameter.grad).all()
    assert 0 < (rough.logprobs - exact).abs().max() < 0.2


def test_windows_of_the_vision_tower_in_one_call(make_policy, prompts, monkeypatch):
    """Three pictures, cut into windows of 64 patches and ragged ones at their edges.

    Outputs and gradients are those of one call per window, in fewer calls.
    """
    visual = make_policy().hf.model.visual
    kernel = torch.nn.functional.scaled_dot_product_attention
    calls = []
    assert visual.config._attn_implementation == attention.WINDOWS
    grid = torch.tensor([[1, 20, 26], [1, 8, 16], [1, 6, 4]])
    pixels = torch.randn(int(grid.prod(1).sum()), 1176, generator=torch.Generator().manual_seed(0))

    def run(implementation):
        visual.config._attn_implementation = implementation
        visual.zero_grad()
        calls.clear()
        output = visual(pixels, grid).pooler_output
        output.square().sum().backward()
        return output, [p.grad.clone() for p in visual.parameters()], len(calls)

    def counted(*args, **kwargs):
        calls.append(1)
        return kernel(*args, **kwargs)

    monkeypatch.setattr(torch.nn.functional, "scaled_dot_product_attention", counted)
    ours, our_gradients, few = run(attention.WINDOWS)
    plain, plain_gradients, many = run("sdpa")
    torch.testing.assert_close(ours, plain, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(our_gradients, plain_gradients, rtol=1e-4, atol=1e-5)
    # windows of 64, 32, 24, 16 and 8 patches, then 3 whole pictures
    assert few == 5 + 3
    assert many == 15 + 3


@pytest.mark.parametrize("family", ["qwen3_vl", "qwen2_vl"])
def test_whole_images_in_the_vision_tower(make_policy):
    """Two pictures of one size and a third: what the stock tower makes of them, and its gradients.

    With Qwen3-VL that is also what deeper layers have for the decoder.
    """
    policy = make_policy()
    visual = policy.hf.model.visual
    pictures = [picture(128, 64, seed=0), picture(128, 64, seed=1), picture(96, 160, seed=2)]
    images = policy.image_processor(images=pictures, return_tensors="pt")

    def run(implementation):
        visual.config._attn_implementation = implementation
        visual.zero_grad()
        output = visual(images["pixel_values"], images["image_grid_thw"])
        features = torch.stack([output.pooler_output, *getattr(output, "deepstack_features", [])])
        features.square().sum().backward()
        return features, [p.grad.clone() for p in visual.parameters()]

    ours, our_gradients = run(attention.WINDOWS)
    plain, plain_gradients = run("sdpa")
    assert len(ours) == (3 if policy.hf.config.model_type == "qwen3_vl" else 1)
    torch.testing.assert_close(ours, plain, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(our_gradients, plain_gradients, rtol=1e-4, atol=1e-4)


def test_products_into_float32_take_no_gradient(make_policy, prompts, monkeypatch):
    """CUDA's 16-bit product with a float32 result has no derivative: none may be wanted."""
    policy = make_policy(dtype=torch.bfloat16)
    plain = model.float32_product
    wants_gradient = []

    def product(a, b):
        wants_gradient.append(torch.is_grad_enabled() and (a.requires_grad or b.requires_grad))
        return plain(a, b)

    for module in (attention, model):
        monkeypatch.setattr(module, "float32_product", product)
    tokens, mask = random_responses(prompts, 2, 5, 300)
    policy(prompts, tokens, mask, policy.tap(DYCO)).logprobs.sum().backward()
    assert wants_gradient
    assert not any(wants_gradient)


@pytest.mark.parametrize(
    "rows, out, uses_onednn, expected",
    [
        (1, 256, True, "bmm"),  # two blocks of the weight
        (1, 320, True, "mm"),  # not whole blocks
        (4, 256, True, "mm"),
        (5, 256, True, "_linear_pointwise"),
        (700, 256, True, "_linear_pointwise"),
        (5, 256, False, "mm"),
    ],
)
def test_quick_products_are_the_usual_one(monkeypatch, rows, out, uses_onednn, expected):
    if uses_onednn and not hasattr(torch.ops.mkldnn, "_linear_pointwise"):
        pytest.skip("this PyTorch is built without oneDNN")
    monkeypatch.setattr(decoder, "USES_ONEDNN", uses_onednn)
    monkeypatch.setattr(decoder, "FEW_ROWS", 4)
    generator = torch.Generator().manual_seed(rows)
    x = torch.randn(rows, 1, 24, generator=generator)
    weight = torch.randn(out, 24, generator=generator)
    bias = torch.randn(out, generator=generator)
    with torch.no_grad(), helpers.Products() as products:
        output = decoder.linear(x, weight)
    assert products.names == [expected]
    torch.testing.assert_close(output, torch.nn.functional.linear(x, weight), rtol=1e-5, atol=1e-5)
    with torch.no_grad():
        output = decoder.linear(x, weight, bias)
    usual = torch.nn.functional.linear(x, weight, bias)
    torch.testing.assert_close(output, usual, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("rows, bias", [(1, False), (4, False), (5, False), (1, True), (5, True)])
def test_quick_products_keep_their_gradients(monkeypatch, rows, bias):
    """That of oneDNN would lose them without a word."""
    monkeypatch.setattr(decoder, "USES_ONEDNN", True)
    monkeypatch.setattr(decoder, "FEW_ROWS", 4)
    module = torch.nn.Linear(24, 256, bias=bias)
    x = torch.randn(rows, 1, 24).requires_grad_()
    output = decoder.joined(module, dtype=torch.float32)(x)
    expected = module(x)
    torch.testing.assert_close(output, expected, rtol=1e-5, atol=1e-5)
    wanted = [x, *module.parameters()]
    upstream = torch.randn(rows, 1, 256)
    gradients = torch.autograd.grad(output, wanted, upstream)
    expected_gradients = torch.autograd.grad(expected, wanted, upstream)
    torch.testing.assert_close(gradients, expected_gradients, rtol=1e-5, atol=1e-5)


class Halved(torch.nn.Linear):
    def forward(self, x):
        return super().forward(x) / 2


@pytest.mark.parametrize(
    "module, dtype",
    [
        (Halved(24, 40, bias=False), torch.float32),
        (torch.nn.Linear(24, 40), torch.float32),
        (torch.nn.Linear(24, 40, bias=False).bfloat16(), torch.bfloat16),
    ],
    ids=["other class", "bias", "16 bits"],
)
def test_other_linear_layers_are_called_as_they_are(module, dtype):
    x = torch.randn(8, 1, 24).to(dtype)
    assert torch.equal(decoder.joined(module, dtype=dtype)(x), module(x))


@pytest.mark.parametrize("has_bias", [(True, False), (False, True)])
def test_linear_layers_with_and_without_bias_are_not_joined(has_bias):
    modules = [torch.nn.Linear(24, 40, bias=bias) for bias in has_bias]
    x = torch.randn(8, 1, 24)
    expected = torch.cat([module(x) for module in modules], dim=-1)
    assert torch.equal(decoder.joined(*modules, dtype=torch.float32)(x), expected)


@pytest.mark.parametrize("rows", [8, 200])
@pytest.mark.parametrize(
    "kind, bias, dtype",
    [
        (Halved, True, torch.float32),
        (torch.nn.Linear, False, torch.float32),
        (torch.nn.Linear, True, torch.float32),
        (torch.nn.Linear, True, torch.bfloat16),
    ],
)
def test_joined_linear_layers_compute_what_each_of_them_does(kind, bias, dtype, rows):
    modules = [kind(24, width, bias=bias).requires_grad_(False) for width in (40, 16, 8)]
    x = torch.randn(rows, 1, 24).to(dtype)
    with torch.autocast("cpu", dtype, enabled=dtype != torch.float32):
        expected = torch.cat([module(x) for module in modules], dim=-1)
        output = decoder.joined(*modules, dtype=dtype)(x)
        one = decoder.joined(modules[0], dtype=dtype)(x)
    assert output.dtype == dtype
    close = {"rtol": 1e-5, "atol": 1e-5} if dtype == torch.float32 else {"rtol": 0.02, "atol": 0.02}
    torch.testing.assert_close(output, expected, **close)
    torch.testing.assert_close(one, expected[..., :40], **close)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_prepared_decoder_computes_what_it_did(make_policy, prompts):
    policy = make_policy()
    tokens, mask = random_responses(prompts, 2, 5, 300)
    with torch.no_grad():
        expected = policy(prompts, tokens, mask).logprobs
        with policy.prepared():
            output = policy(prompts, tokens, mask).logprobs
    torch.testing.assert_close(output, expected, rtol=0, atol=1e-5)


def test_what_was_prepared_is_forgotten_also_after_an_error(make_policy, monkeypatch):
    policy = make_policy()
    layers = policy.hf.model.language_model.layers
    with pytest.raises(RuntimeError, match="in it"), policy.prepared():
        assert all(layer.parts is not None for layer in layers)
        raise RuntimeError("in it")
    assert all(layer.parts is None for layer in layers)

    def joined(*modules, dtype):
        if modules[0] is layers[1].self_attn.q_proj:
            raise RuntimeError("no memory")
        return modules[0]

    monkeypatch.setattr(decoder, "joined", joined)
    with pytest.raises(RuntimeError, match="no memory"), policy.prepared():
        pass
    assert all(layer.parts is None for layer in layers)


@pytest.mark.parametrize("family", FAMILIES)
def test_the_rotary_embedding_of_text_is_taken_from_a_table(make_policy):
    policy = make_policy()
    table = policy.rotary(torch.arange(90).expand(3, 1, -1))
    places = torch.tensor([7, 89, 7, 30])
    expected = policy.rotary(places.expand(3, -1)[..., None])
    for taken, computed in zip(table.at(places), expected, strict=True):
        assert torch.equal(taken, computed)


@pytest.mark.parametrize("family", FAMILIES)
def test_patches_are_multiplied_as_the_convolution_of_the_library_does(make_policy, prompts):
    visual = make_policy().hf.model.visual
    convolution = visual.patch_embed.proj
    patches = prompts[0].pixel_values
    blocks = patches.view(-1, convolution.in_channels, *convolution.kernel_size)
    expected = convolution(blocks).flatten(1)
    output = visual.patch_embed(patches)
    torch.testing.assert_close(output, expected, rtol=1e-5, atol=1e-5)
    upstream = torch.randn(expected.shape, generator=torch.Generator().manual_seed(0))
    gradients = [
        torch.autograd.grad(x, list(convolution.parameters()), upstream) for x in (output, expected)
    ]
    torch.testing.assert_close(*gradients, rtol=1e-4, atol=1e-4)
    of_parts = visual.patch_embed([patches[:12], patches[12:]])
    torch.testing.assert_close(of_parts, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("family", FAMILIES)
def test_gradient_checkpointing_changes_nothing(make_policy, prompts):
    tokens, mask = random_responses(prompts, 2, 6, 300)
    plain, saving = make_policy(), make_policy()
    saving.hf.gradient_checkpointing_enable({"use_reentrant": False})
    saving.train()
    a = gradients(plain, plain(prompts, tokens, mask).logprobs, mask.float())
    b = gradients(saving, saving(prompts, tokens, mask).logprobs, mask.float())
    assert a.keys() == b.keys()
    assert all(torch.allclose(a[name], b[name], atol=1e-5) for name in a)


@pytest.mark.parametrize("family", FAMILIES)
def test_frozen_vision_tower_gets_no_gradient(make_policy, prompts):
    policy = make_policy()
    policy.hf.model.visual.requires_grad_(False)
    tokens, mask = random_responses(prompts, 2, 6, 300)
    policy(prompts, tokens, mask).logprobs.sum().backward()
    assert all(p.grad is None for p in policy.hf.model.visual.parameters())
    assert policy.hf.lm_head.weight.grad is not None


@pytest.mark.slow
def test_compiled_scoring_equals_eager(make_policy, prompts):
    tokens, mask = random_responses(prompts, 2, 6, 300)
    eager, compiled = make_policy(), make_policy(compiled=True)
    plain = eager(prompts, tokens, mask, eager.tap(DYCO))
    fused = compiled(prompts, tokens, mask, compiled.tap(DYCO))
    torch.testing.assert_close(plain.logprobs, fused.logprobs, rtol=1e-5, atol=1e-5)
    for a, b in zip(plain.signals, fused.signals, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)
    a = gradients(eager, plain.logprobs, mask.float())
    b = gradients(compiled, fused.logprobs, mask.float())
    assert all(torch.allclose(a[name], b[name], atol=1e-4) for name in a)


@pytest.mark.parametrize("family", FAMILIES)
def test_saved_folder_is_a_normal_hugging_face_directory(family, make_policy, prompts, tmp_path):
    """Stock classes load it, give the same logits, and generate; so does load_policy."""
    from transformers import AutoImageProcessor, AutoModelForImageTextToText, AutoTokenizer

    policy = make_policy(seed=3)
    save_policy(policy, tmp_path)
    hf = AutoModelForImageTextToText.from_pretrained(tmp_path)
    assert type(hf).__name__ == FAMILIES[family].loader
    tokenizer = AutoTokenizer.from_pretrained(tmp_path)
    assert AutoImageProcessor.from_pretrained(tmp_path).size == policy.image_processor.size
    assert tokenizer.chat_template == policy.tokenizer.chat_template
    assert len(tokenizer) == len(policy.tokenizer)
    prompt = prompts[0]
    inputs = dict(
        input_ids=prompt.input_ids[None],
        mm_token_type_ids=prompt.visual_mask[None].int(),
        pixel_values=prompt.pixel_values,
        image_grid_thw=prompt.image_grid_thw,
    )
    theirs, ours = hf(**inputs).logits, policy.hf(**inputs).logits
    torch.testing.assert_close(theirs[:, -1], ours[:, -1], rtol=1e-5, atol=1e-5)
    assert hf.generate(**inputs, max_new_tokens=3, do_sample=False).shape[1] > len(prompt.input_ids)
    again = load_policy(tmp_path, torch.device("cpu"))
    tokens, mask = random_responses(prompts, 2, 6, 300)
    before, after = policy(prompts, tokens, mask), again(prompts, tokens, mask)
    assert torch.equal(before.logprobs, after.logprobs)
    assert again.eos_ids == policy.eos_ids
    assert len(again.eos_ids) == 2


def test_max_pixels_holds_for_the_layout_of_released_checkpoints(make_policy, tmp_path):
    """Released preprocessor files carry max_pixels, which must not win over the config."""
    save_policy(make_policy(), tmp_path)
    released = helpers.RELEASED_PROCESSORS["qwen2_5_vl"]
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(released))
    policy = load_policy(tmp_path, torch.device("cpu"), max_pixels=100352)
    encoded = policy.image_processor(images=[picture(900, 600, 0)], return_tensors="pt")
    assert 0.8 * 100352 / 196 < len(encoded["pixel_values"]) <= 100352 / 196
    save_policy(policy, tmp_path / "again")
    again = load_policy(tmp_path / "again", torch.device("cpu"))
    assert again.image_processor.size["longest_edge"] == 12845056


@pytest.mark.parametrize("family", ["qwen3_vl"])
def test_a_released_qwen3_vl_folder(make_policy, prompts, tmp_path):
    """Patches of 16 pixels, sizes under other names, and a smallest image of 256 × 256."""
    save_policy(make_policy(), tmp_path)
    released = helpers.RELEASED_PROCESSORS["qwen3_vl"]
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(released))
    policy = load_policy(tmp_path, torch.device("cpu"), max_pixels=102400)
    sample = Sample("one", (picture(900, 600, 0),), "<image>Sum circle.", answer="3")
    prompt = policy.encode(sample, 0, "{question}")
    assert prompt.image_grid_thw.tolist() == [[1, 16, 24]]  # 384 × 256 pixels
    assert int(prompt.visual_mask.sum()) == 8 * 12
    tokens, mask = random_responses([prompt], 2, 6, 300)
    assert policy([prompt], tokens, mask).logprobs.isfinite().all()
    with pytest.raises(ValueError, match="data.max_pixels: expected at least 65536"):
        load_policy(tmp_path, torch.device("cpu"), max_pixels=50176)


def test_an_image_processor_of_another_family_is_refused(make_policy, tmp_path):
    policy = make_policy()
    policy.image_processor.patch_size = 16
    save_policy(policy, tmp_path)
    message = "patches of 16 pixels, 2 frames, merged by 2; its config.json expects 14, 2 and 2"
    with pytest.raises(ValueError, match=message):
        load_policy(tmp_path, torch.device("cpu"))


@pytest.mark.parametrize(
    "kind, what",
    [
        ("qwen3", "a text-only model, 'qwen3'"),
        ("qwen2", "a text-only model, 'qwen2'"),
        ("qwen3_moe", "a mixture of experts, 'qwen3_moe'"),
        ("qwen3_vl_moe", "a mixture of experts, 'qwen3_vl_moe'"),
        ("llava", "a 'llava'"),
    ],
)
def test_other_families_are_refused(make_policy, tmp_path, kind, what):
    """The message says what the model is, and names all families that would do."""
    save_policy(make_policy(), tmp_path)
    (tmp_path / "config.json").write_text(json.dumps({"model_type": kind}))
    with pytest.raises(ValueError, match=f"is {what}; expected a Qwen2.5-VL") as caught:
        load_policy(tmp_path, torch.device("cpu"))
    for name, family in FAMILIES.items():
        assert f"{family.name} ('{name}')" in str(caught.value)


def test_what_is_not_a_qwen_is_refused(make_policy, tmp_path):
    with pytest.raises(ValueError, match="model.path.*is no folder; expected a model directory"):
        load_policy(tmp_path / "nothing", torch.device("cpu"))
    message = "model.path: 'nobody/nothing' is no folder here.*and the hub did not give it"
    with pytest.raises(ValueError, match=message):
        load_policy("nobody/nothing", torch.device("cpu"))
    save_policy(make_policy(), tmp_path)
    (tmp_path / "config.json").write_text('{"model_type": "llama"}')
    with pytest.raises(ValueError, match="'llama'; expected a Qwen2.5-VL"):
        load_policy(tmp_path, torch.device("cpu"))


def test_attention_never_builds_keys_for_other_responses(make_policy, prompts):
    """The query–key pairs of the packed row are P² + G·T·(P + T), not N²."""
    policy = make_policy()
    pairs = []
    original = attention.grouped_query_attention

    def counting(query, key, value, scale):
        pairs.append(query.shape[0] * query.shape[2] * key.shape[2])
        return original(query, key, value, scale)

    tokens, mask = random_responses(prompts[:1], 6, 20, 300)
    mask[:] = True
    attention.grouped_query_attention = counting
    try:
        policy(prompts[:1], tokens, mask)
    finally:
        attention.grouped_query_attention = original
    length, branch = len(prompts[0].input_ids), 19
    assert sum(pairs) == policy.depth * (length**2 + 6 * branch * (length + branch))


def test_without_a_compiler_auto_compiles_nothing_and_says_why(monkeypatch):
    gpu, cpu = torch.device("cuda"), torch.device("cpu")

    def fail(function):
        raise RuntimeError("Failed to find C compiler.\nSet CC")

    monkeypatch.setattr(torch, "compile", fail)
    assert model.compiler_problem(cpu) == "Failed to find C compiler."
    problem = "no compiler"
    monkeypatch.setattr(model, "compiler_problem", lambda device: problem)
    with pytest.warns(UserWarning, match="model.compile: auto compiles nothing.*no compiler"):
        assert not model._is_compiled("auto", gpu)
    problem = None
    assert model._is_compiled("auto", gpu)
    assert model._is_compiled("on", cpu)
    assert not model._is_compiled("auto", cpu)
    assert not model._is_compiled("off", gpu)


def test_compiled_functions_do_not_recompile_per_step(make_policy, prompts, monkeypatch):
    """Ten steps of other lengths, batches and prompts soon meet no new shape.

    Dynamo takes a size of 1 for a case of its own, so the first time that a single row is left to
    decode is one more. Compilation itself is left out (backend "eager"): what is counted is how
    often dynamo traces anew.
    """
    from torch._dynamo.utils import counters

    from rollout import generate

    plain = torch.compile

    def trace_only(function, **options):
        return plain(function, **options | {"backend": "eager"})

    monkeypatch.setattr(torch, "compile", trace_only)
    torch._dynamo.reset()
    counters.clear()
    policy = make_policy(compiled=True)
    graphs = []
    policy.eos_ids = set(range(0, 40))
    for step in range(10):
        some = [prompts[i] for i in ((0, 1, 2), (0, 2), (1, 0))[step % 3]]
        batch = generate(policy, some, 3 + step % 4, 9 + 2 * step, (0, step), DYCO)
        output = policy(some, batch.tokens, batch.mask, policy.tap(DYCO))
        output.logprobs.sum().backward()
        graphs.append(counters["stats"]["unique_graphs"])
    assert graphs[0] > 0, graphs
    assert graphs[-1] <= graphs[0] + 1, graphs
    assert len(set(graphs[5:])) == 1, graphs
