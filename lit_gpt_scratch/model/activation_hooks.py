"""Capture activations inside a network (residual stream, feed-forward units, attention weights) and summarize them."""

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Final, Generic, NamedTuple, TypeVar

import torch
from torch import Tensor, nn

from lit_gpt_scratch.model.attention import document_positions
from lit_gpt_scratch.model.feed_forward import FeedForward
from lit_gpt_scratch.model.gpt import GPT, Block

Kept = TypeVar("Kept")


class BlockActivations(NamedTuple):
    """Activations of one block. Under tensor parallelism, each process holds only its own heads and hidden units.

    Attributes:
        stream: Residual stream after the block, of shape (B, T, n_embd).
        hidden: Input of the down-projection in the feed-forward network, of shape (B, T, ffn_dim), or None if the
            network is a mixture of experts.
        weights: Attention weights in at least float32, of shape (B, n_head, T, T), or None if a custom attention class
            does not record them.
    """

    stream: Tensor
    hidden: Tensor | None
    weights: Tensor | None


class CapturedActivations(NamedTuple, Generic[Kept]):
    """Activations captured in one forward pass.

    Attributes:
        embeddings: Residual stream before the first block, of shape (B, T, n_embd).
        layers: Return values of ``keep``, one per block; see ``capture_activations``.
        output: The output of ``GPT.forward``.
    """

    embeddings: Tensor
    layers: list[Kept]
    output: Tensor


@torch.no_grad()
def capture_activations(
    net: GPT, input_ids: Tensor, document_ids: Tensor | None, keep: Callable[[BlockActivations], Kept]
) -> CapturedActivations[Kept]:
    """Run an uncompiled forward pass in evaluation mode and capture the activations of each block.

    The network's weights, training mode and compiled code are left unchanged. With FSDP2 or tensor parallelism, all
    processes must call this function.

    Args:
        net: The network.
        input_ids: Token ids, int64 tensor of shape (B, T).
        document_ids: See ``GPT.forward``.
        keep: Callback that receives each block's activations and returns what to keep. Attention weights grow
            quadratically with the sequence length and are freed after the call unless ``keep`` returns them.
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
    """Call ``report`` with the block's activations after each forward pass of the block."""
    hidden: list[Tensor] = []
    weights = block.attention.recorded_weights = []

    def after_block(_: nn.Module, inputs: object, outputs: tuple[Tensor, Tensor | None]) -> None:
        report(BlockActivations(outputs[0], hidden.pop() if hidden else None, weights.pop() if weights else None))

    handles = [block.register_forward_hook(after_block)]
    if isinstance(block.feed_forward, FeedForward):
        # Prepended to run before the hook of tensor parallelism, which converts the input to a DTensor.
        hook = block.feed_forward.output.register_forward_pre_hook(
            lambda _, inputs: hidden.append(inputs[0]), prepend=True
        )
        handles.append(hook)
    try:
        yield
    finally:
        block.attention.recorded_weights = None
        for handle in handles:
            handle.remove()


@contextmanager
def eager_eval_mode(net: nn.Module) -> Iterator[None]:
    """Temporarily switch to evaluation mode and disable compiled code; restore the previous state on exit.

    Compiled code would either not call the hooks or be recompiled because of them.
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
    """Statistics of a layer's attention weights, averaged over tokens; each has shape (n_head,).

    Attributes:
        entropy: Entropy of the weights in nats: 0 if a token attends to a single token, ln(n) for n equal weights.
        distance: Mean distance to the attended tokens, in tokens, weighted by the attention weights. Learned sinks
            (``GPTConfig.attention_sinks``) have a distance of zero.
        sink: Attention weight on the first token of the window or document (attention sink,
            https://arxiv.org/abs/2309.17453).
    """

    entropy: Tensor
    distance: Tensor
    sink: Tensor


def attention_stats(
    weights: Tensor, document_ids: Tensor | None = None, lengths: Tensor | None = None
) -> AttentionStats:
    """Compute statistics of attention weights.

    The first token of each window or document attends only to itself and is excluded.

    Args:
        weights: Attention weights, of shape (B, n_head, T, T), with one row per query.
        document_ids: Document ids, int64 tensor of shape (B, T), or None if attention is not restricted to documents.
        lengths: Number of tokens in each row, excluding padding, int64 tensor of shape (B,); T by default.

    Returns:
        The statistics in float32, or NaN if every token attends only to itself.
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
        index * weights.sum(-1) - weights @ index.to(weights.dtype),
        weights.gather(-1, first).squeeze(-1),
    )
    n = counted.sum()
    return AttentionStats(*((x * counted[:, None]).sum((0, 2)).float() / n for x in per_token))


def max_unit_activations(hidden: Tensor, lengths: Tensor | None = None) -> Tensor:
    """Return the maximum absolute activation of each feed-forward unit over all tokens.

    Args:
        hidden: Activations of the feed-forward units, of shape (B, T, ffn_dim).
        lengths: See ``attention_stats``.

    Returns:
        The maximum of each unit, float32 tensor of shape (ffn_dim,).
    """
    magnitude = hidden.abs()
    if lengths is not None:
        in_row = torch.arange(hidden.size(1), device=hidden.device) < lengths[:, None]  # (B, T)
        magnitude = magnitude * in_row[..., None]
    return magnitude.amax((0, 1)).float()


DEAD_UNIT_THRESHOLD: Final = 1e-6
"""Maximum absolute activation of a dead unit, as a fraction of the largest absolute activation in its layer."""


def dead_units(max_activations: Tensor) -> Tensor:
    """Return a mask of a layer's dead feed-forward units, i.e. units whose activations are close to 0 for all tokens.

    A ReLU unit that never activates is exactly 0 for all tokens. Units with smooth activations or gates only get close
    to 0 and are therefore compared with ``DEAD_UNIT_THRESHOLD``.

    Args:
        max_activations: Output of ``max_unit_activations`` for all units of the layer, of shape (ffn_dim,).

    Returns:
        Bool tensor of shape (ffn_dim,), True for dead units.
    """
    return max_activations <= DEAD_UNIT_THRESHOLD * max_activations.max()
