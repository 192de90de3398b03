"""The evaluation of models on proteins, part by part: in this process or several, with finished parts on disk.

A part is a few hundred proteins. Its result is kilobytes, and depends on nothing but the models, the proteins and the
options, so an evaluation that was stopped continues with the parts that are missing.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from contextlib import contextmanager
from dataclasses import dataclass
from functools import reduce
from itertools import islice
from multiprocessing import get_context
from operator import add
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from bionemo_esm.files import atomic_write
from bionemo_esm.inference.batching import Residues, WindowSpec, masked, window_around
from bionemo_esm.inference.engine_options import EngineConfig
from bionemo_esm.inference.evaluation.baselines import BASELINES, NeighbourCounts
from bionemo_esm.inference.evaluation.masked import log_probabilities, masked_protein
from bionemo_esm.inference.evaluation.tally import Tally
from bionemo_esm.inference.load import load_engine
from bionemo_esm.settings import Settings

if TYPE_CHECKING:  # torch takes seconds to import
    from bionemo_esm.inference.engine import Engine

PART_PROTEINS = 256
_PSEUDO = "pseudo"


class EvaluationOptions(Settings):
    """What is measured."""

    masked: float = 0.15  # fraction of the residues that are masked at once
    window: int | None = None  # residues read at once of a longer protein; None: the trained length of each model
    pseudo_perplexity: bool = False  # also with each residue masked alone
    seed: int = 42  # of the masks, and of the choice of proteins


class Part(NamedTuple):
    """Some proteins of an input: their numbers and token ids."""

    place: int  # of the part in the input, from 0
    numbers: list[int]
    tokens: list[Residues]

    @property
    def residues(self) -> int:
        return sum(map(len, self.tokens))


@dataclass(frozen=True)
class PartResult:
    """The sums of one part, of all predictors."""

    lengths: NDArray[np.int64]  # [P], residues of each protein
    counts: NDArray[np.float64]  # [P], masked residues
    tallies: dict[str, Tally]
    pseudo: dict[str, NDArray[np.float64]]  # [P], loss summed over residues that are masked one by one

    def __add__(self, other: PartResult) -> PartResult:
        return PartResult(
            np.concatenate([self.lengths, other.lengths]),
            np.concatenate([self.counts, other.counts]),
            {name: tally + other.tallies[name] for name, tally in self.tallies.items()},
            {name: np.concatenate([sums, other.pseudo[name]]) for name, sums in self.pseudo.items()},
        )

    def save(self, path: Path) -> None:
        """Write the part whole or not at all."""
        arrays = {f"{name}/{key}": a for name, tally in self.tallies.items() for key, a in tally.to_arrays().items()}
        arrays |= {f"{name}/{_PSEUDO}": sums for name, sums in self.pseudo.items()}
        with atomic_write(path) as stream:
            np.savez(stream, lengths=self.lengths, counts=self.counts, **arrays)  # type: ignore[arg-type]

    @classmethod
    def load(cls, path: Path) -> PartResult:
        with np.load(path) as stored:
            arrays: dict[str, Any] = dict(stored)
        lengths, counts = arrays.pop("lengths"), arrays.pop("counts")
        of: dict[str, dict[str, Any]] = {}
        for key, array in arrays.items():
            name, _, kind = key.rpartition("/")
            of.setdefault(name, {})[kind] = array
        pseudo = {name: kinds.pop(_PSEUDO) for name, kinds in of.items() if _PSEUDO in kinds}
        return cls(lengths, counts, {name: Tally.of_arrays(kinds) for name, kinds in of.items()}, pseudo)


@dataclass(frozen=True)
class Predictors:
    """Models and baselines that answer the same questions."""

    engines: Mapping[str, Engine]
    counts: NeighbourCounts | None
    options: EvaluationOptions

    def evaluate(self, part: Part, answered: Callable[[int], None] = lambda residues: None) -> PartResult:
        """Return the sums of a part. `answered` is called with the residues that the models have read."""
        options, engines = self.options, self.engines
        pairs = zip(part.numbers, part.tokens, strict=True)
        proteins = [masked_protein(number, tokens, options.masked, options.seed) for number, tokens in pairs]
        tallies, pseudo = {}, {}
        for name, engine in engines.items():
            windows = WindowSpec.of(engine, options.window)
            tallies[name] = Tally.of(proteins, log_probabilities(engine, proteins, windows, answered))
            if options.pseudo_perplexity:
                pseudo[name] = _pseudo_losses(engine, part.tokens, windows.window, answered)
        if self.counts is not None:
            for baseline in BASELINES:
                answers = (self.counts.log_probabilities(baseline, protein) for protein in proteins)
                tallies[baseline] = Tally.of(proteins, answers)
        return PartResult(
            np.array([len(protein.tokens) for protein in proteins], dtype=np.int64),
            np.array([len(protein.positions) for protein in proteins], dtype=np.float64),
            tallies,
            pseudo,
        )


def _pseudo_losses(
    engine: Engine, proteins: Sequence[Residues], window: int, answered: Callable[[int], None]
) -> NDArray[np.float64]:
    """Return the loss of each protein [P], summed over its residues, each masked alone."""
    queries = (
        masked(tokens[begin:end], np.array([site - begin], dtype=np.int64))
        for tokens in proteins
        for site in range(len(tokens))
        for begin, end in [window_around(site, site, len(tokens), window)]
    )
    answers = engine.log_probabilities(queries, answered)
    return np.array([-sum(float(next(answers)[0, token]) for token in tokens.tolist()) for tokens in proteins])


def parts_of(proteins: Iterable[tuple[int, Residues]]) -> Iterator[Part]:
    """Yield numbered proteins in parts, read as needed."""
    iterator, place = iter(proteins), 0
    while chunk := list(islice(iterator, PART_PROTEINS)):
        yield Part(place, [number for number, _ in chunk], [np.array(tokens) for _, tokens in chunk])
        place += 1


def one_by_one(predictors: Predictors, parts: Iterable[Part]) -> Iterator[tuple[Part, PartResult]]:
    """Evaluate parts in this process: a `compute` of `evaluate_parts`."""
    return ((part, predictors.evaluate(part)) for part in parts)


def evaluate_parts(
    parts: Iterable[Part],
    compute: Callable[[Iterable[Part]], Iterator[tuple[Part, PartResult]]],
    folder: Path | None = None,
    finished: Callable[[int], None] = lambda residues: None,
) -> PartResult:
    """Return the sum of all parts, in their order; a part in `folder` is loaded, and a new one stored there.

    compute: `Predictors.evaluate` over parts, in any order. `finished`: called with the residues of each part.
    """
    results: dict[int, PartResult] = {}

    def missing() -> Iterator[Part]:
        for part in parts:
            path = None if folder is None else _file_of(folder, part.place)
            if path is not None and path.is_file():
                results[part.place] = PartResult.load(path)
                finished(part.residues)
            else:
                yield part

    for part, result in compute(missing()):
        if folder is not None:
            result.save(_file_of(folder, part.place))
        results[part.place] = result
        finished(part.residues)
    return reduce(add, (results[place] for place in sorted(results)))


def _file_of(folder: Path, place: int) -> Path:
    return folder / f"part-{place:06d}.npz"


# --- several processes ------------------------------------------------------------------------------------------------

_predictors: Predictors | None = None  # of a worker process


@contextmanager
def worker_pool(
    models: Mapping[str, EngineConfig], counts: NeighbourCounts | None, options: EvaluationOptions, devices: int
) -> Iterator[Callable[[Iterable[Part]], Iterator[tuple[Part, PartResult]]]]:
    """Yield a `compute` of `evaluate_parts` that deals parts to so many processes, each with its own GPU or cores."""
    context = get_context("spawn")
    ranks = context.SimpleQueue()
    for rank in range(devices):
        ranks.put(rank)
    arguments = (ranks, devices, models, counts, options)
    with ProcessPoolExecutor(devices, context, initializer=_begin_worker, initargs=arguments) as pool:

        def compute(parts: Iterable[Part]) -> Iterator[tuple[Part, PartResult]]:
            iterator, running = iter(parts), dict[Future[PartResult], Part]()
            while True:
                for part in islice(iterator, 2 * devices - len(running)):
                    running[pool.submit(_evaluate_in_worker, part)] = part
                if not running:
                    return
                for future in wait(running, return_when=FIRST_COMPLETED).done:
                    yield running.pop(future), future.result()

        try:
            yield compute
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            raise


def _begin_worker(
    ranks: Any,
    world: int,
    models: Mapping[str, EngineConfig],
    counts: NeighbourCounts | None,
    options: EvaluationOptions,
) -> None:
    global _predictors
    _predictors = Predictors(load_engines(models, ranks.get(), world), counts, options)


def _evaluate_in_worker(part: Part) -> PartResult:
    assert _predictors is not None
    return _predictors.evaluate(part)


def load_engines(models: Mapping[str, EngineConfig], rank: int = 0, world: int = 1) -> dict[str, Engine]:
    """Load the models in one of `world` processes, which share GPUs or cores."""
    import torch

    if world > 1 and not torch.cuda.is_available():
        torch.set_num_threads(max(1, torch.get_num_threads() // world))
    elif world > 1:
        device = f"cuda:{rank % torch.cuda.device_count()}"
        models = {n: c.replace(device=device) if c.device in ("auto", "cuda") else c for n, c in models.items()}
    return {name: load_engine(config) for name, config in models.items()}
