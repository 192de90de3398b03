"""Proteins as features for predictive models:

python examples/extract_embeddings.py model=x.nemo input=proteins.fasta output=embeddings.h5
python examples/extract_embeddings.py model=x.nemo input=proteins.csv output=embeddings residues=true devices=8
"""

import hydra
from omegaconf import DictConfig

from bionemo_esm import config_directory
from bionemo_esm.command_line import check_command_line
from bionemo_esm.inference.embedding.embed_command import embed


@hydra.main(version_base="1.3", config_path=str(config_directory("inference")), config_name="embed")
def main(cfg: DictConfig) -> None:
    embed(cfg)


if __name__ == "__main__":
    check_command_line("embed", "inference")
    main()
