"""Score variants of a protein with a model: those of a table, or all single mutants.

python examples/score_variants.py model=my.nemo sequence=wildtype.fasta input=mutants.csv output=scores.csv
python examples/score_variants.py model=my.nemo sequence=wildtype.fasta scan=true output=scan.csv
"""

from bionemo_esm.__main__ import run

if __name__ == "__main__":
    run("score")
