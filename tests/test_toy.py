"""toy.py: the task, its tokenizer and model, and the cached warm start."""

import random
from dataclasses import replace

import pytest
import torch
from conftest import TEMPLATE

import rewards
import toy
from data import encode_prompt
from toy import LEVELS, ToyDataset, make_sample, write_trace


@pytest.mark.parametrize("number", LEVELS)
def test_samples_are_what_they_say(number):
    """Same arguments, same sample; the picture shows every shape's colour in a cell of its own; the sum is right."""
    level = LEVELS[number]
    for index in range(20):
        sample, again = make_sample(level, 0, "train", index), make_sample(level, 0, "train", index)
        assert (
            sample.question == again.question
            and sample.images[0].tobytes() == again.images[0].tobytes()
        )
        asked = [word.strip(" .,") for word in sample.question.split("Sum")[1].split(",")]
        assert asked == sample.extra["asked"] and len(set(asked)) == level.operands
        colors, values = sample.extra["colors"], sample.extra["values"]
        assert sample.answer == str(sum(values[colors[shape]] for shape in asked))
        seen = {color for _, color in sample.images[0].getcolors(10**6)}
        assert seen == {toy.COLORS[c] for c in colors.values()} | {(245, 245, 245)}
        if level.legend:
            assert all(f"{color} is {value}" in sample.question for color, value in values.items())


def test_splits_do_not_meet():
    train, test = ToyDataset(LEVELS[1], 0, "train", 300), ToyDataset(LEVELS[1], 0, "test", 300)
    seen = {(s.question, s.images[0].tobytes()) for s in train}
    assert not any((s.question, s.images[0].tobytes()) in seen for s in test)
    assert train.fingerprint != test.fingerprint and len(train) == 300
    with pytest.raises(IndexError):
        train[300]


@pytest.mark.parametrize("number", LEVELS)
def test_a_faultless_trace_gets_the_full_reward(number):
    for index in range(50):
        sample = make_sample(LEVELS[number], 1, "train", index)
        trace = write_trace(sample, LEVELS[number])
        assert rewards.accuracy(trace, sample.answer) == rewards.format(trace) == 1.0


def test_slips_happen_at_their_rates():
    """4,000 traces; each rate is met within 0.03, four standard deviations of the rarest kind of slip."""
    level, colors, habits, totals = LEVELS[1], [], [], []
    for index in range(4000):
        sample = make_sample(level, 0, "train", index)
        names, values = list(sample.extra["colors"]), sample.extra["values"]
        before = 0
        for step in (
            write_trace(sample, level, random.Random(index))
            .removeprefix("<think>")
            .split("</think>")[0]
            .split(". ")
        ):
            shape, _, color, _, _, total = step.strip(".").replace(",", "").split()
            totals.append(int(total) != before + values[color])
            before = int(total)
            neighbour = sample.extra["colors"][names[(names.index(shape) + 1) % len(names)]]
            if neighbour != sample.extra["colors"][shape]:  # otherwise a slip does not show
                (habits if shape == names[0] else colors).append(color == neighbour)
    for found, rate in (
        (colors, level.visual_slip),
        (habits, level.habit_slip),
        (totals, level.textual_slip),
    ):
        assert abs(sum(found) / len(found) - rate) < 0.03
    assert level.habit_slip > 0.5, (
        "greedy decoding must be wrong somewhere, or it has nothing to learn"
    )


@pytest.mark.parametrize("number", LEVELS)
def test_tokenizer_and_image_size(number):
    """Qwen's special tokens, no loss of text, few tokens for the task's words, at least 16 visual tokens."""
    level = LEVELS[number]
    tokenizer, processor = toy.build_tokenizer(level, TEMPLATE), toy.build_image_processor()
    sample = make_sample(level, 0, "test", 0)
    trace = write_trace(sample, level)
    ids = tokenizer(trace).input_ids
    assert tokenizer.decode(ids) == trace and len(ids) < 16 * level.operands
    for text in ("naïve 數學 \U0001f600 x²", "<|im_end|>"):
        assert tokenizer.decode(tokenizer(text).input_ids) == text
    assert len(tokenizer("<|image_pad|>").input_ids) == 1 and tokenizer.eos_token == "<|im_end|>"
    prompt = encode_prompt(sample, 0, tokenizer, processor, TEMPLATE)
    assert int(prompt.visual_mask.sum()) == (level.grid * level.cell_size) ** 2 >= 16


def test_model_is_a_small_qwen(tokenizer):
    model = toy.build_model(tokenizer)
    assert type(model).__name__ == "Qwen2_5_VLForConditionalGeneration"
    assert 1e6 < sum(p.numel() for p in model.parameters()) < 3e6
    again = toy.build_model(tokenizer)
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), again.parameters()))
    assert model.lm_head.weight is model.get_input_embeddings().weight


def test_warm_start_learns_and_is_cached(tmp_path, monkeypatch):
    """Ten batches lower the loss of traces; the second call trains nothing; another template or level is another folder."""
    short = replace(
        LEVELS[1], stages=(("colors", 2, 6e-3), ("traces", 8, 4e-3), ("slips", 2, 1e-3))
    )
    monkeypatch.setitem(LEVELS, 1, short)
    losses = []
    monkeypatch.setattr(
        toy.torch.nn.functional,
        "cross_entropy",
        lambda *a, plain=torch.nn.functional.cross_entropy: losses.append(plain(*a)) or losses[-1],
    )
    folder = toy.prepare(1, 0, TEMPLATE, tmp_path, progress=False)
    assert len(losses) == 12 and losses[9] < 0.7 * losses[2]
    assert toy.prepare(1, 0, TEMPLATE, tmp_path, progress=False) == folder and len(losses) == 12
    assert toy.prepare(1, 1, TEMPLATE, tmp_path, progress=False) != folder and len(losses) == 24
    assert {path.name for path in tmp_path.iterdir()} == {
        path.name for path in tmp_path.glob("toy-1-*") if "." not in path.name
    }
    with pytest.raises(ValueError, match="toy.level: expected one of 1.*found 9"):
        toy.prepare(9, 0, TEMPLATE, tmp_path)
