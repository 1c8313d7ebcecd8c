"""Compare ways to generate past the context, by the loss at each position of long texts.

    python experiments/benchmarks/past_context.py PICTURE [--context 128] [--texts 16] [--steps 1800] [FIT_FLAG ...]
    python experiments/benchmarks/past_context.py PICTURE --checkpoint CKPT [--context 128] [--texts 16]

Trains a model with `fit` and the given flags, or loads a checkpoint or Hugging Face folder, whose context may be longer
and is then shortened. `generate` continues the start-of-text token before validation texts of 20 contexts, but instead
of sampling, it is given the next token of the text, whose log-probability it returns. Each way is thus measured by the
code that generates.

Prints the mean loss in sections of the texts, and how much attention goes to the first tokens of the context, to which
the authors of StreamingLLM (https://arxiv.org/abs/2309.17453) attribute the failure of a plain rolling cache. Draws the
loss by position to the file PICTURE.
"""

import argparse
import os
import platform
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final

import torch
from fitting import fit
from matplotlib.figure import Figure
from torch import Tensor

from lit_gpt_scratch.checkpoint.loading import load_model
from lit_gpt_scratch.checkpoint.run_folder import find_checkpoint
from lit_gpt_scratch.data import PackedText
from lit_gpt_scratch.generation.decode_loop import generate
from lit_gpt_scratch.generation.sampling import Sampling
from lit_gpt_scratch.model import GPT
from lit_gpt_scratch.model.activation_hooks import capture_activations
from lit_gpt_scratch.text.tokenizer import Tokenizer

CONTEXTS: Final = 20
"""Length of each text, in contexts."""
WAYS: Final = {
    "last half encoded again": None,
    "rolling cache, 4 sink tokens": 4,
    "rolling cache, no sink token": 0,
}
"""Argument ``sink_tokens`` of ``generate``, by the name of the way."""
SECTIONS: Final = ((0.0, 0.5), (0.5, 1.0), (1.0, 2.0), (2.0, 5.0), (5.0, 10.0), (10.0, 20.0))
"""Sections of the texts whose mean loss is printed, in contexts."""


@dataclass(frozen=True)
class GivenTokens(Sampling):
    """Sampling that returns the tokens of given texts instead of random tokens."""

    temperature: float = 1.0
    steps: Iterator[Tensor] = field(default_factory=lambda: iter(()))

    def sample(self, logits: Tensor, uniform: list[float], seen: Tensor | None = None) -> Tensor:
        """Return the next token of each text."""
        return next(self.steps)


def validation_texts(tokenizer: Tokenizer, n: int, length: int) -> Tensor:
    """Return the first tokens of n validation documents of the standard library, int64 tensor of shape (n, length)."""
    data = PackedText()
    tokens, found = data.store.validation, []
    for starts, lengths in tokens.document_spans():
        for start, size in zip(starts.tolist(), lengths.tolist(), strict=True):
            text = data.tokenizer.decode(tokens.read(start + 1, start + size).tolist())
            ids = [tokenizer.start_of_text, *tokenizer.encode(text)]
            if len(ids) >= length:
                found.append(ids[:length])
            if len(found) == n:
                return torch.tensor(found)
    raise SystemExit(f"only {len(found)} validation documents have {length} tokens; lower --texts or --context")


def losses(model: GPT, texts: Tensor, sink_tokens: int | None) -> Tensor:
    """Return the loss of each token but the first in nats, of shape (texts, length - 1)."""
    n, length = texts.shape
    logprobs: list[list[float]] = [[] for _ in range(n)]
    given = GivenTokens(steps=iter(texts.T[1:]))
    prompts = texts[:, :1].tolist()
    for _ in generate(model, prompts, length - 1, given, [0] * n, (), logprobs=logprobs, sink_tokens=sink_tokens):
        pass
    return -torch.tensor(logprobs)


def first_token_attention(model: GPT, texts: Tensor) -> list[Tensor]:
    """Return the attention of the second half of a context to its first token, of shape (n_head,) for each block."""
    return capture_activations(
        model,
        texts[:, : model.block_size],
        None,
        lambda block: torch.as_tensor(block.weights)[:, :, model.block_size // 2 :, 0].mean((0, 2)),
    ).layers


def draw(found: dict[str, Tensor], context: int, title: str, path: Path) -> None:
    """Draw the mean loss over texts, averaged over quarters of a context."""
    figure = Figure(figsize=(8, 4.5), layout="constrained")
    axes = figure.subplots()
    bin_size = context // 4
    for name, loss in found.items():
        means = loss.split(bin_size, dim=1)
        position = [(index + 0.5) * bin_size / context for index in range(len(means))]
        axes.plot(position, [float(mean.mean()) for mean in means], label=name, linewidth=1.2)
    axes.axvline(1, color="0.6", linestyle="--", linewidth=1)
    axes.set_title(title)
    axes.set_xlabel(f"position in the text (contexts of {context} tokens)")
    axes.set_ylabel("loss (nats per token)")
    axes.legend(frameon=False)
    axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=120)


def main() -> None:
    """Train or load the model, measure each way, and print and draw the losses."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("picture", type=Path)
    parser.add_argument("--checkpoint", help="run folder, checkpoint or Hugging Face folder (default: train a model)")
    parser.add_argument("--context", type=int, default=128)
    parser.add_argument("--texts", type=int, default=16)
    parser.add_argument("--steps", type=int, default=1800)
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument("--runs", type=Path, help="folder that contains the run; an existing run is reused")
    given, flags = parser.parse_known_args()
    if given.checkpoint and flags:
        parser.error(f"{' '.join(flags)}: flags of fit have no effect with --checkpoint")
    torch.set_num_threads(given.threads)
    context = given.context
    print(f"{platform.machine()}, {os.cpu_count()} cores, {given.threads} threads, torch {torch.__version__}")
    with tempfile.TemporaryDirectory() as folder:
        checkpoint, name, validation = given.checkpoint, str(given.checkpoint), ""
        if checkpoint is None:
            training = f"--data.block_size={context}", f"--trainer.max_steps={given.steps}", *flags
            run, summary = fit(given.runs or Path(folder), "past_context", given.threads, *training)
            checkpoint, name, validation = str(run), " ".join(training), f", val/loss {summary['val/loss']:.3f}"
        model, tokenizer = load_model(find_checkpoint(checkpoint, Path(), None))
    print(f"{name}: {sum(weight.numel() for weight in model.parameters()):,} parameters{validation}")
    if context > model.block_size:
        parser.error(f"--context is {context}, but the context of the model is {model.block_size}")
    model.block_size = context
    texts = validation_texts(tokenizer, given.texts, CONTEXTS * context)
    print(f"{given.texts} texts of {texts.size(1):,} tokens; loss in nats per token\n")
    print(f"{'contexts':30}" + "".join(f"{f'{a:g}-{b:g}':>9}" for a, b in SECTIONS) + f"{'tokens/s':>10}")
    found = {}
    for way, sink_tokens in WAYS.items():
        began = time.perf_counter()
        found[way] = losses(model, texts, sink_tokens)
        speed = found[way].numel() / (time.perf_counter() - began)
        means = [found[way][:, round(a * context) : round(b * context)].mean() for a, b in SECTIONS]
        print(f"{way:30}" + "".join(f"{mean:9.3f}" for mean in means) + f"{speed:10,.0f}", flush=True)
    print(f"\nattention of the second half of a context to its first token (uniform attention: {4 / 3 / context:.3f})")
    for layer, share in enumerate(first_token_attention(model, texts)):
        print(f"block {layer + 1}: mean over heads {share.mean():.3f}, largest {share.max():.3f}")
    draw(found, context, f"Loss by position in texts of {CONTEXTS} contexts", given.picture)


if __name__ == "__main__":
    main()
