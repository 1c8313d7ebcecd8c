"""``evaluate``: how well a trained model predicts a text."""

import json
import logging
from collections.abc import Sequence

from lit_gpt_scratch.cli.door import Flags, find_model
from lit_gpt_scratch.evaluation.scoring import score
from lit_gpt_scratch.text.sources import documents

log = logging.getLogger(__name__)


def main(args: Sequence[str] | None = None) -> None:
    """The door ``evaluate``: figures on standard output, as lines or as one JSON object."""
    flags = Flags(prog="python -m lit_gpt_scratch.evaluate", description="Score a text with a trained model.")
    flags.add_checkpoint()
    flags.add_argument("--data.source", dest="source", required=True, help="a text file, a folder, rows, or 'stdlib'")
    flags.add_argument("--data.text_column", dest="column", default="text", help="of a source with columns")
    flags.add_argument("--json", action="store_true", help="print one JSON object")
    given = flags.parse_args(args)
    texts = (document.text for document in documents(given.source, given.column))
    model, tokenizer = find_model(given)
    if tokenizer.loss:
        log.warning("the figures are of what the tokenizer keeps: %s", tokenizer.loss)
    figures = score(model, tokenizer, texts)
    if given.json:
        print(json.dumps(figures))
    else:
        for name, value in figures.items():
            print(f"{name:<14} {value:,.4f}" if isinstance(value, float) else f"{name:<14} {value:,}")
