"""A pretraining run: its recipe, its process groups, what it writes and what it shows."""
