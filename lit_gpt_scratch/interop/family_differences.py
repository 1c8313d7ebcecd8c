"""Describe how an unsupported Hugging Face model differs from the supported families."""

import re
from collections.abc import Collection, Iterable, Sequence
from contextlib import suppress
from dataclasses import replace
from typing import Final

from lit_gpt_scratch.errors import UserError
from lit_gpt_scratch.interop.hf_config import HFConfigReader, shorten
from lit_gpt_scratch.interop.hf_weights import list_some
from lit_gpt_scratch.interop.model_family import NEUTRAL_VALUES, ModelFamily, ModelShape
from lit_gpt_scratch.model import GPTConfig

IRRELEVANT: Final = re.compile(
    r"^_|^summary_|token_id|drop|init|label|dtype|version|loss|_coef$|^(use_cache|architectures|model_type|vocab_size)$"
    r"|^(tie_word_embeddings|rope_theta|rope_scaling|pretraining_tp|return_dict)$"
)
"""Pattern for ``config.json`` fields that do not change the logits in evaluation mode, or that every family reads."""
MEANINGS: Final = {
    "parallel_attn": "attention and feed-forward network in parallel",
    "use_parallel_residual": "attention and feed-forward network in parallel",
    "kv_lora_rank": "multi-head latent attention",
    "state_size": "state-space layers",
    "text_config": "a multimodal model, whose language model is described by text_config",
    "vision_config": "an image encoder",
}
"""Meanings of ``config.json`` fields whose names do not explain themselves."""


def describe_differences(config: HFConfigReader, tensors: Collection[str], families: Sequence[ModelFamily]) -> str:
    """Compare a model with the closest of the supported families, by the model's config and tensor names.

    Args:
        config: Config of a model whose ``model_type`` is not supported.
        tensors: Names of the model's tensors; empty if they are not known.
        families: The supported families.

    Returns:
        The differences as one line, or an empty string if none are found. The model may still compute another function
        with fields and tensors of the same names.
    """
    own = _modules(tensors)
    typical = {family: replace(GPTConfig(n_layer=1), **family.fixed) for family in families}
    names = {family: _modules(m.hf_name for m in family.tensor_mappings(gpt)) for family, gpt in typical.items()}
    fields = {family: {*family.build_config(ModelShape(gpt, 1, 1))} for family, gpt in typical.items()}

    def distance(family: ModelFamily) -> tuple[int, int]:
        return len(own ^ names[family]) if own else 0, len(fields[family] - config.values.keys())

    nearest = min(families, key=distance)
    with suppress(UserError):  # a field is missing
        nearest.read_config(config)  # collects the values that this family does not support
    found = [*config.unsupported]
    known = set().union(NEUTRAL_VALUES, *fields.values())
    unknown = {n: v for n, v in config.values.items() if v and n not in known and not IRRELEVANT.search(n)}
    meanings = sorted({MEANINGS[name] for name in unknown if name in MEANINGS})
    for description, different in (
        ("", meanings),
        ("unknown fields ", [f"{name} = {shorten(value)}" for name, value in unknown.items()]),
        ("additional tensors ", sorted(own - names[nearest])),
        ("missing tensors ", sorted(names[nearest] - own) if own else []),
    ):
        if different:
            found.append(description + list_some(different))
    return f"it differs from {nearest.model_type}, at least in: {'; '.join(found)}" if found else ""


def _modules(tensors: Iterable[str]) -> set[str]:
    """Return the names of the modules with the given tensors, with ``*`` for the number of the layer."""
    names = {re.sub(r"\.\d+\.", ".*.", name).removesuffix(".weight") for name in tensors}
    return {name for name in names if name != "lm_head"}  # tied or not
