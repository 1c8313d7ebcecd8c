"""What the README, the notebooks and the experiment files say is run, with fewer steps."""

import io
import json
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path
from pydoc_data.topics import topics

import pytest
import yaml

from lit_gpt_scratch.__main__ import COMMANDS
from lit_gpt_scratch.text.sources import STDLIB
from tests.conftest import sentences
from tests.end_to_end.conftest import Command, Trained

ROOT = Path(__file__).parents[2]
README = (ROOT / "README.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"```(\w+)\n(.*?)```", README, re.DOTALL)
README_COMMANDS = [
    part.strip()
    for language, block in BLOCKS
    if language == "bash"
    for line in block.splitlines()
    if not line.startswith("#")
    for part in line.split("#")[0].split("&&")
    if part.strip()
]
[OWN, REWARD, BY_HAND] = [block for language, block in BLOCKS if language == "python"]
assert OWN.startswith("# my_attention.py\n")
[DIFF] = [block for language, block in BLOCKS if language == "diff"]
DOOR_COMMANDS = [command for command in README_COMMANDS if "lit_gpt_scratch." in command]
SHORT = [
    "--trainer.max_steps=2", "--model.compile=false", "--model.gpt.n_embd=36", "--trainer.limit_val_batches=2",
    "--data.vocab_size=300", "--data.block_size=32", "--data.tokens_per_step=null", "--data.batch_size=4",
]  # fmt: skip


def test_the_readme_opens_with_the_two_commands() -> None:
    assert README_COMMANDS[:4] == [
        "python -m pip install -e .",
        "python -m lit_gpt_scratch.fit",
        "python -m pip install -e '.[test]'",
        "python -m pytest",
    ]


@pytest.fixture
def newcomers_folder(trained: Trained, small: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder like a fresh clone after its first run, beside some texts of the user's."""
    (tmp_path / "my_texts").mkdir()
    for seed in range(10):
        (tmp_path / "my_texts" / f"{seed}.txt").write_text(sentences(seed), encoding="utf-8")
    for name, prose in sorted(topics.items())[:12]:  # what the interpreter's help() shows: English that a filter keeps
        (tmp_path / "my_texts" / f"{name}.txt").write_text(prose, encoding="utf-8")
    for name, own in (("attention", OWN), ("reward", REWARD)):
        (tmp_path / f"my_{name}.py").write_text(own, encoding="utf-8")
    monkeypatch.syspath_prepend(str(tmp_path))
    rows = "".join(f"x\t{sentences(seed, 3)!r}\n" for seed in range(40))
    (tmp_path / "my_table.tsv").write_text(f"label\tmessage\n{rows}", encoding="utf-8")
    questions = [{"question": "a dog sees", "choices": ["the cat.", "x."], "answer": n % 2} for n in range(5)]
    pairs = [{"sentence_good": "a dog sees the cat.", "sentence_bad": f"dog a {n}."} for n in range(3)]
    prompts = [{"prompt": "a dog sees", "reference": f" the cat {n}."} for n in range(3)]
    said = [{"instruction": f"Say {n}.", "input": "", "output": f"{n}."} for n in range(3)]
    written = {"questions": questions, "pairs": pairs, "prompts": prompts, "conversations": said}
    for name, found in written.items():
        (tmp_path / f"my_{name}.jsonl").write_text("".join(f"{json.dumps(row)}\n" for row in found), encoding="utf-8")
    ranked = [{"prompt": f"Say {n}.", "chosen": f"{n}.", "rejected": f"{n}"} for n in range(30)]
    (tmp_path / "my_preferences.jsonl").write_text("".join(f"{json.dumps(row)}\n" for row in ranked), encoding="utf-8")
    monkeypatch.setattr("sys.stdin", io.StringIO("1\nskip\n"))  # what somebody answers who ranks replies
    for name in ("README.md", "experiments"):
        (tmp_path / name).symlink_to(ROOT / name)
    trained(*(flag for flag in small if "trainer.precision" not in flag))
    return tmp_path


@pytest.fixture(scope="session")
def prepared() -> dict[tuple[str, ...], Path]:
    """By commands of the README, a newcomer's folder as they left it."""
    return {}


@pytest.mark.parametrize("line", DOOR_COMMANDS[1:])
def test_the_readmes_commands_run(
    command: Command,
    newcomers_folder: Path,
    cache: Path,
    prepared: dict[tuple[str, ...], Path],
    tmp_path_factory: pytest.TempPathFactory,
    line: str,
) -> None:
    needed = tuple(before(line))
    if needed in prepared:
        shutil.copytree(prepared[needed], newcomers_folder, dirs_exist_ok=True)
    elif needed:
        for earlier in needed:
            runs(command, newcomers_folder, cache, earlier)
        ours = shutil.ignore_patterns("README.md", "experiments")
        kept = tmp_path_factory.mktemp("prepared") / "folder"
        prepared[needed] = shutil.copytree(newcomers_folder, kept, ignore=ours)
    runs(command, newcomers_folder, cache, line)


def before(line: str) -> list[str]:
    """The commands that make what this one uses, and what those use."""
    needed: list[str] = []
    for earlier in DOOR_COMMANDS[: DOOR_COMMANDS.index(line)]:
        made = re.search(r"(?:--data.store|to-hf \S+|to-adapter \S+|fit .*--experiment) (\S+)", earlier)
        if made and made[1].rstrip("/") in re.findall(r"[\w.]+", line):
            needed += [each for each in (*before(earlier), earlier) if each not in needed]
    return needed


def runs(command: Command, newcomers_folder: Path, cache: Path, line: str) -> None:
    door, *flags = shlex.split(line.partition("lit_gpt_scratch.")[2])  # whatever launches it
    assert door in COMMANDS
    if "--data.vocab_size" in flags:  # more than a short text gives
        place = flags.index("--data.vocab_size")
        del flags[place : place + 2]
    if door == "sweep" and "--compare" not in flags:  # its runs take minutes; that every one starts is tested elsewhere
        pytest.importorskip("optuna")
        from lit_gpt_scratch.cli.sweep_precheck import check_sweep
        from lit_gpt_scratch.sweeps.sweep_config import load_sweep

        assert check_sweep(load_sweep(Path(flags[0])))
        return
    # A subprocess launcher would start the test runner again; that strategies agree is tested elsewhere.
    if door == "fit" and ("--trainer.strategy" in flags or "experiments/hardware" in line):
        assert command(door, *flags, *SHORT[:-1], "--print_config").code == 0
        return
    if door == "fit" and not {"--print_config", "--model.help"} & set(flags):
        if "experiments/finetune" in line or "--model.init_from" in flags:  # the shape is the config's, or the start's
            tuned = {"vocab_size", "block_size"} if "--model.init_from" in flags else set()
            if "base.yaml" in line and "--data.source" not in flags:
                flags += [f"--data.source={newcomers_folder / 'my_texts'}"]
            if "experiments/align" in line and "start.yaml" not in line:
                flags += ["--data.reply_tokens=4"]
            whole = any(f"{name}.yaml" in line for name in ("reward", "ppo", "grpo"))
            if "grpo.yaml" in line:
                flags += ["--model.group=4"]
            kept = [f for f in SHORT if not any(name in f for name in ("n_embd", "tokens_per_step", *tuned))]
            flags += [
                *kept,
                f"--data.cache={cache}",
                *([f"--data.too_long={'drop' if whole else 'cut'}"] if tuned else ["--data.validation_share=0.3"]),
            ]
        elif "--ckpt_path" not in flags:
            named = {"--data.source", "--data.mixture"} & set(flags)
            corpus = [] if named else [f"--data.source={newcomers_folder / 'my_texts'}"]
            # A kind of its own size, tokens that are there, or the kind of a small vocabulary.
            made = {"--data.tokenizer", "--data.mixture"} & set(flags)
            short = [flag for flag in SHORT if "vocab_size" not in flag or not made]
            share = [] if "--data.mixture" in flags else ["--data.validation_share=0.3"]
            flags += [*short, *corpus, f"--data.cache={cache}", *share]
        elif {"--trainer.max_steps", "auto"} & set(flags):
            flags += ["--trainer.max_steps=14"]
    if door == "prepare":
        flags += [f"--data.cache={cache}", "--data.validation_share=0.3"]
    if door == "generate":
        flags = [*(flag for flag in flags if flag != "--compile"), "--max_new_tokens=3"]  # which is tested elsewhere
    if door == "doctor" and {"--resume", "--parity"} & set(flags):
        source = [f"--data.source={newcomers_folder / 'my_texts'}", f"--data.cache={cache}"]
        flags += [*SHORT[1:], *source, "--data.validation_share=0.3"]
        flags += ["--model.gpt.n_layer=1"]
        parity = ["--kinds=float32", "--layouts=single", "--model.gpt.n_embd=32", "--trainer.max_steps=2"]
        flags += parity if "--parity" in flags else ["--kills=1"]
    if door == "sweep":
        pytest.importorskip("optuna")
    outcome = command(door, *flags)
    assert outcome.code == 0, outcome.err


def test_the_readmes_python_runs(newcomers_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(newcomers_folder)
    exec(shortened(BY_HAND), {})


ACTIVATION = """
--- a/lit_gpt_scratch/model/feed_forward.py
+++ b/lit_gpt_scratch/model/feed_forward.py
@@ -93,5 +93,14 @@ class GeGLU(Gated):
 
 
+class ReGLU(Gated):
+    \"\"\"The gate is bent by a ReLU.\"\"\"
+
+    @override
+    def activation(self, x: Tensor, hidden: Tensor) -> Tensor:
+        return F.relu(self.gate(x)) * hidden
+
+
 FEED_FORWARD: dict[str, type[FeedForward]] = {
-    "relu": ReLU, "relu2": ReLU2, "gelu": GELU, "gelu_exact": ExactGELU, "swiglu": SwiGLU, "geglu": GeGLU,
+    "relu": ReLU, "relu2": ReLU2, "gelu": GELU, "gelu_exact": ExactGELU, "swiglu": SwiGLU, "geglu": GeGLU,
+    "reglu": ReGLU,
 }  # fmt: skip
"""  # noqa: W293 - the empty lines of a diff begin with a space


def test_a_part_of_ones_own_touches_one_file(newcomers_folder: Path, small: list[str]) -> None:
    """The README's example, and another, in a copy of the package: trained, and then gone on with from their run."""
    own = {"--model.gpt.position=logarithmic": DIFF, "--model.gpt.feed_forward=reglu": ACTIVATION}
    shutil.copytree(ROOT / "lit_gpt_scratch", newcomers_folder / "lit_gpt_scratch")
    for diff in own.values():
        [touched] = re.findall(r"^\+\+\+ b/(.*)$", diff, re.MULTILINE)
        command = ["git", "apply", "-"]
        applied = subprocess.run(command, input=diff, cwd=newcomers_folder, text=True, capture_output=True)
        assert applied.returncode == 0, applied.stderr
        lines = (newcomers_folder / touched).read_text(encoding="utf-8").splitlines()
        assert all(len(line) <= 120 for line in lines)

    fit = ["fit", *small, *own, "--trainer.max_steps=2", "--experiment=own"]
    generate = ["generate", "--experiment=own", "--max_new_tokens=40"]
    wrong = [["fit", *small, f"{flag}s"] for flag in own]
    python = [sys.executable, "-c", DOORS_IN_TURN, json.dumps([fit, generate, *wrong])]
    done = subprocess.run(python, cwd=newcomers_folder, capture_output=True, text=True)
    assert done.stdout.splitlines()[-4:] == ["ended with 0", "ended with 0", "ended with 2", "ended with 2"], (
        done.stderr
    )
    for flag, said in zip(own, done.stderr.splitlines()[-2:], strict=True):
        assert said.startswith("error: ")
        assert flag.partition("=")[2] in said


DOORS_IN_TURN = """
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
    """The same code on less text, with fewer steps and a smaller model."""
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
def test_a_notebook_runs_and_was_run(newcomers_folder: Path, path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    nbformat = pytest.importorskip("nbformat")
    pyplot = pytest.importorskip("matplotlib.pyplot")
    pyplot.switch_backend("agg")
    monkeypatch.chdir(newcomers_folder)
    notebook = nbformat.read(path, as_version=4)
    cells = [cell for cell in notebook.cells if cell.cell_type == "code"]
    assert [cell.execution_count for cell in cells] == list(range(1, len(cells) + 1))
    assert not any(output.output_type == "error" for cell in cells for output in cell.outputs)
    scope: dict[str, object] = {}
    for cell in cells:
        exec(shortened(cell.source), scope)


EXPERIMENTS = sorted((ROOT / "experiments").rglob("*.yaml"))


@pytest.mark.parametrize("path", EXPERIMENTS, ids=lambda path: path.relative_to(ROOT).as_posix())
def test_an_experiment_is_a_config_that_says_why(command: Command, path: Path) -> None:
    text = path.read_text(encoding="utf-8")
    assert text.startswith("# ")
    if "vary" in yaml.safe_load(text):
        return  # of a sweep, which is read where sweeps are tested
    outcome = command("fit", "--config", path, "--print_config")
    assert outcome.code == 0, outcome.err
    config = yaml.safe_load(outcome.out)
    assert config["data"]["init_args"]["source"] in (None, STDLIB)  # no path of one machine


def test_the_readmes_sweep_can_be_swept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("optuna")
    from lit_gpt_scratch.cli.sweep_precheck import check_sweep
    from lit_gpt_scratch.sweeps.sweep_config import load_sweep

    monkeypatch.chdir(ROOT)
    [text] = [block for language, block in BLOCKS if language == "yaml"]
    (tmp_path / "sweep.yaml").write_text(text, encoding="utf-8")
    assert check_sweep(load_sweep(tmp_path / "sweep.yaml"))


def test_every_module_can_be_held_in_the_head() -> None:
    lengths = {path: path.read_text(encoding="utf-8").count("\n") for path in ROOT.glob("lit_gpt_scratch/**/*.py")}
    assert {path.name: n for path, n in lengths.items() if n > 250} == {}


def test_every_room_is_on_the_map() -> None:
    package = ROOT / "lit_gpt_scratch"
    rooms = {f"{path.name}/" if path.is_dir() else path.name for path in package.iterdir() if path.name[0] not in "_."}
    assert {room for room in rooms if f"`{room}`" not in README} == set()


def test_every_door_is_listed() -> None:
    for door in COMMANDS:
        assert (ROOT / "lit_gpt_scratch" / f"{door}.py").is_file()
        assert f"`{door}.py`" in README
