"""What a fine-tuned model says of proteins, as a table:

python examples/predict.py model=finetuned.nemo input=proteins.fasta output=predictions.csv
python examples/predict.py model=finetuned.nemo input=proteins.csv output=residues.parquet residues=true
"""

import hydra
from omegaconf import DictConfig

from bionemo_esm import config_directory
from bionemo_esm.command_line import check_command_line
from bionemo_esm.finetuning.predict_command import predict


@hydra.main(version_base="1.3", config_path=str(config_directory("finetuning")), config_name="predict")
def main(cfg: DictConfig) -> None:
    predict(cfg)


if __name__ == "__main__":
    check_command_line("predict", "finetuning")
    main()
