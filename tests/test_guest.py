"""The library in a user's process: import, loading and inference change no process state."""

from __future__ import annotations

import copy
import json
import pickle
import subprocess
import sys
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import distributed

from bionemo_esm import ProteinModel
from bionemo_esm.errors import UserError
from bionemo_esm.inference.engine import Engine
from models import tiny_model
from peers import PROTEIN

STATE = '''
import hashlib, json, logging, os, random, resource, signal, sys, threading, warnings
resource.setrlimit(resource.RLIMIT_NOFILE, (64, 64))
import numpy, torch
from torch import distributed


def digest(value):
    return hashlib.sha256(repr(value).encode()).hexdigest()[:16]


def state():
    """Everything that a user's program may rely on."""
    loggers = [logging.root, *(logging.getLogger(name) for name in ("torch", "py.warnings", "lightning", "matplotlib"))]
    files = [os.readlink(f"/proc/self/fd/{number}") for number in os.listdir("/proc/self/fd") if number.isdigit()
             and os.path.islink(f"/proc/self/fd/{number}")]
    return {
        "process group": distributed.is_initialized(),
        "torch generator": digest(torch.get_rng_state().tolist()),
        "numpy generator": digest(numpy.random.get_state()[1].tolist()),
        "python generator": digest(random.getstate()),
        "threads": [torch.get_num_threads(), torch.get_num_interop_threads()],
        "default dtype": str(torch.get_default_dtype()),
        "default device": str(torch.get_default_device()),
        "gradients": torch.is_grad_enabled(),
        "loggers": [(logger.level, repr(logger.handlers), logger.disabled) for logger in loggers],
        "warning filters": repr(warnings.filters),
        "showwarning": repr(warnings.showwarning),
        "hooks": [repr(sys.excepthook), repr(threading.excepthook), repr(sys.unraisablehook)],
        "signals": {number: repr(signal.getsignal(number)) for number in signal.valid_signals()},
        "environment": dict(os.environ),
        "folder": os.getcwd(),
        "recursion": sys.getrecursionlimit(),
        "sockets": sum(name.startswith("socket") for name in files),
    }


def changes(before, after):
    return {key: [before[key], after[key]] for key in before if before[key] != after[key]}


path, protein = sys.argv[1:]
torch.manual_seed(7)
drawn = torch.rand(3).tolist()
torch.manual_seed(7)
start = state()
from bionemo_esm import ProteinModel
imported = state()
model = ProteinModel.load(path, device="cpu")
loaded = state()
embedding = model.embed([protein]).mean
model.contacts(protein) if model.engine.encoder.contact_head is not None else None
model.score_variants(protein, [f"{protein[0]}1A" if protein[0] != "A" else "A1C"])
asked = state()
found = {"import": changes(start, imported), "load": changes(imported, loaded), "ask": changes(loaded, asked)}
found["drawn"] = torch.rand(3).tolist() == drawn
distributed.init_process_group("gloo", store=distributed.HashStore(), rank=0, world_size=1)
found["with a group of the user"] = bool((model.embed([protein]).mean == embedding).all())
again = ProteinModel.load(path, device="cpu")
found["loaded beside a group of the user"] = bool((again.embed([protein]).mean == embedding).all())
distributed.destroy_process_group()
found["after the group of the user"] = bool((again.embed([protein]).mean == embedding).all())
print(json.dumps(found))
'''


@pytest.fixture(scope="module")
def archive(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("guest") / "tiny.nemo"
    model = tiny_model(position_embedding="rotary", token_dropout=True, contact_head=True)
    assert model.encoder is not None
    assert model.encoder.contact_head is not None
    model.encoder.contact_head.weight.normal_(generator=torch.Generator().manual_seed(1))
    model.save_to(str(path))
    return path


@pytest.fixture(scope="module")
def process(archive: Path) -> dict[str, Any]:
    """Return the findings of a separate process that may open at most 64 files."""
    done = subprocess.run([sys.executable, "-c", STATE, archive, PROTEIN], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found


@pytest.mark.parametrize("moment", ["import", "load", "ask"])
def test_process_state_is_unchanged(process: dict[str, Any], moment: str) -> None:
    assert process[moment] == {}


def test_random_numbers_of_the_user_are_unchanged(process: dict[str, Any]) -> None:
    assert process["drawn"]


def test_the_model_works_with_and_without_a_process_group_of_the_user(process: dict[str, Any]) -> None:
    assert process["with a group of the user"]
    assert process["loaded beside a group of the user"]
    assert process["after the group of the user"]


@pytest.fixture(scope="module")
def expected(archive: Path) -> Any:
    return answers(ProteinModel.load(archive, device="cpu"))


def answers(model: ProteinModel) -> list[Any]:
    """Return embeddings, contacts and scores of one protein."""
    embedded = model.embed([PROTEIN], pseudo_perplexity=True)
    scores = model.score_variants(PROTEIN, [f"{PROTEIN[0]}1A"])
    return [np.array(embedded.mean), np.array(embedded.pseudo_perplexity), model.contacts(PROTEIN), scores]


def same(found: list[Any], expected: list[Any]) -> bool:
    return all(np.array_equal(one, other) for one, other in zip(found, expected, strict=True))


class DefaultDtype:
    def __enter__(self) -> None:
        torch.set_default_dtype(torch.float64)

    def __exit__(self, *_: object) -> None:
        torch.set_default_dtype(torch.float32)


AMBIENT = {
    "autocast": lambda: torch.autocast("cpu", dtype=torch.bfloat16),
    "inference mode": torch.inference_mode,
    "no gradients": torch.no_grad,
    "another default device": lambda: torch.device("meta"),
    "another default dtype": DefaultDtype,
}


@pytest.mark.parametrize("setting", AMBIENT)
@pytest.mark.parametrize("within", ["load", "ask", "both"])
def test_results_do_not_depend_on_torch_settings_of_the_user(
    archive: Path, expected: list[Any], setting: str, within: str
) -> None:
    def ambient(part: str) -> AbstractContextManager[Any]:
        return AMBIENT[setting]() if within in (part, "both") else nullcontext()  # type: ignore[no-untyped-call]

    with ambient("load"):
        model = ProteinModel.load(archive, device="cpu")
    with ambient("ask"):
        found = answers(model)
    assert same(found, expected)
    assert torch.get_default_dtype() == torch.float32


def test_a_model_can_be_pickled_and_copied(archive: Path, expected: list[Any]) -> None:
    model = ProteinModel.load(archive, device="cpu", batch_tokens=4000)
    for other in (pickle.loads(pickle.dumps(model)), copy.deepcopy(model), copy.copy(model)):
        assert other.engine.batch_tokens == 4000
        assert same(answers(other), expected)
    assert not distributed.is_initialized()


def test_unpickling_a_model_whose_file_has_changed_is_refused(archive: Path, tmp_path: Path) -> None:
    path = tmp_path / "model.nemo"
    path.write_bytes(archive.read_bytes())
    pickled = pickle.dumps(ProteinModel.load(path, device="cpu"))
    path.unlink()
    tiny_model(seed=2).save_to(str(path))
    with pytest.raises(UserError, match=r"model\.nemo has other weights") as caught:
        pickle.loads(pickled)
    assert caught.value.code == "engine.file-changed"


def test_an_engine_without_a_file_cannot_be_pickled() -> None:
    model = tiny_model()
    assert model.encoder is not None
    with pytest.raises(TypeError, match=r"only a model that was loaded from a file can be pickled"):
        pickle.dumps(Engine(model.encoder, model.encoder_config))
