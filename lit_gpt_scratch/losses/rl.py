"""What a policy of tokens loses on its own replies: PPO's and GRPO's equations, in the order in which they are used.

Everything is (B, T), aligned with a batch's labels: the number at ``[b, t]`` belongs to the token that row ``b`` chose
after its position ``t``. ``mask`` is True where that is a token of the reply, which stand side by side; prompts and
what fills rows up count for nothing, whatever stands there.
"""

import torch
from torch import Tensor

EPS = 1e-8
"""So that nothing is divided by zero."""
RELATIVE_TOLERANCE = 1e-5
"""Of their size, numbers that differ by less are alike: the same sums in another order, in float32, come to that. To
divide by such a spread would make a whole deviation of it."""


def kl_k1(logprobs: Tensor, reference: Tensor) -> Tensor:
    """Estimate of KL(policy || reference) from each sampled token: ``log p - log q``. Unbiased, and often negative.

    Both in nats, of any one shape (Schulman 2020, http://joschu.net/blog/kl-approx.html).
    """
    return logprobs - reference


def kl_k3(logprobs: Tensor, reference: Tensor) -> Tensor:
    """Another one, of less variance and never negative: ``q / p - 1 - log(q / p)`` (the same source).

    It is what GRPO adds to its loss (Shao et al. 2024, https://arxiv.org/abs/2402.03300, equation 4).
    """
    log_ratio = reference - logprobs
    return log_ratio.expm1() - log_ratio


def last_token_mask(mask: Tensor) -> Tensor:
    """Where each reply has its last token: (B, T) bool; nowhere in a row without a reply."""
    after = torch.zeros_like(mask)
    after[:, :-1] = mask[:, 1:]
    return mask & ~after


def kl_penalised_rewards(scores: Tensor, kl: Tensor, mask: Tensor, coefficient: float) -> Tensor:
    """Rewards of single tokens: a penalty at each, and at the last of a reply its score as well.

    That is ``r(x, y) - beta log(p(y | x) / q(y | x))``, the second part given where it arises (Ziegler et al. 2019,
    https://arxiv.org/abs/1909.08593, section 2; Ouyang et al. 2022, https://arxiv.org/abs/2203.02155, equation 2).

    Args:
        scores: (B,), one a reply.
        kl: (B, T), the first estimate.
        mask: (B, T) bool.
        coefficient: Beta.

    Returns:
        (B, T), 0 outside of replies.
    """
    return torch.where(mask, -coefficient * kl, 0.0) + torch.where(last_token_mask(mask), scores[:, None], 0.0)


def gae(rewards: Tensor, values: Tensor, mask: Tensor, gamma: float, gae_lambda: float) -> tuple[Tensor, Tensor]:
    """Generalised advantage estimation (Schulman et al. 2016, https://arxiv.org/abs/1506.02438, equations 11 and 16).

    With ``d_t = r_t + gamma V_{t+1} - V_t`` it is ``A_t = d_t + gamma lambda A_{t+1}``; behind a reply there is nothing
    more to come, so value and advantage are 0 there.

    Args:
        rewards: (B, T), of single tokens.
        values: (B, T), what was expected to come before each token was chosen.
        mask: (B, T) bool.
        gamma: Of what is to come, what counts now.
        gae_lambda: 0 trusts the values, 1 what really came.

    Returns:
        Advantages, and returns, which values are to learn: ``A_t + V_t``; both (B, T), 0 outside of replies.
    """
    values = torch.where(mask, values, 0.0)
    advantages = torch.zeros_like(values)
    ahead = value_ahead = torch.zeros_like(values[:, 0])
    for t in reversed(range(values.size(1))):
        surprise = rewards[:, t] + gamma * value_ahead - values[:, t]
        ahead = torch.where(mask[:, t], surprise + gamma * gae_lambda * ahead, 0.0)
        value_ahead = values[:, t]
        advantages[:, t] = ahead
    return advantages, advantages + values


def grpo_advantages(scores: Tensor, group: int, scale: bool = True) -> Tensor:
    """How much better each reply is than the others to its prompt (Shao et al. 2024, section 4.1.2).

    Args:
        scores: (N * group,), the replies to one prompt side by side.
        group: Replies to a prompt.
        scale: Divide by the group's standard deviation. Without, easy and hard prompts count as they are (Liu et al.
            2025, https://arxiv.org/abs/2503.20783).

    Returns:
        (N * group,), each group with mean 0; 0 of a group whose scores are all the same, but for rounding.
    """
    grouped = scores.view(-1, group)  # (N, group)
    beyond = grouped - grouped.mean(1, keepdim=True)
    if scale:
        beyond = beyond / (grouped.std(1, correction=0, keepdim=True) + EPS)
    spread = grouped.amax(1, keepdim=True) - grouped.amin(1, keepdim=True)
    alike = spread <= RELATIVE_TOLERANCE * grouped.abs().amax(1, keepdim=True)
    return torch.where(alike, 0.0, beyond).flatten()


def whiten(x: Tensor, mask: Tensor) -> Tensor:
    """Give what the mask leaves mean 0 and variance 1, or 0 if it is all the same; and make the rest 0.

    (B, T) -> (B, T).
    """
    kept = x[mask]
    mean, deviation = kept.mean(), kept.std(correction=0)
    alike = deviation <= RELATIVE_TOLERANCE * mean.abs()
    return torch.where(mask & ~alike, (x - mean) / (deviation + EPS), 0.0)


def ppo_policy_loss(logprobs: Tensor, old: Tensor, advantages: Tensor, clip: float) -> tuple[Tensor, Tensor]:
    """PPO's objective, negated (Schulman et al. 2017, https://arxiv.org/abs/1707.06347, equation 7).

    With ``ratio = p / p_old`` it is ``-min(ratio A, clip(ratio, 1 - e, 1 + e) A)``: nothing is gained by going further.

    Args:
        logprobs: (B, T) of the policy, with its graph.
        old: (B, T) of the policy that wrote the replies.
        advantages: (B, T).
        clip: The ``e``.

    Returns:
        The loss of each token, and where clipping holds it, so that it has no gradient: (B, T) float and bool.
    """
    ratio = (logprobs - old).exp()
    free, held = ratio * advantages, ratio.clamp(1 - clip, 1 + clip) * advantages
    return -torch.minimum(free, held), held < free


def ppo_value_loss(values: Tensor, old: Tensor, returns: Tensor, clip: float | None) -> Tensor:
    """Half the squared error, of the value or of it kept near what it was, whichever is worse.

    That is how OpenAI's implementation of PPO clips values, too (https://github.com/openai/baselines, ppo2).

    Args:
        values: (B, T), with their graph.
        old: (B, T), as they were when the replies were written.
        returns: (B, T), what is to be learned.
        clip: The most that a value moves at a gain; None for no limit.

    Returns:
        (B, T).
    """
    error = (values - returns).square()
    if clip is not None:
        error = torch.maximum(error, (old + (values - old).clamp(-clip, clip) - returns).square())
    return 0.5 * error


def token_entropy(logits: Tensor) -> Tensor:
    """Of the next token, in nats: (B, T, vocab_size) float -> (B, T)."""
    logprobs = logits.log_softmax(-1)
    return -(logprobs.exp() * logprobs).sum(-1)


def adapted_kl_coefficient(coefficient: float, kl: float, target: float, rate: float = 0.1) -> float:
    """The coefficient of the penalty that is to bring the KL to a target (Ziegler et al. 2019, section 2.2).

    It is multiplied by ``1 + rate * e``, ``e`` being how far off the KL is, of the target, at most a fifth.

    Args:
        coefficient: The one before.
        kl: As it was found, of a whole reply, in nats.
        target: As it shall be.
        rate: How fast to follow.
    """
    error = min(max(kl / target - 1.0, -0.2), 0.2)
    return coefficient * (1.0 + rate * error)
