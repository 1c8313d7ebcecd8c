"""``python -m lit_gpt_scratch.prepare``: make text into tokens ahead of a run."""

from lit_gpt_scratch.cli import entrypoint

if __name__ == "__main__":
    from lit_gpt_scratch.cli.prepare import main

    entrypoint.run(main)
