"""``python -m lit_gpt_scratch.doctor``: diagnose a run, this machine or a configuration."""

from lit_gpt_scratch.cli import entrypoint

if __name__ == "__main__":
    from lit_gpt_scratch.cli.doctor import main

    entrypoint.run(main)
