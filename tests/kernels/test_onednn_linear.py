"""Linear layers by oneDNN against PyTorch's."""

import re
from collections.abc import Callable, Iterator

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.autograd.graph import saved_tensors_hooks
from torch.nn import functional as F
from torch.utils.flop_counter import FlopCounterMode

from lit_gpt_scratch.kernels import onednn_linear as module
from lit_gpt_scratch.kernels.onednn_linear import linear, onednn_is_faster
from lit_gpt_scratch.model import GPT, GPTConfig, attention, feed_forward, gpt
from lit_gpt_scratch.model.lora import LoRA, add_lora

pytestmark = pytest.mark.skipif(not torch.backends.mkldnn.is_available(), reason="torch is built without oneDNN")
Layer = Callable[[Tensor, Tensor, Tensor | None], Tensor]


@pytest.fixture(autouse=True)
def always() -> Iterator[None]:
    """Call oneDNN on any processor, at any size."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "USE_ONEDNN", True)
        patch.setattr(module, "MIN_MULTIPLICATIONS", 0)
        for user in (gpt, attention, feed_forward):
            patch.setattr(user, "Linear", module.OneDNNLinear)
        yield


def products(call: Callable[[], object]) -> dict[str, int]:
    """Multiplications and additions of matrix products, by operator."""
    with FlopCounterMode(display=False) as counter:
        call()
    return {str(operator): n for operator, n in counter.get_flop_counts()["Global"].items()}


OURS = "lit_gpt_scratch.product"


@given(
    rows=st.sampled_from([(1,), (7,), (2, 5), (3, 1, 4)]), width=st.integers(1, 40), out=st.integers(1, 40),
    bias=st.booleans(), strided=st.booleans(), frozen=st.sets(st.integers(0, 2)), seed=st.integers(0, 99),
)  # fmt: skip
def test_values_first_and_second_derivatives_match_float64(
    rows: tuple[int, ...], width: int, out: int, bias: bool, strided: bool, frozen: set[int], seed: int
) -> None:
    torch.manual_seed(seed)
    x = torch.randn(*rows, width) if not strided else torch.randn(width, *rows).movedim(0, -1)
    given = [x, torch.randn(out, width), *([torch.randn(out)] if bias else [])]

    def derived(layer: Layer, dtype: torch.dtype) -> list[Tensor]:
        leaves = [value.to(dtype).requires_grad_(number not in frozen) for number, value in enumerate(given)]
        wanted = [leaf for leaf in leaves if leaf.requires_grad]
        y = layer(*leaves) if bias else layer(*leaves, None)
        if not wanted:
            return [y]
        first = torch.autograd.grad(y.sin().sum(), wanted, create_graph=True)
        second = torch.autograd.grad(sum(g.square().sum() for g in first), wanted)  # type: ignore[arg-type]
        return [y, *first, *second]

    for a, b in zip(derived(linear, torch.float32), derived(F.linear, torch.float64), strict=True):
        assert a.shape == b.shape
        assert (a.double() - b).norm() <= 1e-4 * b.norm() + 1e-5


def test_gradients_of_a_sum() -> None:
    """Such a gradient is an expanded tensor with stride 0."""
    x, weight = torch.randn(4, 6, 8), torch.randn(5, 8, requires_grad=True)
    linear(x, weight).sum().backward()
    assert weight.grad is not None
    torch.testing.assert_close(weight.grad, x.sum((0, 1)).expand(5, 8))


def test_network_uses_onednn_forward_and_backward() -> None:
    net = GPT(GPTConfig(n_layer=2, n_head=2, n_embd=32, bias=True), vocab_size=97, block_size=16)
    ids = torch.randint(97, (3, 16))

    def step() -> None:
        net(ids).sum().backward()

    counted = products(step)
    assert counted[OURS] == 6 * ids.numel() * sum(
        layer.weight.numel() for layer in net.modules() if isinstance(layer, nn.Linear)
    )
    assert not {"aten.mm", "aten.addmm"} & counted.keys()
    add_lora(net, LoRA(pattern="."))
    assert not {"aten.mm", "aten.addmm"} & products(step).keys()


class Share(Tensor):
    """A tensor subclass with its own arithmetic, such as ``DTensor``."""


@pytest.mark.parametrize(
    "why",
    [
        *("float64", "bfloat16", "autocast", "small", "one vector", "subclass", "subclass of x", "meta", "bias of one"),
        *("torch.func", "forward derivative", "oneDNN is off", "processor"),
    ],
)
def test_unsupported_inputs_use_torch(why: str, monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    x, weight, bias = torch.randn(4, 8), torch.randn(5, 8), None
    if why in ("float64", "bfloat16"):
        x, weight = (t.to(getattr(torch, why)) for t in (x, weight))
    if why == "small":
        monkeypatch.setattr(module, "MIN_MULTIPLICATIONS", 4 * 8 * 5 + 1)
    if why == "processor":
        monkeypatch.setattr(module, "USE_ONEDNN", False)
    if why == "one vector":
        x = x[0]
    if why == "subclass":
        weight = weight.as_subclass(Share)
    if why == "subclass of x":
        x = x.as_subclass(Share)
    if why == "meta":
        x, weight = x.to("meta"), weight.to("meta")
    if why == "bias of one":
        bias = torch.randn(1)

    def result(layer: Layer) -> Tensor:
        with (
            torch.autocast("cpu", torch.bfloat16, enabled=why == "autocast"),
            torch.backends.mkldnn.flags(enabled=why != "oneDNN is off"),
        ):
            if why == "torch.func":
                return torch.func.vmap(torch.func.grad(lambda row: layer(row[None], weight, None).sum()))(x)
            if why == "forward derivative":
                with forward_ad.dual_level():
                    return forward_ad.unpack_dual(layer(forward_ad.make_dual(x, x + 1), weight, None)).tangent
            return layer(x, weight, bias)

    assert OURS not in products(lambda: result(linear))
    ours, torchs = result(linear), result(F.linear)
    assert (ours.dtype, type(ours)) == (torchs.dtype, type(torchs))
    assert why == "meta" or torch.equal(ours, torchs)


@pytest.mark.parametrize("shapes", [((4, 8), (5, 7)), ((4, 8), (5, 8), (4,)), ((4, 8), (2, 5, 8))])
def test_mismatched_shapes_raise_torchs_error(shapes: tuple[tuple[int, ...], ...]) -> None:
    given = [torch.randn(shape) for shape in shapes]
    with pytest.raises(RuntimeError) as torchs:
        F.linear(*given)
    with pytest.raises(RuntimeError, match=re.escape(str(torchs.value))):
        linear(*given)


@pytest.mark.parametrize("bias", [torch.randn(10)[::2], torch.randn(1).expand(5), torch.randn(5, 3)[:, 1]])
def test_bias_with_any_strides(bias: Tensor) -> None:
    x, weight = torch.randn(4, 8), torch.randn(5, 8)
    torch.testing.assert_close(linear(x, weight, bias), F.linear(x, weight, bias))


@pytest.mark.parametrize(
    ("b", "copied"),
    [
        (torch.randn(6, 4), False), (torch.randn(4, 6).t(), False), (torch.randn(1, 1).expand(6, 4), True),
        (torch.randn(1, 4).expand(6, 4), True), (torch.randn(6, 8)[:, ::2], True),
    ],
)  # fmt: skip
def test_second_factor_is_copied_unless_contiguous_or_transposed(b: Tensor, copied: bool) -> None:
    """Without the copy oneDNN gives the same result, a thousand times slower."""
    found = module._contiguous_or_transposed(b)
    assert torch.equal(found, b)
    assert found.is_contiguous() or found.t().is_contiguous()
    assert (found.data_ptr() != b.data_ptr()) == copied


def test_batched_gradients() -> None:
    x, weight = torch.randn(4, 8, requires_grad=True), torch.randn(5, 8, requires_grad=True)
    directions = torch.randn(3, 4, 5)
    found = torch.autograd.grad(linear(x, weight), (x, weight), directions, is_grads_batched=True)
    torch.testing.assert_close(found, (directions @ weight, directions.mT @ x))


def test_exported_network_does_not_use_onednn() -> None:
    batch = torch.export.Dim("batch", min=2, max=64)
    exported = torch.export.export(module.OneDNNLinear(8, 5), (torch.randn(4, 8),), dynamic_shapes=({0: batch},))
    assert "aten.linear" in exported.graph_module.code
    assert OURS not in exported.graph_module.code


@pytest.mark.parametrize(
    ("known", "capability", "faster"),
    [
        ({"cpu_name": "AMD EPYC", "avx512_vp2intersect": True}, "AVX512", True),
        ({"cpu_name": "AMD EPYC", "avx512_vp2intersect": True}, "AVX2", False),  # as set by ATEN_CPU_CAPABILITY
        ({"cpu_name": "AMD EPYC 9654 96-Core Processor", "avx512_vp2intersect": False}, "AVX512", False),  # Zen 4
        ({"cpu_name": "Intel(R) Xeon(R) Platinum 8480+", "avx512_vp2intersect": True}, "AVX512", False),
        (None, "AVX512", False),  # an older version of torch
    ],
)
def test_unmeasured_processors_use_torch(
    known: dict[str, object] | None, capability: str, faster: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch._C, "has_mkl", True)
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: capability)
    if known is None:
        monkeypatch.delattr(torch.cpu, "get_capabilities", raising=False)
    else:
        monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: known, raising=False)
    assert onednn_is_faster() is faster


def test_build_without_mkl_uses_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch._C, "has_mkl", False)
    assert not onednn_is_faster()


@pytest.mark.parametrize("frozen", [(), ("x",), ("weight",), ("x", "weight")])
def test_saves_no_more_tensors_than_torch(frozen: tuple[str, ...]) -> None:
    def kept(layer: Layer) -> int:
        saved: dict[int, int] = {}

        def pack(tensor: Tensor) -> Tensor:
            saved[tensor.data_ptr()] = tensor.nbytes
            return tensor

        x = torch.randn(4, 8, requires_grad="x" not in frozen)
        weight = torch.randn(5, 8, requires_grad="weight" not in frozen)
        with saved_tensors_hooks(pack, lambda tensor: tensor):
            layer(x, weight, torch.zeros(5, requires_grad=True))
        return sum(saved.values())

    assert kept(linear) <= kept(F.linear)


@pytest.mark.parametrize("backend", ["aot_eager", pytest.param("inductor", marks=pytest.mark.slow)])
def test_compiled_results_are_the_same(backend: str) -> None:
    """Generating code takes ten seconds; ``test_language_model`` does so for a model with these layers."""
    torch.manual_seed(0)
    x, weight, bias = (torch.randn(*shape, requires_grad=True) for shape in ((2, 6, 8), (5, 8), (5,)))

    def loss(x: Tensor) -> Tensor:
        return linear(x, weight, bias).sin().sum()

    eager = torch.autograd.grad(loss(x), (x, weight, bias))
    compiled = torch.autograd.grad(torch.compile(loss, fullgraph=True, backend=backend)(x), (x, weight, bias))
    torch.testing.assert_close(compiled, eager)
