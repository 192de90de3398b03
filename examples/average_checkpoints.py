"""Average the weights of a run's last checkpoints into one model.

python examples/average_checkpoints.py checkpoints='runs/my_run/checkpoints/*.ckpt' last=47 output=averaged.nemo
"""

from bionemo_esm.__main__ import run

if __name__ == "__main__":
    run("average")
