"""`bionemo-esm COMMAND [key=value ...]`: the jobs of this package for those who installed it with pip."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from importlib import import_module
from pathlib import Path
from typing import NoReturn

from bionemo_esm import __version__

USAGE = f"""bionemo-esm {__version__}: protein language models

  bionemo-esm pretrain recipe=laptop                                 a small ESM-1nv on the shipped sample
  bionemo-esm pretrain recipe=laptop data.fasta=proteins.fasta.gz    the same on your own proteins
  bionemo-esm pretrain recipe=esm1nv_phase1 plan=true                what that run would be and cost; nothing is started
  bionemo-esm preprocess                                             UniRef50, downloaded, into a store
  bionemo-esm preprocess input=proteins.fasta.gz output=data/store split.validation=null split.test=null
                                                                     your own proteins, one in twenty held out twice
  bionemo-esm inspect data/store --verify                            what is in a store, and whether it is intact
  bionemo-esm inspect runs/laptop/laptop.nemo --verify               the same of a model (.nemo) or a checkpoint (.ckpt)
  bionemo-esm check-leakage data/store                               near-duplicates between its splits, by MMseqs2
  bionemo-esm average checkpoints='runs/laptop/averaging/*.nemo' last=5
                                                                     the mean of a run's last checkpoints
  bionemo-esm convert source=facebook/esm2_t6_8M_UR50D target=esm2_8m.nemo
                                                                     a model of Hugging Face or fair-esm into a .nemo
  bionemo-esm convert source=runs/laptop/laptop.nemo target=laptop_hf
                                                                     a .nemo or .ckpt into a folder for Hugging Face
  bionemo-esm embed model=x.nemo input=proteins.fasta output=embeddings.h5
                                                                     proteins as features for predictive models
  bionemo-esm score model=x.nemo sequence=wildtype.fasta input=mutants.csv output=scores.csv
                                                                     effects of variants; scan=true for every one
  bionemo-esm fit-contacts model=x.nemo structures=structures.parquet output=x_contacts.nemo
                                                                     a contact head from a few structures
  bionemo-esm contacts model=x_contacts.nemo input=proteins.fasta output=contacts
                                                                     which residues touch, with pictures
  bionemo-esm finetune task=secondary_structure restore_from_path=x.nemo data.download=flip output=structure
                                                                     a task learned: FLIP's, TAPE's, or your own
  bionemo-esm predict model=finetuned.nemo input=proteins.fasta output=predictions.csv
                                                                     what a fine-tuned model says of proteins
  bionemo-esm doctor                                                 whether this machine can train, and what is missing
  bionemo-esm convert-legacy old.nemo new.nemo                       an ESM-1nv of NeMo 1, which holds a pickle

inspect, doctor, check-leakage and convert-legacy take --help; all others take key=value, and --help lists every key.
"""

_CONFIGURED = {  # where the function is that runs a job
    "preprocess": ("bionemo_esm.data.store_commands", "main"),
    "average": ("bionemo_esm.pretraining.checkpoint_commands", "average_main"),
    "convert": ("bionemo_esm.model.interchange.convert_command", "main"),
    "embed": ("bionemo_esm.inference.embedding.embed_command", "main"),
    "score": ("bionemo_esm.inference.variants.score_command", "main"),
    "contacts": ("bionemo_esm.inference.contacts.contacts_command", "main"),
    "fit-contacts": ("bionemo_esm.inference.contacts.fit_command", "main"),
    "finetune": ("bionemo_esm.finetuning.finetune_command", "main"),
    "predict": ("bionemo_esm.finetuning.predict_command", "main"),
}


def main() -> None:
    """Run one job with the arguments that follow its name."""
    command, *arguments = sys.argv[1:] or ["--help"]
    if command in ("--help", "-h"):
        print(USAGE)  # noqa: T201
    elif command in ("--version", "-V"):
        print(__version__)  # noqa: T201
    elif command == "pretrain":
        from bionemo_esm.command_line import start_ranks_by
        from bionemo_esm.pretraining import __main__ as job

        sys.argv[1:] = arguments
        start_ranks_by(job.__file__)
        job.main()
    elif command == "inspect":
        inspect(arguments)
    elif command == "doctor":
        from bionemo_esm.pretraining import doctor

        sys.exit(doctor.main(arguments))
    elif command in _CONFIGURED:
        configured(command, arguments)
    elif command == "check-leakage":
        from bionemo_esm.data import store_commands as jobs

        jobs.leakage(arguments)
    elif command == "convert-legacy":
        from bionemo_esm.pretraining import checkpoint_commands as training_jobs

        training_jobs.convert(arguments)
    else:
        _refuse(f"no command {command!r}\n\n{USAGE}")


def configured(command: str, arguments: Sequence[str]) -> None:
    """A job that Hydra configures, from key=value."""
    sys.argv = [f"bionemo-esm {command}", *arguments]
    module, function = _CONFIGURED[command]
    getattr(import_module(module), function)()


def inspect(arguments: Sequence[str]) -> None:
    """The card of a store, if a folder is named; of a model or a checkpoint, if a file is; else exits with 2."""
    parser = argparse.ArgumentParser("bionemo-esm inspect", description="Show what is in a store, or what a model is.")
    parser.add_argument("path", type=Path, help="folder of a store, or file of a model (.nemo) or checkpoint (.ckpt)")
    parser.add_argument("--verify", action="store_true", help="read every byte and compare its hash with the manifest")
    parser.add_argument("--json", action="store_true", help="print the card as JSON")
    parser.add_argument("--picture", metavar="FILE", help="of a store: draw lengths and composition as a PNG")
    path = parser.parse_args(arguments).path
    try:
        is_folder, is_file = path.is_dir(), path.is_file()
    except OSError as error:
        _refuse(f"{path}: cannot be looked at ({error.strerror})")
    if is_folder and (path / "config.yaml").is_file() and not (path / "manifest.json").exists():
        files = [str(file) for file in sorted([*path.glob("*.nemo"), *path.glob("checkpoints/*.ckpt")])]
        _refuse(f"{path}: the folder of a run; name one of its files: {', '.join(files[:6]) or 'there is none yet'}")
    elif is_folder:
        from bionemo_esm.data import store_commands as store_jobs

        store_jobs.inspect(arguments)
    elif is_file:
        from bionemo_esm.model import summary as model_jobs

        model_jobs.inspect(arguments)
    else:
        wrong = "neither a folder nor a file" if path.exists() else "no such folder or file"
        _refuse(f"{path}: {wrong}; give the folder of a store, or the file of a model (.nemo) or checkpoint (.ckpt)")


def _refuse(message: str) -> NoReturn:
    print(f"error: {message}", file=sys.stderr)  # noqa: T201
    sys.exit(2)


if __name__ == "__main__":
    main()
