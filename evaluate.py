"""evaluate.py: what a policy can do: on held-out samples, on benchmarks, and asked one question.

    python evaluate.py ask --model runs/toy/final --image picture.png "Sum circle, cross, square."
    python evaluate.py ask --tokens …               # and what DyCo sees in each token
    python evaluate.py run --model runs/3b/final --benchmark MME --data MME.tsv --out runs/mme
    python evaluate.py score --benchmark MME --data MME.tsv --responses runs/mme/responses.jsonl
    python evaluate.py table runs/mme runs/mmbench …

`run` also works under torchrun; the same command goes on with a run that was stopped. `score` and
`table` need no model. What needs torch, and benchmarks/, is imported where it is used.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import math
import sys
import warnings
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import rewards

if TYPE_CHECKING:
    from torch import Tensor

    from config import Config
    from data import Sample
    from distributed import World
    from dyco import Signals
    from model import Policy
    from rollout import Rollout

SAMPLES_AT_ONCE = 256  # whose pixels are in memory at the same time
MAX_CACHE_TOKENS = 131072  # prompt and response tokens in the cache at once


def respond(
    policy: Policy,
    samples: Sequence[Sample] | Mapping[int, Sample],
    places: Iterable[int],
    template: str,
    *,
    max_new_tokens: int,
    key: tuple | None,
    max_cache_tokens: int = MAX_CACHE_TOKENS,
    temperature: float | None = None,
    group_size: int = 1,
    greedy_last: bool = False,
) -> Rollout:
    """`group_size` responses to each of the samples at some places.

    The random streams depend on `key`, the place and the response; without a key, decoding is
    greedy. The other options are those of rollout.generate.
    """
    from rollout import generate

    prompts = [
        policy.encode(samples[place], place, template, max_prompt_tokens=None) for place in places
    ]
    return generate(
        policy,
        prompts,
        group_size,
        max_new_tokens=max_new_tokens,
        key=key,
        max_cache_tokens=max_cache_tokens,
        temperature=temperature,
        greedy_last=greedy_last,
    )


def respond_to_all(
    policy: Policy, samples: Sequence[Sample], places: Sequence[int], template: str, **options
) -> tuple[list[str], list[int]]:
    """Texts and lengths of the responses to many samples. `options` are those of `respond`."""
    texts = []
    lengths = []
    for start in range(0, len(places), SAMPLES_AT_ONCE):
        part = places[start : start + SAMPLES_AT_ONCE]
        rollout = respond(policy, samples, part, template, **options)
        texts += rollout.texts
        lengths += rollout.mask.sum(1).tolist()
    return texts, lengths


# --------------------------------------------------------------------------------- held-out samples


def swap_images(samples: list[Sample]) -> list[Sample]:
    """Each sample with the images of the next one that has as many; questions and answers stay."""
    by_count: dict[int, list[int]] = {}
    for place, sample in enumerate(samples):
        by_count.setdefault(len(sample.images), []).append(place)
    swapped = list(samples)
    for places in by_count.values():
        donors = places[1:] + places[:1]
        for place, donor in zip(places, donors, strict=True):
            swapped[place] = replace(samples[place], images=samples[donor].images)
    return swapped


def held_out(
    policy: Policy,
    samples: list[Sample],
    template: str,
    *,
    max_new_tokens: int,
    seed: int,
    max_cache_tokens: int = MAX_CACHE_TOKENS,
    swapped: bool = True,
    world: World | None = None,
) -> dict[str, float]:
    """What the policy answers to samples that it is not trained on. Collective.

    Returns fractions 0 … 1: `accuracy` and `format` of a response sampled at temperature 1,
    `accuracy_greedy`, and with `swapped` also `accuracy_swapped`, with the images of other samples.
    `length` is the mean of the sampled responses, in tokens.

    The random streams depend on the seed and on the sample's place alone, so evaluations of one run
    differ by the policy only.
    """
    import torch

    from distributed import ALONE

    world = world or ALONE
    share = list(range(len(samples)))[world.rank :: world.size]
    answers = [samples[place].answer for place in share]

    def count_right(texts: list[str]) -> float:
        return sum(map(rewards.accuracy, texts, answers))

    options = {
        "max_new_tokens": max_new_tokens,
        "key": (seed, "held out"),
        "max_cache_tokens": max_cache_tokens,
        "temperature": 1.0,
    }
    # Each sampled response is followed by a greedy one: both come from one prefill.
    texts, lengths = respond_to_all(
        policy, samples, share, template, group_size=2, greedy_last=True, **options
    )
    sums = {
        "accuracy": count_right(texts[::2]),
        "format": sum(map(rewards.format, texts[::2])),
        "length": sum(lengths[::2]),
        "accuracy_greedy": count_right(texts[1::2]),
    }
    if swapped and any(sample.images for sample in samples):
        texts, _ = respond_to_all(policy, swap_images(samples), share, template, **options)
        sums["accuracy_swapped"] = count_right(texts)
    # float64 counts exactly, so that the result is the same on any number of processes.
    totals = world.sum(torch.tensor(list(sums.values()), dtype=torch.float64)).tolist()
    return {name: total / len(samples) for name, total in zip(sums, totals, strict=True)}


# ------------------------------------------------------------------- one response, token by token


class TokenReading(NamedTuple):
    """What DyCo sees in one response of T tokens; all but `tokens` are [T], on the CPU."""

    tokens: list[str]
    signals: Signals
    roles: Tensor
    scores: Tensor
    weights: Tensor
    probabilities: Tensor
    images: Tensor  # [T, visual tokens]: attention to each visual token


def read_tokens(policy: Policy, rollout: Rollout, settings) -> TokenReading:
    """Read the single response of a rollout by the packed forward (eq. 1 to 7).

    settings: has layers, shift, text_scope, tau and ratio, as the section `dyco` of the config.
    """
    import torch

    import dyco

    # The packed forward of the update reads the attention here, as it does with capture: scoring.
    tap = policy.tap(settings, keep_images=True)
    mask = rollout.mask
    with torch.no_grad():
        output = policy(rollout.prompts, rollout.tokens, mask, tap)
    roles, scores = dyco.roles_and_scores(output.signals, mask, settings)
    length = int(mask.sum())

    def of_response(values: Tensor) -> Tensor:
        return values[0, :length].cpu()

    ids = of_response(rollout.tokens).tolist()
    return TokenReading(
        tokens=[policy.tokenizer.decode(token) for token in ids],
        signals=dyco.Signals(*map(of_response, output.signals)),
        roles=of_response(roles),
        scores=of_response(scores),
        weights=of_response(dyco.token_weights(scores, mask)),
        probabilities=of_response(output.logprobs.exp()),
        images=of_response(tap.images[0]),
    )


# ------------------------------------------------------------------------------------- commands


def check_sampling(max_new_tokens: int, temperature: float) -> None:
    """Raise ValueError for an option of `ask` or `run` that is out of range."""
    if max_new_tokens < 1:
        raise ValueError(f"--max-new-tokens: expected 1 or more, found {max_new_tokens}")
    if not 0 <= temperature < math.inf:
        raise ValueError(f"--temperature: expected 0 (greedy) or more, found {temperature}")


def ask(arguments: argparse.Namespace) -> None:
    """Print the response to one question about some images."""
    import torch

    from data import Sample
    from model import load_policy
    from rows import DataError, load_image, printable
    from tools.token_table import token_table

    check_sampling(arguments.max_new_tokens, arguments.temperature)
    paths = [Path(path).resolve() for path in arguments.image]
    images = tuple(load_image(path.name, path.parent) for path in paths)
    question = arguments.question
    if "<image>" not in question:
        question = "<image>" * len(images) + question
    markers = question.count("<image>")
    if markers != len(images):
        raise DataError(
            f"the question has {markers} <image> markers; expected {len(images)}, one per --image"
        )
    config = config_of(arguments.model)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    # A model of a run sees images as it did in training, another one as it was released.
    is_of_run = config_file_of(arguments.model) is not None
    policy = load_policy(
        arguments.model,
        device,
        temperature=arguments.temperature or 1.0,
        trainable=False,
        max_pixels=config.data.max_pixels if is_of_run else None,
    )
    rollout = respond(
        policy,
        [Sample("ask", images, question, "")],
        [0],
        arguments.template or config.data.prompt_template,
        max_new_tokens=arguments.max_new_tokens,
        key=(arguments.seed, "ask") if arguments.temperature else None,
    )
    print(printable(rollout.texts[0]))
    if arguments.tokens:
        print()
        print(token_table(read_tokens(policy, rollout, config.dyco)))


def config_of(model: str) -> Config:
    """The settings that a model was trained with; of one that train.py did not make, config.yaml.

    train.py writes the model to RUN_DIR/final and its settings to RUN_DIR/config.yaml.
    """
    from config import load_config, load_run_config

    file = config_file_of(model)
    return load_config() if file is None else load_run_config(file)


def config_file_of(model: str) -> Path | None:
    """The settings of the run whose final/ a model is."""
    folder = Path(model).resolve()
    file = folder.parent / "config.yaml"
    return file if folder.name == "final" and file.is_file() else None


def weights_of(model: str) -> str:
    """What tells one model from another: a hub id, or a hash of its weight files, every byte.

    A model of which only the middle changed is another one. Hashing takes a second a gigabyte.
    """
    folder = Path(model)
    if not folder.is_dir():
        return model
    digest = hashlib.sha256()
    for path in sorted([*folder.glob("*.safetensors"), *folder.glob("*.bin")]):
        with open(path, "rb") as file:
            of_file = hashlib.file_digest(file, "sha256").hexdigest()
        digest.update(f"{path.name} {of_file}".encode())
    return digest.hexdigest()


def run(arguments: argparse.Namespace) -> None:
    """Write the responses of a model to a benchmark's rows, on one process or several."""
    from benchmarks import running

    running.run(arguments)


def score(arguments: argparse.Namespace) -> None:
    """Print the score of some responses, one JSON object."""
    import benchmarks

    benchmark = benchmarks.find(arguments.benchmark)
    scores = benchmarks.score_file(
        replace(benchmark, answer_is=arguments.answer_is),
        arguments.data,
        arguments.responses,
        mode=arguments.mode,
        allow_missing=arguments.allow_missing,
        judge=arguments.judge,
    )
    print(json.dumps(scores, indent=1, allow_nan=False))


def table(arguments: argparse.Namespace) -> None:
    """Print the headlines of some runs in the layout of the paper's table 1."""
    from benchmarks.table import table

    print(
        for_terminal(
            table(
                arguments.folder,
                mode=arguments.mode,
                judge=arguments.judge,
                allow_missing=arguments.allow_missing,
                answer_is=arguments.answer_is,
            )
        )
    )


# ---------------------------------------------------------------------------------- command line


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    from benchmarks import options

    parser = argparse.ArgumentParser(
        description="Ask a trained model, or run, score and compare benchmarks. "
        "evaluate.py ask --help shows the options of one command."
    )
    commands = parser.add_subparsers(dest="command", required=True)
    rules = options.scoring_options()
    options.add_run(commands).set_defaults(call=run)
    options.add_score(commands, rules).set_defaults(call=score)
    options.add_table(commands, rules).set_defaults(call=table)
    add_ask(commands).set_defaults(call=ask)
    return parser.parse_args(arguments)


def add_ask(commands) -> argparse.ArgumentParser:
    parser = commands.add_parser("ask", help="print the response to one question")
    option = parser.add_argument
    option(
        "--model", required=True, help="a Hugging Face directory or hub id, such as RUN_DIR/final"
    )
    option(
        "--image",
        action="append",
        default=[],
        help="an image file; may be given several times, or not at all",
    )
    option("--tokens", action="store_true", help="print what DyCo sees in each token, too")
    option("--max-new-tokens", type=int, default=512)
    option("--temperature", type=float, default=0.0, help="0 decodes greedily")
    option("--seed", type=int, default=0)
    option(
        "--template",
        help="of the prompt; by default that of the training run, "
        "or of config.yaml for a model that train.py did not make",
    )
    option("question", help="may hold <image> markers; without them the images come first")
    return parser


def for_terminal(text: str) -> str:
    """rows.printable, which is imported when it is needed, since a score needs no picture."""
    from rows import printable

    return printable(text)


def print_warning(message, *_) -> None:
    print(for_terminal(f"warning: {message}"), file=sys.stderr)


def main(arguments: list[str] | None = None) -> None:
    from tools.command import command

    with command():  # --help prints
        parsed = parse(arguments)
    advice = "; the same command goes on" if parsed.command == "run" else ""
    with command(ValueError, OSError, advice=advice), warnings.catch_warnings():
        warnings.showwarning = print_warning
        parsed.call(parsed)


if __name__ == "__main__":
    main()
