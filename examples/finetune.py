"""Fine-tune a pretrained model on a task of FLIP or TAPE, or your own.

python examples/finetune.py task=secondary_structure model=x.nemo data.train=sampled.fasta \
  data.sequences=sequences.fasta data.mask=mask.fasta output=structure
"""

from bionemo_esm.__main__ import run

if __name__ == "__main__":
    run("finetune")
