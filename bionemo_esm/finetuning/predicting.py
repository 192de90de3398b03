"""A fine-tuned model at work: proteins in, probabilities or numbers out.

    model = FineTunedPredictor.load("finetuned.nemo")
    model.predict_table({"ubiquitin": "MQIFVKTLTGKTITLEVEPSDTIENVKAKIQDKEGIPPDQQRLIFAGKQLEDGRTLSDYNIQKESTLHLVLRLRGG"})

The encoder reads each protein as in training (`ReadingConfig`), and the head what that gives; neither NeMo nor
Lightning is imported. Shape suffixes: R residues of packed proteins, S proteins, H hidden size, C outputs.
"""

from __future__ import annotations

import os
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from bionemo_esm.errors import UserError
from bionemo_esm.finetuning.config import ReadingConfig
from bionemo_esm.finetuning.model_file import FineTunedFile
from bionemo_esm.finetuning.task import Prediction, Task
from bionemo_esm.inference.embedding.choice import EmbeddingChoice, named
from bionemo_esm.inference.inputs import InputPolicy, Protein, Sequences, proteins_of

if TYPE_CHECKING:  # torch takes seconds to import
    from pandas import DataFrame
    from torch import Tensor, nn

    from bionemo_esm.inference.engine import Engine

_GROUP_BYTES = 1 << 27  # of states in memory at once, or those of one protein


class FineTunedPredictor:
    """An encoder, the head that was trained on it, and the task of both."""

    def __init__(self, engine: Engine, head: nn.Module, task: Task, reading: ReadingConfig) -> None:
        """`head` is float32, and on any device; it is moved to the engine's."""
        self.engine, self.task, self.reading = engine, task, reading
        self.head = head.to(engine.device).eval()

    def __repr__(self) -> str:
        from bionemo_esm.inference.running import describe

        return f"<FineTunedPredictor: {asked(self.task)}; {describe(self.engine)}>"

    @classmethod
    def load(
        cls, path: str | os.PathLike[str], device: str = "auto", precision: str = "32", batch_tokens: int | None = None
    ) -> FineTunedPredictor:
        """The model of a `.nemo` that `bionemo-esm finetune` wrote; arguments and errors are those of `Engine.load`.

        `precision` is the encoder's; a head computes in float32.
        """
        opened = FineTunedFile.open(Path(path))
        with warnings.catch_warnings():  # of Megatron, where neither Apex nor Transformer Engine is installed
            warnings.simplefilter("ignore")
            from bionemo_esm.inference.engine import Engine

            engine = Engine.of(opened.file, device, precision, batch_tokens)
        return cls(engine, opened.head(), opened.task, opened.parts.reading)

    def predict(
        self, proteins: Iterable[Protein], answered: Callable[[int], None] = lambda residues: None
    ) -> list[Prediction]:
        """What the model says of each protein, in order; as `stream`, with all answers in memory."""
        return [prediction for _, prediction in self.stream(proteins, answered)]

    def stream(
        self, proteins: Iterable[Protein], answered: Callable[[int], None] = lambda residues: None
    ) -> Iterator[tuple[Protein, Prediction]]:
        """Each protein with what the model says of it, in order.

        Proteins are taken as they are needed, some at a time; `answered` is told of progress, in residues that add up
        to those of the proteins. No answer depends on the other proteins but for rounding, 1e-5 in float32. Raises
        `UserError` for a protein of which the model says NaN or infinity.
        """
        from bionemo_esm.inference.engine import up_to

        residues = max(1, _GROUP_BYTES // (4 * self.engine.config.hidden_size))
        for some in up_to(residues, proteins, lambda protein: protein.residues):
            states = self._states(some, answered)
            found = answers(self.head, self.task, states, self.engine.device, self.engine.batch_tokens)
            for protein, prediction in zip(some, found, strict=True):
                if not np.isfinite(prediction).all():
                    raise UserError(f"{named(protein)}: the model's answer is no finite number; precision=32 may help")
                yield protein, prediction

    def predict_table(
        self,
        sequences: Sequences,
        residues: bool | None = None,
        probabilities: bool = True,
        policy: InputPolicy | None = None,
    ) -> DataFrame:
        """The predictions as a table, with the columns that `bionemo-esm predict` writes; see `Layout`.

        `sequences`: ids with their sequences, sequences, one sequence, or the name of a file, read by the policy.
        `residues`: of a task per residue, a row for each; None where letters cannot name the classes. Raises
        `InputError`; `ConfigError` for a table that the task does not have.
        """
        from bionemo_esm.finetuning.prediction_table import Layout, frame

        layout = Layout.of(self.task, residues, probabilities)
        return frame(layout, self.stream(proteins_of(sequences, policy or InputPolicy())))

    def _states(self, proteins: Sequence[Protein], answered: Callable[[int], None]) -> list[NDArray[np.floating]]:
        """What the head is given: of each protein, the states of its residues, float32 [R, H]."""
        from bionemo_esm.inference.embedding.embeddings import embed_together

        reading = self.reading
        choice = EmbeddingChoice(
            (reading.layer,), mean=False, residues=True, window=reading.window, overlap=reading.overlap
        )
        found = embed_together(self.engine, proteins, choice, answered)
        return [embedding.arrays[f"residues_{reading.layer}"] for embedding in found]


def answers(
    head: nn.Module, task: Task, states: Sequence[NDArray[np.floating]], device: object, batch_tokens: int
) -> list[Prediction]:
    """What a head on that device says of some proteins, by the states [R, H] of their residues, in order.

    As many together as have `batch_tokens` residues, or one. Probabilities, or numbers in the task's own unit.
    """
    import torch

    from bionemo_esm.inference.engine import up_to

    found: list[Prediction] = []
    with torch.inference_mode():
        for some in up_to(batch_tokens, states, len):
            bounds = np.cumsum([0, *map(len, some)])
            packed_RH = torch.from_numpy(np.concatenate(some)).to(device)  # type: ignore[call-overload]
            outputs = head(packed_RH, torch.from_numpy(bounds).to(device))  # type: ignore[call-overload]
            rows = in_own_unit(task, outputs).cpu().numpy()
            edges = bounds if task.is_per_residue else np.arange(len(some) + 1)
            found += [rows[begin:end].copy() for begin, end in pairwise(edges.tolist())]  # not a view of the batch's
    return found


def in_own_unit(task: Task, outputs: Tensor) -> Tensor:
    """A head's outputs [..., C] as `Prediction` has them: softmax over the classes, or the number, float32."""
    if task.is_classification:
        return outputs.float().softmax(dim=-1)
    return outputs.float() * task.target_scale + task.target_mean


def asked(task: Task) -> str:
    """A task in a few words."""
    what = f"one of {len(task.classes):,} classes" if task.is_classification else "a number"
    return f"{task.name}, {what} for each {'residue' if task.is_per_residue else 'protein'}"
