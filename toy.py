"""toy.py: the embedded default: a visual-reasoning task, its tokenizer, a tiny Qwen2.5-VL, and a warm start.

A picture holds one of each shape, every one in a random colour and cell. Each colour is worth a number (fixed, or read
from a legend in the question), and the question asks for the sum over some shapes:

    Sum cross, circle, square.
    <think>cross is blue 3, total 3. circle is red 1, total 4. square is red 1, total 5.</think><answer>5</answer>

A right answer alternates between the modalities: the colour of a shape can only be seen, its number and the running
total can only be read. The warm start teaches every skill and then *bad habits*: slips, made on purpose at a set rate.
A visual slip names the colour of the next shape in SHAPES, a textual slip makes the running total one too high.
Both are decisions that reinforcement learning can undo, and the two rates tell visual from textual errors.

    python toy.py            # build the warm start that config.yaml asks for, and print its folder
"""

import hashlib
import json
import os
import random
import shutil
import tempfile
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from PIL import Image, ImageDraw
from tqdm import tqdm

from data import Prompt, Sample, encode_prompt

SHAPES = ("circle", "square", "triangle", "cross", "diamond", "ring")
COLORS = {
    "red": (214, 39, 40),
    "green": (44, 160, 44),
    "blue": (31, 90, 200),
    "yellow": (240, 200, 20),
}
FIXED_VALUES = {"red": 1, "green": 2, "blue": 3, "yellow": 4}
CELL = 28  # pixels: one visual token of Qwen2.5-VL
BATCH = 32  # of the warm start


@dataclass(frozen=True)
class Level:
    """One difficulty. Slip rates are probabilities per decision of the last warm-start stage."""

    grid: int  # cells per side; grid² visual tokens at cell_size 1
    cell_size: int  # visual tokens per side of a cell
    shapes: int  # shapes in the picture, all different
    operands: int  # shapes in the question
    legend: bool  # colours are worth what a legend in the question says, else FIXED_VALUES
    visual_slip: float  # a shape is given the colour of the next shape in SHAPES
    habit_slip: float  # the same, for the first shape of SHAPES: above one half it fools greedy decoding too
    textual_slip: float  # a running total comes out one too high
    stages: tuple  # warm start: (kind of trace, batches, learning rate) in order


LEVELS = {
    # the default: 16 visual tokens, fixed values
    1: Level(
        grid=4,
        cell_size=1,
        shapes=4,
        operands=3,
        legend=False,
        visual_slip=0.2,
        habit_slip=0.82,
        textual_slip=0.12,
        stages=(("colors", 150, 6e-3), ("traces", 110, 4e-3), ("slips", 80, 1e-3)),
    ),
    # longer and larger: 25 visual tokens, six shapes, four operands
    2: Level(
        grid=5,
        cell_size=1,
        shapes=6,
        operands=4,
        legend=False,
        visual_slip=0.2,
        habit_slip=0.82,
        textual_slip=0.2,
        stages=(("colors", 250, 6e-3), ("traces", 150, 4e-3), ("slips", 80, 1e-3)),
    ),
    # what a colour is worth must be read: a legend in each question, totals up to 27
    3: Level(
        grid=4,
        cell_size=1,
        shapes=4,
        operands=3,
        legend=True,
        visual_slip=0.2,
        habit_slip=0.82,
        textual_slip=0.12,
        stages=(("colors", 150, 6e-3), ("traces", 600, 4e-3), ("slips", 80, 1e-3)),
    ),
}


# ---------------------------------------------------------------------------------------------------- the task


def draw_shape(
    draw: ImageDraw.ImageDraw, shape: str, color: tuple, x: int, y: int, size: int
) -> None:
    """Draw one shape into the square cell whose upper left corner is (x, y), in pixels."""
    m = size // 7
    left, top, right, bottom, cx, cy = (
        x + m,
        y + m,
        x + size - m - 1,
        y + size - m - 1,
        x + size // 2,
        y + size // 2,
    )
    if shape == "circle":
        draw.ellipse((left, top, right, bottom), fill=color)
    elif shape == "square":
        draw.rectangle((left, top, right, bottom), fill=color)
    elif shape == "triangle":
        draw.polygon([(cx, top), (right, bottom), (left, bottom)], fill=color)
    elif shape == "cross":
        draw.line((left, top, right, bottom), fill=color, width=size // 5)
        draw.line((left, bottom, right, top), fill=color, width=size // 5)
    elif shape == "diamond":
        draw.polygon([(cx, top), (right, cy), (cx, bottom), (left, cy)], fill=color)
    elif shape == "ring":
        draw.ellipse((left, top, right, bottom), outline=color, width=size // 6)
    else:
        raise ValueError(f"unknown shape {shape!r}; known: {', '.join(SHAPES)}")


def make_sample(level: Level, seed: int, split: str, index: int) -> Sample:
    """Sample number `index` of a split: the same arguments give the same picture and question, on any machine."""
    rng = random.Random(f"{seed}/{split}/{index}")
    shapes = SHAPES[: level.shapes]
    colors = {shape: rng.choice(list(COLORS)) for shape in shapes}
    cells = dict(zip(shapes, rng.sample(range(level.grid**2), level.shapes)))
    asked = rng.sample(shapes, level.operands)
    values = (
        dict(zip(COLORS, rng.sample(range(1, 10), len(COLORS)))) if level.legend else FIXED_VALUES
    )

    size = CELL * level.cell_size
    image = Image.new("RGB", (size * level.grid, size * level.grid), (245, 245, 245))
    draw = ImageDraw.Draw(image)
    for shape, cell in cells.items():
        draw_shape(
            draw,
            shape,
            COLORS[colors[shape]],
            cell % level.grid * size,
            cell // level.grid * size,
            size,
        )

    legend = (
        "".join(f"{color} is {value}, " for color, value in values.items())[:-2] + ". "
        if level.legend
        else ""
    )
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
        self.level, self.seed, self.split, self.size = level, seed, split, size
        self.name = f"toy/{split}"
        self.fingerprint = hashlib.sha256(
            repr((asdict(level), seed, split, size)).encode()
        ).hexdigest()

    def __len__(self) -> int:
        return self.size

    def __getitem__(self, index: int) -> Sample:
        if not 0 <= index < self.size:
            raise IndexError(index)
        return make_sample(self.level, self.seed, self.split, index)


def write_trace(sample: Sample, level: Level, rng: random.Random | None = None) -> str:
    """The response of a faultless solver, or with `rng` of one that slips at the level's rates."""
    colors, values = sample.extra["colors"], sample.extra["values"]
    steps, total = [], 0
    for shape in sample.extra["asked"]:
        color = colors[shape]
        if rng is not None:
            others = list(colors)
            if rng.random() < (level.habit_slip if shape == others[0] else level.visual_slip):
                color = colors[others[(others.index(shape) + 1) % len(others)]]
        total += values[color]
        if rng is not None and rng.random() < level.textual_slip:
            total += 1
        steps.append(f"{shape} is {color} {values[color]}, total {total}.")
    return f"<think>{' '.join(steps)}</think><answer>{total}</answer>"


def write_colors(sample: Sample) -> str:
    """Every shape with its colour, in the order of the question and then of SHAPES: dense practice in looking."""
    asked = sample.extra["asked"]
    order = asked + [shape for shape in sample.extra["colors"] if shape not in asked]
    return "<think>" + " ".join(f"{shape} is {sample.extra['colors'][shape]}." for shape in order)


# --------------------------------------------------------------------------------------- tokenizer and model

CHAT_TEMPLATE = (
    "{% for message in messages %}"
    "{% if loop.first and message['role'] != 'system' %}<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n{% endif %}"
    "<|im_start|>{{ message['role'] }}\n"
    "{% if message['content'] is string %}{{ message['content'] }}{% else %}{% for part in message['content'] %}"
    "{% if part['type'] == 'image' %}<|vision_start|><|image_pad|><|vision_end|>{% else %}{{ part['text'] }}{% endif %}"
    "{% endfor %}{% endif %}<|im_end|>\n"
    "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
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
    """Byte-level BPE trained on the task's own text, with Qwen's pre-tokenizer, special tokens and chat format."""
    from tokenizers import Tokenizer, models, pre_tokenizers, trainers
    from transformers import Qwen2Tokenizer

    samples = [make_sample(level, 0, "vocabulary", index) for index in range(2000)]
    corpus = [template, "system\nYou are a helpful assistant.\nuser\nassistant\n"]
    for sample in samples:
        corpus += [sample.question.replace("<image>", ""), write_trace(sample, level)]
    trained = Tokenizer(models.BPE())
    # the pre-tokenizer that Qwen2Tokenizer will apply: merges across its borders would never be reached
    trained.pre_tokenizer = Qwen2Tokenizer().backend_tokenizer.pre_tokenizer
    trained.train_from_iterator(
        corpus,
        trainers.BpeTrainer(
            vocab_size=1000,
            show_progress=False,
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        ),
    )
    learned = json.loads(trained.to_str())["model"]
    tokenizer = Qwen2Tokenizer(
        vocab=learned["vocab"],
        merges=[tuple(m) for m in learned["merges"]],
        extra_special_tokens=SPECIAL_TOKENS,
        eos_token="<|im_end|>",
        pad_token="<|endoftext|>",
        unk_token="<|endoftext|>",
    )
    tokenizer.chat_template = CHAT_TEMPLATE
    return tokenizer


def build_image_processor():
    from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

    return Qwen2VLImageProcessorPil(
        size={"shortest_edge": 2 * CELL * 2 * CELL, "longest_edge": 40 * CELL * 40 * CELL}
    )


def build_model(
    tokenizer, hidden: int = 128, layers: int = 4, vocabulary: int | None = None, seed: int = 0
):
    """A randomly initialised Qwen2_5_VLForConditionalGeneration, about 1.4 M parameters at the default width.

    initializer_range 0.08 instead of 0.02 decides whether so narrow a model learns within minutes.
    """
    from transformers import Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration

    token_id = tokenizer.convert_tokens_to_ids
    head_dim = 32
    config = Qwen2_5_VLConfig(
        text_config=dict(
            vocab_size=vocabulary or len(tokenizer),
            hidden_size=hidden,
            intermediate_size=3 * hidden,
            num_hidden_layers=layers,
            num_attention_heads=hidden // head_dim,
            num_key_value_heads=hidden // head_dim // 2,
            max_position_embeddings=4096,
            initializer_range=0.08,
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
            fullatt_block_indexes=[1],
            initializer_range=0.08,
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


# ------------------------------------------------------------------------------------------------- warm start


def collate(
    prompts: list[Prompt], traces: list[list[int]], pad_id: int
) -> tuple[dict, torch.Tensor]:
    """Right-padded rows [prompt | trace | <|im_end|>] for the stock forward; labels -100 outside the traces."""
    rows = [
        torch.cat([prompt.input_ids, torch.tensor(trace)]) for prompt, trace in zip(prompts, traces)
    ]
    pad = lambda tensors, value: torch.nn.utils.rnn.pad_sequence(
        tensors, batch_first=True, padding_value=value
    )
    labels = [
        torch.cat([torch.full_like(p.input_ids, -100), torch.tensor(t)])
        for p, t in zip(prompts, traces)
    ]
    image = [
        torch.nn.functional.pad(p.visual_mask.long(), (0, len(row) - len(p.visual_mask)))
        for p, row in zip(prompts, rows)
    ]
    batch = {
        "input_ids": pad(rows, pad_id),
        "attention_mask": pad([torch.ones_like(row) for row in rows], 0),
        "mm_token_type_ids": pad(image, 0),
        "pixel_values": torch.cat([p.pixel_values for p in prompts]),
        "image_grid_thw": torch.cat([p.image_grid_thw for p in prompts]),
    }
    return batch, pad(labels, -100)


def train_stage(model, draw_batch, batches: int, lr: float, bar) -> None:
    """Supervised training on the response tokens; draw_batch(i) gives batch i as `collate` makes it.

    Muon for the matrices and AdamW for the rest learned to see colours in half the batches that AdamW alone needed.
    """
    inner = [p for name, p in model.named_parameters() if p.ndim == 2 and "embed" not in name]
    inner_ids = {id(p) for p in inner}
    outer = [p for p in model.parameters() if id(p) not in inner_ids]
    optimizers = [
        torch.optim.Muon(inner, lr=lr, weight_decay=0.0, adjust_lr_fn="match_rms_adamw"),
        torch.optim.AdamW(outer, lr=lr / 2, weight_decay=0.0, betas=(0.9, 0.95)),
    ]
    schedules = [
        torch.optim.lr_scheduler.LambdaLR(o, lambda i: min(1.0, (i + 1) / 20, 1.05 - i / batches))
        for o in optimizers
    ]
    for i in range(batches):
        batch, labels = draw_batch(i)
        hidden = model.model(**batch, use_cache=False).last_hidden_state
        keep = labels[:, 1:] != -100  # only response positions reach the language-model head
        loss = torch.nn.functional.cross_entropy(
            model.lm_head(hidden[:, :-1][keep]), labels[:, 1:][keep]
        )
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for step in (*optimizers, *schedules):
            step.step()
        model.zero_grad()
        bar.set_postfix(loss=f"{loss.item():.4f}")
        bar.update()


def warm_start(level: Level, seed: int, template: str, progress: bool = True):
    """Train the policy that RL starts from. Returns (model, tokenizer, image processor)."""
    tokenizer, image_processor = build_tokenizer(level, template), build_image_processor()
    model = build_model(tokenizer, seed=seed)
    pad_id = tokenizer.convert_tokens_to_ids("<|endoftext|>")
    bar = tqdm(total=sum(batches for _, batches, _ in level.stages), disable=not progress)
    for kind, batches, lr in level.stages:

        def draw_batch(i: int, kind=kind):
            samples = [
                make_sample(level, seed, f"warm-{kind}", i * BATCH + j) for j in range(BATCH)
            ]
            if kind == "colors":  # the question alone: a third fewer tokens
                texts, wording = [write_colors(sample) for sample in samples], "{question}"
            else:
                slips = lambda sample: (
                    random.Random(f"{seed}/{sample.id}") if kind == "slips" else None
                )
                texts, wording = (
                    [write_trace(sample, level, slips(sample)) for sample in samples],
                    template,
                )
            prompts = [
                encode_prompt(sample, 0, tokenizer, image_processor, wording) for sample in samples
            ]
            return collate(
                prompts, [tokenizer(text + "<|im_end|>").input_ids for text in texts], pad_id
            )

        bar.set_description(f"warm start: {kind}")
        train_stage(model, draw_batch, batches, lr, bar)
    bar.close()
    return model, tokenizer, image_processor


def prepare(
    level: int, seed: int, template: str, cache_dir: str | Path, progress: bool = True
) -> Path:
    """The folder of the warm start, a Hugging Face directory; built if the cache does not hold it.

    The folder's name is a hash of this file's text, level, seed and prompt template.
    Raises ValueError for an unknown level.
    """
    if level not in LEVELS:
        raise ValueError(f"toy.level: expected one of {', '.join(map(str, LEVELS))}, found {level}")
    made_of = f"{Path(__file__).read_text()}\n{level}\n{seed}\n{template}"
    folder = Path(cache_dir) / f"toy-{level}-{hashlib.sha256(made_of.encode()).hexdigest()[:12]}"
    if not folder.exists():
        built = warm_start(LEVELS[level], seed, template, progress)
        folder.parent.mkdir(parents=True, exist_ok=True)
        beside = Path(tempfile.mkdtemp(dir=folder.parent, prefix=f"{folder.name}."))
        for part in built:
            part.save_pretrained(beside)
        try:
            os.rename(beside, folder)  # atomic: a folder of this name is complete
        except OSError:
            shutil.rmtree(beside)  # another process was first
            if not folder.exists():
                raise
    return folder


def warm_start_folder(config, progress: bool = True) -> Path:
    """`prepare` with what a Config asks for."""
    settings = config.toy
    return prepare(
        settings.level, settings.seed, config.data.prompt_template, settings.cache_dir, progress
    )


def splits(config) -> tuple[ToyDataset, ToyDataset]:
    """The training and the test split that a Config asks for."""
    level = LEVELS[config.toy.level]
    train = ToyDataset(level, config.toy.seed, "train", config.toy.train_size)
    test = ToyDataset(level, config.toy.seed, "test", config.toy.eval_size)
    return train, test


if __name__ == "__main__":
    from config import load_config

    print(warm_start_folder(load_config()))
