"""rl_algos.py: group advantages, and the policy losses that DyCo-RL plugs into.

All are pure functions of tensors. Each algorithm is one small function from what is known of each
token to an objective per token, together with the way its tokens are averaged. `policy_loss` puts
the two together, adds the KL term, and never sees a model.

A new algorithm is one more function under `@register`, and a recipe of the same name in
config.yaml.

Shapes: P prompts, G responses per prompt, B = P·G responses, T response tokens.
"""

import math
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

# exp(20) = 5e8 lies far outside every clip range. Beyond it a ratio is constant instead of
# infinite.
MAX_LOG_RATIO = 20.0


# --------------------------------------------------------------------------- advantages and rewards


@torch.no_grad()
def group_advantages(rewards: Tensor, scale: str = "std", eps: float = 1e-4) -> Tensor:
    """Â = (R − mean) / (std + eps) over the G responses to one prompt, with the unbiased std.

    rewards [P, G] -> [P, G], exactly 0 in a group whose rewards are all equal. scale "none" leaves
    out the division (Dr. GRPO). Raises ValueError for G < 2, a reward that is not finite, or
    another scale.

    >>> group_advantages(torch.tensor([[1., 0., 0., 1.]]), scale="none")
    tensor([[ 0.5000, -0.5000, -0.5000,  0.5000]])
    """
    if rewards.dim() != 2 or rewards.shape[1] < 2:
        raise ValueError(f"rewards must be [prompts, group size >= 2], got {list(rewards.shape)}")
    if not torch.isfinite(rewards).all():
        raise ValueError("rewards must be finite, got NaN or infinity")
    if scale not in ("std", "none"):
        raise ValueError(f"unknown advantage scale {scale!r}; expected 'std' or 'none'")
    exact = rewards.double()
    advantages = exact - exact.mean(dim=1, keepdim=True)
    if scale == "std":
        advantages = advantages / (exact.std(dim=1, keepdim=True) + eps)
    # Rounding may leave a mean that differs from equal rewards by 1e-17, which eps would not hide.
    all_equal = (exact == exact[:, :1]).all(dim=1, keepdim=True)
    advantages = torch.where(all_equal, 0, advantages)
    return advantages if rewards.dtype == torch.float64 else advantages.float()


def overlong_penalty(lengths: Tensor, max_new_tokens: int, buffer: int) -> Tensor:
    """DAPO's soft overlong punishment (arXiv 2503.14476, eq. 13), to be added to the reward.

    lengths [...] in tokens -> [...] float: 0, falling to −1 over the last `buffer` tokens before
    max_new_tokens. A buffer of 0 turns it off.

    >>> overlong_penalty(torch.tensor([60, 90, 100]), max_new_tokens=100, buffer=20)
    tensor([ 0.0000, -0.5000, -1.0000])
    """
    if buffer == 0:
        return torch.zeros_like(lengths, dtype=torch.float32)
    return ((max_new_tokens - buffer - lengths) / buffer).clamp(-1, 0)


# ----------------------------------------------------------------------------------- the algorithms


class Objective(NamedTuple):
    """What an algorithm says of each token, [B, T] each."""

    maximised: Tensor
    ratio: Tensor  # the importance ratio it uses
    clipped: Tensor  # bool: the clip acts on this token


class Algorithm(NamedTuple):
    """A host of DyCo-RL. Config checks and tools derive from it; its recipe is in config.yaml."""

    objective: Callable[..., Objective]  # (logprobs, log_ratio, advantages, mask, settings)
    average: str  # a key of AVERAGES
    source: str


def _mean_of_response(per_token: Tensor, mask: Tensor, settings) -> Tensor:
    return per_token.sum(-1) / mask.sum(-1).clamp(min=1)


def _each_token(per_token: Tensor, mask: Tensor, settings) -> Tensor:
    return per_token


def _share_of_budget(per_token: Tensor, mask: Tensor, settings) -> Tensor:
    return per_token.sum(-1) / settings.max_new_tokens


# How the tokens of a step become one number: what is summed, and then divided by the number of
# tokens where the average is "token", else by that of responses. [B, T], 0 outside the mask ->
# [B] or [B, T].
AVERAGES: dict[str, Callable[..., Tensor]] = {
    "response": _mean_of_response,  # the mean over each response's tokens, then over responses
    "token": _each_token,  # the mean over all tokens
    "budget": _share_of_budget,  # each response's sum / max_new_tokens, then the mean of responses
}

ALGORITHMS: dict[str, Algorithm] = {}


def register(name: str, average: str, source: str = "your own"):
    """Enter the decorated objective into ALGORITHMS; its recipe belongs in config.yaml."""
    if average not in AVERAGES:
        raise ValueError(f"average {average!r} of {name}; expected one of {', '.join(AVERAGES)}")

    def add(objective: Callable) -> Callable:
        ALGORITHMS[name] = Algorithm(objective, average, source)
        return objective

    return add


def _ratio(log_ratio: Tensor) -> Tensor:
    return log_ratio.clamp(max=MAX_LOG_RATIO).exp()


def _pessimistic(ratio: Tensor, advantages: Tensor, settings) -> Objective:
    """PPO's surrogate min(r·A, clip(r, 1 − ε_low, 1 + ε_high)·A).

    A token counts as clipped where the bound is the smaller of the two: there its gradient is 0.
    """
    bounded = ratio.clamp(1 - settings.clip_low, 1 + settings.clip_high)
    surrogate = torch.min(ratio * advantages, bounded * advantages)
    clipped = bounded * advantages < ratio * advantages
    return Objective(surrogate, ratio, clipped)


@register("grpo", average="response", source="GRPO, arXiv 2402.03300")
@register("dapo", average="token", source="DAPO, arXiv 2503.14476")
@register("dr_grpo", average="budget", source="Dr. GRPO, arXiv 2503.20783")
def clipped_objective(logprobs, log_ratio, advantages, mask, settings) -> Objective:
    """The clipped surrogate of the token ratio. The three differ in how tokens are averaged."""
    return _pessimistic(_ratio(log_ratio), advantages, settings)


@register("gspo", average="response", source="GSPO, arXiv 2507.18071")
def gspo_objective(logprobs, log_ratio, advantages, mask, settings) -> Objective:
    """The token form of GSPO: the sequence ratio s_i = exp(mean log r) as value, π's gradient."""
    lengths = mask.sum(-1, keepdim=True).clamp(min=1)
    mean_log_ratio = log_ratio.detach().sum(-1, keepdim=True) / lengths
    one = (logprobs - logprobs.detach()).exp()  # its value is 1, its gradient that of the token
    return _pessimistic(_ratio(mean_log_ratio) * one, advantages, settings)


@register("sapo", average="response", source="SAPO, arXiv 2511.20347")
def sapo_objective(logprobs, log_ratio, advantages, mask, settings) -> Objective:
    """A sigmoid gate of the token ratio in place of the clip.

    The temperature of tokens that are punished is higher: their gate falls off faster.
    """
    temperature = torch.full_like(advantages, settings.temperature_neg)
    temperature = temperature.masked_fill(advantages > 0, settings.temperature_pos)
    ratio = _ratio(log_ratio)
    gate = 4 / temperature * torch.sigmoid(temperature * (ratio - 1))
    return Objective(gate * advantages, ratio, clipped=torch.zeros_like(mask))


@register("cispo", average="token", source="CISPO, arXiv 2506.13585")
def cispo_objective(logprobs, log_ratio, advantages, mask, settings) -> Objective:
    """REINFORCE with a clipped, constant importance weight, so that no token loses its gradient."""
    ratio = _ratio(log_ratio.detach())
    weight = ratio.clamp(1 - settings.clip_low, 1 + settings.clip_high)
    return Objective(weight * advantages * logprobs, ratio, clipped=weight != ratio)


# ----------------------------------------------------------------------------------------- the loss


def loss_normalizer(algorithm: str, mask: Tensor) -> Tensor:
    """What a mini-batch adds to the normaliser of its optimizer step: tokens or responses, a
    scalar.

    mask [B, T] bool: the loss mask.
    """
    if ALGORITHMS[algorithm].average == "token":
        return mask.sum()
    return torch.tensor(mask.shape[0], device=mask.device)


def _k3(logprobs: Tensor, ref_logprobs: Tensor) -> Tensor:
    """k3 = exp(d) − d − 1 of each token, with d = ref − logp.

    d stops at MAX_LOG_RATIO, in both terms: with the exponential alone held constant, the gradient
    of −d would push the policy further away.
    """
    difference = (ref_logprobs - logprobs).clamp(max=MAX_LOG_RATIO)
    return difference.exp() - difference - 1


def policy_loss(
    algorithm: str,
    logprobs: Tensor,
    old_logprobs: Tensor,
    advantages: Tensor,
    mask: Tensor,
    settings,
    ref_logprobs: Tensor | None = None,
    normalizer=None,
) -> tuple[Tensor, dict[str, Tensor]]:
    """The loss of some responses, and what to log of it.

    logprobs, old_logprobs, advantages and ref_logprobs are [B, T]; mask [B, T] bool is the loss
    mask. Only `logprobs` gets a gradient. What stands outside the mask, even NaN, is never read.
    `settings` has the attributes clip_low, clip_high, kl (β), temperature_pos, temperature_neg and
    max_new_tokens.

    `normalizer` is the number of responses in the whole optimizer step, or, where the algorithm's
    average is "token", the number of its loss-mask tokens. With it, the losses of micro-batches add
    up to the loss of the whole, and so do the metrics. None takes the number of this call.

    With β > 0, β·min(k3, settings.kl_cap) per token joins the loss under the same normaliser, where
    k3 = exp(ref − logp) − (ref − logp) − 1. A token above the cap has no KL gradient. There is no
    cap where settings have none, or 0.

    Returns the scalar to minimise, and detached scalars to log: clip_fraction, ratio_deviation (the
    mean of |r − 1|), and with ref_logprobs also kl (the mean k3, without the cap) and kl_capped
    (the share of tokens above the cap). Raises ValueError for an unknown algorithm, and for β > 0
    without ref_logprobs.
    """
    if algorithm not in ALGORITHMS:
        raise ValueError(
            f"unknown algo.name {algorithm!r}; expected one of {', '.join(ALGORITHMS)}"
        )
    if settings.kl > 0 and ref_logprobs is None:
        raise ValueError(f"algo.kl is {settings.kl}, which needs ref_logprobs; got None")
    chosen = ALGORITHMS[algorithm]
    if normalizer is None:
        normalizer = loss_normalizer(algorithm, mask)
    divisor = max(float(normalizer), 1.0)

    def clean(x: Tensor) -> Tensor:
        # Padding may hold anything, and NaN · 0 would still be NaN in the backward pass.
        dtype = x.dtype if x.dtype == torch.float64 else torch.float32
        return torch.where(mask, x, 0).to(dtype)

    def reduce(per_token: Tensor, average: str) -> Tensor:
        per_token = torch.where(mask, per_token, 0)
        return AVERAGES[average](per_token, mask, settings).sum() / divisor

    def mean_to_log(per_token: Tensor) -> Tensor:
        # What is logged is a mean over tokens or responses, also where the loss is divided by a
        # budget.
        average = "token" if chosen.average == "token" else "response"
        return reduce(per_token.detach(), average)

    logprobs = clean(logprobs)
    old_logprobs = clean(old_logprobs).detach()
    advantages = clean(advantages).detach()
    log_ratio = logprobs - old_logprobs
    maximised, ratio, clipped = chosen.objective(
        logprobs, log_ratio, advantages, mask=mask, settings=settings
    )
    loss = -reduce(maximised, chosen.average)

    metrics = {}
    if ref_logprobs is not None:
        k3 = _k3(logprobs, clean(ref_logprobs).detach())
        cap = getattr(settings, "kl_cap", 0.0) or math.inf
        loss = loss + settings.kl * reduce(k3.clamp(max=cap), chosen.average)
        # Without the cap, which would hide how far the policy has gone.
        metrics["kl"] = mean_to_log(k3)
        metrics["kl_capped"] = mean_to_log((k3 > cap).to(k3.dtype))
    metrics["clip_fraction"] = mean_to_log(clipped.to(ratio.dtype))
    metrics["ratio_deviation"] = mean_to_log((ratio - 1).abs())
    return loss, metrics
