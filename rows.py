"""rows.py: reads JSONL files, one line of a data set, or one image file, and trusts none of them.

`read_jsonl` and `append_jsonl` serve every file of rows that the project writes: metrics, samples,
responses. `refuse_other_formats` says what a data set is that is no JSONL file, `parse_row` makes a
Row of a line, and `load_image` makes RGB pixels of an image file. All three raise DataError for
whatever they cannot accept. What a row may look like, and why it is checked, stands in data.py,
which reads whole files with these functions. No model and no tokenizer is needed here.
"""

import difflib
import json
import math
import os
import re
import shlex
import unicodedata
from collections.abc import Iterable, Iterator
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
ROW_KEYS = {"id", "image", "images", "question", "answer", "conversations"}
TURN_KEYS = {"from", "value"}

# How a picture, a video or a sound is recognised that stands under a key that nothing reads: by the
# key, without its digits and signs, or by how a file's name ends.
_PLACE = "(?:path|file|name|url|uri|src|list|data|bytes|base|b|raw|input)s?"
MEDIA_KEYS = {
    medium: re.compile(f"(?:{_PLACE})*(?:{words})s?(?:{_PLACE})*")
    for medium, words in {
        "picture": "image|img|picture|pic|photo|photograph",
        "video": "video|vid|movie",
        "sound": "audio|sound",
    }.items()
}
MEDIA_FILES = {
    medium: re.compile(
        rf"data:{kind}/.*|.*[^/\\\s]\.(?:{endings})(?:[?#]\S*)?", re.IGNORECASE | re.DOTALL
    )
    for medium, kind, endings in (
        ("picture", "image", "png|jpe?g|jpe|jfif|webp|bmp|gif|tiff?|svg|heic|heif|avif|p[bgnp]m"),
        ("video", "video", "mp4|m4v|avi|mov|mkv|webm|mpe?g|flv|wmv|3gp"),
        ("sound", "audio", "wav|mp3|flac|ogg|m4a|aac|wma"),
    )
}
# A longer text that ends in ".png" is no path but a sentence about one.
LONGEST_PATH = 4096  # characters
MOST_WORDS = 10
ADDRESS = re.compile(r"[a-z][a-z0-9+.-]*://|data:", re.IGNORECASE)

# How a file begins that is no JSONL file, what it is then, and what to do.
FILE_SIGNATURES = (
    (b"PAR1", "a Parquet file", "make one of it: python -m tools.import_dataset"),
    (b"ARROW1", "an Arrow file", "write its pictures to files and its rows to a JSONL file"),
    (b"\x1f\x8b", "a gzip file", "unpack it first (gunzip -k)"),
    (b"BZh", "a bzip2 file", "unpack it first (bunzip2 -k)"),
    (b"\xfd7zXZ\x00", "an xz file", "unpack it first (unxz -k)"),
    (b"\x28\xb5\x2f\xfd", "a Zstandard file", "unpack it first (unzstd)"),
    (b"PK\x03\x04", "a zip archive or a spreadsheet", "unpack or export it first"),
    (b"\xff\xfe", "text in UTF-16", "save it as UTF-8"),
    (b"\xfe\xff", "text in UTF-16", "save it as UTF-8"),
    (b"version https://git-lfs", "a Git LFS pointer, not the data", "fetch it (git lfs pull)"),
    (b"<!", "a web page", "download the data itself"),
    (b"<html", "a web page", "download the data itself"),
    (b"<?xml", "XML", "turn each of its rows into one"),
)


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
    if growing and not _is_whole(content):
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


def _is_whole(content: bytes) -> bool:
    """Whether the last line is an object, though no line end may stand behind it.

    An editor may leave that out. An object that was cut short is none.
    """
    try:
        return isinstance(json.loads(content[content.rfind(b"\n") + 1 :]), dict)
    except (ValueError, RecursionError):
        return False


def append_jsonl(path: str | Path, rows: Iterable[dict]) -> None:
    """Add rows to a file, over what a crash may have left half-written at its end."""
    with open(path, "ab+") as file:
        if file.tell():
            file.seek(-1, os.SEEK_END)
            if file.read() != b"\n":
                content = Path(path).read_bytes()
                if _is_whole(content):
                    file.write(b"\n")
                else:
                    file.truncate(content.rfind(b"\n") + 1)
        file.writelines(json.dumps(row).encode() + b"\n" for row in rows)


def nearest(name: str, known: Iterable) -> str:
    """A hint for a name that is not known.

    >>> nearest("stpes", ["steps", "seed"])
    "did you mean 'steps'?"
    >>> nearest("x", ["steps", "seed"])
    'known: steps, seed'
    """
    names = [str(k) for k in known]
    close = difflib.get_close_matches(name, names, n=1)
    return f"did you mean {close[0]!r}?" if close else f"known: {', '.join(names)}"


def show(value: Any) -> str:
    """`value` for an error message: short, and printable whatever the file held."""
    if isinstance(value, list):
        return "an array"
    if isinstance(value, dict):
        return "an object"
    text = "nothing" if value is None else repr(value)
    return text if len(text) <= 100 else text[:97] + "…"


# What a terminal obeys rather than shows: controls, invisible marks that turn the direction of
# text, separators of lines, and halves of surrogate pairs.
UNSHOWN_CATEGORIES = {"Cc", "Cf", "Cs", "Zl", "Zp"}


def printable(text: str, keep: str = "\n\t") -> str:
    """The text for a terminal: what that would obey rather than show is escaped, but for `keep`.

    Text of models and of files passes through here, or through `excerpt`, before it is printed.

    >>> printable("red: \\x1b[31m")
    'red: \\\\x1b[31m'
    """
    characters = []
    for character in text:
        if unicodedata.category(character) in UNSHOWN_CATEGORIES and character not in keep:
            character = character.encode("unicode_escape").decode()
        characters.append(character)
    return "".join(characters)


def excerpt(text: str, most: int = 300) -> str:
    """The first `most` characters of a text for the terminal, on one line."""
    shown = printable(text[:most], keep="")
    return shown + (" …" if len(text) > most else "")


def first_line(error: BaseException) -> str:
    """What an error says first, or its type where it says nothing.

    >>> first_line(ValueError("broken" + chr(10) + "in many words")), first_line(ValueError())
    ('broken', 'ValueError')
    """
    lines = str(error).strip().splitlines()
    return lines[0] if lines else type(error).__name__


# -------------------------------------------------------------------------------------------- files


def refuse_other_formats(path: Path, content: bytes) -> None:
    """Raise DataError, which says what the file is, where it is plainly no JSONL file.

    Its lines would otherwise be reported one by one, and none of the reports would say why.
    """
    start = content.lstrip()
    for signature, what, advice in FILE_SIGNATURES:
        if start.startswith(signature):
            raise DataError(f"{path} is {what}; expected one JSON object per line; {advice}")
    line_end = start.find(b"\n")
    first_line = start[:line_end].rstrip() if line_end >= 0 else start.rstrip()
    separator = _table_separator(path, first_line)
    if separator is not None:
        kind = "TSV" if separator == b"\t" else "CSV"
        raise DataError(
            f"{path} is a {kind} table; expected one JSON object per line, "
            f"so turn each of its rows into one"
        )
    what = _document(start, first_line)
    if what is not None:
        raise DataError(
            f"{path} is {what}; expected one JSON object per line; {_how_to_convert(path, what)}"
        )


def _table_separator(path: Path, first_line: bytes) -> bytes | None:
    """What separates the columns, where the first line is the head of a table."""
    if first_line[:1] in (b"{", b"["):
        return None
    for separator, ending in ((b"\t", ".tsv"), (b",", ".csv"), (b";", ".csv")):
        columns = [column.strip(b'" \r').lower() for column in first_line.split(separator)]
        names_a_column = not {b"question", b"answer", b"conversations"}.isdisjoint(columns)
        if len(columns) > 1 and (names_a_column or path.suffix.lower() == ending):
            return separator
    return None


def _document(start: bytes, first_line: bytes) -> str | None:
    """What the file is where JSON does not end with the first line, or where it is one array."""
    if start[:1] not in (b"{", b"["):
        return None
    on_first_line = _whole_value(first_line)
    if isinstance(on_first_line, dict):
        return None
    # A file of one array per line is no document: each of its lines is checked for itself.
    document = _whole_value(start)
    if isinstance(document, list):
        return "a JSON array"
    if isinstance(document, dict):
        return "a JSON object over several lines"
    if start[:1] == b"[" and on_first_line is None:
        return "a JSON array that is cut off or broken"
    # Objects one after the other, as jq prints them.
    return "JSON with objects over several lines" if first_line == b"{" else None


def _whole_value(text: bytes) -> Any:
    """The JSON value that all of `text` is, or None."""
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        return None


def _how_to_convert(path: Path, what: str) -> str:
    """The command that writes a JSONL file beside a JSON document."""
    if what == "a JSON array that is cut off or broken":
        return "get it whole, then turn each of its elements into a line"
    # The shell empties the file after ">" before Python reads, so it must be another one.
    output = path.with_suffix(".rows.jsonl" if path.suffix == ".jsonl" else ".jsonl")
    source, output = shlex.quote(str(path)), shlex.quote(str(output))
    if what == "JSON with objects over several lines":
        return f"convert it: jq -c . {source} > {output}"
    rows = "json.load(open(sys.argv[1], encoding='utf-8-sig'))"
    if what == "a JSON object over several lines":
        rows = f"[{rows}]"
    code = f"import json, sys; [print(json.dumps(row)) for row in {rows}]"
    return f'convert it: python -c "{code}" {source} > {output}'


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
    images = _read_image_paths(row)
    _refuse_media_elsewhere(row, ROW_KEYS, images)
    for turn in row.get("conversations", []):
        _refuse_media_elsewhere(turn, TURN_KEYS, images)
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
        if ADDRESS.match(path):
            raise DataError(
                f"found {show(path)} as an image; expected the path of a file, "
                "since nothing is fetched from an address"
            )
    return tuple(paths)


def _refuse_media_elsewhere(row: dict[str, Any], known: set[str], images: tuple[str, ...]) -> None:
    """Raise DataError for a key outside `known` with a picture, a video or a sound.

    No key but "image" and "images" reaches the model, so the row would silently become a question
    about nothing. A key may name the pictures of the row once more, as an address does.
    """
    own_pictures = {_file_name(path) for path in images}
    for key, value in row.items():
        leaves = [leaf for leaf in _leaves(value) if leaf]
        # Tables have a column "videos" that is empty in each row.
        if key in known or not leaves:
            continue
        medium, file = _first_medium(leaves, own_pictures)
        if medium is None:
            medium, file = _medium_of_key(key), value
            if medium is None or (medium == "picture" and images):
                continue
        if medium != "picture":
            raise DataError(
                f"the key {show(key)} names a {medium} ({show(file)}), which is not supported; "
                'expected pictures under "image" or "images"'
            )
        several = isinstance(value, list) or key.lower().rstrip("_").endswith("s") or images
        nearest = "images" if several else "image"
        raise DataError(
            f"the key {show(key)} names a picture ({show(file)}), which no model would see; "
            f'expected it under "{nearest}", or no such key'
        )


def _leaves(value: Any) -> Iterator[Any]:
    """What an array or an object holds at any depth, in order; another value is its only leaf."""
    # A stack of its own, since JSON may be nested deeper than functions can call each other.
    waiting = [value]
    while waiting:
        item = waiting.pop()
        if isinstance(item, dict):
            item = list(item.values())
        if isinstance(item, list):
            waiting.extend(reversed(item))
        else:
            yield item


def _first_medium(leaves: list, own_pictures: set[str]) -> tuple[str | None, str]:
    """(medium, text) of the first text that is the path, the address or the data of a file."""
    for leaf in leaves:
        if not isinstance(leaf, str):
            continue
        text = leaf.strip()
        if text.startswith("data:"):
            text = text.partition(",")[0]  # its head, before what may be megabytes
        is_short = len(text) <= LONGEST_PATH and len(text.split(None, MOST_WORDS)) <= MOST_WORDS
        if not is_short or "\n" in text:
            continue
        for medium, pattern in MEDIA_FILES.items():
            if pattern.fullmatch(text):
                if medium == "picture" and _file_name(text) in own_pictures:
                    continue
                return medium, leaf
    return None, ""


def _file_name(path: str) -> str:
    """The last part of a path or an address, without what follows a question mark.

    >>> _file_name("https://example.org/a/b.png?size=2")
    'b.png'
    """
    return re.split(r"[/\\]", re.split("[?#]", path)[0])[-1]


def _medium_of_key(key: str) -> str | None:
    """What a key is for, by its name alone: "Image_1", "img", "photo_url" and "imgae" are pictures.

    "image_id", "image_width" and the like describe a picture, and are none.
    """
    letters = re.sub("[^a-z]", "", key.lower())
    for medium, pattern in MEDIA_KEYS.items():
        if pattern.fullmatch(letters):
            return medium
    near = difflib.get_close_matches(letters, ("image", "images"), n=1, cutoff=0.8)
    if near and abs(len(letters) - len(near[0])) <= 1:
        return "picture"
    return None


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
    text = str(answer).strip()
    if not text:
        raise DataError(f"found {show(answer)} as the answer; expected text that is not empty")
    return text


def _read_id(value: Any, line: int) -> str:
    """The row's own id, or its line number if it has none."""
    if value is None or value == "":
        return str(line)
    if not _is_text(value) and type(value) is not int:
        raise DataError(f'found {show(value)} as "id"; expected text or an integer')
    return str(value)


def check_special_tokens(text: str, what: str, more_tokens: Iterable[str] = ()) -> None:
    """Raise DataError if `text` holds a special token of Qwen2.5-VL, or one of `more_tokens`.

    A tokenizer does not read it as text: with it, a question could end the user's turn. Nor does it
    take what is no text in UTF-8, as an argument of a terminal may be.
    """
    if not _is_text(text):
        raise DataError(f"{what} is {show(text)}; expected text in UTF-8")
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
    with open_image(path, root) as stream:
        return decode_image(stream, f"image {show(str(path))}")


def open_image(path: str | Path, root: str | Path) -> BinaryIO:
    """The image file `path`, opened. Raises DataError as `load_image` does."""
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
        return open(file, "rb")
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
