"""A training with Hugging Face's `Trainer`: the program that `starting.py` and `whole_runs.py` time.

    python benchmarks/rows/huggingface_trainer.py SETTINGS

SETTINGS is a JSON file with the paths of proteins and vocabulary, the sizes of the model, the arguments of the
`Trainer`, and the path of the record. Without `validation` the program records the numbers of proteins and residues
after the first step; with it, also the perplexity of these proteins after the last one. It imports none of our code.
"""

import gzip
import json
import math
import sys
from pathlib import Path

from transformers import (
    DataCollatorForLanguageModeling,
    EsmConfig,
    EsmForMaskedLM,
    EsmTokenizer,
    Trainer,
    TrainerCallback,
    TrainingArguments,
)

settings = json.loads(Path(sys.argv[1]).read_text())


class Proteins:
    """Proteins tokenized on access, which gives the fastest start."""

    def __init__(self, fasta, tokenizer, max_tokens):
        with gzip.open(fasta, "rt") as stream:
            records = stream.read().split(">")[1:]
        self.sequences = [record.split("\n", 1)[1].replace("\n", "") for record in records]
        self.tokenizer, self.max_tokens = tokenizer, max_tokens

    def __len__(self):
        return len(self.sequences)

    def __getitem__(self, index):
        return self.tokenizer(self.sequences[index], truncation=True, max_length=self.max_tokens)


class FirstStep(TrainerCallback):
    """Write the record after the first step."""

    def on_step_end(self, args, state, control, **kwargs):
        write_record()


def write_record(**results):
    found = {"sequences": len(proteins), "residues": sum(map(len, proteins.sequences)), **results}
    partial = Path(settings["record"] + ".partial")
    partial.write_text(json.dumps(found) + "\n")
    partial.replace(settings["record"])


tokenizer = EsmTokenizer(settings["vocabulary"])
proteins = Proteins(settings["fasta"], tokenizer, settings["max_tokens"])
whole = settings.get("validation") is not None
model = EsmForMaskedLM(EsmConfig(**settings["model"], vocab_size=len(tokenizer), pad_token_id=1, mask_token_id=32))
arguments = TrainingArguments(
    output_dir=settings["output"],
    per_device_train_batch_size=settings["batch"],
    use_cpu=settings["device"] == "cpu",
    save_strategy="no",
    logging_strategy="no",
    report_to=[],
    remove_unused_columns=False,
    disable_tqdm=True,
    **settings["arguments"],
)
trainer = Trainer(
    model=model,
    args=arguments,
    data_collator=DataCollatorForLanguageModeling(tokenizer, mlm_probability=0.15),
    train_dataset=proteins,
    eval_dataset=Proteins(settings["validation"], tokenizer, settings["max_tokens"]) if whole else None,
    callbacks=[] if whole else [FirstStep()],
)
trainer.train()
if whole:
    # as in our validation every chosen residue shows <mask>: an unchanged one would give its answer away
    trainer.data_collator = DataCollatorForLanguageModeling(
        tokenizer, mlm_probability=0.15, mask_replace_prob=1.0, random_replace_prob=0.0
    )
    write_record(perplexity=math.exp(trainer.evaluate()["eval_loss"]))
