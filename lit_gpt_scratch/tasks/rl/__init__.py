"""On-policy reinforcement learning: rollouts, rewards, PPO and GRPO."""
