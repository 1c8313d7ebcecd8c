"""Rows that compare the network with itself in float32 on the CPU, by attention backend, precision and compilation."""

from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import replace
from typing import Any, Final

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel

from lit_gpt_scratch.acceptance.row import RowContext, RowFailed, Values
from lit_gpt_scratch.model import GPTConfig
from lit_gpt_scratch.profiling.device_check import RELATIVE_TOLERANCES, relative_difference, training_step

SDPA_BACKENDS: Final = {
    "flash": SDPBackend.FLASH_ATTENTION,
    "efficient": SDPBackend.EFFICIENT_ATTENTION,
    "cudnn": SDPBackend.CUDNN_ATTENTION,
}
"""Kernels of scaled dot-product attention, each of which is used alone."""
PRECISIONS: Final = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


def compare_backends(
    context: RowContext,
    config: GPTConfig,
    backends: Mapping[str, Sequence[str]],
    batch_size: int,
    block_size: int,
    documents: Collection[str] = (),
) -> Iterator[Values]:
    """Compare several attention backends with the CPU in one row, not compiled.

    Args:
        context: Where the row runs.
        config: Architecture; its weights must have gradients from the first step.
        backends: Names of precisions, keyed by backend.
        batch_size: Sequences in the batch.
        block_size: Tokens per sequence.
        documents: Backends for which sequences consist of several documents.

    Raises:
        RowFailed: At least one combination failed; the message names them.
    """
    problems = []
    for backend, precisions in backends.items():
        compared = compare_network(
            context, config, backend, precisions, [False], batch_size, block_size, backend in documents
        )
        try:
            for found in compared:
                yield {f"{backend}, {name}": value for name, value in found.items()}
        except RowFailed as failure:
            problems.append(f"{backend}: {failure}")
    if problems:
        raise RowFailed("; ".join(problems))


def compare_network(
    context: RowContext,
    config: GPTConfig,
    backend: str,
    precisions: Sequence[str],
    compiled: Sequence[bool],
    batch_size: int,
    block_size: int,
    documents: bool = False,
) -> Iterator[Values]:
    """Yield the relative differences of logits and gradients from the CPU in float32, for each combination.

    A combination that raises an exception or exceeds the tolerance of its dtype does not stop the others.

    Args:
        context: Where the row runs.
        config: Architecture; its weights must have gradients from the first step.
        backend: A kernel in ``SDPA_BACKENDS``, ``manual`` or ``flex``.
        precisions: Names in ``PRECISIONS``.
        compiled: Whether to compile; one or both.
        batch_size: Sequences in the batch.
        block_size: Tokens per sequence.
        documents: Whether sequences consist of several documents, which do not attend to each other.

    Raises:
        RowFailed: At least one combination failed; the message names them.
    """
    shape: dict[str, Any] = {"batch_size": batch_size, "block_size": block_size, "documents": documents}
    cpu, device = torch.device("cpu"), context.device
    expected = training_step(cpu, torch.float32, replace(config, attention_backend="sdpa"), **shape)
    own = replace(config, attention_backend="sdpa" if backend in SDPA_BACKENDS else backend)  # type: ignore[arg-type]  # a literal
    problems = []
    for name in precisions:
        for compile in compiled:
            label = f"{name}, compiled" if compile else name
            try:
                with sdpa_kernel(SDPA_BACKENDS[backend]) if backend in SDPA_BACKENDS else nullcontext():
                    found = training_step(device, PRECISIONS[name], own, compile=compile, **shape)
            except Exception as error:  # an unsupported combination must not hide the others
                reason = next(iter(str(error).splitlines()), type(error).__name__)
                problems.append(label)
                yield {label: f"failed: {reason[:120]}"}
                continue
            logits = relative_difference(found.logits, expected.logits)
            gradient = relative_difference(found.gradient, expected.gradient)
            yield {f"{label}: logits": logits, f"{label}: gradient": gradient}
            if not max(logits, gradient) <= RELATIVE_TOLERANCES[PRECISIONS[name]]:  # also if NaN
                problems.append(f"{label} exceeds its tolerance of {RELATIVE_TOLERANCES[PRECISIONS[name]]:g}")
    if problems:
        raise RowFailed("; ".join(problems))
