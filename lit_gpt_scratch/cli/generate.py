"""``generate``: continue prompts, chat, or collect preferences with a trained model."""

from collections.abc import Iterator, Sequence
from pathlib import Path

from lit_gpt_scratch.cli.chat import build_chat_prompts, chat_session, read_stdin_lines
from lit_gpt_scratch.cli.collect_preferences import collect_preferences
from lit_gpt_scratch.cli.entrypoint import CommandParser, load_language_model, validate_utf8
from lit_gpt_scratch.distributed.hardware_defaults import explain_no_compile
from lit_gpt_scratch.errors import UserError
from lit_gpt_scratch.generation.sampling import Sampling
from lit_gpt_scratch.generation.streaming import stream_text
from lit_gpt_scratch.terminal_output import dump_json, write_generated


def main(args: Sequence[str] | None = None) -> None:
    """Run the ``generate`` command, which writes only prompts and generated text to standard output.

    Text is written verbatim to a file or a pipe. On a terminal and with ``--json``, control characters are escaped.
    """
    description = "Continue prompts, chat, or collect preferences with a trained model."
    flags = CommandParser(prog="python -m lit_gpt_scratch.generate", description=description)
    flags.add_checkpoint_arguments()
    flags.add_argument(
        "--prompt", action="append", help="text to continue; an empty prompt starts a new document; may be repeated"
    )
    flags.add_argument(
        "--chat",
        action="store_true",
        help="reply to each --prompt, or to lines typed in the terminal, using the model's chat template",
    )
    flags.add_argument("--system", help="system message for --chat or --rank")
    flags.add_argument(
        "--rank",
        metavar="FILE",
        type=Path,
        help="reply twice to each --prompt or typed line, ask which reply is better, and append the answer to FILE",
    )
    flags.add_argument("--samples", type=int, default=1, help="number of continuations per prompt")
    flags.add_argument("--max_new_tokens", type=int, default=200, help="maximum number of tokens to generate")
    flags.add_argument(
        "--stop", action="append", default=[], help="stop generating before this string; may be repeated"
    )
    flags.add_argument("--temperature", type=float, default=0.8, help="sampling temperature; 0 selects greedy decoding")
    flags.add_argument("--top_k", type=int, default=50, help="number of most probable tokens to sample from")
    flags.add_argument(
        "--top_p", type=float, help="sample from the most probable tokens whose total probability reaches this value"
    )
    flags.add_argument(
        "--min_p", type=float, help="minimum probability of tokens to sample, as a fraction of the highest probability"
    )
    flags.add_argument(
        "--repetition_penalty",
        type=float,
        default=1.0,
        help="penalty (above 1) for tokens that already occur in the prompt or the generated text; 1 disables it",
    )
    flags.add_argument(
        "--seed",
        type=int,
        default=0,
        help="seed for the first text; each further text uses the next seed",
    )
    flags.add_argument(
        "--compile",
        action="store_true",
        help="compile the decoding step; generation starts later but is faster, which suits long texts",
    )
    flags.add_argument(
        "--sink_tokens",
        metavar="N",
        type=int,
        help="when a text exceeds the context, keep its first N tokens (4 is usual) and the most recent ones in a "
        "rolling cache; by default, the last half of the context is encoded again",
    )
    flags.add_argument("--json", action="store_true", help="print one JSON object per text, with its prompt and seed")
    given = flags.parse_args(args)
    sampling = Sampling(given.repetition_penalty, given.temperature, given.top_k, given.top_p, given.min_p)
    if given.samples < 1:
        raise UserError(f"argument --samples is {given.samples}; it must be 1 or more")
    if given.seed < 0:
        raise UserError(f"argument --seed is {given.seed}; it must be 0 or more")
    validate_utf8(given, "prompt", "stop", "system")
    if given.system is not None and not (given.chat or given.rank):
        raise UserError("argument --system has no effect without --chat or --rank; add one of them")
    if given.system is not None and not given.system.strip():
        raise UserError("argument --system is empty; pass a message, or omit the argument")
    interactive = given.chat and given.prompt is None
    if interactive and (given.json or given.stop or given.compile or given.samples > 1):
        raise UserError(
            "argument --chat without --prompt cannot be combined with --json, --stop, --samples or --compile"
        )
    if given.rank and (given.chat or given.json or given.stop or given.compile or given.samples > 1):
        raise UserError("argument --rank cannot be combined with --chat, --json, --stop, --samples or --compile")
    if given.rank and given.sink_tokens is not None:
        raise UserError("argument --rank cannot be combined with --sink_tokens; omit one of them")
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
        except KeyboardInterrupt:  # Ctrl-C is a normal way to stop
            raise SystemExit(130) from None
        return
    if interactive:
        for piece in chat_session(
            model,
            tokenizer,
            given.system,
            read_stdin_lines(),
            given.max_new_tokens,
            sampling,
            given.seed,
            given.sink_tokens,
        ):
            write_generated(piece or "\n")
        return
    asked = build_chat_prompts(tokenizer, given.system, prompts) if given.chat else prompts
    more = given.stop, given.compile, given.sink_tokens
    pieces = stream_text(model, tokenizer, asked, given.max_new_tokens, sampling, seeds, *more)
    if given.json:
        for row, text in _collect_texts(pieces, len(prompts)):
            print(dump_json({"prompt": prompts[row], "text": text, "seed": seeds[row]}), flush=True)
    elif len(prompts) > 1:
        for row, text in _collect_texts(pieces, len(prompts)):
            write_generated("\n" * (row > 0) + ("" if given.chat else prompts[row]) + text + "\n")
    else:
        write_generated("" if given.chat else prompts[0])
        for _, piece in pieces:
            write_generated(piece)
        write_generated("\n")


def _collect_texts(pieces: Iterator[tuple[int, str]], n: int) -> Iterator[tuple[int, str]]:
    """Yield (row, text) pairs in row order, each as soon as this text and all texts before it are complete."""
    texts, done, next_row = [""] * n, [False] * n, 0
    for row, piece in pieces:
        texts[row] += piece
        done[row] = not piece
        while next_row < n and done[next_row]:
            yield next_row, texts[next_row]
            next_row += 1
