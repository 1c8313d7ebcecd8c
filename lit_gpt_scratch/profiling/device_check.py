"""What this machine has, and whether it computes what a CPU computes in float32."""

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
"""What is compared: every weight of it has a gradient."""
VOCAB_SIZE, BATCH, BLOCK_SIZE = 256, 4, 64
RELATIVE_TOLERANCES: Final = {torch.float32: 1e-3, torch.bfloat16: 5e-2, torch.float16: 1e-2}
"""How far loss and gradient may be off, relatively. On GPUs float32 may multiply in TF32, of 10 bits."""


class DeviceComparison(NamedTuple):
    """A device and a type, beside a CPU in float32.

    Attributes:
        device: Its type.
        dtype: In which it multiplied.
        loss: How far the loss is off, relatively.
        gradient: How far the whole gradient is off, by its norm.
        failed: Why it could not be computed at all, or nothing.
    """

    device: str
    dtype: torch.dtype
    loss: float
    gradient: float
    failed: str = ""

    @property
    def within_tolerance(self) -> bool:
        """Whether it is as near as its type allows."""
        return not self.failed and max(self.loss, self.gradient) <= RELATIVE_TOLERANCES[self.dtype]


def list_devices() -> list[torch.device]:
    """Kinds of devices that there are, the CPU first."""
    found = [torch.device("cpu")]
    if torch.cuda.is_available():
        found.append(torch.device("cuda"))
    if torch.backends.mps.is_available():
        found.append(torch.device("mps"))
    return found


def describe_machine(folders: dict[str, Path]) -> Iterator[tuple[str, str]]:
    """Lines, each with its name.

    Args:
        folders: By purpose, where something will be written; those that are not there yet count as the nearest above.
    """
    yield "system", f"{platform.platform()}, Python {platform.python_version()}"
    yield (
        "versions",
        ", ".join(f"{name} {version}" for name in REPORTED_LIBRARIES if (version := _installed_version(name))),
    )
    products = "; float32 is multiplied by oneDNN, which is faster here than MKL" if USE_ONEDNN else ""
    yield "cpu", f"{platform.machine()}, {torch.get_num_threads()} threads for torch{products}"
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
    """A step of a small model on every device, in every type that it can train in, beside a CPU in float32."""
    expected = _training_step(torch.device("cpu"), torch.float32)
    for device in list_devices():
        for dtype in RELATIVE_TOLERANCES:
            if device.type == "cpu" and dtype != torch.bfloat16:
                continue  # float32 is what it is compared with, and in float16 no CPU trains
            try:
                loss, gradient = _training_step(device, dtype)
            except (RuntimeError, NotImplementedError) as error:  # of the device: it cannot do this
                nothing = float("nan")
                yield DeviceComparison(device.type, dtype, nothing, nothing, str(error).splitlines()[0])
                continue
            off = (gradient - expected[1]).norm() / expected[1].norm()
            yield DeviceComparison(device.type, dtype, abs(loss - expected[0]) / expected[0], off.item())


def _training_step(device: torch.device, dtype: torch.dtype) -> tuple[float, torch.Tensor]:
    """The loss of one batch and its gradient, (parameters,) float32 on the CPU."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        net = GPT(CHECK_CONFIG, VOCAB_SIZE, BLOCK_SIZE)
        ids = torch.randint(VOCAB_SIZE, (BATCH, BLOCK_SIZE + 1))
    net, ids = net.to(device), ids.to(device)
    with torch.autocast(device.type, dtype, enabled=dtype != torch.float32):
        lost, counted = token_cross_entropy(net(ids[:, :-1]), ids[:, 1:].contiguous())
    (lost / counted).backward()  # type: ignore[no-untyped-call]  # torch's own
    gradient = torch.cat([p.grad.flatten().float().cpu() for p in net.parameters() if p.grad is not None])
    return (lost / counted).item(), gradient


def _installed_version(library: str) -> str:
    try:
        return metadata.version(library)
    except metadata.PackageNotFoundError:
        return ""
