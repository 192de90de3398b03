"""The archive of a fine-tuned model: contents, readers, and refusal of inconsistent archives."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from nemo.core.classes import ModelPT

from bionemo_esm import FineTunedPredictor
from bionemo_esm import __main__ as command_line
from bionemo_esm.errors import ConfigError
from bionemo_esm.finetuning.archive import FineTunedFile, archive_config
from bionemo_esm.finetuning.batches import Collator
from bionemo_esm.finetuning.config import AdapterConfig, Parts, ReadingConfig
from bionemo_esm.finetuning.splits import LabelledDataset
from bionemo_esm.finetuning.tasks import CLASSIFICATION, SEQUENCE, Task
from bionemo_esm.inference.embedding.embeddings import embed_proteins
from bionemo_esm.inference.embedding.options import EmbeddingOptions
from bionemo_esm.inference.engine import Engine
from bionemo_esm.model import validate as consistency
from bionemo_esm.model.archive import Archive, ArchiveError, ArchiveFile, read_archive, write_archive
from bionemo_esm.model.esm1nv import ESM1nvModel
from bionemo_esm.model.validate import check_sizes
from fine_tuned import (
    ADAPTERS,
    CONV,
    LETTERS,
    LINEAR,
    NUMBER,
    PLACES,
    PROTEINS,
    READING,
    TASKS,
    archive,
    changed,
    fine_tuned,
    proteins,
)  # fmt: skip
from models import tiny_model

QKV, FC2 = "encoder.encoder.layers.1.self_attention.linear_qkv", "encoder.encoder.layers.0.mlp.linear_fc2"
ALL = EmbeddingOptions(layers=(0, 1, 2), residues=True)


def states(engine: Engine) -> list[dict[str, Any]]:
    return [embedding.arrays for embedding in embed_proteins(engine, proteins(), ALL)]


def assert_close(one: list[dict[str, Any]], other: list[dict[str, Any]], within: float) -> None:
    for left, right in zip(one, other, strict=True):
        assert left.keys() == right.keys()
        for name, array in left.items():
            np.testing.assert_allclose(array, right[name], rtol=0, atol=within)


# Readers


@pytest.mark.parametrize("task", TASKS, ids=lambda task: task.name)
@pytest.mark.parametrize("adapters", [None, ADAPTERS], ids=["whole", "lora"])
def test_a_written_archive_is_read_back_exactly(task: Task, adapters: AdapterConfig | None, tmp_path: Path) -> None:
    opened = FineTunedFile.open(fine_tuned(tmp_path / "a.nemo", task, CONV, adapters=adapters))
    assert (opened.task, opened.parts) == (task, Parts(CONV, READING, adapters))
    weights, head = read_archive(tmp_path / "a.nemo").weights, opened.head()
    assert not head.training
    for name, tensor in head.state_dict().items():
        assert tensor.dtype == torch.float32
        torch.testing.assert_close(tensor, weights[f"head.{name}"], rtol=0, atol=0)


def test_equal_models_give_equal_bytes(tmp_path: Path) -> None:
    one, other = (fine_tuned(tmp_path / name, PLACES, adapters=ADAPTERS) for name in ("one.nemo", "other.nemo"))
    assert one.read_bytes() == other.read_bytes()


def test_building_the_head_draws_no_random_numbers(tmp_path: Path) -> None:
    opened = FineTunedFile.open(fine_tuned(tmp_path / "a.nemo", LETTERS))
    before = torch.get_rng_state()
    opened.head()
    assert torch.equal(torch.get_rng_state(), before)


def test_its_encoder_matches_the_pretrained_encoder(tmp_path: Path) -> None:
    plain = tmp_path / "plain.nemo"
    tiny_model().save_to(str(plain))
    tuned = Engine.load(fine_tuned(tmp_path / "tuned.nemo", LETTERS), "cpu")
    assert_close(states(tuned), states(Engine.load(plain, "cpu")), 0)
    assert tuned.weights_sha256 == ArchiveFile.open(tmp_path / "tuned.nemo").weights_sha256


@pytest.mark.parametrize(("precision", "within"), [("32", 1e-5), ("bf16", 0.5)])
def test_unmerged_adapters_give_the_states_of_merged_weights(precision: str, within: float, tmp_path: Path) -> None:
    engine = Engine.load(fine_tuned(tmp_path / "lora.nemo", LETTERS, adapters=ADAPTERS), "cpu", precision)
    held = read_archive(tmp_path / "lora.nemo")
    names = [name.removesuffix(".lora_a") for name in held.weights if name.endswith(".lora_a")]
    assert {QKV, FC2} < set(names)
    merged = {}
    for name in names:
        weight, lora_a, lora_b = (held.weights[f"{name}.{part}"].double() for part in ("weight", "lora_a", "lora_b"))
        merged[f"{name}.weight"] = (weight + ADAPTERS.scale * lora_b @ lora_a).float()
    weights = {name: tensor for name, tensor in held.weights.items() if "lora" not in name and "head." not in name[:5]}
    config = {key: held.config[key] for key in ("encoder", "precision", "seed")}
    write_archive(tmp_path / "merged.nemo", Archive("ESM1nvModel", config, weights | merged))
    assert not [name for name, _ in engine.encoder.named_parameters() if "lora" in name]
    assert_close(states(engine), states(Engine.load(tmp_path / "merged.nemo", "cpu")), within)
    tiny_model().save_to(str(tmp_path / "plain.nemo"))
    with pytest.raises(AssertionError):
        assert_close(states(engine), states(Engine.load(tmp_path / "plain.nemo", "cpu")), within)


@pytest.mark.parametrize("adapters", [None, ADAPTERS], ids=["whole", "lora"])
@pytest.mark.parametrize("task", [LETTERS, NUMBER], ids=lambda task: task.name)
def test_the_model_restored_by_nemo_gives_equal_predictions(
    task: Task, adapters: AdapterConfig | None, tmp_path: Path
) -> None:
    path = fine_tuned(tmp_path / "a.nemo", task, CONV, adapters=adapters)
    model: Any = ModelPT.restore_from(str(path), map_location="cpu")
    some = proteins()
    unknown = [np.full(protein.residues if task.is_per_residue else 1, np.nan, np.float32) for protein in some]
    batch = Collator(task, LabelledDataset(some, unknown), READING)(np.arange(len(some)))
    expected = FineTunedPredictor.load(path, "cpu").predict(some)
    for one, other in zip(model.predictions(batch), expected, strict=True):
        np.testing.assert_allclose(one, other, rtol=0, atol=1e-4 if task == NUMBER else 1e-5)


def test_it_cannot_be_restored_as_a_pretrained_model(tmp_path: Path) -> None:
    path = fine_tuned(tmp_path / "a.nemo", LETTERS)
    with pytest.raises(ArchiveError, match=r"holds a model of class 'ESMFineTunedModel', not a ESM1nvModel"):
        ESM1nvModel.restore_from(str(path))


def test_a_pretrained_model_cannot_be_loaded_as_a_predictor(tmp_path: Path) -> None:
    tiny_model().save_to(str(tmp_path / "plain.nemo"))
    with pytest.raises(ArchiveError, match=r"plain\.nemo: holds a model of class 'ESM1nvModel'.*bionemo-esm finetune"):
        FineTunedPredictor.load(tmp_path / "plain.nemo", "cpu")


def test_the_encoder_may_be_stored_in_bf16_but_not_the_head(tmp_path: Path) -> None:
    path = fine_tuned(tmp_path / "a.nemo", LETTERS, adapters=ADAPTERS, precision="bf16")
    dtypes = {name: info.dtype for name, info in ArchiveFile.open(path).weights.infos.items()}
    assert dtypes[f"{QKV}.weight"] == "BF16"
    assert dtypes[f"{QKV}.lora_a"] == dtypes["head.output.weight"] == "F32"
    assert len(FineTunedPredictor.load(path, "cpu").predict(proteins())) == len(PROTEINS)
    narrow = archive(LETTERS, Parts(LINEAR, READING, None), "bf16")
    write_archive(path, changed(narrow, **{"head.output.bias": narrow.weights["head.output.bias"].bfloat16()}))
    with pytest.raises(ArchiveError, match=r"tensor 'head\.output\.bias' has dtype BF16; it is F32 at any precision"):
        check_sizes(ArchiveFile.open(path))


# Refusals


def tensor(*shape: int) -> torch.Tensor:
    return torch.zeros(shape)


def task(**values: Any) -> dict[str, Any]:
    return {"task": LETTERS.to_dict() | values}


def part(key: str, **values: Any) -> dict[str, Any]:
    return {key: Parts(LINEAR, READING, ADAPTERS).to_dict()[key] | values}


CONFIGS: dict[str, tuple[dict[str, Any], str]] = {
    "without-a-task": ({"task": ...}, "'task' is missing"),
    "without-a-head": ({"head": ...}, "'head' is missing"),
    "another-key": ({"tail": 1}, "'tail' is not a key of a model"),
    "task-is-a-list": ({"task": ["H", "E"]}, "task must be a mapping"),
    "task-is-null": ({"task": None}, "task must be a mapping"),
    "head-is-a-number": ({"head": 3}, "head must be a mapping"),
    "reading-is-text": ({"reading": "layer"}, "reading must be a mapping"),
    "adapters-are-false": ({"adapters": False}, "adapters must be a mapping"),
    "classes-is-a-number": (task(classes=10**9), "task.classes must be a list"),
    "classes-are-numbers": (task(classes=[1, 2, 3]), "classes of a task must be texts"),
    "a-class-more": (task(classes=["H", "E", "C", "X"]), "one of the two is not of this model"),
    "a-class-twice": (task(classes=["H", "E", "E"]), "two or more different classes"),
    "level": (task(level="atom"), "task.level must be one of residue, sequence"),
    "level-is-a-list": (task(level=["residue"]), "task.level must be one of residue, sequence"),
    "scale-of-zero": (task(target_scale=0.0), "target_scale must be positive"),
    "scale-is-true": (task(target_scale=True), "task.target_scale must be a number"),
    "name-missing": ({"task": {"level": "residue"}}, "task.classes is missing"),
    "head-of-no-kind": (part("head", kind="oracle"), "head.kind must be one of"),
    "head-without-end": (part("head", kind="mlp", hidden=10**18), "head.hidden may be up to"),
    "head-too-large": (part("head", kind="convnet", hidden=2**20, kernel_size=2**20 - 1), "one of the two is not"),
    "kernel-without-end": (part("head", kind="convnet", kernel_size=10**9 + 1), "head.kernel_size may be up to"),
    "attention-over-one-residue": (part("head", kind="attention"), "head.kind attention"),
    "half-a-layer": (part("reading", layer=1.5), "reading.layer must be an integer"),
    "layer-above-the-last": (part("reading", layer=3), "reading.layer is 3, the encoder has 0"),
    "window-beyond-the-positions": (part("reading", window=511), "the encoder reads up to 510 residues"),
    "rank-without-end": (part("adapters", rank=10**12), "adapters.rank may be up to"),
    "adapters-that-are-not-there": (part("adapters"), "one of the two is not of this model"),
    "adapters-on-nothing": (part("adapters", targets=["linear_zero"]), "lora.targets must be one of"),
    "endless-encoder": ({"encoder": {"hidden_size": 2**62, "num_attention_heads": 1}}, "one of the two is not"),
}  # fmt: skip


@pytest.mark.parametrize("case", CONFIGS.values(), ids=CONFIGS)
def test_a_configuration_that_contradicts_the_weights_is_refused(
    case: tuple[dict[str, Any], str], tmp_path: Path
) -> None:
    values, message = case
    whole = archive(LETTERS, Parts(LINEAR, READING, None))
    write_archive(tmp_path / "evil.nemo", changed(whole, values))
    for read in (Engine.load, FineTunedPredictor.load, lambda path: ModelPT.restore_from(str(path))):
        with pytest.raises(ArchiveError) as caught:
            read(tmp_path / "evil.nemo")
        assert "evil.nemo: model_config.yaml" in str(caught.value)
        assert message in str(caught.value)


WEIGHTS: dict[str, tuple[dict[str, Any], str]] = {
    "head-missing": ({"head.output.weight": ...}, "one of the two is not of this model"),
    "head-under-another-name": (
        {"head.output.weight": ..., "head.answer.weight": tensor(3, 32)}, "tensor 'head.output.weight' is missing"
    ),
    "head-turned-over": ({"head.output.weight": tensor(32, 3)}, "has shape [32, 3], the model [3, 32]"),
    "head-of-more-classes": ({"head.output.weight": tensor(4, 32)}, "one of the two is not of this model"),
    "a-tensor-more": ({"head.more": tensor(1)}, "one of the two is not of this model"),
    "an-empty-tensor-more": ({"head.more": tensor(0)}, "tensor 'head.more' is not part of this model"),
    "adapter-of-another-rank": (
        {f"{QKV}.lora_a": tensor(4, 16)}, "has shape [4, 16], the model [2, 32]"
    ),
    "not-finite": ({"head.output.bias": torch.full((3,), torch.nan)}, "holds NaN or infinity"),
}  # fmt: skip


@pytest.mark.parametrize("case", WEIGHTS.values(), ids=WEIGHTS)
def test_weights_that_contradict_the_configuration_are_refused(
    case: tuple[dict[str, Any], str], tmp_path: Path
) -> None:
    values, message = case
    whole = archive(LETTERS, Parts(LINEAR, READING, ADAPTERS))
    write_archive(tmp_path / "evil.nemo", changed(whole, **values))
    readers: list[Callable[[Path], Any]] = [FineTunedPredictor.load, lambda path: ModelPT.restore_from(str(path))]
    for read in readers:
        with pytest.raises(ArchiveError) as caught:
            read(tmp_path / "evil.nemo")
        assert str(tmp_path / "evil.nemo") in str(caught.value)
        assert message in str(caught.value)


def test_a_flipped_bit_of_the_head_is_found(tmp_path: Path) -> None:
    path = fine_tuned(tmp_path / "a.nemo", LETTERS)
    content = bytearray(path.read_bytes())
    bias = read_archive(path).weights["head.output.bias"].numpy().tobytes()
    content[content.index(bias)] ^= 1
    path.write_bytes(content)
    with pytest.raises(ArchiveError, match="does not match its BLAKE3"):
        FineTunedPredictor.load(path, "cpu")


def test_a_pretrained_archive_with_a_head_is_refused(tmp_path: Path) -> None:
    whole = archive(LETTERS, Parts(LINEAR, READING, None))
    config = {key: whole.config[key] for key in ("encoder", "precision", "seed")}
    write_archive(tmp_path / "plain.nemo", Archive("ESM1nvModel", config, whole.weights))
    with pytest.raises(ArchiveError, match="one of the two is not of this model"):
        Engine.load(tmp_path / "plain.nemo", "cpu")


@pytest.mark.parametrize("name", ["${oc.env:HOME}", "nemo:x"])
def test_an_unstorable_class_name_is_refused_before_training(name: str) -> None:
    encoder = tiny_model().encoder_config
    odd = Task(name="location", level=SEQUENCE, kind=CLASSIFICATION, metric="f1", classes=("a", name))
    with pytest.raises(ConfigError, match="an archive cannot hold it, so give it another name"):
        archive_config(encoder, "32", 1, odd, Parts(LINEAR, READING, None))
    with pytest.raises(ConfigError, match=r"reading\.layer is 3"):
        archive_config(encoder, "32", 1, LETTERS, Parts(LINEAR, ReadingConfig(layer=3, window=100, overlap=50), None))


def test_checking_a_pretrained_archive_imports_no_fine_tuning_module(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    tiny_model().save_to(str(tmp_path / "plain.nemo"))
    monkeypatch.setattr(consistency, "import_module", lambda name: pytest.fail(f"{name} was imported"))
    check_sizes(ArchiveFile.open(tmp_path / "plain.nemo"))


# Summary


def card(path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.setattr(sys, "argv", ["bionemo-esm", "inspect", str(path)])
    command_line.main()
    return capsys.readouterr().out


def test_the_summary_shows_the_task_and_the_fine_tuning(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    path = fine_tuned(tmp_path / "a.nemo", LETTERS, CONV, adapters=ADAPTERS)
    lines = [line.split(maxsplit=1) for line in card(path, capsys, monkeypatch).splitlines() if line]
    for label, text in (
        ("class", "ESMFineTunedModel"),
        ("task", "secondary_structure: classification per residue, 3 classes"),
        ("classes", "H; E; C"),
        ("head", "dropout 0.25, hidden 4, kernel_size 5, kind convnet, pooling mean"),
        ("reading", "layer 2, overlap 40, window 100"),
        ("adapters", "alpha 16, dropout 0, rank 2, targets linear_qkv; linear_fc2"),
        ("fine-tuning", "base: file pretrained.nemo, weights_sha256"),
        ("validation:", "accuracy 0.71875"),
    ):
        assert [label, text] in lines


@pytest.mark.parametrize("told", [[1, {"a": []}], {}, {"x": None}, "text", 7, {str(n): n for n in range(30)}])
def test_the_summary_accepts_arbitrary_fine_tuning_records(
    told: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = archive(LETTERS, Parts(LINEAR, READING, None))
    for number, odd in enumerate((LETTERS.to_dict(), {"classes": []}, [], "task", LETTERS.to_dict() | {"classes": 7})):
        path = tmp_path / f"odd{number}.nemo"
        write_archive(
            path, Archive(whole.model_class, {**whole.config, "task": odd}, whole.weights, {"finetuning": told})
        )
        assert "ESMFineTunedModel" in card(path, capsys, monkeypatch)
