"""``python -m lit_gpt_scratch.fit``: train, fine-tune or align a GPT, or resume a run."""

from lit_gpt_scratch.cli import entrypoint

if __name__ == "__main__":
    entrypoint.run_command("fit")
