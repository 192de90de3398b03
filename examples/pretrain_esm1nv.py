"""Pretrain ESM-1nv with the model card's recipe on 22 nodes of 8 GPUs, or a small model on a laptop.

python examples/pretrain_esm1nv.py trainer.num_nodes=22 data.store=/data/uniref50_2022_05
python examples/pretrain_esm1nv.py recipe=laptop
"""

from bionemo_esm.__main__ import run

if __name__ == "__main__":
    run("pretrain")
