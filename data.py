"""Data: samples from a JSONL file, the prompt a model reads, and the order in which samples are drawn.

    dataset = JsonlDataset("train.jsonl", image_root="images")        # every row and every image is checked here
    check_lengths(dataset, tokenizer, image_processor, template, 2048)
    sampler = Sampler(len(dataset), seed=0)
    for place, index in enumerate(sampler.take(8)):
        prompt = encode_prompt(dataset[index], place, tokenizer, image_processor, template, 2048)

A row is a JSON object in one of two forms; `<image>` in the question marks where an image stands:

    {"images": ["a.png", "b.png"], "question": "<image>Is it larger than <image>?", "answer": "yes"}
    {"id": "7", "image": "a.png", "conversations": [{"from": "human", "value": "<image>How many?"},
                                                    {"from": "gpt", "value": "3"}]}      (on one line)

The file is treated as hostile: nothing outside the image root is opened, a question cannot smuggle in special
tokens, and a bad row is found before training starts rather than at step 900. No model is needed, only its
tokenizer and its image processor.
"""

import codecs
import difflib
import hashlib
import json
import math
import os
import random
import warnings
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor
from tqdm import tqdm

IMAGE_MARKER = "<image>"
QUESTION_MARKER = "{question}"
# Plain raster formats only: Pillow would hand EPS to Ghostscript, which runs programs.
IMAGE_FORMATS = ("PNG", "JPEG", "WEBP", "BMP", "GIF", "TIFF")
MAX_ASPECT_RATIO = 200  # Qwen's smart_resize refuses more
MAX_LISTED_PROBLEMS = 20
QWEN_SPECIAL_TOKENS = (
    "<|image_pad|>", "<|video_pad|>", "<|vision_start|>", "<|vision_end|>",
    "<|im_start|>", "<|im_end|>", "<|endoftext|>",
)  # fmt: skip
ROW_KEYS = {"id", "image", "images", "question", "answer", "conversations"}


class DataError(ValueError):
    """Anything wrong with the data. The message names the place, what was found and what was expected."""


class MissingImageError(DataError):
    """An image file that does not exist."""


@dataclass(frozen=True)
class Sample:
    """One question about zero or more images."""

    id: str
    images: tuple[Image.Image, ...]  # RGB, decoded
    question: str  # one "<image>" per image, where that image stands
    answer: str
    extra: dict = field(
        default_factory=dict
    )  # what else the row held, for custom rewards and reports


@dataclass
class Prompt:
    """One encoded prompt of P tokens, on the CPU; N is the number of image patches over all images."""

    index: int  # keys the random streams of its responses: the prompt's place in the step
    id: str
    answer: str
    question: str
    input_ids: Tensor  # [P] int64, image placeholders expanded
    visual_mask: Tensor  # [P] bool, True exactly at the image placeholders
    pixel_values: (
        Tensor | None
    )  # [N, channels * temporal_patch * patch * patch] float32; None without images
    image_grid_thw: Tensor | None  # [images, 3] int64, in patches: time, height, width


# ---------------------------------------------------------------- images


def load_image(path: str | Path, root: str | Path) -> Image.Image:
    """Decode the image file `path`, relative to the folder `root`, as upright RGB.

    Raises DataError if it is missing, leaves `root` (also through `..` or a symbolic link), or cannot be decoded.
    """
    what, root = f"image {_show(str(path))}", Path(root).resolve()
    try:
        file = (root / path).resolve()
        if not file.is_relative_to(root):
            raise DataError(
                f"{what} lies outside the image root {str(root)!r}; expected a path inside it"
            )
        if not file.is_file():
            raise MissingImageError(f"{what} is not a file under the image root {str(root)!r}")
        with open(file, "rb") as stream:
            return decode_image(stream, what)
    except DataError:
        raise
    except (
        OSError,
        RuntimeError,
        ValueError,
    ) as error:  # no permission, a loop of links, a NUL in the name
        reason = (
            getattr(error, "strerror", None) or error
        )  # an OSError in full repeats the whole path
        raise DataError(
            f"{what} cannot be opened ({reason}); expected a readable file under {str(root)!r}"
        ) from error


def decode_image(stream: BinaryIO, what: str = "image") -> Image.Image:
    """Decode one image (of an animation, the first frame) as upright RGB, transparency over white.

    Raises DataError, whose message starts with `what`.
    """
    try:
        with Image.open(stream, formats=IMAGE_FORMATS) as image:
            _check_header(image.size, what)
            image.load()
            return _to_rgb(ImageOps.exif_transpose(image), what)
    except DataError:
        raise
    except (
        Exception
    ) as error:  # Pillow's decoders let out whatever a broken file makes them stumble over
        raise DataError(
            f"{what} cannot be decoded ({type(error).__name__}: {error}); "
            f"expected a complete {', '.join(IMAGE_FORMATS[:-1])} or {IMAGE_FORMATS[-1]} file"
        ) from error


def _check_header(size: tuple[int, int], what: str) -> None:
    """Refuse, before any pixel is decoded, a decompression bomb and a shape the image processor cannot take."""
    width, height = size
    # Pillow refuses at twice this limit and merely warns at the limit itself.
    if Image.MAX_IMAGE_PIXELS is not None and width * height > Image.MAX_IMAGE_PIXELS:
        raise DataError(
            f"{what} has {width} x {height} pixels; expected at most {Image.MAX_IMAGE_PIXELS} in all"
        )
    if min(size) < 1 or max(size) > MAX_ASPECT_RATIO * min(size):
        raise DataError(
            f"{what} has {width} x {height} pixels; expected an aspect ratio of at most {MAX_ASPECT_RATIO}"
        )


def _to_rgb(image: Image.Image, what: str) -> Image.Image:
    if image.mode.startswith("I;16"):  # convert() would clip at 255 instead of scaling
        grey = (np.asarray(image).astype(np.uint32) + 128) // 257
        return Image.fromarray(grey.astype(np.uint8)).convert("RGB")
    if image.mode in ("I", "F"):
        raise DataError(
            f"{what} has 32-bit pixels (mode {image.mode}), with no defined white; expected 8 or 16"
        )
    if image.has_transparency_data:
        rgba = image.convert("RGBA")
        white = Image.new("RGBA", rgba.size, "white")
        return Image.alpha_composite(white, rgba).convert("RGB")
    return image.convert("RGB")


def enlarged_size(size: tuple[int, int], factor: int) -> tuple[int, int]:
    """(width, height) in pixels, enlarged where needed so that both sides are at least `factor`, aspect ratio kept.

    With factor 28: (1, 1) -> (28, 28), (14, 100) -> (28, 200), (30, 40) -> (30, 40). Without it Qwen's smart_resize,
    which rounds a side below factor / 2 to zero, *shrinks* a 2000 x 10 image to 812 x 28.
    """
    scale = max(1.0, factor / min(size))
    return max(factor, round(size[0] * scale)), max(factor, round(size[1] * scale))


# ---------------------------------------------------------------- rows


@dataclass(frozen=True)
class _Row:
    line: int
    id: str
    images: tuple[str, ...]
    question: str
    answer: str
    extra: dict


def _parse_row(raw: bytes, line: int) -> _Row:
    """One line of the file, checked as far as that goes without opening images. Raises DataError."""
    row = _parse_json(raw)
    if not isinstance(row, dict):
        raise DataError(f"found {_show(row)}; expected a JSON object")
    row = {
        key: value for key, value in row.items() if value is not None
    }  # null columns of a table export
    if "conversations" in row:
        if "question" in row or "answer" in row:
            raise DataError(
                'found "conversations" and also "question" or "answer"; expected one form or the other'
            )
        question, answer = _read_conversation(row["conversations"])
    elif "question" in row:
        question, answer = row["question"], row.get("answer")
    else:
        raise DataError(
            f'found the keys {_show(", ".join(row))}; expected "question" and "answer", or "conversations"'
        )
    images = _read_image_paths(row)
    question = _read_question(question, len(images), may_prepend="question" in row)
    extra = {key: value for key, value in row.items() if key not in ROW_KEYS and _is_simple(value)}
    return _Row(line, _read_id(row.get("id"), line), images, question, _read_answer(answer), extra)


def _parse_json(raw: bytes) -> Any:
    try:
        return json.loads(
            raw.decode("utf-8"), object_pairs_hook=_unique_keys, parse_constant=_refuse_constant
        )
    except DataError:
        raise
    except json.JSONDecodeError as error:
        raise DataError(
            f"broken JSON at column {error.colno} ({error.msg}); expected one JSON object"
        ) from error
    except (
        ValueError,
        RecursionError,
    ) as error:  # not UTF-8, an integer of thousands of digits, deep nesting
        raise DataError(
            f"the line cannot be read ({error}); expected one JSON object in UTF-8"
        ) from error


def _unique_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    row: dict[str, Any] = {}
    for key, value in pairs:
        if key in row:
            raise DataError(f"the key {_show(key)} stands twice; expected each key once")
        row[key] = value
    return row


def _refuse_constant(name: str) -> None:
    raise DataError(f"found {name}, which is not JSON; expected a finite number, null or a string")


def _read_conversation(turns: Any) -> tuple[Any, Any]:
    """The values of the human and the gpt turn."""
    if not isinstance(turns, list) or not all(isinstance(turn, dict) for turn in turns):
        raise DataError(
            '"conversations" is not an array of objects; expected one "human" and one "gpt" turn'
        )
    speakers = [turn.get("from") for turn in turns]
    if speakers != ["human", "gpt"]:
        advice = "; a system text belongs in data.prompt_template" if "system" in speakers else ""
        found = ", ".join(_show(speaker) for speaker in speakers[:5]) + (
            ", …" if len(speakers) > 5 else ""
        )
        raise DataError(
            f'"conversations" has turns from [{found}]; expected exactly ["human", "gpt"]{advice}'
        )
    return turns[0].get("value"), turns[1].get("value")


def _read_image_paths(row: dict[str, Any]) -> tuple[str, ...]:
    single, several = row.get("image"), row.get("images")
    if single is not None and several is not None:
        raise DataError('found "image" and "images"; expected one of them')
    value = several if single is None else single
    paths = [] if value is None else value if isinstance(value, list) else [value]
    for path in paths:
        if not isinstance(path, str) or not path:
            raise DataError(f"found {_show(path)} as an image; expected a path")
    return tuple(paths)


def _read_question(question: Any, images: int, may_prepend: bool) -> str:
    """The question with one marker per image; a plain row without any marker shows its images first."""
    if not _is_text(question):
        raise DataError(f"found {_show(question)} as the question; expected valid text")
    if not question.replace(IMAGE_MARKER, "").strip():
        raise DataError(f"found {_show(question)} as the question; expected text that is not empty")
    _check_special_tokens(question, "the question")
    markers = question.count(IMAGE_MARKER)
    if markers == 0 and may_prepend:
        return IMAGE_MARKER * images + question
    if markers != images:
        raise DataError(
            f"the question has {markers} {IMAGE_MARKER} markers but the row has {images} images"
        )
    return question


def _read_answer(answer: Any) -> str:
    if isinstance(answer, bool) or not (_is_text(answer) or _is_number(answer)):
        raise DataError(
            f"found {_show(answer)} as the answer; expected valid text or a finite number"
        )
    if not str(answer).strip():
        raise DataError(f"found {_show(answer)} as the answer; expected text that is not empty")
    return str(answer).strip()


def _read_id(value: Any, line: int) -> str:
    if value is None or value == "":
        return str(line)
    if not _is_text(value) and type(value) is not int:
        raise DataError(f'found {_show(value)} as "id"; expected text or an integer')
    return str(value)


def _is_text(value: Any) -> bool:
    r"""A string that can be written as UTF-8; JSON can spell one that cannot: "\ud800"."""
    return isinstance(value, str) and not any(
        "\ud800" <= character <= "\udfff" for character in value
    )


def _is_number(value: Any) -> bool:
    return isinstance(value, int) or (isinstance(value, float) and math.isfinite(value))


def _is_simple(value: Any, nested: bool = False) -> bool:
    """A scalar, or a flat array or object of scalars."""
    if isinstance(value, list | dict) and not nested:
        parts = value if isinstance(value, list) else [*value, *value.values()]
        return all(_is_simple(part, nested=True) for part in parts)
    return value is None or _is_text(value) or _is_number(value)


def _show(value: Any) -> str:
    """`value` for a message: short, and printable whatever the file held."""
    if isinstance(value, list | dict):
        return "an array" if isinstance(value, list) else "an object"
    text = "nothing" if value is None else repr(value)
    return text if len(text) <= 100 else text[:97] + "…"


# ---------------------------------------------------------------- dataset


class JsonlDataset:
    """The samples of a JSONL file, all checked here (each image decoded once), and decoded again on access.

    Bad rows are reported together: `on_error` "raise" raises DataError, "skip" warns and drops them. Relative
    image paths start at `image_root`, by default the folder of the file; messages call it `root_key`.
    """

    def __init__(
        self,
        path: str | Path,
        image_root: str | Path | None = None,
        on_error: str = "raise",
        progress: bool = True,
        root_key: str = "data.image_root",
    ) -> None:
        if on_error not in ("raise", "skip"):
            raise DataError(f'on_error is {on_error!r}; expected "raise" or "skip"')
        self.path, self.on_error, self.progress = Path(path), on_error, progress
        self.name = self.path.name
        content = _read_file(self.path)
        self._content = hashlib.sha256(content).hexdigest()
        self.image_root = self.path.parent if image_root is None else Path(image_root)
        if not self.image_root.is_dir():
            raise DataError(f"{root_key} {str(image_root)!r} is not a folder")
        self._root_key = root_key

        self._rows: list[_Row] = []
        problems: dict[int, DataError] = {}
        for line, raw in enumerate(content.removeprefix(codecs.BOM_UTF8).split(b"\n"), start=1):
            if not raw.strip():
                continue
            try:
                self._rows.append(_parse_row(raw, line))
            except DataError as error:
                problems[line] = error
        if not self._rows and not problems:
            raise DataError(f"{self.path} is empty; expected one JSON object per line")

        self._sizes = self._check_images(problems)
        self._settle(problems)
        self._warn_about_late_images()

    def __len__(self) -> int:
        return len(self._rows)

    @property
    def fingerprint(self) -> str:
        """Of the file and of the lines in use, so that a resumed run can tell whether its places still mean the same rows."""
        return hashlib.sha256(
            repr((self._content, [row.line for row in self._rows])).encode()
        ).hexdigest()

    @property
    def ids(self) -> list[str]:
        """Each sample's id, without opening its images."""
        return [row.id for row in self._rows]

    def __getitem__(self, index: int) -> Sample:
        """The sample at `index`. Raises DataError if its images changed since the check."""
        row = self._rows[index]
        try:
            images = tuple(load_image(path, self.image_root) for path in row.images)
        except DataError as error:
            raise DataError(f"{self.path}, line {row.line}: {error}") from error
        return Sample(row.id, images, row.question, row.answer, dict(row.extra))

    def _check_images(self, problems: dict[int, DataError]) -> dict[str, tuple[int, int]]:
        """Decode every image once; add to `problems` and return {path: (width, height)}, upright, in pixels."""
        paths = list(dict.fromkeys(path for row in self._rows for path in row.images))

        def check(path: str) -> tuple[int, int] | DataError:
            try:
                return load_image(path, self.image_root).size
            except DataError as error:
                return type(error)(
                    str(error)
                )  # a fresh one: a traceback would keep half-decoded pixels alive

        quiet = not (self.progress and paths)
        with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:
            bar = tqdm(
                pool.map(check, paths), f"{self.name}: checking images", len(paths), disable=quiet
            )
            results = dict(zip(paths, bar, strict=True))
        for row in self._rows:
            errors = [results[path] for path in row.images if isinstance(results[path], DataError)]
            if errors:
                problems[row.line] = errors[0]
        return {
            path: result for path, result in results.items() if not isinstance(result, DataError)
        }

    def _settle(self, problems: dict[int, DataError]) -> None:
        """Report `problems` {line: error} together: raise, or warn and drop those rows."""
        total = len({row.line for row in self._rows} | problems.keys())
        if problems:
            lines = sorted(problems)
            report = [f"{self.path}: {len(lines)} of {total} rows cannot be used:"]
            report += [f"  line {line}: {problems[line]}" for line in lines[:MAX_LISTED_PROBLEMS]]
            if len(lines) > MAX_LISTED_PROBLEMS:
                report.append(f"  … and {len(lines) - MAX_LISTED_PROBLEMS} more")
            first_with_images = [row.line for row in self._rows if row.images][:5]
            if first_with_images and all(
                isinstance(problems.get(n), MissingImageError) for n in first_with_images
            ):
                report.append(
                    f"no image was found; is {self._root_key} ({str(self.image_root)!r}) the right folder?"
                )
            if self.on_error == "raise" or len(lines) == total:
                raise DataError("\n".join(report))
            warnings.warn("\n".join([*report, "these rows are skipped"]), stacklevel=3)
        self._rows = [row for row in self._rows if row.line not in problems]

    def _warn_about_late_images(self) -> None:
        """DyCo's text scope starts at the first image, past the attention sink, and would leave out such a question."""
        late = [
            row.line
            for row in self._rows
            if row.images and row.question.split(IMAGE_MARKER)[0].strip()
        ]
        if late:
            warnings.warn(
                f"{self.path}: in {len(late)} rows (first: line {late[0]}) text stands before the first image; "
                "with dyco.text_scope=after_image that text is not counted as text. Put images first where you can",
                stacklevel=3,
            )


def _read_file(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except (OSError, ValueError) as error:
        try:
            near = difflib.get_close_matches(path.name, os.listdir(path.parent))
            advice = (
                f"near names in its folder: {', '.join(near)}"
                if near
                else "its folder holds no similar name"
            )
        except (OSError, ValueError):
            advice = "its folder cannot be read either"
        raise DataError(
            f"{path} cannot be read ({error}); expected a JSONL file; {advice}"
        ) from error


# ---------------------------------------------------------------- prompts


def encode_prompt(
    sample: Sample,
    index: int,
    tokenizer: Any,
    image_processor: Any,
    template: str,
    max_prompt_tokens: int | None = None,
) -> Prompt:
    """Tokens and pixels of one prompt: the chat template around `template`, with the question for its {question}.

    Raises DataError for a template without exactly one {question}, a special token in the text, markers that do not
    match the images, an image the processor refuses, or more than `max_prompt_tokens` tokens.
    """
    try:
        # One image per call: what an odd image makes of a batch must not depend on its neighbours.
        encoded = [_encode_image(image, image_processor) for image in sample.images]
        grids = torch.cat([grid for _, grid in encoded]) if encoded else None
        image_tokens = (
            [] if grids is None else (grids.prod(dim=1) // image_processor.merge_size**2).tolist()
        )
        ids = _prompt_ids(sample.question, image_tokens, tokenizer, template)
        _check_length(len(ids), max_prompt_tokens)
    except DataError as error:
        raise DataError(f"sample {_show(sample.id)}: {error}") from error
    input_ids = torch.tensor(ids)
    visual_mask = input_ids == _image_token_id(tokenizer)
    pixels = torch.cat([pixels for pixels, _ in encoded]) if encoded else None
    return Prompt(
        index, sample.id, sample.answer, sample.question, input_ids, visual_mask, pixels, grids
    )


def count_prompt_tokens(
    question: str,
    sizes: Sequence[tuple[int, int]],
    tokenizer: Any,
    image_processor: Any,
    template: str,
) -> int:
    """The length encode_prompt would give, from the images' (width, height) in pixels alone. Raises DataError."""
    patch, merge = image_processor.patch_size, image_processor.merge_size
    image_tokens = []
    for size in sizes:
        width, height = enlarged_size(size, patch * merge)
        image_tokens.append(image_processor.get_number_of_image_patches(height, width) // merge**2)
    return len(_prompt_ids(question, image_tokens, tokenizer, template))


def check_lengths(
    dataset: JsonlDataset,
    tokenizer: Any,
    image_processor: Any,
    template: str,
    max_prompt_tokens: int | None,
) -> None:
    """Find every row that encode_prompt would refuse; report them like other bad rows, by the dataset's `on_error`.

    Indices change where rows are skipped, so call it before making a Sampler.
    """
    _check_template(template, tokenizer)
    problems: dict[int, DataError] = {}
    for row in tqdm(
        dataset._rows, f"{dataset.name}: checking lengths", disable=not dataset.progress
    ):
        sizes = [dataset._sizes[path] for path in row.images]
        try:
            found = count_prompt_tokens(row.question, sizes, tokenizer, image_processor, template)
            _check_length(found, max_prompt_tokens)
        except DataError as error:
            problems[row.line] = error
    dataset._settle(problems)


def _encode_image(image: Image.Image, image_processor: Any) -> tuple[Tensor, Tensor]:
    """Patches [N, channels * temporal_patch * patch * patch] and their grid [1, 3]."""
    _check_header(image.size, "an image")
    size = enlarged_size(image.size, image_processor.patch_size * image_processor.merge_size)
    encoded = image_processor(
        images=[image.resize(size, Image.Resampling.BICUBIC)], return_tensors="pt"
    )
    return encoded["pixel_values"], encoded["image_grid_thw"]


def _prompt_ids(
    question: str, image_tokens: Sequence[int], tokenizer: Any, template: str
) -> list[int]:
    """Token ids of the prompt, with image_tokens[i] placeholders for image i. Raises DataError."""
    _check_template(template, tokenizer)
    _check_special_tokens(question, "the question", tokenizer)
    parts = template.replace(QUESTION_MARKER, question).split(IMAGE_MARKER)
    content = [{"type": "text", "text": parts[0]}]
    for part in parts[1:]:
        content += [{"type": "image"}, {"type": "text", "text": part}]
    content = [item for item in content if item.get("text") != ""]
    messages = [{"role": "user", "content": content}]
    text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)

    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    placeholder = _image_token_id(tokenizer)
    if not ids.count(placeholder) == len(parts) - 1 == len(image_tokens):
        raise DataError(
            f"found {len(image_tokens)} images, {len(parts) - 1} {IMAGE_MARKER} markers and, after the chat template, "
            f"{ids.count(placeholder)} image placeholders; expected the same number of each"
        )
    # A special token is never merged with its neighbours, so ids can be repeated in place of text.
    copies = iter(image_tokens)
    return [token for token in ids for _ in range(next(copies) if token == placeholder else 1)]


def _image_token_id(tokenizer: Any) -> int:
    token = getattr(tokenizer, "image_token", None) or "<|image_pad|>"
    token_id = tokenizer.convert_tokens_to_ids(token)
    if (
        token_id is None or tokenizer.convert_ids_to_tokens(token_id) != token
    ):  # an unknown token becomes another one
        raise DataError(f"the tokenizer has no token {token}; expected that of a Qwen2.5-VL model")
    return token_id


def _check_template(template: str, tokenizer: Any) -> None:
    if (found := template.count(QUESTION_MARKER)) != 1:
        raise DataError(
            f"data.prompt_template {_show(template)} has {found} {QUESTION_MARKER}; expected exactly one"
        )
    _check_special_tokens(template, "data.prompt_template", tokenizer)


def _check_special_tokens(text: str, what: str, tokenizer: Any = None) -> None:
    for token in (*QWEN_SPECIAL_TOKENS, *(tokenizer.all_special_tokens if tokenizer else ())):
        if token in text:
            raise DataError(
                f"{what} contains {token}, which would be read as that special token; remove it"
            )


def _check_length(found: int, limit: int | None) -> None:
    if limit is not None and found > limit:
        raise DataError(
            f"the prompt has {found} tokens; expected at most {limit} "
            "(raise data.max_prompt_tokens or lower data.max_pixels)"
        )


# ---------------------------------------------------------------- order


class Sampler:
    """Draws indices below `size`, every one once per epoch, in an order that depends on (seed, epoch) alone.

    Its whole state is how many were drawn, so a resumed run continues exactly where it stopped.
    """

    def __init__(self, size: int, seed: int) -> None:
        if size < 1:
            raise DataError(f"a sampler over {size} samples; expected at least one")
        self.size, self.seed, self.consumed = size, seed, 0
        self._epoch, self._order = -1, []

    def take(self, count: int) -> list[int]:
        """The next `count` indices, across the end of an epoch if need be."""
        if count < 0:
            raise DataError(f"take({count}); expected 0 or more")
        indices = []
        for position in range(self.consumed, self.consumed + count):
            epoch, place = divmod(position, self.size)
            if epoch != self._epoch:
                self._epoch, self._order = epoch, self._permutation(epoch)
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
        random.Random(f"{self.seed}/{epoch}").shuffle(
            order
        )  # a string: seed + epoch would repeat orders across seeds
        return order
