"""Effects of variants, by what a model finds likely."""
