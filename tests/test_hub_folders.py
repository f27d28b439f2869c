"""Folders as the hub has them: what is read from them is what the stock classes read.

They have old names of tensors and settings, several weight files, a padded vocabulary, bfloat16.
"""

import json
from pathlib import Path

import helpers
import pytest
import torch
from PIL import Image, ImageOps
from safetensors.torch import load_file, save_file

import rollout
import toy
from data import Sample
from model import load_policy, save_policy
from rows import load_image

CPU = torch.device("cpu")
FAMILIES = ["qwen2_5_vl", "qwen3_vl"]
TEMPLATE = "{question} Think."

GENERATION = {"do_sample": True, "repetition_penalty": 1.05, "temperature": 1e-6}


@pytest.fixture(params=FAMILIES)
def family(request):
    return request.param


@pytest.fixture
def hub_folder(family, tokenizer, tmp_path) -> Path:
    """A folder with random weights in the layout of Qwen/Qwen2.5-VL-… or Qwen/Qwen3-VL-…"""
    folder = tmp_path / "hub"
    padded = int(1.5 * len(tokenizer))
    hf = helpers.tiny_model(family, tokenizer, vocabulary=padded)
    write_weights(folder, dict(hf.named_parameters()), old_names=family == "qwen2_5_vl")
    config = hf.config.to_dict()
    config = flat(config) if family == "qwen2_5_vl" else nested(config)
    ends = [tokenizer.convert_tokens_to_ids(name) for name in ("<|im_end|>", "<|endoftext|>")]
    write(folder / "config.json", config)
    write(folder / "generation_config.json", GENERATION | {"eos_token_id": ends})
    write(folder / "preprocessor_config.json", helpers.RELEASED_PROCESSORS[family])
    write(folder / "video_preprocessor_config.json", {"size": {"shortest_edge": 4096}})
    write_tokenizer(folder, tokenizer)
    return folder


def write(file: Path, content: dict) -> None:
    file.write_text(json.dumps(content))


def read(file: Path) -> dict:
    return json.loads(file.read_text())


def write_weights(folder: Path, weights: dict, old_names: bool) -> None:
    """Three files in bfloat16, and their index."""
    folder.mkdir()
    places = {}
    for shard in range(3):
        file = f"model-{shard + 1:05d}-of-00003.safetensors"
        part = {}
        for name in list(weights)[shard::3]:
            stored = name
            if old_names:
                stored = name.replace("model.language_model.", "model.")
                stored = stored.replace("model.visual.", "visual.")
            part[stored] = weights[name].detach().bfloat16()
            places[stored] = file
        save_file(part, folder / file, metadata={"format": "pt"})
    write(folder / "model.safetensors.index.json", {"metadata": {}, "weight_map": places})


def old_rotary(text: dict, rope_type: dict) -> dict:
    """The settings of a text model, with those of its rotary embedding under their old names."""
    rotary = text.pop("rope_parameters")
    del rotary["rope_type"]
    theta = rotary.pop("rope_theta")
    return text | {"rope_theta": theta, "rope_scaling": rotary | rope_type}


def flat(config: dict) -> dict:
    """Qwen2.5-VL's: the settings of the text model are not in a part of their own."""
    text = old_rotary(config.pop("text_config"), {"type": "mrope"})
    for name in ("model_type", "dtype", "layer_types"):
        text.pop(name)
    vision = config["vision_config"] | {"in_chans": 3, "model_type": "qwen2_5_vl"}
    for name in ("rope_parameters", "dtype"):
        vision.pop(name, None)
    del config["dtype"]
    return text | config | {"vision_config": vision, "torch_dtype": "bfloat16"}


def nested(config: dict) -> dict:
    """Qwen3-VL's."""
    text = old_rotary(config["text_config"], {"rope_type": "default"})
    text["dtype"] = "bfloat16"
    del config["dtype"]
    return config | {"text_config": text}


def write_tokenizer(folder: Path, tokenizer) -> None:
    tokenizer.save_pretrained(folder)
    (folder / "chat_template.jinja").unlink()
    write(folder / "chat_template.json", {"chat_template": tokenizer.chat_template})
    config = read(folder / "tokenizer_config.json")
    config["additional_special_tokens"] = config.pop("extra_special_tokens")
    write(folder / "tokenizer_config.json", config)


# --------------------------------------------------------------------------------------- pictures


def noise(width: int, height: int, mode: str = "RGB") -> Image.Image:
    generator = torch.Generator().manual_seed(width)
    pixels = torch.randint(0, 256, (height, width, 3), generator=generator, dtype=torch.uint8)
    return Image.fromarray(pixels.numpy()).convert(mode)


def save_pictures(folder: Path) -> dict[str, Image.Image]:
    """Pictures in files, name -> what a stock processor should be given for it."""
    half_clear = noise(90, 60, "RGBA")
    half_clear.putalpha(100)
    on_white = Image.new("RGBA", half_clear.size, "white")
    on_white.alpha_composite(half_clear)
    deep = Image.new("I;16", (50, 40), 257 * 200)
    rotated = Image.Exif()
    rotated[0x0112] = 6  # a quarter turn
    noise(70, 40).save(folder / "exif.png", exif=rotated)
    half_clear.save(folder / "rgba.png")
    deep.save(folder / "deep.png")
    expected = {
        "exif.png": ImageOps.exif_transpose(Image.open(folder / "exif.png")),
        # The stock classes would show the colours under the transparency, and clip 16 bits to 8.
        "rgba.png": on_white,
        "deep.png": Image.new("RGB", (50, 40), (200, 200, 200)),
    }
    plain = {
        "rgb.png": noise(112, 84),
        "grey.png": noise(61, 47, "L"),
        "cmyk.jpg": noise(80, 50, "CMYK"),
        "palette.gif": noise(64, 64, "P"),
        "one.png": noise(1, 1),
        "small.png": noise(17, 20),
        "wide.png": noise(4000, 20),
        "tall.png": noise(20, 1500),
        "photo.jpg": noise(640, 480),
    }
    for name, image in plain.items():
        image.save(folder / name)
        expected[name] = Image.open(folder / name)
    return expected


def test_pixels_and_ids_are_the_stock_processors(hub_folder, tmp_path):
    from transformers import AutoImageProcessor, AutoTokenizer

    policy = load_policy(hub_folder, CPU)
    stock = AutoImageProcessor.from_pretrained(hub_folder, backend="pil")
    tokenizer = AutoTokenizer.from_pretrained(hub_folder)
    template = read(hub_folder / "chat_template.json")["chat_template"]
    content = [{"type": "image"}, {"type": "text", "text": "Sum circle. Think."}]
    text = tokenizer.apply_chat_template(
        [{"role": "user", "content": content}],
        chat_template=template,
        tokenize=False,
        add_generation_prompt=True,
    )
    for name, image in save_pictures(tmp_path).items():
        encoded = stock(images=[image], return_tensors="pt")
        copies = int(encoded["image_grid_thw"].prod()) // 4
        ids = tokenizer(text.replace("<|image_pad|>", copies * "<|image_pad|>")).input_ids
        sample = Sample(name, (load_image(name, tmp_path),), "<image>Sum circle.", answer="")
        prompt = policy.encode(sample, 0, TEMPLATE)
        assert prompt.image_grid_thw.tolist() == encoded["image_grid_thw"].tolist(), name
        assert torch.equal(prompt.pixel_values, encoded["pixel_values"]), name
        assert prompt.input_ids.tolist() == ids, name


@torch.no_grad()
def test_sampled_logprobs_are_the_stock_models(hub_folder):
    from transformers import AutoModelForImageTextToText

    policy = load_policy(hub_folder, CPU)
    stock = AutoModelForImageTextToText.from_pretrained(hub_folder, dtype=torch.float32)
    assert len(policy.eos_ids) == 2
    sample = Sample("a", (noise(112, 84),), "<image>Sum circle.", answer="")
    prompt = policy.encode(sample, 0, TEMPLATE)
    batch = rollout.generate(policy, [prompt], 2, max_new_tokens=8, key=(0, "hub"))
    for row in range(2):
        response = batch.tokens[row][batch.mask[row]]
        ids = torch.cat([prompt.input_ids, response])[None]
        logits = stock(
            input_ids=ids,
            mm_token_type_ids=(ids == policy.hf.config.image_token_id).int(),
            pixel_values=prompt.pixel_values,
            image_grid_thw=prompt.image_grid_thw,
        ).logits[0, len(prompt.input_ids) - 1 : -1]
        logits[:, policy.suppressed] = -torch.inf
        expected = logits.log_softmax(-1).gather(-1, response[:, None])[:, 0]
        torch.testing.assert_close(
            batch.logprobs[row][batch.mask[row]], expected, rtol=1e-5, atol=1e-5
        )


# ---------------------------------------------------------------------------------- what is left


def test_the_folder_that_is_left_is_the_released_one_with_other_weights(hub_folder, tmp_path):
    """Training is in float32 and on smaller images; who serves the model gets neither."""
    policy = load_policy(hub_folder, CPU, max_pixels=100_352)
    assert policy.image_processor.size["longest_edge"] == 100_352
    save_policy(policy, tmp_path / "final")
    again = load_policy(tmp_path / "final", CPU)
    assert again.released_dtype == torch.bfloat16
    assert again.image_processor.to_dict() == policy.released_processor.to_dict()
    assert again.image_processor.size["longest_edge"] > 10_000_000
    for name, weight in policy.hf.named_parameters():
        assert torch.equal(weight, again.hf.get_parameter(name)), name
    video = "video_preprocessor_config.json"
    assert read(tmp_path / "final" / video) == read(hub_folder / video)


def test_float32_is_kept_where_it_is_asked_for(hub_folder, tmp_path):
    save_policy(load_policy(hub_folder, CPU), tmp_path / "final", dtype="float32")
    written = load_file(tmp_path / "final" / "model.safetensors").values()
    assert {weight.dtype for weight in written} == {torch.float32}
    config = read(tmp_path / "final" / "config.json")
    assert (config["dtype"], config["text_config"]["dtype"]) == ("float32", "float32")


def test_transformers_4_finds_what_it_reads(hub_folder, tokenizer, family, tmp_path):
    """Such a folder was loaded by 4.57.6 in November 2026, with equal pixels and logits."""
    final = tmp_path / "final"
    save_policy(load_policy(hub_folder, CPU), final)
    config = read(final / "config.json")
    text = config["text_config"]
    released = read(hub_folder / "config.json")
    released_text = released.get("text_config", released)
    assert text["rope_theta"] == released_text["rope_theta"]
    sections = text["rope_scaling"]["mrope_section"]
    assert sections == released_text["rope_scaling"]["mrope_section"]
    assert text["rope_scaling"]["rope_type"] == "default"
    assert text["rope_scaling"].get("mrope_interleaved", False) is (family == "qwen3_vl")
    assert text["tie_word_embeddings"] is True
    assert config["torch_dtype"] == "bfloat16"

    settings = read(final / "tokenizer_config.json")
    assert settings["extra_special_tokens"] == {}
    assert settings["additional_special_tokens"] == toy.SPECIAL_TOKENS
    assert settings["tokenizer_class"] == "Qwen2Tokenizer"
    processor = read(final / "preprocessor_config.json")
    assert processor["image_processor_type"] == "Qwen2VLImageProcessor"
    assert processor["min_pixels"] == processor["size"]["shortest_edge"]
    assert processor["max_pixels"] == processor["size"]["longest_edge"]
    # Transformers 5 reads the same from both spellings.
    again = load_policy(final, CPU)
    assert again.hf.config.text_config.rope_parameters["mrope_section"] == sections
    assert again.tokenizer.all_special_tokens == tokenizer.all_special_tokens


def test_others_may_read_the_weights(hub_folder, tmp_path):
    save_policy(load_policy(hub_folder, CPU), tmp_path / "final")
    modes = {file.stat().st_mode for file in (tmp_path / "final").iterdir()}
    assert len(modes) == 1
