"""`bionemo-esm inspect` on files and folders; models and stores have separate tests."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from bionemo_esm.inference.embedding.formats import format_named
from bionemo_esm.inference.embedding.options import Embedding
from bionemo_esm.inspect_command import main
from errors import refused

ABOUT = {"model": "ESM-1nv", "layers": [6], "proteins": 1}
EMBEDDING = Embedding("a", 3, 3, 1, {"mean_6": np.ones(4, np.float32)}, None)


def text(path: Path, content: str | bytes) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content if isinstance(content, bytes) else content.encode())


def embeddings(path: Path, kind: str) -> None:
    with path.open("wb") as stream:
        format_named(kind).write(stream, ABOUT, [[EMBEDDING]])


def contacts(path: Path) -> None:
    text(path / "maps" / "a.npz", b"")
    text(path / "contacts.csv", "")
    text(path / "summary.json", '{"proteins": 1, "threshold": 0.3}')


def hugging_face(path: Path) -> None:
    text(path / "config.json", '{"model_type": "esm", "hidden_size": 320}')


def run_folder(path: Path) -> None:
    text(path / "config.yaml", "name: laptop\n")
    text(path / "laptop.nemo", b"")
    text(path / "checkpoints" / "step=5.ckpt", b"")


def finetuning(path: Path) -> None:
    text(path / "config.yaml", "restore_from_path: x.nemo\ntask:\n  name: gb1\n")
    text(path / "model.nemo", b"")


@pytest.mark.parametrize(
    ("make", "name", "mentions"),
    [
        (lambda path: embeddings(path, "hdf5"), "x.h5", ["embeddings", "ESM-1nv", "layers"]),
        (lambda path: embeddings(path, "parquet"), "x.parquet", ["embeddings", "ESM-1nv"]),
        (lambda path: embeddings(path, "npz"), "x.npz", ["embeddings", "ESM-1nv"]),
        (contacts, "contacts", ["contacts", "threshold  0.3", "maps       1"]),
        (hugging_face, "my model", ["Hugging Face", "320", "convert 'source=", "target=my model.nemo'"]),
        (run_folder, "run", ["the folder of a run", "laptop.nemo", "step=5.ckpt"]),
        (finetuning, "tuned", ["the folder of a fine-tuning", "model.nemo"]),
    ],
)
def test_outputs_of_commands_are_described(
    make: Callable[[Path], None], name: str, mentions: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / name
    make(path)
    main([str(path)])
    shown = capsys.readouterr().out
    assert all(mention in shown for mention in mentions), shown
    main([str(path), "--json"])
    found = json.loads(capsys.readouterr().out)
    assert found["path"] == str(path)
    assert mentions[0] in found["kind"]


@pytest.mark.parametrize(
    ("name", "content", "mentions"),
    [
        ("x.fasta", ">a\nMKT\n", "is a FASTA file"),
        ("scores.csv", "mutant,score\nA1C,0\nü", "is a text file"),
        ("x.xlsx", b"PK\x03\x04", "is a zip archive"),
        ("x.csv.gz", b"\x1f\x8b\x08", "is a gzip file"),
        ("my x.pt", b"PK\x03\x04", "target=my x.nemo'"),
    ],
)
def test_a_file_of_another_kind_is_refused_with_its_format(
    name: str, content: str | bytes, mentions: str, tmp_path: Path
) -> None:
    text(tmp_path / name, content)
    with refused("inspect.foreign", tmp_path / name, mentions):
        main([str(tmp_path / name)])


def test_a_folder_of_another_kind_is_refused_with_its_contents(tmp_path: Path) -> None:
    text(tmp_path / "notes.txt", "")
    with refused("inspect.foreign", tmp_path, "it holds notes.txt"):
        main([str(tmp_path)])


def test_a_link_to_itself_is_refused(tmp_path: Path) -> None:
    (tmp_path / "loop").symlink_to("loop")
    with refused("inspect.absent", "a link to loop, which is not there"):
        main([str(tmp_path / "loop")])
