"""Which residues touch, read from attention maps."""
