"""toy.py: the task, its tokenizer and model, and the cached warm start."""

import os
import random
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from conftest import TEMPLATE
from PIL import Image

import rewards
import toy
from data import encode_prompt
from run_folder import FolderError
from toy import LEVELS, ToyDataset, make_sample, write_trace

# ---------------------------------------------------------------- the task


@pytest.mark.parametrize("number", LEVELS)
def test_samples_are_what_they_say(number):
    """Same arguments, same sample; every shape's colour is in the picture; the sum is right."""
    level = LEVELS[number]
    for index in range(20):
        sample = make_sample(level, 0, "train", index)
        again = make_sample(level, 0, "train", index)
        assert sample.question == again.question
        assert sample.images[0].tobytes() == again.images[0].tobytes()

        asked = [word.strip(" .,") for word in sample.question.split("Sum")[1].split(",")]
        assert asked == sample.extra["asked"]
        assert len(set(asked)) == level.operands

        colors, values = sample.extra["colors"], sample.extra["values"]
        assert sample.answer == str(sum(values[colors[shape]] for shape in asked))
        seen = {color for _, color in sample.images[0].getcolors(10**6)}
        assert seen == {toy.COLORS[c] for c in colors.values()} | {(245, 245, 245)}
        if level.legend:
            assert all(f"{color} is {value}" in sample.question for color, value in values.items())


def test_splits_do_not_meet():
    train = ToyDataset(LEVELS[1], 0, "train", 300)
    test = ToyDataset(LEVELS[1], 0, "test", 300)
    seen = {(sample.question, sample.images[0].tobytes()) for sample in train}
    assert not any((sample.question, sample.images[0].tobytes()) in seen for sample in test)
    assert train.fingerprint != test.fingerprint
    assert len(train) == 300
    with pytest.raises(IndexError):
        train[300]


@pytest.mark.parametrize("number", LEVELS)
def test_a_faultless_trace_gets_the_full_reward(number):
    for index in range(50):
        sample = make_sample(LEVELS[number], 1, "train", index)
        trace = write_trace(sample, LEVELS[number])
        assert rewards.accuracy(trace, sample.answer) == rewards.format(trace) == 1.0


def test_slips_happen_at_their_rates():
    """4,000 traces; each rate is met within 0.03, four standard deviations of the rarest slip."""
    level = LEVELS[1]
    colors, habits, totals = [], [], []  # of each decision: whether it is a slip
    for index in range(4000):
        sample = make_sample(level, 0, "train", index)
        shapes = list(sample.extra["colors"])
        values = sample.extra["values"]
        trace = write_trace(sample, level, random.Random(index))
        steps = trace.removeprefix("<think>").split("</think>")[0].split(". ")
        before = 0
        for step in steps:
            shape, _, color, _, _, total = step.strip(".").replace(",", "").split()
            totals.append(int(total) != before + values[color])
            before = int(total)
            following = shapes[(shapes.index(shape) + 1) % len(shapes)]
            slip_color = sample.extra["colors"][following]
            if slip_color != sample.extra["colors"][shape]:  # otherwise a slip does not show
                decisions = habits if shape == shapes[0] else colors
                decisions.append(color == slip_color)

    def rate(slips: list[bool]) -> float:
        return sum(slips) / len(slips)

    assert abs(rate(colors) - level.visual_slip) < 0.03
    assert abs(rate(habits) - level.habit_slip) < 0.03
    assert abs(rate(totals) - level.textual_slip) < 0.03
    assert level.habit_slip > 0.5, (
        "greedy decoding must be wrong somewhere, or it has nothing to learn"
    )


def command(*arguments) -> subprocess.CompletedProcess:
    return subprocess.run(
        [sys.executable, toy.__file__, *map(str, arguments)], capture_output=True, text=True
    )


def test_the_command_line_shows_every_level():
    shown = command()
    assert shown.returncode == 0, shown.stderr
    for number, level in LEVELS.items():
        sample = make_sample(level, 0, "test", 0)
        assert f"level {number}    {sample.question.removeprefix('<image>')}" in shown.stdout
        assert write_trace(sample, level) in shown.stdout


def test_the_command_line_saves_a_picture_with_its_question(tmp_path):
    picture = tmp_path / "new" / "picture.png"
    saved = command("--sample", 3, picture)
    assert saved.returncode == 0, saved.stderr
    sample = make_sample(LEVELS[1], 0, "test", 3)
    assert sample.question.removeprefix("<image>") in saved.stdout
    assert f"answer: {sample.answer}" in saved.stdout
    with Image.open(picture) as image:
        assert image.convert("RGB").tobytes() == sample.images[0].tobytes()

    refused = command("--sample", "three", picture)
    assert refused.returncode == 2
    assert "--sample: expected a whole number, found 'three'" in refused.stderr


# ---------------------------------------------------------------- tokenizer and model


@pytest.mark.parametrize("number", LEVELS)
def test_tokenizer_and_image_size(number):
    """Qwen's special tokens, no loss of text, few tokens for the task's words, 16 visual tokens."""
    level = LEVELS[number]
    tokenizer = toy.build_tokenizer(level, TEMPLATE)
    sample = make_sample(level, 0, "test", 0)
    trace = write_trace(sample, level)
    ids = tokenizer(trace).input_ids
    assert tokenizer.decode(ids) == trace
    assert len(ids) < 16 * level.operands
    for text in ("naïve 數學 \U0001f600 x²", "<|im_end|>"):
        assert tokenizer.decode(tokenizer(text).input_ids) == text
    assert len(tokenizer("<|image_pad|>").input_ids) == 1
    assert tokenizer.eos_token == "<|im_end|>"

    prompt = encode_prompt(sample, 0, tokenizer, toy.build_image_processor(), TEMPLATE)
    assert int(prompt.visual_mask.sum()) == (level.grid * level.cell_size) ** 2 >= 16


def test_model_is_a_small_qwen(tokenizer):
    model = toy.build_model(tokenizer)
    assert type(model).__name__ == "Qwen2_5_VLForConditionalGeneration"
    assert 1e6 < sum(p.numel() for p in model.parameters()) < 3e6
    again = toy.build_model(tokenizer)
    for a, b in zip(model.parameters(), again.parameters(), strict=True):
        assert torch.equal(a, b)
    assert model.lm_head.weight is model.get_input_embeddings().weight


# ---------------------------------------------------------------- the warm start


def test_collate_pads_on_the_right_and_labels_the_traces_alone(tokenizer, image_processor):
    prompts = []
    for index, level in ((0, LEVELS[1]), (1, LEVELS[2])):
        sample = make_sample(level, 0, "train", index)
        prompts.append(encode_prompt(sample, 0, tokenizer, image_processor, TEMPLATE))
    traces = [[5, 6, 7, 8], [9]]
    arguments, labels = toy.collate(prompts, traces, pad_id=0)

    longest = max(len(p.input_ids) + len(t) for p, t in zip(prompts, traces, strict=True))
    assert labels.shape == arguments["input_ids"].shape == (2, longest)
    for row, (prompt, trace) in enumerate(zip(prompts, traces, strict=True)):
        before, length = len(prompt.input_ids), len(prompt.input_ids) + len(trace)
        padding = longest - length
        ids = prompt.input_ids.tolist() + trace
        assert arguments["input_ids"][row].tolist() == ids + [0] * padding
        assert labels[row].tolist() == [-100] * before + trace + [-100] * padding
        assert arguments["attention_mask"][row].tolist() == [1] * length + [0] * padding
        images = arguments["mm_token_type_ids"][row].bool()
        assert torch.equal(images[:before], prompt.visual_mask)
        assert not images[before:].any()
    grids = torch.cat([prompt.image_grid_thw for prompt in prompts])
    assert torch.equal(arguments["image_grid_thw"], grids)
    assert len(arguments["pixel_values"]) == int(grids.prod(dim=1).sum())


def test_warm_start_learns_and_is_cached(tmp_path, monkeypatch, capfd):
    """Ten batches lower the loss of traces, and the second call trains nothing.

    Another seed is another folder. What is being built, and where, is said once, if at all.
    """
    stages = (("colors", 2, 6e-3), ("traces", 8, 4e-3), ("slips", 2, 1e-3))
    monkeypatch.setitem(LEVELS, 1, replace(LEVELS[1], stages=stages))
    losses = []
    plain_cross_entropy = torch.nn.functional.cross_entropy

    def recorded(*arguments):
        losses.append(plain_cross_entropy(*arguments))
        return losses[-1]

    monkeypatch.setattr(toy.torch.nn.functional, "cross_entropy", recorded)
    folder = toy.prepare(1, 0, TEMPLATE, tmp_path, progress=False)
    assert "warm start" not in capfd.readouterr().err
    assert len(losses) == 12
    assert losses[9] < 0.7 * losses[2]
    assert toy.prepare(1, 0, TEMPLATE, tmp_path, progress=True) == folder
    assert len(losses) == 12
    assert capfd.readouterr() == ("", "")

    other = toy.prepare(1, 1, TEMPLATE, tmp_path, progress=True)
    assert other != folder
    assert len(losses) == 24
    said, shown = capfd.readouterr()
    assert said == ""
    assert shown.splitlines()[0] == (
        f"warm start of the toy: built once, about 1 min on one core, kept in {other}"
    )
    names = {path.name for path in tmp_path.iterdir()}
    assert names == {path.name for path in tmp_path.glob("toy-1-*") if "." not in path.name}
    with pytest.raises(ValueError, match="toy.level: expected one of 1.*found 9"):
        toy.prepare(9, 0, TEMPLATE, tmp_path)


# ---------------------------------------------------------------- the cache


class Part:
    """A model or a tokenizer, as far as the cache can tell."""

    def __init__(self, name: str, breaks: bool = False):
        self.name = name
        self.breaks = breaks

    def save_pretrained(self, folder: Path) -> None:
        (folder / self.name).write_text("x")
        if self.breaks:
            raise OSError("disk full")


def test_a_folder_of_the_cache_is_whole_or_absent(tmp_path):
    folder = tmp_path / "cache" / "toy"
    with pytest.raises(OSError, match="disk full"):
        toy._save_whole(folder, (Part("model"), Part("tokenizer", breaks=True)))
    assert not folder.exists()
    toy._save_whole(folder, (Part("model"), Part("tokenizer")))
    assert {path.name for path in folder.iterdir()} == {"model", "tokenizer", "checksums.json"}
    assert folder.stat().st_mode & 0o777 == 0o755


def test_everything_is_on_the_disk_before_the_folder_has_its_name(tmp_path, monkeypatch):
    """Otherwise a loss of power could leave the name and empty files."""
    events = []
    plain_fsync, plain_rename = os.fsync, os.rename

    def fsync(descriptor):
        events.append(Path(os.readlink(f"/proc/self/fd/{descriptor}")).name.split(".")[0])
        plain_fsync(descriptor)

    def rename(source, target):
        events.append("rename")
        plain_rename(source, target)

    monkeypatch.setattr(os, "fsync", fsync)
    monkeypatch.setattr(os, "rename", rename)
    toy._save_whole(tmp_path / "toy", (Part("model"), Part("tokenizer")))
    assert sorted(events[:3]) == ["checksums", "model", "tokenizer"]
    assert events[3:] == ["toy", "rename", tmp_path.name]


def test_of_two_processes_that_build_the_same_the_first_one_counts(tmp_path):
    toy._save_whole(tmp_path / "toy", (Part("first"),))
    toy._save_whole(tmp_path / "toy", (Part("second"),))
    assert [path.name for path in tmp_path.iterdir()] == ["toy"]
    assert {path.name for path in (tmp_path / "toy").iterdir()} == {"first", "checksums.json"}


def damage_nothing(folder: Path) -> None:
    pass


def empty(folder: Path) -> None:
    for path in folder.iterdir():
        path.unlink()


def cut(folder: Path) -> None:
    os.truncate(folder / "tokenizer", 0)


@pytest.mark.parametrize(
    "damage, expected",
    [
        (damage_nothing, None),
        (empty, "is not whole (FileNotFoundError"),
        (cut, "tokenizer is not what was saved (its checksum differs): the warm start is built"),
    ],
)
def test_a_damaged_warm_start_is_noticed_and_built_anew(
    tmp_path, monkeypatch, capfd, damage, expected
):
    built = []

    def warm_start(*_, **__):
        built.append(1)
        return (Part("model"), Part("tokenizer"))

    monkeypatch.setattr(toy, "warm_start", warm_start)
    folder = toy.prepare(1, 0, TEMPLATE, cache_dir=tmp_path)
    damage(folder)
    capfd.readouterr()
    assert toy.prepare(1, 0, TEMPLATE, cache_dir=tmp_path) == folder
    said = capfd.readouterr().err
    assert len(built) == (1 if expected is None else 2)
    assert (expected or "") in said
    assert bool(said) == (expected is not None)
    assert (folder / "tokenizer").read_text() == "x"
    assert [path.name for path in tmp_path.iterdir()] == [folder.name]


def test_a_cache_that_cannot_be_written_to_is_found_before_the_work(tmp_path, monkeypatch):
    def warm_start(*_, **__):
        raise AssertionError("minutes of work")

    monkeypatch.setattr(toy, "warm_start", warm_start)
    (tmp_path / "file").write_text("x")
    with pytest.raises(FolderError, match="toy.cache_dir: expected a folder that can be written"):
        toy.prepare(1, 0, TEMPLATE, cache_dir=tmp_path / "file" / "cache")


def test_leftovers_of_killed_builds_are_removed(tmp_path):
    """Only those of the same name, and only those too old to be of a process still at work."""
    for name in ("toy-1.partial-old", "toy-1.partial-new", "toy-2.partial-old", "toy-1"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "file").write_text("x")
        if name.endswith("old"):
            two_hours_ago = time.time() - 7200
            os.utime(tmp_path / name, (two_hours_ago, two_hours_ago))
    toy._remove_leftovers(tmp_path / "toy-1")
    left = {path.name for path in tmp_path.iterdir()}
    assert left == {"toy-1", "toy-1.partial-new", "toy-2.partial-old"}
    toy._remove_leftovers(tmp_path / "no such cache" / "toy-1")


def test_splits_and_warm_start_of_a_config(tmp_path, monkeypatch):
    from config import DEFAULTS, load_config

    config = load_config(
        DEFAULTS,
        ["toy.level=2", "toy.seed=7", "toy.eval_size=3", f"toy.cache_dir={tmp_path}"],
    )
    train, test = toy.splits(config)
    assert (train.split, train.size) == ("train", config.toy.train_size)
    assert (test.split, test.size) == ("test", 3)
    assert train.level == test.level == LEVELS[2]
    assert train.seed == test.seed == 7

    asked = {}
    monkeypatch.setattr(toy, "prepare", lambda **arguments: asked.update(arguments))
    toy.warm_start_folder(config, progress=False)
    assert asked == dict(
        level=2,
        seed=7,
        template=config.data.prompt_template,
        cache_dir=str(tmp_path),
        progress=False,
    )
