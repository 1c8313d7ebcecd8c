"""Compare the scores of a model in this package with those of the same weights in ``lm-eval`` and ``transformers``.

    python experiments/benchmarks/evaluation.py [--checkpoint CKPT] [--rows 300]

The model is exported for ``transformers``. By default, the benchmark trains a model for a few seconds. Questions,
minimal pairs and documents are created from files of the standard library, which the default model is not trained on.
A question asks which line follows a given line; a minimal pair consists of a line and the same words in a different
order.

Questions, pairs and documents are scored in three ways: by ``evaluate``, by an ``lm-eval`` task through this
package's adapter, and by the same task with the ``HFLM`` model of ``lm-eval``. ``HFLM`` adds the start-of-text token
before each context (``add_bos_token``; before whole documents, it always adds this token). Its logits cache is
disabled, because the cache changes the results of repeated requests (version 0.4.13). In ``lm-eval``, the last window
of a document extends backwards for more context; in ``evaluate``, it does not.

In addition, ``transformers`` scores documents token by token, for several window lengths and strides.
"""

import argparse
import contextlib
import json
import random
import sys
import tempfile
import time
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
import transformers
from lm_eval import simple_evaluate
from lm_eval.models.huggingface import HFLM

from lit_gpt_scratch.checkpoint.loading import load_model
from lit_gpt_scratch.distributed.hardware_defaults import configure_process
from lit_gpt_scratch.evaluation import lm_eval_adapter
from lit_gpt_scratch.evaluation.perplexity import score_documents
from lit_gpt_scratch.evaluation.registry import EvalRequest, evaluate
from lit_gpt_scratch.interop import hf_checkpoint
from lit_gpt_scratch.interop.model_family import ModelShape
from lit_gpt_scratch.model import GPT, GPTConfig
from lit_gpt_scratch.text.sources import read_documents
from lit_gpt_scratch.text.tokenizer import Tokenizer

CONTEXT = 256
WINDOWS = ((256, 256), (256, 64), (100, 33), (64, 1))
"""Window lengths and strides, in tokens."""


def trained(texts: Sequence[str]) -> tuple[GPT, Tokenizer]:
    """Train a small model briefly on the given documents, so that it prefers some choices to others."""
    tokenizer = Tokenizer.train(texts, 512)
    torch.manual_seed(0)
    model = GPT(GPTConfig(n_layer=2, n_head=4, n_embd=64), tokenizer.vocab_size, CONTEXT)
    stream = torch.tensor([id_ for text in texts for id_ in (tokenizer.start_of_text, *tokenizer.encode(text))])
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3)
    for _ in range(60):
        starts = torch.randint(len(stream) - CONTEXT - 1, (4,)).tolist()
        windows = torch.stack([stream[start : start + CONTEXT + 1] for start in starts])  # (B, T + 1)
        loss = torch.nn.functional.cross_entropy(model(windows[:, :-1]).flatten(0, 1), windows[:, 1:].flatten())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return model.eval(), tokenizer


def rows(texts: Sequence[str], n: int) -> dict[str, list[dict[str, Any]]]:
    """Create questions, minimal pairs and documents, in the format of each task."""
    rng = random.Random(0)
    lines = [line.strip() for text in texts for line in text.splitlines() if 15 < len(line.strip()) < 50]
    uneven = [line for line in lines if sorted(line.split(), key=len) != line.split()]
    questions, pairs = [], []
    for _ in range(n):
        place = rng.randrange(len(lines) - 1)
        choices = [lines[place + 1], *rng.sample(lines, rng.randrange(1, 4))]
        rng.shuffle(choices)
        questions.append({"question": lines[place], "choices": choices, "answer": choices.index(lines[place + 1])})
        # The sentences must differ: evaluate counts a tie as half, but lm-eval counts the first sentence as correct.
        words = rng.choice(uneven).split()
        pairs.append({"sentence_good": " ".join(words), "sentence_bad": " ".join(sorted(words, key=len))})
    return {"questions": questions, "pairs": pairs, "texts": [{"text": text[:2000]} for text in texts[:20]]}


def tasks(place: Path, content: dict[str, list[dict[str, Any]]]) -> None:
    """Write the rows, and an ``lm-eval`` task for each set of rows, to a folder."""
    choice = {"output_type": "multiple_choice"}
    accuracies = [{"metric": name} for name in ("acc", "acc_norm", "acc_bytes")]
    question = {"doc_to_text": "{{question}}", "doc_to_choice": "{{choices}}", "doc_to_target": "answer"}
    few = {"fewshot_split": "train", "fewshot_config": {"sampler": "first_n"}, "num_fewshot": 2}
    good = {"doc_to_text": "", "doc_to_choice": "{{[sentence_good, sentence_bad]}}", "doc_to_target": 0}
    whole = {"output_type": "loglikelihood_rolling", "doc_to_text": "", "doc_to_target": "{{text}}"}
    made: dict[str, tuple[str, int, dict[str, Any]]] = {
        "own_questions": ("questions", 0, choice | question | {"metric_list": accuracies}),
        "own_few_shot": ("questions", 2, choice | question | few | {"metric_list": accuracies}),
        "own_pairs": ("pairs", 0, choice | good | {"target_delimiter": "", "metric_list": accuracies[:1]}),
        "own_texts": ("texts", 0, whole | {"metric_list": [{"metric": "bits_per_byte"}]}),
    }
    for name, all_of_it in content.items():
        (place / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in all_of_it), encoding="utf-8")
    for name, (source, shots, config) in made.items():
        files = {}
        for side, part in (("train", content[source][:shots]), ("test", content[source][shots:])):
            if part:
                files[side] = str(place / f"{name}.{side}.jsonl")
                Path(files[side]).write_text("".join(json.dumps(row) + "\n" for row in part), encoding="utf-8")
        kept = {"task": name, "dataset_path": "json", "dataset_kwargs": {"data_files": files}, "test_split": "test"}
        (place / f"{name}.yaml").write_text(json.dumps(kept | config), encoding="utf-8")  # JSON is YAML


def by_transformers(model: Any, tokenizer: Tokenizer, texts: Sequence[str], window: int, stride: int) -> float:
    """Return the loss in nats per token, with a separate forward pass for each token over its context in the window."""
    nats, tokens = 0.0, 0
    for text in texts:
        ids = [tokenizer.start_of_text, *tokenizer.encode(text)]
        for t in range(1, len(ids)):
            start = max(0, -(-(t - window) // stride)) * stride
            with torch.inference_mode():
                nats -= model(torch.tensor([ids[start:t]])).logits[0, -1].log_softmax(-1)[ids[t]].item()
            tokens += 1
    return nats / tokens


def main() -> None:
    """Score the model in all ways and print tables."""
    flags = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    flags.add_argument("--checkpoint", type=Path)
    flags.add_argument("--rows", type=int, default=300)
    given = flags.parse_args()
    configure_process()
    every = [document.text for document in read_documents("stdlib")]
    random.Random(0).shuffle(every)
    model, tokenizer = load_model(given.checkpoint) if given.checkpoint else trained(every[100:140])
    with tempfile.TemporaryDirectory() as temporary:
        place = Path(temporary)
        content = rows(every[:60], given.rows)
        tasks(place, content)
        shape = ModelShape(model.config, model.vocab_size, model.block_size)
        hf_checkpoint.write_hf_checkpoint(
            hf_checkpoint.PortableModel(shape, model.state_dict(), tokenizer), place / "hf"
        )
        compare(model, tokenizer, place)
        theirs = transformers.AutoModelForCausalLM.from_pretrained(place / "hf").eval()
    texts = [row["text"][:500] for row in content["texts"][:2]]
    print(f"\n{'loss of two texts':<24}{'evaluate':>14}{'transformers':>14}{'relative':>12}")
    for window, stride in WINDOWS:
        ours = float(score_documents(model, tokenizer, texts, window, stride)["loss"])
        expected = by_transformers(theirs, tokenizer, texts, window, stride)
        print(
            f"{f'window {window}, stride {stride}':<24}{ours:>14.7f}{expected:>14.7f}{abs(ours / expected - 1):>12.1e}"
        )


def compare(model: GPT, tokenizer: Tokenizer, place: Path) -> None:
    """Compute each score in three ways and print a table."""
    lm_eval_adapter.TaskManager = partial(lm_eval_adapter.TaskManager, include_defaults=False)
    manager = lm_eval_adapter.TaskManager(include_path=str(place))
    names = {"acc": "accuracy", "acc_norm": "accuracy_per_character", "acc_bytes": "accuracy_per_byte"}
    kinds: dict[str, tuple[str, EvalRequest, dict[str, str]]] = {
        "own_questions": ("multiple_choice", EvalRequest(str(place / "questions.jsonl")), names),
        "own_few_shot": ("multiple_choice", EvalRequest(str(place / "questions.jsonl"), few_shot=2), names),
        "own_pairs": ("minimal_pairs", EvalRequest(str(place / "pairs.jsonl")), {"acc": "accuracy"}),
        "own_texts": ("text", EvalRequest(str(place / "texts.jsonl")), {"bits_per_byte": "bits_per_byte"}),
    }
    print(f"{'score':<56}{'evaluate':>10}{'adapter':>10}{'HFLM':>10}{'seconds':>10}")
    for task, (kind, asked, figures) in kinds.items():
        seconds = []
        with contextlib.redirect_stdout(sys.stderr):
            began = time.perf_counter()
            ours = evaluate(kind, model, tokenizer, asked).scores
            seconds.append(time.perf_counter() - began)
            began = time.perf_counter()
            adapted = lm_eval_adapter.run_lm_eval(model, tokenizer, [task], include_path=place)[task]
            seconds.append(time.perf_counter() - began)
            own = {} if task == "own_texts" else {"add_bos_token": True}
            theirs = HFLM(pretrained=str(place / "hf"), device="cpu", batch_size=16, logits_cache=False, **own)
            began = time.perf_counter()
            found = simple_evaluate(theirs, tasks=[task], task_manager=manager, bootstrap_iters=0)["results"][task]
            seconds.append(time.perf_counter() - began)
        for name, own_name in figures.items():
            values = ours.metrics[own_name], adapted.metrics[name], found[f"{name},none"]
            label = f"{kind}, few_shot {asked.few_shot}: {own_name}"
            print(f"{label:<56}" + "".join(f"{value:>10.5f}" for value in values), end="")
            print("".join(f"{value:>10.1f}" for value in seconds), flush=True)
            seconds = []  # printed once per task, because the task computes all its metrics together


if __name__ == "__main__":
    main()
