"""Preference losses for pairs of a chosen and a rejected reply: DPO, IPO and Bradley-Terry.

All tensor arguments have shape (B,), with one element per pair, and are in nats. Log-probabilities are those of entire
replies. The functions return one loss per pair, without reduction.
"""

from collections.abc import Callable
from typing import Final

from torch import Tensor
from torch.nn import functional as F


def bradley_terry_loss(chosen: Tensor, rejected: Tensor) -> Tensor:
    """Compute the Bradley-Terry loss of a reward model, ``-log sigmoid(chosen - rejected)``.

    It is the negative log-likelihood of the preference under the Bradley-Terry model (Bradley and Terry 1952; Ouyang et
    al. 2022, https://arxiv.org/abs/2203.02155, equation 1).

    Args:
        chosen: Rewards of the chosen replies, of shape (B,).
        rejected: Rewards of the rejected replies, of shape (B,).

    Returns:
        The loss of each pair, of shape (B,).
    """
    return -F.logsigmoid(chosen - rejected)


def dpo_loss(margin: Tensor, beta: float, label_smoothing: float = 0.0) -> Tensor:
    """Compute the DPO loss (Rafailov et al. 2023, https://arxiv.org/abs/2305.18290, equation 7).

    It is the Bradley-Terry loss with ``beta * log(policy / reference)`` as the reward. With ``label_smoothing``, it is
    the loss of conservative DPO, which assumes that labels are flipped with that probability (Mitchell 2023,
    https://ericmitchell.ai/cdpo.pdf, equation 3).

    Args:
        margin: ``log(policy / reference)`` of the chosen reply minus that of the rejected reply, of shape (B,).
        beta: Strength of the KL penalty.
        label_smoothing: Probability that a label is flipped, at least 0 and below 0.5.

    Returns:
        The loss of each pair, of shape (B,).
    """
    correct, flipped = -F.logsigmoid(beta * margin), -F.logsigmoid(-beta * margin)
    return (1 - label_smoothing) * correct + label_smoothing * flipped


def ipo_loss(margin: Tensor, beta: float, label_smoothing: float = 0.0) -> Tensor:
    """Compute the IPO loss, whose optimal margin is finite even if all labels agree (https://arxiv.org/abs/2310.12036).

    It is the squared difference between the margin and its target ``1 / (2 beta)`` (Azar et al. 2023, equation 17). For
    a flipped label, the target is ``-1 / (2 beta)``; ``label_smoothing`` is the weight of the loss with this target.

    Args:
        margin: See ``dpo_loss``.
        beta: Strength of the KL penalty; tau in the paper.
        label_smoothing: Probability that a label is flipped, at least 0 and below 0.5.

    Returns:
        The loss of each pair, of shape (B,).
    """
    target = 1 / (2 * beta)
    return (1 - label_smoothing) * (margin - target) ** 2 + label_smoothing * (margin + target) ** 2


PREFERENCE_LOSSES: Final[dict[str, Callable[[Tensor, float, float], Tensor]]] = {"sigmoid": dpo_loss, "ipo": ipo_loss}
"""Preference losses for policies, keyed by the value of ``model.loss``; see ``dpo_loss`` for their arguments."""
