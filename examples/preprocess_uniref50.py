"""Build a memory-mapped store of proteins from a UniRef50 release or from other FASTA files.

python examples/preprocess_uniref50.py
python examples/preprocess_uniref50.py input=proteins.fasta.gz output=data/proteins split.validation=500 split.test=500
"""

from bionemo_esm.__main__ import run

if __name__ == "__main__":
    run("preprocess")
