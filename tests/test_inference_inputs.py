"""Input proteins for inference: accepted formats, and handling of unusable records."""

from __future__ import annotations

import csv
import gzip
import io
import subprocess
import sys
import tracemalloc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pandas as pd
import pyarrow as arrow
import pytest
import zstandard
from pyarrow import parquet

from bionemo_esm.alphabet import decode
from bionemo_esm.data.fasta import FastaError, SourceError, read_fasta
from bionemo_esm.errors import ConfigError, UserError
from bionemo_esm.inference.inputs import InputError, InputInventory, InputPolicy, proteins_of, read_proteins, scan_input
from conftest import SAMPLE
from errors import refused

UBIQUITIN = "MQIFVKTLTGKTITLEVEPSDTIENVKAKIQDKEGIPPDQQRLIFAGKQLEDGRTLSDYNIQKESTLHLVLRLRGG"
CRAMBIN = "TTCCPSIVARSNFNVCRLPGTPEALCATYTGCIIIPGATCPGDYAN"
TWO = {"P0CG48": UBIQUITIN, "1CRN": CRAMBIN}
USUAL, SKIP, AS_X = InputPolicy(), InputPolicy(bad_records="skip"), InputPolicy(unknown_letters="X")


def fasta(proteins: dict[str, str]) -> bytes:
    return "".join(f">{name} of something\n{sequence}\n" for name, sequence in proteins.items()).encode()


def table(proteins: dict[str, str], separator: str = ",", end: str = "\n") -> bytes:
    return f"id{separator}sequence{end}".encode() + b"".join(
        f"{name}{separator}{sequence}{end}".encode() for name, sequence in proteins.items()
    )


def as_parquet(columns: dict[str, Any], **options: Any) -> bytes:
    stream = io.BytesIO()
    parquet.write_table(arrow.table(columns), stream, **options)
    return stream.getvalue()


def written(folder: Path, name: str, content: bytes | str) -> str:
    (folder / name).write_bytes(content.encode() if isinstance(content, str) else content)
    return str(folder / name)


def read(path: str | Path, policy: InputPolicy = USUAL) -> dict[str, str]:
    return {protein.id: decode(protein.tokens) for protein in read_proteins(path, policy)}


COLUMNS = {"id": list(TWO), "sequence": list(TWO.values())}
FORMS: dict[str, bytes] = {
    "a.fasta": fasta(TWO),
    "a.fa.gz": gzip.compress(fasta(TWO)),
    "a.faa.zst": zstandard.compress(fasta(TWO)),
    "named-otherwise": fasta(TWO),
    "a.csv": table(TWO),
    "a.CSV.gz": gzip.compress(table(TWO)),
    "a.csv.zst": zstandard.compress(table(TWO)),
    "crlf.csv": table(TWO, end="\r\n"),
    "bom.csv": b"\xef\xbb\xbf" + table(TWO),
    "no-end.csv": table(TWO).rstrip(),
    "blank-lines.csv": table(TWO, end="\n\n") + b"  \n",
    "blanks.csv": table(TWO).replace(b",", b" , ").replace(b"\n", b" \n"),
    "quoted.csv": b'"id","sequence"\n' + b"".join(f'"{n}","{s}"\n'.encode() for n, s in TWO.items()),
    "wrapped-in-quotes.csv": f'id,sequence\nP0CG48,"{UBIQUITIN[:40]}\n{UBIQUITIN[40:]}"\n1CRN,{CRAMBIN}\n'.encode(),
    "capitals.csv": table(TWO).replace(b"id,sequence", b"ID,Sequence"),
    "short-name.csv": table(TWO).replace(b"id,sequence", b"id,seq"),
    "more-columns.csv": b"length,sequence,id\n" + b"".join(f"3,{s},{n}\n".encode() for n, s in TWO.items()),
    "a.tsv": table(TWO, "\t"),
    "a.tsv.gz": gzip.compress(table(TWO, "\t")),
    "a.parquet": as_parquet(COLUMNS),
    "zstd.pq": as_parquet(COLUMNS | {"more": [1, 2]}, compression="zstd"),
    "dictionary.parquet": as_parquet({name: arrow.array(c).dictionary_encode() for name, c in COLUMNS.items()}),
    "large.parquet": as_parquet({name: arrow.array(column, arrow.large_string()) for name, column in COLUMNS.items()}),
    "lower-case.fasta": fasta({name: sequence.lower() for name, sequence in TWO.items()}),
    "ends-in-a-star.csv": table({name: sequence + "*" for name, sequence in TWO.items()}),
}


@pytest.mark.parametrize("name", FORMS)
def test_every_file_format_gives_the_same_proteins(name: str, tmp_path: Path) -> None:
    found = list(read_proteins(written(tmp_path, name, FORMS[name])))
    assert {protein.id: decode(protein.tokens) for protein in found} == TWO
    assert [protein.number for protein in found] == [1, 2]
    assert [protein.residues for protein in found] == [76, 46]


@pytest.mark.parametrize(("content", "form"), [
    (FORMS["a.fasta"], None), (FORMS["a.fa.gz"], None), (FORMS["a.csv.zst"], "csv"), (FORMS["a.parquet"], "parquet"),
])  # fmt: skip
def test_standard_input_is_read_like_a_file(content: bytes, form: str | None) -> None:
    script = (
        "from bionemo_esm.inference.inputs import *\n"
        f"for p in read_proteins('-', InputPolicy(input_format={form!r})): print(p.number, p.id, p.residues)"
    )
    done = subprocess.run([sys.executable, "-c", script], input=content, capture_output=True, check=True)
    assert done.stdout.decode().splitlines() == ["1 P0CG48 76", "2 1CRN 46"]


def test_the_shipped_sample_is_read_like_in_the_data_reader() -> None:
    found = list(read_proteins(SAMPLE / "test.fasta.gz"))
    records = list(read_fasta(SAMPLE / "test.fasta.gz"))
    assert [protein.id for protein in found] == [record.id for record in records]
    assert [decode(protein.tokens) for protein in found] == [record.sequence.decode() for record in records]
    stock = scan_input(SAMPLE / "test.fasta.gz")
    lengths = [len(record.sequence) for record in records]
    assert stock == InputInventory(len(records), sum(lengths), max(lengths), 0, "", False)


def test_columns_may_have_other_names(tmp_path: Path) -> None:
    policy = InputPolicy(id_column="Entry", sequence_column="wild type")
    csv_file = written(tmp_path, "a.csv", "Entry,id,wild type\nP1,x,MKV\n")
    parquet_file = written(tmp_path, "a.parquet", as_parquet({"wild type": ["MKV"], "Entry": ["P1"]}))
    for path in (csv_file, parquet_file):
        assert read(path, policy) == {"P1": "MKV"}


@pytest.mark.parametrize("name", ["a.csv", "a.parquet"])
def test_without_an_id_column_record_numbers_are_the_ids(name: str, tmp_path: Path) -> None:
    content = "sequence\nMKV\n\nACD\n" if name == "a.csv" else as_parquet({"sequence": ["MKV", "ACD"]})
    path = written(tmp_path, name, content)
    assert read(path) == {"1": "MKV", "2": "ACD"}
    assert scan_input(path).ids_are_numbers


def test_integer_ids_are_accepted_including_zero(tmp_path: Path) -> None:
    path = written(tmp_path, "a.parquet", as_parquet({"id": [0, 17], "sequence": ["MKV", "ACD"]}))
    assert read(path) == {"0": "MKV", "17": "ACD"}
    assert not scan_input(path).ids_are_numbers


def test_ids_may_contain_spaces_punctuation_and_unicode(tmp_path: Path) -> None:
    ids = ["a/b", "a b", "ä-β", "x" * 1024, "a,b", 'say "x"', "."]
    stream = io.StringIO()
    csv.writer(stream).writerows([["id", "sequence"], *([name, "MKV"] for name in ids)])
    assert list(read(written(tmp_path, "a.csv", stream.getvalue()))) == ids
    assert list(read(written(tmp_path, "a.parquet", as_parquet({"id": ids, "sequence": ["MKV"] * 7})))) == ids


# --- unusable records -------------------------------------------------------------------------------------------------

BAD: dict[str, tuple[str, str]] = {  # id and sequence of the second record, and the message about it
    "empty": ("", "it has no residues"),
    "star": ("*", "it has no residues"),
    "j": ("MKJV", "residue 3 is 'J', not a letter of proteins"),
    "stop": ("MK*VA", "residue 3 is '\\*', not a letter"),
    "digit": ("M1", "residue 2 is '1', not"),
    "gap": ("MK-V", "residue 3 is '-', a gap, as alignments have"),
    "insertion": ("MK.V", "residue 3 is '\\.', a gap"),
    "umlaut": ("MKäV", "residue 3 is 'ä', not a letter"),
    "cyrillic": ("MКV", "residue 2 is 'К', not a letter"),
}


@pytest.mark.parametrize("form", ["fasta", "csv", "parquet"])
@pytest.mark.parametrize("which", BAD)
def test_a_bad_record_is_an_error_or_skipped(which: str, form: str, tmp_path: Path) -> None:
    sequence, message = BAD[which]
    proteins = {"first": CRAMBIN, "second": sequence, "third": UBIQUITIN}
    columns = {"id": list(proteins), "sequence": list(proteins.values())}
    content = {"fasta": fasta, "csv": table, "parquet": lambda _: as_parquet(columns)}[form](proteins)
    path = written(tmp_path, f"in.{form}", content)
    with pytest.raises(InputError, match=rf"in\.{form}, record 2 \(second\): {message}.*bad_records=skip leaves such"):
        read(path)
    skipped: list[str] = []
    found = list(read_proteins(path, SKIP, skipped.append))
    assert [(protein.id, protein.number) for protein in found] == [("first", 1), ("third", 3)]
    assert len(skipped) == 1
    assert f"in.{form}, record 2 (second): " in skipped[0]
    stock = scan_input(path, SKIP)
    assert (stock.proteins, stock.residues, stock.skipped, stock.first_problem) == (2, 122, 1, skipped[0])


@pytest.mark.parametrize(("given", "read_as"), [
    ("MKJV", "MKXV"), ("MK*VA*", "MKXVA"), ("MK-.V", "MKXXV"), ("MКVä", "MXVX"), ("XBUZO", "XBUZO"),
])  # fmt: skip
@pytest.mark.parametrize("form", ["fasta", "csv"])
def test_unknown_letters_become_x_on_request_without_changing_the_length(
    given: str, read_as: str, form: str, tmp_path: Path
) -> None:
    path = written(tmp_path, f"in.{form}", fasta({"a": given}) if form == "fasta" else table({"a": given}))
    assert read(path, AS_X) == {"a": read_as}


@pytest.mark.parametrize("form", ["fasta", "csv", "parquet"])
def test_a_repeated_id_is_an_error_or_skipped(form: str, tmp_path: Path) -> None:
    contents = {
        "fasta": b">a 1\nMKV\n>b\nACD\n>a 2\nMMM\n",
        "csv": b"id,sequence\na,MKV\nb,ACD\na ,MMM\n",
        "parquet": as_parquet({"id": ["a", "b", "a"], "sequence": ["MKV", "ACD", "MMM"]}),
    }
    path = written(tmp_path, f"in.{form}", contents[form])
    with pytest.raises(InputError, match=r"record 3 \(a\): an earlier record has the same id"):
        read(path)
    assert read(path, SKIP) == {"a": "MKV", "b": "ACD"}


def test_the_id_of_a_skipped_record_can_be_used_again(tmp_path: Path) -> None:
    assert read(written(tmp_path, "in.fasta", ">a\nMKJ\n>a\nMKV\n"), SKIP) == {"a": "MKV"}


@pytest.mark.parametrize(("identifier", "message"), [
    ("", "it has no id"),
    ("  ", "it has no id"),
    (None, "it has no id"),
    ("a\0b", "its id has a control character"),
    ("a\x1bb", "its id has a control character"),
    ("x" * 1025, r"\(x{37}\.\.\.\): its id has 1,025 characters, over 1,024"),
])  # fmt: skip
def test_missing_overlong_and_control_character_ids_are_refused(
    identifier: str | None, message: str, tmp_path: Path
) -> None:
    path = written(tmp_path, "in.parquet", as_parquet({"id": ["a", identifier], "sequence": ["MKV", "ACD"]}))
    with pytest.raises(InputError, match=rf"in\.parquet, record 2.*{message}"):
        read(path)
    assert read(path, SKIP) == {"a": "MKV"}
    if identifier is not None:
        with pytest.raises(InputError, match=message):
            proteins_of({"a": "MKV", identifier: "ACD"})


def test_a_null_sequence_has_no_residues(tmp_path: Path) -> None:
    path = written(tmp_path, "in.parquet", as_parquet({"id": ["a", "b"], "sequence": ["MKV", None]}))
    with pytest.raises(InputError, match=r"record 2 \(b\): it has no residues"):
        read(path)


@pytest.mark.parametrize("content", [b">a\n\n>b\nMKJ\n", b">a\n*\n"])
def test_an_input_whose_records_are_all_skipped_is_an_error(content: bytes, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"in\.fasta: no protein is left: .*record 1 \(a\): it has no residues"):
        scan_input(written(tmp_path, "in.fasta", content), SKIP)


# --- unreadable files -------------------------------------------------------------------------------------------------

WHOLE = gzip.compress(table({f"p{i}": CRAMBIN for i in range(500)}), 1)
SPOILT = bytearray(as_parquet({"id": ["a"] * 3000, "sequence": [CRAMBIN] * 3000}, compression="none"))
SPOILT[4:400] = bytes(396)
BROKEN: dict[str, tuple[bytes, str]] = {
    "empty.csv": (b"", "the first line is empty; it must name the columns"),
    "blank.csv": (b"\nid,sequence\n", "the first line is empty"),
    "no-rows.csv": (b"id,sequence\n", "no protein in it"),
    "columns.csv": (b"name,letters\na,MKV\n", "no column named sequence or seq; .*sequence_column=.*: name, letters"),
    "twice.csv": (b"id,sequence,Sequence\na,MKV,MKV\n", "2 columns are named 'sequence'"),
    "commas.tsv": (table(TWO), "no column named sequence or seq.*: id,sequence"),
    "fields.csv": (b"id,sequence\na,MKV\n\nb,MKV,7\n", r"record 2 \(line 4\): has 3 fields, the header 2"),
    "few.csv": (b"id,sequence\na,MKV\nb\n", r"record 2 \(line 3\): has 1 fields, the header 2"),
    "open-quote.csv": (b'id,sequence\nz,MKV\na,"MKV\nb,ACD\n', "after line 2: unexpected end of data; close quotes"),
    "lone-cr.csv": (table(TWO, end="\r"), "ends its lines with a carriage return alone"),
    "latin1.csv": ("id,sequence\nä,MKV\n".encode("latin-1"), "line 1 or later: is not UTF-8 text"),
    "utf16.csv": (table(TWO).decode().encode("utf-16"), "is UTF-16 text; save it as UTF-8"),
    "twice.csv.gz": (gzip.compress(gzip.compress(table(TWO))), r"is compressed twice; decompress it once \(gunzip\)"),
    "sheet.csv": (b"PK\3\4" + bytes(60), "is a spreadsheet, or another zip file; save the sheet as CSV"),
    "sheet.xlsx": (b"PK\3\4" + bytes(60), "is a spreadsheet, or another zip file; save the sheet as CSV"),
    "semicolon.csv": (b"id;sequence\na;MKV\n", "is it separated by ';'. Save it with commas"),
    "nul.csv": (b"id,sequence\na,MK\0V\n", r"record 1 \(a\): residue 3 is '\\x00'|NUL"),
    "cut.csv.gz": (WHOLE[:-20], r"cut\.csv\.gz: the gzip stream is damaged.*copy the file again"),
    "binary.csv": (bytes(range(256)) * 20, "is no text; is it the right file"),
    "text.parquet": (table(TWO), "cannot be read as Parquet"),
    "cut.parquet": (FORMS["a.parquet"][:-30], "cannot be read as Parquet"),
    "spoilt.parquet": (bytes(SPOILT), "cannot be read as Parquet"),
    "bytes.parquet": (as_parquet({"id": [b"a"], "sequence": ["MKV"]}), "column 'id', of ids, holds binary; make it"),
    "numbers.parquet": (as_parquet({"id": ["a"], "sequence": [17]}), "column 'sequence', of sequences, holds int64"),
    "floats.parquet": (as_parquet({"id": [1.0, None], "sequence": ["M", "K"]}), "column 'id', of ids, holds double"),
    "lists.parquet": (as_parquet({"sequence": [["M", "K"]]}), "column 'sequence', of sequences, holds list"),
    "columns.parquet": (as_parquet({"letters": ["MKV"]}), "no column named sequence or seq.*: letters"),
    "empty.fasta": (b"", "the file is empty"),
    "headless.fasta": (b"MKV\n", "text before the first '>'"),
    "nul.fasta": (b">a\nMK\0V\n", "a NUL byte"),
    "no-id.fasta": (b">\nMKV\n", r"no-id\.fasta, record 1: it has no id"),
    "archive.csv": (b"PK\x03\x04" + bytes(100), "is a spreadsheet, or another zip file"),
}


@pytest.mark.parametrize("name", BROKEN)
def test_an_invalid_file_is_refused_with_its_name_and_the_reason(name: str, tmp_path: Path) -> None:
    content, message = BROKEN[name]
    with pytest.raises((InputError, SourceError), match=message) as raised:
        scan_input(written(tmp_path, name, content), USUAL)
    assert name in str(raised.value)
    assert "\n" not in str(raised.value)


def test_a_truncated_file_gives_an_error_and_no_truncated_record(tmp_path: Path) -> None:
    path = written(tmp_path, "cut.csv.gz", WHOLE[:-20])
    found: list[str] = []
    with pytest.raises(InputError, match="damaged"):
        found.extend(protein.id for protein in read_proteins(path))
    assert found == []


@pytest.mark.parametrize("name", ["none.fasta", "none.csv", "none.parquet", "folder.csv", "folder.parquet"])
def test_a_missing_file_or_a_folder_is_named(name: str, tmp_path: Path) -> None:
    (tmp_path / "folder.csv").mkdir()
    (tmp_path / "folder.parquet").mkdir()
    with pytest.raises(UserError, match=rf"{name}: .*([Nn]o such file|folder|directory)"):
        read(tmp_path / name)


@pytest.mark.parametrize(("policy", "message"), [
    (InputPolicy(id_column="Entry"), "id_column=Entry: there is no such column, but id, sequence"),
    (InputPolicy(sequence_column="wt"), "sequence_column=wt: there is no such column"),
    (InputPolicy(sequence_column="Sequence"), "sequence_column=Sequence: there is no such column"),
])  # fmt: skip
@pytest.mark.parametrize("name", ["a.csv", "a.parquet"])
def test_a_missing_column_is_named(policy: InputPolicy, message: str, name: str, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=message):
        read(written(tmp_path, name, FORMS[name]), policy)


@pytest.mark.parametrize(("settings", "message"), [
    ({"input_format": "xlsx"}, "input_format must be one of fasta, csv, tsv, parquet, or null, not 'xlsx'"),
    ({"bad_records": "warn"}, "bad_records must be one of error, skip, not 'warn'"),
    ({"unknown_letters": "x"}, "unknown_letters must be one of error, X, not 'x'"),
])  # fmt: skip
def test_invalid_values_of_a_policy_are_refused(settings: dict[str, str], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        InputPolicy(**settings)


def test_an_overlong_line_of_a_table_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("bionemo_esm.inference.inputs.MAX_RECORD_BYTES", 2**21)
    with pytest.raises(InputError, match=r"in\.csv, line 2: is too long for a protein"):
        read(written(tmp_path, "in.csv", "id,sequence\na," + "M" * 2**23))


@pytest.mark.parametrize("form", ["fasta", "csv", "parquet"])
def test_memory_does_not_grow_with_the_input(form: str, tmp_path: Path) -> None:
    proteins = {f"p{index}": UBIQUITIN * 100 for index in range(6_000)}
    if form == "parquet":
        columns = {"id": list(proteins), "sequence": list(proteins.values())}
        content = as_parquet(columns, row_group_size=1000)
    else:
        content = {"fasta": fasta, "csv": table}[form](proteins)
    path = written(tmp_path, f"in.{form}", content)
    next(read_proteins(path))  # warm up imports
    tracemalloc.start()
    residues = sum(protein.residues for protein in read_proteins(path))
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert residues == 45_600_000
    assert peak < 0.6 * residues


# --- Python objects ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("given", "expected"), [
    (lambda: {"a": "MKV", 7: "ac d\n"}, {"a": "MKV", "7": "ACD"}),
    (lambda: ["MKV", "ACD"], {"1": "MKV", "2": "ACD"}),
    (lambda: (sequence for sequence in ("MKV", "ACD")), {"1": "MKV", "2": "ACD"}),
    (lambda: [("a", "MKV"), ("b", "ACD*")], {"a": "MKV", "b": "ACD"}),
    (lambda: "MKV", {"1": "MKV"}),
])  # fmt: skip
def test_python_objects_are_accepted_as_proteins(given: Callable[[], Any], expected: dict[str, str]) -> None:
    assert {protein.id: decode(protein.tokens) for protein in proteins_of(given())} == expected


@pytest.mark.parametrize(("given", "message"), [
    (["MKV", None], r"sequences, record 2 \(2\): None is not text"),
    (b"MKV", "is not a sequence; give text, a list of sequences"),
    ([("a", "MKV", 1)], r"record 1 \(1\): \('a', 'MKV', 1\) is not text"),
    (["MKV", "M\ud800"], r"record 2 \(2\): residue 2 is '\?'"),
    ([("a", "MKV"), ("a", "ACD")], r"record 2 \(a\): an earlier record has the same id"),
    ("", r"record 1 \(1\): it has no residues$"),
    ({}, "sequences: no protein is there"),
    ("proteins.fasta", r"proteins\.fasta: no such file"),
])  # fmt: skip
def test_unusable_python_objects_are_refused_with_the_reason(given: Any, message: str) -> None:
    with pytest.raises(UserError, match=message):
        proteins_of(given)


@pytest.mark.parametrize("place", ["at hand", "a file"])
def test_advice_uses_python_or_command_line_syntax_of_the_caller(place: str, tmp_path: Path) -> None:
    path = written(tmp_path, "in.fasta", ">a\nMKJ\n")
    given: Any = path if place == "a file" else {"a": "MKJ"}
    with pytest.raises(InputError) as raised:
        proteins_of(given, USUAL)
    assert "by policy=InputPolicy(unknown_letters='X'); policy=InputPolicy(bad_records='skip')" in str(raised.value)
    with pytest.raises(InputError, match=r"correct it$"):
        proteins_of(given)
    with pytest.raises(InputError, match=r"is left: .*record 1"):
        proteins_of(given, SKIP)
    with pytest.raises(InputError, match="by unknown_letters=X; bad_records=skip leaves"):
        read(path)
    with pytest.raises(InputError, match=r"correct it$"):
        list(read_proteins(path))
    with pytest.raises(InputError, match=r"seq; say by policy=InputPolicy\(sequence_column='...'\) which one it is: x"):
        proteins_of(written(tmp_path, "in.csv", "x\nMK\n"), USUAL)


def test_a_damaged_fasta_raises_the_error_of_the_data_reader(tmp_path: Path) -> None:
    with pytest.raises(FastaError, match="gzip stream is damaged"):
        read(written(tmp_path, "cut.fasta.gz", gzip.compress(fasta(TWO))[:-9]))


@pytest.mark.parametrize("records", [1, 3, 1500])
def test_nucleotides_are_refused_like_in_preprocess(tmp_path: Path, records: int) -> None:
    path = tmp_path / "genes.fasta"
    path.write_text("".join(f">gene{number}\nATGGTGCATCTGACTCCTGAGGAG\n" for number in range(records)))
    with refused("fasta.nucleotides", f"{path}: looks like DNA or RNA"):
        scan_input(path)
    with refused("fasta.nucleotides", "looks like DNA or RNA"):
        proteins_of({"gene": "ATGGTGCATCTGACTCCTGAGGAG"})


@pytest.mark.parametrize("sequence", ["GATTACA", "GAGAGAGAGAGAGAGAGAGAGAGA"])
def test_a_peptide_spelled_in_base_letters_is_accepted(sequence: str) -> None:
    assert [protein.residues for protein in proteins_of([sequence])] == [len(sequence)]


def test_a_file_of_another_format_is_refused_with_its_name(tmp_path: Path) -> None:
    path = tmp_path / "crystallin.fasta"
    path.write_text(">P1;CRAB_ANAPL\nALPHA CRYSTALLIN B CHAIN.\n MDITIHNPLI*\n")
    with refused("fasta.format", f"{path}: is a PIR file"):
        scan_input(path)


def test_a_labelled_pandas_index_gives_the_ids(tmp_path: Path) -> None:
    indexed = pd.DataFrame({"sequence": ["MKV", "MLA"]}, index=["u", "c"])
    named = indexed.rename_axis("accession")
    plain = indexed.reset_index(drop=True)
    for table, ids in ((indexed, ["u", "c"]), (named, ["u", "c"]), (plain, ["1", "2"])):
        table.to_parquet(tmp_path / "a.parquet")
        assert [protein.id for protein in read_proteins(tmp_path / "a.parquet")] == ids
    for table, ids in ((indexed, ["u", "c"]), (plain, ["1", "2"])):
        table.to_csv(tmp_path / "a.csv")
        assert [protein.id for protein in read_proteins(tmp_path / "a.csv")] == ids
