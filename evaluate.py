"""evaluate.py: what a policy can do: accuracy on held-out samples, and single questions.

    python evaluate.py ask --model runs/toy/final --image picture.png "Sum circle, cross, square."
"""
import argparse
import sys
from dataclasses import replace
from pathlib import Path

import torch

import rewards
from data import DataError, Sample, encode_prompt, load_image
from distributed import ALONE, World
from model import Policy, load_policy
from rollout import generate

ROWS = 256  # whose pixels are in memory at once


def swap_images(samples: list[Sample]) -> list[Sample]:
    """Each sample with the images of the next one that has as many of them; questions and answers stay."""
    swapped = list(samples)
    by_count: dict[int, list[int]] = {}
    for place, sample in enumerate(samples):
        by_count.setdefault(len(sample.images), []).append(place)
    for places in by_count.values():
        for place, donor in zip(places, places[1:] + places[:1]):
            swapped[place] = replace(samples[place], images=samples[donor].images)
    return swapped


def held_out(policy: Policy, samples: list[Sample], template: str, max_new_tokens: int, seed: int, max_cache_tokens: int = 131072,
             swapped: bool = True, max_prompt_tokens: int | None = None, world: World = ALONE) -> dict[str, float]:
    """Accuracy on samples, as fractions 0 … 1: sampled at temperature 1, greedy, and with images swapped.

    The random streams depend on `seed` and the sample's place alone, so evaluations of one run differ by the policy only.
    """
    places = list(range(len(samples)))[world.rank::world.size]
    answers = [samples[place].answer for place in places]

    def respond(of: list[Sample], key: tuple | None) -> tuple[list[str], list[int]]:
        texts, lengths = [], []
        for start in range(0, len(places), ROWS):
            prompts = [encode_prompt(of[place], place, policy.tokenizer, policy.image_processor, template, max_prompt_tokens)
                       for place in places[start:start + ROWS]]
            rollout = generate(policy, prompts, 1, max_new_tokens, key, max_cache_tokens=max_cache_tokens, temperature=1.0)
            texts += rollout.texts
            lengths += rollout.mask.sum(1).tolist()
        return texts, lengths

    right = lambda texts: sum(map(rewards.accuracy, texts, answers))
    texts, lengths = respond(samples, (seed, "held out"))
    sums = {"accuracy": right(texts), "format": sum(map(rewards.format, texts)), "length": sum(lengths),
            "accuracy_greedy": right(respond(samples, None)[0])}
    if swapped and any(sample.images for sample in samples):
        sums["accuracy_swapped"] = right(respond(swap_images(samples), (seed, "held out"))[0])
    totals = world.sum(torch.tensor(list(sums.values()), dtype=torch.float64)).tolist()
    return {name: total / len(samples) for name, total in zip(sums, totals)}


def ask(arguments) -> None:
    """Print the response to one question about some images."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    policy = load_policy(arguments.model, device, temperature=arguments.temperature or 1.0, trainable=False)
    paths = [Path(path).resolve() for path in arguments.image]
    images = tuple(load_image(path.name, path.parent) for path in paths)
    question = arguments.question if "<image>" in arguments.question else "<image>" * len(images) + arguments.question
    if question.count("<image>") != len(images):
        raise DataError(f"the question has {question.count('<image>')} <image> markers; expected {len(images)}, one per --image")
    prompt = encode_prompt(Sample("ask", images, question, ""), 0, policy.tokenizer, policy.image_processor, arguments.template)
    key = (arguments.seed, "ask") if arguments.temperature else None
    print(generate(policy, [prompt], 1, arguments.max_new_tokens, key).texts[0])


def main() -> None:
    from config import load_config

    parser = argparse.ArgumentParser(description="Evaluate a policy.")
    commands = parser.add_subparsers(dest="command", required=True)
    one = commands.add_parser("ask", help="print the response to one question")
    one.add_argument("--model", required=True, help="a Hugging Face directory or hub id, such as RUN_DIR/final")
    one.add_argument("--image", action="append", default=[], help="an image file; may be given several times, or not at all")
    one.add_argument("--max-new-tokens", type=int, default=512)
    one.add_argument("--temperature", type=float, default=0.0, help="0 decodes greedily")
    one.add_argument("--seed", type=int, default=0)
    one.add_argument("--template", default=load_config().data.prompt_template, help="data.prompt_template of the training run")
    one.add_argument("question", help="may hold <image> markers; without them the images come first")
    one.set_defaults(run=ask)
    arguments = parser.parse_args()
    try:
        arguments.run(arguments)
    except (DataError, ValueError) as error:
        sys.exit(f"error: {error}")


if __name__ == "__main__":
    main()
