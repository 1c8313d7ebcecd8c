"""Chunked cross-entropy against the loss and the gradients of all logits at once."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from lit_gpt_scratch.batch_types import IGNORE_INDEX
from lit_gpt_scratch.losses import chunked_cross_entropy as module
from lit_gpt_scratch.losses.chunked_cross_entropy import chunked_cross_entropy, chunked_token_logprobs
from lit_gpt_scratch.losses.cross_entropy import positions_per_chunk, token_cross_entropy, token_logprobs
from lit_gpt_scratch.model import GPT, GPTConfig
from lit_gpt_scratch.model.lora import LoRA, LoRALinear

WIDTH, VOCABULARY = 16, 53


def identity(x: Tensor) -> Tensor:
    return x


def softcap(x: Tensor) -> Tensor:
    return 3 * torch.tanh(x / 3)


def truncated(x: Tensor) -> Tensor:
    return x[..., : VOCABULARY - 4]


def linear(dtype: torch.dtype = torch.float32, bias: bool = False) -> nn.Linear:
    torch.manual_seed(0)
    return nn.Linear(WIDTH, VOCABULARY, bias=bias).to(dtype)


def adapted() -> nn.Module:
    head = LoRALinear(linear(bias=True), LoRA(rank=2))
    nn.init.normal_(head.lora_b)
    return head


def frozen() -> nn.Module:
    return linear().requires_grad_(False)


def only_bias() -> nn.Module:
    head = linear(bias=True)
    head.weight.requires_grad_(False)
    return head


def two_layers() -> nn.Module:
    return nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.Tanh(), nn.Linear(WIDTH, VOCABULARY))


HEADS: dict[str, Callable[[], nn.Module]] = {
    "linear": linear, "bias": lambda: linear(bias=True), "frozen": frozen, "only the bias": only_bias,
    "lora": adapted, "two layers": two_layers,
}  # fmt: skip


def sample(shape: tuple[int, int], ignored: float, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(*shape, WIDTH, generator=generator, dtype=torch.float64).to(dtype)
    labels = torch.randint(VOCABULARY - 4, shape, generator=generator)
    labels[torch.rand(shape, generator=generator) < ignored] = IGNORE_INDEX
    return x.requires_grad_(), labels


Loss = Callable[[], tuple[Tensor, Tensor]]


def gradients(loss: Loss, x: Tensor, head: nn.Module, autocast: bool = False) -> tuple[Tensor, Tensor, list[Any]]:
    """Return the loss, the count, and the gradients of a mean that is scaled as in mixed precision."""
    leaves = [x, *head.parameters()]
    for leaf in leaves:
        leaf.grad = None
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        nats, count = loss()
    (nats * 8 / count.clamp(min=1)).backward()
    return nats.detach(), count, [leaf.grad for leaf in leaves]


def compare(
    head: nn.Module, finalize: Callable[[Tensor], Tensor], x: Tensor, labels: Tensor, chunk_size: int,
    tolerance: float, autocast: bool = False,
) -> None:  # fmt: skip
    """Differences are relative to the largest element of each gradient."""
    expected = gradients(lambda: token_cross_entropy(finalize(head(x)), labels), x, head, autocast)
    found = gradients(lambda: chunked_cross_entropy(head, finalize, x, labels, chunk_size), x, head, autocast)
    torch.testing.assert_close(found[0], expected[0], rtol=tolerance, atol=0)
    assert found[0].dtype == expected[0].dtype
    assert found[1] == expected[1]
    for gradient, other in zip(found[2], expected[2], strict=True):
        if other is None:
            assert gradient is None
            continue
        assert gradient.dtype == other.dtype
        assert (gradient - other).abs().max() <= tolerance * other.abs().max()


@pytest.mark.parametrize("finalize", [identity, softcap, truncated])
@pytest.mark.parametrize("head", HEADS)
def test_gradients_match_those_of_all_logits_at_once(head: str, finalize: Callable[[Tensor], Tensor]) -> None:
    x, labels = sample((3, 11), ignored=0.3)
    compare(HEADS[head](), finalize, x, labels, chunk_size=4, tolerance=1e-6)
    compare(HEADS[head]().double(), finalize, x.detach().double().requires_grad_(), labels, 4, 1e-14)


@settings(max_examples=60, deadline=None)
@given(
    st.tuples(st.integers(1, 4), st.integers(1, 9)), st.integers(1, 40), st.sampled_from([0.0, 0.5, 1.0]), st.booleans()
)
def test_any_chunk_size_gives_the_same_gradients(
    shape: tuple[int, int], chunk_size: int, ignored: float, bias: bool
) -> None:
    x, labels = sample(shape, ignored, torch.float64)
    compare(linear(torch.float64, bias), softcap, x, labels, chunk_size, 1e-13)


@pytest.mark.parametrize("head", HEADS)
def test_autocast_computes_the_head_in_bfloat16_and_the_loss_in_float32(head: str) -> None:
    """The tolerance is the rounding of bfloat16; the gradients of the parameters are summed in float32."""
    x, labels = sample((4, 16), ignored=0.1)
    built = HEADS[head]()
    compare(built, lambda raw: raw.float(), x, labels, chunk_size=64, tolerance=1e-2, autocast=True)
    compare(built, lambda raw: raw.float(), x, labels, chunk_size=5, tolerance=2e-2, autocast=True)


@pytest.mark.parametrize(("positions", "additions"), [(4, 13), (5, 13), (14, 6), (64, 1), (1000, 1)])
def test_gradient_of_the_head_is_added_once_for_several_chunks(
    positions: int, additions: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In bfloat16; 64 positions are 13 chunks of 5. A limit below the size of a chunk adds each of them at once."""
    x, labels = sample((4, 16), ignored=0.0)
    head = linear()
    monkeypatch.setattr(module, "MAX_WAITING_BYTES", 2 * head.weight.size(0) * positions)
    added = []
    add = module._ChunkedLinear._add
    monkeypatch.setattr(module._ChunkedLinear, "_add", lambda self, *rest: added.append(add(self, *rest)))
    compare(head, lambda raw: raw.float(), x, labels, chunk_size=5, tolerance=2e-2, autocast=True)
    assert len(added) == additions


def test_bfloat16_weights_have_gradients_summed_in_float32() -> None:
    x, labels = sample((8, 64), 0.0, torch.bfloat16)
    exact = x.detach().float().requires_grad_()
    head, reference = linear(torch.bfloat16), linear(torch.bfloat16).float()
    *_, (_, expected) = gradients(lambda: token_cross_entropy(reference(exact), labels), exact, reference)
    *_, (d_x, d_weight) = gradients(lambda: chunked_cross_entropy(head, torch.Tensor.float, x, labels, 4), x, head)
    assert d_x.dtype == d_weight.dtype == torch.bfloat16
    assert (d_weight - expected).abs().max() <= 1e-2 * expected.abs().max()


def test_heads_that_autograd_differentiates_give_the_same_gradients(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where linear layers use oneDNN, gradients are not added in place."""
    monkeypatch.setattr(module, "USE_ONEDNN", True)
    x, labels = sample((3, 11), ignored=0.3)
    compare(linear(bias=True), softcap, x, labels, chunk_size=4, tolerance=1e-6)


def test_labels_that_are_all_ignored_give_zero_gradients() -> None:
    x, labels = sample((2, 5), ignored=1.0)
    nats, count, found = gradients(lambda: chunked_cross_entropy(head, identity, x, labels, 4), x, head := linear())
    assert (nats.item(), count.item()) == (0.0, 0)
    assert all(gradient is not None and not gradient.any() for gradient in found)


def test_positions_without_a_label_are_skipped() -> None:
    x, labels = sample((2, 10), ignored=0.0)
    labels[:, 3:] = IGNORE_INDEX
    calls: list[torch.Size] = []
    head = linear()
    head.register_forward_hook(lambda _, inputs, __: calls.append(inputs[0].shape))
    chunked_cross_entropy(head, identity, x, labels, 4)
    assert calls == [(1, 4, WIDTH), (1, 2, WIDTH)]


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-6), (torch.float64, 1e-13)])
@pytest.mark.parametrize("tied", [True, False])
def test_network_has_the_gradients_of_the_plain_loss(tied: bool, dtype: torch.dtype, tolerance: float) -> None:
    """In float32, small gradients of a whole network depend on the order of sums, so the largest one is the scale."""
    torch.manual_seed(0)
    config = GPTConfig(
        n_layer=2,
        n_head=2,
        n_embd=32,
        tied_embeddings=tied,
        logit_softcap=5.0,
        vocab_multiple=64,
        initialisation="gpt2",
    )
    net = GPT(config, vocab_size=300, block_size=16).to(dtype)
    ids = torch.randint(300, (3, 16))
    labels = ids.roll(-1, 1)

    def chunked() -> tuple[Tensor, Tensor]:
        return chunked_cross_entropy(net.head, net.finalize_output, net.hidden_states(ids), labels, 7)

    x = torch.zeros(())
    nats, _, (_, *expected) = gradients(lambda: token_cross_entropy(net(ids), labels), x, net)
    for _ in range(2):  # the same bits each time
        other, _, (_, *found) = gradients(chunked, x, net)
        assert other.item() == pytest.approx(nats.item(), rel=1e-6)
        largest = max(float(reference.abs().max()) for reference in expected)
        for gradient, reference in zip(found, expected, strict=True):
            scale = largest if dtype == torch.float32 else float(reference.abs().max())
            assert (gradient - reference).abs().max() <= tolerance * scale
    assert all(torch.equal(one, two) for one, two in zip(found, gradients(chunked, x, net)[2][1:], strict=True))


def test_hooks_of_a_tied_weight_are_called_once() -> None:
    net = GPT(GPTConfig(n_layer=1, n_head=2, n_embd=32, tied_embeddings=True), vocab_size=60, block_size=8)
    ids = torch.randint(60, (2, 8))
    called: list[str] = []
    net.head.weight.register_hook(lambda _: called.append("gradient"))
    net.head.weight.register_post_accumulate_grad_hook(lambda _: called.append("accumulated"))
    chunked_cross_entropy(net.head, net.finalize_output, net.hidden_states(ids), ids, 3)[0].backward()
    assert called == ["gradient", "accumulated"]


def test_gradients_accumulate_over_micro_batches() -> None:
    head = linear()
    for seed in range(2):
        x, labels = sample((2, 5 + seed), ignored=0.2)
        chunked_cross_entropy(head, identity, x, labels, 3)[0].backward()
    assert head.weight.grad is not None
    total, head.weight.grad = head.weight.grad, None
    for seed in range(2):
        x, labels = sample((2, 5 + seed), ignored=0.2)
        token_cross_entropy(head(x), labels)[0].backward()
    torch.testing.assert_close(total, head.weight.grad, rtol=1e-5, atol=1e-6)


def test_second_backward_passes_and_second_derivatives_are_errors() -> None:
    x, labels = sample((2, 5), ignored=0.0)
    loss, _ = chunked_cross_entropy(linear(), identity, x, labels, 3)
    loss.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="only one backward pass"):
        loss.backward()
    loss, _ = chunked_cross_entropy(linear(), identity, x, labels, 3)
    scale = torch.ones((), requires_grad=True)
    (first,) = torch.autograd.grad(loss * scale, x, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        first.sum().backward()


def test_evaluation_gives_the_losses_of_each_label() -> None:
    x, labels = sample((3, 11), ignored=0.3)
    head = linear()
    found = chunked_token_logprobs(head, x, labels, 4)
    torch.testing.assert_close(found, token_logprobs(head(x), labels).detach(), rtol=1e-6, atol=1e-6)
    with torch.no_grad():
        nats, count = chunked_cross_entropy(head, identity, x, labels, 4)
    expected = token_cross_entropy(head(x), labels)
    assert (nats.item(), count) == (pytest.approx(expected[0].item(), rel=1e-6), expected[1])


class LargestTensor(TorchDispatchMode):
    """Records the number of elements of the largest tensor that is created."""

    largest = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        sizes = [leaf.numel() for leaf in tree_leaves(out) if isinstance(leaf, Tensor)]
        self.largest = max(self.largest, *sizes, 0)
        return out


@pytest.mark.parametrize("trains", [True, False], ids=["training", "evaluation"])
def test_no_tensor_holds_more_than_one_chunk_of_logits(trains: bool) -> None:
    x, labels = sample((16, 64), ignored=0.0)
    head = linear()
    with LargestTensor() as created:
        if trains:
            chunked_cross_entropy(head, identity, x, labels, 32)[0].backward()
        else:
            chunked_token_logprobs(head, x, labels, 32)
    assert created.largest == max(32 * VOCABULARY, x.numel())
    with LargestTensor() as created:
        token_cross_entropy(head(x), labels)
    assert created.largest == 16 * 64 * VOCABULARY


@pytest.mark.parametrize(("vocab_size", "mb", "expected"), [(50_257, 64, 256), (50_257, 1024, 4096), (10**9, 1, 1)])
def test_chunk_is_a_power_of_two_whose_logits_fit(vocab_size: int, mb: int, expected: int) -> None:
    assert positions_per_chunk(vocab_size, mb) == expected
    assert expected == 1 or 4 * expected * vocab_size <= mb * 10**6 < 8 * expected * vocab_size
