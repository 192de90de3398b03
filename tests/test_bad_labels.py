"""Tests of unusable labels: the error names file, record, id and remedy before any computation."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from bionemo_esm.errors import UserError
from labelled_files import CLASSES, GB1, MASK, NUMBERS, RESIDUES, SEQUENCES, STRUCTURE, preset, read

TABLE = "id,sequence,target,set\n"


@pytest.mark.parametrize(
    ("labels", "sequences", "mask", "told"),
    [
        (
            STRUCTURE.replace("EC", "XC"),
            SEQUENCES,
            MASK,
            r"record 1 \(a\), residue 4: the label 'X' is none of task\.cl",
        ),
        (STRUCTURE.replace("EC", "E"), SEQUENCES, MASK, r"record 1 \(a\): has 4 labels, its sequence 5 residues"),
        (
            STRUCTURE,
            SEQUENCES,
            MASK.replace("111\n>c", "1\n>c"),
            r"record 2 \(b\): its mask has 1 residues, its seq.* 3",
        ),
        (STRUCTURE, SEQUENCES, MASK.replace("111\n>c", "121\n>c"), r"record 2 \(b\): its mask has a '2'"),
        (STRUCTURE, SEQUENCES, MASK + ">a\n1\n", r"mask\.fasta, record 4 \(a\): an earlier record has the same id"),
        (STRUCTURE, SEQUENCES.replace(">b", ">d"), MASK, r"record 2 \(b\): no sequence of this id .*; 1 of 3 records"),
        (STRUCTURE + ">a SET=train\nHHEEC\n", SEQUENCES, MASK, r"record 4 \(a\): .*record 1 \(a\) has the same id"),
        (
            STRUCTURE,
            SEQUENCES + ">a\nMKVLA\n",
            MASK,
            r"sequences\.fasta, record 5 \(a\): an earlier record has the same",
        ),
        (
            STRUCTURE,
            SEQUENCES.replace("ACD", "AJD"),
            MASK,
            r"residue 2 is 'J', .* data\.unknown_letters=X; data\.bad_rec",
        ),
        (
            STRUCTURE.replace("=test", "=tset"),
            SEQUENCES,
            MASK,
            r"record 3 \(c\): SET is 'tset', not train, validation or",
        ),
        (
            STRUCTURE.replace("=True", "=maybe"),
            SEQUENCES,
            MASK,
            r"record 2 \(b\): VALIDATION is 'maybe', not True or Fa",
        ),
        (STRUCTURE.replace("test VALIDATION=False", "test VALIDATION=True"), SEQUENCES, MASK, r"record 3 .* one only"),
        (
            STRUCTURE.replace("=True", "=False"),
            SEQUENCES,
            MASK,
            r"no protein is marked for validation; .*data\.split\.val",
        ),
        (
            STRUCTURE.replace("=train", "=test").replace("=True", "=False"),
            SEQUENCES,
            MASK,
            r"no protein is left to train",
        ),
        (STRUCTURE.replace("HHE\nEC", "HHHHH"), SEQUENCES, MASK, r"all targets of the training set are of one class"),
        (STRUCTURE, SEQUENCES, MASK.replace("111\n>c", "000\n>c"), r"no target of the validation set is known"),
        (STRUCTURE, SEQUENCES, MASK.replace("\n11\n", "\n00\n"), r"no target of the test set is known"),
        (STRUCTURE.replace("HHE\nEC", ""), SEQUENCES, MASK, r"record 1 \(a\), residue 1: has no target"),
    ],
    ids=[
        "label unknown",
        "labels too short",
        "mask too short",
        "mask of other letters",
        "mask twice",
        "sequence missing",
        "labels twice",
        "sequence twice",
        "letter unknown",
        "set unknown",
        "mark unknown",
        "test and validation",
        "no validation",
        "no training",
        "one class",
        "validation all hidden",
        "test all hidden",
        "labels empty",
    ],
)
def test_unusable_residue_labels_are_refused_with_their_record(
    tmp_path: Path, labels: str, sequences: str, mask: str, told: str
) -> None:
    files = {"labels.fasta": labels, "sequences.fasta": sequences, "mask.fasta": mask}
    keys = {"train": "labels.fasta", "sequences": "sequences.fasta", "mask": "mask.fasta"}
    with pytest.raises(UserError, match=told):
        read(tmp_path, files, preset("secondary_structure"), **keys)


@pytest.mark.parametrize(
    ("task", "rows", "told"),
    [
        (
            NUMBERS,
            "a,MK,1,train\nb,AC,high,train\n",
            r"x\.csv, record 2 \(b\): 'high' is not a number; .*classification",
        ),
        (NUMBERS, "a,MK,1,train\nb,AC,inf,train\n", r"record 2 \(b\): 'inf' is not finite"),
        (NUMBERS, "a,MK,1e39,train\n", r"record 1 \(a\): '1e39' is too large for a 32-bit number"),
        (NUMBERS, "a,MK,-1e400,train\n", r"record 1 \(a\): '-1e400' is too large for a 32-bit number"),
        (NUMBERS, 'a,MK,"-1,5",train\n', r"'-1,5' is not a number; write it with a decimal point$"),
        (CLASSES, "a,MK,x,train\nb,AC,z${y},train\n", r"x\.csv, record 2 \(b\): the label 'z\$\{y\}' .*\. Rename it$"),
        (CLASSES, "a,MK,x,train\nb,AC,Nemo:ä,train\n", r"record 2 \(b\): the label 'Nemo:ä' cannot be kept in a model"),
        (CLASSES, 'a,MK,"x\nb",train\nc,AC,y,train\n', r"record 1 \(a\): the label 'x\\nb' .* is a quote not closed\?"),
        (CLASSES, "a,MK,x,train\nb,AC\n", r"x\.csv, row 3 \(record 2\): has 2 fields, the header 4; correct it"),
        (CLASSES, 'a,MK,x,train\nb,"AC,y,train\n', r"row 3 \(record 2\): has 2 fields, .* is its quote not closed\?"),
        (
            {**CLASSES, "target_column": "fold"},
            "a,MK,x,train\n",
            r"set; say which it is by task\.target_column=\.\.\.$",
        ),
        (NUMBERS, "a,MK,nan,train\n", r"record 1 \(a\): the target is 'nan'; .*data\.missing_targets=skip"),
        (NUMBERS, "a,MK,,train\n", r"record 1 \(a\): has no target; .*data\.missing_targets=skip"),
        (NUMBERS, "a,MK,2,train\nb,AC,2.0,train\nc,DE,3,valid\n", r"all targets of the training set are equal \(2\)"),
        (
            {**NUMBERS, "metric": "spearman"},
            "a,MK,2,train\nb,AC,3,train\nc,DE,1,valid\n",
            r"all targets of the validation set are equal \(1\); task\.metric=spearman cannot be had",
        ),
        (CLASSES, "a,MK,x,train\nb,AC,x,train\nc,DE,y,valid\n", r"two or more classes .*, but there is only 'x'"),
        (
            CLASSES,
            "a,MK,0.5,train\nb,AC,2.0,train\nc,DE,2.0,valid\n",
            r"numbers that are not whole, as '0.5'; is it .*reg",
        ),
        (CLASSES, "a,MK,,train\n", r"record 1 \(a\): has no target"),
        (CLASSES, "a,MK,x,train\na,AC,y,train\n", r"record 2 \(a\): an earlier record has the same id"),
        (CLASSES, "a,MK,x,practice\n", r"record 1 \(a\): SET is 'practice', .*task\.set_column="),
        (
            {**CLASSES, "target_column": "fold"},
            "a,MK,x,train\n",
            r"task\.target_column=fold: .* id, sequence, target, set",
        ),
        ({**CLASSES, "sequence_column": "aa"}, "a,MK,x,train\n", r"sequence_column=aa: there is no such column"),
        ({**CLASSES, "validation_column": "val"}, "a,MK,x,train\n", r"task\.validation_column=val: there is no such"),
        ({**CLASSES, "classes": ["x", "y"]}, "a,MK,z,train\n b,AC,x,valid\n", r"'z' is none of task\.classes \(x, y\)"),
        (RESIDUES, "a,MK,HHH,train\n", r"record 1 \(a\): has 3 labels, its sequence 2 residues"),
    ],
    ids=[
        "text",
        "infinite",
        "too large",
        "too large by far",
        "decimal comma",
        "interpolation",
        "reference",
        "lines in a label",
        "ragged",
        "open quote",
        "other target column",
        "nan",
        "empty",
        "all equal",
        "validation all equal",
        "one class",
        "fractions as classes",
        "class empty",
        "id twice",
        "set unknown",
        "no target column",
        "no sequence column",
        "no validation column",
        "not of the vocabulary",
        "labels too long",
    ],
)
def test_unusable_table_is_refused_with_its_record(tmp_path: Path, task: dict[str, Any], rows: str, told: str) -> None:
    rows += "" if "valid" in rows else "v,WW,x,valid\n" if task["kind"] == "classification" else "v,WW,1,valid\n"
    with pytest.raises(UserError, match=told):
        read(tmp_path, {"x.csv": TABLE + rows}, task, train="x.csv")


@pytest.mark.parametrize(
    ("task", "data", "told"),
    [
        ("gb1", {}, r"data\.train must be given: data\.train=FILE, or the task's own files by data\.download=FOLDER"),
        ("stability", {"download": "here"}, r"data\.download: task stability has no file"),
        ("gb1", {"train": "nothing.csv"}, r"nothing\.csv"),
        ("gb1", {"train": "gb1.csv", "mask": "mask.fasta"}, r"data\.mask is of residues"),
        (
            "gb1",
            {"train": "gb1.csv", "split": {"test": 0.1}},
            r"data\.split\.test: .* has proteins marked for test already",
        ),
        ("gb1", {"train": "gb1.csv", "max_residues": 3}, r"no protein is left to train on"),
        (
            "gb1",
            {"train": "gb1.fasta"},
            r"record 1 \(a\): no TARGET= .*; say where it is, as by 'task\.header_pattern=\"class=\(\\S\+\)\"'$",
        ),
        ("secondary_structure", {"train": "gb1.fasta"}, r"give the sequences by data\.sequences="),
        ("subcellular_localization", {"train": "gb1.fasta"}, r"neither has its header 'a SET=train' a TARGET=, nor"),
        (
            "gb1",
            {"train": "gb1.csv", "test": "train.csv"},
            r"data\.test=.*train\.csv: no record is marked for test, but fo",
        ),
        (
            "gb1",
            {"train": "two.csv", "validation": "two.csv"},
            r"data\.validation=.*two\.csv: is named for another set too",
        ),
        ("gb1", {"train": "two.csv", "split": {"validation": 0.5}}, r"leave none of 1 different sequences to train on"),
    ],
    ids=[
        "no file",
        "nothing to download",
        "no such file",
        "mask of proteins",
        "marked and split",
        "too long",
        "no target",
        "labels alone",
        "header of another form",
        "marked for others",
        "one for two sets",
        "too few to split",
    ],
)
def test_inconsistent_label_files_are_refused(tmp_path: Path, task: str, data: dict[str, Any], told: str) -> None:
    files = {"gb1.csv": GB1, "mask.fasta": MASK, "gb1.fasta": ">a SET=train\nMK\n"}
    files |= {"train.csv": "sequence,target,set\nMK,1,train\n", "two.csv": "sequence,target\nMK,1\nMK,2\n"}
    with pytest.raises(UserError, match=told):
        read(tmp_path, files, preset(task), **data)


@pytest.mark.parametrize(
    ("name", "content", "told"),
    [
        ("x.csv", b"", r"x\.csv: is empty; its first line must name the columns"),
        ("x.csv", b"\n\n", r"x\.csv: is empty"),
        ("x.csv", b"sequence,target\n", r"x\.csv: has a header \(sequence, target\), but no row below it"),
        (
            "x.csv",
            b"sequence;target\nMK;1\n",
            r"target_column=target: .* separated by ';'\? Save it with commas, or as \.t",
        ),
        ("x.csv", b"sequence;target\nMK;1,5\n", r"record 1\): has 2 fields.* separated by ';'\? Save it with commas"),
        ("x.csv", b"sequence\ttarget\nMK\t1\n", r"is it separated by tabs\? Name it \.tsv"),
        ("x.tsv", b"sequence,target\nMK,1\n", r"is it separated by commas\? Name it \.csv"),
        ("x.csv", b"aa,y\nMK,1\n", r"but aa, y; .*by task\.target_column=\.\.\., .* by task\.sequence_column=\.\.\.$"),
        ("x.csv", "sequence,target\nMK,1\n".encode("utf-16"), r"x\.csv: is UTF-16 text; save it as UTF-8"),
        ("x.csv", bytes(range(256)), r"x\.csv: is no text; is it the right file\?"),
        ("folder", None, r"folder: is a folder; name a file in it"),
    ],
    ids=[
        *("empty", "blank lines", "header alone", "semicolons", "decimal commas", "tabs", "commas", "other columns"),
        *("utf-16", "binary", "folder"),
    ],
)
def test_file_that_is_not_a_label_table_is_refused(tmp_path: Path, name: str, content: bytes | None, told: str) -> None:
    if content is None:
        (tmp_path / name).mkdir()
    else:
        (tmp_path / name).write_bytes(content)
    with pytest.raises(UserError, match=told) as caught:
        read(tmp_path, {}, NUMBERS, train=name)
    assert "variant" not in str(caught.value)


def test_bad_records_can_be_skipped(tmp_path: Path) -> None:
    labels = STRUCTURE + ">d SET=train\nHH\n>e SET=train\nHHH\n>f SET=train\nEEE\n"
    files = {"labels.fasta": labels, "sequences.fasta": SEQUENCES + ">d\nWYV\n>f\nAJA\n"}
    keys = {"train": "labels.fasta", "sequences": "sequences.fasta", "bad_records": "skip"}
    splits = read(tmp_path, files, preset("secondary_structure"), **keys)
    assert [protein.id for protein in splits.train.proteins] == ["a"]
    (note,) = [note for note in splits.notes if "left out" in note]
    assert note.startswith("records left out by data.bad_records=skip: 3; the first: ")
    assert "residue 2 is 'J'" in note
