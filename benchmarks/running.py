"""running.py: a model answers the rows of a benchmark, on one process or several.

    1. Settings and rows are checked, and every picture is decoded once, before anything is
       generated: what is wrong is said now rather than after a night.
    2. Each process answers its share of the rows, the longest prompts first, and appends each
       batch to a file of its own.
    3. The main process merges the files and scores them.

The same command goes on with a run that was stopped. The random streams depend on the seed, the
row and the sample alone, so neither batches nor interruptions change a response.
"""

import argparse
import contextlib
import os
import warnings
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

import torch
from tqdm import tqdm

import benchmarks
import distributed
import evaluate
import toy
from attention import pace_on
from benchmarks.benchmark import Benchmark
from benchmarks.files import BenchmarkError, Row
from benchmarks.folder import merge, open_folder, responses_path
from benchmarks.responses import MAX_LISTED, RESPONSES, response_row
from benchmarks.scoring import check_references
from config import load_config
from data import Sample, count_prompt_tokens
from distributed import World, on_main, together
from model import Policy, check_model, load_policy, resolve_dtype
from rollout import Rollout, waves_within
from rows import IMAGE_MARKER, append_jsonl


class Task(NamedTuple):
    """What is to be answered, the same on every process."""

    benchmark: Benchmark
    rows: list[Row]
    dropped: set[str]  # indices that need no response
    settings: dict  # of run.json
    root: Path  # the folder that image paths are relative to


def run(arguments: argparse.Namespace) -> None:
    """`evaluate.py run`: write a model's responses to a benchmark's rows. Collective."""
    with distributed.said_once(ValueError, OSError):
        run_together(arguments, distributed.start())


def run_together(arguments: argparse.Namespace, world: World) -> None:
    """`run`, among the processes of a world. Collective."""
    with contextlib.ExitStack() as stack:
        stack.callback(distributed.stop)
        stack.enter_context(warnings.catch_warnings())
        if not world.is_main:
            warnings.simplefilter("ignore")  # the main process says them
        benchmark, rows, dropped = together(world, load, arguments)
        model = arguments.model
        if model == "toy":
            model = str(on_main(world, warm_start))
        # Before the folder is opened: a command that failed must not leave one that then refuses
        # the corrected command.
        together(world, check_model, model)
        settings = together(world, run_settings, benchmark, rows, arguments, model, world.device)
        task = Task(benchmark, rows, dropped, settings=settings, root=image_root(arguments))
        order = [row.index for row in rows]
        done = on_main(world, open_folder, Path(arguments.out), settings, order, stack)
        answer_all(task, model, done, arguments=arguments, world=world)


def load(arguments: argparse.Namespace) -> tuple[Benchmark, list[Row], set[str]]:
    benchmark = benchmarks.find(arguments.benchmark)
    rows, dropped = benchmark.load(arguments.data, pictures=True)
    check_references(benchmark, rows)
    # Scoring anything at all finds the cells that cannot be scored.
    anything = {row.index: {0: "?"} for row in rows}
    benchmarks.score(benchmark, rows, anything, mode="raw")
    return benchmark, rows, dropped


def warm_start() -> Path:
    """The model that reinforcement learning on the toy begins from, as train.py makes it."""
    return toy.warm_start_folder(load_config())


def image_root(arguments: argparse.Namespace) -> Path:
    """The folder that image paths are relative to."""
    return Path(arguments.image_root or Path(arguments.data or ".").parent)


def run_settings(
    benchmark: Benchmark,
    rows: list[Row],
    arguments: argparse.Namespace,
    model: str,
    device: torch.device,
) -> dict:
    """What run.json holds: all that decides what the responses are, defaults filled in.

    Raises BenchmarkError.
    """

    def chosen(name: str):
        value = getattr(arguments, name)
        return getattr(benchmark, name) if value is None else value

    prompt = arguments.prompt or benchmark.prompt_mode
    template = "{question}"
    if prompt == "train":
        template = arguments.template or evaluate.config_of(arguments.model).data.prompt_template
    elif arguments.template is not None:
        raise BenchmarkError(
            f"--template is that of --prompt train; found it with --prompt {prompt}"
        )
    settings = {
        "benchmark": benchmark.name,
        "data": arguments.data and str(Path(arguments.data).resolve()),
        "rows": benchmark.fingerprint(arguments.data),
        "model": arguments.model,
        "weights": evaluate.weights_of(model),
        "dtype": resolve_dtype(arguments.dtype, device),
        "prompt": prompt,
        "template": template,
        "max_new_tokens": chosen("max_new_tokens"),
        "min_pixels": chosen("min_pixels"),
        "max_pixels": chosen("max_pixels"),
        "sample": arguments.sample,
        "temperature": arguments.temperature,
        "seed": arguments.seed,
    }
    if any(row.images and not row.encoded for row in rows):
        settings["image_root"] = str(image_root(arguments).resolve())
    check_settings(settings)
    return settings


def check_settings(settings: dict) -> None:
    """Raise ValueError, such as a BenchmarkError, for a number that is out of range."""
    evaluate.check_sampling(settings["max_new_tokens"], settings["temperature"])
    if settings["sample"] < 1:
        raise BenchmarkError(f"--sample: expected 1 or more, found {settings['sample']}")
    if settings["sample"] > 1 and not settings["temperature"]:
        raise BenchmarkError(
            f"--sample {settings['sample']}: greedy responses are all the same; "
            "expected a --temperature above 0"
        )
    least, most = settings["min_pixels"], settings["max_pixels"]
    if (least, most) == (None, None):
        return
    if least is None or most is None or not 0 < least <= most:
        raise BenchmarkError(
            "--min-pixels and --max-pixels: expected both, the first not above the second, "
            f"found {(least, most)}"
        )


def answer_all(
    task: Task,
    model: str,
    done: dict[str, list[int]],
    arguments: argparse.Namespace,
    world: World,
) -> None:
    """Answer the rows that are not done, and score them all. Collective.

    model: the folder or hub id of the model. done: {index: samples} of the responses so far.
    """
    count = task.settings["sample"]
    todo = [place for place, row in enumerate(task.rows) if len(done.get(row.index, ())) < count]
    truncated = 0
    if todo:
        policy = load_policy(model, world.device, arguments.dtype, trainable=False)
        if task.settings["min_pixels"] is not None:
            # Both "edges" of this image processor are areas.
            policy.image_processor.size["shortest_edge"] = task.settings["min_pixels"]
            policy.image_processor.size["longest_edge"] = task.settings["max_pixels"]
        lengths = measure(
            policy,
            task.benchmark,
            task.rows,
            todo=todo,
            template=task.settings["template"],
            root=task.root,
            world=world,
        )
        truncated = answer_share(policy, task, lengths, done=done, arguments=arguments, world=world)
    # Once this has gathered, every process has written all.
    truncated = sum(world.gather(truncated))
    if world.is_main:
        finish(task, Path(arguments.out), truncated)
    world.barrier()


def answer_share(
    policy: Policy,
    task: Task,
    lengths: dict[int, int],
    done: dict[str, list[int]],
    arguments: argparse.Namespace,
    world: World,
) -> int:
    """Answer this process's share of the rows. lengths: place -> prompt tokens of those to do.

    Returns how many responses were cut at the limit of tokens.
    """
    settings = task.settings
    count = settings["sample"]
    # Rows of like length stand together, which saves padding. The longest come first, so that what
    # does not fit into memory fails at once.
    places = sorted(lengths, key=lambda place: (-lengths[place], place))[world.rank :: world.size]
    waves = waves_within(
        [lengths[place] for place in places],
        count,
        settings["max_new_tokens"],
        budget=arguments.max_cache_tokens,
        pace=pace_on(policy.device),
    )
    path = responses_path(Path(arguments.out), world.rank)
    label = task.benchmark.name
    if world.size > 1:
        label += f", 1 of {world.size} processes"
    truncated = 0
    with tqdm(total=len(places), desc=label, disable=not world.is_main) as bar:
        for wave in waves:
            asked = [places[i] for i in wave]
            rollout = evaluate.respond(
                policy,
                {place: make_sample(task, task.rows[place]) for place in asked},
                asked,
                settings["template"],
                max_new_tokens=settings["max_new_tokens"],
                key=(settings["seed"], "benchmark") if settings["temperature"] else None,
                max_cache_tokens=arguments.max_cache_tokens,
                temperature=settings["temperature"] or None,
                group_size=count,
            )
            truncated += int(rollout.truncated.sum())
            indices = [task.rows[place].index for place in asked]
            append_jsonl(path, new_responses(policy, rollout, indices, count=count, done=done))
            bar.update(len(asked))
    return truncated


def make_sample(task: Task, row: Row) -> Sample:
    images = task.benchmark.pictures(row, task.root)
    return Sample(row.index, images, question(task.benchmark, row, len(images)), "")


def question(benchmark: Benchmark, row: Row, images: int) -> str:
    """What is asked: the pictures first, then the benchmark's prompt."""
    return IMAGE_MARKER * images + benchmark.prompt(row)


def new_responses(
    policy: Policy, rollout: Rollout, indices: list[str], count: int, done: dict[str, list[int]]
) -> Iterator[dict]:
    """Lines of responses.jsonl for a rollout with `count` responses to each of the indices.

    Of a row that was half done all samples are drawn once more, and those it has are left out.
    """
    for number, (tokens, mask) in enumerate(zip(rollout.tokens, rollout.mask, strict=True)):
        place, sample = divmod(number, count)
        index = indices[place]
        if sample not in done.get(index, ()):
            ids = tokens[mask].tolist()
            text = policy.tokenizer.decode(ids, skip_special_tokens=True)
            yield response_row(index, sample, text, count=count)


def finish(task: Task, folder: Path, truncated: int) -> None:
    """Merge the files of all processes, and print where the responses are and their headlines."""
    count = task.settings["sample"]
    responses = merge(folder, [row.index for row in task.rows], count)
    line = f"{folder / RESPONSES}: {len(task.rows) * count} responses"
    if truncated:
        limit = task.settings["max_new_tokens"]
        line += f"; {truncated} of those written now were cut at {limit} tokens"
    print(line)
    warnings.simplefilter("ignore")  # they were said before the first response
    for mode in ("final", "raw"):
        scores = benchmarks.score(
            task.benchmark, task.rows, responses, mode=mode, dropped=task.dropped
        )
        headline, counts = scores["headline"], scores["counts"]
        print(
            f"{mode}: {headline['metric']} {headline['value']:.1f}; "
            f"{counts['unmatched']} of {counts['scored']} unmatched"
        )


# ----------------------------------------------------------------------------------- checking rows


def measure(
    policy: Policy,
    benchmark: Benchmark,
    rows: list[Row],
    todo: list[int],
    template: str,
    root: str | Path,
    world: World,
) -> dict[int, int]:
    """Place -> prompt tokens of the rows to do. Collective; each process looks at its share.

    What is wrong with any row is found here, before the first response, and raised as one
    BenchmarkError on all processes.
    """
    share = todo[world.rank :: world.size]
    sizes = image_sizes(benchmark, [rows[place] for place in share], root, show=world.is_main)
    lengths = {}
    problems = {}
    for place, size in zip(share, sizes, strict=True):
        row = rows[place]
        try:
            if isinstance(size, ValueError):
                raise size
            lengths[place] = count_prompt_tokens(
                question(benchmark, row, len(size)),
                size,
                policy.tokenizer,
                image_processor=policy.image_processor,
                template=template,
            )
        except ValueError as error:
            text = str(error)
            problems[place] = text if text.startswith(row.where) else f"{row.where}: {text}"
    all_lengths = {}
    all_problems = {}
    for lengths_of_one, problems_of_one in world.gather((lengths, problems)):
        all_lengths |= lengths_of_one
        all_problems |= problems_of_one
    if all_problems:
        in_order = [all_problems[place] for place in sorted(all_problems)]
        raise BenchmarkError(describe_problems(in_order, len(todo)))
    return all_lengths


def image_sizes(
    benchmark: Benchmark, rows: list[Row], root: str | Path, show: bool
) -> Iterator[list[tuple[int, int]] | ValueError]:
    """(width, height) of each row's pictures, or what is wrong with them. Threads decode them."""
    known = {}

    def sizes_of(row: Row) -> list[tuple[int, int]] | ValueError:
        key = row.images or row.index
        try:
            if key not in known:  # the rotations of a question share their picture
                known[key] = [image.size for image in benchmark.pictures(row, root)]
            return known[key]
        except ValueError as error:
            # A fresh error: the traceback of this one would keep half-decoded pixels alive.
            return ValueError(str(error))

    with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:
        label = f"{benchmark.name}: checking rows"
        yield from tqdm(pool.map(sizes_of, rows), label, len(rows), disable=not show)


def describe_problems(problems: list[str], total: int) -> str:
    lines = [f"{len(problems)} of {total} rows cannot be used:"]
    lines += [f"  {problem}" for problem in problems[:MAX_LISTED]]
    if len(problems) > MAX_LISTED:
        lines.append(f"  … and {len(problems) - MAX_LISTED} more")
    return "\n".join(lines)
