"""What several test files share: tiny models, how a test runs train.py, and what the run left."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch.utils._python_dispatch import TorchDispatchMode

import toy
from model import FAMILIES

ROOT = Path(__file__).resolve().parents[1]

# A reward that a random policy can differ in: it has nothing to do with the task.
REWARD = '''
def vowels(response, answer, sample):
    """One twentieth for each vowel."""
    return sum(letter in "aeiou" for letter in response) / 20 + 0 * len(sample.images)
'''

SMALL_RUN = [
    "rollout.prompts_per_step=4",
    "rollout.group_size=3",
    "rollout.max_new_tokens=12",
    "train.steps=2",
    "eval.samples=5",
    "eval.every=2",
    "checkpoint.every=2",
    "optim.lr=1e-3",
]


# The settings of the decoder that tiny models of all families share with the toy's, a Qwen2.5-VL,
# and those that they have of their own.
SHARED = (
    "vocab_size",
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "rope_parameters",
    "bos_token_id",
    "eos_token_id",
    "pad_token_id",
    "initializer_range",
)
TEXT = {
    "qwen2_vl": {},
    # Heads that are wider than their share of the model, and three axes that take turns.
    "qwen3_vl": {
        "head_dim": 48,
        "num_hidden_layers": 3,
        "rope_parameters": {
            "rope_type": "default",
            "rope_theta": 1e4,
            "mrope_section": [8, 8, 8],
            "mrope_interleaved": True,
        },
    },
}
# preprocessor_config.json of released models, by model_type.
RELEASED_PROCESSORS = {
    "qwen2_5_vl": {
        "min_pixels": 3136,
        "max_pixels": 12845056,
        "patch_size": 14,
        "temporal_patch_size": 2,
        "merge_size": 2,
        "image_mean": [0.48145466, 0.4578275, 0.40821073],
        "image_std": [0.26862954, 0.26130258, 0.27577711],
        "image_processor_type": "Qwen2VLImageProcessor",
        "processor_class": "Qwen2_5_VLProcessor",
    },
    "qwen3_vl": {
        "size": {"longest_edge": 16777216, "shortest_edge": 65536},
        "patch_size": 16,
        "temporal_patch_size": 2,
        "merge_size": 2,
        "image_mean": [0.5, 0.5, 0.5],
        "image_std": [0.5, 0.5, 0.5],
        "image_processor_type": "Qwen2VLImageProcessorFast",
        "processor_class": "Qwen3VLProcessor",
    },
}

VISION = {
    "qwen2_vl": {"depth": 2, "embed_dim": 96, "mlp_ratio": 2, "num_heads": 3, "hidden_size": 128},
    "qwen3_vl": {
        "depth": 3,
        "hidden_size": 96,
        "intermediate_size": 256,
        "num_heads": 3,
        "out_hidden_size": 128,
        "num_position_embeddings": 16,
        "deepstack_visual_indexes": [0, 1],
    },
}


def image_processor_of(family: str):
    """The toy's image processor, with the patches of a family of model.FAMILIES."""
    processor = toy.build_image_processor()
    if family == "qwen3_vl":
        processor.patch_size = 16
    return processor


def tiny_model(family: str, tokenizer, seed: int = 0, vocabulary: int | None = None):
    """A model of model.FAMILIES with random weights, two query heads per key head.

    It has two decoder layers. A Qwen3-VL has three, and image features for the first two of them.
    """
    import transformers

    of_toy = toy.build_model(tokenizer, hidden=128, layers=2, vocabulary=vocabulary, seed=seed)
    if family == "qwen2_5_vl":
        return of_toy
    loader = getattr(transformers, FAMILIES[family].loader)
    config = _like_the_toy(of_toy.config.to_dict(), loader.config_class, family)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        hf = loader._from_config(config, attn_implementation="sdpa", dtype=torch.float32)
        _shake_norms(hf)
    hf.generation_config = of_toy.generation_config
    return hf


def _like_the_toy(settings: dict, config_class, family: str):
    """The configuration of a family, with the settings of the toy's model where it shares them."""
    text = {key: settings["text_config"][key] for key in SHARED}
    tokens = {key: value for key, value in settings.items() if key.endswith("_token_id")}
    return config_class(
        text_config=text | TEXT[family],
        vision_config=VISION[family] | {"initializer_range": text["initializer_range"]},
        tie_word_embeddings=True,
        **tokens,
    )


def _shake_norms(hf) -> None:
    """Give the norms of queries and keys other weights than ones."""
    for name, weight in hf.named_parameters():
        if name.endswith(("q_norm.weight", "k_norm.weight")):
            weight.data.add_(torch.randn_like(weight), alpha=0.3)


def small_run(tmp_path: Path, folder: str, *overrides: str) -> list[str]:
    """The arguments of train.py for a run of seconds, tmp_path / folder.

    The fixture `start` puts the model and the reward that they name into tmp_path. Overrides win
    over SMALL_RUN.
    """
    return [
        str(ROOT / "config.yaml"),
        f"run.dir={tmp_path / folder}",
        f"model.path={tmp_path / 'model'}",
        f"reward.custom={tmp_path / 'reward.py'}:vowels",
        *SMALL_RUN,
        *overrides,
    ]


def launch(
    *command: str, processes: int = 2, timeout: float = 300
) -> subprocess.CompletedProcess[str]:
    """Run a script and its arguments under torchrun, in the project's folder."""
    launcher = ["torch.distributed.run", "--standalone", f"--nproc-per-node={processes}"]
    return subprocess.run(
        [sys.executable, "-m", *launcher, *command],
        cwd=ROOT,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=timeout,
    )


def torchrun(tmp_path: Path, folder: str, *overrides: str) -> None:
    """A small run on two gloo processes: what the fixture `start` does on one."""
    done = launch("train.py", *small_run(tmp_path, folder, *overrides))
    assert done.returncode == 0, done.stderr
    assert "warning: no report" not in done.stdout
    assert (tmp_path / folder / "report.html").exists()


def rows_of(folder: Path, timeless: bool = True) -> list[dict]:
    """The rows of a run's metrics.jsonl.

    Timeless rows are without times and memory, which do not repeat.
    """
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    if not timeless:
        return rows
    varying = ("time/", "memory/")
    return [
        {key: value for key, value in row.items() if not key.startswith(varying)} for row in rows
    ]


def weights_of(folder: Path) -> dict:
    """The weights that a run ended with, by name."""
    return load_file(folder / "final" / "model.safetensors")


def same_run(tmp_path: Path, one: Path, two: Path) -> None:
    """Assert that two runs from tmp_path / "model" drew the same samples and learned the same.

    Losses and gradient norms agree to 1e-3: sums in another order differ by rounding, and so do
    the steps that follow from them.
    """
    for a, b in zip(rows_of(one), rows_of(two), strict=True):
        assert a == pytest.approx(b, rel=1e-3, abs=1e-6)
        assert a.get("reward/mean") == b.get("reward/mean")
    before = load_file(tmp_path / "model" / "model.safetensors")
    a = weights_of(one)
    b = weights_of(two)
    moved = max(float((a[name] - before[name]).abs().max()) for name in a)
    # AdamW divides by the gradient's own size, so where a gradient is rounding, its step is too:
    # compare in the mean.
    difference = sum(float((a[name] - b[name]).abs().sum()) for name in a)
    apart = difference / sum(weights.numel() for weights in a.values())
    print(f"weights moved by up to {moved:.1e} and are {apart:.1e} apart in the mean")
    assert moved > 1e-3
    assert apart < 1e-4 * moved


class Products(TorchDispatchMode):
    """The matrix products inside: their names, and the shapes of their results."""

    def __init__(self):
        super().__init__()
        self.names: list[str] = []
        self.shapes: list[tuple[int, ...]] = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        product = function(*args, **(kwargs or {}))
        name = function._schema.name.split("::")[1]
        if "mm" in name or name == "_linear_pointwise":
            self.names.append(name)
            self.shapes.append(tuple(product.shape))
        return product
