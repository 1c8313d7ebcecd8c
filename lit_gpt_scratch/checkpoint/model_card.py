"""Write the model card of an exported model from the files in its run folder; what is not recorded is not stated."""

import json
import logging
import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any, Final

from lit_gpt_scratch.bounded_yaml import load_yaml
from lit_gpt_scratch.checkpoint.run_folder import RunFolder, SessionFacts
from lit_gpt_scratch.errors import UserError
from lit_gpt_scratch.interop.model_family import ModelShape
from lit_gpt_scratch.model import GPTConfig
from lit_gpt_scratch.schema import read_json
from lit_gpt_scratch.terminal_output import redact
from lit_gpt_scratch.text.markdown import escape_markdown, format_compact_table, markdown_code_block
from lit_gpt_scratch.text.sources import STDLIB
from lit_gpt_scratch.text.tokenizer import Tokenizer

log = logging.getLogger(__name__)

METRIC_SPLITS: Final = {"val": "validation", "test": "test"}
"""Names of the data splits, keyed by the prefix of their metrics in ``summary.json``."""
SHOWN_SETTINGS: Final = (
    "n_layer", "n_embd", "n_head", "n_kv_head", "head_dim", "feed_forward", "ffn_dim", "norm", "norm_placement",
    "position", "attention_backend", "vocab_multiple", "initialisation", "dropout",
)  # fmt: skip
"""Fields of ``GPTConfig`` that the card always describes, or that do not change the function of the exported model."""
PLAIN_PROMPT: Final = 'inputs = tokenizer("Once upon a time", return_tensors="pt")'
CHAT_PROMPT: Final = """messages = [{"role": "user", "content": "Hello!"}]
inputs = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=True, return_tensors="pt")"""


@dataclass(frozen=True)
class RunRecord:
    """Files of a run folder that describe a checkpoint in it.

    Attributes:
        step: Number of optimizer steps after which the checkpoint was saved; None if unknown.
        model: Flags of the task, from ``config.yaml``.
        data: Flags of the data, from ``config.yaml``.
        trainer: Flags of the trainer, from ``config.yaml``.
        summary: Content of ``summary.json`` if it describes the same step, else an empty dict.
        sessions: Sessions of the run before that step, from ``provenance.json``.
    """

    step: int | None = None
    model: Mapping[str, Any] = field(default_factory=dict)
    data: Mapping[str, Any] = field(default_factory=dict)
    trainer: Mapping[str, Any] = field(default_factory=dict)
    summary: Mapping[str, Any] = field(default_factory=dict)
    sessions: list[SessionFacts] = field(default_factory=list)

    @classmethod
    def read(cls, checkpoint: Path, step: object) -> "RunRecord":
        """Read the files of the run folder that contains a checkpoint; missing and unreadable files are omitted.

        Args:
            checkpoint: Path to the checkpoint.
            step: Number of optimizer steps after which it was saved, as stated in the checkpoint.
        """
        if not isinstance(step, int) or (run := RunFolder.containing(checkpoint)) is None:
            return cls()
        config: Mapping[str, Any] = {}
        summary: dict[str, Any] = {}
        try:
            config = _mapping(load_yaml(run.config)[0])
        except UserError as error:
            log.warning("the model card does not describe the training: %s", error)
        try:
            summary = read_json(run.path / "summary.json", dict[str, Any])
        except (OSError, ValueError) as error:
            log.warning("the model card has no results: cannot read %s (%s)", run.path / "summary.json", error)
        return cls(
            step,
            _mapping(config.get("model")),
            _mapping(config.get("data")),
            _mapping(config.get("trainer")),
            summary if summary.get("step") == step else {},
            [each for each in run.read_sessions() if _from_step(each) < step],
        )

    @property
    def hub_datasets(self) -> list[str]:
        """Names of the datasets on the Hub from which the sessions read text, without revisions."""
        names = (name for session in self.sessions for name in session.get("hub_datasets", []))
        return list(dict.fromkeys(name.partition("@")[0] for name in names))

    def metrics(self) -> Iterator[tuple[str, str, float]]:
        """Yield the split, name and value of each validation and test metric."""
        for name, value in self.summary.items():
            prefix, _, metric = name.partition("/")
            if prefix in METRIC_SPLITS and isinstance(value, int | float):
                yield METRIC_SPLITS[prefix], metric, value


def build_model_card(
    name: str,
    shape: ModelShape,
    tokenizer: Tokenizer,
    run: RunRecord,
    architecture: str,
    parameters: int,
    license_id: str | None = None,
) -> str:
    """Build the ``README.md`` of a model for the Hub, with metadata in YAML.

    Args:
        name: Name of the folder, or ``owner/name`` on the Hub.
        shape: Architecture, vocabulary size and context length.
        tokenizer: The model's tokenizer.
        run: Record of the run that trained the model.
        architecture: Name of the ``transformers`` class.
        parameters: Number of parameters.
        license_id: Identifier of the license on the Hub; None if unknown.
    """
    has_template = tokenizer.published is not None and tokenizer.published.chat_template is not None
    start = _arguments(run.model).get("init_from")
    origin = f", fine-tuned from {escape_markdown(_public_path(start))}" if isinstance(start, str) else ""
    title = name.rpartition("/")[2]
    sections = {
        f"# {escape_markdown(title)}": f"A language model with {parameters:,} parameters ({architecture}){origin}, "
        "exported by lit_gpt_scratch.",
        "## Use": markdown_code_block(
            "from transformers import AutoModelForCausalLM, AutoTokenizer\n\n"
            f"tokenizer = AutoTokenizer.from_pretrained({json.dumps(name)})\n"
            f"model = AutoModelForCausalLM.from_pretrained({json.dumps(name)})\n"
            f"{CHAT_PROMPT if has_template else PLAIN_PROMPT}\n"
            "print(tokenizer.decode(model.generate(**inputs, max_new_tokens=50)[0]))",
            "python",
        ),
        "## Architecture": _table("setting", _architecture_rows(shape)),
        "## Training data": _table("setting", _data_rows(run)),
        "## Training procedure": _table("setting", _training_rows(run)),
        "## Evaluation": _table("metric", _metric_rows(run)),
        "## Provenance": _table("property", _provenance_rows(run.sessions)),
    }
    body = "\n\n".join(f"{heading}\n\n{content}" for heading, content in sections.items() if content)
    return f"---\n{_build_metadata(title, run, license_id)}\n---\n\n{body}\n"


def _build_metadata(title: str, run: RunRecord, license_id: str | None) -> str:
    from huggingface_hub import EvalResult, ModelCardData

    source = _arguments(run.data).get("source")
    dataset = (run.hub_datasets or [_public_path(source)])[0] if isinstance(source, str) else "unknown"
    results = [
        EvalResult(
            task_type="text-generation",
            dataset_type=dataset,
            dataset_name=dataset,
            dataset_split=split,
            metric_type=metric,
            metric_value=value,
        )
        for split, metric, value in run.metrics()
    ]
    return ModelCardData(
        model_name=title if results else None,
        license=license_id,
        library_name="transformers",
        pipeline_tag="text-generation",
        tags=["lit_gpt_scratch"],
        datasets=run.hub_datasets or None,
        eval_results=results or None,
    ).to_yaml()


def _architecture_rows(shape: ModelShape) -> Iterator[tuple[str, Any]]:
    """Yield the sizes of a model, and its other settings that differ from the defaults."""
    gpt = shape.gpt
    yield "layers", gpt.n_layer
    yield "width", gpt.n_embd
    yield "attention heads", gpt.n_head
    yield "key/value heads", gpt.kv_heads
    yield "head dimension", gpt.head_width
    yield "feed-forward network", f"{gpt.feed_forward}, width {gpt.ffn_width}"
    yield "normalization", f"{gpt.norm}, {gpt.norm_placement}"
    yield "positions", gpt.position
    yield "context length", shape.block_size
    yield "vocabulary size", shape.vocab_size
    for setting in fields(GPTConfig):
        value = getattr(gpt, setting.name)
        if value != setting.default and setting.name not in SHOWN_SETTINGS:
            yield setting.name.replace("_", " "), value


def _data_rows(run: RunRecord) -> Iterator[tuple[str, Any]]:
    if source := _arguments(run.data).get("source"):
        named = "the source code of the Python standard library" if source == STDLIB else _describe(source)
        is_public = isinstance(source, str) and source.partition("@")[0] in run.hub_datasets
        yield "source", source if is_public else named
    on_hub = ("config", "split") if run.hub_datasets else ()
    for name in (*on_hub, "store", "mixture", "cleaning", "packing", "validation_share"):
        if (value := _arguments(run.data).get(name)) not in (None, []):
            yield name.replace("_", " "), _describe(value)


def _training_rows(run: RunRecord) -> Iterator[tuple[str, Any]]:
    if run.step is not None:
        yield "steps", f"{run.step:,}"
    if isinstance(tokens := run.summary.get("tokens"), int):
        yield "tokens", f"{tokens:,}"
    if isinstance(seconds := run.summary.get("seconds"), int | float):
        yield "duration", f"{seconds:,.0f} s"
    if task := run.model.get("class_path"):
        yield "task", _class_name(task)
    task_arguments, data_arguments = _arguments(run.model), _arguments(run.data)
    for name in ("optimizer", "schedule", "lora", "ema_decay"):
        if value := task_arguments.get(name):
            yield name.replace("_", " "), _describe(value)
    for name in ("block_size", "batch_size", "tokens_per_step"):
        if value := data_arguments.get(name):
            yield name.replace("_", " "), value
    for name in ("precision", "accumulate_grad_batches", "gradient_clip_val"):
        if value := run.trainer.get(name):
            yield name.replace("_", " "), value


def _metric_rows(run: RunRecord) -> Iterator[tuple[str, Any]]:
    for split, metric, value in run.metrics():
        yield f"{split} {metric.replace('_', ' ')}", f"{value:.4g}"
    for name, value in _mapping(run.summary.get("baselines")).items():
        if isinstance(value, int | float):
            yield f"baseline without training: {name}", f"{value:.4g}"


def _provenance_rows(sessions: Iterable[SessionFacts]) -> Iterator[tuple[str, Any]]:
    """Yield each property with its distinct values in all sessions."""
    found: dict[str, dict[str, None]] = {}
    for session in sessions:
        code, hardware = _mapping(session.get("code")), _mapping(session.get("hardware"))
        changes = " with uncommitted changes" if code.get("changed_since") else ""
        facts = {
            "data fingerprint": session.get("data"),
            "commit": code["commit"] + changes if isinstance(code.get("commit"), str) else None,
            "SHA-256 of the code": code.get("sources"),
            "seed": session.get("seed"),
            **_mapping(session.get("versions")),
            **{name: hardware.get(name) for name in ("accelerator", "processor", "processes")},
        }
        for name, fact in facts.items():
            if fact is not None:
                found.setdefault(name, {})[str(fact)] = None
    for name, values in found.items():
        yield name, ", ".join(values)


def _table(header: str, rows: Iterable[tuple[str, Any]]) -> str:
    """Format rows as a table, or return an empty string if there are none."""
    cells = [(name, redact(str(value))) for name, value in rows]
    return format_compact_table([(header, "value"), *cells]) if cells else ""


def _describe(value: Any) -> str:
    """Describe a value in a config: paths without their folders, and objects without arguments that are null."""
    if isinstance(value, list):
        return ", ".join(map(_describe, value))
    if not isinstance(value, Mapping):
        return _public_path(value) if isinstance(value, str) and "/" in value else str(value)
    arguments = _arguments(value) if "class_path" in value else value
    named = ", ".join(f"{_describe(name)} {_describe(each)}" for name, each in arguments.items() if each is not None)
    name = _class_name(value.get("class_path", ""))
    return f"{name} ({named})" if name and named else name or named


def _class_name(class_path: object) -> str:
    return str(class_path).rpartition(".")[2]


def _public_path(path: str) -> str:
    """Return the name of a file or folder without its parent folders, which may be private.

    A run folder, such as ``pretrain/version_0``, keeps the name of its experiment.
    """
    run = Path(path)
    return "/".join(run.parts[-2:]) if re.fullmatch(r"version_\d+", run.name) else run.name


def _arguments(value: Mapping[str, Any]) -> Mapping[str, Any]:
    return _mapping(value.get("init_args"))


def _from_step(session: Mapping[str, Any]) -> int:
    """Return the step from which a session started."""
    step = session.get("from_step")
    return step if isinstance(step, int) else 0


def _mapping(value: Any) -> Mapping[str, Any]:
    return value if isinstance(value, Mapping) else {}
