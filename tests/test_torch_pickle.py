"""Reading pickles of tensors: contents are complete, hostile files execute nothing and leave no files."""

from __future__ import annotations

import io
import os
import subprocess
import zipfile
from argparse import Namespace
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from bionemo_esm.errors import UserError
from bionemo_esm.model import torch_pickle as pickles
from bionemo_esm.model.torch_pickle import PickledTensors, PickleError, read_pickle

NAMESPACE = ("argparse.Namespace",)


def saved(path: Path, state: Any, new: bool = True) -> Path:
    torch.save(state, path, _use_new_zipfile_serialization=new)
    return path


def refused(path: Path, match: str, **options: Any) -> None:
    """Assert one single-line error that names the file, and no new file beside it."""
    before = sorted(path.parent.iterdir())
    with pytest.raises(PickleError, match=match) as caught:
        read_pickle(path, **options)
    assert isinstance(caught.value, UserError)
    assert str(caught.value) == f"{path}: {caught.value.why}"
    assert "\n" not in str(caught.value)
    assert sorted(path.parent.iterdir()) == before


def stored(table: PickledTensors) -> dict[str, Tensor]:
    return {name: table.load(name) for name in table.infos}


# --- contents ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("new", [True, False], ids=["zip", "format-before-1.6"])
def test_every_tensor_is_read_under_its_path_and_the_rest_as_plain_values(new: bool, tmp_path: Path) -> None:
    table = torch.randn(5, 3)
    tensors = {
        "words": table,
        "tied": table,  # shares memory
        "column": table[:, 1],  # a view, not contiguous
        "turned": table.T,
        "half": table.half(),
        "brain": table.bfloat16(),
        "steps": torch.tensor(7),
        "flags": torch.tensor([True, False]),
        "none": torch.zeros(0, 4),
        "trained": torch.nn.Parameter(table),
        "negative": torch.view_as_complex(table[:4, :2].contiguous()).conj().imag,  # a view that torch negates lazily
        "number": table[::5, 1],
    }
    state = {
        "model": OrderedDict(tensors),
        "optimizer": {"state": {0: {"moment": torch.ones(2), "step": 3}}},
        "args": Namespace(arch="roberta_large", layers=2, rate=0.1, extra=None, inner=Namespace(flag=True)),
        "sizes": torch.Size([2, 3]),
        "junk": [1, "two", (3.0, {"four": torch.ones(1)}), {5}, torch.float16, 1 << 80, b"bytes"],
    }
    table, plain = read_pickle(saved(tmp_path / "file.pt", state, new), allowed=NAMESPACE)
    found = stored(table)
    expected = {f"model.{name}": tensor for name, tensor in tensors.items()}
    expected["optimizer.state.0.moment"] = torch.ones(2)
    assert found.keys() == table.infos.keys() == expected.keys()
    for name, tensor in expected.items():
        assert table.infos[name].shape == found[name].shape
        assert found[name].dtype == table.dtype(name) == tensor.dtype
        assert found[name].is_contiguous() and not found[name].requires_grad
        assert torch.equal(found[name], tensor), name
    assert plain == {
        "model": {},
        "optimizer": {"state": {"0": {"step": 3}}},
        "args": {"arch": "roberta_large", "layers": 2, "rate": 0.1, "extra": None, "inner": {"flag": True}},
        "sizes": [2, 3],
        "junk": [1, "two", [3.0, {"four": "<Tensor>"}], "<set>", "<dtype>", "<int>", "<bytes>"],
    }
    assert [path.name for path in tmp_path.iterdir()] == ["file.pt"]


def test_tensors_outside_the_requested_prefix_are_left_out(tmp_path: Path) -> None:
    state = {"model": {"a": torch.ones(1)}, "models": {"b": torch.ones(2)}, "moment": torch.ones(3), "step": 4}
    table, plain = read_pickle(saved(tmp_path / "file.pt", state), below="model")
    assert stored(table).keys() == {"model.a"}
    assert plain == {"model": {}, "models": {"b": "<Tensor>"}, "moment": "<Tensor>", "step": 4}


def test_symbolic_link_is_followed_and_named_as_given(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Hugging Face's cache consists of symbolic links."""
    monkeypatch.chdir(tmp_path)
    blob = saved(tmp_path / "3f2a", {"a": torch.ones(1)})
    (tmp_path / "snapshot").mkdir()
    link = tmp_path / "snapshot" / "pytorch_model.bin"
    link.symlink_to(Path("..") / blob.name)
    assert stored(read_pickle(link.relative_to(tmp_path))[0]).keys() == {"a"}
    blob.write_bytes(blob.read_bytes()[:200])
    refused(
        link, r"pytorch_model\.bin: is no file of torch\.save, or one that was cut short; copy or download it again"
    )


# --- hostile and mistaken files ---------------------------------------------------------------------------------------


class Call:
    """An object whose unpickling calls a function."""

    def __init__(self, function: Callable[..., Any], *arguments: Any) -> None:
        self.function, self.arguments = function, arguments

    def __reduce__(self) -> Any:
        return self.function, self.arguments


@pytest.mark.parametrize("new", [True, False], ids=["zip", "format-before-1.6"])
def test_nothing_is_executed_even_if_the_environment_disables_weights_only(
    new: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD", "1")
    evil = Call(os.mkdir, str(tmp_path / "owned"))
    state = {"args": Namespace(evil=evil), "model": {"a": torch.ones(1)}}
    path = saved(tmp_path / "evil.pt", state, new)
    refused(path, r"it asks for (posix|nt)\.mkdir, which is no tensor; nothing of it was run", allowed=NAMESPACE)
    assert not (tmp_path / "owned").exists()
    evil.function(*evil.arguments)
    assert (tmp_path / "owned").exists()  # the payload works when called
    assert os.environ["TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD"] == "1"


def test_torch_rejects_a_function_that_our_check_misses(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD", "1")
    monkeypatch.setattr(pickles, "_check_one", lambda *_: None)
    torch.serialization.add_safe_globals([SimpleNamespace])
    for value in (Call(os.mkdir, str(tmp_path / "owned")), SimpleNamespace(layers=2)):
        refused(saved(tmp_path / "evil.pt", {"value": value}), "it is no pickle of tensors; nothing of it was run")
    assert not (tmp_path / "owned").exists()
    assert SimpleNamespace in torch.serialization.get_safe_globals()


@pytest.mark.parametrize(
    ("value", "match"),
    [
        (Call(eval, "1"), "it asks for eval, which"),
        (Call(getattr, "a", "upper"), "it asks for getattr, which"),
        (Call(subprocess.Popen, ["true"]), r"it asks for (subprocess|commands)\.Popen, which"),
        (Call(torch.load, "/dev/null"), r"it asks for torch\.serialization\.load, which"),
        (Namespace(layers=2), r"it asks for argparse\.Namespace, which"),
        (SimpleNamespace(layers=2), r"it asks for types\.SimpleNamespace, which"),
        (Call(bytearray, 1 << 50), "it asks for bytearray, which"),  # allocates this much memory
        (torch.nn.Linear(1, 1), r"it asks for torch\.nn\.modules\.linear\.Linear, which"),
        (torch.ones(2, dtype=torch.complex64), r"safetensors cannot hold: tensor 'value' of torch\.complex64"),
        (torch.eye(3).to_sparse(), "tensor 'value', which is sparse, quantized or without data"),
        (torch.ones(1, device="meta"), "tensor 'value', which is sparse, quantized or without data"),
    ],
    ids=lambda value: "" if isinstance(value, str) else getattr(value, "function", type(value)).__name__,
)
def test_unsupported_object_is_named(value: Any, match: str, tmp_path: Path) -> None:
    torch.serialization.add_safe_globals([SimpleNamespace])  # as Megatron does for the whole process
    refused(saved(tmp_path / "file.pt", {"value": value}), match)


@pytest.mark.parametrize(
    ("state", "match"),
    [
        ([torch.ones(1)], "it is no pickle of tensors"),
        ({}, "it is no pickle of tensors"),
        ({3: torch.ones(1)}, "it is no pickle of tensors"),
        ({"a.b": torch.ones(1), "a": {"b": torch.ones(1)}}, "two tensors 'a.b'"),
        ({"a": {1: 1, "1": 2}}, "two entries '1' in one dict"),
    ],
    ids=["list", "empty", "numbered", "two-paths", "two-keys"],
)
def test_file_without_distinct_tensor_names_is_rejected(state: Any, match: str, tmp_path: Path) -> None:
    refused(saved(tmp_path / "file.pt", state), match)


def test_endless_values_are_rejected(tmp_path: Path) -> None:
    loop: list[Any] = []
    loop.append(loop)
    laughs: list[Any] = ["ha"]
    for _ in range(20):
        laughs = [laughs] * 10  # a hundred bytes that expand to 10^20 values
    text = "x" * (1 << 16)
    for name, value in (("loop", loop), ("laughs", laughs), ("texts", [text] * 1000), ("names", [{text: 1}] * 1000)):
        refused(saved(tmp_path / name, {"args": value}), f"{name}: it is not a model but values without end")


def rezipped(path: Path, compression: int = zipfile.ZIP_STORED) -> Path:
    """Pack the same file again with Python's zipfile."""
    with zipfile.ZipFile(path) as old, zipfile.ZipFile(path.with_suffix(".zip"), "w", compression) as new:
        for info in old.infolist():
            new.writestr(info.filename, old.read(info))
    return path.with_suffix(".zip")


def test_expanding_zip_is_rejected_before_it_is_read(tmp_path: Path) -> None:
    path = saved(tmp_path / "file.pt", {"a": torch.zeros(1 << 20)})
    refused(rezipped(path, zipfile.ZIP_DEFLATED), "it is a compressed zip, which torch.save does not write")
    content = bytearray(rezipped(path).read_bytes())
    places = [index for index in range(len(content)) if content.startswith(b"PK\x01\x02", index)]
    with zipfile.ZipFile(io.BytesIO(content)) as members:
        largest = max(members.infolist(), key=lambda info: info.file_size)
        data = members.infolist().index(largest)
    for place in places:  # every directory entry points to the large member
        content[place + 20 : place + 28] = content[places[data] + 20 : places[data] + 28]
    (tmp_path / "overlapping").write_bytes(content)
    refused(tmp_path / "overlapping", "it is a zip with members that overlap")


def test_tensors_that_expand_on_disk_are_rejected(tmp_path: Path) -> None:
    one = torch.zeros(1)
    state = {f"tensor{index}": one.expand(1 << 21) for index in range(3)}  # 8 MiB each, one number in the file
    for new in (True, False):
        refused(
            saved(tmp_path / "file.pt", state, new),
            "it unfolds to more than four times its size; nothing of it was run",
        )
    huge = {"a": one.expand(1 << 40)}  # a few bytes that claim 4 TiB
    refused(saved(tmp_path / "huge.pt", huge), "it unfolds to more than four times its size")


@pytest.mark.parametrize(
    ("content", "match"),
    [
        (b"", "is empty; copy or download it again"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:12\n", "git lfs pull"),
        (None, "is safetensors, and not a pickle"),
    ],
    ids=["empty", "pointer", "safetensors"],
)
def test_empty_pointer_or_safetensors_file_is_rejected(content: bytes | None, match: str, tmp_path: Path) -> None:
    path = tmp_path / "file.pt"
    if content is None:
        save_file({"a": torch.ones(1)}, path)
    else:
        path.write_bytes(content)
    refused(path, match)
    path.unlink()
    refused(path, "cannot be read \\(No such file or directory\\)")
    refused(tmp_path / "..", "cannot be read \\(Is a directory\\)")


NOT_WHOLE = r"is no file of torch\.save, or one that was cut short; copy or download it again"


def test_text_and_truncated_files_are_rejected(tmp_path: Path) -> None:
    (tmp_path / "text.pt").write_text("<html><body>404: no such model</body></html>")
    refused(tmp_path / "text.pt", f": {NOT_WHOLE}")
    whole = saved(tmp_path / "whole.pt", {"a": torch.ones(1000)}).read_bytes()
    (tmp_path / "cut.pt").write_bytes(whole[:-2000])
    refused(tmp_path / "cut.pt", f": {NOT_WHOLE}")


@pytest.mark.parametrize("new", [True, False], ids=["zip", "format-before-1.6"])
def test_file_truncated_at_any_point_is_rejected(new: bool, tmp_path: Path) -> None:
    state = {"a": torch.ones(300), "args": Namespace(layers=2)}
    whole = saved(tmp_path / "whole.pt", state, new).read_bytes()
    for length in range(len(whole) // 2, len(whole), 50):  # earlier cuts in the old format may fall into names
        (tmp_path / "cut.pt").write_bytes(whole[:length])
        refused(tmp_path / "cut.pt", f": {NOT_WHOLE}", allowed=NAMESPACE)


@pytest.mark.parametrize("text", ["entry not found", "{}", "[1, 2]", "404", "PK\x03\x04 and more", "\x80\x02}q"])
def test_file_not_written_by_torch_is_rejected(text: str, tmp_path: Path) -> None:
    (tmp_path / "file.pt").write_bytes(text.encode("latin-1"))
    refused(tmp_path / "file.pt", f": {NOT_WHOLE}")
