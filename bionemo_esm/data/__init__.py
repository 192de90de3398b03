"""The way of a protein: FASTA record -> token store -> epoch order -> crop and mask -> packed batch."""
