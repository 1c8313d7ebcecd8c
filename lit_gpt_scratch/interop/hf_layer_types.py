"""Convert ``layer_types`` in ``config.json``, the list of local and global blocks, to ``GPTConfig`` fields and back."""

from typing import Any, Final

from lit_gpt_scratch.interop.hf_config import HFConfigReader
from lit_gpt_scratch.model import GPTConfig

LOCAL: Final = "sliding_attention"
GLOBAL: Final = "full_attention"
"""Elements of ``layer_types``."""


def read_layer_types(fields: HFConfigReader, default_pattern: int, default_window: int) -> dict[str, Any]:
    """Convert ``layer_types`` and ``sliding_window`` to ``GPTConfig`` fields; record unsupported values in ``fields``.

    Args:
        fields: Reader for the whole ``config.json``.
        default_pattern: Value of ``sliding_window_pattern`` if ``config.json`` contains neither it nor ``layer_types``.
        default_window: Value of ``sliding_window`` if it is missing.

    Raises:
        UserError: A number is invalid.
    """
    n_layer, layers = fields.positive_int("num_hidden_layers"), fields.values.get("layer_types")
    if layers is None:
        layers = _layer_types(n_layer, fields.positive_int("sliding_window_pattern", default_pattern))
    if not isinstance(layers, list) or len(layers) != n_layer:
        fields.reject("layer_types", f"must be a list with an element for each of the {n_layer} layers")
        return {}
    every = layers.index(GLOBAL) + 1 if GLOBAL in layers else n_layer + 1
    if layers != _layer_types(n_layer, every):
        fields.reject("layer_types", f"must be {GLOBAL} in every n-th layer, and {LOCAL} in the others")
    return {
        "sliding_window": None if every == 1 else fields.positive_int("sliding_window", default_window),
        "sliding_window_pattern": every if 1 < every <= n_layer else None,
    }


def write_layer_types(gpt: GPTConfig, block_size: int) -> dict[str, Any]:
    """Return ``layer_types`` and ``sliding_window``, which is required even if no layer uses it."""
    return {
        "sliding_window": gpt.sliding_window or block_size,
        "layer_types": [LOCAL if gpt.is_local(layer) else GLOBAL for layer in range(gpt.n_layer)],
    }


def _layer_types(n_layer: int, pattern: int) -> list[str]:
    return [LOCAL if (layer + 1) % pattern else GLOBAL for layer in range(n_layer)]
