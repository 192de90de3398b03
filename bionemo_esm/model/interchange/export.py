"""Export an archive or a checkpoint to a folder that Hugging Face Transformers loads, with a model card.

The files are those of `EsmForMaskedLM.save_pretrained` and `EsmTokenizer.save_pretrained`. They are written without
Transformers and one tensor at a time, so a model may be larger than the memory. Sources for file names, keys, and the
index of shards: `transformers/configuration_utils.py`, `modeling_utils.py`, `tokenization_utils_base.py`.

Provenance is untrusted free text. The model card quotes it in code spans on one line, where Markdown and HTML have no
effect.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from bionemo_esm.alphabet import EOS_ID, MASK_ID, PAD_ID, TOKEN_IDS, TOKENS, VOCABULARY_SIZE
from bionemo_esm.files import atomic_folder, check_absent
from bionemo_esm.model.archive import WEIGHTS, ArchiveError, ArchiveFile
from bionemo_esm.model.config import LEARNED, EncoderConfig
from bionemo_esm.model.interchange import HUB_ID, PRECISIONS
from bionemo_esm.model.interchange.state_dict_adapter import (
    HUGGING_FACE,
    UNUSED_POSITIONS,
    InterchangeError,
    from_native,
)
from bionemo_esm.model.summary import ArchiveSummary, escaped
from bionemo_esm.model.tar_format import Member, atomic_write, quoted
from bionemo_esm.model.tensor_io import LazyTensors, tensor_member
from bionemo_esm.model.validate import check_sizes, extension_of

_LONGEST = 300  # characters of one entry
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


def model_card(card: ArchiveSummary, config: EncoderConfig) -> str:
    """Return the content of README.md: architecture, training, use and limits of the model."""
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
    """Return an untrusted value as a code span for a table, without effect on Markdown, HTML and terminals."""
    text = escaped(str(value), longest).replace("`", "'").replace("|", "\\|").strip()
    return f"`{text}`" if text else "``` ```"


def _base_model(provenance: Mapping[str, Any]) -> str:
    origin = provenance.get("imported_from")
    source = origin.get("source") if isinstance(origin, dict) and origin.get("format") == "Hugging Face" else None
    return f"base_model: {source}\n" if isinstance(source, str) and HUB_ID.fullmatch(source) else ""


def _table(title: str, rows: Mapping[str, str]) -> str:
    lines = [f"| {label} | {value} |" for label, value in rows.items()]
    return "\n".join([f"## {title}\n", "| | |", "|---|---|", *lines]) + "\n"


def _sizes(card: ArchiveSummary, config: EncoderConfig) -> dict[str, str]:
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


def _training(card: ArchiveSummary, provenance: Mapping[str, Any]) -> dict[str, str]:
    """Return the table rows on training from the archive's provenance."""
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
    """Yield the entries of a mapping as `key value`; any other value unchanged."""
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


Progress = Callable[[int, int | None], None]
"""Callback with bytes done and bytes in total (None: not known yet). Each weight counts twice: checked and written."""
SHARD_BYTES = 5_000_000_000
_SPECIAL_TOKENS = {
    "cls_token": "<cls>", "eos_token": "<eos>", "mask_token": "<mask>", "pad_token": "<pad>", "unk_token": "<unk>",
}  # fmt: skip
DTYPES: Mapping[str, torch.dtype] = {name: getattr(torch, dtype) for name, dtype in PRECISIONS.items()}
"""Torch dtypes by the precision in an archive."""


@dataclass(frozen=True)
class ExportReport:
    """The result of an export."""

    folder: Path
    config: EncoderConfig
    precision: str  # "32" or "bf16"
    files: Mapping[str, int]  # by name: bytes
    notes: tuple[str, ...]  # changes, as messages for the user


def export_hugging_face(
    file: ArchiveFile,
    folder: Path,
    *,
    precision: str | None = None,
    shard_bytes: int = SHARD_BYTES,
    progress: Progress = lambda done, total: None,
) -> ExportReport:
    """Write the model of an archive or a checkpoint to a folder for Transformers, atomically.

    folder: must not exist. precision: "32" or "bf16"; None keeps the precision of the archive. shard_bytes: maximum
    bytes of weights per file; a larger tensor gets its own file. Raises `InterchangeError`, and `ArchiveError` for a
    damaged archive and a failed write.
    """
    if extension_of(file) is not None:
        raise InterchangeError(
            f"{file.path}: is a fine-tuned model, whose head Hugging Face's ESM has no place for; give a pretrained one"
        )
    config, precision = check_sizes(file), precision or str(file.config["precision"])
    total = file.sections[WEIGHTS].size
    check_absent("target", folder)
    file.verify(WEIGHTS, progress=lambda count, size: progress(count, 2 * size))
    fixed = dict(config.fixed_tensors())
    dtypes = {name: DTYPES["32" if name in fixed else precision] for name in file.weights.infos}
    tensors = from_native(config, dtypes, lambda name: _finite(file, name).to(dtypes[name]), HUGGING_FACE)
    with written_folder(folder) as unfinished:
        for name, text in _texts(file, config, precision, tensors).items():
            _write(unfinished / name, Member.of(text.encode()))
        _write_weights(unfinished, tensors, shard_bytes, lambda share: progress(round(total * (1 + share)), 2 * total))
        files = {path.name: path.stat().st_size for path in sorted(unfinished.iterdir())}
    return ExportReport(folder, config, precision, files, tuple(_notes(file, config, precision)))


def hugging_face_config(config: EncoderConfig, precision: str) -> dict[str, Any]:
    """Return the content of config.json with every key that distinguishes one ESM from another.

    Transformers 5 reads `torch_dtype` and `dtype`; 4 reads the former only.
    """
    return {
        "architectures": ["EsmForMaskedLM"],
        "model_type": "esm",
        "vocab_size": VOCABULARY_SIZE,
        "pad_token_id": PAD_ID,
        "mask_token_id": MASK_ID,
        "eos_token_id": EOS_ID,
        "hidden_size": config.hidden_size,
        "num_hidden_layers": config.num_layers,
        "num_attention_heads": config.num_attention_heads,
        "intermediate_size": config.ffn_hidden_size,
        "hidden_dropout_prob": config.hidden_dropout,
        "attention_probs_dropout_prob": config.attention_dropout,
        "layer_norm_eps": config.layernorm_epsilon,
        "initializer_range": config.init_method_std,
        "max_position_embeddings": config.seq_length + UNUSED_POSITIONS,
        "position_embedding_type": "absolute" if config.position_embedding == LEARNED else "rotary",
        "emb_layer_norm_before": config.embedding_layernorm,
        "token_dropout": config.token_dropout,
        "is_folding_model": False,
        "tie_word_embeddings": True,
        "torch_dtype": PRECISIONS[precision],
    }


def _texts(file: ArchiveFile, config: EncoderConfig, precision: str, tensors: LazyTensors) -> dict[str, str]:
    """Return the text files beside the weights, by name."""
    described = hugging_face_config(config, precision)
    # Our own key, which Transformers ignores. Without it, the import would read rows of zeros as absent.
    if config.position_offset and not tensors[f"{HUGGING_FACE.position_embeddings}.weight"][:UNUSED_POSITIONS].any():
        described["position_offset"] = config.position_offset
    tokenizer = {
        "tokenizer_class": "EsmTokenizer",
        "model_max_length": config.seq_length,
        "clean_up_tokenization_spaces": False,
        "added_tokens_decoder": {str(TOKEN_IDS[name]): _added(name) for name in _ordered(_SPECIAL_TOKENS)},
        **_SPECIAL_TOKENS,
    }
    return {
        "config.json": _json(described),
        "vocab.txt": "\n".join(TOKENS),
        "tokenizer_config.json": _json(tokenizer),
        "special_tokens_map.json": _json(_SPECIAL_TOKENS),
        "README.md": model_card(ArchiveSummary.of(file), config),
    }


def _ordered(tokens: Mapping[str, str]) -> list[str]:
    return sorted(tokens.values(), key=TOKEN_IDS.__getitem__)


def _added(token: str) -> dict[str, Any]:
    flags = dict.fromkeys(("lstrip", "normalized", "rstrip", "single_word"), False)
    return {"content": token, **flags, "special": True}


def _json(value: Any) -> str:
    return json.dumps(value, indent=2, sort_keys=True) + "\n"


def _notes(file: ArchiveFile, config: EncoderConfig, precision: str) -> Iterator[str]:
    if precision != str(file.config["precision"]):
        yield "weights rounded to bfloat16" if precision == "bf16" else "bfloat16 weights kept as float32"
    for name in ("encoder.embedding.word_embeddings.weight", "encoder.output_layer.bias"):
        if file.weights.load(name)[VOCABULARY_SIZE:].any():
            yield f"left out: numbers in rows of {name} that pad the vocabulary and are never used"
    if not config.contact_head:
        yield "the model has no contact head: transformers makes one of random numbers, and says so as it loads"


def _finite(file: ArchiveFile, name: str) -> Tensor:
    tensor = file.weights.load(name)
    if not tensor.isfinite().all():
        raise ArchiveError(f"{file.path}: tensor {quoted(name)} holds NaN or infinity; the model is of no use")
    return tensor


# --- weights ----------------------------------------------------------------------------------------------------------


def _write_weights(folder: Path, tensors: LazyTensors, shard_bytes: int, tell: Callable[[float], None]) -> None:
    """Write `model.safetensors`, or shards and their index. `tell` receives the fraction done."""
    shards, done, size = _shards(tensors.outline, shard_bytes), 0, sum(map(_bytes, tensors.outline.values()))

    def make(name: str) -> Tensor:
        nonlocal done
        done += _bytes(tensors.outline[name])
        tell(done / size)
        return tensors[name]

    places: dict[str, str] = {}
    for number, names in enumerate(shards, start=1):
        place = "model.safetensors" if len(shards) == 1 else f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        part = LazyTensors({name: tensors.outline[name] for name in names}, make)
        _write(folder / place, tensor_member(part, {"format": "pt"}))
        places |= dict.fromkeys(names, place)
    if len(shards) > 1:
        index = {"metadata": {"total_size": size}, "weight_map": places}
        _write(folder / "model.safetensors.index.json", Member.of(_json(index).encode()))


def _shards(outline: Mapping[str, Tensor], shard_bytes: int) -> list[list[str]]:
    """Split the sorted tensor names into shards of at most `shard_bytes`; a larger tensor has its own shard."""
    shards: list[list[str]] = [[]]
    held = 0
    for name in sorted(outline):
        size = _bytes(outline[name])
        if shards[-1] and held + size > shard_bytes:
            shards.append([])
            held = 0
        shards[-1].append(name)
        held += size
    return shards


def _bytes(tensor: Tensor) -> int:
    return tensor.numel() * tensor.element_size()


# --- files ------------------------------------------------------------------------------------------------------------


@contextmanager
def written_folder(folder: Path) -> Iterator[Path]:
    """Create a folder atomically as `files.atomic_folder` does. Raises `InterchangeError` if it cannot be written."""
    try:
        with atomic_folder("target", folder) as unfinished:
            yield unfinished
    except OSError as error:
        raise InterchangeError(
            f"{folder}: cannot be written ({error.strerror}); nothing is left of it; choose another place"
        ) from error


def _write(path: Path, member: Member) -> None:
    with atomic_write(path) as stream:
        member.write(stream)
