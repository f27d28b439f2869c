"""The performance of this project, as ratios measured side by side in one run.

    python -m tools.bench                  # every row; prints lines and writes bench.json
    python -m tools.bench update rollout   # some rows; bench.json then has these alone
    python -m tools.bench estimate         # memory and time of the released models, on paper
    python -m tools.bench count            # kernels and bytes of the released models, on paper
    python -m tools.bench decode           # tokens per second beside what the machine could do
    python -m tools.bench gpu              # the 3B shape on a GPU; writes bench_gpu.json

Two ways are timed by turns. The ratio is the median over these rounds, with the smallest and the
largest. Peak memory is that of a process of its own. Run nothing else meanwhile.
TRL is a peer of the row `step`, if it is installed (pip install -r requirements-bench.txt).
"""

from __future__ import annotations

import importlib.util
import itertools
import json
import math
import os
import statistics
import subprocess
import sys
from collections.abc import Callable, Iterator
from functools import partial
from types import SimpleNamespace

import torch

import dyco
import lora
import model
from attention import ON_CPU
from config import DEFAULTS, load_config
from model import Policy, TokenLogprobs
from rollout import generate
from tools import bench_gpu, counted, decoded, estimate
from tools.command import command
from tools.measuring import (
    GROUP,
    PIXELS,
    SIZES,
    THREADS,
    compare,
    growth_of_memory,
    line,
    measurement,
    operations,
    policy_of,
    prompts_of,
    sample_of,
    seconds,
    step_of,
)

NEW = 64  # tokens of each response
PROMPTS = 4  # of a rollout and of a step
CAPTURE = SimpleNamespace(layers=[-1], shift="fisher_rao", text_scope="after_image")
# glibc hands freed memory back at once, so that no run is served from what an earlier one left.
RETURN_FREED = {
    "MALLOC_MMAP_THRESHOLD_": "16384",
    "MALLOC_TRIM_THRESHOLD_": "16384",
    "MALLOC_TOP_PAD_": "0",
}

Way = Callable[[], object]  # one of the two ways that a row compares


def setting_of(size: str, visual: int) -> str:
    return f"{size}, {visual} visual tokens"


def in_a_process(module: str, *arguments, environment: dict[str, str]) -> str:
    """What a module of ours prints in a process of its own. Raises RuntimeError with its errors."""
    finished = subprocess.run(
        [sys.executable, "-m", module, *map(str, arguments)],
        capture_output=True,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": str(THREADS), **environment},
    )
    if finished.returncode:
        raise RuntimeError(finished.stderr[-3000:])
    return finished.stdout


def peak_megabytes(job: str, *arguments) -> float:
    """Peak resident memory of a job in a process of its own, above what it held before."""
    printed = in_a_process("tools.bench", "--job", job, *arguments, environment=RETURN_FREED)
    return float(printed.splitlines()[-1])


def peaks(ours: float, theirs: float) -> str:
    return f"peak {ours:.0f} against {theirs:.0f} MB"


# -------------------------------------------------------------------------------- the packed update


def padded_logprobs(policy: Policy, prompt, tokens: torch.Tensor) -> torch.Tensor:
    """The usual way: the stock forward on G rows [prompt | response], the image in each of them."""
    hf = policy.hf
    rows = len(tokens)
    hf.model.rope_deltas = None
    hf.config.text_config._attn_implementation = "sdpa"
    ids = torch.cat([prompt.input_ids.expand(rows, -1), tokens], dim=1)
    in_response = torch.zeros_like(tokens, dtype=torch.bool)
    in_image = torch.cat([prompt.visual_mask.expand(rows, -1), in_response], dim=1)
    hidden = hf.model(
        input_ids=ids,
        mm_token_type_ids=in_image.int(),
        use_cache=False,
        pixel_values=prompt.pixel_values.repeat(rows, 1),
        image_grid_thw=prompt.image_grid_thw.repeat(rows, 1),
    )[0]
    # The state before a token predicts it.
    before = hidden[:, len(prompt.input_ids) - 1 : -1].reshape(tokens.numel(), -1)
    logprobs, *_ = TokenLogprobs.apply(
        before,
        hf.lm_head.weight,
        tokens.flatten(),
        policy.temperature,
        policy.suppressed,
        policy.CHUNK,
        policy.forward_chunk,
        policy.slope_chunk,
    )
    return logprobs.view(tokens.shape)


def one_update(size: str, visual: int, way: str) -> Way:
    """A function that runs forward and backward of one group, and returns the log-probabilities.

    way: "packed", or "padded".
    """
    policy = policy_of(size)
    (prompt,) = prompts_of(policy, visual)
    tokens = torch.randint(0, 300, (GROUP, NEW), generator=torch.Generator().manual_seed(0))
    mask = torch.ones_like(tokens, dtype=torch.bool)

    def run():
        policy.zero_grad(set_to_none=True)
        if way == "packed":
            logprobs = policy([prompt], tokens, mask).logprobs
        else:
            logprobs = padded_logprobs(policy, prompt, tokens)
        logprobs.sum().backward()
        return logprobs.detach()

    return run


def update() -> Iterator[dict]:
    """Forward and backward of one group: same model, same log-probabilities, same gradients."""
    for size, visual in itertools.product(SIZES, PIXELS):
        packed = one_update(size, visual, "packed")
        padded = one_update(size, visual, "padded")
        difference = float((packed() - padded()).abs().max())
        assert difference < 1e-3, difference

        policy = policy_of(size)
        length = len(prompts_of(policy, visual)[0].input_ids)
        counted = partial(operations, policy, visual, length, new=NEW, group=GROUP)
        ideal = counted(packed=False) / counted(packed=True)
        memory = [peak_megabytes("update", size, visual, way) for way in ("packed", "padded")]
        measured = compare(
            "update",
            setting_of(size, visual),
            ours=packed,
            theirs=padded,
            rounds=5 if size == "3M" else 3,
            target=f">= {0.9 * ideal:.2f} (90 % of {ideal:.2f})",
            note=peaks(*memory),
        )
        yield measured | {"ideal": ideal, "peak_mb": memory}


# -------------------------------------------------------------------------------------- the rollout


def one_rollout(size: str, visual: int, way: str, new: int = NEW) -> Way:
    """A function that samples 4 prompts × 8 responses of exactly `new` tokens.

    way: "ours", with the attention captured; "generate", that of transformers; or "naive", which
    keeps every attention matrix, as eager attention returns it.
    """
    policy = policy_of(size)
    prompts = prompts_of(policy, visual, PROMPTS)
    policy.eos_ids = set()  # nobody stops early: both ways decode the same number of tokens

    def ours():
        generate(policy, prompts, GROUP, max_new_tokens=new, key=(0, 0), capture=CAPTURE)

    def theirs():
        hf = policy.hf
        naive = way == "naive"
        hf.model.rope_deltas = None
        hf.config.text_config._attn_implementation = "eager" if naive else "sdpa"
        return hf.generate(
            input_ids=torch.stack([prompt.input_ids for prompt in prompts]),
            mm_token_type_ids=torch.stack([prompt.visual_mask for prompt in prompts]).int(),
            attention_mask=torch.ones(PROMPTS, len(prompts[0].input_ids), dtype=torch.long),
            pixel_values=torch.cat([prompt.pixel_values for prompt in prompts]),
            image_grid_thw=torch.cat([prompt.image_grid_thw for prompt in prompts]),
            num_return_sequences=GROUP,
            do_sample=True,
            top_k=0,
            temperature=1.0,
            max_new_tokens=new,
            min_new_tokens=new,
            output_attentions=naive,
            return_dict_in_generate=True,
        )

    return ours if way == "ours" else theirs


def rollout() -> Iterator[dict]:
    """Sampling with the attention captured, against generate without it."""
    targets = {"3M": {100: ">= 2", 600: ">= 4.5"}, "40M": {100: ">= 2.5", 600: ">= 5"}}
    for size, visual in itertools.product(SIZES, PIXELS):
        yield compare(
            "rollout",
            setting_of(size, visual),
            ours=one_rollout(size, visual, "ours"),
            theirs=one_rollout(size, visual, "generate"),
            rounds=3,
            target=targets[size][visual],
            note="4 × 8 responses of 64 tokens",
        )


def capture() -> Iterator[dict]:
    """Sampling with the attention captured, against generate with output_attentions=True."""
    for size, visual in (("3M", 100), ("3M", 600), ("40M", 600)):
        memory = [peak_megabytes("rollout", size, visual, way) for way in ("ours", "naive")]
        measured = compare(
            "capture",
            setting_of(size, visual),
            ours=one_rollout(size, visual, "ours"),
            theirs=one_rollout(size, visual, "naive"),
            rounds=3,
            target=">= 5 at 600, peak <= 1/2" if visual == 600 else "-",
            note=peaks(*memory),
        )
        yield measured | {"peak_mb": memory}


def one_signal_of_credit(size: str, visual: int, way: str) -> Way:
    """A function that scores one group, "seeing" or "blind", or that samples, "sampling" alone or
    "recording" entropies and similarities to the image as well."""
    policy = policy_of(size)
    policy.eos_ids = set()
    prompts = prompts_of(policy, visual, PROMPTS)
    tokens = torch.randint(0, 300, (GROUP, NEW), generator=torch.Generator().manual_seed(0))
    mask = torch.ones_like(tokens, dtype=torch.bool)

    @torch.no_grad()
    def run():
        if way in ("seeing", "blind"):
            return policy(prompts[:1], tokens, mask, blind=way == "blind").logprobs
        record = ("entropy", "image_similarity") if way == "recording" else ()
        return generate(policy, prompts, GROUP, NEW, key=(0, 0), capture=CAPTURE, record=record)

    return run


def credit() -> Iterator[dict]:
    """What the signals of token credit cost: a look without images beside the scoring of the same
    group, and sampling with entropies and similarities recorded beside sampling without."""
    pairs = {("blind", "seeing"): ">= 1", ("recording", "sampling"): ">= 0.95"}
    for size, visual in (("3M", 100), ("40M", 600)):
        for (ours, theirs), target in pairs.items():
            yield compare(
                "credit",
                f"{setting_of(size, visual)}, {ours} / {theirs}",
                ours=one_signal_of_credit(size, visual, ours),
                theirs=one_signal_of_credit(size, visual, theirs),
                rounds=5,
                target=target,
            )


# ----------------------------------------------------------------------------------------- the step


def one_step(size: str, visual: int, with_dyco: bool = True, new: int = NEW) -> Way:
    """A function that runs one step of 4 prompts × 8 responses: rollout, DyCo and one update."""
    policy = policy_of(size)
    policy.eos_ids = set()  # nobody stops early
    settings = [
        "algo.name=dapo",
        "algo.dynamic_sampling=false",
        "algo.mask_truncated=false",
        f"dyco.enabled={str(with_dyco).lower()}",
        f"rollout.prompts_per_step={PROMPTS}",
        f"rollout.max_new_tokens={new}",
        "train.updates_per_rollout=1",
        "train.micro_batch_tokens=2048",
    ]
    samples = [sample_of(visual, index) for index in range(PROMPTS)]
    return step_of(policy, samples, load_config(DEFAULTS, settings))


def dyco_cost() -> Iterator[dict]:
    """The same step without DyCo: the ratio is below 1 by as much as the method costs."""
    for size, visual in (("3M", 100), ("3M", 600), ("40M", 100)):
        memory = [peak_megabytes("step", size, visual, way) for way in ("on", "off")]
        measured = compare(
            "dyco",
            setting_of(size, visual),
            ours=one_step(size, visual),
            theirs=one_step(size, visual, with_dyco=False),
            rounds=5,
            target=">= 0.97, memory <= 1.01",
            note=peaks(*memory),
        )
        yield measured | {"peak_mb": memory}


def step() -> Iterator[dict]:
    """The whole step, rollout to optimizer, against TRL's GRPOTrainer."""
    if importlib.util.find_spec("trl") is None:
        print("step       TRL is not installed: pip install -r requirements-bench.txt")
        return
    targets = {100: ">= 3", 600: ">= 6"}
    for size, (visual, target) in itertools.product(SIZES, targets.items()):
        yield step_against_trl(size, visual, target)


def step_against_trl(size: str, visual: int, target: str) -> dict:
    """Our steps, and between them TRL's with 1 and with 4 accumulation steps: the better counts."""
    run = one_step(size, visual)
    run()  # warm-up
    ours = [seconds(run)]
    theirs = {}
    for accumulate in (1, 4):
        theirs[accumulate] = trl_seconds(size, visual, accumulate, steps=1 if size == "40M" else 2)
        ours.append(seconds(run))
    medians = {accumulate: statistics.median(times) for accumulate, times in theirs.items()}
    best = min(medians, key=medians.get)
    ratios = [their_time / our_time for their_time in theirs[best] for our_time in ours]
    described = [f"{number} accumulation steps {time:.1f} s" for number, time in medians.items()]
    return measurement(
        "step",
        setting_of(size, visual),
        ours=statistics.median(ours),
        theirs=medians[best],
        ratio=medians[best] / statistics.median(ours),
        low=min(ratios),
        high=max(ratios),
        target=target,
        note="TRL " + ", ".join(described),
    )


def trl_seconds(size: str, visual: int, accumulate: int, steps: int) -> list[float]:
    """Seconds of TRL's steps but the first, with the same prompts, G and lengths."""
    printed = in_a_process(
        "tools.trl_peer",
        size,
        visual,
        accumulate,
        steps,
        environment={"HF_HUB_OFFLINE": "1"},
    )
    return json.loads(next(text for text in printed.splitlines() if text.startswith("[")))


# ---------------------------------------------------------------------------------- memory on paper


WAYS_TO_HOLD = {
    "full": {"checkpointing": False, "rank": 0},
    "full, checkpointed": {"checkpointing": True, "rank": 0},
    "LoRA": {"checkpointing": False, "rank": 16},
    "LoRA, checkpointed": {"checkpointing": True, "rank": 16},
}


def one_memory(size: str, visual: int, checkpointing: bool, rank: int) -> Way:
    """The function of one_update, run once so that the weights' gradients are there already."""
    policy = policy_of(size)
    if rank:
        settings = SimpleNamespace(rank=rank, alpha=32, targets=lora.TARGETS)
        lora.add(policy, settings, seed=0)
    if checkpointing:
        policy.hf.gradient_checkpointing_enable({"use_reentrant": False})
    run = one_update(size, visual, "packed")
    run()

    def keep_gradients(**_) -> None:
        pass

    policy.zero_grad = keep_gradients
    return run


def one_decoding(size: str, visual: int, new: int) -> Way:
    """The function of one_rollout, after a short one, so that libraries are loaded already."""
    one_rollout(size, visual, "ours", new=2)()
    return one_rollout(size, visual, "ours", new=new)


def rollout_on_paper(size: str, visual: int, new: int) -> float:
    """Megabytes that the formula gives for one_decoding at its last step."""
    policy = policy_of(size)
    text = policy.hf.config.text_config
    wave = estimate.Decoding(
        text,
        prompts=PROMPTS,
        prompt=len(prompts_of(policy, visual)[0].input_ids),
        group=GROUP,
        new=new,
        width=4,
        pace=ON_CPU,
    )
    return (wave.cache_bytes() + wave.row_bytes() + wave.sampling_bytes()) / 2**20


def memory_on_paper(size: str, visual: int, checkpointing: bool, rank: int) -> float:
    """Megabytes that the formula gives for one_memory."""
    policy = policy_of(size)
    kept, working = estimate.update_bytes(
        policy.hf.config,
        len(prompts_of(policy, visual)[0].input_ids),
        visual,
        group=GROUP,
        new=NEW,
        width=4,
        checkpointing=checkpointing,
        rank=rank,
    )
    return (kept + working) / 2**20


def on_paper(setting: str, paper: float, peak: float) -> dict:
    """Megabytes by the formula, and those that were measured."""
    return measurement(
        "estimate",
        setting,
        ours=paper,
        theirs=peak,
        ratio=peak / paper,
        low=peak / paper,
        high=peak / paper,
        target="0.85 … 1.15",
        note="ours: MB by the formula; theirs: MB measured",
    )


def estimated() -> Iterator[dict]:
    """The memory formulas against measured peaks; then what they say of the released models."""
    for size, visual, way in itertools.product(SIZES, PIXELS, WAYS_TO_HOLD):
        peak = peak_megabytes("memory", size, visual, way)
        paper = memory_on_paper(size, visual, **WAYS_TO_HOLD[way])
        yield on_paper(f"{setting_of(size, visual)}, {way}", paper, peak)
    # Responses so long that decoding holds more than the prefill before it.
    for size, new in itertools.product(SIZES, (256, 512)):
        peak = peak_megabytes("decoding", size, 100, new)
        paper = rollout_on_paper(size, 100, new)
        yield on_paper(f"{size}, decoding {new} tokens", paper, peak)
    estimate.print_plans()


# ---------------------------------------------------------------------------------- small functions


def one_scoring(way: str, tokens: int, vocabulary: int, backward: bool) -> Way:
    """A function that computes log-probabilities and entropies of random states.

    way: "chunked", as in the policy, or "full", with all logits at once.
    """
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(tokens, 256, generator=generator).requires_grad_()
    weight = torch.randn(vocabulary, 256, generator=generator).requires_grad_()
    targets = torch.randint(0, vocabulary, (tokens,), generator=generator)
    suppressed = torch.tensor([0])

    def chunked() -> torch.Tensor:
        logprobs, *_ = TokenLogprobs.apply(
            hidden,
            weight,
            targets,
            1.0,
            suppressed,
            Policy.CHUNK,
            model._chunk_forward,
            model._chunk_slope,
        )
        return logprobs

    def full() -> torch.Tensor:
        lowest = torch.finfo(torch.float32).min
        logits = (hidden @ weight.T).index_fill(1, suppressed, lowest)
        logprobs = logits.log_softmax(-1).gather(-1, targets[:, None])[:, 0]
        with torch.no_grad():
            (logits.softmax(-1) * logits).sum(-1)  # the entropy, which both log
        return logprobs

    def run():
        hidden.grad = None
        weight.grad = None
        with torch.set_grad_enabled(backward):
            logprobs = chunked() if way == "chunked" else full()
        if backward:
            logprobs.sum().backward()

    return run


def logprobs() -> Iterator[dict]:
    """Chunked log-probabilities against full logits; both give entropies."""
    tokens = 2048
    vocabulary = 32000
    for backward, target in ((False, ">= 0.91 (1.1×)"), (True, ">= 0.71 (1.4×)")):
        memory = [
            peak_megabytes("scoring", way, tokens, vocabulary, int(backward))
            for way in ("chunked", "full")
        ]
        passes = "forward + backward" if backward else "forward"
        measured = compare(
            "logprobs",
            f"{passes}, {tokens} × {vocabulary}",
            ours=one_scoring("chunked", tokens, vocabulary, backward=backward),
            theirs=one_scoring("full", tokens, vocabulary, backward=backward),
            rounds=5,
            target=target,
            note=peaks(*memory),
        )
        yield measured | {"peak_mb": memory}


def signals() -> Iterator[dict]:
    """dyco.attention_signals compiled, against itself uncompiled."""
    compiled = torch.compile(dyco.attention_signals, dynamic=True)
    for responses, queries, keys in ((8, 64, 200), (8, 64, 700), (32, 256, 1200)):
        attention = torch.rand(responses, queries, keys).softmax(-1)
        visual = (torch.arange(keys) < keys // 2).expand(responses, keys)
        text = (~visual)[:, None].expand(attention.shape)
        yield compare(
            "signals",
            f"{responses} × {queries} queries × {keys} keys",
            ours=partial(compiled, attention, visual, text),
            theirs=partial(dyco.attention_signals, attention, visual, text),
            rounds=9,
            target=">= 1.5",
        )


# ------------------------------------------------------------------------------------------- growth

# What grows, and the points (visual tokens, responses, tokens of a response) at which it is timed.
GROWING = {
    "G = 2 … 32": [(100, group, 64) for group in (2, 4, 8, 16, 32)],
    "P = 100 … 2000": [(visual, 8, 64) for visual in (100, 200, 400, 1000, 2000)],
    "T = 32 … 512": [(100, 8, new) for new in (32, 64, 128, 256, 512)],
}


def growth() -> Iterator[dict]:
    """How time grows with G, P and T, beside the count of operations."""
    for setting, points in GROWING.items():
        times, counts = zip(*(timed_and_counted(*point) for point in points), strict=True)
        axis = next(values for values in zip(*points, strict=True) if len(set(values)) > 1)
        measured = exponent(axis, times)
        counted = exponent(axis, counts)
        yield measurement(
            "growth",
            setting,
            ours=measured,
            theirs=counted,
            ratio=measured / counted,
            low=measured / counted,
            high=measured / counted,
            target="exponent <= that of the count",
            note="ours: exponent of the time; theirs: of the operations",
        )


def timed_and_counted(visual: int, group: int, new: int) -> tuple[float, float]:
    """Seconds of a packed update, and its operations."""
    policy = policy_of("3M")
    (prompt,) = prompts_of(policy, visual)
    tokens = torch.randint(0, 300, (group, new))
    mask = torch.ones_like(tokens, dtype=torch.bool)

    def run():
        policy.zero_grad(set_to_none=True)
        policy([prompt], tokens, mask).logprobs.sum().backward()

    run()  # warm-up
    time = statistics.median(seconds(run) for _ in range(3))
    length = len(prompt.input_ids)
    return time, operations(policy, visual, length, new=new, group=group, packed=True)


def exponent(axis: tuple, values: tuple) -> float:
    """The power with which the values grow from the first to the last point of the axis."""
    return math.log(values[-1] / values[0]) / math.log(axis[-1] / axis[0])


# --------------------------------------------------------------------------------------------- main

ROWS = {
    "update": update,
    "rollout": rollout,
    "capture": capture,
    "step": step,
    "dyco": dyco_cost,
    "credit": credit,
    "logprobs": logprobs,
    "signals": signals,
    "growth": growth,
    "estimate": estimated,
    "count": counted.count,
    "decode": decoded.decode,
}


def job_of(name: str, arguments: list[str]) -> Way:
    """The function whose memory `peak_megabytes` measures in a process of its own."""
    if name == "scoring":
        way, tokens, vocabulary, backward = arguments
        return one_scoring(way, int(tokens), int(vocabulary), backward=backward == "1")
    size, visual, way = arguments
    if name == "update":
        return one_update(size, int(visual), way)
    if name == "rollout":
        return one_rollout(size, int(visual), way)
    if name == "decoding":
        return one_decoding(size, int(visual), new=int(way))
    if name == "memory":
        return one_memory(size, int(visual), **WAYS_TO_HOLD[way])
    if name == "step":
        return one_step(size, int(visual), with_dyco=way == "on")
    raise ValueError(f"no job {name!r}")


def measure(names: list[str]) -> list[dict]:
    """The measurements of some rows, each printed as soon as it is made."""
    print(f"torch {torch.__version__}, {THREADS} threads, load {os.getloadavg()[0]:.1f}")
    measurements = []
    for name in names:
        for measured in ROWS[name]():
            if "ratio" in measured:  # the others have printed a table of their own
                print(line(measured), flush=True)
            measurements.append(measured)
    return measurements


@command()
def main(arguments: list[str]) -> None:
    if arguments[:1] in (["-h"], ["--help"]):
        print(__doc__)
        sys.exit()
    torch.set_num_threads(THREADS)
    torch.manual_seed(0)
    if arguments[:1] == ["--job"]:
        print(growth_of_memory(job_of(arguments[1], arguments[2:])))
        return
    if arguments[:1] == ["gpu"]:
        sys.exit(bench_gpu.main(arguments[1:]))
    unknown = [name for name in arguments if name not in ROWS]
    if unknown:
        sys.exit(f"no row {', '.join(unknown)}; rows: {', '.join(ROWS)}\n\n{__doc__}")
    measurements = measure(arguments or list(ROWS))
    written = {"torch": torch.__version__, "threads": THREADS, "rows": measurements}
    with open("bench.json", "w") as file:
        json.dump(written, file, indent=1)


if __name__ == "__main__":
    main(sys.argv[1:])
