"""The compiled parser against the reference reader, on real and on corrupted files."""

from __future__ import annotations

import gzip
import os
import random
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from bionemo_esm.alphabet import ENCODING_TABLE, TOKEN_IDS, UNK_ID, VOCABULARY_SIZE
from bionemo_esm.data import kernels
from bionemo_esm.data.fasta import FastaError, parse_record
from bionemo_esm.data.kernels import DigestSet
from conftest import SAMPLE

KEY = np.uint64(12345)
PIECES = [b">", b"\n", b"\r\n", b"\n>", b"*", b"-", b".", b" ", b"\t", b"J", b"1", b"\0", b"\xff", b"\r", "é".encode()]
PIECES += [b"MKTAYIAKQRQISFVKSHFSRQLEERLGLIEVQAPILSRVGDGTQDNLSGAEKAVQVKVKALPDAQFEVV", b"mkv", b"L" * 60, b"A" * 31]


def parsed(text: bytes, max_residues: int = 1024) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return the tokens, fields and digests of all records in a text."""
    tokens = np.full(len(text), 99, dtype=np.uint8)
    fields = np.full((len(text) // 2 + 1, kernels.FIELDS), -7, dtype=np.int32)
    digests = np.zeros((len(text) // 2 + 1, 2), dtype=np.uint64)
    content = np.frombuffer(text, dtype=np.uint8)
    records, end = kernels.parse(
        content,
        kernels.words_of(content),
        kernels.BYTE_CLASSES,
        max_residues,
        KEY,
        tokens,
        kernels.words_of(tokens),
        fields,
        digests,
    )
    return tokens[:end], fields[:records], digests[:records]


def by_reference(sequence: bytes) -> tuple[bytes, dict[int, int]]:
    """Return the token ids and fields of one sequence, computed byte by byte."""
    residues, fields = bytearray(), dict.fromkeys((kernels.UNKNOWN_LETTERS, kernels.GAPS), 0)
    body = sequence.translate(None, b".-")
    fields[kernels.GAPS] = len(sequence) - len(body)
    inner = body.rstrip(b"*")
    fields[kernels.ENDS_IN_STOP] = int(len(inner) < len(body))
    fields[kernels.INTERNAL_STOPS] = inner.count(b"*")
    for byte in inner:
        code = int(ENCODING_TABLE[byte])
        fields[kernels.UNKNOWN_LETTERS] += code == UNK_ID and byte != ord("*")
        residues.append(TOKEN_IDS["X"] if code == UNK_ID else code)
    fields[kernels.GIVEN_LENGTH] = len(residues)
    return bytes(residues), fields


def check_against_reference(text: bytes, max_residues: int = 1024) -> int:
    """Compare every record that the reference reader accepts; return the number of those records."""
    tokens, fields, _ = parsed(text, max_residues)
    pieces = text[1:].split(b"\n>")
    assert len(pieces) == len(fields)
    begin = accepted = offset = 0
    for piece, row in zip(pieces, fields, strict=True):
        assert row[kernels.OFFSET] == offset
        offset += len(piece) + 2
        length = int(row[kernels.LENGTH])
        try:
            record = parse_record("text", 1, 0, piece)
        except FastaError:
            assert row[kernels.SUSPECT] == 1, piece
        else:
            expected, expected_fields = by_reference(record.sequence)
            assert tokens[begin : begin + length].tobytes() == expected[:max_residues]
            assert {field: int(row[field]) for field in expected_fields} == expected_fields
            accepted += 1
        begin += length
    assert begin == tokens.size
    return accepted


@pytest.mark.parametrize("width", [0, 1, 31, 32, 33, 60, 61, 80])
@pytest.mark.parametrize("newline", [b"\n", b"\r\n"])
def test_real_proteins_match_the_reference_at_any_line_width(width: int, newline: bytes) -> None:
    text = gzip.decompress((SAMPLE / "validation.fasta.gz").read_bytes())
    if width:
        lines = (
            b"\n".join(line[at : at + width] for at in range(0, len(line), width)) if line[:1] != b">" else line
            for line in text.splitlines()
        )
        text = b"\n".join(lines) + b"\n"
    assert check_against_reference(text.replace(b"\n", newline)) == 200


@pytest.mark.parametrize("seed", range(40))
def test_corrupted_proteins_match_the_reference_or_are_marked_suspect(seed: int) -> None:
    """Replace, remove and insert random bytes in real records."""
    rng = random.Random(seed)
    text = bytearray(gzip.decompress((SAMPLE / "test.fasta.gz").read_bytes())[:20_000])
    for _ in range(rng.randrange(1, 200)):
        at = rng.randrange(1, len(text))
        text[at : at + rng.choice((0, 0, 1, 5))] = rng.choice(PIECES)
    assert check_against_reference(bytes(text), max_residues=rng.choice((1, 40, 1024))) > 0


@settings(max_examples=300, deadline=None)
@given(st.lists(st.sampled_from(PIECES), max_size=40))
def test_any_text_matches_the_reference_or_is_marked_suspect(pieces: list[bytes]) -> None:
    check_against_reference(b">" + b"".join(pieces), max_residues=100)


def test_digests_depend_on_the_truncated_sequence_and_the_identifier() -> None:
    protein = b"MKTAYIAKQRQISFVKSHFSRQLEERLGLIEVQAPILSRVG"
    text = b">a x\n%s\n>a y\n%s\n>b\n%sW\n> \n%s\n" % (protein, protein.lower(), protein, protein[:-1])
    digests = parsed(text)[2]
    assert digests[0, 0] == digests[1, 0]
    assert len(set(digests[:, 0].tolist())) == 3
    assert digests[0, 1] == digests[1, 1] != digests[2, 1]
    assert digests[3, 1] == 0
    assert len(set(parsed(text, max_residues=40)[2][:, 0].tolist())) == 1


def test_digests_of_real_proteins_and_point_mutants_are_distinct_and_uniform() -> None:
    records = gzip.decompress((SAMPLE / "train.fasta.gz").read_bytes()).split(b"\n>")
    protein = records[0].partition(b"\n")[2]
    mutants = [protein[:at] + letter + protein[at + 1 :] for at in range(len(protein)) for letter in (b"A", b"W")]
    texts = [record.partition(b"\n")[2] for record in records] + mutants + [b"A" * n for n in range(1, 200)]
    digests = parsed(b"".join(b">\n%s\n" % text for text in texts))[2][:, 0]
    assert len(set(digests.tolist())) == len(set(texts))
    for shift in range(64):  # each bit is set in half of the digests
        assert abs(np.mean((digests >> np.uint64(shift)) & np.uint64(1)) - 0.5) < 0.06


def test_another_key_gives_other_digests() -> None:
    text, tokens = np.frombuffer(b">a\nMKV\n", dtype=np.uint8), np.empty(7, dtype=np.uint8)
    fields, digests = np.empty((4, kernels.FIELDS), dtype=np.int32), np.empty((2, 4, 2), dtype=np.uint64)
    for key, filled in enumerate(digests):
        kernels.parse(
            text,
            kernels.words_of(text),
            kernels.BYTE_CLASSES,
            9,
            np.uint64(key),
            tokens,
            kernels.words_of(tokens),
            fields,
            filled,
        )
    assert (digests[0, 0] != digests[1, 0]).all()


def test_token_counts_match_bincount() -> None:
    rng = np.random.default_rng(0)
    for size in (0, 1, 2, 1001, 65_536):
        tokens = rng.integers(0, VOCABULARY_SIZE, size, dtype=np.uint8)
        counts = np.ones(VOCABULARY_SIZE, dtype=np.int64)
        kernels.count_tokens(tokens, counts)
        assert np.array_equal(counts - 1, np.bincount(tokens, minlength=VOCABULARY_SIZE))


@pytest.mark.parametrize("expected", [0, 50, 100_000])
def test_a_digest_set_matches_a_python_set(expected: int) -> None:
    rng = np.random.default_rng(1)
    ours, theirs = DigestSet(), set[int]()
    ours.reserve(expected)
    for size in (0, 1, 10, 3_000, 40_000):
        digests = rng.integers(0, 60_000, size, dtype=np.uint64) * np.uint64(2**47 + 12345)
        digests = np.concatenate([digests, digests[: size // 2]])
        is_new = ours.add(digests)
        for digest, new in zip(digests.tolist(), is_new.tolist(), strict=True):
            assert new == (max(digest, 1) not in theirs)
            theirs.add(max(digest, 1))
    assert len(ours) == len(theirs)
    known = np.array(sorted(theirs), dtype=np.uint64)
    assert ours.contains(known).all()
    assert not ours.contains(known + np.uint64(1)).any()
    other = DigestSet()
    other.update(ours)
    assert len(other) == len(ours)


def test_kernels_compile_without_a_writable_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In a container with a read-only package and home, numba finds no location for its cache."""
    calls = []

    def njit(**options: bool):  # type: ignore[no-untyped-def]
        calls.append(options)
        if options.get("cache"):
            raise RuntimeError("cannot cache function: no locator available")
        return lambda function: function

    monkeypatch.setattr(kernels.numba, "njit", njit)
    assert kernels.compiled(len) is len
    assert [options.get("cache") for options in calls] == [True, None]


def test_cached_code_of_other_sources_is_not_reused(tmp_path: Path) -> None:
    """Numba's cache checks only a function's own file; our kernels also depend on other files."""
    program = tmp_path / "program.py"
    program.write_text(
        "import sys\n"
        "from bionemo_esm.data import kernels\n"
        "kernels._SOURCES = sys.argv[1]\n"
        "@kernels.compiled\n"
        "def double(number):\n"
        "    return 2 * number\n"
        "assert double(4) == 8\n"
        "print(sum(double.stats.cache_hits.values()))\n"
    )

    def hits(sources: str) -> str:
        environment = os.environ | {"NUMBA_CACHE_DIR": str(tmp_path)}
        command = [sys.executable, str(program), sources]
        return subprocess.run(command, env=environment, capture_output=True, text=True, check=True).stdout.strip()

    assert [hits("these"), hits("these"), hits("others")] == ["0", "1", "0"]
