"""Data modules that convert text and token ids to batches."""

from lit_gpt_scratch.data.conversations import Conversations
from lit_gpt_scratch.data.labelled_text import LabelledText
from lit_gpt_scratch.data.packed_text import PackedText
from lit_gpt_scratch.data.preferences import Preferences
from lit_gpt_scratch.data.prompts import Prompts

__all__ = ["Conversations", "LabelledText", "PackedText", "Preferences", "Prompts"]
