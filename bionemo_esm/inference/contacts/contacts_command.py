"""`bionemo-esm contacts`: which residues of proteins touch, as maps, a table and pictures in one folder.

The folder is filled under another name and gets its own when it is whole; a job that was stopped goes on where it was.
"""

from __future__ import annotations

import hashlib
import json
import sys
from collections.abc import Iterator, Sequence, Set
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
from omegaconf import DictConfig

from bionemo_esm.alphabet import TOKENS
from bionemo_esm.command_line import ConfiguredCommand
from bionemo_esm.console import RESIDUES, Console, ProgressBar
from bionemo_esm.errors import ConfigError
from bionemo_esm.files import atomic_write, check_absent, check_writable
from bionemo_esm.inference.contacts.metrics import TIES, Precisions, as_dicts, precisions, summary, table
from bionemo_esm.inference.contacts.output_dir import WorkFolder, file_names, written_table
from bionemo_esm.inference.contacts.structures import Structure, holds_structures, read_structures, source_paths
from bionemo_esm.inference.engine_options import ENGINE_KEYS, EngineConfig, describe, run
from bionemo_esm.inference.inputs import POLICY_KEYS, InputError, InputPolicy, read_proteins
from bionemo_esm.inference.protein_model import load_engine
from bionemo_esm.settings import integer, known, number, path, plain_values

if TYPE_CHECKING:  # they import torch
    from numpy.typing import NDArray

    from bionemo_esm.inference.contacts.prediction import Map, WindowSpec
    from bionemo_esm.inference.engine import Engine

_KEYS = ENGINE_KEYS | {
    *("input", "output", "threshold", "separation", "pictures", "long_proteins", "window", "overlap", "max_residues"),
    *("atom", "chain", "contact_angstrom", "seed"),
    *POLICY_KEYS,
}


@dataclass(frozen=True)
class ContactsConfig:
    """Which model, which proteins, what is written of them. Raises `ConfigError`, naming the key."""

    engine: EngineConfig
    input: tuple[str, ...]  # several only of structures
    output: Path
    policy: InputPolicy
    threshold: float
    separation: int
    pictures: int
    long_proteins: str
    window: int | None
    overlap: int | None
    max_residues: int
    atom: str
    chain: str | None
    contact_angstrom: float
    seed: int

    def __post_init__(self) -> None:
        if not 0 <= self.threshold <= 1:
            raise ConfigError(f"threshold must be from 0 to 1, not {self.threshold:g}")
        for key, value, least in (
            ("separation", self.separation, 1),
            ("pictures", self.pictures, 0),
            ("max_residues", self.max_residues, 1),
            ("seed", self.seed, 0),
        ):
            if value < least:
                raise ConfigError(f"{key} must be at least {least}, not {value}")
        if self.long_proteins not in ("windows", "error"):
            raise ConfigError(f"long_proteins must be windows or error, not {self.long_proteins!r}")
        if not 0 < self.contact_angstrom < float("inf"):
            raise ConfigError(f"contact_angstrom must be over 0, not {self.contact_angstrom}")


def load_contacts_config(cfg: DictConfig) -> ContactsConfig:
    """Raises `ConfigError`, naming the key, for one that is unknown, missing or of the wrong kind."""
    values = known("", plain_values(cfg), _KEYS)
    output = path("output", values["output"])
    if output is None:
        raise ConfigError("output must be a path, not null")
    window, overlap = (None if values[key] is None else integer(key, values[key]) for key in ("window", "overlap"))
    return ContactsConfig(
        EngineConfig.of(values),
        source_paths("input", values["input"]),
        output,
        InputPolicy.of(values),
        number("threshold", values["threshold"]),
        integer("separation", values["separation"]),
        integer("pictures", values["pictures"]),
        str(values["long_proteins"]),
        window,
        overlap,
        integer("max_residues", values["max_residues"]),
        str(values["atom"]),
        None if values["chain"] is None else str(values["chain"]),
        number("contact_angstrom", values["contact_angstrom"]),
        integer("seed", values["seed"]),
    )


@dataclass(frozen=True)
class Subject:
    """A protein to ask about, and its structure where that is known."""

    id: str
    tokens: NDArray[np.uint8]
    structure: Structure | None

    @property
    def residues(self) -> int:
        return len(self.tokens)


class Found(NamedTuple):
    """What is said of the answers."""

    pairs: int  # that are listed
    surest: float | None  # the highest probability; None where no pair is far enough apart
    precisions: list[Precisions]  # of each structure but those fitted on
    best: list[Precisions]  # of their true contacts
    fitted_on: int  # structures that the head was fitted on


def predict_contacts(cfg: DictConfig) -> None:
    """Predict as a composed Hydra configuration says. Exits with 2 for what a user can mend."""
    run(lambda: _predict(load_contacts_config(cfg)), "Stopped; the same command goes on.")


def _predict(config: ContactsConfig) -> int:
    check_absent("output", config.output)
    check_writable("output", config.output)
    config.engine.check()
    console = Console(sys.stdout)
    subjects, skipped = _read(config, console)
    fitted = _fitted_on(config.engine.model, subjects)
    engine = load_engine(config.engine)
    console.print_line(f"  model    {describe(engine)}")

    from bionemo_esm.inference.contacts.prediction import WindowSpec, check_head  # torch takes a second to import

    check_head(engine)
    reach = WindowSpec.of(engine, config.window, config.overlap)
    _check_lengths(config, subjects, reach.window)
    with WorkFolder.opened(config.output, _fingerprint(engine, reach, subjects)) as work:
        names = file_names([subject.id for subject in subjects])
        _fill(work, engine, subjects, names, reach, console)
        found = _describe_all(work, config, subjects, names, reach, fitted, console)
        _write_summary(work, config, engine, subjects, skipped, reach, found)
        work.finish()
    _tell(config, found, console)
    console.print_line(f"Wrote {config.output}: contacts.csv, proteins.csv, summary.json, maps/ and pictures/")
    return 0


def _tell(config: ContactsConfig, found: Found, console: Console) -> None:
    pairs = "1 pair reaches" if found.pairs == 1 else f"{found.pairs:,} pairs reach"
    surest = "" if found.surest is None else f"; the surest of all is {found.surest:.2f}"
    console.print_line(f"Found: {pairs} threshold={config.threshold:g}{surest}")
    if found.fitted_on:
        console.print_line(f"  left out of the precision: {found.fitted_on:,} that the contact head was fitted on")
    if found.precisions:
        console.print_line(f"Precision over {len(found.precisions):,} structure{'s' * (len(found.precisions) != 1)}:")
        rows = {"model": found.precisions, "best possible": found.best}
        for line in table({name: summary(of_proteins, config.seed) for name, of_proteins in rows.items()}):
            console.print_line(f"  {line}")
        console.print_line(f"  {TIES}")


def _fitted_on(model: Path, subjects: Sequence[Subject]) -> set[int]:
    """The places of the structures that the model's contact head was fitted on, by what its archive says: those of the
    ids there, and those with the same sequence as one of these."""
    if all(subject.structure is None for subject in subjects):
        return set()
    from bionemo_esm.model.archive import ArchiveFile

    told = ArchiveFile.open(model).provenance.get("contact_head")
    listed = told.get("fitted_on") if isinstance(told, dict) else None
    ids = set(map(str, listed)) if isinstance(listed, list) else set()
    sequences = {subject.tokens.tobytes() for subject in subjects if subject.id in ids}
    return {place for place, subject in enumerate(subjects) if subject.tokens.tobytes() in sequences}


def _read(config: ContactsConfig, console: Console) -> tuple[list[Subject], int]:
    """The proteins in the input's order, and how many records were left out."""
    skipped: list[str] = []
    source = ", ".join(config.input)
    if all(map(holds_structures, config.input)):
        structures = read_structures(config.input, config.atom, config.chain)
        subjects = [Subject(structure.id, structure.tokens, structure) for structure in structures]
    elif len(config.input) > 1:
        one = next(one for one in config.input if not holds_structures(one))
        raise InputError(f"input: {one} holds no structures, of which alone there may be a list; give one input")
    else:
        proteins = read_proteins(source, config.policy, skipped.append)
        subjects = [Subject(protein.id, protein.tokens, None) for protein in proteins]
    if not subjects:
        raise InputError(f"{source}: no protein {f'is left: {skipped[0]}' if skipped else 'in it'}")
    for subject in subjects:
        if subject.residues > config.max_residues:
            raise InputError(
                f"{source}: {subject.id[:40]} has {subject.residues:,} residues, over max_residues="
                f"{config.max_residues}; its map would take {4 * subject.residues**2 / 1e9:.1f} GB on disk, and twice "
                f"that in memory; where there is as much, max_residues={subject.residues} allows it"
            )
    proteins_read, residues = len(subjects), sum(subject.residues for subject in subjects)
    console.print_line(
        f"Read {proteins_read:,} protein{'s' * (proteins_read != 1)}, {residues:,} residue{'s' * (residues != 1)}"
    )
    if skipped:
        console.print_line(f"  left out {len(skipped):,}, the first: {skipped[0]}")
    return subjects, len(skipped)


def _check_lengths(config: ContactsConfig, subjects: Sequence[Subject], window: int) -> None:
    if config.long_proteins == "error":
        for subject in subjects:
            if subject.residues > window:
                raise InputError(
                    f"{', '.join(config.input)}: {subject.id[:40]} has {subject.residues:,} residues, over the window "
                    f"of {window}; long_proteins=windows reads it in windows"
                )


def _fingerprint(engine: Engine, reach: WindowSpec, subjects: Sequence[Subject]) -> str:
    """Of all that the maps depend on: a line for each thing."""
    digest = hashlib.sha256()
    for subject in subjects:
        digest.update(f"{len(subject.id)} {subject.id} {subject.residues} ".encode("utf-8", "surrogatepass"))
        digest.update(subject.tokens.tobytes())
    return (
        f"model {engine.model_identity}\ninput {digest.hexdigest()}\nprecision {engine.dtype}\n"
        f"device {engine.device.type}\nwindow {reach.window}\noverlap {reach.overlap}\n"
    )


def _fill(
    work: WorkFolder,
    engine: Engine,
    subjects: Sequence[Subject],
    names: Sequence[str],
    reach: WindowSpec,
    console: Console,
) -> None:
    """Write the map of each protein that has none yet."""
    from bionemo_esm.inference.contacts.prediction import predict_contacts as predict

    todo = {place for place, name in enumerate(names) if not work.has_map(name)}
    total = sum(subject.residues for subject in subjects)
    done = total - sum(subjects[place].residues for place in todo)
    if done:
        there = len(subjects) - len(todo)
        console.print_line(f"  going on {there:,} protein{'s are' if there != 1 else ' is'} there already")
    meter = ProgressBar(console, "contacts", RESIDUES)
    meter(done, total)
    for place, found_RR in predict(engine, [subject.tokens for subject in subjects], reach, todo.__contains__):
        work.write_map(names[place], found_RR)
        done += len(found_RR)
        meter(done, total)


def _describe_all(
    work: WorkFolder,
    config: ContactsConfig,
    subjects: Sequence[Subject],
    names: Sequence[str],
    reach: WindowSpec,
    fitted: Set[int],
    console: Console,
) -> Found:
    """contacts.csv, proteins.csv and the pictures; precisions only where no head was fitted on the structure."""
    from bionemo_esm.inference.figures import draw_contacts

    all_found: list[Precisions] = []
    best: list[Precisions] = []
    below, listed, surest, done = config.contact_angstrom, 0, None, 0
    meter, total = ProgressBar(console, "tables and pictures", RESIDUES), sum(subject.residues for subject in subjects)
    extra = ["distance"] * any(subject.structure is not None for subject in subjects)
    pairs_header = ["id", "i", "j", "residue_i", "residue_j", "probability", *extra]
    proteins_header = ["id", "residues", "windows", "contacts", "map"]
    with (
        written_table(work.folder / "contacts.csv", pairs_header) as pairs,
        written_table(work.folder / "proteins.csv", proteins_header) as proteins,
    ):
        for place, (subject, name) in enumerate(zip(subjects, names, strict=True)):
            found_RR = work.read_map(name, subject.residues)
            probable = _probable(found_RR, config)
            pairs.writerows(_rows(subject, *probable))
            count = len(reach.cover(subject.residues))
            proteins.writerow([subject.id, subject.residues, count, len(probable[0]), f"maps/{name}.npz"])
            listed, surest = listed + len(probable[0]), _surest(found_RR, config.separation, surest)
            if subject.structure is not None and place not in fitted:
                all_found.append(precisions(found_RR, subject.structure, below))
                truth_RR = subject.structure.contacts(below).astype(np.float32)
                best.append(precisions(truth_RR, subject.structure, below))
            if place < config.pictures:
                picture = work.folder / "pictures" / f"{name}.png"
                draw_contacts(picture, subject.id, found_RR, config.separation, subject.structure, below)
            done += subject.residues
            meter(done, total)
    return Found(listed, surest, all_found, best, len(fitted))


def _surest(found_RR: Map, separation: int, before: float | None) -> float | None:
    """The highest probability of a pair so far apart, or that of before; None where there is none."""
    scores = found_RR[np.triu_indices(len(found_RR), separation)]
    highest = max(scores[~np.isnan(scores)].tolist(), default=None)
    return max((one for one in (highest, before) if one is not None), default=None)


def _probable(
    found_RR: Map, config: ContactsConfig
) -> tuple[NDArray[np.int64], NDArray[np.int64], NDArray[np.float32]]:
    """Both places and the probability of the pairs that are listed, the surest first."""
    first, second = np.triu_indices(len(found_RR), config.separation)
    probable = found_RR[first, second] >= np.float32(config.threshold)  # NaN is not
    first, second = first[probable], second[probable]
    scores = found_RR[first, second]
    order = np.lexsort((second, first, -scores))
    return first[order], second[order], scores[order]


def _rows(
    subject: Subject, first: NDArray[np.int64], second: NDArray[np.int64], scores: NDArray[np.float32]
) -> Iterator[list[Any]]:
    """Rows of contacts.csv; residues are numbered from 1."""
    distances = None if subject.structure is None else subject.structure.distances()
    for i, j, score in zip(first, second, scores, strict=True):
        row = [subject.id, i + 1, j + 1, TOKENS[subject.tokens[i]], TOKENS[subject.tokens[j]], f"{score:.4f}"]
        if distances is not None:
            row.append("" if np.isnan(distances[i, j]) else f"{distances[i, j]:.2f}")
        yield row


def _write_summary(
    work: WorkFolder,
    config: ContactsConfig,
    engine: Engine,
    subjects: Sequence[Subject],
    skipped: int,
    reach: WindowSpec,
    found: Found,
) -> None:
    told = {
        "proteins": len(subjects),
        "residues": sum(subject.residues for subject in subjects),
        "left_out": skipped,
        "in_windows": sum(subject.residues > reach.window for subject in subjects),
        "window": reach.window,
        "overlap": reach.overlap,
        "threshold": config.threshold,
        "separation": config.separation,
        "weights_sha256": engine.weights_sha256,
        "dtype": str(engine.dtype).removeprefix("torch."),
        "device": engine.device.type,
        "pairs": found.pairs,
        "highest_probability": None if found.surest is None else round(found.surest, 6),
        "contact_angstrom": config.contact_angstrom if any(subject.structure for subject in subjects) else None,
        "structures_fitted_on": found.fitted_on,
        "precision": as_dicts(summary(found.precisions, config.seed)),
        "best_possible": as_dicts(summary(found.best, config.seed)),
    }
    with atomic_write(work.folder / "summary.json") as stream:
        stream.write((json.dumps(told, indent=2) + "\n").encode())


main = ConfiguredCommand(
    predict_contacts,
    "contacts",
    part="inference",
    text_keys=("model", "output", "chain", "id_column", "sequence_column"),
    list_keys=("input",),
)
"""`bionemo-esm contacts`."""
