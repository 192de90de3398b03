"""Import models from Hugging Face `transformers` and fair-esm, and export models to `transformers`."""

import re

HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]{0,95}/[A-Za-z0-9][\w.-]{0,95}", re.ASCII)
"""The id of a model on the Hugging Face Hub: organisation/name."""
PRECISIONS = {"32": "float32", "bf16": "bfloat16"}
"""Precisions of weights: the names in archives, and torch's."""
