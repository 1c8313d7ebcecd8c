"""``evaluate``: evaluate a trained model on text, a task or a benchmark."""

import argparse
import logging
from argparse import Namespace
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any, Final

from lit_gpt_scratch.checkpoint.metadata import CheckpointMetadata
from lit_gpt_scratch.checkpoint.run_folder import RunFolder, find_checkpoint
from lit_gpt_scratch.cli.entrypoint import CommandParser, load_trained_model, validate_utf8
from lit_gpt_scratch.errors import UserError
from lit_gpt_scratch.evaluation.classification_eval import classify
from lit_gpt_scratch.evaluation.registry import EVAL_TASKS, EvalRequest, evaluate, summary_to_dict
from lit_gpt_scratch.evaluation.results_table import format_results, save_results
from lit_gpt_scratch.model import GPT
from lit_gpt_scratch.model.output_heads import ClassificationHead
from lit_gpt_scratch.terminal_output import dump_json
from lit_gpt_scratch.text.markdown import format_markdown_table
from lit_gpt_scratch.text.tokenizer import Tokenizer
from lit_gpt_scratch.trust import UntrustedCodeError, require_trusted

log = logging.getLogger(__name__)

CONTRACT: Final = ("loss", "perplexity", "bits_per_byte", "tokens", "bytes")
"""Keys that ``--json`` prints if neither ``--task`` nor any task option is set; scripts rely on exactly these keys."""
OPTIONS: Final[dict[str, tuple[str, dict[str, Any]]]] = {
    "limit": ("--limit", {"type": int, "help": "maximum number of rows or documents to evaluate"}),
    "against": (
        "--against",
        {
            "metavar": "SOURCE",
            "help": "training text (as for --data.source) or token store; report how many evaluated rows it contains",
        },
    ),
    "text_column": ("--data.text_column", {"metavar": "NAME", "help": "column that contains the text (default: text)"}),
    "label_column": (
        "--data.label_column",
        {"metavar": "NAME", "help": "column that contains the class (default: label)"},
    ),
    "window": ("--window", {"type": int, "help": "maximum number of tokens per window (default: the context length)"}),
    "stride": (
        "--stride",
        {"type": int, "help": "number of tokens between window starts (default: the window length)"},
    ),
    "few_shot": (
        "--few_shot",
        {"type": int, "help": "number of rows at the start of the source to use as few-shot examples (default: 0)"},
    ),
    "max_new_tokens": (
        "--max_new_tokens",
        {"type": int, "help": "maximum number of tokens to generate (default: 200)"},
    ),
    "stop": ("--stop", {"action": "append", "help": "stop generating before this string; may be repeated"}),
    "include_path": (
        "--include_path",
        {
            "type": Path,
            "metavar": "DIR",
            "help": "folder with YAML files that define additional benchmarks; requires --trust DIR",
        },
    ),
}
"""Flags and their ``add_argument`` arguments, keyed by option name; ``EVAL_TASKS`` lists the options of each task."""


def main(args: Sequence[str] | None = None) -> None:
    """Run the ``evaluate`` command: print metrics as a table or as one JSON object."""
    tasks = "; ".join(f"{name}: {kind.description}" for name, kind in EVAL_TASKS.items())
    flags = CommandParser(prog="python -m lit_gpt_scratch.evaluate", description="Evaluate a trained model.")
    flags.add_checkpoint_arguments()
    asked = flags.add_mutually_exclusive_group()
    asked.add_argument(
        "--data.source", dest="source", help="data to evaluate on: a text file, a folder, a file of rows, or 'stdlib'"
    )
    asked.add_argument("--benchmark", metavar="NAME[,NAME]", help="lm-eval tasks to run (requires the [eval] extra)")
    asked.add_argument("--text", action="append", help="text to classify; may be repeated")
    flags.add_argument("--task", choices=EVAL_TASKS, default=argparse.SUPPRESS, help=f"{tasks} (default: text)")
    for name, (flag, settings) in OPTIONS.items():
        flags.add_argument(flag, dest=name, default=argparse.SUPPRESS, **settings)
    flags.add_argument("--json", action="store_true", help="print one JSON object")
    given = flags.parse_args(args)
    validate_utf8(given, "text", "stop")
    if given.text is not None:
        _validate_flags(given, "--text", ())
        _classify(given)
    elif given.benchmark is not None:
        _validate_flags(given, "--benchmark", ("few_shot", "limit", "include_path"))
        _benchmark(given)
    elif given.source is not None:
        task = getattr(given, "task", "text")
        _validate_flags(given, f"--task {task}", ("task", "limit", "against", *EVAL_TASKS[task].flags))
        _evaluate(given, task)
    else:
        raise UserError("nothing to evaluate; use --data.source, --benchmark or --text (see --help)")


def _validate_flags(given: Namespace, what: str, takes: Sequence[str]) -> None:
    """Reject flags that would have no effect, and values that are out of range."""
    for name, flag in [("task", "--task"), *((name, flag) for name, (flag, _) in OPTIONS.items())]:
        if name in given and name not in takes:
            raise UserError(f"argument {flag} has no effect with {what}; omit it")
    for name, least in (("limit", 1), ("few_shot", 0), ("max_new_tokens", 1)):
        if name in given and getattr(given, name) < least:
            raise UserError(f"argument {OPTIONS[name][0]} is {getattr(given, name)}; it must be {least} or more")


def _evaluate(given: Namespace, task: str) -> None:
    options = {name: getattr(given, name) for name in OPTIONS if name in given}
    asked = EvalRequest(given.source, **options | {"stop": tuple(options.get("stop", ()))})
    kind = EVAL_TASKS[task]
    kind.read(asked)  # report a missing source before loading the model
    model, tokenizer, contents = _open_checkpoint(given)
    classes = tuple(contents.classes or ())
    classifies = isinstance(model.output_head, ClassificationHead)
    if kind.needs_classifier != classifies:
        has = f"classifies into {len(classes)} classes" if classifies else "predicts tokens"
        suits = ", ".join(name for name, other in EVAL_TASKS.items() if other.needs_classifier == classifies)
        raise UserError(
            f"argument --task: {task} is not supported for {given.checkpoint}, which {has}; use one of {suits}"
        )
    request = replace(asked, classes=classes, pooling=contents.pooling or "last", windows=contents.windows)
    answer = evaluate(task, model, tokenizer, request).to_dict()
    bare = {name: answer[name] for name in CONTRACT} if not options and "task" not in given else answer
    _store_results(given, f"{task}-{Path(given.source).stem}", {"task": task, **asdict(asked)}, answer)
    _print_results(given, bare, answer)


def _benchmark(given: Namespace) -> None:
    try:
        from lit_gpt_scratch.evaluation import lm_eval_adapter
    except ImportError as error:
        raise UserError(f"argument --benchmark: {error}; install it with: pip install -e '.[eval]'") from error
    names = given.benchmark.split(",")
    options = {name: getattr(given, name) for name in ("few_shot", "limit", "include_path") if name in given}
    if "include_path" in given:
        try:
            trusted = {str(Path(each)) for each in given.trust or ()}  # without a trailing slash
            require_trusted(str(given.include_path), trusted, given.include_path)
        except UntrustedCodeError as error:
            raise UserError(
                f"argument --include_path: lm-eval runs the code in the task files of {error.name}; "
                f"if you trust it, pass --trust {error.name}"
            ) from error
    model, tokenizer, _ = _open_checkpoint(given)
    if isinstance(model.output_head, ClassificationHead):
        raise UserError(
            f"argument --benchmark: {given.checkpoint} is a classifier; benchmarks require a language model"
        )
    found = lm_eval_adapter.run_lm_eval(model, tokenizer, names, **options)
    answers = {name: summary_to_dict(scores) for name, scores in found.items()}
    for name, answer in answers.items():
        _store_results(given, name, {"benchmark": name, **{key: str(value) for key, value in options.items()}}, answer)
    if given.json:
        print(dump_json(answers))
        return
    for name, answer in answers.items():
        print(f"{name}\n{format_results(answer)}\n")


def _classify(given: Namespace) -> None:
    model, tokenizer, contents = _open_checkpoint(given)
    if not isinstance(model.output_head, ClassificationHead):
        raise UserError(f"argument --text: {given.checkpoint} is a language model; --text requires a classifier")
    probabilities = classify(model, tokenizer, given.text, contents.pooling or "last", contents.windows)
    for text, row in zip(given.text, probabilities.tolist(), strict=True):
        chances = dict(sorted(zip(contents.classes or (), row, strict=True), key=lambda each: -each[1]))
        if given.json:
            result = {"text": text, "class": next(iter(chances)), "probabilities": chances}
            print(dump_json(result))
        else:
            lines = [["class", "probability"], *([name, f"{chance:.4f}"] for name, chance in chances.items())]
            print(f"{text}\n{format_markdown_table(lines, '<>')}\n")


def _open_checkpoint(given: Namespace) -> tuple[GPT, Tokenizer, CheckpointMetadata]:
    """Load the model, its tokenizer and the metadata of the checkpoint.

    Sets ``given.checkpoint`` to the path of the checkpoint, and ``given.step`` to its number of optimizer steps.
    """
    path = find_checkpoint(given.checkpoint, given.runs, given.experiment)
    given.checkpoint = str(path)
    model, tokenizer, contents, given.step = load_trained_model(given)
    if contents.rewards:
        raise UserError(
            f"{path} is a reward model, which `evaluate` does not support; see the metrics reported by `fit`"
        )
    if tokenizer.round_trip_loss:
        log.warning(
            "the tokenizer is lossy, and metrics cover only the text that it preserves: %s", tokenizer.round_trip_loss
        )
    return model, tokenizer, contents


def _print_results(given: Namespace, bare: dict[str, Any], answer: dict[str, Any]) -> None:
    print(dump_json(bare) if given.json else format_results(answer))


def _store_results(given: Namespace, name: str, asked: dict[str, Any], answer: dict[str, Any]) -> None:
    checkpoint = Path(given.checkpoint)
    if folder := RunFolder.containing(checkpoint):
        used = {"adapter": str(given.adapter) if given.adapter else None, "precision": given.precision}
        save_results(folder, name, {"checkpoint": checkpoint.name, "step": given.step, **used, **asked}, answer)
