"""Evaluate a model on held-out proteins: masked-residue loss with intervals, beside baselines or another model.

python examples/evaluate.py model=my.nemo input=data/store
python examples/evaluate.py model=my.nemo reference=other.nemo input=proteins.fasta store=data/store
"""

from bionemo_esm.__main__ import run

if __name__ == "__main__":
    run("evaluate")
