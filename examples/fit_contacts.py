"""Fit a contact head on a few structures, and save it with the model:

python examples/fit_contacts.py model=x.nemo structures=structures.parquet output=x_contacts.nemo
"""

import hydra
from omegaconf import DictConfig

from bionemo_esm import config_directory
from bionemo_esm.command_line import check_command_line
from bionemo_esm.inference.contacts.fit_command import fit_contacts


@hydra.main(version_base="1.3", config_path=str(config_directory("inference")), config_name="fit_contacts")
def main(cfg: DictConfig) -> None:
    fit_contacts(cfg)


if __name__ == "__main__":
    check_command_line("fit_contacts", "inference")
    main()
