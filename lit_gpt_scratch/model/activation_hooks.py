"""Activations inside a network: residual stream, feed-forward units and attention weights, and statistics of them."""

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Final, Generic, NamedTuple, TypeVar

import torch
from torch import Tensor, nn

from lit_gpt_scratch.model.attention import document_positions
from lit_gpt_scratch.model.gpt import GPT, Block

Kept = TypeVar("Kept")


class BlockActivations(NamedTuple):
    """Activations of a block; a tensor-parallel process has those of its own heads and units.

    Attributes:
        stream: (B, T, n_embd), the residual stream after the block.
        hidden: (B, T, ffn_dim), the feed-forward units, as input to the down-projection.
        weights: (B, n_head, T, T) in at least float32, the attention weights; None if a custom attention class does not
            record any.
    """

    stream: Tensor
    hidden: Tensor
    weights: Tensor | None


class CapturedActivations(NamedTuple, Generic[Kept]):
    """Activations of a forward pass.

    Attributes:
        embeddings: (B, T, n_embd), the residual stream before the first block.
        layers: What ``keep`` returned for each block.
        output: The output of ``GPT.forward``.
    """

    embeddings: Tensor
    layers: list[Kept]
    output: Tensor


@torch.no_grad()
def capture_activations(
    net: GPT, input_ids: Tensor, document_ids: Tensor | None, keep: Callable[[BlockActivations], Kept]
) -> CapturedActivations[Kept]:
    """Run a forward pass in evaluation mode, uncompiled, and capture the activations of each block.

    The network's weights, modes and compiled code are unchanged afterwards. With FSDP2 or tensor parallelism all
    processes have to call this.

    Args:
        net: The network.
        input_ids: (B, T) int64.
        document_ids: As for ``GPT.forward``.
        keep: Called after each block; returns what to keep of its activations. Attention weights grow with the square
            of the length, and are freed after this call unless kept.
    """
    layers: list[Kept] = []
    embeddings: list[Tensor] = []
    with ExitStack() as stack:
        stack.enter_context(eager_eval_mode(net))
        handle = net.blocks[0].register_forward_pre_hook(lambda _, inputs: embeddings.append(inputs[0]))
        stack.callback(handle.remove)
        for block in net.blocks:
            assert isinstance(block, Block)
            stack.enter_context(_capture_block(block, lambda activations: layers.append(keep(activations))))
        output = net(input_ids, document_ids)
    return CapturedActivations(embeddings[0], layers, output)


@contextmanager
def _capture_block(block: Block, report: Callable[[BlockActivations], None]) -> Iterator[None]:
    """Report a block's activations after each of its calls."""
    hidden: list[Tensor] = []
    weights = block.attention.recorded_weights = []

    def after_block(_: nn.Module, inputs: object, stream: Tensor) -> None:
        report(BlockActivations(stream, hidden.pop(), weights.pop() if weights else None))

    # Before other hooks: that of tensor parallelism converts the input to a DTensor.
    output_handle = block.feed_forward.output.register_forward_pre_hook(
        lambda _, inputs: hidden.append(inputs[0]), prepend=True
    )
    block_handle = block.register_forward_hook(after_block)
    try:
        yield
    finally:
        block.attention.recorded_weights = None
        output_handle.remove()
        block_handle.remove()


@contextmanager
def eager_eval_mode(net: nn.Module) -> Iterator[None]:
    """Evaluation mode without compiled code, which calls no hooks and would be recompiled for them.

    The previous state is restored afterwards.
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
    """Statistics of a layer's attention weights, as means over tokens: (n_head,) each.

    Attributes:
        entropy: Entropy of the weights in nats: 0 for a single token, ln(n) for n equal weights.
        distance: Mean distance to the attended tokens, weighted by the attention weights.
        sink: Weight of the first token of the window or document (attention sink, https://arxiv.org/abs/2309.17453).
    """

    entropy: Tensor
    distance: Tensor
    sink: Tensor


def attention_stats(
    weights: Tensor, document_ids: Tensor | None = None, lengths: Tensor | None = None
) -> AttentionStats:
    """Statistics of attention weights; the first token of a window or document sees only itself and is not counted.

    Args:
        weights: (B, n_head, T, T), rows are queries.
        document_ids: (B, T) int64, if attention is within documents.
        lengths: (B,) int64, tokens of each row without padding; T by default.

    Returns:
        Float32; NaN if every token sees only itself.
    """
    B, _, T, _ = weights.shape
    index = torch.arange(T, device=weights.device)
    positions = index.expand(B, T) if document_ids is None else document_positions(document_ids, index)  # (B, T)
    counted = positions > 0
    if lengths is not None:
        counted = counted & (index < lengths[:, None])
    first = (index - positions)[:, None, :, None].expand(*weights.shape[:3], 1)  # (B, n_head, T, 1)
    per_token = (
        torch.special.entr(weights).sum(-1),  # (B, n_head, T)
        index - weights @ index.to(weights.dtype),
        weights.gather(-1, first).squeeze(-1),
    )
    n = counted.sum()
    return AttentionStats(*((x * counted[:, None]).sum((0, 2)).float() / n for x in per_token))


def max_unit_activations(hidden: Tensor, lengths: Tensor | None = None) -> Tensor:
    """Largest magnitude of each feed-forward unit over all tokens.

    Args:
        hidden: (B, T, ffn_dim).
        lengths: As for ``attention_stats``.

    Returns:
        (ffn_dim,) float32.
    """
    magnitude = hidden.abs()
    if lengths is not None:
        in_row = torch.arange(hidden.size(1), device=hidden.device) < lengths[:, None]  # (B, T)
        magnitude = magnitude * in_row[..., None]
    return magnitude.amax((0, 1)).float()


DEAD_UNIT_THRESHOLD: Final = 1e-6
"""A unit is dead if its largest activation is below this share of the largest in its layer."""


def dead_units(max_activations: Tensor) -> Tensor:
    """Dead feed-forward units of a layer, by ``max_unit_activations`` of all its units: (ffn_dim,) -> (ffn_dim,) bool.

    A ReLU that never activates is exactly 0 everywhere; smooth activations and gates only come close to it, hence the
    threshold.
    """
    return max_activations <= DEAD_UNIT_THRESHOLD * max_activations.max()
