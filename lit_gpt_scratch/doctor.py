"""``python -m lit_gpt_scratch.doctor``: diagnose a run, check or measure the machine, or test ``fit``."""

from lit_gpt_scratch.cli import entrypoint

if __name__ == "__main__":
    entrypoint.run_command("doctor")
