"""Runs with multi-token prediction: export, generation, and runs that start from them."""

from pathlib import Path

from safetensors.torch import load_file

from lit_gpt_scratch.checkpoint.loading import STATE_PREFIX, load_checkpoint
from lit_gpt_scratch.model.multi_token_prediction import MULTI_TOKEN_PREFIX
from tests.end_to_end.conftest import Command

RUN = Path("runs/pretrain/version_0")


def modules(run: Path) -> set[str]:
    """Indices of the modules in the last checkpoint of a run."""
    weights = load_checkpoint(run / "checkpoints" / "last.ckpt")["state_dict"]
    prefix = STATE_PREFIX + MULTI_TOKEN_PREFIX
    return {name.removeprefix(prefix)[0] for name in weights if name.startswith(prefix)}


def test_modules_are_used_neither_by_exports_nor_by_other_tasks(command: Command, small: list[str]) -> None:
    assert command("fit", *small, "--model.gpt.multi_token_depth=2", "--trainer.max_steps=2").code == 0
    assert modules(RUN) == {"0", "1"}
    exported = command("convert", "to-hf", RUN, "exported")
    assert exported.code == 0, exported.err
    assert "the modules for multi-token prediction are omitted" in exported.err
    assert not [name for name in load_file("exported/model.safetensors") if "multi_token" in name]
    sample = ["--prompt=the cat", "--max_new_tokens=5", "--temperature=0"]
    assert command("generate", RUN, *sample).out == command("generate", "exported", *sample).out

    start = [f"--model.init_from={RUN}", "--model.compile=false", "--trainer.accelerator=cpu", "--trainer.max_steps=2"]
    cache = next(flag for flag in small if flag.startswith("--data.cache"))
    for name, flags, kept in (
        ("same", [], {"0", "1"}),
        ("more", ["--model.gpt.multi_token_depth=3"], {"0", "1", "2"}),
        ("none", ["--model.gpt.multi_token_depth=0", "--model.lora.rank=2"], set()),
    ):
        text = [flag for flag in small if flag.startswith(("--data.source", "--data.validation_share"))]
        done = command("fit", *start, *flags, *text, cache, f"--experiment={name}")
        assert done.code == 0, done.err
        assert modules(Path(f"runs/{name}/version_0")) == kept
    classes = command("fit", "--model=Classification", "--data=LabelledText", *start, cache, "--experiment=classes")
    assert classes.code == 0, classes.err
    assert modules(Path("runs/classes/version_0")) == set()
