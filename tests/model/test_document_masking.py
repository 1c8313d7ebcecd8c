"""With document masking a document's logits do not depend on others in its window; without it they do."""

import itertools
from dataclasses import replace
from pathlib import Path
from typing import get_args

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from lit_gpt_scratch.batch_types import IGNORE_INDEX
from lit_gpt_scratch.data.packed_dataset import PackedDataset
from lit_gpt_scratch.data.packing import PACKING_POLICIES, PackingPolicy, plan_packing
from lit_gpt_scratch.model import GPTConfig
from lit_gpt_scratch.model import attention as layout_module
from lit_gpt_scratch.model.attention import build_attention_layout
from lit_gpt_scratch.model.config import PositionName
from lit_gpt_scratch.model.positions import PositionEncoding
from tests.conftest import randomised, token_stream

VOCAB, T = 61, 24
POSITIONS = get_args(PositionName)
LOOKS_BACK = {"smear": True, "bigram_rows": 50, "value_embeddings": True, "residual_scalars": True}
"""The other modules that depend on the previous token."""


def windows(folder: Path, texts: list[list[int]], policy: PackingPolicy, mask: bool) -> PackedDataset:
    return PackedDataset(
        [plan_packing(token_stream(folder, [[0, *text] for text in texts]), T, policy, folder)], T, VOCAB, 0, mask
    )


def texts(seed: int) -> list[list[int]]:
    rng = np.random.default_rng(seed)
    return [rng.integers(1, VOCAB, n).tolist() for n in (9, 30, 6, 5, 11, 3, 4, 15, 7, 2, 2, 40)]


@pytest.mark.parametrize("extras", [{}, LOOKS_BACK], ids=["plain", "looks-back"])
@pytest.mark.parametrize("position", POSITIONS)
@pytest.mark.parametrize("policy", PACKING_POLICIES)
def test_tokens_of_other_documents_do_not_change_logits(
    tmp_path: Path, policy: PackingPolicy, position: PositionName, extras: dict[str, object]
) -> None:
    """Change each document in turn: the others' logits stay bitwise the same; without the mask some change."""
    config = replace(GPTConfig(n_layer=2, n_head=2, n_embd=16, position=position), **extras)
    model = randomised(config, VOCAB, T)
    moved = {True: 0, False: 0}

    def read(folder: Path, documents: list[list[int]], mask: bool) -> tuple[dict[str, torch.Tensor], torch.Tensor]:
        """All windows as one batch, with their logits."""
        found = windows(folder, documents, policy, mask)
        each = [found[index] for index in range(len(found))]
        batch = {name: torch.cat([window[name] for window in each]) for name in each[0]}
        with torch.no_grad():
            return batch, model(batch["input_ids"], batch.get("document_ids"))

    for mask in (True, False):
        a, before = read(tmp_path / f"{mask}", texts(0), mask)
        padding = (a["input_ids"] == 0) & (a["labels"] == IGNORE_INDEX)
        for changed in range(12):
            other = texts(0)
            other[changed] = [1 + token % (VOCAB - 1) for token in other[changed]]
            b, after = read(tmp_path / f"{mask}-{changed}", other, mask)
            its_own = a["input_ids"] != b["input_ids"]  # (B, T), except its first token, which does not see the rest
            moved[mask] += int((before != after).any(-1)[~its_own & ~padding].sum())
    assert moved[True] == 0
    assert (moved[False] > 0) == (policy != "one_document")  # where each document has its own window


@pytest.mark.parametrize("position", POSITIONS)
@pytest.mark.parametrize("policy", PACKING_POLICIES)
def test_packed_document_has_the_logits_of_a_separate_one(
    tmp_path: Path, policy: PackingPolicy, position: PositionName
) -> None:
    """For any documents of any length before it."""
    config = replace(GPTConfig(n_layer=2, n_head=2, n_embd=16, position=position), **LOOKS_BACK)
    model = randomised(config, VOCAB, T)
    batches = windows(tmp_path, texts(0), policy, mask=True)
    seen = 0
    for index in range(len(batches)):
        batch = batches[index]
        with torch.no_grad():
            together = model(batch["input_ids"], batch["document_ids"])[0]
        ids = batch["document_ids"][0]
        for document in ids.unique():
            where = ids == document
            with torch.no_grad():
                alone = model(batch["input_ids"][:, where])[0]
            torch.testing.assert_close(together[where], alone, atol=2e-4, rtol=2e-4)
            seen += 1
    assert seen > 12


@given(st.lists(st.lists(st.integers(0, 3), min_size=10, max_size=10), min_size=1, max_size=3))
def test_mask_and_positions_match_their_definition(rows: list[list[int]]) -> None:
    ids = torch.tensor([sorted(row) for row in rows])
    config = GPTConfig()
    found = build_attention_layout(config, PositionEncoding(config, 10), torch.zeros_like(ids), ids, None)
    for b, t in itertools.product(range(len(rows)), range(10)):
        mine = [place for place in range(10) if ids[b, place] == ids[b, t]]
        assert found.positions[b, t] == mine.index(t)
        assert found.mask[b, 0, t].tolist() == [place in mine and place <= t for place in range(10)]


@pytest.mark.slow
def test_compiled_blocks_accept_a_block_mask(monkeypatch: pytest.MonkeyPatch) -> None:
    """As on a GPU, as far as a CPU can: compiled, forward only."""
    model = randomised(GPTConfig(n_layer=2, n_head=2, n_embd=32), VOCAB, T)
    input_ids, document_ids = torch.randint(1, VOCAB, (2, T)), torch.randint(0, 4, (2, T)).sort(dim=1).values
    with torch.no_grad():
        expected = model(input_ids, document_ids)
        monkeypatch.setattr(layout_module, "can_use_flex_attention", lambda *_: True)
        for block in model.blocks:
            block.compile()
        torch.testing.assert_close(model(input_ids, document_ids), expected, atol=1e-4, rtol=1e-4)
