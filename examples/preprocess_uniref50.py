"""Build a memory-mapped store of proteins from a UniRef50 release, or from FASTA files of your own:

python examples/preprocess_uniref50.py
python examples/preprocess_uniref50.py input=proteins.fasta.gz output=data/proteins split.validation=500 split.test=500
"""

import hydra
from omegaconf import DictConfig

from bionemo_esm import config_directory
from bionemo_esm.command_line import check_command_line
from bionemo_esm.data.store_commands import preprocess


@hydra.main(version_base="1.3", config_path=str(config_directory()), config_name="preprocess_uniref50")
def main(cfg: DictConfig) -> None:
    preprocess(cfg)


if __name__ == "__main__":
    check_command_line("preprocess_uniref50")
    main()
