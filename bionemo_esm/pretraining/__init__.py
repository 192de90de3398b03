"""Pretraining: recipes, plan, preflight check, training, checkpoints, averages, metrics and report."""
