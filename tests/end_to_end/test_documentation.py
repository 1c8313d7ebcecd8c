"""What README.md, the reference pages, the notebooks and the experiment files show runs, with fewer steps."""

import io
import json
import re
import shlex
import shutil
import subprocess
import sys
from functools import cache
from pathlib import Path
from pydoc_data.topics import topics

import pytest
import yaml

from lit_gpt_scratch.__main__ import COMMANDS
from lit_gpt_scratch.text.sources import STDLIB
from tests.conftest import sentences
from tests.end_to_end.conftest import Command, Trained

ROOT = Path(__file__).parents[2]
REFERENCE = ROOT / "notebooks" / "reference"
INDEX = (REFERENCE / "README.md").read_text(encoding="utf-8")
PAGES = [
    ROOT / "README.md",
    REFERENCE / "README.md",
    *(REFERENCE / name for name in re.findall(r"^\| \[(\w+\.md)\]", INDEX, re.M)),
]
TEXTS = [path.read_text(encoding="utf-8") for path in PAGES]
ARCHITECTURE = (REFERENCE / "architecture.md").read_text(encoding="utf-8")


def blocks(language: str) -> list[str]:
    """The code blocks of all pages in a language, without repetitions."""
    return list(
        dict.fromkeys(block for text in TEXTS for block in re.findall(rf"```{language}\n(.*?)```", text, re.DOTALL))
    )


def commands(block: str) -> list[str]:
    """The commands of a bash block, one per line or joined by ``&&``, without comments."""
    lines = (line.split(" #")[0] for line in block.splitlines() if not line.startswith("#"))
    return [part.strip() for line in lines for part in line.split("&&") if part.strip()]


OURS = re.compile(r"(?:-m lit_gpt_scratch\.|\blit-gpt )(\w+)(.*)")
"""One of our commands and its flags, whatever launches it."""
COMMAND_LINES = [
    line for line in dict.fromkeys(line for block in blocks("bash") for line in commands(block)) if OURS.search(line)
]
FILES = {name: block for block in blocks("python") for name in re.findall(r"\A# (my_\w+\.py)\n", block)}
FILES |= {name: block for block in blocks("yaml") for name in re.findall(r"\A# (\w+\.yaml)\n", block)}
"""Python and YAML blocks that are files, by name."""
SNIPPETS = [block for block in blocks("python") if not block.startswith("# my_")]
*NEW_FILES, DIFF = re.findall(r"```diff\n(.*?)```", (REFERENCE / "model.md").read_text(encoding="utf-8"), re.DOTALL)
"""The diffs that add a file each, and one that changes a file."""
SHORT = [
    "--trainer.max_steps=2", "--model.compile=false", "--model.gpt.n_embd=36", "--trainer.limit_val_batches=2",
    "--data.vocab_size=300", "--data.block_size=32", "--data.tokens_per_step=null", "--data.batch_size=4",
]  # fmt: skip


def test_readme_starts_with_install_and_train() -> None:
    first = next(block for block in re.findall(r"```bash\n(.*?)```", TEXTS[0], re.DOTALL))
    assert commands(first)[:2] == ["python -m pip install -e .", "python -m lit_gpt_scratch.fit"]


def test_index_lists_every_page() -> None:
    assert sorted(PAGES[1:]) == sorted(REFERENCE.glob("*.md"))


@pytest.mark.parametrize("path", PAGES, ids=lambda path: path.relative_to(ROOT).as_posix())
def test_links_exist(path: Path) -> None:
    text = re.sub(r"```.*?```", "", path.read_text(encoding="utf-8"), flags=re.DOTALL)
    links = [link for link in re.findall(r"\]\(([^)\s]+)\)", text) if not link.startswith("http")]
    for link in links:
        name, _, anchor = link.partition("#")
        target = path.parent / name if name else path
        assert target.exists(), link
        if anchor:
            headings = re.findall(r"^#+ (.*)$", target.read_text(encoding="utf-8"), re.M)
            assert anchor in {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}, link


def apply(diff: str, folder: Path) -> Path:
    """Apply a diff that touches a single file, and return the path of the file."""
    [touched] = re.findall(r"^\+\+\+ b/(.*)$", diff, re.MULTILINE)
    applied = subprocess.run(["git", "apply", "-"], input=diff, cwd=folder, text=True, capture_output=True)
    assert applied.returncode == 0, applied.stderr
    return folder / touched


@pytest.fixture
def user_folder(trained: Trained, small: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder like a fresh clone after its first run, with some files of the user's."""
    (tmp_path / "my_texts").mkdir()
    for seed in range(10):
        (tmp_path / "my_texts" / f"{seed}.txt").write_text(sentences(seed), encoding="utf-8")
    for name, prose in sorted(topics.items())[:12]:  # the interpreter's help texts: English that quality filters keep
        (tmp_path / "my_texts" / f"{name}.txt").write_text(prose, encoding="utf-8")
    for name, content in FILES.items():
        (tmp_path / name).write_text(content, encoding="utf-8")
    for diff in NEW_FILES:
        apply(diff, tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    rows = "".join(f"x\t{sentences(seed, 3)!r}\n" for seed in range(40))
    (tmp_path / "my_table.tsv").write_text(f"label\tmessage\n{rows}", encoding="utf-8")
    questions = [{"question": "a dog sees", "choices": ["the cat.", "x."], "answer": n % 2} for n in range(5)]
    pairs = [{"sentence_good": "a dog sees the cat.", "sentence_bad": f"dog a {n}."} for n in range(3)]
    prompts = [{"prompt": "a dog sees", "reference": f" the cat {n}."} for n in range(3)]
    conversations = [{"instruction": f"Say {n}.", "input": "", "output": f"{n}."} for n in range(3)]
    written = {"questions": questions, "pairs": pairs, "prompts": prompts, "conversations": conversations}
    for name, found in written.items():
        (tmp_path / f"my_{name}.jsonl").write_text("".join(f"{json.dumps(row)}\n" for row in found), encoding="utf-8")
    ranked = [{"prompt": f"Say {n}.", "chosen": f"{n}.", "rejected": f"{n}"} for n in range(30)]
    (tmp_path / "my_preferences.jsonl").write_text("".join(f"{json.dumps(row)}\n" for row in ranked), encoding="utf-8")
    monkeypatch.setattr("sys.stdin", io.StringIO("1\nskip\n"))  # the answers of a user who ranks replies
    for name in ("README.md", "experiments"):
        (tmp_path / name).symlink_to(ROOT / name)
    trained(*(flag for flag in small if "trainer.precision" not in flag))
    return tmp_path


@pytest.fixture(scope="session")
def prepared() -> dict[tuple[str, ...], Path]:
    """The user folder as commands left it, by these commands."""
    return {}


def is_slow(line: str) -> bool:
    """``.ci/run`` runs the first of these itself, and a slow test compares all layouts."""
    return line.startswith(("python -m lit_gpt_scratch.doctor --resume", "python -m lit_gpt_scratch.doctor --parity"))


@pytest.mark.parametrize(
    "line",
    [
        pytest.param(line, marks=[pytest.mark.slow] * is_slow(line))
        for line in COMMAND_LINES
        if line != "python -m lit_gpt_scratch.fit"
    ],
)
def test_documented_command_runs(
    command: Command,
    user_folder: Path,
    cache: Path,
    prepared: dict[tuple[str, ...], Path],
    tmp_path_factory: pytest.TempPathFactory,
    line: str,
) -> None:
    steps = (*before(line), line)
    done = max((n for n in range(len(steps)) if steps[:n] in prepared), default=0)
    if done:
        shutil.copytree(prepared[steps[:done]], user_folder, dirs_exist_ok=True)
    for n in range(done, len(steps)):
        runs(command, user_folder, cache, steps[n])
        if any(tuple(before(later))[: n + 1] == steps[: n + 1] for later in COMMAND_LINES):
            ours = shutil.ignore_patterns("README.md", "experiments")
            kept = tmp_path_factory.mktemp("prepared") / "folder"
            prepared[steps[: n + 1]] = shutil.copytree(user_folder, kept, ignore=ours)


@cache
def before(line: str) -> list[str]:
    """The earlier commands that create what this one uses, in order."""
    needed: list[str] = []
    for earlier in COMMAND_LINES[: COMMAND_LINES.index(line)]:
        made = re.search(r"(?:--data.store|to-hf \S+|to-adapter \S+|fit .*--experiment) (\S+)", earlier)
        if made and made[1].rstrip("/") in re.findall(r"[\w.]+", line):
            needed += [each for each in (*before(earlier), earlier) if each not in needed]
    return needed


def runs(command: Command, user_folder: Path, cache: Path, line: str) -> None:
    found = OURS.search(line)
    assert found is not None
    name, flags = found[1], shlex.split(found[2])
    assert name in COMMANDS
    if "--data.vocab_size" in flags:  # a short text yields fewer tokens
        place = flags.index("--data.vocab_size")
        del flags[place : place + 2]
    if name == "sweep" and "--compare" not in flags:  # its runs take minutes; another test starts them
        pytest.importorskip("optuna")
        from lit_gpt_scratch.cli.sweep_precheck import check_sweep
        from lit_gpt_scratch.sweeps.sweep_config import load_sweep

        assert check_sweep(load_sweep(Path(flags[0])))
        return
    # A subprocess launcher would start the test runner again; other tests compare strategies.
    if name == "fit" and ("--trainer.strategy" in flags or "hardware/" in line):
        assert command(name, *flags, *SHORT[:-1], "--print_config").code == 0
        return
    if name == "fit" and not {"--print_config", "--model.help", "--help", "list"} & set(flags):
        if "finetune/" in line or "--model.init_from" in flags:  # the config or the initial model sets the shape
            tuned = {"vocab_size", "block_size"} if "--model.init_from" in flags else set()
            if "finetune/base" in line and "--data.source" not in flags:
                flags += [f"--data.source={user_folder / 'my_texts'}"]
            if "align/" in line and "align/start" not in line:
                flags += ["--data.reply_tokens=4"]
            whole = any(f"align/{stage}" in line for stage in ("reward", "ppo", "grpo"))
            if "align/grpo" in line:
                flags += ["--model.group=4"]
            kept = [f for f in SHORT if not any(name in f for name in ("n_embd", "tokens_per_step", *tuned))]
            flags += [
                *kept,
                f"--data.cache={cache}",
                *([f"--data.too_long={'drop' if whole else 'cut'}"] if tuned else ["--data.validation_share=0.3"]),
            ]
        elif "--ckpt_path" not in flags:
            named = {"--data.source", "--data.mixture"} & set(flags)
            corpus = [] if named else [f"--data.source={user_folder / 'my_texts'}"]
            # A tokenizer with its own size, existing tokens, or one with a small vocabulary.
            made = {"--data.tokenizer", "--data.mixture"} & set(flags)
            short = [flag for flag in SHORT if "vocab_size" not in flag or not made]
            if "_stages" in line:  # of the documented sizes; only a trial run may lack a step in a stage
                own = ("block_size", "batch_size", "tokens_per_step", "max_steps")
                short = [flag for flag in short if not any(size in flag for size in own)] + ["--trainer.fast_dev_run=1"]
            share = [] if "--data.mixture" in flags else ["--data.validation_share=0.3"]
            flags += [*short, *corpus, f"--data.cache={cache}", *share]
        elif {"--trainer.max_steps", "auto"} & set(flags):
            flags += ["--trainer.max_steps=14"]
    if name == "prepare":
        # As for fit, so that a run can use the store.
        for_fit = "--data.store" in flags and "--data.tokenizer" not in flags
        size = [flag for flag in SHORT if "vocab_size" in flag and for_fit]
        flags += [f"--data.cache={cache}", "--data.validation_share=0.3", *size]
    if name == "generate":
        flags = [*(flag for flag in flags if flag != "--compile"), "--max_new_tokens=3"]  # another test compiles
    if name == "doctor" and {"--resume", "--parity"} & set(flags):
        source = [f"--data.source={user_folder / 'my_texts'}", f"--data.cache={cache}"]
        flags += [*SHORT[1:], *source, "--data.validation_share=0.3"]
        flags += ["--model.gpt.n_layer=1"]
        parity = ["--kinds=float32", "--layouts=single", "--model.gpt.n_embd=32", "--trainer.max_steps=2"]
        flags += parity if "--parity" in flags else ["--kills=1"]
    if name == "doctor" and "--acceptance" in flags:  # another test runs the rows
        flags = ["--acceptance", "--minutes=0.01"]
    if name == "doctor" and "--coordinates" in flags:
        pytest.importorskip("matplotlib")
        flags += ["--model.gpt.n_layer=1", "--widths", "64", "128"]
    if name == "sweep":
        pytest.importorskip("optuna")
    outcome = command(name, *flags)
    assert outcome.code == 0, outcome.err


@pytest.mark.parametrize("snippet", SNIPPETS)
def test_documented_python_runs(user_folder: Path, monkeypatch: pytest.MonkeyPatch, snippet: str) -> None:
    monkeypatch.chdir(user_folder)
    exec(shortened(snippet), {})


ACTIVATION = """
--- a/lit_gpt_scratch/model/feed_forward.py
+++ b/lit_gpt_scratch/model/feed_forward.py
@@ -95,7 +95,16 @@
 
 
+class ReGLUFeedForward(GatedFeedForward):
+    \"\"\"The gate is a ReLU.\"\"\"
+
+    @override
+    def activation(self, x: Tensor, hidden: Tensor) -> Tensor:
+        return F.relu(self.gate(x)) * hidden
+
+
 FEED_FORWARDS: dict[str, type[FeedForward]] = {
     "relu": ReLUFeedForward,
+    "reglu": ReGLUFeedForward,
     "relu2": SquaredReLUFeedForward,
     "gelu": GELUFeedForward,
     "gelu_exact": ExactGELUFeedForward,
"""  # noqa: W293 - the empty lines of a diff begin with a space


@pytest.mark.parametrize("diff", NEW_FILES, ids=["attention", "feed-forward"])
def test_a_custom_class_is_one_new_file_that_trains(
    command: Command, small: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, diff: str
) -> None:
    """The documented text, applied in an empty folder: a few steps, and text from the checkpoint."""
    monkeypatch.syspath_prepend(str(tmp_path))
    path = apply(diff, tmp_path)
    assert diff.startswith("--- /dev/null\n")
    [(name, base)] = re.findall(r"^class (\w+)\((\w+)\)", path.read_text(encoding="utf-8"), re.MULTILINE)
    field = "attention" if base == "Attention" else "feed_forward"
    own = f"{path.stem}.{name}"
    assert command("fit", *small, f"--model.gpt.{field}={own}", "--trainer.max_steps=4").code == 0
    refused = command("generate", "--max_new_tokens=3")
    assert (refused.code, f"--trust {own}" in refused.err) == (2, True)
    assert command("generate", "--max_new_tokens=3", f"--trust={own}").code == 0
    monkeypatch.delitem(sys.modules, path.stem)


def test_documented_attention_is_the_shipped_example(tmp_path: Path) -> None:
    shipped = ROOT / "experiments" / "examples" / "gated_attention.py"
    assert apply(NEW_FILES[0], tmp_path).read_text(encoding="utf-8") == shipped.read_text(encoding="utf-8")


@pytest.mark.slow
def test_adding_a_component_changes_one_file(user_folder: Path, small: list[str]) -> None:
    """The documented example and another one, applied to a copy of the package: train, then generate from the run."""
    own = {"--model.gpt.position=logarithmic": DIFF, "--model.gpt.feed_forward=reglu": ACTIVATION}
    shutil.copytree(ROOT / "lit_gpt_scratch", user_folder / "lit_gpt_scratch")
    for diff in own.values():
        lines = apply(diff, user_folder).read_text(encoding="utf-8").splitlines()
        assert all(len(line) <= 120 for line in lines)

    fit = ["fit", *small, *own, "--trainer.max_steps=2", "--experiment=own"]
    generate = ["generate", "--experiment=own", "--max_new_tokens=40"]
    wrong = [["fit", *small, f"{flag}s"] for flag in own]
    python = [sys.executable, "-c", RUN_COMMANDS, json.dumps([fit, generate, *wrong])]
    done = subprocess.run(python, cwd=user_folder, capture_output=True, text=True)
    assert done.stdout.splitlines()[-4:] == ["ended with 0", "ended with 0", "ended with 2", "ended with 2"], (
        done.stderr
    )
    for flag, message in zip(own, done.stderr.splitlines()[-2:], strict=True):
        assert message.startswith("error: ")
        assert flag.partition("=")[2] in message


RUN_COMMANDS = """
import importlib, json, sys
from lit_gpt_scratch.cli import entrypoint
ends = []
for name, *flags in json.loads(sys.argv[1]):
    ends.append(0)
    try:
        entrypoint.run(lambda: importlib.import_module(f"lit_gpt_scratch.cli.{name}").main(flags))
    except SystemExit as error:
        ends[-1] = error.code
print(*(f"\\nended with {end}" for end in ends), sep="")
"""


def shortened(code: str) -> str:
    """The same code with less text, fewer steps and a smaller model."""
    for old, new in {
        "max_steps=900": "max_steps=2, limit_val_batches=2, logger=True, accelerator='cpu'",
        "val_check_interval=300": "val_check_interval=2",
        "log_every_n_steps=10": "log_every_n_steps=1",
        "LanguageModel()": "LanguageModel(compile=False)",
        "PackedText()": "PackedText(source='my_texts', vocab_size=300, validation_share=0.3, batch_size=2)",
    }.items():
        code = code.replace(old, new)
    return code


@pytest.mark.parametrize("path", sorted((ROOT / "notebooks").glob("*.ipynb")), ids=lambda path: path.name)
def test_notebook_runs_and_has_outputs(user_folder: Path, path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    nbformat = pytest.importorskip("nbformat")
    pyplot = pytest.importorskip("matplotlib.pyplot")
    pyplot.switch_backend("agg")
    monkeypatch.chdir(user_folder)
    notebook = nbformat.read(path, as_version=4)
    cells = [cell for cell in notebook.cells if cell.cell_type == "code"]
    assert [cell.execution_count for cell in cells] == list(range(1, len(cells) + 1))
    assert not any(output.output_type == "error" for cell in cells for output in cell.outputs)
    scope: dict[str, object] = {}
    for cell in cells:
        exec(shortened(cell.source), scope)


EXPERIMENTS = sorted((ROOT / "experiments").rglob("*.yaml"))


@pytest.mark.parametrize("path", EXPERIMENTS, ids=lambda path: path.relative_to(ROOT).as_posix())
def test_experiment_is_a_valid_config_with_a_comment(command: Command, path: Path) -> None:
    text = path.read_text(encoding="utf-8")
    assert text.startswith("# ")
    if "vary" in yaml.safe_load(text):
        return  # a sweep file; sweeps have their own tests
    outcome = command("fit", "--config", path, "--print_config")
    assert outcome.code == 0, outcome.err
    config = yaml.safe_load(outcome.out)
    assert config["data"]["init_args"]["source"] in (None, STDLIB)  # no path of a particular machine


def test_documented_sweep_is_valid(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("optuna")
    from lit_gpt_scratch.cli.sweep_precheck import check_sweep
    from lit_gpt_scratch.sweeps.sweep_config import load_sweep

    monkeypatch.chdir(ROOT)
    for text in blocks("yaml"):
        (tmp_path / "sweep.yaml").write_text(text, encoding="utf-8")
        assert check_sweep(load_sweep(tmp_path / "sweep.yaml"))


def test_architecture_page_lists_every_folder_and_command() -> None:
    package = ROOT / "lit_gpt_scratch"
    entries = {
        f"{path.name}/" if path.is_dir() else path.name for path in package.iterdir() if path.name[0] not in "_."
    }
    assert {entry for entry in entries if f"`{entry}`" not in ARCHITECTURE} == set()
    for name in re.findall(r"`((?:\w+/)+\w+\.py)`", ARCHITECTURE):
        assert (package / name).is_file(), name
    for command in COMMANDS:
        assert (package / f"{command}.py").is_file()
