"""Labels for multi-token prediction: tokens further ahead than the next one, within the same document."""

import torch
from torch import Tensor

from lit_gpt_scratch.batch_types import IGNORE_INDEX


def labels_ahead(
    input_ids: Tensor,
    labels: Tensor,
    depth: int,
    document_ids: Tensor | None = None,
    start_of_text: int | None = None,
    end_of_text: int | None = None,
) -> Tensor:
    """Return the label of each position that is ``depth`` tokens further ahead than its next token.

    A label is ignored if it is ignored as the next token, or if it does not belong to the document of the position. If
    the documents are not given, one begins at each start-of-text token, and where the next token in the row is not the
    label of the token before, because tokens of another part of the corpus follow. The second rule does not apply to
    ignored labels.

    Args:
        input_ids: Token ids, int64 tensor of shape (B, T).
        labels: Next tokens, int64 tensor of shape (B, T); ``IGNORE_INDEX`` (-100) where they are ignored.
        depth: Number of tokens between the next token and the label, at least 1.
        document_ids: Id of the document that contains each token, int64 tensor of shape (B, T), or None.
        start_of_text: Id of the token before each document, if known.
        end_of_text: Id of the token after each document, if known. If both ids are the same, the token before a
            document is also a label of the previous document.

    Returns:
        The labels of the first T - ``depth`` positions, int64 tensor of shape (B, max(T - depth, 0)).
    """
    if document_ids is None:
        begins = torch.zeros_like(input_ids, dtype=torch.bool) if start_of_text is None else input_ids == start_of_text
        follows = (labels[:, :-1] == input_ids[:, 1:]) | (labels[:, :-1] == IGNORE_INDEX)
        document_ids = torch.cat((begins[:, :1], begins[:, 1:] | ~follows), dim=1).cumsum(1)
    ahead = labels[:, depth:]  # (B, T - depth)
    same = document_ids[:, depth:] == document_ids[:, : max(labels.size(1) - depth, 0)]
    if start_of_text is not None and start_of_text != end_of_text:
        same = same & (ahead != start_of_text)
    return torch.where(same, ahead, IGNORE_INDEX)
