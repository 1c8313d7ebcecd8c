"""Scores for people, and kept beside the run that they are of."""

import hashlib
import json
import logging
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final

from lit_gpt_scratch.checkpoint.run_folder import RunFolder
from lit_gpt_scratch.text.atomic_files import atomic_file
from lit_gpt_scratch.text.markdown_table import format_markdown_table

log = logging.getLogger(__name__)

RESULTS_FOLDER: Final = "evaluations"
"""In a run's folder. TensorBoard shows it as a run of its own: with newer events beside its own, it would no longer
follow a run that still trains."""


def format_results(answer: Mapping[str, Any]) -> str:
    """An answer as ``Answer.to_dict`` gives it, for a terminal: values, 95% intervals, and those of clean rows."""
    contamination = answer.get("contamination")
    clean = contamination and contamination["clean"]
    lines = [["score", "value", "95% interval"] + (["clean rows", "95% interval"] if clean else [])]
    for name, value in answer.items():
        if isinstance(value, int | float):
            cells = [name, _format_number(value), _format_interval(answer["intervals"].get(name))]
            lines.append(
                cells + ([_format_number(clean[name]), _format_interval(clean["intervals"].get(name))] if clean else [])
            )
    found = [format_markdown_table(lines, "<>>>>" if clean else "<>>")]
    if answer["intervals_of"] == "parts":
        found.append(
            "of so few documents, intervals are from the spread among windows; these are alike, so they are too narrow"
        )
    if "confusion" in answer:
        names = list(answer["confusion"])
        counts = [[name, *map(_format_number, answer["confusion"][name].values())] for name in names]
        found.append(format_markdown_table([["true \\ given", *names], *counts], "<" + ">" * len(names)))
    if contamination:
        share = f"{contamination['share']:.1%}, 95% interval {_format_interval(contamination['interval'])}"
        found.append(f"{contamination['rows']:,} of {answer['rows']:,} rows ({share}) stand in what was trained on")
    return "\n\n".join(found)


def save_results(folder: RunFolder, name: str, asked: Mapping[str, Any], answer: Mapping[str, Any]) -> None:
    """Write ``evaluations/<name>-<digest>.json`` and TensorBoard scalars ``eval/<name>/...`` into a run's folder.

    The digest is of what was asked: another question never takes the place of an answer, the same one does.

    Args:
        folder: The run's.
        name: What was evaluated, and on what.
        asked: Plain data, with the ``step`` of the checkpoint.
        answer: Figures by name; what is no number is not for TensorBoard.
    """
    digest = hashlib.sha256(json.dumps(asked, sort_keys=True).encode()).hexdigest()[:8]
    path = folder.path / RESULTS_FOLDER / f"{name}-{digest}.json"
    try:
        path.parent.mkdir(exist_ok=True)
        with atomic_file(path) as file:
            file.write(json.dumps({"asked": asked, **answer}, indent=2, ensure_ascii=False).encode())
        _write_scalars(path.parent, name, answer, asked["step"])
    except OSError as error:  # somebody else's run, say; the answer has been printed
        log.warning("not kept: cannot write %s (%s)", path, error.strerror)
    else:
        log.info("kept in %s", path)


def _write_scalars(folder: Path, name: str, answer: Mapping[str, Any], step: int) -> None:
    from torch.utils.tensorboard import SummaryWriter

    with SummaryWriter(str(folder)) as writer:
        for figure, value in answer.items():
            if isinstance(value, int | float) and math.isfinite(value):
                writer.add_scalar(f"eval/{name}/{figure}", value, step)


def _format_number(value: float | None) -> str:
    if value is None:
        return ""
    return f"{value:,}" if isinstance(value, int) else f"{value:,.4f}"


def _format_interval(ends: tuple[float, float] | None) -> str:
    return "" if ends is None else f"{ends[0]:,.4f} to {ends[1]:,.4f}"
