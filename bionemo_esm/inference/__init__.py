"""What the model is for: embeddings, effects of variants, contacts."""
