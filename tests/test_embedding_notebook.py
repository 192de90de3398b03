"""Embeddings in a notebook: accepted forms of sequences, and access to the results."""

from __future__ import annotations

import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pandas
import pyarrow as arrow
import pytest
import torch
from numpy.typing import NDArray

from bionemo_esm.alphabet import decode, encode
from bionemo_esm.errors import ConfigError, UserError
from bionemo_esm.inference.inputs import InputError, InputPolicy, proteins_of
from bionemo_esm.inference.protein_model import ProteinModel
from bionemo_esm.model.feature_extraction import representations
from errors import refused
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


def test_two_lines_give_a_feature_matrix(notebook: ProteinModel) -> None:
    features = notebook.embed({"ubiquitin": UBIQUITIN, "crambin": CRAMBIN}).mean
    assert (features.shape, features.dtype) == ((2, 32), np.float32)
    np.testing.assert_allclose(features[1], mean_of(notebook, CRAMBIN, 2), atol=1e-5)


@pytest.mark.parametrize("form", ["mapping", "pairs", "list", "one", "file", "path"])
def test_embed_accepts_every_form_of_proteins(notebook: ProteinModel, form: str, tmp_path: Path) -> None:
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


def test_embeddings_are_indexed_by_number_and_by_id(notebook: ProteinModel) -> None:
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


def test_bad_records_can_be_skipped(notebook: ProteinModel) -> None:
    with pytest.raises(InputError, match=r"record 2 \(b\): it has no residues; policy=InputPolicy\("):
        notebook.embed({"a": CRAMBIN, "b": ""})
    assert notebook.embed({"a": CRAMBIN, "b": ""}, policy=InputPolicy(bad_records="skip")).ids == ["a"]


def test_an_empty_input_is_an_error(notebook: ProteinModel) -> None:
    with pytest.raises(InputError, match=r"^sequences: no protein is there$"):
        notebook.embed({})


def test_the_repr_of_a_model_describes_it(notebook: ProteinModel) -> None:
    assert re.fullmatch(
        "<ProteinModel: ESM-1nv, 2 layers, hidden 32, [0-9,]+ parameters, float32 on cpu, window of [0-9]+ residues>",
        repr(notebook),
    )


def test_reading_embeddings_does_not_import_torch() -> None:
    script = "import sys, bionemo_esm.inference.embedding.formats; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", script], check=False).returncode == 0


class SeqRecord:
    """Mimic Biopython's `SeqRecord`: an id and a sequence that is not a `str`."""

    def __init__(self, identifier: str, sequence: str) -> None:
        self.id, self.seq = identifier, Sequence(sequence)


class Sequence:
    def __init__(self, letters: str) -> None:
        self.letters = letters

    def __str__(self) -> str:
        return self.letters


TWO = [UBIQUITIN, CRAMBIN]
WITH_IDS: dict[str, Any] = {
    "series": pandas.Series(TWO, index=["u", "c"]),
    "records": [SeqRecord("u", UBIQUITIN), SeqRecord("c", CRAMBIN)],
    "records by id": {"u": SeqRecord("x", UBIQUITIN), "c": SeqRecord("y", CRAMBIN)},
    "table": pandas.DataFrame({"sequence": TWO, "id": ["u", "c"]}),
    "table with an index": pandas.DataFrame({"sequence": TWO}, index=["u", "c"]),
    "arrow table": arrow.table({"id": ["u", "c"], "Sequence": TWO}),
}


@pytest.mark.parametrize("form", WITH_IDS)
def test_ids_of_python_objects_are_kept(form: str) -> None:
    proteins = proteins_of(WITH_IDS[form])
    assert [(protein.id, decode(protein.tokens)) for protein in proteins] == [("u", UBIQUITIN), ("c", CRAMBIN)]


def test_the_default_index_of_pandas_gives_record_numbers_as_ids() -> None:
    series = pandas.Series(TWO)
    assert [protein.id for protein in proteins_of(series)] == ["1", "2"]
    assert [protein.id for protein in proteins_of(series.to_frame("sequence"))] == ["1", "2"]
    assert [protein.id for protein in proteins_of(series.iloc[::-1])] == ["1", "0"]
    assert [protein.id for protein in proteins_of(SeqRecord("u", UBIQUITIN))] == ["u"]  # type: ignore[arg-type]


def test_unsupported_arguments_are_refused_with_the_remedy(notebook: ProteinModel) -> None:
    for wrong in (None, 5, b"MKTV"):
        with refused("input.type", "give text, a list of sequences, a mapping"):
            notebook.embed(wrong)  # type: ignore[arg-type]
    with refused("input.no-column", "say by policy=InputPolicy(sequence_column='...')"):
        notebook.embed(pandas.DataFrame({"id": ["a"], "wt": [CRAMBIN]}))
    with refused("input.index", "several levels"):
        notebook.embed(pandas.Series([CRAMBIN], index=pandas.MultiIndex.from_tuples([("a", 1)])))
    with pytest.raises(ConfigError, match="layers must be an integer, not None"):
        notebook.embed([CRAMBIN], layers=None)  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match="mean must be true or false, not 'yes'"):
        notebook.embed([CRAMBIN], mean="yes")  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match="model must be a path, not None"):
        ProteinModel.load(None)  # type: ignore[arg-type]
    with refused("scoring.one-method", "score_variants takes one of masked-marginals"):
        notebook.score_variants("MKTV", ["K2A"], method=["masked-marginals"])  # type: ignore[arg-type]


def test_reading_a_value_that_was_not_computed_is_an_error_with_the_remedy(notebook: ProteinModel) -> None:
    with refused("embeddings.not-computed", "embed(..., pseudo_perplexity=True)"):
        _ = notebook.embed([CRAMBIN]).pseudo_perplexity
