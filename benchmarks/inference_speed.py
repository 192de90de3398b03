"""Embeddings and masked marginals beside Hugging Face and fair-esm: the same weights, proteins, precision and machine.

    python benchmarks/inference_speed.py                  # ESM-2 8M, ESM-2 35M, ESM-1nv's form; half an hour on 2 cores
    python benchmarks/inference_speed.py "ESM-2 8M" 100   # one of them, on so many proteins

Models are built by the peers' own libraries with random weights, saved by them and converted by `import_model`; all
compute in float32 (bfloat16 where there is a GPU). Embeddings: the mean of the last layer's states over the residues of
each protein of a sample, up to 1,022 residues, in the order of the sample and sorted by length, in batches of several
sizes. Masked marginals: the log-probabilities at every place of a protein of 300 residues, each masked alone. All sides
take turns, three times; printed are medians of unpadded residues a second, and of the ratios. Needs the `test` extra;
nothing else should run meanwhile.
"""

from __future__ import annotations

import platform
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from importlib.metadata import version
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))

from bionemo_esm.alphabet import CLS_ID, EOS_ID, MASK_ID, PAD_ID
from bionemo_esm.inference.embedding.choice import EmbeddingChoice
from bionemo_esm.inference.embedding.embeddings import embed_together
from bionemo_esm.inference.engine import Engine, each_masked
from bionemo_esm.inference.inputs import Protein, read_proteins
from bionemo_esm.model.interchange.convert import import_model
from peers import Peer, Shape, fair_esm, hugging_face

SAMPLE = Path(__file__).parents[1] / "bionemo_esm" / "data" / "sample" / "train.fasta.gz"
SHAPES = {
    "ESM-2 8M": ("ESM-2", Shape(6, 320, 20, 0.02)),
    "ESM-2 35M": ("ESM-2", Shape(12, 480, 20, 0.02)),
    "ESM-1nv": ("ESM-1nv", Shape(6, 768, 12, 0.02)),
}
ROUNDS = 3
LONGEST = 1022
BATCHES = (1, 2, 4, 8, 16, 32)  # proteins, of a peer's padded batch
TYPICAL = 8  # of them, in arrival order, beside its best
SCANNED = 300  # residues of the protein whose places are masked
GPU = torch.cuda.is_available()
DEVICE, DTYPE = ("cuda", torch.bfloat16) if GPU else ("cpu", torch.float32)
Contender = Callable[[], float]
"""Does its work; returns a number that depends on all of it, so that it cannot be left out."""


def proteins(count: int) -> list[Protein]:
    """The sample's first so many that fit the models whole."""
    chosen = (protein for protein in read_proteins(SAMPLE) if protein.residues <= LONGEST)
    return [protein for protein, _ in zip(chosen, range(count), strict=False)]


def padded(some: Sequence[np.ndarray]) -> Tensor:
    """int64 [proteins, longest], <cls> and <eos> around each."""
    rows = [torch.from_numpy(np.concatenate([[CLS_ID], tokens, [EOS_ID]]).astype(np.int64)) for tokens in some]
    return torch.nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_value=PAD_ID).to(DEVICE)


def states_of(peer: Peer) -> Callable[[Tensor], Tensor]:
    """The last layer's states as the peer gives them at its best: [proteins, longest, hidden]."""
    model = peer.model
    if peer.name.startswith("fair-esm"):
        last = model.num_layers
        return lambda tokens: model(tokens, repr_layers=[last])["representations"][last]
    body = model.esm  # without the language-model head, which fair-esm cannot leave out
    return lambda tokens: body(tokens, attention_mask=tokens.ne(PAD_ID).long()).last_hidden_state


def logits_of(peer: Peer) -> Callable[[Tensor], Tensor]:
    if peer.name.startswith("fair-esm"):
        return lambda tokens: peer.model(tokens)["logits"]
    return lambda tokens: peer.model(tokens, attention_mask=tokens.ne(PAD_ID).long()).logits


@torch.inference_mode()
def peer_embeddings(peer: Peer, some: Sequence[Protein], size: int, ordered: bool) -> float:
    ask, total = states_of(peer), 0.0
    tokens = [protein.tokens for protein in some]
    if ordered:
        tokens.sort(key=len, reverse=True)
    for begin in range(0, len(tokens), size):
        batch = tokens[begin : begin + size]
        states = ask(padded(batch))
        means = torch.stack([row[1 : len(own) + 1].mean(0) for row, own in zip(states, batch, strict=True)])
        total += float(means.float().cpu().numpy().sum())
    return total


def our_embeddings(engine: Engine, some: Sequence[Protein]) -> float:
    (name,) = embed_together(engine, some[:1], EmbeddingChoice())[0].arrays
    return float(sum(answer.arrays[name].sum() for answer in embed_together(engine, some, EmbeddingChoice())))


@torch.inference_mode()
def peer_marginals(peer: Peer, tokens: np.ndarray, size: int) -> float:
    ask, total = logits_of(peer), 0.0
    row = padded([tokens])
    for begin in range(0, len(tokens), size):
        places = torch.arange(begin + 1, min(begin + size, len(tokens)) + 1, device=DEVICE)
        batch = row.repeat(len(places), 1)
        batch[torch.arange(len(places)), places] = MASK_ID
        answers = ask(batch)[torch.arange(len(places)), places].float().log_softmax(-1)
        total += float(answers.cpu().numpy().sum())
    return total


def our_marginals(engine: Engine, tokens: np.ndarray) -> float:
    return float(sum(row.sum() for row in engine.log_probabilities(each_masked(tokens, range(len(tokens))))))


def compare(contenders: dict[str, Contender], residues: int, unit: str) -> None:
    """Let all do the same work in turns, and print a table; the first is ours."""
    seconds: dict[str, list[float]] = {name: [] for name in contenders}
    for turn in range(ROUNDS + 1):  # the first warms up
        for name, work in contenders.items():
            started = time.perf_counter()
            work()
            if turn:
                seconds[name].append(time.perf_counter() - started)
    (ours, mine), *_ = seconds.items()
    print(f"\n| | {unit} | ours is so many times as fast (range) |\n|---|---|---|")
    for name, own in seconds.items():
        ratios = sorted(theirs / us for theirs, us in zip(own, mine, strict=True))
        ratio = "" if name == ours else f"{statistics.median(ratios):.2f} ({ratios[0]:.2f}-{ratios[-1]:.2f})"
        print(f"| {name} | {residues / statistics.median(own):,.0f} | {ratio} |", flush=True)


def fastest(work: Callable[[int], float]) -> int:
    """The batch size at which a peer is fastest, tried out beforehand."""
    seconds = {}
    for size in BATCHES:
        work(size)
        started = time.perf_counter()
        work(size)
        seconds[size] = time.perf_counter() - started
    return min(seconds, key=seconds.__getitem__)


def benchmark(name: str, count: int, folder: Path) -> None:
    family, shape = SHAPES[name]
    builders = [hugging_face, fair_esm] if family != "ESM-1nv" else [hugging_face]
    peers = [build(family, shape, folder / build.__name__) for build in builders]
    for peer in peers:
        peer.model.to(DEVICE, DTYPE)
    if not GPU:  # its fastest; `peers` asks for the one that shows attention maps
        peers[0].model.set_attn_implementation("sdpa")
    import_model(str(peers[0].path), folder / "ours.nemo")
    engine = Engine.load(folder / "ours.nemo", DEVICE, "bf16" if GPU else "32")
    some = proteins(count)
    residues, few = sum(protein.residues for protein in some), some[: max(count // 8, 16)]
    print(f"\n## {name}: {len(some)} proteins, {residues:,} residues")

    contenders: dict[str, Contender] = {"ours, packed": lambda: our_embeddings(engine, some)}
    for peer in peers:
        for ordered, order in ((False, "arrival order"), (True, "sorted by length")):
            best = fastest(lambda size, p=peer, o=ordered: peer_embeddings(p, few, size, o))
            for size in {best} if ordered else {best, TYPICAL}:
                title = f"{peer.name}, {order}, {size} at a time" + " (its best)" * (size == best)
                contenders[title] = lambda p=peer, n=size, o=ordered: peer_embeddings(p, some, n, o)
    compare(contenders, residues, "embedded residues/s")

    tokens = next(protein.tokens[:SCANNED] for protein in some if protein.residues >= SCANNED)
    contenders = {"ours": lambda: our_marginals(engine, tokens)}
    for peer in peers:
        best = fastest(lambda size, p=peer: peer_marginals(p, tokens[:64], size))
        for size in {1, best}:
            title = f"{peer.name}, " + ("single masks, in a loop" if size == 1 else f"{size} masks at a time, its best")
            contenders[title] = lambda p=peer, n=size: peer_marginals(p, tokens, n)
    compare(contenders, SCANNED, f"places/s of {SCANNED}")


def main() -> None:
    chosen = [sys.argv[1]] if len(sys.argv) > 1 else list(SHAPES)
    count = int(sys.argv[2]) if len(sys.argv) > 2 else 200
    where = torch.cuda.get_device_name() if GPU else f"{torch.get_num_threads()} threads, {platform.processor()}"
    capability = "" if GPU else f", {torch.backends.cpu.get_cpu_capability()}"
    libraries = ", ".join(f"{name} {version(name)}" for name in ("torch", "transformers", "fair-esm"))
    print(f"{libraries}; {where}{capability}, {DTYPE}")
    for name in chosen:
        with tempfile.TemporaryDirectory() as folder:
            benchmark(name, count, Path(folder))


if __name__ == "__main__":
    main()
