"""Model folders as other trainers, copies and disks leave them: refused in one line, or read."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

import evaluate
import train
from config import DEFAULTS
from model import ModelError, check_model, load_policy, save_policy

CPU = torch.device("cpu")


@pytest.fixture
def folder(make_policy, tmp_path) -> Path:
    """A whole model folder."""
    save_policy(make_policy(seed=1), tmp_path / "model")
    return tmp_path / "model"


def rewrite(folder: Path, change) -> None:
    """Save the weights of a folder again, as change(name -> tensor) has them."""
    file = folder / "model.safetensors"
    weights = change(load_file(file))
    save_file(weights, file, metadata={"format": "pt"})


def with_prefix(weights: dict) -> dict:
    return {f"module.{name}": weight for name, weight in weights.items()}


def without_a_layer(weights: dict) -> dict:
    return {name: weight for name, weight in weights.items() if "layers.1.mlp" not in name}


def with_one_more(weights: dict) -> dict:
    return weights | {"value_head.weight": torch.zeros(2)}


def with_another_shape(weights: dict) -> dict:
    name = next(name for name in weights if name.endswith("layers.0.mlp.up_proj.weight"))
    return weights | {name: weights[name][:-1].contiguous()}


def with_nan(weights: dict) -> dict:
    name = next(name for name in weights if name.endswith("layers.0.mlp.up_proj.weight"))
    damaged = weights[name].clone()
    damaged[3, 5] = float("nan")
    return weights | {name: damaged}


@pytest.mark.parametrize(
    "change, message",
    [
        (with_prefix, r"\d+ keys missing \(.*; \d+ keys unexpected \(module\."),
        (without_a_layer, r"3 keys missing \(.*layers\.1\.mlp\.down_proj\.weight, "),
        (with_one_more, r"1 keys unexpected \(value_head\.weight\)"),
        (with_another_shape, r"1 keys of another shape \(.*layers\.0\.mlp\.up_proj\.weight\)"),
        (with_nan, r"1 keys not finite \(.*layers\.0\.mlp\.up_proj\.weight\)"),
    ],
)
def test_weights_that_cannot_be_right_are_refused(folder, change, message):
    rewrite(folder, change)
    with pytest.raises(ModelError, match=message):
        load_policy(folder, CPU)


def test_a_tied_head_may_be_absent(folder):
    """The embedding serves as the head, so the file need not hold it."""
    assert not any("lm_head" in name for name in load_file(folder / "model.safetensors"))
    load_policy(folder, CPU)


@pytest.mark.parametrize(
    "name, what",
    [
        ("config.json", "has no config.json"),
        ("tokenizer.json", "has no tokenizer.json"),
        ("preprocessor_config.json", "has no preprocessor_config.json"),
        ("chat_template.jinja", "has no chat_template.jinja"),
        ("model.safetensors", "holds no weights"),
    ],
)
def test_a_missing_file_is_named(folder, name, what):
    (folder / name).unlink()
    with pytest.raises(ModelError, match=what):
        load_policy(folder, CPU)


@pytest.mark.parametrize("name", ["config.json", "tokenizer.json", "preprocessor_config.json"])
def test_a_broken_file_is_named(folder, name):
    (folder / name).write_text('{"broken')
    with pytest.raises(ModelError, match=name.removesuffix(".json").replace("_", ".")):
        load_policy(folder, CPU)


def test_a_cut_weight_file_is_named(folder):
    file = folder / "model.safetensors"
    content = file.read_bytes()
    file.write_bytes(content[:-20000])
    with pytest.raises(ModelError, match="model.safetensors is damaged or cut short"):
        load_policy(folder, CPU)
    file.write_bytes(b"")
    with pytest.raises(ModelError, match="model.safetensors is damaged or cut short"):
        load_policy(folder, CPU)


@pytest.mark.parametrize(
    "named, message",
    [("absent.safetensors", "which is missing"), ("../x.safetensors", "a file of the same folder")],
)
def test_an_index_stays_inside_its_folder(folder, named, message):
    weights = list(load_file(folder / "model.safetensors"))
    shutil.copy(folder / "model.safetensors", folder.parent / "x.safetensors")
    index = {"weight_map": dict.fromkeys(weights, named)}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(ModelError, match=message):
        check_model(folder)


def test_an_older_folder_keeps_its_chat_template_in_json(folder):
    template = (folder / "chat_template.jinja").read_text()
    (folder / "chat_template.jinja").unlink()
    (folder / "chat_template.json").write_text(json.dumps({"chat_template": template}))
    assert load_policy(folder, CPU).tokenizer.chat_template == template


def test_a_tokenizer_of_another_model_is_refused(folder):
    config = json.loads((folder / "tokenizer.json").read_text())
    size = max(config["model"]["vocab"].values()) + 500
    config["model"]["vocab"] |= {f"new{i}": size + i for i in range(500)}
    (folder / "tokenizer.json").write_text(json.dumps(config))
    with pytest.raises(ModelError, match="the tokenizer of .* has .* tokens"):
        load_policy(folder, CPU)


@pytest.mark.parametrize("name", ["run", "checkpoint", "nowhere/at/all", "text"])
def test_what_is_no_model_folder_is_said(folder, tmp_path, name):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "metrics.jsonl").write_text("")
    (tmp_path / "checkpoint").mkdir()
    (tmp_path / "checkpoint" / "tensors.pt").write_text("")
    expected = {
        "run": "is the folder of a run; its model is in",
        "checkpoint": "python -m tools.export",
        "nowhere/at/all": "is no folder",
        "text": "is no folder",
    }
    with pytest.raises(ModelError, match=expected[name]):
        check_model(tmp_path / name)


def test_the_tokenizers_end_token_ends_a_response(folder):
    """A generation_config.json that names only the end of the text is mended, with a warning."""
    file = folder / "generation_config.json"
    settings = json.loads(file.read_text())
    settings["eos_token_id"] = settings["pad_token_id"]
    file.write_text(json.dumps(settings))
    with pytest.warns(UserWarning, match="does not name the tokenizer's end token"):
        policy = load_policy(folder, CPU)
    assert policy.eos_ids == {settings["pad_token_id"], policy.tokenizer.eos_token_id}


def test_train_and_evaluate_say_it_in_one_line(folder, tmp_path, capsys):
    rewrite(folder, with_prefix)
    with pytest.raises(SystemExit) as caught:
        train.main([str(DEFAULTS), f"model.path={folder}", f"run.dir={tmp_path / 'run'}"])
    errors = capsys.readouterr().err.splitlines()
    assert caught.value.code == 2
    assert errors[-1].startswith("error: model.path: the weights of")
    assert not any("Traceback" in line for line in errors)
    with pytest.raises(SystemExit, match="error: model.path: the weights of"):
        evaluate.main(["ask", "--model", str(folder), "Sum circle."])
