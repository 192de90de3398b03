"""The four scoring methods against a plain float64 reference and fair-esm's example on the same weights."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from esm.data import Alphabet
from numpy.typing import NDArray

from bionemo_esm.alphabet import MASK_ID, TOKEN_IDS, encode
from bionemo_esm.data.collate import pack
from bionemo_esm.errors import ConfigError
from bionemo_esm.inference.batching import MaskedQuery, masked
from bionemo_esm.inference.engine import Engine
from bionemo_esm.inference.protein_model import ProteinModel
from bionemo_esm.inference.variants import scoring
from bionemo_esm.inference.variants.mutations import Variant, VariantError, WildType, all_single
from bionemo_esm.inference.variants.scoring import (
    EACH,
    MASKED,
    METHODS,
    MUTANT,
    PSEUDO,
    WILD_TYPE,
    ScoringOptions,
    plan,
    score,
)
from bionemo_esm.model.interchange.convert import import_model
from models import tiny_model
from peers import fair_esm
from theirs import SMALL

UBIQUITIN = "MQIFVKTLTGKTITLEVEPSDTIENVKAKIQDKEGIPPDQQRLIFAGKQLEDGRTLSDYNIQKESTLHLVLRLRGG"
CUT = UBIQUITIN[:24]
FAMILIES: dict[str, dict[str, Any]] = {
    "ESM-1nv": {},
    "ESM-1b": {"token_dropout": True, "embedding_layernorm": True, "position_offset": 2},
    "ESM-2": {"token_dropout": True, "position_embedding": "rotary"},
}
TEXTS = ["M1A", "Q2W", "Q2W,E16K", "E16K,Q2W", "V5A,T7C,L8D,D21R", "WT", "I3I", "V17Y", "Q2W"]
VARIANTS = [WildType("ubiquitin", encode(CUT)).variant(text) for text in TEXTS]
ALL = ScoringOptions(method=METHODS)


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("models")
    for family, sizes in FAMILIES.items():
        tiny_model(**sizes).save_to(str(folder / f"{family}.nemo"))
    return folder


@pytest.fixture(params=FAMILIES)
def engine(request: pytest.FixtureRequest, files: Path) -> Engine:
    return Engine.load(files / f"{request.param}.nemo", "cpu")


@pytest.fixture
def some_engine(files: Path) -> Engine:
    return Engine.load(files / "ESM-2.nemo", "cpu")


class Asked:
    """An engine that records its queries."""

    def __init__(self, engine: Engine) -> None:
        self.queries: list[MaskedQuery] = []
        self.answer = engine.log_probabilities
        engine.log_probabilities = self  # type: ignore[method-assign, assignment]

    def __call__(self, queries: Any, answered: Any) -> Iterator[NDArray[np.float64]]:
        self.queries += (kept := list(queries))
        yield from self.answer(kept, answered)


class Reference:
    """The formulas of Meier et al. in float64, one forward pass at a time, without sharing or skipping passes."""

    def __init__(self, file: Path) -> None:
        self.engine = Engine.load(file, "cpu")
        self.engine.encoder.double()

    @torch.no_grad()
    def log_p(self, tokens: NDArray[np.uint8], *hidden: int) -> NDArray[np.float64]:
        tokens = tokens.copy()
        for place in hidden:
            tokens[place] = MASK_ID
        row = pack(tokens, np.array([len(tokens)]))
        states = self.engine.encoder.hidden_states(row.tokens, row.positions, row.cu_seqlens, row.max_seqlen)
        assert states.dtype == torch.float64
        return self.engine.encoder.logits(states).double().log_softmax(-1)[1:-1].numpy()

    def likelihood(self, tokens: NDArray[np.uint8]) -> float:
        return sum(self.log_p(tokens, place)[place, token] for place, token in enumerate(tokens))

    def score(self, method: str, x: NDArray[np.uint8], variant: Variant, masks: str = "together") -> float:
        y = WildType("", x).mutated(variant)
        places = [place for place in range(len(x)) if x[place] != y[place]]
        if method == PSEUDO:
            return self.likelihood(y) - self.likelihood(x)
        total = 0.0
        for place in places:
            if method == MASKED:
                log_p = self.log_p(x, *(places if masks == "together" else [place]))
            else:
                log_p = self.log_p(x if method == WILD_TYPE else y)
            total += log_p[place, y[place]] - log_p[place, x[place]]
        return total


def close(found: NDArray[np.float64], expected: object, within: float = 5e-5) -> None:
    np.testing.assert_allclose(found, expected, rtol=0, atol=within)


# --- formulas ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", FAMILIES)
def test_all_scores_equal_a_float64_reference(family: str, files: Path) -> None:
    x, reference = encode(CUT), Reference(files / f"{family}.nemo")
    engine = Engine.load(files / f"{family}.nemo", "cpu")
    found = score(engine, WildType("ubiquitin", x), VARIANTS, ALL)
    each = score(engine, WildType("ubiquitin", x), VARIANTS, ScoringOptions(method=(MASKED,), masks=EACH))
    for method in METHODS:
        expected = np.array([reference.score(method, x, variant) for variant in VARIANTS])
        close(found[method], expected)
        assert np.abs(expected).max() > 1
    expected = np.array([reference.score(MASKED, x, variant, "each") for variant in VARIANTS])
    close(each[MASKED], expected)
    assert np.abs(expected - found[MASKED]).max() > 1e-2, (
        "together and each must differ where several places are hidden"
    )


def test_wild_type_scores_exactly_zero_and_equal_variants_score_equally(engine: Engine) -> None:
    for values in score(engine, WildType("ubiquitin", encode(CUT)), VARIANTS, ALL).values():
        assert (values[[TEXTS.index("WT"), TEXTS.index("I3I")]] == 0).all()
        assert values[1] == values[-1]
        assert values[2] == values[3]
        assert len(set(values)) == 6


@pytest.mark.parametrize("masks", ["together", "each"])
def test_scores_do_not_depend_on_the_other_variants_or_the_batching(engine: Engine, masks: str) -> None:
    options, wild_type = ScoringOptions(method=METHODS, masks=masks), WildType("ubiquitin", encode(CUT))
    found = score(engine, wild_type, VARIANTS, options)
    engine.batch_tokens = 30
    for method, values in score(engine, wild_type, VARIANTS[::-1], options).items():
        close(values[::-1], found[method], 2e-5)
    for index in (0, 4):
        for method, values in score(engine, wild_type, [VARIANTS[index]], options).items():
            close(values, found[method][index], 2e-5)


@pytest.mark.parametrize("family", ["ESM-1v", "ESM-2"])
def test_marginals_equal_fair_esms_example_on_its_own_model(family: str, tmp_path: Path) -> None:
    """Repeat `label_row` and the code before it in examples/variant-prediction/predict.py of facebookresearch/esm."""
    peer, alphabet = fair_esm(family, SMALL, tmp_path), Alphabet.from_architecture("ESM-1b")
    import_model(str(peer.path), tmp_path / "brought.nemo")
    model = ProteinModel.load(tmp_path / "brought.nemo", "cpu")
    offset, texts = 24, ["M24A", "Q25W", "G99P", "T35K"]
    _, _, tokens = alphabet.get_batch_converter()([("protein1", UBIQUITIN)])
    with torch.no_grad():
        unmasked = torch.log_softmax(peer.model(tokens)["logits"], dim=-1)
        rows = []
        for i in range(tokens.size(1)):
            hidden = tokens.clone()
            hidden[0, i] = alphabet.mask_idx
            rows.append(torch.log_softmax(peer.model(hidden)["logits"], dim=-1)[:, i])
    for method, log_p in ((WILD_TYPE, unmasked), (MASKED, torch.cat(rows, dim=0).unsqueeze(0))):
        expected = []
        for text in texts:
            wt, idx, mt = text[0], int(text[1:-1]) - offset, text[-1]
            assert UBIQUITIN[idx] == wt
            row = log_p[0, 1 + idx]
            expected.append((row[alphabet.get_idx(mt)] - row[alphabet.get_idx(wt)]).item())
        close(model.score_variants(UBIQUITIN, texts, method, offset=offset), expected)
        assert np.abs(expected).max() > 0.5


def test_pseudo_log_likelihoods_equal_fair_esms_own_model(tmp_path: Path) -> None:
    peer, alphabet = fair_esm("ESM-2", SMALL, tmp_path), Alphabet.from_architecture("ESM-1b")
    import_model(str(peer.path), tmp_path / "brought.nemo")

    @torch.no_grad()
    def likelihood(sequence: str) -> float:
        _, _, tokens = alphabet.get_batch_converter()([("protein1", sequence)])
        total = 0.0
        for i in range(1, len(sequence) + 1):
            hidden = tokens.clone()
            hidden[0, i] = alphabet.mask_idx
            total += torch.log_softmax(peer.model(hidden)["logits"], dim=-1)[0, i, tokens[0, i]].item()
        return total

    found = ProteinModel.load(tmp_path / "brought.nemo", "cpu").score_variants(CUT, ["Q2W,E16K"], PSEUDO)
    close(found, likelihood(CUT.replace("MQ", "MW").replace("LEV", "LKV")) - likelihood(CUT))


# --- forward passes ---------------------------------------------------------------------------------------------------


def test_pass_shared_by_several_variants_runs_once(some_engine: Engine) -> None:
    wild_type = WildType("ubiquitin", encode(UBIQUITIN))
    singles, asked = all_single(wild_type), Asked(some_engine)
    told: list[tuple[int, int]] = []
    expected = {MASKED: 76, WILD_TYPE: 1, MUTANT: 40, PSEUDO: 76 * 41}
    for method, passes in expected.items():
        variants = [*singles, *singles] if method in (MASKED, WILD_TYPE) else [*singles[:40], *singles[:40]]
        asked.queries.clear()
        told.clear()
        score(some_engine, wild_type, variants, ScoringOptions(method=(method,)), lambda _, *done: told.append(done))
        assert len(asked.queries) == passes
        work = plan(method, wild_type, list(dict.fromkeys(variants)), ScoringOptions(method=(method,)), 510)
        assert (work.passes, work.residues) == (passes, 76 * passes)
        assert told[-1] == (work.residues, work.residues)


def test_masking_each_position_alone_needs_one_pass_per_position(some_engine: Engine) -> None:
    wild_type = WildType("ubiquitin", encode(UBIQUITIN))
    pairs = [tuple(sorted((one[0], other[0]))) for one in all_single(wild_type, (1, 5)) for other in
             all_single(wild_type, (60, 63))]  # fmt: skip
    for masks, passes in (("together", 5 * 4), ("each", 5 + 4)):
        asked = Asked(engine := Engine(some_engine.encoder, some_engine.config))
        score(engine, wild_type, pairs, ScoringOptions(method=(MASKED,), masks=masks))
        assert len(asked.queries) == passes


def test_queries_are_created_lazily(some_engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    """The queries of 50,000 variants, each as long as the protein, would fill the memory."""
    made, seen = [0], []

    def counted(*arguments: Any) -> MaskedQuery:
        made[0] += 1
        return masked(*arguments)

    monkeypatch.setattr(scoring, "masked", counted)
    some_engine.batch_tokens = 4 * (len(CUT) + 2)
    wild_type = WildType("ubiquitin", encode(CUT))
    options = ScoringOptions(method=(PSEUDO,))
    score(some_engine, wild_type, all_single(wild_type)[:9], options, lambda *_: seen.append(made[0]))
    assert seen[0] <= 5
    assert made[0] == 10 * len(CUT)


# --- long proteins ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("text", ["M1A", "K33W", "G76C", "Q2W,T9C", "S57A,G75A"])
def test_long_protein_is_scored_in_a_window_around_the_mutations(text: str, files: Path) -> None:
    """Each method gives the score of the window alone."""
    file, x, window = files / "ESM-1nv.nemo", encode(UBIQUITIN), 20
    variant = WildType("", x).variant(text)
    middle = (variant[0].site + variant[-1].site + 1) // 2
    begin = min(max(middle - window // 2, 0), len(x) - window)
    inside = tuple(one._replace(site=one.site - begin) for one in variant)
    reference, engine = Reference(file), Engine.load(file, "cpu")
    found = score(engine, WildType("", x), [variant], ScoringOptions(method=(MASKED, MUTANT, PSEUDO), window=window))
    for method, values in found.items():
        close(values, reference.score(method, x[begin : begin + window], inside))
    assert abs(found[MUTANT][0] - reference.score(MUTANT, x, variant)) > 1e-3


@pytest.mark.parametrize(("method", "masks"), [(WILD_TYPE, "together"), (MASKED, "each")])
def test_additive_scores_sum_over_the_windows_of_each_position(some_engine: Engine, method: str, masks: str) -> None:
    wild_type, options = WildType("", encode(UBIQUITIN)), ScoringOptions(method=(method,), masks=masks, window=20)
    parts = [wild_type.variant(text) for text in ("Q2W", "K33A", "G76C")]
    whole = wild_type.variant("Q2W,K33A,G76C")
    found = score(some_engine, wild_type, [*parts, whole], options)[method]
    close(found[3], found[:3].sum(), 1e-9)


def test_mutations_too_far_apart_for_one_window_are_rejected_if_one_is_needed(some_engine: Engine) -> None:
    wild_type = WildType("", encode(UBIQUITIN))
    apart, within = wild_type.variant("Q2W,T22A"), wild_type.variant("Q2W,D21A")
    for method in (MASKED, MUTANT, PSEUDO):
        score(some_engine, wild_type, [within], ScoringOptions(method=(method,), window=20))
        with pytest.raises(VariantError, match=rf"Q2W,T22A: .*span more than the 20 residues.*{method} needs"):
            score(some_engine, wild_type, [within, apart], ScoringOptions(method=(method,), window=20))
    score(some_engine, wild_type, [apart], ScoringOptions(method=(WILD_TYPE, MASKED), masks="each", window=20))


def test_default_window_is_510_residues_and_limited_by_the_model(files: Path) -> None:
    learned, rotary = (Engine.load(files / f"{family}.nemo", "cpu") for family in ("ESM-1nv", "ESM-2"))
    assert ScoringOptions().window_of(learned) == ScoringOptions().window_of(rotary) == 510
    assert ScoringOptions(window=800).window_of(rotary) == 800
    with pytest.raises(ConfigError, match="window=511: the model reads up to 510"):
        ScoringOptions(window=511).window_of(learned)


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ({"method": ()}, "method: one or several"),
        ({"method": ("wt-marginals",)}, "method: one or several of masked-marginals.*not wt-marginals"),
        ({"method": (MASKED, MASKED)}, "method"),
        ({"masks": "all"}, "masks"),
        ({"window": 0}, "window"),
    ],
)
def test_invalid_option_is_rejected(arguments: dict[str, Any], said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        ScoringOptions(**arguments)


# --- Python interface -------------------------------------------------------------------------------------------------


def test_python_interface_scores_variants_and_scans(files: Path) -> None:
    model = ProteinModel.load(files / "ESM-2.nemo", "cpu")
    scores = model.score_variants(CUT, TEXTS)
    assert scores.dtype == np.float64
    np.testing.assert_array_equal(scores, score(model.engine, WildType("", encode(CUT)), VARIANTS, ALL)[MASKED])
    frame = model.scan(CUT, [MASKED, WILD_TYPE], region=(11, 12), offset=10)
    assert list(frame) == ["mutant", "position", "wildtype", "mutant_residue", "masked_marginals", "wildtype_marginals"]
    assert len(frame) == 38
    row = frame[frame.mutant == "Q11W"].iloc[0]
    assert (row.position, row.wildtype, row.mutant_residue) == (11, "Q", "W")
    assert row.masked_marginals == pytest.approx(scores[1], abs=2e-5)
    with pytest.raises(VariantError, match=r"variants\[1\]: .*is Q, not A"):
        model.score_variants(CUT, ["Q2A", "A2G"])
    assert model.score_variants(CUT, [None, float("nan")]).tolist() == [0, 0]
    assert model.scan(CUT, method=WILD_TYPE, region=(2, 2)).columns[-1] == "wildtype_marginals"


def test_nonstandard_residues_can_be_inserted_and_replaced(some_engine: Engine, files: Path) -> None:
    x = encode("MKXUW")
    variants = [WildType("", x).variant(text) for text in ("M1U", "X3A", "U4C")]
    reference = Reference(files / "ESM-2.nemo")
    found = score(some_engine, WildType("", x), variants, ScoringOptions())[MASKED]
    close(found, [reference.score(MASKED, x, variant) for variant in variants])
    assert variants[0][0].mutant == TOKEN_IDS["U"]
