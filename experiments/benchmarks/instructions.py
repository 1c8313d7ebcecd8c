"""Measure the loss and the format of replies before and after instruction tuning, of all parameters and with LoRA.

    python experiments/benchmarks/instructions.py instructions.json --text SOURCE

A base model is trained on SOURCE, which accepts the same values as `--data.source`; in a table, the text must be in
the column `message`. The base model is then fine-tuned with `instructions.yaml` and `instructions_lora.yaml` from
`experiments/finetune`. The loss is computed on the test replies, in nats per token. Replies to the test prompts are
generated greedily. A generated reply has the correct format if it is not empty, ends within 120 tokens, and contains
no turn markers.
"""

import argparse
import os
import platform
import tempfile
import time
from pathlib import Path

import lightning as L
from fitting import EXPERIMENTS, fit, quiet

from lit_gpt_scratch.checkpoint.loading import build_model, load_checkpoint
from lit_gpt_scratch.checkpoint.run_folder import find_checkpoint
from lit_gpt_scratch.data import Conversations
from lit_gpt_scratch.evaluation.chat_eval import ChatReply, generate_replies
from lit_gpt_scratch.tasks import LanguageModel

LONGEST = 120
"""Maximum number of tokens per generated reply, about the length of the longest replies in the records."""


def loss(init_from: Path, data: Conversations) -> float:
    """Compute the loss on the test replies, without training."""
    trainer = L.Trainer(
        accelerator="cpu", logger=False, enable_checkpointing=False, enable_progress_bar=False,
        enable_model_summary=False, use_distributed_sampler=False,
    )  # fmt: skip
    (measured,) = trainer.test(LanguageModel(init_from=str(init_from), compile=False), data, verbose=False)
    return measured["test/loss"]


def test_replies(run: Path, data: Conversations) -> list[ChatReply]:
    """Generate replies to the test prompts."""
    path = find_checkpoint(str(run), Path(), None)
    trained = build_model(load_checkpoint(path), path)
    records = [data.records[place][1] for place in data.split_indices["test"]]
    prompts = [data.template.render_prompt(record.messages[:-1]) for record in records]
    return generate_replies(trained.require_language_model()[0], trained.tokenizer, prompts, LONGEST)


def main() -> None:
    """Run all stages and print a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("source")
    parser.add_argument("--text", required=True, help="training text of the base model")
    given = parser.parse_args()
    quiet()
    threads = os.cpu_count() or 1
    with tempfile.TemporaryDirectory() as folder:
        runs = Path(folder)
        flags = [f"--config={EXPERIMENTS / 'base.yaml'}", f"--data.source={given.text}", "--data.text_column=message"]
        base, summary = fit(runs, "base", threads, *flags)
        data = Conversations(source=given.source, init_from=str(base))
        before = loss(base, data)
        n = len(data.split_indices["test"])
        print(
            f"{platform.system()} {platform.machine()}, {os.cpu_count()} cores\n"
            f"base: {summary['parameters']:,} parameters, {summary['tokens']:,} tokens in {summary['step']} steps, "
            f"{summary['wall']:.0f} s, val/bits_per_byte {summary['val/bits_per_byte']:.3f}\n"
            f"test: {n} records, {data.training_copies['test']} of them also in training\n\n"
            f"{'':28}{'loss on replies':>16}{'in format':>10}{'parameters trained':>20}{'seconds':>9}"
        )
        report("before", before, test_replies(base, data), 0.0, 0.0)
        for name, config in {"all parameters": "instructions.yaml", "LoRA": "instructions_lora.yaml"}.items():
            flags = [f"--config={EXPERIMENTS / config}", f"--model.init_from={base}", f"--data.source={given.source}"]
            run, summary = fit(runs, Path(config).stem, threads, *flags)
            began = time.perf_counter()
            replies = test_replies(run, data)
            share = summary["trained_parameters"] / summary["parameters"]
            report(name, summary["test/loss"], replies, share, summary["wall"])
            seconds = time.perf_counter() - began
            print(f"  {len(replies)} replies generated in {seconds:.0f} s; the first: {replies[0].text!r}")


def report(name: str, loss: float, replies: list[ChatReply], share: float, seconds: float) -> None:
    """Print a row of the table."""
    form = sum(reply.well_formed for reply in replies) / len(replies)
    print(f"{name:28}{loss:16.3f}{form:10.1%}{share:20.2%}{seconds:9.0f}", flush=True)


if __name__ == "__main__":
    main()
