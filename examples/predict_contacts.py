"""Predict which residues of proteins touch, by a model with a contact head:

python examples/predict_contacts.py model=x_contacts.nemo input=proteins.fasta output=contacts
"""

import hydra
from omegaconf import DictConfig

from bionemo_esm import config_directory
from bionemo_esm.command_line import check_command_line
from bionemo_esm.inference.contacts.contacts_command import predict_contacts


@hydra.main(version_base="1.3", config_path=str(config_directory("inference")), config_name="contacts")
def main(cfg: DictConfig) -> None:
    predict_contacts(cfg)


if __name__ == "__main__":
    check_command_line("contacts", "inference")
    main()
