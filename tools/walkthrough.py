"""walkthrough.py: one step of training as a page to read, every number real.

    python -m tools.walkthrough                              # the toy's warm start; a page of text
    python -m tools.walkthrough --out docs/walkthrough.md    # the same as a file, with pictures
    python -m tools.walkthrough --model DIR --image FILE --question TEXT --answer TEXT

The step is that of train.train_step; `walk_along` is its order. First stands the page as eight
templates, then a function for each, which fills it in. Nothing is written but what --out names.

On another processor other tokens may be sampled, and numbers differ. So every sentence is true
whatever was sampled: what depends on the sample is a number, a `code span`, a cell of a table or an
answer in a block. Without these the page is the same everywhere, and that is what the test
compares.

Shapes: P prompts, G responses per prompt, B = P·G, T response tokens, K keys.
"""

import argparse
import re
import sys
import textwrap
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace

import torch
import torch.nn.functional as F
from torch import Tensor

import distributed
import dyco
import evaluate
import rewards
import rl_algos
import train
from attention import Tap
from config import DEFAULTS, Config, load_run_config
from data import Sample
from rollout import Rollout, generate
from rows import DataError, check_special_tokens, excerpt, load_image, printable
from run_folder import make_folder, write_file
from tools.charts import figure
from tools.command import command
from tools.examples import heat_maps, picture, visual_grids
from tools.walkthrough_pictures import attention_picture, shifts_picture, weights_picture

COLUMNS = 140  # at which sentences are wrapped
SPACE = "\ue000"  # stands for a space at which no line may break
SEARCHED = 40  # held-out prompts that are tried for groups whose rewards differ
SHOWN_PLACES = 3  # of the image in the table of section 3
SHOWN_WEIGHTS = 6  # of a matrix of the model in section 8
STEP = 1  # whose random numbers are drawn
ROLES = {1: "visual", -1: "text", 0: "neutral"}
# What the page explains. Another value would need other words.
EXPLAINED = {
    "enabled": True,
    "rule": "paper",
    "control": "none",
    "ratio": "relative",
    "shift": "fisher_rao",
    "text_scope": "after_image",
}


class WalkthroughError(ValueError):
    """Options or settings of which no page can be made."""


# ---------------------------------------------------------------------------------------- the page

INTRODUCTION = """
# One training step, slowly

You know GRPO: a model answers a prompt several times, each answer gets a reward, and an answer
above the mean of its group is made likelier, one below it less likely, with one push for all its
tokens. DyCo-RL (arXiv [2606.08035](https://arxiv.org/abs/2606.08035)) gives each token a push of
its own, by what the model's attention did while the token was chosen. Here is one such step.

`.venv/bin/python -m tools.walkthrough` prints this page. The model has {weights} parameters in
{depth} layers, and only a copy in memory is changed. With `--model DIR --image FILE --question
TEXT --answer TEXT` it is about your model and your picture. A line with an equals sign can be
redone by hand with the numbers in it, up to their last digit, which is rounded; angles are in
radians. **Where** names the code of a section, and **Left out?** says what breaks without it.
"""

SECTION_1 = """
## 1. The prompt as tokens and patches

{found} The question is {question}, and the right answer {answer}.

The picture becomes numbers in two steps. It is cut into patches, small squares of pixels. Each is
a row of numbers: three colours, and two frames as of a film that stands still. Then the part of
the model that sees makes one *image token* of every few neighbouring patches: a vector like a
word's. Words become token numbers.
```
patches  {patches}
tokens   {tokens}
numbers in a patch:  3 × {frames} × {patch} × {patch} = {patch_numbers}
image tokens, at the places {first} … {last}:  {high} × {wide} / ({merge} × {merge}) = {visual}
```
**Where:** `data.py`: `encode_prompt`; `model.py`: `Policy.embed`. **Left out?** The list of
places that hold image tokens is all that DyCo-RL knows of the picture. Were it off by one, a word
would count as picture.
"""

SECTION_2 = """
## 2. One prefill and four continuations

The answers share their prompt. So the model reads it once, which is called the *prefill*, and
then writes all answers side by side, a token of each at a time. A token is drawn at random from
the model's own distribution, not from the likeliest few alone, because section 7 scores that
distribution. The probability of each drawn token is kept.
```
{answers}
prompt tokens to read without a shared prefill:  {size} × {prompt} = {unshared}
probability of answer {bad}, from the sum of its tokens' logarithms:  exp({bad_sum}) = {bad_chance}
```
Two are followed: the *good answer*, number {good}, is the first with the highest reward (section
5), and the *bad answer*, number {bad}, the first with the lowest. {parting}

**Where:** `rollout.py`: `generate`, `sample_tokens`; `attention.py`: `PackedGroups`, `Decoding`.
**Left out?** Without the prefill, the picture is read once for each answer. Without the kept
probabilities, section 7 could not tell how far the model moved.
"""

SECTION_3 = """
## 3. The attention row of one token

When the model chooses a token, it stands at the token before and looks back over all that is
there. How much it takes from each place is the *row* of the new token: shares that add up to 1.
DyCo-RL takes the rows of the last layer, averaged over its heads. For token {place} of the bad
answer, {token}:
```
row  {row}
image tokens + all text behind the first of them + all text before it:  {masses} = {total}
```
The first two of these are the *visual mass* and the *text mass* of the token (eq. 1): what the
image tokens get, and what the question and the answer so far get. Text before the picture is not
counted: models park attention there that they have no use for.

How far did attention *move* since the token before? Look inside the picture alone. In this row
and in that of the token before, divide its shares by the visual mass, so that they add up to 1
(eq. 2). For each image token, multiply the two and take the root.

{overlap_table}

The sum of the last column is the *overlap*: 1 if attention lies as before, 0 if it lies on other
places altogether. Eq. 3 turns it into an angle, the *shift*, from 0 (nothing moved) to 3.142,
which is π (all of it moved). This is the Fisher-Rao distance. The text has a shift of its own,
from its own part of the rows. There the newest token is a place that the row before did not have:
its share counts as 0 then, so attention to the newest token always counts as movement.
```
image token {most}, this token:  {by_mass}
image token {most}, root:  {root}
overlap in the picture:  {overlap}
visual shift:  2 × arccos({visual_overlap}) = {visual_shift}
text shift, from an overlap summed likewise:  2 × arccos({text_overlap}) = {text_shift}
its lead, visual − text:  {visual_shift} − {text_shift} = {lead}
```
This token was chosen because its lead is the largest of the bad answer. {attention_pictures}

**Where:** `attention.py`: `Tap.read_group`, `attention_rows`; `dyco.py`: `attention_signals`,
`fisher_rao_distance`. **Left out?** By the masses alone the larger part would always win:
{more_text} of the {length} tokens have more attention on text. A shift compares each part with
its own past, so a small part that moves can win over a large one that rests.
"""

ATTENTION_PICTURES = """On the left is where it looks, the darker the less; on the right where
token {reading} does, {reading_token}, whose lead is the smallest. Below, dots mark both.

![where two tokens look in the picture]({stem}-attention.svg)
![shifts of attention along the answer]({stem}-shifts.svg)
"""

SECTION_4 = """
## 4. Roles, scores and weights of one whole response

**Role (eq. 5).** Did attention move more inside the picture than inside the text, by over {tau}?
Then the token *looks*, and its role is visual. Did it move more inside the text, by over {tau}?
Then the token *reads*, and its role is text. All others are neutral, and so is the first token of
the answer: no row is kept from before it, so its shifts are set to 0.

**Score (eq. 4 and 6).** Is the attention where the role says? The score is the share that the
mass of the role has in both masses, between 0 and 1. A token that looks and has most of its
attention on the picture is *well aligned*. So is one that reads and has most on the text. Neutral
tokens score 0.

**Weight (eq. 7).** Take exp of each score, and divide by the mean of that over the answer. So the
weights have the mean 1: a weight only says whether a token gets more or less than the others.
```
score of token {place}:  {of_role} / ({visual_mass} + {text_mass}) = {score}
its weight, where {mean} is the mean of exp:  exp({score}) / {mean} = {weight}
```
This is the whole bad answer. Its roles: {visual} visual, {text} text, {neutral} neutral. Its
weights add up to {sum}, one per token.

{token_table}

{weights_picture}

**Where:** `dyco.py`: `assign_roles`, `alignment_scores`, `token_weights`. **Left out?** Without
roles only the larger mass could count, and where the text is long that is nearly always the
text's. Without the mean of 1, answers with high scores would be pushed harder as a whole.
"""

SECTION_5 = """
## 5. Rewards and group advantages, by hand

So far nobody asked whether an answer is right. Now a program compares what stands between its
answer tags with the right answer, and checks its form, one think block and one answer block: 1 or
0 each. The reward is {accuracy_weight} × right plus {format_weight} × form, and any reward of
your own. The *group advantage* is the reward less the mean of the group, divided by its standard
deviation; 0.0001 is there so that nothing is divided by 0. {equal}For the first prompt:

{reward_table}
```
mean of the rewards:  {mean_line}
standard deviation:  {std_line}
good answer:  {good_line}
bad answer:  {bad_line}
```
**Where:** `rewards/__init__.py`: `accuracy`, `format`; `train.py`: `give_rewards`; `rl_algos.py`:
`group_advantages`. **Left out?** Without the mean, every answer with a reward would be made
likelier, a wrong one as well, only less. The mean turns a low reward into a punishment: a group
advantage below 0 makes every token of the answer less likely.
"""

ALL_EQUAL = """**All rewards of this prompt are equal, so its advantages are 0:** the step learns
nothing from it, and good and bad are only names here, for its first two answers. """

SECTION_6 = """
## 6. The token advantages

GRPO would push every token by the group advantage of its answer. Eq. 8 multiplies it by a factor:
*token advantage* = (1 + {alpha} × weight) × group advantage. The {alpha} is called α.

{advantage_table}

The factor is always above 1, and it does not know whether the answer is right. Where the group
advantage is positive, the token of the largest weight is praised most. Where it is negative, the
same factor meets a negative number, and the token of the largest weight is punished most. This is
why a well-aligned token of a wrong answer is punished *harder*: a high score makes a large
weight, a large weight a large factor, and the factor enlarges the punishment. The authors' later
code turns it round: by `dyco.rule=signed`, tokens with a role in a wrong answer have the factor 1
− {alpha} × weight.

DyCo-RL does not know which token was the mistake. A row belongs to the place *before* its token.
So where the two answers part, at token {place}, both have the same row, role and score, whatever
was then drawn. Their weights may differ a little, since each answer has its own mean of exp, but
that says nothing of this token. Only the sign of the group advantage tells right from wrong.

**Where:** `train.py`: `assign_advantages`; `dyco.py`: `reweight_advantages`, `_paper`. **Left
out?** Without the factor this is GRPO. The factor has the mean {mean_factor}, so every answer is
pushed that much harder as a whole. With `dyco.control=uniform` all tokens have the factor
{mean_factor}: a run of that tells what the choice of tokens is worth.
"""

SECTION_7 = """
## 7. The loss of each host on the same batch

The algorithm around DyCo-RL is its *host*. It takes the token advantages, and never hears of
attention. Its loss rests on the *ratio* of a token: its probability now, divided by that when it
was drawn. Before the step all ratios are 1. After the step of section 8, the same answers were
scored again: now the ratios lie between {lowest} and {highest}.

What a host teaches a token is the *slope* of its loss: how the loss changes with the logarithm of
the token's probability. The step goes downhill, so a positive slope makes the token less likely.
Here are the slopes, times 1000, for token {place} of the bad answer, {token}, whose ratio becomes
{ratio}. The batch is all answers to all prompts: {count} answers of at most {longest} tokens,
{tokens} together.

{host_table}

**Before the step**, `grpo`, `gspo` and `sapo` have one slope: the token advantage with its sign
changed, divided by the length of the answer and by the number of answers. `dapo` and `cispo`
divide by all tokens of the batch, so that tokens of long answers count as much. `dr_grpo` divides
by the greatest length allowed, and leaves out the standard deviation of section 5. The losses say
little: advantages of both signs cancel out, and `cispo` and `sapo` have other losses, not slopes.

**After it** they differ in when they stop. `grpo`, `dapo` and `dr_grpo` stop a token of a bad
answer once its ratio is below {floor}, and one of a good answer above {ceiling} (`dapo`: {dapo}).
`gspo` takes one ratio for the whole answer, the geometric mean of its tokens' ratios, and stops a
bad answer as a whole below {gspo}. `sapo` has no limit: its slope fades as the ratio leaves 1.
`cispo` has no lower limit: its slope is multiplied by the ratio. Where a token is stopped, the KL
term, a penalty for leaving the model that training began with, still pulls back, with the
coefficient {grpo_kl} in `grpo` and {gspo_kl} in `gspo`.

**Where:** `rl_algos.py`: `policy_loss`, `clipped_objective`, `gspo_objective`, `sapo_objective`,
`cispo_objective`. **Left out?** Without limits, answers that are learned from more than once
would be pushed on and on.
"""

SECTION_8 = """
## 8. The gradient, and what changed after the step

The host of this step is `{host}`. The way back through the model turns the slopes into a
gradient, a number for each parameter. Its length is {norm}; were it above {clip}, it would be cut
to that. AdamW divides each number by its usual size. At the very first step that is its own size,
so each parameter moves by the learning rate, {rate}, against its gradient, however hard the push.
For example, {name}, all times 1000:
```
gradient  {gradient}
change    {change}
```
What did it do? Answers with a group advantage above 0 should be likelier now, the others less
likely.

{chance_table}
```
good answer, probability after / before:  {good_line}
bad answer, probability after / before:  {bad_line}
```
Without dice, always with the likeliest token, it says {greedy_before} before and {greedy_after}
after the step. One step on so few answers is mostly luck. A run takes a hundred and more, each on
new answers: `train_step` in `train.py` does what this page does. There, rewards come before roles.

**Where:** `train.py`: `update`, `backward_of`, `set_learning_rate`, `compute_logprobs`. **Left
out?** Without the cut, a huge gradient would spoil AdamW's usual sizes. Without new answers, it
would learn from what it no longer says.
"""


# ------------------------------------------------------------------------------------- how to write


def wrapped(text: str) -> str:
    """The text with its sentences wrapped, and what is a block, a table or a heading as it is."""
    lines: list[str] = []
    paragraph: list[str] = []
    in_block = False

    def end_paragraph() -> None:
        sentences = " ".join(" ".join(paragraph).split()).replace("q. ", f"q.{SPACE}")
        lines.extend(
            textwrap.wrap(sentences, COLUMNS, break_long_words=False, break_on_hyphens=False)
        )
        paragraph.clear()

    for line in text.strip().split("\n"):
        if line.startswith("```"):
            in_block = not in_block
            as_it_is = True
        else:
            as_it_is = in_block or line.startswith(("|", "#", "!["))
        if not as_it_is and line.strip():
            paragraph.append(line)
            continue
        end_paragraph()
        if as_it_is or (lines and lines[-1]):  # no two empty lines
            lines.append(line)
    end_paragraph()
    return "\n".join(lines).replace(SPACE, " ")


def number(value: float, digits: int = 3) -> str:
    """A number with a fixed count of decimals and a real minus."""
    # Adding 0.0 turns a negative zero into a plain one.
    return f"{round(float(value), digits) + 0.0:.{digits}f}".replace("-", "−")


def numbers(values: Tensor, digits: int = 3) -> str:
    """The shape of a tensor, and its first values."""
    digits = digits if values.is_floating_point() else 0
    shown = [number(value, digits) for value in values.flatten()[:6].tolist()]
    shape = " × ".join(str(size) for size in values.shape)
    return f"[{shape}]  {'  '.join(shown)} …"


def code(content: str) -> str:
    """Text that somebody else wrote, as a Markdown code span that no line break divides."""
    content = excerpt(content) or " "
    longest = max((len(run) for run in re.findall("`+", content)), default=0)
    if longest:
        content = f" {content} "
    fence = "`" * (longest + 1)
    return f"{fence}{content}{fence}".replace(" ", SPACE)


def table(heads: Sequence[str], rows: Sequence[Sequence]) -> str:
    """A Markdown table. A bar within a cell would end the cell."""
    lines = [heads, ["---"] * len(heads), *rows]
    cells = [[str(cell).replace("|", "\\|") for cell in line] for line in lines]
    return "\n".join(f"| {' | '.join(line)} |" for line in cells)


# --------------------------------------------------------------------------------- what is followed


@dataclass
class Answer:
    """A response to the first prompt that the page follows."""

    row: int  # among all responses
    tokens: list[str]  # as Python writes them, so that blanks are seen

    @property
    def length(self) -> int:
        return len(self.tokens)

    def token(self, place: int) -> str:
        return code(self.tokens[place])


@dataclass
class Walk:
    """One step, and what the sections look at. All places are counted from 0."""

    training: train.Training
    hosts: dict[str, Config]  # the same settings with another host
    samples: list[Sample]
    batch: train.Batch
    found: str  # where the prompts come from, in words
    good: Answer
    bad: Answer
    rows: Tensor  # [T, K], attention of the bad answer before the step
    stem: str | None  # how the names of picture files begin, if there are pictures

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
        """[B, T]"""
        return dyco.token_weights(self.batch.scores, self.rollout.mask)

    @property
    def parting(self) -> int:
        """The first place at which the good and the bad answer have different tokens.

        It is the last place where one of them is the beginning of the other.
        """
        shorter = min(self.good.length, self.bad.length)
        tokens = self.rollout.tokens
        different = tokens[self.good.row, :shorter] != tokens[self.bad.row, :shorter]
        return int(different.int().argmax()) if different.any() else shorter - 1

    @property
    def leads(self) -> Tensor:
        """By how much the visual shift is ahead of the text shift at each token of the bad one."""
        signals = self.rollout.signals
        return (signals.visual_shift - signals.text_shift)[self.bad.row, : self.bad.length]

    # The first token has no shift.

    @property
    def looking(self) -> int:
        return 1 + int(self.leads[1:].argmax())

    @property
    def reading(self) -> int:
        return 1 + int(self.leads[1:].argmin())


def collect_groups(training: train.Training, count: int) -> tuple[train.Batch, list[int], bool]:
    """Stages 1 and 2 for the first `count` samples whose responses got different rewards.

    Returns the batch, the places of its samples, and whether there were enough among the first
    SEARCHED. Otherwise the first samples fill up the batch.
    """
    kept: dict[int, train.Batch] = {}
    others: dict[int, train.Batch] = {}
    for place in range(min(SEARCHED, len(training.dataset))):
        batch = train.collect(training, [(place, place)], step=STEP)
        if (batch.rewards != batch.rewards[:, :1]).any():
            kept[place] = batch
        else:
            others[place] = batch
        if len(kept) == count:
            break
    enough = len(kept) == count
    for place in list(others)[: count - len(kept)]:
        kept[place] = others[place]
    return train.join_batches(list(kept.values())), list(kept), enough


def answers_of(training: train.Training, batch: train.Batch) -> list[Answer]:
    """The first response with the highest reward of the first prompt, and that with the lowest.

    They are the first two where all rewards are equal.
    """
    of_group = batch.rewards[0]
    rows = [int(of_group.argmax()), int(of_group.argmin())]
    if rows[0] == rows[1]:
        rows = [0, 1]
    answers = []
    for row in rows:
        ids = batch.rollout.tokens[row][batch.rollout.mask[row]].tolist()
        tokens = [printable(repr(training.policy.tokenizer.decode(token))) for token in ids]
        if len(tokens) < 2:
            raise WalkthroughError(
                f"answer {row + 1} has one token, so nothing moves in it; try another train.seed"
            )
        answers.append(Answer(row, tokens))
    return answers


def rows_of_attention(training: train.Training, batch: train.Batch, row: int) -> Tensor:
    """The attention rows [T, K] of a response to the first prompt, from the packed forward.

    The tap hands each block of rows to a function that makes signals of it; this one keeps them.
    """
    blocks = []

    def keep(attention: Tensor, *masks: Tensor, shift: str) -> dyco.Signals:
        # Each block but the first begins with the row before it.
        blocks.append(attention[row, 1:] if blocks else attention[row])
        return dyco.attention_signals(attention, *masks, shift=shift)

    policy, part = training.policy, batch.rollout.select([0])
    tap = Tap(training.config.dyco.layers, policy.depth, signals=keep)
    with torch.no_grad():
        policy(part.prompts, part.tokens, part.mask, tap)
    length = int(batch.rollout.mask[row].sum())
    return torch.cat(blocks)[:length].cpu()


# ------------------------------------------------------------------------------------- the sections


def introduction(walk: Walk) -> str:
    policy = walk.training.policy
    weights = sum(weight.numel() for weight in policy.parameters())
    return INTRODUCTION.format(weights=f"{weights:,}", depth=policy.depth)


def section_1(walk: Walk) -> str:
    prompt = walk.rollout.prompts[0]
    processor = walk.training.policy.image_processor
    _, high, wide = prompt.image_grid_thw[0].tolist()
    pixels = prompt.pixel_values
    visual = prompt.visual_mask.nonzero().flatten() + 1
    return SECTION_1.format(
        found=walk.found,
        question=code(prompt.question.replace("<image>", "")),
        answer=code(prompt.answer),
        patches=numbers(pixels),
        tokens=numbers(prompt.input_ids),
        first=int(visual[0]),
        last=int(visual[-1]),
        frames=processor.temporal_patch_size,
        patch=processor.patch_size,
        patch_numbers=pixels.shape[1],
        high=high,
        wide=wide,
        merge=processor.merge_size,
        visual=len(visual),
    )


def section_2(walk: Walk) -> str:
    rollout, good, bad = walk.rollout, walk.good, walk.bad
    size, prompt = rollout.group_size, len(rollout.prompts[0].input_ids)
    lines = []
    for row, text in enumerate(rollout.texts[:size], start=1):
        # Four blanks or more, so that nothing in an answer ends the block.
        lines += textwrap.wrap(f"{row}: {excerpt(text)}", COLUMNS, subsequent_indent=" " * 4)
    of_bad = rollout.logprobs[bad.row].sum()
    return SECTION_2.format(
        answers="\n".join(lines),
        size=size,
        prompt=prompt,
        unshared=size * prompt,
        good=good.row + 1,
        bad=bad.row + 1,
        bad_sum=number(of_bad),
        bad_chance=number(of_bad.exp(), 4),
        parting=parting_in_words(walk),
    )


def parting_in_words(walk: Walk) -> str:
    good, bad, place = walk.good, walk.bad, walk.parting
    if good.tokens == bad.tokens:
        return "They are equal, token by token."
    chances = walk.rollout.logprobs[:, place].exp()
    return (
        f"They part at token {place + 1}: {good.token(place)} (probability "
        f"{number(chances[good.row])}) or {bad.token(place)} ({number(chances[bad.row])})."
    )


class RowPair:
    """The rows [K] of a token and of the one before it, within the keys of one modality."""

    def __init__(self, before: Tensor, now: Tensor, members: Tensor):
        self.attention = [before[members], now[members]]
        self.shares = [part / part.sum() for part in self.attention]  # eq. 2
        self.roots = (self.shares[0] * self.shares[1]).sqrt()
        most = min(SHOWN_PLACES, len(self.roots))
        self.shown = self.roots.topk(most).indices.sort().values.tolist()

    def table(self) -> str:
        """The places that add most to the overlap, and the sum of the others."""
        columns = [*self.attention, *self.shares, self.roots]
        rows = []
        for place in self.shown:
            rows.append([place + 1, *(number(column[place], 4) for column in columns)])
        others = [number(column.sum() - column[self.shown].sum(), 4) for column in columns]
        rows.append([f"{len(self.roots) - len(self.shown)} others, summed", *others])
        masses = [number(part.sum()) for part in self.attention]
        heads = ("image token", "token before", "this token", *(f"/ {mass}" for mass in masses))
        return table((*heads, "root of their product"), rows)

    def by_hand(self) -> dict[str, str]:
        """The place that adds most, and the sum, as lines."""
        place = int(self.roots.argmax())
        mass = number(self.attention[1].sum(), 4)
        share, root = number(self.shares[1][place], 4), number(self.roots[place], 4)
        parts = [number(self.roots[shown], 4) for shown in self.shown]
        parts.append(number(self.roots.sum() - self.roots[self.shown].sum(), 4))
        return {
            "most": str(place + 1),
            "by_mass": f"{number(self.attention[1][place], 4)} / {mass} = {share}",
            "root": f"sqrt({number(self.shares[0][place], 4)} × {share}) = {root}",
            "overlap": f"{' + '.join(parts)} = {self.total}",
        }

    @property
    def total(self) -> str:
        return number(self.roots.sum(), 4)


def section_3(walk: Walk) -> str:
    bad, place, prompt = walk.bad, walk.looking, walk.rollout.prompts[0]
    before, now = walk.rows[place - 1], walk.rows[place]
    visual = F.pad(prompt.visual_mask, (0, len(now) - len(prompt.visual_mask)))
    text = ~visual
    first = int(visual.int().argmax())
    text[:first] = False
    picture_pair, text_pair = RowPair(before, now, visual), RowPair(before, now, text)
    signals = signals_at(walk, place)
    masses = (now[visual].sum(), now[text].sum(), now[:first].sum())
    more_text = walk.rollout.signals.text_mass > walk.rollout.signals.visual_mass
    return SECTION_3.format(
        **signals,
        **picture_pair.by_hand(),
        place=place + 1,
        token=bad.token(place),
        row=numbers(now[: len(prompt.input_ids) + place], 4),
        masses=" + ".join(number(mass) for mass in masses),
        total=number(sum(masses)),
        overlap_table=picture_pair.table(),
        visual_overlap=picture_pair.total,
        text_overlap=text_pair.total,
        attention_pictures=attention_pictures(walk),
        more_text=int(more_text[bad.row, : bad.length].sum()),
        length=bad.length,
    )


def signals_at(walk: Walk, place: int) -> dict[str, str]:
    """The masses, the shifts and the lead of a token of the bad answer, as they are printed."""
    signals = walk.rollout.signals._asdict()
    printed = {name: number(values[walk.bad.row, place]) for name, values in signals.items()}
    return {**printed, "lead": number(walk.leads[place])}


def attention_pictures(walk: Walk) -> str:
    if walk.stem is None:
        return ""
    return ATTENTION_PICTURES.format(
        stem=walk.stem, reading=walk.reading + 1, reading_token=walk.bad.token(walk.reading)
    )


def section_4(walk: Walk) -> str:
    bad, place = walk.bad, walk.looking
    roles, scores, weights = (
        values[bad.row, : bad.length]
        for values in (walk.batch.roles, walk.batch.scores, walk.weights)
    )
    signals = signals_at(walk, place)
    of_role = {1: signals["visual_mass"], -1: signals["text_mass"], 0: "0"}[int(roles[place])]
    counts = {name: int((roles == role).sum()) for role, name in ROLES.items()}
    pictures = ""
    if walk.stem is not None:
        pictures = f"![weights of the tokens along the answer]({walk.stem}-weights.svg)"
    return SECTION_4.format(
        **signals,
        **counts,
        place=place + 1,
        tau=walk.config.dyco.tau,
        of_role=of_role,
        score=number(scores[place]),
        mean=number(scores.exp().mean()),
        weight=number(weights[place]),
        sum=number(weights.sum(), 1),
        token_table=token_table(walk),
        weights_picture=pictures,
    )


def token_table(walk: Walk) -> str:
    """Every token of the bad answer, its second half beside the first."""
    bad, signals = walk.bad, walk.rollout.signals
    columns = (signals.visual_shift, signals.text_shift, walk.batch.scores, walk.weights)
    cells = []
    for place in range(bad.length):
        of_token = [number(values[bad.row, place]) for values in columns]
        of_token.insert(2, ROLES[int(walk.batch.roles[bad.row, place])])
        cells.append([place + 1, bad.token(place), *of_token])
    heads = ["", "token", "visual shift", "text shift", "role", "score", "weight"]
    if len(cells) % 2:
        cells.append([""] * len(heads))
    half = len(cells) // 2
    rows = [left + right for left, right in zip(cells[:half], cells[half:], strict=True)]
    return table(heads + heads, rows)


def section_5(walk: Walk) -> str:
    batch, settings = walk.batch, walk.config.reward
    of_group = batch.rewards[0].double()
    advantages = rl_algos.group_advantages(batch.rewards[:1], walk.config.algo.scale)[0]
    texts = [number(reward, 2) for reward in of_group]
    rows = []
    for place, reward in enumerate(texts):
        checks = [number(values[0, place], 0) for values in (batch.accuracy, batch.format)]
        rows.append([place + 1, *checks, reward, number(advantages[place])])
    mean, std = number(of_group.mean()), number(of_group.std(), 4)
    squares = " + ".join(f"({reward} − {mean})^2" for reward in texts)
    divisor = "1" if walk.config.algo.scale == "none" else f"({std} + 0.0001)"

    def by_hand(answer: Answer) -> str:
        value = number(advantages[answer.row])
        return f"({texts[answer.row]} − {mean}) / {divisor} = {value}"

    return SECTION_5.format(
        accuracy_weight=settings.accuracy_weight,
        format_weight=settings.format_weight,
        reward_table=table(("answer", "right", "form", "reward", "group advantage"), rows),
        equal="" if len(set(texts)) > 1 else ALL_EQUAL,
        mean_line=f"({' + '.join(texts)}) / {len(texts)} = {mean}",
        std_line=f"sqrt(({squares}) / {len(texts) - 1}) = {std}",
        good_line=by_hand(walk.good),
        bad_line=by_hand(walk.bad),
    )


def section_6(walk: Walk) -> str:
    alpha = walk.config.dyco.alpha
    rows = []
    for name, answer in (("good", walk.good), ("bad", walk.bad)):
        advantage = number(group_advantage(walk, answer, walk.config.algo.scale))
        weights = walk.weights[answer.row, : answer.length]
        places = {
            "largest weight": int(weights.argmax()),
            "smallest weight": int(weights.argmin()),
            "where they part": walk.parting,
        }
        for what, place in places.items():
            role = ROLES[int(walk.batch.roles[answer.row, place])]
            weight = number(weights[place])
            pushed = number(walk.batch.advantages[answer.row, place])
            by_hand = f"(1 + {alpha} × {weight}) × {advantage} = {pushed}"
            cells = [f"{name} answer, {what}", place + 1, answer.token(place), role, weight]
            rows.append([*cells, by_hand])
    heads = ("", "", "token", "role", "weight", "token advantage")
    return SECTION_6.format(
        alpha=alpha,
        advantage_table=table(heads, rows),
        place=walk.parting + 1,
        mean_factor=number(1 + alpha, 1),
    )


def group_advantage(walk: Walk, answer: Answer, scale: str) -> Tensor:
    """Â of an answer to the first prompt."""
    return rl_algos.group_advantages(walk.batch.rewards[:1], scale)[0, answer.row]


class HostLoss:
    """What one host makes of some log-probabilities [B, T] of the batch."""

    def __init__(self, walk: Walk, host: Config, logprobs: Tensor):
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
        self.loss = number(loss.detach())
        (self.slopes,) = torch.autograd.grad(1000 * loss, logprobs)
        self.clipped = number(100 * logged["clip_fraction"], 0)


def section_7(walk: Walk, new_logprobs: Tensor) -> str:
    batch, bad, place = walk.batch, walk.bad, walk.parting
    ratios = (new_logprobs - batch.old_logprobs).exp()
    of_tokens = ratios[walk.rollout.mask]
    rows = []
    for name, host in walk.hosts.items():
        before = HostLoss(walk, host, batch.old_logprobs)
        after = HostLoss(walk, host, new_logprobs)
        slope = number(before.slopes[bad.row, place])
        if name in ("cispo", "dr_grpo", "grpo"):
            slope = f"{slope_by_hand(walk, name)} = {slope}"
        end = number(after.slopes[bad.row, place])
        rows.append([f"`{name}`", slope, end, after.clipped, before.loss, after.loss])
    heads = ("host", "slope before", "slope after", "% of tokens stopped", "loss before")
    return SECTION_7.format(
        lowest=number(of_tokens.min()),
        highest=number(of_tokens.max()),
        place=place + 1,
        token=bad.token(place),
        ratio=number(ratios[bad.row, place]),
        host_table=table((*heads, "loss after"), rows),
        floor=number(1 - walk.hosts["grpo"].algo.clip_low, 1),
        ceiling=number(1 + walk.hosts["grpo"].algo.clip_high, 1),
        dapo=number(1 + walk.hosts["dapo"].algo.clip_high, 2),
        gspo=number(1 - walk.hosts["gspo"].algo.clip_low, 4),
        grpo_kl=walk.hosts["grpo"].algo.kl,
        gspo_kl=walk.hosts["gspo"].algo.kl,
        count=len(walk.rollout.mask),
        longest=walk.config.rollout.max_new_tokens,
        tokens=int(walk.rollout.mask.sum()),
    )


def slope_by_hand(walk: Walk, host: str) -> str:
    """What divides the token advantage differs from host to host."""
    bad, count = walk.bad, len(walk.rollout.mask)
    divisor = {
        "cispo": str(int(walk.rollout.mask.sum())),
        "dr_grpo": f"({walk.config.rollout.max_new_tokens} × {count})",
        "grpo": f"({bad.length} × {count})",
    }[host]
    factor = 1 + walk.config.dyco.alpha * walk.weights[bad.row, walk.parting]
    pushed = factor * group_advantage(walk, bad, walk.hosts[host].algo.scale)
    return f"1000 × {number(-pushed)} / {divisor}"


@dataclass
class Taken:
    """What the optimizer step did."""

    rate: float
    norm: float  # of the gradient before it was cut
    name: str  # of one matrix of the model
    gradient: Tensor  # its first values, as the optimizer got them
    change: Tensor
    logprobs: Tensor  # [B, T] after the step
    greedy_before: str
    greedy_after: str


def take_step(walk: Walk) -> Taken:
    """Stage 6. One matrix is watched: the gradient is forgotten with the step."""
    training = walk.training
    trained = {name: p for name, p in training.policy.named_parameters() if p.requires_grad}
    name = [name for name in trained if "q_proj" in name][-1]
    gradients = []

    def first_values(matrix: Tensor) -> Tensor:
        return matrix.detach().flatten()[:SHOWN_WEIGHTS].float().cpu()

    def keep(optimizer, arguments, options) -> None:
        gradients.append(first_values(trained[name].grad).clone())

    greedy_before = greedy_answers(walk)
    before = first_values(trained[name]).clone()
    training.optimizer.register_step_pre_hook(keep)
    rate = train.set_learning_rate(walk.config, training.optimizer)
    logged = train.update(training, walk.batch, walk.groups)
    if not gradients:
        raise WalkthroughError("the loss or its gradient is not finite, so no step was taken")
    logprobs, _ = train.compute_logprobs(training, training.policy, walk.rollout, [walk.groups])
    return Taken(
        rate=rate,
        norm=logged["grad_norm"],
        name=name,
        gradient=gradients[0],
        change=first_values(trained[name]) - before,
        logprobs=logprobs,
        greedy_before=greedy_before,
        greedy_after=greedy_answers(walk),
    )


def greedy_answers(walk: Walk) -> str:
    """What the policy answers to each prompt without dice, and whether it is right."""
    limit = walk.config.rollout.max_new_tokens
    prompts = walk.rollout.prompts
    texts = generate(walk.training.policy, prompts, 1, max_new_tokens=limit, key=None).texts
    answers = []
    for text, sample in zip(texts, walk.samples, strict=True):
        start = max(text.rfind("<answer>"), 0)
        verdict = "right" if rewards.accuracy(text, sample.answer) == 1 else "wrong"
        answers.append(code(f"{text[start:][-60:]} ({verdict})"))
    return " and ".join(answers)


def section_8(walk: Walk, taken: Taken) -> str:
    before = walk.rollout.logprobs.sum(1)
    after = taken.logprobs.sum(1)

    def by_hand(answer: Answer) -> str:
        sums = f"{number(after[answer.row])} − ({number(before[answer.row])})"
        return f"exp({sums}) = {number((after - before)[answer.row].exp(), 2)}"

    return SECTION_8.format(
        host=walk.config.algo.name,
        norm=number(taken.norm),
        clip=walk.config.optim.grad_clip,
        rate=f"{taken.rate:f}".rstrip("0"),
        name=code(taken.name.removeprefix("hf.model.")),
        gradient="  ".join(number(value) for value in 1000 * taken.gradient),
        change="  ".join(number(value) for value in 1000 * taken.change),
        chance_table=chance_table(walk, before, after),
        good_line=by_hand(walk.good),
        bad_line=by_hand(walk.bad),
        greedy_before=taken.greedy_before,
        greedy_after=taken.greedy_after,
    )


def chance_table(walk: Walk, before: Tensor, after: Tensor) -> str:
    """The probability of each answer, from its log-probability [B] before and after the step."""
    size = walk.rollout.group_size
    advantages = rl_algos.group_advantages(walk.batch.rewards, walk.config.algo.scale)
    heads = ["answer"]
    rows = [[place + 1] for place in range(size)]
    for group in walk.groups:
        heads += [f"prompt {group + 1}: group advantage", "probability before", "after"]
        for place in range(size):
            row = group * size + place
            chances = [figure(float(sums[row].exp())) for sums in (before, after)]
            rows[place] += [number(advantages[group, place]), *chances]
    return table(heads, rows)


# ---------------------------------------------------------------------------------------- the walk


def walk_along(walk: Walk) -> Iterator[str]:
    """The page, part by part, and on the way stages 3 to 6 of train.train_step."""
    training, batch = walk.training, walk.batch
    yield introduction(walk)
    yield section_1(walk)
    yield section_2(walk)
    train.add_logprobs(training, batch, [walk.groups])
    train.assign_advantages(walk.config, batch, STEP)
    batch.loss_mask = train.loss_mask(walk.config, walk.rollout)
    yield section_3(walk)
    yield section_4(walk)
    yield section_5(walk)
    yield section_6(walk)
    taken = take_step(walk)
    yield section_7(walk, taken.logprobs)
    yield section_8(walk, taken)


def draw_pictures(walk: Walk) -> dict[str, str]:
    """How the name of a file ends -> its SVG. All three are about the bad answer."""
    bad, prompt, image = walk.bad, walk.rollout.prompts[0], walk.samples[0].images[0]

    def of_answer(values: Tensor) -> list:
        return values[bad.row, : bad.length].tolist()

    def label(place: int) -> str:
        token = bad.tokens[place]
        return token if len(token) <= 14 else f"{token[:13]}…"

    labels = [label(place) for place in range(bad.length)]
    marked = [walk.looking, walk.reading]
    roles = [ROLES[role] for role in of_answer(walk.batch.roles)]
    shifts = walk.rollout.signals
    visual_shifts, text_shifts = of_answer(shifts.visual_shift), of_answer(shifts.text_shift)
    rows = walk.rows[:, : len(prompt.visual_mask)][:, prompt.visual_mask]
    grids = visual_grids(prompt, walk.training.policy.image_processor.merge_size)
    (grid,), heat = heat_maps(rows, grids)
    cells = (-(-grid["height"] // grid["block"]), -(-grid["width"] // grid["block"]))
    panels = []
    for place in marked:
        title = f"token {place + 1} {labels[place]}: {number(rows[place].sum())} on the picture"
        panels.append((title, heat[place].tolist()))
    return {
        "attention": attention_picture(picture(image), image.size, cells, panels=panels),
        "shifts": shifts_picture(labels, visual_shifts, text_shifts, marked=marked),
        "weights": weights_picture(labels, of_answer(walk.weights), roles),
    }


# ------------------------------------------------------------------------------------- the command


def own_sample(options: argparse.Namespace) -> Sample | None:
    """The reader's own question about one image, if the options ask one. No model is needed."""
    given = [options.image, options.question, options.answer]
    if given == [None, None, None]:
        return None
    if None in given:
        raise WalkthroughError(
            "--image, --question and --answer go together: expected all three, or none of them"
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
        raise WalkthroughError(f"--answer {excerpt(options.answer)!r}: {error}") from error
    path = Path(options.image).resolve()
    return Sample("yours", (load_image(path.name, path.parent),), question, answer)


def read_configs(options: argparse.Namespace, prompts: int) -> tuple[Config, dict[str, Config]]:
    """The settings of the step, and the same with each host. Raises ConfigError."""
    file = DEFAULTS
    overrides = ["rollout.group_size=4", "optim.warmup_steps=0"]
    if options.model is not None:
        # A model of a run is asked as it was in training.
        file = evaluate.config_file_of(options.model) or DEFAULTS
        overrides.append(f"model.path={options.model}")
    overrides += options.overrides
    # What a page is made of: one update on two prompts of the toy, or on one of the reader's own.
    overrides += ["data.path=toy", "data.eval_path=null", "train.updates_per_rollout=1"]
    overrides.append(f"rollout.prompts_per_step={prompts}")
    config = load_run_config(file, overrides)
    for name, value in EXPLAINED.items():
        if getattr(config.dyco, name) != value:
            raise WalkthroughError(
                f"dyco.{name}: found {str(getattr(config.dyco, name)).lower()}; the page explains "
                f"the paper's first version, so expected {str(value).lower()}"
            )
    if len(config.dyco.layers) > 1:
        raise WalkthroughError("dyco.layers: found several; the page shows rows of one layer")
    hosts = {}
    for name in sorted(rl_algos.ALGORITHMS):
        hosts[name] = load_run_config(file, [*overrides, f"algo.name={name}"])
    return config, hosts


def where_from(config: Config, places: list[int], enough: bool) -> str:
    """Where the toy's prompts come from, in words."""
    size = config.rollout.group_size
    chosen = " and ".join(str(place) for place in places)
    task = (
        "The task: a picture holds shapes in colours, each colour is worth a number, and the "
        "question asks for the sum over some shapes. "
    )
    if enough:
        rule = (
            "Questions that training does not see were tried from number 0 on, until two were "
            f"found whose {size} answers did not all get the same reward."
        )
    else:
        rule = (
            f"None of the first {SEARCHED} questions that training does not see, or one alone, had "
            f"{size} answers with different rewards."
        )
    return f"{task}{rule} These are {chosen}; sections 1 to 6 follow the first."


def prepare(options: argparse.Namespace) -> Walk:
    """Check the options, load the model, and sample the batch of the step."""
    sample = own_sample(options)
    prompts = 2 if sample is None else 1
    config, hosts = read_configs(options, prompts)
    if config.train.threads:
        torch.set_num_threads(config.train.threads)
    training = train.build(config, distributed.start())
    training = training._replace(dataset=training.held_out if sample is None else [sample])
    batch, places, enough = collect_groups(training, prompts)
    good, bad = answers_of(training, batch)
    found = "The prompt is your question about your picture."
    if sample is None:
        found = where_from(config, places, enough=enough)
    return Walk(
        training,
        hosts,
        samples=[training.dataset[place] for place in places],
        batch=batch,
        found=found,
        good=good,
        bad=bad,
        rows=rows_of_attention(training, batch, bad.row),
        stem=Path(options.out).stem if options.out else None,
    )


def run_walkthrough(options: argparse.Namespace) -> None:
    out = None if options.out is None else Path(options.out)
    if out is not None and (out.suffix != ".md" or out.is_dir()):
        raise WalkthroughError(f"--out: found {options.out!r}; expected a file that ends in .md")
    if out is not None:
        make_folder(out.parent, "--out")
    walk = prepare(options)
    parts = []
    for part in walk_along(walk):
        parts.append(wrapped(part))
        if out is None:
            print(printable(parts[-1]), end="\n\n", flush=True)
    if out is None:
        return
    for name, content in draw_pictures(walk).items():
        write_file(out.with_name(f"{out.stem}-{name}.svg"), content.encode())
    write_file(out, ("\n\n".join(parts) + "\n").encode())
    print(f"wrote {out} and three pictures", file=sys.stderr)


@command(ValueError, OSError, train.RunError)
def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        prog="python -m tools.walkthrough",
        description="One step of training as a page to read, with its numbers.",
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
        help="over the config's values, such as rollout.max_new_tokens=512",
    )
    run_walkthrough(parser.parse_args(arguments))


if __name__ == "__main__":
    main()
