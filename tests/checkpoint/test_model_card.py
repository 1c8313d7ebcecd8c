"""Model cards: they state what the files of the run folder record, and nothing else."""

import json
from pathlib import Path
from typing import Any

import pytest
import yaml
from huggingface_hub import ModelCard

from lit_gpt_scratch.checkpoint.model_card import RunRecord, build_model_card
from lit_gpt_scratch.interop.model_family import ModelShape
from lit_gpt_scratch.model import GPTConfig
from lit_gpt_scratch.text.published_settings import PublishedSettings
from lit_gpt_scratch.text.tokenizer import Tokenizer
from tests.conftest import sentences

CONFIG: dict[str, Any] = {
    "model": {
        "class_path": "lit_gpt_scratch.tasks.LanguageModel",
        "init_args": {
            "optimizer": {"class_path": "lit_gpt_scratch.optim.AdamW", "init_args": {"lr": 0.004, "beta1": None}},
            "schedule": {"decay": "cosine", "warmup_steps": 7},
            "init_from": None,
        },
    },
    "data": {
        "class_path": "lit_gpt_scratch.data.PackedText",
        "init_args": {
            "source": "owner/texts@main",
            "cleaning": [{"class_path": "lit_gpt_scratch.text.duplicates.ExactDuplicates"}],
            "batch_size": 16,
        },
    },
    "trainer": {"precision": "bf16-mixed"},
}
SUMMARY: dict[str, Any] = {
    "train/loss": 3.25, "val/loss": 3.5, "val/bits_per_byte": 1.75, "test/loss": 3.75, "test/accuracy": None,
    "baselines": {"unigram": 4.25}, "step": 40, "tokens": 123_456, "seconds": 61.0,
}  # fmt: skip
SESSIONS: list[dict[str, Any]] = [
    {"from_step": 0, "code": {"commit": "abc", "changed_since": True}, "versions": {"torch": "2.13.0"}, "data": "d1",
     "hub_datasets": ["owner/texts@main"]},
    {"from_step": 20, "code": {"commit": "abd", "changed_since": False}, "versions": {"torch": "2.13.0"}, "data": "d1",
     "hub_datasets": ["owner/texts@main"]},
    {"from_step": 40, "code": {"commit": "later"}, "data": "d2", "hub_datasets": ["owner/later"]},
]  # fmt: skip


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return Tokenizer.train([sentences(0)], 300)


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """The path of a checkpoint in a run folder."""
    folder = tmp_path / "pretrain" / "version_3"
    (folder / "checkpoints").mkdir(parents=True)
    (folder / "config.yaml").write_text(yaml.safe_dump(CONFIG), encoding="utf-8")
    (folder / "summary.json").write_text(json.dumps(SUMMARY), encoding="utf-8")
    (folder / "provenance.json").write_text(json.dumps({"sessions": SESSIONS}), encoding="utf-8")
    return folder / "checkpoints" / "last.ckpt"


def card(record: RunRecord, tokenizer: Tokenizer, **changes: Any) -> ModelCard:
    shape = ModelShape(GPTConfig(n_layer=3, n_head=2, n_embd=32, n_kv_head=1, tied_embeddings=True), 300, 64)
    arguments = {"architecture": "Qwen3ForCausalLM", "parameters": 12_345} | changes
    text = build_model_card("owner/model", shape, tokenizer, record, **arguments)
    parsed = ModelCard(text)
    assert str(parsed) == text.removesuffix("\n") or str(parsed) == text  # the metadata are valid
    return parsed


def rows(text: str) -> dict[str, str]:
    """The second column of all tables, by the first."""
    cells = [line.strip("| ").split(" | ") for line in text.splitlines() if line.startswith("| ")]
    return {row[0]: row[1] for row in cells if len(row) == 2}


def change(run: Path, *names: str, value: Any) -> None:
    """Change a value of a run's config."""
    config = json.loads(json.dumps(CONFIG))
    inside = config
    for name in names[:-1]:
        inside = inside[name]
    inside[names[-1]] = value
    (run.parent.parent / "config.yaml").write_text(yaml.safe_dump(config), encoding="utf-8")


def test_the_card_states_the_content_of_the_run_folder(run: Path, tokenizer: Tokenizer) -> None:
    built = card(RunRecord.read(run, 40), tokenizer, license_id="apache-2.0")
    metadata = built.data
    assert (metadata.license, metadata.datasets, metadata.pipeline_tag) == (
        "apache-2.0",
        ["owner/texts"],
        "text-generation",
    )
    assert metadata.library_name == "transformers"
    assert metadata.eval_results is not None
    measured = [
        (each.dataset_name, each.dataset_split, each.metric_type, each.metric_value) for each in metadata.eval_results
    ]
    assert measured == [
        ("owner/texts", "validation", "loss", 3.5),
        ("owner/texts", "validation", "bits_per_byte", 1.75),
        ("owner/texts", "test", "loss", 3.75),
    ]
    expected = {
        "layers": "3", "key/value heads": "1", "context length": "64", "tied embeddings": "True",
        "source": "owner/texts@main", "cleaning": "ExactDuplicates", "steps": "40", "tokens": "123,456",
        "optimizer": "AdamW (lr 0.004)", "schedule": "decay cosine, warmup_steps 7", "batch size": "16",
        "precision": "bf16-mixed", "validation bits per byte": "1.75", "baseline without training: unigram": "4.25",
        "commit": "abc with uncommitted changes, abd", "data fingerprint": "d1", "torch": "2.13.0",
    }  # fmt: skip
    assert expected.items() <= rows(built.text).items()
    assert "sliding window" not in rows(built.text)
    assert "12,345 parameters (Qwen3ForCausalLM)" in built.text
    assert "fine-tuned" not in built.text


def test_nothing_is_stated_that_is_not_recorded(tmp_path: Path, tokenizer: Tokenizer) -> None:
    built = card(RunRecord.read(tmp_path / "model.safetensors", 40), tokenizer)
    assert set(built.data.to_dict()) == {"library_name", "pipeline_tag", "tags"}
    for heading in ("Training data", "Training procedure", "Evaluation", "Provenance"):
        assert heading not in built.text
    assert "## Architecture" in built.text


def test_results_of_another_step_are_omitted(run: Path, tokenizer: Tokenizer) -> None:
    built = card(RunRecord.read(run, 20), tokenizer)
    assert built.data.eval_results is None
    assert "Evaluation" not in built.text
    stated = rows(built.text)
    assert stated["steps"] == "20"
    assert stated["commit"] == "abc with uncommitted changes"
    assert "tokens" not in stated


def test_folders_of_the_machine_are_not_published(run: Path, tokenizer: Tokenizer, tmp_path: Path) -> None:
    change(run, "data", "init_args", "source", value=str(tmp_path / "secret" / "texts.jsonl"))
    assert str(tmp_path) not in str(card(RunRecord.read(run, 40), tokenizer))
    step = {"class_path": "a.Decontaminate", "init_args": {"against": ["/secret/benchmark.jsonl"], "share": 0.5}}
    change(run, "data", "init_args", "cleaning", value=[step])
    stated = rows(card(RunRecord.read(run, 40), tokenizer).text)
    assert stated["cleaning"] == "Decontaminate (against benchmark.jsonl, share 0.5)"
    change(run, "data", "init_args", "mixture", value={"/secret/code": 0.25, "/secret/web": 0.75})
    assert rows(card(RunRecord.read(run, 40), tokenizer).text)["mixture"] == "code 0.25, web 0.75"


@pytest.mark.parametrize(
    ("init_from", "stated"),
    [
        ("/secret/runs/pretrain/version_0", "pretrain/version_0"),
        ("runs/pretrain/version_12/", "pretrain/version_12"),
        ("/home/secret/base.safetensors", "base.safetensors"),
        ("/home/secret/qwen", "qwen"),
        ("secret/qwen", "qwen"),
        ("~/secret/version_0/checkpoints/last.ckpt", "last.ckpt"),
    ],
)
def test_the_initial_model_is_named_without_its_folder(
    run: Path, tokenizer: Tokenizer, init_from: str, stated: str
) -> None:
    change(run, "model", "init_args", "init_from", value=init_from)
    built = card(RunRecord.read(run, 40), tokenizer)
    assert f", fine-tuned from {stated}, exported" in built.text
    assert "secret" not in str(built)


@pytest.mark.parametrize("source", ["corpus/texts.jsonl", "corpus/texts", {"corpus/a": 0.25, "corpus/b.txt": 0.75}])
@pytest.mark.parametrize("recorded", [None, []])
def test_datasets_are_declared_only_if_training_recorded_them(
    run: Path, tokenizer: Tokenizer, source: Any, recorded: list[str] | None
) -> None:
    """A source may look like the name of a dataset on the Hub, and its file may not exist where the model is."""
    sessions = [{name: each[name] for name in each if name != "hub_datasets"} for each in SESSIONS]
    if recorded is not None:
        sessions = [each | {"hub_datasets": recorded} for each in sessions]
    (run.parent.parent / "provenance.json").write_text(json.dumps({"sessions": sessions}), encoding="utf-8")
    change(run, "data", "init_args", "source", value=source)
    built = card(RunRecord.read(run, 40), tokenizer)
    assert built.data.datasets is None
    assert "corpus" not in str(built)
    assert rows(built.text)["source"] in ("texts.jsonl", "texts", "a 0.25, b.txt 0.75")


@pytest.mark.parametrize("text", ["", "[]", "{", "x: ["])
@pytest.mark.parametrize("file", ["config.yaml", "summary.json", "provenance.json"])
def test_unreadable_files_are_left_out(run: Path, tokenizer: Tokenizer, file: str, text: str) -> None:
    (run.parent.parent / file).write_text(text, encoding="utf-8")
    card(RunRecord.read(run, 40), tokenizer)


def test_text_from_files_is_not_interpreted(run: Path, tokenizer: Tokenizer) -> None:
    change(run, "data", "init_args", "source", value="a | b\n# <script>x</script> password=geheim")
    text = card(RunRecord.read(run, 40), tokenizer).text
    assert "<script>" not in text
    assert "geheim" not in text
    assert "\n# " not in text.partition("\n# ")[2]


def test_a_model_with_a_chat_template_is_used_with_it(run: Path, tokenizer: Tokenizer) -> None:
    assert "apply_chat_template" not in card(RunRecord(), tokenizer).text
    chat = Tokenizer.from_json(tokenizer.to_json())
    chat.published = PublishedSettings(chat_template="{{ messages }}")
    assert "apply_chat_template" in card(RunRecord(), chat).text
