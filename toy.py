"""toy.py: the embedded default: a visual-reasoning task, a tiny Qwen2.5-VL, and its warm start.

A picture holds one of each shape, every one in a random colour and cell. Each colour is worth a
number (fixed, or read from a legend in the question), and the question asks for the sum over some
shapes:

    Sum cross, circle, square.
    <think>cross is blue 3, total 3. circle is red 1, total 4. square is red 1, total 5.</think>
    <answer>5</answer>                                         (on one line, without a space)

A right answer alternates between the modalities: the colour of a shape can only be seen, its number
and the running total can only be read.

Reinforcement learning needs a policy that is sometimes right. The warm start makes one, by
supervised training in stages: first it learns to see colours, then to write whole traces, and last
it learns *bad habits*. These are slips, made on purpose at a set rate. A visual slip names the
colour of the next shape in SHAPES, a textual slip makes the running total one too high. Both are
decisions that reinforcement learning can undo, and the two rates tell visual from textual errors.

    python toy.py                                  # a question of each level, and two traces
    python toy.py --sample 0 runs/picture.png      # a test picture, its question and its answer
"""

import argparse
import contextlib
import hashlib
import json
import math
import random
import shutil
import sys
import time
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path

import torch
from PIL import Image, ImageDraw
from tqdm import tqdm

from data import Prompt, Sample, encode_prompt
from run_folder import (
    RunError,
    check_folder,
    make_folder,
    remove_folder,
    write_checksums,
    write_folder,
)

SHAPES = ("circle", "square", "triangle", "cross", "diamond", "ring")
COLORS = {
    "red": (214, 39, 40),
    "green": (44, 160, 44),
    "blue": (31, 90, 200),
    "yellow": (240, 200, 20),
}
BACKGROUND = (245, 245, 245)
FIXED_VALUES = {"red": 1, "green": 2, "blue": 3, "yellow": 4}
CELL = 28  # pixels: one visual token of Qwen2.5-VL
BATCH = 32  # of the warm start
IGNORED = -100  # the label of positions without a loss


@dataclass(frozen=True)
class Level:
    """One difficulty. Slip rates are probabilities per decision, in the last warm-start stage."""

    grid: int  # cells per side; grid² visual tokens at cell_size 1
    cell_size: int  # visual tokens per side of a cell
    shapes: int  # shapes in the picture, all different
    operands: int  # shapes in the question
    legend: bool  # colours are worth what a legend in the question says, else FIXED_VALUES
    visual_slip: float  # a shape is given the colour of the next shape in SHAPES
    # The same, for the first shape of SHAPES. Above one half, greedy decoding is wrong there too;
    # below, it would be right from the start and have nothing to learn.
    habit_slip: float
    textual_slip: float  # a running total comes out one too high
    stages: tuple  # warm start: (kind of trace, batches, learning rate) in order


# The default: 16 visual tokens, fixed values.
LEVEL_1 = Level(
    grid=4,
    cell_size=1,
    shapes=4,
    operands=3,
    legend=False,
    visual_slip=0.2,
    habit_slip=0.82,
    textual_slip=0.12,
    stages=(("colors", 150, 6e-3), ("traces", 110, 4e-3), ("slips", 80, 1e-3)),
)
# Longer and larger: 25 visual tokens, six shapes, four operands.
LEVEL_2 = replace(
    LEVEL_1,
    grid=5,
    shapes=6,
    operands=4,
    textual_slip=0.2,
    stages=(("colors", 250, 6e-3), ("traces", 150, 4e-3), ("slips", 80, 1e-3)),
)
# What a colour is worth must be read: a legend in each question, totals up to 27.
LEVEL_3 = replace(
    LEVEL_1,
    legend=True,
    stages=(("colors", 150, 6e-3), ("traces", 600, 4e-3), ("slips", 80, 1e-3)),
)
LEVELS = {1: LEVEL_1, 2: LEVEL_2, 3: LEVEL_3}
SECONDS_PER_BATCH = 0.52  # of the warm start, about, on one core


# ---------------------------------------------------------------- the task


def draw_shape(
    draw: ImageDraw.ImageDraw, shape: str, color: tuple, x: int, y: int, size: int
) -> None:
    """Draw one shape into the square cell whose upper left corner is (x, y), in pixels."""
    margin = size // 7
    left, right = x + margin, x + size - margin - 1
    top, bottom = y + margin, y + size - margin - 1
    center_x, center_y = x + size // 2, y + size // 2
    if shape == "circle":
        draw.ellipse((left, top, right, bottom), fill=color)
    elif shape == "square":
        draw.rectangle((left, top, right, bottom), fill=color)
    elif shape == "triangle":
        draw.polygon([(center_x, top), (right, bottom), (left, bottom)], fill=color)
    elif shape == "cross":
        draw.line((left, top, right, bottom), fill=color, width=size // 5)
        draw.line((left, bottom, right, top), fill=color, width=size // 5)
    elif shape == "diamond":
        corners = [(center_x, top), (right, center_y), (center_x, bottom), (left, center_y)]
        draw.polygon(corners, fill=color)
    elif shape == "ring":
        draw.ellipse((left, top, right, bottom), outline=color, width=size // 6)
    else:
        raise ValueError(f"unknown shape {shape!r}; known: {', '.join(SHAPES)}")


def make_sample(level: Level, seed: int, split: str, index: int) -> Sample:
    """Sample number `index` of a split.

    The same arguments give the same picture and question, on any machine.
    """
    rng = random.Random(f"{seed}/{split}/{index}")
    shapes = SHAPES[: level.shapes]
    colors = {shape: rng.choice(list(COLORS)) for shape in shapes}
    cells = rng.sample(range(level.grid**2), level.shapes)
    asked = rng.sample(shapes, level.operands)
    values = FIXED_VALUES
    legend = ""
    if level.legend:
        values = dict(zip(COLORS, rng.sample(range(1, 10), len(COLORS)), strict=True))
        legend = ", ".join(f"{color} is {value}" for color, value in values.items()) + ". "

    size = CELL * level.cell_size
    image = Image.new("RGB", (size * level.grid, size * level.grid), BACKGROUND)
    draw = ImageDraw.Draw(image)
    for shape, cell in zip(shapes, cells, strict=True):
        row, column = divmod(cell, level.grid)
        draw_shape(draw, shape, COLORS[colors[shape]], x=column * size, y=row * size, size=size)

    return Sample(
        id=f"{split}-{index}",
        images=(image,),
        question=f"<image>{legend}Sum {', '.join(asked)}.",
        answer=str(sum(values[colors[shape]] for shape in asked)),
        extra={"asked": asked, "colors": colors, "values": values},
    )


class ToyDataset:
    """`size` samples of one split ("train" or "test"), drawn when they are asked for."""

    def __init__(self, level: Level, seed: int, split: str, size: int):
        self.level = level
        self.seed = seed
        self.split = split
        self.size = size
        self.name = f"toy/{split}"
        made_of = repr((asdict(level), seed, split, size))
        self.fingerprint = hashlib.sha256(made_of.encode()).hexdigest()

    def __len__(self) -> int:
        return self.size

    def __getitem__(self, index: int) -> Sample:
        if not 0 <= index < self.size:
            raise IndexError(index)
        return make_sample(self.level, self.seed, self.split, index=index)


def write_trace(sample: Sample, level: Level, rng: random.Random | None = None) -> str:
    """The response of a faultless solver, or with `rng` of one that slips at the level's rates."""
    colors, values = sample.extra["colors"], sample.extra["values"]
    shapes = list(colors)
    steps = []
    total = 0
    for shape in sample.extra["asked"]:
        color = colors[shape]
        if rng is not None:
            rate = level.habit_slip if shape == shapes[0] else level.visual_slip
            if rng.random() < rate:
                following = shapes[(shapes.index(shape) + 1) % len(shapes)]
                color = colors[following]
        total += values[color]
        # A wrong total is carried on, as a reader of the trace would carry it.
        if rng is not None and rng.random() < level.textual_slip:
            total += 1
        steps.append(f"{shape} is {color} {values[color]}, total {total}.")
    return f"<think>{' '.join(steps)}</think><answer>{total}</answer>"


def write_colors(sample: Sample) -> str:
    """Every shape with its colour, those of the question first: dense practice in looking."""
    colors = sample.extra["colors"]
    order = list(sample.extra["asked"])
    order += [shape for shape in colors if shape not in order]
    return "<think>" + " ".join(f"{shape} is {colors[shape]}." for shape in order)


# ---------------------------------------------------------------- tokenizer and model

# That of Qwen2.5-VL, without what the toy does not need (tools, videos).
CHAT_TEMPLATE = (
    "{% for message in messages %}"
    "{% if loop.first and message['role'] != 'system' %}"
    "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n"
    "{% endif %}"
    "<|im_start|>{{ message['role'] }}\n"
    "{% if message['content'] is string %}{{ message['content'] }}{% else %}"
    "{% for part in message['content'] %}"
    "{% if part['type'] == 'image' %}<|vision_start|><|image_pad|><|vision_end|>"
    "{% else %}{{ part['text'] }}{% endif %}"
    "{% endfor %}{% endif %}"
    "<|im_end|>\n"
    "{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
SPECIAL_TOKENS = [
    "<|endoftext|>",
    "<|im_start|>",
    "<|im_end|>",
    "<|vision_start|>",
    "<|vision_end|>",
    "<|vision_pad|>",
    "<|image_pad|>",
    "<|video_pad|>",
]


def build_tokenizer(level: Level, template: str):
    """Byte-level BPE trained on the task's own text, with Qwen's special tokens and chat format."""
    from tokenizers import Tokenizer, models, pre_tokenizers, trainers
    from transformers import Qwen2Tokenizer

    corpus = [template, "system\nYou are a helpful assistant.\nuser\nassistant\n"]
    for index in range(2000):
        sample = make_sample(level, seed=0, split="vocabulary", index=index)
        corpus.append(sample.question.replace("<image>", ""))
        corpus.append(write_trace(sample, level))
    trained = Tokenizer(models.BPE())
    # Qwen2Tokenizer will apply its own pre-tokenizer: merges across its borders would be useless.
    trained.pre_tokenizer = Qwen2Tokenizer().backend_tokenizer.pre_tokenizer
    trainer = trainers.BpeTrainer(
        vocab_size=1000,
        show_progress=False,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
    )
    trained.train_from_iterator(corpus, trainer)
    learned = json.loads(trained.to_str())["model"]
    tokenizer = Qwen2Tokenizer(
        vocab=learned["vocab"],
        merges=[tuple(merge) for merge in learned["merges"]],
        extra_special_tokens=SPECIAL_TOKENS,
        eos_token="<|im_end|>",
        pad_token="<|endoftext|>",
        unk_token="<|endoftext|>",
    )
    tokenizer.chat_template = CHAT_TEMPLATE
    return tokenizer


def build_image_processor():
    """Qwen's, for images of 4 to 1600 visual tokens: the sizes are areas in pixels, not edges."""
    from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

    return Qwen2VLImageProcessorPil(
        size={"shortest_edge": (2 * CELL) ** 2, "longest_edge": (40 * CELL) ** 2}
    )


def build_model(
    tokenizer, hidden: int = 128, layers: int = 4, vocabulary: int | None = None, seed: int = 0
):
    """A randomly initialised Qwen2_5_VLForConditionalGeneration, 1.4 M parameters by default.

    `hidden` is the width of the text model, a multiple of 64; `vocabulary` the number of tokens, by
    default the tokenizer's.
    """
    from transformers import Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration

    token_id = tokenizer.convert_tokens_to_ids
    head_dim = 32
    # With the usual 0.02, so narrow a model stays on a plateau for a thousand steps.
    initializer_range = 0.08
    config = Qwen2_5_VLConfig(
        text_config=dict(
            vocab_size=vocabulary or len(tokenizer),
            hidden_size=hidden,
            intermediate_size=3 * hidden,
            num_hidden_layers=layers,
            num_attention_heads=hidden // head_dim,
            num_key_value_heads=hidden // head_dim // 2,
            max_position_embeddings=4096,
            initializer_range=initializer_range,
            # The sections (time, height, width) share half of head_dim, as in the released models.
            rope_parameters={"rope_type": "default", "rope_theta": 1e4, "mrope_section": [4, 6, 6]},
            bos_token_id=token_id("<|endoftext|>"),
            eos_token_id=token_id("<|im_end|>"),
            pad_token_id=token_id("<|endoftext|>"),
        ),
        vision_config=dict(
            depth=2,
            hidden_size=96,
            intermediate_size=256,
            num_heads=3,
            out_hidden_size=hidden,
            # Without such a block, patches would never see beyond their window.
            fullatt_block_indexes=[1],
            initializer_range=initializer_range,
        ),
        image_token_id=token_id("<|image_pad|>"),
        video_token_id=token_id("<|video_pad|>"),
        vision_start_token_id=token_id("<|vision_start|>"),
        vision_end_token_id=token_id("<|vision_end|>"),
        tie_word_embeddings=True,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = Qwen2_5_VLForConditionalGeneration._from_config(
            config, attn_implementation="sdpa", dtype=torch.float32
        )
    model.generation_config.eos_token_id = [token_id("<|im_end|>"), token_id("<|endoftext|>")]
    model.generation_config.pad_token_id = token_id("<|endoftext|>")
    return model


# ---------------------------------------------------------------- warm start


def collate(
    prompts: list[Prompt], traces: list[list[int]], pad_id: int
) -> tuple[dict[str, torch.Tensor], torch.Tensor]:
    """Right-padded rows [prompt | trace] for the stock forward, and labels, IGNORED but in traces.

    Takes B prompts and B traces, which are token ids that end with <|im_end|>. Returns the
    arguments of the forward and the labels, [B, longest row] int64.
    """
    rows, labels, image_types = [], [], []
    for prompt, trace in zip(prompts, traces, strict=True):
        response = torch.tensor(trace)
        rows.append(torch.cat([prompt.input_ids, response]))
        labels.append(torch.cat([torch.full_like(prompt.input_ids, IGNORED), response]))
        # Without these, transformers silently gives image tokens the positions of plain text.
        image_types.append(torch.cat([prompt.visual_mask.long(), torch.zeros_like(response)]))

    def pad(tensors: list[torch.Tensor], value: int) -> torch.Tensor:
        return torch.nn.utils.rnn.pad_sequence(tensors, batch_first=True, padding_value=value)

    arguments = {
        "input_ids": pad(rows, pad_id),
        "attention_mask": pad([torch.ones_like(row) for row in rows], 0),
        "mm_token_type_ids": pad(image_types, 0),
        "pixel_values": torch.cat([prompt.pixel_values for prompt in prompts]),
        "image_grid_thw": torch.cat([prompt.image_grid_thw for prompt in prompts]),
    }
    return arguments, pad(labels, IGNORED)


def draw_batch(
    index: int, kind: str, level: Level, seed: int, template: str, tokenizer, image_processor
) -> tuple[dict[str, torch.Tensor], torch.Tensor]:
    """Batch number `index` of a stage of `kind` "colors", "traces" or "slips", by `collate`."""
    if kind == "colors":
        template = "{question}"  # the question alone: a third fewer tokens
    prompts, traces = [], []
    for place in range(index * BATCH, (index + 1) * BATCH):
        sample = make_sample(level, seed, f"warm-{kind}", index=place)
        if kind == "colors":
            text = write_colors(sample)
        elif kind == "traces":
            text = write_trace(sample, level)
        else:
            text = write_trace(sample, level, random.Random(f"{seed}/{sample.id}"))
        prompts.append(encode_prompt(sample, 0, tokenizer, image_processor, template=template))
        traces.append(tokenizer(text + "<|im_end|>").input_ids)
    return collate(prompts, traces, tokenizer.convert_tokens_to_ids("<|endoftext|>"))


def train_stage(model, draw, batches: int, lr: float, bar: tqdm) -> None:
    """Supervised training on the response tokens; draw(i) gives batch i."""
    # Muon for the matrices and AdamW for the rest: they learn to see colours in half the batches
    # that AdamW alone needs.
    matrices, others = [], []
    for name, parameter in model.named_parameters():
        is_matrix = parameter.ndim == 2 and "embed" not in name
        (matrices if is_matrix else others).append(parameter)
    optimizers = [
        torch.optim.Muon(matrices, lr=lr, weight_decay=0.0, adjust_lr_fn="match_rms_adamw"),
        torch.optim.AdamW(others, lr=lr / 2, weight_decay=0.0, betas=(0.9, 0.95)),
    ]

    def share_of_lr(batch: int) -> float:
        """Twenty batches up, then linearly down to a twentieth."""
        return min(1.0, (batch + 1) / 20, 1.05 - batch / batches)

    schedules = [
        torch.optim.lr_scheduler.LambdaLR(optimizer, share_of_lr) for optimizer in optimizers
    ]
    for i in range(batches):
        arguments, labels = draw(i)
        hidden = model.model(**arguments, use_cache=False).last_hidden_state
        # Position t predicts token t + 1. Only what has a label reaches the language-model head.
        targets = labels[:, 1:]
        keep = targets != IGNORED
        logits = model.lm_head(hidden[:, :-1][keep])
        loss = torch.nn.functional.cross_entropy(logits, targets[keep])
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for stepped in (*optimizers, *schedules):
            stepped.step()
        model.zero_grad()
        bar.set_postfix(loss=f"{loss.item():.4f}")
        bar.update()


def warm_start(level: Level, seed: int, template: str, progress: bool = True):
    """Train the policy that RL starts from. Returns (model, tokenizer, image processor)."""
    tokenizer = build_tokenizer(level, template)
    image_processor = build_image_processor()
    model = build_model(tokenizer, seed=seed)
    batches_in_all = sum(batches for _, batches, _ in level.stages)
    with tqdm(total=batches_in_all, disable=not progress) as bar:
        for kind, batches, lr in level.stages:
            bar.set_description(f"warm start: {kind}")
            draw = partial(
                draw_batch,
                kind=kind,
                level=level,
                seed=seed,
                template=template,
                tokenizer=tokenizer,
                image_processor=image_processor,
            )
            train_stage(model, draw, batches, lr=lr, bar=bar)
    return model, tokenizer, image_processor


# ---------------------------------------------------------------- the cache


def prepare(
    level: int, seed: int, template: str, cache_dir: str | Path, progress: bool = True
) -> Path:
    """The folder of the warm start, a Hugging Face directory; built if the cache does not hold it.

    The folder's name is a hash of all that the warm start depends on: this file's text, level, seed
    and prompt template. Raises ValueError for an unknown level, and FolderError for a cache that
    cannot be written to.
    """
    if level not in LEVELS:
        raise ValueError(f"toy.level: expected one of {', '.join(map(str, LEVELS))}, found {level}")
    made_of = f"{Path(__file__).read_text()}\n{level}\n{seed}\n{template}"
    name = f"toy-{level}-{hashlib.sha256(made_of.encode()).hexdigest()[:12]}"
    folder = Path(cache_dir) / name
    _remove_leftovers(folder)
    _remove_damaged(folder, progress)
    if not folder.exists():
        make_folder(folder.parent, "toy.cache_dir")  # before the minutes of work
        if progress:
            batches = sum(batches for _, batches, _ in LEVELS[level].stages)
            minutes = math.ceil(batches * SECONDS_PER_BATCH / 60)
            tqdm.write(
                f"warm start of the toy: built once, about {minutes} min on one core, "
                f"kept in {folder}",
                file=sys.stderr,
            )
        built = warm_start(LEVELS[level], seed, template, progress=progress)
        _save_whole(folder, built)
    return folder


def _save_whole(folder: Path, parts: tuple) -> None:
    """Save model, tokenizer and image processor into `folder`, which is complete or absent.

    If another process was first, its folder is as good as this one, and stays.
    """

    def fill(path: Path) -> None:
        for part in parts:
            part.save_pretrained(path)
        write_checksums(path)

    write_folder(folder, fill, replace=False)


def _remove_damaged(folder: Path, progress: bool) -> None:
    """Remove a warm start that is not what was saved: emptied, cut, or changed by somebody."""
    if not folder.exists():
        return
    try:
        check_folder(folder)
    except RunError as error:
        if progress:
            tqdm.write(f"{error}: the warm start is built anew", file=sys.stderr)
        with contextlib.suppress(FileNotFoundError):  # another process has just removed it
            remove_folder(folder)


def _remove_leftovers(folder: Path) -> None:
    """Remove what killed builds of this folder left beside it."""
    for path in folder.parent.glob(f"{folder.name}.partial-*"):
        # Another process may remove it at the same moment.
        with contextlib.suppress(OSError):
            # Saving takes seconds. A younger one may be of a process that is still at it.
            if time.time() - path.stat().st_mtime > 3600:
                shutil.rmtree(path)


# ---------------------------------------------------------------- what a config asks for


def warm_start_folder(config, progress: bool = True) -> Path:
    """`prepare` with what a Config asks for."""
    settings = config.toy
    return prepare(
        level=settings.level,
        seed=settings.seed,
        template=config.data.prompt_template,
        cache_dir=settings.cache_dir,
        progress=progress,
    )


def splits(config) -> tuple[ToyDataset, ToyDataset]:
    """The training and the test split that a Config asks for."""
    settings = config.toy
    level = LEVELS[settings.level]
    train = ToyDataset(level, settings.seed, "train", size=settings.train_size)
    test = ToyDataset(level, settings.seed, "test", size=settings.eval_size)
    return train, test


# ---------------------------------------------------------------- the command line


def show_levels() -> None:
    """Print a question of each level, its faultless trace and one with slips."""
    for number, level in LEVELS.items():
        sample = make_sample(level, seed=0, split="test", index=0)
        print(f"level {number}    {question_of(sample)}")
        print(f"  right    {write_trace(sample, level)}")
        print(f"  slips    {write_trace(sample, level, random.Random(0))}")


def save_sample(index: int, picture: str) -> None:
    """Save the picture of a test sample of level 1, and print its question and answer."""
    sample = make_sample(LEVELS[1], seed=0, split="test", index=index)
    Path(picture).parent.mkdir(parents=True, exist_ok=True)
    sample.images[0].save(picture)
    print(f"{question_of(sample)}    (answer: {sample.answer}; picture: {picture})")


def question_of(sample: Sample) -> str:
    return sample.question.replace("<image>", "")


def main() -> None:
    parser = argparse.ArgumentParser(description="Show the toy task: without options, each level.")
    parser.add_argument(
        "--sample",
        nargs=2,
        metavar=("INDEX", "PICTURE"),
        help="save the picture of a test sample of level 1, and print its question and answer",
    )
    options = parser.parse_args()
    if options.sample is None:
        show_levels()
        return
    index, picture = options.sample
    if not index.isdecimal():
        parser.error(f"--sample: expected a whole number, found {index!r}")
    save_sample(int(index), picture)


if __name__ == "__main__":
    from tools.command import command

    with command(OSError, ValueError):
        main()
