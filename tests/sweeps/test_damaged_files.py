"""Damaged and hostile sweep files and run folders: one line each, in bounded time and memory."""

import itertools
import json
import math
import random
import resource
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

pytest.importorskip("optuna")

from lit_gpt_scratch.errors import UserError
from lit_gpt_scratch.sweeps import report as report_module
from lit_gpt_scratch.sweeps.build_report import build_comparison_report
from lit_gpt_scratch.sweeps.fit_command import ResolvedBaseline, build_arguments
from lit_gpt_scratch.sweeps.run_results import RunResult, read_curve, read_run_result
from lit_gpt_scratch.sweeps.sweep_config import load_sweep
from tests.diagnostics.test_damaged_events import write_all_curves
from tests.mutations import NotWritableError, fuzz, mutate_bytes, mutate_events, mutate_json, nested
from tests.sweeps.test_run_results import write_events

METRIC = "val/bits_per_byte"
MAX_SECONDS = 5.0
MAX_BYTES = 2**30
SWEEP: dict[str, Any] = {
    "base": ["base.yaml"],
    "fixed": {"trainer.max_steps": 200, "model.gpt.attention": {"class_path": "a.B", "init_args": {"c": [1, 2]}}},
    "vary": {
        "model.gpt.position": ["learned", "rotary"],
        "model.optimizer.lr": {"low": 1e-4, "high": 1e-2, "log": True},
        "model.gpt.n_layer": {"low": 2, "high": 8, "step": 2},
        "norm": {"pre": {}, "post": {"model.gpt.norm_placement": "post"}},
    },
    "method": "tpe",
    "trials": 8,
    "seeds": [1, 2],
    "metric": "val/loss",
    "direction": "minimize",
    "budget": {"minutes": 5},
    "baseline": {"model.gpt.n_layer": 4},
    "pruning": {"MedianPruner": {"n_startup_trials": 2}},
}
LADDER: dict[str, Any] = {
    "base": ["base.yaml"],
    "vary": {
        "size": {str(width): {"model.gpt.n_embd": width} for width in (32, 64, 128)},
        "budget.tokens": [1e5, 2e5, 4e5],
    },
    "scaling": {"hold_out": {"size": "128", "budget.tokens": 4e5}},
}


def assert_bounded(read: Callable[[], object]) -> str:
    """Read a file; it is either accepted or refused in one short line, in bounded time and memory. Returns the line."""
    start, before = time.monotonic(), resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    message = ""
    try:
        read()
    except UserError as error:
        message = str(error)
        assert "\n" not in message
        assert len(message) < 2000
    assert time.monotonic() - start < MAX_SECONDS
    unit = 1 if sys.platform == "darwin" else 1024
    assert (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * unit < MAX_BYTES
    return message


def read_sweep(path: Path) -> None:
    """Everything that the command does with a sweep file before ``fit`` parses the flags."""
    sweep = load_sweep(path)
    _ = sweep.fingerprint
    assert sweep.n_trials > 0
    for dimension in sweep.vary.values():
        _ = dimension.distribution
        for setting in dimension.example_settings():
            assert dimension.contains(setting)
    known = ResolvedBaseline({"data.tokens_per_step": 4096})
    for argument in build_arguments(sweep, sweep.baseline_assignment, known):
        argument.encode()


@pytest.fixture
def sweep_path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    Path("base.yaml").write_text("trainer:\n  log_every_n_steps: 5\n")
    return tmp_path / "sweep.yaml"


BOMB = "a0: &a0 [x, x, x, x, x, x, x, x]\n" + "".join(
    f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 8)}]\n" for n in range(1, 12)
)
MERGE_BOMB = "a0: &a0 {k0: 1}\n" + "".join(
    f"a{n}: &a{n} {{k{n}: 1, <<: [*a{n - 1}, *a{n - 1}]}}\n" for n in range(1, 40)
)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("vary: {" + ", ".join(f"d{n}: [0, 1]" for n in range(40)) + "}\n", "grid has 1,099,511,627,776 combinations"),
        ("vary: {" + ", ".join(f"d{n}: [0, 1]" for n in range(400)) + "}\n", "grid has more than 10^18 combinations"),
        ("vary: {a: {low: 0, high: 1, step: 1e-9}}\n", "values; use a larger step"),
        ("vary: {a: {low: 0, high: 1e9, step: 1e-300}}\n", "too small for the range"),
        ("vary: {a: {low: 0, high: 1e400}}\n", "it must be finite"),
        (f"vary: {{a: {{low: 0, high: 1{'0' * 400}}}}}\n", "contains an integer of more than 400 characters"),
        (f"vary: {{a: [1{'0' * 5000}]}}\n", "contains an integer of more than 400 characters"),
        (f"vary: {{a: [1]}}\nseeds: [0x{'f' * 20_000}]\n", "contains an integer of more than 400 characters"),
        (f"vary: {{a: [{2**63}]}}\n", "contains an integer of more than 64 bits"),
        (f"vary: {{a: [1]}}\nbaseline: {{0x{'f' * 300}: 1}}\n", "contains an integer of more than 64 bits"),
        (f"vary: {{a: [{2**63 - 1}]}}\n", ""),
        (f"{BOMB}vary: *a11\n", "has more than 100,000 values, possibly because of repeated aliases"),
        (f"{MERGE_BOMB}vary: *a39\n", "has more than 100,000 values, possibly because of repeated aliases"),
        ("vary: &a {x: *a}\n", "contains a YAML alias inside the value that it refers to"),
        ("vary: &a [*a]\n", "contains a YAML alias inside the value that it refers to"),
        ("vary: " + "[" * 20_000 + "]" * 20_000, "is nested more than 50 levels deep"),
        ("vary: " + "{a: " * 60 + "1" + "}" * 60, "is nested more than 50 levels deep"),
        ("vary: {a: [1]}\n" + "# " + "x" * 2**20, "it is larger than 256 KB"),
        ("vary: {a: [2024-01-01]}\n", "contains 2024-01-01, which YAML reads as a date; put it in quotes"),
        ("vary: {a: [2024-99-99]}\n", "is not valid YAML: month must be in 1..12"),
        ("vary: {a: [!!python/object/apply:os.system [ls]]}\n", "line 1: could not determine a constructor"),
        ("vary: {a: [!!binary aGk=]}\n", "which YAML reads as a bytes"),
        ("vary: {? [1] : 2}\n", "is not valid YAML: line 1: found unhashable key"),
        ('vary: {a: ["x\\0"]}\n', "cannot be passed on a command line"),
        ("vary: {a: {1: {x: 1}, '1': {x: 2}}}\n", "contains a mapping with a duplicate key"),
        ("vary: {a: [1]}\nbase: [[x]]\n", "base is [['x']]; it must be a path"),
        ("vary: {a: [1]}\nbase: ['']\n", "it must be a path"),
        ("vary: {a: [1]}\nbase: sweep.yaml/x\n", "base: c"),
        ("vary: {a: [1]}\nmethod: [grid]\n", "method is ['grid']; it must be one of"),
        ("vary: {a: [1]}\ndirection: {x: 1}\n", "direction is {'x': 1}; it must be one of"),
        ("vary: {a: [1]}\npruning: {MedianPruner: 3}\n", "pruning: MedianPruner is 3; it must be a mapping"),
        ("vary: {a: [1]}\npruning: {PatientPruner: {wrapped_pruner: x, patience: -1}}\n", "pruning: PatientPruner"),
        ("vary: {a: [1]}\nseeds: [-1]\n", "seeds are [-1]"),
        (f"vary: {{a: [1]}}\nseeds: [{2**40}]\n", "between 0 and 4294967295"),
        ("vary: {a: [{class_path: x.Y, init_args: 3}]}\n", ""),
        ("vary: {a: [{class_path: x.Y, init_args: {1: 2, b: 3}}]}\nfixed: {1: 2, b: 3}\n", ""),
        ("base64: &b {low: 1, high: 2}\nvary: {a: *b}\n", "unknown key base64"),
        ("vary: {a: {x: {1: 2}}, 3: [4]}\n", ""),
        ("vary: {a: &x [1, 2], b: *x}\n", ""),  # an alias is fine
    ],
)  # fmt: skip
def test_hostile_sweep_file(sweep_path: Path, text: str, message: str) -> None:
    sweep_path.write_text(text)
    found = assert_bounded(lambda: read_sweep(sweep_path))
    assert message in found
    assert bool(found) == bool(message)
    assert not found or str(sweep_path) in found


def test_base_config_that_is_not_text(sweep_path: Path) -> None:
    Path("base.yaml").write_bytes(b"\xff\xfe\x00")
    sweep_path.write_text("vary: {a: [1]}\nbase: base.yaml\n")
    assert "base: cannot read base.yaml: it is not UTF-8 text" in assert_bounded(lambda: read_sweep(sweep_path))


def quick_and_slow() -> pytest.MarkDecorator:
    """Seeds of 50 mutations in the quick suite, and of 500 others and some that cannot be written in the slow one."""
    slow = [pytest.mark.slow, pytest.mark.timeout(1800)]
    return pytest.mark.parametrize("seeds", [range(50), pytest.param(range(50, 580), marks=slow)], ids=["50", "500"])


@quick_and_slow()
@pytest.mark.parametrize("given", [SWEEP, LADDER], ids=["search", "ladder"])
def test_mutated_sweep_files(sweep_path: Path, given: dict[str, Any], seeds: range) -> None:
    sweep_path.write_text(yaml.safe_dump(given))
    read_sweep(sweep_path)
    intact = sweep_path.read_bytes()

    def attempt(seed: int, rng: random.Random) -> None:
        if seed % 3:
            mutated = mutate_json(given, rng)
            if rng.random() < 0.05:
                mutated["vary"] = nested(3000)
            try:
                sweep_path.write_text(yaml.dump(mutated, Dumper=yaml.Dumper))
            except (RecursionError, UnicodeEncodeError, ValueError) as error:
                raise NotWritableError from error
        else:
            sweep_path.write_bytes(mutate_bytes(intact, rng))
        read_sweep(sweep_path)

    fuzz("sweep file", sweep_path.parent, seeds, attempt)


def write_run(folder: Path, seed: int, rate: float) -> None:
    """Write the files of a finished run that the comparison reads."""
    folder.mkdir(parents=True)
    config = {"seed_everything": seed, "model": {"init_args": {"lr": rate, "n": 2}}, "trainer": {"max_steps": 5}}
    (folder / "config.yaml").write_text(yaml.safe_dump(config))
    summary = {METRIC: 1.0 + rate + seed / 100, "step": 5, "tokens": 500, "baselines": {"xz": 2.0}, "throughput": None}
    (folder / "summary.json").write_text(json.dumps(summary))
    session = {"versions": {"torch": "2.13"}, "hardware": {"threads": 2}, "code": {"commit": "abc"}}
    (folder / "provenance.json").write_text(json.dumps({"sessions": [session]}))
    (folder / "doctor.json").write_text(json.dumps([{"symptom": "a: b", "cause": "c", "flag": "d", "step": 1}]))
    write_events(folder, {1: 3.0, 3: 2.0, 4: 1.0 + rate}, 1000.0)


@pytest.fixture
def runs(tmp_path: Path) -> Path:
    for seed in (1, 2):
        for rate in (0.1, 0.2):
            write_run(tmp_path / "runs" / f"{rate}_{seed}" / "version_0", seed, rate)
    return tmp_path / "runs"


def compare(runs: Path, target: Path) -> None:
    build_comparison_report([runs], METRIC, "minimize").write(target)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("config.yaml", "seed_everything: [\n", "config.yaml is not valid YAML"),
        ("config.yaml", "- 1\n", "config.yaml has no integer seed_everything"),
        ("config.yaml", "seed_everything: x\n", "config.yaml has no integer seed_everything"),
        ("config.yaml", "seed_everything: 1.5\n", "config.yaml has no integer seed_everything"),
        ("config.yaml", "{}\n", "config.yaml has no integer seed_everything"),
        ("config.yaml", b"\xff\xfe", "config.yaml: not UTF-8 text"),
        ("config.yaml", f"{BOMB}seed_everything: 1\n", "has more than 100,000 values"),
        ("config.yaml", "seed_everything: 1\na: &a [*a]\n", "contains a YAML alias inside the value"),
        ("config.yaml", None, ""),  # not a finished run
        ("summary.json", "{", "summary.json: Expecting property name"),
        ("summary.json", "[]", "summary.json: the content is a list; it must be an object"),
        ("summary.json", "{}", "does not log val/bits_per_byte"),
        ("summary.json", b"\xff", "summary.json: 'utf-8' codec"),
        ("summary.json", "[" * 100_000, "summary.json: "),
        ("summary.json", f'{{"{METRIC}": "x"}}', "does not log val/bits_per_byte"),
        ("summary.json", f'{{"{METRIC}": 1{"0" * 400}}}', ""),
        ("summary.json", f'{{"{METRIC}": NaN}}', ""),
        ("summary.json", f'{{"{METRIC}": Infinity}}', ""),
        ("summary.json", f'{{"{METRIC}": null}}', ""),
        ("summary.json", f'{{"{METRIC}": 1e300}}', ""),
        ("summary.json", f'{{"{METRIC}": 1, "stopped": "guard"}}', ""),
        ("summary.json", None, ""),
        ("provenance.json", "{}", ""),
        ("provenance.json", "[]", ""),
        ("provenance.json", '{"sessions": {}}', ""),
        ("provenance.json", '{"sessions": [3]}', ""),
        ("provenance.json", '{"sessions": [{"versions": 3, "code": [1]}]}', ""),
        ("provenance.json", "{", ""),
        ("doctor.json", "{}", ""),
        ("doctor.json", "[3]", ""),
        ("doctor.json", '[{"symptom": 3, "cause": [], "flag": {}}]', ""),
        ("doctor.json", '[{"symptom": "x"}]', ""),
    ],
)
def test_damaged_run_folder(
    runs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, content: Any, message: str
) -> None:
    """The files that decide the comparison are refused; damage to other files is logged, or counts as a failed run."""
    monkeypatch.setattr(report_module, "plot_curves", lambda *_: None)
    path = runs / "0.2_1" / "version_0" / name
    path.unlink()
    if content is not None:
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
    found = assert_bounded(lambda: compare(runs, tmp_path / "report"))
    assert message in found
    assert bool(found) == bool(message)
    if message:
        assert str(path.parent) in found


def test_metric_that_is_not_finite_is_a_failed_run(runs: Path) -> None:
    (runs / "0.2_1" / "version_0" / "summary.json").write_text(f'{{"{METRIC}": NaN}}')
    report = build_comparison_report([runs], METRIC, "minimize")
    assert [trial.state for trial in report.trials] == ["finished", "failed"]
    assert "1 of 4 runs failed, in 1 of 2 trials." in report.markdown()


JSON_FILES = ("summary.json", "provenance.json", "doctor.json")


@quick_and_slow()
def test_mutated_run_folders(runs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, seeds: range) -> None:
    """One file of a compared run is damaged; every tenth report is written with its plots."""
    folder = runs / "0.2_1" / "version_0"
    intact = {name: (folder / name).read_bytes() for name in (*JSON_FILES, "config.yaml")}
    drawn = report_module.plot_curves

    def attempt(seed: int, rng: random.Random) -> None:
        for name, content in intact.items():
            (folder / name).write_bytes(content)
        name = rng.choice(sorted(intact))
        content = mutate_bytes(intact[name], rng)
        if seed % 4 and name in JSON_FILES:
            content = json.dumps(mutate_json(json.loads(intact[name]), rng)).encode()
        elif seed % 4:
            try:
                content = yaml.dump(mutate_json(yaml.safe_load(intact[name]), rng), Dumper=yaml.Dumper).encode()
            except (RecursionError, UnicodeEncodeError, ValueError) as error:
                raise NotWritableError from error
        (folder / name).write_bytes(content)
        monkeypatch.setattr(report_module, "plot_curves", drawn if seed % 10 == 0 else lambda *_: None)
        compare(runs, tmp_path / "report")

    fuzz("run folder, compared", tmp_path, seeds, attempt)


@quick_and_slow()
def test_mutated_events_of_compared_runs(
    runs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, seeds: range
) -> None:
    folder = runs / "0.2_1" / "version_0"
    for path in folder.glob("*tfevents*"):
        path.unlink()
    intact = write_all_curves(folder, {METRIC: [(step, 3.0 - step / 10) for step in range(9)]})
    [path] = folder.glob("*tfevents*")
    drawn = report_module.plot_curves

    def attempt(seed: int, rng: random.Random) -> None:
        path.write_bytes(mutate_events(intact, rng))
        if seed % 2:  # an unfinished run
            (folder / "summary.json").unlink(missing_ok=True)
            result = read_run_result(folder, 1, METRIC)
            assert RunResult.from_dict(json.loads(json.dumps(result.to_dict()))) == result
            for point in itertools.chain(result.curve, read_curve(folder, METRIC, growing=True)):
                assert math.isfinite(point.value)
                assert math.isfinite(point.seconds)
        else:
            (folder / "summary.json").write_text(json.dumps({METRIC: 1.2, "step": 5, "tokens": 500}))
            monkeypatch.setattr(report_module, "plot_curves", drawn if seed % 10 == 0 else lambda *_: None)
            compare(runs, tmp_path / "report")

    fuzz("events, compared", tmp_path, seeds, attempt)
