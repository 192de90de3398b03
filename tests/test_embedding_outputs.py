"""Embedding files: exact round trips in every format, equal bytes for equal input, and joined parts."""

from __future__ import annotations

import json
import resource
import signal
import tracemalloc
from collections.abc import Callable, Iterator
from pathlib import Path

import h5py
import numpy as np
import pandas as pd
import pytest

from bionemo_esm.alphabet import encode
from bionemo_esm.errors import ConfigError
from bionemo_esm.inference.embedding.formats import (
    FORMATS,
    EmbeddingFileError,
    Hdf5Format,
    format_named,
    format_of,
    group_name,
    read_about,
    read_embeddings,
)
from bionemo_esm.inference.embedding.options import Embedding
from bionemo_esm.inference.embedding.work_folder import WorkError, WorkFolder, cut
from bionemo_esm.inference.inputs import Protein

ABOUT = {"model": "ESM-1nv", "layers": [0, 2], "window": 510, "overlap": None, "weights_sha256": "0" * 64}
ODD_IDS = ["sp|P12345|A_HUMAN", "a/b/c", ".", "..", "50%", "%2F", "größe-蛋白", "two words", "id", "a" * 300, "mean_2"]
KINDS = ["hdf5", "npz", "parquet"]


def made(ids: list[str], dtype: str = "float32", perplexity: bool = True, first: int = 0) -> list[Embedding]:
    """Return random embeddings of proteins with 1, 2, 3, ... residues; the third has two residues read."""
    numbers = np.random.default_rng(first)
    embeddings = []
    for index, identifier in enumerate(ids):
        residues, read = index + 1, min(index + 1, 2) if index == 2 else index + 1
        shapes = {"mean_0": (8,), "mean_2": (8,), "cls_2": (8,), "residues_2": (read, 8), "logits": (read, 33)}
        arrays = {name: numbers.normal(size=shape).astype(dtype) for name, shape in shapes.items()}
        value = float(numbers.uniform(1, 20)) if perplexity else None
        embeddings.append(Embedding(identifier, residues, read, 1 + index % 2, arrays, value))
    return embeddings


def equal(one: Embedding, other: Embedding) -> bool:
    return (
        one[:4] == other[:4]
        and one.pseudo_perplexity == other.pseudo_perplexity
        and one.arrays.keys() == other.arrays.keys()
        and all(
            array.dtype == other.arrays[name].dtype and np.array_equal(array, other.arrays[name])
            for name, array in one.arrays.items()
        )
    )


def written(folder: Path, kind: str, embeddings: list[Embedding], is_folder: bool = False, each: int = 4) -> Path:
    """Write a finished output from parts of `each` proteins."""
    output = folder / ("parts" if is_folder else f"whole{format_named(kind).suffix}")
    work = WorkFolder(output, kind, is_folder)
    with work.held():
        parts = [embeddings[begin : begin + each] for begin in range(0, len(embeddings), each)]
        for number, part in enumerate(parts):
            work.write(number, ABOUT, part)
        assert work.finish(len(parts), ABOUT)
    assert [path.name for path in folder.iterdir()] == [output.name]
    return output


@pytest.mark.parametrize("dtype", ["float32", "float16"])
@pytest.mark.parametrize("is_folder", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_embeddings_are_read_back_in_order_bit_for_bit(tmp_path: Path, kind: str, is_folder: bool, dtype: str) -> None:
    embeddings = made(ODD_IDS, dtype)
    output = written(tmp_path, kind, embeddings, is_folder)
    found = list(read_embeddings(output))
    assert [embedding.id for embedding in found] == ODD_IDS
    assert all(map(equal, found, embeddings))
    assert read_about(output) == ABOUT


@pytest.mark.parametrize("kind", KINDS)
def test_outputs_with_means_only_are_read_back(tmp_path: Path, kind: str) -> None:
    embeddings = [
        embedding._replace(arrays={"mean_2": embedding.arrays["mean_2"]})
        for embedding in made(ODD_IDS, perplexity=False)
    ]
    assert all(map(equal, read_embeddings(written(tmp_path, kind, embeddings)), embeddings))


@pytest.mark.parametrize("kind", KINDS)
def test_many_rows_are_read_back_exactly(tmp_path: Path, kind: str) -> None:
    """Read more rows than one batch of the reader, with lists at varied offsets."""
    embeddings = made([f"protein{number}" for number in range(150)])
    assert all(map(equal, read_embeddings(written(tmp_path, kind, embeddings, each=101)), embeddings))


@pytest.mark.parametrize("is_folder", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_equal_embeddings_give_equal_bytes(
    tmp_path: Path, kind: str, is_folder: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    outputs = []
    for day in (1, 2):
        monkeypatch.setattr("time.time", lambda day=day: 86400.0 * 9000 * day)
        (tmp_path / str(day)).mkdir()
        outputs.append(written(tmp_path / str(day), kind, made(ODD_IDS), is_folder))
    if is_folder:
        one, other = ({path.name: path.read_bytes() for path in output.iterdir()} for output in outputs)
        assert one == other
    else:
        assert outputs[0].read_bytes() == outputs[1].read_bytes()


def test_files_open_in_other_libraries_as_documented(tmp_path: Path) -> None:
    embeddings = made(ODD_IDS)
    for name in KINDS:
        (tmp_path / name).mkdir()
    with h5py.File(written(tmp_path / "hdf5", "hdf5", embeddings)) as file:
        assert list(file) == [group_name(identifier) for identifier in ODD_IDS]
        assert file["a%2Fb%2Fc"].attrs["id"] == "a/b/c"
        assert file["%2E"].attrs["residues"] == 3
        np.testing.assert_array_equal(file["two words/residues_2"], embeddings[7].arrays["residues_2"])
    table = pd.read_parquet(written(tmp_path / "parquet", "parquet", embeddings)).set_index("id")
    np.testing.assert_array_equal(np.stack(table["mean_2"]), [entry.arrays["mean_2"] for entry in embeddings])
    np.testing.assert_array_equal(np.stack(table.loc["two words", "residues_2"]), embeddings[7].arrays["residues_2"])
    with np.load(written(tmp_path / "npz", "npz", embeddings)) as archive:
        begin, end = archive["offset"][7:9]
        assert archive["id"].tolist() == ODD_IDS
        assert archive["mean_2"].shape == (len(ODD_IDS), 8)
        np.testing.assert_array_equal(archive["residues_2"][begin:end], embeddings[7].arrays["residues_2"])


def test_the_manifest_of_a_folder_describes_its_parts(tmp_path: Path) -> None:
    output = written(tmp_path, "parquet", made(ODD_IDS), is_folder=True)
    manifest = json.loads((output / "manifest.json").read_text())
    assert (manifest["proteins"], manifest["residues"], manifest["about"]) == (11, 66, ABOUT)
    assert [part["file"] for part in manifest["parts"]] == [f"part-0000{number}.parquet" for number in range(3)]
    assert [part["proteins"] for part in manifest["parts"]] == [4, 4, 3]


def test_the_format_follows_from_the_file_name() -> None:
    assert format_of(Path("a.H5"), None) == ("hdf5", False)
    assert format_of(Path("a.hdf5"), "hdf5") == ("hdf5", False)
    assert format_of(Path("a.npz"), None) == ("npz", False)
    assert format_of(Path("embeddings"), None) == ("parquet", True)
    assert format_of(Path("v1.2"), "npz") == ("npz", True)
    with pytest.raises(ConfigError, match=r"format=npz: .*a\.h5 ends as hdf5"):
        format_of(Path("a.h5"), "npz")
    with pytest.raises(ConfigError, match="format must be one of hdf5, npz, parquet, or null, not 'csv'"):
        format_of(Path("a"), "csv")


def test_an_input_is_split_by_proteins_and_by_bytes() -> None:
    lengths = [3, 3, 3, 50, 1, 1, 1, 1, 1]
    proteins = [Protein(str(number), encode("A" * length), number) for number, length in enumerate(lengths)]
    parts = list(cut(iter(proteins), 4, 100, lambda residues: residues * 10))
    assert [[protein.residues for protein in part] for part in parts] == [[3, 3, 3], [50], [1, 1, 1, 1], [1]]


@pytest.mark.parametrize("kind", KINDS)
def test_damaged_files_are_refused_with_their_name(tmp_path: Path, kind: str) -> None:
    output = written(tmp_path, kind, made(ODD_IDS))
    content = output.read_bytes()
    output.write_bytes(content[: len(content) // 2])
    with pytest.raises(EmbeddingFileError, match=output.name):
        list(read_embeddings(output))
    output.write_bytes(b"nothing of the kind")
    with pytest.raises(EmbeddingFileError, match="neither HDF5, Parquet nor NPZ"):
        list(read_embeddings(output))
    with pytest.raises(EmbeddingFileError, match="cannot be opened"):
        list(read_embeddings(tmp_path / "absent"))


def test_a_manifest_cannot_name_files_outside_its_folder(tmp_path: Path) -> None:
    (tmp_path / "manifest.json").write_text(json.dumps({"about": {}, "parts": [{"file": "../secret.npz"}]}))
    with pytest.raises(EmbeddingFileError, match="names files elsewhere"):
        list(read_embeddings(tmp_path))


def test_an_array_of_python_objects_is_not_unpickled(tmp_path: Path) -> None:
    np.savez(tmp_path / "evil.npz", id=np.array([{}], dtype=object), about=np.array("{}"), offset=np.zeros(1))
    with pytest.raises(EmbeddingFileError, match="it holds Python objects"):
        list(read_embeddings(tmp_path / "evil.npz"))


@pytest.fixture
def small_disk() -> Iterator[Callable[[int], None]]:
    """Return a function that limits the size of every file to a number of bytes."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)

    def limit(size: int) -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))

    yield limit
    resource.setrlimit(resource.RLIMIT_FSIZE, before)
    signal.signal(signal.SIGXFSZ, handler)


@pytest.mark.parametrize("is_folder", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_a_full_disk_leaves_no_partial_file_and_keeps_finished_parts(
    tmp_path: Path, kind: str, is_folder: bool, small_disk: Callable[[int], None]
) -> None:
    output = tmp_path / ("parts" if is_folder else f"whole{format_named(kind).suffix}")
    work = WorkFolder(output, kind, is_folder)
    embeddings = made([f"protein{number}" for number in range(120)])
    with work.held():
        work.write(0, ABOUT, embeddings[:3])
        small_disk(60_000)
        with pytest.raises(WorkError, match="make room, and run the same command again"):
            work.write(1, ABOUT, embeddings[3:])
    assert not output.exists()
    assert list(work.records()) == [0]
    assert work.is_intact(0, work.records()[0])
    small_disk(resource.RLIM_INFINITY)
    with work.held():
        work.write(1, ABOUT, embeddings[3:])
        small_disk(60_000)
        if not is_folder:
            with pytest.raises(WorkError, match="make room"):
                work.finish(2, ABOUT)
            assert not output.exists()
        small_disk(resource.RLIM_INFINITY)
        assert work.finish(2, ABOUT)
    assert all(map(equal, read_embeddings(output), embeddings))


def test_a_disk_that_fills_up_when_hdf5_closes_is_an_error(tmp_path: Path, small_disk: Callable[[int], None]) -> None:
    """HDF5 writes most of a file's metadata when it closes the file."""
    with (tmp_path / "a.h5").open("w+b") as stream:

        def batches() -> Iterator[list[Embedding]]:
            yield made(["a"])
            small_disk(100)

        with pytest.raises(OSError, match="File too large"):
            Hdf5Format().write(stream, ABOUT, batches())


def test_a_modified_part_is_computed_again(tmp_path: Path) -> None:
    work = WorkFolder(tmp_path / "a.npz", "npz", False)
    with work.held():
        work.write(0, ABOUT, made(["a"]))
        content = bytearray(work.part(0).read_bytes())
        content[-100] ^= 1
        work.part(0).write_bytes(content)
        assert not work.is_intact(0, work.records()[0])
        assert not work.records()
        assert not work.finish(1, ABOUT)


def test_a_work_folder_with_foreign_files_is_refused(tmp_path: Path) -> None:
    work = WorkFolder(tmp_path / "a.npz", "npz", False)
    work.folder.mkdir()
    (work.folder / "thesis.txt").write_text("years of work")
    with pytest.raises(ConfigError, match=r"not ours: it holds thesis\.txt"), work.held():
        pass
    assert (work.folder / "thesis.txt").exists()


@pytest.mark.parametrize("kind", KINDS)
def test_memory_does_not_grow_with_the_number_of_parts(tmp_path: Path, kind: str) -> None:
    def peak(parts: int) -> int:
        work = WorkFolder(tmp_path / f"whole{format_named(kind).suffix}", kind, False)
        with work.held():
            for number in range(parts):
                work.write(number, ABOUT, made([f"{number}-{index}" for index in range(100)], first=number))
            tracemalloc.start()
            assert work.finish(parts, ABOUT)
            seen = tracemalloc.get_traced_memory()[1]
            tracemalloc.stop()
        work.output.unlink()
        return seen

    peak(1)
    assert peak(12) < 1.5 * peak(3)


PLUGIN = """
import json
import numpy as np
from bionemo_esm.inference.embedding.formats import EmbeddingFormat
from bionemo_esm.inference.embedding.options import Embedding

class JsonLines(EmbeddingFormat):
    name, suffix = "jsonl", ".jsonl"

    def write(self, stream, about, batches):
        stream.write(json.dumps(about).encode() + b"\\n")
        for batch in batches:
            for one in batch:
                arrays = {name: array.tolist() for name, array in one.arrays.items()}
                stream.write(json.dumps([*one[:4], arrays, one.pseudo_perplexity]).encode() + b"\\n")

    def read(self, path):
        for line in path.read_text().splitlines()[1:]:
            *plain, arrays, perplexity = json.loads(line)
            yield Embedding(*plain, {name: np.array(rows, "float32") for name, rows in arrays.items()}, perplexity)

    def read_about(self, path):
        return json.loads(path.read_text().splitlines()[0])
"""


@pytest.mark.parametrize("is_folder", [False, True])
def test_an_installed_package_can_add_a_format(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, is_folder: bool
) -> None:
    """Install a module and metadata with an entry point, as pip does; nothing else names the format."""
    info = tmp_path / "site" / "jsonl_plugin-1.0.dist-info"
    info.mkdir(parents=True)
    (tmp_path / "site" / "jsonl_plugin.py").write_text(PLUGIN)
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: jsonl-plugin\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text("[bionemo_esm.embedding_writers]\n.jsonl = jsonl_plugin:JsonLines\n")
    monkeypatch.syspath_prepend(tmp_path / "site")
    monkeypatch.setattr(FORMATS, "_parts", dict(FORMATS._parts))
    monkeypatch.setattr(FORMATS, "_plugins_loaded", False)
    assert format_of(Path("a.JSONL"), None) == ("jsonl", False)
    (tmp_path / "out").mkdir()
    output = written(tmp_path / "out", "jsonl", made(ODD_IDS), is_folder)
    assert all(map(equal, read_embeddings(output), made(ODD_IDS)))
    assert read_about(output) == ABOUT
