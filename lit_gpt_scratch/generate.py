"""``python -m lit_gpt_scratch.generate [CKPT] --prompt TEXT``: let a trained model write."""

from lit_gpt_scratch.cli import entrypoint

if __name__ == "__main__":
    from lit_gpt_scratch.cli.generate import main

    entrypoint.run(main)
