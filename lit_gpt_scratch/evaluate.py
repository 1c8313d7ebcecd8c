"""``python -m lit_gpt_scratch.evaluate``: evaluate a trained model on text, a task or a benchmark."""

from lit_gpt_scratch.cli import entrypoint

if __name__ == "__main__":
    entrypoint.run_command("evaluate")
