"""The FASTA reader: accepted files, and refusals with a reason."""

from __future__ import annotations

import ast
import gzip
import io
import random
import subprocess
import sys
import tracemalloc
import zipfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import zstandard
from numpy.typing import NDArray

from bionemo_esm.alphabet import VOCABULARY_SIZE, encode
from bionemo_esm.data import fasta
from bionemo_esm.data import fasta as sources
from bionemo_esm.data.fasta import FastaError, FastaRecord, SourceError, read_fasta, refuse_nucleotides
from errors import refused

UBIQUITIN = "MQIFVKTLTGKTITLEVEPSDTIENVKAKIQDKEGIPPDQQRLIFAGKQLEDGRTLSDYNIQKESTLHLVLRLRGG"
CRAMBIN = "TTCCPSIVARSNFNVCRLPGTPEALCATYTGCIIIPGATCPGDYAN"
GB1 = "MTYKLILNGKTLKGETTTEAVDAATAEKVFKQYANDNGVDGEWTYDDATKTFTVTE"
THREE = f">sp|P0CG48|UBC_HUMAN Ubiquitin\n{UBIQUITIN}\n>1CRN\n{CRAMBIN}\n>1PGA GB1\n{GB1}\n".encode()


def read(tmp_path: Path, content: bytes) -> list[FastaRecord]:
    path = tmp_path / "proteins.fasta"
    path.write_bytes(content)
    return list(read_fasta(path))


def sequences(records: list[FastaRecord]) -> list[str]:
    return [record.sequence.decode() for record in records]


def test_records_are_in_order_with_header_number_and_offset(tmp_path: Path) -> None:
    records = read(tmp_path, THREE)
    assert [record.header for record in records] == ["sp|P0CG48|UBC_HUMAN Ubiquitin", "1CRN", "1PGA GB1"]
    assert [record.id for record in records] == ["sp|P0CG48|UBC_HUMAN", "1CRN", "1PGA"]
    assert sequences(records) == [UBIQUITIN, CRAMBIN, GB1]
    assert [record.number for record in records] == [1, 2, 3]
    assert [record.offset for record in records] == [0, THREE.find(b">1CRN"), THREE.find(b">1PGA")]


def wrapped(text: bytes, width: int) -> bytes:
    lines = text.splitlines()
    pieces = [
        [line] if line[:1] == b">" else [line[i : i + width] for i in range(0, len(line), width)] for line in lines
    ]
    return b"\n".join(piece for group in pieces for piece in group) + b"\n"


LAYOUTS = {
    "wrapped": wrapped(THREE, 60),
    "a residue a line": wrapped(THREE, 1),
    "crlf": wrapped(THREE, 60).replace(b"\n", b"\r\n"),
    "no final newline": THREE.rstrip(b"\n"),
    "blank lines between records": THREE.replace(b"\n>", b"\n\n\n>"),
    "blank lines after all lines": THREE.replace(b"\n", b"\n\n"),
    "blank lines first": b"\n \r\n" + THREE,
    "blank lines last": THREE + b"\n\r\n  \n",
    "padded lines": THREE.replace(b"\n>", b" \t\n>").replace(b"\nM", b"\n  M"),
}


@pytest.mark.parametrize("content", LAYOUTS.values(), ids=LAYOUTS)
def test_line_layout_does_not_change_the_records(tmp_path: Path, content: bytes) -> None:
    records = read(tmp_path, content)
    assert sequences(records) == [UBIQUITIN, CRAMBIN, GB1]
    assert [record.header for record in records] == ["sp|P0CG48|UBC_HUMAN Ubiquitin", "1CRN", "1PGA GB1"]
    assert all(content[record.offset : record.offset + 1] == b">" for record in records)


def test_gzip_with_one_or_many_members_reads_like_plain_text(tmp_path: Path) -> None:
    plain = read(tmp_path, THREE)
    middle = len(THREE) // 2
    assert read(tmp_path, gzip.compress(THREE)) == plain
    assert read(tmp_path, gzip.compress(THREE[:middle]) + gzip.compress(b"") + gzip.compress(THREE[middle:])) == plain
    assert (
        read(tmp_path, gzip.compress(THREE[:middle]) + b"\0" * 7 + gzip.compress(THREE[middle:]) + b"\0" * 512) == plain
    )


def test_zstd_with_one_or_many_frames_reads_like_plain_text(tmp_path: Path) -> None:
    plain = read(tmp_path, THREE)
    middle = len(THREE) // 2
    assert read(tmp_path, zstandard.compress(THREE)) == plain
    assert read(tmp_path, zstandard.compress(THREE[:middle]) + zstandard.compress(THREE[middle:])) == plain


PACKINGS: dict[str, Callable[[bytes], bytes]] = {"plain": bytes, "gzip": gzip.compress, "zstd": zstandard.compress}


@pytest.mark.parametrize("pack", PACKINGS.values(), ids=PACKINGS)
def test_standard_input_reads_like_a_file(tmp_path: Path, pack: Callable[[bytes], bytes]) -> None:
    code = "from bionemo_esm.data.fasta import read_fasta; print([r.sequence.decode() for r in read_fasta('-')])"
    done = subprocess.run([sys.executable, "-c", code], input=pack(THREE), capture_output=True, check=True)
    assert ast.literal_eval(done.stdout.decode()) == [UBIQUITIN, CRAMBIN, GB1]


@pytest.mark.parametrize("pack", PACKINGS.values(), ids=PACKINGS)
def test_block_size_does_not_change_the_records(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, pack: Callable[[bytes], bytes]
) -> None:
    whole = read(tmp_path, THREE)
    content = pack(THREE)
    monkeypatch.setattr(sources, "_READ_BYTES", 3)
    monkeypatch.setattr(sources, "_ZSTD_READ_BYTES", 3)
    for size in range(1, 90):
        monkeypatch.setattr(sources, "_UNPACKED_BYTES", size)
        monkeypatch.setattr(fasta, "_BLOCK_BYTES", size)
        assert read(tmp_path, content) == whole


def test_a_record_longer_than_any_known_protein_is_read(tmp_path: Path) -> None:
    giant = "".join(random.Random(0).choices("LAGVSERTIDPKQNFYMHWC", k=2_500_000))
    content = f">giant\n{giant}\n>1CRN\n{CRAMBIN}\n".encode()
    assert sequences(read(tmp_path, wrapped(content, 60))) == [giant, CRAMBIN]
    assert sequences(read(tmp_path, gzip.compress(content, 1))) == [giant, CRAMBIN]


def test_empty_headers_and_empty_sequences_are_records(tmp_path: Path) -> None:
    records = read(tmp_path, b">\n>  \nMK\n>only a header\n\n>last")
    assert [(record.header, record.id, record.sequence) for record in records] == [
        ("", "", b""),
        ("", "", b"MK"),
        ("only a header", "only", b""),
        ("last", "last", b""),
    ]


def test_case_and_symbols_are_passed_through(tmp_path: Path) -> None:
    assert sequences(read(tmp_path, b">a\nmkT-.*j\n")) == ["mkT-.*j"]


def test_headers_are_utf8(tmp_path: Path) -> None:
    records = read(tmp_path, ">α-synuclein > fragment\nMDVF\n".encode())
    assert records[0].header == "α-synuclein > fragment"


@pytest.mark.parametrize("compressed", [False, True], ids=["plain", "gzip"])
def test_memory_does_not_grow_with_the_file(tmp_path: Path, compressed: bool) -> None:
    path = tmp_path / "large.fasta"
    long_records = b"".join(b">%d\n%s\n" % (number, CRAMBIN.encode() * 200) for number in range(20_000))
    path.write_bytes(gzip.compress(long_records, 1) if compressed else long_records)
    assert len(long_records) > 170 * 2**20
    del long_records
    tracemalloc.start()
    try:
        assert sum(1 for _ in read_fasta(path)) == 20_000
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak < 60 * 2**20


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "the file is empty"),
        (b"\n \r\n", "the file is empty"),
        (gzip.compress(b"", mtime=0), "the file is empty"),
        (
            UBIQUITIN.encode() + b"\n" + THREE,
            r"record 1, byte 0: text before the first '>' \('MQIFV.*begin each record",
        ),
        (b"\n\nid,sequence\n1,MK\n", r"byte 2: text before the first '>' \('id,sequence'\)"),
        (b"\xef\xbb\xbf" + THREE, "byte order mark"),
        (THREE.decode().encode("utf-16"), "NUL byte: binary or UTF-16"),
        (b">a\nMK\n>b\nM\0K\n", "record 2, byte 10: a NUL byte"),
        (b">a\nMK >b\nMV\n", "record 1, byte 6: a '>' amid a sequence line"),
        (b">a\rMK\r>b\rMV\r", "record 1, byte 0: lines end in a lone CR"),
        (b">a\nMK\n>prot\xe9ine\nMV\n", r"record 2, byte 11: the header is not UTF-8 \(byte 0xe9\).*iconv"),
        (b"\x28\xb5\x2f\xfd\x04\x00", "record 1, byte 0: the zstd stream is damaged"),
        (zstandard.compress(THREE)[:-9], "the zstd stream is damaged.*zstd -t"),
        (zstandard.compress(THREE) + b">late\nMK\n", "the zstd stream is damaged"),
        (b"BZh91AY", "compressed with bzip2; decompress it first"),
        (b"\xfd7zXZ\x00\x00", "compressed with xz; decompress it first"),
    ],
)
def test_an_unreadable_file_is_refused_with_place_and_advice(tmp_path: Path, content: bytes, message: str) -> None:
    with pytest.raises(SourceError, match=message) as caught:
        read(tmp_path, content)
    assert str(tmp_path / "proteins.fasta") in str(caught.value)


def workbook() -> bytes:
    content = io.BytesIO()
    with zipfile.ZipFile(content, "w") as archive:
        archive.writestr("[Content_Types].xml", "<Types/>")
        archive.writestr("xl/workbook.xml", "<workbook/>")
    return content.getvalue()


def zipped() -> bytes:
    content = io.BytesIO()
    with zipfile.ZipFile(content, "w") as archive:
        archive.writestr("proteins.fasta", THREE)
    return content.getvalue()


OTHER_FORMATS = {
    "PIR": (b">P1;CRAB_ANAPL\nALPHA CRYSTALLIN B CHAIN.\n MDITIHNPLI*\n", "a PIR file", "'pir'"),
    "GenBank": (b"LOCUS       NP_000508  142 aa  linear   PRI\n", "a GenBank file", "'genbank'"),
    "EMBL": (b"ID   P69905; SV 1; linear; mRNA; STD; HUM; 576 BP.\n", "an EMBL or Swiss-Prot file", "'swiss'"),
    "Swiss-Prot": (b"ID   HBA_HUMAN  Reviewed;  142 AA.\n", "an EMBL or Swiss-Prot file", "'swiss'"),
    "Clustal": (b"CLUSTAL O(1.2.4) multiple sequence alignment\n\n", "a Clustal alignment", "'clustal'"),
    "Stockholm": (b"# STOCKHOLM 1.0\n", "a Stockholm alignment", "'stockholm'"),
    "NEXUS": (b"#NEXUS\nbegin data;\n", "a NEXUS file", "'nexus'"),
    "FASTQ": (b"@read1 a long description of where it was read\nACGT\n+\nIIII\n", "a FASTQ file", "'fastq'"),
    "PDB": (b"HEADER    PLANT PROTEIN            30-APR-81   1CRN\n", "a PDB structure", "'pdb-atom'"),
    "mmCIF": (b"data_1CRN\n#\n_entry.id 1CRN\n", "an mmCIF structure", "'cif-atom'"),
    "A3M": (b"#A3M#\n>query\nMKV\n", "an A3M alignment", "lower-case insertions"),
    "HTML": (b"\n<!DOCTYPE html>\n<html><title>404</title>", "an HTML page", "the download failed"),
    "XML": (b"<?xml version='1.0'?><uniprot/>", "an XML file", "download the FASTA file"),
    "xlsx": (workbook(), "a workbook", "export the sheet as CSV"),
    "xls": (b"\xd0\xcf\x11\xe0\xa1\xb1\x1a\xe1" + bytes(9), "a workbook", "export the sheet as CSV"),
    "twice": (gzip.compress(gzip.compress(THREE)), "compressed twice", "gzip -d"),
    "zipped twice": (gzip.compress(zipped()), "compressed twice", "gzip -d"),
}


@pytest.mark.parametrize("case", OTHER_FORMATS)
def test_a_file_of_another_format_is_refused_with_the_remedy(tmp_path: Path, case: str) -> None:
    content, what, remedy = OTHER_FORMATS[case]
    with refused("fasta.format", tmp_path / "proteins.fasta", f"is {what}", remedy):
        read(tmp_path, content)


def test_a_zip_archive_is_refused(tmp_path: Path) -> None:
    with pytest.raises(SourceError, match="compressed with zip; decompress it first with `unzip`"):
        read(tmp_path, zipped())


def counts(text: str) -> NDArray[np.int64]:
    return np.bincount(encode(text), minlength=VOCABULARY_SIZE)


@pytest.mark.parametrize("text", ["ACGT" * 5, "acgu" * 9, "ACGTN" * 9 + "RY", "GATTACA" * 3])
def test_nucleotides_are_refused(text: str) -> None:
    with refused("fasta.nucleotides", "x.fasta: looks like DNA or RNA"):
        refuse_nucleotides("x.fasta", counts(text))


@pytest.mark.parametrize("text", ["GATTACA", "GAGAGS" * 9, "A" * 99, "GAAAG" * 20, CRAMBIN, UBIQUITIN, ""])
def test_peptides_repeats_and_proteins_are_not_taken_for_nucleotides(text: str) -> None:
    refuse_nucleotides("x.fasta", counts(text))


def test_a_missing_file_and_a_folder_are_refused(tmp_path: Path) -> None:
    with pytest.raises(SourceError, match=r"absent\.fasta: no such file; check the path"):
        next(read_fasta(tmp_path / "absent.fasta"))
    with pytest.raises(SourceError, match="is a folder; name a file in it"):
        next(read_fasta(tmp_path))


def test_a_truncated_gzip_gives_its_complete_records_then_an_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sources, "_UNPACKED_BYTES", 16)
    monkeypatch.setattr(fasta, "_BLOCK_BYTES", 16)
    path = tmp_path / "cut.fasta.gz"
    path.write_bytes(gzip.compress(THREE)[:-9])
    reader = read_fasta(path)
    first = [next(reader), next(reader)]
    assert sequences(first) == [UBIQUITIN, CRAMBIN]
    with pytest.raises(
        FastaError, match=rf"record 3, byte {THREE.find(b'>1PGA')}: the gzip stream is damaged.*gzip -t"
    ):
        list(reader)


@pytest.mark.parametrize("where", [0.3, 0.6, 0.99])
def test_a_flipped_bit_in_a_gzip_is_found(tmp_path: Path, where: float) -> None:
    damaged = bytearray(gzip.compress(THREE))
    damaged[int(len(damaged) * where)] ^= 0x10
    with pytest.raises(FastaError, match="the gzip stream is damaged"):
        read(tmp_path, bytes(damaged))


def test_text_after_the_gzip_stream_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(FastaError, match="the gzip stream is damaged"):
        read(tmp_path, gzip.compress(THREE) + b">late\nMK\n")


def test_a_record_above_the_size_limit_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert fasta.MAX_RECORD_BYTES == 64 * 2**20
    monkeypatch.setattr(fasta, "MAX_RECORD_BYTES", 2 * 2**20)
    content = b">1CRN\n" + CRAMBIN.encode() + b"\n>chromosome\n" + b"ACGT" * 2**20
    with pytest.raises(FastaError, match=rf"record 2, byte {content.find(b'>chr')}: the record is longer than 2 MiB"):
        read(tmp_path, content)
