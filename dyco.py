"""dyco.py: DyCo-RL's token advantage, eq. 1 to 8 of arXiv 2606.08035, as pure functions of tensors.

    attention rows ── attention_signals ────> mass and shift of each modality       eq. 1, 2, 3
                      assign_roles ─────────> visual, text or neutral               eq. 5
                      alignment_scores ─────> does the attention fit the role?      eq. 4, 6
                      token_weights ────────> weights whose mean is 1               eq. 7
                      reweight_advantages ──> one advantage for each token          eq. 8

Eq. 8 is one *rule* of several in RULES: behind the equations stand the rules of other papers, and
the controls that any rule can be compared with.

    python dyco.py        # works the four-token example of the README, and prints it as a table

Shapes: B responses, T response tokens, K keys, P prompts, G responses per prompt.

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
    text_mask [B, T, K] bool: the text keys. Attention is 0 on keys that a query cannot see, so they
    may be marked, too. A key that could not be seen one step ago had probability 0 then.

    The shift of the first token is 0, since no row before its own is given. So is a shift where the
    modality has no mass at t or at t − 1. Raises ValueError for an unknown `shift`, and for
    attention whose heads were not averaged.

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


def _minmax(x: Tensor, mask: Tensor) -> Tensor:
    """x, scaled to 0 … 1 over the marked places of each row. A row of equal values gives 0."""
    low = torch.where(mask, x, math.inf).amin(-1, keepdim=True)
    high = torch.where(mask, x, -math.inf).amax(-1, keepdim=True)
    varies = mask & (high > low)
    return torch.where(varies, (x - low) / torch.where(high > low, high - low, 1), 0)


def _minmax_mass(visual_mass: Tensor, text_mass: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
    """Each modality's mass, scaled to 0 … 1 over the response. A constant mass gives 0."""
    return _minmax(visual_mass, mask), _minmax(text_mass, mask)


# What a token's score compares: the modalities with one another (eq. 4), or each with itself over
# the response (no ratio, but the authors' setting has this name).
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
    """What a rule sees of some responses. A rule's entry says which of the optional ones it needs.

    Rows are group-major. Floats are at least float32, and 0 on padding.
    """

    advantages: Tensor  # [B, T], Â of the token's response
    scores: Tensor  # [B, T], s_t
    roles: Tensor  # [B, T], +1 visual, −1 text, 0 neutral or padding
    mask: Tensor  # [B, T] bool
    alpha: float
    group_size: int | None = None
    logprobs: Tensor | None = None  # [B, T], log π(o_t) of the policy that sampled
    entropy: Tensor | None = None  # [B, T], of the distribution that o_t was drawn from, in nats
    blind_logprobs: Tensor | None = None  # [B, T], log π(o_t) without the image
    image_similarity: Tensor | None = None  # [B, T], cosine of hidden state and image
    tokens: Tensor | None = None  # [B, T] long, ids; anything on padding
    rewards: Tensor | None = None  # [B]


# A rule returns what multiplies Â, one factor for each token [B, T]. What it says of padding is
# dropped.


def _off(t: Tokens) -> Tensor:
    return torch.ones_like(t.advantages)


def _paper(t: Tokens) -> Tensor:
    return 1 + t.alpha * token_weights(t.scores, t.mask)  # eq. 7 and 8


def _signed(t: Tokens) -> Tensor:
    # The weights have mean 1 over the tokens with a role alone.
    return _weigh_tokens_with_role(t, token_weights(t.scores, mask=_with_role(t)))


def _centered(t: Tokens) -> Tensor:
    return _weigh_tokens_with_role(t, token_weights(t.scores, mask=_with_role(t)) - 1)


def _weigh_tokens_with_role(t: Tokens, weights: Tensor) -> Tensor:
    return torch.where(_with_role(t), 1 + t.alpha * t.advantages.sign() * weights, 1)


def _with_role(t: Tokens) -> Tensor:
    return t.roles != 0


def _response(t: Tokens) -> Tensor:
    """1 + α·tanh(z), where z is the response's mean score, standardised within its group."""
    tokens_with_role = _with_role(t).sum(-1).clamp(min=1)
    mean_score = torch.where(_with_role(t), t.scores, 0).sum(-1) / tokens_with_role
    groups = _in_groups(t, mean_score)
    distance_from_mean = groups - groups.mean(-1, keepdim=True)
    std = groups.std(-1, keepdim=True, unbiased=t.group_size > 1)
    # Scores lie in 0 … 1. Means that differ by rounding alone must not be standardised into ±1.
    spread = groups.amax(-1, keepdim=True) - groups.amin(-1, keepdim=True)
    z = torch.where(spread > 1e-6, distance_from_mean / std.clamp(min=1e-12), 0)
    return (1 + t.alpha * torch.tanh(z)).view(-1, 1).expand(t.mask.shape)


def _in_groups(t: Tokens, x: Tensor) -> Tensor:
    """[B, …] -> [P, G, …]"""
    if len(x) % t.group_size:
        raise ValueError(f"{len(x)} responses are not whole groups of {t.group_size}")
    return x.unflatten(0, (len(x) // t.group_size, t.group_size))


# ------------------------------------------------------------------------ the rules of other papers


def _highest(values: Tensor, mask: Tensor, percent: int) -> Tensor:
    """Marks the ⌈percent / 100 · n⌉ highest of the n masked values of each row.

    Of equal values the earlier ones are marked.
    """
    count = (mask.sum(-1, keepdim=True) * percent + 99) // 100
    order = values.masked_fill(~mask, -math.inf).argsort(dim=-1, descending=True, stable=True)
    return mask & (order.argsort(dim=-1) < count)


def _highest_of_batch(values: Tensor, mask: Tensor, percent: int) -> Tensor:
    """The same over all responses together."""
    marked = _highest(values.flatten()[None], mask.flatten()[None], percent)
    return marked.view(mask.shape)


def _mean(x: Tensor, mask: Tensor) -> Tensor:
    """Over the masked places of each row; 0 where there are none."""
    return torch.where(mask, x, 0).sum(-1, keepdim=True) / mask.sum(-1, keepdim=True).clamp(min=1)


def _entropy(t: Tokens) -> Tensor:
    kept = _highest_of_batch(t.entropy, t.mask, percent=20)
    # A mean over all tokens of the batch becomes one over the kept ones.
    return kept * (t.mask.sum().to(t.entropy.dtype) / kept.sum().clamp(min=1))


def _image_dependence(t: Tokens) -> Tensor:
    """k3 = e^d − d − 1, where d is how much likelier the token is without the image (in nats).

    It estimates how far the distributions with and without the image are apart (Schulman's
    estimator of a KL divergence).
    """
    d = (t.blind_logprobs - t.logprobs).clamp(-20, 20)
    return (torch.expm1(d) - d).clamp(min=0)


def _vppo(t: Tokens) -> Tensor:
    dependence = _image_dependence(t).clamp(max=10)
    kept = _highest(dependence, t.mask, percent=40)
    # The responses that depend more on the image weigh more; the mean over responses is 1.
    responses = t.mask.any(-1)[None]  # [1, B], as height and of_response
    height = _minmax(_mean(dependence, t.mask).T, responses)
    average = _mean(height, responses)
    of_response = torch.where(average > 0, 0.9 + 0.1 * height / average.clamp(min=1e-12), 1)
    return kept * of_response.T


def _pgpo(t: Tokens) -> Tensor:
    intensity = _minmax(_image_dependence(t).log1p(), t.mask)
    threshold = 0.4
    above = 1 + 2 * (intensity - threshold) / (1 - threshold)
    weights = torch.where(intensity < threshold, intensity / threshold, above)
    average = _mean(weights, t.mask)
    return torch.where(average > 0, weights / average.clamp(min=1e-12), 1)


def _tor(t: Tokens) -> Tensor:
    uncertain = _highest_of_batch(t.entropy, t.mask, percent=30)
    change = (t.blind_logprobs - t.logprobs).abs()
    looking = _highest_of_batch(change, t.mask, percent=30)
    return torch.where(uncertain, 1.0, 0.5 * looking.to(t.entropy.dtype))


def _vgpo(t: Tokens) -> Tensor:
    similarity = _minmax(t.image_similarity, t.mask)
    return (1 + similarity - _mean(similarity, t.mask)).clamp(0.1, 2)


def _surprise(t: Tokens) -> Tensor:
    return _paper(t._replace(scores=-torch.expm1(t.logprobs)))


def _siblings(t: Tokens) -> Tensor:
    """Eq. 7 and 8, scored by how much the token changed what its response was worth.

    V_t, the worth of a response up to token t, is the mean reward of the responses of the group
    that begin with the same t tokens.
    """
    tokens = _in_groups(t, t.tokens)  # [P, G, T]
    mask = _in_groups(t, t.mask)
    rewards = _in_groups(t, t.rewards)  # [P, G]
    both_go_on = mask[:, :, None] & mask[:, None]
    equal = both_go_on & (tokens[:, :, None] == tokens[:, None])
    alike = equal.long().cumprod(-1)  # [P, G, G, T]: the response, its sibling, up to this token
    worth = (alike * rewards[:, None, :, None]).sum(2) / alike.sum(2).clamp(min=1)
    before_the_first = rewards.mean(-1)[:, None, None].expand(-1, t.group_size, 1)
    change = torch.cat([before_the_first, worth], dim=-1).diff(dim=-1)
    return _paper(t._replace(scores=_scores_of_change(t, change.flatten(0, 1))))


def _phrases(t: Tokens) -> Tensor:
    """Eq. 7 and 8, scored by what the token adds to the worth of the two tokens before it.

    The worth of a phrase is the mean reward of the responses of the group that hold it, wherever
    it stands in them. So responses are compared behind the place where they part, too.
    """
    tokens = torch.where(t.mask, t.tokens, -1)
    phrases = F.pad(tokens, (2, 0), value=-1).unfold(-1, 3, 1)  # [B, T, 3], the last is token t
    rewards = _in_groups(t, t.rewards)
    groups = zip(_in_groups(t, phrases), _in_groups(t, t.mask), rewards, strict=True)
    change = []
    for of_group, mask, reward in groups:
        beginning = _worth_of_phrases(of_group[..., :2], mask, reward)
        change.append(_worth_of_phrases(of_group, mask, reward) - beginning)
    return _paper(t._replace(scores=_scores_of_change(t, torch.cat(change))))


def _worth_of_phrases(phrases: Tensor, mask: Tensor, rewards: Tensor) -> Tensor:
    """phrases [G, T, n] ids, mask [G, T], rewards [G] -> [G, T], the mean reward of those that hold
    the phrase."""
    kinds = phrases.flatten(0, 1).unique(dim=0, return_inverse=True)[1].view(mask.shape)
    count = rewards.new_zeros(len(rewards), int(kinds.max()) + 1)  # [G, kinds]
    holds = count.scatter_add_(1, kinds, mask.to(count.dtype)) > 0
    worth = (holds * rewards[:, None]).sum(0) / holds.sum(0).clamp(min=1)
    return worth[kinds]


def _scores_of_change(t: Tokens, change: Tensor) -> Tensor:
    """3 · max(0, sign(Â)·change) / spread of the group's rewards, [B, T]; 0 where all are equal."""
    rewards = _in_groups(t, t.rewards)
    spread = rewards.amax(-1) - rewards.amin(-1)
    spread = spread.repeat_interleave(t.group_size)[:, None]
    fits = (t.advantages.sign() * change).clamp(min=0)
    return torch.where(t.mask & (spread > 0), 3 * fits / torch.where(spread > 0, spread, 1), 0)


# ---------------------------------------------------------------------------- controls and registry


def _as_it_is(factors: Tensor, among: Tensor, generator) -> Tensor:
    return factors


def _shuffle(factors: Tensor, among: Tensor, generator) -> Tensor:
    """The factors of the marked tokens change places within each response."""
    if generator is None:
        raise ValueError(
            "control 'shuffled' needs a generator: one torch.Generator, or a sequence with one for "
            "each response"
        )
    one_for_all = isinstance(generator, torch.Generator)
    if not one_for_all and len(generator) != len(factors):
        raise ValueError(f"{len(generator)} generators; expected one for all, or {len(factors)}")
    shuffled = factors.clone()
    for row in range(len(factors)):
        places = among[row].nonzero().squeeze(-1)
        source = generator if one_for_all else generator[row]
        order = torch.randperm(len(places), generator=source, device=source.device)
        shuffled[row, places] = factors[row, places[order.to(places.device)]]
    return shuffled


def _uniform(factors: Tensor, among: Tensor, generator) -> Tensor:
    """The marked tokens of each response get their mean factor."""
    return torch.where(among, _mean(factors, among), factors)


# What a rule can be compared with: its own factors on other tokens, or without differences.
CONTROLS = {"none": _as_it_is, "shuffled": _shuffle, "uniform": _uniform}


def _all_tokens(t: Tokens) -> Tensor:
    return t.mask


class Rule(NamedTuple):
    """A way to spread a response's advantage over its tokens. Config checks, help and tools derive
    from it."""

    factor: Callable[[Tokens], Tensor]  # -> [B, T]: what multiplies Â
    what: str  # one line, for people
    source: str
    average: str  # of the factors: rules that differ in it learn at different rates
    needs: tuple[str, ...] = ()  # fields of Tokens that it reads, of those that may be None
    over_batch: bool = False  # compares responses of different groups
    per_response: bool = False  # one factor for a whole response: no control changes it
    among: Callable[[Tokens], Tensor] = _all_tokens  # [B, T] bool: the tokens a control touches


PAPER = "arXiv 2606.08035 v1"
LATER = "the authors' later code"
OURS = "this project"

RULES = {
    "off": Rule(
        _off,
        "Â for every token; the signals are only logged",
        "the host algorithm",
        "1",
        per_response=True,
    ),
    "paper": Rule(
        _paper, "eq. 8: (1 + α·w)·Â", f"{PAPER}, eq. 7 and 8", "1 + α over each response"
    ),
    "signed": Rule(
        _signed,
        "(1 + α·sign(Â)·w)·Â on tokens with a role, w of mean 1 over those; Â on neutral ones",
        LATER,
        "1 + α where Â > 0, 1 − α where Â < 0, over the tokens with a role",
        among=_with_role,
    ),
    "centered": Rule(
        _centered,
        "signed with w − 1 in place of w",
        LATER,
        "1 over each response",
        among=_with_role,
    ),
    "response": Rule(
        _response,
        "(1 + α·tanh z)·Â with one z per response: its mean score, standardised within the group",
        "the idea of the authors' first release, which weighs responses instead of tokens",
        "about 1 over each group",
        needs=("group_size",),
        per_response=True,
    ),
    "entropy": Rule(
        _entropy,
        "N/⌈0.2·N⌉·Â on the 20 % of the batch's N tokens with the highest entropy, else 0",
        "arXiv 2506.01939 (80/20)",
        "1 over the batch: a loss that is averaged over tokens (dapo) is one over the kept tokens",
        needs=("entropy",),
        over_batch=True,
    ),
    "vppo": Rule(
        _vppo,
        "f·Â on the 40 % of each response that depend most on the image, else 0; one f ≥ 0.9 each",
        "arXiv 2510.09285 (VPPO)",
        "about 0.4: the loss is still averaged over all tokens",
        needs=("logprobs", "blind_logprobs"),
        over_batch=True,
    ),
    "pgpo": Rule(
        _pgpo,
        "w·Â, where w says how much the token depends on the image, with a threshold; mean 1",
        "arXiv 2604.01840 (PGPO)",
        "1 over each response",
        needs=("logprobs", "blind_logprobs"),
    ),
    "tor": Rule(
        _tor,
        "Â on the 30 % of highest entropy, else Â/2 on the 30 % most changed by the image, else 0",
        "arXiv 2603.25077 (ToR)",
        "0.3 to 0.45: the loss is still averaged over all tokens",
        needs=("logprobs", "entropy", "blind_logprobs"),
        over_batch=True,
    ),
    "vgpo": Rule(
        _vgpo,
        "(1 + s − mean s)·Â, s the similarity to the image by minmax, the factor within 0.1 … 2",
        "arXiv 2604.09349 (VGPO)",
        "1 over each response, where no factor is clamped",
        needs=("image_similarity",),
    ),
    "surprise": Rule(
        _surprise,
        "eq. 7 and 8 with the score 1 − π(o_t)",
        OURS,
        "1 + α over each response",
        needs=("logprobs",),
    ),
    "siblings": Rule(
        _siblings,
        "eq. 7 and 8, scored by the change in mean reward of the siblings that share the prefix",
        OURS,
        "1 + α over each response",
        needs=("group_size", "tokens", "rewards"),
    ),
    "phrases": Rule(
        _phrases,
        "eq. 7 and 8, scored by the mean reward of siblings with this phrase, less its beginning's",
        OURS,
        "1 + α over each response",
        needs=("group_size", "tokens", "rewards"),
    ),
}
# Names that earlier versions had for a rule and a control together.
FORMER_NAMES = {
    "uniform": ("paper", "uniform"),
    "shuffled": ("paper", "shuffled"),
    "signed_uniform": ("signed", "uniform"),
    "signed_shuffled": ("signed", "shuffled"),
}


# Fields of Tokens with a number for each token. They are checked, and 0 on padding.
FLOATS = (
    "advantages",
    "scores",
    "logprobs",
    "entropy",
    "blind_logprobs",
    "image_similarity",
)


def _check_shapes(t: Tokens) -> None:
    """Raise ValueError for what would be broadcast in silence."""
    if t.mask.dim() != 2 or t.mask.dtype != torch.bool:
        raise ValueError(f"mask is {list(t.mask.shape)} {t.mask.dtype}; expected [B, T] bool")
    for name in (*FLOATS, "roles", "tokens"):
        values = getattr(t, name)
        if values is not None and values.shape != t.mask.shape:
            raise ValueError(
                f"{name} is {list(values.shape)}; expected {list(t.mask.shape)}, as the mask is"
            )
    if t.rewards is not None and t.rewards.shape != t.mask.shape[:1]:
        raise ValueError(f"rewards is {list(t.rewards.shape)}; expected [{len(t.mask)}]")
    if t.group_size is not None and t.group_size < 1:
        raise ValueError(f"group_size is {t.group_size}; expected at least 1")


def _clean(t: Tokens) -> Tokens:
    """Floats of 32 bits or more, and zeros on padding."""
    cleaned = {"roles": torch.where(t.mask, t.roles, 0)}
    for name in FLOATS:
        values = getattr(t, name)
        if values is not None:
            cleaned[name] = torch.where(t.mask, _at_least_float32(values), 0)
    if t.rewards is not None:
        cleaned["rewards"] = _at_least_float32(t.rewards)
    return t._replace(**cleaned)


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
    *,
    control: str = "none",
    logprobs: Tensor | None = None,
    entropy: Tensor | None = None,
    blind_logprobs: Tensor | None = None,
    image_similarity: Tensor | None = None,
    tokens: Tensor | None = None,
    rewards: Tensor | None = None,
) -> Tensor:
    """The advantage of every token: eq. 8, or another rule of RULES, which says what each of them
    is.

    advantages [B] or [B, T]; scores, roles and mask [B, T] -> [B, T], 0 on padding. Rows are
    group-major. `Tokens` says what the others are, and Rule.needs which of them a rule needs. The
    control "shuffled" needs `generator`, one for all responses or one for each. A few rules
    (Rule.over_batch) compare responses of different groups: give them the whole batch at once.

    Raises ValueError for an unknown rule or control, a missing argument, or one of a wrong shape.

    >>> scores, roles = torch.tensor([[0., .5, .75, 0.]]), torch.tensor([[0, 1, -1, 0]])
    >>> reweight_advantages(torch.tensor([-1.]), scores, roles, torch.ones(1, 4).bool())
    tensor([[-1.1388, -1.2288, -1.2937, -1.1388]])
    """
    if rule in FORMER_NAMES and control == "none":
        rule, control = FORMER_NAMES[rule]
    chosen = _choose(RULES, rule, "dyco.rule")
    apply_control = _choose(CONTROLS, control, "dyco.control")
    if advantages.shape == mask.shape[:1]:
        advantages = advantages[:, None].expand(mask.shape)
    given = Tokens(
        advantages=advantages,
        scores=scores,
        roles=roles,
        mask=mask,
        alpha=alpha,
        group_size=group_size,
        logprobs=logprobs,
        entropy=entropy,
        blind_logprobs=blind_logprobs,
        image_similarity=image_similarity,
        tokens=tokens,
        rewards=rewards,
    )
    _check_shapes(given)
    seen = _clean(given)
    missing = [name for name in chosen.needs if getattr(seen, name) is None]
    if missing:
        raise ValueError(f"rule {rule!r} needs {', '.join(missing)}")
    # Dynamic sampling can leave a process without any group.
    factors = chosen.factor(seen) if len(mask) else torch.ones_like(seen.advantages)
    factors = apply_control(factors, chosen.among(seen), generator)
    return torch.where(mask, factors * seen.advantages, 0)


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
