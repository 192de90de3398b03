"""The README.md of an exported model, made from what its archive says of itself.

Provenance is free text of whoever made the file. It stands in code spans, on one line, where Markdown and HTML mean
nothing.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from bionemo_esm.alphabet import TOKENS
from bionemo_esm.model.card import ArchiveCard, escaped
from bionemo_esm.model.config import LEARNED, EncoderConfig
from bionemo_esm.model.interchange.route import HUB_ID

_LONGEST = 300  # characters told of one entry
_MOST_NOTES = 20
_EXAMPLE = "MKTAYIAKQRQISFVKSHFSRQLEERLGLIEVQAPILSRVGDGTQDNLSGAEKAVQVKVKALPDAQFEVV"

_FRONT = """\
---
library_name: transformers
pipeline_tag: fill-mask
{base_model}tags:
- esm
- protein language model
- masked-lm
- biology
widget:
- text: "MKTAYIAKQRQISFVKSHFSRQ<mask>EERLGLIEVQAPILSRVGDG"
---
"""
_USE = f"""\
## Use

```python
import torch
from transformers import AutoTokenizer, EsmForMaskedLM

place = "."  # this folder, or its id on the Hub
tokenizer, model = AutoTokenizer.from_pretrained(place), EsmForMaskedLM.from_pretrained(place).eval()
with torch.no_grad():
    tokens = tokenizer("{_EXAMPLE}", truncation=True, return_tensors="pt")
    output = model(**tokens, output_hidden_states=True)
logits, embeddings = output.logits, output.hidden_states[-1]  # of <cls>, the residues and <eos>
```
"""


def model_card(card: ArchiveCard, config: EncoderConfig) -> str:
    """The README.md: what the model is, how it was trained, how to use it, and where it ends."""
    family = config.family
    provenance = card.to_dict()["provenance"]
    provenance = provenance if isinstance(provenance, dict) else {}
    sections = [
        _FRONT.format(base_model=_base_model(provenance)),
        f"# {family}, {config.parameters / 1e6:,.{1 if config.parameters >= 1e6 else 3}f}M parameters\n",
        f"A protein language model of the {family} architecture: a BERT over amino acids that fills in masked "
        "residues. Exported by bionemo_esm for Hugging Face `transformers`.\n",
        _table("Sizes", _sizes(card, config)),
        _table("Training", _training(card, provenance))
        + "\nWhat the archive says of itself; nothing here has been checked but the hash of the weights.\n",
        _USE,
        _limits(config),
        "## Licence\n\nNot chosen yet: add `license:` to the head of this file before you publish the model. Weights "
        "that were imported keep the licence they came with.\n",
    ]
    return "\n".join(sections)


def code(value: Any, longest: int = _LONGEST) -> str:
    """A value from a file as a code span for a table: nothing in it is obeyed by Markdown, HTML or a terminal."""
    text = escaped(str(value), longest).replace("`", "'").replace("|", "\\|").strip()
    return f"`{text}`" if text else "``` ```"


def _base_model(provenance: Mapping[str, Any]) -> str:
    origin = provenance.get("imported_from")
    source = origin.get("source") if isinstance(origin, dict) and origin.get("format") == "Hugging Face" else None
    return f"base_model: {source}\n" if isinstance(source, str) and HUB_ID.fullmatch(source) else ""


def _table(title: str, rows: Mapping[str, str]) -> str:
    lines = [f"| {label} | {value} |" for label, value in rows.items()]
    return "\n".join([f"## {title}\n", "| | |", "|---|---|", *lines]) + "\n"


def _sizes(card: ArchiveCard, config: EncoderConfig) -> dict[str, str]:
    return {
        "layers": f"{config.num_layers:,}",
        "hidden size": f"{config.hidden_size:,}",
        "attention heads": f"{config.num_attention_heads:,}",
        "FFN size": f"{config.ffn_hidden_size:,}",
        "longest sequence, `<cls>` and `<eos>` counted": f"{config.seq_length:,} tokens",
        "positions": config.position_embedding,
        "layer norm after the embeddings": "yes" if config.embedding_layernorm else "no",
        "token dropout": "yes" if config.token_dropout else "no",
        "contact head": "yes" if config.contact_head else "no",
        "weights": ", ".join(f"{count:,} in {dtype}" for dtype, count in card.parameters_by_dtype.items())
        + ", rows that pad the vocabulary counted",
        "SHA-256 of the archive's weights": code(card.to_dict()["weights_sha256"]),
    }


def _training(card: ArchiveCard, provenance: Mapping[str, Any]) -> dict[str, str]:
    """How it was trained, as far as the archive says."""
    rows = {
        label: f"{value:,}" if type(value) is int and key != "seed" else code(value)
        for key, label in (
            ("recipe", "recipe"), ("seed", "seed"), ("steps", "steps"), ("consumed_samples", "consumed samples"),
            ("data", "data"), ("data_release", "data release"),
            ("data_manifest_sha256", "SHA-256 of the data's manifest"), ("restored_from", "began with the weights of"),
        )
        if (value := provenance.get(key)) not in (None, "")
    }  # fmt: skip
    if card.epochs is not None:
        rows["epochs"] = f"{card.epochs:,.2f}"
    for key, label in (
        ("data_sequences", "sequences"), ("continued_from", "continued from"), ("converted_from", "converted from"),
        ("imported_from", "imported from"), ("package_versions", "written with"),
    ):  # fmt: skip
        if provenance.get(key):
            rows[label] = ", ".join(_entries(provenance[key]))
    averaged = provenance.get("averaged_from")
    if isinstance(averaged, list) and averaged:
        rows["averaged from"] = _averaged(averaged)
    notes = provenance.get("notes")
    if isinstance(notes, list) and notes:
        rows["notes"] = "; ".join(map(code, notes[:_MOST_NOTES]))
    return rows or {"": "the archive says nothing of it"}


def _entries(value: Any, depth: int = 0) -> Iterator[str]:
    """The entries of a mapping as `key value`; whatever else it is, as it is."""
    if not isinstance(value, dict) or depth > 1:
        yield code(value)
        return
    for key, item in list(value.items())[:_MOST_NOTES]:
        if item is not None:
            yield f"{code(key)} {' '.join(_entries(item, depth + 1))}"


def _averaged(sources: list[Any]) -> str:
    steps = [source["steps"] for source in sources if isinstance(source, dict) and type(source.get("steps")) is int]
    span = f", steps {min(steps):,} to {max(steps):,}" if steps else ""
    return f"{len(sources):,} checkpoints{span}"


def _limits(config: EncoderConfig) -> str:
    residues = config.seq_length - 2
    longest = (
        f"- At most {residues:,} residues: there are positions for no more, and `transformers` fails with an index "
        "error beyond. Give `truncation=True`, or cut longer proteins yourself."
        if config.position_embedding == LEARNED
        else f"- Meant for up to {residues:,} residues. Rotary positions let it read longer proteins; how well, has "
        "to be measured. `transformers` 4 reports a table of positions as newly initialised, which it does not use."
    )
    contacts = (
        "- `model.predict_contacts` gives probabilities of contact by the regression that came with the model; it is "
        "not fitted anew when the encoder is trained further. It needs attention maps, which only "
        '`EsmForMaskedLM.from_pretrained(place, attn_implementation="eager")` gives; otherwise `transformers` 5 fails '
        'with "stack expects a non-empty TensorList".'
        if config.contact_head
        else "- There is no contact head: `transformers` reports `esm.contact_head` as newly initialised, and "
        "`predict_contacts` gives random numbers."
    )
    special = f"- Residues are upper case, of {' '.join(TOKENS[4:29])}; anything else becomes `<unk>`."
    return "\n".join(["## Limits\n", longest, contacts, special]) + "\n"
