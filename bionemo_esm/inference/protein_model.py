"""The model in a notebook: load it, ask it.

    model = ProteinModel.load("runs/laptop/laptop.nemo")
    model.embed({"ubiquitin": "MQIFVKTLTGKTITLEVEPSDTIENVKAKIQDKEGIPPDQQRLIFAGKQLEDGRTLSDYNIQKESTLHLVLRLRGG"})

Nothing here computes; each method calls the module that its name says.
"""

from __future__ import annotations

import os
import warnings
from collections.abc import Callable, Iterable, Sequence
from functools import wraps
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar, cast

from bionemo_esm.inference.engine_options import EngineConfig, describe

if TYPE_CHECKING:  # torch and Megatron take seconds to import
    import numpy as np
    from numpy.typing import NDArray
    from pandas import DataFrame

    from bionemo_esm.inference.embedding.embeddings import Embeddings
    from bionemo_esm.inference.engine import Engine
    from bionemo_esm.inference.inputs import InputPolicy, Sequences


Method = TypeVar("Method", bound=Callable[..., Any])


def isolated(method: Method) -> Method:
    """Decorator: compute without the ambient PyTorch settings of the user's program (see `default_torch_state`)."""

    @wraps(method)
    def run(*args: Any, **options: Any) -> Any:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # Megatron's at import, without Apex or Transformer Engine
            from bionemo_esm.model.backends import default_torch_state
        with default_torch_state():
            return method(*args, **options)

    return cast(Method, run)


class ProteinModel:
    """A pretrained model, and what it is for."""

    def __init__(self, engine: Engine) -> None:
        self.engine = engine

    def __repr__(self) -> str:
        return f"<ProteinModel: {describe(self.engine)}, window of {self.engine.window:,} residues>"

    @classmethod
    @isolated
    def load(
        cls, path: str | os.PathLike[str], device: str = "auto", precision: str = "32", batch_tokens: int | None = None
    ) -> ProteinModel:
        """The model of a `.nemo` or a `.ckpt` of ours.

        `device`: "cpu", "cuda", "cuda:1", or "auto" for a GPU where there is one. `precision`: "32", "bf16", or "auto"
        for what the device multiplies faster. `batch_tokens`: computed at once; memory grows with it, and no answer
        depends on it but for rounding. Raises `ArchiveError`, `ConfigError`.
        """
        return cls(load_engine(EngineConfig(Path(path), device, precision, batch_tokens)))

    @isolated
    def embed(
        self,
        sequences: Sequences,
        layers: int | Iterable[int] = -1,
        mean: bool = True,
        cls: bool = False,
        residues: bool = False,
        logits: bool = False,
        pseudo_perplexity: bool = False,
        dtype: str = "float32",
        long_proteins: str = "windows",
        window: int | None = None,
        overlap: int | None = None,
        policy: InputPolicy | None = None,
    ) -> Embeddings:
        """Embeddings of proteins, in their order: `model.embed("proteins.fasta").mean` is a matrix of features.

        `sequences`: ids with their sequences, sequences, one sequence, or the name of a file, read by the policy; the
        rest is in `EmbeddingOptions`. Of what comes back `.mean`, `.cls`, `.pseudo_perplexity` and `.stacked` are
        arrays with a row a protein, `["its id"].arrays["residues_6"]` is what there is of one. All answers are in
        memory at once. Raises `InputError`, `ConfigError`.
        """
        from bionemo_esm.inference.embedding.embeddings import Embeddings, embed_proteins
        from bionemo_esm.inference.embedding.options import EmbeddingOptions
        from bionemo_esm.inference.inputs import InputPolicy, proteins_of

        numbers = (layers,) if isinstance(layers, int) else tuple(layers)
        options = EmbeddingOptions(
            numbers, mean, cls, residues, logits, pseudo_perplexity, dtype, long_proteins, window, overlap
        ).resolved(self.engine)
        return Embeddings(embed_proteins(self.engine, proteins_of(sequences, policy or InputPolicy()), options))

    @isolated
    def score_variants(
        self,
        sequence: str,
        variants: Iterable[str | float | None],
        method: str = "masked-marginals",
        masks: str = "together",
        offset: int = 1,
        window: int | None = None,
    ) -> NDArray[np.float64]:
        """Effects of variants, float64 [V], 0 for the wild type: `model.score_variants(gfp, ["A108D,N144D"])`.

        `sequence`: the wild type's residues, or a FASTA file of it alone; `offset`: the number that `variants` give to
        its first residue; None and NaN among these are the wild type. `method` is one of `METHODS`, and the rest what
        `ScoringOptions` says. Raises `VariantError` for a variant that does not go with the sequence, `InputError`,
        `ConfigError`.
        """
        from bionemo_esm.inference.variants.mutations import read_wild_type, variants_at_hand
        from bionemo_esm.inference.variants.scoring import ScoringOptions, score

        wild_type, options = read_wild_type(sequence, offset=offset), ScoringOptions((method,), masks, window)
        return score(self.engine, wild_type, variants_at_hand(variants, wild_type), options)[method]

    @isolated
    def scan(
        self,
        sequence: str,
        method: str | Sequence[str] = "masked-marginals",
        region: tuple[int, int] | None = None,
        offset: int = 1,
        window: int | None = None,
    ) -> DataFrame:
        """Every residue replaced by each of the other 19, a row each: `mutant`, `position`, `wildtype`,
        `mutant_residue`, and the scores, such as `masked_marginals`.

        `region`: the first and last position; None for all. `method` may be several; the rest is as for
        `score_variants`.
        """
        from bionemo_esm.inference.variants.mutations import read_wild_type
        from bionemo_esm.inference.variants.scoring import ScoringOptions, scan_frame

        options = ScoringOptions((method,) if isinstance(method, str) else tuple(method), window=window)
        return scan_frame(self.engine, read_wild_type(sequence, offset=offset), options, region)

    @isolated
    def contacts(self, sequence: str, window: int | None = None, overlap: int | None = None) -> NDArray[np.float32]:
        """Probabilities of contact between all residues of a protein: float32 [R, R].

        `window`, `overlap`: residues that are read at once of a longer one, and that neighbouring windows share; None:
        as many as the model was trained on, and half of that. NaN stands where no window has both residues. Raises
        `ConfigError`; `UserError` for what is no sequence, and for a model without a contact head.
        """
        from bionemo_esm.inference.contacts.prediction import WindowSpec, contacts_of, residues_at_hand

        return contacts_of(self.engine, residues_at_hand(sequence), WindowSpec.of(self.engine, window, overlap))


def load_engine(config: EngineConfig) -> Engine:
    """`Engine.load` without the warnings that Megatron gives where neither Apex nor Transformer Engine is installed."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from bionemo_esm.inference.engine import Engine

        return Engine.load(config.model, config.device, config.precision, config.batch_tokens)
