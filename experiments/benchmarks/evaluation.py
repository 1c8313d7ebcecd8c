"""Scores of a model, and of the same weights under ``lm-eval`` and ``transformers``, side by side.

    python experiments/benchmarks/evaluation.py [--checkpoint CKPT] [--rows 300]

The model (by default one trained for a few seconds) is exported for ``transformers``. Questions, minimal pairs and
texts are made from files of the standard library that it was not trained on, if it was trained here: which line comes
next, and a line against its words in another order. Each is scored by ``evaluate``, by a task of ``lm-eval`` through
this package's adapter, and by the same task on ``lm-eval``'s ``HFLM``: with the start of text before each context
(``add_bos_token``; for whole texts it is always added), and without its logits cache, which changes the results of
repeated requests (0.4.13). Its last window of a text extends back for context, ours does not. Texts are scored again
by ``transformers`` token by token, for some windows and strides.
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
"""Tokens of a window, and of a stride."""


def trained(texts: Sequence[str]) -> tuple[GPT, Tokenizer]:
    """A small model trained briefly on these texts, so that it prefers some choices to others."""
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
    """Questions, pairs and documents, in each task's format."""
    rng = random.Random(0)
    lines = [line.strip() for text in texts for line in text.splitlines() if 15 < len(line.strip()) < 50]
    uneven = [line for line in lines if sorted(line.split(), key=len) != line.split()]
    questions, pairs = [], []
    for _ in range(n):
        place = rng.randrange(len(lines) - 1)
        choices = [lines[place + 1], *rng.sample(lines, rng.randrange(1, 4))]
        rng.shuffle(choices)
        questions.append({"question": lines[place], "choices": choices, "answer": choices.index(lines[place + 1])})
        # Equal sentences are a tie: it counts half here, but lm-eval credits the first.
        words = rng.choice(uneven).split()
        pairs.append({"sentence_good": " ".join(words), "sentence_bad": " ".join(sorted(words, key=len))})
    return {"questions": questions, "pairs": pairs, "texts": [{"text": text[:2000]} for text in texts[:20]]}


def tasks(place: Path, content: dict[str, list[dict[str, Any]]]) -> None:
    """The rows, and an ``lm-eval`` task for each."""
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
    """Nats per token; each token has its own forward pass over its context in the window."""
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
    """Print the table."""
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
    """Compute each score in the three ways."""
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
            seconds = []  # of all metrics of a task together


if __name__ == "__main__":
    main()
