"""Muon and AdamW against torch and linear algebra, and the parameter groups."""

import copy
import math
from pathlib import Path

import pytest
import torch
from torch import nn

from lit_gpt_scratch.errors import UserError
from lit_gpt_scratch.model import GPT, GPTConfig
from lit_gpt_scratch.model.lora import LoRA, add_lora
from lit_gpt_scratch.optim import AdamW, Muon, optimizers
from lit_gpt_scratch.optim.optimizers import MOMENTS, MuonAdamW, newton_schulz_dtype, orthogonalise
from lit_gpt_scratch.optim.param_groups import parameter_groups
from lit_gpt_scratch.profiling.flops_and_memory import state_bytes_by_part
from tests.conftest import TINY


@pytest.mark.parametrize(("dtype", "rounding"), [(torch.bfloat16, 0.1), (torch.float32, 1e-4)])
@pytest.mark.parametrize("shape", [(3, 16, 16), (2, 40, 16), (2, 16, 40), (1, 1, 8)])
def test_orthogonalise_keeps_singular_vectors_and_equalises_singular_values(
    shape: tuple[int, ...], dtype: torch.dtype, rounding: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(optimizers, "newton_schulz_dtype", lambda device: dtype)
    u, s, vh = torch.linalg.svd(torch.randn(shape), full_matrices=False)
    matrices = u @ torch.diag_embed(torch.linspace(1, 0.05, s.size(-1)).expand_as(s)) @ vh
    result = orthogonalise(matrices)
    assert result.dtype == dtype
    result = result.float()
    values = torch.diagonal(u.mT @ result @ vh.mT, dim1=-2, dim2=-1)
    assert values.min() > 0.5
    assert values.max() < 1.3
    leftover = u.mT @ result @ vh.mT - torch.diag_embed(values)
    assert leftover.abs().max() < rounding


@pytest.mark.skipif(not torch.backends.mkldnn.is_available(), reason="requires PyTorch with oneDNN")
def test_newton_schulz_runs_in_float32_on_processors_without_fast_bfloat16_matmuls() -> None:
    """Without AVX-512, bfloat16 matmuls are 24 to 150 times as slow, and a first run would take an hour."""
    vectors = torch.backends.cpu.get_cpu_capability()
    if vectors in ("AVX512", "AVX2"):
        cpuinfo = Path("/proc/cpuinfo")
        converts = cpuinfo.is_file() and "avx_ne_convert" in cpuinfo.read_text()  # AVX2 processors since 2024
        expected = torch.bfloat16 if vectors == "AVX512" or converts else torch.float32
        assert newton_schulz_dtype(torch.device("cpu")) == expected


@pytest.mark.parametrize(
    ("device", "fast", "expected"),
    [
        ("cpu", True, torch.bfloat16), ("cpu", False, torch.float32), ("cuda", True, torch.bfloat16),
        ("cuda", False, torch.float32), ("mps", False, torch.bfloat16),
    ],
)  # fmt: skip
def test_newton_schulz_dtype_follows_the_hardware(
    device: str, fast: bool, expected: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.backends.mkldnn, "is_available", lambda: True)
    monkeypatch.setattr(torch.ops.mkldnn, "_is_mkldnn_bf16_supported", lambda: fast)
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation: fast)
    assert newton_schulz_dtype.__wrapped__(torch.device(device)) == expected


def test_orthogonalise_keeps_zero() -> None:
    assert torch.equal(orthogonalise(torch.zeros(1, 4, 6)).float(), torch.zeros(1, 4, 6))


def test_muon_update_matches_its_definition() -> None:
    """Two steps by hand, with the exact polar factor from an SVD in place of the iteration."""
    weight = nn.Parameter(torch.randn(12, 4))
    start, momentum = weight.detach().clone(), torch.zeros(12, 4)
    group = {"params": [weight], "rule": "muon", "lr": 0.1, "momentum": 0.9, "weight_decay": 0.5}
    optimizer = MuonAdamW([group])
    expected = start.clone()
    for _ in range(2):
        gradient = torch.randn(12, 4)
        weight.grad = gradient.clone()
        optimizer.step()
        momentum = 0.9 * momentum + 0.1 * gradient
        u, _, vh = torch.linalg.svd(0.1 * gradient + 0.9 * momentum, full_matrices=False)
        expected = expected * (1 - 0.1 * 0.5) - 0.1 * math.sqrt(12 / 4) * (u @ vh)
    moved = (weight.detach() - start).norm()
    assert (weight.detach() - expected).norm() / moved < 0.25  # singular values are close to 1, not exactly 1


@pytest.mark.parametrize("row_beta", [None, 0.9])
@pytest.mark.parametrize("shape", [(6, 10), (10, 6)])
def test_muon_updates_each_matrix_of_a_stack(shape: tuple[int, int], row_beta: float | None) -> None:
    """Experts are updated as if each were a parameter of its own."""
    settings = {"rule": "muon", "lr": 0.1, "momentum": 0.9, "weight_decay": 0.5, "row_beta": row_beta}
    stacks = [nn.Parameter(torch.randn(3, *shape)) for _ in range(2)]
    single = [nn.Parameter(matrix.detach().clone()) for stack in stacks for matrix in stack]
    optimizers = [MuonAdamW([{"params": params, **settings}]) for params in (stacks, single)]
    for _ in range(3):
        for stack in stacks:
            stack.grad = torch.randn_like(stack)
        for matrix, gradient in zip(single, torch.cat([stack.grad for stack in stacks]), strict=True):
            matrix.grad = gradient.clone()
        for optimizer in optimizers:
            optimizer.step()
    torch.testing.assert_close(torch.cat([*stacks]), torch.stack(single))


def test_normuon_normalises_rows() -> None:
    """Algorithm 1 of https://arxiv.org/abs/2510.05491 over three steps, given Muon's orthogonalised update."""
    plain, even = nn.Parameter(torch.zeros(6, 10)), nn.Parameter(torch.zeros(6, 10))
    settings = {"rule": "muon", "lr": 1.0, "momentum": 0.9, "weight_decay": 0.0}
    muon = MuonAdamW([{"params": [plain], **settings}])
    normuon = MuonAdamW([{"params": [even], **settings, "row_beta": 0.95}])
    usual = torch.zeros(6, 1)
    for _ in range(3):
        before, even_before = plain.detach().clone(), even.detach().clone()
        plain.grad = torch.randn(6, 10) * torch.tensor([1.0, 1, 1, 1, 1, 100])[:, None]
        even.grad = plain.grad.clone()
        muon.step()
        normuon.step()
        update = plain.detach() - before
        usual = 0.95 * usual + 0.05 * update.square().mean(1, keepdim=True)
        scaled = update / usual.sqrt()
        expected = scaled * update.norm() / scaled.norm()
        torch.testing.assert_close(even.detach() - even_before, expected, atol=1e-2, rtol=1e-2)


def test_other_parameters_match_torch_adamw() -> None:
    ours = [nn.Parameter(torch.randn(5, 3)), nn.Parameter(torch.randn(7))]
    theirs = copy.deepcopy(ours)
    settings = {"lr": 0.01, "betas": (0.8, 0.9), "eps": 1e-8, "weight_decay": 0.1, "fused": True}
    a = MuonAdamW([{"params": ours, "rule": "adamw", **settings}])
    b = torch.optim.AdamW(theirs, **settings)
    for _ in range(5):
        for p, q in zip(ours, theirs, strict=True):
            p.grad = torch.randn_like(p)
            q.grad = p.grad.clone()
        a.step()
        b.step()
    for p, q in zip(ours, theirs, strict=True):
        torch.testing.assert_close(p, q)


def test_adamw_with_moments_in_bfloat16_matches_its_definition() -> None:
    """Algorithm 2 of https://arxiv.org/abs/1711.05101, with moments that are rounded after each step."""
    weights = [nn.Parameter(torch.randn(5, 3)), nn.Parameter(torch.randn(7))]
    settings = {"lr": 0.01, "betas": (0.8, 0.9), "eps": 1e-8, "weight_decay": 0.1, "fused": True, "bf16_state": True}
    optimizer = MuonAdamW([{"params": weights, "rule": "adamw", **settings}])
    expected = [p.detach().double() for p in weights]
    moments = [(torch.zeros_like(p), torch.zeros_like(p)) for p in expected]
    for step in range(1, 21):
        for n, p in enumerate(weights):
            p.grad = torch.randn_like(p)
            gradient, (first, second) = p.grad.double(), moments[n]
            first, second = 0.8 * first + 0.2 * gradient, 0.9 * second + 0.1 * gradient.square()
            expected[n] = expected[n] * (1 - 0.01 * 0.1) - 0.01 * (first / (1 - 0.8**step)) / (
                (second / (1 - 0.9**step)).sqrt() + 1e-8
            )
            moments[n] = first.bfloat16().double(), second.bfloat16().double()
        optimizer.step()
    for p, reference, (first, second) in zip(weights, expected, moments, strict=True):
        # Values near the middle of two bfloat16 numbers may be rounded differently than in float64.
        torch.testing.assert_close(p.detach().double(), reference, rtol=0, atol=2e-4)
        state = optimizer.state[p]
        assert (state["exp_avg"].dtype, state["exp_avg_sq"].dtype) == (torch.bfloat16, torch.bfloat16)
        torch.testing.assert_close(state["exp_avg"].double(), first, rtol=0.01, atol=1e-3)
        torch.testing.assert_close(state["exp_avg_sq"].double(), second, rtol=0.01, atol=1e-3)


def test_muon_with_momentum_in_bfloat16_rounds_it_after_each_step() -> None:
    """Against Muon in float32 whose momentum the test rounds."""
    rounded, plain = nn.Parameter(torch.randn(12, 4)), nn.Parameter(torch.randn(12, 4))
    with torch.no_grad():
        plain.copy_(rounded)
    settings = {"rule": "muon", "lr": 0.1, "momentum": 0.9, "weight_decay": 0.5}
    ours = MuonAdamW([{"params": [rounded], **settings, "bf16_state": True}])
    reference = MuonAdamW([{"params": [plain], **settings}])
    for _ in range(5):
        rounded.grad = torch.randn(12, 4)
        plain.grad = rounded.grad.clone()
        ours.step()
        reference.step()
        momentum = reference.state[plain]["momentum"]
        momentum.copy_(momentum.bfloat16())
        assert ours.state[rounded]["momentum"].dtype == torch.bfloat16
        assert torch.equal(ours.state[rounded]["momentum"].float(), momentum)
        assert torch.equal(rounded, plain)


@pytest.mark.parametrize("recipe", [Muon, AdamW])
@pytest.mark.parametrize(("saved", "loaded"), [(True, True), (False, True), (True, False)])
def test_loaded_moments_have_the_configured_dtype(recipe: type[Muon] | type[AdamW], saved: bool, loaded: bool) -> None:
    """Also if the run is resumed with another dtype; the values are those of the checkpoint, rounded if necessary."""
    model = GPT(TINY, 50, 8)
    optimizers = [recipe(bf16_state=bf16).build(model) for bf16 in (saved, loaded)]
    for p in model.parameters():
        p.grad = torch.randn_like(p)
    optimizers[0].step()
    optimizers[1].load_state_dict(copy.deepcopy(optimizers[0].state_dict()))
    for p in model.parameters():
        before, after = (optimizer.state[p] for optimizer in optimizers)
        assert before.keys() == after.keys()
        assert before.get("step") == after.get("step")
        for name in MOMENTS & before.keys():
            assert before[name].dtype == (torch.bfloat16 if saved else torch.float32)
            assert after[name].dtype == (torch.bfloat16 if loaded else torch.float32)
            assert torch.equal(before[name].bfloat16(), after[name].bfloat16())
    optimizers[1].step()  # with the configured dtype, and not with that of the checkpoint
    for p in model.parameters():
        for name in MOMENTS & optimizers[1].state[p].keys():
            assert optimizers[1].state[p][name].dtype == (torch.bfloat16 if loaded else torch.float32)
            assert not torch.equal(optimizers[1].state[p][name].float(), optimizers[0].state[p][name].float())


@pytest.mark.parametrize("recipe", [Muon(), AdamW(), Muon(bf16_state=True, row_beta=0.9), AdamW(bf16_state=True)])
def test_planned_bytes_are_those_of_the_optimizer_state(recipe: Muon | AdamW) -> None:
    model = GPT(TINY, 50, 8)
    optimizer = recipe.build(model)
    for p in model.parameters():
        p.grad = torch.randn_like(p)
    optimizer.step()
    held = sum(
        state[name].numel() * state[name].element_size()
        for state in optimizer.state.values()
        for name in MOMENTS & state.keys()
    )
    assert state_bytes_by_part(optimizer)["optimizer"] == held


@pytest.mark.parametrize("recipe", [Muon(), AdamW(), Muon(bf16_state=True), AdamW(bf16_state=True)])
def test_optimizer_state_can_be_saved_and_loaded(recipe: Muon | AdamW) -> None:
    def run(interrupt: bool) -> list[torch.Tensor]:
        torch.manual_seed(0)
        model = GPT(TINY, 50, 8)
        optimizer = recipe.build(model)
        for step in range(4):
            if interrupt and step == 2:
                state = copy.deepcopy(optimizer.state_dict())
                optimizer = recipe.build(model)
                optimizer.load_state_dict(state)
            for p in model.parameters():
                p.grad = torch.randn_like(p)
            optimizer.step()
        return [p.detach() for p in model.parameters()]

    for a, b in zip(run(False), run(True), strict=True):
        assert torch.equal(a, b)


def test_every_parameter_is_in_one_group() -> None:
    model = GPT(GPTConfig(n_layer=2, n_head=2, n_embd=32, position="learned"), 50, 8)
    names = {id(p): name for name, p in model.named_parameters()}
    groups = parameter_groups(model)
    found = [names[id(p)] for group in (groups.matrices, groups.tables, groups.vectors) for p in group]
    assert sorted(found) == sorted(names.values())
    assert {names[id(p)] for p in groups.tables} == {"embedding.weight", "head.weight", "position.table.weight"}
    assert all(name.endswith("norm.weight") for name in (names[id(p)] for p in groups.vectors))
    model.norm.weight.requires_grad = False
    assert len(parameter_groups(model).vectors) == len(groups.vectors) - 1


def test_parameters_that_are_not_matrices_use_adamw() -> None:
    net = GPT(TINY, 50, 8)
    net.blocks[0].gate = torch.nn.Parameter(torch.zeros(2, 1, 16))
    assert any(p is net.blocks[0].gate for p in parameter_groups(net).tables)
    Muon().build(net)


def test_muon_updates_experts_but_not_the_router_nor_biases() -> None:
    net = GPT(GPTConfig(n_layer=1, n_head=2, n_embd=32, feed_forward="moe", n_shared_experts=1, bias=True), 50, 8)
    groups, mixture = parameter_groups(net), net.blocks[0].feed_forward
    names = {id(p): name for name, p in mixture.named_parameters()}
    assert sorted(names[id(p)] for p in groups.matrices if id(p) in names) == sorted(
        f"{part}.{name}.weight" for part in ("experts", "shared") for name in ("input", "gate", "output")
    )
    assert any(p is mixture.router.weight for p in groups.tables)  # one vector per expert
    assert {name for name, _ in mixture.named_parameters() if name.endswith(".bias")} == {
        names[id(p)] for p in groups.vectors if id(p) in names
    }
    assert mixture.experts.output.bias.shape == (8, 32)


@pytest.mark.parametrize("recipe", [Muon(), AdamW()])
def test_lora_factors_are_not_matrices(recipe: Muon | AdamW) -> None:
    """Orthogonal steps of A and B would not make their product's step orthogonal; where nothing else is trained, adamw
    is all there is."""
    net = GPT(TINY, 50, 8)
    add_lora(net, LoRA(rank=2))
    factors = [p for name, p in net.named_parameters() if "lora_" in name]
    assert len(factors) == 2 * 14
    [group] = recipe.build(net).param_groups
    assert group["rule"] == "adamw"
    assert {id(p) for p in group["params"]} == {id(p) for p in factors}
    net.requires_grad_(True)
    assert all(any(p is table for table in parameter_groups(net).tables) for p in factors)


def test_adamw_decays_only_matrices_and_tables() -> None:
    optimizer = AdamW(weight_decay=0.3).build(GPT(TINY, 50, 8))
    assert [(group["weight_decay"], {p.ndim for p in group["params"]}) for group in optimizer.param_groups] == [
        (0.3, {2}),
        (0.0, {1}),
    ]


def test_each_optimizer_has_its_own_learning_rate() -> None:
    assert (Muon().lr, AdamW().lr) == (0.02, 3e-3)
    assert (Muon(lr=None).lr, AdamW(lr=1e-4).lr) == (0.02, 1e-4)


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: Muon(lr=0.0), "model.optimizer.lr is 0.0"),
        (lambda: Muon(adamw_lr=-1.0), "model.optimizer.adamw_lr is -1.0"),
        (lambda: AdamW(lr=float("nan")), "model.optimizer.lr is nan"),
        (lambda: AdamW(weight_decay=-0.1), "model.optimizer.weight_decay is -0.1"),
        (lambda: Muon(momentum=1.0), "model.optimizer.momentum is 1.0"),
        (lambda: AdamW(beta2=0.999, bf16_state=True), "model.optimizer.beta2 is 0.999, whose small changes would be"),
        (lambda: Muon(momentum=0.995, bf16_state=True), "model.optimizer.momentum is 0.995, whose small changes"),
    ],
)
def test_invalid_optimizer_settings_are_an_error(build: object, message: str) -> None:
    with pytest.raises(UserError, match=message):
        build()  # type: ignore[operator]
