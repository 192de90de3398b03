"""Import a model from Hugging Face or fair-esm, or export one of ours to Hugging Face.

python examples/convert_checkpoint.py source=facebook/esm2_t6_8M_UR50D target=esm2_8m.nemo
python examples/convert_checkpoint.py source=runs/my_run/my_run.nemo target=my_model
"""

from bionemo_esm.__main__ import run

if __name__ == "__main__":
    run("convert")
