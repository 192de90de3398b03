"""Embeddings: values against references for every batch size, window and precision."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from bionemo_esm.alphabet import CLS_ID, EOS_ID, MASK_ID
from bionemo_esm.data.collate import pack
from bionemo_esm.data.store import SequenceSplit
from bionemo_esm.errors import ConfigError, UserError
from bionemo_esm.inference.batching import windows
from bionemo_esm.inference.embedding import embeddings as pooling
from bionemo_esm.inference.embedding.embeddings import embed_proteins
from bionemo_esm.inference.embedding.options import EmbeddingOptions
from bionemo_esm.inference.engine import Engine
from bionemo_esm.inference.inputs import InputError, Protein
from bionemo_esm.model.feature_extraction import representations
from models import tiny_model
from peers import brought_here, hugging_face
from theirs import SMALL

EVERYTHING = EmbeddingOptions(layers=(0, 1, 2), mean=True, cls=True, residues=True, logits=True)
FAMILIES: dict[str, dict[str, Any]] = {
    "ESM-1nv": {},
    "ESM-1b": {"token_dropout": True, "embedding_layernorm": True, "position_offset": 2},
    "ESM-2": {"token_dropout": True, "position_embedding": "rotary"},
}


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """Use one thread: a second one does not speed up such small models."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def engine_of(batch_tokens: int | None = None, **sizes: Any) -> Engine:
    model = tiny_model(**sizes)
    return Engine(model.encoder, model.encoder_config, batch_tokens)


@pytest.fixture(scope="module")
def engine() -> Engine:
    """Return an ESM-2 that was trained on windows of 64 residues."""
    return engine_of(**FAMILIES["ESM-2"], seq_length=66)


@pytest.fixture(scope="module")
def proteins(tiny_split: SequenceSplit) -> list[Protein]:
    """Return 12 real proteins of 1 to 64 residues, with rare letters and repeated lengths."""
    lengths = (30, 1, 64, 2, 30, 50, 64, 7, 3, 1, 41, 50)
    return [Protein(f"p{i}", tiny_split[10 + i][:length], i + 1) for i, length in enumerate(lengths)]


@pytest.fixture(scope="module")
def long_proteins(tiny_split: SequenceSplit) -> list[Protein]:
    return [Protein(f"l{i}", tiny_split[9][:length], i + 1) for i, length in enumerate((200, 20, 65, 64, 129))]


@torch.inference_mode()
def seen(engine: Engine, tokens: NDArray[np.uint8]) -> dict[str, NDArray[np.float32]]:
    """Return the hidden states of each layer and the logits for one sequence on its own."""
    row = pack(tokens, np.array([len(tokens)]))
    states = representations(engine.encoder, row, range(engine.layers + 1))
    told = {f"states_{layer}": state.float().numpy() for layer, state in states.items()}
    return told | {"logits": engine.encoder.logits(states[engine.layers]).numpy()}


def expected_of(engine: Engine, tokens: NDArray[np.uint8]) -> dict[str, NDArray[np.float32]]:
    told, found = seen(engine, tokens), {}
    for layer in range(engine.layers + 1):
        state = told[f"states_{layer}"]
        found |= {f"mean_{layer}": state[1:-1].mean(axis=0), f"cls_{layer}": state[0], f"residues_{layer}": state[1:-1]}
    return found | {"logits": told["logits"][1:-1]}


def assert_close(ours: dict[str, Any], theirs: dict[str, Any], atol: float = 1e-5) -> None:
    assert ours.keys() == theirs.keys()
    for name, array in theirs.items():
        np.testing.assert_allclose(ours[name], array, rtol=0, atol=atol, err_msg=name)


@pytest.mark.parametrize("family", FAMILIES)
def test_embeddings_in_a_batch_equal_those_of_each_protein_alone(family: str, proteins: list[Protein]) -> None:
    engine = engine_of(**FAMILIES[family])
    found = embed_proteins(engine, proteins, EVERYTHING)
    assert [each.id for each in found] == [protein.id for protein in proteins]
    for embedding, protein in zip(found, proteins, strict=True):
        assert (embedding.residues, embedding.read, embedding.windows) == (protein.residues, protein.residues, 1)
        assert embedding.pseudo_perplexity is None
        assert all(array.dtype == np.float32 for array in embedding.arrays.values())
        assert_close(embedding.arrays, expected_of(engine, protein.tokens))


@pytest.mark.parametrize("family", FAMILIES)
def test_embeddings_match_hugging_face_for_the_same_weights(
    family: str, proteins: list[Protein], tmp_path: Path
) -> None:
    peer = hugging_face(family, SMALL, tmp_path / "theirs")
    brought_here(peer, tmp_path)
    found = embed_proteins(Engine.load(tmp_path / "imported.nemo", "cpu"), proteins, EVERYTHING)
    for embedding, protein in zip(found, proteins, strict=True):
        tokens = torch.tensor([[CLS_ID, *protein.tokens.tolist(), EOS_ID]])
        with torch.no_grad():
            told = peer.model(tokens, attention_mask=torch.ones_like(tokens), output_hidden_states=True)
        theirs = {"logits": told.logits[0, 1:-1].numpy()}
        for layer, state in enumerate(told.hidden_states):
            theirs[f"mean_{layer}"] = state[0, 1:-1].mean(dim=0).numpy()
            theirs[f"cls_{layer}"], theirs[f"residues_{layer}"] = state[0, 0].numpy(), state[0, 1:-1].numpy()
        assert_close(embedding.arrays, theirs, 3e-5)


@pytest.mark.parametrize("batch_tokens", [1, 70, 200, 100_000])
def test_embeddings_do_not_depend_on_the_batch(
    engine: Engine, proteins: list[Protein], long_proteins: list[Protein], batch_tokens: int
) -> None:
    everyone = [*proteins, *long_proteins]
    usual = embed_proteins(engine, everyone, EVERYTHING)
    other = Engine(engine.encoder, engine.config, batch_tokens)
    for place in range(len(everyone)):
        assert_close(embed_proteins(engine, everyone[place:][:1], EVERYTHING)[0].arrays, usual[place].arrays)
    for one, two in zip(usual, reversed(embed_proteins(other, everyone[::-1], EVERYTHING)), strict=True):
        assert one.id == two.id
        assert_close(two.arrays, one.arrays)


def test_repeated_calls_give_bit_identical_embeddings(engine: Engine, long_proteins: list[Protein]) -> None:
    first, second = (embed_proteins(engine, long_proteins, EVERYTHING) for _ in range(2))
    for one, two in zip(first, second, strict=True):
        assert {name: array.tobytes() for name, array in one.arrays.items()} == {
            name: array.tobytes() for name, array in two.arrays.items()
        }


# --- long proteins ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("window", "overlap"), [(None, None), (40, 0), (40, 39), (33, 7), (200, 5)])
def test_windows_are_weighted_by_the_distance_from_their_cut_ends(
    engine: Engine, long_proteins: list[Protein], window: int | None, overlap: int | None
) -> None:
    options = EVERYTHING.replace(window=window, overlap=overlap)
    size = window or 64
    for embedding, protein in zip(embed_proteins(engine, long_proteins, options), long_proteins, strict=True):
        cover = windows(protein.residues, size, size // 2 if overlap is None else overlap)
        assert (embedding.read, embedding.windows) == (protein.residues, len(cover))
        told = [seen(engine, protein.tokens[begin:end]) for begin, end in cover]
        for name, kind in (("residues_1", "states_1"), ("residues_2", "states_2"), ("logits", "logits")):
            for place in range(protein.residues):
                total = weights = 0.0
                for (begin, end), each in zip(cover, told, strict=True):
                    if begin <= place < end:
                        to_begin = place - begin + 1 if begin else size
                        to_end = end - place if end < protein.residues else size
                        weight = min(to_begin, to_end, size)
                        total, weights = total + weight * each[kind][place - begin + 1], weights + weight
                np.testing.assert_allclose(embedding.arrays[name][place], total / weights, atol=1e-5, rtol=0)
        for layer in range(3):
            blended = embedding.arrays[f"residues_{layer}"].mean(axis=0)
            np.testing.assert_allclose(embedding.arrays[f"mean_{layer}"], blended, atol=1e-5, rtol=0)
            cls = np.mean([each[f"states_{layer}"][0] for each in told], axis=0)
            np.testing.assert_allclose(embedding.arrays[f"cls_{layer}"], cls, atol=1e-5, rtol=0)


def test_truncation_reads_the_first_residues_and_records_it(engine: Engine, long_proteins: list[Protein]) -> None:
    found = embed_proteins(engine, long_proteins, EVERYTHING.replace(long_proteins="truncate"))
    for embedding, protein in zip(found, long_proteins, strict=True):
        read = min(protein.residues, 64)
        assert (embedding.residues, embedding.read, embedding.windows) == (protein.residues, read, 1)
        assert_close(embedding.arrays, expected_of(engine, protein.tokens[:read]))


def test_long_proteins_error_refuses_before_any_computation(
    engine: Engine, long_proteins: list[Protein], monkeypatch: pytest.MonkeyPatch
) -> None:
    options = EmbeddingOptions(long_proteins="error")
    assert embed_proteins(engine, long_proteins[3:4], options)[0].read == 64
    monkeypatch.setattr(engine.encoder, "hidden_states", lambda *_: pytest.fail("computed"))
    with pytest.raises(InputError, match=r"record 3 \(l2\) has 65 residues, over the window of 64; .*truncate"):
        embed_proteins(engine, long_proteins[1:4], options)


# --- options ----------------------------------------------------------------------------------------------------------


def test_layers_accept_negative_numbers_and_are_deduplicated(engine: Engine, proteins: list[Protein]) -> None:
    options = EmbeddingOptions(layers=(-1, 0, 2, -3), cls=True)
    assert options.resolved(engine).layers == (2, 0)
    found = embed_proteins(engine, proteins[:1], options)[0]
    assert list(found.arrays) == ["mean_2", "mean_0", "cls_2", "cls_0"]
    assert_close(found.arrays, {name: expected_of(engine, proteins[0].tokens)[name] for name in found.arrays})


def test_only_requested_rows_are_copied_to_the_cpu(
    engine: Engine, long_proteins: list[Protein], monkeypatch: pytest.MonkeyPatch
) -> None:
    moved: list[int] = []
    real = pooling._on_cpu

    def moving(rows: torch.Tensor) -> NDArray[np.float32]:
        moved.append(len(rows))
        return real(rows)

    monkeypatch.setattr(pooling, "_on_cpu", moving)
    embed_proteins(engine, long_proteins, EmbeddingOptions(layers=(0, 1, 2), cls=True))
    pieces = sum(len(windows(protein.residues, 64, 32)) for protein in long_proteins)
    assert sum(moved) == 6 * pieces


@pytest.mark.parametrize(("options", "asked"), [
    (EmbeddingOptions(), {2}),
    (EmbeddingOptions(layers=(0,)), {0}),
    (EmbeddingOptions(layers=(0,), logits=True), {0, 2}),
    (EmbeddingOptions(layers=(0, 1), mean=False, logits=True), {2}),
])  # fmt: skip
def test_only_requested_layers_are_computed(
    engine: Engine, proteins: list[Protein], monkeypatch: pytest.MonkeyPatch, options: EmbeddingOptions, asked: set[int]
) -> None:
    def looking(encoder: Any, batch: Any, layers: set[int]) -> Any:
        assert set(layers) == asked
        return representations(encoder, batch, layers)

    monkeypatch.setattr(pooling, "representations", looking)
    assert embed_proteins(engine, proteins[:2], options)


@pytest.mark.parametrize(("settings", "message"), [
    ({"layers": (3,)}, "layer 3: the model has 0 .* to 2"),
    ({"layers": (-4,)}, "layer -4"),
    ({"layers": ("last",)}, "layers must be an integer, not 'last'"),
    ({"layers": (True,)}, "layers must be an integer, not True"),
    ({"layers": ()}, "layers: name one"),
    ({"mean": False}, "nothing is asked for"),
    ({"dtype": "bfloat16"}, "dtype must be one of float32, float16, not 'bfloat16'"),
    ({"long_proteins": "cut"}, "long_proteins must be one of windows, truncate, error, not 'cut'"),
    ({"window": 0}, "window must be at least 1, or null, not 0"),
    ({"window": 65}, "window=65: the model reads up to 64 residues"),
    ({"window": 10, "overlap": 10}, "overlap must be from 0 to below the window of 10, not 10"),
    ({"overlap": 64}, "overlap must be from 0 to below the window of 64, not 64"),
    ({"overlap": -1}, "overlap must be from 0"),
])  # fmt: skip
def test_invalid_options_are_refused_with_their_key(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        EmbeddingOptions(**settings).resolved(engine_of(seq_length=66))


def test_a_rotary_model_accepts_a_window_longer_than_in_training(engine: Engine) -> None:
    options = EmbeddingOptions(window=1000).resolved(engine)
    assert (options.window, options.overlap) == (1000, 500)
    assert EmbeddingOptions().resolved(engine) == options.replace(layers=(2,), window=64, overlap=32)


@pytest.mark.parametrize("options", [
    EVERYTHING,
    EmbeddingOptions(layers=(0, 2), dtype="float16", residues=True),
    EmbeddingOptions(mean=False, logits=True, long_proteins="truncate", pseudo_perplexity=True),
])  # fmt: skip
def test_the_predicted_size_of_an_embedding_is_exact(
    engine: Engine, long_proteins: list[Protein], options: EmbeddingOptions
) -> None:
    resolved = options.resolved(engine)
    for embedding, protein in zip(embed_proteins(engine, long_proteins, options), long_proteins, strict=True):
        told = sum(array.nbytes for array in embedding.arrays.values()) + 8 * options.pseudo_perplexity
        assert resolved.bytes_of(protein.residues, 32) == told


@pytest.mark.parametrize("settings", [
    {}, {"long_proteins": "truncate"}, {"pseudo_perplexity": True},
    {"mean": False, "pseudo_perplexity": True, "long_proteins": "truncate"}, {"window": 30, "overlap": 29},
])  # fmt: skip
def test_progress_adds_up_to_all_residues(
    engine: Engine, long_proteins: list[Protein], settings: dict[str, Any]
) -> None:
    told: list[int] = []
    small_batches = Engine(engine.encoder, engine.config, 150)
    embed_proteins(small_batches, long_proteins, EmbeddingOptions(**settings), told.append)
    assert sum(told) == sum(protein.residues for protein in long_proteins)
    assert len(told) > 1
    assert min(told) > 0


def test_no_proteins_give_no_embeddings(engine: Engine) -> None:
    assert embed_proteins(engine, [], EVERYTHING) == []


# --- pseudo-perplexity ------------------------------------------------------------------------------------------------


@torch.no_grad()
def surprise(model: torch.nn.Module, tokens: NDArray[np.uint8], place: int) -> float:
    """Return -log p of one residue, computed in float64 with only that residue masked."""
    shown = tokens.copy()
    shown[place] = MASK_ID
    row = pack(shown, np.array([len(shown)]))
    scores = model.double()(row.tokens, row.positions, row.cu_seqlens, row.max_seqlen)
    return -float(scores[place + 1].double().log_softmax(-1)[tokens[place]])


@pytest.mark.parametrize("family", FAMILIES)
def test_pseudo_perplexity_masks_each_residue_once(family: str, proteins: list[Protein]) -> None:
    some = [proteins[1], proteins[7], proteins[0]]
    options = EmbeddingOptions(mean=False, pseudo_perplexity=True)
    found = embed_proteins(engine_of(100, **FAMILIES[family]), some, options)
    twin = tiny_model(**FAMILIES[family]).encoder
    for embedding, protein in zip(found, some, strict=True):
        surprises = [surprise(twin, protein.tokens, place) for place in range(protein.residues)]
        assert embedding.arrays == {}
        assert embedding.pseudo_perplexity == pytest.approx(np.exp(np.mean(surprises)), rel=1e-5)


def test_pseudo_perplexity_of_a_long_protein_centres_the_window_on_each_residue(long_proteins: list[Protein]) -> None:
    sizes = FAMILIES["ESM-2"] | {"seq_length": 66}
    protein = long_proteins[4]
    options = EmbeddingOptions(pseudo_perplexity=True)
    found = embed_proteins(engine_of(**sizes), [protein], options)[0]
    twin, surprises = tiny_model(**sizes).encoder, []
    for place in range(129):
        begin = min(max(place - 32, 0), 129 - 64)
        surprises.append(surprise(twin, protein.tokens[begin : begin + 64], place - begin))
    assert found.pseudo_perplexity == pytest.approx(np.exp(np.mean(surprises)), rel=1e-5)
    cut = options.replace(long_proteins="truncate")
    short = Protein("short", protein.tokens[:64], 1)
    cut_found = embed_proteins(engine_of(**sizes), [protein, short], cut)
    assert cut_found[0].pseudo_perplexity == pytest.approx(cut_found[1].pseudo_perplexity, rel=1e-9)
    assert cut_found[0].pseudo_perplexity != pytest.approx(found.pseudo_perplexity, rel=1e-3)


# --- precision --------------------------------------------------------------------------------------------------------


def test_float16_rounds_only_the_final_values(engine: Engine, long_proteins: list[Protein]) -> None:
    exact = embed_proteins(engine, long_proteins, EVERYTHING)
    for rounded, whole in zip(
        embed_proteins(engine, long_proteins, EVERYTHING.replace(dtype="float16")), exact, strict=True
    ):
        for name, array in whole.arrays.items():
            assert rounded.arrays[name].dtype == np.float16
            assert np.array_equal(rounded.arrays[name], array.astype(np.float16))


@pytest.mark.parametrize("which", [0, 1])
def test_values_beyond_the_float16_range_are_an_error(long_proteins: list[Protein], which: int) -> None:
    engine = engine_of(**FAMILIES["ESM-2"], seq_length=66)
    with torch.no_grad():
        engine.encoder.encoder.final_layernorm.weight *= 1e6
    some = [long_proteins[which]]
    assert np.abs(embed_proteins(engine, some, EmbeddingOptions(cls=True))[0].arrays["cls_2"]).max() > 65_504
    with pytest.raises(UserError, match=rf"record {which + 1} \(l{which}\): \w+_2 is beyond .*65,504; .*dtype=float32"):
        embed_proteins(engine, some, EmbeddingOptions(layers=(0, 2), cls=True, dtype="float16"))


def test_nonfinite_values_are_an_error(proteins: list[Protein]) -> None:
    engine = engine_of()
    with torch.no_grad():
        engine.encoder.encoder.final_layernorm.weight *= 1e39
    with pytest.raises(UserError, match="model's own numbers overflow"):
        embed_proteins(engine, proteins, EmbeddingOptions())


def test_bfloat16_embeddings_are_close_and_means_are_computed_in_float32(
    tmp_path: Path, proteins: list[Protein], long_proteins: list[Protein]
) -> None:
    tiny_model(**FAMILIES["ESM-2"], seq_length=66, init_method_std=0.1).save_to(str(tmp_path / "m.nemo"))
    exact, coarse = (Engine.load(tmp_path / "m.nemo", "cpu", precision) for precision in ("32", "bf16"))
    assert coarse.dtype == torch.bfloat16
    everyone = [*proteins, *long_proteins]
    for one, two in zip(
        embed_proteins(exact, everyone, EVERYTHING), embed_proteins(coarse, everyone, EVERYTHING), strict=True
    ):
        assert one.arrays.keys() == two.arrays.keys()
        for layer in range(3):
            near = np.abs(two.arrays[f"residues_{layer}"] - one.arrays[f"residues_{layer}"]).mean()
            assert near < 0.05, layer
            own_mean = two.arrays[f"residues_{layer}"].astype(np.float64).mean(axis=0)
            np.testing.assert_allclose(two.arrays[f"mean_{layer}"], own_mean, atol=2e-6, rtol=0)
