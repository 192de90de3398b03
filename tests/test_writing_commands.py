"""What every command that writes guarantees: it holds its output from the start, and modes follow the umask."""

from __future__ import annotations

import os
import re
import shutil
import stat
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

import pytest

from bionemo_esm.__main__ import COMMANDS, main
from bionemo_esm.alphabet import encode
from bionemo_esm.data.preprocess import BuildPolicy, build_store
from bionemo_esm.files import hold_name
from bionemo_esm.model.archive import write_archive
from bionemo_esm.model.interchange.convert import export_model
from bionemo_esm.model.nemo_connector import describe
from conftest import needs_mmseqs
from fine_tuned import NUMBER, PROTEINS, fine_tuned
from finetuning_runs import QUICK, per_protein
from models import tiny_model
from runs import SMALL
from structures import as_table, walk

UMASK = 0o027
WITHOUT_OUTPUT = ("inspect", "doctor")
LABELS = "task=custom task.level=sequence task.kind=regression task.target_column=share data.train=shares.csv"

Run = Callable[[list[str]], tuple[int, str, str]]
"""Run a command; return its exit code, output and errors."""


class Writing(NamedTuple):
    """A command that writes, with relative paths; its output by the name that it holds, and the key of that name."""

    arguments: str
    output: str
    key: str = "output"

    @property
    def command(self) -> list[str]:
        return self.arguments.split()


WRITING = {
    "pretrain": Writing(
        " ".join(["pretrain", *SMALL, "trainer.max_steps=4", "exp_manager.exp_dir=new", "exp_manager.name=run"]),
        "new/run",
        "exp_manager.exp_dir",
    ),
    "preprocess": Writing("preprocess input=p.fasta split.validation=1 split.test=1 output=new/store", "new/store"),
    "check-leakage": Writing("check-leakage store --output new/pairs.tsv", "new/pairs.tsv", "--output"),
    "average": Writing("average checkpoints=averaging/* last=2 output=new/average.nemo", "new/average.nemo"),
    "convert": Writing("convert source=x.nemo target=new/exported", "new/exported", "target"),
    "convert, import": Writing("convert source=exported target=new/imported.nemo", "new/imported.nemo", "target"),
    "convert-legacy": Writing("convert-legacy old.nemo new/converted.nemo", "new/converted.nemo", "NEW.nemo"),
    "embed": Writing("embed model=x.nemo input=p.fasta output=new/e.h5", "new/e.h5"),
    "embed, folder": Writing("embed model=x.nemo input=p.fasta output=new/e", "new/e"),
    "evaluate": Writing("evaluate model=x.nemo input=p.fasta store=store output=new/e.json", "new/e.json"),
    "score": Writing("score model=x.nemo sequence=wt.fasta scan=true output=new/scores.csv", "new/scores.csv"),
    "fit-contacts": Writing(
        "fit-contacts model=x.nemo structures=structures.parquet train=3 most_pairs=500 output=new/fitted.nemo",
        "new/fitted.nemo",
    ),
    "contacts": Writing("contacts model=head.nemo input=p.fasta output=new/maps", "new/maps"),
    "finetune": Writing(
        " ".join(["finetune", *QUICK, LABELS, "model=x.nemo", "cache=cache", "output=new/tuned"]),
        "new/tuned",
    ),
    "predict": Writing("predict model=tuned.nemo input=p.fasta output=new/predicted.csv", "new/predicted.csv"),
}


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder with the inputs of all commands."""
    folder = tmp_path_factory.mktemp("writing")
    (folder / "p.fasta").write_text("".join(f">{name}\n{sequence}\n" for name, sequence in PROTEINS.items()))
    (folder / "wt.fasta").write_text(f">wild\n{PROTEINS['crambin']}\n")
    (folder / "averaging").mkdir()
    (folder / "averaging" / "none.nemo").touch()
    for path, sizes in (("x.nemo", {}), ("head.nemo", {"contact_head": True})):
        write_archive(folder / path, describe(tiny_model(**sizes)))
    fine_tuned(folder / "tuned.nemo", NUMBER)
    per_protein(folder, count=12)
    export_model(folder / "x.nemo", folder / "exported")
    build_store([folder / "p.fasta"], folder / "store", BuildPolicy())
    as_table(
        [walk(f"s{seed}", encode(PROTEINS["ubiquitin"].encode())[seed:], seed) for seed in range(6)],
        folder / "structures.parquet",
    )
    return folder


@pytest.fixture
def run(
    place: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> Iterator[Callable[..., tuple[int, str, str]]]:
    """Return a function that runs a command in this process, in the folder of inputs, under `UMASK`."""
    monkeypatch.chdir(place)

    def command(words: list[str]) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["bionemo-esm", *words])
        code = 0
        try:
            main()
        except SystemExit as end:
            code = int(end.code or 0)
        return code, *capfd.readouterr()

    before = os.umask(UMASK)
    yield command
    os.umask(before)


def test_every_command_is_in_the_table() -> None:
    assert {name.split(",")[0] for name in WRITING} == COMMANDS.keys() - set(WITHOUT_OUTPUT)


@pytest.mark.parametrize("name", WRITING)
def test_a_command_whose_output_another_process_writes_is_refused(name: str, run: Run, place: Path) -> None:
    writing = WRITING[name]
    with hold_name("another", Path(writing.output)):
        code, _, errors = run(writing.command)
        assert code == 2
        refusal = (
            rf"error: {writing.key}: another process is writing (/.*/)?{writing.output} \(process {os.getpid()} on "
        )
        assert re.match(refusal, errors), errors
    assert not (place / "new").exists(), "something is left"


@needs_mmseqs
def test_modes_of_all_outputs_follow_the_umask(run: Run, place: Path) -> None:
    """One test in the order of the table: `average` reads what `pretrain` wrote."""
    started = set(place.rglob("*"))
    for name, writing in WRITING.items():
        if name == "convert-legacy":  # needs an archive of NeMo 1; `test_legacy.py` makes some
            continue
        code, _, errors = run(writing.command)
        assert code == 0, f"{name}: {errors}"
        if name == "pretrain":
            shutil.rmtree(place / "averaging")
            shutil.copytree(place / "new" / "run" / "averaging", place / "averaging")
        for path in set(place.rglob("*")) - started:
            wanted = (0o777 if path.is_dir() else 0o666) & ~UMASK
            assert stat.S_IMODE(path.stat().st_mode) == wanted, f"{name} made {path} with other modes"
