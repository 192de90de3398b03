"""The 33-token ESM alphabet: amino-acid letters to token ids and back, by table look-up.

Ids equal those of fair-esm (`Alphabet.from_architecture("ESM-1b")`, esm/data.py) and of Hugging Face's `EsmTokenizer`,
so weights, logits and token arrays can be exchanged with both. Only NumPy is needed here.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

TOKENS: tuple[str, ...] = (
    *("<cls>", "<pad>", "<eos>", "<unk>"),
    *"LAGVSERTIDPKQNFYMHWC",  # the 20 standard amino acids, by their frequency in UniRef50
    *"XBUZO",  # unknown, Asx, selenocysteine, Glx, pyrrolysine
    *(".", "-", "<null_1>", "<mask>"),
)
TOKEN_IDS: dict[str, int] = {token: index for index, token in enumerate(TOKENS)}
CLS_ID, PAD_ID, EOS_ID, UNK_ID, MASK_ID = (TOKEN_IDS[t] for t in ("<cls>", "<pad>", "<eos>", "<unk>", "<mask>"))
VOCABULARY_SIZE = len(TOKENS)
SPECIAL_TOKENS_PER_SEQUENCE = 2  # <cls> before, <eos> after

STANDARD_RESIDUES = "LAGVSERTIDPKQNFYMHWC"
FIRST_RESIDUE_ID = TOKEN_IDS["L"]  # the standard 20 are the ids 4..23 without a gap
NUM_STANDARD_RESIDUES = len(STANDARD_RESIDUES)


def _encoding_table() -> NDArray[np.uint8]:
    table = np.full(256, UNK_ID, dtype=np.uint8)
    for token, index in TOKEN_IDS.items():
        if len(token) == 1:
            table[ord(token)] = table[ord(token.lower())] = index
    table.setflags(write=False)
    return table


ENCODING_TABLE = _encoding_table()
"""uint8 [256]: the token id of every byte; lower case counts as upper case, any other byte is `<unk>`."""


def encode(sequence: str | bytes) -> NDArray[np.uint8]:
    """Return the token ids of a residue string, uint8 [residues], without `<cls>` and `<eos>`.

    Lower case is read as upper case; a character outside the alphabet (`J`, `*`, a digit) becomes `<unk>`.
    """
    raw = sequence.encode("ascii", errors="replace") if isinstance(sequence, str) else sequence
    return ENCODING_TABLE[np.frombuffer(raw, dtype=np.uint8)]


def decode(token_ids: NDArray[np.integer]) -> str:
    """Return the text of token ids [tokens]; special tokens appear by name (`<cls>`, `<mask>`, ...).

    Raises `ValueError` for an id outside 0..32.
    """
    ids = np.asarray(token_ids).ravel()
    if ids.size and not (ids.min() >= 0 and ids.max() < VOCABULARY_SIZE):
        raise ValueError(f"token ids must lie in 0..{VOCABULARY_SIZE - 1}, found {ids.min()}..{ids.max()}")
    return "".join(TOKENS[index] for index in ids)


def padded_vocabulary_size(multiple: int = 128) -> int:
    """Return the rows of the embedding table: 33 rounded up to a multiple (128: the tile of a tensor core)."""
    return -(-VOCABULARY_SIZE // multiple) * multiple
