"""The summary of a store: its numbers against the sequences, and its text when values are missing."""

from __future__ import annotations

import json
import subprocess
import sys
import tracemalloc
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
import pytest
from matplotlib import image
from numpy.typing import NDArray

from bionemo_esm.alphabet import encode
from bionemo_esm.data import store_summary as card_module
from bionemo_esm.data.store import SPLITS, ProteinStore, StoreWriter
from bionemo_esm.data.store_summary import CONTEXTS, SplitStatistics, StoreSummary, draw_summary

README_MEDIANS = {"train": 302, "validation": 254, "test": 337}  # from bionemo_esm/data/sample/README.md
README_UNIGRAM = 18.25  # of the validation split


@pytest.fixture(scope="module")
def sample_card(sample_store: ProteinStore) -> StoreSummary:
    return StoreSummary.of(sample_store)


def store_of(folder: Path, sequences: Mapping[str, Sequence[NDArray[np.uint8]]], **manifest: Any) -> ProteinStore:
    with StoreWriter(folder) as writer:
        for name, proteins in sequences.items():
            for protein in proteins:
                writer.add(name, protein)
        writer.finish(manifest)
    return ProteinStore.open(folder)


def counted(lengths: Sequence[int], residue_counts: NDArray[np.int64] | None = None) -> SplitStatistics:
    distinct, counts = np.unique(np.array(lengths, np.int64), return_counts=True)
    return SplitStatistics(distinct, counts, np.zeros(33, np.int64) if residue_counts is None else residue_counts)


@pytest.mark.parametrize("name", SPLITS)
def test_length_statistics_equal_those_of_the_sequences(
    sample_store: ProteinStore, sample_card: StoreSummary, name: str
) -> None:
    lengths, split = sample_store.split(name).lengths, sample_card.splits[name]
    assert (split.sequences, split.residues) == (lengths.size, lengths.sum())
    assert split.mean == pytest.approx(lengths.mean())
    assert split.percentile(50) == README_MEDIANS[name]
    for percent in (0, 5, 25, 50, 75, 95, 100):
        assert split.percentile(percent) == np.percentile(lengths, percent, method="higher")


def test_lengths_counted_in_blocks_are_merged(sample_store: ProteinStore, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(card_module, "_BLOCK", 7)
    split = SplitStatistics.of(sample_store.split("train"))
    lengths, counts = np.unique(sample_store.split("train").lengths, return_counts=True)
    assert (split.lengths.tolist(), split.counts.tolist()) == (lengths.tolist(), counts.tolist())


@pytest.mark.parametrize("tokens", CONTEXTS)
def test_cropping_and_padding_include_the_two_special_tokens(
    sample_store: ProteinStore, sample_card: StoreSummary, tokens: int
) -> None:
    lengths, split = sample_store.split("train").lengths, sample_card.splits["train"]
    batch = np.minimum(lengths + 2, tokens)
    assert split.share_cropped(tokens) == pytest.approx((lengths + 2 > tokens).mean())
    assert split.padding_waste(tokens) == pytest.approx(1 - batch.sum() / (tokens * lengths.size))


def test_sequence_that_just_fits_is_neither_cropped_nor_padded() -> None:
    fits, longer = counted([510]), counted([511])
    assert (fits.share_cropped(512), fits.padding_waste(512)) == (0.0, 0.0)
    assert (longer.share_cropped(512), longer.padding_waste(512)) == (1.0, 0.0)


def test_composition_gives_each_standard_residue_and_the_sum_of_rare_ones(tmp_path: Path) -> None:
    card = StoreSummary.of(store_of(tmp_path / "store", {"train": [encode("LLLLAAGX"), encode("UO")]}))
    shares = card.splits["train"].composition()
    assert (shares["L"], shares["A"], shares["G"], shares["W"]) == (0.4, 0.2, 0.1, 0.0)
    assert shares["other"] == pytest.approx(0.3)
    assert sum(shares.values()) == pytest.approx(1.0)


def test_unigram_perplexity_uses_train_frequencies_and_matches_the_readme(sample_card: StoreSummary) -> None:
    train, validation = sample_card.splits["train"], sample_card.splits["validation"]
    assert validation.unigram_perplexity(train) == pytest.approx(README_UNIGRAM, abs=0.005)
    uniform = np.zeros(33, np.int64)
    uniform[4:24] = 10**9
    assert counted([20 * 10**9], uniform).unigram_perplexity(counted([20 * 10**9], uniform)) == pytest.approx(20.0)


def test_text_describes_every_split_and_its_source(tmp_path: Path, sample_store: ProteinStore) -> None:
    proteins = [sample_store.split("train")[i] for i in range(3)]
    manifest: dict[str, Any] = {
        "source": [{"split": "train", "file": "a.fasta.gz", "bytes": 1234567, "sha256": "0123456789abcdef" * 4}],
        "release": "UniRef50 2022_05",
        "licence": "CC BY 4.0",
        "policy": {"max_residues": 1024, "seed": 0, "test_sequences": None},
        "counts": {"records_read": 54321, "dropped_empty": 0, "dropped_duplicate": 7, "truncated": 0},
        "command": "bionemo-esm data build",
    }
    card = StoreSummary.of(store_of(tmp_path / "store", {"train": proteins}, **manifest))
    text = card.text()
    assert text.startswith("UniRef50 2022_05\n3 proteins, ")
    assert "a.fasta.gz (train), 1,234,567 bytes, SHA-256 0123456789ab…" in text
    assert "max residues 1,024, seed 0, test sequences null" in text
    assert "records read 54,321, dropped duplicate 7\n" in text
    assert "bionemo-esm data build" in text
    assert str(card.manifest["splits"]["train"]["bin_sha256"])[:12] in text
    assert "CC BY 4.0" in text


def test_text_has_aligned_columns_and_fits_one_page(sample_card: StoreSummary) -> None:
    lines = sample_card.text().splitlines()
    assert 30 <= len(lines) <= 55
    assert max(map(len, lines)) <= 120
    rows = [line for line in lines if line.startswith(("sequences", "residues  ", "  median", "unigram"))]
    assert len(rows) == 4
    assert {len(row) for row in rows} == {80}
    assert rows[0].split() == ["sequences", "2,600", "200", "200"]
    assert rows[1].split() == ["residues", "908,430", "64,181", "77,237"]


@pytest.mark.parametrize("manifest", [{}, {"source": "by hand", "policy": [], "counts": 3, "splits": {}, "release": 5}])
def test_missing_manifest_values_are_shown_as_not_recorded(
    sample_card: StoreSummary, manifest: dict[str, Any], tmp_path: Path
) -> None:
    card = StoreSummary("handmade", manifest, sample_card.splits)
    text = card.text()
    for key in ("licence", "built by", "policy"):
        assert f"{key:<26}not recorded" in text
    assert text.count("not recorded") >= 9  # including the hashes of six files
    json.dumps(card.to_dict())
    assert draw_summary(card, tmp_path / "card.png").is_file()


def test_clusters_are_shown_only_if_they_differ_from_sequences(sample_card: StoreSummary) -> None:
    assert "clusters" not in sample_card.text()
    entries = {name: {"clusters": 10} for name in SPLITS}
    clustered = StoreSummary("clustered", {"splits": entries}, sample_card.splits)
    assert any(line.split() == ["clusters", "10", "10", "10"] for line in clustered.text().splitlines())


def test_dictionary_is_valid_json_with_the_numbers_of_the_text(sample_card: StoreSummary) -> None:
    told = json.loads(json.dumps(sample_card.to_dict(), allow_nan=False))
    train = told["splits"]["train"]
    assert (told["sequences"], train["sequences"], train["residues"]) == (3000, 2600, 908430)
    assert train["length_residues"]["median"] == 302
    assert set(train["padding_waste"]) == {"512_tokens", "1024_tokens"}
    assert sum(train["residue_counts"].values()) == 908430
    assert told["manifest"]["format_version"] == sample_card.manifest["format_version"]


@pytest.mark.parametrize(
    "lengths",
    [{}, {"train": [1]}, {"train": [300], "test": [45_000]}, {"test": [250, 251]}],
    ids=["empty", "one residue", "45,000 residues", "no train"],
)
def test_unusual_stores_have_a_summary_and_a_picture(lengths: dict[str, list[int]], tmp_path: Path) -> None:
    sequences = {name: [np.full(n, 5, np.uint8) for n in sizes] for name, sizes in lengths.items()}
    card = StoreSummary.of(store_of(tmp_path / "store", sequences))
    assert "–" in card.text()  # for empty splits
    json.dumps(card.to_dict(), allow_nan=False)
    pixels = image.imread(draw_summary(card, tmp_path / "card.png"))
    assert pixels.shape[:2] == (1066, 1500)


def test_picture_does_not_depend_on_matplotlib_settings(
    sample_store: ProteinStore, sample_card: StoreSummary, tmp_path: Path
) -> None:
    first = draw_summary(sample_card, tmp_path / "first.png").read_bytes()
    with matplotlib.rc_context({"font.size": 30.0, "axes.facecolor": "red", "savefig.dpi": 20}):
        second = draw_summary(sample_store, tmp_path / "second.png").read_bytes()
        assert matplotlib.rcParams["font.size"] == 30.0
    assert first == second
    assert b"Software" not in first
    assert sorted(path.name for path in tmp_path.iterdir()) == ["first.png", "second.png"]


def test_picture_shows_train_and_held_out_in_their_colours(sample_card: StoreSummary, tmp_path: Path) -> None:
    def shows(card: StoreSummary, colour: tuple[int, int, int]) -> bool:
        pixels = np.round(255 * image.imread(draw_summary(card, tmp_path / "card.png"))[..., :3]).astype(int)
        return bool((pixels == colour).all(axis=-1).any())

    train, held_out = (0xB5, 0xCD, 0xE6), (0xF0, 0xC8, 0xAB)
    assert shows(sample_card, train)
    assert shows(sample_card, held_out)
    alone = {name: split if name == "train" else counted([]) for name, split in sample_card.splits.items()}
    assert not shows(StoreSummary("train only", {}, alone), held_out)


def test_failed_picture_keeps_the_old_one(sample_card: StoreSummary, tmp_path: Path) -> None:
    old = draw_summary(sample_card, tmp_path / "card.png").read_bytes()
    broken = StoreSummary("broken", {}, {})
    with pytest.raises(KeyError):
        draw_summary(broken, tmp_path / "card.png")
    assert [path.name for path in tmp_path.iterdir()] == ["card.png"]
    assert (tmp_path / "card.png").read_bytes() == old


@pytest.mark.parametrize("module", ["store_summary", "leakage"])
def test_module_imports_neither_torch_nor_matplotlib(module: str) -> None:
    program = f"import sys, bionemo_esm.data.{module}; print(*{{'torch', 'nemo', 'matplotlib'}} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == ""


def test_millions_of_lengths_are_counted_in_bounded_memory() -> None:
    class Many:
        lengths = np.random.default_rng(0).integers(30, 40_000, 20_000_000, dtype=np.int32)

        def __len__(self) -> int:
            return self.lengths.size

        def residue_counts(self) -> NDArray[np.int64]:
            return np.zeros(33, np.int64)

    many = Many()
    tracemalloc.start()
    card = SplitStatistics.of(many)  # type: ignore[arg-type]
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert card.sequences == 20_000_000
    assert card.residues == int(many.lengths.sum(dtype=np.int64))
    assert peak < 60e6
