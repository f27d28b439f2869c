"""data.py: samples from a JSONL file, the prompt a model reads, and the order of drawing samples.

    dataset = JsonlDataset("train.jsonl", image_root="images")
    check_lengths(dataset, tokenizer, image_processor, template, max_prompt_tokens=2048)
    sampler = Sampler(len(dataset), seed=0)
    for place, index in enumerate(sampler.take(8)):
        prompt = encode_prompt(dataset[index], place, tokenizer, image_processor, template)

Each line of the file is one JSON object, a row. A row has one of two forms. In the plain form,
`<image>` marks where each image stands in the question; without any mark the images come first:

    {"images": ["a.png", "b.png"], "question": "<image>Is it larger than <image>?", "answer": "yes"}

The other form is that of the authors' files, a conversation of one human and one gpt turn (on one
line; "image" and "images" both hold one path or an array of paths, in either form):

    {"id": "7", "image": "a.png", "conversations": [{"from": "human", "value": "<image>How many?"},
                                                    {"from": "gpt", "value": "3"}]}

A row may also have an "id" (else it is the line number) and other keys, whose simple values reach
custom rewards as `sample.extra`. Rows that share an id, as several questions about one picture do,
become id, id#2, id#3 in the order of the file. A key that names a picture, a video or a sound but
is neither "image" nor "images" is an error, because the model would never see what it names.

Rows come from many sources, so nothing in the file is trusted, and everything is checked before
training starts: a run should fail in its first minute, not at step 900. The JSON must be valid,
with no key twice. The question and the answer must hold text. There must be as many marks as
images. A question must not contain special tokens, because it could end the user's turn with them.
Image paths must stay below the image root, because a row should not open other files. Every image
is decoded once, because the header of a truncated file looks intact. Finally, `check_lengths`
counts each prompt's tokens. All bad rows are reported together, by line. rows.py checks single
lines and images. No model is needed for any of this, only its tokenizer and its image processor.
"""

import codecs
import difflib
import hashlib
import os
import random
import warnings
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor
from tqdm import tqdm

from rows import (
    IMAGE_MARKER,
    DataError,
    MissingImageError,
    Row,
    check_image_size,
    check_special_tokens,
    decode_image,
    load_image,
    open_image,
    parse_row,
    printable,
    refuse_other_formats,
    show,
)

QUESTION_MARKER = "{question}"
MAX_LISTED_PROBLEMS = 20


@dataclass(frozen=True)
class Sample:
    """One question about zero or more images."""

    id: str
    images: tuple[Image.Image, ...]  # RGB, decoded
    question: str  # one "<image>" per image, where that image stands
    answer: str
    extra: dict = field(default_factory=dict)  # the rest of the row, for custom rewards and reports


@dataclass
class Prompt:
    """One encoded prompt of P tokens, on the CPU. N is the number of patches of all its images."""

    index: int  # keys the random streams of its responses: the prompt's place in the step
    id: str
    answer: str
    question: str
    input_ids: Tensor  # [P] int64, image placeholders expanded
    visual_mask: Tensor  # [P] bool, True exactly at the image placeholders
    # [N, channels * temporal_patch * patch * patch] float32; None without images
    pixel_values: Tensor | None
    image_grid_thw: Tensor | None  # [images, 3] int64, in patches: time, height, width


def without_images(prompt: Prompt) -> Prompt:
    """What is left of a prompt where all that its images stand for is taken out."""
    is_text = ~prompt.visual_mask
    return replace(
        prompt,
        input_ids=prompt.input_ids[is_text],
        visual_mask=prompt.visual_mask[is_text],
        pixel_values=None,
        image_grid_thw=None,
    )


# ---------------------------------------------------------------- dataset


class JsonlDataset:
    """The samples of a JSONL file. Everything is checked here; images are decoded again on access.

    Bad rows are reported together: `on_error` "raise" raises DataError, "skip" warns and drops
    them. Relative image paths start at `image_root`, by default the folder of the file. `root_key`
    is what messages call that setting. `check_answer` takes each row's answer and returns the
    reference to use for it; it raises DataError for one that no response can match.
    """

    def __init__(
        self,
        path: str | Path,
        image_root: str | Path | None = None,
        on_error: str = "raise",
        progress: bool = True,
        root_key: str = "data.image_root",
        check_answer: Callable[[str], str] | None = None,
    ) -> None:
        if on_error not in ("raise", "skip"):
            raise DataError(f'on_error is {on_error!r}; expected "raise" or "skip"')
        self.path = Path(path)
        self.name = self.path.name
        self.on_error = on_error
        self.progress = progress
        content = _read_file(self.path)
        self._content_hash = hashlib.sha256(content).hexdigest()
        self.image_root = self.path.parent if image_root is None else Path(image_root)
        if not self.image_root.is_dir():
            raise DataError(f"{root_key} {str(image_root)!r} is not a folder")
        self._root_key = root_key

        content = content.removeprefix(codecs.BOM_UTF8)
        refuse_other_formats(self.path, content)
        problems: dict[int, DataError] = {}  # by line
        self._image_hashes: dict[str, str] = {}  # path -> hash of the file
        self.rows = _parse_rows(content, problems, check_answer)
        if not self.rows and not problems:
            raise DataError(f"{self.path} is empty; expected one JSON object per line")
        self._tell_ids_apart()

        self.image_sizes = self._check_images(problems)  # path: (width, height), upright, in pixels
        self.settle(problems)
        self._warn_about_late_images()

    def __len__(self) -> int:
        return len(self.rows)

    @property
    def fingerprint(self) -> str:
        """A hash of the file, of the lines in use and of their images, every byte.

        A resumed run compares it, to tell whether its sampler's places still mean the same rows.
        """
        lines = [row.line for row in self.rows]
        images = sorted(self._image_hashes.items())
        return hashlib.sha256(repr((self._content_hash, lines, images)).encode()).hexdigest()

    @property
    def ids(self) -> list[str]:
        """Each sample's id, without opening its images."""
        return [row.id for row in self.rows]

    def __getitem__(self, index: int) -> Sample:
        """The sample at `index`. Raises DataError if its images changed since the check."""
        row = self.rows[index]
        try:
            images = tuple(load_image(path, self.image_root) for path in row.images)
        except DataError as error:
            raise DataError(f"{self.path}, line {row.line}: {error}") from error
        return Sample(row.id, images, row.question, answer=row.answer, extra=dict(row.extra))

    def settle(self, problems: dict[int, DataError]) -> None:
        """Report bad rows, {line: error}, together: raise DataError, or warn and drop them."""
        if not problems:
            return
        total = len({row.line for row in self.rows} | problems.keys())
        report = self._describe(problems, total)
        if self.on_error == "raise" or len(problems) == total:
            raise DataError(report)
        warnings.warn(printable(f"{report}\nthese rows are skipped"), stacklevel=3)
        self.rows = [row for row in self.rows if row.line not in problems]

    def _describe(self, problems: dict[int, DataError], total: int) -> str:
        """The first problems, a line each, and how many there are in all."""
        lines = sorted(problems)
        report = [f"{self.path}: {len(lines)} of {total} rows cannot be used:"]
        for line in lines[:MAX_LISTED_PROBLEMS]:
            report.append(f"  line {line}: {problems[line]}")
        if len(lines) > MAX_LISTED_PROBLEMS:
            report.append(f"  … and {len(lines) - MAX_LISTED_PROBLEMS} more")

        # If the first images are all missing, the folder is more likely wrong than every row.
        first_with_images = [row.line for row in self.rows if row.images][:5]
        missing = [isinstance(problems.get(n), MissingImageError) for n in first_with_images]
        if missing and all(missing):
            report.append(
                f"no image was found; is {self._root_key} ({str(self.image_root)!r}) "
                "the right folder?"
            )
        return "\n".join(report)

    def _tell_ids_apart(self) -> None:
        """Rename each row whose id an earlier row has, and warn once.

        This comes before any row is dropped, so a row keeps its name when another is mended.
        """
        taken = {row.id for row in self.rows}
        copies: dict[str, int] = {}  # how often each id stood so far
        renamed = []
        for place, row in enumerate(self.rows):
            copies[row.id] = copies.get(row.id, 0) + 1
            if copies[row.id] == 1:
                continue
            # "a#2" may be the id of a row in the file.
            while f"{row.id}#{copies[row.id]}" in taken:
                copies[row.id] += 1
            self.rows[place] = replace(row, id=f"{row.id}#{copies[row.id]}")
            renamed.append((row, self.rows[place].id))
        if renamed:
            first, new_id = renamed[0]
            warnings.warn(
                f"{self.path}: {len(renamed)} rows have the id of an earlier row, or its line "
                f"number; they get ids of their own (first: line {first.line}, {show(first.id)} is "
                f"now {show(new_id)})",
                stacklevel=3,
            )

    def _check_images(self, problems: dict[int, DataError]) -> dict[str, tuple[int, int]]:
        """Decode every image once. Returns {path: (width, height)} and adds to `problems`."""
        paths = list(dict.fromkeys(path for row in self.rows for path in row.images))

        def size_or_error(path: str) -> tuple[int, int] | DataError:
            try:
                with open_image(path, self.image_root) as file:
                    size = decode_image(file, f"image {show(path)}").size
                    file.seek(0)
                    self._image_hashes[path] = hashlib.file_digest(file, "sha256").hexdigest()
                return size
            except DataError as error:
                # A fresh one: this one's traceback would keep half-decoded pixels alive.
                return type(error)(str(error))

        with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:
            checks = tqdm(
                pool.map(size_or_error, paths),
                desc=f"{self.name}: checking images",
                total=len(paths),
                disable=not self.progress or not paths,
            )
            results = dict(zip(paths, checks, strict=True))
        for row in self.rows:
            for path in row.images:
                if isinstance(results[path], DataError):
                    problems.setdefault(row.line, results[path])
        return {path: size for path, size in results.items() if not isinstance(size, DataError)}

    def _warn_about_late_images(self) -> None:
        """Warn of questions with text before the first image.

        DyCo's text scope starts at the first image, past the attention sink, and omits such text.
        """
        late = []
        for row in self.rows:
            before = row.question.split(IMAGE_MARKER)[0]
            if row.images and before.strip():
                late.append(row.line)
        if late:
            warnings.warn(
                f"{self.path}: in {len(late)} rows (first: line {late[0]}) text stands before the "
                "first image; with dyco.text_scope=after_image that text is not counted as text. "
                "Put images first where you can",
                stacklevel=3,
            )


def _read_file(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except (OSError, ValueError) as error:
        raise DataError(
            f"{path} cannot be read ({error}); expected a JSONL file; {_names_near(path)}"
        ) from error


def _parse_rows(
    content: bytes,
    problems: dict[int, DataError],
    check_answer: Callable[[str], str] | None,
) -> list[Row]:
    """The rows of a file. Adds to `problems`, by line, what is wrong with the other lines."""
    rows = []
    # Only "\n" ends a line: splitlines() would also split a string at a U+2028 in it.
    for line, raw in enumerate(content.split(b"\n"), start=1):
        if not raw.strip():
            continue
        try:
            row = parse_row(raw, line)
            if check_answer is not None:
                row = replace(row, answer=_reference(row.answer, check_answer))
            rows.append(row)
        except DataError as error:
            problems[line] = error
    return rows


def _reference(answer: str, check_answer: Callable[[str], str]) -> str:
    try:
        return check_answer(answer)
    except DataError as error:
        raise DataError(f"found {show(answer)} as the answer; {error}") from error


def _names_near(path: Path) -> str:
    """What the folder of a missing file holds instead, for an error message."""
    try:
        near = difflib.get_close_matches(path.name, os.listdir(path.parent))
    except (OSError, ValueError):
        return "its folder cannot be read either"
    if not near:
        return "its folder holds no similar name"
    return f"near names in its folder: {', '.join(near)}"


# ---------------------------------------------------------------- prompts


def encode_prompt(
    sample: Sample,
    index: int,
    tokenizer: Any,
    image_processor: Any,
    template: str,
    max_prompt_tokens: int | None = None,
) -> Prompt:
    """Tokens and pixels of one prompt: the template, with the question in it, as a user's turn.

    Raises DataError for a template without exactly one {question}, a special token in the text,
    markers that do not match the images, an image the processor refuses, or more than
    `max_prompt_tokens` tokens.
    """
    pixels, grids, image_tokens = [], [], []
    try:
        # One image per call: what an odd image makes of a batch must not depend on its neighbours.
        for image in sample.images:
            patches, grid = _encode_image(image, image_processor)
            pixels.append(patches)
            grids.append(grid)
            image_tokens.append(int(grid.prod()) // image_processor.merge_size**2)
        ids = _prompt_ids(sample.question, image_tokens, tokenizer, template=template)
        _check_length(len(ids), max_prompt_tokens)
    except DataError as error:
        raise DataError(f"sample {show(sample.id)}: {error}") from error
    input_ids = torch.tensor(ids)
    return Prompt(
        index=index,
        id=sample.id,
        answer=sample.answer,
        question=sample.question,
        input_ids=input_ids,
        visual_mask=input_ids == _image_token_id(tokenizer),
        pixel_values=torch.cat(pixels) if pixels else None,
        image_grid_thw=torch.cat(grids) if grids else None,
    )


def count_prompt_tokens(
    question: str,
    sizes: Sequence[tuple[int, int]],
    tokenizer: Any,
    image_processor: Any,
    template: str,
) -> int:
    """The number of tokens that encode_prompt would give, without decoding an image.

    `sizes` are the images' (width, height) in pixels. Raises DataError.
    """
    patch, merge = image_processor.patch_size, image_processor.merge_size
    image_tokens = []
    for size in sizes:
        width, height = enlarged_size(size, patch * merge)
        patches = image_processor.get_number_of_image_patches(height, width)
        image_tokens.append(patches // merge**2)
    return len(_prompt_ids(question, image_tokens, tokenizer, template=template))


def check_lengths(
    dataset: JsonlDataset,
    tokenizer: Any,
    image_processor: Any,
    template: str,
    max_prompt_tokens: int | None,
) -> None:
    """Find every row that encode_prompt would refuse, and report them like other bad rows.

    Where rows are skipped, indices change, so call it before making a Sampler.
    """
    _check_template(template, tokenizer)
    problems: dict[int, DataError] = {}
    title = f"{dataset.name}: checking lengths"
    for row in tqdm(dataset.rows, desc=title, disable=not dataset.progress):
        sizes = [dataset.image_sizes[path] for path in row.images]
        try:
            tokens = count_prompt_tokens(
                row.question, sizes, tokenizer, image_processor=image_processor, template=template
            )
            _check_length(tokens, max_prompt_tokens)
        except DataError as error:
            problems[row.line] = error
    dataset.settle(problems)


def enlarged_size(size: tuple[int, int], factor: int) -> tuple[int, int]:
    """(width, height) in pixels, enlarged if a side is at most half of `factor`.

    The shorter side is then `factor`, and the aspect ratio is kept. With factor 28:
    (1, 1) -> (28, 28), (14, 100) -> (28, 200), (20, 100) -> (20, 100). Without it Qwen's
    smart_resize would *shrink* a 2000 x 10 image to 812 x 28, because it rounds such a side to
    zero. All other images get the sizes that it gives them.
    """
    width, height = size
    if 2 * min(size) > factor:
        return size
    scale = factor / min(size)
    return max(factor, round(width * scale)), max(factor, round(height * scale))


def _encode_image(image: Image.Image, image_processor: Any) -> tuple[Tensor, Tensor]:
    """Patches [N, channels * temporal_patch * patch * patch] and their grid [1, 3]."""
    check_image_size(image.size, "an image")
    size = enlarged_size(image.size, image_processor.patch_size * image_processor.merge_size)
    resized = image.resize(size, Image.Resampling.BICUBIC)
    encoded = image_processor(images=[resized], return_tensors="pt")
    return encoded["pixel_values"], encoded["image_grid_thw"]


def _prompt_ids(
    question: str, image_tokens: Sequence[int], tokenizer: Any, template: str
) -> list[int]:
    """Token ids of the prompt, with image_tokens[i] placeholders for image i. Raises DataError."""
    _check_template(template, tokenizer)
    check_special_tokens(question, "the question", tokenizer.all_special_tokens)
    # replace() and not format(): questions and templates may hold braces, as LaTeX does.
    parts = template.replace(QUESTION_MARKER, question).split(IMAGE_MARKER)
    content = []
    for number, part in enumerate(parts):
        if number > 0:
            content.append({"type": "image"})
        if part:
            content.append({"type": "text", "text": part})
    messages = [{"role": "user", "content": content}]
    text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)

    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    placeholder = _image_token_id(tokenizer)
    markers, placeholders = len(parts) - 1, ids.count(placeholder)
    if not len(image_tokens) == markers == placeholders:
        raise DataError(
            f"found {len(image_tokens)} images, {markers} {IMAGE_MARKER} markers and, "
            f"after the chat template, {placeholders} image placeholders; "
            "expected the same number of each"
        )
    # A special token is never merged with its neighbours, so ids can be repeated in place of text.
    copies = iter(image_tokens)
    expanded = []
    for token in ids:
        expanded += [token] * (next(copies) if token == placeholder else 1)
    return expanded


def _image_token_id(tokenizer: Any) -> int:
    token = getattr(tokenizer, "image_token", None) or "<|image_pad|>"
    token_id = tokenizer.convert_tokens_to_ids(token)
    # For a token that it does not know, a tokenizer gives the id of another one.
    if token_id is None or tokenizer.convert_ids_to_tokens(token_id) != token:
        raise DataError(f"the tokenizer has no token {token}; expected that of a Qwen-VL model")
    return token_id


def _check_template(template: str, tokenizer: Any) -> None:
    places = template.count(QUESTION_MARKER)
    if places != 1:
        raise DataError(
            f"data.prompt_template {show(template)} has {places} {QUESTION_MARKER}; "
            "expected exactly one"
        )
    check_special_tokens(template, "data.prompt_template", tokenizer.all_special_tokens)


def _check_length(tokens: int, limit: int | None) -> None:
    if limit is not None and tokens > limit:
        raise DataError(
            f"the prompt has {tokens} tokens; expected at most {limit} "
            "(raise data.max_prompt_tokens or lower data.max_pixels)"
        )


# ---------------------------------------------------------------- order


class Sampler:
    """Draws indices below `size`, each once per epoch, in an order given by (seed, epoch) alone.

    Its whole state is how many were drawn, so a resumed run continues exactly where it stopped.
    """

    def __init__(self, size: int, seed: int) -> None:
        if size < 1:
            raise DataError(f"a sampler over {size} samples; expected at least one")
        self.size = size
        self.seed = seed
        self.consumed = 0
        self._epoch = -1  # the epoch that _order is of
        self._order: list[int] = []

    def take(self, count: int) -> list[int]:
        """The next `count` indices, across the end of an epoch if need be."""
        if count < 0:
            raise DataError(f"take({count}); expected 0 or more")
        indices = []
        for position in range(self.consumed, self.consumed + count):
            epoch, place = divmod(position, self.size)
            if epoch != self._epoch:
                self._epoch = epoch
                self._order = self._permutation(epoch)
            indices.append(self._order[place])
        self.consumed += count
        return indices

    def state_dict(self) -> dict[str, int]:
        return {"consumed": self.consumed}

    def load_state_dict(self, state: dict[str, int]) -> None:
        consumed = state.get("consumed")
        if type(consumed) is not int or consumed < 0:
            raise DataError(
                f'sampler state "consumed" is {consumed!r}; expected an integer of 0 or more'
            )
        self.consumed = consumed

    def _permutation(self, epoch: int) -> list[int]:
        order = list(range(self.size))
        # A string, because seed + epoch would repeat orders: 1 + 0 and 0 + 1 are one key.
        random.Random(f"{self.seed}/{epoch}").shuffle(order)
        return order
