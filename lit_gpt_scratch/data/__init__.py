"""Token ids to batches."""

from lit_gpt_scratch.data.packed_text import PackedText

__all__ = ["PackedText"]
