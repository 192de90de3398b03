"""From a pretrained model to predictions: heads, labelled proteins, training, and the archive that comes of it."""
