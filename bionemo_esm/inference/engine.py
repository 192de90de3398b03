"""The inference engine: an encoder loaded from an archive onto a device, which reads proteins in packed batches.

NeMo and Lightning are not imported: loading a model takes three seconds instead of ten. Results for a protein do not
depend on its neighbours in a batch, except for rounding: in float32, 1e-5 of a hidden state or a logit.
Shape suffixes: T tokens of the packed row, R residues of a protein, H hidden size, K positions of a query.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from bionemo_esm.data.collate import PackedBatch, pack
from bionemo_esm.errors import ConfigError, UserError
from bionemo_esm.inference.batching import MaskedQuery, Residues, group_by_size, tokens_of_query
from bionemo_esm.inference.engine_options import ModelSizes, engine_config, open_model_file
from bionemo_esm.model.archive import WEIGHTS, ArchiveFile
from bionemo_esm.model.backends import choose_backends, parameter_dtype
from bionemo_esm.model.config import EncoderConfig
from bionemo_esm.model.encoder import ESMEncoder
from bionemo_esm.model.validate import check_sizes, extension_of

BATCH_TOKENS = {"cpu": 4096, "cuda": 65_536}
"""Default tokens of a packed batch: about the cache of a CPU core, and enough to use a GPU fully."""
_PREFIX = "encoder."  # of the encoder's tensors in an archive


class Engine(ModelSizes):
    """An encoder in evaluation mode, without gradients. `Engine.load` builds one from a file."""

    def __init__(self, encoder: ESMEncoder, config: EncoderConfig, batch_tokens: int | None = None) -> None:
        """`batch_tokens`: tokens of a packed batch; None for the device's value in `BATCH_TOKENS`."""
        super().__init__(config)
        self.encoder = encoder.eval()
        self.device = next(encoder.parameters()).device
        self.dtype = next(encoder.parameters()).dtype
        self.batch_tokens = BATCH_TOKENS[self.device.type] if batch_tokens is None else batch_tokens
        if self.batch_tokens < 1:
            raise ConfigError(f"batch_tokens must be at least 1, not {self.batch_tokens}")
        self.source: Path | None = None  # the archive that it was loaded from
        self.weights_sha256 = self.model_identity = ""

    @classmethod
    def load(
        cls, path: str | os.PathLike[str], device: str = "auto", precision: str = "32", batch_tokens: int | None = None
    ) -> Engine:
        """Load the model of a `.nemo` or `.ckpt` of this package; the precision it was saved in does not matter.

        `device`: "cpu", "cuda", "cuda:1", or "auto" (a GPU if there is one). `precision`: "32", "bf16", or "auto" (the
        faster one on the device). Raises `ArchiveError` for a file that is no archive, or damaged; `ConfigError` for a
        device that is not present and for an invalid argument. Both come before the weights are read.
        """
        config = engine_config(path, device, precision, batch_tokens)
        _device(config.device)
        return cls.from_file(open_model_file(config.model), config.device, config.precision, config.batch_tokens)

    @classmethod
    def from_file(cls, file: ArchiveFile, device: str, precision: str, batch_tokens: int | None) -> Engine:
        """Load the encoder of an opened archive, which may be of a fine-tuned model; the rest as `load`."""
        engine_config(file.path, device, precision, batch_tokens)
        place, sizes = _device(device), check_sizes(file)
        dtype = parameter_dtype(precision, place.type)
        quiet = sizes.replace(hidden_dropout=0.0, attention_dropout=0.0)  # so that any attention kernel will do
        encoder = ESMEncoder(quiet, dtype, choose_backends("cpu", dtype, 0.0, quiet.head_size), initialize=False)
        if (extension := extension_of(file)) is None:
            _fill(encoder, file)
        else:
            extension.fill(encoder, file.config, lambda: _fill(encoder, file))
        engine = cls(encoder.to(place), sizes, batch_tokens)
        engine.source, engine.weights_sha256 = file.path, file.weights_sha256
        engine.model_identity = file.model_identity
        return engine

    def __reduce__(self) -> tuple[Any, ...]:
        """Pickle and copy as a reference to the file. Loading raises `UserError` if the file holds another model."""
        if self.source is None:
            raise TypeError("only a model that was loaded from a file can be pickled or copied")
        precision = "bf16" if self.dtype == torch.bfloat16 else "32"
        return _reload, (self.source.absolute(), str(self.device), precision, self.batch_tokens, self.model_identity)

    def packed(self, proteins: Sequence[Residues]) -> PackedBatch:
        """Return proteins as one packed row on the device. None may be over `longest`."""
        lengths = np.array([len(protein) for protein in proteins], dtype=np.int64)
        assert self.longest is None or lengths.max(initial=0) <= self.longest, "cut long proteins into windows first"
        batch = pack(np.concatenate(proteins), lengths)
        return batch.to(self.device, non_blocking=True)

    @torch.inference_mode()
    def log_probabilities(
        self, queries: Iterable[MaskedQuery], answered: Callable[[int], None] = lambda residues: None
    ) -> Iterator[NDArray[np.float64]]:
        """Yield log-probabilities of the 33 tokens at the positions of each query: float64 [K, 33], in order.

        Queries are read as needed, a batch at a time. The last block is computed at the queried positions only.
        `answered` is called with the residues of each batch.
        """
        for group in group_by_size(self.batch_tokens, queries, tokens_of_query):
            batch = self.packed([query.tokens for query in group])
            first = batch.cu_seqlens[:-1].long().cpu().numpy() + 1  # after each <cls>
            positions = np.concatenate([query.positions + start for query, start in zip(group, first, strict=True)])
            rows = (batch.tokens, batch.positions, batch.cu_seqlens, batch.max_seqlen)
            hidden = self.encoder.hidden_states_at(*rows, torch.from_numpy(positions).to(self.device))
            answers = self.encoder.logits(hidden).double().log_softmax(dim=-1).cpu().numpy()
            answered(batch.residues)
            yield from np.split(answers, np.cumsum([len(query.positions) for query in group[:-1]]))


def _reload(path: Path, device: str, precision: str, batch_tokens: int, model_identity: str) -> Engine:
    """Load a pickled engine in a new process. Raises `UserError` if the file has changed since."""
    engine = Engine.load(path, device, precision, batch_tokens)
    if engine.model_identity != model_identity:
        raise UserError(f"{path} has other weights than the model that was pickled", code="engine.file-changed")
    return engine


def _device(name: str) -> torch.device:
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    device = torch.device(name)
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise ConfigError(f"device={name}: there are {torch.cuda.device_count()} CUDA devices here; device=cpu works")
    return device


@torch.no_grad()
def _fill(encoder: ESMEncoder, file: ArchiveFile) -> None:
    """Copy the verified weights into an encoder, one tensor at a time. Raises `ArchiveError` if any is not finite."""
    file.verify(WEIGHTS)
    own: dict[str, Tensor] = dict(encoder.named_parameters()) | dict(encoder.named_buffers())
    for name, tensor in own.items():
        tensor.copy_(file.load_finite(_PREFIX + name))
