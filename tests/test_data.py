"""data.py on files built here: no download, no model, a byte-level tokenizer made in the test."""

import io
import json
import os
import subprocess
import sys
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image, ImageFile
from tokenizers.pre_tokenizers import ByteLevel
from transformers import Qwen2Tokenizer
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

import data
from data import DataError, JsonlDataset, Sample, Sampler, check_lengths, encode_prompt, load_image
from rows import QWEN_SPECIAL_TOKENS, parse_row

CHAT_TEMPLATE = (
    "{% for message in messages %}{% if loop.first and message['role'] != 'system' %}<|im_start|>system\n"
    "You are a helpful assistant.<|im_end|>\n{% endif %}<|im_start|>{{ message['role'] }}\n"
    "{% if message['content'] is string %}{{ message['content'] }}<|im_end|>\n{% else %}"
    "{% for content in message['content'] %}{% if content['type'] == 'image' or 'image' in content %}"
    "<|vision_start|><|image_pad|><|vision_end|>{% elif 'text' in content %}{{ content['text'] }}{% endif %}"
    "{% endfor %}<|im_end|>\n{% endif %}{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
SYSTEM = "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n"
SPECIAL = list(QWEN_SPECIAL_TOKENS)


def make_tokenizer(**options) -> Qwen2Tokenizer:
    vocab = {symbol: number for number, symbol in enumerate(sorted(ByteLevel.alphabet()))}
    vocab["he"] = len(vocab)  # one merge, so that it is a BPE and not a byte table
    options = {"extra_special_tokens": SPECIAL} | options
    tokenizer = Qwen2Tokenizer(vocab=vocab, merges=[("h", "e")], **options)
    tokenizer.chat_template = CHAT_TEMPLATE
    return tokenizer


@pytest.fixture(scope="module")
def tokenizer() -> Qwen2Tokenizer:
    return make_tokenizer()


@pytest.fixture(scope="module")
def processor() -> Qwen2VLImageProcessorPil:
    return Qwen2VLImageProcessorPil(size={"shortest_edge": 28 * 28, "longest_edge": 28 * 28 * 64})


def save_image(path: Path, size=(40, 30), color="red", **options) -> str:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", size, color).save(path, **options)
    return path.name


def write_rows(path: Path, rows: list) -> Path:
    """Rows as JSON lines; a str or bytes row is written as it is."""
    lines = [row if isinstance(row, str | bytes) else json.dumps(row) for row in rows]
    path.write_bytes(
        b"\n".join(line.encode() if isinstance(line, str) else line for line in lines) + b"\n"
    )
    return path


def load(path: Path, rows: list, **options) -> JsonlDataset:
    return JsonlDataset(write_rows(path / "rows.jsonl", rows), **({"progress": False} | options))


def plain(question="How many?", answer="3", **more) -> dict:
    return {"question": question, "answer": answer, **more}


def chat(value="<image>How many?", answer="3", image="a.png", **more) -> dict:
    turns = [{"from": "human", "value": value}, {"from": "gpt", "value": answer}]
    return {"id": "c", "image": image, "conversations": turns, **more}


@pytest.fixture
def folder(tmp_path) -> Path:
    save_image(tmp_path / "a.png", (40, 30), (255, 0, 0))
    save_image(tmp_path / "b.png", (60, 80), (0, 0, 255))
    return tmp_path


# ---------------------------------------------------------------- rows that load


def test_both_forms_mix_and_keep_their_order(folder):
    rows = [
        chat(),
        plain("<image>Is <image> bigger?", "yes", images=["a.png", "b.png"], id=17),
        plain("One plus one?", 2),
        plain("<image>Half?", 0.5, image="b.png"),
        chat("<image>then <image>", image=["b.png", "a.png"]),
        {k: v for k, v in chat("No picture").items() if k != "image"},
    ]
    dataset = load(folder, rows)
    assert len(dataset) == 6
    samples = [dataset[i] for i in range(6)]
    assert [s.id for s in samples] == ["c", "17", "3", "4", "c#2", "c#3"]
    assert [s.answer for s in samples] == ["3", "yes", "2", "0.5", "3", "3"]
    assert [s.question for s in samples][1:3] == ["<image>Is <image> bigger?", "One plus one?"]
    assert [[im.size for im in s.images] for s in samples] == [
        [(40, 30)], [(40, 30), (60, 80)], [], [(60, 80)], [(60, 80), (40, 30)], []
    ]  # fmt: skip
    assert all(im.mode == "RGB" for s in samples for im in s.images)
    assert samples[3].images[0].getpixel((0, 0)) == (0, 0, 255)
    assert dataset.name == "rows.jsonl"


@pytest.mark.parametrize(
    "images", [{}, {"image": None}, {"images": []}, {"images": None, "image": []}]
)
def test_text_only_rows(folder, images):
    assert load(folder, [plain("Why?", **images)])[0].images == ()


def test_markers_are_prepended_only_in_the_plain_form(folder):
    dataset = load(folder, [plain("Compare.", images=["a.png", "b.png"])])
    assert dataset[0].question == "<image><image>Compare."
    with pytest.raises(DataError, match="0 <image> markers but the row has 1 images"):
        load(folder, [chat("How many?")])


def test_blank_lines_crlf_and_bom_keep_line_numbers(folder):
    body = (
        b"\xef\xbb\xbf\n"
        + json.dumps(plain()).encode()
        + b"\r\n  \r\n"
        + json.dumps(plain("é \u2028 ok")).encode()
    )
    dataset = load(folder, [body])
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
    row = plain(**simple, deep=[[1]], deeper={"x": {"y": 1}}, image="a.png")
    text = json.dumps(row)[:-1] + ', "huge": 1e999, "broken": "\\ud800"}'
    extra = load(folder, [text])[0].extra
    assert extra == {key: value for key, value in simple.items() if value is not None}


def test_nulls_are_absent_keys(folder):
    """A table exported to JSONL has every column in every row."""
    assert load(folder, [chat(question=None, images=None) | {"answer": None}])[0].answer == "3"


def test_fingerprint_is_of_the_content_and_of_the_rows_in_use(folder):
    first, second, again = (
        load(folder, [plain()]),
        load(folder, [plain("Other?")]),
        load(folder, [plain()]),
    )
    assert first.fingerprint == again.fingerprint != second.fingerprint
    rows = [plain(image="late.png"), plain()]
    with pytest.warns(UserWarning, match="1 of 2 rows"):
        before = load(folder, rows, on_error="skip")
    (folder / "late.png").write_bytes((folder / "a.png").read_bytes())
    assert (
        load(folder, rows, on_error="skip").fingerprint != before.fingerprint
    )  # place 0 is another row now


def test_image_root(folder, tmp_path_factory):
    elsewhere = tmp_path_factory.mktemp("elsewhere")
    rows = [plain(image="a.png"), plain(image=str(folder / "a.png"))]
    path = write_rows(elsewhere / "rows.jsonl", rows)
    assert len(JsonlDataset(path, image_root=folder, progress=False)) == 2
    with pytest.raises(DataError, match="image_root .*not a folder"):
        JsonlDataset(path, image_root=folder / "nope", progress=False)


# ---------------------------------------------------------------- rows that do not


BAD_ROWS = {
    "broken json": ('{"question": ', "broken JSON at column 14"),
    "two objects": ("{} {}", "broken JSON"),
    "not an object": ([1], "found an array; expected a JSON object"),
    "a number": ("3", "found 3; expected a JSON object"),
    "no form": ({"quesion": "x", "answer": "y"}, "found the keys 'quesion, answer'"),
    "empty object": ({}, "found the keys ''"),
    "both forms": (chat(question="x"), "one form or the other"),
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
    "null answer": (plain(answer=None), "found nothing as the answer"),
    "empty answer": (plain(answer=" \n"), "as the answer; expected text that is not empty"),
    "list answer": (plain(answer=["a"]), "found an array as the answer"),
    "bool answer": (plain(answer=True), "found True as the answer"),
    "empty question": (plain("  "), "as the question; expected text that is not empty"),
    "only a marker": (
        plain("<image>", image="a.png"),
        "as the question; expected text that is not empty",
    ),
    "question type": (plain(5), "found 5 as the question"),
    "id type": (plain(id=[1]), 'found an array as "id"'),
    "id bool": (plain(id=True), 'found True as "id"'),
    "image type": (plain(image=3), "found 3 as an image"),
    "image list type": (plain(images=["a.png", None]), "found nothing as an image"),
    "empty path": (plain(image=""), "found '' as an image"),
    "image and images": (plain(image="a.png", images=["a.png"]), 'found "image" and "images"'),
    "too few markers": (
        plain("<image> x", images=["a.png", "b.png"]),
        "1 <image> markers but the row has 2 images",
    ),
    "too many markers": (
        plain("<image><image> x", image="a.png"),
        "2 <image> markers but the row has 1 images",
    ),
    "marker without image": (plain("<image> x"), "1 <image> markers but the row has 0 images"),
    "no turns": (chat() | {"conversations": []}, r"turns from \[\]"),
    "turns not objects": (chat() | {"conversations": ["a", "b"]}, "not an array of objects"),
    "turns not a list": (chat() | {"conversations": {"from": "human"}}, "not an array of objects"),
    "system turn": (
        chat() | {"conversations": [{"from": "system", "value": "s"}, *chat()["conversations"]]},
        r"\['system', 'human', 'gpt'\].*prompt_template",
    ),
    "two rounds": (chat() | {"conversations": chat()["conversations"] * 2}, "expected exactly"),
    "wrong order": (
        chat() | {"conversations": chat()["conversations"][::-1]},
        r"\['gpt', 'human'\]",
    ),
    "turn without value": (chat(value=None), "found nothing as the question"),
    "turn with a number": (chat(value=3), "found 3 as the question"),
    "missing image": (plain(image="c.png"), "'c.png' is not a file under"),
    "a folder": (plain(image="."), "is not a file under"),
    "nul in the path": (plain(image="a\0.png"), "cannot be opened"),
    "long path": (plain(image="a" * 5000), "image 'aaa"),
    "surrogate path": (
        r'{"question": "q", "answer": "1", "image": "\ud800.png"}',
        "cannot be opened",
    ),
    "parent folder": (plain(image="../secret.png"), "lies outside the image root"),
    "absolute path": (plain(image="/etc/passwd"), "lies outside the image root"),
    "not an image": (plain(image="rows.jsonl"), "cannot be decoded"),
} | {f"special {t}": (plain(f"Say {t} now"), f"contains {t}".replace("|", r"\|")) for t in SPECIAL}


@pytest.mark.parametrize("name", BAD_ROWS)
def test_bad_row_is_reported_with_its_line(folder, name):
    row, message = BAD_ROWS[name]
    save_image(folder.parent / "secret.png")
    with pytest.raises(
        DataError, match=rf"1 of 2 rows cannot be used:\n  line 3: .*{message}"
    ) as caught:
        load(folder, [plain(), "", row])
    assert str(folder / "rows.jsonl") in str(caught.value)
    str(caught.value).encode()  # printable whatever the row held
    assert len(str(caught.value)) < 1500


def test_problems_are_reported_together_twenty_and_the_total(folder):
    rows = [plain("") if i % 2 else plain(image="no.png") for i in range(25)] + [plain()]
    with pytest.raises(DataError) as caught:
        load(folder, rows)
    message = str(caught.value)
    assert "25 of 26 rows" in message and "and 5 more" in message
    assert [f"line {n}:" in message for n in range(1, 27)] == [True] * 20 + [False] * 6
    assert message.index("line 1:") < message.index("line 2:") < message.index("line 20:")


def test_skip_warns_once_and_drops(folder):
    rows = [plain(""), plain("Kept?"), plain(image="no.png"), "{"]
    with pytest.warns(UserWarning) as caught:
        dataset = load(folder, rows, on_error="skip")
    assert [dataset[i].question for i in range(len(dataset))] == ["Kept?"]
    assert len(caught) == 1
    assert all(f"line {n}:" in str(caught[0].message) for n in (1, 3, 4))
    assert Path(caught[0].filename).name == "test_data.py"  # the warning points at the caller


def test_nothing_left_is_an_error(folder):
    with pytest.raises(DataError, match="1 of 1 rows"):
        load(folder, [plain("")], on_error="skip")
    for content in ([], ["", "  "]):
        with pytest.raises(DataError, match="is empty"):
            load(folder, content, on_error="skip")
    with pytest.raises(DataError, match='expected "raise" or "skip"'):
        load(folder, [plain()], on_error="ignore")


def test_file_that_cannot_be_read(folder):
    write_rows(folder / "train.jsonl", [plain()])
    with pytest.raises(DataError, match=r"trian\.jsonl.*near names in its folder: train\.jsonl"):
        JsonlDataset(folder / "trian.jsonl")
    with pytest.raises(DataError, match="its folder cannot be read either"):
        JsonlDataset(folder / "no" / "train.jsonl")
    for path in (folder, folder / "a\0b"):
        with pytest.raises(DataError, match="cannot be read"):
            JsonlDataset(path)


def test_wrong_image_root_is_suspected_only_if_every_first_image_misses(folder):
    rows = [plain(), *[plain(image=f"no{i}.png") for i in range(8)]]
    with pytest.raises(DataError, match="is data.image_root .* the right folder"):
        load(folder, rows)
    with pytest.raises(DataError) as caught:
        load(folder, [plain(image="a.png"), *rows])
    assert "right folder" not in str(caught.value)


def test_symlinks_may_not_leave_the_root(folder, tmp_path_factory):
    outside = tmp_path_factory.mktemp("outside")
    save_image(outside / "x.png")
    root = folder / "root"
    save_image(root / "in.png")
    (root / "file.png").symlink_to(outside / "x.png")
    (root / "dir").symlink_to(outside)
    (root / "fine.png").symlink_to(root / "in.png")
    (root / "loop.png").symlink_to(root / "loop.png")
    assert load_image("fine.png", root).size == load_image("../root/in.png", root).size == (40, 30)
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


def test_image_that_changes_after_the_check_names_its_line(folder):
    dataset = load(folder, [plain(), plain(image="a.png")])
    (folder / "a.png").write_bytes(b"")
    with pytest.raises(DataError, match=r"rows\.jsonl, line 2: image 'a\.png'"):
        dataset[1]


def test_every_image_is_decoded_once_at_construction(folder, monkeypatch):
    opened = []
    original = data.load_image
    monkeypatch.setattr(
        data, "load_image", lambda path, root: opened.append(path) or original(path, root)
    )
    load(folder, [plain(image="a.png"), plain(images=["a.png", "b.png"])])
    assert sorted(opened) == ["a.png", "b.png"]


def test_warning_about_text_before_the_image(folder):
    rows = [
        plain(image="a.png"),
        plain("Look: <image> what?", image="a.png"),
        chat("See <image>"),
        chat("\n<image>x", id="d"),
    ]
    with pytest.warns(UserWarning, match=r"in 2 rows \(first: line 2\)") as caught:
        load(folder, rows)
    assert len(caught) == 1
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        load(folder, [plain(image="a.png"), chat(), plain("text only")])


def test_progress_is_silent_on_request(folder, capfd):
    load(folder, [plain(image="a.png")])
    assert capfd.readouterr() == ("", "")
    load(folder, [plain(image="a.png")], progress=True)
    assert "rows.jsonl: checking images" in capfd.readouterr().err


# ---------------------------------------------------------------- images


def test_palette_with_transparency_is_composited_on_white(tmp_path):
    image = Image.new("P", (4, 2), 0)
    image.putpalette([255, 0, 0, 0, 255, 0] + [0] * 762)
    image.putpixel((3, 1), 1)
    for name in ("p.png", "p.gif"):
        image.save(tmp_path / name, transparency=0)
        loaded = load_image(name, tmp_path)
        assert loaded.mode == "RGB"
        assert loaded.getpixel((0, 0)) == (255, 255, 255) and loaded.getpixel((3, 1)) == (0, 255, 0)


def test_alpha_is_composited_on_white(tmp_path):
    rgba = Image.new("RGBA", (3, 2), (200, 0, 0, 0))  # the hidden red must not show
    rgba.putpixel((1, 0), (0, 0, 200, 255))
    rgba.putpixel((2, 0), (0, 0, 0, 128))
    grey = Image.new("LA", (3, 2), (7, 0))
    grey.putpixel((1, 0), (7, 255))
    rgba.save(tmp_path / "rgba.png")
    grey.save(tmp_path / "la.png")
    loaded = load_image("rgba.png", tmp_path)
    assert [loaded.getpixel((x, 0)) for x in range(3)] == [
        (255, 255, 255),
        (0, 0, 200),
        (127, 127, 127),
    ]
    loaded = load_image("la.png", tmp_path)
    assert [loaded.getpixel((x, 0)) for x in range(2)] == [(255, 255, 255), (7, 7, 7)]


@pytest.mark.parametrize("name, dtype", [("g.png", "<u2"), ("g.tif", "<u2"), ("big.tif", ">u2")])
def test_16_bit_grey_is_scaled_not_clipped(tmp_path, name, dtype):
    values = np.array([[0, 257, 32896], [65535, 400, 65400]])
    Image.fromarray(values.astype(dtype)).save(tmp_path / name)
    expected = [
        [0, 1, 128],
        [255, 2, 254],
    ]  # round(value / 257); clipping would give 255 nearly everywhere
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
    assert loaded.getpixel((1, 1)) == (255, 255, 255) and loaded.getpixel((0, 0)) == (0, 0, 0)
    Image.new("CMYK", (8, 8), (0, 255, 255, 0)).save(tmp_path / "cmyk.jpg", quality=100)
    red, green, blue = load_image("cmyk.jpg", tmp_path).getpixel((3, 3))
    assert red > 240 and green < 15 and blue < 15  # JPEG is lossy


@pytest.mark.parametrize("name", ["o.jpg", "o.png", "o.tif", "o.webp"])
def test_exif_rotation_is_applied(tmp_path, name):
    """Orientation 6: the camera stored the picture's left edge as the top row, so upright means a quarter turn."""
    stored = Image.new("RGB", (32, 16), "black")
    stored.paste("white", (0, 0, 16, 16))  # left half white; turned clockwise it is the top half
    exif = Image.Exif()
    exif[0x0112] = 6
    options = (
        {"quality": 100} if name == "o.jpg" else {"lossless": True} if name == "o.webp" else {}
    )
    stored.save(tmp_path / name, exif=exif, **options)
    upright = load_image(name, tmp_path)
    assert upright.size == (16, 32)
    assert min(upright.getpixel((8, 4))) > 250 and max(upright.getpixel((8, 28))) < 5
    assert load(tmp_path, [plain(image=name)]).image_sizes == {name: (16, 32)}


@pytest.mark.parametrize("name", ["m.gif", "m.webp", "m.png"])
def test_first_frame_of_an_animation(tmp_path, name):
    frames = [Image.new("RGB", (20, 20), color) for color in ("red", "blue")]
    options = {"lossless": True} if name == "m.webp" else {}
    frames[0].save(tmp_path / name, save_all=True, append_images=frames[1:], **options)
    assert load_image(name, tmp_path).getpixel((5, 5)) == (255, 0, 0)


def test_multi_picture_jpeg_of_a_phone(tmp_path):
    first, second = Image.new("RGB", (32, 32), "red"), Image.new("RGB", (16, 16), "blue")
    first.save(tmp_path / "phone.jpg", format="MPO", save_all=True, append_images=[second])
    loaded = load_image("phone.jpg", tmp_path)
    assert loaded.size == (32, 32) and loaded.getpixel((3, 3))[0] > 240


def test_image_without_area(tmp_path):
    (tmp_path / "zero.gif").write_bytes(b"GIF89a\0\0\0\0\0\0\0,\0\0\0\0\0\0\0\0\0\2\0\0;")
    with pytest.raises(DataError, match="zero.gif"):
        load_image("zero.gif", tmp_path)


def noise(size=(64, 64)) -> Image.Image:
    return Image.fromarray(np.random.default_rng(0).integers(0, 256, (*size, 3), dtype=np.uint8))


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
        load(tmp_path, [plain(image=name)])


def test_only_raster_formats_are_opened(tmp_path):
    """An EPS named .png would reach Ghostscript if Pillow chose the format itself."""
    Image.new("RGB", (30, 30)).save(tmp_path / "x.png", format="EPS")
    assert (tmp_path / "x.png").read_bytes().startswith(b"%!PS")
    Image.new("RGB", (30, 30)).save(tmp_path / "y.png", format="PPM")
    for name in ("x.png", "y.png"):
        with pytest.raises(DataError, match="cannot be decoded"):
            load_image(name, tmp_path)


@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
@pytest.mark.parametrize(
    "limit", [1199, 599]
)  # 40 x 30 = 1200: over the limit, and over Pillow's own factor of two
def test_decompression_bombs_are_refused_before_decoding(folder, monkeypatch, limit):
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 1200)
    assert load_image("a.png", folder).size == (40, 30)
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", limit)
    monkeypatch.setattr(ImageFile.ImageFile, "load", lambda *_: pytest.fail("decoded"))
    with pytest.raises(DataError, match="a.png.*(1200|40 x 30) pixels"):
        load_image("a.png", folder)
    assert Image.MAX_IMAGE_PIXELS == limit
    with pytest.raises(DataError, match="line 1: image 'a.png'"):
        load(folder, [plain(image="a.png")])


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
    assert len(load(tmp_path, [plain(image="ok.png")])) == 1
    for name in ("long.png", "tall.png"):
        with pytest.raises(DataError, match="aspect ratio of at most 200"):
            load(tmp_path, [plain(image=name)])


def test_broken_images_keep_no_pixels_alive(tmp_path):
    """A stored exception keeps its traceback, whose frames keep half-decoded images: a thousand are gigabytes."""
    noise().save(tmp_path / "t.png")
    (tmp_path / "t.png").write_bytes((tmp_path / "t.png").read_bytes()[:3000])
    problems: dict[int, DataError] = {}
    dataset = load(tmp_path, [plain()])
    dataset.rows = [parse_row(json.dumps(plain(image="t.png")).encode(), 1)]
    dataset._check_images(problems)
    assert (
        problems[1].__traceback__ is None
        and problems[1].__cause__ is None
        and problems[1].__context__ is None
    )


# ---------------------------------------------------------------- prompts


TEMPLATE = "{question}\nThink first."


def sample_of(question: str, *sizes: tuple[int, int]) -> Sample:
    colors = ["red", "green", "blue"]
    images = tuple(
        Image.new("RGB", size, color) for size, color in zip(sizes, colors, strict=False)
    )
    return Sample("s", images, question, "3")


def expected_ids(tokenizer, user: str) -> list[int]:
    """Byte-level ids by hand: special tokens by name, "he" merged, every other byte its own token."""
    text = f"{SYSTEM}<|im_start|>user\n{user}<|im_end|>\n<|im_start|>assistant\n"
    ids = []
    while text:
        special = next((token for token in SPECIAL if text.startswith(token)), None)
        piece = special or ("he" if text.startswith("he") else text[0])
        symbol = {" ": "Ġ", "\n": "Ċ"}.get(piece, piece)
        ids.append(tokenizer.convert_tokens_to_ids(symbol))
        text = text[len(piece) :]
    return ids


def test_prompt_of_two_interleaved_images(tokenizer, processor):
    sample = sample_of("<image>Is the first <image> red?", (56, 28), (84, 56))
    prompt = encode_prompt(sample, 5, tokenizer, processor, TEMPLATE)
    pads = [f"<|vision_start|>{'<|image_pad|>' * n}<|vision_end|>" for n in (2, 6)]
    user = f"{pads[0]}Is the first {pads[1]} red?\nThink first."
    assert prompt.input_ids.tolist() == expected_ids(tokenizer, user)
    assert prompt.input_ids.dtype == torch.int64 and prompt.visual_mask.dtype == torch.bool
    image_id = tokenizer.convert_tokens_to_ids("<|image_pad|>")
    assert prompt.visual_mask.tolist() == [token == image_id for token in prompt.input_ids.tolist()]
    assert int(prompt.visual_mask.sum()) == 8
    assert prompt.image_grid_thw.tolist() == [[1, 2, 4], [1, 4, 6]]
    assert (
        prompt.pixel_values.shape == (8 + 24, 3 * 2 * 14 * 14)
        and prompt.pixel_values.dtype == torch.float32
    )
    assert (prompt.index, prompt.id, prompt.answer, prompt.question) == (
        5,
        "s",
        "3",
        sample.question,
    )


def test_prompt_without_images(tokenizer, processor):
    prompt = encode_prompt(sample_of("What?"), 0, tokenizer, processor, TEMPLATE)
    assert prompt.input_ids.tolist() == expected_ids(tokenizer, "What?\nThink first.")
    assert prompt.pixel_values is None and prompt.image_grid_thw is None
    assert prompt.visual_mask.shape == prompt.input_ids.shape and not prompt.visual_mask.any()


def test_pixels_are_in_the_order_of_the_markers(tokenizer, processor):
    prompt = encode_prompt(
        sample_of("<image>a<image>b", (28, 28), (28, 28)), 0, tokenizer, processor, TEMPLATE
    )
    red, green = prompt.pixel_values[:4], prompt.pixel_values[4:]
    assert (
        red.view(4, 3, -1).mean((0, 2)).argmax() == 0
        and green.view(4, 3, -1).mean((0, 2)).argmax() == 1
    )


def test_an_odd_image_does_not_change_its_neighbour(tokenizer, processor):
    alone = encode_prompt(sample_of("<image>x", (100, 70)), 0, tokenizer, processor, TEMPLATE)
    both = encode_prompt(
        sample_of("<image>x<image>", (100, 70), (1, 3)), 0, tokenizer, processor, TEMPLATE
    )
    assert torch.equal(both.pixel_values[: len(alone.pixel_values)], alone.pixel_values)
    assert torch.equal(both.image_grid_thw[:1], alone.image_grid_thw)


@pytest.mark.parametrize(
    "size, grid",
    [
        ((1, 1), (2, 2)),
        ((3, 3), (2, 2)),
        ((28, 28), (2, 2)),
        ((3, 90), (60, 2)),
        ((90, 3), (2, 60)),
        ((56, 27), (2, 4)),
    ],
)
def test_tiny_images_are_enlarged_keeping_their_aspect(tokenizer, processor, size, grid):
    """The processor alone would make a 3 x 90 image 28 x 168: smart_resize rounds the short side to zero first."""
    prompt = encode_prompt(sample_of("<image>x", size), 0, tokenizer, processor, TEMPLATE)
    assert prompt.image_grid_thw.tolist() == [[1, *grid]]


def test_the_factor_comes_from_the_processor(tokenizer):
    """With 16-pixel patches the unit is 32: a constant 28 would leave a side that rounds to another grid."""
    processor = Qwen2VLImageProcessorPil(
        patch_size=16, size={"shortest_edge": 32 * 32, "longest_edge": 32 * 32 * 64}, merge_size=2
    )
    prompt = encode_prompt(sample_of("<image>x", (2, 20)), 0, tokenizer, processor, TEMPLATE)
    assert prompt.image_grid_thw.tolist() == [[1, 20, 2]]  # 32 x 320 pixels
    assert int(prompt.visual_mask.sum()) == 10


def test_enlarged_size():
    assert data.enlarged_size((1, 1), 28) == (28, 28)
    assert data.enlarged_size((14, 100), 28) == (28, 200)
    assert data.enlarged_size((30, 40), 28) == (30, 40)
    assert data.enlarged_size((200, 1), 28) == (5600, 28)  # never past the aspect limit


@given(st.integers(1, 3000), st.integers(1, 3000), st.integers(2, 64))
def test_enlarged_size_properties(width, height, factor):
    new = data.enlarged_size((width, height), factor)
    assert min(new) >= factor
    assert new == (width, height) or min(new) == factor
    if max(width, height) <= 200 * min(width, height):
        assert max(new) <= 200 * min(new)


@pytest.mark.parametrize("template", ["no place", "{question} {question}", "{Question}"])
def test_template_needs_exactly_one_question(tokenizer, processor, template):
    with pytest.raises(DataError, match="data.prompt_template .*expected exactly one"):
        encode_prompt(sample_of("x"), 0, tokenizer, processor, template)


def test_template_is_not_a_format_string(tokenizer, processor):
    question = r"Is \frac{1}{2} in {question} or {0.__class__}?"
    prompt = encode_prompt(
        sample_of(question), 0, tokenizer, processor, r"{question} Put it in \boxed{}."
    )
    assert prompt.input_ids.tolist() == expected_ids(tokenizer, question + r" Put it in \boxed{}.")


@pytest.mark.parametrize("token", SPECIAL)
def test_special_tokens_in_template_or_question_are_refused(tokenizer, processor, token):
    for question, template in ((f"a{token}b", TEMPLATE), ("a", "{question}" + token)):
        with pytest.raises(DataError, match="would be read as that special token"):
            encode_prompt(sample_of(question), 0, tokenizer, processor, template)


def test_special_tokens_of_this_tokenizer_are_refused(processor):
    tokenizer = make_tokenizer(extra_special_tokens=[*SPECIAL, "<|box_start|>"])
    with pytest.raises(DataError, match=r"box_start"):
        encode_prompt(sample_of("a<|box_start|>b"), 0, tokenizer, processor, TEMPLATE)


def test_marker_and_image_counts_must_match(tokenizer, processor):
    for question, sizes, template in (
        ("<image><image>x", [(28, 28)], TEMPLATE),
        ("x", [(28, 28)], TEMPLATE),
        ("<image>x", [], TEMPLATE),
        ("<image>x", [(28, 28)], "<image>{question}"),
    ):
        with pytest.raises(
            DataError, match="sample 's': found .* images.*expected the same number"
        ):
            encode_prompt(sample_of(question, *sizes), 0, tokenizer, processor, template)


def test_chat_template_that_drops_images_is_refused(processor):
    tokenizer = make_tokenizer()
    tokenizer.chat_template = (
        "{% for part in messages[0]['content'] %}{{ part.get('text', '') }}{% endfor %}"
    )
    with pytest.raises(DataError, match="after the chat template, 0 image placeholders"):
        encode_prompt(sample_of("<image>x", (28, 28)), 0, tokenizer, processor, TEMPLATE)


def test_image_token_comes_from_the_tokenizer(processor):
    tokenizer = make_tokenizer(extra_special_tokens=[*SPECIAL, "<|pic|>"])
    tokenizer.chat_template = CHAT_TEMPLATE.replace("<|image_pad|>", "<|pic|>")
    tokenizer.image_token = "<|pic|>"
    prompt = encode_prompt(sample_of("<image>x", (56, 28)), 0, tokenizer, processor, TEMPLATE)
    assert (
        prompt.input_ids[prompt.visual_mask].tolist()
        == [tokenizer.convert_tokens_to_ids("<|pic|>")] * 2
    )


def test_tokenizer_without_an_image_token_is_refused(processor):
    """An unknown token maps to <|endoftext|> in Qwen2Tokenizer, which would silently be the placeholder."""
    tokenizer = make_tokenizer(extra_special_tokens=["<|im_start|>", "<|im_end|>"])
    with pytest.raises(DataError, match=r"no token <\|image_pad\|>"):
        encode_prompt(sample_of("<image>x", (28, 28)), 0, tokenizer, processor, TEMPLATE)


def test_prompt_length_limit(tokenizer, processor):
    sample = sample_of("<image>x", (84, 56))
    length = len(encode_prompt(sample, 0, tokenizer, processor, TEMPLATE).input_ids)
    assert len(encode_prompt(sample, 0, tokenizer, processor, TEMPLATE, length).input_ids) == length
    message = (
        f"'s': .*{length} tokens.*at most {length - 1} .*data.max_prompt_tokens.*data.max_pixels"
    )
    with pytest.raises(DataError, match=message):
        encode_prompt(sample, 0, tokenizer, processor, TEMPLATE, length - 1)


def test_extreme_aspect_in_a_sample_from_elsewhere(tokenizer, processor):
    with pytest.raises(DataError, match="'s': an image has 300 x 1 pixels"):
        encode_prompt(sample_of("<image>x", (300, 1)), 0, tokenizer, processor, TEMPLATE)


SIZES = st.tuples(st.integers(1, 400), st.integers(1, 400)).filter(lambda s: max(s) <= 200 * min(s))


@settings(max_examples=40, deadline=None)
@given(
    st.lists(SIZES, max_size=3),
    st.text(st.characters(exclude_categories=["Cs"]), min_size=1, max_size=20),
)
def test_counted_length_is_the_encoded_length(tokenizer, processor, sizes, text):
    question = text.join(["<image>"] * len(sizes)) + text
    sample = sample_of(question, *sizes)
    counted = data.count_prompt_tokens(question, sizes, tokenizer, processor, TEMPLATE)
    assert counted == len(encode_prompt(sample, 0, tokenizer, processor, TEMPLATE).input_ids)


def test_check_lengths_reports_and_skips(folder, tokenizer, processor):
    rows = [plain("x" * (100 if i % 2 else 1), image="a.png") for i in range(50)]
    dataset = load(folder, rows)
    short = len(encode_prompt(dataset[0], 0, tokenizer, processor, TEMPLATE).input_ids)
    check_lengths(dataset, tokenizer, processor, TEMPLATE, short + 99)
    check_lengths(dataset, tokenizer, processor, TEMPLATE, None)
    assert len(dataset) == 50
    with pytest.raises(
        DataError, match=f"25 of 50 rows.*\n  line 2: the prompt has {short + 99} tokens"
    ) as caught:
        check_lengths(dataset, tokenizer, processor, TEMPLATE, short)
    assert "and 5 more" in str(caught.value) and str(caught.value).count("line ") == 20
    assert len(dataset) == 50

    skipping = load(folder, rows, on_error="skip")
    with pytest.warns(UserWarning, match="25 of 50 rows"):
        check_lengths(skipping, tokenizer, processor, TEMPLATE, short)
    assert len(skipping) == 25 and skipping[1].id == "3"
    with pytest.raises(DataError, match="25 of 25 rows"):
        check_lengths(skipping, tokenizer, processor, TEMPLATE, 1)


def test_check_lengths_decodes_nothing(folder, tokenizer, processor, monkeypatch):
    dataset = load(folder, [plain("<image>a<image>", images=["a.png", "b.png"])])
    length = len(encode_prompt(dataset[0], 0, tokenizer, processor, TEMPLATE).input_ids)
    monkeypatch.setattr(data, "load_image", lambda *_: pytest.fail("decoded"))
    check_lengths(dataset, tokenizer, processor, TEMPLATE, length)
    with pytest.raises(DataError, match=f"{length} tokens"):
        check_lengths(dataset, tokenizer, processor, TEMPLATE, length - 1)


def test_check_lengths_blames_the_template_not_the_rows(folder, tokenizer, processor):
    dataset = load(folder, [plain()], on_error="skip")
    for template in ("none", "{question}<|im_end|>"):
        with pytest.raises(DataError, match="^data.prompt_template"):
            check_lengths(dataset, tokenizer, processor, template, 1000)


def test_check_lengths_finds_special_tokens_of_the_tokenizer(folder, processor):
    tokenizer = make_tokenizer(extra_special_tokens=[*SPECIAL, "<|box_start|>"])
    dataset = load(folder, [plain(), plain("a<|box_start|>")])
    with pytest.raises(DataError, match=r"line 2: the question contains <\|box_start\|>"):
        check_lengths(dataset, tokenizer, processor, TEMPLATE, None)


# ---------------------------------------------------------------- sampler


def test_every_epoch_is_another_permutation():
    sampler = Sampler(50, seed=1)
    epochs = [sampler.take(50) for _ in range(3)]
    assert all(sorted(epoch) == list(range(50)) for epoch in epochs)
    assert epochs[0] != epochs[1] != epochs[2] != list(range(50))


def test_the_order_depends_on_seed_and_epoch_alone():
    assert Sampler(50, 1).take(100) == Sampler(50, 1).take(100)
    assert Sampler(50, 1).take(50) != Sampler(50, 2).take(50)
    # seed + epoch as the key would make epoch 1 of seed 1 the epoch 0 of seed 2
    assert Sampler(50, 1).take(100)[50:] != Sampler(50, 2).take(50)
    python_hash_seed = [
        subprocess.run(
            [sys.executable, "-c", "import random; r = list(range(9)); random.Random('3/4').shuffle(r); print(r)"],
            env={"PYTHONHASHSEED": seed}, capture_output=True, text=True, check=True,
        ).stdout
        for seed in ("1", "2")
    ]  # fmt: skip
    assert python_hash_seed[0] == python_hash_seed[1]


def test_pinned_order():
    """A silent change of the order would make an old checkpoint resume on other data."""
    assert Sampler(6, seed=0).take(8) == [0, 5, 1, 4, 3, 2, 2, 0]


@given(st.integers(1, 12), st.integers(0, 5), st.lists(st.integers(0, 30), max_size=6))
def test_chunks_and_resumption_do_not_change_the_stream(size, seed, counts):
    whole = Sampler(size, seed).take(sum(counts))
    pieces, state = [], {"consumed": 0}
    for count in counts:
        sampler = Sampler(size, seed)
        sampler.load_state_dict(json.loads(json.dumps(state)))
        pieces += sampler.take(count)
        state = sampler.state_dict()
    assert pieces == whole
    assert state == {"consumed": sum(counts)}


def test_rewinding_a_sampler():
    sampler = Sampler(5, 0)
    first = sampler.take(13)
    sampler.load_state_dict({"consumed": 2})
    assert sampler.take(11) == first[2:]


@pytest.mark.parametrize(
    "state", [{}, {"consumed": -1}, {"consumed": "3"}, {"consumed": True}, {"consumed": 1.0}]
)
def test_bad_sampler_state(state):
    with pytest.raises(DataError, match='"consumed"'):
        Sampler(5, 0).load_state_dict(state)


def test_bad_sampler_arguments():
    with pytest.raises(DataError, match="at least one"):
        Sampler(0, 0)
    with pytest.raises(DataError, match="expected 0 or more"):
        Sampler(3, 0).take(-1)


# ---------------------------------------------------------------- hostile input


def only_data_errors(folder: Path, content: bytes) -> None:
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
            assert sample.question.strip() and sample.answer.strip()
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
VALUES = st.recursive(
    SCALARS,
    lambda v: st.lists(v, max_size=3) | st.dictionaries(TEXTS | st.just("from"), v, max_size=3),
    max_leaves=6,
)
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
        image = data.decode_image(io.BytesIO(bytes(content)))
        assert image.mode == "RGB" and min(image.size) >= 1
    except DataError:
        pass


def test_importing_does_nothing():
    """Not even loading transformers, which takes seconds."""
    code = "import sys, data; assert 'transformers' not in sys.modules"
    root = Path(data.__file__).parent
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=root)
    assert (result.returncode, result.stdout, result.stderr) == (0, "", "")
