"""A trained reward model, for a policy that learns from it."""

from pathlib import Path

from lit_gpt_scratch.checkpoint.loading import build, load_checkpoint
from lit_gpt_scratch.checkpoint.run_folder import find_checkpoint
from lit_gpt_scratch.errors import UserError
from lit_gpt_scratch.model import GPT


def reward_model(place: str, tokenizer_json: str, trusted: str | None = None) -> GPT:
    """A network whose head is a ``Scalar``, in evaluation mode and frozen; ``model.heads.rewards`` asks it.

    Args:
        place: A run folder, a checkpoint or a ``.safetensors`` file.
        tokenizer_json: The policy's tokenizer.
        trusted: The attention class of somebody's own that it may name: to build it is to run that code.

    Raises:
        UserError: There is none, or it is no reward model, or its tokens are not those of the policy.
    """
    path = find_checkpoint(place, Path(), None)
    trained = build(load_checkpoint(path), path, trusted)
    if not trained.contents.rewards:
        what = trained.contents.otherwise or "predicts tokens"
        raise UserError(f"{path} is no reward model: it {what}; fit --model Reward trains one")
    if trained.contents.tokenizer != tokenizer_json:
        raise UserError(
            f"the reward model {path} was trained with another tokenizer than the policy has: begin both with the same "
            "model (--model.init_from)"
        )
    return trained.net.requires_grad_(False)
