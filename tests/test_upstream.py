"""What this package relies on in torch and TensorBoard; Lightning's part is in ``test_lightning_compat.py``."""

import zipfile
from pathlib import Path

import torch
from torch.utils.tensorboard import SummaryWriter

from lit_gpt_scratch.checkpoint.compare_checkpoints import read_curves
from lit_gpt_scratch.checkpoint.run_folder import RunFolder


def test_a_torch_checkpoint_is_a_zip_archive_whose_comment_is_ignored(tmp_path: Path) -> None:
    torch.save({"x": torch.ones(3)}, tmp_path / "x")
    with zipfile.ZipFile(tmp_path / "x", "a") as archive:
        assert archive.comment == b""
        archive.comment = b"sha256:" + b"0" * 64
    assert torch.load(tmp_path / "x", weights_only=True)["x"].sum() == 3


def test_tensorboard_purges_points_from_the_purge_step_on(tmp_path: Path) -> None:
    """Points of an earlier session are purged from where the next one begins, if the first also set a purge step."""
    for first, purge in ((0, 0), (3, 3)):
        RunFolder(tmp_path).order_events()
        with SummaryWriter(str(tmp_path), purge_step=purge) as writer:
            for step in range(first, first + 5):
                writer.add_scalar("x", first, step)
    assert read_curves(tmp_path) == {"x": [(n, "0.0") for n in range(3)] + [(n, "3.0") for n in range(3, 8)]}
