"""Predict which residues of proteins touch, by a model with a contact head:

python examples/predict_contacts.py model=x_contacts.nemo input=proteins.fasta output=contacts
"""

from bionemo_esm.__main__ import run

if __name__ == "__main__":
    run("contacts")
