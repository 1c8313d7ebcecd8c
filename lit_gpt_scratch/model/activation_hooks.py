"""Looking inside a network while it reads: what attention weighs, what the stream holds, which units answer."""

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Generic, NamedTuple, TypeVar

import torch
from torch import Tensor, nn

from lit_gpt_scratch.model.attention import document_positions
from lit_gpt_scratch.model.gpt import GPT, Block

Kept = TypeVar("Kept")


class BlockActivations(NamedTuple):
    """What a block did; of a process that has some of the heads and units, its own.

    Attributes:
        stream: (B, T, n_embd), behind the block.
        hidden: (B, T, ffn_dim), the feed-forward units as the last matrix reads them.
        weights: (B, n_head, T, T) in at least float32, who looks at whom; None if attention of one's own gave none.
    """

    stream: Tensor
    hidden: Tensor
    weights: Tensor | None


class CapturedActivations(NamedTuple, Generic[Kept]):
    """What was seen of a network.

    Attributes:
        start: (B, T, n_embd), the stream before the first block.
        layers: What was kept of each block.
        read: What the head read, as ``GPT.forward`` gives it.
    """

    start: Tensor
    layers: list[Kept]
    read: Tensor


@torch.no_grad()
def capture_activations(
    net: GPT, input_ids: Tensor, document_ids: Tensor | None, keep: Callable[[BlockActivations], Kept]
) -> CapturedActivations[Kept]:
    """Let a network read, in evaluation mode and uncompiled, and look at each block as it comes.

    The network is left as it was: its weights, its modes, and what was compiled of it. Under FSDP2 and tensor
    parallelism all processes have to take part.

    Args:
        net: The network.
        input_ids: (B, T) int64.
        document_ids: As for ``GPT.forward``.
        keep: What to keep of a block. Attention weights grow with the square of the window: they are not held for
            longer than this takes.
    """
    layers: list[Kept] = []
    start: list[Tensor] = []
    with ExitStack() as stack:
        stack.enter_context(eager_eval_mode(net))
        first = net.blocks[0].register_forward_pre_hook(lambda _, given: start.append(given[0]))
        stack.callback(first.remove)
        for block in net.blocks:
            assert isinstance(block, Block)
            stack.enter_context(_watched(block, lambda seen: layers.append(keep(seen))))
        read = net(input_ids, document_ids)
    return CapturedActivations(start[0], layers, read)


@contextmanager
def _watched(block: Block, tell: Callable[[BlockActivations], None]) -> Iterator[None]:
    """Have told what a block does, whenever it is called."""
    hidden: list[Tensor] = []
    weights = block.attention.recorded_weights = []

    def done(_: nn.Module, given: object, stream: Tensor) -> None:
        tell(BlockActivations(stream, hidden.pop(), weights.pop() if weights else None))

    # Before others: a tensor-parallel matrix makes something else of its own part.
    before = block.feed_forward.output.register_forward_pre_hook(lambda _, given: hidden.append(given[0]), prepend=True)
    after = block.register_forward_hook(done)
    try:
        yield
    finally:
        block.attention.recorded_weights = None
        before.remove()
        after.remove()


@contextmanager
def eager_eval_mode(net: nn.Module) -> Iterator[None]:
    """Evaluation mode, and nothing compiled: compiled code calls no hooks, and would be compiled again for them.

    Afterwards all is as it was.
    """
    training = [module for module in net.modules() if module.training]
    compiled = [(module, module._compiled_call_impl) for module in net.modules() if module._compiled_call_impl]
    for module in training:
        module.training = False
    for module, _ in compiled:
        module._compiled_call_impl = None
    try:
        yield
    finally:
        for module in training:
            module.training = True
        for module, code in compiled:
            module._compiled_call_impl = code


class AttentionStats(NamedTuple):
    """How each head of a layer looks back, as means over tokens: (n_head,) each.

    Attributes:
        entropy: Of its weights, in nats: 0 for one token alone, ln(n) for n tokens alike.
        distance: How many tokens it looks back, each by its weight.
        sink: The share that goes to the first token of the window, or of the document
            (https://arxiv.org/abs/2309.17453).
    """

    entropy: Tensor
    distance: Tensor
    sink: Tensor


def attention_stats(
    weights: Tensor, document_ids: Tensor | None = None, lengths: Tensor | None = None
) -> AttentionStats:
    """Sum up attention weights. The first token of a window or document has no choice, and does not count.

    Args:
        weights: (B, n_head, T, T), rows are tokens that look.
        document_ids: (B, T) int64, if no token sees another document.
        lengths: (B,) int64, of each row the tokens that are not there to fill it up; all by default.

    Returns:
        Float32; NaN if no token has more than itself to see.
    """
    B, _, T, _ = weights.shape
    place = torch.arange(T, device=weights.device)
    positions = place.expand(B, T) if document_ids is None else document_positions(document_ids, place)  # (B, T)
    counted = positions > 0
    if lengths is not None:
        counted = counted & (place < lengths[:, None])
    begin = (place - positions)[:, None, :, None].expand(*weights.shape[:3], 1)  # (B, n_head, T, 1)
    each = (
        torch.special.entr(weights).sum(-1),  # (B, n_head, T)
        place - weights @ place.to(weights.dtype),
        weights.gather(-1, begin).squeeze(-1),
    )
    n = counted.sum()
    return AttentionStats(*((x * counted[:, None]).sum((0, 2)).float() / n for x in each))


def max_unit_activations(hidden: Tensor, lengths: Tensor | None = None) -> Tensor:
    """The largest magnitude of each feed-forward unit over all tokens.

    Args:
        hidden: (B, T, ffn_dim).
        lengths: As for ``looks``.

    Returns:
        (ffn_dim,) float32.
    """
    size = hidden.abs()
    if lengths is not None:
        there = torch.arange(hidden.size(1), device=hidden.device) < lengths[:, None]  # (B, T)
        size = size * there[..., None]
    return size.amax((0, 1)).float()


DEAD_UNIT_THRESHOLD = 1e-6
"""Of the largest answer in its layer: a unit that never gives more says nothing."""


def dead_units(answers: Tensor) -> Tensor:
    """Which units are dead, by the answers of all units of a layer: (ffn_dim,) -> (ffn_dim,) bool.

    A ReLU that is never reached is exactly 0 everywhere. Smooth activations and gates come close to it alone, so that
    a share of what others say stands for nothing.
    """
    return answers <= DEAD_UNIT_THRESHOLD * answers.max()
