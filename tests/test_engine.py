"""The engine: loading models at any precision, and log probabilities at any batch size."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from bionemo_esm.alphabet import MASK_ID, encode
from bionemo_esm.data.collate import pack
from bionemo_esm.data.store import SequenceSplit
from bionemo_esm.errors import ConfigError
from bionemo_esm.inference import engine_options
from bionemo_esm.inference.batching import MaskedQuery, batches_by_length, each_masked, masked
from bionemo_esm.inference.engine import Engine
from bionemo_esm.inference.engine_options import EngineConfig
from bionemo_esm.inference.protein_model import ProteinModel
from bionemo_esm.model import backends
from bionemo_esm.model.archive import Archive, ArchiveError, ArchiveFile, read_archive, write_archive
from bionemo_esm.model.esm1nv import ESM1nvModel
from models import tiny_model

CRAMBIN = encode("TTCCPSIVARSNFNVCRLPGTPEALCATYTGCIIIPGATCPGDYAN")
FAMILIES: dict[str, dict[str, Any]] = {
    "ESM-1nv": {},
    "ESM-1b": {"token_dropout": True, "embedding_layernorm": True, "position_offset": 2},
    "ESM-2": {"token_dropout": True, "position_embedding": "rotary", "contact_head": True},
}


def logits_of(model: ESM1nvModel, tokens: NDArray[np.uint8]) -> torch.Tensor:
    with torch.no_grad():
        return model.logits(pack(tokens, np.array([len(tokens)])))


def saved(model: ESM1nvModel, path: Path) -> Path:
    model.save_to(str(path))
    return path


# --- loading ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("stored", ["32", "bf16"])
def test_a_loaded_model_gives_the_logits_of_the_saved_model(family: str, stored: str, tmp_path: Path) -> None:
    model = tiny_model(stored, **FAMILIES[family])
    engine = Engine.load(saved(model, tmp_path / "m.nemo"), "cpu", stored)
    row = engine.packed([CRAMBIN])
    with torch.no_grad():
        states = engine.encoder.hidden_states(row.tokens, row.positions, row.cu_seqlens, row.max_seqlen)
    assert torch.equal(engine.encoder.logits(states), logits_of(model, CRAMBIN))
    assert engine.dtype == {"32": torch.float32, "bf16": torch.bfloat16}[stored]
    assert engine.weights_sha256 == ArchiveFile.open(tmp_path / "m.nemo").weights_sha256
    assert engine.source == tmp_path / "m.nemo"


@pytest.mark.parametrize(("stored", "precision"), [("32", "bf16"), ("bf16", "32")])
def test_a_model_can_compute_in_a_precision_other_than_the_stored_one(
    stored: str, precision: str, tmp_path: Path
) -> None:
    model = tiny_model(stored, **FAMILIES["ESM-2"])
    engine = Engine.load(saved(model, tmp_path / "m.nemo"), "cpu", precision)
    weights = dict(model.encoder.named_parameters())
    for name, parameter in engine.encoder.named_parameters():
        assert parameter.dtype == engine.dtype
        assert torch.equal(parameter, weights[name].to(engine.dtype)), name
    for name, buffer in engine.encoder.named_buffers():
        assert buffer.dtype == torch.float32, name
        assert torch.equal(buffer, dict(model.encoder.named_buffers())[name])


def test_a_training_checkpoint_can_be_loaded(tmp_path: Path) -> None:
    model = tiny_model()
    archive = read_archive(saved(model, tmp_path / "m.nemo"))
    state = {"optimizer": {"step": 7}, "moments": torch.ones(3)}
    path = write_archive(
        tmp_path / "step.ckpt", Archive(archive.model_class, archive.config, archive.weights, state=state)
    )
    row = (engine := Engine.load(path, "cpu")).packed([CRAMBIN])
    with torch.no_grad():
        assert torch.equal(engine.encoder(row.tokens, row.positions, row.cu_seqlens, row.max_seqlen),
                           logits_of(model, CRAMBIN))  # fmt: skip


def test_dropout_is_disabled(tmp_path: Path) -> None:
    model = tiny_model(hidden_dropout=0.5, attention_dropout=0.5)
    path = saved(model, tmp_path / "m.nemo")
    model.train()
    query = masked(CRAMBIN, np.array([3]))
    expected = next(Engine.load(path, "cpu").log_probabilities([query]))
    for engine in (Engine.load(path, "cpu"), Engine(model.encoder, model.encoder_config)):
        assert np.array_equal(next(engine.log_probabilities([query])), expected)


@pytest.mark.parametrize(("family", "window", "longest"), [("ESM-1b", 510, 510), ("ESM-2", 510, None)])
def test_the_engine_reports_its_window_and_its_layers(family: str, window: int, longest: int | None) -> None:
    model = tiny_model(**FAMILIES[family])
    engine = Engine(model.encoder, model.encoder_config)
    assert (engine.window, engine.longest, engine.layers) == (window, longest, 2)
    assert [engine.layer(number) for number in (-3, -2, -1, 0, 1, 2)] == [0, 1, 2, 0, 1, 2]
    for number in (-4, 3):
        with pytest.raises(ConfigError, match=rf"layer {number}: the model has 0 \(the embeddings\) to 2"):
            engine.layer(number)


@pytest.mark.parametrize(("settings", "message"), [
    ({"device": "tpu"}, "device must be auto, cpu, cuda or cuda:N, not 'tpu'"),
    ({"device": "mps"}, "device must be auto, cpu, cuda or cuda:N, not 'mps'"),
    ({"device": "cuda:99"}, "device=cuda:99: there are [0-9]+ CUDA devices here; device=cpu works"),
    ({"precision": "16"}, "^precision must be one of auto, 32, bf16, not '16'"),
    ({"batch_tokens": 0}, "batch_tokens must be at least 1, or null, not 0"),
])  # fmt: skip
def test_settings_are_checked_before_the_file_is_opened(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        Engine.load("nowhere.nemo", **settings)


def test_precision_names_map_to_parameter_dtypes() -> None:
    dtypes = {precision: backends.parameter_dtype(precision, "cpu") for precision in engine_options.PRECISIONS}
    assert (
        dtypes["32"] == torch.float32 and dtypes["bf16"] == torch.bfloat16 and dtypes.keys() == {"auto", "32", "bf16"}
    )


def test_sizes_are_available_without_importing_torch(tmp_path: Path) -> None:
    engine = Engine.load(saved(tiny_model(), tmp_path / "m.nemo"), "cpu")
    sizes = EngineConfig(model=tmp_path / "m.nemo").check()
    assert (sizes.config, sizes.window, sizes.longest) == (engine.config, engine.window, engine.longest)
    script = (
        "import sys; from pathlib import Path; from bionemo_esm.inference.engine_options import EngineConfig\n"
        f"EngineConfig(model=Path({str(tmp_path / 'm.nemo')!r})).check(); sys.exit('torch' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", script], check=False).returncode == 0


def spoil(path: Path, name: str) -> None:
    content = bytearray(path.read_bytes())
    section = ArchiveFile.open(path).sections[name]
    content[section.start + section.size - 3] ^= 1
    path.write_bytes(content)


def test_a_file_that_is_not_a_model_is_refused(tmp_path: Path) -> None:
    (tmp_path / "folder.nemo").mkdir()
    (tmp_path / "text.nemo").write_text(">P1\nMKV\n")
    saved(tiny_model(), tmp_path / "damaged.nemo")
    spoil(tmp_path / "damaged.nemo", "model_weights.safetensors")
    saved(tiny_model(), tmp_path / "cut.nemo")
    os.truncate(tmp_path / "cut.nemo", 9000)
    for name, message in (
        ("none.nemo", "none.nemo: no such file; give a .nemo"),
        ("folder.nemo", "folder.nemo: is a folder"),
        ("text.nemo", "text.nemo: is not an archive of ours; `bionemo-esm convert`"),
        ("damaged.nemo", "damaged.nemo.*model_weights.safetensors"),
        ("cut.nemo", "cut.nemo"),
    ):
        with pytest.raises(ArchiveError, match=message):
            ProteinModel.load(tmp_path / name, "cpu")


def test_nonfinite_weights_are_refused(tmp_path: Path) -> None:
    archive = read_archive(saved(tiny_model(), tmp_path / "m.nemo"))
    weights = dict(archive.weights)
    name = "encoder.encoder.final_layernorm.bias"
    weights[name] = torch.full_like(weights[name], torch.nan)
    write_archive(tmp_path / "nan.nemo", Archive(archive.model_class, archive.config, weights))
    with pytest.raises(ArchiveError, match=r"final_layernorm\.bias"):
        Engine.load(tmp_path / "nan.nemo", "cpu")


# --- queries ----------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def queries(tiny_split: SequenceSplit) -> list[MaskedQuery]:
    """Return queries about one or several positions, masked and visible, in proteins of 1 to 60 residues."""
    generator, asked = np.random.default_rng(1), []
    for index, length in enumerate((46, 1, 60, 2, 33, 46, 46, 9)):
        tokens = tiny_split[10 + index][:length]
        places = np.sort(generator.choice(length, size=min(length, 1 + index), replace=False))
        asked.append(masked(tokens, places) if index % 3 else MaskedQuery(tokens, places))
    return [*asked, MaskedQuery(CRAMBIN, np.arange(len(CRAMBIN)))]


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("batch_tokens", [1, 100, 100_000])
def test_log_probabilities_match_a_softmax_over_all_logits(
    family: str, batch_tokens: int, queries: list[MaskedQuery]
) -> None:
    model = tiny_model(**FAMILIES[family])
    told: list[int] = []
    answers = list(Engine(model.encoder, model.encoder_config, batch_tokens).log_probabilities(queries, told.append))
    assert sum(told) == sum(len(query.tokens) for query in queries)
    assert len(told) == {1: 9, 100: 5, 100_000: 1}[batch_tokens]
    for query, answer in zip(queries, answers, strict=True):
        scores = logits_of(model, query.tokens)[1:-1][query.positions].double().log_softmax(-1)
        assert answer.dtype == np.float64
        assert answer.shape == (len(query.positions), 33)
        np.testing.assert_allclose(answer, scores.numpy(), atol=1e-5, rtol=0)
        np.testing.assert_allclose(np.exp(answer).sum(axis=1), 1, rtol=1e-12)


def test_queries_are_consumed_lazily(queries: list[MaskedQuery]) -> None:
    model, taken = tiny_model(), 0

    def asked() -> Iterator[MaskedQuery]:
        nonlocal taken
        for query in queries:
            taken += 1
            yield query

    answers = Engine(model.encoder, model.encoder_config, 100).log_probabilities(asked())
    next(answers)
    assert taken == 3, "a batch, and the question that did not fit into it"
    assert list(Engine(model.encoder, model.encoder_config).log_probabilities([])) == []


def test_masking_does_not_modify_the_input_tokens() -> None:
    tokens = CRAMBIN.copy()
    query = masked(tokens, np.array([1, 4]))
    assert np.array_equal(tokens, CRAMBIN)
    assert np.flatnonzero(query.tokens == MASK_ID).tolist() == [1, 4]
    alone = list(each_masked(tokens, [0, 45]))
    assert [np.flatnonzero(each.tokens == MASK_ID).tolist() for each in alone] == [[0], [45]]
    assert [each.positions.tolist() for each in alone] == [[0], [45]]
    assert np.array_equal(np.delete(alone[1].tokens, 45), np.delete(CRAMBIN, 45))


# --- batches ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("batch_tokens", [1, 50, 1000])
def test_batches_are_full_sorted_and_complete(batch_tokens: int) -> None:
    lengths = np.random.default_rng(0).integers(1, 120, size=60)
    batches = batches_by_length(lengths, batch_tokens)
    order = np.concatenate(batches)
    assert sorted(order.tolist()) == list(range(60))
    assert np.all(np.diff(lengths[order]) <= 0)
    tokens = [int((lengths[batch] + 2).sum()) for batch in batches]
    assert all(size <= batch_tokens or len(batch) == 1 for size, batch in zip(tokens, batches, strict=True))
    for size, following in zip(tokens, batches[1:], strict=False):
        assert size + lengths[following[0]] + 2 > batch_tokens, "the next one would have fitted"
    assert batches_by_length(np.zeros(0, dtype=np.int64), 100) == []
