"""Conversion of checkpoints between one file and shards: equal contents, and memory for a few tensors."""

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from lit_gpt_scratch.checkpoint import convert_format
from lit_gpt_scratch.checkpoint.checkpoint_io import load_archive, save_checkpoint, verify_checksum
from lit_gpt_scratch.checkpoint.compare_checkpoints import iterate_leaves
from lit_gpt_scratch.checkpoint.convert_format import to_one_file, to_sharded
from lit_gpt_scratch.checkpoint.safetensors_export import export_safetensors, load_safetensors
from lit_gpt_scratch.checkpoint.sharded_checkpoint import ShardedCheckpoint, save_sharded
from lit_gpt_scratch.errors import UserError
from lit_gpt_scratch.interop.tensor_stream import LazyTensors


@pytest.fixture
def checkpoint() -> dict[str, Any]:
    """Checkpoint with several data types, a tied weight, an empty tensor and small tensors outside of the weights."""
    torch.manual_seed(0)
    tied = torch.randn(30, 7)
    weights = {
        "net.embedding.weight": tied, "net.head.weight": tied, "net.bias": torch.randn(5).to(torch.bfloat16),
        "net.empty": torch.zeros(0, 3), "net.counts": torch.arange(6).reshape(2, 3), "net.scale": torch.tensor(2.5),
    }  # fmt: skip
    moments = {0: {"exp_avg": torch.randn(30, 7, dtype=torch.float64), "step": torch.tensor(3.0)}, 2: {}}
    return {
        "lit_gpt_scratch": {"x": 1}, "state_dict": weights, "callbacks": {"a": {"values": torch.randn(4)}},
        "optimizer_states": [{"state": moments, "param_groups": [{"params": [0, 2]}]}], "global_step": 4,
    }  # fmt: skip


@pytest.mark.parametrize("mapped_bytes", [1, 2**28])
def test_checkpoint_survives_a_round_trip(
    checkpoint: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, mapped_bytes: int
) -> None:
    monkeypatch.setattr(convert_format, "MAPPED_BYTES", mapped_bytes)
    save_checkpoint(checkpoint, tmp_path / "one.ckpt")
    to_sharded(tmp_path / "one.ckpt", tmp_path / "sharded.ckpt")
    to_one_file(tmp_path / "sharded.ckpt", tmp_path / "two.ckpt")
    assert verify_checksum(tmp_path / "two.ckpt")
    expected = load_archive(tmp_path / "one.ckpt")
    for found in (
        ShardedCheckpoint.open(tmp_path / "sharded.ckpt").load(),
        load_archive(tmp_path / "two.ckpt"),
        torch.load(tmp_path / "two.ckpt", weights_only=True),
    ):
        leaves = [dict(iterate_leaves(each)) for each in (expected, found)]
        assert leaves[0].keys() == leaves[1].keys()
        for name, value in leaves[0].items():
            assert torch.equal(torch.as_tensor(leaves[1][name]), torch.as_tensor(value)), name
        assert found["state_dict"].keys() == checkpoint["state_dict"].keys()
        one, two = (found["state_dict"][f"net.{name}.weight"] for name in ("embedding", "head"))
        assert one.data_ptr() == two.data_ptr()
    assert abs((tmp_path / "two.ckpt").stat().st_size - (tmp_path / "one.ckpt").stat().st_size) < 1000


def test_export_of_shards_equals_that_of_one_file(checkpoint: dict[str, Any], tmp_path: Path) -> None:
    save_sharded(checkpoint, tmp_path / "sharded.ckpt")
    lazy = ShardedCheckpoint.open(tmp_path / "sharded.ckpt").load_lazily()
    assert isinstance(lazy["state_dict"], LazyTensors)
    export_safetensors(checkpoint, "net.", tmp_path / "one.safetensors")
    export_safetensors(lazy, "net.", tmp_path / "two.safetensors")
    assert (tmp_path / "one.safetensors").read_bytes() == (tmp_path / "two.safetensors").read_bytes()
    read_by_library, own = (
        load_file(tmp_path / "two.safetensors"),
        load_safetensors(tmp_path / "two.safetensors", "net."),
    )
    for name, weight in checkpoint["state_dict"].items():
        assert torch.equal(read_by_library[name.removeprefix("net.")], weight)
        assert torch.equal(own["state_dict"][name], weight)


def test_wrong_format_and_existing_output_are_refused(checkpoint: dict[str, Any], tmp_path: Path) -> None:
    save_checkpoint(checkpoint, tmp_path / "one.ckpt")
    save_sharded(checkpoint, tmp_path / "sharded.ckpt")
    with pytest.raises(UserError, match=r"one\.ckpt is not a sharded checkpoint"):
        to_one_file(tmp_path / "one.ckpt", tmp_path / "x")
    with pytest.raises(UserError, match=r"sharded\.ckpt is sharded already"):
        to_sharded(tmp_path / "sharded.ckpt", tmp_path / "x")
    for convert, source in ((to_one_file, "sharded.ckpt"), (to_sharded, "one.ckpt")):
        with pytest.raises(UserError, match="already exists"):
            convert(tmp_path / source, tmp_path / "one.ckpt")
    save_checkpoint({"lit_gpt_scratch": {}, "state_dict": [1]}, tmp_path / "foreign.ckpt")
    with pytest.raises(UserError, match="does not map names to tensors"):
        to_sharded(tmp_path / "foreign.ckpt", tmp_path / "x")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["foreign.ckpt", "one.ckpt", "sharded.ckpt"]


def test_type_that_cannot_be_exported_is_named(checkpoint: dict[str, Any], tmp_path: Path) -> None:
    checkpoint["state_dict"]["net.phase"] = torch.zeros(2, dtype=torch.complex64)
    with pytest.raises(UserError, match=r"phase has the data type torch\.complex64"):
        export_safetensors(checkpoint, "net.", tmp_path / "x.safetensors")
    assert not any(tmp_path.iterdir())
