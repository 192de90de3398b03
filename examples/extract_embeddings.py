"""Extract embeddings of proteins as features for predictive models.

python examples/extract_embeddings.py model=x.nemo input=proteins.fasta output=embeddings.h5
python examples/extract_embeddings.py model=x.nemo input=proteins.csv output=embeddings residues=true devices=8
"""

from bionemo_esm.__main__ import run

if __name__ == "__main__":
    run("embed")
