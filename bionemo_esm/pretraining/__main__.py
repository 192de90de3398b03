"""`python -m bionemo_esm.pretraining key=value ...`: the file by which Lightning starts the ranks of pretraining."""

from bionemo_esm.__main__ import run

if __name__ == "__main__":
    run("pretrain")
