"""Token ids to batches."""

from lit_gpt_scratch.data.conversations import Conversations
from lit_gpt_scratch.data.labelled import LabelledText
from lit_gpt_scratch.data.packed_text import PackedText

__all__ = ["Conversations", "LabelledText", "PackedText"]
