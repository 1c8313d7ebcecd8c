"""Mutated TensorBoard event files, given to ``doctor``, to a resumed run, and to the comparison of two runs."""

import io
import random
from collections.abc import Iterable, Mapping
from contextlib import redirect_stdout
from pathlib import Path

import pytest
from tensorboard.compat.proto.event_pb2 import Event, SessionLog
from tensorboard.compat.proto.summary_pb2 import Summary, SummaryMetadata
from tensorboard.compat.proto.tensor_pb2 import TensorProto

from lit_gpt_scratch.callbacks.diagnostics import format_table
from lit_gpt_scratch.checkpoint.compare_checkpoints import compare_curves
from lit_gpt_scratch.cli.doctor import main
from lit_gpt_scratch.diagnostics.rule_engine import Diagnosis, RuleEngine
from lit_gpt_scratch.diagnostics.rules import RULES
from lit_gpt_scratch.diagnostics.tensorboard_reader import replay_events
from lit_gpt_scratch.errors import UserError
from tests.diagnostics.test_rule_engine import CASES, FACTS, Curves
from tests.mutations import fuzz, join_records, mutate_events

OTHERS: Curves = {
    "baselines/unigram": [(0, 3.3)], "run/train_tokens": [(0, 1e5)], "run/guard": [(0, 2.0)],
    "run/kl_target": [(0, 6.0)], "guard/spike": [(104, 9.0)], "guard/non_finite": [(109, 1.0)],
    "run/loader_processes": [(0, 2.0)], "train/kl_coefficient": [(9, 0.1)], "train/ended": [(9, 1.0), (19, 0.5)],
    "val/reward": [(9, 0.5), (19, 0.9)], "val/true_reward": [(9, 0.5), (19, 0.2)], "run/post_norm": [(0, 1.0)],
    "dynamics/update_ratio/feed_forward": [(0, 0.003), (299, 0.003)],
}  # fmt: skip
"""Curves that rules read in addition to those of ``CASES``."""
TEXTS = {
    "guard/spike/where": "loss 9\n- window 3",
    "doctor": format_table([Diagnosis("loss spike: 9", "a", "--b", 104)]),
}


def of_session(curves: Mapping[str, Iterable[tuple[int, float]]]) -> list[Event]:
    """Return the events of a session, as PyTorch and Lightning write them; every third scalar is a tensor."""
    events = [
        Event(wall_time=0.0, file_version="brain.Event:2"),
        Event(wall_time=1.0, step=0, session_log=SessionLog(status=SessionLog.START)),
    ]
    points = sorted((step, name, value) for name, curve in curves.items() for step, value in curve)
    for nth, (step, name, value) in enumerate(points):
        if nth % 3:
            scalar = Summary.Value(tag=name, simple_value=value)
        else:
            metadata = SummaryMetadata(plugin_data=SummaryMetadata.PluginData(plugin_name="scalars"))
            scalar = Summary.Value(tag=name, metadata=metadata, tensor=TensorProto(dtype=1, float_val=[value]))
        events.append(Event(wall_time=2.0 + step, step=step, summary=Summary(value=[scalar])))
    for name, text in TEXTS.items():
        metadata = SummaryMetadata(plugin_data=SummaryMetadata.PluginData(plugin_name="text"))
        shape = TensorProto(dtype=7, string_val=[text.encode()])
        shape.tensor_shape.dim.add().size = 1
        value = Summary.Value(tag=f"{name}/text_summary", metadata=metadata, tensor=shape)
        events.append(Event(wall_time=400.0, step=104, summary=Summary(value=[value])))
    return events


def write_all_curves(folder: Path, curves: Mapping[str, Iterable[tuple[int, float]]]) -> bytes:
    """Write an event file with these curves, and return its content."""
    content = join_records(event.SerializeToString() for event in of_session(curves))
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "events.out.tfevents.1000000000.host.1.0").write_bytes(content)
    return content


def read(run: Path, intact: Path) -> None:
    """Do what every command does with the events of a run."""
    refused: UserError | None = None
    for flags in ([], ["--json"]):
        try:
            with redirect_stdout(io.StringIO()):
                main([str(run), *flags])
        except UserError as error:
            refused = error
    try:
        resumed = RuleEngine(RULES)
        replay_events(run, resumed)
        resumed.drop_from(150)
        resumed.add_metrics(150, {name: 1.0 for rule in RULES for name in rule.reads})
        resumed.finish()
        format_table(resumed.diagnoses)
    except UserError as error:
        refused = error
    compare_curves(run, intact)
    if refused:
        raise refused


def test_every_curve_that_a_rule_reads_is_mutated() -> None:
    known = {*OTHERS, *FACTS}.union(*CASES.values())
    assert {name for rule in RULES for name in rule.reads} <= known


@pytest.mark.parametrize(
    "seeds",
    [range(50), pytest.param(range(50, 550), marks=[pytest.mark.slow, pytest.mark.timeout(1800)])],
    ids=["50", "500"],
)
def test_mutated_events(tmp_path: Path, seeds: range) -> None:
    run, intact = tmp_path / "run", tmp_path / "intact"
    cases = sorted(CASES)
    facts = {name: [(0, value)] for name, value in FACTS.items()}
    written = {name: write_all_curves(run, facts | OTHERS | CASES[name]) for name in cases}
    write_all_curves(intact, facts | OTHERS)

    def attempt(seed: int, rng: random.Random) -> None:
        [path] = run.iterdir()
        path.write_bytes(mutate_events(written[cases[seed % len(cases)]], rng))
        read(run, intact)

    fuzz("events, doctor", tmp_path, seeds, attempt)
