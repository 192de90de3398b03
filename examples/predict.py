"""Predict with a fine-tuned model, and write a table.

python examples/predict.py model=finetuned.nemo input=proteins.fasta output=predictions.csv
python examples/predict.py model=finetuned.nemo input=proteins.csv output=residues.parquet residues=true
"""

from bionemo_esm.__main__ import run

if __name__ == "__main__":
    run("predict")
