"""What the tests of rows.py and data.py share: rows and images, in files."""

import json
from pathlib import Path

import numpy as np
from PIL import Image

from data import JsonlDataset


def save_image(path: Path, size=(40, 30), color="red", **options) -> str:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", size, color).save(path, **options)
    return path.name


def noise(size=(64, 64)) -> Image.Image:
    """An image that no format compresses away."""
    pixels = np.random.default_rng(0).integers(0, 256, (*size, 3), dtype=np.uint8)
    return Image.fromarray(pixels)


def plain_row(question="How many?", answer="3", **more) -> dict:
    return {"question": question, "answer": answer, **more}


def chat_row(value="<image>How many?", answer="3", image="a.png", **more) -> dict:
    turns = [{"from": "human", "value": value}, {"from": "gpt", "value": answer}]
    return {"id": "c", "image": image, "conversations": turns, **more}


def write_rows(path: Path, rows: list) -> Path:
    """Rows as JSON lines; a str or bytes row is written as it is."""
    content = b""
    for row in rows:
        line = row if isinstance(row, str | bytes) else json.dumps(row)
        content += (line.encode() if isinstance(line, str) else line) + b"\n"
    path.write_bytes(content)
    return path


def load_rows(folder: Path, rows: list, **options) -> JsonlDataset:
    """The dataset of folder/rows.jsonl, which is written with these rows."""
    options = {"progress": False} | options
    return JsonlDataset(write_rows(folder / "rows.jsonl", rows), **options)
