"""Labels of multi-token prediction against a loop over positions."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from lit_gpt_scratch.batch_types import IGNORE_INDEX
from lit_gpt_scratch.losses.labels_ahead import labels_ahead

START, END = 0, 1


@st.composite
def rows(draw: st.DrawFn, start: int) -> tuple[list[int], list[int], list[int]]:
    """A row of a packed token stream: ids, next tokens of which some are ignored, and the document of each token."""
    documents = draw(st.lists(st.lists(st.integers(2, 9), max_size=5), min_size=1, max_size=6))
    # If one token separates the documents, the last one is a label of the last document.
    tokens = [(t, n) for n, d in enumerate(documents) for t in ([start, *d] if start == END else [start, *d, END])]
    tokens.append((start, len(documents)))
    ignored = draw(st.sets(st.integers(0, len(tokens))))
    labels = [IGNORE_INDEX if t in ignored else tokens[t + 1][0] for t in range(len(tokens) - 1)]
    return [token for token, _ in tokens[:-1]], labels, [document for _, document in tokens]


@pytest.mark.parametrize("start", [START, END])
@pytest.mark.parametrize("known", [True, False])
@given(data=st.data(), depth=st.integers(1, 5))
def test_labels_are_those_of_the_same_document(start: int, known: bool, data: st.DataObject, depth: int) -> None:
    """Whether the documents are given or found by their first tokens."""
    ids, labels, documents = data.draw(rows(start))
    expected = []
    for t in range(len(ids) - depth):
        label, inside = labels[t + depth], documents[t] == documents[t + depth]
        # The token after a document belongs to the next one, unless it is the end-of-text token.
        ends_here = start == END or documents[t] == documents[t + depth + 1]
        expected.append(label if inside and ends_here else IGNORE_INDEX)
    given_documents = torch.tensor([documents[:-1]]) if known else None
    found = labels_ahead(torch.tensor([ids]), torch.tensor([labels]), depth, given_documents, start, END)
    assert found.tolist() == [expected]


def test_parts_of_documents_that_do_not_follow_each_other() -> None:
    """The part 4 5 6 continues with 7, not with 8."""
    ids, labels = torch.tensor([[4, 5, 6, 8, 9, 2]]), torch.tensor([[5, 6, 7, 9, 2, 3]])
    assert labels_ahead(ids, labels, 1, None, START, END).tolist() == [[6, 7, -100, 2, 3]]
    assert labels_ahead(ids, labels, 2, None, START, END).tolist() == [[7, -100, -100, 3]]


@pytest.mark.parametrize("depth", [3, 4, 9])
def test_rows_that_are_too_short_have_no_labels(depth: int) -> None:
    assert labels_ahead(torch.zeros(2, 3).long(), torch.ones(2, 3).long(), depth).shape == (2, 0)
