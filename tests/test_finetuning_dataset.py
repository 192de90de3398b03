"""Reading labelled files: formats, assignment to sets, and notes about omitted records."""

from __future__ import annotations

import gzip
import hashlib
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as arrow
import pytest
from pyarrow import parquet

from bionemo_esm.alphabet import decode
from bionemo_esm.errors import UserError
from bionemo_esm.finetuning.splits import LabelledDataset
from labelled_files import CLASSES, GB1, NUMBERS, RESIDUES, SEQUENCES, STRUCTURE, UBIQUITIN, preset, read

DEEPLOC = "".join(
    f">P{number} {place}\n{UBIQUITIN[number : number + 20]}\n"
    for number, place in enumerate(("Cell.membrane-M", "Nucleus-U", "Cytoplasm-Nucleus-U", "Plastid-S") * 5)
)


def shown(labelled: LabelledDataset) -> list[tuple[str, str, list[float]]]:
    return [
        (protein.id, decode(protein.tokens), target.tolist())
        for protein, target in zip(labelled.proteins, labelled.targets, strict=True)
    ]


def sequences(labelled: LabelledDataset) -> set[str]:
    return {decode(protein.tokens) for protein in labelled.proteins}


# --- formats ----------------------------------------------------------------------------------------------------------


def test_residue_labels_of_flip_are_joined_with_sequences_and_mask_by_id(tmp_path: Path) -> None:
    files = {"labels.fasta": STRUCTURE, "sequences.fasta": SEQUENCES, "mask.fasta": ">b\n011\n>a\n11011\n>c\n11\n"}
    splits = read(
        tmp_path, files, preset("secondary_structure"),
        train="labels.fasta", sequences="sequences.fasta", mask="mask.fasta",
    )  # fmt: skip
    assert splits.task.classes == ("C", "E", "H")
    assert str(shown(splits.train)) == str([("a", "MKVLA", [2.0, 2.0, np.nan, 1.0, 0.0])])
    assert str(shown(splits.validation)) == str([("b", "ACD", [np.nan, 0.0, 1.0])])
    assert splits.test is not None
    assert [protein.id for protein in splits.test.proteins] == ["c"]
    assert not hasattr(splits.test, "targets")
    assert shown(splits.test.open()) == [("c", "WY", [2.0, 0.0])]
    assert splits.train.targets[0].dtype == np.float32
    assert "training: 4 of 5 targets are known" in splits.notes
    assert splits.files == {name: hashlib.sha256(text.encode()).hexdigest() for name, text in files.items()}


def test_tables_of_flip_have_a_set_and_a_validation_column(tmp_path: Path) -> None:
    (tmp_path / "gb1.csv.gz").write_bytes(gzip.compress(GB1.encode()))
    splits = read(tmp_path, {}, preset("gb1"), train="gb1.csv.gz")
    assert shown(splits.train) == [("1", "MKVLA", [1.5]), ("2", "ACDEF", [0.5])]
    assert shown(splits.validation) == [("3", "WYWYW", [-2.0])]
    assert splits.test is not None
    assert shown(splits.test.open()) == [("4", "GGGGG", [7.0])]
    assert (splits.task.target_mean, splits.task.target_scale) == (1.0, 0.5)  # of the training set only
    assert splits.task.classes == ()


def test_fasta_headers_of_flip_give_the_targets_of_its_table(tmp_path: Path) -> None:
    fasta = (
        ">s1 TARGET=1.5 SET=train VALIDATION=False\nMKVLA\n>s2 TARGET=0.5 SET=train VALIDATION=False\nACDEF\n"
        ">s3 TARGET=-2 SET=train VALIDATION=True\nWYWYW\n>s4 TARGET=7 SET=test VALIDATION=False\nGGGGG\n"
    )
    one = read(tmp_path, {"gb1.fasta": fasta}, preset("gb1"), train="gb1.fasta")
    other = read(tmp_path, {"gb1.csv": GB1}, preset("gb1"), train="gb1.csv")
    assert one.task == other.task
    assert [each[1:] for each in shown(one.train)] == [each[1:] for each in shown(other.train)]
    assert [protein.id for protein in one.validation.proteins] == ["s3"]


def test_a_target_in_a_header_may_contain_spaces(tmp_path: Path) -> None:
    text = ">a TARGET=Cell membrane SET=train\nMK\n>b SET=train TARGET=Nucleus\nAC\n>c TARGET=Nucleus SET=val\nDE\n"
    splits = read(tmp_path, {"x.fasta": text}, CLASSES, train="x.fasta")
    assert splits.task.classes == ("Cell membrane", "Nucleus")
    assert shown(splits.train) == [("a", "MK", [0.0]), ("b", "AC", [1.0])]


def test_deeploc_headers_are_parsed_like_in_flip_and_split_at_random(tmp_path: Path) -> None:
    splits = read(
        tmp_path, {"deeploc.fasta": DEEPLOC}, preset("subcellular_localization"),
        train="deeploc.fasta", split={"validation": 0.1, "test": 0.2},
    )  # fmt: skip
    assert splits.task.classes == ("Cell.membrane", "Cytoplasm", "Nucleus", "Plastid")
    assert splits.test is not None
    assert (len(splits.train), len(splits.validation), len(splits.test)) == (14, 2, 4)
    assert any("split off the training set at random" in note for note in splits.notes)


def test_numeric_class_names_are_sorted_as_numbers(tmp_path: Path) -> None:
    files = {"train.csv": "seq,label\nMK,10\nAC,9\nDE,0\nFG,100\n", "valid.csv": "seq,label\nHI,9\n"}
    splits = read(tmp_path, files, preset("remote_homology"), train="train.csv", validation="valid.csv")
    assert splits.task.classes == ("0", "9", "10", "100")
    assert shown(splits.validation) == [("1", "HI", [1.0])]
    assert splits.test is None


@pytest.mark.parametrize(
    ("task", "cells", "expected"),
    [
        (RESIDUES, ("HEC", "HH", "C-"), [[2, 1, 0], [2, 2], [0, np.nan]]),
        (RESIDUES, ("in out in", "out;in", "in,-"), [[0, 1, 0], [1, 0], [0, np.nan]]),
        ({**RESIDUES, "kind": "regression"}, ("1 2.5 3", "4;-5", "6, nan"), [[1, 2.5, 3], [4, -5], [6, np.nan]]),
    ],
    ids=["letters", "words", "numbers"],
)
def test_a_custom_table_may_have_residue_labels(
    tmp_path: Path, task: dict[str, Any], cells: tuple[str, ...], expected: list[list[float]]
) -> None:
    rows = zip(("MKV", "AC", "DE"), cells, ("train", "train", "validation"), strict=True)
    text = "id\tsequence\ttarget\tset\n" + "".join(f"p{row[0]}\t{row[0]}\t{row[1]}\t{row[2]}\n" for row in rows)
    splits = read(
        tmp_path, {"own.tsv": text}, {**preset("custom", **task), "unknown": ["-"]},
        train="own.tsv", missing_targets="skip",
    )  # fmt: skip
    found = [target for _, _, target in (*shown(splits.train), *shown(splits.validation))]
    assert str(found) == str([[float(value) for value in row] for row in expected])
    assert [protein.id for protein in splits.train.proteins] == ["pMKV", "pAC"]


def test_parquet_may_have_lists_of_residue_labels_and_renamed_columns(tmp_path: Path) -> None:
    table = arrow.table(
        {
            "name": ["a", "b", "c"],
            "protein": ["MKV", "AC", "DE"],
            "exposure": [[0.5, None, 1.5], [2.0, 3.0], [1.0, 0.0]],
            "part": ["train", "train", "valid"],
        }
    )
    parquet.write_table(table, tmp_path / "own.parquet")
    columns = {"id": "name", "sequence": "protein", "target": "exposure", "set": "part"}
    task = {**RESIDUES, "kind": "regression"} | {f"{key}_column": name for key, name in columns.items()}
    splits = read(tmp_path, {}, task, train="own.parquet", missing_targets="skip")
    assert str(shown(splits.train)) == str([("a", "MKV", [0.5, np.nan, 1.5]), ("b", "AC", [2.0, 3.0])])
    assert shown(splits.validation) == [("c", "DE", [1.0, 0.0])]


def test_labels_in_a_table_can_be_joined_with_sequences_in_fasta(tmp_path: Path) -> None:
    files = {"x.csv": "id,target,set\nc,yes,train\na,no,train\nb,no,valid\n", "s.fasta": SEQUENCES}
    splits = read(tmp_path, files, CLASSES, train="x.csv", sequences="s.fasta")
    assert shown(splits.train) == [("c", "WY", [1.0]), ("a", "MKVLA", [0.0])]


# --- splits -----------------------------------------------------------------------------------------------------------


def test_a_file_given_for_a_set_yields_its_marked_records_or_all_without_marks(tmp_path: Path) -> None:
    files = {"gb1.csv": GB1, "more.csv": "sequence,target\nHHHHH,3\nIIIII,4\n"}
    same = read(tmp_path, files, preset("gb1"), train="gb1.csv", validation="gb1.csv", test="gb1.csv")
    assert same.test is not None
    assert (len(same.train), len(same.validation), len(same.test)) == (2, 1, 1)
    assert not [note for note in same.notes if "not used" in note]
    other = read(tmp_path, files, preset("gb1"), train="gb1.csv", validation="more.csv")
    assert sequences(other.validation) == {"HHHHH", "IIIII"}
    assert sequences(other.train) == {"MKVLA", "ACDEF"}  # records marked for validation are not trained on
    assert any("marked for validation in data.train, but not used" in note for note in other.notes)


def test_a_random_split_depends_on_the_seed_only_and_groups_equal_sequences(
    tmp_path: Path,
) -> None:
    rows = [f"{UBIQUITIN[start : start + 9]},{start % 5}" for start in range(60)]
    rows += [f"{UBIQUITIN[start : start + 9].lower()},{start % 3}" for start in range(0, 60, 2)]
    files = {
        "one.csv": "sequence,target\n" + "\n".join(rows),
        "other.csv": "sequence,target\n" + "\n".join(rows[::-1]),
    }
    shares = {"validation": 0.2, "test": 0.1}
    one, other, again = (
        read(tmp_path, files, NUMBERS, train=name, split=shares, seed=seed)
        for name, seed in (("one.csv", 1), ("other.csv", 1), ("one.csv", 2))
    )
    assert one.test is not None
    assert other.test is not None
    parts = [sequences(one.train), sequences(one.validation), sequences(one.test.open())]
    assert [len(part) for part in parts] == [42, 12, 6]
    assert sum(map(len, parts)) == len(set.union(*parts))
    assert parts == [sequences(other.train), sequences(other.validation), sequences(other.test.open())]
    assert parts[1] != sequences(again.validation)


# --- notes ------------------------------------------------------------------------------------------------------------


def notes_of(tmp_path: Path, rows: str, task: dict[str, Any], **data: Any) -> str:
    return "\n".join(read(tmp_path, {"x.csv": "sequence,target,set\n" + rows}, task, train="x.csv", **data).notes)


def test_sequences_in_two_sets_or_with_two_labels_are_noted(tmp_path: Path) -> None:
    rows = "MK,a,train\nMK,b,train\nAC,a,train\nmk,a,valid\nDE,a,valid\nAC,b,test\nDE,b,test\n"
    notes = notes_of(tmp_path, rows, CLASSES)
    assert "1 of 2 validation proteins are in the training set too: its scores are not those of new proteins" in notes
    assert "1 of 2 test proteins are in the training set too: its scores are not those of new proteins" in notes
    assert "1 of 2 test proteins are in the validation set too\n" in notes
    assert "training: sequences that occur more than once, with different targets: 1" in notes


def test_only_known_different_labels_of_a_sequence_contradict(tmp_path: Path) -> None:
    rows = "MKV,H-E,train\nMKV,HHE,train\nMKV,-HE,train\nAC,HH,train\nDE,EH,valid\n"
    task = {**RESIDUES, "unknown": ["-"]}
    assert "different targets" not in notes_of(tmp_path, rows, task)
    assert "with different targets: 1" in notes_of(tmp_path, rows + "MKV,-EE,train\n", task)


def test_strongly_imbalanced_classes_are_noted_with_their_counts(tmp_path: Path) -> None:
    rows = "MK,rare,train\nAC,some,valid\n" + "".join(f"{UBIQUITIN[n : n + 8]},often,train\n" for n in range(12))
    assert "often 12, rare 1" in notes_of(tmp_path, rows.replace("some", "often"), CLASSES)
    assert "frequent" not in notes_of(tmp_path, rows.replace("some", "often") + "WW,rare,train\n", CLASSES)


def test_for_many_classes_the_most_and_least_frequent_are_noted(tmp_path: Path) -> None:
    times = {0: 30, 1: 20, 2: 10} | dict.fromkeys(range(3, 20), 2)
    labels = [f"c{label:02}" for label, count in times.items() for _ in range(count)] + ["c20", "c21", "c22"]
    rows = "".join(f"{UBIQUITIN[n % 60 :]}{'A' * (n // 60)},{label},train\n" for n, label in enumerate(labels))
    told = "frequent: c00 30, c01 20, c02 10, ... 17 others ..., c20 1, c21 1, c22 1"
    assert told in notes_of(tmp_path, rows + "WW,c00,valid\n", CLASSES)


def test_omitted_records_are_counted(tmp_path: Path) -> None:
    rows = "MKVLA,1,train\nMJ,1,train\nAC,2,train\nDE,,train\nFG,3,valid\nHI,-,test\nKL,1,test\n"
    data = {"max_residues": 4, "bad_records": "skip", "missing_targets": "skip"}
    notes = notes_of(tmp_path, rows + "MN,3,train\n", {**NUMBERS, "unknown": ["-"]}, **data)
    assert "training: 1 of 4 proteins left out, as too long" in notes
    assert "x.csv, record 2 (2): residue 2 is 'J'" in notes
    assert "training: proteins left out, of which no target is known: 1" in notes
    assert "test: proteins left out, of which no target is known: 1" in notes


def test_a_class_absent_from_training_can_be_treated_as_unknown(tmp_path: Path) -> None:
    rows = "MK,a,train\nAC,b,train\nDE,c,valid\nFG,a,valid\n"
    with pytest.raises(UserError, match=r"record 3: the label 'c' is none of the classes of the training set \(a, b\)"):
        notes_of(tmp_path, rows, CLASSES)
    splits = read(tmp_path, {}, CLASSES, train="x.csv", unseen_classes="skip")
    assert sequences(splits.validation) == {"FG"}
    (note,) = splits.notes  # one note, although the label and the protein are both dropped
    assert note == "validation: proteins left out, as their classes are none of the task's: 1"
    some = read(tmp_path, {"x.csv": f"sequence,target,set\n{rows}HI,,valid\n"}, CLASSES, train="x.csv",
                unseen_classes="skip", missing_targets="skip")  # fmt: skip
    assert some.notes == (
        "validation: labels of classes that are none of the task's, treated as not known: 1",
        "validation: proteins left out, of which no target is known: 2",
    )


def test_unseen_residue_classes_are_counted_separately_from_proteins(tmp_path: Path) -> None:
    rows = "MK,HE,train\nAC,HX,valid\nDE,--,valid\n"
    notes = notes_of(tmp_path, rows, {**RESIDUES, "unknown": ["-"]}, unseen_classes="skip")
    assert "validation: labels of classes that are none of the task's, treated as not known: 1" in notes
    assert "validation: proteins left out, of which no target is known: 1" in notes


def test_row_numbers_as_ids_are_noted_when_a_name_column_exists(tmp_path: Path) -> None:
    table = "Name,sequence,target,set\nown,MK,1,train\nother,AC,2,train\nthird,DE,1,valid\n"
    (note,) = read(tmp_path, {"x.csv": table}, NUMBERS, train="x.csv").notes
    assert note.endswith("x.csv: ids are the numbers of the rows; task.id_column=Name takes those of the column Name")
    named = read(tmp_path, {}, {**NUMBERS, "id_column": "Name"}, train="x.csv")
    assert named.notes == ()
    assert [protein.id for protein in named.train.proteins] == ["own", "other"]
