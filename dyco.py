"""dyco.py: DyCo-RL's token advantage, equations 1–8 of arXiv 2606.08035, as pure functions of tensors.

    attention rows ── attention_signals ──> mass and shift per modality      eq. 1–3
                      assign_roles      ──> visual, text or neutral          eq. 5
                      alignment_scores  ──> how well attention fits the role eq. 4, 6
                      token_weights     ──> weights of mean 1                eq. 7
                      reweight_advantages > one advantage per token          eq. 8

Shapes: B responses, T response tokens, K keys. The *query* of token o_t is the position just before it (the last prompt
token for t = 1), and its row is the softmaxed attention of that query, averaged over heads. Everything is computed in
the dtype of its input, at least float32, and without gradient: the weights are constants to the policy loss.
"""

import math
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor


class Signals(NamedTuple):
    """What DyCo reads off the attention, each [B, T]: masses as fractions 0 … 1, shifts in radians 0 … π."""

    visual_mass: Tensor
    text_mass: Tensor
    visual_shift: Tensor
    text_shift: Tensor


def _at_least_float32(x: Tensor) -> Tensor:
    return x if x.dtype == torch.float64 else x.float()


# --------------------------------------------------------------------------------------------- eq. 3 and its ablations


def fisher_rao_distance(p: Tensor, q: Tensor, dim: int = -1) -> Tensor:
    """Geodesic distance between distributions on the simplex, in radians, 0 … π (eq. 3).

    2·arccos(Σ √(p·q)) loses half its digits where p ≈ q; the chord 4·arcsin(‖√p − √q‖ / 2) is the same number and gives
    exactly 0 for equal and π for disjoint distributions.

    >>> fisher_rao_distance(torch.tensor([1., 0., 0., 0.]), torch.tensor([.5, .5, 0., 0.]))
    tensor(1.5708)
    """
    p, q = _at_least_float32(p), _at_least_float32(q)
    half_chord = torch.linalg.vector_norm(p.sqrt() - q.sqrt(), dim=dim) / 2
    return 4 * torch.asin(half_chord.clamp(max=math.sqrt(0.5)))


def _hellinger(p: Tensor, q: Tensor) -> Tensor:
    return torch.linalg.vector_norm(p.sqrt() - q.sqrt(), dim=-1) * (math.pi / math.sqrt(2))


def _jensen_shannon(p: Tensor, q: Tensor) -> Tensor:
    middle = (p + q) / 2
    # Σ p·log(p/m) with the log of each quotient: exactly 0 where p equals q
    log_ratio = lambda x: torch.where(
        x > 0, x / middle.clamp(min=torch.finfo(x.dtype).tiny), 1
    ).log2()
    divergence = (p * log_ratio(p) + q * log_ratio(q)).sum(-1) / 2
    return divergence.clamp(0, 1).sqrt() * math.pi


def _total_variation(p: Tensor, q: Tensor) -> Tensor:
    return (p - q).abs().sum(-1) * (math.pi / 2)


# each scaled to 0 … π, so that τ keeps its meaning; l1 is the total variation
SHIFTS = {
    "fisher_rao": fisher_rao_distance,
    "hellinger": _hellinger,
    "js": _jensen_shannon,
    "l1": _total_variation,
}


def _choose(table, name: str, what: str):
    if name not in table:
        raise ValueError(f"unknown {what} {name!r}; expected one of {', '.join(table)}")
    return table[name]


# ------------------------------------------------------------------------------------------------ eq. 1–3: the signals


@torch.no_grad()
def attention_signals(
    attention: Tensor, visual_mask: Tensor, text_mask: Tensor, shift: str = "fisher_rao"
) -> Signals:
    """Mass on each modality and its movement since the previous token (eq. 1–3).

    attention [B, T, K] head-averaged rows; visual_mask [B, K] bool; text_mask [B, T, K] bool, the text keys visible to
    each query. A key that was not visible a step ago had probability 0 then. Shifts are 0 at t = 0, and where the
    modality has no mass at t or at t − 1. Raises ValueError for an unknown `shift`, and for heads that were not averaged.

    >>> rows = torch.tensor([[[.2, .2, .6, .0], [.4, .0, .3, .3]]])                  # keys: image, image, text, text
    >>> image = torch.tensor([[True, True, False, False]])
    >>> attention_signals(rows, image, ~image[:, None].expand(1, 2, 4))              # doctest: +NORMALIZE_WHITESPACE
    Signals(visual_mass=tensor([[0.4000, 0.4000]]), text_mass=tensor([[0.6000, 0.6000]]),
            visual_shift=tensor([[0.0000, 1.5708]]), text_shift=tensor([[0.0000, 1.5708]]))
    """
    distance = _choose(SHIFTS, shift, "dyco.shift")
    if attention.dim() != 3:
        raise ValueError(f"attention: expected [B, T, K], found {tuple(attention.shape)}")
    attention = _at_least_float32(attention)

    def mass_and_shift(members: Tensor) -> tuple[Tensor, Tensor]:
        selected = torch.where(members, attention, 0)
        mass = selected.sum(-1)  # eq. 1
        within = selected / torch.where(mass > 0, mass, 1)[..., None]  # eq. 2
        moved = torch.where(
            (mass[:, 1:] > 0) & (mass[:, :-1] > 0), distance(within[:, :-1], within[:, 1:]), 0
        )
        return mass, torch.nn.functional.pad(moved, (1, 0))  # eq. 3

    visual_mass, visual_shift = mass_and_shift(visual_mask[:, None, :])
    text_mass, text_shift = mass_and_shift(text_mask)
    return Signals(visual_mass, text_mass, visual_shift, text_shift)


# ------------------------------------------------------------------------------------- eq. 4–7: role, score and weight


@torch.no_grad()
def assign_roles(
    visual_shift: Tensor, text_shift: Tensor, mask: Tensor, tau: float = 0.05
) -> Tensor:
    """The modality whose attention moved more, by over τ radians, gives the token its role (eq. 5).

    [B, T] float, float and bool -> [B, T] int8: +1 visual, −1 text, 0 neutral or padding.

    >>> assign_roles(torch.tensor([[0., .9, .1, .30]]), torch.tensor([[0., .2, .6, .28]]), torch.ones(1, 4).bool())
    tensor([[ 0,  1, -1,  0]], dtype=torch.int8)
    """
    lead = _at_least_float32(visual_shift) - _at_least_float32(text_shift)
    return ((lead > tau).to(torch.int8) - (lead < -tau).to(torch.int8)) * mask.to(torch.int8)


def _relative_mass(visual_mass: Tensor, text_mass: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
    total = visual_mass + text_mass
    visual = torch.where(total > 0, visual_mass / torch.where(total > 0, total, 1), 0)  # eq. 4
    return visual, torch.where(total > 0, 1 - visual, 0)


def _minmax_mass(visual_mass: Tensor, text_mass: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
    def normalise(mass: Tensor) -> Tensor:  # over the response; a constant mass gives 0
        low = torch.where(mask, mass, math.inf).amin(-1, keepdim=True)
        high = torch.where(mask, mass, -math.inf).amax(-1, keepdim=True)
        return torch.where(high > low, (mass - low) / torch.where(high > low, high - low, 1), 0)

    return normalise(visual_mass), normalise(text_mass)


RATIOS = {"relative": _relative_mass, "minmax": _minmax_mass}


@torch.no_grad()
def alignment_scores(
    visual_mass: Tensor, text_mass: Tensor, roles: Tensor, mask: Tensor, ratio: str = "relative"
) -> Tensor:
    """How much of its attention a token spends on the modality of its role, s_t in 0 … 1 (eq. 4 and 6).

    All [B, T]; 0 on neutral tokens and padding. `ratio` "relative" is eq. 4; "minmax" scales each modality's mass over
    the response to 0 … 1 instead (the authors' later revision). Raises ValueError for another one.

    >>> alignment_scores(torch.tensor([[.2, .2, .1, .2]]), torch.tensor([[.6, .2, .3, .2]]),
    ...                  torch.tensor([[0, 1, -1, 0]]), torch.ones(1, 4).bool())
    tensor([[0.0000, 0.5000, 0.7500, 0.0000]])
    """
    normalise = _choose(RATIOS, ratio, "dyco.ratio")
    visual, text = normalise(_at_least_float32(visual_mass), _at_least_float32(text_mass), mask)
    return torch.where(mask & (roles > 0), visual, 0) + torch.where(
        mask & (roles < 0), text, 0
    )  # eq. 6


def roles_and_scores(signals: Signals, mask: Tensor, settings) -> tuple[Tensor, Tensor]:
    """Role and alignment score of every token, [B, T] each (eq. 4 to 6); `settings` has tau and ratio."""
    roles = assign_roles(signals.visual_shift, signals.text_shift, mask, settings.tau)
    scores = alignment_scores(signals.visual_mass, signals.text_mass, roles, mask, settings.ratio)
    return roles, scores


@torch.no_grad()
def token_weights(scores: Tensor, mask: Tensor) -> Tensor:
    """Softmax of the scores over the response times its length: mean exactly 1, 0 on padding (eq. 7).

    scores [B, T] float, mask [B, T] bool -> [B, T].

    >>> token_weights(torch.tensor([[0., .5, .75, 0.]]), torch.ones(1, 4).bool())
    tensor([[0.6938, 1.1438, 1.4687, 0.6938]])
    """
    scores = _at_least_float32(scores).masked_fill(~mask, -math.inf)
    weights = torch.softmax(scores, dim=-1) * mask.sum(-1, keepdim=True)
    return torch.where(
        mask.any(-1, keepdim=True), weights, 0
    )  # the softmax of a row without tokens is NaN


# ------------------------------------------------------------------------------------ eq. 8: the token advantage


def _shuffle(scores: Tensor, among: Tensor, generator) -> Tensor:
    """Permute the scores of the marked tokens within each response; one generator, or one per response."""
    if generator is None:
        raise ValueError(
            "a shuffled rule needs a generator: a torch.Generator, or a sequence with one per response"
        )
    shuffled = scores.clone()
    for row in range(len(scores)):
        places = among[row].nonzero().squeeze(-1)
        source = generator if isinstance(generator, torch.Generator) else generator[row]
        order = torch.randperm(len(places), generator=source, device=source.device).to(
            places.device
        )
        shuffled[row, places] = scores[row, places[order]]
    return shuffled


def _response_factor(scores: Tensor, roles: Tensor, alpha: float, group_size: int | None) -> Tensor:
    """[B, 1]: 1 + α·tanh(z), z the mean score over non-neutral tokens, standardised within the prompt's group."""
    if group_size is None:
        raise ValueError("rule 'response' needs group_size")
    if len(scores) % group_size:
        raise ValueError(
            f"rule 'response': {len(scores)} responses are not whole groups of {group_size}"
        )
    acting = roles != 0
    mean = torch.where(acting, scores, 0).sum(-1) / acting.sum(-1).clamp(min=1)
    grouped = mean.view(len(mean) // group_size, group_size)
    spread = grouped.amax(-1, keepdim=True) - grouped.amin(-1, keepdim=True)
    std = grouped.std(-1, keepdim=True, unbiased=group_size > 1)
    # scores are in 0 … 1: means that differ by rounding alone must not be standardised into ±1
    z = torch.where(
        spread > 1e-6, (grouped - grouped.mean(-1, keepdim=True)) / std.clamp(min=1e-12), 0
    )
    return (1 + alpha * torch.tanh(z)).view(-1, 1)


class Tokens(NamedTuple):
    """What a rule sees."""

    advantages: Tensor  # [B, T], Â of the token's response
    scores: Tensor  # [B, T], s_t, 0 on padding
    roles: Tensor  # [B, T], +1 visual, −1 text, 0 neutral or padding
    mask: Tensor  # [B, T]
    alpha: float
    generator: object  # a torch.Generator, one per response, or None
    group_size: int | None


def _paper(t: Tokens) -> Tensor:
    return (1 + t.alpha * token_weights(t.scores, t.mask)) * t.advantages  # eq. 8


def _signed(t: Tokens, offset: float = 0.0) -> Tensor:
    acting = t.roles != 0
    weights = token_weights(t.scores, acting) - offset
    return torch.where(
        acting, (1 + t.alpha * t.advantages.sign() * weights) * t.advantages, t.advantages
    )


def _flat(t: Tokens) -> Tokens:
    return t._replace(scores=torch.zeros_like(t.scores))


class Rule(NamedTuple):
    """One way to assign token advantages."""

    compute: Callable[[Tokens], Tensor]
    description: str
    source: str
    controls: tuple[str, ...] = ()  # the rules that it must be compared with


RULES = {
    "off": Rule(lambda t: t.advantages, "the host's own advantage", "host algorithm"),
    "paper": Rule(_paper, "(1 + α·w)·Â", "eq. 8", ("uniform", "shuffled")),
    "signed": Rule(
        _signed,
        "(1 + α·sign(Â)·w)·Â on non-neutral tokens",
        "the authors' later revision",
        ("signed_uniform", "signed_shuffled"),
    ),
    "centered": Rule(
        lambda t: _signed(t, offset=1.0), "signed with w − 1", "the authors' later revision"
    ),
    "uniform": Rule(lambda t: _paper(_flat(t)), "paper with w = 1", "control"),
    "shuffled": Rule(
        lambda t: _paper(t._replace(scores=_shuffle(t.scores, t.mask, t.generator))),
        "paper with permuted scores",
        "control",
    ),
    "signed_uniform": Rule(lambda t: _signed(_flat(t)), "signed with w = 1", "control"),
    "signed_shuffled": Rule(
        lambda t: _signed(t._replace(scores=_shuffle(t.scores, t.roles != 0, t.generator))),
        "signed with permuted scores",
        "control",
    ),
    "response": Rule(
        lambda t: _response_factor(t.scores, t.roles, t.alpha, t.group_size) * t.advantages,
        "(1 + α·tanh z)·Â",
        "the authors' release",
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
    generator=None,
    group_size: int | None = None,
) -> Tensor:
    """The advantage of every token (eq. 8) or of one of its variants and controls.

    advantages [B] or [B, T], scores, roles and mask [B, T] -> [B, T], 0 on padding. Rows are group-major.

    rule: "off" Â · "paper" (1 + α·w)·Â, w of mean 1 over the response · "signed" (1 + α·sign(Â)·w)·Â on non-neutral
    tokens, w of mean 1 over those, Â on neutral ones · "centered" signed with w − 1 · controls: "uniform" and
    "signed_uniform" (w = 1), "shuffled" and "signed_shuffled" (scores permuted among the tokens that enter w; need
    `generator`) · "response" (1 + α·tanh z)·Â with one z per response (needs `group_size`).
    Raises ValueError for another rule or a missing argument.

    >>> reweight_advantages(torch.tensor([-1.]), torch.tensor([[0., .5, .75, 0.]]), torch.tensor([[0, 1, -1, 0]]),
    ...                     torch.ones(1, 4).bool())
    tensor([[-1.1388, -1.2288, -1.2937, -1.1388]])
    """
    compute = _choose(RULES, rule, "dyco.rule").compute
    advantages = _at_least_float32(advantages)
    if advantages.dim() == 1:
        advantages = advantages[:, None]
    advantages = advantages.expand(mask.shape)
    scores, roles = torch.where(mask, _at_least_float32(scores), 0), torch.where(mask, roles, 0)
    return torch.where(
        mask, compute(Tokens(advantages, scores, roles, mask, alpha, generator, group_size)), 0
    )
