"""A ``torch.compile`` backend that, if the compiler fails, raises a one-line error or runs the graph uncompiled."""

import copy
import logging
import re
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any, Final

import torch
from torch import fx

from lit_gpt_scratch.errors import UserError, exception_chain

log = logging.getLogger(__name__)

LAZINESS_SETTING: Final = "force_non_lazy_backward_lowering"
Compile = Callable[[fx.GraphModule, list[Any]], Any]


class CompilerBackend:
    """Inductor backend with a fallback for machines on which the C++ compiler or Triton fails, e.g. due to a full disk.

    A graph that cannot be compiled is executed operation by operation, so the results are those of the uncompiled
    model. The failure is reported once, and no further graph is compiled.

    Use one instance for all modules that share code, because each instance compiles the code again.

    Args:
        required: Whether to raise an error instead of running graphs uncompiled.
        compile: Callable that compiles a graph for its example inputs; Inductor by default.
    """

    def __init__(self, required: bool, compile: Compile | None = None) -> None:
        self.required = required
        self.failed = False
        self._compile = compile or _compile_with_inductor

    def __call__(self, graph: fx.GraphModule, example_inputs: Sequence[Any]) -> Callable[..., Any]:
        """Compile a graph, including its backward pass; return the graph itself if the compiler has failed.

        Raises:
            UserError: The compiler failed, and compilation is required.
        """
        original = fx.GraphModule(graph, copy.deepcopy(graph.graph))  # Inductor modifies the graph
        if not self.failed:
            try:
                with _compile_backward_pass_at_once():
                    compiled: Callable[..., Any] = self._compile(graph, list(example_inputs))
                return compiled
            except Exception as error:
                reason = _describe_failure(error)
                if self.required:
                    raise UserError(
                        f"torch.compile failed ({reason}); repair the compiler, or disable compilation"
                    ) from error
                self.failed = True
                log.warning("not compiled, because the compiler failed: %s", reason)
        return original


def _compile_backward_pass_at_once() -> AbstractContextManager[None]:
    """Compile backward passes with their forward passes, not on first use, when a step can no longer be repeated.

    A version of PyTorch without this setting compiles a backward pass on first use. If the compiler fails then, the run
    ends with the compiler's error instead of continuing uncompiled; a failure in the forward pass is handled as usual.
    """
    config = torch._functorch.config
    if not hasattr(config, LAZINESS_SETTING):
        return nullcontext()
    patched: AbstractContextManager[None] = config.patch({LAZINESS_SETTING: True})
    return patched


def _compile_with_inductor(graph: fx.GraphModule, example_inputs: list[Any]) -> Any:
    from torch._inductor.compile_fx import compile_fx  # takes two seconds to import

    return compile_fx(graph, example_inputs)


def _describe_failure(error: Exception) -> str:
    """Return the line of an error message that states the cause, such as the compiler's first error."""
    lines = [line.strip() for each in exception_chain(error) for line in str(each).splitlines() if line.strip()]
    for pattern in (r"No space left|Disk quota|Too many open", r"[Ee]rror: |not found", r""):
        for line in lines:
            if re.search(pattern, line):
                return line[:200]
    return type(error).__name__
