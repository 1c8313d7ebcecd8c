"""Losses and advantages of PPO and GRPO, and estimates of the KL divergence, in the order in which they are used.

Tensors are (B, T), aligned with a batch's labels: element ``[b, t]`` belongs to the token that was sampled after
position ``t`` of row ``b``. ``mask`` is True at the tokens of the reply, which are contiguous; values at prompts and
padding are ignored.
"""

import torch
from torch import Tensor

EPS = 1e-8
"""Added to denominators."""
RELATIVE_TOLERANCE = 1e-5
"""Values whose spread is smaller than this share of their magnitude are treated as equal: float32 sums in a different
order differ by that much, and dividing by such a spread would turn rounding errors into a full standard deviation."""


def kl_k1(logprobs: Tensor, reference: Tensor) -> Tensor:
    """Estimate k1 of KL(policy || reference) per sampled token: ``log p - log q``; unbiased, often negative.

    Both arguments in nats, of the same shape (Schulman 2020, http://joschu.net/blog/kl-approx.html).
    """
    return logprobs - reference


def kl_k3(logprobs: Tensor, reference: Tensor) -> Tensor:
    """Estimate k3, with lower variance and never negative: ``q / p - 1 - log(q / p)`` (same source).

    GRPO adds it to its loss (Shao et al. 2024, https://arxiv.org/abs/2402.03300, equation 4).
    """
    log_ratio = reference - logprobs
    return log_ratio.expm1() - log_ratio


def last_token_mask(mask: Tensor) -> Tensor:
    """Last token of each reply: (B, T) bool; all False in a row without a reply."""
    next_in_reply = torch.zeros_like(mask)
    next_in_reply[:, :-1] = mask[:, 1:]
    return mask & ~next_in_reply


def kl_penalised_rewards(scores: Tensor, kl: Tensor, mask: Tensor, coefficient: float) -> Tensor:
    """Per-token rewards: a KL penalty at each token, and the score at the last token of each reply.

    That is ``r(x, y) - beta log(p(y | x) / q(y | x))``, with the second term distributed over the tokens (Ziegler et
    al. 2019, https://arxiv.org/abs/1909.08593, section 2; Ouyang et al. 2022, https://arxiv.org/abs/2203.02155,
    equation 2).

    Args:
        scores: (B,), one per reply.
        kl: (B, T), estimate k1.
        mask: (B, T) bool.
        coefficient: Beta.

    Returns:
        (B, T), 0 outside of replies.
    """
    return torch.where(mask, -coefficient * kl, 0.0) + torch.where(last_token_mask(mask), scores[:, None], 0.0)


def gae(rewards: Tensor, values: Tensor, mask: Tensor, gamma: float, gae_lambda: float) -> tuple[Tensor, Tensor]:
    """Generalised advantage estimation (Schulman et al. 2016, https://arxiv.org/abs/1506.02438, equations 11 and 16).

    With ``d_t = r_t + gamma V_{t+1} - V_t`` it is ``A_t = d_t + gamma lambda A_{t+1}``; value and advantage are 0 after
    the end of a reply.

    Args:
        rewards: (B, T), per token.
        values: (B, T), predicted before each token was sampled.
        mask: (B, T) bool.
        gamma: Discount factor.
        gae_lambda: 0 relies on the values, 1 on the sampled rewards.

    Returns:
        Advantages, and returns ``A_t + V_t`` as targets of the value function; both (B, T), 0 outside of replies.
    """
    values = torch.where(mask, values, 0.0)
    advantages = torch.zeros_like(values)
    next_advantage = next_value = torch.zeros_like(values[:, 0])
    for t in reversed(range(values.size(1))):
        delta = rewards[:, t] + gamma * next_value - values[:, t]
        next_advantage = torch.where(mask[:, t], delta + gamma * gae_lambda * next_advantage, 0.0)
        next_value = values[:, t]
        advantages[:, t] = next_advantage
    return advantages, advantages + values


def grpo_advantages(scores: Tensor, group: int, scale: bool = True) -> Tensor:
    """Score of each reply relative to the other replies to its prompt (Shao et al. 2024, section 4.1.2).

    Args:
        scores: (N * group,), with the replies to one prompt next to each other.
        group: Replies per prompt.
        scale: Divide by the group's standard deviation. Without it, all prompts have the same weight whether easy or
            hard (Liu et al. 2025, https://arxiv.org/abs/2503.20783).

    Returns:
        (N * group,), with mean 0 in each group; 0 in a group whose scores are equal up to rounding.
    """
    grouped = scores.view(-1, group)  # (N, group)
    advantages = grouped - grouped.mean(1, keepdim=True)
    if scale:
        advantages = advantages / (grouped.std(1, correction=0, keepdim=True) + EPS)
    spread = grouped.amax(1, keepdim=True) - grouped.amin(1, keepdim=True)
    equal = spread <= RELATIVE_TOLERANCE * grouped.abs().amax(1, keepdim=True)
    return torch.where(equal, 0.0, advantages).flatten()


def whiten(x: Tensor, mask: Tensor) -> Tensor:
    """Normalise the unmasked values to mean 0 and variance 1, or to 0 if they are all equal; (B, T) -> (B, T).

    Masked values become 0.
    """
    unmasked = x[mask]
    mean, std = unmasked.mean(), unmasked.std(correction=0)
    equal = std <= RELATIVE_TOLERANCE * mean.abs()
    return torch.where(mask & ~equal, (x - mean) / (std + EPS), 0.0)


def ppo_policy_loss(logprobs: Tensor, old: Tensor, advantages: Tensor, clip: float) -> tuple[Tensor, Tensor]:
    """PPO's clipped objective, negated (Schulman et al. 2017, https://arxiv.org/abs/1707.06347, equation 7).

    With ``ratio = p / p_old`` it is ``-min(ratio A, clip(ratio, 1 - e, 1 + e) A)``.

    Args:
        logprobs: (B, T), of the policy, with gradient.
        old: (B, T), of the policy that generated the replies.
        advantages: (B, T).
        clip: The ``e``.

    Returns:
        The loss per token, and whether it is clipped and so has no gradient: (B, T) float and bool.
    """
    ratio = (logprobs - old).exp()
    unclipped, clipped = ratio * advantages, ratio.clamp(1 - clip, 1 + clip) * advantages
    return -torch.minimum(unclipped, clipped), clipped < unclipped


def ppo_value_loss(values: Tensor, old: Tensor, returns: Tensor, clip: float | None) -> Tensor:
    """Half the squared error of the value, or of the value clipped to near its old one, whichever is larger.

    As in OpenAI's implementation of PPO (https://github.com/openai/baselines, ppo2).

    Args:
        values: (B, T), with gradient.
        old: (B, T), predicted when the replies were generated.
        returns: (B, T), the targets.
        clip: Largest change of a value that lowers the loss; None for no limit.

    Returns:
        (B, T).
    """
    error = (values - returns).square()
    if clip is not None:
        error = torch.maximum(error, (old + (values - old).clamp(-clip, clip) - returns).square())
    return 0.5 * error


def token_entropy(logits: Tensor) -> Tensor:
    """Entropy of the next-token distribution in nats: (B, T, vocab_size) float -> (B, T)."""
    logprobs = logits.log_softmax(-1)
    return -(logprobs.exp() * logprobs).sum(-1)


def adapted_kl_coefficient(coefficient: float, kl: float, target: float, rate: float = 0.1) -> float:
    """Next coefficient of the KL penalty, to bring the KL to a target (Ziegler et al. 2019, section 2.2).

    It is multiplied by ``1 + rate * e``, where ``e`` is the relative deviation of the KL from the target, clipped to
    +-0.2.

    Args:
        coefficient: The current one.
        kl: Measured KL per reply, in nats.
        target: Target KL per reply, in nats.
        rate: Gain of the controller.
    """
    error = min(max(kl / target - 1.0, -0.2), 0.2)
    return coefficient * (1.0 + rate * error)
