"""Export to Hugging Face: loading with transformers, the model card, and all-or-nothing writes."""

from __future__ import annotations

import errno
import json
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from safetensors import safe_open
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoModelForMaskedLM, AutoTokenizer, EsmForMaskedLM, EsmTokenizer

from bionemo_esm.alphabet import TOKENS, encode
from bionemo_esm.data.collate import pack
from bionemo_esm.errors import UserError
from bionemo_esm.model.archive import WEIGHTS, Archive, ArchiveFile, read_archive, write_archive
from bionemo_esm.model.esm1nv import ESM1nvModel
from bionemo_esm.model.interchange import export
from bionemo_esm.model.interchange.export import ExportReport, export_hugging_face
from models import tiny_model

FAMILIES: dict[str, dict[str, Any]] = {
    "ESM-1nv": {"hidden_dropout": 0.1},
    "ESM-1b": {"embedding_layernorm": True, "token_dropout": True, "position_offset": 2, "contact_head": True},
    "ESM-1v": {"token_dropout": True, "position_offset": 2},
    "ESM-2": {"token_dropout": True, "position_embedding": "rotary", "contact_head": True},
}
PROTEIN = "MKTAYIAKQRQISFVKSHFSRQXBLEERUZO"
HOSTILE = "x|y`z <script>alert(1)</script> [a](https://evil.example) **b**\n---\n# c \x1b[31m"


def archived(
    path: Path, family: str, precision: str = "32", provenance: Mapping[str, Any] | None = None
) -> ArchiveFile:
    """Save a small random model of a family, with rotary frequencies rounded as in float16 training."""
    model = tiny_model(precision, **FAMILIES[family])
    generator = torch.Generator().manual_seed(7)
    for name, buffer in model.named_buffers():
        buffer.copy_(buffer.half() if "frequencies" in name else torch.randn(buffer.shape, generator=generator))
    with torch.no_grad():
        dict(model.named_parameters())["encoder.output_layer.bias"][len(TOKENS) :] = 0  # as in training
    model.provenance = dict(provenance or {})
    model.save_to(str(path))
    return ArchiveFile.open(path)


def exported(folder: Path, family: str, **options: Any) -> ExportReport:
    return export_hugging_face(archived(folder.with_suffix(".nemo"), family), folder, **options)


def weights_in(folder: Path) -> dict[str, Tensor]:
    return {name: tensor for path in folder.glob("*.safetensors") for name, tensor in load_file(path).items()}


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Return an export of each family next to its archive; tests must not change them."""
    base = tmp_path_factory.mktemp("exported")
    for family in FAMILIES:
        exported(base / family, family)
    return {family: base / family for family in FAMILIES}


# Loading with transformers


@pytest.mark.parametrize("family", FAMILIES)
def test_transformers_loads_every_tensor_and_computes_the_same(folders: dict[str, Path], family: str) -> None:
    folder = folders[family]
    twin, report = EsmForMaskedLM.from_pretrained(folder, output_loading_info=True)
    has_head = FAMILIES[family].get("contact_head", False)
    assert all(name.startswith("esm.contact_head") for name in report["missing_keys"])
    assert bool(report["missing_keys"]) is not has_head
    assert not report["unexpected_keys"]
    assert not report["mismatched_keys"]
    assert twin.dtype == torch.float32
    model = ESM1nvModel.restore_from(str(folder.with_suffix(".nemo")))
    tokens = encode(PROTEIN)
    ours = model.logits(pack(tokens, np.array([len(tokens)])))
    asked = EsmTokenizer.from_pretrained(folder)(PROTEIN, return_tensors="pt")
    with torch.no_grad():
        theirs = twin.eval()(**asked).logits[0]
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-4)
    if has_head:
        assert torch.equal(
            twin.esm.contact_head.regression.weight, dict(model.named_buffers())["encoder.contact_head.weight"]
        )


def test_transformers_uses_the_exported_rotary_frequencies(folders: dict[str, Path]) -> None:
    ours = read_archive(folders["ESM-2"].with_suffix(".nemo")).weights["encoder.rotary.frequencies"]
    formula = 1.0 / 10_000 ** (torch.arange(0, 8, 2).float() / 8)
    assert not torch.equal(ours, formula)
    names = [name for name in weights_in(folders["ESM-2"]) if "inv_freq" in name]
    assert names == [f"esm.encoder.layer.{layer}.attention.self.rotary_embeddings.inv_freq" for layer in range(2)]
    twin = EsmForMaskedLM.from_pretrained(folders["ESM-2"])
    used = {name: buffer for name, buffer in twin.named_buffers() if "inv_freq" in name}
    assert used
    assert all(torch.equal(buffer, ours) for buffer in used.values())


@pytest.mark.parametrize("loader", [AutoTokenizer, EsmTokenizer])
def test_the_tokenizer_has_our_alphabet_and_the_maximum_length(folders: dict[str, Path], loader: Any) -> None:
    tokenizer = loader.from_pretrained(folders["ESM-1b"])
    assert type(tokenizer) is EsmTokenizer
    assert tokenizer.convert_ids_to_tokens(range(len(TOKENS))) == list(TOKENS)
    assert tokenizer("MK<mask>T")["input_ids"] == [0, 20, 15, 32, 11, 2]
    assert tokenizer.model_max_length == 512
    assert len(tokenizer("M" * 600, truncation=True)["input_ids"]) == 512


def test_the_exported_configuration_distinguishes_the_families(folders: dict[str, Path]) -> None:
    told = {family: json.loads((folder / "config.json").read_text()) for family, folder in folders.items()}
    assert {family: values["position_embedding_type"] for family, values in told.items()} == {
        "ESM-1nv": "absolute", "ESM-1b": "absolute", "ESM-1v": "absolute", "ESM-2": "rotary",
    }  # fmt: skip
    assert [told[family]["emb_layer_norm_before"] for family in FAMILIES] == [False, True, False, False]
    assert [told[family]["token_dropout"] for family in FAMILIES] == [False, True, True, True]
    assert [told[family]["hidden_dropout_prob"] for family in FAMILIES] == [0.1, 0.0, 0.0, 0.0]
    assert {values["max_position_embeddings"] for values in told.values()} == {514}
    assert type(AutoModelForMaskedLM.from_pretrained(folders["ESM-1nv"])) is EsmForMaskedLM


def test_a_position_table_without_unused_rows_gets_two_rows_of_zeros(folders: dict[str, Path]) -> None:
    ours = read_archive(folders["ESM-1nv"].with_suffix(".nemo")).weights["encoder.embedding.position_embeddings.weight"]
    theirs = weights_in(folders["ESM-1nv"])["esm.embeddings.position_embeddings.weight"]
    assert torch.equal(theirs, torch.cat([torch.zeros(2, 32), ours]))


@pytest.mark.parametrize("family", ["ESM-1b", "ESM-2"])
def test_large_weights_are_split_into_complete_shards(folders: dict[str, Path], tmp_path: Path, family: str) -> None:
    folder = tmp_path / "sharded"
    file = ArchiveFile.open(folders[family].with_suffix(".nemo"))
    report = export_hugging_face(file, folder, shard_bytes=25_000)
    shards = sorted(folder.glob("*.safetensors"))
    assert [path.name for path in shards] == [
        f"model-{number:05d}-of-{len(shards):05d}.safetensors" for number in range(1, len(shards) + 1)
    ]
    assert len(shards) >= 3
    index = json.loads((folder / "model.safetensors.index.json").read_text())
    sizes = {path.name: sum(tensor.nbytes for tensor in load_file(path).values()) for path in shards}
    largest = max(tensor.nbytes for tensor in weights_in(folder).values())
    assert all(size <= max(25_000, largest) for size in sizes.values())
    following = [next(iter(sorted(load_file(path).items())))[1].nbytes for path in shards[1:]]
    assert all(
        held + more > 25_000 for held, more in zip(sizes.values(), following, strict=False)
    )  # no shard could hold the next tensor
    assert index["metadata"]["total_size"] == sum(sizes.values())
    assert index["weight_map"] == {name: path.name for path in shards for name in load_file(path)}
    for path in shards:
        with safe_open(path, "pt") as opened:
            assert opened.metadata() == {"format": "pt"}  # transformers 4 requires this
    whole, parts = weights_in(folders[family]), weights_in(folder)
    assert whole.keys() == parts.keys()
    assert all(torch.equal(whole[name], parts[name]) for name in whole)
    assert report.files.keys() == {path.name for path in folder.iterdir()}
    twin = EsmForMaskedLM.from_pretrained(folder).state_dict()
    assert all(torch.equal(twin[name], tensor) for name, tensor in whole.items() if name in twin)


def test_bfloat16_weights_stay_bfloat16_and_buffers_stay_float32(tmp_path: Path) -> None:
    file = archived(tmp_path / "half.nemo", "ESM-2", "bf16")
    export_hugging_face(file, tmp_path / "half")
    weights = weights_in(tmp_path / "half")
    fixed = {name for name, tensor in weights.items() if tensor.dtype == torch.float32}
    assert {name.split(".")[-2] for name in fixed} == {"rotary_embeddings", "regression"}
    assert weights["lm_head.dense.weight"].dtype == torch.bfloat16
    assert EsmForMaskedLM.from_pretrained(tmp_path / "half").dtype == torch.bfloat16
    report = export_hugging_face(file, tmp_path / "whole", precision="32")
    wide = weights_in(tmp_path / "whole")
    assert all(
        tensor.dtype == torch.float32 and torch.equal(tensor, weights[name].float()) for name, tensor in wide.items()
    )
    assert json.loads((tmp_path / "whole" / "config.json").read_text())["torch_dtype"] == "float32"
    assert report.notes == ("bfloat16 weights kept as float32",)


def test_float32_weights_are_rounded_to_bfloat16_on_request(folders: dict[str, Path], tmp_path: Path) -> None:
    file = ArchiveFile.open(folders["ESM-2"].with_suffix(".nemo"))
    export_hugging_face(file, tmp_path / "half", precision="bf16")
    before, after = weights_in(folders["ESM-2"]), weights_in(tmp_path / "half")
    assert torch.equal(after["lm_head.dense.weight"], before["lm_head.dense.weight"].bfloat16())
    name = "esm.contact_head.regression.weight"
    assert torch.equal(after[name], before[name])


def test_a_checkpoint_is_exported_like_a_model(folders: dict[str, Path], tmp_path: Path) -> None:
    archive = read_archive(folders["ESM-1b"].with_suffix(".nemo"))
    path = write_archive(tmp_path / "step.ckpt", replace(archive, state={"moments": torch.ones(3)}))
    export_hugging_face(ArchiveFile.open(path), tmp_path / "out")
    for name in ("model.safetensors", "config.json"):
        assert (tmp_path / "out" / name).read_bytes() == (folders["ESM-1b"] / name).read_bytes()


def test_nonzero_padding_rows_of_the_vocabulary_are_reported_as_left_out(tmp_path: Path) -> None:
    bias = "encoder.output_layer.bias"
    report = export_hugging_face(spoilt(tmp_path / "model.nemo", "ESM-2", **{bias: torch.ones(128)}), tmp_path / "out")
    assert report.notes == (f"left out: numbers in rows of {bias} that pad the vocabulary and are never used",)


# The model card


def test_the_code_in_the_card_runs_unchanged(folders: dict[str, Path]) -> None:
    code = (folders["ESM-1nv"] / "README.md").read_text().split("```python\n")[1].split("```")[0]
    done = subprocess.run(
        [sys.executable, "-c", code + "print(tuple(logits.shape), tuple(embeddings.shape))"],
        cwd=folders["ESM-1nv"], capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1] == "(1, 72, 33) (1, 72, 32)"


def test_the_card_shows_the_archives_training_provenance(tmp_path: Path) -> None:
    provenance = {
        "recipe": "laptop",
        "seed": 1234,
        "steps": 1500,
        "consumed_samples": 24_000,
        "data_samples_of_an_epoch": 12_000,
        "data": "UniRef50",
        "data_release": "2022_05",
        "data_sequences": {"train": 2600, "validation": 150},
        "data_manifest_sha256": "ab" * 32,
        "averaged_from": [{"file": f"step-{step}.nemo", "steps": step} for step in (900, 1200, 1500)],
        "imported_from": {"format": "Hugging Face", "source": "facebook/esm2_t6_8M_UR50D", "revision": "c" * 40},
        "notes": ["no contact head came with it"],
    }
    file = archived(tmp_path / "model.nemo", "ESM-2", provenance=provenance)
    export_hugging_face(file, tmp_path / "out")
    text = (tmp_path / "out" / "README.md").read_text()
    head = yaml.safe_load(text.split("---\n")[1])
    assert head["library_name"] == "transformers"
    assert head["pipeline_tag"] == "fill-mask"
    assert {"protein language model", "masked-lm"} <= set(head["tags"])
    assert head["base_model"] == "facebook/esm2_t6_8M_UR50D"
    assert "license" not in head
    for row in (
        "| recipe | `laptop` |", "| seed | `1234` |", "| steps | 1,500 |", "| consumed samples | 24,000 |",
        "| epochs | 2.00 |", "| data release | `2022_05` |", "| sequences | `train` `2600`, `validation` `150` |",
        f"| SHA-256 of the data's manifest | `{'ab' * 32}` |", "| averaged from | 3 checkpoints, steps 900 to 1,500 |",
        f"| SHA-256 of the archive's weights | `{file.weights_sha256}` |", "| notes | `no contact head came with it` |",
        "| positions | rotary |", "| layers | 2 |",
    ):  # fmt: skip
        assert row in text.splitlines(), row
    assert f"`revision` `{'c' * 40}`" in text
    assert "`torch`" in text  # package versions
    assert "at most" not in text.lower()


def test_the_card_states_the_length_limit_and_the_contact_head(folders: dict[str, Path]) -> None:
    learned, rotary = ((folders[family] / "README.md").read_text() for family in ("ESM-1nv", "ESM-2"))
    assert "At most 510 residues" in learned
    assert "There is no contact head" in learned
    assert "Rotary positions let it read longer proteins" in rotary
    assert "There is no contact head" not in rotary


def test_hostile_provenance_is_escaped_in_the_card(tmp_path: Path) -> None:
    provenance = {
        "recipe": HOSTILE, "seed": HOSTILE, "steps": {HOSTILE: [HOSTILE]}, "data_sequences": HOSTILE,
        "averaged_from": [HOSTILE, {"steps": HOSTILE}], "notes": [HOSTILE, 7], "restored_from": ["`", "``"],
        "imported_from": {"format": "Hugging Face", "source": "a/b\nlicense: mit", HOSTILE: {HOSTILE: {HOSTILE: 1}}},
    }  # fmt: skip
    file = archived(tmp_path / "model.nemo", "ESM-1nv", provenance=provenance)
    archive = replace(read_archive(file.path), provenance={**file.provenance, "package_versions": {HOSTILE: HOSTILE}})
    export_hugging_face(ArchiveFile.open(write_archive(tmp_path / "worse.nemo", archive)), tmp_path / "out")
    text = (tmp_path / "out" / "README.md").read_text()
    assert "\x1b" not in text
    assert set(yaml.safe_load(text.split("---\n")[1])) == {"library_name", "pipeline_tag", "tags", "widget"}
    rows = [line for line in text.splitlines() if "script" in line or "evil" in line]
    assert len(rows) >= 7
    for row in rows:
        assert row.replace("\\|", "").count("|") == 3
        outside = "".join(row.split("`")[::2])
        assert "script" not in outside
        assert "evil" not in outside
        assert row.count("`") % 2 == 0


def test_contacts_can_be_predicted_as_the_card_describes(folders: dict[str, Path]) -> None:
    text = (folders["ESM-2"] / "README.md").read_text()
    loading = text.split("only `")[1].split("`")[0]
    asked = EsmTokenizer.from_pretrained(folders["ESM-2"])(PROTEIN, return_tensors="pt").values()
    model = eval(loading, {"EsmForMaskedLM": EsmForMaskedLM, "place": folders["ESM-2"]})
    assert model.predict_contacts(*asked).shape == (1, len(PROTEIN), len(PROTEIN))
    with pytest.raises(RuntimeError, match="stack expects a non-empty TensorList"):
        EsmForMaskedLM.from_pretrained(folders["ESM-2"]).predict_contacts(*asked)


# All or nothing


def spoilt(path: Path, family: str, **changes: Any) -> ArchiveFile:
    """Save an archive of a family with some tensors replaced; None removes a tensor."""
    archive = read_archive(archived(path, family).path)
    weights = {name: tensor for name, tensor in {**archive.weights, **changes}.items() if tensor is not None}
    return ArchiveFile.open(write_archive(path, Archive(archive.model_class, archive.config, weights)))


WORDS, BIAS = "encoder.embedding.word_embeddings.weight", "encoder.lm_head.dense.bias"


@pytest.mark.parametrize(
    ("changes", "complaint"),
    [
        ({BIAS: torch.full((32,), torch.nan)}, "holds NaN or infinity"),
        ({BIAS: None}, "one of the two is not of this model"),
        ({BIAS: torch.zeros(4, 8)}, r"has shape \[4, 8\], the model \[32\]"),
        ({BIAS: torch.zeros(32).bfloat16()}, "weights have dtype BF16, F32"),
        ({"encoder.contact_head.weight": torch.zeros(1, 8).bfloat16()}, "is F32 at any precision"),
    ],
    ids=["not finite", "missing", "another shape", "another dtype", "a fixed tensor rounded"],
)
def test_an_incomplete_or_invalid_model_is_not_exported(
    tmp_path: Path, changes: dict[str, Any], complaint: str
) -> None:
    file = spoilt(tmp_path / "model.nemo", "ESM-1b", **changes)
    with pytest.raises(UserError, match=complaint):
        export_hugging_face(file, tmp_path / "out")
    assert [path.name for path in tmp_path.iterdir()] == ["model.nemo"]


def test_a_flipped_bit_is_found_before_any_file_is_written(tmp_path: Path) -> None:
    file = archived(tmp_path / "model.nemo", "ESM-1nv")
    with file.path.open("r+b") as stream:
        stream.seek(file.sections[WEIGHTS].start + file.sections[WEIGHTS].size - 5)
        byte = stream.read(1)
        stream.seek(-1, 1)
        stream.write(bytes([byte[0] ^ 1]))
    with pytest.raises(UserError, match="does not match its BLAKE3"):
        export_hugging_face(file, tmp_path / "out")
    assert [path.name for path in tmp_path.iterdir()] == ["model.nemo"]


@pytest.mark.parametrize("kind", ["a folder", "an empty folder", "a file", "a dangling link"])
def test_an_existing_target_is_refused_and_unchanged(folders: dict[str, Path], tmp_path: Path, kind: str) -> None:
    target = tmp_path / "out"
    if kind == "a file":
        target.write_text("mine")
    elif kind == "a dangling link":
        target.symlink_to(tmp_path / "nowhere")
    else:
        target.mkdir()
    if kind == "a folder":
        (target / "mine").write_text("mine")
    file = ArchiveFile.open(folders["ESM-1nv"].with_suffix(".nemo"))
    with pytest.raises(UserError, match="exists already"):
        export_hugging_face(file, target, progress=lambda done, total: pytest.fail("work was begun"))
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
    assert not target.is_dir() or len(list(target.iterdir())) == (kind == "a folder")


@pytest.mark.parametrize("stop", [KeyboardInterrupt(), OSError(errno.ENOSPC, "No space left on device")], ids=repr)
def test_an_interrupted_export_leaves_no_files(folders: dict[str, Path], tmp_path: Path, stop: BaseException) -> None:
    calls = 0

    def progress(done: int, total: int | None) -> None:
        nonlocal calls
        assert total is not None
        calls += done > total // 2  # weights are being written
        if calls == 20:
            raise stop

    file = ArchiveFile.open(folders["ESM-1b"].with_suffix(".nemo"))
    with pytest.raises((KeyboardInterrupt, UserError), match="No space" if isinstance(stop, OSError) else None):
        export_hugging_face(file, tmp_path / "deep" / "out", shard_bytes=40_000, progress=progress)
    assert calls == 20
    assert list((tmp_path / "deep").iterdir()) == []


def test_a_folder_that_appears_during_the_export_is_not_overwritten(folders: dict[str, Path], tmp_path: Path) -> None:
    def progress(done: int, total: int | None) -> None:
        if total is not None and done > total // 2:  # while weights are written
            (tmp_path / "out").mkdir(exist_ok=True)

    with pytest.raises(UserError, match="exists already"):
        export_hugging_face(
            ArchiveFile.open(folders["ESM-1nv"].with_suffix(".nemo")), tmp_path / "out", progress=progress
        )
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
    assert list((tmp_path / "out").iterdir()) == []


def test_progress_ends_at_its_announced_total(folders: dict[str, Path], tmp_path: Path) -> None:
    told: list[tuple[int, int | None]] = []
    file = ArchiveFile.open(folders["ESM-2"].with_suffix(".nemo"))
    export_hugging_face(file, tmp_path / "out", progress=lambda done, total: told.append((done, total)))
    done = [item for item, _ in told]
    assert done == sorted(done)
    assert told[-1] == (2 * file.sections[WEIGHTS].size,) * 2
    assert export.SHARD_BYTES == 5_000_000_000
