"""Rows: embeddings and masked marginals against Hugging Face and fair-esm, with the same random weights and proteins.

Embeddings: the mean of the last layer's hidden states over the residues of each protein, float32, in memory. Ours packs
proteins of similar length. The peers pad, in file order and sorted by length. Masked marginals: the log-probabilities
at positions of a protein, each masked alone.

Each library runs its most exact bf16. Hugging Face: the model in bfloat16 with float32 rotary frequencies, as it loads
them. fair-esm: autocast, because a bfloat16 model of its code rounds positions over 256. Not run on CUDA.
"""

from __future__ import annotations

import gc
import itertools
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).parents[2] / "tests"))

from benchmarks.comparison import Inputs, Row, Setting, Side, Target, best_of
from benchmarks.proteins import TUNING, Source, sources
from bionemo_esm.alphabet import CLS_ID, EOS_ID, MASK_ID, PAD_ID, SPECIAL_TOKENS_PER_SEQUENCE
from bionemo_esm.inference.batching import each_masked
from bionemo_esm.inference.embedding.embeddings import embed_proteins
from bionemo_esm.inference.embedding.options import EmbeddingOptions
from bionemo_esm.inference.engine import Engine
from bionemo_esm.inference.inputs import Protein
from bionemo_esm.model.archive import read_archive
from bionemo_esm.model.config import EncoderConfig
from bionemo_esm.model.interchange.convert import import_model
from bionemo_esm.model.interchange.state_dict_adapter import FAIR_ESM, from_native
from theirs import Shape, fair_esm_model, hugging_face_model, saved  # type: ignore[import-not-found]

HUGGING_FACE, FAIR = "Hugging Face", "fair-esm"
LIBRARIES = {HUGGING_FACE: ("torch", "transformers"), FAIR: ("torch", "fair-esm")}
TYPICAL = 8  # proteins of a padded batch in file order
TOLERANCE = {"32": 1e-5, "bf16": 5e-2}
TURNS = 3
NAMES = {"32": "float32", "bf16": "bf16"}


@dataclass(frozen=True)
class Form:
    """A model to run on whole proteins."""

    key: str
    title: str
    family: str  # a key of `theirs.FAMILIES`
    shape: Shape
    tokens: int  # of the longest protein, including <cls> and <eos>
    peers: tuple[str, ...]


ESM2 = Form("esm2-8m", "ESM-2 8M", "ESM-2", Shape(6, 320, 20, 0.02), 1024, (HUGGING_FACE, FAIR))
ESM1NV = Form("esm1nv", "ESM-1nv", "ESM-1nv", Shape(6, 768, 12, 0.02), 512, (HUGGING_FACE,))
TINY = Shape(2, 32, 4, 0.2)  # for any form, to check that a row runs


@dataclass(frozen=True)
class Scale:
    """Number of proteins to embed, and the batch sizes to try for the peers."""

    proteins: int
    arrival: int  # of these, padded in file order: these sides are by far the slowest
    tuning: int  # proteins over all lengths, to find the best batch size
    sizes: tuple[int, ...]  # to try, up to the number of proteins


SCALES = {
    "quick": {ESM2: Scale(5, 4, 4, (1, 2)), ESM1NV: Scale(5, 4, 4, (1, 2))},
    "cpu": {ESM2: Scale(60, 24, 16, (1, 2, 4, 8)), ESM1NV: Scale(24, 16, 8, (1, 2, 4, 8))},
    "cuda": {
        ESM2: Scale(2400, 1200, 512, (1, 8, 16, 32, 64, 128)),
        ESM1NV: Scale(2000, 1000, 512, (1, 8, 16, 32, 64, 128)),
    },
}


@dataclass(frozen=True)
class Scan:
    """Masked marginals at the first `places` positions of a protein, cropped to `residues`."""

    places: int
    residues: int
    tuning: int  # positions to find the best batch size


SCANS = {"quick": Scan(6, 40, 4), "cpu": Scan(104, 300, 32), "cuda": Scan(300, 300, 256)}


# --- the sides --------------------------------------------------------------------------------------------------------


class Peer:
    """A model of another library in evaluation mode. `precision` is "32" or "bf16"."""

    def __init__(self, library: str, form: Form, shape: Shape, archive: Path, precision: str, device: str) -> None:
        """Build the model with the weights of `archive`, imported from Hugging Face's model of this form and shape."""
        self.library, self.device = library, device
        fast = library == HUGGING_FACE
        model: Any = hugging_face_peer(form, shape) if fast else fair_esm_peer(form, shape, archive)
        self.autocasts = precision == "bf16" and not fast
        self.model = model.to(device)
        if precision == "bf16" and fast:
            exact = {name: buffer.clone() for name, buffer in model.named_buffers() if name.endswith("inv_freq")}
            self.model.to(torch.bfloat16)
            for name, buffer in exact.items():
                owner, _, own = name.rpartition(".")
                setattr(self.model.get_submodule(owner), own, buffer)
        rounding = {"32": "float32", "bf16": "bf16 autocast" if self.autocasts else "bfloat16"}[precision]
        self.settings = f"{rounding}, {'SDPA' if fast else 'its own attention'}"

    def rounding(self) -> AbstractContextManager[Any]:
        return torch.autocast(self.device, torch.bfloat16) if self.autocasts else nullcontext()

    def states(self, tokens_BT: Tensor) -> Tensor:
        """Return the last hidden states, [B, T, H]. fair-esm always computes the language-model head, too."""
        if self.library == FAIR:
            last = self.model.num_layers
            found = self.model(tokens_BT, repr_layers=[last])["representations"][last]
        else:
            found = self.model.esm(tokens_BT, attention_mask=tokens_BT.ne(PAD_ID).long()).last_hidden_state
        states_BTH: Tensor = found
        return states_BTH

    def logits(self, tokens_BT: Tensor) -> Tensor:
        """Return the logits, [B, T, V]."""
        if self.library == FAIR:
            found = self.model(tokens_BT)["logits"]
        else:
            found = self.model(tokens_BT, attention_mask=tokens_BT.ne(PAD_ID).long()).logits
        logits_BTV: Tensor = found
        return logits_BTV

    @torch.inference_mode()
    def embed(self, proteins: Sequence[Protein], size: int) -> NDArray[np.float32]:
        """Return the mean hidden states of proteins, in batches of `size` in the given order: float32 [proteins, H]."""
        means = []
        with self.rounding():
            for begin in range(0, len(proteins), size):
                tokens_BT = padded([protein.tokens for protein in proteins[begin : begin + size]]).to(self.device)
                residues_BT = tokens_BT.ne(PAD_ID) & tokens_BT.ne(CLS_ID) & tokens_BT.ne(EOS_ID)
                sums_BH = (self.states(tokens_BT) * residues_BT[:, :, None]).sum(1, dtype=torch.float32)
                means.append(sums_BH / residues_BT.sum(1, keepdim=True))
        found: NDArray[np.float32] = torch.cat(means).cpu().numpy()
        return found

    @torch.inference_mode()
    def marginals(self, tokens: NDArray[np.uint8], places: int, size: int) -> NDArray[np.float64]:
        """Return the log-probabilities at the first positions of a protein, each masked alone: float64 [places, V]."""
        row_1T = padded([tokens]).to(self.device)
        found = []
        with self.rounding():
            for begin in range(0, places, size):
                asked = torch.arange(begin + 1, min(begin + size, places) + 1, device=self.device)
                batch_BT = row_1T.repeat(len(asked), 1)
                each = torch.arange(len(asked), device=self.device)
                batch_BT[each, asked] = MASK_ID
                found.append(self.logits(batch_BT)[each, asked].double().log_softmax(-1))
        answers: NDArray[np.float64] = torch.cat(found).cpu().numpy()
        return answers


def hugging_face_peer(form: Form, shape: Shape) -> nn.Module:
    """Return Hugging Face's model of a form, with its fastest attention and fixed random weights."""
    model: nn.Module = hugging_face_model(form.family, shape, form.tokens, attn_implementation="sdpa")
    return model


def fair_esm_peer(form: Form, shape: Shape, archive: Path) -> nn.Module:
    """Return fair-esm's model of a form, with the weights of one of our archives."""
    model: nn.Module = fair_esm_model(form.family, shape, form.tokens)
    whole = read_archive(archive)
    config, dtypes = EncoderConfig.from_config(whole.config["encoder"]), dict.fromkeys(whole.weights, torch.float32)
    missing, unknown = model.load_state_dict(
        dict(from_native(config, dtypes, whole.weights.__getitem__, FAIR_ESM)), False
    )
    assert not unknown
    assert all(name == "lm_head.weight" for name in missing), missing  # tied to the embeddings
    return model


def padded(some: Sequence[NDArray[np.uint8]]) -> Tensor:
    """Return tokens padded to the longest protein, with <cls> and <eos>: int64 [proteins, longest]."""
    rows = [torch.from_numpy(np.concatenate([[CLS_ID], tokens, [EOS_ID]]).astype(np.int64)) for tokens in some]
    return nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_value=PAD_ID)


def our_embeddings(engine: Engine, proteins: Sequence[Protein]) -> NDArray[np.float32]:
    """Return mean hidden states as `Peer.embed` does."""
    found = embed_proteins(engine, proteins, EmbeddingOptions())
    (name,) = found[0].arrays
    return np.stack([embedding.arrays[name] for embedding in found])


def our_marginals(engine: Engine, tokens: NDArray[np.uint8], places: int) -> NDArray[np.float64]:
    """Return log-probabilities as `Peer.marginals` does."""
    return np.concatenate(list(engine.log_probabilities(each_masked(tokens, range(places)))))


def farthest(theirs: NDArray[Any], ours: NDArray[Any]) -> float:
    """Return the largest difference of a row from ours, as its norm relative to the norm of our row."""
    if theirs.shape != ours.shape:
        raise ValueError(f"shapes {theirs.shape} and {ours.shape} are of different work")
    return float((np.linalg.norm(theirs - ours, axis=1) / np.linalg.norm(ours, axis=1)).max())


# --- rows -------------------------------------------------------------------------------------------------------------


def rows(setting: Setting) -> Iterator[Row]:
    """Yield the rows: embeddings of ESM-2 8M and of ESM-1nv in float32 and bf16; masked marginals of ESM-2 8M."""
    for form in (ESM2, ESM1NV):
        for precision, source in itertools.product(("32", "bf16"), sources(setting.fasta)):
            yield _embeddings(setting, form, precision, source)
            gc.collect()
    yield _marginals(setting, ESM2, "bf16" if setting.device == "cuda" else "32")


def _built(setting: Setting, form: Form, precision: str) -> tuple[Engine, list[Peer]]:
    """Return our engine and the peers with the same weights."""
    shape = TINY if setting.quick else form.shape
    archive = setting.folder / f"{form.key}.nemo"
    if not archive.exists():
        import_model(str(saved(hugging_face_peer(form, shape), setting.folder / form.key)), archive)
    peers = [Peer(library, form, shape, archive, precision, setting.device) for library in form.peers]
    return Engine.load(archive, setting.device, precision), peers


def _embeddings(setting: Setting, form: Form, precision: str, source: Source) -> Row:
    scale = SCALES[_size(setting)][form]

    def drawn(turn: int) -> list[Protein]:
        return source.draw(turn, scale.proteins, form.tokens - SPECIAL_TOKENS_PER_SEQUENCE)

    def first(proteins: Sequence[Protein]) -> Sequence[Protein]:
        return proteins[: scale.arrival]

    tuned = drawn(TUNING)
    drawn(TURNS)  # refuses a file that is too small before any work
    engine, peers = _built(setting, form, precision)
    sides = [
        Side(
            "ours, packed",
            lambda proteins: our_embeddings(engine, proteins),
            settings=_told(engine, precision),
            libraries=("torch",),
            draw=lambda turn: _inputs(drawn(turn)),
        )
    ]
    few = _by_length(tuned)[:: max(len(tuned) // scale.tuning, 1)]
    sizes = [size for size in scale.sizes if size <= len(few)]
    for peer in peers:
        best = best_of(sizes, _call(peer.embed, few))
        for name, order, size, how in (
            ("arrival order", first, min(TYPICAL, scale.arrival), f", the first {scale.arrival}"),
            ("sorted by length", _by_length, best, _best(sizes)),
        ):
            off = farthest(peer.embed(order(tuned), size), our_embeddings(engine, order(tuned)))
            sides.append(
                Side(
                    f"{peer.library}, {name}",
                    lambda proteins, peer=peer, size=size: peer.embed(proteins, size),  # type: ignore[misc]
                    settings=f"{peer.settings}, {size} at a time{how}",
                    error=off,
                    libraries=LIBRARIES[peer.library],
                    draw=lambda turn, order=order: _inputs(order(drawn(turn))),  # type: ignore[misc]
                )
            )
    targets = [Target("Hugging Face, sorted by length", ratio=1.5)]
    if setting.device == "cuda" and precision == "bf16":
        targets.append(Target(least_per_second=5e6))
    return Row(
        key=f"embed-{form.key}-{NAMES[precision]}{source.key}",
        title=f"Embeddings, {form.title}, {source.name}",
        unit="residue",
        precision=NAMES[precision],
        sides=sides,
        parity="mean embeddings, against ours: the largest difference of a protein's, relative, in the norm",
        tolerance=TOLERANCE[precision],
        targets=targets,
        turns=TURNS,
        note=f"Fresh proteins in each turn: {len(tuned)}, of up to {form.tokens - SPECIAL_TOKENS_PER_SEQUENCE} "
        f"residues, {_residues(tuned) / len(tuned):.0f} on average where sizes are tuned and results compared; in "
        f"arrival order the first {scale.arrival}.",
    )


def _by_length(proteins: Sequence[Protein]) -> list[Protein]:
    return sorted(proteins, key=lambda protein: protein.residues, reverse=True)


def _inputs(proteins: Sequence[Protein]) -> Inputs:
    return Inputs(proteins, _residues(proteins))


def _marginals(setting: Setting, form: Form, precision: str) -> Row:
    size_of, scan = _size(setting), SCANS[_size(setting)]
    source, places = sources(setting.fasta)[0], scan.places

    def draw(turn: int) -> Inputs:
        return Inputs(source.at_least(turn, scan.residues).tokens[: scan.residues], places)

    tokens = draw(TUNING).value
    draw(TURNS)  # refuses a file that is too small before any work
    engine, peers = _built(setting, form, precision)
    settings = f"{_told(engine, precision)}, the last block at the places alone"
    sides = [
        Side(
            "ours, packed",
            lambda tokens: our_marginals(engine, tokens, places),
            settings=settings,
            libraries=("torch",),
            draw=draw,
        )
    ]
    expected = our_marginals(engine, tokens, places)
    sizes = [size for size in SCALES[size_of][form].sizes if size <= scan.tuning]
    for peer in peers:
        best = best_of(sizes, _call(peer.marginals, tokens, scan.tuning))
        for name, size, how in (("single masks in a loop", 1, ""), ("several masks at a time", best, _best(sizes))):
            off = farthest(peer.marginals(tokens, places, size), expected)
            sides.append(
                Side(
                    f"{peer.library}, {name}",
                    lambda tokens, peer=peer, size=size: peer.marginals(tokens, places, size),  # type: ignore[misc]
                    settings=f"{peer.settings}, {size} at a time{how}",
                    error=off,
                    libraries=LIBRARIES[peer.library],
                    draw=draw,
                )
            )
    return Row(
        key=f"marginals-{form.key}",
        title=f"Masked marginals, {form.title}",
        unit="masked place",
        precision=NAMES[precision],
        sides=sides,
        parity="log-probabilities, against ours: the largest difference of a place's, relative, in the norm",
        tolerance=TOLERANCE[precision],
        targets=[Target("Hugging Face, single masks in a loop", ratio=3)],
        turns=TURNS,
        note=f"{places} places of a protein of {len(tokens)} residues, another in each turn.",
    )


def _size(setting: Setting) -> str:
    return "quick" if setting.quick else setting.device


def _residues(proteins: Sequence[Protein]) -> int:
    return sum(protein.residues for protein in proteins)


def _told(engine: Engine, precision: str) -> str:
    return f"{NAMES[precision]}, batches of up to {engine.batch_tokens:,} tokens"


def _best(sizes: Sequence[int]) -> str:
    return f", its best of {', '.join(map(str, sizes))}"


def _call(function: Callable[..., Any], *arguments: Any) -> Callable[..., Any]:
    """Bind the first arguments of a function."""
    return lambda *rest: function(*arguments, *rest)
