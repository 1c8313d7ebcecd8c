"""DPO, IPO and Bradley-Terry: losses of pairs of replies, one preferred to the other.

All arguments are (B,) tensors with one pair of replies per element, in nats: rewards, or log-probabilities of whole
replies. Losses are returned per pair, to be summed or weighted by the caller.
"""

from collections.abc import Callable
from typing import Final

from torch import Tensor
from torch.nn import functional as F


def bradley_terry_loss(chosen: Tensor, rejected: Tensor) -> Tensor:
    """Negative log-likelihood of the preference under the Bradley-Terry model (1952), ``-log sigmoid(r_w - r_l)``.

    Reward models are trained with it (Ouyang et al. 2022, https://arxiv.org/abs/2203.02155, equation 1).

    Args:
        chosen: (B,) rewards of the preferred replies.
        rejected: (B,) rewards of the others.

    Returns:
        (B,).
    """
    return -F.logsigmoid(chosen - rejected)


def dpo_loss(margin: Tensor, beta: float, label_smoothing: float = 0.0) -> Tensor:
    """DPO (Rafailov et al. 2023, https://arxiv.org/abs/2305.18290, equation 7).

    It is the Bradley-Terry loss with ``beta * log(policy / reference)`` as the reward. With ``label_smoothing`` it is
    conservative DPO, which assumes that labels are flipped with that probability (Mitchell 2023,
    https://ericmitchell.ai/cdpo.pdf, equation 3).

    Args:
        margin: (B,) ``log(policy / reference)`` of the preferred replies minus that of the others.
        beta: Strength of the KL penalty.
        label_smoothing: At least 0 and below 0.5.

    Returns:
        (B,).
    """
    correct, flipped = -F.logsigmoid(beta * margin), -F.logsigmoid(-beta * margin)
    return (1 - label_smoothing) * correct + label_smoothing * flipped


def ipo_loss(margin: Tensor, beta: float, label_smoothing: float = 0.0) -> Tensor:
    """IPO, which does not diverge when all labels agree (Azar et al. 2023, https://arxiv.org/abs/2310.12036).

    It regresses the margin to ``1 / (2 beta)`` (equation 17). A flipped label would regress it to the negative of that,
    so with ``label_smoothing`` both terms are weighted.

    Args:
        margin: (B,) as for ``dpo_loss``.
        beta: The paper's tau.
        label_smoothing: At least 0 and below 0.5.

    Returns:
        (B,).
    """
    target = 1 / (2 * beta)
    return (1 - label_smoothing) * (margin - target) ** 2 + label_smoothing * (margin + target) ** 2


PREFERENCE_LOSSES: Final[dict[str, Callable[[Tensor, float, float], Tensor]]] = {"sigmoid": dpo_loss, "ipo": ipo_loss}
"""Losses of a policy by the name of ``model.loss``, as functions of margin, beta and label smoothing."""
