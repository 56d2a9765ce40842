"""Evaluation: prompts in, outputs and scores out."""
