"""KL estimators, rewards, advantages and losses of PPO and GRPO, in the order in which they are used.

Unless stated otherwise, tensors have shape (B, T) and are aligned with the labels of a batch: element ``[b, t]``
belongs to the token that was sampled after position ``t`` of row ``b``. ``mask`` is True at the tokens of the reply,
which are contiguous; values at prompt and padding positions are ignored.
"""

import torch
from torch import Tensor

EPS = 1e-8
"""Value added to denominators to avoid division by zero."""
RELATIVE_TOLERANCE = 1e-5
"""Maximum spread of values that are treated as equal, as a fraction of their magnitude.

Float32 sums that are computed in different orders may differ by this much. Dividing by such a small spread would
amplify rounding errors to a standard deviation of 1.
"""


def kl_k1(logprobs: Tensor, reference: Tensor) -> Tensor:
    """Compute the k1 estimate of KL(policy || reference) per sampled token, ``log p - log q``.

    The estimate is unbiased, but often negative (Schulman 2020, http://joschu.net/blog/kl-approx.html). Both arguments
    are log-probabilities of the sampled tokens in nats, under the policy p and the reference q, with the same shape.
    """
    return logprobs - reference


def kl_k3(logprobs: Tensor, reference: Tensor) -> Tensor:
    """Compute the k3 estimate of KL(policy || reference) per sampled token, ``q / p - 1 - log(q / p)``.

    The estimate has a lower variance than k1 and is never negative (Schulman 2020,
    http://joschu.net/blog/kl-approx.html). GRPO adds it to the loss (Shao et al. 2024,
    https://arxiv.org/abs/2402.03300, equation 4). The arguments are as in ``kl_k1``.
    """
    log_ratio = reference - logprobs
    return log_ratio.expm1() - log_ratio


def last_token_mask(mask: Tensor) -> Tensor:
    """Return a mask of the last token of each reply, bool tensor of shape (B, T); False in rows without a reply."""
    next_in_reply = torch.zeros_like(mask)
    next_in_reply[:, :-1] = mask[:, 1:]
    return mask & ~next_in_reply


def kl_penalized_rewards(scores: Tensor, kl: Tensor, mask: Tensor, coefficient: float) -> Tensor:
    """Compute per-token rewards: a KL penalty at each token of a reply, plus the score at its last token.

    The sum of the rewards over a reply is ``r(x, y) - beta log(p(y | x) / q(y | x))`` (Ziegler et al. 2019,
    https://arxiv.org/abs/1909.08593, section 2; Ouyang et al. 2022, https://arxiv.org/abs/2203.02155, equation 2).

    Args:
        scores: Score r of each reply, of shape (B,).
        kl: k1 estimate of the KL divergence at each token, of shape (B, T).
        mask: Mask of the reply tokens, bool tensor of shape (B, T).
        coefficient: Coefficient beta of the KL penalty.

    Returns:
        Per-token rewards, of shape (B, T); 0 outside of replies.
    """
    return torch.where(mask, -coefficient * kl, 0.0) + torch.where(last_token_mask(mask), scores[:, None], 0.0)


def gae(rewards: Tensor, values: Tensor, mask: Tensor, gamma: float, gae_lambda: float) -> tuple[Tensor, Tensor]:
    """Compute generalized advantage estimates (Schulman et al. 2016, https://arxiv.org/abs/1506.02438).

    With ``d_t = r_t + gamma V_{t+1} - V_t``, the advantage is ``A_t = d_t + gamma lambda A_{t+1}`` (equations 11 and
    16). Values and advantages are 0 after the end of a reply.

    Args:
        rewards: Reward for each token, of shape (B, T).
        values: Value predicted before each token was sampled, of shape (B, T).
        mask: Mask of the reply tokens, bool tensor of shape (B, T).
        gamma: Discount factor.
        gae_lambda: Trade-off between bias and variance: 0 relies on the values, 1 relies on the sampled rewards.

    Returns:
        The advantages, and the returns ``A_t + V_t`` as targets for the value function. Both have shape (B, T) and are
        0 outside of replies.
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
    """Compute the advantage of each reply relative to the other replies to the same prompt.

    See Shao et al. 2024, https://arxiv.org/abs/2402.03300, section 4.1.2.

    Args:
        scores: Scores of the replies to N prompts, of shape (N * group,); replies to the same prompt are contiguous.
        group: Number of replies per prompt.
        scale: Whether to divide by the standard deviation of the group. This gives more weight to prompts with similar
            scores, which are often very easy or very hard (Liu et al. 2025, https://arxiv.org/abs/2503.20783).

    Returns:
        Advantages of shape (N * group,), with mean 0 in each group; all 0 if a group's scores are equal up to rounding.
    """
    grouped = scores.view(-1, group)  # (N, group)
    advantages = grouped - grouped.mean(1, keepdim=True)
    if scale:
        advantages = advantages / (grouped.std(1, correction=0, keepdim=True) + EPS)
    spread = grouped.amax(1, keepdim=True) - grouped.amin(1, keepdim=True)
    equal = spread <= RELATIVE_TOLERANCE * grouped.abs().amax(1, keepdim=True)
    return torch.where(equal, 0.0, advantages).flatten()


def whiten(x: Tensor, mask: Tensor) -> Tensor:
    """Normalize the values where ``mask`` is True to mean 0 and variance 1: (B, T) -> (B, T).

    If all of these values are equal, they are set to 0. Values where ``mask`` is False are also set to 0.
    """
    unmasked = x[mask]
    mean, std = unmasked.mean(), unmasked.std(correction=0)
    equal = std <= RELATIVE_TOLERANCE * mean.abs()
    return torch.where(mask & ~equal, (x - mean) / (std + EPS), 0.0)


def ppo_policy_loss(logprobs: Tensor, old: Tensor, advantages: Tensor, clip: float) -> tuple[Tensor, Tensor]:
    """Compute PPO's clipped policy loss (Schulman et al. 2017, https://arxiv.org/abs/1707.06347, equation 7).

    With ``ratio = p / p_old``, the loss is ``-min(ratio A, clip(ratio, 1 - e, 1 + e) A)``.

    Args:
        logprobs: Log-probabilities under the current policy, with gradient, of shape (B, T).
        old: Log-probabilities under the policy that generated the replies, of shape (B, T).
        advantages: Advantage of each token, of shape (B, T).
        clip: Clipping range ``e`` of the ratio.

    Returns:
        The loss per token, and a bool mask of the tokens whose loss is clipped and therefore has no gradient. Both have
        shape (B, T).
    """
    ratio = (logprobs - old).exp()
    unclipped, clipped = ratio * advantages, ratio.clamp(1 - clip, 1 + clip) * advantages
    return -torch.minimum(unclipped, clipped), clipped < unclipped


def ppo_value_loss(values: Tensor, old: Tensor, returns: Tensor, clip: float | None) -> Tensor:
    """Compute PPO's clipped value loss, as in OpenAI's implementation (https://github.com/openai/baselines, ppo2).

    The loss is half the larger of two squared errors: that of the value, and that of the value clipped to a range
    around the old value.

    Args:
        values: Current predictions, with gradient, of shape (B, T).
        old: Predictions when the replies were generated, of shape (B, T).
        returns: Targets, of shape (B, T).
        clip: Maximum difference between the clipped value and the old value; None disables clipping.

    Returns:
        The loss per token, of shape (B, T).
    """
    error = (values - returns).square()
    if clip is not None:
        error = torch.maximum(error, (old + (values - old).clamp(-clip, clip) - returns).square())
    return 0.5 * error


def token_entropy(logits: Tensor) -> Tensor:
    """Compute the entropy of the next-token distribution in nats: (B, T, vocab_size) float -> (B, T)."""
    logprobs = logits.log_softmax(-1)
    return -(logprobs.exp() * logprobs).sum(-1)


def adapted_kl_coefficient(coefficient: float, kl: float, target: float, rate: float = 0.1) -> float:
    """Return the next KL coefficient, adapted to bring the KL divergence closer to a target.

    The coefficient is multiplied by ``1 + rate * e``, where ``e`` is the relative deviation of ``kl`` from the target,
    clipped to [-0.2, 0.2] (Ziegler et al. 2019, https://arxiv.org/abs/1909.08593, section 2.2).

    Args:
        coefficient: Current KL coefficient.
        kl: Measured KL divergence per reply, in nats.
        target: Target KL divergence per reply, in nats.
        rate: Factor for ``e``, i.e. the gain of the proportional controller.
    """
    error = min(max(kl / target - 1.0, -0.2), 0.2)
    return coefficient * (1.0 + rate * error)
