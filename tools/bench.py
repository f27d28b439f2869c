"""bench.py: the performance of this project, as ratios measured side by side in one run.

    python bench.py                  # every row; prints a table and writes bench.json
    python bench.py update rollout   # some rows; bench.json then has these alone

Rounds of the compared ways are interleaved; the ratio is the median over rounds, with the smallest and the largest.
Peak memory is that of a process of its own. Run nothing else meanwhile.
TRL is a peer of the row `step`, if it is installed (pip install -r requirements-bench.txt).
"""

import gc
import json
import math
import os
import statistics
import subprocess
import sys
import threading
import time
from functools import lru_cache
from types import SimpleNamespace

import torch
from PIL import Image

import dyco
import model
import toy
from attention import ATTENTION
from config import DEFAULTS, load_config
from data import Sample, encode_prompt
from distributed import resident_bytes
from model import Policy, TokenLogprobs
from rollout import generate

THREADS = int(os.environ.get("OMP_NUM_THREADS", 2))
GROUP = 8
PIXELS = {100: (280, 280), 600: (700, 672)}  # visual tokens -> width, height
SIZES = {"3M": dict(hidden=192, layers=6), "40M": dict(hidden=512, layers=8, vocabulary=32000)}
CAPTURE = SimpleNamespace(layers=[-1], shift="fisher_rao", text_scope="after_image")
# glibc hands freed memory back at once, so that a second run is not served from what a first one left
RETURN_FREED = {
    "MALLOC_MMAP_THRESHOLD_": "16384",
    "MALLOC_TRIM_THRESHOLD_": "16384",
    "MALLOC_TOP_PAD_": "0",
}
TABLE: list[dict] = []


# ------------------------------------------------------------------------------------------------------------- helpers


@lru_cache(maxsize=1)
def policy_of(size: str) -> Policy:
    tokenizer = toy.build_tokenizer(toy.LEVELS[1], load_config().data.prompt_template)
    return Policy(toy.build_model(tokenizer, **SIZES[size]), tokenizer, toy.build_image_processor())


def sample_of(visual: int, index: int = 0) -> Sample:
    width, height = PIXELS[visual] if visual in PIXELS else (28 * visual // 10, 280)
    noise = torch.randint(
        0,
        256,
        (height, width, 3),
        dtype=torch.uint8,
        generator=torch.Generator().manual_seed(index),
    )
    return Sample(
        str(index), (Image.fromarray(noise.numpy()),), "<image>Sum circle, cross, square.", "6"
    )


def prompts_of(policy: Policy, visual: int, count: int = 1) -> list:
    template = load_config().data.prompt_template
    return [
        encode_prompt(sample_of(visual, i), i, policy.tokenizer, policy.image_processor, template)
        for i in range(count)
    ]


def seconds(way) -> float:
    gc.collect()
    started = time.perf_counter()
    way()
    return time.perf_counter() - started


def compare(row: str, setting: str, ours, theirs, rounds: int, target: str, note: str = "") -> dict:
    """Time two ways by turns; the ratio is theirs / ours, above 1 where ours is faster."""
    ours(), theirs()  # warm-up
    pairs = [(seconds(ours), seconds(theirs)) for _ in range(rounds)]
    ratios = sorted(b / a for a, b in pairs)
    return report(
        row,
        setting,
        statistics.median(a for a, _ in pairs),
        statistics.median(b for _, b in pairs),
        statistics.median(ratios),
        ratios[0],
        ratios[-1],
        target,
        note,
    )


def report(row, setting, ours, theirs, ratio, low, high, target, note="") -> dict:
    TABLE.append(
        dict(
            row=row,
            setting=setting,
            ours=ours,
            theirs=theirs,
            ratio=ratio,
            low=low,
            high=high,
            target=target,
            note=note,
        )
    )
    print(
        f"{row:<10} {setting:<34} ours {ours:8.3f}  theirs {theirs:8.3f}  ratio {ratio:5.2f} ({low:.2f} … {high:.2f})  "
        f"target {target}  {note}",
        flush=True,
    )
    return TABLE[-1]


def growth_of_memory(job) -> float:
    """Megabytes by which resident memory rises while a job runs, looked at every two milliseconds."""
    resident = lambda: resident_bytes() / 2**20
    done, seen = threading.Event(), [resident()]

    def watch():
        while not done.wait(0.002):
            seen.append(resident())

    watcher = threading.Thread(target=watch)
    watcher.start()
    job()
    done.set()
    watcher.join()
    return max(seen) - seen[0]


def peak_megabytes(*job: str) -> float:
    """Peak resident memory of one job of JOBS in a process of its own, above what it held before the job."""
    done = subprocess.run(
        [sys.executable, "-m", "tools.bench", "--job", *map(str, job)],
        capture_output=True,
        text=True,
        check=True,
        env={**os.environ, "OMP_NUM_THREADS": str(THREADS), **RETURN_FREED},
    )
    return float(done.stdout.splitlines()[-1])


# -------------------------------------------------------------------------------------------------- the packed update


def padded_logprobs(policy: Policy, prompt, tokens: torch.Tensor) -> torch.Tensor:
    """The usual way: the stock forward on G rows [prompt | response], the image encoded once per row."""
    rows, hf = len(tokens), policy.hf
    hf.model.rope_deltas = None
    hf.config.text_config._attn_implementation = "sdpa"
    ids = torch.cat([prompt.input_ids.expand(rows, -1), tokens], dim=1)
    image = torch.cat(
        [prompt.visual_mask.expand(rows, -1), torch.zeros_like(tokens, dtype=torch.bool)], dim=1
    )
    hidden = hf.model(
        input_ids=ids,
        mm_token_type_ids=image.int(),
        use_cache=False,
        pixel_values=prompt.pixel_values.repeat(rows, 1),
        image_grid_thw=prompt.image_grid_thw.repeat(rows, 1),
    )[0]
    hf.config.text_config._attn_implementation = ATTENTION
    hidden = hidden[:, len(prompt.input_ids) - 1 : -1].reshape(tokens.numel(), -1)
    return TokenLogprobs.apply(
        hidden,
        hf.lm_head.weight,
        tokens.flatten(),
        policy.temperature,
        policy.suppressed,
        policy.CHUNK,
        policy.forward_chunk,
        policy.backward_chunk,
    )[0].view(tokens.shape)


def operations(
    policy: Policy, visual: int, length: int, new: int, group: int, packed: bool
) -> float:
    """Multiply-adds of one forward: linear layers, attention pairs, vision tower, language-model head."""
    text, vision = policy.hf.config.text_config, policy.hf.config.vision_config
    decoder = sum(p.numel() for p in policy.hf.model.language_model.layers.parameters())
    merger = sum(
        p.numel() for p in policy.hf.model.visual.merger.parameters()
    )  # is run once per four patches
    tower = sum(p.numel() for p in policy.hf.model.visual.parameters()) - merger * 3 / 4
    patches = 4 * visual
    window = (vision.window_size // vision.patch_size) ** 2
    full = len(vision.fullatt_block_indexes)
    images = 1 if packed else group
    see = images * (
        patches * tower
        + 2
        * patches
        * vision.hidden_size
        * (full * patches + (vision.depth - full) * min(window, patches))
    )
    if packed:
        tokens, pairs = (
            length + group * (new - 1),
            length**2 / 2 + group * (new - 1) * (length + new / 2),
        )
    else:
        tokens, pairs = group * (length + new), group * (length + new) ** 2 / 2
    think = tokens * decoder + 2 * pairs * text.hidden_size * text.num_hidden_layers
    return see + think + group * new * text.hidden_size * text.vocab_size


def one_update(size: str, visual: int, way: str):
    """A function that runs forward and backward of one group, packed or padded, and returns the log-probabilities."""
    policy = policy_of(size)
    (prompt,), new = prompts_of(policy, visual), 64
    tokens = torch.randint(0, 300, (GROUP, new), generator=torch.Generator().manual_seed(0))
    mask = torch.ones_like(tokens, dtype=torch.bool)

    def run():
        policy.zero_grad(set_to_none=True)
        logprobs = (
            policy([prompt], tokens, mask).logprobs
            if way == "packed"
            else padded_logprobs(policy, prompt, tokens)
        )
        logprobs.sum().backward()
        return logprobs.detach()

    return run


def update() -> None:
    """Forward and backward of one group: same model, same log-probabilities, same gradients."""
    for size in SIZES:
        for visual in PIXELS:
            packed, padded = one_update(size, visual, "packed"), one_update(size, visual, "padded")
            apart = float((packed() - padded()).abs().max())
            assert apart < 1e-3, apart
            policy, length = policy_of(size), len(prompts_of(policy_of(size), visual)[0].input_ids)
            ideal = operations(policy, visual, length, 64, GROUP, False) / operations(
                policy, visual, length, 64, GROUP, True
            )
            memory = [peak_megabytes("update", size, visual, way) for way in ("packed", "padded")]
            found = compare(
                "update",
                f"{size}, {visual} visual tokens",
                packed,
                padded,
                5 if size == "3M" else 3,
                f">= {0.9 * ideal:.2f} (90 % of {ideal:.2f})",
                f"peak {memory[0]:.0f} against {memory[1]:.0f} MB",
            )
            found.update(ideal=ideal, peak_mb=memory)


# --------------------------------------------------------------------------------------------------------- the rollout


def one_rollout(size: str, visual: int, way: str, new: int = 64):
    """A function that samples 4 prompts × 8 responses of exactly `new` tokens."""
    policy = policy_of(size)
    prompts = prompts_of(policy, visual, 4)
    policy.eos_ids = set()  # nobody stops early: both ways decode the same number of tokens

    def ours():
        generate(policy, prompts, GROUP, new, (0, 0), CAPTURE)

    def theirs():
        """transformers.generate; "naive" keeps every attention matrix, as eager attention returns it."""
        hf, attentions = policy.hf, way == "naive"
        hf.model.rope_deltas = None
        hf.config.text_config._attn_implementation = "eager" if attentions else "sdpa"
        try:
            return hf.generate(
                input_ids=torch.stack([p.input_ids for p in prompts]),
                mm_token_type_ids=torch.stack([p.visual_mask for p in prompts]).int(),
                attention_mask=torch.ones(4, len(prompts[0].input_ids), dtype=torch.long),
                pixel_values=torch.cat([p.pixel_values for p in prompts]),
                image_grid_thw=torch.cat([p.image_grid_thw for p in prompts]),
                num_return_sequences=GROUP,
                do_sample=True,
                top_k=0,
                temperature=1.0,
                max_new_tokens=new,
                min_new_tokens=new,
                output_attentions=attentions,
                return_dict_in_generate=True,
            )
        finally:
            hf.config.text_config._attn_implementation = ATTENTION

    return ours if way == "ours" else theirs


def rollout() -> None:
    """Sampling with the attention captured, against generate without it."""
    for size in SIZES:
        for visual, target in ((100, ">= 2"), (600, ">= 3")):
            compare(
                "rollout",
                f"{size}, {visual} visual tokens",
                one_rollout(size, visual, "ours"),
                one_rollout(size, visual, "generate"),
                3,
                target,
                "4 × 8 responses of 64 tokens",
            )


def capture() -> None:
    """Sampling with the attention captured, against generate with output_attentions=True."""
    for size, visual in (("3M", 100), ("3M", 600), ("40M", 600)):
        memory = [peak_megabytes("rollout", size, visual, way) for way in ("ours", "naive")]
        found = compare(
            "capture",
            f"{size}, {visual} visual tokens",
            one_rollout(size, visual, "ours"),
            one_rollout(size, visual, "naive"),
            3,
            ">= 5 at 600, peak <= 1/2" if visual == 600 else "-",
            f"peak {memory[0]:.0f} against {memory[1]:.0f} MB",
        )
        found["peak_mb"] = memory


# ------------------------------------------------------------------------------------------------------------ the step


def one_step(size: str, visual: int, with_dyco: bool = True, new: int = 64):
    """A function that runs rollout, DyCo and one update of 4 prompts × 8 responses by the project's own stages."""
    import train
    from distributed import ALONE

    policy = policy_of(size)
    policy.eos_ids = set()
    config = load_config(
        DEFAULTS,
        [
            "algo.name=dapo",
            "algo.dynamic_sampling=false",
            "algo.mask_truncated=false",
            f"dyco.enabled={str(with_dyco).lower()}",
            "rollout.prompts_per_step=4",
            f"rollout.max_new_tokens={new}",
            "train.updates_per_rollout=1",
            "train.micro_batch_tokens=2048",
        ],
    )
    samples = [sample_of(visual, i) for i in range(4)]
    optimizer = torch.optim.AdamW(policy.parameters(), lr=1e-6)
    sampler = SimpleNamespace(take=lambda n: list(range(n)))
    varied = iter(range(10**9))

    def run():
        train.train_step(
            config, policy, None, optimizer, samples, sampler, 1, ALONE, lambda *_: next(varied) % 3
        )

    return run


def dyco_cost() -> None:
    """The same step without DyCo: the price of the method. Ratio below 1 by as much as DyCo costs."""
    for size, visual in (("3M", 100), ("3M", 600), ("40M", 100)):
        memory = [peak_megabytes("step", size, visual, way) for way in ("on", "off")]
        found = compare(
            "dyco",
            f"{size}, {visual} visual tokens",
            one_step(size, visual),
            one_step(size, visual, False),
            5,
            ">= 0.97, memory <= 1.01",
            f"peak {memory[0]:.0f} against {memory[1]:.0f} MB",
        )
        found["peak_mb"] = memory


def step() -> None:
    """The whole step, rollout to optimizer, against TRL's GRPOTrainer."""
    try:
        import trl  # noqa: F401
    except ImportError:
        print("step       TRL is not installed: pip install -r requirements-bench.txt")
        return
    for size in SIZES:
        for visual, target in ((100, ">= 3"), (600, ">= 6")):
            ours = one_step(size, visual)
            ours()
            mine = [seconds(ours)]
            theirs = {}
            for accumulate in (1, 4):
                theirs[accumulate] = trl_seconds(
                    size, visual, accumulate, steps=1 if size == "40M" else 2
                )
                mine.append(seconds(ours))
            best = min(theirs, key=lambda k: statistics.median(theirs[k]))
            ours_median, ratios = (
                statistics.median(mine),
                sorted(t / m for t in theirs[best] for m in mine),
            )
            report(
                "step",
                f"{size}, {visual} visual tokens",
                ours_median,
                statistics.median(theirs[best]),
                statistics.median(theirs[best]) / ours_median,
                ratios[0],
                ratios[-1],
                target,
                "TRL "
                + ", ".join(
                    f"{k} accumulation steps {statistics.median(v):.1f} s"
                    for k, v in theirs.items()
                ),
            )


def trl_seconds(size: str, visual: int, accumulate: int, steps: int) -> list[float]:
    """Seconds of TRL's steps after a first one, same prompts, G and lengths, in a process of its own."""
    done = subprocess.run(
        [
            sys.executable,
            "-m",
            "tools.bench",
            "--job",
            "trl",
            size,
            str(visual),
            str(accumulate),
            str(steps),
        ],
        capture_output=True,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": str(THREADS), "HF_HUB_OFFLINE": "1"},
    )
    if done.returncode:
        raise RuntimeError(done.stderr[-3000:])
    return json.loads(next(line for line in done.stdout.splitlines() if line.startswith("[")))


def trl_job(size: str, visual: str, accumulate: str, steps: str) -> None:
    """Train a fresh copy of the model with TRL; print the seconds of each step but the first."""
    import tempfile

    from datasets import Dataset
    from transformers import ProcessorMixin, TrainerCallback
    from trl import GRPOConfig, GRPOTrainer

    class Processor(ProcessorMixin):
        """Qwen2.5-VL's processor without the video part, which needs torchvision."""

        attributes, valid_kwargs = ["image_processor", "tokenizer"], ["chat_template"]
        image_processor_class, tokenizer_class = "AutoImageProcessor", "AutoTokenizer"

        def __init__(self, image_processor=None, tokenizer=None, chat_template=None):
            self.image_token = "<|image_pad|>"
            self.image_token_id = tokenizer.convert_tokens_to_ids(self.image_token)
            super().__init__(
                image_processor, tokenizer, chat_template=chat_template or tokenizer.chat_template
            )

        def __call__(self, images=None, text=None, **kwargs):
            from transformers.feature_extraction_utils import BatchFeature

            kwargs = {
                k: v
                for k, v in kwargs.items()
                if k in ("padding", "padding_side", "return_tensors", "add_special_tokens")
            }
            tensors, vision = kwargs.pop("return_tensors", None), {}
            text = [text] if isinstance(text, str) else list(text)
            if images:
                flat = [
                    one
                    for entry in images
                    for one in (entry if isinstance(entry, list) else [entry])
                ]
                vision = self.image_processor(images=flat, return_tensors="pt")
                counts = iter((vision["image_grid_thw"].prod(1) // 4).tolist())
                text = [
                    "".join(
                        part
                        + (self.image_token * next(counts) if i < t.count(self.image_token) else "")
                        for i, part in enumerate(t.split(self.image_token))
                    )
                    for t in text
                ]
            encoded = self.tokenizer(text, **kwargs)
            encoded["mm_token_type_ids"] = [
                [int(i == self.image_token_id) for i in ids] for ids in encoded["input_ids"]
            ]
            return BatchFeature({**encoded, **vision}, tensor_type=tensors)

        @property
        def model_input_names(self):
            return (
                self.tokenizer.model_input_names
                + self.image_processor.model_input_names
                + ["mm_token_type_ids"]
            )

    policy, marks = policy_of(size), []
    policy.hf.config.text_config._attn_implementation = "sdpa"
    policy.hf.generation_config.eos_token_id = None
    template = load_config().data.prompt_template
    rows = [
        {
            "prompt": [
                {
                    "role": "user",
                    "content": template.replace("{question}", "Sum circle, cross, square."),
                }
            ],
            "image": sample_of(int(visual), i).images[0],
        }
        for i in range(4)
    ]
    varied = iter(range(10**9))

    class Clock(TrainerCallback):
        def on_step_end(self, *args, **kwargs):
            marks.append(time.perf_counter())

    with tempfile.TemporaryDirectory() as folder:
        settings = GRPOConfig(
            output_dir=folder,
            per_device_train_batch_size=32 // int(accumulate),
            gradient_accumulation_steps=int(accumulate),
            num_generations=GROUP,
            max_completion_length=64,
            max_steps=int(steps) + 1,
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
                "min_new_tokens": 64,
            },
        )
        trainer = GRPOTrainer(
            model=policy.hf,
            args=settings,
            train_dataset=Dataset.from_list(rows),
            processing_class=Processor(policy.image_processor, policy.tokenizer),
            reward_funcs=lambda completions, **_: [float(next(varied) % 3) for _ in completions],
            callbacks=[Clock()],
        )
        trainer.train()
    print(json.dumps([b - a for a, b in zip(marks, marks[1:])]))


# ---------------------------------------------------------------------------------------------------- memory on paper

SETUPS = {  # what `estimate` plans
    "Qwen2.5-VL-3B on one GPU of 80 GB": dict(
        gpus=1,
        text=dict(
            hidden_size=2048,
            intermediate_size=11008,
            num_hidden_layers=36,
            num_attention_heads=16,
            num_key_value_heads=2,
            vocab_size=151936,
        ),
        tied=True,
    ),
    "Qwen2.5-VL-7B on eight": dict(
        gpus=8,
        text=dict(
            hidden_size=3584,
            intermediate_size=18944,
            num_hidden_layers=28,
            num_attention_heads=28,
            num_key_value_heads=4,
            vocab_size=152064,
        ),
        tied=False,
    ),
}
FLOPS, USED, DECODE_STEP = (
    312e12,
    0.4,
    0.030,
)  # A100 in bfloat16, the share of it that is used, seconds of a decoding step (launch-bound)


def update_bytes(
    config,
    prompt: int,
    visual: int,
    group: int,
    new: int,
    width: int,
    checkpointing: bool,
    frozen: bool = False,
) -> tuple[float, float]:
    """What one group's forward and backward hold beyond weights and their gradients, in bytes: kept from forward to backward, and
    at work in the backward pass.

    width: bytes of a number in the arithmetic's dtype; the residual stream and the norms are float32 in any case. Of a decoder layer,
    each packed token keeps two residuals and two normalised rows in float32; in the arithmetic's dtype two norm outputs, query,
    attention output twice, key and value, four rows of the MLP; each response token a query laid out for its group; and each
    response the keys and values of prompt and response.
    """
    text, vision = config.text_config, config.vision_config
    h, inter, layers = text.hidden_size, text.intermediate_size, text.num_hidden_layers
    kv = 2 * text.num_key_value_heads * h // text.num_attention_heads
    own = group * (new - 1)
    tokens, patches = prompt + own, 4 * visual
    layer = (
        tokens * (16 * h + width * (5 * h + kv + 4 * inter))
        + own * width * h
        + group * (prompt + new) * width * kv
    )
    block = patches * (
        16 * vision.hidden_size + width * (9 * vision.hidden_size + 4 * vision.intermediate_size)
    )
    pixels = patches * (
        width * 3 * vision.temporal_patch_size * vision.patch_size**2
        + 8 * width * vision.hidden_size
    )
    head = (
        4 * min(group * new, Policy.CHUNK) * text.vocab_size + 8 * text.vocab_size * h
    )  # logits of a chunk, its gradient twice
    if checkpointing:  # the inputs of all layers, and at any one time one layer or the head
        return layers * tokens * 4 * h + (
            0 if frozen else pixels + vision.depth * patches * 4 * vision.hidden_size
        ), max(layer, block, head)
    return layers * layer + (0 if frozen else pixels + vision.depth * block), head


def one_memory(size: str, visual: int, checkpointing: bool):
    """The function of one_update, run once before so that the weights' gradients are there already."""
    policy = policy_of(size)
    if checkpointing:
        policy.hf.gradient_checkpointing_enable({"use_reentrant": False})
    run = one_update(size, visual, "packed")
    run()
    policy.zero_grad = lambda **_: None
    return run


def estimate() -> None:
    """The memory formula against measured peaks; then what it says of the released models."""
    for size in SIZES:
        for visual in PIXELS:
            for checkpointing in (False, True):
                policy = policy_of(size)
                length = len(prompts_of(policy, visual)[0].input_ids)
                paper = (
                    sum(update_bytes(policy.hf.config, length, visual, GROUP, 64, 4, checkpointing))
                    / 2**20
                )
                found = peak_megabytes("memory", size, visual, int(checkpointing))
                report(
                    "estimate",
                    f"{size}, {visual} visual tokens" + ", checkpointed" * checkpointing,
                    paper,
                    found,
                    found / paper,
                    found / paper,
                    found / paper,
                    "0.85 … 1.15",
                    "ours: MB by the formula; theirs: MB measured",
                )
    for name, setup in SETUPS.items():
        print(
            f"\n{name}, 16 prompts per GPU and step, prompts of 600 image and 100 text tokens, 8 responses of 400 tokens, 2048 at worst"
        )
        for label, amount, unit in plan(**setup):
            print(f"  {label:<98} {amount:8.1f} {unit}")


def plan(gpus: int, text: dict, tied: bool) -> list[tuple[str, float, str]]:
    """Memory per GPU and time of a step of 16 prompts per GPU, on paper; config_3b.yaml's settings."""
    from transformers import Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration

    vision = dict(
        depth=32,
        hidden_size=1280,
        intermediate_size=3420,
        num_heads=16,
        out_hidden_size=text["hidden_size"],
    )
    config = Qwen2_5_VLConfig(text_config=text, vision_config=vision, tie_word_embeddings=tied)
    with torch.device("meta"):
        hf = Qwen2_5_VLForConditionalGeneration(config)
    count = lambda module: sum(p.numel() for p in module.parameters())
    whole, tower, layer = (
        count(hf),
        count(hf.model.visual),
        count(hf.model.language_model.layers[0]),
    )
    trained = whole - tower
    active = trained - (
        0 if tied else text["vocab_size"] * text["hidden_size"]
    )  # embeddings are looked up, not multiplied by
    G, P, T, mean, prompts = GROUP, 700, 2048, 400, 16
    budget = load_config(DEFAULTS.with_name("config_3b.yaml")).rollout.max_cache_tokens
    cache = (
        2
        * 2
        * text["num_hidden_layers"]
        * text["num_key_value_heads"]
        * text["hidden_size"]
        // text["num_attention_heads"]
    )
    at_once = 2 * (trained if gpus == 1 else whole - layer * (text["num_hidden_layers"] - 2))
    kept, working = update_bytes(config, P, 600, G, T, 2, True, frozen=True)
    states = 16 * trained / gpus + 4 * tower / gpus
    reference = 2 * whole / gpus
    rollout = 2 * (trained if gpus == 1 else whole) + budget * cache
    of = f" / {gpus}" if gpus > 1 else ""
    rows = [
        (
            f"weights, gradients, AdamW in float32: 16 · {trained / 1e9:.2f} B{of}",
            16 * trained / gpus,
        ),
        (f"frozen vision tower, float32: 4 · {tower / 1e9:.2f} B{of}", 4 * tower / gpus),
        (f"reference policy, bfloat16 (algo.kl > 0): 2 · {whole / 1e9:.2f} B{of}", reference),
        (
            "bfloat16 copies of the weights in use"
            + (
                ": those that are trained"
                if gpus == 1
                else ": two layers, embeddings, head, vision tower"
            ),
            at_once,
        ),
        *(
            (
                [
                    (
                        "their gradients before they are scattered, bfloat16 and float32",
                        3 * (at_once - 2 * tower),
                    )
                ]
            )
            if gpus > 1
            else []
        ),
        (f"activations, checkpointed, one group of {G} responses of {T} tokens", kept),
        (
            "one layer while it is computed again, or a chunk of logits and the gradient of the head",
            working,
        ),
    ]
    peak = sum(amount for _, amount in rows)
    table = [(label, amount / 1e9, "GB") for label, amount in rows]
    table.append(("together, at the update", peak / 1e9, "GB"))
    bare, _ = update_bytes(config, P, 600, G, T, 2, False, frozen=True)
    table.append(("activations of that group without checkpointing", bare / 1e9, "GB"))
    table.append(
        (
            f"in the rollout: states and reference, weights in bfloat16, {budget} cached tokens of {cache} bytes",
            (states - 4 * trained / gpus + reference + rollout) / 1e9,
            "GB",
        )
    )
    tokens = prompts * (P + G * mean)
    waves = -(-prompts * (P + G * T) // budget)
    rate = FLOPS * USED
    times = [
        (
            f"rollout: {waves} waves, about 1000 decoding steps each until most rows have ended",
            waves * 1000 * DECODE_STEP,
        ),
        (
            f"score, behaviour and reference: 2 · 2 · {tokens} tokens · {active / 1e9:.2f} B",
            4 * tokens * active / rate,
        ),
        (
            f"update, forward, again, backward: 8 · {tokens} tokens · {active / 1e9:.2f} B",
            8 * tokens * active / rate,
        ),
    ]
    table += [(label, amount, "s") for label, amount in times]
    step = sum(amount for _, amount in times)
    table.append(
        (
            f"one epoch of 11 000 prompts: {-(-11000 // (prompts * gpus))} steps",
            -(-11000 // (prompts * gpus)) * step / 3600,
            "hours",
        )
    )
    return table


# ------------------------------------------------------------------------------------------------------- small functions


def one_scoring(way: str, tokens: int, vocabulary: int, backward: bool):
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(tokens, 256, generator=generator).requires_grad_()
    weight = torch.randn(vocabulary, 256, generator=generator).requires_grad_()
    targets = torch.randint(0, vocabulary, (tokens,), generator=generator)

    def run():
        hidden.grad = weight.grad = None
        with torch.set_grad_enabled(backward):
            if way == "chunked":
                logprobs = TokenLogprobs.apply(
                    hidden,
                    weight,
                    targets,
                    1.0,
                    torch.tensor([0]),
                    Policy.CHUNK,
                    model._chunk_forward,
                    model._chunk_backward,
                )[0]
            else:
                logits = (hidden @ weight.T).index_fill(
                    1, torch.tensor([0]), torch.finfo(torch.float32).min
                )
                logprobs = logits.log_softmax(-1).gather(-1, targets[:, None])[:, 0]
                with torch.no_grad():
                    (logits.softmax(-1) * logits).sum(-1)  # the entropy, which both log
        if backward:
            logprobs.sum().backward()

    return run


def logprobs() -> None:
    """Chunked log-probabilities against full logits; both give entropies."""
    for backward, target in ((False, ">= 0.91 (1.1×)"), (True, ">= 0.71 (1.4×)")):
        memory = [
            peak_megabytes("scoring", way, 2048, 32000, int(backward))
            for way in ("chunked", "full")
        ]
        name = "forward + backward" if backward else "forward"
        found = compare(
            "logprobs",
            f"{name}, 2048 × 32000",
            one_scoring("chunked", 2048, 32000, backward),
            one_scoring("full", 2048, 32000, backward),
            5,
            target,
            f"peak {memory[0]:.0f} against {memory[1]:.0f} MB",
        )
        found["peak_mb"] = memory


def signals() -> None:
    """dyco.attention_signals compiled, against itself uncompiled."""
    compiled = torch.compile(dyco.attention_signals, dynamic=True)
    for responses, queries, keys in ((8, 64, 200), (8, 64, 700), (32, 256, 1200)):
        rows = torch.rand(responses, queries, keys).softmax(-1)
        visual = (torch.arange(keys) < keys // 2).expand(responses, keys)
        text = (~visual)[:, None].expand(rows.shape)
        compare(
            "signals",
            f"{responses} × {queries} queries × {keys} keys",
            lambda: compiled(rows, visual, text),
            lambda: dyco.attention_signals(rows, visual, text),
            9,
            ">= 1.5",
        )


def growth() -> None:
    """How time grows with G, P and T, beside the count of operations."""
    policy = policy_of("3M")

    def once(visual: int, group: int, new: int) -> tuple[float, float]:
        (prompt,) = prompts_of(policy, visual)
        tokens = torch.randint(0, 300, (group, new))
        mask = torch.ones_like(tokens, dtype=torch.bool)

        def run():
            policy.zero_grad(set_to_none=True)
            policy([prompt], tokens, mask).logprobs.sum().backward()

        run()
        return (
            statistics.median(seconds(run) for _ in range(3)),
            operations(policy, visual, len(prompt.input_ids), new, group, True),
        )

    for name, points in (
        ("G = 2 … 32", [(100, g, 64) for g in (2, 4, 8, 16, 32)]),
        ("P = 100 … 2000", [(p, 8, 64) for p in (100, 200, 400, 1000, 2000)]),
        ("T = 32 … 512", [(100, 8, t) for t in (32, 64, 128, 256, 512)]),
    ):
        changing = next(i for i in range(3) if points[0][i] != points[-1][i])
        axis = [point[changing] for point in points]
        measured, counted = zip(*(once(*point) for point in points))
        slope = lambda values: math.log(values[-1] / values[0]) / math.log(axis[-1] / axis[0])
        report(
            "growth",
            name,
            slope(measured),
            slope(counted),
            *[slope(measured) / slope(counted)] * 3,
            "exponent <= that of the count",
            "ours: exponent of the time; theirs: of the operations",
        )


# ---------------------------------------------------------------------------------------------------------------- main

JOBS = {
    "update": lambda size, visual, way: one_update(size, int(visual), way),
    "rollout": lambda size, visual, way: one_rollout(size, int(visual), way),
    "memory": lambda size, visual, checkpointing: one_memory(
        size, int(visual), checkpointing == "1"
    ),
    "step": lambda size, visual, way: one_step(size, int(visual), way == "on"),
    "scoring": lambda way, tokens, vocabulary, backward: one_scoring(
        way, int(tokens), int(vocabulary), backward == "1"
    ),
}
ROWS = {
    "update": update,
    "rollout": rollout,
    "capture": capture,
    "step": step,
    "dyco": dyco_cost,
    "logprobs": logprobs,
    "signals": signals,
    "growth": growth,
    "estimate": estimate,
}


def main(arguments: list[str]) -> None:
    torch.set_num_threads(THREADS)
    torch.manual_seed(0)
    if arguments[:1] == ["--job"]:
        name, *rest = arguments[1:]
        if name == "trl":
            trl_job(*rest)
            return
        job = JOBS[name](*rest)
        print(growth_of_memory(job))
        return
    unknown = [name for name in arguments if name not in ROWS]
    if unknown:
        sys.exit(f"no row {', '.join(unknown)}; rows: {', '.join(ROWS)}\n\n{__doc__}")
    print(f"torch {torch.__version__}, {THREADS} threads, load {os.getloadavg()[0]:.1f}")
    for name in arguments or ROWS:
        ROWS[name]()
    with open("bench.json", "w") as file:
        json.dump({"torch": torch.__version__, "threads": THREADS, "rows": TABLE}, file, indent=1)


if __name__ == "__main__":
    main(sys.argv[1:])
