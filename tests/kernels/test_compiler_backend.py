"""A graph whose compiler fails is run uncompiled, with the same bits, or is an error."""

import logging
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lit_gpt_scratch.errors import UserError, exception_chain
from lit_gpt_scratch.kernels import compiler_backend
from lit_gpt_scratch.kernels.compiler_backend import CompilerBackend
from lit_gpt_scratch.model import GPT, GPTConfig

OUTPUT = (
    """C++ compile error

Command:
g++ /tmp/x/main.cpp -o /tmp/x/main.so

Output:
In file included from /tmp/x/main.cpp:2:
/tmp/x/main.cpp:9: fatal error: error writing to /tmp/cc.s: No space left on device
compilation terminated.
"""
    + "more output\n" * 100
)


class Failing:
    """A compiler that changes the graph and then fails, from the n-th call on."""

    def __init__(self, first: int = 0) -> None:
        self.first, self.calls = first, 0

    def __call__(self, graph: torch.fx.GraphModule, inputs: list[Any]) -> Any:
        self.calls += 1
        if self.calls <= self.first:
            return graph.forward
        for node in list(graph.graph.nodes)[::-1]:
            if node.op == "output":
                node.args = (None,)
            elif not node.users and node.op != "placeholder":
                graph.graph.erase_node(node)
        graph.recompile()
        raise RuntimeError(OUTPUT)


def net() -> GPT:
    torch.manual_seed(0)
    made = GPT(GPTConfig(n_layer=2, n_head=2, n_embd=32, dropout=0.1, initialisation="gpt2"), 50, 16)
    return made.train()


def loss_and_gradients(model: nn.Module) -> list[Tensor]:
    torch.manual_seed(1)
    ids = torch.arange(32).view(2, 16)
    loss = model(ids).logsumexp(-1).sum()
    loss.backward()
    return [loss.detach(), *(p.grad for p in model.parameters() if p.grad is not None)]


@pytest.mark.parametrize("first", [0, 1])
def test_failing_compiler_changes_no_bit(first: int, caplog: pytest.LogCaptureFixture) -> None:
    torch._dynamo.reset()
    compiler = Failing(first)
    model, backend = net(), CompilerBackend(required=False, compile=compiler)
    for block in model.blocks:
        block.compile(backend=backend)
    with caplog.at_level(logging.WARNING):
        found = loss_and_gradients(model)
        with torch.no_grad():
            model.eval()(torch.arange(6).view(1, 6))  # another graph, which is not compiled any more
    assert compiler.calls == first + 1
    assert all(torch.equal(a, b) for a, b in zip(found, loss_and_gradients(net()), strict=True))
    [message] = caplog.messages
    assert message.startswith(
        "not compiled, because the compiler failed: /tmp/x/main.cpp:9: fatal error: error writing"
    )
    assert len(message) < 300
    assert "\n" not in message


def test_failure_of_a_required_compiler_is_one_line() -> None:
    torch._dynamo.reset()
    function = torch.compile(lambda x: x + 1, backend=CompilerBackend(required=True, compile=Failing()))
    with pytest.raises(Exception) as caught:
        function(torch.zeros(3))
    [error] = [each for each in exception_chain(caught.value) if isinstance(each, UserError)]
    assert "No space left on device" in str(error)
    assert "\n" not in str(error)


@pytest.mark.parametrize("known", [True, False])
def test_versions_without_the_setting_for_backward_passes(known: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """The setting is on while a graph is compiled, and a version of PyTorch that lacks it compiles all the same."""
    setting, seen = compiler_backend.LAZINESS_SETTING, []

    def compile(graph: torch.fx.GraphModule, inputs: list[Any]) -> Any:
        seen.append(getattr(torch._functorch.config, setting))
        return graph

    if not known:
        monkeypatch.setattr(compiler_backend, "LAZINESS_SETTING", "no_such_setting")
    torch._dynamo.reset()
    before = getattr(torch._functorch.config, setting)
    module = nn.Linear(3, 3)
    compiled = torch.compile(module, backend=CompilerBackend(required=True, compile=compile))
    x = torch.ones(2, 3)
    assert torch.equal(compiled(x), module(x))
    assert seen == [known or before]
    assert getattr(torch._functorch.config, setting) == before
