"""``python -m lit_gpt_scratch.generate [CKPT] --prompt TEXT``: let a trained model write."""

from lit_gpt_scratch.cli import door

if __name__ == "__main__":
    from lit_gpt_scratch.cli.generate import main

    door.run(main)
