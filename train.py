"""train.py: reinforcement learning with verifiable rewards and DyCo-RL's token advantages.

    torchrun train.py config.yaml [section.key=value ...]      # python train.py works as well

One step, top to bottom:

    1. rollout     G responses to each prompt, one prefill per prompt; attention is read while decoding     eq. 1–3
    2. reward      accuracy and format of each response
    3. score       behaviour and reference log-probabilities, where the algorithm needs them
    4. advantage   each response against its group
    5. DyCo        role of each token, fit of its attention, weight, token advantage                       eq. 4–8
    6. update      a few optimizer steps, each on its own groups: packed forward, loss, backward, clip, step

What it leaves out: a learning-rate decay, a value model, asynchronous rollouts. Everything a run writes is under run.dir,
but for the toy's cached warm start; the same command resumes it.
"""

import contextlib
import hashlib
import json
import math
import os
import signal
import sys
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from types import SimpleNamespace

import torch
from torch import Tensor
from tqdm import tqdm

import distributed
import dyco
import evaluate
import rewards
import rl_algos
import run_folder
import toy
from config import Config, ConfigError, load_config
from data import DataError, JsonlDataset, Prompt, Sampler, check_lengths, encode_prompt
from model import Policy, policy_from_config, save_policy
from rollout import Rollout, generate, join, keyed_generator, runs_within

# config keys that decide what a run *is*: a checkpoint of another value cannot be continued
FIXED_ON_RESUME = (
    "model.path",
    "model.freeze_vision",
    "data.path",
    "data.image_root",
    "data.prompt_template",
    "toy",
    "train.seed",
    "algo",
    "dyco",
    "reward.accuracy_weight",
    "reward.format_weight",
    "reward.custom",
    "reward.custom_weight",
)
MAX_FAILURES = 5  # steps in a row with a non-finite loss or gradient before the run stops


class RunError(RuntimeError):
    """A run that cannot start or go on."""


# ---------------------------------------------------------------------------------------------------- stages of a step


@contextlib.contextmanager
def memory_for(describe, *arguments):
    """Running out of memory inside is a RunError; describe(*arguments) says at what, and which keys to lower."""
    try:
        yield
    except (
        RuntimeError
    ) as error:  # torch.OutOfMemoryError is one; the CPU's has no class of its own
        if not isinstance(error, torch.OutOfMemoryError) and "can't allocate memory" not in str(
            error
        ):
            raise
        raise RunError(
            f"out of memory at {describe(*arguments)} ({str(error).splitlines()[0]})"
        ) from error


def describe_sampling(config: Config, prompts: list[Prompt]) -> str:
    longest = max(prompts, key=lambda prompt: len(prompt.input_ids))
    return (
        f"sampling {config.rollout.group_size} responses to each of {len(prompts)} prompts, the longest of {len(longest.input_ids)} "
        f"tokens (id {longest.id}); lower rollout.max_cache_tokens, rollout.max_new_tokens or data.max_pixels"
    )


def describe_packed_row(config: Config, rollout: Rollout, groups: list[int]) -> str:
    tokens = sum(len(rollout.prompts[group].input_ids) for group in groups) + int(
        rollout.mask[rollout.rows(groups)].sum()
    )
    keys = (
        f"train.micro_batch_tokens (now {config.train.micro_batch_tokens})"
        if len(groups) > 1
        else (
            "rollout.group_size, rollout.max_new_tokens or data.max_pixels, or set model.gradient_checkpointing=true"
        )
    )
    ids = ", ".join(rollout.prompts[group].id for group in groups)
    return f"a packed row of {tokens} tokens, the groups of the prompts {ids}; lower {keys}"


@dataclass
class Batch:
    """One rollout batch of this process and what the stages add to it. Rows are group-major, B = prompts · G."""

    rollout: Rollout
    rewards: Tensor  # [prompts, G]
    accuracy: Tensor  # [prompts, G]
    format: Tensor  # [prompts, G]
    advantages: Tensor | None = None  # [B, T], of every token
    roles: Tensor | None = None  # [B, T]
    scores: Tensor | None = None  # [B, T]
    old_logprobs: Tensor | None = None  # [B, T]
    ref_logprobs: Tensor | None = None  # [B, T]
    loss_mask: Tensor | None = None  # [B, T]

    @property
    def positions(self) -> list[int]:
        """Each prompt's place in the step's order of drawing, over all processes."""
        return [prompt.index for prompt in self.rollout.prompts]


def ask_custom(config: Config, function, text: str, sample) -> float:
    try:
        return rewards.call_custom(
            function, text, sample.answer, sample, config.reward.custom_timeout
        )
    except rewards.RewardError as error:
        if config.reward.custom_on_error == "raise":
            raise RunError(
                f"{error}, on a response to {sample.id}; reward.custom_on_error=zero goes on with a reward of 0"
            ) from error
        tqdm.write(f"{error}, on a response to {sample.id}: its reward is 0", file=sys.stderr)
        return 0.0


def collect(
    config: Config, policy: Policy, dataset, drawn: list[tuple[int, int]], step: int, custom_reward
) -> Batch:
    """Stages 1 and 2: responses to some (position, sample index) pairs, and their rewards."""
    samples = [dataset[index] for _, index in drawn]
    prompts = [
        encode_prompt(
            sample,
            position,
            policy.tokenizer,
            policy.image_processor,
            config.data.prompt_template,
            config.data.max_prompt_tokens,
        )
        for (position, _), sample in zip(drawn, samples)
    ]
    capture = config.dyco if config.dyco.enabled and config.dyco.capture == "rollout" else None
    with memory_for(describe_sampling, config, prompts):
        rollout = generate(
            policy,
            prompts,
            config.rollout.group_size,
            config.rollout.max_new_tokens,
            (config.train.seed, step),
            capture,
            config.rollout.max_cache_tokens,
        )

    asked = [sample for sample in samples for _ in range(rollout.group_size)]
    accuracy = torch.tensor(
        [rewards.accuracy(text, sample.answer) for text, sample in zip(rollout.texts, asked)]
    )
    form = torch.tensor([rewards.format(text) for text in rollout.texts])
    total = config.reward.accuracy_weight * accuracy + config.reward.format_weight * form
    if custom_reward is not None:
        custom = [
            ask_custom(config, custom_reward, text, sample)
            for text, sample in zip(rollout.texts, asked)
        ]
        total = total + config.reward.custom_weight * torch.tensor(custom)
    total = total + config.algo.overlong_weight * rl_algos.overlong_penalty(
        rollout.mask.sum(1).cpu(), config.rollout.max_new_tokens, config.algo.overlong_buffer
    )
    grouped = lambda x: x.view(len(prompts), rollout.group_size)
    return Batch(rollout, grouped(total), grouped(accuracy), grouped(form))


def collect_useful(
    config: Config, policy: Policy, dataset, sampler: Sampler, step: int, world, custom_reward
) -> tuple[Batch, list[Batch]]:
    """`collect` for this process's share of rollout.prompts_per_step. Under dynamic sampling, groups whose accuracy is
    constant are replaced in at most algo.max_refills further rounds, each of rollout.prompts_per_step prompts.

    Returns the groups to learn from, possibly none, and all that was collected on the way.
    """
    quota, kept, collected = config.rollout.prompts_per_step, [], []
    for round_ in range(1 + config.algo.max_refills * config.algo.dynamic_sampling):
        size = config.rollout.prompts_per_step
        drawn = list(enumerate(sampler.take(size), start=round_ * size))[world.rank :: world.size]
        batch = collect(config, policy, dataset, drawn, step, custom_reward)
        collected.append(batch)
        useful = [
            position
            for position, row in zip(batch.positions, batch.accuracy)
            if not config.algo.dynamic_sampling or bool((row != row[0]).any())
        ]
        accepted = sorted(sum(world.gather(useful), []))[
            :quota
        ]  # the quota is global, first drawn first kept
        quota -= len(accepted)
        mine = [i for i, position in enumerate(batch.positions) if position in accepted]
        kept.append(
            Batch(
                batch.rollout.select(mine),
                batch.rewards[mine],
                batch.accuracy[mine],
                batch.format[mine],
            )
        )
        if quota == 0:
            break
    stack = lambda name: torch.cat([getattr(b, name) for b in kept])
    return Batch(
        join([b.rollout for b in kept]), stack("rewards"), stack("accuracy"), stack("format")
    ), collected


def split(config: Config, batch: Batch, step: int, world) -> list[list[int]]:
    """This process's groups of each of the step's mini-batches; the split is seeded and the same for any world size."""
    positions = sorted(sum(world.gather(batch.positions), []))
    order = torch.randperm(
        len(positions), generator=keyed_generator(config.train.seed, step, "split")
    ).tolist()
    parts = torch.tensor([positions[i] for i in order]).tensor_split(
        max(1, min(config.train.updates_per_rollout, len(positions)))
    )
    parts = [set(part.tolist()) for part in parts]
    return [[i for i, position in enumerate(batch.positions) if position in part] for part in parts]


def micro_batches(rollout: Rollout, groups: list[int], budget: int, world) -> list[list[int]]:
    """Groups in runs of at most `budget` packed tokens; a single larger group is a run of its own. Every process gets as many
    runs; the last ones of a process with less work are empty."""
    lengths = rollout.mask.sum(1).view(len(rollout.prompts), rollout.group_size).sum(1).tolist()
    runs = runs_within(
        [len(rollout.prompts[group].input_ids) + lengths[group] for group in groups], budget
    )
    idle = max(world.gather(len(runs))) - len(runs)
    return [[groups[i] for i in run] for run in runs] + [[]] * idle


@torch.no_grad()
def score(
    config: Config,
    policy: Policy,
    rollout: Rollout,
    parts: list[list[int]],
    world,
    capture: bool = False,
) -> tuple[Tensor, dyco.Signals | None]:
    """Stage 3: log-probabilities [B, T] by the packed forward, and with `capture` DyCo's signals.

    parts: the groups of each mini-batch. Packed as the update will pack them, since a GPU may round another row otherwise.
    """
    logprobs = torch.zeros_like(rollout.logprobs)
    signals = dyco.Signals(*(torch.zeros_like(logprobs) for _ in range(4))) if capture else None
    for groups in (
        row
        for part in parts
        for row in micro_batches(rollout, part, config.train.micro_batch_tokens, world)
    ):
        if not groups:
            policy.idle()
            continue
        part, rows = rollout.select(groups), rollout.rows(groups)
        with memory_for(describe_packed_row, config, rollout, groups):
            output = policy(
                part.prompts, part.tokens, part.mask, policy.tap(config.dyco) if capture else None
            )
        width = part.mask.shape[1]
        logprobs[rows, :width] = output.logprobs
        if capture:
            for whole, found in zip(signals, output.signals):
                whole[rows, :width] = found
    return logprobs, signals


def assign_advantages(config: Config, batch: Batch, step: int) -> None:
    """Stages 4 and 5: group advantages, then one advantage per token."""
    rollout, settings = batch.rollout, config.dyco
    advantages = (
        rl_algos.group_advantages(batch.rewards, config.algo.scale)
        .flatten()
        .to(rollout.mask.device)
    )
    if not settings.enabled:
        batch.advantages = torch.where(rollout.mask, advantages[:, None], 0)
        return
    signals = rollout.signals
    batch.roles = dyco.assign_roles(
        signals.visual_shift, signals.text_shift, rollout.mask, settings.tau
    )  # eq. 5
    batch.scores = dyco.alignment_scores(
        signals.visual_mass, signals.text_mass, batch.roles, rollout.mask, settings.ratio
    )  # eq. 4, 6
    generators = [
        keyed_generator(config.train.seed, step, "shuffle", prompt.index, response)
        for prompt in rollout.prompts
        for response in range(rollout.group_size)
    ]
    batch.advantages = dyco.reweight_advantages(
        advantages,
        batch.scores,
        batch.roles,
        rollout.mask,
        settings.alpha,
        settings.rule,
        generators,
        rollout.group_size,
    )  # eq. 7, 8


def loss_mask(config: Config, rollout: Rollout) -> Tensor:
    """[B, T] bool: the response tokens that enter the loss."""
    return (
        rollout.mask & ~rollout.truncated[:, None] if config.algo.mask_truncated else rollout.mask
    )


def steps_taken(optimizer) -> int:
    """Optimizer steps so far, those of earlier processes of a resumed run included; skipped updates are none."""
    state = next(iter(optimizer.state.values()), None)
    return int(state["step"]) if state else 0


def update(
    config: Config, policy: Policy, optimizer, batch: Batch, groups: list[int], world
) -> dict[str, float]:
    """Stage 6, one optimizer step on some groups of the batch. Returns what to log of it."""
    rollout, name = batch.rollout, config.algo.name
    settings = SimpleNamespace(**vars(config.algo), max_new_tokens=config.rollout.max_new_tokens)
    loss_mask = batch.loss_mask[rollout.rows(groups)]
    normalizer = float(world.sum(rl_algos.loss_normalizer(name, loss_mask).double().cpu()))
    logged: dict[str, Tensor] = {}
    for part in micro_batches(rollout, groups, config.train.micro_batch_tokens, world):
        if not part:
            policy.idle().backward()
            continue
        some, rows = rollout.select(part), rollout.rows(part)
        cut = lambda x: None if x is None else x[rows, : some.mask.shape[1]]
        with memory_for(describe_packed_row, config, rollout, part):
            output = policy(some.prompts, some.tokens, some.mask)
            loss, metrics = rl_algos.policy_loss(
                name,
                output.logprobs,
                cut(batch.old_logprobs),
                cut(batch.advantages),
                cut(batch.loss_mask),
                settings,
                cut(batch.ref_logprobs),
                normalizer,
            )
            loss.backward()
        for key, value in (
            metrics
            | {"loss": loss.detach(), "entropy": output.entropy.sum(), "tokens": some.mask.sum()}
        ).items():
            logged[key] = logged.get(key, 0) + value
    parameters = [p for p in policy.parameters() if p.requires_grad]
    norm = float(
        distributed.whole(torch.nn.utils.clip_grad_norm_(parameters, config.optim.grad_clip))
    )
    keys = [
        "loss",
        "clip_fraction",
        "ratio_deviation",
        "entropy",
        "tokens",
        *(["kl"] if batch.ref_logprobs is not None else []),
    ]
    mine = [
        float(logged[key]) if logged else 0.0 for key in keys
    ]  # a process without groups of this mini-batch adds nothing
    values = dict(zip(keys, world.sum(torch.tensor(mine, dtype=torch.float64)).tolist()))
    values["entropy"] /= max(values.pop("tokens"), 1)
    finite = math.isfinite(norm) and math.isfinite(values["loss"])
    if finite:
        with memory_for(
            lambda: (
                "the optimizer step (AdamW keeps 8 bytes a trained weight from the first one on); use more processes or "
                "model.freeze_vision=true"
            )
        ):
            optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    if finite:
        return {**values, "grad_norm": norm}
    return {
        "skipped_updates": 1.0,
        "skipped_prompts": sum(world.gather([rollout.prompts[group].id for group in groups]), []),
    }


def train_step(
    config: Config,
    policy: Policy,
    reference: Policy | None,
    optimizer,
    dataset,
    sampler: Sampler,
    step: int,
    world,
    custom_reward,
) -> tuple[dict[str, float], Batch | None]:
    """One row of metrics.jsonl, and the batch it came from (None if dynamic sampling left nothing to learn from)."""
    clock = [time.perf_counter()]
    if world.device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()

    def lap() -> float:
        if world.device.type == "cuda":
            torch.cuda.synchronize()
        clock.append(time.perf_counter())
        return clock[-1] - clock[-2]

    with distributed.gathered(policy):  # 1. rollout, 2. reward
        batch, collected = collect_useful(
            config, policy, dataset, sampler, step, world, custom_reward
        )
    row = describe_responses(collected, world)
    tokens = sum(world.gather(sum(int(b.rollout.mask.sum()) for b in collected)))
    seconds = {"rollout": lap()}
    if not sum(map(len, world.gather(batch.positions))):
        return {
            **row,
            "policy/skipped_updates": float(config.train.updates_per_rollout),
            "time/rollout": seconds["rollout"],
        }, None

    rollout, parts = batch.rollout, split(config, batch, step, world)  # 3. score
    late_capture = config.dyco.enabled and config.dyco.capture == "scoring"
    how = config.train.old_logprobs
    scored = how == "scored" or how == "auto" and policy.dtype != torch.float32
    batch.old_logprobs = rollout.logprobs
    if scored or late_capture:
        logprobs, signals = score(config, policy, rollout, parts, world, late_capture)
        rollout.signals = signals if late_capture else rollout.signals
        gap = (logprobs - rollout.logprobs).abs()
        row["policy/rollout_gap"] = max(world.gather(float(gap.max()) if gap.numel() else 0.0))
        batch.old_logprobs = logprobs if scored else rollout.logprobs
    if reference is not None:
        batch.ref_logprobs, _ = score(config, reference, rollout, parts, world)
    assign_advantages(config, batch, step)  # 4. advantage, 5. DyCo
    batch.loss_mask = loss_mask(config, rollout)
    if batch.roles is not None:
        row |= describe_tokens(batch, world)
    seconds["score"] = lap()

    logged = []
    for groups in parts:  # 6. update
        for group in optimizer.param_groups:
            group["lr"] = config.optim.lr * min(
                1.0, (steps_taken(optimizer) + 1) / max(config.optim.warmup_steps, 1)
            )
        logged.append(update(config, policy, optimizer, batch, groups, world))
    seconds["update"] = lap()
    for key in sorted({key for found in logged for key in found}):
        values = [found[key] for found in logged if key in found]
        row[f"policy/{key}"] = (
            sum(values, type(values[0])())
            if key.startswith("skipped")
            else sum(values) / len(values)
        )
    row |= {f"time/{stage}": value for stage, value in seconds.items()}
    row["time/tokens_per_second"] = tokens / sum(seconds.values())
    if os.path.exists("/proc/self/statm"):
        row["memory/resident_gb"] = distributed.resident_bytes() / 1e9
    if world.device.type == "cuda":
        row["memory/peak_gb"] = torch.cuda.max_memory_allocated() / 1e9
    return row, batch


def means(pairs: dict[str, tuple], world) -> dict[str, float]:
    """{name: (sum, count)} of each process -> {name: sum / count over all processes}, without those whose count is 0."""
    sums = world.sum(
        torch.tensor([[float(a), float(b)] for a, b in pairs.values()], dtype=torch.float64)
    ).tolist()
    return {name: a / b for name, (a, b) in zip(pairs, sums) if b > 0}


def describe_responses(collected: list[Batch], world) -> dict[str, float]:
    """Means over all responses of a step, those included that dynamic sampling dropped."""
    total = lambda measure: sum(float(measure(batch).sum()) for batch in collected)
    responses, groups = (
        total(lambda b: torch.ones_like(b.rewards)),
        sum(len(b.rewards) for b in collected),
    )
    tokens = total(lambda b: b.rollout.mask)
    constant = lambda x: (x == x[:, :1]).all(1)
    return means(
        {
            "reward/mean": (total(lambda b: b.rewards.double()), responses),
            "reward/accuracy": (total(lambda b: b.accuracy), responses),
            "reward/format": (total(lambda b: b.format), responses),
            "reward/constant_groups": (total(lambda b: constant(b.rewards)), groups),
            "response/length": (tokens, responses),
            "response/truncated": (total(lambda b: b.rollout.truncated), responses),
        },
        world,
    )


def describe_tokens(batch: Batch, world) -> dict[str, float]:
    """DyCo's own figures, means over the response tokens of the batch."""
    mask, acting, signals = batch.rollout.mask, batch.roles != 0, batch.rollout.signals
    pairs = {
        "visual_share": batch.roles > 0,
        "text_share": batch.roles < 0,
        "neutral_share": mask & ~acting,
    }
    pairs |= {name: getattr(signals, name) for name in signals._fields}
    return means(
        {f"dyco/{name}": (values.sum(), mask.sum()) for name, values in pairs.items()}
        | {"dyco/alignment": (batch.scores.sum(), acting.sum())},
        world,
    )


# ------------------------------------------------------------------------------------------------------------ the run


def append_rows(path: Path, rows) -> None:
    """Add rows to a JSONL file, without figures that are not finite."""
    finite = lambda row: {
        k: v for k, v in row.items() if not isinstance(v, float) or math.isfinite(v)
    }
    run_folder.append_jsonl(path, [finite(row) for row in rows])


def supersede(path: Path, step: int) -> None:
    """Before the steps after `step` are computed again, move their rows from NAME.jsonl to NAME.superseded.jsonl; half a line goes."""
    lines = path.read_bytes().splitlines(keepends=True) if path.exists() else []
    whole = [line for line in lines if line.endswith(b"\n")]
    later = []
    for number, line in enumerate(whole, start=1):
        try:
            later.append(json.loads(line)["step"] > step)
        except (ValueError, TypeError, KeyError):
            raise RunError(
                f"{path}, line {number}: expected an object with a step, found {line[:60]!r}; take the line out"
            ) from None
    if any(later):
        with open(path.with_suffix(".superseded.jsonl"), "ab") as file:
            file.writelines(line for line, is_later in zip(whole, later) if is_later)
    if any(later) or len(whole) < len(lines):
        run_folder.write_file(
            path, b"".join(line for line, is_later in zip(whole, later) if not is_later)
        )


def console_line(row: dict, steps: int) -> str:
    """One step for people: is it learning, and where does the time go?"""
    part = lambda label, key, form: f"{label} {row[key]:{form}}" if key in row else ""
    fields = [
        f"step {row['step']:>4}/{steps}",
        part("reward", "reward/mean", ".3f"),
        part("acc", "reward/accuracy", ".3f"),
        part("fmt", "reward/format", ".2f"),
        part("len", "response/length", ".0f"),
        part("trunc", "response/truncated", ".2f"),
        part("ent", "policy/entropy", ".3f"),
        part("kl", "policy/kl", ".4f"),
        part("clip", "policy/clip_fraction", ".3f"),
        part("grad", "policy/grad_norm", ".2f"),
    ]
    if "dyco/visual_share" in row:
        fields.append(
            "vis/txt/neu "
            + "/".join(f"{row[f'dyco/{role}_share']:.2f}" for role in ("visual", "text", "neutral"))
        )
        fields.append(part("align", "dyco/alignment", ".3f"))
    if "time/update" in row:
        fields.append(
            "s "
            + "+".join(f"{row[f'time/{stage}']:.2f}" for stage in ("rollout", "score", "update"))
        )
        fields.append(part("tok/s", "time/tokens_per_second", ".0f"))
    fields += [
        part("| eval", "eval/accuracy", ".3f"),
        part("greedy", "eval/accuracy_greedy", ".3f"),
        part("swapped", "eval/accuracy_swapped", ".3f"),
    ]
    if "policy/skipped_prompts" in row:
        fields.append(
            "| update skipped, loss or gradient not finite, prompts "
            + ", ".join(row["policy/skipped_prompts"])
        )
    elif "policy/skipped_updates" in row:
        fields.append("| no update: right answers all or none in every group")
    return "  ".join(field for field in fields if field)


def sample_rows(batch: Batch, step: int, count: int, tokenizer):
    """Some responses for samples.jsonl: the first of each group, in turn, with the role and score of each token."""
    size = batch.rollout.group_size
    order = [
        group * size + response
        for response in range(size)
        for group in range(len(batch.rollout.prompts))
    ]
    for row in order[:count]:
        prompt = batch.rollout.prompts[row // size]
        mine = batch.rollout.mask[row]
        found = {
            "step": step,
            "id": prompt.id,
            "question": prompt.question,
            "answer": prompt.answer,
            "response": batch.rollout.texts[row],
            "reward": float(batch.rewards.flatten()[row]),
            "accuracy": float(batch.accuracy.flatten()[row]),
            "tokens": [
                tokenizer.decode(token) for token in batch.rollout.tokens[row][mine].tolist()
            ],
        }
        if batch.roles is not None:
            found |= {
                "roles": batch.roles[row][mine].tolist(),
                "scores": [round(x, 4) for x in batch.scores[row][mine].tolist()],
            }
        yield found


def build(config: Config, world):
    """(policy, reference policy or None, training set, held-out samples or None, custom reward or None, key -> fingerprint of what
    it names), with everything that can be wrong with them found before anything long starts. Raises ConfigError or DataError."""
    try:
        custom_reward = rewards.load_custom(config.reward.custom) if config.reward.custom else None
        path = config.model.path
        if path == "toy":
            warm_start = lambda: toy.warm_start_folder(config, world.is_main)
            if world.is_main:
                warm_start()
            world.barrier()
            path = warm_start()
        load = lambda **more: policy_from_config(config, path, world.device, **more)
        policy = load(
            freeze_vision=config.model.freeze_vision,
            gradient_checkpointing=config.model.gradient_checkpointing,
        )
        policy.tap(config.dyco)  # knows which layers there are
        distributed.shard(policy, world)
        reference = load(trainable=False) if config.algo.kl > 0 else None
        if reference is not None:
            distributed.shard(reference, world)
    except ValueError as error:
        raise ConfigError(str(error)) from error

    def read(path: str, root: str | None, root_key: str) -> JsonlDataset:
        rows = JsonlDataset(path, root, config.data.on_error, world.is_main, root_key)
        check_lengths(
            rows,
            policy.tokenizer,
            policy.image_processor,
            config.data.prompt_template,
            config.data.max_prompt_tokens,
        )
        return rows

    if config.data.path == "toy":
        dataset, held_out = toy.splits(config)
        encode_prompt(
            dataset[0],
            0,
            policy.tokenizer,
            policy.image_processor,
            config.data.prompt_template,
            config.data.max_prompt_tokens,
        )
    else:
        dataset, held_out = read(config.data.path, config.data.image_root, "data.image_root"), None
    if config.data.eval_path is not None:
        held_out = read(config.data.eval_path, config.data.eval_image_root, "data.eval_image_root")
    inputs = {"data.path": dataset.fingerprint}
    if (
        reference is not None
    ):  # the policy goes on from the checkpoint, the reference from model.path
        inputs["model.path"] = evaluate.weights_of(str(path))
    if custom_reward is not None:
        inputs["reward.custom"] = hashlib.sha256(
            Path(config.reward.custom.rpartition(":")[0]).read_bytes()
        ).hexdigest()
    return policy, reference, dataset, held_out, custom_reward, inputs


def refuse_changes(old: dict, config: Config, say) -> None:
    """Compare this run's earlier config with the present one: say what changed, refuse what cannot be changed."""
    flat = lambda tree: {
        f"{section}.{key}": value for section, keys in tree.items() for key, value in keys.items()
    }
    before, after = flat(old), flat(asdict(config))
    for key in [
        key for key in after if key not in before
    ]:  # options that the code has got since then
        say(f"new since the checkpoint: {key} {after[key]!r}")
    changed = [
        key for key in after if key in before and before[key] != after[key] and key != "run.dir"
    ]
    fixed = [
        key for key in changed if key in FIXED_ON_RESUME or key.split(".")[0] in FIXED_ON_RESUME
    ]
    if fixed:
        raise ConfigError(
            f"{config.run.dir} holds a run with another "
            + ", ".join(f"{key} ({before[key]!r}, now {after[key]!r})" for key in fixed)
            + "; set run.dir to a new folder"
        )
    for key in changed:
        say(f"changed since the checkpoint: {key} {before[key]!r} -> {after[key]!r}")


@torch.no_grad()
def load_weights(policy: Policy, optimizer, tensors: dict) -> None:
    """Continue from the whole tensors of a checkpoint, whatever number of processes wrote them."""
    own = dict(policy.hf.named_parameters())
    for name, parameter in own.items():
        parameter.copy_(distributed.share(tensors["policy"][name], parameter))
    trained = [parameter for parameter in own.values() if parameter.requires_grad]
    for index, state in tensors["optimizer"]["state"].items():
        tensors["optimizer"]["state"][index] = {
            name: distributed.share(value, trained[index]) if value.dim() else value
            for name, value in state.items()
        }
    optimizer.load_state_dict(tensors["optimizer"])


def run(config: Config, world) -> None:
    folder = Path(config.run.dir)
    say = (lambda text: tqdm.write(text, file=sys.stdout)) if world.is_main else (lambda text: None)
    if config.rollout.prompts_per_step % (config.train.updates_per_rollout * world.size):
        raise ConfigError(
            f"rollout.prompts_per_step: expected a multiple of train.updates_per_rollout × processes "
            f"({config.train.updates_per_rollout} × {world.size}), found {config.rollout.prompts_per_step}"
        )
    if config.train.threads:
        torch.set_num_threads(config.train.threads)
    if world.is_main:
        run_folder.remove_partial(folder)
        run_folder.remove_partial(folder / "checkpoints")
    world.barrier()
    saved = run_folder.checkpoints(folder / "checkpoints")[-1:]
    if len(seen := set(world.gather(saved[0].name if saved else "none"))) > 1:
        raise RunError(
            f"{folder}: processes find different checkpoints there ({', '.join(sorted(seen))}); expected a folder that all nodes share"
        )
    facts = run_folder.read_facts(saved[0]) if saved else {"step": 0}
    if saved:
        refuse_changes(facts["config"], config, say)
    elif (
        folder / "metrics.jsonl"
    ).exists():  # a run that ended before its first checkpoint begins again
        refuse_changes(asdict(load_config(folder / "config.yaml")), config, say)
    if facts["step"] >= config.train.steps and (folder / "final").exists():
        say(
            f"{folder}: finished at step {facts['step']}; nothing to do. Raise train.steps to go on, or set run.dir to a new folder"
        )
        return
    done = facts["step"] if saved else -1  # the last step whose rows stand
    writer = tensorboard(folder, done) if config.log.tensorboard and world.is_main else None
    policy, reference, dataset, held_out, custom_reward, inputs = build(config, world)
    sampler = Sampler(len(dataset), config.train.seed)
    optimizer = torch.optim.AdamW(
        [p for p in policy.parameters() if p.requires_grad],
        lr=config.optim.lr,
        weight_decay=config.optim.weight_decay,
        fused=world.device.type == "cuda",
    )
    if saved:
        for key in [key for key, found in inputs.items() if found != facts["inputs"].get(key)]:
            if key != "reward.custom":
                raise ConfigError(
                    f"{key}: what is there is not what this run's checkpoint was made with; restore it, or set run.dir to a new folder"
                )
            say(
                f"changed since the checkpoint: the file of {key}"
            )  # a reward that failed is mended and goes on
        tensors = run_folder.read_tensors(saved[0])
        load_weights(policy, optimizer, tensors)
        optimizer.param_groups[0]["weight_decay"] = config.optim.weight_decay
        sampler.load_state_dict(facts["sampler"])
        del tensors
        say(f"resumed {folder} at step {facts['step']}")
    step, failures = facts["step"], 0

    metrics, samples = folder / "metrics.jsonl", folder / "samples.jsonl"
    if world.is_main:
        for path in (metrics, samples):
            supersede(path, done)
        run_folder.drop_examples(folder, done)
        if (folder / "final").exists():  # of a run that is now extended
            run_folder.remove_folder(folder / "final")
        run_folder.write_file(folder / "config.yaml", config.to_yaml().encode())
        if not saved:
            say(config.to_yaml())

    def evaluation() -> dict[str, float]:
        if held_out is None:
            return {}
        samples = [held_out[i] for i in range(min(config.eval.samples, len(held_out)))]
        with distributed.gathered(policy):
            return {
                f"eval/{name}": value
                for name, value in evaluate.held_out(
                    policy,
                    samples,
                    config.data.prompt_template,
                    config.rollout.max_new_tokens,
                    config.train.seed,
                    config.rollout.max_cache_tokens,
                    config.eval.swapped,
                    world,
                ).items()
            }

    def record(row: dict) -> None:
        if world.is_main:
            append_rows(metrics, [row])
            say(console_line(row, config.train.steps))
            if writer is not None:
                for key, value in row.items():
                    if not isinstance(value, list):
                        writer.add_scalar(key, value, row["step"])

    def refresh_report(evaluated: bool) -> None:
        """Examples of this evaluation, and report.html. A report that cannot be made stops no run, but is not missed silently."""
        with distributed.gathered(policy) if evaluated else contextlib.nullcontext():
            if not world.is_main:
                return
            try:
                from tools import examples, report  # training needs no tool

                if evaluated:
                    source = dataset if held_out is None else held_out
                    some = [source[i] for i in range(min(examples.EXAMPLES, len(source)))]
                    run_folder.save_examples(
                        folder, step, examples.make_examples(policy, some, config)
                    )
                report.write(folder)
            except Exception as error:
                say(f"warning: no report at step {step}: {type(error).__name__}: {error}")

    def save() -> None:
        tensors = distributed.whole(
            {"policy": dict(policy.hf.named_parameters()), "optimizer": optimizer.state_dict()},
            world.is_main,
        )
        if world.is_main:
            for path in (
                metrics,
                samples,
            ):  # what a checkpoint leaves behind must outlive a loss of power, too
                if path.exists():
                    run_folder.sync(path)
            run_folder.save_checkpoint(
                folder / "checkpoints",
                step,
                tensors,
                {
                    "step": step,
                    "sampler": sampler.state_dict(),
                    "inputs": inputs,
                    "config": asdict(config),
                },
                config.checkpoint.keep_last,
            )
        world.barrier()

    stop_asked = []
    for number in (signal.SIGTERM, signal.SIGINT):  # finish the step, save, leave
        signal.signal(number, lambda *_: stop_asked.append(True))

    if step == 0:
        record({"step": 0, **evaluation()})
        refresh_report(evaluated=True)
    with tqdm(
        total=config.train.steps, initial=step, disable=not world.is_main, desc="train"
    ) as bar:
        while step < config.train.steps:
            step += 1
            with profiled(
                config.train.profile_steps >= step - facts["step"] > 0 and world.is_main,
                folder / f"profile-{step}.json",
            ):
                row, batch = train_step(
                    config,
                    policy,
                    reference,
                    optimizer,
                    dataset,
                    sampler,
                    step,
                    world,
                    custom_reward,
                )
            failures = (
                failures + 1 if row.get("policy/skipped_updates") and batch is not None else 0
            )
            evaluated = step % config.eval.every == 0 or step == config.train.steps
            if evaluated:
                started = time.perf_counter()
                row |= evaluation()
                row["time/eval"] = time.perf_counter() - started
            if world.is_main and batch is not None:
                append_rows(
                    samples, sample_rows(batch, step, config.log.samples_per_step, policy.tokenizer)
                )
            record({"step": step, **row})
            bar.update()
            if failures >= MAX_FAILURES:
                raise RunError(
                    f"step {step}: {failures} steps in a row had a loss or gradient that is not finite; those "
                    f"updates were left out, and the weights in {folder / 'checkpoints'} are finite; lower optim.lr"
                )
            stopping = any(world.gather(bool(stop_asked)))
            if (
                evaluated or stopping
            ):  # before the checkpoint: a run that is resumed there has its examples
                refresh_report(evaluated)
            if step % config.checkpoint.every == 0 or step == config.train.steps or stopping:
                save()
            if stopping and step < config.train.steps:
                say(f"stopped at step {step}; the same command resumes it")
                return
    weights = distributed.whole(dict(policy.hf.named_parameters()), world.is_main)
    if world.is_main:
        run_folder.write_folder(folder / "final", lambda path: save_policy(policy, path, weights))
        if held_out is not None:
            say(curve(metrics))
        say(
            f"done: open {folder / 'report.html'}; {folder / 'final'} is a Hugging Face directory; try\n"
            f"  python evaluate.py ask --model {folder / 'final'} --image FILE QUESTION"
        )
    world.barrier()


@contextlib.contextmanager
def profiled(wanted: bool, path: Path):
    """Write a trace of what runs inside, to be opened at ui.perfetto.dev or chrome://tracing."""
    if not wanted:
        yield
        return
    with torch.profiler.profile() as profiler:
        yield
    profiler.export_chrome_trace(str(path))


def curve(path: Path) -> str:
    """The evaluations of a run, for people: one line per figure."""
    rows = [row for row in map(json.loads, path.read_text().splitlines()) if "eval/accuracy" in row]
    lines = ["held out, in percent, at step  " + "  ".join(f"{row['step']:>4}" for row in rows)]
    for label, key in (
        ("temperature 1", "accuracy"),
        ("greedy", "accuracy_greedy"),
        ("images swapped", "accuracy_swapped"),
    ):
        lines.append(
            f"{label:>29}  "
            + "  ".join(f"{100 * row.get(f'eval/{key}', math.nan):4.0f}" for row in rows)
        )
    return "\n".join(lines)


def tensorboard(folder: Path, step: int):
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError:
        raise ConfigError(
            "log.tensorboard is true, but TensorBoard is not installed: pip install tensorboard"
        ) from None
    return SummaryWriter(folder / "tensorboard", purge_step=step + 1)


def main(arguments: list[str] = sys.argv[1:]) -> None:
    paths = [a for a in arguments if "=" not in a]
    if len(paths) != 1 or paths[0] in ("-h", "--help"):
        sys.exit(
            f"usage: {{torchrun|python}} train.py CONFIG.yaml [section.key=value ...]\n\n{__doc__}"
        )
    world, handlers = (
        None,
        [(number, signal.getsignal(number)) for number in (signal.SIGTERM, signal.SIGINT)],
    )
    try:
        config = load_config(paths[0], [a for a in arguments if "=" in a])
        world = distributed.start()
        with (
            run_folder.exclusive(Path(config.run.dir), "run.dir")
            if world.is_main
            else contextlib.nullcontext()
        ):
            run(config, world)
        distributed.stop()  # not after an error: it would wait for processes that wait for this one
    except (ConfigError, DataError, RunError, run_folder.FolderError) as error:
        process = f"process {world.rank}: " if world is not None and world.size > 1 else ""
        print(f"error: {process}{error}", file=sys.stderr)
        sys.exit(2)
    finally:
        for number, handler in handlers:
            signal.signal(number, handler)


if __name__ == "__main__":
    main()
