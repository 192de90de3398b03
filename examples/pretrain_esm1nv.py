"""Pretrain ESM-1nv. The model card's recipe on 22 nodes of 8 GPUs, or a small model on a laptop:

python examples/pretrain_esm1nv.py trainer.num_nodes=22 data.store=/data/uniref50_2022_05
python examples/pretrain_esm1nv.py recipe=laptop
"""

import hydra
from omegaconf import DictConfig

from bionemo_esm import config_directory
from bionemo_esm.command_line import check_command_line
from bionemo_esm.pretraining.run import pretrain


@hydra.main(version_base="1.3", config_path=str(config_directory()), config_name="pretrain_esm1nv")
def main(cfg: DictConfig) -> None:
    pretrain(cfg)


if __name__ == "__main__":
    check_command_line("pretrain_esm1nv")
    main()
