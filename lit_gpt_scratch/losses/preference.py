"""What is lost where the wrong one of two replies is preferred.

All of it is of (B,) tensors, a pair at each place, in nats: rewards of a reward model, or log-probabilities of whole
replies. Losses come a pair each, so that they can be summed and weighed outside.
"""

from collections.abc import Callable
from typing import Final

from torch import Tensor
from torch.nn import functional as F


def bradley_terry_loss(chosen: Tensor, rejected: Tensor) -> Tensor:
    """How surprising it is that the chosen one is preferred, if rewards are what decides.

    Bradley and Terry's model of comparisons (1952), as reward models learn by it: ``-log sigmoid(r_w - r_l)``
    (Ouyang et al. 2022, https://arxiv.org/abs/2203.02155, equation 1).

    Args:
        chosen: (B,) rewards of the preferred replies.
        rejected: (B,) rewards of the others.

    Returns:
        (B,).
    """
    return -F.logsigmoid(chosen - rejected)


def dpo_loss(margin: Tensor, beta: float, label_smoothing: float = 0.0) -> Tensor:
    """DPO (Rafailov et al. 2023, https://arxiv.org/abs/2305.18290, equation 7).

    It is Bradley-Terry with ``beta * log(policy / reference)`` as the reward. With ``label_smoothing`` it is
    conservative: with that probability the label is taken to be the wrong way round (Mitchell 2023,
    https://ericmitchell.ai/cdpo.pdf, equation 3).

    Args:
        margin: (B,) ``log(policy / reference)`` of the preferred replies, less that of the others.
        beta: How dear it is to leave the reference.
        label_smoothing: At least 0 and below 0.5.

    Returns:
        (B,).
    """
    right, wrong = -F.logsigmoid(beta * margin), -F.logsigmoid(-beta * margin)
    return (1 - label_smoothing) * right + label_smoothing * wrong


def ipo_loss(margin: Tensor, beta: float, label_smoothing: float = 0.0) -> Tensor:
    """IPO, which does not go on for ever where all labels agree (Azar et al. 2023, https://arxiv.org/abs/2310.12036).

    The margin is drawn to ``1 / (2 beta)`` (equation 17), and not beyond. A label that is the wrong way round would
    draw it to the negative of that, so with ``label_smoothing`` both are weighed.

    Args:
        margin: (B,) as for ``dpo_loss``.
        beta: The paper's tau.
        label_smoothing: At least 0 and below 0.5.

    Returns:
        (B,).
    """
    goal = 1 / (2 * beta)
    return (1 - label_smoothing) * (margin - goal) ** 2 + label_smoothing * (margin + goal) ** 2


PREFERENCE_LOSSES: Final[dict[str, Callable[[Tensor, float, float], Tensor]]] = {"sigmoid": dpo_loss, "ipo": ipo_loss}
"""By name, what is lost by a policy at a margin."""
