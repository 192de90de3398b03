"""The encoder, its NeMo model, and the archive it travels in."""
