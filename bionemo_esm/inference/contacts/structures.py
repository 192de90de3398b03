"""Structures of proteins: chains with a coordinate for each residue, from Parquet, mmCIF or PDB files.

The sequence of a chain is the full one of the experiment: unresolved residues are in it, without coordinates. Shape
suffixes: R residues of a chain, P pairs of residues.
"""

from __future__ import annotations

import glob
import os
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
from numpy.typing import NDArray

from bionemo_esm.alphabet import TOKEN_IDS, UNK_ID, encode
from bionemo_esm.errors import ConfigError, UserError
from bionemo_esm.settings import Settings, expand_home

if TYPE_CHECKING:
    import gemmi

ATOMS = ("CA", "CB")
CONTACT_ANGSTROM = 8.0
"""Residues that are nearer than this are in contact (Rao et al. 2020)."""
_MODELS = (".cif", ".mmcif", ".pdb", ".ent")
_TABLES = (".parquet", ".pq")
_ENDINGS = f"{', '.join(_TABLES)}, or {', '.join(_MODELS)} with or without .gz"
_BOND_ANGSTROM = 4.5  # C-alphas of neighbours are 3.8 apart
GAPS = {TOKEN_IDS["."], TOKEN_IDS["-"], UNK_ID}
"""Token ids of letters that no protein has."""


class StructureError(UserError):
    """A structure that cannot be used; the message names the file, the chain or row, and what to do."""


@dataclass(frozen=True, eq=False)
class Structure:
    """A protein chain."""

    id: str
    tokens: NDArray[np.uint8]  # [R], R > 0: token ids, without <cls> and <eos>
    coordinates: NDArray[np.float32]  # [R, 3], angstrom; NaN for an unresolved residue

    @property
    def residues(self) -> int:
        return len(self.tokens)

    @property
    def resolved(self) -> NDArray[np.bool_]:
        """Residues that have coordinates, bool [R]."""
        return np.asarray(np.isfinite(self.coordinates).all(axis=1))

    def distances_from(self, rows: slice = slice(None)) -> NDArray[np.float32]:
        """Return distances of some residues (default: all) to all residues, angstrom: float32 [rows, R].

        NaN where one of the two is not resolved.
        """
        squared = np.zeros((len(self.coordinates[rows]), self.residues), dtype=np.float32)
        for axis in self.coordinates.T:
            squared += np.square(axis[rows, None] - axis[None, :])
        return np.sqrt(squared)

    def distances_of(self, first: NDArray[np.int64], second: NDArray[np.int64]) -> NDArray[np.float32]:
        """Return the distances of pairs of residues, angstrom: float32 [P]; NaN as in `distances_from`."""
        squared = np.zeros(len(first), dtype=np.float32)
        for axis in self.coordinates.T:
            squared += np.square(axis[first] - axis[second])
        return np.sqrt(squared)

    def contacts(self, below: float = CONTACT_ANGSTROM) -> NDArray[np.bool_]:
        """Return which pairs of residues [R, R] are nearer than so many angstrom; False where one is not resolved."""
        with np.errstate(invalid="ignore"):
            return self.distances_from() < below


class StructureOptions(Settings):
    """The policy for reading mmCIF and PDB files."""

    atom: Literal["CA", "CB"] = "CA"  # whose position stands for a residue; CA in glycine
    chain: str | None = None  # by the author's name, of each file; None: all protein chains


def source_paths(key: str, value: Any) -> tuple[str, ...]:
    """Return one path, or a list of them, as a tuple. Raises `ConfigError`."""
    paths = value if isinstance(value, list | tuple) else [value]
    if not paths or not all(isinstance(path, str) and path for path in paths):
        raise ConfigError(f"{key} must be a path, or a list of paths, not {value!r}")
    return tuple(str(expand_home(path)) for path in paths)


def holds_structures(path: str) -> bool:
    """Return whether an input holds structures: mmCIF, PDB, a folder or pattern, or Parquet with `coords`."""
    if _kind(path) == "table":
        return Path(path).is_file() and "coords" in _schema(path)
    return _kind(path) == "model" or Path(path).is_dir() or (glob.has_magic(path) and not os.path.lexists(path))


def read_structures(source: str | Iterable[str], atom: str = "CA", chain: str | None = None) -> list[Structure]:
    """Return the protein chains of a file, a folder (by name), a pattern (`structures/*.cif.gz`), or several of these.

    `atom`: whose position stands for a residue, CA, or CB (CA in glycine). `chain`: the author's name of the chain of
    each file; None: all. Ids are `file_chain` (`1ubq_A`), and must differ. Raises `StructureError`; `ConfigError` for
    arguments.
    """
    if atom not in ATOMS:
        raise ConfigError(f"atom must be {' or '.join(ATOMS)}, not {atom!r}")
    found: dict[str, str] = {}
    structures = []
    for path in _files([source] if isinstance(source, str) else list(source)):
        for structure in _of_file(path, atom, chain):
            if structure.id in found:
                raise StructureError(
                    f"{path}: {structure.id} is there already, from {found[structure.id]}; ids must differ, as results "
                    "are found by them"
                )
            found[structure.id] = path
            structures.append(structure)
    return structures


def files_of(source: str | Iterable[str]) -> list[str]:
    """Return the files that `read_structures` would read, in order. Raises `StructureError` if there is none."""
    return _files([source] if isinstance(source, str) else list(source))


def _files(sources: Sequence[str]) -> list[str]:
    files: list[str] = []
    for source in sources:
        if Path(source).is_dir():
            inside = sorted(str(path) for path in Path(source).iterdir() if _kind(path.name))
            if not inside:
                raise StructureError(
                    f"{source}: no file there ends in {', '.join(_MODELS + _TABLES)} or one of them.gz"
                )
            files += inside
        elif Path(source).is_file():
            if not _kind(source):
                raise StructureError(f"{source}: structures are in files that end in {_ENDINGS}")
            files.append(source)
        elif not (matching := sorted(glob.glob(source))):  # noqa: PTH207
            raise StructureError(f"{source}: no such file")
        elif source in matching:  # a device, a pipe, or a link to nothing
            raise StructureError(f"{source}: is neither a file nor a folder; give a file or a folder of structures")
        else:
            files += _files(matching)
    return files


def _kind(path: str) -> str:
    """Return `table`, `model`, or an empty text, by the name."""
    name = path.lower()
    if name.endswith(_TABLES):
        return "table"
    return "model" if name.removesuffix(".gz").endswith(_MODELS) else ""


def _of_file(path: str, atom: str, chain: str | None) -> Iterator[Structure]:
    if _kind(path) == "model":
        return _of_model(path, atom, chain)
    if atom != "CA" or chain is not None:
        raise ConfigError(f"{path}: atom and chain are for mmCIF and PDB files; a table is taken as it is")
    return _of_table(path)


# --- Parquet ----------------------------------------------------------------------------------------------------------


def _schema(path: str) -> list[str]:
    import pyarrow as arrow
    from pyarrow import parquet

    try:
        return list(parquet.read_schema(path).names)
    except (arrow.ArrowInvalid, OSError) as error:
        raise StructureError(f"{path}: cannot be read as Parquet ({str(error).splitlines()[0]})") from error


def _of_table(path: str) -> Iterator[Structure]:
    """Yield rows with `sequence`, `coords` (R times x, y, z) and optionally `ca_mask` (0: no coordinates), named by
    `id`, or by `pdb_id` and `chain_id`.
    """
    import pyarrow as arrow
    from pyarrow import parquet

    names = _schema(path)
    id_columns = next((some for some in (["id"], ["pdb_id", "chain_id"], ["pdb_id"]) if set(some) <= set(names)), None)
    if id_columns is None or not {"sequence", "coords"} <= set(names):
        raise StructureError(
            f"{path}: structures need the columns sequence, coords and id (or pdb_id and chain_id); there are "
            f"{', '.join(names[:20])}"
        )
    columns = [*id_columns, "sequence", "coords", *(["ca_mask"] if "ca_mask" in names else [])]
    number = 0
    try:
        for batch in parquet.ParquetFile(path).iter_batches(64, columns=columns):
            for row in batch.to_pylist():
                number += 1
                identifier = "_".join(str(row[column]) for column in id_columns)
                yield _of_row(f"{path}, row {number} ({identifier})", identifier, row)
    except (arrow.ArrowInvalid, OSError) as error:
        raise StructureError(f"{path}: cannot be read as Parquet ({str(error).splitlines()[0]})") from error


def _of_row(where: str, identifier: str, row: dict[str, Any]) -> Structure:
    if not isinstance(row["sequence"], str) or not row["sequence"]:
        raise StructureError(f"{where}: it has no sequence")
    tokens = encode(row["sequence"].encode("ascii", "replace"))
    if unknown := [place for place, token in enumerate(tokens.tolist()) if token in GAPS]:
        raise StructureError(
            f"{where}: residue {unknown[0] + 1} is {row['sequence'][unknown[0]]!r}, no letter of a protein; put X there"
        )
    try:
        points = [[np.nan] * 3 if point is None else point for point in row["coords"] or ()]
        coordinates = np.array(points, dtype=np.float32)
        shown = np.ones(len(tokens), dtype=bool) if row.get("ca_mask") is None else np.array(row["ca_mask"]) != 0
    except (TypeError, ValueError) as error:
        raise StructureError(f"{where}: coords is not a list of x, y and z ({error})") from error
    if coordinates.shape != (len(tokens), 3) or shown.shape != (len(tokens),):
        raise StructureError(
            f"{where}: {len(tokens)} residues, but coords of shape {list(coordinates.shape)} and a ca_mask of "
            f"{len(shown)}; each residue has x, y and z, and one entry of the mask"
        )
    coordinates[~(shown & np.isfinite(coordinates).all(axis=1))] = np.nan
    return Structure(identifier, tokens, coordinates)


# --- mmCIF and PDB ----------------------------------------------------------------------------------------------------


def _of_model(path: str, atom: str, wanted: str | None) -> Iterator[Structure]:
    import gemmi

    try:
        file = gemmi.read_structure(path)
    except (RuntimeError, ValueError, OSError) as error:
        raise StructureError(f"{path}: cannot be read as mmCIF or PDB ({str(error).splitlines()[0]})") from error
    if not len(file) or not file[0].count_atom_sites():
        raise StructureError(f"{path}: no atom in it")
    file.setup_entities()
    file.assign_label_seq_id()
    peptides = (gemmi.PolymerType.PeptideL, gemmi.PolymerType.PeptideD)
    found = []
    for chain in file[0]:  # of several models the first
        polymer = chain.get_polymer()
        entity = file.get_entity_of(polymer) if len(polymer) else None
        kind = entity.polymer_type if entity is not None else gemmi.PolymerType.Unknown
        if len(polymer) and (kind if kind != gemmi.PolymerType.Unknown else polymer.check_polymer_type()) in peptides:
            found.append(chain.name)
            if wanted in (None, chain.name):
                yield _of_chain(path, f"{_stem(path)}_{chain.name}", polymer, entity, atom)
    if not found:
        raise StructureError(f"{path}: no chain in it is a protein")
    if wanted is not None and wanted not in found:
        raise StructureError(f"{path}: no protein chain is named {wanted}; there are {', '.join(found)}")


def _of_chain(
    path: str, identifier: str, polymer: gemmi.ResidueSpan, entity: gemmi.Entity | None, atom: str
) -> Structure:
    shown = list(polymer.first_conformer())
    if entity is not None and entity.full_sequence:
        import gemmi

        names = [gemmi.Entity.first_mon(name) for name in entity.full_sequence]
        places = [None if residue.label_seq is None else residue.label_seq - 1 for residue in shown]
        if any(place is None or not 0 <= place < len(names) for place in places):
            raise StructureError(
                f"{path}: {identifier}: its residues do not fit its full sequence (SEQRES, or entity_poly_seq); "
                "correct or remove that"
            )
    else:
        places, names = _numbered(shown)
    coordinates = np.full((len(names), 3), np.nan, dtype=np.float32)
    for place, residue in zip(places, shown, strict=True):
        coordinates[place] = _point(residue, atom)
    if atom == "CB" and not any(place.name == "CB" for residue in shown for place in residue):
        raise StructureError(f"{path}: {identifier}: no C-beta is in it, which atom=CB asks for; take atom=CA")
    tokens = encode("".join(map(_letter, names)).encode())
    return Structure(identifier, tokens, coordinates)


def _numbered(shown: list[gemmi.Residue]) -> tuple[list[int | None], list[str]]:
    """Return positions and names for a file without a full sequence; X stands for missing residues.

    Missing are as many as the numbering skips where the chain is broken in space.
    """
    places: list[int | None] = []
    names: list[str] = []
    for before, residue in zip([None, *shown[:-1]], shown, strict=True):
        if before is not None:
            left_out = (residue.seqid.num or 0) - (before.seqid.num or 0) - 1
            apart = np.linalg.norm(_point(residue, "CA") - _point(before, "CA"))
            if left_out > 0 and not apart <= _BOND_ANGSTROM:
                names += ["UNK"] * left_out
        places.append(len(names))
        names.append(residue.name)
    return places, names


def _point(residue: gemmi.Residue, atom: str) -> NDArray[np.float32]:
    """Return the position of a residue's atom: the alternative with the highest occupancy, the first of equals; NaN for
    none.
    """
    name = "CA" if residue.name == "GLY" else atom
    candidates = [place for place in residue if place.name == name and place.element.name == "C"]
    if not candidates:
        return np.full(3, np.nan, dtype=np.float32)
    return np.array(max(candidates, key=lambda place: place.occ).pos.tolist(), dtype=np.float32)


def _letter(name: str) -> str:
    """Return the letter of a residue: that of the parent of a modified one (MSE is M), X for an unknown one."""
    import gemmi

    letter = gemmi.find_tabulated_residue(name).one_letter_code.upper()
    return letter if letter.isalpha() and letter != "J" else "X"


def _stem(path: str) -> str:
    name = Path(path).name
    name = name[:-3] if name.lower().endswith(".gz") else name
    return name.rsplit(".", 1)[0]
