"""Tests of conversion in Python: sequence length, precision, and bit-exact round trips."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import EsmForMaskedLM

from bionemo_esm.alphabet import TOKENS
from bionemo_esm.errors import ConfigError, UserError
from bionemo_esm.model.archive import ArchiveFile, read_archive
from bionemo_esm.model.esm1nv import ESM1nvModel
from bionemo_esm.model.interchange.convert import export_model, import_model
from bionemo_esm.model.interchange.formats import FORMATS
from bionemo_esm.model.interchange.state_dict_adapter import interpolate_positions
from models import tiny_model
from peers import logits_of
from theirs import FAMILIES, hugging_face_model, saved

POSITIONS = "encoder.embedding.position_embeddings.weight"


def source(family: str) -> EsmForMaskedLM:
    return hugging_face_model(family, tokens=64, hidden_dropout_prob=0.1, attention_probs_dropout_prob=0.2)


@pytest.fixture(scope="module")
def sources(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder with a Hugging Face folder of each family and an archive of ours. Read-only."""
    base = tmp_path_factory.mktemp("sources")
    for family in FAMILIES:
        saved(source(family), base / family)
    tiny_model(seq_length=64).save_to(str(base / "ours.nemo"))
    return base


# --- sequence length and precision ------------------------------------------------------------------------------------


def test_position_table_is_cut_on_request(sources: Path, tmp_path: Path) -> None:
    whole = import_model(sources / "ESM-1b", tmp_path / "whole.nemo")
    report = import_model(sources / "ESM-1b", tmp_path / "cut.nemo", seq_length=40)
    before, after = read_archive(whole.output), read_archive(report.output)
    assert (before.config["encoder"]["seq_length"], after.config["encoder"]["seq_length"]) == (64, 40)
    assert torch.equal(after.weights[POSITIONS], before.weights[POSITIONS][:42])
    assert "position table cut from 64 to 40 tokens" in after.provenance["notes"]
    torch.testing.assert_close(logits_of(report.output), logits_of(whole.output), rtol=0, atol=0)


@pytest.mark.parametrize(("family", "offset"), [("ESM-1b", 2), ("ESM-1nv", 0)])
def test_position_table_is_stretched_only_on_request(sources: Path, tmp_path: Path, family: str, offset: int) -> None:
    with pytest.raises(ConfigError, match=r"positions for 64 tokens, not for 127; .* stretch_positions=true"):
        import_model(sources / family, tmp_path / "model.nemo", seq_length=127)
    assert list(tmp_path.iterdir()) == []
    before = read_archive(import_model(sources / family, tmp_path / "whole.nemo").output)
    report = import_model(sources / family, tmp_path / "model.nemo", seq_length=127, stretch_positions=True)
    after, old = read_archive(report.output), before.weights[POSITIONS]
    new = after.weights[POSITIONS]
    assert new.shape == (127 + offset, 32)
    assert torch.equal(new[:offset], old[:offset])
    assert torch.equal(new[offset::2], old[offset:])  # every second row is an old row
    middle = (old[offset:-1].double() + old[offset + 1 :].double()) / 2
    assert torch.equal(new[offset + 1 :: 2], middle.float())
    assert report.notes[-1] == "position table stretched by linear interpolation from 64 to 127 tokens"
    others = before.weights.keys() - {POSITIONS}
    assert all(torch.equal(before.weights[name], after.weights[name]) for name in others)


def test_position_interpolation_is_linear_and_keeps_the_ends() -> None:
    table = torch.tensor([[0.0, 1.0], [4.0, 1.0], [5.0, 3.0]])
    assert interpolate_positions(table, 5).tolist() == [[0, 1], [2, 1], [4, 1], [4.5, 2], [5, 3]]
    assert interpolate_positions(table, 7)[2].tolist() == pytest.approx([8 / 3, 1])
    assert interpolate_positions(table.bfloat16(), 9).dtype == torch.bfloat16


def test_rotary_model_takes_any_length_without_new_weights(sources: Path, tmp_path: Path) -> None:
    longer = import_model(sources / "ESM-2", tmp_path / "longer.nemo", seq_length=2_000)
    same = import_model(sources / "ESM-2", tmp_path / "same.nemo", seq_length=64)
    assert longer.config.seq_length == 2_000
    assert longer.weights_sha256 == same.weights_sha256
    assert "longest sequence set from 64 to 2,000 tokens" in longer.notes


@pytest.mark.parametrize(
    ("family", "options", "complaint"),
    [
        ("ESM-2", {"seq_length": 200, "stretch_positions": True}, "no table to be stretched"),
        ("ESM-1b", {"seq_length": 40, "stretch_positions": True}, "40 tokens are fewer than the model's 64"),
        ("ESM-1b", {"seq_length": 64, "stretch_positions": True}, "nothing to stretch"),
        ("ESM-1b", {"seq_length": 7}, "seq_length is 7 tokens"),
        ("ESM-1b", {"precision": "16"}, "precision must be 32 or bf16"),
        ("ESM-1b", {"revision": "main"}, "only a model on the Hub has revisions"),
    ],
    ids=["rotary", "shorter", "equal", "too short", "unknown precision", "a folder's revision"],
)  # fmt: skip
def test_invalid_conversion_options_are_refused(
    sources: Path, tmp_path: Path, family: str, options: dict[str, Any], complaint: str
) -> None:
    with pytest.raises(ConfigError, match=complaint):
        import_model(sources / family, tmp_path / "model.nemo", **options)
    assert list(tmp_path.iterdir()) == []


def test_precision_is_that_of_the_source_unless_given(sources: Path, tmp_path: Path) -> None:
    saved(source("ESM-2").bfloat16(), tmp_path / "half")
    half = import_model(tmp_path / "half", tmp_path / "half.nemo")
    wide = import_model(tmp_path / "half", tmp_path / "wide.nemo", precision="32")
    rounded = import_model(sources / "ESM-2", tmp_path / "rounded.nemo", precision="bf16")
    assert [report.precision for report in (half, wide, rounded)] == ["bf16", "32", "bf16"]
    weights = [read_archive(report.output).weights for report in (half, wide, rounded)]
    name, fixed = "encoder.lm_head.dense.weight", "encoder.contact_head.weight"
    assert [item[name].dtype for item in weights] == [torch.bfloat16, torch.float32, torch.bfloat16]
    assert {item[fixed].dtype for item in weights} == {torch.float32}
    assert torch.equal(weights[0][name].float(), weights[1][name])
    assert "weights rounded to bfloat16" in rounded.notes
    ESM1nvModel.restore_from(str(rounded.output))


def test_progress_ends_at_its_total(sources: Path, tmp_path: Path) -> None:
    told: list[tuple[int, int | None]] = []
    import_model(sources / "ESM-2", tmp_path / "model.nemo", progress=lambda done, total: told.append((done, total)))
    assert told[0][1] is None  # while the source is read and hashed
    done = [count for count, total in told if total is not None]
    assert done == sorted(done)
    assert told[-1][0] == told[-1][1]


# --- round trips ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", FAMILIES)
def test_hugging_face_round_trip_is_bit_exact(sources: Path, tmp_path: Path, family: str) -> None:
    report = import_model(sources / family, tmp_path / "model.nemo")
    export_model(report.output, tmp_path / "back", shard_bytes=40_000)
    before = EsmForMaskedLM.from_pretrained(sources / family)
    after, loading = EsmForMaskedLM.from_pretrained(tmp_path / "back", output_loading_info=True)
    assert not any(loading[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    first, second = before.state_dict(), after.state_dict()
    assert first.keys() == second.keys()
    assert all(torch.equal(first[name], second[name]) for name in first)
    told = [
        {key: value for key, value in model.config.to_dict().items() if not key.startswith(("_", "transformers"))}
        for model in (before, after)
    ]
    assert told[0] == told[1]


OURS: dict[str, dict[str, Any]] = {
    "ESM-1nv": {"hidden_dropout": 0.1, "attention_dropout": 0.2},
    "ESM-1b": {"embedding_layernorm": True, "token_dropout": True, "contact_head": True},
    "ESM-1b with unused rows": {"embedding_layernorm": True, "token_dropout": True, "position_offset": 2},
    "ESM-2": {"token_dropout": True, "position_embedding": "rotary", "contact_head": True},
}


@pytest.mark.parametrize("precision", ["32", "bf16"])
@pytest.mark.parametrize("family", OURS)
def test_archive_round_trip_through_hugging_face_is_bit_exact(tmp_path: Path, family: str, precision: str) -> None:
    model = tiny_model(precision, **OURS[family])
    with torch.no_grad():
        dict(model.named_parameters())["encoder.output_layer.bias"][len(TOKENS) :] = 0  # as in training
        for buffer in model.buffers():
            buffer.copy_(buffer.half())
    model.save_to(str(tmp_path / "ours.nemo"))
    export_model(tmp_path / "ours.nemo", tmp_path / "theirs", shard_bytes=40_000)
    report = import_model(tmp_path / "theirs", tmp_path / "back.nemo")
    ours = ArchiveFile.open(tmp_path / "ours.nemo")
    assert report.weights_sha256 == ours.weights_sha256
    assert {**ArchiveFile.open(report.output).config, "seed": 1} == dict(ours.config)


# --- formats of other packages ----------------------------------------------------------------------------------------

PLUGIN = """
import json
from pathlib import Path

from bionemo_esm.model.config import EncoderConfig
from bionemo_esm.model.interchange.export import DTYPES, ExportReport
from bionemo_esm.model.interchange.formats import ModelFormat
from bionemo_esm.model.interchange.state_dict_adapter import FAIR_ESM, SourceModel, SourceTensors, from_native
from bionemo_esm.model.tar_format import Section
from bionemo_esm.model.tensor_io import TensorTable, tensor_member
from bionemo_esm.model.validate import check_sizes


class PairFormat(ModelFormat):
    description, suffixes = "a pair of files", (".pair",)

    def detect(self, source):
        return source.endswith(".pair")

    def read(self, source, revision, tell):
        path = Path(source)
        config = EncoderConfig.from_config(json.loads(path.with_suffix(".json").read_text()))
        table = TensorTable.open(path, path.name, Section(0, path.stat().st_size))
        origin = {"imported_from": {"format": "pair", "source": path.name}}
        return SourceModel(FAIR_ESM, config, SourceTensors.of(source, [table], FAIR_ESM), origin)

    def write(self, file, target, *, precision, shard_bytes, progress):
        config, dtypes = check_sizes(file), {name: DTYPES["32"] for name in file.weights.infos}
        target.with_suffix(".json").write_text(json.dumps(config.to_dict()))
        with target.open("wb") as stream:
            tensor_member(from_native(config, dtypes, file.load_finite, FAIR_ESM)).write(stream)
        return ExportReport(target, config, "32", {target.name: target.stat().st_size}, ())


PAIR = PairFormat()
"""


def test_format_plugin_is_written_and_read(sources: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    info = tmp_path / "site" / "pair_plugin-1.0.dist-info"
    info.mkdir(parents=True)
    (info.parent / "pair_plugin.py").write_text(PLUGIN)
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: pair-plugin\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text("[bionemo_esm.formats]\npair = pair_plugin:PAIR\n")
    monkeypatch.syspath_prepend(info.parent)
    monkeypatch.setattr(FORMATS, "_plugins_loaded", False)
    monkeypatch.setattr(FORMATS, "_parts", dict(FORMATS._parts))
    first = import_model(sources / "ESM-2", tmp_path / "first.nemo")
    export_model(first.output, tmp_path / "theirs.pair")
    report = import_model(tmp_path / "theirs.pair", tmp_path / "back.nemo")
    assert report.weights_sha256 == first.weights_sha256
    assert report.provenance["imported_from"] == {"format": "pair", "source": "theirs.pair"}
    with pytest.raises(ConfigError, match=r"from a pair of files an archive is made, so its name must end in \.nemo"):
        import_model(tmp_path / "theirs.pair", tmp_path / "folder")


# --- errors -----------------------------------------------------------------------------------------------------------


def test_incomplete_model_leaves_no_output(sources: Path, tmp_path: Path) -> None:
    shutil.copytree(sources / "ESM-1b", tmp_path / "source")
    values = json.loads((tmp_path / "source" / "config.json").read_text())
    (tmp_path / "source" / "config.json").write_text(json.dumps({**values, "num_hidden_layers": 3}))
    with pytest.raises(UserError, match=r"num_hidden_layers is 3, but the weights are of 2 layers"):
        import_model(tmp_path / "source", tmp_path / "model.nemo")
    assert [path.name for path in tmp_path.iterdir()] == ["source"]


def test_import_and_export_refuse_the_other_direction(sources: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="export_model exports it"):
        import_model(sources / "ours.nemo", tmp_path / "model")
    with pytest.raises(ConfigError, match="import_model takes it in"):
        export_model(sources / "ESM-2", tmp_path / "model.nemo")
    assert list(tmp_path.iterdir()) == []
