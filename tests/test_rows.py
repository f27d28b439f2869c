"""rows.py: hostile lines and images, one at a time, on files built here."""

import io
import json
import os
import re
import warnings
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image, ImageFile
from row_files import chat_row, load_rows, noise, plain_row, save_image

from data import JsonlDataset
from rows import QWEN_SPECIAL_TOKENS, DataError, decode_image, load_image, parse_row

# ---------------------------------------------------------------- rows that load


def test_both_forms_mix_and_keep_their_order(folder):
    rows = [
        chat_row(),
        plain_row("<image>Is <image> bigger?", "yes", images=["a.png", "b.png"], id=17),
        plain_row("One plus one?", 2),
        plain_row("<image>Half?", 0.5, image="b.png"),
        chat_row("<image>then <image>", image=["b.png", "a.png"]),
        chat_row("No picture", image=None),
    ]
    with pytest.warns(UserWarning, match="have the id of an earlier row"):
        dataset = load_rows(folder, rows)
    assert len(dataset) == 6
    samples = [dataset[index] for index in range(6)]
    assert [sample.id for sample in samples] == ["c", "17", "3", "4", "c#2", "c#3"]
    assert [sample.answer for sample in samples] == ["3", "yes", "2", "0.5", "3", "3"]
    assert samples[1].question == "<image>Is <image> bigger?"
    assert samples[2].question == "One plus one?"
    a, b = (40, 30), (60, 80)
    sizes = [[image.size for image in sample.images] for sample in samples]
    assert sizes == [[a], [a, b], [], [b], [b, a], []]
    assert all(image.mode == "RGB" for sample in samples for image in sample.images)
    assert samples[3].images[0].getpixel((0, 0)) == (0, 0, 255)
    assert dataset.name == "rows.jsonl"


@pytest.mark.parametrize(
    "images", [{}, {"image": None}, {"images": []}, {"images": None, "image": []}]
)
def test_text_only_rows(folder, images):
    assert load_rows(folder, [plain_row("Why?", **images)])[0].images == ()


def test_markers_are_prepended_only_in_the_plain_form(folder):
    dataset = load_rows(folder, [plain_row("Compare.", images=["a.png", "b.png"])])
    assert dataset[0].question == "<image><image>Compare."
    with pytest.raises(DataError, match="0 <image> markers but the row has 1 images"):
        load_rows(folder, [chat_row("How many?")])


def test_blank_lines_crlf_and_bom_keep_line_numbers(folder):
    byte_order_mark = b"\xef\xbb\xbf"
    second = json.dumps(plain_row()).encode()
    fourth = json.dumps(plain_row("é \u2028 ok"), ensure_ascii=False).encode()
    dataset = load_rows(folder, [byte_order_mark + b"\n" + second + b"\r\n  \r\n" + fourth])
    assert [dataset[0].id, dataset[1].id] == ["2", "4"]
    assert dataset[1].question == "é \u2028 ok"  # U+2028 inside a string ends no line


def test_extra_keeps_simple_values_only(folder):
    simple = {
        "a": 1,
        "b": None,
        "c": [1, "x"],
        "d": {"A": "one", "B": 2.5},
        "e": True,
        "big": 10**400,
    }
    row = plain_row(**simple, deep=[[1]], deeper={"x": {"y": 1}}, image="a.png")
    text = json.dumps(row)[:-1] + ', "huge": 1e999, "broken": "\\ud800"}'
    extra = load_rows(folder, [text])[0].extra
    assert extra == {key: value for key, value in simple.items() if value is not None}


def test_nulls_are_absent_keys(folder):
    """A table exported to JSONL has every column in every row."""
    assert (
        load_rows(folder, [chat_row(question=None, images=None) | {"answer": None}])[0].answer
        == "3"
    )


# ---------------------------------------------------------------- rows that do not


# A row, and what is said of it (a regular expression).
BAD_ROWS = {
    "broken json": ('{"question": ', "broken JSON at column 14"),
    "two objects": ("{} {}", "broken JSON"),
    "not an object": ([1], "found an array; expected a JSON object"),
    "a number": ("3", "found 3; expected a JSON object"),
    "no form": ({"quesion": "x", "answer": "y"}, "found the keys 'quesion, answer'"),
    "empty object": ({}, "found the keys ''"),
    "both forms": (chat_row(question="x"), "one form or the other"),
    "duplicate key": (
        '{"question": "a", "question": "b", "answer": "c"}',
        "'question' stands twice",
    ),
    "nested duplicate": (
        '{"question": "a", "answer": "c", "x": {"k": 1, "k": 2}}',
        "'k' stands twice",
    ),
    "nan": ('{"question": "a", "answer": NaN}', "found NaN"),
    "infinity": ('{"question": "a", "answer": 1, "x": -Infinity}', "found -Infinity"),
    "overflow": ('{"question": "a", "answer": 1e999}', "found inf as the answer"),
    "long integer": ('{"question": "a", "answer": ' + "9" * 5000 + "}", "cannot be read"),
    "not utf-8": (
        b'{"question": "\xff", "answer": "1"}',
        "utf-8.*expected one JSON object in UTF-8",
    ),
    "surrogate": (r'{"question": "\ud800", "answer": "1"}', "as the question; expected valid text"),
    "deep": (
        '{"question": "a", "answer": "b", "x": ' + "[" * 100_000 + "]" * 100_000 + "}",
        "recursion",
    ),
    "no answer": ({"question": "x"}, "found nothing as the answer"),
    "null answer": (plain_row(answer=None), "found nothing as the answer"),
    "empty answer": (plain_row(answer=" \n"), "as the answer; expected text that is not empty"),
    "list answer": (plain_row(answer=["a"]), "found an array as the answer"),
    "bool answer": (plain_row(answer=True), "found True as the answer"),
    "empty question": (plain_row("  "), "as the question; expected text that is not empty"),
    "only a marker": (
        plain_row("<image>", image="a.png"),
        "as the question; expected text that is not empty",
    ),
    "question type": (plain_row(5), "found 5 as the question"),
    "id type": (plain_row(id=[1]), 'found an array as "id"'),
    "id bool": (plain_row(id=True), 'found True as "id"'),
    "image type": (plain_row(image=3), "found 3 as an image"),
    "image list type": (plain_row(images=["a.png", None]), "found nothing as an image"),
    "empty path": (plain_row(image=""), "found '' as an image"),
    "image and images": (plain_row(image="a.png", images=["a.png"]), 'found "image" and "images"'),
    "too few markers": (
        plain_row("<image> x", images=["a.png", "b.png"]),
        "1 <image> markers but the row has 2 images",
    ),
    "too many markers": (
        plain_row("<image><image> x", image="a.png"),
        "2 <image> markers but the row has 1 images",
    ),
    "marker without image": (plain_row("<image> x"), "1 <image> markers but the row has 0 images"),
    "no turns": (chat_row() | {"conversations": []}, r"turns from \[\]"),
    "turns not objects": (chat_row() | {"conversations": ["a", "b"]}, "not an array of objects"),
    "turns not a list": (
        chat_row() | {"conversations": {"from": "human"}},
        "not an array of objects",
    ),
    "system turn": (
        chat_row()
        | {"conversations": [{"from": "system", "value": "s"}, *chat_row()["conversations"]]},
        r"\['system', 'human', 'gpt'\].*prompt_template",
    ),
    "two rounds": (
        chat_row() | {"conversations": chat_row()["conversations"] * 2},
        "expected exactly",
    ),
    "wrong order": (
        chat_row() | {"conversations": chat_row()["conversations"][::-1]},
        r"\['gpt', 'human'\]",
    ),
    "turn without value": (chat_row(value=None), "found nothing as the question"),
    "turn with a number": (chat_row(value=3), "found 3 as the question"),
    "missing image": (plain_row(image="c.png"), "'c.png' is not a file under"),
    "a folder": (plain_row(image="."), "is not a file under"),
    "nul in the path": (plain_row(image="a\0.png"), "cannot be opened"),
    "long path": (plain_row(image="a" * 5000), "image 'aaa"),
    "surrogate path": (
        r'{"question": "q", "answer": "1", "image": "\ud800.png"}',
        "cannot be opened",
    ),
    "parent folder": (plain_row(image="../secret.png"), "lies outside the image root"),
    "absolute path": (plain_row(image="/etc/passwd"), "lies outside the image root"),
    "not an image": (plain_row(image="rows.jsonl"), "cannot be decoded"),
}
for token in QWEN_SPECIAL_TOKENS:
    BAD_ROWS[f"special {token}"] = (plain_row(f"Say {token} now"), f"contains {re.escape(token)}")


@pytest.mark.parametrize("name", BAD_ROWS)
def test_bad_row_is_reported_with_its_line(folder, name):
    row, message = BAD_ROWS[name]
    save_image(folder.parent / "secret.png")
    with pytest.raises(
        DataError, match=rf"1 of 2 rows cannot be used:\n  line 3: .*{message}"
    ) as caught:
        load_rows(folder, [plain_row(), "", row])
    assert str(folder / "rows.jsonl") in str(caught.value)
    str(caught.value).encode()  # printable whatever the row held
    assert len(str(caught.value)) < 1500


# ---------------------------------------------------------------- image paths


def test_symlinks_may_not_leave_the_root(folder, tmp_path_factory):
    outside = tmp_path_factory.mktemp("outside")
    save_image(outside / "x.png")
    root = folder / "root"
    save_image(root / "in.png")
    (root / "file.png").symlink_to(outside / "x.png")
    (root / "dir").symlink_to(outside)
    (root / "fine.png").symlink_to(root / "in.png")
    (root / "loop.png").symlink_to(root / "loop.png")
    assert load_image("fine.png", root).size == (40, 30)
    assert load_image("../root/in.png", root).size == (40, 30)
    assert load_image("nowhere/../in.png", root).size == (40, 30)
    for path in ("file.png", "dir/x.png", str(outside / "x.png")):
        with pytest.raises(DataError, match="lies outside the image root"):
            load_image(path, root)
    with pytest.raises(DataError, match="loop.png"):
        load_image("loop.png", root)
    (folder / "link").symlink_to(root)  # the root itself may be a link
    assert load_image("in.png", folder / "link").size == (40, 30)


def test_a_sibling_with_the_same_prefix_is_outside(folder):
    """A string comparison of paths would take /x/root2 for a part of /x/root."""
    save_image(folder / "root2" / "x.png")
    (folder / "root").mkdir()
    with pytest.raises(DataError, match="outside"):
        load_image("../root2/x.png", folder / "root")


def test_a_fifo_does_not_hang(folder):
    os.mkfifo(folder / "pipe.png")
    with pytest.raises(DataError, match="is not a file"):
        load_image("pipe.png", folder)


# ---------------------------------------------------------------- images


def test_palette_with_transparency_is_composited_on_white(tmp_path):
    image = Image.new("P", (4, 2), 0)
    image.putpalette([255, 0, 0, 0, 255, 0] + [0] * 762)
    image.putpixel((3, 1), 1)
    for name in ("p.png", "p.gif"):
        image.save(tmp_path / name, transparency=0)
        loaded = load_image(name, tmp_path)
        assert loaded.mode == "RGB"
        assert loaded.getpixel((0, 0)) == (255, 255, 255)
        assert loaded.getpixel((3, 1)) == (0, 255, 0)


def test_alpha_is_composited_on_white(tmp_path):
    rgba = Image.new("RGBA", (3, 2), (200, 0, 0, 0))  # the hidden red must not show
    rgba.putpixel((1, 0), (0, 0, 200, 255))
    rgba.putpixel((2, 0), (0, 0, 0, 128))
    grey = Image.new("LA", (3, 2), (7, 0))
    grey.putpixel((1, 0), (7, 255))
    rgba.save(tmp_path / "rgba.png")
    grey.save(tmp_path / "la.png")
    loaded = load_image("rgba.png", tmp_path)
    colors = [loaded.getpixel((x, 0)) for x in range(3)]
    assert colors == [(255, 255, 255), (0, 0, 200), (127, 127, 127)]
    loaded = load_image("la.png", tmp_path)
    assert [loaded.getpixel((x, 0)) for x in range(2)] == [(255, 255, 255), (7, 7, 7)]


@pytest.mark.parametrize("name, dtype", [("g.png", "<u2"), ("g.tif", "<u2"), ("big.tif", ">u2")])
def test_16_bit_grey_is_scaled_not_clipped(tmp_path, name, dtype):
    values = np.array([[0, 257, 32896], [65535, 400, 65400]])
    Image.fromarray(values.astype(dtype)).save(tmp_path / name)
    # round(value / 257); clipping would give 255 nearly everywhere
    expected = [[0, 1, 128], [255, 2, 254]]
    assert np.asarray(load_image(name, tmp_path))[..., 0].tolist() == expected
    assert load_image(name, tmp_path).mode == "RGB"


@pytest.mark.parametrize("dtype", [np.int32, np.float32])
def test_32_bit_grey_is_refused(tmp_path, dtype):
    Image.fromarray(np.ones((4, 4), dtype)).save(tmp_path / "x.tif")
    with pytest.raises(DataError, match="x.tif' has 32-bit pixels"):
        load_image("x.tif", tmp_path)


def test_one_bit_and_cmyk(tmp_path):
    bits = Image.new("1", (3, 2), 0)
    bits.putpixel((1, 1), 1)
    bits.save(tmp_path / "bits.png")
    loaded = load_image("bits.png", tmp_path)
    assert loaded.getpixel((1, 1)) == (255, 255, 255)
    assert loaded.getpixel((0, 0)) == (0, 0, 0)
    Image.new("CMYK", (8, 8), (0, 255, 255, 0)).save(tmp_path / "cmyk.jpg", quality=100)
    red, green, blue = load_image("cmyk.jpg", tmp_path).getpixel((3, 3))
    assert red > 240 and green < 15 and blue < 15  # JPEG is lossy


@pytest.mark.parametrize("name", ["o.jpg", "o.png", "o.tif", "o.webp"])
def test_exif_rotation_is_applied(tmp_path, name):
    """Orientation 6: the camera stored the left edge as the top row; upright is a quarter turn."""
    stored = Image.new("RGB", (32, 16), "black")
    stored.paste("white", (0, 0, 16, 16))  # left half white; turned clockwise it is the top half
    exif = Image.Exif()
    exif[0x0112] = 6
    exact = {"o.jpg": {"quality": 100}, "o.webp": {"lossless": True}}.get(name, {})
    stored.save(tmp_path / name, exif=exif, **exact)
    upright = load_image(name, tmp_path)
    assert upright.size == (16, 32)
    assert min(upright.getpixel((8, 4))) > 250
    assert max(upright.getpixel((8, 28))) < 5
    assert load_rows(tmp_path, [plain_row(image=name)]).image_sizes == {name: (16, 32)}


@pytest.mark.parametrize("name", ["m.gif", "m.webp", "m.png"])
def test_first_frame_of_an_animation(tmp_path, name):
    frames = [Image.new("RGB", (20, 20), color) for color in ("red", "blue")]
    options = {"lossless": True} if name == "m.webp" else {}
    frames[0].save(tmp_path / name, save_all=True, append_images=frames[1:], **options)
    assert load_image(name, tmp_path).getpixel((5, 5)) == (255, 0, 0)


def test_multi_picture_jpeg_of_a_phone(tmp_path):
    first = Image.new("RGB", (32, 32), "red")
    second = Image.new("RGB", (16, 16), "blue")
    first.save(tmp_path / "phone.jpg", format="MPO", save_all=True, append_images=[second])
    loaded = load_image("phone.jpg", tmp_path)
    assert loaded.size == (32, 32)
    assert loaded.getpixel((3, 3))[0] > 240


def test_image_without_area(tmp_path):
    (tmp_path / "zero.gif").write_bytes(b"GIF89a\0\0\0\0\0\0\0,\0\0\0\0\0\0\0\0\0\2\0\0;")
    with pytest.raises(DataError, match="zero.gif"):
        load_image("zero.gif", tmp_path)


@pytest.mark.parametrize("name", ["t.png", "t.jpg", "t.webp", "t.bmp", "t.gif", "t.tif"])
def test_truncated_images_are_refused_and_whole_ones_load(tmp_path, name):
    """The header is intact, so only decoding can tell."""
    noise().save(tmp_path / name)
    assert load_image(name, tmp_path).size == (64, 64)
    content = (tmp_path / name).read_bytes()
    (tmp_path / name).write_bytes(content[: len(content) // 2])
    with pytest.raises(DataError, match=f"'{name}' cannot be decoded .*expected a complete PNG"):
        load_image(name, tmp_path)
    with pytest.raises(DataError, match="line 1: image"):
        load_rows(tmp_path, [plain_row(image=name)])


def test_only_raster_formats_are_opened(tmp_path):
    """An EPS named .png would reach Ghostscript if Pillow chose the format itself."""
    Image.new("RGB", (30, 30)).save(tmp_path / "x.png", format="EPS")
    assert (tmp_path / "x.png").read_bytes().startswith(b"%!PS")
    Image.new("RGB", (30, 30)).save(tmp_path / "y.png", format="PPM")
    for name in ("x.png", "y.png"):
        with pytest.raises(DataError, match="cannot be decoded"):
            load_image(name, tmp_path)


@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
# 40 x 30 = 1200: over the limit, and over Pillow's own factor of two.
@pytest.mark.parametrize("limit", [1199, 599])
def test_decompression_bombs_are_refused_before_decoding(folder, monkeypatch, limit):
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 1200)
    assert load_image("a.png", folder).size == (40, 30)
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", limit)

    def decoded(*_):
        pytest.fail("decoded")

    monkeypatch.setattr(ImageFile.ImageFile, "load", decoded)
    with pytest.raises(DataError, match="a.png.*(1200|40 x 30) pixels"):
        load_image("a.png", folder)
    assert limit == Image.MAX_IMAGE_PIXELS
    with pytest.raises(DataError, match="line 1: image 'a.png'"):
        load_rows(folder, [plain_row(image="a.png")])


def test_bomb_warning_turned_into_an_error_is_still_a_data_error(folder, monkeypatch):
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 1199)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with pytest.raises(DataError, match="a.png"):
            load_image("a.png", folder)


def test_extreme_aspect_ratio(tmp_path):
    save_image(tmp_path / "ok.png", (200, 1))
    save_image(tmp_path / "long.png", (201, 1))
    save_image(tmp_path / "tall.png", (2, 401))
    assert len(load_rows(tmp_path, [plain_row(image="ok.png")])) == 1
    for name in ("long.png", "tall.png"):
        with pytest.raises(DataError, match="aspect ratio of at most 200"):
            load_rows(tmp_path, [plain_row(image=name)])


def test_a_row_is_checked_without_opening_anything():
    raw = json.dumps(chat_row("<image>x", 4, image="nowhere.png", points=[1, 2])).encode()
    row = parse_row(raw, 7)
    assert (row.line, row.id, row.images) == (7, "c", ("nowhere.png",))
    assert (row.question, row.answer, row.extra) == ("<image>x", "4", {"points": [1, 2]})
    assert parse_row(b'{"question": "q", "answer": "a"}', 7).id == "7"


# ---------------------------------------------------------------- hostile input


def only_data_errors(folder: Path, content: bytes) -> None:
    """Whatever a file holds, only good samples come out of it, or a DataError."""
    (folder / "fuzz.jsonl").write_bytes(content)
    for on_error in ("raise", "skip"):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            try:
                dataset = JsonlDataset(folder / "fuzz.jsonl", on_error=on_error, progress=False)
            except DataError as error:
                str(error).encode()
                continue
        for index in range(len(dataset)):
            sample = dataset[index]
            assert sample.question.count("<image>") == len(sample.images)
            assert sample.question.strip()
            assert sample.answer.strip()
            # A log can hold what is left: no NaN, and nothing that is not UTF-8.
            json.dumps([sample.id, sample.extra], allow_nan=False, ensure_ascii=False).encode()


FUZZ = settings(
    max_examples=300, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)


@FUZZ
@given(st.binary(max_size=80))
def test_random_bytes(folder, content):
    only_data_errors(folder, content)


TEXTS = st.sampled_from(
    ["a.png", "<image>x", "q", "", " ", "\0", "..", "/", "\ud800", "<|im_end|>", "human", "gpt"]
)
SCALARS = TEXTS | st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5)


def nested(values):
    keys = TEXTS | st.just("from")
    return st.lists(values, max_size=3) | st.dictionaries(keys, values, max_size=3)


VALUES = st.recursive(SCALARS, nested, max_leaves=6)
SPEAKERS = SCALARS | st.sampled_from(["human", "gpt"])
TURNS = st.lists(
    st.fixed_dictionaries({}, optional={"from": SPEAKERS, "value": VALUES}), max_size=3
)
ROWS = st.fixed_dictionaries(
    {},
    optional={
        "id": VALUES,
        "image": VALUES,
        "images": VALUES,
        "question": VALUES | st.just("<image>q"),
        "answer": VALUES | st.just("1"),
        "conversations": VALUES | TURNS,
        "more": VALUES,
    },
)


@FUZZ
@given(st.lists(ROWS | VALUES, max_size=4))
def test_random_json(folder, rows):
    only_data_errors(folder, "\n".join(json.dumps(row) for row in rows).encode())


@settings(FUZZ, max_examples=150)
@given(
    st.sampled_from(["PNG", "JPEG", "GIF", "BMP", "TIFF", "WEBP"]),
    st.lists(st.tuples(st.integers(0, 400), st.integers(0, 255)), min_size=1, max_size=4),
)
@pytest.mark.filterwarnings("ignore")
def test_corrupted_images(format, changes):
    """Flipped bytes may still decode; if not, only DataError comes out."""
    stream = io.BytesIO()
    noise((12, 12)).save(stream, format)
    content = bytearray(stream.getvalue())
    for position, value in changes:
        content[position % len(content)] = value
    try:
        image = decode_image(io.BytesIO(bytes(content)))
    except DataError:
        return
    assert image.mode == "RGB"
    assert min(image.size) >= 1
