"""`bionemo-esm contacts`: predicted contacts of proteins as maps, a table and figures in one folder.

The folder is filled under another name and renamed when it is complete. A command that was stopped resumes there.
"""

from __future__ import annotations

import hashlib
import json
import os
import sys
from collections.abc import Iterator, Sequence, Set
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

import numpy as np
from omegaconf import DictConfig
from pydantic import Field, field_validator

from bionemo_esm.alphabet import TOKENS
from bionemo_esm.command_line import INFERENCE_SPELLINGS, ConfiguredCommand
from bionemo_esm.console import RESIDUES, Console, ProgressBar
from bionemo_esm.files import atomic_write, hold_output
from bionemo_esm.inference.batching import WindowSpec
from bionemo_esm.inference.contacts.metrics import TIES, Precisions, as_dicts, precisions, summary, table
from bionemo_esm.inference.contacts.output_dir import WorkFolder, file_names, written_table
from bionemo_esm.inference.contacts.structures import (
    CONTACT_ANGSTROM,
    Structure,
    StructureOptions,
    holds_structures,
    read_structures,
    source_paths,
)
from bionemo_esm.inference.engine_options import EngineConfig, describe, run
from bionemo_esm.inference.figures import draw_contacts
from bionemo_esm.inference.inputs import InputError, InputPolicy, read_proteins
from bionemo_esm.inference.load import load_engine
from bionemo_esm.settings import NonNegativeInt, PositiveFloat, PositiveInt, plain_values

if TYPE_CHECKING:  # they import torch
    from numpy.typing import NDArray

    from bionemo_esm.inference.contacts.prediction import Map
    from bionemo_esm.inference.engine import Engine

_BLOCK_PAIRS = 2**22  # of a map that are looked at together


class ContactsConfig(EngineConfig, InputPolicy, StructureOptions):
    """The keys of `conf/inference/contacts.yaml`."""

    input: tuple[str, ...]  # several only of structures
    output: Path
    threshold: float = Field(default=0.3, ge=0, le=1)
    separation: PositiveInt = 6
    pictures: NonNegativeInt = 10
    long_proteins: Literal["windows", "error"] = "windows"
    window: PositiveInt | None = None
    overlap: NonNegativeInt | None = None
    max_residues: PositiveInt = 5000
    contact_angstrom: PositiveFloat = Field(default=CONTACT_ANGSTROM, allow_inf_nan=False)
    seed: NonNegativeInt = 0

    @field_validator("input", mode="before")
    @classmethod
    def _one_or_several(cls, value: Any) -> tuple[str, ...]:
        return source_paths("input", value)


def load_contacts_config(cfg: DictConfig) -> ContactsConfig:
    """Return the checked configuration. Raises `ConfigError`, naming the key."""
    return ContactsConfig.from_config(plain_values(cfg))


@dataclass(frozen=True)
class Subject:
    """A protein, and its structure if that is known."""

    id: str
    tokens: NDArray[np.uint8]
    structure: Structure | None

    @property
    def residues(self) -> int:
        return len(self.tokens)


class Found(NamedTuple):
    """Totals over all maps."""

    pairs: int  # listed in contacts.csv
    highest: float | None  # probability; None if no pair is far enough apart
    precisions: list[Precisions]  # of each structure that the head was not fitted on
    best: list[Precisions]  # of their true contacts
    fitted_on: int  # structures that the head was fitted on


def predict_contacts(cfg: DictConfig) -> None:
    """Run the command for a composed Hydra configuration. Exits with 2 for a user's error."""
    run(lambda: _predict(load_contacts_config(cfg)), "Stopped; the same command goes on.")


def _predict(config: ContactsConfig) -> int:
    with hold_output("output", config.output):
        return _predict_held(config)


def _predict_held(config: ContactsConfig) -> int:
    config.check()
    console = Console(sys.stdout)
    subjects, skipped = _read(config, console)
    fitted = _fitted_on(config.model, subjects)
    engine = load_engine(config)
    console.print_line(f"  model    {describe(engine)}")

    from bionemo_esm.inference.contacts.prediction import check_head  # torch takes a second to import

    check_head(engine)
    spec = WindowSpec.of(engine, config.window, config.overlap)
    _check_lengths(config, subjects, spec.window)
    with WorkFolder.opened(config.output, _fingerprint(engine, spec, subjects)) as work:
        names = file_names([subject.id for subject in subjects])
        _fill(work, engine, subjects, names, spec, console)
        found = _describe_all(work, config, subjects, names, spec, fitted, console)
        _write_summary(work, config, engine, subjects, skipped, spec, found)
        work.finish()
    _report(config, found, console)
    console.print_line(f"Wrote {config.output}: contacts.csv, proteins.csv, summary.json, maps/ and pictures/")
    return 0


def _report(config: ContactsConfig, found: Found, console: Console) -> None:
    pairs = "1 pair reaches" if found.pairs == 1 else f"{found.pairs:,} pairs reach"
    highest = "" if found.highest is None else f"; the surest of all is {found.highest:.2f}"
    console.print_line(f"Found: {pairs} threshold={config.threshold:g}{highest}")
    if found.fitted_on:
        console.print_line(f"  left out of the precision: {found.fitted_on:,} that the contact head was fitted on")
    if found.precisions:
        console.print_line(f"Precision over {len(found.precisions):,} structure{'s' * (len(found.precisions) != 1)}:")
        rows = {"model": found.precisions, "best possible": found.best}
        for line in table({name: summary(of_proteins, config.seed) for name, of_proteins in rows.items()}):
            console.print_line(f"  {line}")
        console.print_line(f"  {TIES}")


def _fitted_on(model: Path, subjects: Sequence[Subject]) -> set[int]:
    """Return the indices of structures that the contact head was fitted on, by the ids in its archive.

    Structures with the sequence of one of these are included.
    """
    if all(subject.structure is None for subject in subjects):
        return set()
    from bionemo_esm.model.archive import ArchiveFile

    provenance = ArchiveFile.open(model).provenance.get("contact_head")
    listed = provenance.get("fitted_on") if isinstance(provenance, dict) else None
    ids = set(map(str, listed)) if isinstance(listed, list) else set()
    sequences = {subject.tokens.tobytes() for subject in subjects if subject.id in ids}
    return {index for index, subject in enumerate(subjects) if subject.tokens.tobytes() in sequences}


def _read(config: ContactsConfig, console: Console) -> tuple[list[Subject], int]:
    """Return the proteins in the order of the input, and the number of records left out."""
    skipped: list[str] = []
    source = ", ".join(config.input)
    if all(map(holds_structures, config.input)):
        structures = read_structures(config.input, config.atom, config.chain)
        subjects = [Subject(structure.id, structure.tokens, structure) for structure in structures]
    elif len(config.input) > 1:
        one = next(one for one in config.input if not holds_structures(one))
        raise InputError(f"input: {one} holds no structures, of which alone there may be a list; give one input")
    else:
        proteins = read_proteins(source, config, skipped.append)
        subjects = [Subject(protein.id, protein.tokens, None) for protein in proteins]
    if not subjects:
        raise InputError(f"{source}: no protein {f'is left: {skipped[0]}' if skipped else 'in it'}")
    _check_memory(config, subjects)
    proteins_read, residues = len(subjects), sum(subject.residues for subject in subjects)
    console.print_line(
        f"Read {proteins_read:,} protein{'s' * (proteins_read != 1)}, {residues:,} residue{'s' * (residues != 1)}"
    )
    if skipped:
        console.print_line(f"  left out {len(skipped):,}, the first: {skipped[0]}")
    return subjects, len(skipped)


def _check_memory(config: ContactsConfig, subjects: Sequence[Subject]) -> None:
    """Raise `InputError` for a protein over `max_residues`, and for a map that this machine's memory cannot hold."""
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    longest = max(subjects, key=lambda subject: subject.residues)
    for subject in (*subjects, longest):
        disk, needed = 4 * subject.residues**2, 8 * subject.residues**2
        where = f"{', '.join(config.input)}: {subject.id[:40]} has {subject.residues:,} residues"
        if subject.residues > config.max_residues:
            raise InputError(
                f"{where}, over max_residues={config.max_residues}; its map would take {disk / 1e9:.1f} GB on disk, "
                f"and twice that in memory; where there is as much, max_residues={subject.residues} allows it",
                code="contacts.max-residues",
            )
        if needed > memory:
            raise InputError(
                f"{where}; its map takes {needed / 1e9:.1f} GB of memory, more than the {memory / 1e9:.1f} GB of this "
                "machine; leave the protein out, or split it",
                code="contacts.memory",
            )


def _check_lengths(config: ContactsConfig, subjects: Sequence[Subject], window: int) -> None:
    if config.long_proteins == "error":
        for subject in subjects:
            if subject.residues > window:
                raise InputError(
                    f"{', '.join(config.input)}: {subject.id[:40]} has {subject.residues:,} residues, over the window "
                    f"of {window}; long_proteins=windows reads it in windows"
                )


def _fingerprint(engine: Engine, spec: WindowSpec, subjects: Sequence[Subject]) -> str:
    """Return a line for each thing that the maps depend on."""
    digest = hashlib.sha256()
    for subject in subjects:
        digest.update(f"{len(subject.id)} {subject.id} {subject.residues} ".encode("utf-8", "surrogatepass"))
        digest.update(subject.tokens.tobytes())
    return (
        f"model {engine.model_identity}\ninput {digest.hexdigest()}\nprecision {engine.dtype}\n"
        f"device {engine.device.type}\nwindow {spec.window}\noverlap {spec.overlap}\n"
    )


def _fill(
    work: WorkFolder,
    engine: Engine,
    subjects: Sequence[Subject],
    names: Sequence[str],
    spec: WindowSpec,
    console: Console,
) -> None:
    """Write the map of each protein that has none yet."""
    from bionemo_esm.inference.contacts.prediction import predict_contacts as predict

    todo = {index for index, name in enumerate(names) if not work.has_map(name)}
    total = sum(subject.residues for subject in subjects)
    done = total - sum(subjects[index].residues for index in todo)
    if done:
        present = len(subjects) - len(todo)
        console.print_line(f"  going on {present:,} protein{'s are' if present != 1 else ' is'} there already")
    bar = ProgressBar(console, "contacts", RESIDUES)
    bar(done, total)
    for index, found_RR in predict(engine, [subject.tokens for subject in subjects], spec, todo.__contains__):
        work.write_map(names[index], found_RR)
        done += len(found_RR)
        del found_RR  # before the next map is computed
        bar(done, total)


def _describe_all(
    work: WorkFolder,
    config: ContactsConfig,
    subjects: Sequence[Subject],
    names: Sequence[str],
    spec: WindowSpec,
    fitted: Set[int],
    console: Console,
) -> Found:
    """Write contacts.csv, proteins.csv and the figures; compute the precision of structures not fitted on."""
    all_found: list[Precisions] = []
    best: list[Precisions] = []
    below, listed, highest, done = config.contact_angstrom, 0, None, 0
    bar, total = ProgressBar(console, "tables and pictures", RESIDUES), sum(subject.residues for subject in subjects)
    extra = ["distance"] * any(subject.structure is not None for subject in subjects)
    pairs_header = ["id", "i", "j", "residue_i", "residue_j", "probability", *extra]
    proteins_header = ["id", "residues", "windows", "contacts", "map"]
    with (
        written_table(work.folder / "contacts.csv", pairs_header) as pairs,
        written_table(work.folder / "proteins.csv", proteins_header) as proteins,
    ):
        for index, (subject, name) in enumerate(zip(subjects, names, strict=True)):
            found_RR = work.read_map(name, subject.residues)
            first, second, scores, highest = _probable(found_RR, config, highest)
            pairs.writerows(_rows(subject, first, second, scores))
            count = len(spec.cover(subject.residues))
            proteins.writerow([subject.id, subject.residues, count, len(first), f"maps/{name}.npz"])
            listed += len(first)
            if subject.structure is not None and index not in fitted:
                all_found.append(precisions(found_RR, subject.structure, below))
                truth_RR = subject.structure.contacts(below).astype(np.float32)
                best.append(precisions(truth_RR, subject.structure, below))
            if index < config.pictures:
                picture = work.folder / "pictures" / f"{name}.png"
                draw_contacts(picture, subject.id, found_RR, config.separation, subject.structure, below)
            del found_RR  # before the next map is read
            done += subject.residues
            bar(done, total)
    return Found(listed, highest, all_found, best, len(fitted))


def _probable(
    found_RR: Map, config: ContactsConfig, highest: float | None
) -> tuple[NDArray[np.int64], NDArray[np.int64], NDArray[np.float32], float | None]:
    """Return both positions and the probability of the pairs to list, highest first, and the highest of all pairs.

    The last is at least `highest`; None if no pair is far enough apart. Memory: some rows of the map, and the pairs.
    """
    residues = len(found_RR)
    rows = max(_BLOCK_PAIRS // residues, 1)
    found: list[tuple[NDArray[np.int64], NDArray[np.int64]]] = []
    for begin in range(0, residues, rows):
        block = np.triu(np.ones((min(rows, residues - begin), residues), dtype=bool), config.separation + begin)
        known = block & ~np.isnan(found_RR[begin : begin + rows])
        if known.any():
            top = float(np.max(found_RR[begin : begin + rows], where=known, initial=-np.inf))
            highest = top if highest is None else max(highest, top)
        first, second = np.nonzero(known & (found_RR[begin : begin + rows] >= np.float32(config.threshold)))
        found.append((first + begin, second))
    first, second = (np.concatenate(column) for column in zip(*found, strict=True))
    scores = found_RR[first, second]
    order = np.lexsort((second, first, -scores))
    return first[order], second[order], scores[order], highest


def _rows(
    subject: Subject, first: NDArray[np.int64], second: NDArray[np.int64], scores: NDArray[np.float32]
) -> Iterator[list[Any]]:
    """Yield rows of contacts.csv; residues are numbered from 1."""
    distances = None if subject.structure is None else subject.structure.distances_of(first, second)
    for row, (i, j, score) in enumerate(zip(first, second, scores, strict=True)):
        fields = [subject.id, i + 1, j + 1, TOKENS[subject.tokens[i]], TOKENS[subject.tokens[j]], f"{score:.4f}"]
        if distances is not None:
            fields.append("" if np.isnan(distances[row]) else f"{distances[row]:.2f}")
        yield fields


def _write_summary(
    work: WorkFolder,
    config: ContactsConfig,
    engine: Engine,
    subjects: Sequence[Subject],
    skipped: int,
    spec: WindowSpec,
    found: Found,
) -> None:
    content = {
        "proteins": len(subjects),
        "residues": sum(subject.residues for subject in subjects),
        "left_out": skipped,
        "in_windows": sum(subject.residues > spec.window for subject in subjects),
        "window": spec.window,
        "overlap": spec.overlap,
        "threshold": config.threshold,
        "separation": config.separation,
        "weights_sha256": engine.weights_sha256,
        "dtype": str(engine.dtype).removeprefix("torch."),
        "device": engine.device.type,
        "pairs": found.pairs,
        "highest_probability": None if found.highest is None else round(found.highest, 6),
        "contact_angstrom": config.contact_angstrom if any(subject.structure for subject in subjects) else None,
        "structures_fitted_on": found.fitted_on,
        "precision": as_dicts(summary(found.precisions, config.seed)),
        "best_possible": as_dicts(summary(found.best, config.seed)),
    }
    with atomic_write(work.folder / "summary.json") as stream:
        stream.write((json.dumps(content, indent=2) + "\n").encode())


main = ConfiguredCommand(
    predict_contacts,
    "contacts",
    part="inference",
    text_keys=("model", "output", "chain", "id_column", "sequence_column"),
    list_keys=("input",),
    other_spellings=INFERENCE_SPELLINGS,
)
"""`bionemo-esm contacts`."""
