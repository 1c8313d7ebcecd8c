"""Replace class paths from earlier versions of this package, so that old config files still load."""

import re
from typing import Final

MOVED_CLASS_PATHS: Final[dict[str, str]] = {
    # 0.1
    "lit_gpt_scratch.callbacks.dynamics.Dynamics": "lit_gpt_scratch.callbacks.introspection.GradientStats",
    "lit_gpt_scratch.callbacks.ending.ValidateAtEnd": "lit_gpt_scratch.callbacks.checkpointing.ValidateAtEnd",
    "lit_gpt_scratch.callbacks.trace.Trace": "lit_gpt_scratch.callbacks.summary.LossTrace",
    "lit_gpt_scratch.data.labelled.LabelledText": "lit_gpt_scratch.data.LabelledText",
    "lit_gpt_scratch.hardware.strategies.ModelParallel": "lit_gpt_scratch.distributed.strategies.ModelParallel",
    "lit_gpt_scratch.optim.recipes.AdamW": "lit_gpt_scratch.optim.AdamW",
    "lit_gpt_scratch.optim.recipes.Muon": "lit_gpt_scratch.optim.Muon",
    "lit_gpt_scratch.optim.schedule.Schedule": "lit_gpt_scratch.optim.Schedule",
    "lit_gpt_scratch.tasks.grpo.GRPO": "lit_gpt_scratch.tasks.GRPO",
    "lit_gpt_scratch.tasks.ppo.PPO": "lit_gpt_scratch.tasks.PPO",
    "lit_gpt_scratch.tasks.reward.Reward": "lit_gpt_scratch.tasks.Reward",
    "lit_gpt_scratch.text.leakage.Leakage": "lit_gpt_scratch.text.decontamination.Leakage",
}
"""Current class paths, keyed by old path. Add an entry when a class that a config can reference is moved or renamed."""

_OLD_PATH: Final = re.compile(rf"(?<![\w.])({'|'.join(map(re.escape, MOVED_CLASS_PATHS))})(?![\w.])")


def replace_moved_class_paths(text: str) -> str:
    """Replace all old class paths in the text of a config file or in a flag with the current paths."""
    return _OLD_PATH.sub(lambda match: MOVED_CLASS_PATHS[match[1]], text)
