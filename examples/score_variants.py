"""Score variants of a protein by a model, those of a table or all single ones:

python examples/score_variants.py model=my.nemo sequence=wildtype.fasta input=mutants.csv output=scores.csv
python examples/score_variants.py model=my.nemo sequence=wildtype.fasta scan=true output=scan.csv
"""

import hydra
from omegaconf import DictConfig

from bionemo_esm import config_directory
from bionemo_esm.command_line import check_command_line
from bionemo_esm.inference.variants.score_command import score_variants


@hydra.main(version_base="1.3", config_path=str(config_directory("inference")), config_name="score")
def main(cfg: DictConfig) -> None:
    score_variants(cfg)


if __name__ == "__main__":
    check_command_line("score", "inference")
    main()
