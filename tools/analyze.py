"""analyze.py: what response tokens attend to, what changes when their attention is changed, and the report of a run.

    python analyze.py roles     --model toy --data toy --out runs/analysis [section.key=value ...]
    python analyze.py roles     --model DIR --data FILE.jsonl --responses RECORDED.jsonl --out DIR
    python analyze.py intervene --model toy --data toy --out runs/analysis [section.key=value ...]
    python analyze.py gradient  --model toy --data toy --out runs/analysis [section.key=value ...]
    python analyze.py report    RUN_DIR

`roles` compares the tokens of right and wrong responses: roles, alignment, shifts (the paper's observation); on the toy, where it is
known which tokens look and which read, also those, right and wrong. `intervene` scales the attention of tokens of one role while they
are sampled and measures what becomes of the answers (its experiment). `gradient` compares the gradient of a batch under DyCo's rules
with the host's; on the toy also under eq. 7 and 8 with the scores of oracles. All take what they need from config.yaml: eval.samples
prompts, rollout.group_size responses to each, rollout.*, dyco.*, toy.*, data.*, train.seed; `gradient` also algo.* and reward.*;
--config names another file, such as a run's. `report` writes RUN_DIR/report.html (report.py).

Intervals are 95 % percentile bootstrap intervals over prompts, since the responses to one prompt are not independent; over batches
in `gradient`. Right and wrong are compared within prompts.
Shapes: B responses, T response tokens, P prompts, R rows being decoded, K keys, H heads.
"""

import argparse
import json
import math
import re
import sys
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from tqdm import tqdm

import dyco
import rewards
import run_folder
import toy
import train
from config import DEFAULTS, Config, load_config
from data import JsonlDataset, Prompt, Sample, check_lengths, encode_prompt
from distributed import ALONE
from dyco import Signals
from model import Policy, load_policy
from rollout import Rollout, generate, keyed_generator, runs_within
from run_folder import write_file
from tools import report
from tools.ablate import expanded_percentile

PROMPTS_AT_ONCE = 32  # whose pixels and signals are on the device together
REPLICATES = 2000  # of the bootstrap
HIGHEST_MASS = 0.99  # an intervention raises no head's mass above this
ROLES = {"visual": 1, "text": -1}
SHIFT_BINS = 32  # of the histograms over 0 … π
TOY_STEP = re.compile(r"([a-z]+) is ([a-z]+) ([0-9]+), total ([0-9]+)\.")  # toy.write_trace
TOY_DECISIONS = ("colour", f"{toy.SHAPES[0]}'s colour", "value", "total")
CONTROLS = {
    "paper": ("uniform", "shuffled"),
    "signed": ("signed_uniform", "signed_shuffled"),
}  # rule: what `gradient` sets it against
ORACLES = {"oracle": False, "oracle, blame": True}  # what `oracle_scores` is called with


class AnalysisError(ValueError):
    """Arguments or files that cannot be analysed."""


# ------------------------------------------------------------------------------------------------- what is analysed


@dataclass
class Observed:
    """Responses with their signals, on the CPU; all [B, T] but for `prompt` and `correct`."""

    prompt: Tensor  # [B] long, the place of the response's prompt among the samples
    correct: Tensor  # [B] bool
    tokens: Tensor
    mask: Tensor
    signals: Signals
    roles: Tensor
    scores: Tensor


def observe(
    prompt: list[int],
    texts: list[str],
    answers: list[str],
    tokens: Tensor,
    mask: Tensor,
    signals: Signals,
    settings,
) -> Observed:
    """Score responses and assign roles; `settings` has tau and ratio."""
    tokens, mask, signals = tokens.cpu(), mask.cpu(), Signals(*(x.float().cpu() for x in signals))
    roles = dyco.assign_roles(signals.visual_shift, signals.text_shift, mask, settings.tau)
    scores = dyco.alignment_scores(
        signals.visual_mass, signals.text_mass, roles, mask, settings.ratio
    )
    correct = torch.tensor(
        [rewards.accuracy(text, answer) == 1 for text, answer in zip(texts, answers)]
    )
    return Observed(torch.tensor(prompt), correct, tokens, mask, signals, roles, scores)


def together(parts: list[Observed]) -> Observed:
    width = max(part.mask.shape[1] for part in parts)
    stack = lambda tensors: torch.cat([F.pad(x, (0, width - x.shape[1])) for x in tensors])
    wide = {
        name: stack([getattr(part, name) for part in parts])
        for name in ("tokens", "mask", "roles", "scores")
    }
    return Observed(
        torch.cat([part.prompt for part in parts]),
        torch.cat([part.correct for part in parts]),
        signals=Signals(*(stack(field) for field in zip(*(part.signals for part in parts)))),
        **wide,
    )


def sample_responses(
    policy: Policy,
    samples: Sequence,
    count: int,
    config: Config,
    what: str,
    intervention=None,
    each=None,
) -> Observed:
    """rollout.group_size responses to each of the first `count` samples, signals read while decoding. The random streams depend
    on train.seed and on the sample's and the response's place alone: interventions are compared on the same streams.

    each: called with every rollout as it comes.
    """
    parts, bar = [], tqdm(total=count, desc=what)
    for start in range(0, count, PROMPTS_AT_ONCE):
        some = [samples[place] for place in range(start, min(start + PROMPTS_AT_ONCE, count))]
        prompts = [encode(policy, sample, start + i, config) for i, sample in enumerate(some)]
        rollout = generate(
            policy,
            prompts,
            config.rollout.group_size,
            config.rollout.max_new_tokens,
            (config.train.seed, "analysis"),
            config.dyco,
            config.rollout.max_cache_tokens,
            intervention=intervention,
        )
        asked = [prompt for prompt in prompts for _ in range(rollout.group_size)]
        parts.append(
            observe(
                [p.index for p in asked],
                rollout.texts,
                [p.answer for p in asked],
                rollout.tokens,
                rollout.mask,
                rollout.signals,
                config.dyco,
            )
        )
        if each is not None:
            each(rollout)
        bar.update(len(some))
    bar.close()
    return together(parts)


@torch.no_grad()
def read_responses(
    policy: Policy, samples: Sequence, recorded: list[tuple[int, list[int], str]], config: Config
) -> Observed:
    """Recorded responses (place of the sample, token ids, text), teacher-forced through the packed forward."""
    by_place: dict[int, list] = {}
    for place, ids, text in recorded:
        by_place.setdefault(place, []).append((ids, text))
    parts = []
    for place, found in tqdm(by_place.items(), desc="recorded responses"):
        prompt = encode(policy, samples[place], place, config)
        for run in runs_within([len(ids) for ids, _ in found], config.train.micro_batch_tokens):
            ids, texts = zip(*(found[i] for i in run))
            tokens = torch.nn.utils.rnn.pad_sequence(
                [torch.tensor(row) for row in ids], batch_first=True
            )
            mask = torch.arange(tokens.shape[1]) < torch.tensor([len(row) for row in ids])[:, None]
            signals = policy([prompt], tokens, mask, policy.tap(config.dyco)).signals
            parts.append(
                observe(
                    [place] * len(run),
                    texts,
                    [prompt.answer] * len(run),
                    tokens,
                    mask,
                    signals,
                    config.dyco,
                )
            )
    return together(parts)


def encode(policy: Policy, sample: Sample, place: int, config: Config) -> Prompt:
    return encode_prompt(
        sample,
        place,
        policy.tokenizer,
        policy.image_processor,
        config.data.prompt_template,
        config.data.max_prompt_tokens,
    )


# ------------------------------------------------------------------------------------------- estimates with intervals


def by_prompt(values: Tensor, prompt: Tensor) -> Tensor:
    """Sums over the responses to each prompt: values [S, B], prompt [B] -> [S, prompts], float64."""
    _, place = prompt.unique(return_inverse=True)
    return torch.zeros(len(values), int(place.max()) + 1, dtype=torch.float64).index_add_(
        1, place, values.double()
    )


def bootstrap(
    numerators: Tensor, denominators: Tensor, prompt: Tensor, seed: int = 0
) -> tuple[Tensor, Tensor]:
    """Ratios of sums over responses, and the same after drawing prompts with replacement.

    numerators, denominators [S, B] of S statistics; prompt [B] -> ([S], [S, replicates]), NaN where a denominator is 0.
    One draw serves all statistics, so that their differences are paired.
    """
    sums = [by_prompt(x, prompt) for x in (numerators, denominators)]
    prompts = sums[0].shape[1]
    draws = torch.randint(
        prompts, (REPLICATES, prompts), generator=torch.Generator().manual_seed(seed)
    )
    counts = torch.stack(
        [draw.bincount(minlength=prompts) for draw in draws], dim=1
    ).double()  # [prompts, replicates]
    ratio = lambda a, b: torch.where(b > 0, a / b, torch.nan)
    return ratio(*(x.sum(1) for x in sums)), ratio(*(x @ counts for x in sums))


def within_prompts(
    right: tuple[Tensor, Tensor], wrong: tuple[Tensor, Tensor], prompt: Tensor
) -> tuple[Tensor, Tensor]:
    """Differences of ratios of sums, wrong − right, within the prompts that have both: that harder prompts differ from easier ones is
    no difference. A prompt counts m·n / (m + n), where m and n are its two denominators, as for a difference of means.

    right and wrong (numerators, denominators), [S, B] each; prompt [B] -> what `bootstrap` returns.
    """
    (a, m), (b, n) = ((by_prompt(x, prompt) for x in outcome) for outcome in (right, wrong))
    both = (m > 0) & (n > 0)
    weight = torch.where(both, m * n / (m + n), 0)
    return bootstrap(
        torch.where(both, weight * (b / n - a / m), 0), weight, torch.arange(weight.shape[1])
    )


def estimate(value: Tensor, replicates: Tensor, low: float = 0.025) -> list[float | None]:
    """[value, low, high] for people and JSON: None where undefined. `low`: the quantile of the replicates that the interval begins at."""
    number = lambda x: round(float(x), 5) if math.isfinite(x) else None
    if not math.isfinite(value) or not replicates.isfinite().any():
        return [number(value), None, None]
    return [
        number(value),
        *map(number, replicates.nanquantile(torch.tensor([low, 1 - low], dtype=replicates.dtype))),
    ]


# ------------------------------------------------------------------------------------------------------------- roles


def statistics(seen: Observed) -> dict[str, tuple[Tensor, Tensor]]:
    """{name: (numerator, denominator)}, [B] each: means over tokens once summed over responses."""
    mask, roles, signals = seen.mask, seen.roles, seen.signals
    visual, text, acting = roles > 0, roles < 0, roles != 0
    count = lambda marked: marked.sum(1).double()
    over = lambda values, marked: (torch.where(marked, values, 0).double().sum(1), count(marked))
    later = mask.clone()
    later[:, 0] = False  # the first token has no shift
    # role of the last token with one, before each token
    places = torch.where(acting, torch.arange(1, mask.shape[1] + 1), 0).cummax(1).values
    before = F.pad(places, (1, 0))[:, :-1]
    previous = torch.where(before > 0, roles.gather(1, (before - 1).clamp(min=0)), 0)
    switches = acting & (previous != 0) & (previous != roles)
    found = {
        "visual tokens, %": (100 * count(visual), count(mask)),
        "text tokens, %": (100 * count(text), count(mask)),
        "neutral tokens, %": (100 * count(mask & ~acting), count(mask)),
        "alignment of visual tokens": over(seen.scores, visual),
        "alignment of text tokens": over(seen.scores, text),
        "alignment of both": over(seen.scores, acting),
        "image mass at visual tokens": over(signals.visual_mass, visual),
        "text mass at text tokens": over(signals.text_mass, text),
        "image mass": over(signals.visual_mass, mask),
        "text mass": over(signals.text_mass, mask),
        "visual shift, radians": over(signals.visual_shift, later),
        "text shift, radians": over(signals.text_shift, later),
        "role switches per 100 tokens": (100 * count(switches), count(mask)),
        "tokens per response": (count(mask), torch.ones(len(mask), dtype=torch.float64)),
    }
    lengths = mask.sum(1, keepdim=True).clamp(min=1)
    tenth = (torch.arange(mask.shape[1]) * 10 // lengths).clamp(max=9)
    for part in range(10):
        found[f"alignment at {10 * part}–{10 * part + 10} % of the response"] = over(
            seen.scores, acting & (tenth == part)
        )
    return found


def shift_distributions(seen: Observed) -> dict:
    """Histograms over 0 … π and quantiles of both shifts, first tokens left out, of right and of wrong responses."""
    found = {}
    for outcome, chosen in (("correct", seen.correct), ("incorrect", ~seen.correct)):
        later = (seen.mask & chosen[:, None])[:, 1:]
        for name in ("visual_shift", "text_shift"):
            values = getattr(seen.signals, name)[:, 1:][later]
            quantiles = (
                np.quantile(values.numpy(), [0.1, 0.5, 0.9]).tolist()
                if values.numel()
                else [None] * 3
            )
            found.setdefault(name, {})[outcome] = {
                "counts": torch.histc(values, SHIFT_BINS, 0, math.pi).int().tolist(),
                "quantiles": dict(
                    zip(("10", "50", "90"), (None if q is None else round(q, 4) for q in quantiles))
                ),
            }
    return found


def token_strings(seen: Observed, tokenizer, shown: int = 10) -> dict[str, list[dict]]:
    """For each role the token strings that have it most often, among those that occur often enough to tell."""
    totals, having = Counter(), {name: Counter() for name in ROLES}
    for ids, roles in zip(seen.tokens[seen.mask].tolist(), seen.roles[seen.mask].tolist()):
        totals[ids] += 1
        for name, role in ROLES.items():
            having[name][ids] += role == roles
    enough = [
        token for token, count in totals.items() if count >= max(10, sum(totals.values()) // 1000)
    ]
    best = lambda name: sorted(
        enough, key=lambda token: (-having[name][token] / totals[token], -totals[token], token)
    )
    share = lambda name, token: round(having[name][token] / totals[token], 4)
    return {
        name: [
            {
                "token": tokenizer.decode(token),
                "occurrences": totals[token],
                "share": share(name, token),
            }
            for token in best(name)[:shown]
            if having[name][token]
        ]
        for name in ROLES
    }


def describe_roles(seen: Observed, tokenizer) -> dict:
    """What `roles` writes: [estimate, low, high] of each statistic for right and wrong responses and their difference within prompts."""
    found = statistics(seen)
    numerators, denominators = (torch.stack(x) for x in zip(*found.values()))
    right, wrong = (
        (numerators * chosen, denominators * chosen) for chosen in (seen.correct, ~seen.correct)
    )
    columns = {
        "correct": bootstrap(*right, seen.prompt),
        "incorrect": bootstrap(*wrong, seen.prompt),
        "difference": within_prompts(right, wrong, seen.prompt),
    }
    table = {
        name: {
            column: estimate(values[i], replicates[i])
            for column, (values, replicates) in columns.items()
        }
        for i, name in enumerate(found)
    }
    count = lambda chosen: {
        "responses": int(chosen.sum()),
        "prompts": len(seen.prompt[chosen].unique()),
    }
    return {
        "counts": {"correct": count(seen.correct), "incorrect": count(~seen.correct)},
        "statistics": table,
        "shifts": shift_distributions(seen),
        "strings": token_strings(seen, tokenizer),
    }


def toy_decisions(pieces: list[str], sample: Sample) -> dict[int, tuple[str, bool]]:
    """Which tokens of a toy response decide what: {place: (kind, is it right)}; `pieces` are the tokens as text.

    A "colour", or that of the shape with the bad habit, is right if it is the picture's; a "value" if it is that of the
    named colour; a "total" if it is the total before plus the named value: a later step is not wrong because of an earlier one.
    """
    ends = np.cumsum([len(piece) for piece in pieces])
    found, total = {}, 0
    for step in TOY_STEP.finditer("".join(pieces)):
        shape, color, value, after = step.groups()
        kinds = (
            f"{toy.SHAPES[0]}'s colour" if shape == toy.SHAPES[0] else "colour",
            "value",
            "total",
        )
        right = (
            color == sample.extra["colors"].get(shape),
            int(value) == sample.extra["values"].get(color),
            int(after) == total + int(value),
        )
        places = (
            int(np.searchsorted(ends, step.start(group), side="right")) for group in (2, 3, 4)
        )
        found |= dict(zip(places, zip(kinds, right)))
        total = int(after)
    return found


def all_decisions(
    places: list[int], tokens: Tensor, mask: Tensor, samples: Sequence[Sample], tokenizer
) -> Iterator[tuple[int, int, str, bool]]:
    """(row, token, kind, is it right) of what toy responses [B, T] to the samples at some places [B] decide."""
    for row, place in enumerate(places):
        pieces = [tokenizer.decode([token]) for token in tokens[row][mask[row]].tolist()]
        for token, (kind, right) in toy_decisions(pieces, samples[place]).items():
            yield row, token, kind, right


def describe_decisions(
    seen: Observed, samples: Sequence[Sample], tokenizer
) -> dict[str, dict[str, dict]]:
    """{kind: {"right", "wrong", "difference" (wrong − right, within prompts): {statistic: [estimate, low, high], "tokens": how many}}}.

    The kinds are those of `toy_decisions`, and "other" tokens, which are neither.
    """
    marks: dict[tuple[str, str], Tensor] = {
        (kind, outcome): torch.zeros_like(seen.mask)
        for kind in TOY_DECISIONS
        for outcome in ("right", "wrong")
    }
    other = seen.mask.clone()
    for row, token, kind, right in all_decisions(
        seen.prompt.tolist(), seen.tokens, seen.mask, samples, tokenizer
    ):
        marks[kind, "right" if right else "wrong"][row, token] = True
        other[row, token] = False
    signals, weights = seen.signals, dyco.token_weights(seen.scores, seen.mask)
    image_share = signals.visual_mass / (signals.visual_mass + signals.text_mass).clamp(min=1e-12)
    values = {
        "visual, %": 100.0 * (seen.roles > 0),
        "text, %": 100.0 * (seen.roles < 0),
        "visual shift": signals.visual_shift,
        "text shift": signals.text_shift,
        "image's share": image_share,
        "alignment": seen.scores,
        "weight": weights,
    }

    marks["other", "right"] = other
    numerators = torch.stack(
        [
            torch.where(marked, value, 0).sum(1)
            for marked in marks.values()
            for value in values.values()
        ]
    )
    denominators = torch.stack([marked.sum(1) for marked in marks.values() for _ in values])
    sums = dict(zip(marks, zip(numerators.split(len(values)), denominators.split(len(values)))))
    describe = lambda estimates, replicates: dict(zip(values, map(estimate, estimates, replicates)))
    table: dict[str, dict[str, dict]] = {}
    for (kind, outcome), parts in sums.items():
        table.setdefault(kind, {})[outcome] = {
            "tokens": int(marks[kind, outcome].sum()),
            **describe(*bootstrap(*parts, seen.prompt)),
        }
    for kind in TOY_DECISIONS:
        table[kind]["difference"] = describe(
            *within_prompts(sums[kind, "right"], sums[kind, "wrong"], seen.prompt)
        )
    return table


def decisions_text(table: dict) -> str:
    names = [name for name in table["other"]["right"] if name != "tokens"]
    line = lambda cells: "".join(
        f"{cell:<{width}}" for cell, width in zip(cells, (24, 9, *[15] * len(names)))
    ).rstrip()
    lines = [line(("tokens that decide", "tokens", *names))]
    for kind, outcomes in table.items():
        for outcome, row in outcomes.items():
            if outcome != "difference":
                cells = [report.interval([row[name][0], None, None]) for name in names]
                lines.append(
                    line((kind if kind == "other" else f"{kind}, {outcome}", row["tokens"], *cells))
                )
    lines += [
        f"alignment, wrong − right within prompts: {kind} {report.interval(outcomes['difference']['alignment'])}"
        for kind, outcomes in table.items()
        if "difference" in outcomes
    ]
    return "\n".join(lines)


def roles_text(found: dict) -> str:
    counts = found["counts"]
    heads = [f"{name} ({counts[name]['responses']})" for name in ("correct", "incorrect")] + [
        "within prompts"
    ]
    lines = [f"{'':<42}" + "".join(f"{head:<26}" for head in heads)]
    for name, row in found["statistics"].items():
        lines.append(
            f"{name:<42}"
            + "".join(
                f"{report.interval(row[part]):<26}"
                for part in ("correct", "incorrect", "difference")
            )
        )
    for name, by_outcome in found["shifts"].items():
        cells = [
            " / ".join(
                "–" if q is None else f"{q:.2f}" for q in by_outcome[outcome]["quantiles"].values()
            )
            for outcome in ("correct", "incorrect")
        ]
        lines.append(
            f"{name.replace('_', ' ') + ', quantiles 10/50/90 %':<42}"
            + "".join(f"{cell:<26}" for cell in cells)
        )
    for name, strings in found["strings"].items():
        shares = [f"{s['token']!r} {100 * s['share']:.0f} % of {s['occurrences']}" for s in strings]
        lines.append(f"most often {name}: " + ", ".join(shares))
    if "decisions" in found:
        lines += ["", decisions_text(found["decisions"])]
    return "\n".join(line.rstrip() for line in lines)


def run_roles(arguments) -> None:
    config = load_config(arguments.config, arguments.overrides)
    out = Path(arguments.out)
    keep = out / "responses.jsonl"
    if arguments.responses is None and keep.exists():
        raise AnalysisError(
            f"{keep} holds responses that were sampled before; analyse them with --responses {keep}, or choose "
            "another --out"
        )
    policy, samples, ids, count = load(arguments, config)
    recorded = (
        None
        if arguments.responses is None
        else read_recorded(Path(arguments.responses), ids, policy)
    )
    out.mkdir(parents=True, exist_ok=True)
    if recorded is None:

        def write(rollout: Rollout) -> None:  # as they come: what was sampled is never lost
            asked = [prompt for prompt in rollout.prompts for _ in range(rollout.group_size)]
            run_folder.append_jsonl(
                keep,
                [
                    {"id": prompt.id, "response": text, "token_ids": tokens[mask].tolist()}
                    for prompt, text, tokens, mask in zip(
                        asked, rollout.texts, rollout.tokens, rollout.mask
                    )
                ],
            )

        seen = sample_responses(policy, samples, count, config, "sampling", each=write)
    else:
        seen = read_responses(policy, samples, recorded, config)
    found = {
        "model": arguments.model,
        "data": arguments.data,
        "responses": arguments.responses,
        "dyco": asdict(config.dyco),
        **describe_roles(seen, policy.tokenizer),
    }
    if arguments.data == "toy":
        found["decisions"] = describe_decisions(seen, samples, policy.tokenizer)
    write_file(out / "roles.json", json.dumps(found, indent=1).encode())
    print(roles_text(found))
    print(f"wrote {out / 'roles.json'}")


# --------------------------------------------------------------------------------------------------------- intervene


def mass_bias(mass: Tensor, rest: Tensor, factor: float) -> tuple[Tensor, Tensor]:
    """What to add to a modality's attention logits so that its mass r becomes min(factor · r, 0.99).

    mass r and rest 1 − r, both given because 1 − r rounds to 0 where it matters. Returns (bias, capped) of their shape:
    logit(min(factor · r, 0.99)) − logit(r), and where the cap bound. The cap never works backwards: a mass above 0.99 stays
    where it is when it should rise. 0 where r or 1 − r is 0: there is nothing to move, or nowhere to move it from.

    >>> mass_bias(torch.tensor([.2, .6, .0]), torch.tensor([.8, .4, 1.]), 2.0)[0]
    tensor([0.9808, 4.1897, 0.0000])
    """
    r, rest_64 = mass.double(), rest.double()
    target = factor * r
    highest = r.clamp(min=HIGHEST_MASS)
    capped = (target > highest) & (rest > 0)
    # logit(λr) − logit(r) = log λ + log((1 − r) / (1 − λr)), exactly 0 at λ = 1
    free = (
        math.log(factor) + (rest_64 / (rest_64 + (1 - factor) * r)).log()
        if factor > 0
        else torch.full_like(r, -math.inf)
    )
    bound = torch.where(
        r < HIGHEST_MASS, math.log(HIGHEST_MASS / (1 - HIGHEST_MASS)) - r.log() + rest_64.log(), 0
    )
    bias = torch.where((r > 0) & (rest > 0), torch.where(capped, bound, free), 0)
    return bias.to(mass.dtype), capped


class Intervention:
    """Scales the attention mass on one modality by `factor` while chosen tokens are sampled, in every head of some layers.

    Decoding computes each step twice: once as the policy would, which gives the next token its role (`choose`), and once
    with the bias of `mass_bias` on the modality's logits where the token was chosen (`shift`); the keys and values of the second
    computation stay. A head's mass is that of the second computation, just before the bias: what lower layers changed is in
    it. What counts as text is dyco.text_scope's, as in eq. 1. The first token is never chosen: it has no role.

    role: +1 visual, −1 text: its tokens are chosen. plan: instead, {(prompt's index, response): steps}, 0 the first token.
    modality: +1 image, −1 text. layers: decoder layers, None for all.
    """

    def __init__(
        self,
        factor: float,
        modality: int,
        role: int = 0,
        plan: dict | None = None,
        layers: list[int] | None = None,
        depth: int = 1,
        tau: float = 0.05,
    ):
        self.factor, self.modality, self.role, self.plan, self.tau = (
            factor,
            modality,
            role,
            plan,
            tau,
        )
        self.layers = set(range(depth)) if layers is None else {layer % depth for layer in layers}
        self.chosen: Tensor | None = None  # [R] bool
        self.moved = self.capped = 0  # heads × layers × tokens

    def choose(
        self, names: list[tuple[int, int]], step: int, signals: Signals, going: Tensor
    ) -> None:
        """names: (prompt's index, response) of each of the R rows; signals [R] of the token at `step`; going [R] bool."""
        if self.plan is not None:
            planned = torch.tensor(
                [step in self.plan.get(name, ()) for name in names], device=going.device
            )
        else:
            planned = (
                dyco.assign_roles(signals.visual_shift, signals.text_shift, going, self.tau)
                == self.role
            )
        self.chosen = planned & going

    def shift(self, layer: int, scores: Tensor, visual: Tensor, text: Tensor) -> Tensor:
        """scores [R, H_kv, H/H_kv, K] before the softmax; visual and text keys [R, K] bool."""
        if layer not in self.layers:
            return scores
        members = (visual if self.modality > 0 else text)[:, None, None]
        attention = torch.softmax(scores, dim=-1)
        mass, rest = (
            torch.where(keys, attention, 0).sum(-1, keepdim=True) for keys in (members, ~members)
        )
        bias, capped = mass_bias(mass, rest, self.factor)
        chosen = self.chosen[:, None, None, None]
        self.moved += int((chosen & (mass > 0) & (rest > 0)).sum())
        self.capped += int((chosen & capped).sum())
        return torch.where(members & chosen, scores + bias, scores)


def random_plan(
    touched: Tensor, lengths: Tensor, names: list[tuple[int, int]], seed: int
) -> dict[tuple[int, int], set[int]]:
    """The random control's tokens: for each response as many steps as `touched` says, drawn without replacement from 1 … its
    length − 1 (0 is the first token, which no intervention touches); touched, lengths [B] are those of the same response
    under the intervention that is controlled. Where the control's own response ends earlier, later steps fall away.
    Tokens of the role may be among them: the control is about *which* tokens.
    """
    order = lambda name, length: torch.randperm(
        max(length - 1, 0), generator=keyed_generator(seed, "random tokens", *name)
    )
    return {
        name: set((1 + order(name, length)[:count]).tolist())
        for name, count, length in zip(names, touched.tolist(), lengths.tolist())
    }


def arm_row(seen: Observed, touched: Tensor) -> dict:
    """What a row of intervene.jsonl keeps of each response: enough for every estimate and for the random control."""
    row = {
        "prompt": seen.prompt.tolist(),
        "correct": seen.correct.int().tolist(),
        "length": seen.mask.sum(1).tolist(),
        "touched": touched.tolist(),
    }
    for name, role in ROLES.items():
        marked = seen.roles == role
        row[f"{name} tokens"] = marked.sum(1).tolist()
        row[f"{name} alignment"] = [
            round(x, 5) for x in torch.where(marked, seen.scores, 0).sum(1).tolist()
        ]
    return row


def describe_intervention(rows: list[dict]) -> list[dict]:
    """Per arm and λ, as [estimate, low, high]: accuracy, its change against λ = 1, its distance from the random tokens' accuracy at
    the same λ (both paired), and the alignment of the role's tokens. rows: those of intervene.jsonl, λ = 1 first."""
    base = rows[0]
    prompt, ones = torch.tensor(base["prompt"]), torch.ones(len(base["prompt"]))
    tensor = lambda row, key: torch.tensor(row[key], dtype=torch.float64)
    made = {(row["role"], row["arm"], row["factor"]): row for row in rows[1:]}
    found = []
    for role in dict.fromkeys(row["role"] for row in rows[1:]):
        factors = sorted(
            {row["factor"] for row in rows[1:] if row["role"] == role} | {base["factor"]}
        )
        for arm in ("role tokens", "random tokens", "other modality"):
            for factor in factors:
                row, control = (
                    made.get((role, name, factor), base) for name in (arm, "random tokens")
                )
                values, replicates = bootstrap(
                    torch.stack(
                        [
                            tensor(row, "correct"),
                            tensor(base, "correct"),
                            tensor(control, "correct"),
                            tensor(row, f"{role} alignment"),
                        ]
                    ),
                    torch.stack([ones, ones, ones, tensor(row, f"{role} tokens")]),
                    prompt,
                )
                against = lambda i: estimate(values[0] - values[i], replicates[0] - replicates[i])
                found.append(
                    {
                        "role": role,
                        "arm": arm,
                        "factor": factor,
                        "accuracy": estimate(values[0], replicates[0]),
                        "change": against(1),
                        "against random": against(2),
                        "alignment": estimate(values[3], replicates[3]),
                        "touched": round(sum(row["touched"]) / len(ones), 3),
                        "capped": row["capped"],
                    }
                )
    return found


def intervention_text(found: list[dict]) -> str:
    widths = (8, 16, 7, 24, 24, 24, 22, 9, 0)
    line = lambda cells: "".join(f"{cell:<{width}}" for cell, width in zip(cells, widths)).rstrip()
    lines = [
        line(
            (
                "role",
                "arm",
                "λ",
                "accuracy, %",
                "change, points",
                "against random",
                "alignment",
                "touched",
                "capped, %",
            )
        )
    ]
    for row in found:
        lines.append(
            line(
                (
                    row["role"],
                    row["arm"],
                    f"{row['factor']:g}",
                    report.interval(row["accuracy"], 100),
                    report.interval(row["change"], 100),
                    report.interval(row["against random"], 100),
                    report.interval(row["alignment"]),
                    f"{row['touched']:.1f}",
                    f"{100 * row['capped']:.1f}",
                )
            )
        )
    return "\n".join(lines)


def run_intervene(arguments) -> None:
    config = load_config(arguments.config, arguments.overrides)
    factors = sorted(set(arguments.factors) - {1.0})
    if not factors or any(not 0 <= factor < math.inf for factor in factors):
        raise AnalysisError(
            f"--factors: expected numbers of 0 or more, one of them not 1, found {arguments.factors}"
        )
    out, layers = (
        Path(arguments.out),
        None if arguments.layers is None else sorted(set(arguments.layers)),
    )
    policy, samples, _, count = load(arguments, config)
    wrong = [layer for layer in layers or [] if not -policy.depth <= layer < policy.depth]
    if wrong:
        raise AnalysisError(
            f"--layers: {wrong} out of range; the model has {policy.depth} decoder layers"
        )
    if not any(samples[place].images for place in range(count)):
        raise AnalysisError(
            f"--data {arguments.data}: no sample has an image; there is no attention to move between image and text"
        )
    out.mkdir(parents=True, exist_ok=True)
    files = sorted(model_folder(arguments, config).glob("*.safetensors"))
    weights = {path.name: [path.stat().st_size, path.stat().st_mtime_ns] for path in files}
    settings = {
        "model": arguments.model,
        "weights": weights,
        "data": arguments.data,
        "samples": count,
        "layers": layers,
        "seed": config.train.seed,
        "template": config.data.prompt_template,
        "toy": asdict(config.toy),
        "rollout": asdict(config.rollout),
        "dyco": asdict(config.dyco),
    }
    log = out / "intervene.jsonl"
    rows = read_log(log, settings)
    names = [
        (place, response) for place in range(count) for response in range(config.rollout.group_size)
    ]

    def arm(
        role: str | None, name: str, factor: float, intervention: Intervention | None = None
    ) -> dict:
        """One pass over the samples, unless an earlier call got that far."""
        done = rows.get((role, name, factor))
        if done is None:
            what = f"{role}, {name}, λ = {factor:g}" if role else "λ = 1"
            seen = sample_responses(policy, samples, count, config, what, intervention)
            touched, capped = torch.zeros(len(names), dtype=torch.long), 0.0
            if intervention is not None:
                capped = round(intervention.capped / max(intervention.moved, 1), 5)
                touched = (seen.roles == intervention.role).sum(1)
                if intervention.plan is not None:
                    lengths = seen.mask.sum(1).tolist()
                    touched = torch.tensor(
                        [
                            sum(step < n for step in intervention.plan[who])
                            for who, n in zip(names, lengths)
                        ]
                    )
            done = {
                "role": role,
                "arm": name,
                "factor": factor,
                **arm_row(seen, touched),
                "capped": capped,
            }
            run_folder.append_jsonl(log, [{"settings": settings, **done}])
        return done

    found = [arm(None, "none", 1.0)]
    scale = lambda factor, modality, **tokens: Intervention(
        factor, modality, layers=layers, depth=policy.depth, tau=config.dyco.tau, **tokens
    )
    for name in ROLES if arguments.role == "both" else [arguments.role]:
        role = ROLES[name]
        for factor in factors:
            main = arm(name, "role tokens", factor, scale(factor, role, role=role))
            plan = random_plan(
                torch.tensor(main["touched"]),
                torch.tensor(main["length"]),
                names,
                config.train.seed,
            )
            found += [
                main,
                arm(name, "random tokens", factor, scale(factor, role, plan=plan)),
                arm(name, "other modality", factor, scale(factor, -role, role=role)),
            ]
    described = describe_intervention(found)
    write_file(
        out / "intervene.json",
        json.dumps({"settings": settings, "arms": described}, indent=1).encode(),
    )
    print(intervention_text(described))
    print(f"wrote {out / 'intervene.json'}")


def read_log(path: Path, settings: dict) -> dict[tuple, dict]:
    """The arms that an earlier call finished. Raises AnalysisError if they were made with other settings."""
    found = {}
    for line, row in run_folder.read_jsonl(path, growing=True) if path.exists() else []:
        other = [key for key in settings if row.get("settings", {}).get(key) != settings[key]]
        if other:
            before, now = row.get("settings", {}).get(other[0]), settings[other[0]]
            raise AnalysisError(
                f"{path}, line {line}: holds an analysis with another {other[0]} ({before!r}, now {now!r}); choose "
                "another --out"
            )
        found[row["role"], row["arm"], row["factor"]] = row
    return found


# ---------------------------------------------------------------------------------------------------------- gradient


class Recorder:
    """Stands where train.update has its optimizer: keeps the gradient, takes no step."""

    def __init__(self, policy: Policy):
        self.parameters, self.gradient = [p for p in policy.parameters() if p.requires_grad], None

    def step(self) -> None:
        self.gradient = torch.cat(
            [(torch.zeros_like(p) if p.grad is None else p.grad).flatten() for p in self.parameters]
        )

    def zero_grad(self, set_to_none: bool = True) -> None:
        for parameter in self.parameters:
            parameter.grad = None


def oracle_scores(batch: train.Batch, samples: Sequence[Sample], tokenizer, blame: bool) -> Tensor:
    """Alignment scores [B, T] that only the author of the toy can give: 1 at the tokens that decide something, 0 at the others. With
    `blame`, in responses worse than the mean of their group 1 only where they decide wrongly."""
    rollout, scores = batch.rollout, torch.zeros(batch.rollout.mask.shape)
    worse = (batch.rewards < batch.rewards.mean(1, keepdim=True)).flatten().tolist()
    places = [prompt.index for prompt in rollout.prompts for _ in range(rollout.group_size)]
    for row, token, _, right in all_decisions(
        places, rollout.tokens, rollout.mask, samples, tokenizer
    ):
        scores[row, token] = not (blame and worse[row] and right)
    return scores.to(rollout.mask.device)


def batch_gradient(
    config: Config,
    policy: Policy,
    batch: train.Batch,
    rule: str,
    step: int,
    scores: Tensor | None = None,
) -> Tensor:
    """The gradient [parameters] of one optimizer step on the whole batch, its advantages assigned by `rule`, or by eq. 7 and 8 with
    the given scores: what train.update hands to the optimizer before any clipping."""
    config = replace(config, dyco=replace(config.dyco, rule=rule if scores is None else "off"))
    train.assign_advantages(config, batch, step)
    if scores is not None:
        batch.advantages = dyco.reweight_advantages(
            batch.advantages, scores, batch.roles, batch.rollout.mask, config.dyco.alpha
        )
    recorder = Recorder(policy)
    train.update(config, policy, recorder, batch, list(range(len(batch.rollout.prompts))), ALONE)
    if recorder.gradient is None:
        raise AnalysisError(f"batch {step}, rule {rule}: the loss or its gradient is not finite")
    return recorder.gradient


def describe_gradients(
    config: Config,
    policy: Policy,
    batches: list[train.Batch],
    rules: list[str],
    oracles: dict[str, list[Tensor]] | None = None,
) -> dict[str, dict]:
    """For each rule and each oracle (name -> scores of each batch), as [estimate, low, high] over the second half of the batches:
    `factor` and `spread`, mean and standard deviation over tokens of what advantages are multiplied by; `length` of the gradient
    over the host's on the same batch, and the `angle` between the two in degrees; `summed`, the angle between the sums over all these
    batches, where the noise of single ones cancels, without an interval; `reference`, the cosine with the sum of the
    host's gradients on the first half, which stands for the direction that a batch is a noisy sample of; `gain`, how much larger
    that is than the host's own, and `over NAME` than that of a control (CONTROLS).

    Intervals hold for that reference; of few batches they are as long as Student's. Batches whose gradient is zero are left out.
    """
    oracles = oracles or {}
    gradient = lambda k, rule: batch_gradient(
        config, policy, batches[k], rule, k, oracles[rule][k] if rule in oracles else None
    )
    unit, half = lambda x: x / x.norm(), len(batches) // 2
    degrees = lambda a, b: (
        2 * ((unit(a) - unit(b)).norm() / 2).asin().rad2deg()
    )  # of the chord: exact where the cosine rounds to 1
    reference = sum(gradient(k, "off") for k in tqdm(range(half), desc="reference"))
    towards, found, sums = unit(reference), {rule: [] for rule in ["off", *rules, *oracles]}, {}
    for k in tqdm(range(half, len(batches)), desc="gradients"):
        host = gradient(k, "off")
        if not host.any() or not reference.any():
            continue
        advantages = batches[k].advantages
        for rule, rows in found.items():
            mine = host if rule == "off" else gradient(k, rule)
            factors = (batches[k].advantages / advantages)[advantages != 0]
            sums[rule] = sums.get(rule, 0) + mine.cpu()
            rows.append(
                [
                    factors.mean(),
                    factors.std(),
                    mine.norm() / host.norm(),
                    degrees(mine, host),
                    unit(mine) @ towards,
                    (unit(mine) - unit(host)) @ towards,
                ]
            )
    if not found["off"]:
        raise AnalysisError(
            "all gradients are zero: no group with unequal rewards; take more samples (eval.samples)"
        )
    described, gains = (
        {},
        {rule: torch.tensor(rows, dtype=torch.float64).T[-1] for rule, rows in found.items()},
    )
    for rule, rows in found.items():
        values = dict(
            zip(
                ("factor", "spread", "length", "angle", "reference", "gain"),
                torch.tensor(rows, dtype=torch.float64).T,
            )
        )
        values |= {
            f"over {other}": gains[rule] - gains[other]
            for other in CONTROLS.get(rule, ())
            if other in gains
        }
        table, n = torch.stack(list(values.values())), len(rows)
        low = expanded_percentile(n) if n > 1 else 0.025
        intervals = [
            estimate(*pair, low)
            for pair in zip(*bootstrap(table, torch.ones_like(table), torch.arange(n)))
        ]
        described[rule] = dict(zip(values, intervals)) | {
            "summed": [round(float(degrees(sums[rule], sums["off"])), 5), None, None]
        }
    return described


def gradients_text(found: dict[str, dict]) -> str:
    heads = {
        "factor": ("factor", 1),
        "spread": ("its spread", 1),
        "length": ("length / host's", 1),
        "angle": ("angle to host's, degrees", 1),
        "summed": ("of the sums", 1),
        "reference": ("100 · cosine, reference", 100),
        "gain": ("minus the host's", 100),
    }
    lines = [f"{'rule':<16}" + "".join(f"{head:<29}" for head, _ in heads.values())]
    lines += [
        f"{rule:<16}"
        + "".join(
            f"{report.interval(row[name], factor):<29}" for name, (_, factor) in heads.items()
        )
        for rule, row in found.items()
    ]
    lines += [
        f"100 · cosine, {rule} {name}: {report.interval(row[name], 100)}"
        for rule, row in found.items()
        for name in row
        if name.startswith("over ")
    ]
    return "\n".join(line.rstrip() for line in lines)


def run_gradient(arguments) -> None:
    config = load_config(arguments.config, arguments.overrides)
    if unknown := [rule for rule in arguments.rules if rule not in dyco.RULES]:
        raise AnalysisError(
            f"--rules: no rule {', '.join(unknown)}; expected some of {', '.join(dyco.RULES)}"
        )
    # at the first update of a step: all ratios are 1, the reference policy is the policy, nothing is clipped
    config = replace(
        config,
        algo=replace(config.algo, kl=0.0),
        optim=replace(config.optim, grad_clip=math.inf),
        dyco=replace(config.dyco, enabled=True, capture="rollout"),
    )
    policy, samples, _, count = load(arguments, config, trainable=True)
    size = config.rollout.prompts_per_step
    if count < 2 * size:
        raise AnalysisError(
            f"{count} samples make {count // size} batches of rollout.prompts_per_step={size}; expected 2 or more "
            "(eval.samples, toy.eval_size)"
        )
    out = Path(arguments.out)
    out.mkdir(parents=True, exist_ok=True)
    custom = rewards.load_custom(config.reward.custom) if config.reward.custom else None
    batches = []
    for k in tqdm(range(count // size), desc="sampling"):
        batch = train.collect(
            config,
            policy,
            samples,
            [(place, place) for place in range(k * size, (k + 1) * size)],
            0,
            custom,
        )
        batch.loss_mask = train.loss_mask(config, batch.rollout)
        batch.old_logprobs, _ = train.score(
            config, policy, batch.rollout, [list(range(size))], ALONE
        )
        batches.append(batch)
    rules = [rule for rule in dict.fromkeys(arguments.rules) if rule != "off"]
    oracles = {
        name: [oracle_scores(batch, samples, policy.tokenizer, blame) for batch in batches]
        for name, blame in ORACLES.items()
        if arguments.data == "toy"
    }
    found = {
        "model": arguments.model,
        "data": arguments.data,
        "algo": config.algo.name,
        "dyco": asdict(config.dyco),
        "batches": len(batches),
        "prompts_per_batch": size,
        "rules": describe_gradients(config, policy, batches, rules, oracles),
    }
    write_file(out / "gradient.json", json.dumps(found, indent=1).encode())
    print(gradients_text(found["rules"]))
    print(f"wrote {out / 'gradient.json'}")


# -------------------------------------------------------------------------------------------------- inputs and main


def model_folder(arguments, config: Config) -> Path:
    """The policy's folder or hub id; `toy` is the warm start that the config describes, built if need be."""
    if arguments.model != "toy":
        return Path(arguments.model)
    return toy.prepare(
        config.toy.level, config.toy.seed, config.data.prompt_template, config.toy.cache_dir
    )


def load(
    arguments, config: Config, trainable: bool = False
) -> tuple[Policy, Sequence, list[str], int]:
    """(policy, samples, their ids, how many of them to sample from), everything checked."""
    if config.train.threads:
        torch.set_num_threads(config.train.threads)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    policy = load_policy(
        model_folder(arguments, config),
        device,
        config.model.dtype,
        config.model.attention,
        config.rollout.temperature,
        config.model.compile,
        trainable=trainable,
        max_pixels=config.data.max_pixels,
    )
    policy.tap(config.dyco)  # knows which layers there are
    if arguments.data == "toy":
        sizes = {"test": config.toy.eval_size, "train": config.toy.train_size}
        splits = [
            toy.ToyDataset(toy.LEVELS[config.toy.level], config.toy.seed, split, size)
            for split, size in sizes.items()
        ]
        ids = [f"{split}-{index}" for split, size in sizes.items() for index in range(size)]
        return (
            policy,
            torch.utils.data.ConcatDataset(splits),
            ids,
            min(config.eval.samples, config.toy.eval_size),
        )
    samples = JsonlDataset(arguments.data, config.data.image_root, config.data.on_error)
    check_lengths(
        samples,
        policy.tokenizer,
        policy.image_processor,
        config.data.prompt_template,
        config.data.max_prompt_tokens,
    )
    return policy, samples, samples.ids, min(config.eval.samples, len(samples))


def read_recorded(path: Path, ids: list[str], policy: Policy) -> list[tuple[int, list[int], str]]:
    """(place of the sample, token ids, text) of each row of a JSONL file: {"id": …, "response": …}.

    "token_ids", where a row has them, are taken as they are; else the text is tokenized, and the end token put behind it unless
    the row says "truncated": true. samples.jsonl of a run and what `roles` keeps can be read. Raises AnalysisError.
    """
    places, found, limit = {}, [], policy.hf.config.text_config.max_position_embeddings
    for place, name in enumerate(ids):
        places.setdefault(name, []).append(place)
    for line, row in run_folder.read_jsonl(path):
        refuse = lambda what: AnalysisError(f"{path}, line {line}: {what}")
        text, tokens = row.get("response"), row.get("token_ids")
        at = places.get(str(row.get("id")), [])
        if len(at) != 1:
            raise refuse(
                f"found the id {row.get('id')!r:.100}, which {len(at) or 'no'} rows of --data have; expected one"
            )
        if not isinstance(text, str) or text != text.encode(errors="replace").decode():
            raise refuse(f'"response" is {text!r:.100}; expected valid text')
        if tokens is None:
            end = [] if row.get("truncated") is True else [policy.tokenizer.eos_token_id]
            tokens = policy.tokenizer(text, add_special_tokens=False).input_ids + end
        size = policy.hf.config.text_config.vocab_size
        if not isinstance(tokens, list) or not all(
            type(token) is int and 0 <= token < size for token in tokens
        ):
            raise refuse(
                f'"token_ids" is {tokens!r:.100}; expected a list of ids from 0 to {size - 1}'
            )
        if not 1 <= len(tokens) <= limit:
            raise refuse(f"the response has {len(tokens)} tokens; expected 1 to {limit}")
        found.append((at[0], tokens, text))
    if not found:
        raise AnalysisError(
            f"{path} is empty; expected one JSON object with id and response per line"
        )
    return found


def main(arguments: list[str] | None = None) -> None:
    numbers = lambda kind: lambda text: [kind(part) for part in text.split(",")]
    parser = argparse.ArgumentParser(
        description="Look at a policy's attention, change it, or write the report of a run."
    )
    commands = parser.add_subparsers(dest="command", required=True)
    roles = commands.add_parser("roles", help="compare the tokens of right and wrong responses")
    roles.add_argument(
        "--responses",
        help="JSONL of responses to analyse instead of sampling: id and response in each row",
    )
    roles.set_defaults(run=run_roles)
    intervene = commands.add_parser(
        "intervene",
        help="scale the attention of tokens of one role, and see what becomes of answers",
    )
    intervene.add_argument("--role", default="both", choices=[*ROLES, "both"], help="whose tokens")
    intervene.add_argument(
        "--factors",
        type=numbers(float),
        default=[0.0, 0.25, 0.5, 2.0, 4.0],
        help="λ, separated by commas; 1 is always measured",
    )
    intervene.add_argument(
        "--layers",
        type=numbers(int),
        help="decoder layers to change, separated by commas (default: all)",
    )
    intervene.set_defaults(run=run_intervene)
    gradient = commands.add_parser(
        "gradient",
        help="how far the rules of DyCo turn the gradient of a batch, and whether towards that of others",
    )
    gradient.add_argument(
        "--rules",
        type=numbers(str),
        default=[
            "paper",
            "uniform",
            "shuffled",
            "signed",
            "signed_uniform",
            "signed_shuffled",
            "response",
        ],
        help="of dyco.RULES, separated by commas",
    )
    gradient.set_defaults(run=run_gradient)
    for command in (roles, intervene, gradient):
        command.add_argument(
            "--model",
            required=True,
            help="toy (the warm start), a Hugging Face directory such as RUN_DIR/final, or a hub id",
        )
        command.add_argument(
            "--data", required=True, help="toy (its held-out split) or a JSONL file"
        )
        command.add_argument(
            "--out",
            required=True,
            help="folder to write to; RUN_DIR/analysis puts it into the run's report",
        )
        command.add_argument(
            "--config", default=DEFAULTS, help="a config file, such as RUN_DIR/config.yaml"
        )
        command.add_argument(
            "overrides", nargs="*", metavar="section.key=value", help="over the config's values"
        )
    one = commands.add_parser("report", help="write RUN_DIR/report.html")
    one.add_argument("folder", metavar="RUN_DIR")
    one.set_defaults(run=lambda arguments: print(f"wrote {report.write(arguments.folder)}"))
    arguments = parser.parse_args(arguments)
    try:
        arguments.run(arguments)
    except (ValueError, OSError, train.RunError) as error:  # ours are ValueErrors
        sys.exit(f"error: {error}")


if __name__ == "__main__":
    main()
