"""Models with different start-of-text and end-of-text tokens."""

import json
import math
from pathlib import Path

import pytest
import torch
from tokenizers import Tokenizer as Backend
from tokenizers import processors

from lit_gpt_scratch.checkpoint.loading import load_model
from lit_gpt_scratch.cli import convert
from lit_gpt_scratch.evaluation.perplexity import score_documents
from lit_gpt_scratch.interop.hf_checkpoint import read_hf_checkpoint
from lit_gpt_scratch.text.tokenizer import Tokenizer
from tests.conftest import sentences
from tests.interop.conftest import Published, library


@pytest.fixture
def with_start(published: Published, tokenizer: Tokenizer) -> tuple[torch.nn.Module, Path, int]:
    """A Llama whose tokenizer prepends ``<|begin_of_text|>`` to each text."""
    model, folder = published("llama")
    backend = Backend.from_str(tokenizer.to_json())
    backend.add_special_tokens(["<|begin_of_text|>"])
    start = backend.token_to_id("<|begin_of_text|>")
    backend.post_processor = processors.TemplateProcessing(
        single="<|begin_of_text|> $A", special_tokens=[("<|begin_of_text|>", start)]
    )
    (folder / "tokenizer.json").write_text(backend.to_str())
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"bos_token_id": start}))
    return model, folder, start


def test_texts_are_scored_after_the_start_of_text(
    with_start: tuple[torch.nn.Module, Path, int], tmp_path: Path
) -> None:
    model, folder, start = with_start
    convert.main(["from-hf", str(folder), str(tmp_path / "a.ckpt")])
    ours, tokenizer = load_model(tmp_path / "a.ckpt")
    assert tokenizer.start_of_text == start != tokenizer.end_of_text
    text = sentences(3, n=3)
    ids = torch.tensor([Backend.from_file(str(folder / "tokenizer.json")).encode(text).ids])
    assert ids[0, 0] == start
    with torch.no_grad():
        chances = model(ids).logits[0, :-1].log_softmax(-1).gather(1, ids[0, 1:, None])
    assert ids.size(1) <= ours.block_size
    bits = -chances.sum().item() / math.log(2) / len(text.encode())
    assert score_documents(ours, tokenizer, [text])["bits_per_byte"] == pytest.approx(bits, rel=1e-5)


def test_start_of_text_survives_a_round_trip(with_start: tuple[torch.nn.Module, Path, int], tmp_path: Path) -> None:
    _, folder, start = with_start
    convert.main(["from-hf", str(folder), str(tmp_path / "a.safetensors")])
    convert.main(["to-hf", str(tmp_path / "a.safetensors"), str(tmp_path / "again")])
    config = json.loads((tmp_path / "again/config.json").read_text())
    assert (config["bos_token_id"], config["eos_token_id"]) == (start, 0)
    reference = library().AutoTokenizer.from_pretrained(tmp_path / "again")
    assert (reference.bos_token_id, reference.eos_token_id) == (start, 0)
    assert reference("the cat").input_ids[0] == start


@pytest.mark.parametrize(("bos_token_id", "start"), [(7, 7), (None, 0), (10_000, 0), ("7", 0)])
def test_start_of_text_from_the_config(published: Published, bos_token_id: object, start: int) -> None:
    _, folder = published("llama")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"bos_token_id": bos_token_id}))
    assert read_hf_checkpoint(folder).tokenizer.start_of_text == start
