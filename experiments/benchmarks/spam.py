"""Compare spam classification by a small GPT, fine-tuned fully or with LoRA, with n-gram baselines on the same splits.

    python experiments/benchmarks/spam.py sms_spam.tsv [--splits 5]

The file must have the columns `labels` and `message`. Every split contains all spam messages and an equal number of
other messages, sampled with a different seed for each split and without cleaning: 70% training, 10% validation, 20%
test. One base model is trained first, without labels, on the messages that are neither in any validation or test
split nor duplicates of a message in such a split (ignoring case and whitespace). For each split, the base model is
then fine-tuned with `experiments/finetune/spam.yaml` and `spam_lora.yaml`. Two runs execute in parallel, each with
half of the cores.

The baselines use scikit-learn (`pip install scikit-learn`): logistic regression on TF-IDF features of word or
character n-grams, with default settings except for `max_iter`, trained only on the training split. N-grams of 3 to 5
characters are a common choice; n-grams of 1 to 5 characters have the highest accuracy of several ranges on these test
splits.
"""

import argparse
import json
import os
import platform
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from statistics import mean, stdev
from typing import Any

from fitting import EXPERIMENTS, fit
from sklearn.feature_extraction.text import TfidfVectorizer
from sklearn.linear_model import LogisticRegression
from sklearn.pipeline import make_pipeline

from lit_gpt_scratch.data import LabelledText

COLUMNS = {"text_column": "message", "label_column": "labels"}
BASELINES = {
    "words": {"analyzer": "word"},
    "3 to 5 characters": {"analyzer": "char", "ngram_range": (3, 5)},
    "1 to 5 characters": {"analyzer": "char", "ngram_range": (1, 5)},
}
STAGES = {"all parameters": "spam.yaml", "LoRA": "spam_lora.yaml"}


def key(text: str) -> str:
    """Normalize case and whitespace, so that duplicates are equal."""
    return " ".join(text.split()).casefold()


def base_text(source: str, splits: list[LabelledText], path: Path) -> int:
    """Write the messages that are in no validation or test split to a file; return the number of messages."""
    held_out = {
        key(data.records[place][1].text)
        for data in splits
        for side in ("validation", "test")
        for place in data.split_indices[side]
    }
    every = LabelledText(source=source, **COLUMNS).records
    texts = [record.text for _, record in every if key(record.text) not in held_out]
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts), encoding="utf-8")
    return len(texts)


def baseline(data: LabelledText, **of: Any) -> float:
    """Return the test accuracy of an n-gram baseline."""

    def side(name: str) -> tuple[list[str], list[str]]:
        records = [data.records[place][1] for place in data.split_indices[name]]
        return [record.text for record in records], [record.label for record in records]

    model = make_pipeline(TfidfVectorizer(**of), LogisticRegression(max_iter=1000))
    return float(model.fit(*side("train")).score(*side("test")))


def row(name: str, values: list[float], note: str = "") -> str:
    """Format a row of the table."""
    figures = "  ".join(f"{100 * value:5.1f}" for value in values)
    spread = 100 * stdev(values) if len(values) > 1 else 0.0
    return f"{name:34}{figures}   {100 * mean(values):5.2f} ± {spread:.2f}   {note}"


def main() -> None:
    """Run all splits and print a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("source")
    parser.add_argument("--splits", type=int, default=5)
    parser.add_argument(
        "--first_seed", type=int, default=0, help="seed of the first split; settings were chosen on seeds 100 to 104"
    )
    parser.add_argument("--runs", type=Path, help="folder that contains the runs; existing runs are reused")
    given = parser.parse_args()
    seeds = range(given.first_seed, given.first_seed + given.splits)
    splits = [LabelledText(source=given.source, balance=True, split_seed=seed, **COLUMNS) for seed in seeds]
    threads = max(1, (os.cpu_count() or 1) // 2)
    with tempfile.TemporaryDirectory() as folder, ThreadPoolExecutor(2) as pool:
        runs = given.runs or Path(folder)
        runs.mkdir(exist_ok=True)
        text = runs / "messages.jsonl"
        n_texts = base_text(given.source, splits, text)
        base, summary = fit(runs, "base", 2 * threads, f"--config={EXPERIMENTS / 'base.yaml'}", f"--data.source={text}")
        print(
            f"{platform.system()} {platform.machine()}, {os.cpu_count()} cores\n"
            f"base: {summary['parameters']:,} parameters, {n_texts:,} messages, {summary['tokens']:,} tokens in "
            f"{summary['step']} steps, {summary['wall']:.0f} s, val/bits_per_byte {summary['val/bits_per_byte']:.3f}",
            flush=True,
        )
        flags = [f"--model.init_from={base}", f"--data.source={given.source}", "--data.balance=true"]
        flags += [f"--data.{name}={column}" for name, column in COLUMNS.items()]
        running = {
            stage: [
                pool.submit(
                    fit, runs, f"{Path(config).stem}_{seed}", threads, f"--config={EXPERIMENTS / config}", *flags,
                    f"--data.split_seed={seed}",
                )
                for seed in seeds
            ]
            for stage, config in STAGES.items()
        }  # fmt: skip
        found = {stage: [future.result()[1] for future in futures] for stage, futures in running.items()}
    ngrams = {name: [baseline(data, **of) for data in splits] for name, of in BASELINES.items()}
    copies = ", ".join(f"{data.training_copies['test']} of {len(data.split_indices['test'])}" for data in splits)
    print(f"test messages that are also in training: {copies}")
    tuning = sum(one["wall"] for summaries in found.values() for one in summaries) / 2
    print(f"seconds: base {summary['wall']:.0f}, all others, two in parallel, {tuning:.0f}")
    print(f"\n{'test accuracy, %':34}" + "  ".join(f"{seed:5}" for seed in seeds) + "    mean ± sd")
    for name, accuracies in ngrams.items():
        print(row(name, accuracies, "TF-IDF, logistic regression"))
    for stage, summaries in found.items():
        share = summaries[0]["trained_parameters"] / summaries[0]["parameters"]
        seconds = mean(one["wall"] for one in summaries)
        accuracies = [one["test/accuracy"] for one in summaries]
        print(row(stage, accuracies, f"{share:.2%} of the parameters trained; {seconds:.0f} s per run"))
        for name in ("3 to 5 characters", "1 to 5 characters"):
            gains = [ours - theirs for ours, theirs in zip(accuracies, ngrams[name], strict=True)]
            print(row(f"  less that of {name}", gains))
        print(row("  F1", [one["test/f1"] for one in summaries]))
        print(row("  AUROC", [one["test/auroc"] for one in summaries]))


if __name__ == "__main__":
    main()
