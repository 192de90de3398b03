"""Tests of fitting a contact head: features, regression, precision metrics and the archive."""

from __future__ import annotations

import weakref
from pathlib import Path

import esm
import numpy as np
import pytest
import torch
from sklearn.linear_model import LogisticRegression
from torch import Tensor
from transformers import EsmForMaskedLM

from bionemo_esm.alphabet import encode
from bionemo_esm.data.collate import pack
from bionemo_esm.data.store import SequenceSplit
from bionemo_esm.errors import ConfigError, UserError
from bionemo_esm.inference.contacts import head_fitting as contact_pairs
from bionemo_esm.inference.contacts.head_fitting import (
    FitOptions,
    Pairs,
    Regression,
    attention_features,
    check_memory,
    divide,
    evaluate,
    evaluate_separation,
    fit_head,
    fit_regression,
    head_of,
    pairs_of,
    some_of,
    training_pairs,
    untrained,
    with_head,
)
from bionemo_esm.inference.contacts.metrics import Row, intervals, precision_of_top, precisions, summary, table, verdict
from bionemo_esm.inference.contacts.prediction import WindowSpec, contacts_of, predict_contacts
from bionemo_esm.inference.contacts.structures import Structure
from bionemo_esm.inference.engine import Engine
from bionemo_esm.model.attention import MapObserver
from bionemo_esm.model.contact_head import average_product_correction
from bionemo_esm.model.feature_extraction import observe_attention_maps
from bionemo_esm.model.interchange.convert import export_model
from models import tiny_model
from peers import fair_esm
from structures import walk
from theirs import Shape

SHAPE = Shape(2, 32, 4)


@pytest.fixture(scope="module")
def structures(tiny_split: SequenceSplit) -> list[Structure]:
    """Return real sequences of 30 to 150 residues on random compact walks. Some residues are unresolved."""
    proteins = [tiny_split[index] for index in range(11, 37)]
    return [walk(f"s{index}", protein[: 40 + 5 * index], index) for index, protein in enumerate(proteins[:12])]


@pytest.fixture(scope="module")
def engine(tmp_path_factory: pytest.TempPathFactory) -> Engine:
    """Return an ESM-2 with random weights and without a contact head."""
    path = tmp_path_factory.mktemp("engine") / "m.nemo"
    tiny_model(position_embedding="rotary", token_dropout=True, seq_length=130).save_to(str(path))
    return Engine.load(path, "cpu")


CHOICE = FitOptions(train=4, C=100.0)


@pytest.fixture(scope="module")
def fitted(engine: Engine, structures: list[Structure]) -> Regression:
    train = divide(structures, CHOICE, engine.window).train
    return fit_head(engine, train, training_pairs(train, CHOICE), CHOICE)


# --- features and regression ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", ["ESM-1b", "ESM-2"])
def test_features_and_fit_equal_those_from_the_attention_maps_of_fair_esm(
    family: str, structures: list[Structure], tmp_path: Path
) -> None:
    peer = fair_esm(family, SHAPE, tmp_path / "peer")
    from bionemo_esm.model.interchange.convert import import_model

    ours = Engine.load(import_model(peer.path, tmp_path / "ours.nemo").output, "cpu")
    features, touch = [], []
    for structure in structures[:4]:
        pairs = pairs_of(structure, 6, 8.0)
        theirs = torch.from_numpy(np.concatenate([[0], structure.tokens, [2]]).astype(np.int64))[None]
        with torch.no_grad():
            maps = peer.model(theirs, repr_layers=[], need_head_weights=True)["attentions"]  # [1, layers, heads, L, L]
        maps = maps.flatten(1, 2)[0, :, 1:-1, 1:-1]
        corrected = esm.modules.apc(esm.modules.symmetrize(maps)).permute(1, 2, 0).numpy()
        features.append(corrected[pairs.first, pairs.second])
        touch.append(pairs.touch)
        found = attention_features(ours, structure.tokens, pairs)
        assert found.dtype == np.float32
        assert np.abs(found - features[-1]).max() < 1e-5
    import sklearn

    lasso = {"l1_ratio": 1.0} if tuple(map(int, sklearn.__version__.split(".")[:2])) >= (1, 8) else {"penalty": "l1"}
    reference = LogisticRegression(C=100.0, solver="liblinear", random_state=0, max_iter=1000, **lasso)
    reference.fit(np.concatenate(features), np.concatenate(touch))
    regression = fit_head(ours, structures[:4], training_pairs(structures[:4], CHOICE), CHOICE)
    assert np.abs(reference.coef_).max() > 0.1
    expected = reference.predict_proba(np.concatenate(features))[:, 1]
    with with_head(ours, head_of(regression)):
        maps_of = dict(predict_contacts(ours, [structure.tokens for structure in structures[:4]], WindowSpec.of(ours)))
    pairs_of_all = training_pairs(structures[:4], CHOICE)
    answers = [maps_of[place][pairs.first, pairs.second] for place, pairs in enumerate(pairs_of_all)]
    assert np.abs(np.concatenate(answers) - expected).max() < 1e-3  # tolerance between two separate fits
    own = np.concatenate(
        [attention_features(ours, s.tokens, p) for s, p in zip(structures, pairs_of_all, strict=False)]
    )
    logits = own.astype(np.float64) @ regression.weight + regression.bias
    assert np.abs(np.concatenate(answers) - 1 / (1 + np.exp(-logits))).max() < 1e-5


def test_attention_maps_of_at_most_one_layer_are_in_memory(
    structures: list[Structure], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tiny_model(num_layers=5, position_embedding="rotary").save_to(str(tmp_path / "m.nemo"))
    engine, alive, most = Engine.load(tmp_path / "m.nemo", "cpu"), [], []

    def watched(encoder: object, batch: object, observer: MapObserver) -> None:
        def observe(layer: int, maps: list[Tensor]) -> None:
            observer(layer, maps)
            alive.extend(weakref.ref(map_NLL) for map_NLL in maps)
            most.append(sum(reference() is not None for reference in alive))

        observe_attention_maps(encoder, batch, observe)  # type: ignore[arg-type]

    monkeypatch.setattr("bionemo_esm.model.feature_extraction.observe_attention_maps", watched)
    attention_features(engine, structures[0].tokens, pairs_of(structures[0], 6, 8.0))
    assert most == [1] * 5


def test_average_product_correction_of_a_zero_map_is_zero() -> None:
    maps = torch.stack([torch.zeros(5, 5), torch.rand(5, 5)])
    corrected = average_product_correction(maps)
    assert torch.equal(corrected[0], torch.zeros(5, 5)) and corrected[1].isfinite().all()
    assert torch.equal(corrected[1], esm.modules.apc(maps[1:])[0])


def test_regression_selects_the_informative_head_only() -> None:
    random = np.random.default_rng(0)
    touch = random.random(4000) < 0.1
    features = random.normal(0, 0.05, (4000, 8)).astype(np.float32)
    features[:, 3] += 0.5 * touch
    found = fit_regression(features, touch, 0.15, 0)
    assert np.flatnonzero(found.weight).tolist() == [3] and found.weight[3] > 1 and found.bias < 0
    assert found.converged
    again = fit_regression(features, touch, 0.15, 0)
    assert np.array_equal(found.weight, again.weight) and found.bias == again.bias
    assert not fit_regression(features, touch, 1e-4, 0).weight.any()


# --- structures and pairs ---------------------------------------------------------------------------------------------


def test_fitted_and_held_out_structures_share_no_sequence(structures: list[Structure]) -> None:
    twin = Structure("twin", structures[0].tokens, structures[0].coordinates)
    short = walk("short", structures[1].tokens[:6], 1)
    for seed in range(5):
        division = divide([*structures, twin, short], FitOptions(train=6, seed=seed), 128)
        train, held_out = ({found.tokens.tobytes() for found in part} for part in (division.train, division.held_out))
        assert len(train) == 6 and not train & held_out and len(train | held_out) == 12
        assert (division.repeated, division.without_pairs) == (1, 1)
    first, again, other = (
        [found.id for found in divide(structures, FitOptions(train=6, seed=seed), 128).train] for seed in (0, 0, 1)
    )
    assert first == again != other
    named = divide([twin, *structures], FitOptions(train=("s3", "s2")), 128)
    assert [found.id for found in named.train] == ["s3", "s2"]
    assert "s0" not in [found.id for found in named.held_out]


def test_training_structures_must_exist_and_fit_the_window_of_the_model(structures: list[Structure]) -> None:
    lengths = sorted(structure.residues for structure in structures)
    with pytest.raises(ConfigError, match="train=12: there are 3 structures to fit on"):
        divide(structures, FitOptions(train=12), lengths[2])
    assert {found.residues for found in divide(structures, FitOptions(train=3), lengths[2]).train} == set(lengths[:3])
    for ids, message in (
        (("s1", "nobody"), "no structure is named nobody; there are s0, s1"),
        (("s1", "s1"), "s1 is named twice"),
        (("s11",), "s11 cannot be fitted on"),
    ):
        with pytest.raises(ConfigError, match=message):
            divide(structures, FitOptions(train=ids), lengths[2])


def test_pairs_are_separated_and_resolved(structures: list[Structure]) -> None:
    structure = structures[0]
    pairs = pairs_of(structure, 6, 8.0)
    shown, touching = structure.resolved, structure.contacts()
    expected = [
        (i, j) for i in range(structure.residues) for j in range(i + 6, structure.residues) if shown[i] and shown[j]
    ]
    assert list(zip(pairs.first.tolist(), pairs.second.tolist(), strict=True)) == expected
    assert pairs.touch.tolist() == [bool(touching[pair]) for pair in expected]
    assert 0 < pairs.touch.sum() < len(expected) and not shown.all()


def test_sampled_pairs_come_from_all_proteins_in_similar_shares(structures: list[Structure]) -> None:
    pairs = [pairs_of(structure, 6, 8.0) for structure in structures]
    drawn = some_of(pairs, 2000, seed=1)
    assert sum(len(part.first) for part in drawn) == 2000
    shares = [len(some.first) / len(part.first) for some, part in zip(drawn, pairs, strict=True)]
    assert max(shares) < 3 * min(shares) and min(shares) > 0
    for some, part in zip(drawn, pairs, strict=True):
        everything = set(zip(*(array.tolist() for array in part), strict=True))
        assert set(zip(*(array.tolist() for array in some), strict=True)) <= everything
    assert all(np.array_equal(a.first, b.first) for a, b in zip(drawn, some_of(pairs, 2000, 1), strict=True))
    assert some_of(pairs, None, 1) is pairs


def test_structures_without_contacts_and_fits_beyond_memory_are_refused(
    structures: list[Structure], monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(UserError, match=r"0 of [\d,]+ pairs touch"):
        training_pairs(structures[:2], FitOptions(contact_angstrom=0.1))
    check_memory(300_000, 24)
    monkeypatch.setattr(contact_pairs.os, "sysconf", lambda name: 2**15)  # 2^30 bytes
    with pytest.raises(
        UserError, match=r"300,000 pairs x 660 attention heads takes 7.9 GB, more than the 1.1 GB .*=20336"
    ):
        check_memory(300_000, 660)


@pytest.mark.parametrize(
    "wrong",
    [{"train": 0}, {"train": ()}, {"C": 0.0}, {"contact_angstrom": -1.0}, {"most_pairs": 0}, {"seed": -1}],
)
def test_invalid_fit_options_are_refused(wrong: dict[str, object]) -> None:
    with pytest.raises(ConfigError):
        FitOptions(**wrong)  # type: ignore[arg-type]


# --- metrics ----------------------------------------------------------------------------------------------------------


def test_precision_ranks_pairs_by_probability_and_averages_over_ties() -> None:
    scores = np.array([0.9, 0.8, 0.5, 0.5, 0.5, 0.1, np.nan])
    hits = np.array([1, 0, 1, 0, 0, 1, 1], dtype=bool)
    assert precision_of_top(scores, hits, 1) == 1
    assert precision_of_top(scores, hits, 2) == 0.5
    assert precision_of_top(scores, hits, 4) == pytest.approx((1 + 2 / 3) / 4)
    assert precision_of_top(scores[::-1], hits[::-1], 4) == pytest.approx((1 + 2 / 3) / 4)
    assert precision_of_top(scores, hits, 6) == pytest.approx(3 / 6)
    assert precision_of_top(scores, hits, 100) == pytest.approx(4 / 7)


def test_precisions_equal_a_direct_count(structures: list[Structure]) -> None:
    structure = structures[5]
    scores = np.random.default_rng(0).random((structure.residues,) * 2).astype(np.float32)
    found = precisions(scores, structure)
    shown, touching = structure.resolved, structure.contacts()
    for name, begin, end in (("short", 6, 12), ("medium", 12, 24), ("long", 24, 10**9)):
        ranked = sorted(
            (-scores[i, j], touching[i, j])
            for i in range(structure.residues)
            for j in range(i + begin, min(i + end, structure.residues))
            if shown[i] and shown[j]
        )
        for top, part in (("P@L", 1), ("P@L/2", 2), ("P@L/5", 5)):
            surest = ranked[: structure.residues // part]
            assert found[name, top] == pytest.approx(sum(hit for _, hit in surest) / len(surest))
    assert ("long", "P@L") not in precisions(scores[:20, :20], walk("short", structure.tokens[:20], 1))


def test_confidence_interval_is_over_proteins_and_reproducible() -> None:
    rows = summary([{("long", "P@L"): value} for value in (0.1, 0.2, 0.3, 0.4)] + [{}], seed=0)
    assert [(row.range, row.top, row.proteins) for row in rows] == [("long", "P@L", 4)]
    assert rows[0].mean == pytest.approx(0.25) and 0.1 <= rows[0].low < 0.25 < rows[0].high <= 0.4
    assert rows == summary([{("long", "P@L"): value} for value in (0.1, 0.2, 0.3, 0.4)], seed=0)
    assert table({"model": rows})[-1].split() == ["model", *"------", "0.250", "-", "-"]


def test_verdict_says_better_only_if_the_intervals_do_not_overlap() -> None:
    def row(mean: float, half: float) -> list[Row]:
        return [Row("long", "P@L", mean, mean - half, mean + half, 9)]

    told = verdict({"m": row(0.5, 0.1), "a": row(0.2, 0.1), "b": row(0.4, 0.1), "c": row(0.5, 0.1), "d": []})
    assert [line.split(":")[0].removeprefix("At long range the head is ") for line in told] == [
        "better than a", "above b, but the intervals overlap", "no better than c",
    ]  # fmt: skip
    assert intervals({"m": row(0.5, 0.1)}) == [
        "long range P@L of m  0.500, 95% interval over 9 proteins 0.400 to 0.600"
    ]


def test_separation_baseline_predicts_separations_frequent_in_training_contacts() -> None:
    pairs = [Pairs(np.zeros(4, dtype=int), np.array([6, 6, 7, 8]), np.array([True, False, True, False]))]
    coordinates = np.zeros((9, 3), dtype=np.float32)
    coordinates[:, 0] = [0, 50, 100, 150, 200, 250, 300, 0, 400]  # 0 and 7 touch, 1 and 8 do not
    structure = Structure("a", encode("MKVLAGSTW"), coordinates)
    (found,) = evaluate_separation(pairs, [structure], FitOptions())
    assert found["short", "P@L/5"] == pytest.approx(0.5)  # one of the two pairs at separation 7 is drawn


def test_fitted_head_is_better_than_chance_on_its_training_structures(
    engine: Engine, structures: list[Structure], fitted: Regression
) -> None:
    train = divide(structures, CHOICE, engine.window).train
    found, blank = evaluate(engine, fitted, train, CHOICE), Regression(0 * fitted.weight, 0.0, 1, True)
    chance = evaluate(engine, blank, train, CHOICE)
    mean = [np.mean([of_one["short", "P@L/5"] for of_one in rows]) for rows in (found, chance)]
    assert mean[0] > mean[1]
    assert engine.encoder.contact_head is None, "the head is taken away again"


def test_untrained_model_has_the_same_shapes_and_other_weights(
    engine: Engine, recwarn: pytest.WarningsRecorder
) -> None:
    state = torch.get_rng_state()
    blank = untrained(engine, 3)
    assert torch.equal(torch.get_rng_state(), state)
    torch.rand(1)
    again = untrained(engine, 3)
    weights, others = (dict(model.encoder.named_parameters()) for model in (blank, again))
    for name, parameter in engine.encoder.named_parameters():
        assert weights[name].shape == parameter.shape and torch.equal(weights[name], others[name])
        assert parameter.ndim < 2 or not torch.equal(weights[name], parameter)
    assert not recwarn.list  # no warnings from Megatron in the report


# --- long proteins and export to Hugging Face -------------------------------------------------------------------------


def test_contacts_of_long_proteins_are_blended_from_windows(
    engine: Engine, tiny_split: SequenceSplit, fitted: Regression
) -> None:
    tokens = tiny_split[9][:200]
    with with_head(engine, head_of(fitted)):
        found = contacts_of(engine, tokens, WindowSpec(120, 60))
        parts = [contacts_of(engine, tokens[begin : begin + 120], WindowSpec(120, 60)) for begin in (0, 40, 80)]
        assert WindowSpec(120, 60).cover(200) == [(0, 120), (40, 160), (80, 200)]
        assert np.allclose(found[:40, :40], parts[0][:40, :40], atol=1e-5)
        assert np.allclose(found[170:, 170:], parts[2][90:, 90:], atol=1e-5)
        assert np.array_equal(found, found.T, equal_nan=True)
        places = np.arange(200)
        reached = (places[:, None] < 120) & (places[None, :] < 120)
        reached |= (places[:, None] >= 80) & (places[None, :] >= 80)
        inner = (places >= 40) & (places < 160)
        reached |= inner[:, None] & inner[None, :]
        assert np.array_equal(np.isnan(found), ~reached)
        low = np.minimum(parts[0][100, 50], parts[1][60, 10])
        high = np.maximum(parts[0][100, 50], parts[1][60, 10])
        assert low - 1e-6 <= found[100, 50] <= high + 1e-6
        one = contacts_of(engine, tokens, WindowSpec(200, 0))
    assert not np.isnan(one).any()


def test_contacts_do_not_depend_on_the_other_proteins_of_a_request(
    engine: Engine, structures: list[Structure], fitted: Regression
) -> None:
    proteins = [structure.tokens for structure in structures]
    with with_head(engine, head_of(fitted)):
        every = dict(predict_contacts(engine, proteins, WindowSpec.of(engine)))
        some = dict(predict_contacts(engine, proteins, WindowSpec.of(engine), lambda place: place in (2, 5)))
        alone = contacts_of(engine, proteins[5], WindowSpec.of(engine))
    assert sorted(every) == list(range(12)) and sorted(some) == [2, 5]
    assert np.array_equal(some[5], every[5]) and np.abs(every[5] - alone).max() < 1e-5
    with pytest.raises(UserError, match=r"has no contact head; .* fit-contacts model="):
        contacts_of(engine, proteins[0], WindowSpec.of(engine))


def test_fitted_archive_gives_the_same_contacts_in_hugging_face(
    structures: list[Structure], fitted: Regression, tmp_path: Path
) -> None:
    model = tiny_model(position_embedding="rotary", token_dropout=True, seq_length=130, contact_head=True)
    model.encoder.contact_head.load_state_dict(head_of(fitted).state_dict())
    model.save_to(str(tmp_path / "fitted.nemo"))
    export_model(tmp_path / "fitted.nemo", tmp_path / "theirs")
    theirs = EsmForMaskedLM.from_pretrained(tmp_path / "theirs", attn_implementation="eager").eval()
    ours = Engine.load(tmp_path / "fitted.nemo", "cpu")
    for structure in structures[:3]:
        batch = pack(structure.tokens, np.array([structure.residues]))
        tokens = batch.tokens[None]
        with torch.no_grad():
            expected = theirs.predict_contacts(tokens, torch.ones_like(tokens))[0].numpy()
        assert np.abs(contacts_of(ours, structure.tokens, WindowSpec.of(ours)) - expected).max() < 1e-5
        assert expected.std() > 0.001


def test_window_beyond_the_model_is_refused(engine: Engine, tmp_path: Path) -> None:
    tiny_model(seq_length=64).save_to(str(tmp_path / "m.nemo"))
    learned = Engine.load(tmp_path / "m.nemo", "cpu")
    assert WindowSpec.of(learned) == WindowSpec(62, 31) and WindowSpec.of(engine, window=5000).window == 5000
    for window, overlap, message in (
        (63, None, "reads up to 62"),
        (0, None, "at least 1"),
        (60, 60, "below the window"),
    ):
        with pytest.raises(ConfigError, match=message):
            WindowSpec.of(learned, window, overlap)
