"""The Python API of a pretrained model.

    model = ProteinModel.load("runs/laptop/laptop.nemo")
    model.embed({"ubiquitin": "MQIFVKTLTGKTITLEVEPSDTIENVKAKIQDKEGIPPDQQRLIFAGKQLEDGRTLSDYNIQKESTLHLVLRLRGG"})

Each method checks its arguments and calls the module of the same subject.
"""

from __future__ import annotations

import os
import warnings
from collections.abc import Callable, Iterable, Sequence
from functools import partial, wraps
from typing import TYPE_CHECKING, Any, TypeVar, cast

from bionemo_esm.inference.engine_options import describe, engine_config
from bionemo_esm.inference.load import load_engine

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
    """A pretrained model: embeddings, effects of variants, contacts."""

    def __init__(self, engine: Engine) -> None:
        self.engine = engine

    def __repr__(self) -> str:
        return f"<ProteinModel: {describe(self.engine)}, window of {self.engine.window:,} residues>"

    @classmethod
    @isolated
    def load(
        cls, path: str | os.PathLike[str], device: str = "auto", precision: str = "32", batch_tokens: int | None = None
    ) -> ProteinModel:
        """Load the model of a `.nemo` or `.ckpt` of this package.

        `device`: "cpu", "cuda", "cuda:1", or "auto" (a GPU if there is one). `precision`: "32", "bf16", or "auto" (the
        faster one on the device). `batch_tokens`: tokens computed at once; memory grows with it, results change by
        rounding only. Raises `ArchiveError`, `ConfigError`.
        """
        return cls(load_engine(engine_config(path, device, precision, batch_tokens)))

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
        """Return embeddings of proteins in their order: `model.embed("proteins.fasta").mean` is a feature matrix.

        `sequences`: a mapping of ids to sequences, (id, sequence) pairs, sequences, Biopython `SeqRecord`s, a pandas
        Series (its index holds the ids), a table with the columns `id` and `sequence`, one sequence, or the name of a
        file. `policy` says how they are read; `EmbeddingOptions` documents the other arguments.

        The result has arrays with a row for each protein (`.mean`, `.cls`, `.pseudo_perplexity`, `.stacked(name)`);
        `result["its id"].arrays["residues_6"]` is an array of one protein. All results are in memory at once. Raises
        `InputError`, `ConfigError`.
        """
        from bionemo_esm.inference.embedding.embeddings import Embeddings, embed_proteins
        from bionemo_esm.inference.embedding.options import EmbeddingOptions
        from bionemo_esm.inference.inputs import InputPolicy, proteins_of

        values: dict[str, Any] = {"layers": layers, "mean": mean, "cls": cls, "residues": residues, "logits": logits}
        values |= {"pseudo_perplexity": pseudo_perplexity, "dtype": dtype, "long_proteins": long_proteins}
        options = EmbeddingOptions(**values, window=window, overlap=overlap).resolved(self.engine)
        return Embeddings(embed_proteins(self.engine, proteins_of(sequences, policy or InputPolicy()), options))

    @isolated
    def evaluate(
        self,
        sequences: Sequences,
        store: str | os.PathLike[str] | None = None,
        masked: float = 0.15,
        window: int | None = None,
        pseudo_perplexity: bool = False,
        seed: int = 42,
        resamples: int = 1000,
        policy: InputPolicy | None = None,
    ) -> dict[str, Any]:
        """Return how well the model predicts masked residues: the figures of `bionemo-esm evaluate`, as plain values.

        `sequences`: as in `embed`. `store`: a store over whose training split the baselines are counted; None: no
        baselines. `masked`: fraction of the residues that are masked at once. `seed`: of the masks. `resamples`: of
        the bootstrap over proteins. Raises `InputError`, `ConfigError`, `StoreError`.
        """
        from bionemo_esm.data.store import ProteinStore
        from bionemo_esm.inference.evaluation.baselines import NeighbourCounts
        from bionemo_esm.inference.evaluation.evaluation import (
            EvaluationOptions,
            Predictors,
            evaluate_parts,
            one_by_one,
            parts_of,
        )
        from bionemo_esm.inference.evaluation.figures import MODEL, figures_of
        from bionemo_esm.inference.inputs import InputPolicy, proteins_of

        options = EvaluationOptions(masked=masked, window=window, pseudo_perplexity=pseudo_perplexity, seed=seed)
        counts = None
        if store is not None:
            opened = ProteinStore.open(store)
            counts = NeighbourCounts.of(opened.split("train"), opened.split("validation"))
        proteins = [protein.tokens for protein in proteins_of(sequences, policy or InputPolicy())]
        predictors = Predictors({MODEL: self.engine}, counts, options)
        result = evaluate_parts(parts_of(enumerate(proteins)), partial(one_by_one, predictors))
        return figures_of(result, resamples)

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
        """Return scores of variants, float64 [V], 0 for the wild type: `model.score_variants(gfp, ["A108D,N144D"])`.

        `sequence`: the residues of the wild type, or a file that holds it alone. `offset`: the position number of its
        first residue in `variants`; None and NaN among these are the wild type. `method`: one of `scoring.METHODS`.
        `ScoringOptions` documents `masks` and `window`. Raises `VariantError` for a variant that does not fit the
        sequence, `InputError`, `ConfigError`.
        """
        from bionemo_esm.inference.variants.mutations import read_wild_type, variants_at_hand
        from bionemo_esm.inference.variants.scoring import ScoringOptions, check_one_method, score

        check_one_method(method)
        options = ScoringOptions.from_config({"method": method, "masks": masks, "window": window})
        wild_type = read_wild_type(sequence, offset=offset)
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
        """Return all single mutants, a row each: `mutant`, `position`, `wildtype`, `mutant_residue`, and a column of
        scores for each method, such as `masked_marginals`.

        `region`: the first and last position (default: all). `method`: one, or several. The rest as in
        `score_variants`.
        """
        from bionemo_esm.inference.variants.mutations import read_wild_type
        from bionemo_esm.inference.variants.scoring import ScoringOptions, scan_frame

        options = ScoringOptions.from_config({"method": method, "window": window})
        return scan_frame(self.engine, read_wild_type(sequence, offset=offset), options, region)

    @isolated
    def contacts(self, sequence: str, window: int | None = None, overlap: int | None = None) -> NDArray[np.float32]:
        """Return the contact probabilities of all pairs of residues of a protein: float32 [R, R].

        `window`: residues read at once of a longer protein (default: the trained length); `overlap`: residues that
        neighbouring windows share (default: half a window). Pairs that no window covers are NaN. Raises `ConfigError`;
        `UserError` for an invalid sequence and for a model without a contact head.
        """
        from bionemo_esm.inference.batching import WindowSpec
        from bionemo_esm.inference.contacts.prediction import contacts_of, residues_at_hand

        return contacts_of(self.engine, residues_at_hand(sequence), WindowSpec.of(self.engine, window, overlap))
