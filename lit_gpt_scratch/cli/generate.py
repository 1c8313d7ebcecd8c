"""``generate``: a trained model continues a prompt."""

import sys
from collections.abc import Sequence

from lit_gpt_scratch.cli.door import Flags, find_model
from lit_gpt_scratch.decoding.sampling import Sampling, generate
from lit_gpt_scratch.errors import UserError


def main(args: Sequence[str] | None = None) -> None:
    """The door ``generate``: the prompt and what follows it, and nothing else, on standard output."""
    flags = Flags(prog="python -m lit_gpt_scratch.generate", description="Let a trained model continue a prompt.")
    flags.add_checkpoint()
    flags.add_argument("--prompt", default="", help="text to continue; empty begins a new document")
    flags.add_argument("--max_new_tokens", type=int, default=200, help="stop after so many tokens")
    flags.add_argument("--temperature", type=float, default=0.8, help="0 always takes the likeliest token")
    flags.add_argument("--top_k", type=int, default=50, help="choose among the k likeliest tokens")
    flags.add_argument("--seed", type=int, default=0, help="the same seed writes the same text")
    given = flags.parse_args(args)
    sampling = Sampling(given.temperature, given.top_k)
    if not 0 <= given.seed < 2**63:
        raise UserError(f"argument --seed: {given.seed} is not between 0 and 2**63")
    if any("\ud800" <= character <= "\udfff" for character in given.prompt):
        raise UserError("argument --prompt: it is not UTF-8 text")
    model, tokenizer = find_model(given)
    prompt = [tokenizer.end_of_text, *tokenizer.encode(given.prompt)]
    ids = generate(model, prompt, given.max_new_tokens, sampling, given.seed, tokenizer.end_of_text)
    sys.stdout.write(given.prompt)
    for piece in tokenizer.decode_stream(ids):
        sys.stdout.write(piece)
        sys.stdout.flush()
    sys.stdout.write("\n")
