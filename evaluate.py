"""evaluate.py: what a policy can do: on the benchmarks, on held-out samples, and asked a single question.

    python evaluate.py run --model runs/3b/final --benchmark MME --data MME.tsv --out runs/mme      # also under torchrun
    python evaluate.py score --benchmark MME --data MME.tsv --responses runs/mme/responses.jsonl --mode final
    python evaluate.py table runs/mme runs/mmbench ...
    python evaluate.py ask --model runs/toy/final --image picture.png "Sum circle, cross, square."

`run` writes responses, greedy by default, and resumes; `score` prints one JSON object; neither `score` nor `table` needs a
model, so what needs torch is imported where it is used. Prompts, answer rules and metrics are in benchmarks.py.
"""

from __future__ import annotations

import argparse
import contextlib
import hashlib
import json
import os
import sys
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from tqdm import tqdm

import benchmarks
import rewards
from benchmarks import TABLE, Benchmark, BenchmarkError, Row

if TYPE_CHECKING:
    from torch import Tensor

    from data import Sample
    from distributed import World
    from dyco import Signals
    from model import Policy
    from rollout import Rollout

ROWS = 256  # whose pixels are in memory at once


def respond(
    policy: Policy,
    samples: Sequence[Sample] | Mapping[int, Sample],
    places: Iterable[int],
    template: str,
    max_new_tokens: int,
    key: tuple | None,
    max_cache_tokens: int,
    temperature: float | None,
    group_size: int = 1,
    greedy_last: bool = False,
) -> Rollout:
    """Responses to the samples at some places. The random streams depend on `key`, place and response; None decodes greedily, `greedy_last`
    the last response to each."""
    from data import encode_prompt
    from rollout import generate

    prompts = [
        encode_prompt(samples[place], place, policy.tokenizer, policy.image_processor, template)
        for place in places
    ]
    return generate(
        policy,
        prompts,
        group_size,
        max_new_tokens,
        key,
        max_cache_tokens=max_cache_tokens,
        temperature=temperature,
        greedy_last=greedy_last,
    )


# ---------------------------------------------------------------------------------------------------- held-out samples


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


def held_out(
    policy: Policy,
    samples: list[Sample],
    template: str,
    max_new_tokens: int,
    seed: int,
    max_cache_tokens: int = 131072,
    swapped: bool = True,
    world: World | None = None,
) -> dict[str, float]:
    """Accuracy on samples, as fractions 0 … 1: sampled at temperature 1, greedy, and with images swapped; of the sampled responses also
    the share that is well formed (`format`) and the tokens (`length`).

    The random streams depend on `seed` and the sample's place alone, so evaluations of one run differ by the policy only.
    """
    import torch

    from distributed import ALONE

    world = world or ALONE
    places = list(range(len(samples)))[world.rank :: world.size]
    answers = [samples[place].answer for place in places]

    def answer(of: list[Sample], greedy: bool) -> tuple[list[str], list[int]]:
        """Texts and lengths of a sampled response to each sample, each followed by a `greedy` one from the same prefill."""
        texts, lengths = [], []
        for start in range(0, len(places), ROWS):
            rollout = respond(
                policy,
                of,
                places[start : start + ROWS],
                template,
                max_new_tokens,
                (seed, "held out"),
                max_cache_tokens,
                1.0,
                1 + greedy,
                greedy,
            )
            texts += rollout.texts
            lengths += rollout.mask.sum(1).tolist()
        return texts, lengths

    right = lambda texts: sum(map(rewards.accuracy, texts, answers))
    texts, lengths = answer(samples, greedy=True)
    sums = {
        "accuracy": right(texts[::2]),
        "format": sum(map(rewards.format, texts[::2])),
        "length": sum(lengths[::2]),
        "accuracy_greedy": right(texts[1::2]),
    }
    if swapped and any(sample.images for sample in samples):
        sums["accuracy_swapped"] = right(answer(swap_images(samples), greedy=False)[0])
    totals = world.sum(torch.tensor(list(sums.values()), dtype=torch.float64)).tolist()
    return {name: total / len(samples) for name, total in zip(sums, totals)}


# -------------------------------------------------------------------------------------------------- run: the benchmarks


def run(arguments: argparse.Namespace) -> None:
    """Write the responses of a model to a benchmark's rows, on one process or several."""
    import distributed

    world = distributed.start()
    with contextlib.ExitStack() as stack:
        stack.callback(distributed.stop)
        stack.enter_context(warnings.catch_warnings())
        if not world.is_main:
            warnings.simplefilter("ignore")  # the main process says it

        def prepare():
            benchmark = benchmarks.find(arguments.benchmark)
            rows, dropped = benchmark.load(arguments.data, pictures=True)
            if (
                benchmark.answers
            ):  # cells that cannot be scored are found now rather than after a night of generation
                benchmarks.score(benchmark, rows, {row.index: {0: "?"} for row in rows}, "raw")
            return benchmark, rows, dropped

        benchmark, rows, dropped = together(world, prepare)
        model = str(on_main(world, warm_start)) if arguments.model == "toy" else arguments.model
        settings = together(world, lambda: run_settings(benchmark, arguments, model))
        done = on_main(
            world,
            lambda: open_folder(Path(arguments.out), settings, [row.index for row in rows], stack),
        )
        run_benchmark(model, benchmark, rows, dropped, settings, done, arguments, world)


def warm_start() -> Path:
    """The model that RL on the toy begins from, as train.py makes it."""
    import toy
    from config import load_config

    config = load_config()
    return toy.prepare(
        config.toy.level, config.toy.seed, config.data.prompt_template, config.toy.cache_dir
    )


def run_benchmark(
    model: str,
    benchmark: Benchmark,
    rows: list[Row],
    dropped: set[str],
    settings: dict,
    done: dict[str, list[int]],
    arguments: argparse.Namespace,
    world: World,
) -> None:
    """Every process answers its share of the rows that are not done, and appends to a file of its own; the main one merges them."""
    from data import IMAGE_MARKER, Sample
    from model import load_policy
    from rollout import runs_within

    folder, count = Path(arguments.out), settings["sample"]
    todo = [place for place, row in enumerate(rows) if len(done.get(row.index, ())) < count]
    root = arguments.image_root or Path(arguments.data or ".").parent
    truncated = 0
    if todo:
        policy = load_policy(model, world.device, arguments.dtype, trainable=False)
        if settings["min_pixels"] is not None:  # both edges of this processor are areas
            policy.image_processor.size["shortest_edge"] = settings["min_pixels"]
            policy.image_processor.size["longest_edge"] = settings["max_pixels"]
        question = lambda row, images: IMAGE_MARKER * images + benchmark.prompt(row)
        lengths = measure(
            policy, benchmark, rows, todo, question, settings["template"], root, world
        )
        # like beside like: little padding; the longest first: what does not fit fails at once
        own = sorted(todo, key=lambda place: (-lengths[place], place))[world.rank :: world.size]
        path = folder / (RESPONSES if world.is_main else f"responses.rank{world.rank}.jsonl")
        key = (settings["seed"], "benchmark") if settings["temperature"] else None
        label = benchmark.name + f", 1 of {world.size} processes" * (world.size > 1)
        bar = tqdm(total=len(own), desc=label, disable=not world.is_main)
        needed = [lengths[place] + count * settings["max_new_tokens"] for place in own]
        for batch in runs_within(needed, arguments.max_cache_tokens):
            places, samples = [own[i] for i in batch], {}
            for place in places:
                images = benchmark.pictures(rows[place], root)
                samples[place] = Sample(
                    rows[place].index, images, question(rows[place], len(images)), ""
                )
            rollout = respond(
                policy,
                samples,
                places,
                settings["template"],
                settings["max_new_tokens"],
                key,
                arguments.max_cache_tokens,
                settings["temperature"] or None,
                count,
            )
            truncated += int(rollout.truncated.sum())
            with open(path, "a") as file:  # closing it flushes
                for number, (tokens, mask) in enumerate(zip(rollout.tokens, rollout.mask)):
                    index, sample = rows[places[number // count]].index, number % count
                    if sample not in done.get(index, ()):
                        text = policy.tokenizer.decode(
                            tokens[mask].tolist(), skip_special_tokens=True
                        )
                        file.write(response_line(index, sample, text, count))
            bar.update(len(places))
        bar.close()
    truncated = sum(world.gather(truncated))  # from here on every process has written all
    if world.is_main:
        responses = merge(folder, [row.index for row in rows], count)
        cut = (
            f"; {truncated} of those written now were cut at {settings['max_new_tokens']} tokens"
            * bool(truncated)
        )
        print(f"{folder / RESPONSES}: {len(rows) * count} responses{cut}")
        warnings.simplefilter("ignore")  # said before the first response
        for mode in ("final", "raw") if benchmark.answers else ():
            result = benchmarks.score(benchmark, rows, responses, mode, dropped)
            print(
                f"{mode}: {result['headline']['metric']} {result['headline']['value']:.1f}; "
                f"{result['counts']['unmatched']} of {result['counts']['scored']} unmatched"
            )
    world.barrier()


def run_settings(benchmark: Benchmark, arguments: argparse.Namespace, model: str) -> dict:
    """What run.json holds: all that decides what the responses are, defaults filled in. Raises BenchmarkError."""
    chosen = lambda name: (
        getattr(benchmark, name) if getattr(arguments, name) is None else getattr(arguments, name)
    )
    prompt = arguments.prompt or benchmark.prompt_mode
    settings = {
        "benchmark": benchmark.name,
        "data": arguments.data and str(Path(arguments.data).resolve()),
        "rows": benchmark.fingerprint(arguments.data),
        "model": arguments.model,
        "weights": weights_of(model),
        "prompt": prompt,
        "template": (arguments.template or default_template())
        if prompt == "train"
        else "{question}",
        "max_new_tokens": chosen("max_new_tokens"),
        "min_pixels": chosen("min_pixels"),
        "max_pixels": chosen("max_pixels"),
        "sample": arguments.sample,
        "temperature": arguments.temperature,
        "seed": arguments.seed,
    }
    for name in ("sample", "max_new_tokens"):
        if settings[name] < 1:
            raise BenchmarkError(
                f"--{name.replace('_', '-')}: expected 1 or more, found {settings[name]}"
            )
    if settings["temperature"] < 0:
        raise BenchmarkError(
            f"--temperature: expected 0 (greedy) or more, found {settings['temperature']}"
        )
    if settings["sample"] > 1 and not settings["temperature"]:
        raise BenchmarkError(
            f"--sample {settings['sample']}: greedy responses are all the same; expected a --temperature above 0"
        )
    pixels = settings["min_pixels"], settings["max_pixels"]
    if pixels != (None, None) and (None in pixels or not 0 < pixels[0] <= pixels[1]):
        raise BenchmarkError(
            f"--min-pixels and --max-pixels: expected both, the first not above the second, found {pixels}"
        )
    return settings


def weights_of(model: str) -> str:
    """What tells one model from another: a hub id, or a hash of the ends of a directory's weight files."""
    if not Path(model).is_dir():
        return model
    digest = hashlib.sha256()
    for path in sorted([*Path(model).glob("*.safetensors"), *Path(model).glob("*.bin")]):
        with open(path, "rb") as file:
            digest.update(f"{path.name} {path.stat().st_size}".encode() + file.read(2**20))
            file.seek(max(0, path.stat().st_size - 2**20))
            digest.update(file.read())
    return digest.hexdigest()


def measure(
    policy: Policy,
    benchmark: Benchmark,
    rows: list[Row],
    todo: list[int],
    question: Callable[[Row, int], str],
    template: str,
    root: str | Path,
    world: World,
) -> dict[int, int]:
    """Place -> prompt tokens of the rows to do, each process looking at its share. Every picture is decoded once: what is
    wrong with any row is found here, before the first response, and raised as one BenchmarkError."""
    from data import count_prompt_tokens

    mine, sizes = todo[world.rank :: world.size], {}

    def sizes_of(place: int) -> list[tuple[int, int]] | ValueError:
        row = rows[place]
        try:
            if (row.images or row.index) not in sizes:  # rotations share their picture
                sizes[row.images or row.index] = [
                    image.size for image in benchmark.pictures(row, root)
                ]
            return sizes[row.images or row.index]
        except ValueError as error:
            return ValueError(
                str(error)
            )  # a fresh one: a traceback would keep half-decoded pixels alive

    lengths, problems = {}, {}
    with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:
        bar = tqdm(
            pool.map(sizes_of, mine),
            f"{benchmark.name}: checking rows",
            len(mine),
            disable=not world.is_main,
        )
        for found, place in zip(bar, mine):
            try:
                if isinstance(found, ValueError):
                    raise found
                text = question(rows[place], len(found))
                lengths[place] = count_prompt_tokens(
                    text, found, policy.tokenizer, policy.image_processor, template
                )
            except ValueError as error:
                where = rows[place].where
                problems[place] = (
                    str(error) if str(error).startswith(where) else f"{where}: {error}"
                )
    gathered = world.gather((lengths, problems))
    problems = {place: text for _, found in gathered for place, text in found.items()}
    if problems:
        lines = [f"{len(problems)} of {len(todo)} rows cannot be used:"]
        lines += [f"  {problems[place]}" for place in sorted(problems)[: benchmarks.MAX_LISTED]]
        lines += [f"  … and {len(problems) - benchmarks.MAX_LISTED} more"] * (
            len(problems) > benchmarks.MAX_LISTED
        )
        say_and_leave(world, "\n".join(lines))
    return {place: length for found, _ in gathered for place, length in found.items()}


def say_and_leave(world: World, message: str) -> None:
    """An error that all processes know of, said by the main one."""
    if world.is_main:
        raise BenchmarkError(message)
    sys.exit(1)


def together(world: World, action: Callable):
    """What action() returns on this process; an error on any is said once and ends all."""
    found, problem = None, None
    try:
        found = action()
    except (ValueError, OSError) as error:
        problem = str(error)
    problems = [text for text in world.gather(problem) if text is not None]
    if problems:
        say_and_leave(world, problems[0])
    return found


def on_main(world: World, action: Callable):
    """What action() returns on the main process, for all."""
    return world.gather(together(world, lambda: action() if world.is_main else None))[0]


# ------------------------------------------------------------------------------------------------- the folder of a run

RESPONSES = "responses.jsonl"
HASHED = {
    "weights": "model",
    "rows": "data",
}  # keys of run.json: the hash of what is named, whose name may change


def open_folder(
    folder: Path, settings: dict, order: list[str], stack: contextlib.ExitStack
) -> dict[str, list[int]]:
    """Begin a run in its folder, or go on with it: {index: samples} of the responses that it holds. The folder is ours until
    the stack is left. Raises BenchmarkError if it holds another run, FolderError if another process writes there.
    """
    import run_folder

    stack.enter_context(run_folder.exclusive(folder, "--out"))
    if (folder / "run.json").exists():
        before = read_settings(folder)
        changes = []
        for key in settings:
            name = HASHED.get(key, key)
            if key not in HASHED.values() and before.get(key) != settings[key]:
                other_name = before.get(name) != settings[name]
                changes.append(
                    f"{name} ({before.get(name)!r}, now {settings[name]!r})"
                    if other_name
                    else f"{name} ({settings[name]!r} has another content now)"
                )
        if changes:
            raise BenchmarkError(
                f"{folder} holds a run with another {', '.join(changes)}; set --out to a new folder"
            )
    elif any(folder.glob("responses*.jsonl")):
        raise BenchmarkError(
            f"{folder} holds responses but no run.json that says of what; set --out to a new folder"
        )
    run_folder.write_file(folder / "run.json", (json.dumps(settings, indent=1) + "\n").encode())
    return {index: list(found) for index, found in merge(folder, order, settings["sample"]).items()}


def read_settings(folder: str | Path) -> dict:
    path = Path(folder) / "run.json"
    try:
        settings = json.loads(path.read_text())
        return {
            key: settings[key]
            for key in ("benchmark", "model", "data", "prompt", "sample", "temperature")
        } | settings
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise BenchmarkError(
            f"{path} cannot be read ({type(error).__name__}: {error}); expected that of evaluate.py run"
        ) from error


def merge(folder: Path, order: list[str], count: int) -> dict[str, dict[int, str]]:
    """All responses {index: {sample: text}} of a run. Half-written last lines are cut off, files of several processes
    become one, in the order of the rows. Nothing is lost if this is interrupted."""
    from run_folder import write_file

    responses: dict[str, dict[int, str]] = {}
    parts = sorted(folder.glob("responses.rank*.jsonl"))
    for path in [folder / RESPONSES, *parts]:
        if path.exists():
            content = path.read_bytes()
            os.truncate(path, content.rfind(b"\n") + 1)
            for index, found in benchmarks.read_responses(path).items():
                responses[index] = found | responses.get(index, {})
    lines = "".join(
        response_line(index, sample, text, count)
        for index in order
        for sample, text in sorted(responses.get(index, {}).items())
    )
    write_file(folder / RESPONSES, lines.encode())
    for path in parts:
        path.unlink()
    return responses


def response_line(index: str, sample: int, text: str, count: int) -> str:
    return (
        json.dumps({"index": index, **({"sample": sample} if count > 1 else {}), "response": text})
        + "\n"
    )


# ------------------------------------------------------------------------------------------------------ score and table


def score(arguments: argparse.Namespace) -> None:
    """Print the score of some responses, one JSON object."""
    benchmark = replace(benchmarks.find(arguments.benchmark), answer_is=arguments.answer_is)
    print(
        json.dumps(
            score_file(benchmark, arguments.data, arguments.responses, arguments),
            indent=1,
            allow_nan=False,
        )
    )


def score_file(
    benchmark: Benchmark, data: str | None, responses: str | Path, arguments: argparse.Namespace
) -> dict:
    judge = rewards.load_custom(arguments.judge, "--judge") if arguments.judge else None
    rows, dropped = benchmark.load(data)
    return benchmarks.score(
        benchmark,
        rows,
        benchmarks.read_responses(responses),
        arguments.mode,
        dropped,
        arguments.allow_missing,
        judge,
        arguments.judge,
    )


def table(arguments: argparse.Namespace) -> None:
    """Print the headlines of some runs in the layout of the paper's table 1, as text and as Markdown."""
    runs, notes = [], []
    for folder in arguments.folder:
        settings = read_settings(folder)
        benchmark = replace(benchmarks.find(settings["benchmark"]), answer_is=arguments.answer_is)
        try:
            result = score_file(benchmark, settings["data"], Path(folder) / RESPONSES, arguments)
        except BenchmarkError as error:
            raise BenchmarkError(f"{folder}: {error}") from error
        label = settings["model"] + f", {settings['prompt']} prompt" * (
            settings["prompt"] != benchmark.prompt_mode
        )
        label += f", {settings['sample']} samples at {settings['temperature']}" * bool(
            settings["temperature"]
        )
        runs.append((label, benchmark.title, result["headline"]["value"]))
        counts = result["counts"]
        notes.append(
            f"{folder}: {benchmark.name}, {result['headline']['metric']}, {counts['rows']} rows, {counts['unmatched']} of "
            f"{counts['scored']} responses unmatched"
            + f", {counts['missing']} missing"
            * bool(counts["missing"])
        )
    print(f"mode {arguments.mode}, judge: {arguments.judge or benchmarks.NO_JUDGE}; percent\n")
    print("\n".join([*lay_out(runs), "", *notes]))


def lay_out(runs: list[tuple[str, str, float]]) -> list[str]:
    """Lines of the table, as text and as Markdown, of (label, column, value) triples: a row per label, more where a column
    repeats. The average is that of the paper: over all seven."""
    seven = [title for titles in TABLE.values() for title in titles]
    others = list(dict.fromkeys(title for _, title, _ in runs if title not in seven))
    rows: list[tuple[str, dict[str, float]]] = []
    for label, title, value in runs:
        row = next((values for name, values in rows if name == label and title not in values), None)
        if row is None:
            row = {}
            rows.append((label, row))
        row[title] = value
    groups = {**TABLE, "average": ("Avg.",), **({"other": tuple(others)} if others else {})}
    heads = [
        [""]
        + [group if i == 0 else "" for group, titles in groups.items() for i in range(len(titles))],
        ["model"] + [title for titles in groups.values() for title in titles],
    ]
    body = []
    for label, values in rows:
        if all(title in values for title in seven):
            values = values | {"Avg.": sum(values[title] for title in seven) / len(seven)}
        body.append(
            [label] + [f"{values[title]:.1f}" if title in values else "–" for title in heads[1][1:]]
        )
    widths = [max(len(row[i]) for row in [heads[1], *body]) for i in range(len(heads[1]))]
    starts, spans, at = [], [], 1  # of each group: its first column, its width
    for group, titles in groups.items():
        if len(titles) == 1:
            widths[at] = max(widths[at], len(group))
        starts.append(at)
        spans.append(sum(widths[at : at + len(titles)]) + 2 * (len(titles) - 1))
        at += len(titles)
    cell = lambda row, i: (" | " if i in starts else "  ") + row[i].rjust(widths[i])
    text = [
        " " * widths[0] + "".join(" | " + group.ljust(span) for group, span in zip(groups, spans))
    ]
    text += [
        row[0].ljust(widths[0]) + "".join(cell(row, i) for i in range(1, at))
        for row in [heads[1], *body]
    ]
    escape = lambda cell: cell.replace("|", "\\|")
    markdown = ["| " + " | ".join(map(escape, row)) + " |" for row in [*heads, *body]]
    markdown.insert(1, "|---" * len(heads[0]) + "|")
    return [line.rstrip() for line in text] + [""] + markdown


# ------------------------------------------------------------------------------- one response, token by token


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


# ----------------------------------------------------------------------------------------------------- single questions


def ask(arguments: argparse.Namespace) -> None:
    """Print the response to one question about some images."""
    import torch

    from data import DataError, Sample, load_image
    from model import load_policy

    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    policy = load_policy(
        arguments.model, device, temperature=arguments.temperature or 1.0, trainable=False
    )
    paths = [Path(path).resolve() for path in arguments.image]
    images = tuple(load_image(path.name, path.parent) for path in paths)
    question = (
        arguments.question
        if "<image>" in arguments.question
        else "<image>" * len(images) + arguments.question
    )
    if question.count("<image>") != len(images):
        raise DataError(
            f"the question has {question.count('<image>')} <image> markers; expected {len(images)}, one per --image"
        )
    key = (arguments.seed, "ask") if arguments.temperature else None
    rollout = respond(
        policy,
        [Sample("ask", images, question, "")],
        [0],
        arguments.template or default_template(),
        arguments.max_new_tokens,
        key,
        131072,
        None,
    )
    print(rollout.texts[0])


def default_template() -> str:
    from config import load_config

    return load_config().data.prompt_template


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Evaluate a policy.")
    commands = parser.add_subparsers(dest="command", required=True)
    model = "a Hugging Face directory or hub id, such as RUN_DIR/final"
    template = "of the training prompt: data.prompt_template of the training run; by default that of config.yaml"

    one = commands.add_parser(
        "run", help="write a model's responses to a benchmark; the same command resumes"
    )
    one.add_argument("--model", required=True, help=f"{model}; or toy, its warm start")
    one.add_argument(
        "--benchmark", required=True, metavar="NAME", help=", ".join(benchmarks.BENCHMARKS)
    )
    one.add_argument("--data", metavar="FILE.tsv", help="VLMEvalKit's TSV file; the toy has none")
    one.add_argument(
        "--out", required=True, metavar="DIR", help="folder of this run: run.json, responses.jsonl"
    )
    one.add_argument(
        "--prompt",
        choices=("benchmark", "train"),
        help="the dataset's own prompt (default; the toy's is train), "
        "or that with the instruction of training around it",
    )
    one.add_argument("--template", help=template)
    one.add_argument(
        "--image-root",
        metavar="DIR",
        help="folder of a file with image paths instead of images, by default the file's",
    )
    one.add_argument("--max-new-tokens", type=int, help="default 2048; toy 128")
    one.add_argument(
        "--sample",
        type=int,
        default=1,
        metavar="K",
        help="responses to each row, for pass@k; needs --temperature",
    )
    one.add_argument("--temperature", type=float, default=0.0, help="0 decodes greedily")
    one.add_argument("--seed", type=int, default=0, help="of sampling")
    one.add_argument(
        "--min-pixels",
        type=int,
        help="smaller images are enlarged to this area; default 1003520, as VLMEvalKit "
        "does for Qwen2.5-VL; toy: the model's own",
    )
    one.add_argument(
        "--max-pixels",
        type=int,
        help="larger images are shrunk to this area; default 12845056; toy: the model's own",
    )
    one.add_argument(
        "--max-cache-tokens",
        type=int,
        default=131072,
        help="prompt and response tokens in the cache at once",
    )
    one.add_argument(
        "--dtype",
        choices=("auto", "float32", "bfloat16"),
        default="auto",
        help="auto is bfloat16 on a GPU",
    )
    one.set_defaults(call=run)

    rules = argparse.ArgumentParser(add_help=False)
    rules.add_argument(
        "--mode",
        choices=("raw", "final"),
        default="final",
        help="what the rules read: the whole response, or its final answer (default)",
    )
    rules.add_argument(
        "--judge",
        metavar="FILE.py:function",
        help="asked about what the rules cannot settle, as function(response, "
        "answer, row) -> the response's answer, or True or False",
    )
    rules.add_argument(
        "--allow-missing", action="store_true", help="missing responses are wrong, not an error"
    )
    rules.add_argument(
        "--answer-is",
        action="store_true",
        help="match options with VLMEvalKit's rule of 2026-06-17, too",
    )
    one = commands.add_parser(
        "score", parents=[rules], help="print the score of responses as one JSON object"
    )
    one.add_argument(
        "--benchmark", required=True, metavar="NAME", help=", ".join(benchmarks.BENCHMARKS)
    )
    one.add_argument("--data", metavar="FILE.tsv")
    one.add_argument(
        "--responses", required=True, metavar="FILE.jsonl", help='lines {"index": …, "response": …}'
    )
    one.set_defaults(call=score)
    one = commands.add_parser("table", parents=[rules], help="print runs side by side")
    one.add_argument("folder", nargs="+", metavar="DIR", help="--out of a run")
    one.set_defaults(call=table)

    one = commands.add_parser("ask", help="print the response to one question")
    one.add_argument("--model", required=True, help=model)
    one.add_argument(
        "--image",
        action="append",
        default=[],
        help="an image file; may be given several times, or not at all",
    )
    one.add_argument("--max-new-tokens", type=int, default=512)
    one.add_argument("--temperature", type=float, default=0.0, help="0 decodes greedily")
    one.add_argument("--seed", type=int, default=0)
    one.add_argument("--template", help=template)
    one.add_argument(
        "question", help="may hold <image> markers; without them the images come first"
    )
    one.set_defaults(call=ask)
    return parser.parse_args(arguments)


def main(arguments: list[str] | None = None) -> None:
    parsed = parse(arguments)
    try:
        with warnings.catch_warnings():
            warnings.showwarning = lambda message, *_: print(f"warning: {message}", file=sys.stderr)
            parsed.call(parsed)
    except (ValueError, OSError) as error:
        sys.exit(f"error: {error}")
    except KeyboardInterrupt:
        sys.exit("stopped" + "; the same command goes on" * (parsed.command == "run"))


if __name__ == "__main__":
    main()
