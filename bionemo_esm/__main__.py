"""`bionemo-esm COMMAND [key=value ...]`: the jobs of this package for those who installed it with pip."""

from __future__ import annotations

import sys

from bionemo_esm import __version__

USAGE = f"""bionemo-esm {__version__}: protein language models

  bionemo-esm pretrain recipe=laptop                                 a small ESM-1nv on the shipped sample
  bionemo-esm pretrain recipe=laptop data.fasta=proteins.fasta.gz    the same on your own proteins
  bionemo-esm preprocess                                             UniRef50, downloaded, into a store
  bionemo-esm preprocess input=proteins.fasta.gz output=data/store split.validation=null split.test=null
                                                                     your own proteins, one in twenty held out twice
  bionemo-esm inspect data/store --verify                            what is in a store, and whether it is intact
  bionemo-esm check-leakage data/store                               near-duplicates between its splits, by MMseqs2

pretrain and preprocess take key=value, and --help lists every key; the others take --help.
"""


def main() -> None:
    """Run one job with the arguments that follow its name."""
    command, *arguments = sys.argv[1:] or ["--help"]
    if command in ("--help", "-h"):
        print(USAGE)  # noqa: T201
    elif command in ("--version", "-V"):
        print(__version__)  # noqa: T201
    elif command == "pretrain":
        from bionemo_esm.training import __main__ as job

        sys.argv = [job.__file__, *arguments]  # a file that Lightning can start again for the other ranks of a node
        job.main()
    elif command in ("preprocess", "inspect", "check-leakage"):
        from bionemo_esm.data import jobs

        if command == "preprocess":
            sys.argv = [f"bionemo-esm {command}", *arguments]
            jobs.main()
        else:
            (jobs.inspect if command == "inspect" else jobs.leakage)(arguments)
    else:
        print(f"error: no command {command!r}\n\n{USAGE}", file=sys.stderr)  # noqa: T201
        sys.exit(2)


if __name__ == "__main__":
    main()
