"""rows.py: reads JSONL files, one line of a data set, or one image file, and trusts none of them.

`read_jsonl` and `append_jsonl` serve every file of rows that the project writes: metrics, samples,
responses. `parse_row` makes a Row of a line, `load_image` makes RGB pixels of an image file, and
both raise DataError for whatever they cannot accept. What a row may look like, and why it is
checked, stands in data.py, which reads whole files with these functions. No model and no tokenizer
is needed here.
"""

import difflib
import json
import math
import os
import re
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from PIL import Image, ImageOps

IMAGE_MARKER = "<image>"
# Plain raster formats only: Pillow would hand EPS to Ghostscript, which runs programs.
IMAGE_FORMATS = ("PNG", "JPEG", "WEBP", "BMP", "GIF", "TIFF")
MAX_ASPECT_RATIO = 200  # Qwen's smart_resize refuses more
QWEN_SPECIAL_TOKENS = (
    "<|image_pad|>",
    "<|video_pad|>",
    "<|vision_start|>",
    "<|vision_end|>",
    "<|im_start|>",
    "<|im_end|>",
    "<|endoftext|>",
)
# Names that people give to what they want the model to see or hear.
MEDIA_NAMES = re.compile(
    r"(?i)^(image|img|pic|picture|photo|figure|video|audio)s?"
    r"([_-]?(path|file|filename|url|uri|bytes|data|base64)s?)?$|^(path|file)(_?name)?s?$"
)
MEDIA_FILE = re.compile(
    r"(?i)^(data:(image|video|audio)/|[^\n]{0,1000}"
    r"\.(png|jpe?g|webp|bmp|gif|tiff?|heic|avif|svg|mp4|avi|mov|mkv|webm|mp3|wav|flac)$)"
)
ROW_KEYS = {"id", "image", "images", "question", "answer", "conversations"}


class DataError(ValueError):
    """Anything wrong with the data. The message says where, what was found, what was expected."""


class MissingImageError(DataError):
    """An image file that does not exist."""


class RowError(ValueError):
    """A file of rows that cannot be read."""


@dataclass(frozen=True)
class Row:
    """One line of the file, checked as far as that goes without opening its images."""

    line: int  # counted from 1
    id: str
    images: tuple[str, ...]  # paths, as the file has them
    question: str  # one "<image>" per image, where that image stands
    answer: str
    extra: dict  # the other keys of the row that hold simple values


def read_jsonl(path: str | Path, growing: bool = False) -> list[tuple[int, dict]]:
    """(line number, object) of each line that is not blank.

    growing: the last line may be half-written, and is left out then. Raises RowError.
    """
    content = Path(path).read_bytes()
    if growing:
        content = content[: content.rfind(b"\n") + 1]
    rows = []
    for number, line in enumerate(content.split(b"\n"), start=1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise RowError(f"{path}, line {number}: {error}; expected a JSON object") from None
        if not isinstance(row, dict):
            raise RowError(f"{path}, line {number}: found {row!r:.60}; expected a JSON object")
        rows.append((number, row))
    return rows


def append_jsonl(path: str | Path, rows: Iterable[dict]) -> None:
    """Add rows to a file, over what a crash may have left half-written at its end."""
    with open(path, "ab+") as file:
        if file.tell():
            file.seek(-1, os.SEEK_END)
            if file.read() != b"\n":
                last_line_end = Path(path).read_bytes().rfind(b"\n")
                file.truncate(last_line_end + 1)
        file.writelines(json.dumps(row).encode() + b"\n" for row in rows)


def nearest(name: str, known: Iterable) -> str:
    """A hint for a name that is not known.

    >>> nearest("stpes", ["steps", "seed"])
    "did you mean 'steps'?"
    >>> nearest("x", ["steps", "seed"])
    'known: steps, seed'
    """
    names = [str(k) for k in known]
    close = difflib.get_close_matches(str(name), names, n=1)
    return f"did you mean {close[0]!r}?" if close else f"known: {', '.join(names)}"


def show(value: Any) -> str:
    """`value` for an error message: short, and printable whatever the file held."""
    if isinstance(value, list):
        return "an array"
    if isinstance(value, dict):
        return "an object"
    text = "nothing" if value is None else repr(value)
    return text if len(text) <= 100 else text[:97] + "…"


# -------------------------------------------------------------------------------------------- lines


def parse_row(raw: bytes, line: int) -> Row:
    """The Row that stands on one line of the file. Raises DataError."""
    row = _parse_json(raw)
    if not isinstance(row, dict):
        raise DataError(f"found {show(row)}; expected a JSON object")
    # A table exported to JSONL has every column in every row, with null where a cell is empty.
    row = {key: value for key, value in row.items() if value is not None}
    if "conversations" in row:
        if "question" in row or "answer" in row:
            raise DataError(
                'found "conversations" and also "question" or "answer"; '
                "expected one form or the other"
            )
        question, answer = _read_conversation(row["conversations"])
    elif "question" in row:
        question, answer = row["question"], row.get("answer")
    else:
        raise DataError(
            f"found the keys {show(', '.join(row))}; "
            'expected "question" and "answer", or "conversations"'
        )
    _refuse_other_media(row)
    images = _read_image_paths(row)
    question = _read_question(question, len(images), may_prepend="question" in row)
    row_id = _read_id(row.get("id"), line)
    answer = _read_answer(answer)
    extra = {key: value for key, value in row.items() if key not in ROW_KEYS and _is_simple(value)}
    return Row(line=line, id=row_id, images=images, question=question, answer=answer, extra=extra)


def _parse_json(raw: bytes) -> Any:
    """json.loads, but strict: UTF-8 only, no NaN or Infinity, no key twice in an object."""
    try:
        return json.loads(
            raw.decode("utf-8"),
            object_pairs_hook=_unique_keys,
            parse_constant=_refuse_constant,
        )
    except DataError:
        raise
    except json.JSONDecodeError as error:
        raise DataError(
            f"broken JSON at column {error.colno} ({error.msg}); expected one JSON object"
        ) from error
    # Bytes that are not UTF-8, an integer of thousands of digits, or brackets nested too deeply.
    except (ValueError, RecursionError) as error:
        raise DataError(
            f"the line cannot be read ({error}); expected one JSON object in UTF-8"
        ) from error


def _unique_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    row: dict[str, Any] = {}
    for key, value in pairs:
        if key in row:
            raise DataError(f"the key {show(key)} stands twice; expected each key once")
        row[key] = value
    return row


def _refuse_constant(name: str) -> None:
    raise DataError(f"found {name}, which is not JSON; expected a finite number, null or a string")


def _read_conversation(turns: Any) -> tuple[Any, Any]:
    """The values of the human and of the gpt turn, not yet checked."""
    if not isinstance(turns, list) or not all(isinstance(turn, dict) for turn in turns):
        raise DataError(
            '"conversations" is not an array of objects; expected one "human" and one "gpt" turn'
        )
    speakers = [turn.get("from") for turn in turns]
    if speakers != ["human", "gpt"]:
        shown = [show(speaker) for speaker in speakers[:5]]
        if len(speakers) > 5:
            shown.append("…")
        advice = "; a system text belongs in data.prompt_template" if "system" in speakers else ""
        raise DataError(
            f'"conversations" has turns from [{", ".join(shown)}]; '
            f'expected exactly ["human", "gpt"]{advice}'
        )
    human, gpt = turns
    return human.get("value"), gpt.get("value")


def _refuse_other_media(row: dict[str, Any]) -> None:
    """A picture under another key would be left out, and its row become a question without one.

    A key counts as such by its name, or because its value is the path of such a file.
    """
    for key, value in row.items():
        if key in ROW_KEYS:
            continue
        values = value if isinstance(value, list) else [value]
        names_a_file = any(isinstance(v, str) and MEDIA_FILE.match(v) for v in values)
        if not names_a_file and not MEDIA_NAMES.match(key):
            continue
        if re.search(r"(?i)video|audio", key):
            raise DataError(f"found the key {show(key)}; expected images only")
        raise DataError(
            f"found the key {show(key)}, which looks like a picture; expected it under "
            '"image" (a path) or "images" (a list of paths)'
        )


def _read_image_paths(row: dict[str, Any]) -> tuple[str, ...]:
    """The paths under "image" or "images"; either key may hold one path or an array of them."""
    if "image" in row and "images" in row:
        raise DataError('found "image" and "images"; expected one of them')
    paths = row.get("image", row.get("images", []))
    if not isinstance(paths, list):
        paths = [paths]
    for path in paths:
        if not isinstance(path, str) or not path:
            raise DataError(f"found {show(path)} as an image; expected a path")
    return tuple(paths)


def _read_question(question: Any, images: int, may_prepend: bool) -> str:
    """The question with one marker per image. Where a plain row has none, the images come first."""
    if not _is_text(question):
        raise DataError(f"found {show(question)} as the question; expected valid text")
    if not question.replace(IMAGE_MARKER, "").strip():
        raise DataError(f"found {show(question)} as the question; expected text that is not empty")
    check_special_tokens(question, "the question")
    markers = question.count(IMAGE_MARKER)
    if markers == 0 and may_prepend:
        return IMAGE_MARKER * images + question
    if markers != images:
        raise DataError(
            f"the question has {markers} {IMAGE_MARKER} markers but the row has {images} images"
        )
    return question


def _read_answer(answer: Any) -> str:
    # To Python True is a number, too; here it is more likely a wrong column.
    if isinstance(answer, bool) or not (_is_text(answer) or _is_number(answer)):
        raise DataError(
            f"found {show(answer)} as the answer; expected valid text or a finite number"
        )
    text = inside_of(str(answer).strip())
    if not text:
        raise DataError(f"found {show(answer)} as the answer; expected text that is not empty")
    return text


def inside_of(answer: str) -> str:
    """What a reference says that comes wrapped: in answer tags, behind ####, or boxed.

    >>> inside_of("<think>a dozen</think><answer> 12 </answer>"), inside_of("3 + 4 = 7\\n#### 7")
    ('12', '7')
    >>> inside_of(r"So x = \\boxed{\\frac{1}{2}}."), inside_of("3")
    ('\\\\frac{1}{2}', '3')
    """
    tagged = re.findall(r"<answer>(.*?)</answer>", answer, re.DOTALL)
    if tagged:
        answer = tagged[-1].strip()
    if "####" in answer:
        answer = answer.rpartition("####")[2].strip()
    start = answer.rfind("\\boxed{")
    if start < 0:
        return answer
    depth = 0
    for place in range(start + len("\\boxed"), len(answer)):
        depth += (answer[place] == "{") - (answer[place] == "}")
        if depth == 0:
            return answer[start + len("\\boxed{") : place].strip() or answer
    return answer


def _read_id(value: Any, line: int) -> str:
    """The row's own id, or its line number if it has none."""
    if value is None or value == "":
        return str(line)
    if not _is_text(value) and type(value) is not int:
        raise DataError(f'found {show(value)} as "id"; expected text or an integer')
    return str(value)


def check_special_tokens(text: str, what: str, more_tokens: Iterable[str] = ()) -> None:
    """Raise DataError if `text` holds a special token of Qwen2.5-VL, or one of `more_tokens`.

    A tokenizer does not read it as text: with it, a question could end the user's turn.
    """
    for token in (*QWEN_SPECIAL_TOKENS, *more_tokens):
        if token in text:
            raise DataError(
                f"{what} contains {token}, which would be read as that special token; remove it"
            )


def _is_text(value: Any) -> bool:
    if not isinstance(value, str):
        return False
    # JSON can spell half of a surrogate pair, "\ud800", which no UTF-8 file can hold.
    return not any("\ud800" <= character <= "\udfff" for character in value)


def _is_number(value: Any) -> bool:
    return isinstance(value, int) or (isinstance(value, float) and math.isfinite(value))


def _is_scalar(value: Any) -> bool:
    return value is None or _is_text(value) or _is_number(value)


def _is_simple(value: Any) -> bool:
    """Whether it is a scalar, or a flat array or object of scalars: what a log can hold."""
    if isinstance(value, list):
        return all(_is_scalar(item) for item in value)
    if isinstance(value, dict):
        return all(_is_scalar(key) and _is_scalar(item) for key, item in value.items())
    return _is_scalar(value)


# ------------------------------------------------------------------------------------------- images


def load_image(path: str | Path, root: str | Path) -> Image.Image:
    """Decode the image file `path`, relative to the folder `root`, as upright RGB.

    Raises DataError if the file is missing, cannot be decoded, or lies outside `root`: no row may
    reach other files of this machine, neither through `..` nor through a symbolic link.
    """
    what = f"image {show(str(path))}"
    root = Path(root).resolve()
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
    # No permission, a loop of links, or a NUL in the name.
    except (OSError, RuntimeError, ValueError) as error:
        # An OSError in full repeats the whole path.
        reason = getattr(error, "strerror", None) or error
        raise DataError(
            f"{what} cannot be opened ({reason}); expected a readable file under {str(root)!r}"
        ) from error


def decode_image(stream: BinaryIO, what: str = "image") -> Image.Image:
    """Decode one image as upright RGB: the first frame of an animation, transparency over white.

    Raises DataError, whose message starts with `what`.
    """
    try:
        with Image.open(stream, formats=IMAGE_FORMATS) as image:
            check_image_size(image.size, what)
            image.load()
            return _to_rgb(ImageOps.exif_transpose(image), what)
    except DataError:
        raise
    # Pillow's decoders let out whatever a broken file makes them stumble over.
    except Exception as error:
        raise DataError(
            f"{what} cannot be decoded ({type(error).__name__}: {error}); "
            f"expected a complete {', '.join(IMAGE_FORMATS[:-1])} or {IMAGE_FORMATS[-1]} file"
        ) from error


def check_image_size(size: tuple[int, int], what: str) -> None:
    """Raise DataError for a (width, height) in pixels that no model should meet.

    The header tells the size, so this refuses a decompression bomb before any pixel of it is
    decoded, and a shape that the image processor cannot take.
    """
    width, height = size
    # Pillow itself refuses at twice this limit and merely warns at the limit.
    if Image.MAX_IMAGE_PIXELS is not None and width * height > Image.MAX_IMAGE_PIXELS:
        raise DataError(
            f"{what} has {width} x {height} pixels; "
            f"expected at most {Image.MAX_IMAGE_PIXELS} in all"
        )
    if min(size) < 1 or max(size) > MAX_ASPECT_RATIO * min(size):
        raise DataError(
            f"{what} has {width} x {height} pixels; "
            f"expected an aspect ratio of at most {MAX_ASPECT_RATIO}"
        )


def _to_rgb(image: Image.Image, what: str) -> Image.Image:
    if image.mode.startswith("I;16"):
        # convert() would clip 16-bit values at 255 instead of scaling them: round(value / 257).
        grey = (np.asarray(image).astype(np.uint32) + 128) // 257
        return Image.fromarray(grey.astype(np.uint8)).convert("RGB")
    if image.mode in ("I", "F"):
        raise DataError(
            f"{what} has 32-bit pixels (mode {image.mode}), with no defined white; expected 8 or 16"
        )
    if image.has_transparency_data:
        # convert() would show whatever colour stands under the transparent pixels.
        rgba = image.convert("RGBA")
        white = Image.new("RGBA", rgba.size, "white")
        return Image.alpha_composite(white, rgba).convert("RGB")
    return image.convert("RGB")
