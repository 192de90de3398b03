"""Predict contacts between residues of proteins with a model that has a contact head.

python examples/predict_contacts.py model=x_contacts.nemo input=proteins.fasta output=contacts
"""

from bionemo_esm.__main__ import run

if __name__ == "__main__":
    run("contacts")
