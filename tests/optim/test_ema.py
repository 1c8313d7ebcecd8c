"""The moving average of the weights against its recursion, with stateful and stateless optimizers."""

from collections.abc import Callable, Iterator

import pytest
import torch
from torch import Tensor, distributed, nn
from torch.distributed.fsdp import fully_shard
from torch.optim.optimizer import Optimizer

from lit_gpt_scratch.errors import UserError
from lit_gpt_scratch.model import GPT, GPTConfig
from lit_gpt_scratch.optim import Muon
from lit_gpt_scratch.optim.ema import EMA_STATE_KEY, ExponentialMovingAverage, parameter_names, swap_saved_weights

TIED = GPTConfig(n_layer=1, n_head=2, n_embd=16, tied_embeddings=True)
OPTIMIZERS: dict[str, Callable[[nn.Module], Optimizer]] = {
    "sgd": lambda net: torch.optim.SGD(net.parameters(), lr=0.1),
    "adamw": lambda net: torch.optim.AdamW(net.parameters(), lr=0.1),
    "muon": lambda net: Muon().build(net),
}


def step(optimizer: Optimizer, net: nn.Module) -> None:
    for p in net.parameters():
        p.grad = torch.randn_like(p)
    optimizer.step()


def weights(net: nn.Module) -> list[Tensor]:
    return [p.detach().clone() for p in net.parameters()]


def averaged(
    net: nn.Module, optimizer: Optimizer, decay: float, steps: int
) -> tuple[ExponentialMovingAverage, list[Tensor]]:
    """The average after some steps, and the expected one in float64."""
    average = ExponentialMovingAverage(decay)
    done = 0
    average.attach(optimizer, lambda: done)
    expected: list[Tensor] = []
    for done in range(steps):
        step(optimizer, net)
        now = [p.double() for p in weights(net)]
        keep = min(decay, (1 + done) / (10 + done))
        expected = [keep * a + (1 - keep) * w for a, w in zip(expected, now, strict=True)] if expected else now
    return average, expected


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@pytest.mark.parametrize("decay", [0.0, 0.7, 0.999])
def test_average_matches_its_recursion_and_does_not_affect_training(optimizer: str, decay: float) -> None:
    net, plain = GPT(TIED, 50, 8), GPT(TIED, 50, 8)
    plain.load_state_dict(net.state_dict())
    followed, alone = OPTIMIZERS[optimizer](net), OPTIMIZERS[optimizer](plain)
    torch.manual_seed(0)
    _, expected = averaged(net, followed, decay, 30)
    torch.manual_seed(0)
    for _ in range(30):
        step(alone, plain)
    assert all(torch.equal(a, b) for a, b in zip(weights(net), weights(plain), strict=True))
    for p, a in zip(net.parameters(), expected, strict=True):
        torch.testing.assert_close(followed.state[p][EMA_STATE_KEY].double(), a, atol=1e-5, rtol=1e-5)


def test_parameter_without_updates_has_no_average() -> None:
    """An optimizer that finds a nonempty state would not initialize its moments."""
    used, unused = nn.Parameter(torch.zeros(2)), nn.Parameter(torch.zeros(2))
    optimizer = torch.optim.AdamW([used, unused])
    average = ExponentialMovingAverage(0.9)
    average.attach(optimizer, lambda: 0)
    used.grad = torch.ones(2)
    optimizer.step()
    unused.grad = torch.ones(2)
    optimizer.step()
    assert set(optimizer.state[unused]) == {"step", "exp_avg", "exp_avg_sq", EMA_STATE_KEY}


def test_weights_and_averages_are_swapped_and_restored() -> None:
    net = GPT(TIED, 50, 8)
    optimizer = OPTIMIZERS["muon"](net)
    average, expected = averaged(net, optimizer, 0.7, 5)
    trained = weights(net)
    for _ in range(2):  # the second time has no effect
        average.set_active(True, [optimizer], net)
        for found, a in zip(weights(net), expected, strict=True):
            torch.testing.assert_close(found.double(), a, atol=1e-5, rtol=1e-5)
    for _ in range(2):
        average.set_active(False, [optimizer], net)
        assert all(torch.equal(a, b) for a, b in zip(weights(net), trained, strict=True))


def test_saved_weights_and_averages_are_swapped_by_name() -> None:
    """Live tensors are unchanged, and tied weights stay tied."""
    net = GPT(TIED, 50, 8)
    optimizer = OPTIMIZERS["muon"](net)
    averaged(net, optimizer, 0.7, 5)
    own = {p: name for name, p in net.named_parameters()}
    saved = optimizer.state_dict()
    expected = {name: optimizer.state[p][EMA_STATE_KEY] for p, name in own.items()}
    trained = {name: p.detach() for p, name in own.items()}
    state = net.state_dict()
    of = parameter_names(optimizer, net)
    swap_saved_weights(state, saved, of)
    assert all(torch.equal(state[name], average) for name, average in expected.items())
    assert state["head.weight"] is state["embedding.weight"]
    assert all(torch.equal(net.get_parameter(name), weight) for name, weight in trained.items())
    assert all(optimizer.state[p][EMA_STATE_KEY] is expected[name] for p, name in own.items())
    swap_saved_weights(state, saved, of)
    assert all(torch.equal(state[name], weight) for name, weight in trained.items())


@pytest.fixture
def _one_process() -> Iterator[None]:
    distributed.init_process_group("gloo", store=distributed.HashStore(), rank=0, world_size=1)
    yield
    distributed.destroy_process_group()


@pytest.mark.usefixtures("_one_process")
def test_sharded_weights_are_averaged_and_resharded_after_a_swap() -> None:
    """FSDP2 keeps the unsharded weights of the root after a forward pass without a backward pass."""
    net, plain = nn.Linear(4, 3), nn.Linear(4, 3)
    plain.load_state_dict(net.state_dict())
    fully_shard(net, mesh=distributed.init_device_mesh("cpu", (1,)))
    optimizers = torch.optim.SGD(net.parameters(), lr=0.1), torch.optim.SGD(plain.parameters(), lr=0.1)
    averages = ExponentialMovingAverage(0.5), ExponentialMovingAverage(0.5)
    x = torch.randn(2, 4)
    for average, optimizer in zip(averages, optimizers, strict=True):
        average.attach(optimizer, lambda: 100)
    for _ in range(3):
        for module, optimizer in zip((net, plain), optimizers, strict=True):
            module(x).square().sum().backward()
            optimizer.step()
            optimizer.zero_grad()
    for wanted in (True, False):
        for average, optimizer, module in zip(averages, optimizers, (net, plain), strict=True):
            average.set_active(wanted, [optimizer], module)
        with torch.no_grad():
            assert torch.equal(net(x), plain(x))


@pytest.mark.parametrize("decay", [-0.1, 1.0, float("nan")])
def test_decay_out_of_range_is_an_error(decay: float) -> None:
    with pytest.raises(UserError, match=r"model.ema_decay is .*; it must be at least 0 and below 1"):
        ExponentialMovingAverage(decay)


def test_16_bit_weights_are_an_error() -> None:
    """A bfloat16 average of 1 does not move towards 2 with a decay of 0.999."""
    stuck = torch.ones(1, dtype=torch.bfloat16)
    assert torch.equal(stuck.clone().lerp_(stuck + 1, 0.001), stuck)
    net = nn.Linear(2, 2, dtype=torch.bfloat16)
    with pytest.raises(UserError, match=r"weights are stored in torch.bfloat16, whose precision is too low"):
        ExponentialMovingAverage(0.999).attach(torch.optim.SGD(net.parameters()), lambda: 0)
