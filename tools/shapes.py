"""Models of the released shape and of a tiny one, with random weights made on the device."""

from __future__ import annotations

from dataclasses import dataclass

import torch

import toy
from config import load_config
from model import Policy, choose_kernels
from tools import estimate


@dataclass(frozen=True)
class Shape:
    """A model, and what is done with it."""

    text: dict
    vision: dict
    prompts: int  # of a rollout and of a step
    visual: int  # image tokens of a prompt
    group: int  # responses of a prompt
    new: int  # tokens of each response
    copied: int  # bytes of the tensor whose copy gives the bandwidth
    multiplied: int  # rows of the square matrices whose product gives the operations


SHAPES = {
    "3b": Shape(
        text=estimate.SETUPS["Qwen2.5-VL-3B on one GPU of 80 GB"]["text"],
        vision=estimate.VISION,
        prompts=estimate.PROMPTS,
        visual=estimate.VISUAL,
        group=estimate.GROUP,
        new=256,  # an eighth of what config_3b.yaml has, so that the bench takes minutes
        copied=2**31,
        multiplied=8192,
    ),
    "tiny": Shape(
        text={
            "hidden_size": 64,
            "intermediate_size": 96,
            "num_hidden_layers": 2,
            "num_attention_heads": 2,
            "num_key_value_heads": 1,
            "vocab_size": 2000,
        },
        vision={
            "depth": 2,
            "hidden_size": 64,
            "intermediate_size": 96,
            "num_heads": 2,
            "fullatt_block_indexes": [1],
        },
        prompts=2,
        visual=10,
        group=2,
        new=4,
        copied=2**20,
        multiplied=64,
    ),
}


def build_tokenizer():
    """The toy's. It knows a small part of a real vocabulary."""
    return toy.build_tokenizer(toy.LEVELS[1], load_config().data.prompt_template)


def build_model(shape: Shape, tokenizer, device: torch.device, dtype: torch.dtype):
    """A Qwen2_5_VLForConditionalGeneration of this shape."""
    from transformers import Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration

    token_id = tokenizer.convert_tokens_to_ids
    end = token_id("<|im_end|>")
    nothing = token_id("<|endoftext|>")
    width = shape.text["hidden_size"] // shape.text["num_attention_heads"]
    # The sections (time, height, width) share half of a head, as in the released models.
    sections = [width // 8, 3 * width // 16, 3 * width // 16]
    rope = {"rope_type": "default", "rope_theta": 1e6, "mrope_section": sections}
    ids = {"bos_token_id": nothing, "eos_token_id": end, "pad_token_id": nothing}
    config = Qwen2_5_VLConfig(
        text_config=shape.text | ids | {"rope_parameters": rope},
        vision_config=shape.vision | {"out_hidden_size": shape.text["hidden_size"]},
        image_token_id=token_id("<|image_pad|>"),
        video_token_id=token_id("<|video_pad|>"),
        vision_start_token_id=token_id("<|vision_start|>"),
        vision_end_token_id=token_id("<|vision_end|>"),
        tie_word_embeddings=True,
    )
    with device:
        hf = Qwen2_5_VLForConditionalGeneration._from_config(
            config, attn_implementation="sdpa", dtype=dtype
        )
    hf.generation_config.eos_token_id = end
    hf.generation_config.pad_token_id = nothing
    return hf.eval()


def build_policy(shape: Shape, device: torch.device) -> Policy:
    """bfloat16 arithmetic over float32 weights, as config_3b.yaml has it trained."""
    choose_kernels(device)
    tokenizer = build_tokenizer()
    hf = build_model(shape, tokenizer, device, dtype=torch.float32)
    hf.model.visual.requires_grad_(False)
    hf.gradient_checkpointing_enable({"use_reentrant": False})
    policy = Policy(
        hf,
        tokenizer,
        toy.build_image_processor(),
        dtype=torch.bfloat16,
        compiled=device.type == "cuda",
    )
    policy.eos_ids = set()  # nobody stops early
    return policy.to(device).train()
