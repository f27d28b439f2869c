"""Files, rows and references as people have them: made for other programs, or in another form."""

import gzip
import json
import subprocess
import sys
import warnings
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from data import DataError, JsonlDataset
from rows import parse_row

ROW = {"question": "How many?", "answer": "3"}


@pytest.fixture
def folder(tmp_path) -> Path:
    for name in ("a.png", "b.png"):
        Image.new("RGB", (40, 30), "red").save(tmp_path / name)
    return tmp_path


def write(path: Path, rows: list) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def load(folder: Path, rows: list, **options) -> JsonlDataset:
    return JsonlDataset(write(folder / "rows.jsonl", rows), progress=False, **options)


def parse(**more):
    return parse_row(json.dumps(ROW | more).encode(), line=1)


# -------------------------------------------------------------- pictures that stand elsewhere


@pytest.mark.parametrize(
    "key",
    ["image_path", "img", "imgs", "picture", "path", "Image", "IMAGE", "Images", "image_file"]
    + ["image_url", "imageURL", "photo", "photos", "pic", "img_path", "image_1", "image ", "file"]
    + [
        "imgae",
        "iamge",
        "imags",
        "input_image",
        "image_base64",
        "file_name",
        "decoded",
        "anything",
    ],
)
def test_a_picture_under_another_key_is_an_error_of_the_row(folder, key):
    with pytest.raises(DataError) as caught:
        load(folder, [ROW, ROW | {key: "a.png"}])
    message = str(caught.value)
    assert f"line 2: the key {key!r} names a picture ('a.png')" in message
    assert 'expected it under "image' in message


@pytest.mark.parametrize("key", ["image_path", "img", "Image", "imgae", "images_list", "photo1"])
@pytest.mark.parametrize(
    "value", ["000123", 7, "iVBORw0KGgo=", ["x"], {"bytes": "iVBO", "path": None}]
)
def test_a_name_alone_is_enough(key, value):
    """What stands under it may be anything: a name without an ending, a number, base64."""
    with pytest.raises(DataError, match=f"the key '{key}' names a picture"):
        parse(**{key: value})


def test_several_pictures_belong_under_images():
    with pytest.raises(DataError, match="the key 'frames' .*expected it under \"images\""):
        parse(frames=["a.png", "b.png"])
    with pytest.raises(DataError, match="the key 'Image' .*expected it under \"image\""):
        parse(Image="a.png")


@pytest.mark.parametrize(
    "value",
    [
        "a.PNG",
        "deep/folder/a.jpeg",
        "C:\\pictures\\a.bmp",
        "my picture 2.webp",
        "https://example.org/a.jpg?size=2#top",
        "data:image/png;base64,iVBO\nRw0K",
        ["a.png"],
        {"url": "a.gif"},
        [{"type": "text"}, {"type": "image_url", "image_url": {"url": "x/a.tiff"}}],
    ],
)
def test_a_value_alone_is_enough(value):
    with pytest.raises(DataError, match="the key 'source' names a picture"):
        parse(source=value)


@pytest.mark.parametrize(
    "key, value, medium",
    [
        ("video", "clip", "video"),
        ("videos", ["a.mp4"], "video"),
        ("Video_Path", "a", "video"),
        ("source", "x/film.MOV", "video"),
        ("audio", "speech", "sound"),
        ("audios", ["a.wav"], "sound"),
        ("source", "data:audio/mp3;base64,AAAA", "sound"),
    ],
)
def test_video_and_sound_are_not_supported(key, value, medium):
    with pytest.raises(DataError, match=f"the key '{key}' names a {medium} .*not supported"):
        parse(**{key: value})


@pytest.mark.parametrize("images", [{}, {"image": "a.png"}])
def test_other_keys_are_harmless(images):
    harmless = {
        "source": "geometry3k/train",
        "category": "charts",
        "url": "https://example.org/questions/7.html",
        "difficulty": 0.5,
        "image_id": 17,
        "image_width": 640,
        "num_images": 1,
        "has_image": True,
        "image_caption": "A cat.",
        "photo_id": "x17",
        "img_size": [4, 3],
        "file": "algebra/7.tex",
        "path": "math/algebra",
        "solution": "Look at the picture.\nIt is stored as plot.png",
        "caption": "The curve that the program of the last exercise draws, stored as plot.png",
        "long": "a" * 5000 + ".png",
        "teacher": "claude-3.opus",
        "ext": ".png",
        "message": "hello",
        "pages": 3,
        "topic": "images of functions",
        "metadata": {"split": "train", "format": "png"},
        "videos": [],
        "Image": "",
        "audio": False,
        "image_2": {"bytes": None, "path": None},
        "видео": "x",
    }
    row = parse(**harmless, **images)
    assert row.extra["category"] == "charts" and len(row.images) == len(images)


def test_the_own_picture_may_be_named_again():
    """Another trainer's column beside ours, or where the picture came from."""
    again = {"image_path": "/data/a.png", "image_url": "https://example.org/x/a.png?v=1"}
    assert parse(image="train/a.png", image_name="cat", **again).images == ("train/a.png",)
    with pytest.raises(DataError, match="the key 'image_2' names a picture .*under \"images\""):
        parse(image="a.png", image_2="b.png")
    with pytest.raises(DataError, match="the key 'video' names a video"):
        parse(image="a.png", video="clip")


def test_a_picture_inside_a_turn_is_found():
    human = {"from": "human", "value": "How many?", "image": "a.png"}
    row = {"conversations": [human, {"from": "gpt", "value": "3"}]}
    with pytest.raises(DataError, match="the key 'image' names a picture .*under \"image\""):
        parse_row(json.dumps(row).encode(), line=1)


def test_the_key_is_named_before_the_markers_are_counted():
    """Both are wrong, and only one of them is the cause."""
    with pytest.raises(DataError, match="the key 'image_path'"):
        parse(question="<image>How many?", image_path="a.png")


@pytest.mark.parametrize("path", ["https://example.org/a.png", "s3://x/a.png", "data:image/png;,"])
def test_nothing_is_fetched(path):
    with pytest.raises(DataError, match="as an image; expected the path of a file"):
        parse(image=path)


def test_deep_values_are_walked():
    deep = '{"question": "a", "answer": "b", "x": ' + "[" * 900 + '"a.png"' + "]" * 900 + "}"
    with pytest.raises(DataError, match="the key 'x' names a picture"):
        parse_row(deep.encode(), line=1)


# -------------------------------------------------------------- files of another form


def refused(path: Path) -> str:
    messages = []
    for on_error in ("raise", "skip"):
        with pytest.raises(DataError) as caught:
            JsonlDataset(path, on_error=on_error, progress=False)
        messages.append(str(caught.value))
    assert messages[0] == messages[1] and "\n" not in messages[0] and str(path) in messages[0]
    assert "expected one JSON object per line" in messages[0]
    return messages[0]


@pytest.mark.parametrize("name", ["rows.json", "rows.jsonl", "my rows"])
@pytest.mark.parametrize("indent", [None, 0, 2])
@pytest.mark.parametrize("mark", ["", "\ufeff"])
def test_an_array_is_named_once_with_a_command_that_works(folder, name, indent, mark):
    rows = [ROW | {"id": str(number)} for number in range(5)]
    path = folder / name
    path.write_text(mark + "\n" + json.dumps(rows, indent=indent), encoding="utf-8")
    message = refused(path)
    assert message.startswith(f"{path} is a JSON array; expected one JSON object per line")

    before = path.read_bytes()
    command = message.partition("convert it: ")[2].replace("python", sys.executable, 1)
    subprocess.run(command, shell=True, check=True)
    assert path.read_bytes() == before
    output = command.rpartition(" > ")[2].strip("'")
    assert JsonlDataset(output, progress=False).ids == ["0", "1", "2", "3", "4"]


def test_one_object_over_several_lines(folder):
    path = folder / "one.json"
    path.write_text(json.dumps(ROW, indent=2))
    message = refused(path)
    assert "is a JSON object over several lines" in message
    command = message.partition("convert it: ")[2].replace("python", sys.executable, 1)
    subprocess.run(command, shell=True, check=True)
    assert len(JsonlDataset(folder / "one.jsonl", progress=False)) == 1


def test_objects_over_several_lines(folder):
    path = folder / "rows.jsonl"
    path.write_text("\n".join(json.dumps(ROW, indent=2) for _ in range(3)))
    message = refused(path)
    assert "is JSON with objects over several lines" in message
    assert f"jq -c . {path} > {folder / 'rows.rows.jsonl'}" in message


@pytest.mark.parametrize("cut", [1, 20, 60])
def test_an_array_that_is_cut_off(folder, cut):
    path = folder / "rows.json"
    path.write_text(json.dumps([ROW] * 3, indent=2)[:-cut])
    assert "is a JSON array that is cut off or broken" in refused(path)


@pytest.mark.parametrize(
    "content, what",
    [
        (b"PAR1\x15\x04\x15", "a Parquet file"),
        # Without its time of making, which would be another one in each process that runs tests.
        (gzip.compress(json.dumps(ROW).encode(), mtime=0), "a gzip file"),
        (b"PK\x03\x04\x14", "a zip archive"),
        (b"\x28\xb5\x2f\xfd\x00", "a Zstandard file"),
        (json.dumps(ROW).encode("utf-16"), "text in UTF-16"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:1\n", "a Git LFS pointer"),
        (b"\n<!DOCTYPE html>\n<html></html>\n", "a web page"),
        (b"id,question,answer\n1,How many?,3\n", "a CSV table"),
        (b'"question";"answer"\r\n"How many?";"3"\r\n', "a CSV table"),
        (b"index\tquestion\tanswer\n0\tHow many?\t3\n", "a TSV table"),
    ],
)
def test_files_of_other_kinds_say_what_they_are(folder, content, what):
    (folder / "rows").write_bytes(content)
    assert f"rows is {what}" in refused(folder / "rows")


def test_the_name_tells_a_table_apart(folder):
    (folder / "rows.csv").write_text("frage,antwort\nWie viele?,3\n")
    assert "is a CSV table" in refused(folder / "rows.csv")
    write(folder / "really.csv", [ROW])
    assert len(JsonlDataset(folder / "really.csv", progress=False)) == 1


def test_broken_lines_stay_errors_of_their_lines(folder):
    """One bad line in a JSONL file is no other format, be it the first one."""
    for first in ('{"question": ', '{"question": "a"', "[1]", "[]", "3", "{}}"):
        path = folder / "rows.jsonl"
        path.write_text(f"{first}\n" + json.dumps(ROW) + "\n" + json.dumps(ROW) + "\n")
        with pytest.raises(DataError, match=r"1 of 3 rows cannot be used:\n  line 1: "):
            JsonlDataset(path, progress=False)


# -------------------------------------------------------------- ids


def ids_of(folder: Path, ids: list) -> list[str]:
    rows = [ROW if name is None else ROW | {"id": name} for name in ids]
    return load(folder, rows).ids


def test_rows_that_share_an_id_are_told_apart(folder):
    with pytest.warns(UserWarning, match=r"3 rows have the id .*line 3, 'cat' is now 'cat#2'\)"):
        assert ids_of(folder, ["cat", "dog", "cat", "cat", "dog"]) == [
            "cat", "dog", "cat#2", "cat#3", "dog#2"
        ]  # fmt: skip


def test_an_id_may_be_the_line_number_of_another_row(folder):
    with pytest.warns(UserWarning, match=r"1 rows have .*line 2, '2' is now '2#2'\)"):
        assert ids_of(folder, [2, None, None]) == ["2", "2#2", "3"]


def test_a_new_id_is_no_id_of_the_file(folder):
    with pytest.warns(UserWarning):
        assert ids_of(folder, ["a", "a", "a#2", "a#2", "a"]) == ["a", "a#3", "a#2", "a#2#2", "a#4"]


def test_ids_do_not_depend_on_which_rows_are_dropped(folder):
    rows = [ROW | {"id": "x", "image": name} for name in ("a.png", "late.png", "b.png")]
    with pytest.warns(UserWarning):
        assert load(folder, rows, on_error="skip").ids == ["x", "x#3"]
    (folder / "late.png").write_bytes((folder / "a.png").read_bytes())
    with pytest.warns(UserWarning):
        assert load(folder, rows, on_error="skip").ids == ["x", "x#2", "x#3"]


@given(st.lists(st.sampled_from(["a", "a#2", "a#3", "1", "2", "2#2", None]), max_size=8))
def test_ids_are_distinct_and_unique_ones_stay(tmp_path_factory, ids):
    folder = tmp_path_factory.mktemp("ids")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        result = ids_of(folder, [*ids, "last"])
    wanted = [str(line) if name is None else name for line, name in enumerate(ids, start=1)]
    assert len(set(result)) == len(result)
    for old, new in zip(wanted, result, strict=False):
        assert new == old or (new.startswith(f"{old}#") and wanted.count(old) > 1)


# -------------------------------------------------------------- references


def read_tags(answer: str) -> str:
    answer = answer.removeprefix("<answer>").removesuffix("</answer>").strip()
    if not answer.isdigit():
        raise DataError("no response can match it; expected a number")
    return answer


def test_references_are_read_and_checked_at_load_time(folder):
    rows = [ROW, ROW | {"answer": "<answer> 12 </answer>"}]
    dataset = load(folder, rows, check_answer=read_tags)
    assert [dataset[place].answer for place in range(2)] == ["3", "12"]


def test_references_that_nothing_matches_are_listed_together(folder):
    rows = [ROW, ROW | {"answer": "?"}, ROW | {"answer": "<answer></answer>"}, ROW | {"answer": ""}]
    with pytest.raises(DataError) as caught:
        load(folder, rows, check_answer=read_tags)
    message = str(caught.value)
    assert "3 of 4 rows cannot be used" in message
    assert "line 2: found '?' as the answer; no response can match it; expected a n" in message
    assert "line 3: found '<answer></answer>' as the answer; no response" in message
    with pytest.warns(UserWarning, match="3 of 4 rows"):
        assert len(load(folder, rows, on_error="skip", check_answer=read_tags)) == 1
