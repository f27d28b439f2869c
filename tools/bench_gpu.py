"""The row `gpu` of the bench: how much of a GPU the 3B shape of Qwen2.5-VL uses.

    python -m tools.bench gpu                # prints a table and writes bench_gpu.json
    python -m tools.bench gpu --shape tiny   # the same code with a tiny model, on a CPU, too

Weights are random and made on the device, arithmetic is bfloat16 over float32 weights as in
training. What a part reaches is compared with what the same device reached in the same run: with a
copy of a large tensor (the bandwidth), or with a large product in bfloat16 (the operations).
"""

from __future__ import annotations

import gc
import json
import statistics
import time
from collections.abc import Callable, Iterator
from functools import partial
from types import SimpleNamespace
from typing import NamedTuple

import torch

from attention import pace_on
from config import DEFAULTS, load_config
from data import Prompt
from distributed import World
from metrics import resident_bytes
from rollout import generate
from tools import estimate
from tools.measuring import growth_of_memory, operations, prompts_of, sample_of, step_of
from tools.shapes import SHAPES, Shape, build_model, build_policy

ROUNDS = 3  # of each timing, after a warm-up; the median counts
CAPTURE = SimpleNamespace(layers=[-1], shift="fisher_rao", text_scope="after_image")


# ---------------------------------------------------------------------------------- time and memory


def finish(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize()


def elapsed(device: torch.device, way: Callable[[], object]) -> float:
    """Seconds that a call takes, work of the device included."""
    way()  # warm-up
    times = []
    for _ in range(ROUNDS):
        finish(device)
        started = time.perf_counter()
        way()
        finish(device)
        times.append(time.perf_counter() - started)
    return statistics.median(times)


def peak_bytes(device: torch.device, way: Callable[[], object]) -> float:
    """The most memory in use during a call; on a CPU that of the whole process."""
    if device.type == "cpu":
        return resident_bytes() + growth_of_memory(way) * 2**20
    torch.cuda.reset_peak_memory_stats()
    way()
    return torch.cuda.max_memory_allocated()


def measure_bandwidth(shape: Shape, device: torch.device) -> float:
    """Bytes a second that a copy reads and writes."""
    source = torch.ones(shape.copied, dtype=torch.uint8, device=device)
    target = torch.zeros_like(source)
    return 2 * shape.copied / elapsed(device, partial(target.copy_, source))


def measure_flops(shape: Shape, device: torch.device) -> float:
    """Operations a second of a product in bfloat16, where an addition is one, too."""
    size = shape.multiplied
    # Random numbers: a GPU that multiplies equal ones needs less power, and is faster than usual.
    factor = torch.randn(size, size, device=device).to(torch.bfloat16)
    return 2 * size**3 / elapsed(device, partial(torch.mm, factor, factor))


# ---------------------------------------------------------------------------------------- the parts


class Reached(NamedTuple):
    """What a part measured, and the share of what was possible that it reached."""

    value: float
    unit: str
    share: float
    of: str  # what was possible


class Bench:
    """What all parts share: the policy, its prompts, and what the device reaches."""

    def __init__(self, shape: Shape, device: torch.device):
        self.shape = shape
        self.device = device
        self.bandwidth = measure_bandwidth(shape, device)
        self.flops = measure_flops(shape, device)
        self.policy = build_policy(shape, device)
        self.prompts: list[Prompt] = prompts_of(self.policy, shape.visual, shape.prompts)
        self.weights = estimate.weights_of(self.policy.hf)
        self.wave = estimate.Decoding(
            self.policy.hf.config.text_config,
            prompts=shape.prompts,
            prompt=len(self.prompts[0].input_ids),
            group=shape.group,
            new=shape.new,
            width=estimate.BFLOAT16,
            pace=pace_on(device),
        )

    def decode(self, way: Callable[[int], object]) -> Reached:
        """way(new): samples so many tokens for each response."""
        steps = self.shape.new - 1  # the prefill gives the first token
        whole = elapsed(self.device, partial(way, self.shape.new))
        # A tiny model on a noisy machine can decode faster than the noise of its prefill.
        decoding = max(whole - elapsed(self.device, partial(way, 1)), 1e-2 * whole)
        read = steps * self.wave.step_bytes(self.weights.multiplied, steps)
        speed = self.wave.rows * steps / decoding
        return Reached(speed, "tokens/s", read / self.bandwidth / decoding, "of the bandwidth")

    def decode_ours(self, graphs: bool, capture) -> Reached:
        self.policy.graphs = graphs

        def way(new: int):
            generate(
                self.policy,
                self.prompts,
                self.shape.group,
                max_new_tokens=new,
                key=(0, 0),
                capture=capture,
            )

        try:
            return self.decode(way)
        finally:
            self.policy.graphs = True

    def decode_stock(self) -> Reached:
        """transformers' own generate, which copies each prompt to its responses."""
        prompts, device = self.prompts, self.device
        # A static cache has the dtype of the weights, so here they have 16 bits.
        hf = build_model(self.shape, self.policy.tokenizer, device, dtype=torch.bfloat16)
        inputs = {
            "input_ids": torch.stack([prompt.input_ids for prompt in prompts]),
            "attention_mask": torch.stack([torch.ones_like(p.input_ids) for p in prompts]),
            "mm_token_type_ids": torch.stack([prompt.visual_mask for prompt in prompts]).int(),
            "pixel_values": torch.cat([prompt.pixel_values for prompt in prompts]),
            "image_grid_thw": torch.cat([prompt.image_grid_thw for prompt in prompts]),
        }
        inputs = {name: tensor.to(device) for name, tensor in inputs.items()}

        def way(new: int):
            hf.generate(
                **inputs,
                num_return_sequences=self.shape.group,
                do_sample=True,
                top_k=0,
                max_new_tokens=new,
                min_new_tokens=new,
                cache_implementation="static",
            )

        return self.decode(way)

    def forward_flops(self, group: int, new: int) -> tuple[float, float]:
        """Operations of a packed forward: those of the text model, and those of the image."""
        length = len(self.prompts[0].input_ids)
        counted = partial(operations, self.policy, length=length, new=new, group=group, packed=True)
        text = counted(0)
        return 2 * text, 2 * (counted(self.shape.visual) - text)

    def prefill(self) -> Reached:
        """A rollout of a single token."""

        def way():
            generate(self.policy, self.prompts, 1, max_new_tokens=1, key=(0, 0))

        counted = self.shape.prompts * sum(self.forward_flops(group=1, new=1))
        seconds = elapsed(self.device, way)
        return Reached(seconds, "s", counted / seconds / self.flops, "of the operations")

    def update(self) -> Reached:
        """Forward and backward of one group. What checkpointing computes again does not count."""
        group, new = self.shape.group, self.shape.new
        tokens = torch.randint(0, 300, (group, new), device=self.device)
        mask = torch.ones_like(tokens, dtype=torch.bool)

        def way():
            self.policy.zero_grad(set_to_none=True)
            self.policy(self.prompts[:1], tokens, mask).logprobs.sum().backward()

        text, image = self.forward_flops(group, new)
        seconds = elapsed(self.device, way)
        self.policy.zero_grad(set_to_none=True)
        # The vision tower is frozen: it has no backward, which is twice the forward.
        counted = 3 * text + image
        return Reached(seconds, "s", counted / seconds / self.flops, "of the operations")

    def make_step(self) -> Callable[[], dict]:
        shape = self.shape
        settings = [
            "algo.kl=0",  # without the reference policy
            "algo.dynamic_sampling=false",
            f"rollout.prompts_per_step={shape.prompts}",
            f"rollout.group_size={shape.group}",
            f"rollout.max_new_tokens={shape.new}",
        ]
        config = load_config(DEFAULTS.with_name("config_3b.yaml"), settings)
        samples = [sample_of(shape.visual, index) for index in range(shape.prompts)]
        return step_of(self.policy, samples, config, World(0, 1, self.device))

    def step(self) -> Reached:
        """A training step, against what tools/estimate.py would say of this device."""
        steps = self.shape.new - 1
        read = steps * self.wave.step_bytes(self.weights.multiplied, steps)
        tokens = self.wave.prompts * (self.wave.prompt + self.wave.group * self.wave.new)
        # Scoring is one forward; the update is a forward, another one, and a backward.
        counted = 10 * tokens * self.weights.multiplied
        paper = read / self.bandwidth / estimate.REACHED + counted / self.flops / estimate.USED
        seconds = elapsed(self.device, self.make_step())
        return Reached(seconds, "s", paper / seconds, "of the speed on paper")

    def memory(self) -> Reached:
        """The peak of a step, against the formulas of tools/estimate.py."""
        wave, weights = self.wave, self.weights
        always = estimate.FLOAT32 * weights.tower + estimate.BFLOAT16 * weights.trained
        activations = estimate.update_bytes(
            self.policy.hf.config,
            wave.prompt,
            self.shape.visual,
            group=wave.group,
            new=wave.new,
            width=estimate.BFLOAT16,
            checkpointing=True,
            frozen=True,
        )
        update = estimate.ADAMW * weights.trained + sum(activations)
        states = (estimate.ADAMW - estimate.FLOAT32) * weights.trained
        decoding = states + wave.cache_bytes() + wave.row_bytes() + wave.sampling_bytes()
        step = self.make_step()
        step()  # warm-up, and the states of AdamW
        peak = peak_bytes(self.device, step)
        paper = always + max(update, decoding)
        return Reached(peak / 1e9, "GB", peak / paper, "of the formula")

    def parts(self) -> dict[str, Callable[[], Reached]]:
        return {
            "decode, graphs": partial(self.decode_ours, graphs=True, capture=None),
            "decode, graphs, attention captured": partial(
                self.decode_ours, graphs=True, capture=CAPTURE
            ),
            "decode, no graphs": partial(self.decode_ours, graphs=False, capture=None),
            "decode, no graphs, attention captured": partial(
                self.decode_ours, graphs=False, capture=CAPTURE
            ),
            "generate of transformers, static cache": self.decode_stock,
            "prefill": self.prefill,
            "update of one group": self.update,
            "training step": self.step,
            "memory of a training step": self.memory,
        }


# -------------------------------------------------------------------------------------- the command


def measured_parts(bench: Bench) -> Iterator[dict]:
    """A line of each part. One that fails says why, and the others go on."""
    for name, part in bench.parts().items():
        try:
            reached = part()
        except Exception as error:  # out of memory, or whatever a new device makes stumble
            first_line = (str(error).splitlines() or [""])[0]
            yield {"part": name, "failed": f"{type(error).__name__}: {first_line}"}
        else:
            yield {"part": name, **reached._asdict()}
        gc.collect()
        if bench.device.type == "cuda":
            torch.cuda.empty_cache()


def in_words(measured: dict) -> str:
    if "failed" in measured:
        return f"{measured['part']:<40} failed: {measured['failed']}"
    return "{part:<40} {value:12.3f} {unit:<9} {share:7.1%} {of}".format(**measured)


def describe(name: str, bench: Bench) -> dict:
    """What was run, and on what."""
    import transformers

    wave = bench.wave
    is_gpu = bench.device.type == "cuda"
    return {
        "device": torch.cuda.get_device_name() if is_gpu else "CPU",
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "shape": name,
        "weights": bench.weights.whole,
        "prompts": wave.prompts,
        "prompt_tokens": wave.prompt,
        "group": wave.group,
        "response_tokens": wave.new,
        "bandwidth": bench.bandwidth,
        "flops": bench.flops,
    }


def main(arguments: list[str]) -> int:
    """Measure, print, and write bench_gpu.json. The exit status."""
    options = {(): "3b", ("--shape", "3b"): "3b", ("--shape", "tiny"): "tiny"}
    name = options.get(tuple(arguments))
    if name is None:
        print(f"expected nothing or --shape {' | '.join(SHAPES)}, found {' '.join(arguments)}")
        return 2
    if name != "tiny" and not torch.cuda.is_available():
        print("no GPU here: nothing was measured (--shape tiny runs on a CPU)")
        return 2
    bench = Bench(SHAPES[name], torch.device("cuda" if torch.cuda.is_available() else "cpu"))
    written = describe(name, bench) | {"lines": []}
    print(
        "{device}, torch {torch}, transformers {transformers}\n"
        "{prompts} prompts of {prompt_tokens} tokens, {group} responses of {response_tokens} "
        "tokens each\n"
        "reached with a copy {gigabytes:.0f} GB/s, with a product {tera:.2f} TFLOP/s".format(
            **written, gigabytes=bench.bandwidth / 1e9, tera=bench.flops / 1e12
        )
    )
    for measured in measured_parts(bench):
        print(in_words(measured), flush=True)
        written["lines"].append(measured)
        with open("bench_gpu.json", "w") as file:
            json.dump(written, file, indent=1)
    return 0
