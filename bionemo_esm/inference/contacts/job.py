"""`bionemo-esm contacts`: which residues of proteins touch, as maps, a table and pictures in one folder.

The folder is filled under another name and gets its own when it is whole; a job that was stopped goes on where it was.
"""

from __future__ import annotations

import hashlib
import json
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import hydra
import numpy as np
from omegaconf import DictConfig

from bionemo_esm import config_directory
from bionemo_esm.alphabet import TOKENS
from bionemo_esm.command_line import check_command_line
from bionemo_esm.errors import ConfigError
from bionemo_esm.inference.contacts.folder import WorkFolder, file_names, written_table
from bionemo_esm.inference.contacts.metrics import Precisions, as_dicts, precisions, summary, table
from bionemo_esm.inference.contacts.structures import Structure, holds_structures, read_structures
from bionemo_esm.inference.inputs import InputError, InputPolicy, read_proteins
from bionemo_esm.inference.running import ENGINE_KEYS, EngineConfig, describe, run
from bionemo_esm.outputs import check_absent, check_writable, written_whole
from bionemo_esm.screen import RESIDUES, Meter, Screen
from bionemo_esm.settings import integer, known, number, path, plain_values

if TYPE_CHECKING:  # they import torch
    from numpy.typing import NDArray

    from bionemo_esm.inference.contacts.prediction import Map, Reach
    from bionemo_esm.inference.engine import Engine

_POLICY = ("input_format", "id_column", "sequence_column", "bad_records", "unknown_letters")
_KEYS = ENGINE_KEYS | {
    *("input", "output", "threshold", "separation", "pictures", "long_proteins", "window", "overlap", "max_residues"),
    *("atom", "chain", "contact_angstrom", "seed"),
    *_POLICY,
}


@dataclass(frozen=True)
class ContactsConfig:
    """Which model, which proteins, what is written of them. Raises `ConfigError`, naming the key."""

    engine: EngineConfig
    input: str
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
    source, output = path("input", values["input"]), path("output", values["output"])
    if source is None or output is None:
        raise ConfigError(f"{'input' if source is None else 'output'} must be a path, not null")
    words = {key: None if values[key] is None else str(values[key]) for key in (*_POLICY, "chain")}
    chain = words.pop("chain")
    window, overlap = (None if values[key] is None else integer(key, values[key]) for key in ("window", "overlap"))
    return ContactsConfig(
        EngineConfig.of(values),
        str(source),
        output,
        InputPolicy(**words),  # type: ignore[arg-type]
        number("threshold", values["threshold"]),
        integer("separation", values["separation"]),
        integer("pictures", values["pictures"]),
        str(values["long_proteins"]),
        window,
        overlap,
        integer("max_residues", values["max_residues"]),
        str(values["atom"]),
        chain,
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


def predict_contacts(cfg: DictConfig) -> None:
    """Predict as a composed Hydra configuration says. Exits with 2 for what a user can mend."""
    run(lambda: _predict(load_contacts_config(cfg)), "Stopped; the same command goes on.")


def _predict(config: ContactsConfig) -> int:
    check_absent("output", config.output)
    check_writable("output", config.output)
    screen = Screen(sys.stdout)
    subjects, skipped = _read(config, screen)
    engine = config.engine.load()
    screen.say(f"  model    {describe(engine)}")

    from bionemo_esm.inference.contacts.prediction import Reach, check_head  # torch takes a second to import

    check_head(engine)
    reach = Reach.of(engine, config.window, config.overlap)
    _check_lengths(config, subjects, reach.window)
    with WorkFolder.opened(config.output, _fingerprint(engine, reach, subjects)) as work:
        names = file_names([subject.id for subject in subjects])
        _fill(work, engine, subjects, names, reach, screen)
        rows = _describe_all(work, config, subjects, names, reach)
        _write_summary(work, config, engine, subjects, skipped, reach, rows)
        work.finish()
    if rows:
        screen.say(f"Precision over {len(rows):,} structures:")
        for line in table({"model": summary(rows, config.seed)}):
            screen.say(f"  {line}")
    screen.say(f"Wrote {config.output}: contacts.csv, proteins.csv, summary.json, maps/ and pictures/")
    return 0


def _read(config: ContactsConfig, screen: Screen) -> tuple[list[Subject], int]:
    """The proteins in the input's order, and how many records were left out."""
    skipped: list[str] = []
    if holds_structures(config.input):
        structures = read_structures(config.input, config.atom, config.chain)
        subjects = [Subject(structure.id, structure.tokens, structure) for structure in structures]
    else:
        proteins = read_proteins(config.input, config.policy, skipped.append)
        subjects = [Subject(protein.id, protein.tokens, None) for protein in proteins]
    if not subjects:
        raise InputError(f"{config.input}: no protein {f'is left: {skipped[0]}' if skipped else 'in it'}")
    for subject in subjects:
        if subject.residues > config.max_residues:
            raise InputError(
                f"{config.input}: {subject.id[:40]} has {subject.residues:,} residues, over max_residues="
                f"{config.max_residues}; its map would take {4 * subject.residues**2 / 1e9:.1f} GB on disk, and twice "
                "that in memory"
            )
    screen.say(f"Read {len(subjects):,} proteins, {sum(subject.residues for subject in subjects):,} residues")
    if skipped:
        screen.say(f"  left out {len(skipped):,}, the first: {skipped[0]}")
    return subjects, len(skipped)


def _check_lengths(config: ContactsConfig, subjects: Sequence[Subject], window: int) -> None:
    if config.long_proteins == "error":
        for subject in subjects:
            if subject.residues > window:
                raise InputError(
                    f"{config.input}: {subject.id[:40]} has {subject.residues:,} residues, over the window of "
                    f"{window}; long_proteins=windows reads it in windows"
                )


def _fingerprint(engine: Engine, reach: Reach, subjects: Sequence[Subject]) -> str:
    """Of all that the maps depend on."""
    digest = hashlib.sha256(f"{engine.weights_sha256} {engine.dtype} {engine.device.type} {reach}".encode())
    for subject in subjects:
        digest.update(f"{len(subject.id)} {subject.id} {subject.residues} ".encode("utf-8", "surrogatepass"))
        digest.update(subject.tokens.tobytes())
    return digest.hexdigest()


def _fill(
    work: WorkFolder, engine: Engine, subjects: Sequence[Subject], names: Sequence[str], reach: Reach, screen: Screen
) -> None:
    """Write the map of each protein that has none yet."""
    from bionemo_esm.inference.contacts.prediction import predict_contacts as predict

    todo = {place for place, name in enumerate(names) if not work.has_map(name)}
    total = sum(subject.residues for subject in subjects)
    done = total - sum(subjects[place].residues for place in todo)
    if done:
        screen.say(f"  going on {len(subjects) - len(todo):,} proteins are there already")
    meter = Meter(screen, "contacts", RESIDUES)
    meter(done, total)
    for place, found_RR in predict(engine, [subject.tokens for subject in subjects], reach, todo.__contains__):
        work.write_map(names[place], found_RR)
        done += len(found_RR)
        meter(done, total)


def _describe_all(
    work: WorkFolder, config: ContactsConfig, subjects: Sequence[Subject], names: Sequence[str], reach: Reach
) -> list[Precisions]:
    """contacts.csv, proteins.csv and the pictures; the precisions of each protein whose structure is known."""
    from bionemo_esm.inference.contacts.picture import draw_contacts

    all_found: list[Precisions] = []
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
            if subject.structure is not None:
                all_found.append(precisions(found_RR, subject.structure, config.contact_angstrom))
            if place < config.pictures:
                picture = work.folder / "pictures" / f"{name}.png"
                how = (config.separation, subject.structure, config.contact_angstrom)
                draw_contacts(picture, subject.id, found_RR, *how)
    return all_found


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
    reach: Reach,
    rows: Sequence[Precisions],
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
        "contact_angstrom": config.contact_angstrom if rows else None,
        "precision": as_dicts(summary(rows, config.seed)),
    }
    with written_whole(work.folder / "summary.json") as stream:
        stream.write((json.dumps(told, indent=2) + "\n").encode())


def main() -> None:
    """`bionemo-esm contacts`, where there is no checkout and so no `examples/`."""
    check_command_line("contacts", "inference")
    hydra.main(version_base="1.3", config_path=str(config_directory("inference")), config_name="contacts")(
        predict_contacts
    )()
