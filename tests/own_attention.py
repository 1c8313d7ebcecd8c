"""A user's own attention, found by its path."""

from typing import Any

from torch import Tensor

from lit_gpt_scratch.model.attention import Attention


class Loud(Attention):
    """Every head twice as loud."""

    def attend(self, *args: Any) -> Tensor:
        return 2 * super().attend(*args)
