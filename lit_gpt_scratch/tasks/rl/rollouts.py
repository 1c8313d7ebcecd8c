"""Replies that a policy wrote, with all that is known of them: what it learns from until it writes the next ones."""

import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from lit_gpt_scratch.batch_types import IGNORE_INDEX, PADDING_MULTIPLE
from lit_gpt_scratch.generation.decode_loop import generate
from lit_gpt_scratch.generation.sampling import Sampling
from lit_gpt_scratch.losses.rl import kl_k1
from lit_gpt_scratch.model import GPT


@dataclass
class Rollouts:
    """The rows of one phase, those of all ranks on every rank.

    Attributes:
        phase: Its number.
        coefficient: Of the KL, in this phase.
        figures: What is known of its replies together, by name.
        rows: (N, T) and (N,) tensors by name; ``input_ids`` and ``labels`` as in a ``Batch``.
    """

    phase: int
    coefficient: float
    figures: dict[str, float] = field(default_factory=dict)
    rows: dict[str, Tensor] = field(default_factory=dict)

    def state(self) -> dict[str, Any]:
        """Plain data and tensors on the CPU."""
        rows = {name: row.cpu() for name, row in self.rows.items()}
        return {"phase": self.phase, "coefficient": self.coefficient, "figures": dict(self.figures), "rows": rows}

    @classmethod
    def of(cls, state: dict[str, Any], device: torch.device) -> "Rollouts":
        """What ``state`` gave, on a device."""
        return cls(**{**state, "rows": {name: row.to(device) for name, row in state["rows"].items()}})

    def take(self, places: Tensor) -> dict[str, Tensor]:
        """Some of the rows, as wide as the longest of them: (B, T) and (B,)."""
        return trim_padding({name: values[places] for name, values in self.rows.items()})


@dataclass
class Replies:
    """What was written to some prompts.

    Attributes:
        prompts: Ids.
        asked: The same as texts, without the template.
        replies: Ids, with the end of text where it came.
        texts: The same as texts, without it.
        ended: Whether it came.
    """

    prompts: Sequence[list[int]]
    asked: Sequence[str]
    replies: Sequence[list[int]]
    texts: Sequence[str]
    ended: Sequence[bool]

    @property
    def whole(self) -> list[list[int]]:
        """Ids of prompt and reply."""
        return [prompt + reply for prompt, reply in zip(self.prompts, self.replies, strict=True)]

    def rows(self, width: int, fill: int) -> dict[str, Tensor]:
        """As rows of one width; each token of a reply is the label of the position before it.

        Returns:
            ``input_ids`` and ``labels``, (N, width) int64, and ``ended``, (N,) float32.
        """
        input_ids, labels = np.full((2, len(self.prompts), width), IGNORE_INDEX)
        input_ids[:] = fill
        for row, (prompt, whole) in enumerate(zip(self.prompts, self.whole, strict=True)):
            input_ids[row, : len(whole) - 1] = whole[:-1]
            labels[row, len(prompt) - 1 : len(whole) - 1] = whole[len(prompt) :]
        ended = torch.tensor(self.ended, dtype=torch.float32)
        return {"input_ids": torch.from_numpy(input_ids), "labels": torch.from_numpy(labels), "ended": ended}


@contextmanager
def eval_mode(net: nn.Module) -> Iterator[None]:
    """Drop nothing meanwhile."""
    before = net.training
    net.eval()
    try:
        yield
    finally:
        net.train(before)


def rollout_means(rows: dict[str, Tensor]) -> dict[str, float]:
    """What is known of replies together: means over them."""
    within = rows["labels"] != IGNORE_INDEX
    each = {
        "reward": rows["scores"],
        "kl": torch.where(within, kl_k1(rows["logprobs"], rows["reference"]), 0.0).sum(1),
        "reply_tokens": within.sum(1).float(),
        "ended": rows["ended"],
        **({"true_reward": rows["true_reward"]} if "true_reward" in rows else {}),
    }
    return {name: value.mean().item() for name, value in each.items()}


def trim_padding(rows: dict[str, Tensor]) -> dict[str, Tensor]:
    """Rows without what fills all of them up."""
    labelled = (rows["labels"] != IGNORE_INDEX).any(0).nonzero()
    longest = int(labelled[-1]) + 1 if len(labelled) else 1
    width = -(-longest // PADDING_MULTIPLE) * PADDING_MULTIPLE
    return {name: values[:, :width] if values.ndim > 1 else values for name, values in rows.items()}


def generate_replies(
    net: GPT,
    prompts: Sequence[list[int]],
    tokens: int,
    temperature: float,
    seeds: Sequence[int],
    end_of_text: int,
    at_once: int,
) -> list[list[int]]:
    """A reply to each prompt, side by side; with the end of text, where it came within so many tokens.

    Args:
        net: In evaluation mode.
        prompts: Ids.
        tokens: The most of a reply.
        temperature: 1 writes what the network says; nothing is left out of what it could say.
        seeds: One a prompt.
        end_of_text: Ends a reply.
        at_once: Rows in memory.
    """
    sampling = Sampling(temperature=temperature, top_k=None)
    replies: list[list[int]] = []
    for part in _parts(len(prompts), at_once):
        written: list[list[int]] = [[] for _ in prompts[part]]
        for row, token in generate(net, prompts[part], tokens, sampling, seeds[part], end_of_text):
            if token is not None:
                written[row].append(token)
        replies += [reply if len(reply) == tokens else [*reply, end_of_text] for reply in written]
    return replies


def _parts(n: int, size: int) -> Iterator[slice]:
    return (slice(first, first + size) for first in range(0, n, size))


def reply_seeds(*keys: int, numbers: Sequence[int]) -> list[int]:
    """A seed for each number, which depends on nothing else but the keys."""
    return [int(np.random.SeedSequence((*keys, number)).generate_state(1, np.uint64)[0]) for number in numbers]


def merge_ranks(own: Tensor, ranks: Tensor, batch_size: int) -> Tensor:
    """Rows of all ranks in the order of the phase.

    Args:
        own: (n, ...) of this rank, for its shape.
        ranks: (W, n, ...), what each rank has: its part of one micro-batch after the other.
        batch_size: Rows of a rank's part of a micro-batch.

    Returns:
        (W * n, ...).
    """
    dealt = ranks.view(-1, len(own) // batch_size, batch_size, *own.shape[1:])  # (W, micro-batches, B, ...)
    return dealt.transpose(0, 1).flatten(0, 2)


class Stopwatch:
    """Adds up the seconds of what is done in it."""

    def __init__(self) -> None:
        self._seconds = 0.0

    @contextmanager
    def running(self) -> Iterator[None]:
        """Count meanwhile."""
        began = time.perf_counter()
        yield
        self._seconds += time.perf_counter() - began

    def take(self) -> float:
        """Seconds since the last time."""
        taken, self._seconds = self._seconds, 0.0
        return taken
