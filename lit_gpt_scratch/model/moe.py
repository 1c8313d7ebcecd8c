"""Parts of a mixture of experts (https://arxiv.org/abs/1701.06538): router, experts and losses that balance the load.

Each token chooses its experts, and no token is dropped, however uneven the load is. ``feed_forward.MixtureOfExperts``
combines the parts.
"""

from collections.abc import Callable
from typing import TYPE_CHECKING, Any, ClassVar, Final, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from typing_extensions import Self, override

from lit_gpt_scratch.kernels.grouped_linear import grouped_linear
from lit_gpt_scratch.model.local_shard import to_local
from lit_gpt_scratch.model.module_metadata import OptimizerGroup

if TYPE_CHECKING:
    from lit_gpt_scratch.model.config import GPTConfig

ROUTER_SCORES: Final = ("softmax", "sigmoid")
"""Functions that turn the router's logits into scores."""


class Routing(NamedTuple):
    """Experts of each token.

    Attributes:
        scores: Score of each expert, at least float32, of shape (..., n_experts).
        experts: Indices of the chosen experts, int64 tensor of shape (..., experts_per_token).
        gates: Factors by which the outputs of these experts are multiplied, of shape (..., experts_per_token).
    """

    scores: Tensor
    experts: Tensor
    gates: Tensor


class Router(nn.Linear):
    """Linear layer that scores the experts for each token; it runs in float32, because the choice is discontinuous.

    Attributes:
        balance_bias: Values that are added to the scores when experts are chosen, but not to the gates, tensor of shape
            (n_experts,) in at least float32, in which small changes are not rounded; None without ``expert_bias_rate``.
    """

    optimizer_group: ClassVar[OptimizerGroup] = "readouts"  # one logit per expert
    balance_bias: Tensor | None

    def __init__(self, config: "GPTConfig") -> None:
        super().__init__(config.n_embd, config.n_experts, bias=config.bias)
        self.config = config
        self.init_buffers()

    def init_buffers(self) -> None:
        """Register the bias that balances the load."""
        balances = self.config.expert_bias_rate is not None
        dtype = torch.promote_types(torch.get_default_dtype(), torch.float32)
        bias = torch.zeros(self.config.n_experts, dtype=dtype) if balances else None
        self.register_buffer("balance_bias", bias)

    @override
    def _apply(self, fn: Callable[..., Any], recurse: bool = True) -> Self:
        """Apply a function such as ``to``, but keep the bias in at least float32."""
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]  # untyped in torch
        if self.balance_bias is not None:
            self.balance_bias = self.balance_bias.to(torch.promote_types(self.balance_bias.dtype, torch.float32))
        return self

    @override
    def forward(self, input: Tensor) -> Tensor:
        """Compute the router logits: (..., n_embd) -> (..., n_experts), in at least float32."""
        dtype = torch.promote_types(input.dtype, torch.float32)
        bias = None if self.bias is None else self.bias.to(dtype)
        with torch.autocast(input.device.type, enabled=False):
            return F.linear(input.to(dtype), self.weight.to(dtype), bias)

    def route(self, logits: Tensor) -> Routing:
        """Choose the experts with the highest scores, given router logits of shape (..., n_experts)."""
        config = self.config
        scores = logits.softmax(-1) if config.router_scores == "softmax" else logits.sigmoid()
        ranked = scores if self.balance_bias is None else scores + self.balance_bias
        experts = ranked.topk(config.experts_per_token, dim=-1).indices
        gates = scores.gather(-1, experts)
        if config.normalize_gates:
            gates = gates / (gates.sum(-1, keepdim=True) + 1e-20)  # sigmoid scores can underflow to 0
        return Routing(scores, experts, gates)


class ExpertLinear(nn.Module):
    """Linear layer for each expert, with the weights of all experts in one tensor.

    Attributes:
        weight: Weights, of shape (n_experts, out_features, in_features).
        bias: Biases, of shape (n_experts, out_features), or None.
    """

    optimizer_group: ClassVar[OptimizerGroup] = "stacked_matrices"

    def __init__(self, n_experts: int, in_features: int, out_features: int, bias: bool) -> None:
        super().__init__()
        self.in_features, self.out_features = in_features, out_features
        self.weight = nn.Parameter(torch.empty(n_experts, out_features, in_features))
        self.bias = nn.Parameter(torch.zeros(n_experts, out_features)) if bias else None
        nn.init.kaiming_uniform_(self.weight.flatten(0, 1), a=5**0.5)  # as in nn.Linear

    def forward(self, x: Tensor, ends: Tensor) -> Tensor:
        """Apply the layer of each expert to its rows; see ``grouped_linear``."""
        return grouped_linear(x, to_local(self.weight), ends, None if self.bias is None else to_local(self.bias))


class Experts(nn.Module):
    """Gated feed-forward networks, each of which is applied to the tokens that chose it.

    Tensor parallelism assigns some of the experts to each process (expert parallelism).

    Args:
        config: The architecture.
        gated_activation: See ``GatedFeedForward.gated_activation``.

    Attributes:
        first: Index of the first expert that this process holds.
    """

    def __init__(self, config: "GPTConfig", gated_activation: Callable[[Tensor, Tensor], Tensor]) -> None:
        super().__init__()
        self.config, self.gated_activation = config, gated_activation
        n, width, hidden = config.n_experts, config.n_embd, config.ffn_width
        self.input = ExpertLinear(n, width, hidden, config.bias)
        self.gate = ExpertLinear(n, width, hidden, config.bias)
        self.output = ExpertLinear(n, hidden, width, config.bias)
        self.first = 0

    def forward(self, x: Tensor, experts: Tensor, gates: Tensor) -> Tensor:
        """Add up the outputs of each token's experts, multiplied by their gates.

        Args:
            x: Tokens, of shape (N, n_embd).
            experts: Experts of each token, int64 tensor of shape (N, k).
            gates: Their gates, of shape (N, k).

        Returns:
            The sums over the experts of this process, of shape (N, n_embd).
        """
        N, k = experts.shape
        n_local = to_local(self.input.weight).size(0)
        choices = experts.flatten() - self.first  # (N * k,)
        choices = torch.where((choices >= 0) & (choices < n_local), choices, n_local)  # n_local: another process's
        ordered, order = choices.sort(stable=True)
        ends = torch.searchsorted(ordered, torch.arange(n_local, device=x.device), right=True).int()  # (n_local,)
        # Sorting copies of the tokens, instead of indexing the tokens, makes the backward pass deterministic on GPUs.
        rows = x[:, None].expand(-1, k, -1).flatten(0, 1)[order]  # (N * k, n_embd)
        hidden = self.gated_activation(self.gate(rows, ends), self.input(rows, ends))  # (N * k, ffn_dim)
        out = self.output(hidden, ends)  # (N * k, n_embd)
        out = out[order.argsort()].view(N, k, -1)  # (N, k, n_embd), in the order of the tokens
        mixed: Tensor = (out * gates[..., None].to(out.dtype)).sum(1)
        return mixed

    def flops_per_token(self, context: int) -> int:
        """Return the number of FLOPs per token in the forward pass: two for each weight that the token uses."""
        weights = sum(layer.weight.numel() for layer in (self.input, self.gate, self.output))
        return 2 * weights * self.config.experts_per_token // self.config.n_experts

    def inactive_parameters(self) -> int:
        """Return the number of parameters that a token does not use: those of the experts that it does not choose."""
        inactive = self.config.n_experts - self.config.experts_per_token
        return sum(p.numel() for p in self.parameters()) * inactive // self.config.n_experts


def count_choices(experts: Tensor, n_experts: int, is_token: Tensor | None = None) -> Tensor:
    """Count how often the tokens of each sequence choose each expert.

    Args:
        experts: Chosen experts, int64 tensor of shape (B, T, experts_per_token).
        n_experts: Number of experts.
        is_token: Bool tensor of shape (B, T) that is False at padding; None if there is no padding.

    Returns:
        The counts, int64 tensor of shape (B, n_experts).
    """
    chosen = experts[..., None] == torch.arange(n_experts, device=experts.device)  # (B, T, k, n_experts)
    if is_token is not None:
        chosen = chosen & is_token[:, :, None, None]
    return chosen.sum((1, 2))


def load_balance_loss(routing: Routing, is_token: Tensor | None = None) -> Tensor:
    """Return the load-balancing loss of DeepSeek-V3 (https://arxiv.org/abs/2412.19437, equations 17 to 20).

    It is computed for each sequence, so that it does not depend on how sequences are distributed across micro-batches
    and processes. It is 1 if the load is balanced, and n_experts / experts_per_token if all tokens choose the same
    experts with certainty.

    Args:
        routing: Routing of sequences, whose experts have shape (B, T, experts_per_token).
        is_token: See ``count_choices``.

    Returns:
        The mean over the sequences that have tokens, a scalar.
    """
    B, T, k = routing.experts.shape
    scores, n_experts = routing.scores, routing.scores.size(-1)
    counts = count_choices(routing.experts, n_experts, is_token)  # (B, n_experts)
    if is_token is None:
        is_token = torch.ones(B, T, dtype=torch.bool, device=scores.device)
    lengths = is_token.sum(1, keepdim=True)  # (B, 1)
    load = counts / lengths.clamp(min=1) * (n_experts / k)  # (B, n_experts)
    share = scores / (scores.sum(-1, keepdim=True) + 1e-20)  # (B, T, n_experts)
    mean_share = (share * is_token[..., None]).sum(1) / lengths.clamp(min=1)  # (B, n_experts)
    return (load * mean_share).sum() / (lengths > 0).sum().clamp(min=1)


def router_z_loss(logits: Tensor, is_token: Tensor | None = None) -> Tensor:
    """Return the router z-loss of ST-MoE (https://arxiv.org/abs/2202.08906), which keeps the logits small.

    Args:
        logits: Router logits, of shape (B, T, n_experts).
        is_token: See ``count_choices``.

    Returns:
        The mean of the squared log-sum-exp over the tokens, a scalar.
    """
    squares = logits.logsumexp(-1).square()  # (B, T)
    return squares.mean() if is_token is None else (squares * is_token).sum() / is_token.sum().clamp(min=1)
