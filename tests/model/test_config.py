"""Invalid and contradictory architecture settings."""

from typing import Any

import pytest

from lit_gpt_scratch.errors import UserError
from lit_gpt_scratch.model import GPTConfig

LONGROPE = {
    "head_dim": 4, "rotary_scaling": "longrope", "rotary_trained_context": 64, "rotary_short_factors": (1.0, 2.0),
    "rotary_long_factors": (1.0, 2.0),
}  # fmt: skip


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"n_embd": 190}, "n_embd (190) is not divisible by model.gpt.n_head (3)"),
        ({"n_kv_head": 2}, "n_head (3) is not divisible by model.gpt.n_kv_head (2)"),
        ({"position": "rotry"}, "model.gpt.position is rotry; it must be one of rotary, learned"),
        ({"feed_forward": "selu"}, "model.gpt.feed_forward is selu; it must be one of relu, relu2"),
        ({"n_layer": 0}, "model.gpt.n_layer is 0"),
        ({"n_head": -3}, "model.gpt.n_head is -3"),
        ({"n_kv_head": 0}, "model.gpt.n_kv_head is 0"),
        ({"head_dim": 33}, "33 of 33 channels would be rotated; choose another model.gpt.head_dim"),
        ({"dropout": 1.0}, "model.gpt.dropout is 1.0"),
        ({"dropout": -0.1}, "model.gpt.dropout is -0.1"),
        ({"logit_softcap": -1.0}, "model.gpt.logit_softcap is -1.0"),
        ({"parametrisation": "mup"}, "model.gpt.parametrisation is mup, but model.gpt.mup_base_width is not set; set"),
        ({"parametrisation": "mup", "mup_base_width": 0}, "model.gpt.mup_base_width is 0"),
        (
            {"parametrisation": "mup", "mup_base_width": 64, "scaled_embeddings": True},
            "scaled_embeddings is true, with which embeddings grow with the width, but model.gpt.parametrisation",
        ),
        ({"mup_base_width": 64}, "model.gpt.mup_base_width is 64, but model.gpt.parametrisation is standard; set"),
        ({"mup_base_head_dim": 64}, "model.gpt.mup_base_head_dim is 64, but model.gpt.parametrisation is standard"),
    ],
)
def test_invalid_config_is_an_error(changes: dict[str, float], message: str) -> None:
    with pytest.raises(UserError) as error:
        GPTConfig(**changes)  # type: ignore[arg-type]
    assert message in str(error.value)


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"n_embd": 190}, ("model.gpt.n_embd (190)", "model.gpt.n_head (3)", "model.gpt.head_dim")),
        ({"n_kv_head": 2}, ("model.gpt.n_head (3)", "model.gpt.n_kv_head (2)")),
        ({"rotary_factor": 2.0}, ("model.gpt.rotary_factor is 2.0", "model.gpt.rotary_scaling is not set")),
        (
            {"position": "learned", "rotary_scaling": "linear"},
            ("model.gpt.rotary_scaling is linear", "model.gpt.position is learned"),
        ),
        ({"position": "alibi", "rotary_share": 0.5}, ("model.gpt.rotary_share is 0.5", "model.gpt.position is alibi")),
        (
            {"position": "sinusoidal", "rotary_scaling": "ntk"},
            ("model.gpt.rotary_scaling is ntk", "model.gpt.position is sinusoidal"),
        ),
        ({"position": "none", "rotary_share": 0.5}, ("model.gpt.rotary_share is 0.5", "model.gpt.position is none")),
        (
            {"rotary_scaling": "yarn", "rotary_factor": 4.0},
            ("model.gpt.rotary_scaling is yarn", "model.gpt.rotary_trained_context is None"),
        ),
        (
            {"rotary_scaling": "llama3", "rotary_factor": 4.0},
            ("model.gpt.rotary_scaling is llama3", "model.gpt.rotary_trained_context is None"),
        ),
        (
            {"rotary_scaling": "linear", "rotary_factor": 4.0, "rotary_trained_context": 512},
            ("model.gpt.rotary_scaling is linear", "model.gpt.rotary_trained_context is 512"),
        ),
        (
            {"rotary_trained_context": 512},
            ("model.gpt.rotary_scaling is None", "model.gpt.rotary_trained_context is 512"),
        ),
        ({"rotary_share": 0.26}, ("model.gpt.position is rotary", "17 of 64 channels would be", "rotary_share")),
        ({"rotary_share": 1.5}, ("model.gpt.position is rotary", "96 of 64 channels would be", "rotary_share")),
        ({"head_dim": 2, "rotary_scaling": "ntk"}, ("model.gpt.rotary_scaling is ntk", "there are 2")),
        (
            {"head_dim": 2, "rotary_scaling": "dynamic", "rotary_trained_context": 64},
            ("model.gpt.rotary_scaling is dynamic", "there are 2"),
        ),
        (
            {"rotary_scaling": "dynamic", "rotary_factor": 2.0},
            ("model.gpt.rotary_scaling is dynamic", "model.gpt.rotary_trained_context is None", "yarn, dynamic or lon"),
        ),
        (
            {"rotary_scaling": "longrope", "rotary_trained_context": 64},
            ("model.gpt.rotary_scaling is longrope", "model.gpt.rotary_short_factors is None"),
        ),
        (
            {"rotary_long_factors": (1.0, 2.0)},
            ("model.gpt.rotary_scaling is None", "model.gpt.rotary_long_factors is set"),
        ),
        (LONGROPE | {"rotary_long_factors": (1.0,) * 3}, ("model.gpt.rotary_long_factors has 3 numbers", "list of 2")),
        (LONGROPE | {"rotary_short_factors": (1.0, -2.0)}, ("model.gpt.rotary_short_factors contains -2.0",)),
        (LONGROPE | {"rotary_trained_context": 1}, ("model.gpt.rotary_trained_context is 1", "longrope")),
        (
            LONGROPE | {"rotary_fast": 2.0},
            ("model.gpt.rotary_fast is 2.0", "model.gpt.rotary_scaling is longrope"),
        ),
        (
            {"rotary_scaling": "linear", "rotary_slow": 2.0},
            ("model.gpt.rotary_slow is 2.0", "model.gpt.rotary_scaling is linear"),
        ),
        (
            {"rotary_scaling": "llama3", "rotary_trained_context": 64, "rotary_slow": 4.0},
            ("model.gpt.rotary_slow is 4.0", "model.gpt.rotary_fast is 4.0"),
        ),
        (
            {"position": "learned", "rotary_trained_context": 64},
            ("model.gpt.rotary_trained_context is 64", "model.gpt.position is learned"),
        ),
        (
            {"rotary_scaling": "linear", "rotary_truncate": False},
            ("model.gpt.rotary_truncate is false", "model.gpt.rotary_scaling is linear", "only to yarn"),
        ),
        (
            {"position": "none", "rotary_truncate": False},
            ("model.gpt.rotary_truncate is False", "model.gpt.position is none"),
        ),
        (
            {"position": "none", "rotary_skip_every": 2},
            ("model.gpt.rotary_skip_every is 2", "model.gpt.position is none"),
        ),
        (
            {"sliding_window_pattern": 2},
            ("model.gpt.sliding_window_pattern is 2", "model.gpt.sliding_window is not set"),
        ),
        (
            {"sliding_window": 8, "sliding_window_pattern": 5},
            ("model.gpt.sliding_window_pattern is 5", "model.gpt.n_layer is 4", "no block would be global"),
        ),
        (
            {"sliding_window": 8, "sliding_window_pattern": 1},
            ("model.gpt.sliding_window_pattern is 1", "no block would use model.gpt.sliding_window"),
        ),
        (
            {"sliding_window": 8, "rotary_local_base": 100.0},
            ("model.gpt.rotary_local_base is 100.0", "model.gpt.sliding_window_pattern is not set"),
        ),
        (
            {"sliding_window": 8, "sliding_window_pattern": 2, "rotary_local_base": 1.0},
            ("model.gpt.rotary_local_base is 1.0", "greater than 1"),
        ),
        (
            {"position": "none", "rotary_local_base": 100.0},
            ("model.gpt.rotary_local_base is 100.0", "model.gpt.position is none"),
        ),
        ({"qk_norm": False, "qk_norm_joint": True}, ("qk_norm_joint is true", "model.gpt.qk_norm is false")),
        ({"rotary_base": 1.0}, ("model.gpt.rotary_base is 1.0", "greater than 1")),
        (
            {"n_embd": 15, "position": "sinusoidal"},
            ("model.gpt.position is sinusoidal", "model.gpt.n_embd is 15"),
        ),
        (
            {"attention_backend": "sdpa", "attention_softcap": 30.0},
            ("model.gpt.attention_backend is sdpa", "model.gpt.attention_softcap is 30.0"),
        ),
        (
            {"attention_backend": "flex", "dropout": 0.1},
            ("model.gpt.attention_backend is flex", "model.gpt.dropout is 0.1"),
        ),
    ],
)  # fmt: skip
def test_contradictory_settings_are_an_error_that_names_both(changes: dict[str, Any], named: tuple[str, ...]) -> None:
    with pytest.raises(UserError) as error:
        GPTConfig(**changes)
    assert [part for part in named if part not in str(error.value)] == []


@pytest.mark.parametrize(
    "switch",
    ["attention_backend", "position", "rotary_scaling", "norm", "norm_placement", "feed_forward", "initialisation"],
)
def test_unknown_choice_is_an_error_that_lists_the_choices(switch: str) -> None:
    with pytest.raises(UserError, match=rf"model\.gpt\.{switch} is quadratic; it must be one of \w+, \w+"):
        GPTConfig(**{switch: "quadratic"})  # type: ignore[arg-type]  # the error under test
