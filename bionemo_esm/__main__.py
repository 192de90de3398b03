"""`bionemo-esm COMMAND [key=value ...]`: the table of commands, and the program that runs them."""

from __future__ import annotations

import os
import sys
from importlib import import_module
from typing import NamedTuple

from bionemo_esm import __version__
from bionemo_esm.console import run_program
from bionemo_esm.errors import UserError

USAGE = f"""bionemo-esm {__version__}: protein language models

  bionemo-esm pretrain recipe=laptop                                 a small ESM-1nv on the shipped sample
  bionemo-esm pretrain recipe=laptop data.fasta=proteins.fasta.gz    the same on a FASTA file
  bionemo-esm pretrain recipe=esm1nv_phase1 plan=true                size, memory and cost of that run
  bionemo-esm preprocess                                             download UniRef50 and build a store
  bionemo-esm preprocess input=proteins.fasta.gz output=data/store split.validation=null split.test=null
                                                                     build one of a FASTA file, 5% held out twice
  bionemo-esm inspect data/store --verify                            describe a store, and check its hashes
  bionemo-esm inspect runs/laptop/laptop.nemo --verify               the same for a model or a checkpoint
  bionemo-esm check-leakage data/store                               search its splits for near-duplicates, by MMseqs2
  bionemo-esm average checkpoints='runs/laptop/averaging/*.nemo' last=5
                                                                     average a run's last checkpoints
  bionemo-esm convert source=facebook/esm2_t6_8M_UR50D target=esm2_8m.nemo
                                                                     import a model of Hugging Face or fair-esm
  bionemo-esm convert source=runs/laptop/laptop.nemo target=laptop_hf
                                                                     export a model to Transformers
  bionemo-esm embed model=x.nemo input=proteins.fasta output=embeddings.h5
                                                                     compute embeddings
  bionemo-esm evaluate model=x.nemo input=data/store                 masked-residue loss on its test split
  bionemo-esm score model=x.nemo sequence=wildtype.fasta input=mutants.csv output=scores.csv
                                                                     score variants; scan=true for every single one
  bionemo-esm fit-contacts model=x.nemo structures=structures.parquet output=x_contacts.nemo
                                                                     fit a contact head on a few structures
  bionemo-esm contacts model=x_contacts.nemo input=proteins.fasta output=contacts
                                                                     predict contacts, with pictures
  bionemo-esm finetune task=secondary_structure model=x.nemo data.download=flip output=structure
                                                                     fine-tune on a task of FLIP, TAPE or your own
  bionemo-esm predict model=finetuned.nemo input=proteins.fasta output=predictions.csv
                                                                     predict with a fine-tuned model
  bionemo-esm doctor                                                 check that this machine can train
  bionemo-esm convert-legacy old.nemo new.nemo                       convert an ESM-1nv of NeMo 1, which holds a pickle

inspect, doctor, check-leakage and convert-legacy take options; all others take key=value. --help lists them.
"""


class Command(NamedTuple):
    """The module and the function of a command. The module is imported when the command runs."""

    module: str
    function: str = "main"
    configured: bool = True  # by Hydra, from the command line; else the function takes the arguments


COMMANDS = {
    "pretrain": Command("bionemo_esm.pretraining.run"),
    "preprocess": Command("bionemo_esm.data.store_commands"),
    "inspect": Command("bionemo_esm.inspect_command", configured=False),
    "check-leakage": Command("bionemo_esm.data.store_commands", "leakage", configured=False),
    "average": Command("bionemo_esm.pretraining.checkpoint_commands", "average_main"),
    "convert": Command("bionemo_esm.model.interchange.convert_command"),
    "convert-legacy": Command("bionemo_esm.pretraining.checkpoint_commands", "convert", configured=False),
    "embed": Command("bionemo_esm.inference.embedding.embed_command"),
    "evaluate": Command("bionemo_esm.inference.evaluation.evaluate_command"),
    "score": Command("bionemo_esm.inference.variants.score_command"),
    "contacts": Command("bionemo_esm.inference.contacts.contacts_command"),
    "fit-contacts": Command("bionemo_esm.inference.contacts.fit_command"),
    "finetune": Command("bionemo_esm.finetuning.finetune_command"),
    "predict": Command("bionemo_esm.finetuning.predict_command"),
    "doctor": Command("bionemo_esm.pretraining.doctor", configured=False),
}


DEFAULTS = (
    # The sizes of rows change at every step, and would fragment the memory of PyTorch's CUDA allocator.
    ("PYTORCH_ALLOC_CONF", "expandable_segments:True", ("PYTORCH_CUDA_ALLOC_CONF",)),
    # How often a waiting OpenMP thread looks before it sleeps: 30 times less than GNU's default. A thread that waits
    # for one whose core another program uses would keep the other core busy (benchmarks/busy_machine.py).
    ("GOMP_SPINCOUNT", "10000", ("OMP_WAIT_POLICY",)),
)
"""Environment variables set before PyTorch is loaded: name, value, and other variables by which a user may choose."""


def main() -> None:
    """Run the command that the first argument names, with the arguments that follow it."""
    run_program(_main)


def run(name: str) -> None:
    """Run a command with the arguments of this process."""
    run_program(lambda: _run(name))


def _main() -> None:
    name, *arguments = sys.argv[1:] or ["--help"]
    if name in ("--help", "-h"):
        print(USAGE)  # noqa: T201
    elif name in ("--version", "-V"):
        print(__version__)  # noqa: T201
    elif name in COMMANDS:
        sys.argv = [f"bionemo-esm {name}", *arguments]
        _run(name)
    else:
        raise UserError(f"no command {name!r}\n\n{USAGE}", code="command.unknown")


def _run(name: str) -> None:
    for variable, value, instead in DEFAULTS:
        if not any(other in os.environ for other in instead):
            os.environ.setdefault(variable, value)
    command = COMMANDS[name]
    function = getattr(import_module(command.module), command.function)
    if code := function() if command.configured else function(sys.argv[1:]):
        sys.exit(code)


if __name__ == "__main__":
    main()
