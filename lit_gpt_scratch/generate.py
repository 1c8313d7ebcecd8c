"""``python -m lit_gpt_scratch.generate``: continue prompts, chat, or collect preferences with a trained model."""

from lit_gpt_scratch.cli import entrypoint

if __name__ == "__main__":
    entrypoint.run_command("generate")
