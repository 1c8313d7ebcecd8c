"""Describe the machine, and compare a training step on each device with the same step on the CPU in float32."""

import platform
import shutil
from collections.abc import Iterator
from importlib import metadata
from pathlib import Path
from typing import Final, NamedTuple

import torch

from lit_gpt_scratch.distributed.hardware_defaults import default_precision, explain_no_compile
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
    expected = _training_step(torch.device("cpu"), torch.float32)
    for device in list_devices():
        for dtype in RELATIVE_TOLERANCES:
            if device.type == "cpu" and dtype != torch.bfloat16:
                continue  # float32 is the reference, and CPUs cannot train in float16
            try:
                loss, gradient = _training_step(device, dtype)
            except (RuntimeError, NotImplementedError) as error:  # the device does not support the dtype
                nan = float("nan")
                yield DeviceComparison(device.type, dtype, nan, nan, str(error).splitlines()[0])
                continue
            difference = (gradient - expected[1]).norm() / expected[1].norm()
            yield DeviceComparison(device.type, dtype, abs(loss - expected[0]) / expected[0], difference.item())


def _training_step(device: torch.device, dtype: torch.dtype) -> tuple[float, torch.Tensor]:
    """Return the loss of one batch, and its gradient as a float32 tensor of shape (n_parameters,) on the CPU."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        net = GPT(CHECK_CONFIG, VOCAB_SIZE, BLOCK_SIZE)
        ids = torch.randint(VOCAB_SIZE, (BATCH, BLOCK_SIZE + 1))
    net, ids = net.to(device), ids.to(device)
    with torch.autocast(device.type, dtype, enabled=dtype != torch.float32):
        nats, n_labels = token_cross_entropy(net(ids[:, :-1]), ids[:, 1:].contiguous())
    (nats / n_labels).backward()  # type: ignore[no-untyped-call]  # not annotated in torch
    gradient = torch.cat([p.grad.flatten().float().cpu() for p in net.parameters() if p.grad is not None])
    return (nats / n_labels).item(), gradient


def _installed_version(library: str) -> str:
    try:
        return metadata.version(library)
    except metadata.PackageNotFoundError:
        return ""
