"""``python -m lit_gpt_scratch.evaluate``: measure a trained model."""

from lit_gpt_scratch.cli import entrypoint

if __name__ == "__main__":
    from lit_gpt_scratch.cli.evaluate import main

    entrypoint.run(main)
