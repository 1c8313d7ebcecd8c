"""Errors of requests to the Hub are one line; all others are bugs, which keep their traceback."""

from typing import Any

import pytest
from huggingface_hub import HfApi
from huggingface_hub.errors import HTTPError, OfflineModeIsEnabled

from lit_gpt_scratch.errors import UserError
from lit_gpt_scratch.interop.hub_upload import require_hub_access


def fails_with(error: Exception) -> Any:
    def whoami(_: HfApi) -> None:
        raise error

    return whoami


@pytest.mark.parametrize("error", [HTTPError("no route"), TimeoutError("late"), OfflineModeIsEnabled("offline")])
def test_errors_of_the_network_are_explained(monkeypatch: pytest.MonkeyPatch, error: Exception) -> None:
    monkeypatch.setattr(HfApi, "whoami", fails_with(error))
    with pytest.raises(UserError, match=rf"^cannot log in to the Hub: {error}; check the network connection$"):
        require_hub_access("owner/name")


@pytest.mark.parametrize("error", [TypeError, KeyError, AttributeError, AssertionError, ValueError])
def test_bugs_are_not_reported_as_errors_of_the_network(
    monkeypatch: pytest.MonkeyPatch, error: type[Exception]
) -> None:
    monkeypatch.setattr(HfApi, "whoami", fails_with(error("a bug")))
    with pytest.raises(error, match="a bug"):
        require_hub_access("owner/name")
