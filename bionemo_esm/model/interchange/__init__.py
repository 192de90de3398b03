"""Models that other libraries keep, brought here and taken home: Hugging Face `transformers`, and fair-esm."""
