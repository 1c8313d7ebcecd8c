"""Describe the machine, and compare a training step on each device with the same step on the CPU in float32."""

import platform
import shutil
from collections.abc import Iterator
from importlib import metadata
from pathlib import Path
from typing import Final, NamedTuple

import torch
from torch import Tensor

from lit_gpt_scratch.distributed.hardware_defaults import default_precision, explain_no_compile
from lit_gpt_scratch.kernels.compiler_backend import CompilerBackend
from lit_gpt_scratch.kernels.onednn_linear import USE_ONEDNN
from lit_gpt_scratch.losses.cross_entropy import token_cross_entropy
from lit_gpt_scratch.model import GPT, GPTConfig

REPORTED_LIBRARIES: Final = ("torch", "lightning", "tokenizers", "tensorboard", "transformers", "optuna", "lm-eval")
CHECK_CONFIG: Final = GPTConfig(n_layer=2, n_head=2, n_embd=64, initialisation="gpt2")
"""Config of the trained model; with the default ``initialisation``, most gradients of the first step would be zero."""
VOCAB_SIZE, BATCH, BLOCK_SIZE = 256, 4, 64
RELATIVE_TOLERANCES: Final = {torch.float32: 1e-3, torch.bfloat16: 5e-2, torch.float16: 1e-2}
"""Maximum relative differences in loss and gradient, keyed by dtype.

On GPUs, float32 matmuls may use TF32, which has a 10-bit mantissa.
"""
FLOAT16_LOSS_SCALE: Final = 2.0**14
"""Factor of the loss in float16, in which the gradients of the logits would otherwise underflow."""


class DeviceComparison(NamedTuple):
    """Comparison of a training step on a device in a given dtype with the same step on the CPU in float32.

    Attributes:
        device: Device type.
        dtype: Autocast dtype.
        loss: Relative difference between the losses.
        gradient: Norm of the difference between the gradients, relative to the norm of the CPU gradient.
        failed: Error message if the step failed, otherwise an empty string.
    """

    device: str
    dtype: torch.dtype
    loss: float
    gradient: float
    failed: str = ""

    @property
    def within_tolerance(self) -> bool:
        """Whether the step succeeded and its differences are within the tolerance of the dtype."""
        return not self.failed and max(self.loss, self.gradient) <= RELATIVE_TOLERANCES[self.dtype]


def list_devices() -> list[torch.device]:
    """Return one device for each available device type, starting with the CPU."""
    found = [torch.device("cpu")]
    if torch.cuda.is_available():
        found.append(torch.device("cuda"))
    if torch.backends.mps.is_available():
        found.append(torch.device("mps"))
    return found


def describe_machine(folders: dict[str, Path]) -> Iterator[tuple[str, str]]:
    """Yield (name, text) pairs that describe the software and hardware of the machine.

    Args:
        folders: Folders for which free disk space is reported, keyed by the label to show, such as ``runs``. If a
            folder does not exist, its nearest existing parent is used.
    """
    yield "system", f"{platform.platform()}, Python {platform.python_version()}"
    yield (
        "versions",
        ", ".join(f"{name} {version}" for name in REPORTED_LIBRARIES if (version := _installed_version(name))),
    )
    matmuls = "; float32 matmuls with oneDNN, which is faster than MKL on this CPU" if USE_ONEDNN else ""
    yield "cpu", f"{platform.machine()}, {torch.get_num_threads()} threads for torch{matmuls}"
    for number in range(torch.cuda.device_count()):
        properties = torch.cuda.get_device_properties(number)
        yield f"cuda:{number}", f"{properties.name}, {properties.total_memory / 1e9:.0f} GB"
    precision = default_precision("auto")
    yield "precision", f"{precision.value}: {precision.reason}"
    for device in list_devices():
        yield f"compiler, {device.type}", explain_no_compile(device) or "blocks are compiled"
    for purpose, folder in folders.items():
        there = next(path for path in (folder.absolute(), *folder.absolute().parents) if path.is_dir())
        yield f"disk, {purpose}", f"{shutil.disk_usage(there).free / 1e9:,.1f} GB free for {folder}"


def compare_devices() -> Iterator[DeviceComparison]:
    """Compare a training step of a small model on each device and in each dtype with the CPU in float32."""
    expected = training_step(torch.device("cpu"), torch.float32)
    for device in list_devices():
        for dtype in RELATIVE_TOLERANCES:
            if device.type == "cpu" and dtype != torch.bfloat16:
                continue  # float32 is the reference, and CPUs cannot train in float16
            try:
                found = training_step(device, dtype)
            except (RuntimeError, NotImplementedError) as error:  # the device does not support the dtype
                nan = float("nan")
                yield DeviceComparison(device.type, dtype, nan, nan, str(error).splitlines()[0])
                continue
            loss = abs(found.loss - expected.loss) / expected.loss
            yield DeviceComparison(device.type, dtype, loss, relative_difference(found.gradient, expected.gradient))


class StepResult(NamedTuple):
    """Result of a training step, in float32 on the CPU.

    Attributes:
        loss: Mean cross-entropy in nats.
        logits: (B, T, vocab_size).
        gradient: (n_parameters,), the gradient of the loss.
    """

    loss: float
    logits: Tensor
    gradient: Tensor


def training_step(
    device: torch.device,
    dtype: torch.dtype,
    config: GPTConfig = CHECK_CONFIG,
    batch_size: int = BATCH,
    block_size: int = BLOCK_SIZE,
    documents: bool = False,
    compile: bool = False,
) -> StepResult:
    """Compute the loss of a batch and its gradient; weights and batch depend only on the sizes.

    Args:
        device: Device that computes the step.
        dtype: Autocast dtype; weights are in float32.
        config: Architecture of the network.
        batch_size: Number of sequences.
        block_size: Number of tokens per sequence.
        documents: Whether each sequence consists of three documents, which do not attend to each other.
        compile: Whether to compile the blocks, as in training.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        net = GPT(config, VOCAB_SIZE, block_size)
        ids = torch.randint(VOCAB_SIZE, (batch_size, block_size + 1))
        document_ids = torch.randint(3, (batch_size, block_size)).sort(dim=1).values if documents else None
    net, ids = net.to(device), ids.to(device)
    if compile:
        backend = CompilerBackend(required=True)
        for block in net.blocks:
            block.compile(backend=backend)
    document_ids = None if document_ids is None else document_ids.to(device)
    with torch.autocast(device.type, dtype, enabled=dtype != torch.float32):
        logits = net(ids[:, :-1], document_ids)
        nats, n_labels = token_cross_entropy(logits, ids[:, 1:].contiguous())
    scale = FLOAT16_LOSS_SCALE if dtype == torch.float16 else 1.0
    (scale * nats / n_labels).backward()  # type: ignore[no-untyped-call]  # not annotated in torch
    gradient = torch.cat([p.grad.flatten().float().cpu() for p in net.parameters() if p.grad is not None])
    return StepResult((nats / n_labels).item(), logits.detach().float().cpu(), gradient / scale)


def relative_difference(found: Tensor, expected: Tensor) -> float:
    """Return the norm of the difference between two tensors relative to the norm of the expected tensor."""
    return float((found - expected).norm() / expected.norm())


def _installed_version(library: str) -> str:
    try:
        return metadata.version(library)
    except metadata.PackageNotFoundError:
        return ""
