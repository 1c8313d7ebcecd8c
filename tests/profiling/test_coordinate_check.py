"""The coordinate check is flat with mup and not flat without, for both optimizers."""

import math
from dataclasses import replace
from typing import Any

import pytest

from lit_gpt_scratch.errors import UserError
from lit_gpt_scratch.model import GPTConfig
from lit_gpt_scratch.model.feed_forward import FEED_FORWARDS
from lit_gpt_scratch.optim import AdamW, Muon
from lit_gpt_scratch.profiling.coordinate_check import FLAT_RATIO, CoordinateCheck, check_coordinates

NARROW: dict[str, Any] = {"n_layer": 1, "n_head": 4, "n_embd": 64}
STANDARD = GPTConfig(**NARROW)
MUP = replace(STANDARD, parametrisation="mup", mup_base_width=64)
RECIPES = [pytest.param(AdamW(), id="adamw"), pytest.param(Muon(), id="muon")]


@pytest.mark.parametrize("recipe", RECIPES)
def test_activations_are_flat_with_mup_only(recipe: AdamW | Muon) -> None:
    flat, steep = (check_coordinates(config, recipe, (64, 256), seeds=range(8)) for config in (MUP, STANDARD))
    assert flat.scales.keys() == {
        "embedding", "blocks.0.attention", "blocks.0.feed_forward", "blocks.0", "logits"
    }  # fmt: skip
    assert flat.not_flat == [], f"\n{flat}"
    assert steep.ratios["logits"] > 1.5, f"\n{steep}"


@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("recipe", RECIPES)
def test_activations_are_flat_from_width_64_to_1024(recipe: AdamW | Muon) -> None:
    """Within 10%, after 10 steps, in a network of two layers."""
    flat = check_coordinates(replace(MUP, n_layer=2), recipe)
    assert flat.widths == (64, 128, 256, 512, 1024)
    assert max(flat.ratios.values()) <= 1.1, f"\n{flat}"


@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.parametrize(
    ("changes", "widths"),
    [
        # The share of the random initial head in the logits decreases with the square root of the width.
        ({"tied_embeddings": True}, (256, 512, 1024)),
        ({"initialisation": "gpt2"}, (256, 512, 1024)),
        ({"n_kv_head": 2}, (128, 256, 512)),
        ({"qk_norm": False}, (128, 256, 512)),
        *(({"feed_forward": name}, (128, 256, 512)) for name in FEED_FORWARDS if name != STANDARD.feed_forward),
    ],
    ids=str,
)
@pytest.mark.parametrize("recipe", RECIPES)
def test_activations_of_other_architectures_are_flat_with_mup_only(
    recipe: AdamW | Muon, changes: dict[str, Any], widths: tuple[int, ...]
) -> None:
    flat, steep = (check_coordinates(replace(config, **changes), recipe, widths) for config in (MUP, STANDARD))
    assert flat.not_flat == [], f"\n{flat}"
    assert max(steep.ratios.values()) > 1.3, f"\n{steep}"


def check(scales: dict[str, list[float]], config: GPTConfig = STANDARD) -> CoordinateCheck:
    return CoordinateCheck(config, "AdamW", (64, 128), 10, scales)


def test_ratio_and_verdict() -> None:
    flat = check({"embedding": [1.0, FLAT_RATIO], "logits": [2.0, 2.0]})
    assert flat.ratios == {"embedding": FLAT_RATIO, "logits": 1.0}
    assert flat.verdict.startswith("flat: no activation changes its scale by more than 10% from width 64 to 128")
    steep = check({"embedding": [1.0, 1.0], "blocks.0": [1.0, 1.2], "logits": [4.0, 2.0]})
    assert steep.not_flat == ["blocks.0", "logits"]
    assert "2 of 3 activations change" in steep.verdict
    assert "most of all logits by a factor of 2" in steep.verdict
    assert "set --model.gpt.parametrisation mup --model.gpt.mup_base_width 64" in steep.verdict
    assert "optimizer_group" in check({"logits": [2.0, 4.0]}, MUP).verdict
    assert "compare wider models" in check({"logits": [4.0, 2.0]}, MUP).verdict
    assert str(steep).splitlines()[-1].split() == ["|", "logits", "|", "4", "|", "2", "|", "2.000", "|", "no", "|"]


def test_an_activation_that_is_not_finite_is_not_flat() -> None:
    found = check({"logits": [1.0, math.nan], "blocks.0": [math.nan, 1.0], "embedding": [1.0, math.inf]})
    assert found.not_flat == ["logits", "blocks.0", "embedding"]


def test_one_width_is_an_error() -> None:
    with pytest.raises(UserError, match="at least two widths"):
        check_coordinates(MUP, AdamW(), [64, 64])
