"""Embeddings in a notebook: two lines from sequences, as they are at hand there, to a matrix of features."""

from __future__ import annotations

import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pandas
import pytest
import torch
from numpy.typing import NDArray

from bionemo_esm.alphabet import encode
from bionemo_esm.errors import UserError
from bionemo_esm.inference.inputs import InputError, InputPolicy
from bionemo_esm.inference.protein_model import ProteinModel
from bionemo_esm.model.feature_extraction import representations
from models import tiny_model

UBIQUITIN = "MQIFVKTLTGKTITLEVEPSDTIENVKAKIQDKEGIPPDQQRLIFAGKQLEDGRTLSDYNIQKESTLHLVLRLRGG"
CRAMBIN = "TTCCPSIVARSNFNVCRLPGTPEALCATYTGCIIIPGATCPGDYAN"


@torch.inference_mode()
def mean_of(model: ProteinModel, sequence: str, layer: int) -> NDArray[np.float32]:
    states = representations(model.engine.encoder, model.engine.packed([encode(sequence)]), [layer])[layer]
    return states[1:-1].mean(dim=0).numpy()


@pytest.fixture(scope="module")
def notebook(tmp_path_factory: pytest.TempPathFactory) -> ProteinModel:
    path = tmp_path_factory.mktemp("model") / "tiny.nemo"
    tiny_model().save_to(str(path))
    return ProteinModel.load(path, device="cpu")


def test_two_lines_make_a_matrix_of_features(notebook: ProteinModel) -> None:
    features = notebook.embed({"ubiquitin": UBIQUITIN, "crambin": CRAMBIN}).mean
    assert (features.shape, features.dtype) == ((2, 32), np.float32)
    np.testing.assert_allclose(features[1], mean_of(notebook, CRAMBIN, 2), atol=1e-5)


@pytest.mark.parametrize("form", ["mapping", "pairs", "list", "one", "file", "path"])
def test_proteins_come_as_a_notebook_has_them(notebook: ProteinModel, form: str, tmp_path: Path) -> None:
    (tmp_path / "u.fasta").write_text(f">ubi\n{UBIQUITIN}\n")
    forms: dict[str, Callable[[], Any]] = {
        "mapping": lambda: {"ubi": UBIQUITIN},
        "pairs": lambda: [("ubi", UBIQUITIN)],
        "list": lambda: [UBIQUITIN],
        "one": lambda: UBIQUITIN,
        "file": lambda: str(tmp_path / "u.fasta"),
        "path": lambda: tmp_path / "u.fasta",
    }
    found = notebook.embed(forms[form](), layers=[0, 1])
    assert found.ids == (["1"] if form in ("list", "one") else ["ubi"])
    np.testing.assert_allclose(found.stacked("mean_1")[0], mean_of(notebook, UBIQUITIN, 1),
                               atol=1e-5)  # fmt: skip


def test_embeddings_are_found_by_number_and_by_id(notebook: ProteinModel) -> None:
    found = notebook.embed({"u": UBIQUITIN, "c": CRAMBIN}, layers=range(3), cls=True, pseudo_perplexity=True)
    assert len(found) == 2
    assert found["c"] is found[1] is found[-1] is found[1:][0] is list(found)[1]
    assert found["c"].residues == 46
    assert np.array_equal(found.stacked("cls_1")[1], found["c"].arrays["cls_1"])
    assert found.pseudo_perplexity.tolist() == [found["u"].pseudo_perplexity, found["c"].pseudo_perplexity]
    assert repr(found).startswith("<Embeddings of 2 proteins: mean_0, mean_1, ")
    with pytest.raises(KeyError):
        found["nobody"]
    with pytest.raises(UserError, match=re.escape("mean is of one layer, here are mean_0, mean_1, mean_2")):
        _ = found.mean
    with pytest.raises(UserError, match="'logits': no such row of each protein; there are: mean_0"):
        found.stacked("logits")
    assert notebook.embed([UBIQUITIN], cls=True, mean=False).cls.shape == (1, 32)


def test_a_notebook_may_leave_bad_records_out(notebook: ProteinModel) -> None:
    with pytest.raises(InputError, match=r"record 2 \(b\): it has no residues; policy=InputPolicy\("):
        notebook.embed({"a": CRAMBIN, "b": ""})
    assert notebook.embed({"a": CRAMBIN, "b": ""}, policy=InputPolicy(bad_records="skip")).ids == ["a"]


def test_no_protein_at_all_is_an_error(notebook: ProteinModel) -> None:
    with pytest.raises(InputError, match=r"^sequences: no protein is there$"):
        notebook.embed({})


def test_a_model_says_what_it_is(notebook: ProteinModel) -> None:
    assert re.fullmatch(
        "<ProteinModel: ESM-1nv, 2 layers, hidden 32, [0-9,]+ parameters, float32 on cpu, window of [0-9]+ residues>",
        repr(notebook),
    )


def test_embeddings_are_read_without_waiting_for_torch() -> None:
    script = "import sys, bionemo_esm.inference.embedding.formats; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", script], check=False).returncode == 0


def test_a_table_is_not_taken_for_sequences(notebook: ProteinModel) -> None:
    table = pandas.DataFrame({"id": ["a"], "sequence": [CRAMBIN]})
    with pytest.raises(InputError, match=r"this is a table; give dict\(zip"):
        notebook.embed(table)
    assert notebook.embed(table["sequence"]).ids == ["1"]
