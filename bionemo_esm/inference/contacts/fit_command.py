"""`bionemo-esm fit-contacts`: a contact head from a few structures, saved with the model in a new archive."""

from __future__ import annotations

import hashlib
import shlex
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from omegaconf import DictConfig
from pydantic import field_validator

from bionemo_esm.command_line import INFERENCE_SPELLINGS, ConfiguredCommand
from bionemo_esm.console import RESIDUES, Console, ProgressBar
from bionemo_esm.data.store import sha256_of_file
from bionemo_esm.errors import ConfigError, UserError
from bionemo_esm.files import hold_output
from bionemo_esm.inference.contacts.head_fitting import (
    Division,
    FitOptions,
    Pairs,
    Regression,
    best_possible,
    bytes_to_fit,
    check_memory,
    divide,
    evaluate,
    evaluate_separation,
    fit_head,
    head_of,
    training_pairs,
    untrained,
)
from bionemo_esm.inference.contacts.metrics import TIES, Row, as_dicts, intervals, summary, table, verdict
from bionemo_esm.inference.contacts.structures import StructureOptions, files_of, read_structures, source_paths
from bionemo_esm.inference.engine_options import EngineConfig, describe, run
from bionemo_esm.inference.load import load_engine
from bionemo_esm.settings import plain_values

if TYPE_CHECKING:
    from bionemo_esm.inference.engine import Engine


class FitConfig(EngineConfig, FitOptions, StructureOptions):
    """The keys of `conf/inference/fit_contacts.yaml`."""

    structures: tuple[str, ...]
    output: Path
    baseline: bool = True

    @field_validator("structures", mode="before")
    @classmethod
    def _one_or_several(cls, value: Any) -> tuple[str, ...]:
        return source_paths("structures", value)

    @field_validator("output", mode="before")
    @classmethod
    def _is_archive(cls, value: Any) -> Any:
        if not isinstance(value, str | Path) or Path(value).suffix != ".nemo":
            raise ConfigError(f"output must be the name of a .nemo to write, not {value!r}")
        return value


def load_fit_config(cfg: DictConfig) -> FitConfig:
    """Return the checked configuration. Raises `ConfigError`, naming the key."""
    return FitConfig.from_config(plain_values(cfg))


def fit_contacts(cfg: DictConfig) -> None:
    """Run the command for a composed Hydra configuration. Exits with 2 for a user's error."""
    run(lambda: _fit(load_fit_config(cfg)), "Stopped; nothing was written.")


def _fit(config: FitConfig) -> int:
    with hold_output("output", config.output):
        return _fit_held(config)


def _fit_held(config: FitConfig) -> int:
    config.check()
    console = Console(sys.stdout)
    structures = read_structures(config.structures, config.atom, config.chain)
    chains = f"{len(structures):,} chain{'s' * (len(structures) != 1)}"
    console.print_line(f"Read {chains} from {', '.join(config.structures)}")
    engine = load_engine(config)
    console.print_line(f"  model    {describe(engine)}")
    if engine.config.contact_head:
        console.print_line("  note     it has a contact head already, which the new one replaces")
    division = divide(structures, config, engine.window)
    pairs = training_pairs(division.train, config)
    count, heads = sum(len(part.first) for part in pairs), engine.layers * engine.config.num_attention_heads
    check_memory(count, heads)
    _report_division(console, division, pairs, heads)
    answered = _progress(console, "attention", sum(structure.residues for structure in division.train))
    regression = fit_head(engine, division.train, pairs, config, answered)
    _report_fit(console, regression)
    results = _results(engine, regression, division, pairs, config, console)
    _save(engine, regression, _provenance(config, engine, regression, division, count, results), config.output)
    console.print_line(
        f"Wrote {config.output}, {config.output.stat().st_size:,} bytes: the same weights, and the contact head"
    )
    name = shlex.quote(str(config.output))
    console.print_line(f"Predict contacts:  bionemo-esm contacts model={name} input=proteins.fasta output=contacts")
    return 0


def _report_division(console: Console, division: Division, pairs: Sequence[Pairs], heads: int) -> None:
    count, touching = sum(len(part.first) for part in pairs), sum(int(part.touch.sum()) for part in pairs)
    structures = f"{len(division.train)} structure{'s' * (len(division.train) != 1)}"
    console.print_line(f"  fit on   {structures}, {count:,} pairs of residues, {touching:,} in contact")
    left_out = [
        f"{division.repeated} with the sequence of another" if division.repeated else "",
        f"{division.without_pairs} without pairs to ask about" if division.without_pairs else "",
    ]
    excluded = ", ".join(filter(None, left_out))
    others = f"{len(division.held_out)} other{'s' * (len(division.held_out) != 1)}"
    console.print_line(f"  test on  {others}{f'; left out: {excluded}' if excluded else ''}")
    console.print_line(
        f"  features {heads:,} attention heads; fitting takes up to {bytes_to_fit(count, heads) / 1e9:.2f} GB"
    )


def _report_fit(console: Console, regression: Regression) -> None:
    used = int((regression.weight != 0).sum())
    console.print_line(
        f"  head     {used:,} of {len(regression.weight):,} attention heads ha{'s' if used == 1 else 've'} a weight"
    )
    if not used:
        console.print_line("  note     none has: all pairs get the same probability. A higher C allows more, e.g. C=1")
    if not regression.converged:
        console.print_line(
            f"  note     not converged after {regression.rounds:,} rounds; the weights are near the best ones"
        )


def _progress(console: Console, what: str, total: int) -> Callable[[int], None]:
    meter, done = ProgressBar(console, what, RESIDUES), 0

    def answered(residues: int) -> None:
        nonlocal done
        done += residues
        meter(done, total)

    return answered


def _results(
    engine: Engine, regression: Regression, division: Division, pairs: list[Pairs], config: FitConfig, console: Console
) -> dict[str, list[Row]]:
    """Return the precisions on the held-out structures by predictor, and print them."""
    if not division.held_out:
        console.print_line("  note     all structures were fitted on: how good the head is on others is not known")
        return {}
    others = division.held_out
    total = sum(structure.residues for structure in others)
    found = {
        "model": evaluate(engine, regression, others, config, _progress(console, "held out", total)),
        "separation alone": evaluate_separation(pairs, others, config),
        "best possible": best_possible(others, config),
    }
    if config.baseline:
        blank = untrained(engine, config.seed)
        its_own = fit_head(blank, division.train, pairs, config)
        found["untrained model"] = evaluate(blank, its_own, others, config, _progress(console, "untrained", total))
    order = [name for name in ("model", "untrained model", "separation alone", "best possible") if name in found]
    rows: dict[str, list[Row]] = {name: summary(found[name], config.seed) for name in order}
    console.print_line("Precision on the held-out structures:")
    for line in table(rows):
        console.print_line(f"  {line}")
    console.print_line(f"  {TIES}")
    compared = {name: rows[name] for name in rows if name != "best possible"}
    for line in (*intervals(compared), *verdict(compared)):
        console.print_line(f"  {line}")
    return rows


def _provenance(
    config: FitConfig,
    engine: Engine,
    regression: Regression,
    division: Division,
    pairs: int,
    results: Mapping[str, Sequence[Row]],
) -> dict[str, Any]:
    """Return what the new archive records about its contact head."""
    import sklearn

    files = {Path(file).name: sha256_of_file(Path(file)) for file in files_of(config.structures)}
    digest = hashlib.sha256("".join(f"{name} {files[name]}\n" for name in sorted(files)).encode()).hexdigest()
    return {
        "fitted_on": [structure.id for structure in division.train],
        "pairs": pairs,
        "structure_files": files if len(files) <= 100 else f"{len(files)} files",
        "structure_files_sha256": digest,
        "contact": f"{config.atom} nearer than {config.contact_angstrom:g} angstrom",
        "separation": config.separation,
        "C": config.C,
        "seed": config.seed,
        "solver": f"scikit-learn {sklearn.__version__}, liblinear, L1",
        "heads_used": int((regression.weight != 0).sum()),
        "weights_sha256": engine.weights_sha256,
        "held_out_structures": len(division.held_out),
        "precision": {name: as_dicts(rows) for name, rows in results.items()},
    }


def _save(engine: Engine, regression: Regression, provenance: Mapping[str, Any], output: Path) -> None:
    """Write the engine's archive with this contact head in the place of any other; all other tensors bit for bit."""
    import torch

    from bionemo_esm.model.archive import WEIGHTS, Archive, ArchiveFile, write_archive
    from bionemo_esm.model.tensor_io import LazyTensors

    assert engine.source is not None
    file = ArchiveFile.open(engine.source)
    if file.model_identity != engine.model_identity:
        raise UserError(f"model: {engine.source} was replaced while the head was fitted; run the same command again")
    file.verify(WEIGHTS)
    fitted = {f"encoder.contact_head.{name}": tensor for name, tensor in head_of(regression).state_dict().items()}
    dtypes = {"F32": torch.float32, "BF16": torch.bfloat16}
    infos = file.weights.infos.items()
    outline = {name: torch.empty(info.shape, dtype=dtypes[info.dtype], device="meta") for name, info in infos}
    weights = LazyTensors(outline | fitted, lambda name: fitted[name] if name in fitted else file.load_finite(name))
    config = {**file.config, "encoder": {**file.config["encoder"], "contact_head": True}}
    write_archive(output, Archive(file.model_class, config, weights, {**file.provenance, "contact_head": provenance}))


main = ConfiguredCommand(
    fit_contacts,
    "fit_contacts",
    part="inference",
    text_keys=("model", "output", "chain"),
    list_keys=("structures",),
    other_spellings=INFERENCE_SPELLINGS,
)
"""`bionemo-esm fit-contacts`."""
