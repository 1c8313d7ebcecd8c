"""``python -m lit_gpt_scratch.convert``: convert checkpoints to and from Hugging Face folders and safetensors files."""

from lit_gpt_scratch.cli import entrypoint

if __name__ == "__main__":
    entrypoint.run_command("convert")
