"""Fine-tune a pretrained model on a task: one of FLIP's or TAPE's, or your own.

python examples/finetune.py task=secondary_structure restore_from_path=x.nemo data.train=sampled.fasta \
  data.sequences=sequences.fasta data.mask=mask.fasta output=structure
"""

import hydra
from omegaconf import DictConfig

from bionemo_esm import config_directory
from bionemo_esm.command_line import check_command_line
from bionemo_esm.finetuning.finetune_command import finetune


@hydra.main(version_base="1.3", config_path=str(config_directory("finetuning")), config_name="finetune")
def main(cfg: DictConfig) -> None:
    finetune(cfg)


if __name__ == "__main__":
    check_command_line("finetune", "finetuning")
    main()
