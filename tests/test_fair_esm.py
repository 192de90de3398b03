"""Import from fair-esm: the outputs match fair-esm's, and invalid files are refused with their name."""

from __future__ import annotations

from argparse import Namespace
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from esm.pretrained import load_model_and_alphabet_local
from torch import Tensor, nn

from bionemo_esm.alphabet import MASK_ID, PAD_ID
from bionemo_esm.data.collate import PackedBatch, pack
from bionemo_esm.data.masking import MaskedResidues
from bionemo_esm.data.store import SequenceSplit, sha256_of_file
from bionemo_esm.errors import UserError
from bionemo_esm.model.archive import Archive, write_archive
from bionemo_esm.model.esm1nv import ESM1nvModel
from bionemo_esm.model.feature_extraction import contacts
from bionemo_esm.model.interchange.fair_esm import read_fair_esm
from bionemo_esm.model.interchange.state_dict_adapter import ImportedWeights, InterchangeError, SourceModel, to_native
from bionemo_esm.model.torch_pickle import PickleError
from peers import padded
from theirs import Shape, State, fair_esm_model, released

SHAPE = Shape(2, 32, 4, ffn=48)
MAX_POSITIONS = 128
JUNK = {
    "criterion": "masked_lm", "lr": [0.0004], "adam_betas": "(0.9, 0.999)", "device_id": 0, "tbmf_wrapper": False,
    "clip_norm": float("inf"), "restore_file": None, "dtype": torch.float16, "filtered": {"a", "b"}, "shape": (1, 2),
    "encoder_layers_to_keep": None, "activation_fn": "gelu",
}  # fmt: skip
"""Further fairseq arguments, of many types."""


def contents(family: str, half: bool = False, **arguments: Any) -> tuple[State, State]:
    """Return the contents of a released model's two files; an argument of None is omitted."""
    state, regression = released(fair_esm_model(family, SHAPE, MAX_POSITIONS), **JUNK | arguments)
    if half:
        weights = state["model"] = {name: tensor.half() for name, tensor in state["model"].items()}
        # keep the tied weights one tensor, as in the model
        weights["encoder.lm_head.weight"] = weights["encoder.sentence_encoder.embed_tokens.weight"]
    return state, regression


def written(folder: Path, state: Any, regression: State | None = None, name: str = "esm1b_random") -> Path:
    folder.mkdir(exist_ok=True)
    path = folder / f"{name}.pt"
    torch.save(state, path)
    if regression is not None:
        torch.save(regression, folder / f"{name}-contact-regression.pt")
    return path


def taken(path: Path) -> tuple[SourceModel, ImportedWeights]:
    foreign = read_fair_esm(path)
    return foreign, to_native(foreign.tensors, foreign.config, foreign.key_mapping)


# --- equal outputs ----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def batch(tiny_split: SequenceSplit) -> PackedBatch:
    """Return three proteins: the first has rare letters and a fifth of it masked, the last has one residue."""
    proteins = [tiny_split[10][:120], tiny_split[3], tiny_split[0]]
    residues = np.concatenate(proteins)
    chosen = (np.arange(len(residues)) % 5 == 2) & (np.arange(len(residues)) < len(proteins[0]))
    shown = np.where(chosen, np.uint8(MASK_ID), residues)
    return pack(residues, np.array([len(protein) for protein in proteins]), MaskedResidues(shown, chosen))


def answers(model: nn.Module, batch: PackedBatch) -> tuple[Tensor, list[Tensor]]:
    """Return fair-esm's logits as one packed row, and the contacts of each protein."""
    lengths = batch.cu_seqlens.diff().tolist()
    rows = padded(batch, batch.tokens)
    with torch.no_grad():
        told = model.eval()(rows, return_contacts=True)
    found = [told["contacts"][index, : length - 2, : length - 2] for index, length in enumerate(lengths)]
    return told["logits"][rows != PAD_ID], found


@pytest.mark.parametrize(
    ("family", "name", "half"),
    [("ESM-1b", "esm1b_t2", False), ("ESM-1v", "esm1v_t2_1", False), ("ESM-2", "esm2_t2", True)],
    ids=["ESM-1b", "ESM-1v", "ESM-2-float16"],
)
def test_the_imported_model_matches_fair_esm_on_the_same_file(
    family: str, name: str, half: bool, batch: PackedBatch, tmp_path: Path
) -> None:
    state, regression = contents(family, half, dropout=0.1)
    has_contacts = family != "ESM-1v"
    path = written(tmp_path / "released", state, regression if has_contacts else None, name)
    with torch.serialization.safe_globals([Namespace]):
        theirs, _ = load_model_and_alphabet_local(str(path))
    foreign, model = taken(path)
    config = {"encoder": model.config.to_dict(), "precision": model.precision, "seed": 0}
    write_archive(tmp_path / "out.nemo", Archive("ESM1nvModel", config, model.weights, foreign.provenance))
    ours = ESM1nvModel.restore_from(str(tmp_path / "out.nemo"), map_location="cpu").eval()
    logits, found = answers(theirs.float(), batch)
    torch.testing.assert_close(ours.logits(batch).detach(), logits, rtol=0, atol=1e-4)
    if has_contacts:
        torch.testing.assert_close(contacts(ours.encoder, batch), found, rtol=0, atol=1e-4)
    told = model.config
    assert told.contact_head == has_contacts
    assert told.seq_length == (1024 if family == "ESM-2" else MAX_POSITIONS)
    assert told.embedding_layernorm == (family == "ESM-1b")
    assert (told.token_dropout, told.hidden_dropout, told.attention_dropout) == (True, 0.1, 0.0)
    files = [path, *([path.with_name(f"{name}-contact-regression.pt")] if has_contacts else [])]
    assert foreign.provenance == {
        "imported_from": {
            "format": "fair-esm",
            "source": f"{name}.pt",
            "revision": None,
            "sha256": {file.name: sha256_of_file(file) for file in files},
        }
    }
    assert any("seq_length is 1024" in note for note in foreign.notes) == (family == "ESM-2")
    assert any("contact-regression.pt; it is not there" in note for note in foreign.notes) != has_contacts


def test_progress_counts_every_hashed_byte(tmp_path: Path) -> None:
    path = written(tmp_path / "released", *contents("ESM-2"))
    told: list[int] = []
    read_fair_esm(path, advance=told.append)
    assert sum(told) == sum(file.stat().st_size for file in path.parent.iterdir())


@pytest.mark.parametrize(("family", "left"), [("ESM-1b", False), ("ESM-2", True)])
def test_the_mask_embedding_is_zeroed_where_fair_esm_zeroes_it(family: str, left: bool, tmp_path: Path) -> None:
    state, _ = contents(family)
    row = state["model"]["encoder.sentence_encoder.embed_tokens.weight"][MASK_ID].clone()
    _, model = taken(written(tmp_path / "released", state))
    words = model.weights["encoder.embedding.word_embeddings.weight"]
    assert row.abs().min() > 0
    assert torch.equal(words[MASK_ID], row if left else torch.zeros(32))


def test_training_state_of_fairseq_is_left_out_with_a_note(tmp_path: Path) -> None:
    state, regression = contents("ESM-1b", activation_dropout=0.1, token_dropout=None)
    moments = {"last_optimizer_state": {"state": {0: {"exp_avg": torch.ones(3)}}}, "extra_state": {"epoch": 3}}
    foreign, model = taken(written(tmp_path / "released", state | moments, regression))
    assert foreign.notes[0] == "left out of esm1b_random.pt: 'extra_state', 'last_optimizer_state'"
    assert any("activation_dropout" in note for note in foreign.notes)
    assert model.notes == ()
    assert not model.config.token_dropout  # fair-esm's value for a missing argument


def test_arguments_without_the_encoder_prefix_are_accepted(tmp_path: Path) -> None:
    sizes = {"layers": 2, "embed_dim": 32, "attention_heads": 4}
    bare = sizes | {f"encoder_{name}": None for name in sizes}
    foreign, _ = taken(written(tmp_path / "released", contents("ESM-1b", **bare)[0]))
    assert (foreign.config.num_layers, foreign.config.hidden_size, foreign.config.num_attention_heads) == (2, 32, 4)
    twice = contents("ESM-1b", layers=3)[0]
    with pytest.raises(InterchangeError, match="args: encoder_layers is '2', and layers is '3'; remove one"):
        read_fair_esm(written(tmp_path / "twice", twice))


# --- refusals ---------------------------------------------------------------------------------------------------------


def refused(path: Path, match: str, kind: type[UserError] = InterchangeError) -> None:
    """Check that reading or converting fails with a one-line error that starts with the file's path."""
    with pytest.raises(kind, match=match) as caught:
        taken(path)
    assert str(caught.value).startswith((f"{path}: ", f"{path.with_suffix('')}-contact-regression.pt: "))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("arch", "match"),
    [
        (
            "protein_bert_base",
            "ESM-1 has sinusoidal positions, an extra key .*35 tokens.*Take ESM-1b or ESM-2",
        ),
        ("msa_transformer", "the MSA Transformer attends along the columns"),
        ("invariant_gvp_transformer", "ESM-IF reads structures"),
        ("transformer_lm", "arch is 'transformer_lm'; known is 'roberta_large'"),
        (None, "args has no 'arch'"),
    ],
)
def test_other_architectures_are_refused_with_their_name(arch: str | None, match: str, tmp_path: Path) -> None:
    refused(written(tmp_path / "released", contents("ESM-1b", arch=arch)[0]), match)


@pytest.mark.parametrize(
    ("family", "arguments", "match"),
    [
        ("ESM-1b", {"encoder_layers": None}, "args has no 'layers'"),
        ("ESM-1b", {"max_positions": None}, "args has no 'max_positions'"),
        ("ESM-1b", {"max_positions": 127}, r"embed_positions\.weight' has shape \[130, 32\]; .* be \[129, 32\]"),
        ("ESM-1b", {"encoder_layers": 3}, "args: layers is 3, but the weights are of 2 layers"),
        ("ESM-1b", {"encoder_layers": 1}, "args: layers is 1, but the weights are of 2 layers"),
        ("ESM-1b", {"encoder_layers": 10**9}, "layers is 1,000,000,000, but the weights are of 2 layers"),
        ("ESM-1b", {"encoder_layers": "two"}, "args: in our terms, model.num_layers must be an integer, not 'two'"),
        ("ESM-1b", {"encoder_attention_heads": 5}, r"args: .*hidden_size \(32\) is not divisible"),
        ("ESM-1b", {"encoder_ffn_embed_dim": 64}, r"fc1\.bias' has shape \[48\]; .* should be \[64\]"),
        ("ESM-1b", {"dropout": 2.0}, r"model\.hidden_dropout must lie in \[0, 1\), not 2\.0"),
        ("ESM-1b", {"token_dropout": torch.float16}, "token_dropout must be true or false, not '<dtype>'"),
        ("ESM-2", {"token_dropout": None}, r"cfg\['model'\] has no 'token_dropout'"),
        ("ESM-2", {"encoder_embed_dim": 64}, r"has shape \[33, 32\]|should be \[64\]|should be \[33, 64\]"),
        ("ESM-2", {"encoder_embed_dim": "32"}, "must be an integer, not '32'"),
        ("ESM-2", {"arch": "msa_transformer"}, "the MSA Transformer attends"),
    ],
    ids=lambda value: "-".join(map(str, value.items())) if isinstance(value, dict) else "",
)
def test_missing_or_invalid_sizes_are_named(family: str, arguments: State, match: str, tmp_path: Path) -> None:
    refused(written(tmp_path / "released", contents(family, **arguments)[0]), match)


def without(name: str) -> Callable[[State, State], None]:
    return lambda weights, regression: weights.pop(name)


def having(name: str, value: Any) -> Callable[[State, State], None]:
    return lambda weights, regression: weights.update({name: value})


def having_in_regression(name: str, value: Any) -> Callable[[State, State], None]:
    return lambda weights, regression: regression.update({name: value})


TOKENS, LAYER = "encoder.sentence_encoder.embed_tokens.weight", "encoder.sentence_encoder.layers.0."


@pytest.mark.parametrize(
    ("change", "match"),
    [
        (without(LAYER + "fc2.bias"), r"tensor 'layers\.0\.fc2\.bias' is missing; the model is not whole"),
        (without("encoder.sentence_encoder.emb_layer_norm_before.bias"), r"'emb_layer_norm_before\.bias' is missing"),
        (having(LAYER + "self_attn.bias_k", torch.ones(1)), r"bias_k' has no place in an ESM of these sizes"),
        (having("encoder.embed_tokens.weight", torch.ones(33, 32)), r"embed_tokens\.weight' is there twice"),
        (having("encoder.lm_head.weight", torch.ones(33, 32)), r"lm_head\.weight' differs from 'embed_tokens\.weight'"),
        (having(TOKENS, torch.ones(35, 32)), r"has shape \[35, 32\]; by the configuration it should be \[33, 32\]"),
        (having(TOKENS, torch.ones(33, 32, dtype=torch.float64)), "has dtype F64; known are F32, BF16, F16"),
        (having("encoder.version", 3), "'encoder.version' under 'model' is no tensor"),
        (having("adapters", {"a": torch.ones(1)}), "'adapters' under 'model' is no tensor"),
        (having_in_regression("contact_head.regression.weight", torch.ones(1, 9)), r"has shape \[1, 9\]"),
        (having_in_regression("contact_head.scale", torch.ones(1)), r"contact_head\.scale' has no place"),
        (having_in_regression("lm_head.bias", torch.ones(33)), r"lm_head\.bias' is there twice"),
    ],
    ids=[
        "missing", "half-a-norm", "left-over", "twice", "untied", "larger-alphabet", "float64", "number", "nested",
        "regression-of-another-size", "more-in-regression", "regression-overwrites",
    ],
)  # fmt: skip
def test_missing_unexpected_or_invalid_tensors_are_named(
    change: Callable[[State, State], None], match: str, tmp_path: Path
) -> None:
    state, regression = contents("ESM-1b")
    change(state["model"], regression["model"])
    refused(written(tmp_path / "released", state, regression), match)


def test_other_kinds_of_files_are_recognised_and_refused(tmp_path: Path) -> None:
    state, regression = contents("ESM-1b")
    weights = state["model"]
    learned = contents("ESM-2")[0]
    learned["model"]["encoder.sentence_encoder.embed_positions.weight"] = torch.ones(130, 32)
    cases: dict[str, tuple[Any, str]] = {
        "bare": (weights, "is a bare state dict, without the sizes of the model; save {'args': sizes"),
        "hub": ({"esm.encoder.layer.0.output.dense.bias": torch.ones(1)}, "is a pytorch_model.bin of Hugging Face"),
        "headless": ({"model": weights}, "neither 'args' .* nor 'cfg' with a 'model'"),
        "empty": ({"model": weights, "args": None, "cfg": {"task": 1}}, "neither 'args'"),
        "unpacked": ({"args": state["args"], "model": [1]}, "has no 'model' with weights in it"),
        "x-contact-regression": (regression, "has the weights for contacts only; give the model's own file"),
        "learned": (learned, r"embed_positions\.weight' is a table of learned positions; a file with 'cfg' is ESM-2"),
    }
    for name, (content, match) in cases.items():
        refused(written(tmp_path / "files", content, name=name), match)
    refused(tmp_path / "absent.pt", "no such file")
    refused(tmp_path, "no such file")


def test_a_pickle_that_imports_code_is_refused_and_esmfold_is_recognised(tmp_path: Path) -> None:
    from omegaconf import OmegaConf

    state, _ = contents("ESM-1b", hook=replace)
    path = written(tmp_path / "evil", state)
    refused(path, r"it asks for dataclasses\.replace, which is no tensor; nothing of it was run", PickleError)
    folding = {"cfg": OmegaConf.create({"model": {"trunk": 1}}), "model": {}}
    refused(written(tmp_path / "fold", folding), r"it asks for omegaconf\.\S+, .*ESMFold's files have such")


def test_an_error_names_the_damaged_file(tmp_path: Path) -> None:
    path = written(tmp_path / "released", *contents("ESM-1b"))
    regression = tmp_path / "released" / "esm1b_random-contact-regression.pt"
    regression.write_text("version https://git-lfs.github.com/spec/v1\n")
    with pytest.raises(PickleError, match=r"contact-regression\.pt: is a pointer of Git LFS .*git lfs pull"):
        read_fair_esm(path)
    path.write_bytes(path.read_bytes()[:-3000])
    refused(path, "is no file of torch.save, or one that was cut short", PickleError)
