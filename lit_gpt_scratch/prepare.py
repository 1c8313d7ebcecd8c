"""``python -m lit_gpt_scratch.prepare``: clean and tokenize text before a run, or compare tokenizers."""

from lit_gpt_scratch.cli import entrypoint

if __name__ == "__main__":
    entrypoint.run_command("prepare")
