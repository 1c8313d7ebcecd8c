"""Measure the fraction of replies that satisfy a verifiable reward, before and after PPO and GRPO.

    python experiments/benchmarks/alignment.py [--seeds 5] [--runs DIR] [--reward model]

A base model is trained on the standard library (or on `--text`, which accepts the same values as `--data.source`),
fine-tuned on replies (`start.yaml`), and aligned with `ppo.yaml` and `grpo.yaml`, once for each seed. The reward is
the verifiable reward itself, a full stop at the end of the reply, or with `--reward model`, the output of a
reward model trained on preference pairs (`reward.yaml`).

`true reward` is the fraction of sampled replies to the test prompts that satisfy the preference. `KL` is the mean KL
divergence per reply from the initial model, in nats. A seed is successful if its true reward is at least `GOAL` and
its KL divergence is at most `BUDGET`. The base model, the initial model and the reward model are trained once and
shared by all seeds.
"""

import argparse
import os
import platform
import tempfile
from pathlib import Path
from typing import Final

from fitting import EXPERIMENTS, fit

ALIGN = EXPERIMENTS.parent / "align"
GOAL: Final = 0.9
BUDGET: Final = 10.0
"""Maximum KL divergence per reply from the initial model, in nats."""


def main() -> None:
    """Run all stages and print a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--text", help="training text of the base model; by default the standard library")
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--runs", type=Path, help="folder that contains the runs; existing runs are reused")
    parser.add_argument("--reward", choices=["checkable", "model"], default="checkable")
    parser.add_argument("--threads", type=int, default=os.cpu_count() or 1)
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        runs = given.runs or Path(folder)
        text = [f"--data.source={given.text}"] if given.text else []
        root, began = fit(runs, "root", given.threads, f"--config={EXPERIMENTS / 'base.yaml'}", *text)
        start, tuned = fit(
            runs, "start", given.threads, f"--config={ALIGN / 'start.yaml'}", f"--model.init_from={root}"
        )
        from_start, reward = [f"--model.init_from={start}"], ["--model.reward=full_stop"]
        print(
            f"{platform.system()} {platform.machine()}, {given.threads} threads\n"
            f"base: {began['parameters']:,} parameters, {began['tokens']:,} tokens, {began['wall']:.0f} s; "
            f"start: test/loss {tuned['test/loss']:.3f}, {tuned['wall']:.0f} s"
        )
        if given.reward == "model":
            path, learned = fit(runs, "reward", given.threads, f"--config={ALIGN / 'reward.yaml'}", *from_start)
            reward = [f"--model.reward={path}"]
            print(f"reward model: accuracy {learned['test/accuracy']:.1%} on held-out pairs, {learned['wall']:.0f} s")
        print(f"\n{'':6}{'seed':>5}{'start':>8}{'true reward':>13}{'KL':>7}{'tokens':>8}{'sampling':>9}{'seconds':>9}")
        for task in ("ppo", "grpo"):
            reached = 0
            for seed in range(given.seeds):
                name, flags = f"{task}_{given.reward}_{seed}", [*from_start, *reward, f"--seed_everything={seed}"]
                _, after = fit(runs, name, given.threads, f"--config={ALIGN / task}.yaml", *flags)
                reached += after["test/true_reward"] >= GOAL and after["test/kl"] <= BUDGET
                print(
                    f"{task:6}{seed:5}{after['baselines']['true_reward']:8.1%}{after['test/true_reward']:13.1%}"
                    f"{after['test/kl']:7.2f}{after['test/reply_tokens']:8.1f}{after['throughput']['generation']:9.0%}"
                    f"{after['wall']:9.0f}",
                    flush=True,
                )
            print(f"{task}: {reached} of {given.seeds} seeds reach {GOAL:.0%} within {BUDGET:.0f} nats")


if __name__ == "__main__":
    main()
