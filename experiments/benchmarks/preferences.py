"""Measure accuracy, margin and loss on replies before and after DPO on a file of preferences.

    python experiments/benchmarks/preferences.py instructions_with_preference.json

A base model is trained on the standard library (or on `--text`, which accepts the same values as `--data.source`). It
is fine-tuned on the column `output` of the file with `experiments/finetune/instructions.yaml`, and then trained on
the pairs of the file with `experiments/align/dpo.yaml`. Test pairs are not used for instruction tuning. Pairs with
equal replies are dropped.

`accuracy` is the fraction of held-out pairs whose preferred reply has the higher reward, `beta * log(policy / initial
model)`, and `margin` is the mean difference between the two rewards; before DPO, both rewards are 0. `by logprob` is
the fraction of held-out pairs whose preferred reply has the higher log-probability, without a reference model. `reply
loss` is the loss on the preferred replies, in nats per token.
"""

import argparse
import json
import os
import platform
import tempfile
from pathlib import Path

import lightning as L
from fitting import EXPERIMENTS, fit, quiet

from lit_gpt_scratch.data import Preferences
from lit_gpt_scratch.tasks import DPO

ALIGN = EXPERIMENTS.parent / "align"
SHARES = {"validation_share": 0.05, "test_share": 0.1}


def measured(init_from: Path, data: Preferences, **how: bool) -> dict[str, float]:
    """Compute the metrics on the test pairs, without training."""
    trainer = L.Trainer(
        accelerator="cpu", logger=False, enable_checkpointing=False, enable_progress_bar=False,
        enable_model_summary=False, use_distributed_sampler=False,
    )  # fmt: skip
    (found,) = trainer.test(DPO(init_from=str(init_from), compile=False, **how), data, verbose=False)
    return dict(found)


def main() -> None:
    """Run all stages and print a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("source")
    parser.add_argument("--text", help="training text of the base model; by default the standard library")
    parser.add_argument("--runs", type=Path, help="folder that contains the runs; existing runs are reused")
    given = parser.parse_args()
    quiet()
    threads = os.cpu_count() or 1
    with tempfile.TemporaryDirectory() as folder:
        runs = given.runs or Path(folder)
        text = [f"--data.source={given.text}"] if given.text else []
        base, began = fit(runs, "base", threads, f"--config={EXPERIMENTS / 'base.yaml'}", *text)
        # Both stages have the same test split, because they split the same pairs, in file order, with the same seed.
        pairs = Path(folder, "pairs.jsonl")
        rows = [row for row in json.loads(Path(given.source).read_text("utf-8")) if row["chosen"] != row["rejected"]]
        pairs.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
        shares = [f"--data.{name}={share}" for name, share in SHARES.items()]
        source = [f"--data.source={pairs}", *shares, "--data.block_size=512"]
        tuning = [f"--config={EXPERIMENTS / 'instructions.yaml'}", f"--model.init_from={base}", "--data.batch_size=2"]
        start, tuned = fit(runs, "start", threads, *tuning, *source)
        aligning = [f"--config={ALIGN / 'dpo.yaml'}", f"--model.init_from={start}"]
        run, after = fit(runs, "dpo", threads, *aligning, *source)
        data = Preferences(source=str(pairs), init_from=str(start), block_size=512, batch_size=16, **SHARES)
        before = measured(start, data)
        print(
            f"{platform.system()} {platform.machine()}, {os.cpu_count()} cores\n"
            f"base: {began['parameters']:,} parameters, {began['tokens']:,} tokens, {began['seconds']:.0f} s; "
            f"start: test/loss {tuned['test/loss']:.3f}, {tuned['seconds']:.0f} s; DPO: {after['step']} steps, "
            f"{after['seconds']:.0f} s\n"
            f"test: {len(data.split_indices['test'])} pairs of {len(data.records)}, "
            f"{data.training_copies['test']} also in training\n\n"
            f"{'':8}{'accuracy':>10}{'margin':>10}{'by logprob':>12}{'reply loss':>12}"
        )
        for name, found, place in (("before", before, start), ("after", after, run)):
            by_logprob = measured(place, data, reference_free=True)["test/accuracy"]
            accuracy = f"{found['test/accuracy']:.1%}" if name == "after" else "-"
            print(
                f"{name:8}{accuracy:>10}{found['test/margin']:10.3f}{by_logprob:12.1%}{found['test/reply_loss']:12.3f}",
                flush=True,
            )


if __name__ == "__main__":
    main()
