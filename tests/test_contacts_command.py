"""Tests of the commands `fit-contacts` and `contacts`: output, errors, resume and atomic results."""

from __future__ import annotations

import csv
import json
import os
import shutil
import signal
import subprocess
import sys
import time
import tracemalloc
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from bionemo_esm.alphabet import TOKENS
from bionemo_esm.data.store import SequenceSplit
from bionemo_esm.files import hold_output
from bionemo_esm.inference import figures
from bionemo_esm.inference.contacts import contacts_command as contacts_job
from bionemo_esm.inference.contacts import head_fitting as contact_fit
from bionemo_esm.inference.contacts import output_dir as contact_folder
from bionemo_esm.inference.contacts.contacts_command import load_contacts_config, predict_contacts
from bionemo_esm.inference.contacts.fit_command import fit_contacts, load_fit_config
from bionemo_esm.inference.contacts.prediction import map_bytes
from bionemo_esm.inference.contacts.structures import read_structures
from bionemo_esm.inference.protein_model import ProteinModel
from bionemo_esm.model.archive import ArchiveFile, read_archive
from models import reconfigured, tiny_model
from runs import ROOT, composed
from structures import as_table, walk

JOBS = {"fit_contacts": fit_contacts, "contacts": predict_contacts}
ODD_ID = "../a|b/ç é"


@pytest.fixture(scope="module")
def there(tmp_path_factory: pytest.TempPathFactory, tiny_split: SequenceSplit) -> Path:
    """Return a read-only folder with a model, structures, proteins and the model with a fitted contact head."""
    base = tmp_path_factory.mktemp("there")
    model = tiny_model(position_embedding="rotary", token_dropout=True, seq_length=102, precision="bf16")
    model.save_to(str(base / "bf16.nemo"))
    tiny_model(position_embedding="rotary", token_dropout=True, seq_length=102).save_to(str(base / "m.nemo"))
    structures = [walk(f"s{n}", tiny_split[11 + n][: 40 + 6 * n], n) for n in range(10)]
    as_table(structures, base / "s.parquet")
    proteins = {"1ubq_A": tiny_split[15][:60], "1ubq_a": tiny_split[16][:150], ODD_ID: tiny_split[17][:1]}
    lines = [f">{name}\n{''.join(TOKENS[token] for token in tokens)}\n" for name, tokens in proteins.items()]
    (base / "p.csv").write_text("id,sequence\n" + "".join(line[1:].replace("\n", ",", 1) for line in lines))
    (base / "p.fasta").write_text("".join(lines[:2]))
    settings = [
        f"model={base}/m.nemo",
        f"structures={base}/s.parquet",
        f"output={base}/fitted.nemo",
        "train=4",
        "C=100",
    ]
    fit_contacts(configured("fit_contacts", *settings))
    return base


def configured(name: str, *settings: str) -> object:
    """Return a configuration as composed by the command line."""
    return composed(*settings, config=name, part="inference")


Job = Callable[..., tuple[int, str, str]]


@pytest.fixture
def job(capfd: pytest.CaptureFixture[str]) -> Job:
    """Return a function that runs a job in this process: exit code, output and errors."""

    def run(name: str, *settings: str) -> tuple[int, str, str]:
        code = 0
        try:
            JOBS[name](configured(name, *settings))
        except SystemExit as end:
            code = int(end.code or 0)
        told = capfd.readouterr()
        return code, told.out, told.err

    return run


# --- fitting ----------------------------------------------------------------------------------------------------------


def test_fit_keeps_all_weights_and_records_its_provenance(there: Path) -> None:
    before, after = read_archive(there / "m.nemo"), read_archive(there / "fitted.nemo")
    heads = {"encoder.contact_head.weight", "encoder.contact_head.bias"}
    assert set(after.weights) == set(before.weights) | heads
    for name, tensor in before.weights.items():
        assert tensor.equal(after.weights[name]) and tensor.dtype == after.weights[name].dtype
    assert after.weights["encoder.contact_head.weight"].any()
    assert after.config["encoder"] == before.config["encoder"] | {"contact_head": True}
    told = after.provenance["contact_head"]
    assert len(told["fitted_on"]) == 4 and told["held_out_structures"] == 6
    assert (told["C"], told["separation"], told["contact"]) == (100, 6, "CA nearer than 8 angstrom")
    assert told["weights_sha256"] == ArchiveFile.open(there / "m.nemo").weights_sha256
    assert set(told["precision"]) == {"model", "untrained model", "separation alone", "best possible"}
    assert "s.parquet" in told["structure_files"] and told["solver"].startswith("scikit-learn")


def test_equal_fits_give_equal_bytes_and_an_existing_head_is_replaced(there: Path, job: Job, tmp_path: Path) -> None:
    same = (f"structures={there}/s.parquet", "train=4", "C=100", "baseline=false")
    first = job("fit_contacts", f"model={there}/m.nemo", f"output={tmp_path}/a.nemo", *same)
    code, told, _ = job("fit_contacts", f"model={there}/m.nemo", f"output={tmp_path}/b.nemo", *same)
    assert first[0] == code == 0
    assert (tmp_path / "a.nemo").read_bytes() == (tmp_path / "b.nemo").read_bytes()
    assert "fit on   4 structures" in told and "test on  6 others" in told and "best possible" in told
    assert "long range P@L of model" in told and "than separation alone" in told.replace("above ", "than ")
    assert "Pairs with the same probability" in told
    other = (f"structures={there}/s.parquet", "train=[s1,s2]", "C=50", "baseline=false")
    code, told, _ = job("fit_contacts", f"model={there}/fitted.nemo", f"output={tmp_path}/c.nemo", *other)
    assert code == 0 and "replaces" in told
    assert read_archive(tmp_path / "c.nemo").provenance["contact_head"]["fitted_on"] == ["s1", "s2"]
    ends = [
        read_archive(path).weights["encoder.contact_head.weight"]
        for path in (there / "fitted.nemo", tmp_path / "c.nemo")
    ]
    assert not ends[0].equal(ends[1])


def test_fit_reports_an_empty_result_and_a_missing_test_set(there: Path, job: Job, tmp_path: Path) -> None:
    to = (f"model={there}/bf16.nemo", f"output={tmp_path}/a.nemo", f"structures={there}/s.parquet", "baseline=false")
    code, told, _ = job("fit_contacts", *to, "train=10", "C=1e-6", "most_pairs=3000")
    assert code == 0 and "all pairs get the same probability" in told and "how good the head is" in told
    assert "3,000 pairs" in told
    weights = read_archive(tmp_path / "a.nemo").weights
    assert {str(tensor.dtype) for name, tensor in weights.items() if "contact_head" in name} == {"torch.float32"}


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (("train=30",), "train=30: there are 10 structures to fit on"),
        (("train=[s1,s99]",), "no structure is named s99"),
        (("C=0",), "C must be positive"),
        (("structures=nowhere.parquet",), "nowhere.parquet: no such file"),
        (("output=x.txt",), "output must be the name of a .nemo"),
        (("model=nowhere.nemo",), "no such file"),
        (("chain=A",), "a table is taken as it is"),
        (("baseline=1",), "baseline must be true or false"),
    ],
    ids=lambda value: value[0] if isinstance(value, tuple) else "",
)
def test_invalid_fit_ends_with_one_line_and_no_output(
    there: Path, job: Job, tmp_path: Path, settings: tuple[str, ...], message: str
) -> None:
    usual = (f"model={there}/m.nemo", f"structures={there}/s.parquet", f"output={tmp_path}/out.nemo", "train=4")
    code, _, error = job("fit_contacts", *usual, *settings)
    assert code == 2 and message in error and error.count("\n") == 1
    assert list(tmp_path.iterdir()) == []


def test_model_replaced_during_a_fit_is_refused(
    there: Path, job: Job, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shutil.copy(there / "m.nemo", tmp_path / "m.nemo")
    fit = contact_fit.fit_head

    def replacing(*arguments: Any) -> contact_fit.Regression:
        shutil.copy(there / "fitted.nemo", tmp_path / "m.nemo")
        return fit(*arguments)

    monkeypatch.setattr("bionemo_esm.inference.contacts.fit_command.fit_head", replacing)
    usual = (f"model={tmp_path}/m.nemo", f"structures={there}/s.parquet", f"output={tmp_path}/out.nemo")
    code, _, error = job("fit_contacts", *usual, "train=[s1,s2]", "baseline=false")
    assert code == 2 and "was replaced while the head was fitted" in error and not (tmp_path / "out.nemo").exists()


def test_existing_archive_is_not_overwritten(there: Path, job: Job) -> None:
    usual = (f"model={there}/m.nemo", f"structures={there}/s.parquet", f"output={there}/fitted.nemo")
    before = (there / "fitted.nemo").read_bytes()
    code, _, error = job("fit_contacts", *usual)
    assert code == 2 and "exists already" in error and (there / "fitted.nemo").read_bytes() == before


# --- prediction -------------------------------------------------------------------------------------------------------


def test_maps_tables_and_pictures_agree_with_the_model(there: Path, job: Job, tmp_path: Path) -> None:
    usual = (f"model={there}/fitted.nemo", f"input={there}/p.csv", "threshold=0.1")
    code, told, _ = job("contacts", *usual, f"output={tmp_path}/out", "pictures=2")
    assert code == 0 and "Read 3 proteins, 211 residues" in told
    out = tmp_path / "out"
    assert sorted(path.name for path in out.iterdir()) == [
        "contacts.csv", "maps", "pictures", "proteins.csv", "summary.json",
    ]  # fmt: skip
    with (out / "proteins.csv").open(newline="", encoding="utf-8") as stream:
        proteins = list(csv.DictReader(stream))
    assert [(row["id"], row["residues"], row["windows"]) for row in proteins] == [
        ("1ubq_A", "60", "1"), ("1ubq_a", "150", "2"), (ODD_ID, "1", "1"),
    ]  # fmt: skip
    model = ProteinModel.load(there / "fitted.nemo", "cpu")
    sequences = dict(line.split(",") for line in (there / "p.csv").read_text().splitlines()[1:])
    maps = {}
    for row in proteins:
        with np.load(out / row["map"]) as file:
            maps[row["id"]] = file["probabilities"]
        expected = model.contacts(sequences[row["id"]])
        assert maps[row["id"]].dtype == expected.dtype == np.float32
        assert np.allclose(maps[row["id"]], expected, atol=1e-5, equal_nan=True)
    with (out / "contacts.csv").open(newline="", encoding="utf-8") as stream:
        rows = list(csv.DictReader(stream))
    for name, found in maps.items():
        i, j = np.triu_indices(len(found), 6)
        own = [row for row in rows if row["id"] == name]
        assert len(own) == int((found[i, j] >= 0.1).sum())
        scores = [float(row["probability"]) for row in own]
        assert scores == sorted(scores, reverse=True)
        for row in own[:20]:
            first, second = int(row["i"]) - 1, int(row["j"]) - 1
            assert float(row["probability"]) == pytest.approx(found[first, second], abs=6e-5)
            assert sequences[name][first] + sequences[name][second] == row["residue_i"] + row["residue_j"]
    assert [row["contacts"] for row in proteins][2] == "0" and len(rows) > 50
    assert len(list((out / "pictures").glob("*.png"))) == 2
    summary = json.loads((out / "summary.json").read_text())
    assert (summary["proteins"], summary["in_windows"], summary["window"], summary["precision"]) == (3, 1, 100, [])


def test_predictions_are_compared_with_structures(there: Path, job: Job, tmp_path: Path) -> None:
    usual = (f"model={there}/fitted.nemo", f"input={there}/s.parquet", "threshold=0")
    code, told, _ = job("contacts", *usual, f"output={tmp_path}/out", "pictures=1")
    assert code == 0 and "Precision over 6 structures" in told and "best possible" in told
    assert "left out of the precision: 4 that" in told
    summary = json.loads((tmp_path / "out" / "summary.json").read_text())
    assert (summary["structures_fitted_on"], summary["precision"][0]["proteins"]) == (4, 6)
    assert len(summary["best_possible"]) == len(summary["precision"])
    assert {(row["range"], row["top"]) for row in summary["precision"]} >= {("short", "P@L"), ("long", "P@L/5")}
    structures = {structure.id: structure for structure in read_structures(str(there / "s.parquet"))}
    with (tmp_path / "out" / "contacts.csv").open(newline="") as stream:
        for row in list(csv.DictReader(stream))[:500]:
            distance = structures[row["id"]].distances_from()[int(row["i"]) - 1, int(row["j"]) - 1]
            assert row["distance"] == ("" if np.isnan(distance) else f"{distance:.2f}")


def test_interrupted_job_resumes_to_the_same_bytes(
    there: Path, job: Job, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    usual = (f"model={there}/fitted.nemo", f"input={there}/s.parquet", "batch_tokens=100", "pictures=1")
    assert job("contacts", *usual, f"output={tmp_path}/whole")[0] == 0
    write, written = contact_folder.WorkFolder.write_map, []

    def dying(self: contact_folder.WorkFolder, name: str, found: object) -> None:
        if len(written) == 4:
            raise KeyboardInterrupt
        written.append(name)
        write(self, name, found)  # type: ignore[arg-type]

    monkeypatch.setattr(contact_folder.WorkFolder, "write_map", dying)
    code, _, error = job("contacts", *usual, f"output={tmp_path}/out")
    assert code == 130 and "the same command goes on" in error and not (tmp_path / "out").exists()

    def noting(self: contact_folder.WorkFolder, name: str, found: object) -> None:
        written.append(name)
        write(self, name, found)  # type: ignore[arg-type]

    monkeypatch.setattr(contact_folder.WorkFolder, "write_map", noting)
    (tmp_path / ".out.partial" / "maps" / ".s1.npz.abc.partial").write_bytes(b"half")
    code, _, error = job("contacts", *usual, "window=50", f"output={tmp_path}/out")
    assert code == 2 and "job with another window and overlap;" in error
    other = reconfigured(there / "fitted.nemo", there / "other.nemo", layernorm_epsilon=1e-4)
    code, _, error = job("contacts", f"model={other}", *usual[1:], f"output={tmp_path}/out")
    assert code == 2 and "job with another model;" in error
    code, told, _ = job("contacts", *usual, f"output={tmp_path}/out")
    assert code == 0 and "4 proteins are there already" in told
    assert len(written) == len(set(written)) == 10
    folders = (tmp_path / "whole", tmp_path / "out")
    files = [sorted(path.relative_to(base) for path in base.rglob("*")) for base in folders]
    assert files[0] == files[1]
    for path in files[0]:
        first, second = tmp_path / "whole" / path, tmp_path / "out" / path
        assert first.is_dir() or first.read_bytes() == second.read_bytes(), path
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out", "whole"]


def test_two_processes_cannot_write_to_one_output(there: Path, job: Job, tmp_path: Path) -> None:
    with hold_output("output", tmp_path / "out"):
        code, _, error = job("contacts", f"model={there}/fitted.nemo", f"input={there}/p.csv", f"output={tmp_path}/out")
    assert code == 2 and "another process is writing" in error
    with hold_output("output", tmp_path / "x.nemo"):
        usual = (f"model={there}/m.nemo", f"structures={there}/s.parquet")
        code, _, error = job("fit_contacts", *usual, f"output={tmp_path}/x.nemo")
    assert code == 2 and "another process is writing" in error


def test_memory_for_a_long_protein_stays_within_the_estimate(there: Path, job: Job, tmp_path: Path) -> None:
    residues = 3000
    (tmp_path / "long.fasta").write_text(f">long\n{'MKTAYIAKQR' * (residues // 10)}\n")
    usual = (f"model={there}/fitted.nemo", f"input={tmp_path}/long.fasta", "threshold=1", "batch_tokens=200")
    (tmp_path / "short.fasta").write_text(">short\nMKTAYIAKQR\n")
    short = (usual[0], f"input={tmp_path}/short.fasta", f"output={tmp_path}/first")
    assert job("contacts", *short)[0] == 0  # imports are no memory of a protein
    tracemalloc.start()
    try:
        assert job("contacts", *usual, f"output={tmp_path}/out")[0] == 0
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert (tmp_path / "out" / "pictures" / "long.png").exists()
    assert peak < map_bytes(residues) + 60e6, f"{peak / 1e6:.0f} MB"


def test_map_beyond_memory_is_refused_before_the_model_is_loaded(
    there: Path, job: Job, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sysconf = os.sysconf
    monkeypatch.setattr(os, "sysconf", lambda name: 20 if name == "SC_PHYS_PAGES" else sysconf(name))
    usual = (f"model={there}/fitted.nemo", f"input={there}/p.fasta", f"output={tmp_path}/out")
    code, _, error = job("contacts", *usual)
    assert code == 2 and "1ubq_a has 150 residues; its map takes 0.0 GB of memory, more than the" in error


def test_large_map_is_drawn_in_blocks_that_keep_every_contact() -> None:
    """A block has the highest probability of its pairs. It is unknown only if all of its pairs are unknown."""
    found_RR = np.full((2500, 2500), np.nan, dtype=np.float32)
    found_RR[:1500, :1500] = 0.1
    found_RR[10, 1401] = found_RR[1401, 10] = 0.9
    pixels = figures._in_blocks(found_RR, 6, None, 8.0, 3)
    assert pixels.probabilities.shape == (834, 834)
    assert np.argwhere(pixels.probabilities > 0.5).tolist() == [[3, 467], [467, 3]]
    assert np.isnan(pixels.probabilities[0, 0]) and not pixels.unseen[0, 0]
    assert pixels.unseen[0, 600] and not pixels.unseen[0, 400]
    whole = figures._in_blocks(found_RR[:90, :90], 6, walk("w", np.full(90, 5, dtype=np.uint8), 1), 8.0, 1)
    structure = walk("w", np.full(90, 5, dtype=np.uint8), 1)
    apart = np.arange(90)[None, :] - np.arange(90)[:, None]
    assert np.array_equal(whole.touching, structure.contacts() & (apart <= -6))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (("model={there}/m.nemo",), "has no contact head; fit one"),
        (("input=nowhere.fasta",), "nowhere.fasta"),
        (("output={there}",), "exists already"),
        (("max_residues=100",), "1ubq_a has 150 residues, over max_residues=100"),
        (("long_proteins=error",), "1ubq_a has 150 residues, over the window of 100"),
        (("long_proteins=truncate",), "long_proteins must be one of windows, error"),
        (("threshold=2",), "threshold must be at most 1"),
        (("overlap=100",), "overlap must be from 0 to below the window"),
        (("pictures=-1",), "pictures must not be negative"),
    ],
    ids=lambda value: value[0] if isinstance(value, tuple) else "",
)
def test_invalid_prediction_ends_with_one_line_and_no_output(
    there: Path, job: Job, tmp_path: Path, settings: tuple[str, ...], message: str
) -> None:
    usual = (f"model={there}/fitted.nemo", f"input={there}/p.fasta", f"output={tmp_path}/out")
    code, _, error = job("contacts", *usual, *(text.format(there=there) for text in settings))
    assert code == 2 and message in error and error.count("\n") == 1
    assert list(tmp_path.iterdir()) == []


def test_structures_that_share_a_sequence_with_the_fit_are_not_evaluated(there: Path, job: Job, tmp_path: Path) -> None:
    listed = ArchiveFile.open(there / "fitted.nemo").provenance["contact_head"]["fitted_on"]
    structures = read_structures(str(there / "s.parquet"))
    twin = next(structure for structure in structures if structure.id == listed[0])
    other = next(structure for structure in structures if structure.id not in listed)
    as_table([twin, replace(twin, id="twin")], tmp_path / "a.parquet")
    as_table([replace(other, id="other")], tmp_path / "b.parquet")
    inputs = f"input=[{tmp_path}/a.parquet,{tmp_path}/b.parquet]"
    code, told, _ = job("contacts", f"model={there}/fitted.nemo", inputs, f"output={tmp_path}/out", "pictures=0")
    assert code == 0 and "precision: 2 that" in told and "Precision over 1 structure:" in told
    code, _, error = job(
        "contacts", f"model={there}/fitted.nemo", f"{inputs[:-1]},{there}/p.fasta]", f"output={tmp_path}/b"
    )
    assert code == 2 and "p.fasta holds no structures, of which alone there may be a list" in error


def test_empty_contact_table_reports_the_highest_probability(there: Path, job: Job, tmp_path: Path) -> None:
    usual = (f"model={there}/fitted.nemo", "pictures=0")
    code, told, _ = job("contacts", *usual, f"input={there}/p.csv", f"output={tmp_path}/out", "threshold=1")
    summary = json.loads((tmp_path / "out" / "summary.json").read_text())
    highest = 0.0
    for path in (tmp_path / "out" / "maps").glob("*.npz"):
        with np.load(path) as file:
            found = file["probabilities"]
        highest = max([highest, *found[np.triu_indices(len(found), 6)].tolist()])
    assert code == 0 and f"Found: 0 pairs reach threshold=1; the surest of all is {highest:.2f}" in told
    assert (summary["pairs"], summary["highest_probability"]) == (0, pytest.approx(highest, abs=1e-6))
    (tmp_path / "short.csv").write_text("id,sequence\na,MKV\n")
    code, told, _ = job("contacts", *usual, f"input={tmp_path}/short.csv", f"output={tmp_path}/short")
    assert code == 0 and "Read 1 protein, 3 residues" in told and "0 pairs reach threshold=0.3\n" in told


@pytest.mark.slow
def test_killed_job_leaves_no_output_under_the_final_name(there: Path, tmp_path: Path) -> None:
    lines = [f">p{n}\n{'MKVLAGSTWE' * 30}\n" for n in range(400)]
    (tmp_path / "p.fasta").write_text("".join(lines))
    shutil.copy(there / "fitted.nemo", tmp_path / "m.nemo")
    script = tmp_path / "job.py"
    script.write_text(
        f"import sys; sys.path.insert(0, {str(ROOT / 'tests')!r})\n"
        "from test_contacts_command import configured, predict_contacts\n"
        f"predict_contacts(configured('contacts', 'model={tmp_path}/m.nemo', 'input={tmp_path}/p.fasta', "
        f"'output={tmp_path}/out', 'pictures=0'))\n"
    )
    process = subprocess.Popen([sys.executable, str(script)], env=os.environ | {"OMP_NUM_THREADS": "1"})
    maps = tmp_path / ".out.partial" / "maps"
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline and len(list(maps.glob("*.npz"))) < 5:
        time.sleep(0.02)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert not (tmp_path / "out").exists() and list(maps.glob("*.npz"))
    for path in maps.glob("[!.]*.npz"):
        with np.load(path) as file:
            assert file["probabilities"].shape == (300, 300)


def test_contact_settings_are_parsed() -> None:
    fit = load_fit_config(configured("fit_contacts", "model=m", "structures=[a.cif,b.cif]", "output=x.nemo", "chain=1"))
    assert (fit.structures, fit.chain, fit.train, fit.C) == (("a.cif", "b.cif"), "1", 20, 0.15)
    contacts = load_contacts_config(configured("contacts", "model=m", "input=-", "output=x"))
    assert (contacts.input, contacts.window, contacts.bad_records) == (("-",), None, "error")
    assert contacts_job.Subject("a", np.zeros(3, dtype=np.uint8), None).residues == 3
