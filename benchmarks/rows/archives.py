"""Rows: save and restore a model, and the time that training waits for a checkpoint.

Our archives hash every byte on writing. On reading they verify the hashes and check all numbers to be finite. No side
unpickles foreign data. All sides marked "synced" sync the file to disk. All sides share the page cache, so reading is
measured without the disk. Not run on a GPU, where copies would cross the bus.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from omegaconf import OmegaConf
from safetensors.torch import load_file, save_file
from torch import Tensor

from benchmarks.comparison import Row, Setting, Side
from bionemo_esm.errors import ConfigError
from bionemo_esm.model.archive import Archive, ArchiveFile, write_archive
from bionemo_esm.model.esm1nv import ESM1nvModel
from bionemo_esm.model.nemo_connector import ESMSaveRestoreConnector, describe
from bionemo_esm.pretraining.checkpoints import StateCopies

ESM1NV = {"num_layers": 6, "hidden_size": 768, "num_attention_heads": 12}
TINY = {"num_layers": 1, "hidden_size": 32, "num_attention_heads": 4}
DIFFERING = "numbers that are not bit for bit ours"


def rows(setting: Setting) -> Iterator[Row]:
    """Yield the rows: save, restore, and wait for a checkpoint."""
    yield _saving(setting)
    yield _restoring(setting)
    yield _waiting(setting)


def model_of(setting: Setting) -> ESM1nvModel:
    """Return ESM-1nv in float32, or a tiny model, with random weights."""
    encoder = TINY if setting.quick else ESM1NV
    model = ESM1nvModel(OmegaConf.create({"encoder": encoder, "precision": "32", "seed": 1}))
    placed: ESM1nvModel = model.to(setting.device)
    return placed


def check_space(folder: Path, needed_bytes: float) -> None:
    """Raise `ConfigError` if the folder's disk has too little free space."""
    free = shutil.disk_usage(folder).free
    if free < needed_bytes:
        raise ConfigError(
            f"{folder}: the benchmark writes {needed_bytes / 1e9:.1f} GB there, and {free / 1e9:.1f} GB are free; set "
            "TMPDIR to a folder on a larger disk"
        )


def synced(path: Path, write: Callable[[Path], object]) -> None:
    """Write a file with a library's function, then sync it to disk."""
    write(path)
    with path.open("rb") as stream:
        os.fsync(stream.fileno())


def differing(found: Mapping[str, Tensor], ours: Mapping[str, Tensor]) -> float:
    """Return the number of elements that differ between two sets of tensors, including missing ones."""
    wrong = sum(tensor.numel() for name, tensor in ours.items() if name not in found)
    wrong += sum(tensor.numel() for name, tensor in found.items() if name not in ours)
    for name in found.keys() & ours.keys():
        a, b = found[name], ours[name]
        same_kind = a.shape == b.shape and a.dtype == b.dtype
        wrong += int((_bytes(a) != _bytes(b)).any(-1).sum()) if same_kind else b.numel()
    return float(wrong)


def _bytes(tensor: Tensor) -> Tensor:
    """Return the elements as bytes: uint8 [elements, bytes per element]."""
    return tensor.cpu().contiguous().reshape(-1).view(torch.uint8).view(-1, tensor.element_size())


def _saving(setting: Setting) -> Row:
    model, folder = model_of(setting), setting.folder
    archive = describe(model)
    weights = {name: tensor.contiguous() for name, tensor in archive.weights.items()}
    check_space(folder, 5 * _size(weights))
    ours, plain, mapped = folder / "saved.nemo", folder / "saved.pt", folder / "saved.safetensors"
    theirs = folder / "saved-by-nemo.nemo"

    def save_ours() -> None:
        ESMSaveRestoreConnector().save_to(model, str(ours))

    save_ours()
    expected = ArchiveFile.open(ours).load_weights()
    sides = [Side("ours (.nemo)", save_ours, 1.0, "synced; hashed; written beside and renamed")]
    for name, path, write, read, library in (
        ("torch.save", plain, lambda to: torch.save(weights, to), _torch_load, "torch"),
        ("safetensors", mapped, lambda to: save_file(weights, to), load_file, "safetensors"),
        ("NeMo's save_to", theirs, lambda to: _save_as_nemo(model, to), _read_nemo, "nemo-toolkit"),
    ):
        work = _saver(path, write)
        work()
        error = differing(read(path), _named_as(model, expected) if path is theirs else expected)
        sides.append(Side(name, work, 1.0, "synced", error, (library,)))
    return Row(
        "archive-save", f"Save {_name(setting)} ({_size(weights) / 1e6:,.0f} MB)", "model", "float32", sides,
        DIFFERING, 0.0, seconds_matter=True,
        note="Ours hashes what it writes, and spares the old file until the new one is safe; the others do neither.",
    )  # fmt: skip


def _saver(path: Path, write: Callable[[Path], object]) -> Callable[[], None]:
    return lambda: synced(path, write)


def _torch_load(path: Path) -> dict[str, Tensor]:
    tensors: dict[str, Tensor] = torch.load(path, weights_only=True)
    return tensors


def _save_as_nemo(model: ESM1nvModel, path: Path) -> None:
    """Save with NeMo's own connector: a tar of a YAML file and the output of `torch.save`."""
    from nemo.core.connectors.save_restore_connector import SaveRestoreConnector

    SaveRestoreConnector().save_to(model, str(path))


def _read_nemo(path: Path) -> dict[str, Tensor]:
    """Return the weights of an archive of NeMo, read from the tar without extraction."""
    import tarfile

    with tarfile.open(path) as archive:
        (member,) = [member for member in archive.getmembers() if member.name.endswith(".ckpt")]
        stream = archive.extractfile(member)
        assert stream is not None
        tensors: dict[str, Any] = torch.load(stream, weights_only=True)
    return {name: tensor for name, tensor in tensors.items() if isinstance(tensor, Tensor)}


def _named_as(model: ESM1nvModel, weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return the weights whose names are also in the model's `state_dict`."""
    names = {name for name, value in model.state_dict().items() if isinstance(value, Tensor)}
    return {name: tensor for name, tensor in weights.items() if name in names}


def _restoring(setting: Setting) -> Row:
    model, folder = model_of(setting), setting.folder
    archive = describe(model)
    weights = {name: tensor.cpu().contiguous() for name, tensor in archive.weights.items()}
    parameters = {name: torch.empty_like(tensor, device=setting.device) for name, tensor in weights.items()}
    check_space(folder, 4 * _size(weights))
    ours, plain, mapped = folder / "kept.nemo", folder / "kept.pt", folder / "kept.safetensors"
    write_archive(ours, archive)
    torch.save(weights, plain)
    save_file(weights, mapped)
    del model, archive, weights

    def into_parameters(read: Callable[[], Mapping[str, Tensor]]) -> Callable[[], None]:
        def work() -> None:
            for name, tensor in read().items():
                parameters[name].copy_(tensor)
            if setting.device == "cuda":
                torch.cuda.synchronize()

        return work

    readers: tuple[tuple[str, Callable[[], Mapping[str, Tensor]], str, tuple[str, ...]], ...] = (
        (
            "ours (.nemo)",
            lambda: ArchiveFile.open(ours).load_weights(),
            "verified by BLAKE3, checked to be finite",
            (),
        ),
        ("torch.load", lambda: _torch_load(plain), "weights_only=True; not verified", ("torch",)),
        ("torch.load, mapped", lambda: torch.load(plain, weights_only=True, mmap=True), "mmap=True", ("torch",)),
        ("safetensors", lambda: load_file(mapped), "mapped; not verified", ("safetensors",)),
    )
    expected = ArchiveFile.open(ours).load_weights()
    sides = []
    for number, (name, read, settings, libraries) in enumerate(readers):
        for parameter in parameters.values():
            parameter.fill_(float("nan"))
        work = into_parameters(read)
        work()
        error = differing(parameters, expected)
        assert number or not error
        sides.append(Side(name, work, 1.0, settings, error if number else None, libraries))
    return Row(
        "archive-restore", f"Restore the weights of {_name(setting)}", "model", "float32", sides, DIFFERING, 0.0,
        seconds_matter=True,
        note="Into a model's memory. Ours hashes every byte that it reads; the others trust the disk.",
    )  # fmt: skip


def _waiting(setting: Setting) -> Row:
    archive = training_state(setting)
    plain = {"state_dict": dict(archive.weights), "state": archive.state}
    check_space(setting.folder, 8 * _size(archive.weights))
    path, copies = setting.folder / "waited.ckpt", StateCopies()
    expected = _flat(archive)
    assert not differing(_flat(copies.of(archive)), expected)
    torch.save(plain, path)
    loaded = torch.load(path, weights_only=True)
    error = differing(_flat(Archive("", {}, loaded["state_dict"], state=loaded["state"])), expected)
    del loaded
    sides = [
        Side("ours", lambda: copies.of(archive), 1.0, "copied; written, synced and hashed beside the training"),
        Side("torch.save", lambda: torch.save(plain, path), 1.0, "not synced, as Lightning has it", error, ("torch",)),
        Side("torch.save, synced", lambda: synced(path, lambda to: torch.save(plain, to)), 1.0, "", error, ("torch",)),
    ]
    return Row(
        "checkpoint-wait", f"Training waits for a checkpoint of {_name(setting)}, with Adam's moments", "checkpoint",
        "float32", sides, DIFFERING, 0.0, seconds_matter=True,
        note="From the second checkpoint on; the first waits for the system to give memory for the copy.",
    )  # fmt: skip


def training_state(setting: Setting) -> Archive:
    """Return weights and Adam's two moments, the content of a checkpoint."""
    archive = describe(model_of(setting))
    generator = torch.Generator().manual_seed(1)
    moments = {
        number: {
            name: torch.randn(tensor.shape, generator=generator).to(tensor.device)
            for name, tensor in archive.weights.items()
        }
        for number in (0, 1)
    }
    weights = {name: tensor.detach() for name, tensor in archive.weights.items()}
    return Archive(archive.model_class, archive.config, weights, {"steps": 1000}, {"optimizer": moments})


def _flat(archive: Archive) -> dict[str, Tensor]:
    assert archive.state is not None
    moments = archive.state["optimizer"]
    return dict(archive.weights) | {f"{n}.{name}": value for n in (0, 1) for name, value in moments[n].items()}


def _size(weights: Mapping[str, Tensor]) -> int:
    """Return the size in bytes."""
    return sum(tensor.numel() * tensor.element_size() for tensor in weights.values())


def _name(setting: Setting) -> str:
    return "a tiny model" if setting.quick else "ESM-1nv"
