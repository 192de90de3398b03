"""Contacts between residues, predicted from attention maps."""
