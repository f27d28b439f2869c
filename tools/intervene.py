"""intervene.py: what becomes of answers when the attention of some tokens is changed.

    python -m tools.intervene --model toy --data toy --out runs/analysis [section.key=value ...]

This is the paper's experiment. While responses are sampled, the attention of the tokens of one role
is scaled by λ: that on their own modality, that on the other one, and, as a control, that of random
tokens on the same modality. Each of these *arms* is one pass over the samples for each λ, and all
passes use the same random streams.

intervene.jsonl keeps every finished pass, so a call that was cut off goes on where it stopped.
intervene.json holds the estimates; tools/report.py reads it.

Intervals are 95 % bootstrap intervals over prompts; what is compared is paired.

Shapes: B responses, R rows being decoded, K keys, H heads.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import asdict
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

import dyco
import evaluate
from attention import Decoding, Tap
from config import Config, load_config
from data import Prompt
from dyco import Signals
from model import Policy
from rollout import keyed_generator
from rows import append_jsonl, read_jsonl
from run_folder import make_folder
from tools.charts import interval
from tools.command import command
from tools.estimates import bootstrap, estimate
from tools.observed import (
    ROLES,
    AnalysisError,
    Observed,
    command_line,
    load,
    model_folder,
    sample_responses,
    write_json,
)

HIGHEST_MASS = 0.99  # an intervention raises no head's mass above this
ARMS = ("role tokens", "random tokens", "other modality")
LATER_SETTINGS = ("rows", "max_pixels")  # which the logs of earlier versions lack


# --------------------------------------------------------------------------- changing attention


def mass_bias(mass: Tensor, rest: Tensor, factor: float) -> tuple[Tensor, Tensor]:
    """What to add to a modality's attention logits so that its mass r becomes min(λ·r, 0.99).

    mass: r; rest: 1 − r, which is given because 1 − r rounds to 0 where it matters; factor: λ.
    Returns the bias logit(min(λ·r, 0.99)) − logit(r) and where the cap was met, of their shape.

    The cap never works backwards: a mass above 0.99 that should rise stays where it is. The bias is
    0 where r or 1 − r is 0: there is nothing to move, or nowhere to move it from.

    >>> mass_bias(torch.tensor([.2, .6, .0]), torch.tensor([.8, .4, 1.]), 2.0)[0]
    tensor([0.9808, 4.1897, 0.0000])
    """
    # The differences of logarithms below cancel where λ is close to 1: float64 keeps their digits.
    r = mass.double()
    outside = rest.double()
    capped = (factor * r > r.clamp(min=HIGHEST_MASS)) & (outside > 0)
    if factor > 0:
        # logit(λr) − logit(r) = log λ + log((1 − r) / (1 − λr)), which is exactly 0 at λ = 1
        outside_after = outside + (1 - factor) * r
        to_target = math.log(factor) + (outside / outside_after).log()
    else:
        to_target = torch.full_like(r, -math.inf)
    logit_of_cap = math.log(HIGHEST_MASS / (1 - HIGHEST_MASS))
    to_cap = torch.where(r < HIGHEST_MASS, logit_of_cap - r.log() + outside.log(), 0)
    bias = torch.where(capped, to_cap, to_target)
    bias = torch.where((r > 0) & (outside > 0), bias, 0)
    return bias.to(mass.dtype), capped


class Intervention:
    """Scales the attention mass on one modality by `factor` where chosen tokens are sampled.

    It acts on every head of some layers. A head's mass is its mass just before the bias is added,
    so what lower layers have changed is in it. What counts as text is said by dyco.text_scope, as
    in eq. 1. The first token is never chosen, because it has no role.

    modality: +1 image, −1 text. role: +1 visual, −1 text: its tokens are chosen.
    plan: chooses tokens instead, {(prompt's index, response): steps}, where step 0 is the first
    token. layers: decoder layers, None for all. depth: how many the model has.
    """

    def __init__(
        self,
        factor: float,
        modality: int,
        role: int = 0,
        plan: dict[tuple[int, int], set[int]] | None = None,
        layers: list[int] | None = None,
        depth: int = 1,
        tau: float = 0.05,
    ):
        self.factor = factor
        self.modality = modality
        self.role = role
        self.plan = plan
        self.tau = tau
        self.layers = set(range(depth)) if layers is None else {layer % depth for layer in layers}
        self.chosen: Tensor | None = None  # [R] bool
        # Of these heads, layers and tokens together, how many were moved, and how many met the cap?
        self.moved = 0
        self.capped = 0

    def choose(
        self, names: list[tuple[int, int]], step: int, signals: Signals, going: Tensor
    ) -> None:
        """Choose among the tokens at `step`.

        names: (prompt's index, response) of each of the R rows; signals: those of the token, [R]
        each; going [R] bool: the rows that have not ended.
        """
        if self.plan is None:
            roles = dyco.assign_roles(signals.visual_shift, signals.text_shift, going, self.tau)
            chosen = roles == self.role
        else:
            planned = [step in self.plan.get(name, ()) for name in names]
            chosen = torch.tensor(planned, device=going.device)
        self.chosen = chosen & going

    def shift(self, layer: int, scores: Tensor, visual: Tensor, text: Tensor) -> Tensor:
        """Move the chosen rows' attention.

        scores [R, H_kv, H/H_kv, K] before the softmax; visual, text [R, K] bool: which keys are
        the image's and which are text.
        """
        if layer not in self.layers:
            return scores
        members = (visual if self.modality > 0 else text)[:, None, None]
        chosen = self.chosen[:, None, None, None]
        attention = torch.softmax(scores, dim=-1)
        mass = torch.where(members, attention, 0).sum(-1, keepdim=True)
        rest = torch.where(~members, attention, 0).sum(-1, keepdim=True)
        bias, capped = mass_bias(mass, rest, self.factor)
        self.moved += int((chosen & (mass > 0) & (rest > 0)).sum())
        self.capped += int((chosen & capped).sum())
        return torch.where(members & chosen, scores + bias, scores)


class IntervenedDecoding(Decoding):
    """Decoding that computes every step twice, the second time as `intervention` would have it.

    The first computation, without a change, gives the next token its role, by which rows are
    chosen. In the second one the chosen rows' scores are shifted; its keys and values overwrite the
    first ones and stay. So of the recorded signals the masses are those of the changed attention,
    while shifts, and with them roles, are taken between rows of first computations.
    """

    static = False  # which rows are chosen is decided on the host

    def __init__(
        self,
        intervention: Intervention,
        prompts: list[Prompt],
        kept: dict,
        group_size: int,
        capacity: int,
        tap: Tap | None,
        device,
    ):
        """All but `intervention` as in Decoding."""
        if tap is None:
            raise ValueError("an intervention needs the roles of tokens; pass `capture`")
        super().__init__(prompts, kept, group_size, capacity=capacity, tap=tap, device=device)
        self.intervention = intervention
        self.is_second = False  # is a step being computed for the second time?
        self.names = [(prompt.index, i) for prompt in prompts for i in range(group_size)]
        self.recorded: list[Signals] = []  # [R, 1] of each step since `signals` was called

    def advance(self, compute: Callable[[], Tensor], going: Tensor) -> Tensor:
        super().advance(compute, going)
        natural = super().signals(1)
        of_this_step = Signals(*(signal[:, 0] for signal in natural))
        step = int(self.position)
        self.intervention.choose(self.names, step, of_this_step, going=going)
        # The next step's shifts start from the unchanged rows, so these are put back below.
        natural_rows = {layer: rows[:, 0].clone() for layer, rows in self.tap.rows.items()}

        # Going back by one makes the second computation overwrite the first one's keys and values.
        self.position -= 1
        self.is_second = True
        result = super().advance(compute, going)
        self.is_second = False
        changed = super().signals(1)
        for layer, rows in natural_rows.items():
            self.tap.rows[layer][:, 0] = rows
        self.recorded.append(
            Signals(
                changed.visual_mass, changed.text_mass, natural.visual_shift, natural.text_shift
            )
        )
        return result

    def adjust_logits(self, layer: int, scores: Tensor) -> Tensor:
        if not self.is_second:
            return scores
        visual, text = self.members()
        shifted = self.intervention.shift(layer, self.from_grid(scores), visual, text)
        return self.to_grid(shifted)

    def signals(self, count: int) -> Signals:
        signals = zip(*self.recorded, strict=True)
        self.recorded = []
        return Signals(*(torch.cat(steps, dim=1) for steps in signals))

    def keep(self, rows: Tensor) -> None:
        super().keep(rows)
        self.names = [self.names[row] for row in rows.tolist()]


def random_plan(
    touched: Tensor, lengths: Tensor, names: list[tuple[int, int]], seed: int
) -> dict[tuple[int, int], set[int]]:
    """The random control's tokens: for each response as many steps as the intervention touched.

    touched, lengths [B]: of the same responses under the intervention that is controlled. Steps are
    drawn without replacement from 1 … length − 1; 0 is the first token, which no intervention
    touches. Where the control's own response ends earlier, later steps fall away. Tokens of the
    role may be among them: the control is about *which* tokens are changed.
    """
    plan = {}
    for name, count, length in zip(names, touched.tolist(), lengths.tolist(), strict=True):
        generator = keyed_generator(seed, "random tokens", *name)
        order = 1 + torch.randperm(max(length - 1, 0), generator=generator)
        plan[name] = set(order[:count].tolist())
    return plan


# ------------------------------------------------------------------------------------- the passes


def arm_row(seen: Observed, touched: Tensor) -> dict:
    """What intervene.jsonl keeps of each response: enough for all estimates and the random plan."""
    row = {
        "prompt": seen.prompt.tolist(),
        "correct": seen.correct.int().tolist(),
        "length": seen.mask.sum(1).tolist(),
        "touched": touched.tolist(),
    }
    for name, role in ROLES.items():
        marked = seen.roles == role
        alignment = torch.where(marked, seen.scores, 0).sum(1).tolist()
        row[f"{name} tokens"] = marked.sum(1).tolist()
        row[f"{name} alignment"] = [round(value, 5) for value in alignment]
    return row


def read_log(path: Path, settings: dict) -> dict[tuple, dict]:
    """{(role, arm, λ): row} of the passes that an earlier call finished.

    Raises AnalysisError if they were made with other settings.
    """
    finished = {}
    for line, row in read_jsonl(path, growing=True) if path.exists() else []:
        before = row.get("settings", {})
        for key, now in settings.items():
            if key in LATER_SETTINGS and key not in before:
                continue
            if before.get(key) != now:
                raise AnalysisError(
                    f"{path}, line {line}: holds an analysis with another {key} "
                    f"({before.get(key)!r}, now {now!r}); choose another --out"
                )
        finished[row["role"], row["arm"], row["factor"]] = row
    return finished


def touched_tokens(
    seen: Observed, names: list[tuple[int, int]], intervention: Intervention | None
) -> Tensor:
    """How many tokens of each response the intervention changed, [B]."""
    if intervention is None:
        return torch.zeros(len(names), dtype=torch.long)
    if intervention.plan is None:
        return (seen.roles == intervention.role).sum(1)
    lengths = seen.mask.sum(1).tolist()
    return torch.tensor(
        [
            sum(step < length for step in intervention.plan[name])
            for name, length in zip(names, lengths, strict=True)
        ]
    )


class Passes:
    """The passes over the samples. Those that an earlier call finished are read from the log."""

    def __init__(
        self,
        policy: Policy,
        samples: Sequence,
        count: int,
        config: Config,
        log: Path,
        settings: dict,
    ):
        """count: of the samples; log: intervene.jsonl; settings: what its rows must agree in."""
        self.policy = policy
        self.samples = samples
        self.count = count
        self.config = config
        self.log = log
        self.settings = settings
        self.finished = read_log(log, settings)
        responses = range(config.rollout.group_size)
        self.names = [(place, response) for place in range(count) for response in responses]
        # For the progress bar: how many passes there are, and how many were asked for so far.
        self.total = 0
        self.begun = 0

    def make(
        self, role: str | None, arm: str, factor: float, intervention: Intervention | None = None
    ) -> dict:
        """One pass: its row of intervene.jsonl."""
        self.begun += 1
        if (role, arm, factor) in self.finished:
            return self.finished[role, arm, factor]
        what = "λ = 1" if role is None else f"{role}, {arm}, λ = {factor:g}"
        seen = sample_responses(
            self.policy,
            self.samples,
            self.count,
            config=self.config,
            what=f"pass {self.begun} of {self.total}: {what}",
            decoding=Decoding
            if intervention is None
            else partial(IntervenedDecoding, intervention),
        )
        capped = 0.0
        if intervention is not None:
            capped = round(intervention.capped / max(intervention.moved, 1), 5)
        row = {
            "role": role,
            "arm": arm,
            "factor": factor,
            **arm_row(seen, touched_tokens(seen, self.names, intervention)),
            "capped": capped,
        }
        append_jsonl(self.log, [{"settings": self.settings, **row}])
        return row

    def make_all(
        self, roles: list[str], factors: list[float], layers: list[int] | None
    ) -> list[dict]:
        """The rows of all passes, λ = 1 first."""
        self.total = 1 + len(roles) * len(factors) * len(ARMS)
        scale = partial(
            Intervention, layers=layers, depth=self.policy.depth, tau=self.config.dyco.tau
        )
        rows = [self.make(None, "none", 1.0)]
        for name in roles:
            role = ROLES[name]
            for factor in factors:
                main = self.make(name, "role tokens", factor, scale(factor, role, role=role))
                # The control touches as many tokens as the main pass did, so it has to come second.
                plan = random_plan(
                    torch.tensor(main["touched"]),
                    torch.tensor(main["length"]),
                    self.names,
                    seed=self.config.train.seed,
                )
                control = scale(factor, role, plan=plan)
                other = scale(factor, -role, role=role)
                rows.append(main)
                rows.append(self.make(name, "random tokens", factor, control))
                rows.append(self.make(name, "other modality", factor, other))
        return rows


# ----------------------------------------------------------------------------------- the estimates


def describe_arm(row: dict, base: dict, control: dict, role: str) -> dict:
    """[estimate, low, high] of one pass: accuracy, its change against λ = 1 (`base`), its distance
    from the random tokens at the same λ (`control`), and the alignment of the role's tokens."""

    def of_each_response(row: dict, key: str) -> Tensor:
        return torch.tensor(row[key], dtype=torch.float64)

    # All four go through one draw of the bootstrap, so that their differences are paired.
    ones = torch.ones(len(base["prompt"]), dtype=torch.float64)
    numerators = [
        of_each_response(row, "correct"),
        of_each_response(base, "correct"),
        of_each_response(control, "correct"),
        of_each_response(row, f"{role} alignment"),
    ]
    denominators = [ones, ones, ones, of_each_response(row, f"{role} tokens")]
    values, replicates = bootstrap(
        torch.stack(numerators), torch.stack(denominators), torch.tensor(base["prompt"])
    )
    accuracy, accuracy_of_base, accuracy_of_control, alignment = range(4)

    def against(other: int) -> list[float | None]:
        return estimate(values[accuracy] - values[other], replicates[accuracy] - replicates[other])

    return {
        "accuracy": estimate(values[accuracy], replicates[accuracy]),
        "change": against(accuracy_of_base),
        "against random": against(accuracy_of_control),
        "alignment": estimate(values[alignment], replicates[alignment]),
        "touched": round(sum(row["touched"]) / len(ones), 3),
        "capped": row["capped"],
    }


def describe_intervention(rows: list[dict]) -> list[dict]:
    """`describe_arm` of every role, arm and λ. rows: those of intervene.jsonl, λ = 1 first."""
    base, *others = rows
    by_name = {(row["role"], row["arm"], row["factor"]): row for row in others}
    described = []
    for role in dict.fromkeys(row["role"] for row in others):
        factors = {row["factor"] for row in others if row["role"] == role}
        for arm in ARMS:
            # At λ = 1 nothing is changed, so all arms share the one pass that was made there.
            for factor in sorted(factors | {base["factor"]}):
                row = by_name.get((role, arm, factor), base)
                control = by_name.get((role, "random tokens", factor), base)
                described.append(
                    {
                        "role": role,
                        "arm": arm,
                        "factor": factor,
                        **describe_arm(row, base, control, role=role),
                    }
                )
    return described


def intervention_text(described: list[dict]) -> str:
    """`describe_intervention` as lines for the terminal."""
    columns = {
        "role": 8,
        "arm": 16,
        "λ": 7,
        "accuracy, %": 24,
        "change, points": 24,
        "against random": 24,
        "alignment": 22,
        "touched": 9,
        "capped, %": 0,
    }

    def line(cells) -> str:
        widths = columns.values()
        padded = (f"{cell:<{width}}" for cell, width in zip(cells, widths, strict=True))
        return "".join(padded).rstrip()

    lines = [line(columns)]
    for row in described:
        cells = [
            row["role"],
            row["arm"],
            f"{row['factor']:g}",
            interval(row["accuracy"], 100),
            interval(row["change"], 100),
            interval(row["against random"], 100),
            interval(row["alignment"]),
            f"{row['touched']:.1f}",
            f"{100 * row['capped']:.1f}",
        ]
        lines.append(line(cells))
    return "\n".join(lines)


# ------------------------------------------------------------------------------------- the command


def settings_of(
    options, config: Config, samples: Sequence, count: int, layers: list[int] | None
) -> dict:
    """What the passes of one intervene.jsonl must agree in."""
    return {
        "model": options.model,
        "weights": evaluate.weights_of(str(model_folder(options, config))),
        "data": options.data,
        "rows": None if options.data == "toy" else samples.fingerprint,
        "samples": count,
        "layers": layers,
        "seed": config.train.seed,
        "template": config.data.prompt_template,
        "max_pixels": config.data.max_pixels,
        "toy": asdict(config.toy),
        "rollout": asdict(config.rollout),
        "dyco": asdict(config.dyco),
    }


def run_intervene(options) -> None:
    config = load_config(options.config, options.overrides)
    factors = sorted(set(options.factors) - {1.0})
    if not factors or any(not 0 <= factor < math.inf for factor in factors):
        raise AnalysisError(
            f"--factors: expected numbers of 0 or more, one of them not 1, found {options.factors}"
        )
    layers = None if options.layers is None else sorted(set(options.layers))
    policy, samples, _, count = load(options, config)
    wrong = [layer for layer in layers or [] if not -policy.depth <= layer < policy.depth]
    if wrong:
        raise AnalysisError(
            f"--layers: {wrong} out of range; the model has {policy.depth} decoder layers"
        )
    if not any(samples[place].images for place in range(count)):
        raise AnalysisError(
            f"--data {options.data}: no sample has an image; "
            "there is no attention to move between image and text"
        )
    out = Path(options.out)
    make_folder(out, "--out")
    settings = settings_of(options, config, samples, count, layers=layers)
    passes = Passes(
        policy, samples, count, config=config, log=out / "intervene.jsonl", settings=settings
    )
    roles = list(ROLES) if options.role == "both" else [options.role]
    described = describe_intervention(passes.make_all(roles, factors, layers))
    write_json(out / "intervene.json", {"settings": settings, "arms": described})
    print(intervention_text(described))
    print(f"wrote {out / 'intervene.json'}")


def listed(kind: type) -> Callable[[str], list]:
    """An argparse type: values separated by commas."""

    def parse(text: str) -> list:
        return [kind(part) for part in text.split(",")]

    parse.__name__ = f"{kind.__name__} among commas"  # argparse names it where it refuses one
    return parse


@command(ValueError, OSError, advice="; the same command goes on")
def main(arguments: list[str] | None = None) -> None:
    parser = command_line(
        "intervene",
        "Scale the attention of tokens of one role, and see what becomes of answers.",
    )
    parser.add_argument("--role", default="both", choices=[*ROLES, "both"], help="whose tokens")
    parser.add_argument(
        "--factors",
        type=listed(float),
        default=[0.0, 0.25, 0.5, 2.0, 4.0],
        help="λ, separated by commas; 1 is always measured",
    )
    parser.add_argument(
        "--layers",
        type=listed(int),
        help="decoder layers to change, separated by commas (default: all)",
    )
    run_intervene(parser.parse_args(arguments))


if __name__ == "__main__":
    main()
