"""``python -m lit_gpt_scratch.sweep``: run all trials of a sweep file, or compare runs."""

from lit_gpt_scratch.cli import entrypoint

if __name__ == "__main__":
    entrypoint.run_command("sweep")
