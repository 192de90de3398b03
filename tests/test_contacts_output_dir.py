"""Tests of the output folder of contacts, of file names, and of the one-sequence input of a notebook."""

from __future__ import annotations

from pathlib import Path

import pytest

from bionemo_esm.alphabet import decode
from bionemo_esm.errors import ConfigError, UserError
from bionemo_esm.inference.contacts.output_dir import WorkFolder, file_names
from bionemo_esm.inference.contacts.prediction import residues_at_hand


def test_file_names_are_safe_and_unique() -> None:
    ids = ["a", "A", "../up", ".hidden", "x/y", "x" * 300, "x" * 299 + "X", "ç", "sp|P1|N", "con:1", "a%2Fb", "a/b"]
    names = file_names(ids)
    assert names[:4] == ["a", names[1], "..%2Fup".replace(".", "%2E", 1), "%2Ehidden"]
    assert len({name.casefold() for name in names}) == len(ids)
    assert all(len(name) < 200 and "/" not in name and not name.startswith(".") for name in names)
    assert file_names(ids) == names


def test_folder_that_cannot_be_created_gives_one_line(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with (
        pytest.raises(ConfigError, match=r"output: .* cannot be made: .*Not a directory"),
        WorkFolder.opened(tmp_path / "file" / "out", "model 1\n"),
    ):
        pass


def test_changed_settings_of_an_unfinished_job_are_named(tmp_path: Path) -> None:
    with WorkFolder.opened(tmp_path / "out", "model 1\ninput 2\nwindow 3\n"):
        pass
    for fingerprint, said in (
        ("model 1\ninput 9\nwindow 3\n", "another input;"),
        ("model 9\ninput 2\nwindow 9\n", "another model and window;"),
        ("model 1\ninput 2\n", "another version of this program;"),
    ):
        with pytest.raises(UserError, match=said), WorkFolder.opened(tmp_path / "out", fingerprint):
            pass


def test_notebook_input_must_be_one_protein() -> None:
    assert decode(residues_at_hand(" mkv laG*\n")) == "MKVLAG"
    for wrong, said in (({"a": "MKV"}, "not a dict"), ("", "no residue"), ("MK-V", "residue 3 is '-'"),
                        ("a.fasta", "not a file's name"), ("ATGGTGCATCTGACTCCTGAGGAG", "looks like DNA")):  # fmt: skip
        with pytest.raises(UserError, match=said) as caught:
            residues_at_hand(wrong)
        assert "=" not in str(caught.value)
