"""``python -m lit_gpt_scratch.fit``: train, fine-tune or align a GPT, or resume a run."""

from lit_gpt_scratch.cli import entrypoint

if __name__ == "__main__":
    from lit_gpt_scratch.cli.fit import main

    entrypoint.run(main)
