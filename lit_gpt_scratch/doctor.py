"""``python -m lit_gpt_scratch.doctor``: examine a configuration on this machine."""

from lit_gpt_scratch.cli import door

if __name__ == "__main__":
    from lit_gpt_scratch.cli.doctor import main

    door.run(main)
