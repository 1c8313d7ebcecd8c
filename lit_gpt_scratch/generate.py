"""``python -m lit_gpt_scratch.generate [CKPT] --prompt TEXT``: let a trained model write."""
