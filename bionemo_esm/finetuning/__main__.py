"""`python -m bionemo_esm.finetuning key=value ...`: the file by which Lightning starts the ranks of fine-tuning."""

from bionemo_esm.__main__ import run

if __name__ == "__main__":
    run("finetune")
