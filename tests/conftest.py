"""What the tests work on: tiny real policies with random weights, prompts, and runs.

They are Qwen2.5-VL's, as the toy, but where a test names another family of models. The tokenizer is
the toy's. All of it takes seconds on a CPU.
"""

import os

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("CUDA_VISIBLE_DEVICES", "")  # float32 and gloo, on a machine with GPUs too

import tempfile
from pathlib import Path

import pytest
import torch
from hypothesis.configuration import set_hypothesis_home_dir
from PIL import Image

import toy
import train
from data import Sample, encode_prompt
from model import Policy, save_policy

pytest.register_assert_rewrite("helpers")  # before it is imported, or its asserts say little
import helpers  # noqa: E402

torch.set_num_threads(1)
TEMPLATE = "{question} Think."


def pytest_configure(config):
    set_hypothesis_home_dir(tempfile.mkdtemp())  # tests write only into temporary folders


@pytest.fixture(scope="session")
def tokenizer():
    return toy.build_tokenizer(toy.LEVELS[1], TEMPLATE)


@pytest.fixture(scope="session")
def image_processor():
    return toy.build_image_processor()


@pytest.fixture
def family():
    """A model_type of model.FAMILIES. A test that is parametrised by it has other models."""
    return "qwen2_5_vl"


@pytest.fixture
def make_policy(family, tokenizer):
    """make_policy(seed=0, **options of Policy) -> a fresh Policy.

    It has two decoder layers, with two query heads per key head; a Qwen3-VL has three.
    """

    def make(seed: int = 0, **options) -> Policy:
        hf = helpers.tiny_model(family, tokenizer, seed)
        return Policy(hf, tokenizer, helpers.image_processor_of(family), **options)

    return make


@pytest.fixture
def start(make_policy, tmp_path):
    """start(*overrides, folder="run") runs train.main on a random policy -> the run's folder."""
    save_policy(make_policy(seed=1), tmp_path / "model")
    (tmp_path / "reward.py").write_text(helpers.REWARD)

    def run(*overrides: str, folder: str = "run") -> Path:
        train.main(helpers.small_run(tmp_path, folder, *overrides))
        return tmp_path / folder

    return run


def picture(width: int, height: int, seed: int) -> Image.Image:
    """Noise."""
    generator = torch.Generator().manual_seed(seed)
    pixels = torch.randint(0, 256, size=(height, width, 3), generator=generator, dtype=torch.uint8)
    return Image.fromarray(pixels.numpy())


@pytest.fixture
def prompts(family, tokenizer):
    """Prompts of different lengths: with one image, with none, with two, one amid the text."""
    one = (picture(112, 84, seed=0),)
    two = (picture(56, 84, seed=1), picture(140, 56, seed=2))
    samples = [
        Sample("one", one, "<image>Sum circle, cross.", answer="3"),
        Sample("none", (), "Sum circle, square, triangle.", answer="5"),
        Sample("two", two, "<image>Sum cross.<image>And circle.", answer="7"),
    ]
    processor = helpers.image_processor_of(family)
    return [
        encode_prompt(sample, index, tokenizer, image_processor=processor, template=TEMPLATE)
        for index, sample in enumerate(samples)
    ]


def random_responses(prompts, group_size: int, longest: int, vocabulary: int, seed: int = 0):
    """(tokens, mask) of random responses of length 1 … longest, free of special tokens."""
    generator = torch.Generator().manual_seed(seed)
    rows = len(prompts) * group_size
    lengths = torch.randint(1, longest + 1, (rows,), generator=generator)
    lengths[0] = longest
    lengths[1] = 1
    tokens = torch.randint(0, vocabulary - 10, (rows, longest), generator=generator)
    return tokens, torch.arange(longest) < lengths[:, None]


@pytest.fixture
def folder(tmp_path):
    """A folder with a.png, red and 40 x 30 pixels, and b.png, blue and 60 x 80."""
    Image.new("RGB", (40, 30), (255, 0, 0)).save(tmp_path / "a.png")
    Image.new("RGB", (60, 80), (0, 0, 255)).save(tmp_path / "b.png")
    return tmp_path
