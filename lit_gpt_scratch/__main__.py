"""Entry point for all commands: ``lit-gpt <command>``, or ``python -m lit_gpt_scratch <command>``."""

import sys
from importlib import import_module

from lit_gpt_scratch.cli import entrypoint
from lit_gpt_scratch.errors import UserError

COMMANDS = {
    "fit": "train, fine-tune or align a GPT, or resume a run",
    "prepare": "clean and tokenize text before a run, or compare tokenizers",
    "generate": "continue prompts, chat, or collect preferences with a trained model",
    "evaluate": "evaluate a trained model on text, a task or a benchmark",
    "sweep": "run all trials of a sweep file and report the results, or compare runs",
    "convert": "convert checkpoints to and from Hugging Face folders and safetensors files",
    "doctor": "diagnose a run, check this machine, or test resuming and strategies",
}


def main() -> None:
    """Run the command named by the first argument; without arguments, list the commands."""
    entrypoint.run(_dispatch)


def _dispatch() -> None:
    name, *args = sys.argv[1:] or ["--help"]
    if name in ("-h", "--help"):
        print("usage: lit-gpt <command> [flags]    (or: python -m lit_gpt_scratch.<command> [flags])\n")
        print("\n".join(f"  {command:<10} {purpose}" for command, purpose in COMMANDS.items()))
        print("\nRun a command with --help to list its flags.")
        return
    if name not in COMMANDS:
        raise UserError(f"unknown command {name}; choose from {', '.join(COMMANDS)}")
    import_module(f"lit_gpt_scratch.cli.{name}").main(args)


if __name__ == "__main__":
    main()
