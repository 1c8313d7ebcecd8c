"""Format evaluation results as a table, and save them in the run folder."""

import hashlib
import json
import logging
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final

from lit_gpt_scratch.checkpoint.run_folder import RunFolder
from lit_gpt_scratch.text.atomic_files import write_atomically
from lit_gpt_scratch.text.markdown import format_markdown_table

log = logging.getLogger(__name__)

RESULTS_FOLDER: Final = "evaluations"
"""Name of the subfolder for evaluation results in a run folder.

TensorBoard shows the subfolder as a separate run. If newer event files were in the run folder itself, TensorBoard would
stop following a run that is still training.
"""


def format_results(result: Mapping[str, Any]) -> str:
    """Format the output of ``EvalResult.to_dict`` as a table with 95% confidence intervals.

    If metrics of the uncontaminated ("clean") rows are available, the table also includes them.
    """
    contamination = result.get("contamination")
    clean = contamination and contamination["clean"]
    lines = [["metric", "value", "95% interval"] + (["clean rows", "95% interval"] if clean else [])]
    for name, value in result.items():
        if isinstance(value, int | float):
            cells = [name, _format_number(value), _format_interval(result["intervals"].get(name))]
            lines.append(
                cells + ([_format_number(clean[name]), _format_interval(clean["intervals"].get(name))] if clean else [])
            )
    sections = [format_markdown_table(lines, "<>>>>" if clean else "<>>")]
    if result["intervals_of"] == "parts":
        sections.append(
            "with few documents, the intervals are estimated from windows and are too narrow, because windows are "
            "correlated"
        )
    if "confusion" in result:
        names = list(result["confusion"])
        counts = [[name, *map(_format_number, result["confusion"][name].values())] for name in names]
        sections.append(format_markdown_table([["true \\ predicted", *names], *counts], "<" + ">" * len(names)))
    if contamination:
        share = f"{contamination['share']:.1%}, 95% interval {_format_interval(contamination['interval'])}"
        sections.append(
            f"{contamination['rows']:,} of {result['rows']:,} rows ({share}) were found in the training data"
        )
    return "\n\n".join(sections)


def save_results(folder: RunFolder, name: str, request: Mapping[str, Any], result: Mapping[str, Any]) -> None:
    """Write ``evaluations/<name>-<digest>.json`` and TensorBoard scalars ``eval/<name>/...`` into a run's folder.

    The digest is a hash of the request, so an earlier result is overwritten only if the same request is repeated.

    Args:
        folder: Run folder.
        name: Name of the result, composed of the task and source names.
        request: JSON-serializable evaluation options, including the ``step`` of the checkpoint.
        result: Metrics keyed by name; only finite numbers are logged to TensorBoard.
    """
    digest = hashlib.sha256(json.dumps(request, sort_keys=True).encode()).hexdigest()[:8]
    path = folder.path / RESULTS_FOLDER / f"{name}-{digest}.json"
    try:
        path.parent.mkdir(exist_ok=True)
        write_atomically(path, json.dumps({"asked": request, **result}, indent=2, ensure_ascii=False))
        _write_scalars(path.parent, name, result, request["step"])
    except OSError as error:  # e.g. the run belongs to another user; the result is still printed
        log.warning("cannot write %s (%s); the results were not saved", path, error.strerror)
    else:
        log.info("results saved to %s", path)


def _write_scalars(folder: Path, name: str, result: Mapping[str, Any], step: int) -> None:
    from torch.utils.tensorboard import SummaryWriter

    with SummaryWriter(str(folder)) as writer:
        for metric, value in result.items():
            if isinstance(value, int | float) and math.isfinite(value):
                writer.add_scalar(f"eval/{name}/{metric}", value, step)


def _format_number(value: float | None) -> str:
    if value is None:
        return ""
    return f"{value:,}" if isinstance(value, int) else f"{value:,.4f}"


def _format_interval(ends: tuple[float, float] | None) -> str:
    return "" if ends is None else f"{ends[0]:,.4f} to {ends[1]:,.4f}"
