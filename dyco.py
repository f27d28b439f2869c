"""dyco.py: DyCo-RL's token advantage, eq. 1 to 8 of arXiv 2606.08035, as pure functions of tensors.

    attention rows ── attention_signals ────> mass and shift of each modality       eq. 1, 2, 3
                      assign_roles ─────────> visual, text or neutral               eq. 5
                      alignment_scores ─────> does the attention fit the role?      eq. 4, 6
                      token_weights ────────> weights whose mean is 1               eq. 7
                      reweight_advantages ──> one advantage for each token          eq. 8

    python dyco.py        # works the four-token example of the README, and prints it as a table

Shapes: B responses, T response tokens, K keys.

The *query* of token o_t is the position just before it: the last prompt token for t = 1, and
o_{t-1} after that. Its *row* is the softmaxed attention of that query over all keys, averaged over
the heads.

Everything is computed in the dtype of its input, but at least in float32, and without gradient: to
the policy loss the weights are constants.
"""

import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor


class Signals(NamedTuple):
    """What DyCo reads off the attention, each [B, T]: masses are shares 0 … 1, shifts are radians 0
    … π."""

    visual_mass: Tensor
    text_mass: Tensor
    visual_shift: Tensor
    text_shift: Tensor


def _at_least_float32(x: Tensor) -> Tensor:
    return x if x.dtype == torch.float64 else x.float()


def _choose(table: dict, name: str, key: str):
    """The entry of a registry. Raises ValueError that lists the names it has."""
    if name not in table:
        raise ValueError(f"unknown {key} {name!r}; expected one of {', '.join(table)}")
    return table[name]


# --------------------------------------------------------------- eq. 3: how far did attention move?


def fisher_rao_distance(p: Tensor, q: Tensor, dim: int = -1) -> Tensor:
    """Geodesic distance between two distributions on the simplex, in radians from 0 to π (eq. 3).

    The paper writes 2·arccos(Σ √(p·q)). Near p = q the arccos loses half of its digits. The chord
    between √p and √q gives the same number as 4·arcsin(‖√p − √q‖ / 2), exactly 0 for equal and π
    for disjoint distributions.

    >>> fisher_rao_distance(torch.tensor([1., 0., 0., 0.]), torch.tensor([.5, .5, 0., 0.]))
    tensor(1.5708)
    """
    p = _at_least_float32(p)
    q = _at_least_float32(q)
    half_chord = torch.linalg.vector_norm(p.sqrt() - q.sqrt(), dim=dim) / 2
    # Rounding may put the half chord of disjoint distributions just above √½, where the result
    # would exceed π.
    return 4 * torch.asin(half_chord.clamp(max=math.sqrt(0.5)))  # eq. 3


def _hellinger(p: Tensor, q: Tensor) -> Tensor:
    return torch.linalg.vector_norm(p.sqrt() - q.sqrt(), dim=-1) * (math.pi / math.sqrt(2))


def _jensen_shannon(p: Tensor, q: Tensor) -> Tensor:
    middle = (p + q) / 2

    def log_ratio(x: Tensor) -> Tensor:
        # The logarithm of the quotient, not a difference of logarithms: exactly 0 where p equals q.
        smallest = torch.finfo(x.dtype).tiny
        return torch.where(x > 0, x / middle.clamp(min=smallest), 1).log2()

    divergence = (p * log_ratio(p) + q * log_ratio(q)).sum(-1) / 2
    return divergence.clamp(0, 1).sqrt() * math.pi


def _total_variation(p: Tensor, q: Tensor) -> Tensor:
    return (p - q).abs().sum(-1) * (math.pi / 2)


# The paper's distance and three others for ablation. Each is scaled to 0 … π, so that τ keeps its
# meaning.
SHIFTS = {
    "fisher_rao": fisher_rao_distance,
    "hellinger": _hellinger,
    "js": _jensen_shannon,
    "l1": _total_variation,
}


# -------------------------------------------------------------------------- eq. 1 to 3: the signals


@torch.no_grad()
def attention_signals(
    attention: Tensor, visual_mask: Tensor, text_mask: Tensor, shift: str = "fisher_rao"
) -> Signals:
    """How much attention lies on each modality, and how far it moved since the token before (eq. 1
    to 3).

    attention [B, T, K]: rows, averaged over heads. visual_mask [B, K] bool: the image keys.
    text_mask [B, T, K] bool: the text keys that each query can see. A key that could not be seen
    one step ago had probability 0 then.

    The shift is 0 at t = 0, where there is no token before, and where the modality has no mass at t
    or at t − 1. Raises ValueError for an unknown `shift`, and for attention whose heads were not
    averaged.

    >>> rows = torch.tensor([[[.2, .2, .6, .0], [.4, .0, .3, .3]]])  # two image, two text keys
    >>> image = torch.tensor([[True, True, False, False]])
    >>> signals = attention_signals(rows, image, ~image[:, None].expand(1, 2, 4))
    >>> signals.visual_mass, signals.text_mass
    (tensor([[0.4000, 0.4000]]), tensor([[0.6000, 0.6000]]))
    >>> signals.visual_shift, signals.text_shift
    (tensor([[0.0000, 1.5708]]), tensor([[0.0000, 1.5708]]))
    """
    distance = _choose(SHIFTS, shift, "dyco.shift")
    if attention.dim() != 3:
        raise ValueError(f"attention: expected [B, T, K], found {tuple(attention.shape)}")
    attention = _at_least_float32(attention)

    def mass_and_shift(members: Tensor) -> tuple[Tensor, Tensor]:
        selected = torch.where(members, attention, 0)
        mass = selected.sum(-1)  # eq. 1
        # Where there is no mass, dividing by 1 leaves zeros instead of NaN.
        within = selected / torch.where(mass > 0, mass, 1)[..., None]  # eq. 2
        moved = distance(within[:, :-1], within[:, 1:])  # eq. 3
        both_have_mass = (mass[:, 1:] > 0) & (mass[:, :-1] > 0)
        moved = torch.where(both_have_mass, moved, 0)
        return mass, F.pad(moved, (1, 0))

    visual_mass, visual_shift = mass_and_shift(visual_mask[:, None, :])
    text_mass, text_shift = mass_and_shift(text_mask)
    return Signals(visual_mass, text_mass, visual_shift, text_shift)


# --------------------------------------------------------------- eq. 4 to 7: role, score and weight


@torch.no_grad()
def assign_roles(
    visual_shift: Tensor, text_shift: Tensor, mask: Tensor, tau: float = 0.05
) -> Tensor:
    """The modality within which attention moved more, by over τ radians, gives the token its role
    (eq. 5).

    Shifts [B, T] float, mask [B, T] bool -> [B, T] int8: +1 visual, −1 text, 0 neutral or padding.

    >>> visual_shift, text_shift = torch.tensor([[[0., .9, .1, .30]], [[0., .2, .6, .28]]])
    >>> assign_roles(visual_shift, text_shift, torch.ones(1, 4).bool())
    tensor([[ 0,  1, -1,  0]], dtype=torch.int8)
    """
    lead = _at_least_float32(visual_shift) - _at_least_float32(text_shift)
    visual = (lead > tau).to(torch.int8)  # eq. 5
    text = (lead < -tau).to(torch.int8)
    return (visual - text) * mask.to(torch.int8)


def _relative_mass(visual_mass: Tensor, text_mass: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
    """Eq. 4: the share of each modality in the mass of both. Both are 0 where there is no mass."""
    total = visual_mass + text_mass
    visual = torch.where(total > 0, visual_mass / torch.where(total > 0, total, 1), 0)
    text = torch.where(total > 0, 1 - visual, 0)
    return visual, text


def _minmax_mass(visual_mass: Tensor, text_mass: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
    """Each modality's mass, scaled to 0 … 1 over the response. A constant mass gives 0."""

    def normalise(mass: Tensor) -> Tensor:
        low = torch.where(mask, mass, math.inf).amin(-1, keepdim=True)
        high = torch.where(mask, mass, -math.inf).amax(-1, keepdim=True)
        varies = high > low
        return torch.where(varies, (mass - low) / torch.where(varies, high - low, 1), 0)

    return normalise(visual_mass), normalise(text_mass)


# What a token's score compares: the modalities with one another (eq. 4), or each with itself over
# the response.
RATIOS = {"relative": _relative_mass, "minmax": _minmax_mass}


@torch.no_grad()
def alignment_scores(
    visual_mass: Tensor, text_mass: Tensor, roles: Tensor, mask: Tensor, ratio: str = "relative"
) -> Tensor:
    """How much of its attention a token spends on the modality of its role: s_t, 0 … 1 (eq. 4 and
    6).

    All are [B, T]. Neutral tokens and padding have the score 0. `ratio` "relative" is eq. 4.
    "minmax" scales the mass of each modality to 0 … 1 over the response instead, as the authors'
    later revision does. Raises ValueError for any other ratio.

    >>> alignment_scores(torch.tensor([[.2, .2, .1, .2]]), torch.tensor([[.6, .2, .3, .2]]),
    ...                  torch.tensor([[0, 1, -1, 0]]), torch.ones(1, 4).bool())
    tensor([[0.0000, 0.5000, 0.7500, 0.0000]])
    """
    normalise = _choose(RATIOS, ratio, "dyco.ratio")
    visual, text = normalise(_at_least_float32(visual_mass), _at_least_float32(text_mass), mask)
    visual_scores = torch.where(mask & (roles > 0), visual, 0)
    text_scores = torch.where(mask & (roles < 0), text, 0)
    return visual_scores + text_scores  # eq. 6: at most one of the two is not 0


def roles_and_scores(signals: Signals, mask: Tensor, settings) -> tuple[Tensor, Tensor]:
    """The role and the alignment score of every token, [B, T] each (eq. 4 to 6).

    settings: anything with the attributes tau and ratio, such as the section `dyco` of the config.
    """
    roles = assign_roles(signals.visual_shift, signals.text_shift, mask, tau=settings.tau)
    scores = alignment_scores(
        signals.visual_mass, signals.text_mass, roles, mask=mask, ratio=settings.ratio
    )
    return roles, scores


@torch.no_grad()
def token_weights(scores: Tensor, mask: Tensor) -> Tensor:
    """The softmax of the scores over the response, times its length: a mean of exactly 1 (eq. 7).

    scores [B, T] float, mask [B, T] bool -> [B, T], 0 on padding.

    >>> token_weights(torch.tensor([[0., .5, .75, 0.]]), torch.ones(1, 4).bool())
    tensor([[0.6938, 1.1438, 1.4687, 0.6938]])
    """
    scores = _at_least_float32(scores).masked_fill(~mask, -math.inf)
    weights = torch.softmax(scores, dim=-1) * mask.sum(-1, keepdim=True)  # eq. 7
    # The softmax of a row without any token is NaN.
    return torch.where(mask.any(-1, keepdim=True), weights, 0)


# ----------------------------------------------------------------------- eq. 8: the token advantage


class Tokens(NamedTuple):
    """What a rule sees of some responses."""

    advantages: Tensor  # [B, T], Â of the token's response
    scores: Tensor  # [B, T], s_t, 0 on padding
    roles: Tensor  # [B, T], +1 visual, −1 text, 0 neutral or padding
    mask: Tensor  # [B, T] bool
    alpha: float
    generator: torch.Generator | Sequence[torch.Generator] | None
    group_size: int | None


def _off(t: Tokens) -> Tensor:
    return t.advantages


def _paper(t: Tokens) -> Tensor:
    weights = token_weights(t.scores, t.mask)  # eq. 7
    return (1 + t.alpha * weights) * t.advantages  # eq. 8


def _signed(t: Tokens) -> Tensor:
    has_role = t.roles != 0
    # The weights have mean 1 over the tokens with a role alone.
    return _weigh_tokens_with_role(t, token_weights(t.scores, mask=has_role))


def _centered(t: Tokens) -> Tensor:
    has_role = t.roles != 0
    return _weigh_tokens_with_role(t, token_weights(t.scores, mask=has_role) - 1)


def _weigh_tokens_with_role(t: Tokens, weights: Tensor) -> Tensor:
    factor = 1 + t.alpha * t.advantages.sign() * weights
    return torch.where(t.roles != 0, factor * t.advantages, t.advantages)


def _uniform(t: Tokens) -> Tensor:
    return _paper(_with_equal_scores(t))


def _shuffled(t: Tokens) -> Tensor:
    return _paper(_with_shuffled_scores(t, among=t.mask))


def _signed_uniform(t: Tokens) -> Tensor:
    return _signed(_with_equal_scores(t))


def _signed_shuffled(t: Tokens) -> Tensor:
    return _signed(_with_shuffled_scores(t, among=t.roles != 0))


def _with_equal_scores(t: Tokens) -> Tokens:
    return t._replace(scores=torch.zeros_like(t.scores))


def _with_shuffled_scores(t: Tokens, among: Tensor) -> Tokens:
    """The scores of the marked tokens change places within each response."""
    if t.generator is None:
        raise ValueError(
            "a shuffled rule needs a generator: one torch.Generator, or a sequence with one for "
            "each response"
        )
    shuffled = t.scores.clone()
    for row in range(len(t.scores)):
        places = among[row].nonzero().squeeze(-1)
        one_for_all = isinstance(t.generator, torch.Generator)
        source = t.generator if one_for_all else t.generator[row]
        order = torch.randperm(len(places), generator=source, device=source.device)
        shuffled[row, places] = t.scores[row, places[order.to(places.device)]]
    return t._replace(scores=shuffled)


def _response(t: Tokens) -> Tensor:
    """One factor per response: 1 + α·tanh(z), where z is its mean score, standardised within the
    prompt's group."""
    if t.group_size is None:
        raise ValueError("rule 'response' needs group_size")
    if len(t.scores) % t.group_size:
        raise ValueError(
            f"rule 'response': {len(t.scores)} responses are not whole groups of {t.group_size}"
        )
    has_role = t.roles != 0
    tokens_with_role = has_role.sum(-1).clamp(min=1)
    mean_score = torch.where(has_role, t.scores, 0).sum(-1) / tokens_with_role
    groups = mean_score.view(len(mean_score) // t.group_size, t.group_size)
    distance_from_mean = groups - groups.mean(-1, keepdim=True)
    std = groups.std(-1, keepdim=True, unbiased=t.group_size > 1)
    # Scores lie in 0 … 1. Means that differ by rounding alone must not be standardised into ±1.
    spread = groups.amax(-1, keepdim=True) - groups.amin(-1, keepdim=True)
    z = torch.where(spread > 1e-6, distance_from_mean / std.clamp(min=1e-12), 0)
    factor = (1 + t.alpha * torch.tanh(z)).view(-1, 1)
    return factor * t.advantages


class Rule(NamedTuple):
    """A way to spread a response's advantage over its tokens. Config checks, help and tools derive
    from it."""

    compute: Callable[[Tokens], Tensor]  # -> [B, T]
    what: str  # one line, for people
    source: str
    # Rules to compare it with: equal weights first, then the same weights on other tokens.
    controls: tuple[str, ...] = ()


PAPER = "arXiv 2606.08035 v1"
LATER = "the authors' later code"
CONTROL = "a control of this project"

RULES = {
    "off": Rule(_off, "Â for every token; the signals are only logged", "the host algorithm"),
    "paper": Rule(_paper, "eq. 8: (1 + α·w)·Â", f"{PAPER}, eq. 7 and 8", ("uniform", "shuffled")),
    "signed": Rule(
        _signed,
        "(1 + α·sign(Â)·w)·Â on tokens with a role, w of mean 1 over those; Â on neutral ones",
        LATER,
        ("signed_uniform", "signed_shuffled"),
    ),
    "centered": Rule(_centered, "signed with w − 1 in place of w", LATER),
    "uniform": Rule(_uniform, "paper with w = 1", CONTROL),
    "shuffled": Rule(_shuffled, "paper with the scores permuted within the response", CONTROL),
    "signed_uniform": Rule(_signed_uniform, "signed with w = 1", CONTROL),
    "signed_shuffled": Rule(
        _signed_shuffled, "signed with the scores permuted among the tokens with a role", CONTROL
    ),
    "response": Rule(
        _response,
        "(1 + α·tanh z)·Â with one z per response: its mean score, standardised within the group",
        "the idea of the authors' first release, which weighs responses instead of tokens",
    ),
}


@torch.no_grad()
def reweight_advantages(
    advantages: Tensor,
    scores: Tensor,
    roles: Tensor,
    mask: Tensor,
    alpha: float = 0.2,
    rule: str = "paper",
    generator: torch.Generator | Sequence[torch.Generator] | None = None,
    group_size: int | None = None,
) -> Tensor:
    """The advantage of every token: eq. 8, or another rule of RULES, which says what each of them
    is.

    advantages [B] or [B, T]; scores, roles and mask [B, T] -> [B, T], 0 on padding. Rows are
    group-major. The shuffled rules need `generator`, one for all responses or one for each.
    "response" needs `group_size`. Raises ValueError for an unknown rule or a missing argument.

    >>> scores, roles = torch.tensor([[0., .5, .75, 0.]]), torch.tensor([[0, 1, -1, 0]])
    >>> reweight_advantages(torch.tensor([-1.]), scores, roles, torch.ones(1, 4).bool())
    tensor([[-1.1388, -1.2288, -1.2937, -1.1388]])
    """
    chosen = _choose(RULES, rule, "dyco.rule")
    advantages = _at_least_float32(advantages)
    if advantages.dim() == 1:
        advantages = advantages[:, None]
    tokens = Tokens(
        advantages=advantages.expand(mask.shape),
        scores=torch.where(mask, _at_least_float32(scores), 0),
        roles=torch.where(mask, roles, 0),
        mask=mask,
        alpha=alpha,
        generator=generator,
        group_size=group_size,
    )
    return torch.where(mask, chosen.compute(tokens), 0)


# ------------------------------------------------------------------------------- the worked example


def worked_example() -> str:
    """The four tokens of the README, from masses and shifts to token advantages, as a table."""
    mask = torch.ones(1, 4, dtype=torch.bool)
    signals = Signals(
        visual_mass=torch.tensor([[0.2, 0.2, 0.1, 0.2]]),
        text_mass=torch.tensor([[0.6, 0.2, 0.3, 0.2]]),
        visual_shift=torch.tensor([[0.0, 0.9, 0.1, 0.30]]),
        text_shift=torch.tensor([[0.0, 0.2, 0.6, 0.28]]),
    )
    roles = assign_roles(signals.visual_shift, signals.text_shift, mask)
    scores = alignment_scores(signals.visual_mass, signals.text_mass, roles, mask)
    weights = token_weights(scores, mask)
    of_right = reweight_advantages(torch.tensor([1.0]), scores, roles, mask)
    of_wrong = reweight_advantages(torch.tensor([-1.0]), scores, roles, mask)

    columns = [
        ("visual", "mass", "eq. 1", signals.visual_mass),
        ("text", "mass", "eq. 1", signals.text_mass),
        ("visual", "shift", "eq. 3", signals.visual_shift),
        ("text", "shift", "eq. 3", signals.text_shift),
        ("", "role", "eq. 5", roles),
        ("", "score", "eq. 4, 6", scores),
        ("", "weight", "eq. 7", weights),
        ("advantage", "if Â = +1", "eq. 8", of_right),
        ("advantage", "if Â = −1", "eq. 8", of_wrong),
    ]
    lines = []
    for place, head in enumerate(("", "token", "")):
        lines.append(f"{head:>5}" + "".join(f"{column[place]:>10}" for column in columns))
    role_names = {1: "visual", -1: "text", 0: "neutral"}
    for token in range(4):
        line = f"{token + 1:>5}"
        for _, title, _, values in columns:
            value = values[0, token].item()
            line += f"{role_names[value]:>10}" if title == "role" else f"{value:>10.2f}"
        lines.append(line)
    return "\n".join(lines)


if __name__ == "__main__":
    from tools.command import command

    with command():
        print(worked_example())
