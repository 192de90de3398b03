"""Fit a contact head on a few structures, and save it with the model.

python examples/fit_contacts.py model=x.nemo structures=structures.parquet output=x_contacts.nemo
"""

from bionemo_esm.__main__ import run

if __name__ == "__main__":
    run("fit-contacts")
