"""Bring a model in from Hugging Face or fair-esm, or take one of ours to Hugging Face:

python examples/convert_checkpoint.py source=facebook/esm2_t6_8M_UR50D target=esm2_8m.nemo
python examples/convert_checkpoint.py source=runs/my_run/my_run.nemo target=my_model
"""

import hydra
from omegaconf import DictConfig

from bionemo_esm import config_directory
from bionemo_esm.command_line import check_command_line
from bionemo_esm.model.interchange.convert_command import convert


@hydra.main(version_base="1.3", config_path=str(config_directory()), config_name="convert_checkpoint")
def main(cfg: DictConfig) -> None:
    convert(cfg)


if __name__ == "__main__":
    check_command_line("convert_checkpoint")
    main()
