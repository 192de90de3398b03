"""Average the weights of a run's last checkpoints into one model:

python examples/average_checkpoints.py checkpoints='runs/my_run/checkpoints/*.ckpt' last=47 output=averaged.nemo
"""

import hydra
from omegaconf import DictConfig

from bionemo_esm import config_directory
from bionemo_esm.command_line import check_command_line
from bionemo_esm.pretraining.checkpoint_commands import average


@hydra.main(version_base="1.3", config_path=str(config_directory()), config_name="average_checkpoints")
def main(cfg: DictConfig) -> None:
    average(cfg)


if __name__ == "__main__":
    check_command_line("average_checkpoints")
    main()
