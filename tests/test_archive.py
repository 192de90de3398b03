"""Tests of the `.nemo` archive: bit-equal restore, deterministic bytes, and one clear error for invalid files."""

from __future__ import annotations

import errno
import hashlib
import io
import json
import subprocess
import sys
import tarfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from blake3 import blake3
from nemo.core.classes import ModelPT
from safetensors.torch import load, save

from bionemo_esm.data.collate import pack
from bionemo_esm.data.store import SequenceSplit
from bionemo_esm.model.archive import CONFIG, MANIFEST, WEIGHTS, ArchiveError, ArchiveFile, read_archive
from bionemo_esm.model.esm1nv import ESM1nvModel
from models import reconfigured, tiny_model

Members = dict[str, bytes]


@pytest.mark.parametrize(
    ("changes", "same"),
    [
        ({"layernorm_epsilon": 1e-4}, False),
        ({"token_dropout": True}, False),
        ({"seq_length": 256}, False),
        ({"hidden_dropout": 0.5, "attention_dropout": 0.5, "init_method_std": 0.5}, True),
        ({"position_embedding": "learned"}, True),  # the default value, given explicitly
    ],
)
def test_model_identity_depends_on_the_weights_and_on_settings_that_change_outputs(
    archive: Path, tmp_path: Path, changes: dict[str, object], same: bool
) -> None:
    """Equal weights with another configuration are another model, unless only training settings differ."""
    one, other = ArchiveFile.open(archive), ArchiveFile.open(reconfigured(archive, tmp_path / "other.nemo", **changes))
    assert one.weights_sha256 == other.weights_sha256
    assert (one.model_identity == other.model_identity) is same


def test_model_identity_does_not_depend_on_seed_or_provenance(archive: Path, tmp_path: Path) -> None:
    model = ESM1nvModel.restore_from(str(archive))
    model.seed, model.provenance = 5, {"steps": 8}
    model.save_to(str(tmp_path / "again.nemo"))
    assert ArchiveFile.open(tmp_path / "again.nemo").model_identity == ArchiveFile.open(archive).model_identity


@pytest.fixture(scope="module")
def archive(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("archive") / "model.nemo"
    model = tiny_model()
    model.provenance = {"steps": 7}
    model.save_to(str(path))
    return path


def unpacked(path: Path) -> Members:
    with tarfile.open(path) as tar:
        return {member.name: tar.extractfile(member).read() for member in tar}  # type: ignore[union-attr]


def signed(manifest: dict[str, object]) -> bytes:
    """Return the manifest with a correct hash of itself."""
    bare = {key: value for key, value in manifest.items() if key != "manifest_sha256"}
    digest = hashlib.sha256(json.dumps(bare, indent=2, sort_keys=True).encode()).hexdigest()
    return json.dumps(bare | {"manifest_sha256": digest}, indent=2, sort_keys=True).encode()


def repacked(members: Members, path: Path, honest: bool = True) -> Path:
    """Write members as an archive. If `honest`, the manifest is updated to match them."""
    if honest:
        manifest = json.loads(members[MANIFEST])
        for name in (CONFIG, WEIGHTS):
            manifest["files"][name] = {
                "size": len(members[name]),
                "sha256": hashlib.sha256(members[name]).hexdigest(),
            }
        members = members | {MANIFEST: signed(manifest)}
    with tarfile.open(path, "w") as tar:
        for name, content in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
    return path


def test_manifest_has_sha256_and_blake3_of_each_member(archive: Path) -> None:
    members = unpacked(archive)
    files = json.loads(members[MANIFEST])["files"]
    for name in (CONFIG, WEIGHTS):
        sha256, fast = hashlib.sha256(members[name]).hexdigest(), blake3(members[name]).hexdigest()
        assert files[name] == {"size": len(members[name]), "sha256": sha256, "blake3": fast}


def test_archive_of_an_earlier_version_with_sha256_alone_is_read_and_verified(archive: Path, tmp_path: Path) -> None:
    old = repacked(unpacked(archive), tmp_path / "old.nemo")
    assert "blake3" not in json.loads(unpacked(old)[MANIFEST])["files"][WEIGHTS]
    found, expected = ArchiveFile.open(old), ArchiveFile.open(archive)
    assert found.weights_sha256 == expected.weights_sha256
    assert all(torch.equal(tensor, found.load_weights()[name]) for name, tensor in expected.load_weights().items())
    members = unpacked(old)
    damaged = members | {WEIGHTS: members[WEIGHTS][:-1] + bytes([members[WEIGHTS][-1] ^ 1])}
    with pytest.raises(ArchiveError, match="does not match its SHA-256"):
        ArchiveFile.open(repacked(damaged, tmp_path / "bad.nemo", honest=False)).load_weights()


@pytest.mark.parametrize(("hash_name", "label"), [("blake3", "BLAKE3"), ("sha256", "SHA-256")])
def test_verify_can_compare_both_hashes(hash_name: str, label: str, archive: Path, tmp_path: Path) -> None:
    members = unpacked(archive)
    manifest = json.loads(members[MANIFEST])
    manifest["files"][WEIGHTS][hash_name] = "0" * 64
    file = ArchiveFile.open(repacked(members | {MANIFEST: signed(manifest)}, tmp_path / "bad.nemo", honest=False))
    with pytest.raises(ArchiveError, match=f"does not match its {label}"):
        file.verify(every_hash=True)


@pytest.mark.parametrize("restore", [ESM1nvModel.restore_from, ModelPT.restore_from])
@pytest.mark.parametrize("precision", ["32", "bf16"])
def test_restored_model_has_bit_equal_weights_and_outputs(
    restore: Callable[[str], ESM1nvModel], precision: str, tmp_path: Path, tiny_split: SequenceSplit
) -> None:
    model = tiny_model(precision)
    model.save_to(str(tmp_path / "model.nemo"))
    restored = restore(str(tmp_path / "model.nemo"))
    assert type(restored) is ESM1nvModel
    for (name, ours), theirs in zip(model.named_parameters(), restored.parameters(), strict=True):
        assert ours.dtype == theirs.dtype
        assert torch.equal(ours, theirs), name
    batch = pack(np.concatenate([tiny_split[3], tiny_split[11]]), np.array([len(tiny_split[3]), len(tiny_split[11])]))
    assert torch.equal(model.logits(batch), restored.logits(batch))


def test_importing_the_package_registers_its_models_with_nemo(archive: Path) -> None:
    for first, second in (("bionemo_esm", "nemo.core.classes"), ("nemo.core.classes", "bionemo_esm")):
        code = (
            f"import {first}, {second}\nfrom nemo.core.classes import ModelPT\n"
            f"print(type(ModelPT.restore_from({str(archive)!r})).__name__)"
        )
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
        assert done.stdout.splitlines()[-1:] == ["ESM1nvModel"], done.stderr


def test_equal_models_give_equal_archive_bytes(archive: Path, tmp_path: Path) -> None:
    model = tiny_model()
    model.provenance = {"steps": 7}
    model.save_to(str(tmp_path / "again.nemo"))
    assert (tmp_path / "again.nemo").read_bytes() == archive.read_bytes()
    assert [path.name for path in tmp_path.iterdir()] == ["again.nemo"]


def test_archive_holds_three_members_and_no_pickle_or_class_path(archive: Path) -> None:
    members = unpacked(archive)
    assert list(members) == [CONFIG, MANIFEST, WEIGHTS]
    assert b"target" not in members[CONFIG]
    manifest = json.loads(members[MANIFEST])
    assert manifest["model_class"] == "ESM1nvModel"
    assert manifest["provenance"]["steps"] == 7
    assert set(manifest["provenance"]["package_versions"]) == {"bionemo_esm", "torch", "megatron-core", "nemo_toolkit"}


def test_configuration_is_readable_without_the_weights(archive: Path) -> None:
    config = ESM1nvModel.restore_from(str(archive), return_config=True)
    assert config.encoder.num_layers == 2
    assert not read_archive(archive, with_weights=False).weights


def test_restoring_does_not_change_the_working_directory(
    archive: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.chdir(tmp_path)
    ESM1nvModel.restore_from(str(archive))
    assert Path.cwd() == tmp_path
    assert not list(tmp_path.iterdir())


def test_failed_save_leaves_the_existing_file_and_no_partial_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "model.nemo"
    path.write_bytes(b"the one before")

    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("bionemo_esm.model.tar_format.os.fsync", full)
    with pytest.raises(ArchiveError, match=r"model\.nemo: cannot be written \(No space left on device\); free some"):
        tiny_model().save_to(str(path))
    assert path.read_bytes() == b"the one before"
    assert [entry.name for entry in tmp_path.iterdir()] == ["model.nemo"]


def test_file_that_is_not_an_archive_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "model.nemo"
    path.write_bytes(b"not a tar" * 1000)
    with pytest.raises(ArchiveError, match=r"model\.nemo: not a \.nemo archive of ours, or damaged"):
        ESM1nvModel.restore_from(str(path))


@pytest.mark.parametrize("fraction", [0.0, 0.01, 0.5, 0.9])
def test_truncated_archive_is_refused(archive: Path, tmp_path: Path, fraction: float) -> None:
    path = tmp_path / "short.nemo"
    content = archive.read_bytes()
    path.write_bytes(content[: int(len(content) * fraction)])
    with pytest.raises(ArchiveError, match=r"short\.nemo: .*(cut short|missing)"):
        ESM1nvModel.restore_from(str(path))


def test_flipped_bit_is_detected(archive: Path, tmp_path: Path) -> None:
    members = unpacked(archive)
    weights = bytearray(members[WEIGHTS])
    weights[-5] ^= 1
    path = repacked(members | {WEIGHTS: bytes(weights)}, tmp_path / "bad.nemo", honest=False)
    with pytest.raises(ArchiveError, match=r"bad\.nemo: model_weights\.safetensors does not match its BLAKE3"):
        ESM1nvModel.restore_from(str(path))


def test_unexpected_repeated_and_linked_members_are_refused(archive: Path, tmp_path: Path) -> None:
    members = unpacked(archive)
    for name in ("../evil", "/etc/passwd", "./model_config.yaml", "model_weights.ckpt"):
        path = repacked({**members, name: b"x"}, tmp_path / "extra.nemo")
        with pytest.raises(ArchiveError, match="unexpected member"):
            ESM1nvModel.restore_from(str(path))
    with tarfile.open(repacked(members, tmp_path / "twice.nemo"), "a") as tar:
        tar.addfile(tarfile.TarInfo(CONFIG), io.BytesIO())
    with pytest.raises(ArchiveError, match="appears twice"):
        ESM1nvModel.restore_from(str(tmp_path / "twice.nemo"))
    with tarfile.open(tmp_path / "link.nemo", "w") as tar:
        link = tarfile.TarInfo(CONFIG)
        link.type, link.linkname = tarfile.SYMTYPE, "/etc/passwd"
        tar.addfile(link)
    with pytest.raises(ArchiveError, match="unexpected member"):
        ESM1nvModel.restore_from(str(tmp_path / "link.nemo"))
    assert {entry.suffix for entry in tmp_path.iterdir()} == {".nemo"}


def test_missing_extra_and_misshapen_tensors_are_named_in_the_error(archive: Path, tmp_path: Path) -> None:
    members, name = unpacked(archive), "encoder.output_layer.bias"
    tensors = load(members[WEIGHTS])
    others = {key: value for key, value in tensors.items() if key != name}
    cases = {
        r"describes a model of [\d,]+ parameters, the file has": others,
        "tensor 'encoder.a' is not part of this model": {**tensors, "encoder.a": torch.zeros(0)},
        "tensor 'encoder.output_layer.bias' is missing": {**others, "encoder.z": tensors[name]},
        r"tensor '.*bias' has shape \[2, 64\], the model \[128\]": tensors | {name: tensors[name].reshape(2, 64)},
    }
    for message, changed in cases.items():
        path = repacked(members | {WEIGHTS: save(changed)}, tmp_path / "wrong.nemo")
        with pytest.raises(ArchiveError, match=message):
            ESM1nvModel.restore_from(str(path))


@pytest.mark.parametrize(
    ("config", "error"),
    [
        (b"encoder: &a {num_layers: 2}\nagain: *a\n", "aliases are not allowed"),
        (b"encoder: !!python/object/apply:os.system ['touch owned']\n", "the tag '.*os.system' is not allowed"),
        (b"- a list\n", "is not a mapping"),
        (b"encoder: {num_layers: 2, _target_: os.system}\n", "key '_target_' names a class to be built; refused"),
    ],
)
def test_unsafe_yaml_in_the_configuration_is_refused(archive: Path, tmp_path: Path, config: bytes, error: str) -> None:
    path = repacked(unpacked(archive) | {CONFIG: config}, tmp_path / "trick.nemo")
    with pytest.raises(ValueError, match=error):
        ESM1nvModel.restore_from(str(path))


def test_model_class_outside_the_registry_is_refused(archive: Path, tmp_path: Path) -> None:
    members = unpacked(archive)
    manifest = json.loads(members[MANIFEST]) | {"model_class": "os.system"}
    path = repacked(members | {MANIFEST: json.dumps(manifest).encode()}, tmp_path / "class.nemo")
    with pytest.raises(ArchiveError, match=r"holds a model of class 'os\.system', not a ESM1nvModel"):
        ESM1nvModel.restore_from(str(path))
