"""Structures from Parquet, mmCIF and PDB files: sequences, coordinates and contacts."""

from __future__ import annotations

import gzip
from pathlib import Path
from typing import Any

import gemmi
import numpy as np
import pyarrow as arrow
import pytest
from pyarrow import parquet

from bionemo_esm.alphabet import TOKENS
from bionemo_esm.errors import ConfigError
from bionemo_esm.inference.contacts.structures import (
    Structure,
    StructureError,
    files_of,
    holds_structures,
    read_structures,
)

HELIX = ("MET", "GLY", "LYS", "LEU", "SER", "ASP", "TRP", "ARG")


def atom(number: int, name: str, residue: str, chain: str, place: int, x: float, **more: Any) -> str:
    """Return one ATOM line of a PDB file, at (x, 2x, 3) unless `y` is given."""
    told = {"altloc": " ", "occupancy": 1.0, "element": name[0], "record": "ATOM", "y": 2 * x} | more
    return (
        f"{told['record']:<6}{number:>5}  {name:<3}{told['altloc']}{residue:>3} {chain}{place:>4}    "
        f"{x:8.3f}{told['y']:8.3f}{3.0:8.3f}{told['occupancy']:6.2f}{10.0:6.2f}          {told['element']:>2}"
    )


def seqres(chain: str, names: tuple[str, ...]) -> str:
    return f"SEQRES   1 {chain} {len(names):>4}  {' '.join(names)}"


def backbone(chain: str, names: tuple[str, ...], first: int = 1) -> list[str]:
    """Return N, CA, C and, except for glycine, CB of each residue; neighbouring CA atoms are 3.8 Å apart."""
    lines = []
    for index, name in enumerate(names):
        x = 3.8 * index
        record = "HETATM" if name == "MSE" else "ATOM"
        atoms = ["N", "CA", "C", *(["CB"] if name != "GLY" else [])]
        for offset, what in zip((-0.5, 0.0, 0.5, 1.0), atoms, strict=False):
            lines.append(atom(1, what, name, chain, first + index, x + offset, y=0.0, record=record))
    return lines


def pdb(folder: Path, *lines: str, name: str = "some.pdb") -> Path:
    path = folder / name
    path.write_text("\n".join([*lines, "END", ""]))
    return path


def letters(structure: Structure) -> str:
    return "".join(TOKENS[token] for token in structure.tokens)


def test_unresolved_residues_keep_their_positions_in_the_sequence(tmp_path: Path) -> None:
    lines = [line for line in backbone("A", HELIX, first=51) if int(line[22:26]) not in (51, 55)]
    (found,) = read_structures(str(pdb(tmp_path, seqres("A", HELIX), *lines)))
    assert (found.id, letters(found)) == ("some_A", "MGKLSDWR")
    assert found.resolved.tolist() == [False, True, True, True, False, True, True, True]
    assert found.coordinates.dtype == np.float32
    assert found.coordinates[3].tolist() == pytest.approx([3.8 * 3, 0, 3])


def test_gzipped_mmcif_gives_the_same_structure_as_pdb(tmp_path: Path) -> None:
    lines = [line for line in backbone("A", HELIX) if int(line[22:26]) not in (1, 5)]
    path = pdb(tmp_path, seqres("A", HELIX), *lines)
    file = gemmi.read_structure(str(path))
    file.setup_entities()
    file.assign_label_seq_id()
    text = file.make_mmcif_document().as_string()
    with gzip.open(tmp_path / "some.cif.gz", "wt") as stream:
        stream.write(text)
    (expected,), (found,) = read_structures(str(path)), read_structures(str(tmp_path / "some.cif.gz"))
    assert found.id == expected.id == "some_A"
    assert np.array_equal(found.tokens, expected.tokens)
    assert np.array_equal(found.coordinates, expected.coordinates, equal_nan=True)


def test_selenomethionine_is_methionine_and_unknown_residues_are_x(tmp_path: Path) -> None:
    names = ("MSE", "GLY", "LYS", "UNK", "ALA", "SEP", "TRP", "ARG")
    (found,) = read_structures(str(pdb(tmp_path, seqres("A", names), *backbone("A", names))))
    assert letters(found) == "MGKXASWR"
    assert found.resolved.all()


def test_alternate_location_with_the_highest_occupancy_is_used(tmp_path: Path) -> None:
    lines = [line for line in backbone("A", HELIX) if not (line[12:16].strip() == "CA" and int(line[22:26]) == 3)]
    at = next(index for index, line in enumerate(lines) if int(line[22:26]) == 4)
    both = [
        atom(1, "CA", "LYS", "A", 3, 7.6, y=0.0, altloc="A", occupancy=0.3),
        atom(1, "CA", "LYS", "A", 3, 8.5, y=0.0, altloc="B", occupancy=0.7),
    ]
    (found,) = read_structures(str(pdb(tmp_path, seqres("A", HELIX), *lines[:at], *both, *lines[at:])))
    assert letters(found) == "MGKLSDWR"
    assert found.coordinates[2, 0] == pytest.approx(8.5)


def test_protein_chains_of_the_first_model_only_are_read(tmp_path: Path) -> None:
    dna = [atom(1, "P", name, "D", place, place * 6.0) for place, name in enumerate(("DA", "DC", "DG"), start=1)]
    water = [atom(1, "O", "HOH", "A", 300, 1.0, record="HETATM")]
    sequences = [seqres("A", HELIX), seqres("B", HELIX[:4]), seqres("D", (" DA", " DC", " DG"))]
    atoms = [*backbone("A", HELIX), "TER", *backbone("B", HELIX[:4]), "TER", *dna, "TER", *water]
    path = pdb(tmp_path, *sequences, "MODEL        1", *atoms, "ENDMDL", "MODEL        2", *atoms, "ENDMDL")
    assert [(found.id, letters(found)) for found in read_structures(str(path))] == [
        ("some_A", "MGKLSDWR"),
        ("some_B", "MGKL"),
    ]
    assert [found.id for found in read_structures(str(path), chain="B")] == ["some_B"]
    with pytest.raises(StructureError, match=r"some.pdb: no protein chain is named D; there are A, B"):
        read_structures(str(path), chain="D")


def test_beta_carbons_are_used_on_request_with_alpha_carbons_for_glycine(tmp_path: Path) -> None:
    path = str(pdb(tmp_path, seqres("A", HELIX), *backbone("A", HELIX)))
    (alpha,), (beta,) = read_structures(path), read_structures(path, atom="CB")
    assert (beta.coordinates - alpha.coordinates)[:, 0].tolist() == pytest.approx([1, 0, 1, 1, 1, 1, 1, 1], abs=1e-5)
    with pytest.raises(ConfigError, match="atom must be CA or CB"):
        read_structures(path, atom="N")


def test_file_without_beta_carbons_is_rejected_for_atom_cb(tmp_path: Path) -> None:
    lines = [line for line in backbone("A", ("ALA", "GLY", "SER")) if line[12:16].strip() == "CA"]
    path = str(pdb(tmp_path, *lines))
    assert read_structures(path)[0].resolved.all()
    with pytest.raises(StructureError, match="no C-beta is in it"):
        read_structures(path, "CB")


def test_without_seqres_chain_breaks_are_filled_with_x_by_residue_number(tmp_path: Path) -> None:
    first, second = backbone("A", HELIX[:4]), backbone("A", HELIX)[-12:]  # residues 1 to 4, and 6 to 8
    moved = [line[:22] + f"{int(line[22:26]) + 2:>4}" + line[26:] for line in second]
    renumbered = [line[:22] + f"{int(line[22:26]) + 90:>4}" + line[26:] for line in backbone("B", HELIX)[16:]]
    (broken,) = read_structures(str(pdb(tmp_path, *first, *moved, name="broken.pdb")))
    assert letters(broken) == "MGKLXXXDWR"
    assert broken.resolved.tolist() == [True] * 4 + [False] * 3 + [True] * 3
    whole = [*backbone("B", HELIX)[:15], *renumbered]
    (joined,) = read_structures(str(pdb(tmp_path, *whole, name="joined.pdb")))
    assert letters(joined) == "MGKLSDWR", "numbers that jump are no gap where neighbours are bonded"


def test_contacts_are_resolved_residues_closer_than_eight_angstrom() -> None:
    coordinates = np.array([[0, 0, 0], [7.9, 0, 0], [8.0, 0, 0], [np.nan] * 3], dtype=np.float32)
    structure = Structure("a", np.arange(4, 8, dtype=np.uint8), coordinates)
    expected = np.array([[1, 1, 0, 0], [1, 1, 1, 0], [0, 1, 1, 0], [0, 0, 0, 0]], dtype=bool)
    assert np.array_equal(structure.contacts(), expected)
    assert structure.contacts(7.0)[0].tolist() == [True, False, False, False]
    assert np.isnan(structure.distances_from()[3]).all()


# --- Parquet ----------------------------------------------------------------------------------------------------------


def table(folder: Path, *rows: dict[str, Any], name: str = "s.parquet") -> str:
    parquet.write_table(arrow.Table.from_pylist(list(rows)), folder / name)
    return str(folder / name)


ROW = {"pdb_id": "1ABC", "chain_id": "A", "sequence": "MKV", "coords": [[0.0, 1, 2], [3, 4, 5], [6, 7, 8]]}


def test_parquet_table_has_chains_and_a_mask_of_resolved_residues(tmp_path: Path) -> None:
    path = table(tmp_path, ROW | {"ca_mask": [1, 0, 1]}, ROW | {"chain_id": "B", "ca_mask": [1, 1, 1]})
    first, second = read_structures(path)
    assert (first.id, second.id, letters(first)) == ("1ABC_A", "1ABC_B", "MKV")
    assert first.resolved.tolist() == [True, False, True] and second.resolved.all()
    assert first.coordinates[2].tolist() == [6, 7, 8]
    (unmasked,) = read_structures(table(tmp_path, ROW | {"coords": [[0.0, 1, 2], None, [6, float("nan"), 8]]}))
    assert unmasked.resolved.tolist() == [True, False, False]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"coords": [[0.0, 1, 2]]}, r"s.parquet, row 2 \(1ABC_B\): 3 residues, but coords of shape \[1, 3\]"),
        ({"coords": [[0.0, 1], [2, 3], [4, 5]]}, r"row 2 .* coords of shape \[3, 2\]"),
        ({"coords": [[0.0, 1, 2], [2.0], [4, 5, 6.0]]}, "row 2 .* coords is not a list of x, y and z"),
        ({"ca_mask": [1]}, "row 2 .* a ca_mask of 1"),
        ({"sequence": "MJV"}, "row 2 .*: residue 2 is 'J', no letter of a protein"),
        ({"sequence": ""}, "row 2 .*: it has no sequence"),
        ({"chain_id": "A"}, r"1ABC_A is there already, from .*s.parquet; ids must differ"),
    ],
    ids=["too few", "two numbers", "ragged", "mask", "letter", "empty", "id"],
)
def test_invalid_row_is_named(tmp_path: Path, change: dict[str, Any], message: str) -> None:
    path = table(tmp_path, ROW | {"ca_mask": [1, 1, 1]}, ROW | {"chain_id": "B", "ca_mask": [1, 1, 1]} | change)
    with pytest.raises(StructureError, match=message):
        read_structures(path)


def test_source_without_structures_is_rejected_by_name(tmp_path: Path) -> None:
    parquet.write_table(arrow.Table.from_pylist([{"id": "a", "sequence": "MK"}]), tmp_path / "proteins.parquet")
    (tmp_path / "broken.cif").write_text("data_x\nloop_\n_a.b\n")
    (tmp_path / "broken.parquet").write_bytes(b"PAR1")
    (tmp_path / "empty.pdb").write_text("END\n")
    water = pdb(tmp_path, atom(1, "O", "HOH", "A", 1, 1.0, record="HETATM"), name="water.pdb")
    (tmp_path / "proteins.fasta").write_text(">a\nMK\n")
    (tmp_path / "nothing").mkdir()
    for name, message in (
        ("proteins.parquet", "need the columns sequence, coords and id .*; there are id, sequence"),
        ("broken.cif", "broken.cif: .*(cannot be read|no atom)"),
        ("broken.parquet", "cannot be read as Parquet"),
        ("empty.pdb", "empty.pdb: no atom in it"),
        (water.name, "no chain in it is a protein"),
        ("proteins.fasta", "structures are in files that end in .parquet"),
        ("nothing", "nothing: no file there ends in"),
        ("absent.pdb", "absent.pdb: no such file"),
    ):
        with pytest.raises(StructureError, match=message):
            read_structures(str(tmp_path / name))
    with pytest.raises(ConfigError, match="a table is taken as it is"):
        read_structures(table(tmp_path, ROW), chain="A")


def test_folders_patterns_and_lists_are_read_in_order(tmp_path: Path) -> None:
    for name in ("b.pdb", "a.pdb"):
        pdb(tmp_path, seqres("A", HELIX), *backbone("A", HELIX), name=name)
    (tmp_path / "notes.txt").write_text("not one")
    for source in (str(tmp_path), str(tmp_path / "?.pdb")):
        assert [found.id for found in read_structures(source)] == ["a_A", "b_A"]
    both = [str(tmp_path / "b.pdb"), str(tmp_path / "a.pdb")]
    assert [found.id for found in read_structures(both)] == ["b_A", "a_A"]
    assert files_of(both) == both


def test_structure_files_are_distinguished_from_protein_files(tmp_path: Path) -> None:
    proteins = tmp_path / "p.parquet"
    parquet.write_table(arrow.Table.from_pylist([{"id": "a", "sequence": "MK"}]), proteins)
    assert not holds_structures(str(proteins)) and not holds_structures("-") and not holds_structures("x.fasta.gz")
    assert (
        holds_structures(table(tmp_path, ROW)) and holds_structures("1ubq.cif.gz") and holds_structures(str(tmp_path))
    )


def test_a_device_and_a_link_to_nothing_are_refused(tmp_path: Path) -> None:
    (tmp_path / "lost.pdb").symlink_to(tmp_path / "gone")
    for source in ("/dev/null", str(tmp_path / "lost.pdb"), str(tmp_path / "l*.pdb")):
        with pytest.raises(StructureError, match="is neither a file nor a folder"):
            files_of(source)
