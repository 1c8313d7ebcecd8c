"""What all commands share: the choice of a device."""

import pytest
import torch

from lit_gpt_scratch.cli.entrypoint import find_device
from lit_gpt_scratch.errors import UserError


@pytest.mark.parametrize(
    ("cuda", "mps", "expected"), [(True, False, "cuda"), (False, True, "mps"), (False, False, "cpu")]
)
def test_auto_takes_a_gpu_if_there_is_one(
    monkeypatch: pytest.MonkeyPatch, cuda: bool, mps: bool, expected: str
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: cuda)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: mps)
    assert find_device("auto") == expected
    assert find_device("cpu") == "cpu"
    if cuda:
        assert find_device("cuda:1") == "cuda:1"
    else:
        with pytest.raises(UserError, match="--device: cuda:1 is not available on this machine; use auto or cpu"):
            find_device("cuda:1")


def test_unknown_devices_are_rejected() -> None:
    with pytest.raises(UserError, match="--device: tpu is not valid; use one of auto, cpu"):
        find_device("tpu")
