"""Masked-residue prediction on held-out proteins, beside baselines and another model."""
