"""Uses of a model: embeddings, effects of variants, contacts."""
