"""``python -m lit_gpt_scratch.doctor``: examine a configuration on this machine."""

from lit_gpt_scratch.cli import entrypoint

if __name__ == "__main__":
    from lit_gpt_scratch.cli.doctor import main

    entrypoint.run(main)
