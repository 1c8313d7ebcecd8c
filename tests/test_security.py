"""``SECURITY.md`` lists every function that opens a file; only listed functions run code by name, or delete files."""

import ast
import re
from collections import defaultdict
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "lit_gpt_scratch"

READERS = {
    "EventAccumulator", "EventFileLoader", "JournalStorage", "ParquetFile", "RDBStorage", "TaskManager",
    "from_file", "fromfile", "load_dataset", "load_dataset_builder", "load_yaml", "memmap", "open",
    "open_memmap", "open_safetensors", "parse_string", "parse_yaml", "read_bytes", "read_events", "read_json",
    "read_metadata", "read_schema", "read_text", "safe_load", "safe_open", "simple_evaluate", "yaml_load", "np.load",
    "torch.load", "HuggingFaceStorageReader", "json.load", "sqlite3.connect", "mmap.mmap",
}  # fmt: skip
"""Calls that read a file: names of functions and methods, with their module if the name alone means other things."""
WRITE_ONLY = {"w", "wb", "x", "xb", "x+b", "a", "ab"}  # "x" creates the file
OWN_OPEN = {"TokenStore.open", "CleanedCorpus.open", "ShardedCheckpoint.open", "cls.open", "os.open"}
"""Functions named ``open`` that open no file by themselves, and the one that only locks, or syncs folders."""
IMPORTERS = {
    "trust.import_object": {"importlib.import_module"},
    "__main__._dispatch": {"import_module"},  # a command of this package
    "cli.entrypoint.run_command": {"import_module"},  # a command of this package
    "cli.help.HelpPage._of_other_classes": {"import_module"},  # packages in a table
    "cli.help.class_flags": {"import_module"},
    "text.template_worker.compile_template": {"environment.from_string"},  # in a sandbox, in a process with limits
    "sweeps.run_process.run_module": {"runpy.run_module"},  # fit, in a child process
}
"""Functions that run code by name, and how."""
CODE = {
    "eval", "exec", "compile", "__import__", "importlib.import_module", "import_module", "importlib.reload",
    "runpy.run_module", "runpy.run_path", "yaml.load", "yaml.load_all", "yaml.full_load", "yaml.unsafe_load",
    "torch.jit.load", "torch.hub.load", "os.system", "os.popen",
}  # fmt: skip
CODE_METHODS = {"from_pretrained", "from_string", "load_from_checkpoint"}
"""Methods of libraries that may run code from a file: remote code, and templates."""
CODE_MODULES = {"pickle", "cPickle", "dill", "cloudpickle", "joblib", "marshal", "shelve"}
DELETERS = {
    "checkpoint.sharded_checkpoint._remove_shards": "folders of a sharded checkpoint that this program has named",
    "checkpoint.sharded_checkpoint.remove_checkpoint": "a checkpoint of the run; folders with other files are kept",
    "checkpoint.sharded_checkpoint.save_sharded": "the folder of a save that failed, which this call has made",
    "checkpoint.sharded_checkpoint.set_aside": "a checkpoint of the run, renamed until a new one has replaced it",
    "callbacks.introspection.ActivationPlots.log_embedding": "the folder of an earlier session in the run folder",
    "checkpoint.run_folder.RunFolder.delete": "a run folder that this call has made, without a checkpoint",
    "checkpoint.run_folder.RunFolder.order_events": "event files of the run, renamed to unused names",
    "data.prepare_tokens.TokenPreparation._write_texts_and_tokens": "a file in the unfinished store",
    "sweeps.runner.SweepRunner._execute": "a run folder of this sweep, without a checkpoint",
    "text.atomic_files.atomic_file": "its own temporary file",
    "text.atomic_files.fill_folder_atomically": "its own temporary folder",
    "text.atomic_files._remove_if_unused": "temporary files of this program",
    "text.tokenize_corpus.remove_shard_markers": "markers in the unfinished store",
}
"""Functions that delete, rename or replace files, and which."""
DELETIONS = {"unlink", "rmtree", "rmdir", "rename", "renames", "replace", "os.remove", "shutil.move"}


@cache
def calls() -> list[tuple[str, str, ast.Call]]:
    """Each call in the package: the function or class that contains it, what it calls, and the call itself."""

    def walk(node: ast.AST, name: str) -> Iterator[tuple[str, ast.Call]]:
        for child in ast.iter_child_nodes(node):
            inside = f"{name}.{child.name}" if isinstance(child, ast.FunctionDef | ast.ClassDef) else name
            if isinstance(child, ast.Call):
                yield inside, child
            yield from walk(child, inside)

    found = []
    for path in sorted(PACKAGE.rglob("*.py")):
        module = ".".join(path.relative_to(PACKAGE).with_suffix("").parts)
        for name, call in walk(ast.parse(path.read_text(encoding="utf-8")), module):
            found.append((name, ast.unparse(call.func), call))
    return found


def mode_of(call: ast.Call) -> str:
    """The mode of a call of ``open``; that of reading if it has none."""
    given = [*call.args, *(keyword.value for keyword in call.keywords if keyword.arg == "mode")]
    texts = [each.value for each in given if isinstance(each, ast.Constant) and isinstance(each.value, str)]
    return next((text for text in texts if re.fullmatch("[rwaxbt+]+", text)), "r")


def reads_a_file(called: str, call: ast.Call) -> bool:
    last = called.rpartition(".")[2]
    if last == "open":
        return called not in OWN_OPEN and mode_of(call) not in WRITE_ONLY
    return called in READERS or last in READERS


def test_every_way_in_is_listed() -> None:
    """A new function that opens a file is listed with what it trusts; one that is gone is removed from the table."""
    found = {name for name, called, call in calls() if reads_a_file(called, call)}
    table = (ROOT / "SECURITY.md").read_text(encoding="utf-8").partition("## Ways in")[2]
    rows = [line.split(" | ") for line in table.splitlines() if line.startswith("| `")]
    assert all(len(row) == 3 for row in rows)
    listed = [name for row in rows for name in re.findall("`([^`]+)`", row[0])]
    assert len(listed) == len(set(listed))
    assert set(listed) - found == set(), "no longer open a file: remove them from SECURITY.md"
    assert found - set(listed) == set(), "open a file: list them in SECURITY.md"


def test_code_is_imported_by_name_only_where_it_is_listed() -> None:
    found = defaultdict(set)
    for name, called, _ in calls():
        if called in CODE or called.rpartition(".")[2] in CODE_METHODS:
            found[name].add(called)
    assert found == IMPORTERS


def test_files_are_not_unpickled() -> None:
    for name, called, call in calls():
        given = {keyword.arg: keyword.value for keyword in call.keywords}
        if called == "torch.load":
            assert ast.unparse(given["weights_only"]) == "True", name
        assert "allow_pickle" not in given, name
        assert "trust_remote_code" not in given, name
        assert "shell" not in given, name
    for path in sorted(PACKAGE.rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import | ast.ImportFrom) else []
            modules = {*names, node.module} if isinstance(node, ast.ImportFrom) else set(names)
            assert not modules & CODE_MODULES, path


@pytest.mark.parametrize("config", ["GPTConfig", "LoRA"])
def test_one_function_builds_configs_from_files(config: str) -> None:
    built = [name for name, called, call in calls() if called == config and any(k.arg is None for k in call.keywords)]
    # A Hugging Face config contains no class: its fields are read one by one.
    allowed = ["checkpoint.metadata.CheckpointMetadata.build_configs"]
    if config == "GPTConfig":
        allowed.append("interop.model_family.ModelFamily.read_config")
    assert built == allowed


def test_files_are_deleted_only_where_it_is_listed() -> None:
    found = {
        name
        for name, called, call in calls()
        if (called in DELETIONS or called.rpartition(".")[2] in DELETIONS)
        and not (called.endswith(".replace") and len(call.args) != 1)  # of a string
        and called != "replace"  # of a dataclass
    }
    assert found == set(DELETERS)
