"""observed.py: the responses that roles, intervene and gradient look at, and their common options.

Responses are sampled, or read from a file and passed through the policy once more. Either way they
come with DyCo's signals, roles and alignment scores. What is sampled is said by the config:
eval.samples prompts, rollout.group_size responses to each, rollout.*, dyco.*, toy.*, data.*,
train.seed. --config names another file than config.yaml, such as a run's.

Shapes: B responses, T response tokens.
"""

import argparse
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from torch.utils.data import ConcatDataset
from tqdm import tqdm

import dyco
import rewards
import toy
from attention import Decoding
from config import DEFAULTS, Config
from data import JsonlDataset, Prompt, check_lengths
from dyco import Signals
from model import Policy, policy_from_config
from rollout import Rollout, generate, runs_within
from rows import read_jsonl
from run_folder import check_place, write_file
from train import reference_of

PROMPTS_AT_ONCE = 32  # whose pixels and signals are on the device together
ROLES = {"visual": 1, "text": -1}


class AnalysisError(ValueError):
    """Arguments or files that cannot be analysed."""


# ------------------------------------------------------------------------------ what is analysed


@dataclass
class Observed:
    """Responses with their signals, on the CPU; all are [B, T] but for `prompt` and `correct`."""

    prompt: Tensor  # [B] long, the place of the response's prompt among the samples
    correct: Tensor  # [B] bool
    tokens: Tensor
    mask: Tensor
    signals: Signals
    roles: Tensor
    scores: Tensor


def observe(
    asked: list[Prompt],
    texts: Sequence[str],
    tokens: Tensor,
    mask: Tensor,
    signals: Signals,
    settings,
) -> Observed:
    """Verify responses and assign roles.

    asked, texts: the prompt and the text of each response; settings: has tau and ratio.
    """
    mask = mask.cpu()
    signals = Signals(*(signal.float().cpu() for signal in signals))
    roles, scores = dyco.roles_and_scores(signals, mask, settings)
    correct = [
        rewards.accuracy(text, prompt.answer) == 1
        for text, prompt in zip(texts, asked, strict=True)
    ]
    return Observed(
        prompt=torch.tensor([prompt.index for prompt in asked]),
        correct=torch.tensor(correct),
        tokens=tokens.cpu(),
        mask=mask,
        signals=signals,
        roles=roles,
        scores=scores,
    )


def concatenate(parts: list[Observed]) -> Observed:
    """All responses of several parts, padded to the longest."""
    width = max(part.mask.shape[1] for part in parts)

    def stacked(tensors) -> Tensor:
        return torch.cat([F.pad(x, (0, width - x.shape[1])) for x in tensors])

    signals = zip(*(part.signals for part in parts), strict=True)
    return Observed(
        prompt=torch.cat([part.prompt for part in parts]),
        correct=torch.cat([part.correct for part in parts]),
        tokens=stacked(part.tokens for part in parts),
        mask=stacked(part.mask for part in parts),
        signals=Signals(*(stacked(signal) for signal in signals)),
        roles=stacked(part.roles for part in parts),
        scores=stacked(part.scores for part in parts),
    )


def prompt_of_each(rollout: Rollout) -> list[Prompt]:
    """The prompt of every response of a rollout, [B]."""
    return [prompt for prompt in rollout.prompts for _ in range(rollout.group_size)]


def sample_responses(
    policy: Policy,
    samples: Sequence,
    count: int,
    config: Config,
    what: str,
    decoding: Callable[..., Decoding] = Decoding,
    each: Callable[[Rollout], None] | None = None,
) -> Observed:
    """Sample rollout.group_size responses to each of the first `count` samples.

    The signals are read while decoding. The random streams depend only on train.seed and on the
    places of the sample and of the response: interventions are compared on the same streams.

    what: stands before the progress bar; decoding: as for `generate`; each: is called with every
    rollout as it comes.
    """
    parts = []
    with tqdm(total=count, desc=what) as bar:
        for start in range(0, count, PROMPTS_AT_ONCE):
            places = range(start, min(start + PROMPTS_AT_ONCE, count))
            prompts = [encode(policy, samples, place, config) for place in places]
            rollout = generate(
                policy,
                prompts,
                config.rollout.group_size,
                max_new_tokens=config.rollout.max_new_tokens,
                key=(config.train.seed, "analysis"),
                capture=config.dyco,
                max_cache_tokens=config.rollout.max_cache_tokens,
                decoding=decoding,
            )
            if each is not None:
                each(rollout)  # before the verifier, so that responses are kept whatever it does
            part = observe(
                prompt_of_each(rollout),
                rollout.texts,
                rollout.tokens,
                mask=rollout.mask,
                signals=rollout.signals,
                settings=config.dyco,
            )
            parts.append(part)
            bar.update(len(places))
    return concatenate(parts)


def encode(policy: Policy, samples: Sequence, place: int, config: Config) -> Prompt:
    settings = config.data
    return policy.encode(
        samples[place], place, settings.prompt_template, settings.max_prompt_tokens
    )


# ----------------------------------------------------------------------------- recorded responses


def check_recorded(
    row: dict, places: dict[str, list[int]], policy: Policy
) -> tuple[int, list[int], str]:
    """(place of the sample, token ids, text) of one recorded response.

    places: sample id -> the places of the samples that have it. Raises AnalysisError.
    """
    text = row.get("response")
    tokens = row.get("token_ids")
    mine = places.get(str(row.get("id")), [])
    if len(mine) != 1:
        raise AnalysisError(
            f"found the id {row.get('id')!r:.100}, which {len(mine) or 'no'} rows of --data have; "
            "expected one"
        )
    # A lone surrogate is a str that no tokenizer takes.
    if not isinstance(text, str) or text != text.encode(errors="replace").decode():
        raise AnalysisError(f'"response" is {text!r:.100}; expected valid text')
    if tokens is None:
        tokens = policy.tokenizer(text, add_special_tokens=False).input_ids
        if row.get("truncated") is not True:
            tokens.append(policy.tokenizer.eos_token_id)
    size = policy.hf.config.text_config.vocab_size
    if not isinstance(tokens, list) or not all(
        type(token) is int and 0 <= token < size for token in tokens
    ):
        raise AnalysisError(
            f'"token_ids" is {tokens!r:.100}; expected a list of ids from 0 to {size - 1}'
        )
    limit = policy.hf.config.text_config.max_position_embeddings
    if not 1 <= len(tokens) <= limit:
        raise AnalysisError(f"the response has {len(tokens)} tokens; expected 1 to {limit}")
    return mine[0], tokens, text


def read_recorded(path: Path, ids: list[str], policy: Policy) -> list[tuple[int, list[int], str]]:
    """(place of the sample, token ids, text) of each row {"id": …, "response": …} of a JSONL file.

    "token_ids" are taken as they are where a row has them. Otherwise the text is tokenized, and the
    end token stands behind it unless the row says "truncated": true. A run's samples.jsonl can be
    read, and so can what `roles` keeps. ids: those of the samples. Raises AnalysisError.
    """
    places: dict[str, list[int]] = {}
    for place, name in enumerate(ids):
        places.setdefault(name, []).append(place)
    recorded = []
    for line, row in read_jsonl(path):
        try:
            recorded.append(check_recorded(row, places, policy))
        except AnalysisError as error:
            raise AnalysisError(f"{path}, line {line}: {error}") from None
    if not recorded:
        raise AnalysisError(
            f"{path} is empty; expected one JSON object with id and response per line"
        )
    return recorded


@torch.no_grad()
def read_responses(
    policy: Policy, samples: Sequence, recorded: list[tuple[int, list[int], str]], config: Config
) -> Observed:
    """Pass recorded responses (as of `read_recorded`) through the packed forward."""
    by_place: dict[int, list] = {}
    for place, ids, text in recorded:
        by_place.setdefault(place, []).append((ids, text))
    # The responses to one sample are one group of the packed forward, which encodes it once.
    parts = []
    for place, responses in tqdm(by_place.items(), desc="recorded responses"):
        prompt = encode(policy, samples, place, config)
        lengths = [len(ids) for ids, _ in responses]
        for some in runs_within(lengths, config.train.micro_batch_tokens):
            texts = [responses[i][1] for i in some]
            rows = [torch.tensor(responses[i][0]) for i in some]
            tokens = pad_sequence(rows, batch_first=True)
            ends = torch.tensor([len(row) for row in rows])
            mask = torch.arange(tokens.shape[1]) < ends[:, None]
            signals = policy([prompt], tokens, mask, tap=policy.tap(config.dyco)).signals
            part = observe(
                [prompt] * len(some),
                texts,
                tokens,
                mask=mask,
                signals=signals,
                settings=config.dyco,
            )
            parts.append(part)
    return concatenate(parts)


# ------------------------------------------------------------------------------ inputs and outputs


def model_folder(options, config: Config) -> Path:
    """The policy's folder or hub id; "toy" is the config's warm start, built if need be."""
    if options.model == "toy":
        return toy.warm_start_folder(config)
    return Path(options.model)


def load(
    options, config: Config, trainable: bool = False
) -> tuple[Policy, Sequence, list[str], int]:
    """(policy, samples, their ids, how many of them to sample from), everything checked.

    What is cheap to check comes first: the data, --responses and --out before the model.

    Of the toy these are the held-out samples, from which responses are sampled, and behind them the
    training samples, since a run's samples.jsonl is about those.
    """
    if config.train.threads:  # 0: as many as PyTorch chooses
        torch.set_num_threads(config.train.threads)
    samples, ids, count = load_samples(options, config)
    if getattr(options, "responses", None) is not None:
        with open(options.responses, "rb"):  # raises OSError where it cannot be read
            pass
    check_place(Path(options.out), "--out")
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    folder = model_folder(options, config)
    policy = policy_from_config(config, folder, device, trainable=trainable)
    policy.tap(config.dyco)  # refuses layers that the model does not have
    if isinstance(samples, JsonlDataset):
        check_lengths(
            samples,
            policy.tokenizer,
            policy.image_processor,
            template=config.data.prompt_template,
            max_prompt_tokens=config.data.max_prompt_tokens,
        )
    return policy, samples, ids, count


def load_samples(options, config: Config) -> tuple[Sequence, list[str], int]:
    """(samples, their ids, how many of them to sample from)."""
    if options.data == "toy":
        training, held_out = toy.splits(config)
        ids = [f"test-{index}" for index in range(len(held_out))]
        ids += [f"train-{index}" for index in range(len(training))]
        count = min(config.eval.samples, len(held_out))
        return ConcatDataset([held_out, training]), ids, count
    samples = JsonlDataset(
        options.data,
        config.data.image_root,
        config.data.on_error,
        check_answer=reference_of,  # as in training: a reference that nothing matches is an error
    )
    return samples, samples.ids, min(config.eval.samples, len(samples))


def write_json(path: Path, content: dict) -> None:
    write_file(path, json.dumps(content, indent=1).encode())


# -------------------------------------------------------------------------------- the command line


def split_at_commas(text: str) -> list[str]:
    return text.split(",")


def command_line(tool: str, description: str) -> argparse.ArgumentParser:
    """The options that roles, intervene and gradient share."""
    parser = argparse.ArgumentParser(prog=f"python -m tools.{tool}", description=description)
    parser.add_argument(
        "--model",
        required=True,
        help="toy (the warm start), a Hugging Face directory such as RUN_DIR/final, or a hub id",
    )
    parser.add_argument("--data", required=True, help="toy (its held-out split) or a JSONL file")
    parser.add_argument(
        "--out",
        required=True,
        help="folder to write to; RUN_DIR/analysis puts it into the run's report",
    )
    parser.add_argument(
        "--config", default=DEFAULTS, help="a config file, such as RUN_DIR/config.yaml"
    )
    parser.add_argument(
        "overrides", nargs="*", metavar="section.key=value", help="over the config's values"
    )
    return parser
