"""``generate``: a trained model continues a prompt."""

import json
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

from lit_gpt_scratch.cli.chat import build_chat_prompts, chat_session, read_stdin_lines
from lit_gpt_scratch.cli.collect_preferences import collect_preferences
from lit_gpt_scratch.cli.entrypoint import CommandParser, load_language_model, validate_utf8
from lit_gpt_scratch.distributed.hardware_defaults import explain_no_compile
from lit_gpt_scratch.errors import UserError
from lit_gpt_scratch.generation.sampling import Sampling
from lit_gpt_scratch.generation.streaming import stream_text


def main(args: Sequence[str] | None = None) -> None:
    """The door ``generate``: prompts and what follows them, and nothing else, on standard output."""
    description = "Let a trained model continue a prompt."
    flags = CommandParser(prog="python -m lit_gpt_scratch.generate", description=description)
    flags.add_checkpoint_arguments()
    flags.add_argument(
        "--prompt", action="append", help="text to continue; empty begins a new document; may be given several times"
    )
    flags.add_argument(
        "--chat",
        action="store_true",
        help="reply, in the template of instruction tuning: to each prompt, or in turn to lines that are typed",
    )
    flags.add_argument("--system", help="with --chat or --rank, what the model is told first")
    flags.add_argument(
        "--rank",
        metavar="FILE",
        type=Path,
        help="reply twice to each prompt, or to each line that is typed, ask which is better, and add that to FILE",
    )
    flags.add_argument("--samples", type=int, default=1, help="continuations of each prompt, side by side")
    flags.add_argument("--max_new_tokens", type=int, default=200, help="stop after so many tokens")
    flags.add_argument("--stop", action="append", default=[], help="end before this string; may be given several times")
    flags.add_argument("--temperature", type=float, default=0.8, help="0 always takes the likeliest token")
    flags.add_argument("--top_k", type=int, default=50, help="choose among the k likeliest tokens")
    flags.add_argument("--top_p", type=float, help="choose among the likeliest that together have this probability")
    flags.add_argument("--min_p", type=float, help="choose among those with this share of the likeliest's probability")
    flags.add_argument("--repetition_penalty", type=float, default=1.0, help="above 1, avoid tokens that were there")
    flags.add_argument(
        "--seed", type=int, default=0, help="the same seed writes the same text; each next text has the next"
    )
    flags.add_argument("--compile", action="store_true", help="many seconds at first, then faster: for one long text")
    flags.add_argument("--json", action="store_true", help="print a JSON object a text, with its prompt and seed")
    given = flags.parse_args(args)
    sampling = Sampling(given.repetition_penalty, given.temperature, given.top_k, given.top_p, given.min_p)
    if given.samples < 1:
        raise UserError(f"argument --samples: {given.samples} is not positive")
    if given.seed < 0:
        raise UserError(f"argument --seed: {given.seed} is negative")
    validate_utf8(given, "prompt", "stop", "system")
    if given.system is not None and not (given.chat or given.rank):
        raise UserError("argument --system: it is for --chat and --rank")
    if given.system is not None and not given.system.strip():
        raise UserError("argument --system: it is empty")
    talks = given.chat and given.prompt is None
    if talks and (given.json or given.stop or given.compile or given.samples > 1):
        raise UserError("argument --chat: without a --prompt it takes no --json, --stop, --samples or --compile")
    if given.rank and (given.chat or given.json or given.stop or given.compile or given.samples > 1):
        raise UserError("argument --rank: it takes no --chat, --json, --stop, --samples or --compile")
    prompts = [prompt for prompt in given.prompt or [""] for _ in range(given.samples)]
    seeds = [given.seed + n for n in range(len(prompts))]
    model, tokenizer = load_language_model(given)
    if given.compile and (why_not := explain_no_compile(model.embedding.weight.device, requested=True)):
        raise UserError(f"argument --compile: {why_not}")
    if given.rank:
        lines = read_stdin_lines()
        settings = given.rank, given.max_new_tokens, sampling, given.seed
        try:
            for line in collect_preferences(model, tokenizer, given.system, given.prompt or lines, lines, *settings):
                print(line, flush=True)
        except KeyboardInterrupt:  # a way to end it like any other
            raise SystemExit(130) from None
        return
    if talks:
        for piece in chat_session(
            model, tokenizer, given.system, read_stdin_lines(), given.max_new_tokens, sampling, given.seed
        ):
            sys.stdout.write(piece or "\n")
            sys.stdout.flush()
        return
    asked = build_chat_prompts(tokenizer, given.system, prompts) if given.chat else prompts
    pieces = stream_text(model, tokenizer, asked, given.max_new_tokens, sampling, seeds, given.stop, given.compile)
    if given.json:
        for row, text in _collect_texts(pieces, len(prompts)):
            print(
                json.dumps({"prompt": prompts[row], "text": text, "seed": seeds[row]}, ensure_ascii=False), flush=True
            )
    elif len(prompts) > 1:
        for row, text in _collect_texts(pieces, len(prompts)):
            print("\n" * (row > 0) + ("" if given.chat else prompts[row]) + text, flush=True)
    else:
        sys.stdout.write("" if given.chat else prompts[0])
        for _, piece in pieces:
            sys.stdout.write(piece)
            sys.stdout.flush()
        sys.stdout.write("\n")


def _collect_texts(pieces: Iterator[tuple[int, str]], n: int) -> Iterator[tuple[int, str]]:
    """Texts that are written side by side, one after the other, each when it and those before it are done."""
    texts, done, next_row = [""] * n, [False] * n, 0
    for row, piece in pieces:
        texts[row] += piece
        done[row] = not piece
        while next_row < n and done[next_row]:
            yield next_row, texts[next_row]
            next_row += 1
