"""Predictions of a fine-tuned model: proteins in, probabilities or numbers out.

    model = FineTunedPredictor.load("finetuned.nemo")
    model.predict_table({"ubiquitin": "MQIFVKTLTGKTITLEVEPSDTIENVKAKIQDKEGIPPDQQRLIFAGKQLEDGRTLSDYNIQKESTLHLVLRLRGG"})

The encoder reads each protein as in training (`ReadingConfig`), and the head reads its states; neither NeMo nor
Lightning is imported. Shape suffixes: R residues of packed proteins, S proteins, H hidden size, C outputs.

Tables of predictions: their columns, and CSV, TSV, Parquet or FASTA, written protein by protein.
"""

from __future__ import annotations

import csv
import gzip
import io
import os
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from bionemo_esm.alphabet import decode
from bionemo_esm.errors import ConfigError, UserError
from bionemo_esm.finetuning.archive import FineTunedFile
from bionemo_esm.finetuning.config import ReadingConfig
from bionemo_esm.finetuning.tasks import Prediction, Task
from bionemo_esm.inference.embedding.options import EmbeddingOptions, record_label
from bionemo_esm.inference.inputs import InputPolicy, Protein, Sequences, proteins_of
from bionemo_esm.inference.protein_model import isolated

_SEPARATORS = {".csv": ",", ".tsv": "\t"}
_PARQUET = (".parquet", ".pq")
_FASTA = (".fasta", ".fa")
_GZIP = ".gz"
_ENDINGS = (*_SEPARATORS, *_PARQUET, *_FASTA)
_ROWS_AT_ONCE = 1 << 16  # of a group in Parquet, whatever their number in a batch
_COMPRESSION = 6

Columns = dict[str, list[Any]]
Add = Callable[[Protein, Prediction], None]


@dataclass(frozen=True)
class Layout:
    """The columns of a table of predictions.

    A row for each protein: `id`, `prediction` (a class, or a number in the target's unit), for a class its
    `probability`, and `p_CLASS` for each class. A row for each residue: `id`, `position` (from 1), `residue` (its
    letter), then the same. A task per residue whose classes have one letter each may also have a row for each protein:
    `prediction` is a letter for each residue, `probability` their mean probability.
    """

    task: Task
    by_residue: bool  # a row for each residue
    probabilities: bool  # p_CLASS for each class

    @classmethod
    def of(cls, task: Task, residues: bool | None, probabilities: bool) -> Layout:
        """Return the layout of a task's table.

        residues: a row for each residue; None: only if the classes of a task per residue are not single letters.
        Raises `ConfigError` for rows that the task does not have.
        """
        if residues and not task.is_per_residue:
            raise ConfigError(f"residues=true: {task.name} predicts one thing for each protein; leave it out")
        if residues is False and task.is_per_residue and not has_letters(task):
            raise ConfigError(f"residues=false: what {task.name} predicts cannot be one letter for each residue")
        by_residue = task.is_per_residue and not has_letters(task) if residues is None else residues
        return cls(task, by_residue, probabilities and task.is_classification and by_residue == task.is_per_residue)

    @property
    def columns(self) -> list[str]:
        """Names, in order."""
        places = ["position", "residue"] if self.by_residue else []
        chance = ["probability"] if self.task.is_classification else []
        each = [f"p_{name}" for name in self.task.classes] if self.probabilities else []
        return ["id", *places, "prediction", *chance, *each]

    @property
    def numbers(self) -> list[str]:
        """Names of the float32 columns."""
        return [name for name in self.columns if name not in ("id", "position", "residue", *self._words)]

    @property
    def _words(self) -> list[str]:
        return ["prediction"] if self.task.is_classification else []

    def rows(self, protein: Protein, prediction: Prediction) -> Columns:
        """Return the rows of one protein, column by column."""
        found: Columns = {"id": [protein.id] * (protein.residues if self.by_residue else 1)}
        if self.by_residue:
            found |= {"position": list(range(1, protein.residues + 1)), "residue": list(decode(protein.tokens))}
        if not self.task.is_classification:
            return found | {"prediction": prediction[:, 0].tolist()}
        chosen, highest = prediction.argmax(axis=1).tolist(), prediction.max(axis=1)
        names = [self.task.classes[number] for number in chosen]
        if self.task.is_per_residue and not self.by_residue:
            return found | {"prediction": ["".join(names)], "probability": [float(highest.mean(dtype=np.float64))]}
        found |= {"prediction": names, "probability": highest.tolist()}
        if self.probabilities:
            found |= {f"p_{name}": prediction[:, number].tolist() for number, name in enumerate(self.task.classes)}
        return found


def has_letters(task: Task) -> bool:
    """Whether a prediction can be written as one letter for each residue."""
    return task.is_per_residue and task.is_classification and all(_is_letter(name) for name in task.classes)


def check_ending(key: str, output: Path, task: Task, residues: bool | None) -> None:
    """Raise `ConfigError`, naming the key, if no table of this task can have the name."""
    ending = _ending(output)
    if ending not in _ENDINGS or (ending in _PARQUET and output.suffix.lower() == _GZIP):
        raise ConfigError(f"{key}: {output} must end in .csv, .tsv, .fasta (each with .gz, too) or .parquet")
    if ending in _FASTA and not has_letters(task):
        raise ConfigError(
            f"{key}: {output}: FASTA takes a letter for each residue, which {task.name} does not predict; "
            "choose .csv, .tsv or .parquet"
        )
    if ending in _FASTA and residues:
        raise ConfigError(
            f"{key}: {output}: FASTA has no row for each residue; leave residues=true out, or choose .csv"
        )


@contextmanager
def table_writer(stream: IO[bytes], output: Path, layout: Layout) -> Iterator[Add]:
    """Yield a function that writes a protein's rows to the stream, in the format that the name of `output` says.

    CSV and TSV have six decimals of a probability, six digits of a number; Parquet has float32. FASTA has the predicted
    letters. At most one block of rows is held in memory.
    """
    ending = _ending(output)
    if ending in _PARQUET:
        with _parquet(stream, layout) as add:
            yield add
        return
    is_packed = output.suffix.lower() == _GZIP
    packed = gzip.GzipFile("", "wb", _COMPRESSION, stream, mtime=0) if is_packed else None
    text = io.TextIOWrapper(packed or stream, encoding="utf-8", newline="")
    yield _fasta(text, layout) if ending in _FASTA else _separated(text, layout, _SEPARATORS[ending])
    text.flush()
    text.detach()
    if packed is not None:
        packed.close()


def frame(layout: Layout, found: Iterable[tuple[Protein, Prediction]]) -> DataFrame:
    """Return all predictions as a table in memory."""
    import pandas

    every: Columns = {name: [] for name in layout.columns}
    for protein, prediction in found:
        for name, values in layout.rows(protein, prediction).items():
            every[name] += values
    numbers = layout.numbers
    return pandas.DataFrame(
        {name: np.array(values, dtype=np.float32) if name in numbers else values for name, values in every.items()}
    )


def _separated(text: io.TextIOWrapper, layout: Layout, separator: str) -> Add:
    rows = csv.writer(text, delimiter=separator, lineterminator="\n")
    rows.writerow(layout.columns)
    numbers = set(layout.numbers)
    as_text = _six_decimals if layout.task.is_classification else _six_digits

    def add(protein: Protein, prediction: Prediction) -> None:
        columns = layout.rows(protein, prediction)
        fields = [map(as_text, columns[name]) if name in numbers else columns[name] for name in layout.columns]
        rows.writerows(zip(*fields, strict=True))

    return add


def _fasta(text: io.TextIOWrapper, layout: Layout) -> Add:
    def add(protein: Protein, prediction: Prediction) -> None:
        letters = layout.rows(protein, prediction)["prediction"]
        text.write(f">{protein.id}\n{''.join(letters)}\n")

    return add


@contextmanager
def _parquet(stream: IO[bytes], layout: Layout) -> Iterator[Add]:
    import pyarrow as arrow
    from pyarrow import parquet

    numbers = set(layout.numbers)
    kinds = {name: arrow.float32() if name in numbers else arrow.string() for name in layout.columns}
    schema = arrow.schema([(name, arrow.int64() if name == "position" else kind) for name, kind in kinds.items()])
    waiting: Columns = {name: [] for name in layout.columns}
    with parquet.ParquetWriter(stream, schema) as writer:

        def write(rows: int) -> None:
            table = arrow.table({name: values[:rows] for name, values in waiting.items()}, schema=schema)
            writer.write_table(table, row_group_size=_ROWS_AT_ONCE)
            for values in waiting.values():
                del values[:rows]

        def add(protein: Protein, prediction: Prediction) -> None:
            for name, values in layout.rows(protein, prediction).items():
                waiting[name] += values
            while len(waiting["id"]) >= _ROWS_AT_ONCE:
                write(_ROWS_AT_ONCE)

        yield add
        write(len(waiting["id"]))


def _ending(output: Path) -> str:
    return Path(output.name.lower().removesuffix(_GZIP)).suffix


def _is_letter(name: str) -> bool:
    return len(name) == 1 and name.isprintable() and not name.isspace() and name != ">"


def _six_decimals(value: float) -> str:
    return f"{value:.6f}"


def _six_digits(value: float) -> str:
    return f"{value + 0.0:.6g}"  # + 0.0: never -0


if TYPE_CHECKING:  # torch takes seconds to import
    from pandas import DataFrame
    from torch import Tensor, nn

    from bionemo_esm.inference.engine import Engine

_GROUP_BYTES = 1 << 27  # of states in memory at once, or those of one protein


class FineTunedPredictor:
    """An encoder, the head that was trained on it, and their task."""

    def __init__(self, engine: Engine, head: nn.Module, task: Task, reading: ReadingConfig) -> None:
        """Move `head`, float32, to the engine's device."""
        self.engine, self.task, self.reading = engine, task, reading
        self.head = head.to(engine.device).eval()

    def __repr__(self) -> str:
        from bionemo_esm.inference.engine_options import describe

        return f"<FineTunedPredictor: {describe_task(self.task)}; {describe(self.engine)}>"

    @classmethod
    @isolated
    def load(
        cls, path: str | os.PathLike[str], device: str = "auto", precision: str = "32", batch_tokens: int | None = None
    ) -> FineTunedPredictor:
        """Load a `.nemo` that `bionemo-esm finetune` wrote; arguments and errors are those of `Engine.load`.

        precision: of the encoder; a head computes in float32.
        """
        if not isinstance(path, str | os.PathLike) or not os.fspath(path):
            raise ConfigError(f"path must name a .nemo of `bionemo-esm finetune`, not {path!r}", code="config.type")
        opened = FineTunedFile.open(Path(path))
        with warnings.catch_warnings():  # of Megatron, where neither Apex nor Transformer Engine is installed
            warnings.simplefilter("ignore")
            from bionemo_esm.inference.engine import Engine

            engine = Engine.from_file(opened.file, device, precision, batch_tokens)
        return cls(engine, opened.head(), opened.task, opened.parts.reading)

    @isolated
    def predict(self, sequences: Sequences | Sequence[Protein], policy: InputPolicy | None = None) -> list[Prediction]:
        """Return the prediction of each protein, in order, float32: [R, C] per residue, [1, C] per protein.

        C: probabilities of the classes, or one number in the target's unit. `sequences`: as for `predict_table`, or
        checked proteins. Raises `InputError`, and `UserError` for a prediction that is not finite.
        """
        return [prediction for _, prediction in self.stream(_checked(sequences, policy))]

    def stream(
        self, proteins: Iterable[Protein], progress: Callable[[int], None] = lambda residues: None
    ) -> Iterator[tuple[Protein, Prediction]]:
        """Yield each protein with its prediction, in order.

        Proteins are read as they are needed, some at a time. `progress` is called with residues that are done; they add
        up to those of the proteins. A prediction does not depend on the other proteins, but for rounding, 1e-5 in
        float32. Raises `UserError` for a prediction that is not finite.
        """
        from bionemo_esm.inference.batching import group_by_size

        residues = max(1, _GROUP_BYTES // (4 * self.engine.config.hidden_size))
        for some in group_by_size(residues, proteins, lambda protein: protein.residues):
            states = self._states(some, progress)
            found = head_predictions(self.head, self.task, states, self.engine.device, self.engine.batch_tokens)
            for protein, prediction in zip(some, found, strict=True):
                if not np.isfinite(prediction).all():
                    raise UserError(
                        f"{record_label(protein)}: the prediction is no finite number; precision=32 may help"
                    )
                yield protein, prediction

    @isolated
    def predict_table(
        self,
        sequences: Sequences,
        residues: bool | None = None,
        probabilities: bool = True,
        policy: InputPolicy | None = None,
    ) -> DataFrame:
        """Return the predictions as a table, with the columns that `bionemo-esm predict` writes; see `Layout`.

        sequences: ids with their sequences, sequences, one sequence, a table, or a file name, read by the policy; see
        `proteins_of`. residues: for a task per residue, a row for each residue (default: if the classes are not single
        letters). probabilities: the columns `p_CLASS`. Raises `InputError`; `ConfigError` for a table that the task
        does not have.
        """
        layout = Layout.of(self.task, residues, probabilities)
        return frame(layout, self.stream(_checked(sequences, policy)))

    def _states(self, proteins: Sequence[Protein], progress: Callable[[int], None]) -> list[NDArray[np.floating]]:
        """Return the head's input: for each protein, the hidden states of its residues, float32 [R, H]."""
        from bionemo_esm.inference.embedding.embeddings import embed_proteins

        reading = self.reading
        options = EmbeddingOptions(
            layers=(reading.layer,), mean=False, residues=True, window=reading.window, overlap=reading.overlap
        )
        found = embed_proteins(self.engine, proteins, options, progress)
        return [embedding.arrays[f"residues_{reading.layer}"] for embedding in found]


def _checked(sequences: Sequences | Sequence[Protein], policy: InputPolicy | None) -> Sequence[Protein]:
    """Return proteins in any form that Python programs pass. Raises `InputError`."""
    if isinstance(sequences, list | tuple) and sequences and all(isinstance(one, Protein) for one in sequences):
        return sequences
    return proteins_of(sequences, policy or InputPolicy())  # type: ignore[arg-type]


def head_predictions(
    head: nn.Module, task: Task, states: Sequence[NDArray[np.floating]], device: object, batch_tokens: int
) -> list[Prediction]:
    """Return the predictions of a head on that device from the states [R, H] of each protein's residues, in order.

    A batch has up to `batch_tokens` residues, or one protein.
    """
    import torch

    from bionemo_esm.inference.batching import group_by_size

    found: list[Prediction] = []
    with torch.inference_mode():
        for some in group_by_size(batch_tokens, states, len):
            bounds = np.cumsum([0, *map(len, some)])
            packed_RH = torch.from_numpy(np.concatenate(some)).to(device)  # type: ignore[call-overload]
            outputs = head(packed_RH, torch.from_numpy(bounds).to(device))  # type: ignore[call-overload]
            rows = in_own_unit(task, outputs).cpu().numpy()
            edges = bounds if task.is_per_residue else np.arange(len(some) + 1)
            found += [rows[begin:end].copy() for begin, end in pairwise(edges.tolist())]  # not a view of the batch's
    return found


def in_own_unit(task: Task, outputs: Tensor) -> Tensor:
    """Return a head's outputs [..., C] as a `Prediction`, float32: softmax over the classes, or the number."""
    if task.is_classification:
        return outputs.float().softmax(dim=-1)
    return outputs.float() * task.target_scale + task.target_mean


def describe_task(task: Task) -> str:
    """Return a task in a few words."""
    what = f"one of {len(task.classes):,} classes" if task.is_classification else "a number"
    return f"{task.name}, {what} for each {'residue' if task.is_per_residue else 'protein'}"
