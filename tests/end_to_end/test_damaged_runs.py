"""Run folders with damaged files, given to ``fit --ckpt_path``."""

import json
import random
import shutil
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import pytest
import yaml

from lit_gpt_scratch.cli.fit import main
from tests.end_to_end.conftest import Trained
from tests.mutations import NotWritableError, fuzz, mutate_bytes, mutate_json

FILES = (*["config.yaml"] * 3, "provenance.json", "summary.json", "tokenizer.json", "doctor.json")


@pytest.mark.parametrize(
    "seeds",
    [range(10), pytest.param(range(50, 550), marks=[pytest.mark.slow, pytest.mark.timeout(3600)])],
    ids=["10", "500"],
)
def test_mutated_run_folders(
    trained: Trained, small: list[str], cache: Path, tmp_path: Path, seeds: range, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The run is finished, so it is only resumed if its config is mutated accordingly, and then only for seconds."""
    folder = tmp_path / "in"
    folder.mkdir()
    monkeypatch.chdir(tmp_path)
    trained(*small)
    monkeypatch.chdir(folder)
    monkeypatch.setenv("XDG_CACHE_HOME", str(folder / "cache"))  # used if the mutation removes data.cache
    run, whole = Path("runs/pretrain/version_0"), tmp_path / "runs" / "pretrain" / "version_0"

    def attempt(seed: int, rng: random.Random) -> None:
        shutil.rmtree("runs", ignore_errors=True)
        shutil.copytree(whole, run)
        path = run / rng.choice(FILES)
        content = path.read_bytes() if path.exists() else b"[]"
        load: Callable[[bytes], object] = yaml.safe_load if path.suffix == ".yaml" else json.loads
        mutated = mutate_bytes(content, rng)
        if seed % 4:
            try:
                mutated = json.dumps(mutate_json(load(content), rng)).encode()
            except (RecursionError, ValueError) as error:
                raise NotWritableError from error
        path.write_bytes(mutated)
        with suppress(SystemExit):
            main([f"--ckpt_path={run}", "--trainer.max_time=00:00:00:05"])

    # Without data.source, the run prepares the default corpus.
    fuzz("run folder, resumed", folder, seeds, attempt, max_seconds=60.0, cache=cache)
