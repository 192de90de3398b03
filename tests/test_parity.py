"""Parity with Transformers and fair-esm on the same weights and proteins: hidden states, attentions, contacts, logits,
loss and gradients. `docs/interchange.md` has the measured errors.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from torch.nn.functional import cross_entropy

from bionemo_esm.alphabet import PAD_ID, encode
from bionemo_esm.data.store import ProteinStore
from bionemo_esm.model.esm1nv import ESM1nvModel
from bionemo_esm.model.interchange.state_dict_adapter import FAIR_ESM, HUGGING_FACE, from_native
from peers import Peer, Proteins, batch_of, brought_here, errors, fair_esm, hugging_face, padded
from theirs import Shape

TOLERANCE = 1e-4  # largest absolute difference in float32, for values up to about 10
SHAPES = [Shape(2, 32, 4), Shape(3, 48, 3), Shape(5, 40, 2)]
FAMILIES = [
    (hugging_face, "ESM-1nv"), (hugging_face, "ESM-1b"), (hugging_face, "ESM-1v"), (hugging_face, "ESM-2"),
    (fair_esm, "ESM-1b"), (fair_esm, "ESM-1v"), (fair_esm, "ESM-2"),
]  # fmt: skip


@pytest.fixture(scope="module")
def batches(sample_store: ProteinStore) -> dict[str, Proteins]:
    """Real proteins: lengths at the limits, unequal lengths, and every rare letter."""
    train = sample_store.split("train")
    long = [train[int(index)] for index in np.flatnonzero(train.lengths >= 1022)[:4]]
    short = [train[int(index)] for index in np.flatnonzero(train.lengths < 200)[:4]]
    rare = np.concatenate([encode("XBUZO.-"), short[0], encode("-.OZUBX"), short[1]])
    return {
        "1 residue": [long[0][:1]],
        "2 residues": [long[1][:2]],
        "511 residues": [long[2][:511]],
        "1,022 residues": [long[3][:1022]],
        "unequal lengths": [short[2], long[0][:1], long[1][:400], long[2][:2], short[3]],
        "rare letters": [rare, short[0]],
    }


def pair_of(family: int, shape: Shape, folder: Path) -> tuple[Peer, ESM1nvModel]:
    build, name = FAMILIES[family]
    peer = build(name, shape, folder / "peer")
    return peer, brought_here(peer, folder)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("family", range(len(FAMILIES)), ids=[f"{build.__name__} {name}" for build, name in FAMILIES])
def test_imported_model_gives_the_outputs_of_its_source(
    family: int, shape: Shape, batches: dict[str, Proteins], tmp_path: Path
) -> None:
    peer, ours = pair_of(family, shape, tmp_path)
    for name, proteins in batches.items():
        for quantity, error in errors(peer, ours, batch_of(proteins)).items():
            assert error < TOLERANCE, f"{quantity}, {name}"


@pytest.mark.parametrize("family", range(4), ids=[name for _, name in FAMILIES[:4]])
def test_loss_and_gradients_equal_transformers(family: int, batches: dict[str, Proteins], tmp_path: Path) -> None:
    peer, ours = pair_of(family, SHAPES[0], tmp_path)
    batch = batch_of(batches["unequal lengths"])
    labels = torch.full_like(batch.tokens, -100)
    labels[batch.target_index] = batch.targets
    tokens_BT = padded(batch, batch.tokens)
    told = peer.model(tokens_BT, attention_mask=tokens_BT.ne(PAD_ID).long(), labels=padded(batch, labels, -100))
    loss = cross_entropy(ours(batch), batch.targets)
    assert loss.item() == pytest.approx(told.loss.item(), abs=1e-5)
    told.loss.backward()
    loss.backward()
    gradients = {name: parameter.grad for name, parameter in ours.named_parameters() if parameter.grad is not None}
    gradients |= dict(ours.named_buffers())
    theirs = dict(peer.model.named_parameters())
    compared = 0
    for name, ours_there in from_native(
        ours.encoder_config, dict.fromkeys(gradients), gradients.get, HUGGING_FACE
    ).items():
        if "contact" in name or "inv_freq" in name:
            continue
        assert torch.allclose(ours_there, theirs[name].grad, atol=TOLERANCE), name
        compared += 1
    assert compared == len([name for name in theirs if "contact" not in name])


def test_a_small_change_of_the_weights_exceeds_the_tolerance(batches: dict[str, Proteins], tmp_path: Path) -> None:
    peer, ours = pair_of(FAMILIES.index((fair_esm, "ESM-2")), SHAPES[0], tmp_path)
    ours.encoder.rotary.frequencies[1] *= 1.001
    found = errors(peer, ours, batch_of(batches["511 residues"]))
    assert all(found[quantity] > TOLERANCE for quantity in ("hidden states", "attentions", "logits"))


def test_both_key_mappings_have_the_same_parts() -> None:
    assert HUGGING_FACE.parts.keys() == FAIR_ESM.parts.keys()
    assert HUGGING_FACE.layer_parts.keys() == FAIR_ESM.layer_parts.keys()
