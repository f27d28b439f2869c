"""walkthrough.py: one step of training as a page to read, every number real.

    python -m tools.walkthrough                              # the toy's warm start; a page of text
    python -m tools.walkthrough --out docs/walkthrough.md    # the same as a file, with pictures
    python -m tools.walkthrough --model DIR --image FILE --question TEXT --answer TEXT

The step is that of train.train_step, stage by stage, and `walk` is its order. Nothing is written
but what --out names. What is longer than the toy's needs more tokens: rollout.max_new_tokens=512.

On another processor other tokens may be sampled, and numbers differ. So every sentence is written
to be true whatever was sampled: what depends on the sample is a number, a `code span` or a cell of
a table, and a page without these is the same everywhere. The test compares such pages.

Shapes: P prompts, G responses per prompt, B = P·G, T response tokens, K keys.
"""

import argparse
import sys
import textwrap
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace

import torch
from torch import Tensor

import distributed
import dyco
import evaluate
import rl_algos
import toy
import train
from attention import Tap
from config import DEFAULTS, Config, load_config
from data import Sample
from rollout import Rollout, generate
from rows import DataError, check_special_tokens, excerpt, load_image, printable
from run_folder import write_file
from tools.charts import figure
from tools.command import command
from tools.examples import heat_maps, picture, visual_grids
from tools.walkthrough_pictures import attention_picture, shifts_picture, weights_picture

COLUMNS = 110  # at which sentences are wrapped
SPACE = "\ue000"  # stands for a space at which no line may break
SEARCHED = 40  # held-out prompts that are tried for groups whose rewards differ
SHOWN_PLACES = 5  # of the image in the table of section 3
STEP = 1  # whose random numbers are drawn
ROLES = {1: "visual", -1: "text", 0: "neutral"}
# What the page explains. Another value would need other words.
EXPLAINED = {"enabled": True, "rule": "paper", "control": "none", "ratio": "relative"}
EXPLAINED |= {"shift": "fisher_rao", "text_scope": "after_image"}


class WalkthroughError(ValueError):
    """Options or settings of which no page can be made."""


# ------------------------------------------------------------------------------------- how to write


def number(value: float, digits: int = 3) -> str:
    """A number with a fixed count of decimals and a real minus."""
    # Adding 0.0 turns a negative zero into a plain one.
    return f"{round(float(value), digits) + 0.0:.{digits}f}".replace("-", "−")


def numbers(values: Tensor, digits: int = 3, most: int = 6) -> str:
    """The first values of a tensor, whole numbers without decimals."""
    whole = not values.is_floating_point()
    shown = [number(x, 0 if whole else digits) for x in values.flatten()[:most].tolist()]
    return "  ".join(shown) + (" …" if values.numel() > most else "")


def code(content: str) -> str:
    """Text that somebody else wrote, as a Markdown code span that no line break divides."""
    content = excerpt(content)
    fence = "``" if "`" in content else "`"
    inside = f" {content} " if "`" in content else content
    return f"{fence}{inside}{fence}".replace(" ", SPACE)


def sentences(*parts: str) -> str:
    """A paragraph."""
    lines = textwrap.wrap(
        " ".join(parts), COLUMNS, break_long_words=False, break_on_hyphens=False
    )
    return "\n".join(lines).replace(SPACE, " ")


def block(lines: Sequence[str]) -> str:
    return "\n".join(["```", *lines, "```"])


def table(heads: Sequence[str], rows: Sequence[Sequence]) -> str:
    """A Markdown table. A bar within a cell would end it."""
    lines = [heads, ["---"] * len(heads), *rows]
    cells = [[str(cell).replace("|", "\\|") for cell in line] for line in lines]
    return "\n".join(f"| {' | '.join(line)} |" for line in cells).replace(SPACE, " ")


def section(title: str, *parts: str, where: dict[str, str], without: str) -> str:
    """where: file -> names of functions in it; without: what breaks if this is left out."""
    places = [f"`{file}`: {', '.join(f'`{n}`' for n in names.split())}" for file, names in where.items()]
    ends = [sentences(f"**Where:** {'; '.join(places)}."), sentences(f"**Left out?** {without}")]
    return "\n\n".join([f"## {title}", *filter(None, parts), *ends])


# --------------------------------------------------------------------------------- what is followed


@dataclass
class Answer:
    """One response of the first prompt, and what its tokens are called."""

    name: str  # "good answer" or "bad answer"
    row: int  # among all responses
    tokens: list[str]  # as Python writes them, so that blanks are seen

    @property
    def length(self) -> int:
        return len(self.tokens)

    def token(self, place: int) -> str:
        return code(self.tokens[place])


@dataclass
class Walk:
    """One step, and what the sections look at."""

    training: train.Training
    hosts: dict[str, Config]  # the same settings with another host
    samples: list[Sample]
    batch: train.Batch
    found: str  # how the prompts were chosen, in words
    good: Answer
    bad: Answer
    pictures: str | None  # how the names of picture files begin

    @property
    def config(self) -> Config:
        return self.training.config

    @property
    def rollout(self) -> Rollout:
        return self.batch.rollout

    @property
    def groups(self) -> list[int]:
        return list(range(len(self.rollout.prompts)))

    @property
    def weights(self) -> Tensor:
        return dyco.token_weights(self.batch.scores, self.rollout.mask)

    @property
    def parting(self) -> int:
        """The first place at which the good and the bad answer have different tokens."""
        shorter = min(self.good.length, self.bad.length)
        one = self.rollout.tokens[self.good.row, :shorter]
        other = self.rollout.tokens[self.bad.row, :shorter]
        different = (one != other).nonzero()
        return int(different[0]) if len(different) else shorter - 1

    def leads(self, answer: Answer) -> Tensor:
        """By how much the visual shift of each token is ahead of its text shift."""
        signals = self.rollout.signals
        return (signals.visual_shift - signals.text_shift)[answer.row, : answer.length]

    @property
    def looking(self) -> int:
        """The token of the bad answer that looks most. The first one has no shift."""
        return 1 + int(self.leads(self.bad)[1:].argmax())

    @property
    def reading(self) -> int:
        return 1 + int(self.leads(self.bad)[1:].argmin())


def collect_groups(
    training: train.Training, count: int, searched: int
) -> tuple[train.Batch, list[int], bool]:
    """Stages 1 and 2 for the first `count` samples whose responses got different rewards.

    Returns the batch, the places of its samples, and whether there were enough among the first
    `searched`. Otherwise the first samples fill up the batch.
    """
    kept: dict[int, train.Batch] = {}
    others: dict[int, train.Batch] = {}
    for place in range(min(searched, len(training.dataset))):
        batch = train.collect(training, [(place, place)], step=STEP)
        varies = bool((batch.rewards != batch.rewards[:, :1]).any())
        (kept if varies else others)[place] = batch
        if len(kept) == count:
            break
    enough = len(kept) == count
    for place in list(others)[: count - len(kept)]:
        kept[place] = others[place]
    return train.join_batches(list(kept.values())), list(kept), enough


def answers_of(training: train.Training, batch: train.Batch) -> tuple[Answer, Answer]:
    """The first response with the highest reward of the first prompt, and that with the lowest.

    They are the first two where all rewards are equal.
    """
    rewards = batch.rewards[0]
    rows = (int(rewards.argmax()), int(rewards.argmin()))
    if rows[0] == rows[1]:
        rows = (0, 1)
    answers = []
    for name, row in zip(("good answer", "bad answer"), rows, strict=True):
        ids = batch.rollout.tokens[row][batch.rollout.mask[row]].tolist()
        tokens = [printable(repr(training.policy.tokenizer.decode(token))) for token in ids]
        if len(tokens) < 2:
            raise WalkthroughError(
                f"answer {row + 1} has one token, and nothing moves in it; try another train.seed"
            )
        answers.append(Answer(name, row, tokens))
    return answers[0], answers[1]


def rows_of_attention(walk: Walk) -> Tensor:
    """The attention rows [G, T, K] of the first prompt's responses, from the packed forward.

    The tap hands each block of rows to a function that makes signals of it; here it keeps them.
    """
    policy, config = walk.training.policy, walk.config
    blocks = []

    def keep(attention: Tensor, *masks: Tensor, shift: str) -> dyco.Signals:
        # Each block begins with the row before it.
        blocks.append(attention[:, 1:] if blocks else attention)
        return dyco.attention_signals(attention, *masks, shift=shift)

    tap = Tap(config.dyco.layers, policy.depth, signals=keep)
    part = walk.rollout.select([0])
    with torch.no_grad():
        policy(part.prompts, part.tokens, part.mask, tap=tap)
    return torch.cat(blocks, dim=1).cpu()


# ------------------------------------------------------------------------------------- the sections


def introduction(walk: Walk) -> str:
    policy = walk.training.policy
    weights = sum(weight.numel() for weight in policy.parameters())
    return "\n\n".join(
        [
            "# One training step, slowly",
            sentences(
                "You know GRPO: a model answers a prompt several times, each answer gets a reward,",
                "and answers above the mean of their group are made likelier, below it less likely;",
                "all tokens of an answer are pushed alike. DyCo-RL",
                "([arXiv 2606.08035](https://arxiv.org/abs/2606.08035)) changes the last words: each",
                "token gets a push of its own, from what the model's attention did while the token",
                "was chosen. This page takes one such step and shows the numbers on the way.",
            ),
            sentences(
                "`.venv/bin/python -m tools.walkthrough` prints it. The model has",
                f"{weights:,} weights and {policy.depth} layers; only a copy in memory is changed.",
                "Add `--model DIR --image FILE --question TEXT --answer TEXT` to see your own model",
                "and picture. Every line with an equals sign can be redone by hand with the numbers",
                "in it, which are rounded. There sqrt, exp and arccos are those of a pocket",
                "calculator; angles are in radians.",
            ),
        ]
    )


def the_prompt(walk: Walk) -> str:
    """Section 1."""
    prompt = walk.rollout.prompts[0]
    processor = walk.training.policy.image_processor
    _, high, wide = prompt.image_grid_thw[0].tolist()
    patch, merge = processor.patch_size, processor.merge_size
    frames = processor.temporal_patch_size
    pixels = prompt.pixel_values
    visual = prompt.visual_mask.nonzero().flatten() + 1
    question = prompt.question.replace("<image>", "")
    return section(
        "1. The prompt as tokens and patches",
        sentences(walk.found),
        sentences(f"The question is {code(question)}, and the right answer {code(prompt.answer)}."),
        sentences(
            "The picture becomes numbers in two steps. First it is cut into patches, small squares",
            "of pixels. Each is one row of numbers: three colours, and two frames, because to this",
            "model a picture is a film that stands still. Then the vision tower makes one *image",
            "token* of every few neighbouring patches, a vector like that of a word. The text",
            "becomes token numbers, and each image token has a placeholder among them.",
        ),
        block(
            [
                f"patches  {list(pixels.shape)}  {numbers(pixels[len(pixels) // 2])}",
                f"tokens   [{len(prompt.input_ids)}]  {numbers(prompt.input_ids)}",
                f"image tokens are number {int(visual[0])} to {int(visual[-1])} of the prompt",
                "",
                f"numbers in a patch:  3 × {frames} × {patch} × {patch} = {pixels.shape[1]}",
                f"image tokens:  {high} × {wide} / ({merge} × {merge}) = {len(visual)}",
            ]
        ),
        where={"data.py": "encode_prompt", "model.py": "Policy.embed"},
        without="The list of the places that hold image tokens is all that DyCo will know of the "
        "picture. If it were off by one, a word would count as picture, and every number below "
        "would be wrong without an error.",
    )


def the_rollout(walk: Walk) -> str:
    """Section 2."""
    rollout, config = walk.rollout, walk.config
    size, prompt = rollout.group_size, len(rollout.prompts[0].input_ids)
    lines = []
    for row in range(size):
        text = excerpt(rollout.texts[row])
        indents = {"initial_indent": f"answer {row + 1}  ", "subsequent_indent": " " * 10}
        lines += textwrap.wrap(text, COLUMNS, break_on_hyphens=False, **indents) or [f"answer {row + 1}"]
    sums = rollout.logprobs.sum(1)
    bad, good, place = walk.bad, walk.good, walk.parting
    chances = rollout.logprobs.exp()[:, place]
    return section(
        "2. One prefill and four continuations",
        sentences(
            "The answers to a prompt share it. So the model reads it once, which is called the",
            "*prefill*, and keeps what attention needs of it, a key and a value per token and layer.",
            f"Then it writes {size} answers side by side, one token of each at a time. A token is",
            f"drawn at random from the model's own distribution (temperature {config.rollout.temperature}),",
            "never from the likeliest few alone, because section 7 scores the same distribution.",
        ),
        block(lines),
        sentences(
            "The probability of an answer is the product of those of its tokens; programs add the",
            "logarithms instead.",
        ),
        block(
            [
                f"prompt tokens read, with and without the prefill:  {prompt}  and  {size} × {prompt} = {size * prompt}",
                f"probability of answer {bad.row + 1}:  exp({number(sums[bad.row])}) = {number(sums[bad.row].exp(), 4)}",
            ]
        ),
        sentences(
            f"Two answers are followed from here. The *good answer* is number {good.row + 1}, the",
            f"first with the highest reward (section 5). The *bad answer* is number {bad.row + 1},",
            f"the first with the lowest. They part at token {place + 1}: the good one has",
            f"{good.token(place)}, which had the probability {number(chances[good.row])}, and the bad",
            f"one {bad.token(place)}, which had {number(chances[bad.row])}.",
        ),
        where={
            "rollout.py": "generate sample_tokens",
            "attention.py": "PackedGroups Decoding",
        },
        without="Without the shared prefill the answers are the same, but the picture is read once "
        "per answer. Without the probabilities, which are written down as tokens are drawn, section "
        "7 could not say how far the model has moved since.",
    )


def the_attention(walk: Walk) -> str:
    """Section 3."""
    rollout, answer, place = walk.rollout, walk.bad, walk.looking
    signals = [float(values[answer.row, place]) for values in rollout.signals]
    visual_mass, text_mass, visual_shift, text_shift = signals
    prompt = rollout.prompts[0]
    rows = rows_of_attention(walk)[answer.row]
    keys = len(prompt.input_ids) + place  # that this token could see
    before, now = rows[place - 1], rows[place]
    first_visual = int(prompt.visual_mask.nonzero()[0])
    outside = float(now[:first_visual].sum())
    is_visual = torch.nn.functional.pad(prompt.visual_mask, (0, rows.shape[1] - len(prompt.visual_mask)))
    is_text = ~is_visual
    is_text[:first_visual] = False
    overlap = overlaps(before, now, is_text).sum()
    more_text = rollout.signals.text_mass > rollout.signals.visual_mass
    reading = walk.reading
    pictures = []
    if walk.pictures:
        pictures = [
            sentences(
                f"![the picture, dark where a token has little attention]({walk.pictures}-attention.svg)",
            ),
            sentences(
                f"Left: token {place + 1}, {answer.token(place)}. Right: token {reading + 1},",
                f"{answer.token(reading)}, the one whose text shift is ahead by most. Each is dark",
                "where the picture gets little of its attention. Below, both shifts along the answer;",
                "dots mark the two tokens.",
            ),
            f"![shifts of attention along the answer]({walk.pictures}-shifts.svg)",
        ]
    return section(
        "3. The attention row of one token",
        sentences(
            "To choose a token, the model gathers something from each token that stands before it.",
            "How much it takes from each is the *row* of the new token: shares that add up to 1.",
            "DyCo-RL takes the rows of the last layer, averaged over its heads. Here is that of",
            f"token {place + 1} of the bad answer, {answer.token(place)}:",
        ),
        block(
            [
                f"row  [{keys}]  {numbers(now[:keys], 4)}",
                "picture + text from the picture on + what stands before:  "
                f"{number(visual_mass)} + {number(text_mass)} + {number(outside)} = "
                f"{number(visual_mass + text_mass + outside)}",
            ]
        ),
        sentences(
            "The first two sums are the *visual mass* and the *text mass* of the token (eq. 1). Text",
            "means the question and the answer so far. What stands before the picture is left out:",
            "models park attention there that they have no use for.",
        ),
        sentences(
            "Now the question of eq. 3: how far did attention *move* since the token before? Look",
            "inside the picture alone. Divide its part of the row by the visual mass, so that it adds",
            "up to 1 (eq. 2). Do the same with the row of the token before. Then, for each image",
            "token, multiply the two shares and take the root.",
        ),
        overlap_table(before, now, is_visual),
        sentences(
            "The sum of the last column is the *overlap*: 1 if attention lies as before, 0 if it lies",
            "on other places altogether. The *shift* turns it into an angle, from 0 (nothing moved) to",
            "3.142, which is π (all of it moved). It is called the Fisher-Rao distance. The text has",
            "a shift of its own, from its own part of the rows.",
        ),
        block(
            [
                overlap_line(before, now, is_visual),
                f"visual shift:  2 × arccos({number(overlaps(before, now, is_visual).sum(), 4)}) = {number(visual_shift)}",
                f"text shift:  2 × arccos({number(overlap, 4)}) = {number(text_shift)}",
                f"visual − text:  {number(visual_shift)} − {number(text_shift)} = {number(visual_shift - text_shift)}",
            ]
        ),
        sentences(
            "This token is shown because the last number is the largest of the bad answer here: while",
            "it was chosen, attention wandered inside the picture more than inside the text.",
        ),
        *pictures,
        where={
            "attention.py": "Tap.read_group attention_rows",
            "dyco.py": "attention_signals fisher_rao_distance",
        },
        without="With the masses alone, the larger part would always win: of the bad answer's "
        f"{answer.length} tokens, {int(more_text[answer.row, : answer.length].sum())} have more "
        "attention on text. A shift compares each part with its own past, so a small part that "
        "moves can win over a large one that rests.",
    )


def within(row: Tensor, members: Tensor) -> Tensor:
    """Eq. 2 for the printed table: the row's shares among the members."""
    part = row[members]
    return part / part.sum()


def overlaps(before: Tensor, now: Tensor, members: Tensor) -> Tensor:
    """What each member adds to the overlap of two rows."""
    return (within(before, members) * within(now, members)).sqrt()


def shown_places(before: Tensor, now: Tensor, members: Tensor) -> list[int]:
    """The places that add most to the overlap, in the order of the prompt."""
    parts = overlaps(before, now, members)
    return parts.topk(min(SHOWN_PLACES, len(parts))).indices.sort().values.tolist()


def overlap_table(before: Tensor, now: Tensor, members: Tensor) -> str:
    places = shown_places(before, now, members)
    columns = [before[members], now[members], within(before, members), within(now, members)]
    columns.append(overlaps(before, now, members))
    rows = [[place + 1, *(number(column[place], 4) for column in columns)] for place in places]
    rest = torch.ones(len(columns[0]), dtype=torch.bool)
    rest[places] = False
    others = [number(column[rest].sum(), 4) for column in columns]
    rows.append([f"the other {int(rest.sum())}", *others])
    heads = ("image token", "token before", "this token", "share before", "share now", "root of product")
    return table(heads, rows)


def overlap_line(before: Tensor, now: Tensor, members: Tensor) -> str:
    parts = overlaps(before, now, members)
    places = shown_places(before, now, members)
    rest = parts.sum() - parts[places].sum()
    summands = [number(part, 4) for part in (*parts[places], rest)]
    return f"overlap:  {' + '.join(summands)} = {number(parts.sum(), 4)}"


def the_roles(walk: Walk) -> str:
    """Section 4."""
    batch, answer, place, tau = walk.batch, walk.bad, walk.looking, walk.config.dyco.tau
    signals = walk.rollout.signals
    visual_mass, text_mass, visual_shift, text_shift = (
        number(values[answer.row, place]) for values in signals
    )
    role = int(batch.roles[answer.row, place])
    own = {1: visual_mass, -1: text_mass, 0: "0"}[role]
    scores = batch.scores[answer.row, : answer.length]
    weights = walk.weights[answer.row, : answer.length]
    mean = number(scores.exp().mean())
    counted = [int((batch.roles[answer.row, : answer.length] == value).sum()) for value in ROLES]
    pictures = []
    if walk.pictures:
        pictures = [f"![weights of the tokens along the answer]({walk.pictures}-weights.svg)"]
    return section(
        "4. Roles, scores and weights of one whole response",
        sentences(
            "**Role (eq. 5).** Did attention move more inside the picture than inside the text, by",
            f"more than {tau}? Then the token *looks*, and its role is visual. Did it move more inside",
            f"the text, by more than {tau}? Then it *reads*: text. All others are neutral, and so is",
            "the first token, which has none before it.",
        ),
        sentences(
            "**Score (eq. 4 and 6).** Is the attention where the role says? The score is the part of",
            "the role's modality in the two masses, between 0 and 1. A token that looks and has most",
            "of its attention on the picture is *well aligned*, and so is one that reads and has most",
            "on the text. Neutral tokens score 0.",
        ),
        sentences(
            "**Weight (eq. 7).** Take exp of each score and divide by the mean of these over the",
            "answer. Then the weights have the mean 1: they only say who gets more than the others.",
        ),
        block(
            [
                f"lead of token {place + 1}:  {visual_shift} − {text_shift} = {number(walk.leads(answer)[place])}",
                f"its score:  {own} / ({visual_mass} + {text_mass}) = {number(scores[place])}",
                f"its weight, as exp(score) is {mean} in the mean:  "
                f"exp({number(scores[place])}) / {mean} = {number(weights[place])}",
            ]
        ),
        sentences(
            f"The whole bad answer. Its roles are {counted[0]} visual, {counted[1]} text,",
            f"{counted[2]} neutral; its weights add up to {number(weights.sum(), 1)}, one per token.",
        ),
        token_table(walk, answer),
        *pictures,
        where={"dyco.py": "assign_roles alignment_scores token_weights"},
        without="Without roles, a score would be nothing but the size of a mass, and tokens that "
        "read would always win where the text is long. Without the mean of 1, an answer with high "
        "scores would be pushed harder as a whole; the weights are meant to choose among its tokens.",
    )


def token_table(walk: Walk, answer: Answer) -> str:
    columns = [*walk.rollout.signals, walk.batch.scores, walk.weights]
    roles = walk.batch.roles[answer.row]
    rows = []
    for place in range(answer.length):
        cells = [number(values[answer.row, place]) for values in columns]
        cells.insert(4, ROLES[int(roles[place])])
        rows.append([place + 1, answer.token(place), *cells])
    heads = ("", "token", "visual mass", "text mass", "visual shift", "text shift")
    return table((*heads, "role", "score", "weight"), rows)


def the_rewards(walk: Walk) -> str:
    """Section 5."""
    batch, settings, size = walk.batch, walk.config.reward, walk.rollout.group_size
    advantages = rl_algos.group_advantages(batch.rewards, walk.config.algo.scale)
    rows = []
    for group in walk.groups:
        for place in range(size):
            cells = [batch.accuracy, batch.format]
            rows.append(
                [
                    group + 1,
                    place + 1,
                    *(number(values[group, place], 0) for values in cells),
                    number(batch.rewards[group, place], 2),
                    number(advantages[group, place]),
                ]
            )
    equal = ""
    if not bool(batch.rewards[0].max() > batch.rewards[0].min()):
        equal = sentences(
            "**All rewards of the first prompt are equal**, so its advantages are 0: this step learns",
            "nothing from it, and good and bad are only names for its first two answers.",
        )
    return section(
        "5. Rewards and group advantages, by hand",
        sentences(
            "So far nobody asked whether an answer is right. Now a program compares what stands",
            "between the answer tags with the right answer: 1 or 0. It also checks the form, one",
            f"think block and one answer block: 1 or 0. The reward is {settings.accuracy_weight} ×",
            f"right + {settings.format_weight} × form, plus whatever rewards of your own you add.",
            "The *group advantage* of an answer is its reward less the group's mean, divided by the",
            "group's standard deviation; 0.0001 keeps that from dividing by 0.",
        ),
        table(("prompt", "answer", "right", "form", "reward", "group advantage"), rows),
        equal,
        reward_arithmetic(walk, batch.rewards[0].double(), advantages[0]),
        where={
            "rewards/__init__.py": "accuracy format",
            "train.py": "give_rewards",
            "rl_algos.py": "group_advantages",
        },
        without="Without the mean, every answer with a reward would be made likelier, the wrong one "
        "too, only less. The mean is what turns a low reward into a punishment: a negative group "
        "advantage makes all tokens of an answer less likely.",
    )


def reward_arithmetic(walk: Walk, rewards: Tensor, advantages: Tensor) -> str:
    """Mean, standard deviation and two advantages of the first group, line by line."""
    count = len(rewards)
    mean, std = number(rewards.mean(), 4), number(rewards.std(), 4)
    texts = [number(reward, 2) for reward in rewards]
    squares = " + ".join(f"({reward} − {mean})^2" for reward in texts)
    lines = [
        f"mean:  ({' + '.join(texts)}) / {count} = {mean}",
        f"standard deviation:  sqrt(({squares}) / {count - 1}) = {std}",
    ]
    divisor = "1" if walk.config.algo.scale == "none" else f"({std} + 0.0001)"
    for answer in (walk.good, walk.bad):
        value = number(advantages[answer.row])
        lines.append(f"{answer.name}:  ({texts[answer.row]} − {mean}) / {divisor} = {value}")
    return block(lines)


def the_advantages(walk: Walk) -> str:
    """Section 6."""
    alpha, place = walk.config.dyco.alpha, walk.parting
    rows, lines = [], []
    for answer in (walk.good, walk.bad):
        advantage = group_advantage(walk, answer)
        weights = walk.weights[answer.row, : answer.length]
        chosen = {"heaviest": int(weights.argmax()), "lightest": int(weights.argmin())}
        for what, at in {**chosen, "where they part": place}.items():
            weight = number(weights[at])
            factor = number(1 + alpha * weights[at])
            pushed = number(walk.batch.advantages[answer.row, at])
            cells = (at + 1, answer.token(at), ROLES[int(walk.batch.roles[answer.row, at])])
            rows.append([f"{answer.name}, {what}", *cells, weight, factor, pushed])
            if what != "where they part":
                product = f"(1 + {alpha} × {weight}) × {number(advantage)}"
                lines.append(f"{answer.name}, {what}:  {product} = {pushed}")
    heads = ("token", "", "", "role", "weight", "factor", "token advantage")
    return section(
        "6. The token advantages",
        sentences(
            "GRPO would give every token the group advantage of its answer. Eq. 8 multiplies it by a",
            f"factor, 1 + {alpha} × weight; the {alpha} is called α. The result is the *token",
            "advantage*.",
        ),
        table(heads, rows),
        block(lines),
        sentences(
            "Look at the signs. The factor is always above 1, and does not know whether the answer is",
            "right. In an answer with a positive group advantage, the heaviest token is praised most.",
            "In one with a negative group advantage, the same factor meets a negative number, and the",
            "heaviest token is punished most. This is why a well-aligned token of a wrong answer is",
            "punished *harder*: high score, high weight, large factor, larger punishment. You may find",
            "that odd; the authors' later code turns it round (`dyco.rule=signed`: 1 minus instead of",
            "1 plus where the group advantage is negative), see `docs/differences.md`.",
        ),
        sentences(
            "Note what DyCo-RL does not know: which token was the mistake. The two answers are the",
            f"same up to token {place + 1}. A row belongs to the place *before* its token, so at that",
            "token both still have the same row and the same score, whatever was then drawn. Only the",
            "group advantage tells them apart there.",
        ),
        where={"train.py": "assign_advantages", "dyco.py": "reweight_advantages _paper"},
        without=f"Without the factor this is GRPO. Since its mean is {number(1 + alpha, 1)}, eq. 8 "
        "also takes larger steps; to know what the choice of tokens is worth, compare with "
        "`dyco.control=uniform`, where all tokens of an answer get the same factor.",
    )


def group_advantage(walk: Walk, answer: Answer) -> float:
    """Â of one answer to the first prompt."""
    rewards = walk.batch.rewards[:1]
    return float(rl_algos.group_advantages(rewards, walk.config.algo.scale)[0, answer.row])


# --------------------------------------------------------------------------- the loss and the step


@dataclass
class HostLoss:
    """What one host makes of some log-probabilities of the batch."""

    loss: float
    slopes: Tensor  # [B, T], of the loss along each token's log-probability
    clipped: float  # share


def loss_of_host(walk: Walk, host: Config, logprobs: Tensor) -> HostLoss:
    """rl_algos.policy_loss on the whole batch, its advantages those that train.py would assign."""
    batch = train.Batch(
        walk.rollout,
        rewards=walk.batch.rewards,
        accuracy=walk.batch.accuracy,
        format=walk.batch.format,
        old_logprobs=walk.batch.old_logprobs,
    )
    train.assign_advantages(host, batch, STEP)
    settings = SimpleNamespace(**vars(host.algo), max_new_tokens=host.rollout.max_new_tokens)
    logprobs = logprobs.detach().clone().requires_grad_()
    loss, logged = rl_algos.policy_loss(
        host.algo.name,
        logprobs,
        batch.old_logprobs,
        advantages=batch.advantages,
        mask=train.loss_mask(host, walk.rollout),
        settings=settings,
        ref_logprobs=batch.old_logprobs,  # at a run's first step the reference is the policy
    )
    (slopes,) = torch.autograd.grad(loss, logprobs)
    return HostLoss(float(loss.detach()), slopes, float(logged["clip_fraction"]))


def the_losses(walk: Walk, new_logprobs: Tensor) -> str:
    """Section 7."""
    batch, answer, place = walk.batch, walk.bad, walk.parting
    at = (answer.row, place)
    mask = walk.rollout.mask
    ratios = (new_logprobs - batch.old_logprobs).exp()
    rows = []
    slopes = {}
    for name, host in walk.hosts.items():
        before = loss_of_host(walk, host, batch.old_logprobs)
        after = loss_of_host(walk, host, new_logprobs)
        slopes[name] = 1000 * before.slopes[at]
        figures = [number(slopes[name]), number(1000 * after.slopes[at])]
        losses = [number(before.loss), number(after.loss)]
        rows.append([name, *losses, *figures, number(100 * after.clipped, 0)])
    heads = ("host", "loss before", "loss after", "slope before, × 1000", "slope after, × 1000")
    return section(
        "7. The loss of each host on the same batch",
        sentences(
            "The algorithm around DyCo-RL is its *host*. It takes the token advantages and never hears",
            "of attention. Its loss rests on the *ratio* of a token: its probability under the model",
            "as it is now, divided by that when it was drawn. Before the step all ratios are 1. To see",
            "the hosts differ, the step of section 8 was taken, and the same answers were scored again:",
            f"now the ratios lie between {number(ratios[mask].min())} and {number(ratios[mask].max())}.",
        ),
        sentences(
            "What a host teaches one token is the *slope* of its loss: how the loss changes with the",
            "token's log-probability. The update goes downhill, so a positive slope makes the token less",
            f"likely. The table follows token {place + 1} of the bad answer, {answer.token(place)},",
            f"whose ratio is {number(ratios[at])} after the step.",
        ),
        table((*heads, "clipped after, %"), rows),
        slope_arithmetic(walk, slopes),
        sentences(
            "Before the step, `grpo`, `gspo` and `sapo` have the same slope: minus the token advantage,",
            "divided by the length of the answer and the number of answers. `dapo` and `cispo` divide",
            "by all tokens of the batch, so a token counts the same in a long answer as in a short one.",
            "`dr_grpo` divides by the longest length allowed, and its group advantage is not divided by",
            "the standard deviation. The losses themselves say little, for advantages cancel out.",
        ),
        sentences(
            "After the step they part. `grpo`, `dapo` and `dr_grpo` stop a token that has gone far",
            f"enough: a punished one has no slope left once its ratio is below {number(1 - walk.hosts['grpo'].algo.clip_low, 1)}.",
            "`gspo` looks at the mean over the whole answer, and its limits are a thousand times as",
            "narrow. `sapo` has no limit: its slope fades as the ratio leaves 1. `cispo` multiplies the",
            "slope by the ratio and has no lower limit. What is left where a token is stopped is the",
            "KL term of `grpo` and `gspo`, which pulls back to the model that training began with.",
        ),
        where={
            "rl_algos.py": "policy_loss clipped_objective gspo_objective sapo_objective "
            "cispo_objective"
        },
        without="Without the limits, answers that are learned from several times would be pushed on "
        "and on, although the model that drew them is gone. At ratio 1 they do nothing: that is why "
        "`train.updates_per_rollout=2` is the default, and this page shows only the first update.",
    )


def slope_arithmetic(walk: Walk, slopes: dict[str, Tensor]) -> str:
    """The slopes of three hosts by hand. 0 − … is how the sign of the loss is said."""
    answer, place, alpha = walk.bad, walk.parting, walk.config.dyco.alpha
    count, tokens = len(walk.rollout.mask), int(walk.rollout.mask.sum())
    scaled = rl_algos.group_advantages(walk.batch.rewards[:1])[0, answer.row]
    centred = rl_algos.group_advantages(walk.batch.rewards[:1], scale="none")[0, answer.row]
    weight = walk.weights[answer.row, place]
    pushed = number((1 + alpha * weight) * scaled)
    unscaled = number((1 + alpha * weight) * centred)
    longest = walk.config.rollout.max_new_tokens
    return block(
        [
            f"grpo:  0 − 1000 × ({pushed}) / ({answer.length} × {count}) = {number(slopes['grpo'])}",
            f"cispo:  0 − 1000 × ({pushed}) / {tokens} = {number(slopes['cispo'])}",
            f"dr_grpo:  0 − 1000 × ({unscaled}) / ({longest} × {count}) = {number(slopes['dr_grpo'])}",
        ]
    )


@dataclass
class Taken:
    """What the optimizer step did."""

    rate: float
    norm: float  # of the gradient before it was clipped
    name: str  # of one weight matrix
    gradient: Tensor  # its first values, clipped
    change: Tensor
    logprobs: Tensor  # [B, T] after the step
    greedy_before: list[str]
    greedy_after: list[str]


def greedy(walk: Walk) -> list[str]:
    """The likeliest answer to each prompt, token by token."""
    limit = walk.config.rollout.max_new_tokens
    return generate(
        walk.training.policy, walk.rollout.prompts, group_size=1, max_new_tokens=limit, key=None
    ).texts


def take_step(walk: Walk) -> Taken:
    """Stage 6. The optimizer tells the gradient of one matrix before it forgets it."""
    training, rollout = walk.training, walk.rollout
    trained = {name: p for name, p in training.policy.named_parameters() if p.requires_grad}
    name = [name for name in trained if "q_proj" in name or name == list(trained)[-1]][-1]
    gradients = []

    def keep(optimizer, arguments, options) -> None:
        gradients.append(trained[name].grad.flatten()[:6].clone())

    before = greedy(walk)
    old = trained[name].detach().flatten()[:6].clone()
    training.optimizer.register_step_pre_hook(keep)
    rate = train.set_learning_rate(walk.config, training.optimizer)
    logged = train.update(training, walk.batch, walk.groups)
    if not gradients:
        raise WalkthroughError("the loss or its gradient is not finite; no step was taken")
    logprobs, _ = train.compute_logprobs(training, training.policy, rollout, [walk.groups])
    return Taken(
        rate=rate,
        norm=logged["grad_norm"],
        name=name,
        gradient=gradients[0].cpu(),
        change=(trained[name].detach().flatten()[:6] - old).cpu(),
        logprobs=logprobs.cpu(),
        greedy_before=before,
        greedy_after=greedy(walk),
    )


def the_update(walk: Walk, taken: Taken) -> str:
    """Section 8."""
    before, after = walk.rollout.logprobs.sum(1), taken.logprobs.sum(1)
    advantages = rl_algos.group_advantages(walk.batch.rewards, walk.config.algo.scale).flatten()
    rows = []
    for row in range(len(before)):
        group, place = divmod(row, walk.rollout.group_size)
        chances = (figure(float(before[row].exp())), figure(float(after[row].exp())))
        rows.append([group + 1, place + 1, number(advantages[row]), *chances])
    lines = []
    for answer in (walk.good, walk.bad):
        value = number((after - before)[answer.row].exp(), 2)
        lines.append(
            f"{answer.name}, after / before:  exp({number(after[answer.row])} − "
            f"{number(before[answer.row])}) = {value}"
        )
    greedy_rows = []
    for group, texts in enumerate(zip(taken.greedy_before, taken.greedy_after, strict=True)):
        for when, text in zip(("before", "after"), texts, strict=True):
            right = number(train.rewards.accuracy(text, walk.samples[group].answer), 0)
            greedy_rows.append([group + 1, when, code(answer_in(text)), right])
    clip = walk.config.optim.grad_clip
    return section(
        "8. The gradient, and what changed after the step",
        sentences(
            f"The host of this run is `{walk.config.algo.name}`. Going backwards through the model",
            "turns the slopes of section 7 into a gradient, one number for each weight of the model:",
            f"here its length is {number(taken.norm)}. It is shortened to at most {clip}. AdamW divides",
            "each number by its usual size. At the very first step that is the number itself, so each",
            f"weight moves by the learning rate, {figure(taken.rate)}, one way or the other, however",
            f"long the gradient was. Six weights of {code(taken.name)}:",
        ),
        block(
            [
                "gradient  " + "  ".join(figure(x) for x in taken.gradient.tolist()),
                "change    " + "  ".join(figure(x) for x in taken.change.tolist()),
            ]
        ),
        sentences(
            "What did the step do? The probability of each sampled answer, before and after.",
            "Answers with a negative group advantage should have become less likely, the others likelier.",
        ),
        table(("prompt", "answer", "group advantage", "probability before", "probability after"), rows),
        block(lines),
        sentences("And what the model answers when it always takes the likeliest token:"),
        table(("prompt", "step", "answer without dice", "right"), greedy_rows),
        sentences(
            "One step on so few answers is mostly luck; a run takes hundreds, each on new prompts. The",
            "whole of it, in the order of this page, is `train_step` in `train.py`.",
        ),
        where={"train.py": "update backward_of set_learning_rate compute_logprobs"},
        without="Without shortening, one odd batch with a huge gradient would fill AdamW's memory of "
        "usual sizes, and the steps after it would be too small. Without new samples for the next "
        "step, the model would learn from answers that it no longer gives.",
    )


def answer_in(text: str) -> str:
    """What stands between the last answer tags, or the end of the text."""
    begin = text.rfind("<answer>")
    return text[begin:] if begin >= 0 else text[-40:]


# ---------------------------------------------------------------------------------------- the walk


def walk_along(walk: Walk) -> Iterator[str]:
    """The page, part by part; stages 3 to 6 of train.train_step on the way."""
    training, batch = walk.training, walk.batch
    yield introduction(walk)
    yield the_prompt(walk)
    yield the_rollout(walk)
    train.add_logprobs(training, batch, [walk.groups])
    train.assign_advantages(walk.config, batch, STEP)
    batch.loss_mask = train.loss_mask(walk.config, walk.rollout)
    yield the_attention(walk)
    yield the_roles(walk)
    yield the_rewards(walk)
    yield the_advantages(walk)
    taken = take_step(walk)
    yield the_losses(walk, taken.logprobs)
    yield the_update(walk, taken)


def draw_pictures(walk: Walk) -> dict[str, str]:
    """File name -> SVG of the three pictures, all of the bad answer."""
    rollout, answer = walk.rollout, walk.bad
    image, prompt = walk.samples[0].images[0], rollout.prompts[0]
    rows = rows_of_attention(walk)[answer.row]
    rows = rows[: answer.length, : len(prompt.visual_mask)][:, prompt.visual_mask]
    grids = visual_grids(prompt, walk.training.policy.image_processor.merge_size)
    (place,), heat = heat_maps(rows, grids)
    cells = (-(-place["height"] // place["block"]), -(-place["width"] // place["block"]))
    panels = []
    for token in (walk.looking, walk.reading):
        panels.append((f"{token + 1} {short(answer.tokens[token])}", heat[token].tolist()))

    def of_answer(values: Tensor) -> list:
        return values[answer.row, : answer.length].tolist()

    labels = [short(token) for token in answer.tokens]
    signals = rollout.signals
    marked = [walk.looking, walk.reading]
    roles = [ROLES[role] for role in of_answer(walk.batch.roles)]
    visual, words = of_answer(signals.visual_shift), of_answer(signals.text_shift)
    return {
        "attention": attention_picture(picture(image), image.size, cells, panels=panels),
        "shifts": shifts_picture(labels, visual, words, marked=marked),
        "weights": weights_picture(labels, of_answer(walk.weights), roles),
    }


def short(token: str, most: int = 14) -> str:
    return token if len(token) <= most else token[: most - 1] + "…"


# ------------------------------------------------------------------------------------- the command


def own_sample(options) -> Sample | None:
    """The reader's own question about one image, if the options ask one. No model is needed."""
    given = [options.image, options.question, options.answer]
    if given == [None, None, None]:
        return None
    if None in given:
        raise WalkthroughError(
            "--image, --question and --answer go together: expected all three of them, or none"
        )
    question = options.question
    if "<image>" not in question:
        question = f"<image>{question}"
    if question.count("<image>") > 1:
        raise WalkthroughError("--question has several <image> markers; expected one, or none")
    check_special_tokens(question, "--question")
    try:
        answer = train.reference_of(options.answer)
    except DataError as error:
        raise WalkthroughError(f"--answer {options.answer!r:.100}: {error}") from error
    path = Path(options.image).resolve()
    return Sample("yours", (load_image(path.name, path.parent),), question, answer)


def read_configs(options, prompts: int) -> tuple[Config, dict[str, Config]]:
    """The settings of the walk, and the same with each host. Raises ConfigError."""
    file = DEFAULTS
    overrides = ["rollout.group_size=4", "optim.warmup_steps=0"]
    if options.model is not None:
        # A model of a run is asked as it was in training.
        file = evaluate.config_file_of(options.model) or DEFAULTS
        overrides.append(f"model.path={options.model}")
    overrides += options.overrides
    overrides += ["data.path=toy", "data.eval_path=null", "train.updates_per_rollout=1"]
    overrides.append(f"rollout.prompts_per_step={prompts}")
    config = load_config(file, overrides)
    found = {name: getattr(config.dyco, name) for name in EXPLAINED}
    if found != EXPLAINED or len(config.dyco.layers) > 1:
        wanted = " ".join(f"dyco.{name}={str(value).lower()}" for name, value in EXPLAINED.items())
        raise WalkthroughError(
            f"the page explains the paper's first version, in one layer: expected {wanted} and one "
            "layer in dyco.layers; found other values"
        )
    hosts = {}
    for name in rl_algos.ALGORITHMS:
        hosts[name] = load_config(file, [*overrides, f"algo.name={name}"])
    return config, hosts


def prepare(options) -> Walk:
    """Check the options, load the model, and sample the step's batch."""
    sample = own_sample(options)
    prompts = 2 if sample is None else 1
    config, hosts = read_configs(options, prompts)
    if config.train.threads:
        torch.set_num_threads(config.train.threads)
    training = train.build(config, distributed.start())
    dataset = training.held_out if sample is None else [sample]
    training = training._replace(dataset=dataset)
    batch, places, enough = collect_groups(training, prompts, searched=SEARCHED)
    good, bad = answers_of(training, batch)
    stem = Path(options.out).stem if options.out else None
    return Walk(
        training,
        hosts,
        [dataset[place] for place in places],
        batch,
        how_found(sample, config, places, enough=enough),
        good,
        bad,
        stem,
    )


def how_found(sample: Sample | None, config: Config, places: list[int], enough: bool) -> str:
    """Where the prompts come from, in words."""
    size = config.rollout.group_size
    if sample is not None:
        return f"The prompt is your own question; {size} answers to it were sampled."
    numbers_of = " and ".join(str(place) for place in places)
    task = (
        "The toy's pictures hold shapes in colours, a colour is worth a number, and the question "
        "asks for the sum over some shapes. "
    )
    if enough:
        return task + (
            f"To learn from a prompt, its {size} answers must have different rewards. The held-out "
            "questions were tried from number 0 on, and the first two with right and wrong answers "
            f"taken: numbers {numbers_of}. Sections 1 to 4 follow the first of them."
        )
    return task + (
        f"Among the first {SEARCHED} held-out questions there were no two whose {size} answers have "
        f"different rewards, so these are numbers {numbers_of}. Sections 1 to 4 follow the first."
    )


def run_walkthrough(options) -> None:
    out = Path(options.out) if options.out else None
    if out is not None and (out.suffix != ".md" or out.is_dir()):
        raise WalkthroughError(f"--out {options.out!r:.200}: expected a file that ends in .md")
    walk = prepare(options)
    if out is None:
        for part in walk_along(walk):
            print(printable(part), end="\n\n", flush=True)
        return
    text = "\n\n".join(walk_along(walk)) + "\n"
    out.parent.mkdir(parents=True, exist_ok=True)
    for name, content in draw_pictures(walk).items():
        write_file(out.with_name(f"{out.stem}-{name}.svg"), content.encode())
    write_file(out, text.encode())
    print(f"wrote {out} and three pictures", file=sys.stderr)


@command(ValueError, OSError, train.RunError)
def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        prog="python -m tools.walkthrough",
        description="One step of training as a page to read, with every number in it.",
    )
    parser.add_argument("--out", help="a .md file; three pictures are written beside it")
    parser.add_argument("--model", help="a Hugging Face directory or hub id; by default the toy's")
    parser.add_argument("--image", help="a picture of your own, with --question and --answer")
    parser.add_argument("--question", help="about the picture")
    parser.add_argument("--answer", help="the right one")
    parser.add_argument(
        "overrides",
        nargs="*",
        metavar="section.key=value",
        help="over config.yaml, such as rollout.max_new_tokens=512",
    )
    run_walkthrough(parser.parse_args(arguments))


if __name__ == "__main__":
    main()
