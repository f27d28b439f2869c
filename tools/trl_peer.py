"""A step of TRL's GRPOTrainer on the bench's model and prompts: the peer of the bench's row `step`.

    python -m tools.trl_peer 3M 600 4 2    # size, visual tokens, accumulation steps, steps

It trains a fresh copy of the model and prints the seconds of each step but the first,
as a JSON list.
"""

from __future__ import annotations

import itertools
import json
import sys
import tempfile
import time

import torch
from datasets import Dataset
from transformers import ProcessorMixin, TrainerCallback
from transformers.feature_extraction_utils import BatchFeature
from trl import GRPOConfig, GRPOTrainer

from config import load_config
from model import Policy
from tools.command import command
from tools.measuring import GROUP, QUESTION, THREADS, policy_of, sample_of

PROMPTS = 4
NEW = 64  # tokens of each response
KNOWN_TO_TOKENIZER = ("padding", "padding_side", "return_tensors", "add_special_tokens")


class Processor(ProcessorMixin):
    """Qwen2.5-VL's processor without the video part, which needs torchvision."""

    attributes = ["image_processor", "tokenizer"]
    valid_kwargs = ["chat_template"]
    image_processor_class = "AutoImageProcessor"
    tokenizer_class = "AutoTokenizer"

    def __init__(self, image_processor=None, tokenizer=None, chat_template=None):
        self.image_token = "<|image_pad|>"
        self.image_token_id = tokenizer.convert_tokens_to_ids(self.image_token)
        template = chat_template or tokenizer.chat_template
        super().__init__(image_processor, tokenizer, chat_template=template)

    def __call__(self, images=None, text=None, **kwargs):
        kwargs = {name: value for name, value in kwargs.items() if name in KNOWN_TO_TOKENIZER}
        tensors = kwargs.pop("return_tensors", None)
        texts = [text] if isinstance(text, str) else list(text)
        vision = {}
        if images:
            vision = self.image_processor(images=flat(images), return_tensors="pt")
            texts = self.with_image_tokens(texts, vision["image_grid_thw"])
        encoded = self.tokenizer(texts, **kwargs)
        encoded["mm_token_type_ids"] = [
            [int(i == self.image_token_id) for i in ids] for ids in encoded["input_ids"]
        ]
        return BatchFeature({**encoded, **vision}, tensor_type=tensors)

    def with_image_tokens(self, texts: list[str], grids: torch.Tensor) -> list[str]:
        """The texts, with as many image tokens for each one as its image has visual tokens."""
        counts = iter((grids.prod(1) // 4).tolist())

        def expanded(text: str) -> str:
            first, *others = text.split(self.image_token)
            return first + "".join(self.image_token * next(counts) + part for part in others)

        return [expanded(text) for text in texts]

    @property
    def model_input_names(self):
        return [
            *self.tokenizer.model_input_names,
            *self.image_processor.model_input_names,
            "mm_token_type_ids",
        ]


def flat(images: list) -> list:
    """The images of a batch whose entries are images or lists of images."""
    nested = [entry if isinstance(entry, list) else [entry] for entry in images]
    return list(itertools.chain.from_iterable(nested))


class Clock(TrainerCallback):
    """The time at the end of each step."""

    def __init__(self) -> None:
        self.ends: list[float] = []

    def on_step_end(self, *args, **kwargs):
        self.ends.append(time.perf_counter())


def rows_of(visual: int) -> Dataset:
    content = load_config().data.prompt_template.replace("{question}", QUESTION)
    rows = []
    for index in range(PROMPTS):
        rows.append(
            {
                "prompt": [{"role": "user", "content": content}],
                "image": sample_of(visual, index).images[0],
            }
        )
    return Dataset.from_list(rows)


def settings(folder: str, policy: Policy, accumulate: int, steps: int) -> GRPOConfig:
    """What the bench's own step does, in TRL's words."""
    return GRPOConfig(
        output_dir=folder,
        per_device_train_batch_size=PROMPTS * GROUP // accumulate,
        gradient_accumulation_steps=accumulate,
        num_generations=GROUP,
        max_completion_length=NEW,
        max_steps=steps + 1,
        use_cpu=True,
        bf16=False,
        beta=0.0,
        gradient_checkpointing=False,
        report_to=[],
        logging_steps=100,
        save_strategy="no",
        temperature=1.0,
        learning_rate=1e-6,
        disable_tqdm=True,
        loss_type="dapo",
        shuffle_dataset=False,
        generation_kwargs={
            "suppress_tokens": policy.suppressed.tolist(),
            "top_k": 0,
            "min_new_tokens": NEW,
        },
    )


def step_seconds(size: str, visual: int, accumulate: int, steps: int) -> list[float]:
    policy = policy_of(size)
    policy.hf.config.text_config._attn_implementation = "sdpa"
    # Nobody stops early, and the rewards of a group differ.
    policy.hf.generation_config.eos_token_id = None
    turn = itertools.count()

    def reward(completions, **_) -> list[float]:
        return [float(next(turn) % 3) for _ in completions]

    clock = Clock()
    with tempfile.TemporaryDirectory() as folder:
        trainer = GRPOTrainer(
            model=policy.hf,
            args=settings(folder, policy, accumulate, steps),
            train_dataset=rows_of(visual),
            processing_class=Processor(policy.image_processor, policy.tokenizer),
            reward_funcs=reward,
            callbacks=[clock],
        )
        trainer.train()
    return [end - begin for begin, end in itertools.pairwise(clock.ends)]


@command()
def main(arguments: list[str]) -> None:
    size, *numbers = arguments
    visual, accumulate, steps = map(int, numbers)
    torch.set_num_threads(THREADS)
    torch.manual_seed(0)
    print(json.dumps(step_seconds(size, visual, accumulate, steps)))


if __name__ == "__main__":
    main(sys.argv[1:])
