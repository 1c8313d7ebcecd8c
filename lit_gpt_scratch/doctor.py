"""``python -m lit_gpt_scratch.doctor``: diagnose a run, check this machine, or test resuming and strategies."""

from lit_gpt_scratch.cli import entrypoint

if __name__ == "__main__":
    entrypoint.run_command("doctor")
