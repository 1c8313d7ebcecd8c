"""Data-sheet figures of accelerators, and machines that consist of several of them, such as ``2x8xh100``."""

import re
from typing import Final, NamedTuple

from lit_gpt_scratch.errors import UserError
from lit_gpt_scratch.profiling.peak_flops import TENSOR_CORE_TFLOPS

MAX_DEVICES: Final = 2**16
"""Largest number of devices of a machine."""


class Accelerator(NamedTuple):
    """Figures of one accelerator and of the node that it usually comes in; bandwidths are per device and direction.

    Attributes:
        label: Name to display.
        driver_name: Key of ``TENSOR_CORE_TFLOPS``, which has the dense FLOP/s in bfloat16 and float16.
        float32_tflops: TFLOP/s in float32 without TF32, PyTorch's default.
        memory: Memory in bytes, with decimal gigabytes as in the data sheet.
        memory_bandwidth: Bandwidth of the memory in bytes per second.
        link_bandwidth: Bandwidth between devices of a node in bytes per second.
        network_bandwidth: Bandwidth between nodes in bytes per second.
        per_node: Number of devices in a full node.
        max_matmul_share: Largest share of the nominal FLOP/s that any bfloat16 matmul was measured to reach.
        attention_share: Share of the nominal FLOP/s that fused attention was measured to reach.
    """

    label: str
    driver_name: str
    float32_tflops: float
    memory: float
    memory_bandwidth: float
    link_bandwidth: float
    network_bandwidth: float
    per_node: int
    max_matmul_share: float
    attention_share: float

    @property
    def tensor_core_flops(self) -> float:
        """Nominal dense FLOP/s in bfloat16 and float16."""
        return 1e12 * TENSOR_CORE_TFLOPS[self.driver_name]


ACCELERATORS: Final[dict[str, Accelerator]] = {
    "a100_40gb": Accelerator("A100 SXM 40 GB", "A100", 19.5, 40e9, 1.555e12, 300e9, 25e9, 8, 0.869, 0.6),
    "a100_80gb": Accelerator("A100 SXM 80 GB", "A100", 19.5, 80e9, 2.039e12, 300e9, 25e9, 8, 0.869, 0.6),
    "h100": Accelerator("H100 SXM", "H100 80GB HBM3", 67.0, 80e9, 3.35e12, 450e9, 50e9, 8, 0.803, 0.35),
    "h200": Accelerator("H200 SXM", "H200$", 67.0, 141e9, 4.8e12, 450e9, 50e9, 8, 0.803, 0.35),
    "b200": Accelerator("B200 SXM", "B200", 75.0, 180e9, 7.7e12, 900e9, 50e9, 8, 0.776, 0.35),
    "l40s": Accelerator("L40S", "L40S", 91.6, 48e9, 0.864e12, 32e9, 12.5e9, 8, 0.8, 0.5),
    "rtx4090": Accelerator("RTX 4090", "RTX 4090$", 82.6, 24e9, 1.008e12, 16e9, 1.5e9, 8, 0.9, 0.6),
    "mi300x": Accelerator("MI300X", "MI300X", 163.4, 192e9, 5.3e12, 448e9, 50e9, 8, 0.514, 0.25),
}
"""Accelerators, keyed by the name that ``--devices_like`` accepts.

- Memory, bandwidths and float32 FLOP/s are from the data sheets: https://www.nvidia.com/en-us/data-center/ (``a100``,
  ``h100``, ``h200``, ``dgx-b200``, ``l40s``), https://www.nvidia.com/en-us/geforce/graphics-cards/40-series/rtx-4090/
  and https://www.amd.com/en/products/accelerators/instinct/mi300/mi300x.html. Vendors state the bandwidth of NVLink for
  both directions together, so half of it is used. L40S and RTX 4090 communicate over PCIe 4.0 x16. GeForce GPUs cannot
  access each other's memory, so each transfer crosses the host's memory, and half of PCIe's bandwidth is used.
- The network is the usual one: one adapter per GPU with 200 Gb/s (DGX A100) or 400 Gb/s (DGX H100 and B200, MI300X
  platforms); assumed to be 100 Gb/s per L40S and 100 Gb/s per node of eight RTX 4090.
- ``max_matmul_share`` is the "MAMF" table of https://github.com/stas00/ml-engineering (compute/accelerator), the
  fastest matmul of all shapes; that of L40S and RTX 4090 is assumed.
- ``attention_share`` is that of FlashAttention-2, which PyTorch contains: 0.35 on H100 (abstract of
  https://arxiv.org/abs/2407.08608), and 0.5 to 0.73 on A100 (abstract of https://arxiv.org/abs/2307.08691). Those of
  B200, L40S, RTX 4090 and MI300X are assumed.
"""
ALIASES: Final = {"a100": "a100_80gb"}


class Machine(NamedTuple):
    """A number of equal nodes with a number of equal accelerators.

    Attributes:
        accelerator: The accelerator.
        nodes: Number of nodes.
        per_node: Number of devices per node.
    """

    accelerator: Accelerator
    nodes: int
    per_node: int

    @property
    def devices(self) -> int:
        """Number of devices of all nodes."""
        return self.nodes * self.per_node

    def __str__(self) -> str:
        """Describe the machine, e.g. "2 nodes of 8 x H100 SXM"."""
        devices = f"{self.per_node} x {self.accelerator.label}"
        return devices if self.nodes == 1 else f"{self.nodes} nodes of {devices}"


def parse_machine(text: str) -> Machine:
    """Parse the value of ``--devices_like``.

    Args:
        text: ``8xh200`` for eight devices; ``2x8xh100`` for two nodes of eight devices. More devices than a node has
            are distributed over full nodes, so ``16xh100`` is the same as ``2x8xh100``.

    Raises:
        UserError: The text has another form, the accelerator is unknown, or a node cannot have so many devices.
    """
    names = ", ".join(ACCELERATORS)
    found = re.fullmatch(r"(?:(\d{1,6})x)?(\d{1,6})x([a-z]\w*)", text.strip().lower().replace("-", "_"))
    if found is None:
        raise UserError(
            f"--devices_like is {text}; use COUNTxNAME such as 8xh200, or NODESxCOUNTxNAME such as 2x8xh100, where "
            f"NAME is one of {names}"
        )
    accelerator = ACCELERATORS.get(ALIASES.get(found[3], found[3]))
    if accelerator is None:
        raise UserError(f"--devices_like is {text}, but {found[3]} is unknown; use one of {names}")
    count = int(found[2])
    nodes = int(found[1]) if found[1] else max(1, count // accelerator.per_node)
    per_node = count if found[1] else min(count, accelerator.per_node)
    if not 0 < nodes * count <= MAX_DEVICES:
        raise UserError(f"--devices_like is {text}; the number of devices must be from 1 to {MAX_DEVICES}")
    if per_node > accelerator.per_node or (found[1] is None and nodes * per_node != count):
        raise UserError(
            f"--devices_like is {text}, but a node has at most {accelerator.per_node} {accelerator.label}; use a "
            f"multiple of {accelerator.per_node} devices, or NODESxCOUNTx{found[3]}"
        )
    return Machine(accelerator, nodes, per_node)
