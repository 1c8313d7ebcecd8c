"""Token-level cross-entropy in chunks of positions, so that the logits of only one chunk are in memory.

The gradients are computed in the forward pass, while the logits of the chunk are available, and are scaled in the
backward pass, as in Liger Kernel (https://arxiv.org/abs/2410.10989). Compared with activation checkpointing of each
chunk, the logits are computed once, not twice. In exchange, the gradient of the output head already takes up memory
during the backward pass of the blocks.
"""

from collections.abc import Callable
from typing import Any, Final

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.func import functional_call
from typing_extensions import override

from lit_gpt_scratch.batch_types import IGNORE_INDEX
from lit_gpt_scratch.kernels.onednn_linear import LINEAR_CLASSES, USE_ONEDNN
from lit_gpt_scratch.losses.cross_entropy import token_cross_entropy, token_logprobs

MAX_WAITING_BYTES: Final = 100_000_000
"""Size of the gradients of the logits that ``_ChunkedLinear`` collects before it adds to the gradient of the head."""


def chunked_cross_entropy(
    head: nn.Module, finalize: Callable[[Tensor], Tensor], x: Tensor, labels: Tensor, chunk_size: int
) -> tuple[Tensor, Tensor]:
    """Compute ``token_cross_entropy(finalize(head(x)), labels)`` in chunks of positions.

    On the CPU, positions without a label are skipped. On other devices they are not, because finding them would
    synchronize with the device.

    Args:
        head: Projection to the vocabulary, called once per chunk; it must treat all positions independently. The
            gradients of its parameters are summed over chunks in at least float32.
        finalize: Function without trainable parameters that maps the output of ``head`` to logits.
        x: Hidden states, float tensor of shape (B, T, n_embd).
        labels: Labels, int64 tensor of shape (B, T); positions with ``IGNORE_INDEX`` (-100) are ignored.
        chunk_size: Number of positions per chunk.

    Returns:
        The summed loss in nats (scalar, at least float32) and the number of labels that are not ignored (int64 scalar).
        The loss supports a single backward pass, and no second derivatives.
    """
    count = (labels != IGNORE_INDEX).sum()
    parameters = tuple(head.parameters())
    if not (torch.is_grad_enabled() and any(t.requires_grad for t in (x, *parameters))):
        return -chunked_token_logprobs(lambda chunk: finalize(head(chunk)), x, labels, chunk_size).sum(), count
    arguments = head, finalize, chunk_size, labels, x, *parameters
    loss: Tensor = _ChunkedCrossEntropy.apply(*arguments)  # type: ignore[no-untyped-call]  # untyped in torch
    return loss, count


@torch.no_grad()
def chunked_token_logprobs(head: Callable[[Tensor], Tensor], x: Tensor, labels: Tensor, chunk_size: int) -> Tensor:
    """Compute ``token_logprobs(head(x), labels)`` in chunks of positions, without gradients.

    Args:
        head: Function from hidden states to logits, called once per chunk; it must treat all positions independently.
        x: Hidden states, float tensor of shape (B, T, n_embd).
        labels: Labels, int64 tensor of shape (B, T).
        chunk_size: Number of positions per chunk.

    Returns:
        Log-probabilities in nats, in at least float32, of shape (B, T); 0 where the label is ``IGNORE_INDEX`` (-100).
    """
    hidden, targets = x.flatten(0, 1), labels.flatten()  # (B * T, n_embd), (B * T,)
    logprobs = torch.zeros(targets.shape, dtype=torch.promote_types(x.dtype, torch.float32), device=x.device)
    for positions in _split_positions(targets, chunk_size):
        logits = head(hidden[positions][None])  # (1, chunk_size, vocab_size)
        logprobs[positions] = token_logprobs(logits, targets[positions][None])[0]
    return logprobs.view(labels.shape)


def _split_positions(targets: Tensor, chunk_size: int) -> tuple[Tensor, ...]:
    """Return the indices of the positions in each chunk; there is at least one chunk, which may be empty."""
    if targets.device.type == "cpu":
        positions = (targets != IGNORE_INDEX).nonzero().flatten()
    else:
        positions = torch.arange(len(targets), device=targets.device)
    return torch.split(positions, chunk_size)


class _ChunkedCrossEntropy(torch.autograd.Function):
    """Autograd function for the summed loss; its gradients are computed in the forward pass."""

    @staticmethod
    def forward(
        ctx: Any,
        head: nn.Module,
        finalize: Callable[[Tensor], Tensor],
        chunk_size: int,
        labels: Tensor,
        x: Tensor,
        *parameters: Tensor,
    ) -> Tensor:
        hidden, targets = x.detach().flatten(0, 1), labels.flatten()  # (B * T, n_embd), (B * T,)
        loss = torch.zeros((), dtype=torch.promote_types(x.dtype, torch.float32), device=x.device)
        d_hidden = torch.zeros_like(hidden)
        linear = _adds_in_place(head)
        chunked_head = _ChunkedLinear(head, x.dtype, chunk_size, len(targets)) if linear else _ChunkedHead(head)
        for positions in _split_positions(targets, chunk_size):
            out = chunked_head.forward(hidden[positions][None]).requires_grad_()
            with torch.enable_grad():
                nats, _ = token_cross_entropy(finalize(out), targets[positions][None])
            loss += nats.detach()
            (d_out,) = torch.autograd.grad(nats, out)
            del nats, out  # they hold the logits
            d_hidden[positions] = chunked_head.backward(d_out)[0].to(d_hidden.dtype)
        chunked_head.finish()
        ctx.gradients = [d_hidden.view_as(x), *chunked_head.gradients]
        ctx.dtypes = [t.dtype for t in (x, *parameters)]
        return loss

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        if ctx.gradients is None:
            raise RuntimeError("chunked_cross_entropy supports only one backward pass; compute the loss again")
        # Scaled in place, and released here, so that there is no second copy of them.
        gradients, ctx.gradients = ctx.gradients, None
        scaled = (None if g is None else g.mul_(grad).to(dtype) for g, dtype in zip(gradients, ctx.dtypes, strict=True))
        return None, None, None, None, *scaled


class _ChunkedHead:
    """Output head that is applied to one chunk at a time, and sums the gradients of its parameters over the chunks.

    Autograd allocates the gradient of each parameter in each chunk.

    Args:
        head: The head.

    Attributes:
        gradients: For each parameter its gradient, in at least float32, or None if it is frozen.
    """

    def __init__(self, head: nn.Module) -> None:
        self.head = head
        # Aliases, because autograd would call the hooks of the parameters themselves once per chunk.
        self.aliases = {name: p.detach().requires_grad_(p.requires_grad) for name, p in head.named_parameters()}
        self.gradients = [
            torch.zeros_like(p, dtype=torch.promote_types(p.dtype, torch.float32)) if p.requires_grad else None
            for p in head.parameters()
        ]

    def forward(self, x: Tensor) -> Tensor:
        """Return the output for a chunk, detached; x: (1, chunk_size, n_embd) -> (1, chunk_size, out_features)."""
        with torch.enable_grad():
            self.x = x.requires_grad_()
            self.out = functional_call(self.head, self.aliases, (self.x,))
        detached: Tensor = self.out.detach()
        return detached

    def backward(self, d_out: Tensor) -> Tensor:
        """Add the gradients of the parameters, and return that of the input of the last call of ``forward``."""
        trained = [alias for alias in self.aliases.values() if alias.requires_grad]
        d_x: Tensor
        d_x, *gradients = torch.autograd.grad(self.out, [self.x, *trained], d_out)
        for total, gradient in zip((g for g in self.gradients if g is not None), gradients, strict=True):
            total += gradient
        return d_x

    def finish(self) -> None:
        """Complete ``gradients`` after the last chunk."""


class _ChunkedLinear(_ChunkedHead):
    """Linear output head whose gradients are added in place by the matmuls.

    The gradient of the head takes up more memory than the logits of a chunk, so that the loss takes longer the more
    often it is read and written. In lower precision than that of the gradient, where a matmul cannot add to it, the
    matmul therefore waits until the gradients of the logits of several chunks take up ``MAX_WAITING_BYTES``.

    Args:
        head: The head, an instance of ``nn.Linear``.
        dtype: Dtype of its input.
        chunk_size: Maximum number of positions of a chunk.
        n_positions: Maximum number of positions of all chunks together.
    """

    def __init__(self, head: nn.Module, dtype: torch.dtype, chunk_size: int, n_positions: int) -> None:
        super().__init__(head)
        device = self.aliases["weight"].device.type
        if torch.is_autocast_enabled(device) and dtype != torch.float64:
            dtype = torch.get_autocast_dtype(device)
        # Cast once. Autocast itself would cast a frozen weight in each chunk.
        self.aliases = {name: alias.detach().to(dtype) for name, alias in self.aliases.items()}
        self.weight = self.aliases["weight"]
        self.d_weight, self.d_bias = (*self.gradients, None)[:2]
        is_exact = self.d_weight is None or self.d_weight.dtype == dtype
        self.product = None if is_exact else torch.empty_like(self.weight)
        rows = 0 if is_exact else max_waiting_rows(self.weight, chunk_size, n_positions)
        self.d_logits, self.inputs = (self.weight.new_empty(rows, width) for width in self.weight.shape)
        """Gradients of the logits and inputs of the chunks that are not yet part of the gradient of the weight."""
        self.n_waiting = 0

    @override
    def forward(self, x: Tensor) -> Tensor:
        self.x = x.to(self.weight.dtype)
        out: Tensor = functional_call(self.head, self.aliases, (self.x,))
        return out.detach()

    @override
    def backward(self, d_out: Tensor) -> Tensor:
        flat, x = d_out.flatten(0, 1), self.x.flatten(0, 1)  # (chunk_size, out_features), (chunk_size, n_embd)
        if self.d_weight is not None and self.product is None:
            self.d_weight.addmm_(flat.t(), x)
        elif self.d_weight is not None:
            if self.n_waiting + len(x) > len(self.inputs):
                self.finish()
            if len(x) > len(self.inputs):
                self._add(flat, x)
            else:
                waiting = slice(self.n_waiting, self.n_waiting + len(x))
                self.d_logits[waiting], self.inputs[waiting] = flat, x
                self.n_waiting += len(x)
        if self.d_bias is not None:
            self.d_bias += flat.sum(0)
        return torch.mm(flat, self.weight).view_as(self.x)

    @override
    def finish(self) -> None:
        if self.n_waiting:
            self._add(self.d_logits[: self.n_waiting], self.inputs[: self.n_waiting])
            self.n_waiting = 0

    def _add(self, d_logits: Tensor, x: Tensor) -> None:
        """Add to the gradient of the weight; d_logits: (N, out_features), x: (N, n_embd)."""
        assert self.d_weight is not None
        self.d_weight += torch.mm(d_logits.t(), x, out=self.product)


def max_waiting_rows(weight: Tensor, chunk_size: int, n_positions: int) -> int:
    """Return the number of positions that may wait, or 0 if a single chunk takes more than ``MAX_WAITING_BYTES``.

    Args:
        weight: Weight of the head in the dtype of its matmuls.
        chunk_size: See ``_ChunkedLinear``.
        n_positions: See ``_ChunkedLinear``.
    """
    rows = MAX_WAITING_BYTES // (weight.size(0) * weight.element_size())
    return min(rows, n_positions) if chunk_size <= rows else 0


def _adds_in_place(head: nn.Module) -> bool:
    """Return whether ``_ChunkedLinear`` supports a head; oneDNN, where it is used, cannot add to its output."""
    return type(head) in LINEAR_CLASSES and not (USE_ONEDNN and not torch.is_autocast_enabled("cpu"))
