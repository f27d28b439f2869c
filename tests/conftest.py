"""Tiny real Qwen2.5-VL policies for the tests: random weights, the toy's tokenizer, seconds on a CPU."""

import os

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("CUDA_VISIBLE_DEVICES", "")  # float32 and gloo, on a machine with GPUs too

import pytest
import torch
from hypothesis.configuration import set_hypothesis_home_dir
from PIL import Image

import toy
from data import Sample, encode_prompt
from model import Policy

torch.set_num_threads(1)
TEMPLATE = "{question} Think."


def pytest_configure(config):
    import tempfile

    set_hypothesis_home_dir(tempfile.mkdtemp())  # tests write only into temporary folders


@pytest.fixture(scope="session")
def tokenizer():
    return toy.build_tokenizer(toy.LEVELS[1], TEMPLATE)


@pytest.fixture(scope="session")
def image_processor():
    return toy.build_image_processor()


@pytest.fixture
def make_policy(tokenizer, image_processor):
    """make_policy(seed=0, temperature=1.0, ...) -> a fresh two-layer Policy with two query heads per key head."""

    def make(seed: int = 0, **options) -> Policy:
        hf = toy.build_model(tokenizer, hidden=128, layers=2, seed=seed)
        return Policy(hf, tokenizer, image_processor, **options)

    return make


def picture(width: int, height: int, seed: int) -> Image.Image:
    pixels = torch.randint(
        0, 256, (height, width, 3), generator=torch.Generator().manual_seed(seed), dtype=torch.uint8
    )
    return Image.fromarray(pixels.numpy())


@pytest.fixture(scope="session")
def prompts(tokenizer, image_processor):
    """Prompts with one, no and two images, of different lengths, the second image of the third inside the text."""
    samples = [
        Sample("one", (picture(112, 84, 0),), "<image>Sum circle, cross.", "3"),
        Sample("none", (), "Sum circle, square, triangle.", "5"),
        Sample(
            "two",
            (picture(56, 84, 1), picture(140, 56, 2)),
            "<image>Sum cross.<image>And circle.",
            "7",
        ),
    ]
    return [
        encode_prompt(sample, index, tokenizer, image_processor, TEMPLATE)
        for index, sample in enumerate(samples)
    ]


def random_responses(prompts, group_size: int, longest: int, vocabulary: int, seed: int = 0):
    """(tokens, mask) of random responses of length 1 … longest, free of special tokens."""
    generator = torch.Generator().manual_seed(seed)
    rows = len(prompts) * group_size
    lengths = torch.randint(1, longest + 1, (rows,), generator=generator)
    lengths[0], lengths[1] = longest, 1
    tokens = torch.randint(0, vocabulary - 10, (rows, longest), generator=generator)
    return tokens, torch.arange(longest) < lengths[:, None]


@pytest.fixture
def folder(tmp_path):
    """A folder with a.png, red and 40 x 30 pixels, and b.png, blue and 60 x 80."""
    Image.new("RGB", (40, 30), (255, 0, 0)).save(tmp_path / "a.png")
    Image.new("RGB", (60, 80), (0, 0, 255)).save(tmp_path / "b.png")
    return tmp_path
