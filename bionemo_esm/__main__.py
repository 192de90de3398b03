"""`bionemo-esm COMMAND [key=value ...]`: the jobs of this package for those who installed it with pip."""

from __future__ import annotations

import sys

from bionemo_esm import __version__

USAGE = f"""bionemo-esm {__version__}: protein language models

  bionemo-esm pretrain recipe=laptop                                a small ESM-1nv on the shipped sample
  bionemo-esm pretrain recipe=laptop data.fasta=proteins.fasta.gz   the same on your own proteins
  bionemo-esm pretrain --help                                       every key, with its value
"""


def main() -> None:
    """Run one job; its own arguments are Hydra overrides."""
    command, *arguments = sys.argv[1:] or ["--help"]
    if command in ("--help", "-h"):
        print(USAGE)  # noqa: T201
    elif command in ("--version", "-V"):
        print(__version__)  # noqa: T201
    elif command == "pretrain":
        from bionemo_esm.training import __main__ as job

        sys.argv = [job.__file__, *arguments]  # a file that Lightning can start again for the other ranks of a node
        job.main()
    else:
        sys.exit(f"error: no command {command!r}\n\n{USAGE}")


if __name__ == "__main__":
    main()
