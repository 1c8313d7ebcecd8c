"""Rollouts, which are generated replies together with the data required to train on them."""

import time
from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from typing_extensions import TypedDict

from lit_gpt_scratch.batch_types import IGNORE_INDEX, PADDING_MULTIPLE, BatchLayout
from lit_gpt_scratch.checkpoint.training_state import validate_callback_state
from lit_gpt_scratch.generation.decode_loop import generate
from lit_gpt_scratch.generation.sampling import Sampling
from lit_gpt_scratch.losses.rl import kl_k1
from lit_gpt_scratch.model import GPT


class SavedRollouts(TypedDict):
    """State of ``Rollouts`` in a checkpoint."""

    phase: int
    coefficient: float
    figures: dict[str, float]
    rows: dict[str, Tensor]


@dataclass
class Rollouts:
    """Rollouts of one rollout phase; every rank holds the rollouts of all ranks.

    Attributes:
        phase: Index of the phase in the run.
        coefficient: KL coefficient in this phase.
        means: Metrics to log, averaged over all replies and keyed by name.
        rows: Tensors of shape (N, T) or (N,), keyed by name; ``input_ids`` and ``labels`` are as in a ``Batch``.
    """

    phase: int
    coefficient: float
    means: dict[str, float] = field(default_factory=dict)
    rows: dict[str, Tensor] = field(default_factory=dict)

    def state_dict(self) -> dict[str, Any]:
        """Return the state as a dictionary of numbers and CPU tensors."""
        rows = {name: row.cpu() for name, row in self.rows.items()}
        return {"phase": self.phase, "coefficient": self.coefficient, "figures": dict(self.means), "rows": rows}

    @classmethod
    def from_state_dict(cls, state: dict[str, Any], device: torch.device) -> "Rollouts":
        """Create rollouts from the output of ``state_dict``."""
        saved = validate_callback_state(state, SavedRollouts, "rollouts")
        rows = {name: row.to(device) for name, row in saved["rows"].items()}
        return cls(saved["phase"], saved["coefficient"], saved["figures"], rows)

    def take(self, indices: Tensor) -> dict[str, Tensor]:
        """Return the rows with the given indices, with trailing padding trimmed (see ``trim_padding``)."""
        return trim_padding({name: values[indices] for name, values in self.rows.items()})


@dataclass
class Replies:
    """Generated replies and their prompts.

    Attributes:
        prompts: Token ids of the prompts.
        prompt_texts: Text of each prompt, without the chat template.
        replies: Token ids of each reply, including the stop token unless the reply was truncated.
        texts: Text of each reply, without the stop token.
        ended: Whether each reply ended with a stop token, i.e. was not truncated.
    """

    prompts: Sequence[list[int]]
    prompt_texts: Sequence[str]
    replies: Sequence[list[int]]
    texts: Sequence[str]
    ended: Sequence[bool]

    @property
    def full_ids(self) -> list[list[int]]:
        """Token ids of each prompt followed by its reply."""
        return [prompt + reply for prompt, reply in zip(self.prompts, self.replies, strict=True)]

    def rows(self, width: int, fill: int) -> dict[str, Tensor]:
        """Build rows padded to a common width; each reply token is the label of the preceding position.

        Args:
            width: Number of columns to pad the rows to.
            fill: Token id used to pad ``input_ids``.

        Returns:
            ``input_ids`` and ``labels``, int64 tensors of shape (N, width); ``ended``, a float32 tensor of shape (N,).
        """
        input_ids, labels = np.full((2, len(self.prompts), width), IGNORE_INDEX)
        input_ids[:] = fill
        for row, (prompt, ids) in enumerate(zip(self.prompts, self.full_ids, strict=True)):
            input_ids[row, : len(ids) - 1] = ids[:-1]
            labels[row, len(prompt) - 1 : len(ids) - 1] = ids[len(prompt) :]
        ended = torch.tensor(self.ended, dtype=torch.float32)
        return {"input_ids": torch.from_numpy(input_ids), "labels": torch.from_numpy(labels), "ended": ended}


@contextmanager
def eval_mode(net: nn.Module) -> Iterator[None]:
    """Temporarily put a module into evaluation mode."""
    before = net.training
    net.eval()
    try:
        yield
    finally:
        net.train(before)


def rollout_means(rows: dict[str, Tensor]) -> dict[str, float]:
    """Return the reward, KL and other metrics, averaged over the replies of a rollout phase and keyed by name."""
    mask = rows["labels"] != IGNORE_INDEX
    values = {
        "reward": rows["scores"],
        "kl": torch.where(mask, kl_k1(rows["logprobs"], rows["reference"]), 0.0).sum(1),
        "reply_tokens": mask.sum(1).float(),
        "ended": rows["ended"],
        **({"true_reward": rows["true_reward"]} if "true_reward" in rows else {}),
    }
    return {name: value.mean().item() for name, value in values.items()}


def trim_padding(rows: dict[str, Tensor]) -> dict[str, Tensor]:
    """Remove trailing columns that are padding in all rows; keep a multiple of ``PADDING_MULTIPLE`` columns."""
    labelled = (rows["labels"] != IGNORE_INDEX).any(0).nonzero()
    longest = int(labelled[-1]) + 1 if len(labelled) else 1
    width = -(-longest // PADDING_MULTIPLE) * PADDING_MULTIPLE
    return {name: values[:, :width] if values.ndim > 1 else values for name, values in rows.items()}


def generate_replies(
    net: GPT,
    prompts: Sequence[list[int]],
    max_tokens: int,
    temperature: float,
    seeds: Sequence[int],
    stop_ids: Collection[int],
    batch_size: int,
) -> list[list[int]]:
    """Sample one reply to each prompt.

    Args:
        net: Network, which must be in evaluation mode.
        prompts: Token ids of the prompts.
        max_tokens: Maximum number of tokens per reply.
        temperature: Sampling temperature; 1 samples from the unmodified distribution of the network.
        seeds: Random seed of each reply.
        stop_ids: Ids of the stop tokens, which end a reply.
        batch_size: Number of replies to generate in one batch.

    Returns:
        Token ids of each reply, including the stop token unless the reply was truncated.
    """
    sampling = Sampling(temperature=temperature, top_k=None)
    replies: list[list[int]] = [[] for _ in prompts]
    for first in range(0, len(prompts), batch_size):
        part = slice(first, first + batch_size)
        # No stop ids are passed, so that ``generate`` also yields the stop token.
        tokens = generate(net, prompts[part], max_tokens, sampling, seeds[part], (), lambda _, token: token in stop_ids)
        for row, token in tokens:
            if token is not None:
                replies[first + row].append(token)
    return replies


def reply_seeds(*keys: int, numbers: Sequence[int]) -> list[int]:
    """Return one random seed per reply index in ``numbers``; each seed depends only on the index and on ``keys``."""
    return [int(np.random.SeedSequence((*keys, number)).generate_state(1, np.uint64)[0]) for number in numbers]


def rank_rows(layout: BatchLayout, rank: int, n: int) -> list[int]:
    """Return the indices of the rows that a rank generates in a rollout phase of ``n`` rows.

    The rank trains on the same rows, in the same order, in the first pass.
    """
    rows: list[int] = np.arange(n).reshape(-1, layout.replicas, layout.batch_size)[:, rank].ravel().tolist()
    return rows


def merge_ranks(own: Tensor, ranks: Tensor, batch_size: int) -> Tensor:
    """Merge the rows of all ranks in the order of the rollout phase; the inverse of ``rank_rows``.

    Args:
        own: Rows of this rank, of shape (n, ...); only the shape is used.
        ranks: Rows of all W ranks, of shape (W, n, ...), in the order of the micro-batches.
        batch_size: Number of rows per micro-batch and rank.

    Returns:
        The merged rows, of shape (W * n, ...).
    """
    split = ranks.view(-1, len(own) // batch_size, batch_size, *own.shape[1:])  # (W, micro-batches, B, ...)
    return split.transpose(0, 1).flatten(0, 2)


class Stopwatch:
    """Stopwatch that accumulates the time spent in its ``running`` contexts."""

    def __init__(self) -> None:
        self._seconds = 0.0

    @contextmanager
    def running(self) -> Iterator[None]:
        """Add the time spent in this context to the accumulated time."""
        began = time.perf_counter()
        yield
        self._seconds += time.perf_counter() - began

    def take(self) -> float:
        """Return the accumulated time in seconds, and reset it to 0."""
        taken, self._seconds = self._seconds, 0.0
        return taken
