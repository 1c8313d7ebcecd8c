"""The default callbacks together."""

import pytest

from lit_gpt_scratch.callbacks.checkpointing import Checkpointing
from lit_gpt_scratch.callbacks.default_callbacks import default_callbacks
from lit_gpt_scratch.callbacks.introspection import ActivationStats
from lit_gpt_scratch.callbacks.signal_handling import SignalHandling
from lit_gpt_scratch.callbacks.summary import RunMetadata


def test_states_in_checkpoints_keep_their_names_of_0_1() -> None:
    checkpointing = Checkpointing()
    callbacks = default_callbacks(
        [RunMetadata()], ActivationStats(), SignalHandling(checkpointing), checkpointing, True, "act"
    )
    states = {callback.state_key for callback in callbacks if callback.state_dict()}
    assert states == {"Guard", "Throughput", "TrueReward", "Summary", "Checkpoints"}
    assert RunMetadata().state_key == "Provenance"


@pytest.mark.parametrize("saves", [True, False])
def test_checkpointing_comes_last_if_there_is_any(saves: bool) -> None:
    checkpointing = Checkpointing() if saves else None
    signals = SignalHandling(checkpointing)
    callbacks = default_callbacks([], ActivationStats(), signals, checkpointing, False, "off")
    assert callbacks[-1] is (checkpointing or signals)
