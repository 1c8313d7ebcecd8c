"""Evaluation: perplexity, multiple choice, generation, chat, classification, confidence intervals and baselines."""
