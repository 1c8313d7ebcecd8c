"""``python -m lit_gpt_scratch.sweep``: many runs from one file, and a report of what they show."""

from lit_gpt_scratch.cli import entrypoint

if __name__ == "__main__":
    from lit_gpt_scratch.cli.sweep import main

    entrypoint.run(main)
