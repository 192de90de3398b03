"""Import of folders written by `transformers`: exact tensors, and refusals that name the file."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import EsmForMaskedLM, EsmModel

from bionemo_esm.alphabet import TOKENS, encode
from bionemo_esm.data.collate import pack
from bionemo_esm.errors import UserError
from bionemo_esm.model.archive import Archive, write_archive
from bionemo_esm.model.esm1nv import ESM1nvModel
from bionemo_esm.model.interchange.huggingface import read_hugging_face
from bionemo_esm.model.interchange.state_dict_adapter import (
    HUGGING_FACE,
    ImportedWeights,
    InterchangeError,
    SourceModel,
    from_native,
    to_native,
)
from theirs import FAMILIES, SMALL, Shape, hugging_face_model

SHAPES = dict.fromkeys(FAMILIES, SMALL) | {"ESM-2": Shape(2, 32, 8, ffn=64)}
FREQUENCIES = "esm.rotary_embeddings.inv_freq"
LAST = "model-00002-of-00002.safetensors"


def esm(family: str = "ESM-1b") -> EsmForMaskedLM:
    return hugging_face_model(family, SHAPES[family], tokens=32)


def in_two(model: EsmForMaskedLM, folder: Path, save: Callable[[Any, Path], None], name: str) -> None:
    """Write two shards and an index as `save_pretrained` does; it no longer writes pickled ones itself."""
    stem, suffix = name.split(".")
    model.config.architectures = ["EsmForMaskedLM"]
    model.config.save_pretrained(folder)
    state = {key: tensor.clone() for key, tensor in model.state_dict().items()}
    names, placed = sorted(state), {}
    for number, part in enumerate((names[::2], names[1::2]), start=1):
        file = f"{stem}-0000{number}-of-00002.{suffix}"
        save({key: state[key] for key in part}, folder / file)
        placed |= dict.fromkeys(part, file)
    (folder / f"{name}.index.json").write_text(json.dumps({"metadata": {"total_size": 1}, "weight_map": placed}))


def pickled(model: EsmForMaskedLM, folder: Path) -> None:
    model.config.save_pretrained(folder)
    torch.save(model.state_dict(), folder / "pytorch_model.bin")


WAYS: dict[str, Callable[[EsmForMaskedLM, Path], Any]] = {
    "one file": lambda model, folder: model.save_pretrained(folder),
    "shards": lambda model, folder: model.save_pretrained(folder, max_shard_size="20KB"),
    "a pickle": pickled,
    "pickled shards": lambda model, folder: in_two(model, folder, torch.save, "pytorch_model.bin"),
}


def read(folder: Path) -> SourceModel:
    return read_hugging_face(folder)


def taken(folder: Path) -> ImportedWeights:
    foreign = read(folder)
    return to_native(foreign.tensors, foreign.config, foreign.key_mapping)


def refused(folder: Path, *parts: str) -> str:
    """Check that the import fails with a one-line error that has these parts; return the error."""
    with pytest.raises(UserError) as caught:
        taken(folder)
    message = str(caught.value)
    assert "\n" not in message
    assert all(part in message for part in parts), message
    return message


# --- import -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("family", "way"),
    [(family, way) for family in SHAPES for way in WAYS if "pickle" not in way or family == "ESM-2"],
)
def test_every_tensor_that_was_saved_is_read_back_bit_for_bit(tmp_path: Path, family: str, way: str) -> None:
    model = esm(family)
    WAYS[way](model, tmp_path / "saved")
    assert len(list((tmp_path / "saved").iterdir())) > 2 or "shards" not in way
    ours = taken(tmp_path / "saved")
    dtypes = {name: tensor.dtype for name, tensor in ours.weights.outline.items()}
    back = from_native(ours.config, dtypes, ours.weights.__getitem__, HUGGING_FACE)
    theirs = {name: tensor for name, tensor in model.state_dict().items() if "decoder" not in name}
    if (frequencies := theirs.pop(FREQUENCIES, None)) is not None:
        assert torch.equal(ours.weights["encoder.rotary.frequencies"], frequencies)
    assert {name for name in back if "inv_freq" not in name} == theirs.keys()
    assert all(torch.equal(back[name], tensor) for name, tensor in theirs.items())


@pytest.mark.parametrize("family", SHAPES)
def test_the_imported_model_matches_the_logits_of_transformers(tmp_path: Path, family: str) -> None:
    model = esm(family)
    model.save_pretrained(tmp_path / "saved")
    ours = taken(tmp_path / "saved")
    config = {"encoder": ours.config.to_dict(), "precision": ours.precision, "seed": 0}
    write_archive(tmp_path / "ours.nemo", Archive("ESM1nvModel", config, ours.weights))
    protein = encode("MKTAYIAKQRQISFVKSHFSRQLEERLG")
    batch = pack(protein, np.array([len(protein)]))
    with torch.no_grad():
        theirs = model(batch.tokens[None]).logits[0]
        mine = ESM1nvModel.restore_from(str(tmp_path / "ours.nemo")).logits(batch)
    assert (mine - theirs).abs().max() < 1e-4 < 0.1 * theirs.std()


def test_provenance_has_the_source_and_hashes_of_all_read_files(tmp_path: Path) -> None:
    esm().save_pretrained(tmp_path / "mine", max_shard_size="40KB")
    told: list[int] = []
    foreign = read_hugging_face(tmp_path / "mine", source="me/mine", revision="abc", advance=told.append)
    origin = foreign.provenance["imported_from"]
    files = [path for path in (tmp_path / "mine").iterdir() if path.name != "generation_config.json"]
    assert origin["sha256"] == {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in files}
    assert sum(told) == sum(path.stat().st_size for path in files)
    assert (origin["format"], origin["source"], origin["revision"]) == ("Hugging Face", "me/mine", "abc")
    assert read(tmp_path / "mine").provenance["imported_from"]["source"] == "mine"
    assert json.loads(json.dumps(foreign.provenance)) == foreign.provenance


def test_safetensors_are_preferred_and_ignored_files_are_noted(tmp_path: Path) -> None:
    esm().save_pretrained(tmp_path / "saved")
    (tmp_path / "saved" / "vocab.txt").write_text("\n".join(TOKENS))
    (tmp_path / "saved" / "pytorch_model.bin").write_bytes(b"never opened")
    (tmp_path / "saved" / "training_args.bin").write_bytes(b"no weights")
    assert read(tmp_path / "saved").notes == ("left aside: 'pytorch_model.bin', as model.safetensors is read",)


def test_a_missing_alphabet_is_noted(tmp_path: Path) -> None:
    esm().save_pretrained(tmp_path / "saved")
    (note,) = read(tmp_path / "saved").notes
    assert note.startswith("taken for granted: the alphabet is ESM's")


# --- refusals ---------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def sound(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a valid folder with a vocabulary as `EsmTokenizer` writes it."""
    folder = tmp_path_factory.mktemp("sound") / "esm"
    esm().save_pretrained(folder)
    (folder / "vocab.txt").write_text("\n".join(TOKENS) + "\n")
    taken(folder)
    return folder


@pytest.fixture
def copy(sound: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(sound, tmp_path / "esm"))


def sharded(folder: Path) -> Path:
    """Rewrite the folder in two shards; return the index."""
    shutil.rmtree(folder)
    in_two(esm(), folder, save_file_as_theirs, "model.safetensors")
    return folder / "model.safetensors.index.json"


def save_file_as_theirs(tensors: dict[str, torch.Tensor], path: Path) -> None:
    save_file(tensors, path, {"format": "pt"})


def placed(folder: Path, change: Callable[[dict[str, Any]], Any]) -> None:
    index = sharded(folder)
    values = json.loads(index.read_text())
    change(values)
    index.write_text(json.dumps(values))


def rewritten(path: Path, **changes: Any) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-100])


def resaved(folder: Path, change: Callable[[dict[str, torch.Tensor]], Any]) -> None:
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors")


def only(folder: Path, name: str) -> None:
    (folder / "model.safetensors").rename(folder / name)


def move_to(file: str) -> Callable[[dict[str, Any]], None]:
    return lambda index: index["weight_map"].update(dict.fromkeys(["lm_head.bias"], file))


def pickle_with(folder: Path, **others: Any) -> None:
    (folder / "model.safetensors").unlink()
    torch.save(esm().state_dict() | others, folder / "pytorch_model.bin")


def linked(folder: Path) -> None:
    only(folder, "elsewhere")
    (folder / "model.safetensors").symlink_to("nowhere")


def written(name: str, content: bytes) -> Callable[[Path], None]:
    return lambda folder: (folder / name).write_bytes(content) and None


FILES: dict[str, tuple[Callable[[Path], Any], tuple[str, ...]]] = {
    "no folder": (shutil.rmtree, ("no such folder",)),
    "no config.json": (lambda f: (f / "config.json").unlink(), ("config.json: no such file",)),
    "config.json is no JSON": (written("config.json", b"{"), ("config.json", "no proper JSON")),
    "config.json is a list": (written("config.json", b"[]"), ("config.json", "not a mapping")),
    "a key twice": (written("config.json", b'{"a": 1, "a": 2}'), ("config.json", "'a' appears twice")),
    "config.json without end": (written("config.json", b" " * (2**24 + 1)), ("config.json", "longer than")),
    "config.json too deep": (written("config.json", b'{"a":' * 99 + b"1" + b"}" * 99), ("nested",)),
    "tokens in another order": (
        written("vocab.txt", "\n".join(["<pad>", "<cls>", *TOKENS[2:]]).encode()),
        ("vocab.txt", "token 0 is '<pad>'", "'<cls>'", "cannot be taken in. If", "put the vocab.txt of facebook/esm2_"),
    ),
    "one token short": (written("vocab.txt", "\n".join(TOKENS[:-1]).encode()), ("token 32 is missing", "'<mask>'")),
    "one token more": (written("vocab.txt", "\n".join([*TOKENS, "J"]).encode()), ("token 33 is 'J'", "none")),
    "vocabulary that is no text": (written("vocab.txt", b"\xff\xfe"), ("vocab.txt", "no text")),
    "more layers than tensors": (
        lambda f: rewritten(f / "config.json", num_hidden_layers=10_000),
        ("config.json: num_hidden_layers is 10,000, but the weights are of 2 layers",),
    ),
    "fewer layers than tensors": (
        lambda f: rewritten(f / "config.json", num_hidden_layers=1),
        ("config.json: num_hidden_layers is 1, but the weights are of 2 layers",),
    ),
    "weights without layers": (
        lambda f: resaved(f, lambda t: [t.pop(name) for name in [*t] if ".layer." in name]),
        ("num_hidden_layers is 2, but the weights are of 0 layers",),
    ),
    "no weights": (lambda f: (f / "model.safetensors").unlink(), ("neither model.safetensors nor",)),
    "TensorFlow only": (lambda f: only(f, "tf_model.h5"), ("tf_model.h5", "from_tf")),
    "Flax only": (lambda f: only(f, "flax_model.msgpack"), ("flax_model.msgpack", "from_flax")),
    "adapter only": (lambda f: only(f, "adapter_model.safetensors"), ("adapter", "merge_and_unload")),
    "shards without index": (lambda f: sharded(f).unlink(), ("'model-00001-of-00002.safetensors'", "index")),
    "a file and an index": (lambda f: written("model.safetensors", b"")((sharded(f)).parent), ("both",)),
    "weights are a folder": (
        lambda f: (f / "model.safetensors").unlink() or (f / "model.safetensors").mkdir(),
        ("model.safetensors: is not a file",),
    ),
    "weights are a broken link": (linked, ("model.safetensors: is a link to nothing",)),
    "empty weights": (written("model.safetensors", b""), ("model.safetensors: is empty",)),
    "truncated weights": (
        lambda f: cut(f / "model.safetensors"),
        ("/model.safetensors: it is not a proper safetensors file", "cut short"),
    ),
    "pickle under that name": (
        lambda f: torch.save(esm().state_dict(), f / "model.safetensors"),
        ("model.safetensors: is a pickle", "not safetensors"),
    ),
    "old pickle under that name": (written("model.safetensors", b"\x80\x02}q\x00."), ("is a pickle",)),
    "pointer of Git LFS": (
        written("model.safetensors", b"version https://git-lfs.github.com/spec/v1\noid sha256:00\n"),
        ("model.safetensors", "git lfs pull"),
    ),
    "web page": (written("model.safetensors", b"<!DOCTYPE html><html>"), ("web page",)),
    "truncated shard": (lambda f: cut(sharded(f).parent / LAST), (LAST, "cut short")),
    "missing shard": (lambda f: (sharded(f).parent / LAST).unlink(), (f"{LAST}: no such file", "index.json names")),
    "index without map": (lambda f: placed(f, lambda i: i.pop("weight_map")), ("index.json", "weight_map")),
    "map to numbers": (lambda f: placed(f, lambda i: i["weight_map"].update(a=1)), ("weight_map",)),
    "index is no JSON": (lambda f: sharded(f).write_text("oid sha256:"), ("index.json", "no proper JSON")),
    "shard outside": (lambda f: placed(f, move_to("../model.safetensors")), ("'../model.safetensors'", "beside")),
    "shard anywhere": (lambda f: placed(f, move_to("/etc/x.safetensors")), ("'/etc/x.safetensors'",)),
    "shard of another kind": (lambda f: placed(f, move_to("config.json")), ("'config.json'",)),
    "tensor in another shard": (lambda f: placed(f, move_to(LAST)), ("lm_head.bias", "index.json")),
    "tensor in no shard": (
        lambda f: placed(f, lambda i: i["weight_map"].update(extra=LAST)),
        (f"{LAST}: does not hold tensor 'extra'",),
    ),
    "tensor of no index": (
        lambda f: placed(f, lambda i: i["weight_map"].pop("lm_head.dense.weight")),
        ("holds tensor 'lm_head.dense.weight'", "not of one model"),
    ),
    "tensor missing": (lambda f: resaved(f, lambda t: t.pop("lm_head.dense.bias")), ("lm_head.dense.bias", "missing")),
    "tensor too many": (lambda f: resaved(f, lambda t: t.update(x=torch.ones(2))), ("'x' has no place",)),
    "another shape": (
        lambda f: resaved(f, lambda t: t.update({"lm_head.bias": torch.ones(32)})),
        ("lm_head.bias", "[32]", "[33]"),
    ),
    "an EsmModel's weights": (
        lambda f: save_file(EsmModel(esm().config).state_dict(), f / "model.safetensors"),
        ("no output head",),
    ),
    "pickle that calls": (lambda f: pickle_with(f, evil=os.system), ("pytorch_model.bin", "system")),
    "pickle with more than tensors": (lambda f: pickle_with(f, epoch=3), ("pytorch_model.bin", "'epoch' is no tensor")),
    "no pickle": (
        lambda f: only(f, "pytorch_model.bin"),
        ("pytorch_model.bin",),
    ),
}


@pytest.mark.parametrize("name", FILES)
def test_invalid_files_are_refused_with_their_name(copy: Path, name: str) -> None:
    spoil, parts = FILES[name]
    spoil(copy)
    message = refused(copy, *parts)
    assert str(copy) in message


def test_a_refusal_is_an_interchange_error(copy: Path) -> None:
    cut(copy / "model.safetensors")
    with pytest.raises(InterchangeError):
        read(copy)
