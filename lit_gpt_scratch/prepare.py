"""``python -m lit_gpt_scratch.prepare``: tokenize a text ahead of a run, or compare tokenizers on it."""

from lit_gpt_scratch.cli import entrypoint

if __name__ == "__main__":
    from lit_gpt_scratch.cli.prepare import main

    entrypoint.run(main)
