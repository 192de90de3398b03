"""Embeddings: hidden states as features, for files of any size."""
