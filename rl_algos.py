"""rl_algos.py: group advantages and the policy losses that DyCo-RL plugs into, as pure functions of tensors.

Each algorithm is one small function from per-token quantities to a per-token objective, plus the rule by which its
tokens are averaged. `policy_loss` puts the two together, adds the KL term and never sees a model. A new algorithm is
one more function with `@register`, and a recipe of the same name in config.yaml.

Shapes: P prompts, G responses per prompt, B = P·G responses, T response tokens.

    grpo  GRPO 2402.03300   dapo  DAPO 2503.14476      gspo   GSPO 2507.18071
    sapo  SAPO 2511.20347   dr_grpo  Dr. GRPO 2503.20783   cispo  CISPO 2506.13585
"""

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

MAX_LOG_RATIO = 20.0  # exp(20) = 5e8: far outside every clip range; beyond it a ratio is constant instead of infinite


# -------------------------------------------------------------------------------------------- advantages and rewards


@torch.no_grad()
def group_advantages(rewards: Tensor, scale: str = "std", eps: float = 1e-4) -> Tensor:
    """Â = (R − mean) / (std + eps) over the G responses to one prompt, std unbiased; scale "none" leaves std out.

    rewards [P, G] -> [P, G], exactly 0 in a group whose rewards are all equal. Raises ValueError for G < 2, a reward
    that is not finite, or another scale.

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
    centered = exact - exact.mean(dim=1, keepdim=True)
    if scale == "std":
        centered = centered / (exact.std(dim=1, keepdim=True) + eps)
    centered = torch.where((exact == exact[:, :1]).all(dim=1, keepdim=True), 0, centered)
    return centered if rewards.dtype == torch.float64 else centered.float()


def overlong_penalty(lengths: Tensor, max_new_tokens: int, buffer: int) -> Tensor:
    """DAPO's soft overlong punishment (2503.14476, eq. 13): 0, falling to −1 over the last `buffer` tokens.

    lengths [...] in tokens -> [...] float, added to the reward; buffer 0 turns it off.

    >>> overlong_penalty(torch.tensor([60, 90, 100]), max_new_tokens=100, buffer=20)
    tensor([ 0.0000, -0.5000, -1.0000])
    """
    if buffer == 0:
        return torch.zeros_like(lengths, dtype=torch.float32)
    return ((max_new_tokens - buffer - lengths) / buffer).clamp(-1, 0)


# ----------------------------------------------------------------------------------------------------- the algorithms


class Algorithm(NamedTuple):
    objective: Callable  # (logprobs, log_ratio, advantages, mask, settings) -> (maximised, ratio, clipped), each [B, T]
    average: str  # "response": over a response's tokens, then over responses · "token": over all tokens ·
    # "budget": the sum over a response's tokens / max_new_tokens, then over responses


ALGORITHMS: dict[str, Algorithm] = {}


def register(name: str, average: str):
    def add(objective: Callable) -> Callable:
        ALGORITHMS[name] = Algorithm(objective, average)
        return objective

    return add


def _ratio(log_ratio: Tensor) -> Tensor:
    return log_ratio.clamp(max=MAX_LOG_RATIO).exp()


def _pessimistic(ratio: Tensor, advantages: Tensor, settings) -> tuple[Tensor, Tensor, Tensor]:
    """PPO's surrogate min(r·A, clip(r, 1 − ε_low, 1 + ε_high)·A); a token is clipped where that zeroes its gradient."""
    bounded = ratio.clamp(1 - settings.clip_low, 1 + settings.clip_high)
    return (
        torch.min(ratio * advantages, bounded * advantages),
        ratio,
        bounded * advantages < ratio * advantages,
    )


@register("grpo", average="response")
@register("dapo", average="token")
@register("dr_grpo", average="budget")
def clipped_objective(logprobs, log_ratio, advantages, mask, settings):
    """GRPO, DAPO and Dr. GRPO: the same clipped surrogate of the token ratio; they differ in how tokens are averaged."""
    return _pessimistic(_ratio(log_ratio), advantages, settings)


@register("gspo", average="response")
def gspo_objective(logprobs, log_ratio, advantages, mask, settings):
    """GSPO in its token form: the value of the sequence ratio s_i = exp(mean log r), the gradient of the token's π."""
    log_sequence_ratio = log_ratio.detach().sum(-1, keepdim=True) / mask.sum(
        -1, keepdim=True
    ).clamp(min=1)
    ratio = _ratio(log_sequence_ratio) * (logprobs - logprobs.detach()).exp()
    return _pessimistic(ratio, advantages, settings)


@register("sapo", average="response")
def sapo_objective(logprobs, log_ratio, advantages, mask, settings):
    """SAPO: a sigmoid gate of the token ratio in place of the clip, steeper for tokens that are punished (temperature 1.05)."""
    temperature = torch.full_like(advantages, settings.temperature_neg).masked_fill(
        advantages > 0, settings.temperature_pos
    )
    ratio = _ratio(log_ratio)
    return (
        4 / temperature * torch.sigmoid(temperature * (ratio - 1)) * advantages,
        ratio,
        torch.zeros_like(mask),
    )


@register("cispo", average="token")
def cispo_objective(logprobs, log_ratio, advantages, mask, settings):
    """CISPO: REINFORCE with a clipped, constant importance weight, so that no token loses its gradient."""
    ratio = _ratio(log_ratio.detach())
    weight = ratio.clamp(1 - settings.clip_low, 1 + settings.clip_high)
    return weight * advantages * logprobs, ratio, weight != ratio


# ----------------------------------------------------------------------------------------------------------- the loss


def loss_normalizer(algorithm: str, mask: Tensor) -> Tensor:
    """What a mini-batch contributes to the normaliser of its optimizer step: tokens or responses, a scalar to sum."""
    tokens = ALGORITHMS[algorithm].average == "token"
    return mask.sum() if tokens else torch.tensor(mask.shape[0], device=mask.device)


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

    logprobs, old_logprobs, advantages, ref_logprobs [B, T]; mask [B, T] bool, the loss mask. Only `logprobs` gets a
    gradient; what stands outside the mask, even NaN, is never read. `settings` has the attributes clip_low, clip_high,
    kl (β), temperature_pos, temperature_neg and max_new_tokens. `normalizer` is the number of responses (or for dapo and
    cispo of loss-mask tokens) in the whole optimizer step: with it, the losses of micro-batches add up to the loss of
    the whole, and so do the metrics; None takes this call's. With β > 0, β·k3 per token joins the loss under the same
    normaliser, k3 = exp(ref − logp) − (ref − logp) − 1.

    Returns the scalar to minimise and detached scalars to log: kl, clip_fraction, ratio_deviation
    (mean |r − 1|).
    Raises ValueError for an unknown algorithm, or β > 0 without ref_logprobs.
    """
    if algorithm not in ALGORITHMS:
        raise ValueError(
            f"unknown algo.name {algorithm!r}; expected one of {', '.join(ALGORITHMS)}"
        )
    if settings.kl > 0 and ref_logprobs is None:
        raise ValueError(f"algo.kl is {settings.kl}, which needs ref_logprobs; got None")
    objective, average = ALGORITHMS[algorithm]
    if normalizer is None:
        normalizer = loss_normalizer(algorithm, mask)

    def clean(
        x: Tensor,
    ) -> Tensor:  # padding may hold anything: NaN · 0 would still be NaN in the backward pass
        return torch.where(mask, x, 0).to(x.dtype if x.dtype == torch.float64 else torch.float32)

    logprobs, old_logprobs, advantages = (
        clean(logprobs),
        clean(old_logprobs).detach(),
        clean(advantages).detach(),
    )
    token_objective, ratio, clipped = objective(
        logprobs, logprobs - old_logprobs, advantages, mask, settings
    )

    def reduce(per_token: Tensor, average: str = average) -> Tensor:
        per_token = torch.where(mask, per_token, 0)
        if average == "response":
            per_token = per_token.sum(-1) / mask.sum(-1).clamp(min=1)
        elif average == "budget":
            per_token = per_token.sum(-1) / settings.max_new_tokens
        return per_token.sum() / max(float(normalizer), 1.0)

    # what is logged is a mean over tokens or over responses, also where the loss is divided by a budget
    log = lambda per_token: reduce(
        per_token.detach(), "token" if average == "token" else "response"
    )

    loss, metrics = -reduce(token_objective), {}
    if ref_logprobs is not None:
        log_ref_ratio = clean(ref_logprobs).detach() - logprobs
        k3 = _ratio(log_ref_ratio) - log_ref_ratio - 1
        loss = loss + settings.kl * reduce(k3)
        metrics["kl"] = log(k3)
    metrics["clip_fraction"] = log(clipped.to(ratio.dtype))
    metrics["ratio_deviation"] = log((ratio - 1).abs())
    return loss, metrics
