"""Tests of the alphabet: token ids as in ESM-1b and ESM-2, encoding and decoding."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from bionemo_esm import alphabet

# fairseq order of ESM-1b, as in `vocab.txt` of facebook/esm2_t6_8M_UR50D
ESM_TOKEN_IDS = {
    **{"<cls>": 0, "<pad>": 1, "<eos>": 2, "<unk>": 3},
    **{"L": 4, "A": 5, "G": 6, "V": 7, "S": 8, "E": 9, "R": 10, "T": 11, "I": 12, "D": 13},
    **{"P": 14, "K": 15, "Q": 16, "N": 17, "F": 18, "Y": 19, "M": 20, "H": 21, "W": 22, "C": 23},
    **{"X": 24, "B": 25, "U": 26, "Z": 27, "O": 28, ".": 29, "-": 30, "<null_1>": 31, "<mask>": 32},
}
UBIQUITIN = "MQIFVKTLTGKTITLEVEPSDTIENVKAKIQDKEGIPPDQQRLIFAGKQLEDGRTLSDYNIQKESTLHLVLRLRGG"


def test_token_ids_equal_those_of_esm() -> None:
    assert alphabet.TOKEN_IDS == ESM_TOKEN_IDS
    assert alphabet.VOCABULARY_SIZE == 33
    named = (alphabet.CLS_ID, alphabet.PAD_ID, alphabet.EOS_ID, alphabet.UNK_ID, alphabet.MASK_ID)
    assert named == (0, 1, 2, 3, 32)


def test_encoding_equals_the_hugging_face_tokenizer(tmp_path: Path) -> None:
    from transformers import EsmTokenizer

    vocabulary = tmp_path / "vocab.txt"
    vocabulary.write_text("\n".join(ESM_TOKEN_IDS))
    tokenizer = EsmTokenizer(str(vocabulary))  # type: ignore[no-untyped-call]
    every_letter = "LAGVSERTIDPKQNFYMHWCXBUZO.-"
    for sequence in (UBIQUITIN, every_letter):
        expected = tokenizer(sequence)["input_ids"]
        assert [alphabet.CLS_ID, *alphabet.encode(sequence), alphabet.EOS_ID] == expected


def test_encoding_is_uint8_without_special_tokens() -> None:
    ids = alphabet.encode("MQIF")
    assert ids.dtype == np.uint8
    assert ids.tolist() == [20, 16, 12, 18]


def test_text_and_bytes_encode_to_the_same_ids() -> None:
    assert np.array_equal(alphabet.encode(UBIQUITIN), alphabet.encode(UBIQUITIN.encode()))


def test_lower_case_encodes_as_upper_case() -> None:
    letters = "LAGVSERTIDPKQNFYMHWCXBUZO"
    assert np.array_equal(alphabet.encode(letters.lower()), alphabet.encode(letters))


@pytest.mark.parametrize("symbol", ["J", "j", "*", "1", " ", "\n", "é", "<"])
def test_character_outside_the_alphabet_encodes_to_unk(symbol: str) -> None:
    assert alphabet.encode(f"M{symbol}K").tolist() == [20, 3, 15]


def test_decoding_inverts_encoding() -> None:
    every_letter = "LAGVSERTIDPKQNFYMHWCXBUZO.-"
    assert alphabet.decode(alphabet.encode(UBIQUITIN + every_letter)) == UBIQUITIN + every_letter
    assert alphabet.decode(alphabet.encode("")) == ""


def test_decoding_writes_special_tokens_by_name() -> None:
    assert alphabet.decode(np.array([0, 20, 32, 2, 1])) == "<cls>M<mask><eos><pad>"


@pytest.mark.parametrize("bad", [-1, 33])
def test_decoding_refuses_ids_outside_the_vocabulary(bad: int) -> None:
    with pytest.raises(ValueError, match=r"0\.\.32"):
        alphabet.decode(np.array([20, bad]))


def test_encoding_table_is_read_only() -> None:
    with pytest.raises(ValueError, match="read-only"):
        alphabet.ENCODING_TABLE[0] = 5


def test_standard_residues_have_consecutive_ids() -> None:
    ids = alphabet.encode(alphabet.STANDARD_RESIDUES)
    assert ids.tolist() == list(range(alphabet.FIRST_RESIDUE_ID, 24))
    assert alphabet.NUM_STANDARD_RESIDUES == 20


def test_vocabulary_is_padded_to_a_multiple() -> None:
    assert alphabet.padded_vocabulary_size() == 128
    assert alphabet.padded_vocabulary_size(multiple=8) == 40
    assert alphabet.padded_vocabulary_size(multiple=33) == 33
