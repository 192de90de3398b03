"""Import of an ESM from a Hugging Face folder: `config.json`, the vocabulary, weights in one file or in shards.

safetensors are preferred to a `pytorch_model.bin`. Index and shards must agree. Weight files with other names that are
not in the index are ignored with a note, as Transformers does.

Each key of `config.json` belongs to one of three groups: keys that are used, keys whose value must match our encoder,
and keys that do not change the model's outputs. Any other key is an error that names it, unless its value is null,
which is how Transformers writes an unset key. Sources for keys and defaults:
`transformers/models/esm/configuration_esm.py`, `transformers/configuration_utils.py`, 4.2x to 5.x.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

from bionemo_esm.alphabet import CLS_ID, EOS_ID, MASK_ID, PAD_ID, TOKENS, UNK_ID, VOCABULARY_SIZE
from bionemo_esm.errors import ConfigError
from bionemo_esm.model.config import LEARNED, ROTARY, EncoderConfig
from bionemo_esm.model.interchange.state_dict_adapter import (
    HUGGING_FACE,
    UNUSED_POSITIONS,
    InterchangeError,
    SourceModel,
    SourceTensors,
)
from bionemo_esm.model.safe_serialization import parse_json
from bionemo_esm.model.tar_format import ArchiveError, Section, hash_section, quoted, readable
from bionemo_esm.model.tensor_io import TensorTable
from bionemo_esm.model.torch_pickle import LFS_POINTER, read_pickle

CONFIG, VOCABULARY, TOKENIZER = "config.json", "vocab.txt", "tokenizer.json"
ARCHITECTURE = "EsmForMaskedLM"
_LARGEST_TEXT = 2**24  # bytes of a JSON file; the index of ESM-2 15B has 2**16 bytes
_LARGEST_NUMBER = 2**31
_POSITIONS = {"absolute": LEARNED, "rotary": ROTARY}

_SIZES = {
    "num_layers": "num_hidden_layers",
    "hidden_size": "hidden_size",
    "num_attention_heads": "num_attention_heads",
    "ffn_hidden_size": "intermediate_size",
}
_NUMBERS = {
    "hidden_dropout": "hidden_dropout_prob",
    "attention_dropout": "attention_probs_dropout_prob",
    "layernorm_epsilon": "layer_norm_eps",
    "init_method_std": "initializer_range",
}
_FLAGS = {"embedding_layernorm": "emb_layer_norm_before", "token_dropout": "token_dropout"}
_USED = {*_SIZES.values(), *_NUMBERS.values(), *_FLAGS.values(), "max_position_embeddings", "position_embedding_type"}

_OFFSET = "position_offset"
"""Our own key in exported files: number of unused rows at the top of the position table, even if they are zeros."""

_HARMLESS = frozenset(
    (
        # origin, and dtype to load as; the weight files determine the dtype
        "_name_or_path", "name_or_path", "_commit_hash", "transformers_version", "torch_dtype", "dtype", "use_bfloat16",
        # outputs of a call, and choice of kernels
        "use_cache", "return_dict", "output_attentions", "output_hidden_states", "torchscript", "tf_legacy_loss",
        "chunk_size_feed_forward", "gradient_checkpointing", "attn_implementation", "_attn_implementation",
        "_attn_implementation_autoset",
        # heads for other tasks
        "classifier_dropout", "id2label", "label2id", "num_labels", "problem_type", "finetuning_task",
        "task_specific_params", "tokenizer_class",
        # text generation
        "max_length", "min_length", "do_sample", "early_stopping", "num_beams", "num_beam_groups", "diversity_penalty",
        "temperature", "top_k", "top_p", "typical_p", "repetition_penalty", "length_penalty", "no_repeat_ngram_size",
        "encoder_no_repeat_ngram_size", "bad_words_ids", "num_return_sequences", "output_scores",
        "return_dict_in_generate", "forced_bos_token_id", "forced_eos_token_id", "remove_invalid_values",
        "exponential_decay_length_penalty", "suppress_tokens", "begin_suppress_tokens", "decoder_start_token_id",
        "prefix",
    )
)  # fmt: skip


@dataclass(frozen=True)
class _Fixed:
    """The permitted values of a key (None: null), and the reason to refuse any other."""

    values: tuple[Any, ...]
    why: str


_NO_DECODER = "our encoder is no decoder and attends to nothing but the sequence"
_ROTATION = "our rotary positions turn by 10000^(-2i / head size), without scaling"
_ALPHABET = f"ESM's alphabet of {VOCABULARY_SIZE} tokens has another there"
_FOLDING = "ESMFold is another model; take its language model, facebook/esm2_t36_3B_UR50D"
_FIXED = {
    "auto_map": _Fixed((None, {}), "code that comes with a model is never run; take a model that needs none"),
    "quantization_config": _Fixed((None,), "quantized weights cannot be taken in; take the model they were made from"),
    "is_folding_model": _Fixed((None, False), _FOLDING),
    "esmfold_config": _Fixed((None, {}), _FOLDING),
    "vocab_size": _Fixed(
        (VOCABULARY_SIZE,),
        f"ESM's alphabet of proteins has {VOCABULARY_SIZE} tokens; Nucleotide Transformer, for one, reads DNA with the "
        "same classes and other tokens",
    ),
    "vocab_list": _Fixed((None, list(TOKENS)), _ALPHABET),
    "pad_token_id": _Fixed((PAD_ID,), _ALPHABET),
    "mask_token_id": _Fixed((MASK_ID,), _ALPHABET),
    "cls_token_id": _Fixed((None, CLS_ID), _ALPHABET),
    "bos_token_id": _Fixed((None, CLS_ID), _ALPHABET),
    "eos_token_id": _Fixed((None, EOS_ID, [EOS_ID]), _ALPHABET),
    "sep_token_id": _Fixed((None, EOS_ID), _ALPHABET),
    "unk_token_id": _Fixed((None, UNK_ID), _ALPHABET),
    "hidden_act": _Fixed((None, "gelu"), "our encoder has the exact GELU, as ESM has"),
    "rope_theta": _Fixed((None, 10000, 10000.0), _ROTATION),
    "rope_scaling": _Fixed((None, {}), _ROTATION),
    "rope_parameters": _Fixed(
        (None, {"rope_type": "default", "rope_theta": 10000.0}, {"rope_type": "default", "rope_theta": 10000}),
        _ROTATION,
    ),
    "tie_word_embeddings": _Fixed((True,), "our encoder ties its output to the word embeddings"),
    "pruned_heads": _Fixed((None, {}), "all layers of our encoder have the same number of attention heads"),
    "per_layer_config": _Fixed((None, {}), "all layers of our encoder are alike"),
    "is_decoder": _Fixed((None, False), _NO_DECODER),
    "is_encoder_decoder": _Fixed((None, False), _NO_DECODER),
    "add_cross_attention": _Fixed((None, False), _NO_DECODER),
    "cross_attention_hidden_size": _Fixed((None,), _NO_DECODER),
    "tie_encoder_decoder": _Fixed((None, False), _NO_DECODER),
}
_NEEDED = ("vocab_size", "pad_token_id", "mask_token_id")
_OTHER_TYPES = {
    "nv_esm": "NVIDIA's copies of ESM-2 have layouts of their own; take facebook/esm2_* or export with NVIDIA's script",
    "esmplusplus": "ESM++ is ESM Cambrian, which is built otherwise",
    "esmc": "ESM Cambrian is built otherwise",
    "t5": "ProtT5 and its like are built otherwise",
    "bert": "ProtBert and its like are built otherwise, and have another alphabet",
}


@dataclass(frozen=True)
class HuggingFaceConfig:
    """Relevant content of `config.json`."""

    encoder: EncoderConfig
    transformers_version: str | None  # that wrote the file
    notes: tuple[str, ...] = ()  # assumptions, as messages for the user


def read_config(folder: Path) -> HuggingFaceConfig:
    """Read the encoder's configuration from `config.json` and `vocab.txt`; dropout is that of the file.

    Without `vocab.txt`, `tokenizer.json` defines the alphabet. Without both, the ids in `config.json` define it, with a
    note. Raises `InterchangeError`, naming file, key and value, for a model that our encoder cannot represent.
    """
    path = folder / CONFIG
    values = read_json(path)
    if not isinstance(values, dict):
        raise InterchangeError(f"{path}: is not a mapping of settings; is it the config.json of a model?")
    _check_kind(path, values)
    _check_keys(path, values)
    version = values.get("transformers_version")
    if version is not None and not (isinstance(version, str) and re.fullmatch(r"[\w.+-]{1,40}", version)):
        raise InterchangeError(f"{path}: transformers_version is {quoted(version)}; that is no version")
    config = _encoder(path, values)
    is_known = _check_vocabulary(folder) or values.get("vocab_list") is not None
    assumed = f"taken for granted: the alphabet is ESM's, as neither {VOCABULARY} nor {TOKENIZER} is there to tell"
    return HuggingFaceConfig(config, version, () if is_known else (assumed,))


def read_json(path: Path) -> Any:
    """Read a small JSON file. Raises `InterchangeError` for a missing, large, ambiguous or invalid file."""
    content = _small_file(path)
    try:
        return parse_json(content)
    except ValueError as error:
        raise InterchangeError(f"{path}: is no proper JSON ({error}); copy or download it again") from error


def _small_file(path: Path) -> bytes:
    if not path.is_file():
        raise InterchangeError(f"{path}: no such file; give the folder of a model, as `save_pretrained` writes it")
    with readable(path), path.open("rb") as stream:
        content = stream.read(_LARGEST_TEXT + 1)
    if len(content) > _LARGEST_TEXT:
        raise InterchangeError(f"{path}: is longer than {_LARGEST_TEXT:,} bytes; refused, it is not what its name says")
    return content


def _check_kind(path: Path, values: Mapping[str, Any]) -> None:
    """Raise for a model other than ESM, before the other keys are checked."""
    kind = values.get("model_type")
    if kind != "esm":
        hint = _OTHER_TYPES.get(kind.lower() if isinstance(kind, str) else "")
        raise InterchangeError(
            f"{path}: model_type is {_shown(kind)}; those of type 'esm' can be taken in, which are "
            f"ESM-1b, ESM-1v and ESM-2{'. ' + hint if hint else ''}"
        )
    if (architectures := values.get("architectures")) in (None, [], [ARCHITECTURE]):
        return  # without the key, the tensors determine it
    why = f"only {ARCHITECTURE} can be taken in"
    if architectures == ["EsmModel"]:
        why += ", and an EsmModel is one without its output head (lm_head); take the model that it was made from"
    elif architectures in (["EsmForSequenceClassification"], ["EsmForTokenClassification"]):
        why += (
            ". Heads for other tasks are not, and it was saved without its output head (lm_head); take the "
            f"{ARCHITECTURE} that it was fine-tuned from"
        )
    raise InterchangeError(f"{path}: architectures is {_shown(architectures)}; {why}")


def _check_keys(path: Path, values: Mapping[str, Any]) -> None:
    for key, fixed in _FIXED.items():
        if key in values and not any(_same(values[key], value) for value in fixed.values):
            raise InterchangeError(f"{path}: {key} is {_shown(values[key])}; {fixed.why}")
    for key in _NEEDED:
        if key not in values:
            raise _missing(path, key)
    known = {"model_type", "architectures", *_FIXED, *_USED, _OFFSET} | _HARMLESS
    for key, value in values.items():
        if key not in known and value is not None:
            raise InterchangeError(
                f"{path}: {quoted(key)} is {_shown(value)}, and it is not known what that means for the model; remove "
                "the key if it means nothing for what the model computes"
            )


def _same(value: Any, expected: Any) -> bool:
    """Return whether two values are equal and of the same type; true does not equal 1."""
    return type(value) is type(expected) and bool(value == expected)


def _shown(value: Any) -> str:
    """Return a value as JSON, without control characters."""
    return quoted(value) if isinstance(value, str) else quoted(json.dumps(value))[1:-1]


def _missing(path: Path, key: str) -> InterchangeError:
    return InterchangeError(f"{path}: {key} is missing; the file is not whole, copy or download it again")


def _encoder(path: Path, values: Mapping[str, Any]) -> EncoderConfig:
    for key in sorted(_USED):
        if key not in values:
            raise _missing(path, key)
    kind = values["position_embedding_type"]
    if not isinstance(kind, str) or kind not in _POSITIONS:
        raise InterchangeError(
            f"{path}: position_embedding_type is {_shown(kind)}; our encoder has learned positions ('absolute') and "
            "'rotary' ones"
        )
    sizes = {ours: _count(path, key, values[key]) for ours, key in _SIZES.items()}
    numbers = {ours: _number(path, key, values[key]) for ours, key in _NUMBERS.items()}
    flags = {ours: _flag(path, key, values[key]) for ours, key in _FLAGS.items()}
    positions = _count(path, "max_position_embeddings", values["max_position_embeddings"])
    offset = {} if values.get(_OFFSET) is None else {_OFFSET: _count(path, _OFFSET, values[_OFFSET])}
    try:
        return EncoderConfig.from_config(
            {
                **sizes,
                **numbers,
                **flags,
                **offset,
                "seq_length": positions - UNUSED_POSITIONS,
                "position_embedding": _POSITIONS[kind],
            }
        )
    except ConfigError as error:
        raise InterchangeError(f"{path}: in our terms, {error}") from error


def _count(path: Path, key: str, value: Any) -> int:
    if type(value) is not int or not 1 <= value < _LARGEST_NUMBER:
        raise InterchangeError(f"{path}: {key} is {_shown(value)}; it must be an integer from 1 to {_LARGEST_NUMBER:,}")
    return value


def _number(path: Path, key: str, value: Any) -> float:
    if type(value) not in (int, float) or not math.isfinite(value):
        raise InterchangeError(f"{path}: {key} is {_shown(value)}; it must be a number")
    return float(value)


def _flag(path: Path, key: str, value: Any) -> bool:
    if value is not None and not isinstance(value, bool):
        raise InterchangeError(f"{path}: {key} is {_shown(value)}; it must be true or false")
    return bool(value)  # Transformers reads null as false


def _check_vocabulary(folder: Path) -> bool:
    """Return whether the folder has a vocabulary. Raises if it is not our alphabet in our order."""
    if (path := folder / VOCABULARY).exists():
        _check_alphabet(path, _listed_tokens(path))
    elif (path := folder / TOKENIZER).exists():
        _check_alphabet(path, _tokens_of_tokenizer(path))
    else:
        return False
    return True


def _listed_tokens(path: Path) -> list[str | None]:
    """Return the tokens of a `vocab.txt`, one a line."""
    try:
        return [line.strip() for line in _small_file(path).decode("utf-8").splitlines()]
    except UnicodeDecodeError as error:
        raise InterchangeError(f"{path}: is no text ({error.reason}); copy or download it again") from error


def _tokens_of_tokenizer(path: Path) -> list[str | None]:
    """Return the tokens of a `tokenizer.json` by id; None for an id of ESM's alphabet without a token.

    `model.vocab` maps tokens to ids, or lists tokens with scores; `added_tokens` may override some ids.
    """
    values = read_json(path)
    vocabulary = _at(_at(values, "model"), "vocab")
    if isinstance(vocabulary, dict):
        placed = list(vocabulary.items())
    elif isinstance(vocabulary, list):
        placed = [(entry[0] if isinstance(entry, list) and entry else entry, i) for i, entry in enumerate(vocabulary)]
    else:
        raise InterchangeError(f"{path}: has no model.vocab, by which tokens are known; copy or download it again")
    added = _at(values, "added_tokens")
    placed += [(_at(entry, "content"), _at(entry, "id")) for entry in added] if isinstance(added, list) else []
    tokens: dict[int, str] = {}
    for token, number in placed:
        if type(number) is not int or not isinstance(token, str):
            raise InterchangeError(
                f"{path}: token {_shown(token)} has the id {_shown(number)}; that is no vocabulary, copy or download "
                "it again"
            )
        tokens[number] = token
    others = [tokens[number] for number in sorted(tokens.keys() - range(VOCABULARY_SIZE))]
    return [*map(tokens.get, range(VOCABULARY_SIZE)), *others]


def _at(value: Any, key: str) -> Any:
    return value.get(key) if isinstance(value, dict) else None


def _check_alphabet(path: Path, tokens: Sequence[str | None]) -> None:
    """Raise, naming the first differing token, if these tokens are not our alphabet in our order."""
    for index in range(max(len(tokens), VOCABULARY_SIZE)):
        token = tokens[index] if index < len(tokens) else None
        here = TOKENS[index] if index < VOCABULARY_SIZE else None
        if token is None or token != here:
            there = "missing" if token is None else quoted(token)
            raise InterchangeError(
                f"{path}: token {index} is {there}, in ESM's alphabet it is {quoted(here) if here else 'none'}; a "
                "model with other tokens cannot be taken in. If it was trained with ESM's, put the vocab.txt of "
                "facebook/esm2_t6_8M_UR50D in the folder instead"
            )


SAFETENSORS, PICKLE = "model.safetensors", "pytorch_model.bin"
INDEX_SUFFIX = ".index.json"
_WEIGHTS = ("model*.safetensors", "pytorch_model*.bin", "adapter_model.*", "tf_model*.h5", "flax_model*.msgpack")
_PICKLE_PROTOCOLS = tuple(bytes([0x80, protocol]) for protocol in range(2, 6))


@dataclass(frozen=True)
class _Weights:
    """Weight files to read, and with an index the names of the tensors in each file."""

    files: tuple[Path, ...]
    index: Path | None = None
    names: Mapping[str, frozenset[str]] | None = None  # by file name


def read_hugging_face(
    folder: Path,
    *,
    source: str | None = None,
    revision: str | None = None,
    advance: Callable[[int], None] = lambda count: None,
) -> SourceModel:
    """Read an ESM from a folder written by `EsmForMaskedLM.save_pretrained` of any version of Transformers.

    `source` and `revision` name the origin of the folder in the provenance (default: the folder's name). `advance` is
    called with the number of bytes of each hashed block.

    Raises `InterchangeError`, `PickleError` or `ArchiveError`, naming the file and the key or tensor, for a
    configuration that our encoder cannot represent, for missing or truncated files or files of another format, and for
    an index that does not match them. `state_dict_adapter.to_native` checks the set of tensors.
    """
    if not folder.is_dir():
        raise InterchangeError(f"{folder}: no such folder; give one with config.json and model.safetensors in it")
    config = read_config(folder)
    weights, notes = _find_weights(folder)
    tables = [_open(file) for file in weights.files]
    _check_against_index(weights, tables)
    tensors = SourceTensors.of(str(folder), tables, HUGGING_FACE)
    _check_plausible(folder, tensors, config)
    provenance = _provenance(
        source or folder.resolve().name, revision, config, [folder / CONFIG, *_read(weights)], advance
    )
    origin = {"imported_from": provenance}
    return SourceModel(HUGGING_FACE, config.encoder, tensors, origin, (*config.notes, *notes))


# --- weight files -----------------------------------------------------------------------------------------------------


def _find_weights(folder: Path) -> tuple[_Weights, tuple[str, ...]]:
    """Return the weight files to read (safetensors if there are any), and a note on each ignored file."""
    for name in (SAFETENSORS, PICKLE):
        single, index = folder / name, folder / f"{name}{INDEX_SUFFIX}"
        if _is_there(single) and _is_there(index):
            raise InterchangeError(
                f"{folder}: has both {single.name} and {index.name}, and they may be two models; move away the one "
                "that is not meant"
            )
        if _is_there(single):
            return _with_notes(folder, _Weights((_regular(single),)))
        if _is_there(index):
            return _with_notes(folder, _indexed(index))
    raise _nothing_found(folder)


def _is_there(path: Path) -> bool:
    return path.exists() or path.is_symlink()  # a dangling link is a broken download, not a missing file


def _regular(path: Path, index: Path | None = None) -> Path:
    if path.is_file():
        return path
    fault = "is not a file" if path.exists() else "is a link to nothing" if path.is_symlink() else "no such file"
    by = f", which {index.name} names" if index else ""
    raise InterchangeError(f"{path}: {fault}{by}; copy or download it again")


def _indexed(index: Path) -> _Weights:
    """Return the shards of an index, sorted by name."""
    values = read_json(index)
    placed = values.get("weight_map") if isinstance(values, dict) else None
    if not isinstance(placed, dict) or not placed or not all(isinstance(file, str) for file in placed.values()):
        raise InterchangeError(f"{index}: has no weight_map from tensors to files; copy or download it again")
    suffix = PurePosixPath(index.name.removesuffix(INDEX_SUFFIX)).suffix
    names: dict[str, set[str]] = {}
    for tensor, file in placed.items():
        if "/" in file or "\\" in file or "\0" in file or not file.endswith(suffix) or file == suffix:
            raise InterchangeError(
                f"{index}: gives tensor {quoted(tensor)} to {quoted(file)}; a shard lies beside its index and is named "
                f"like {index.name.removesuffix(suffix + INDEX_SUFFIX)}-00001-of-00002{suffix}"
            )
        names.setdefault(file, set()).add(tensor)
    files = tuple(_regular(index.parent / file, index) for file in sorted(names))
    return _Weights(files, index, {file: frozenset(tensors) for file, tensors in names.items()})


def _with_notes(folder: Path, weights: _Weights) -> tuple[_Weights, tuple[str, ...]]:
    others = _weight_files(folder) - {file.name for file in weights.files}
    leader = weights.index or weights.files[0]
    return weights, tuple(f"left aside: {quoted(name)}, as {leader.name} is read" for name in sorted(others))


def _weight_files(folder: Path) -> set[str]:
    with readable(folder):
        return {path.name for pattern in _WEIGHTS for path in folder.glob(pattern)}


def _nothing_found(folder: Path) -> InterchangeError:
    there = sorted(_weight_files(folder))
    why = f"neither {SAFETENSORS} nor {PICKLE} is there, nor an index of shards"
    if any(name.startswith("adapter_model") for name in there):
        why = (
            f"{there[0]} is an adapter, not a model; merge it into its model with `merge_and_unload` of peft, and save"
        )
    elif any(name.startswith(("tf_model", "flax_model")) for name in there):
        why = f"{there[0]} is not for PyTorch; load it with transformers once (from_tf or from_flax) and save it again"
    elif there:
        why += f", only {', '.join(map(quoted, there[:3]))}: give it the usual name, or copy the index as well"
    return InterchangeError(f"{folder}: {why}")


# --- contents of weight files -----------------------------------------------------------------------------------------


def _open(file: Path) -> TensorTable:
    """Open the tensors of a file. Raises `InterchangeError` or `PickleError` if content and suffix differ."""
    if file.suffix == ".bin":
        return _unpickled(file)
    with readable(file), file.open("rb") as stream:
        beginning = stream.read(64)
        size = file.stat().st_size
    try:
        return TensorTable.open(file, "it", Section(0, size))  # messages then name the file only once
    except ArchiveError as error:
        why = _disguise(beginning)
        if why is None:
            raise InterchangeError(f"{error}. It may be cut short; copy or download it again") from error
        raise InterchangeError(f"{file}: {why}") from error


def _disguise(beginning: bytes) -> str | None:
    """Return the actual format of a file that is not safetensors, and the remedy; None if unknown."""
    if not beginning:
        return "is empty; copy or download it again"
    if beginning.startswith(LFS_POINTER):
        return "is a pointer of Git LFS and not the file itself; fetch it with `git lfs pull`"
    if beginning.startswith((b"PK\x03\x04", *_PICKLE_PROTOCOLS)):
        return (
            f"is a pickle by PyTorch and not safetensors; ask its author for safetensors, or name it {PICKLE} to have "
            "it opened with the care that pickles need"
        )
    if beginning.lstrip().lower().startswith((b"<!doctype", b"<html")):
        return "is a web page and not safetensors; the download went wrong, try again"
    return None


def _unpickled(file: Path) -> TensorTable:
    table, others = read_pickle(file)
    if others:
        name, value = next(iter(others.items()))
        raise InterchangeError(
            f"{file}: {quoted(name)} is no tensor but {quoted(value)}; a state dict with tensors and nothing else is "
            "expected, as save_pretrained writes it"
        )
    return table


def _check_against_index(weights: _Weights, tables: list[TensorTable]) -> None:
    """Check that each shard holds the tensors that the index assigns to it. Detects shards of another model or save."""
    if weights.names is None or weights.index is None:
        return
    for file, table in zip(weights.files, tables, strict=True):
        expected = weights.names[file.name]
        for name in sorted(expected ^ table.infos.keys()):
            fault = "does not hold" if name in expected else "holds"
            but = "gives to it" if name in expected else "does not give to it"
            raise InterchangeError(
                f"{file}: {fault} tensor {quoted(name)}, which {weights.index.name} {but}; they are not of one model, "
                "copy or download both again"
            )


def _check_plausible(folder: Path, tensors: SourceTensors, config: HuggingFaceConfig) -> None:
    """Check what has a clearer message here than in the check of all tensors, or would make that check very slow."""
    if not any(name.startswith("lm_head.") for name in tensors.places):
        raise InterchangeError(
            f"{folder}: the weights have no output head (lm_head), so they are of an EsmModel, or of a model for "
            "another task; take the EsmForMaskedLM that it was made from"
        )
    declared, found = config.encoder.num_layers, tensors.layers(HUGGING_FACE)
    if declared != found:
        raise InterchangeError(
            f"{folder / CONFIG}: num_hidden_layers is {declared:,}, but the weights are of {found:,} layers; they do "
            "not belong together, copy or download both again"
        )


# --- provenance -------------------------------------------------------------------------------------------------------


def _read(weights: _Weights) -> list[Path]:
    return [*([weights.index] if weights.index else []), *weights.files]


def _provenance(
    source: str,
    revision: str | None,
    config: HuggingFaceConfig,
    files: list[Path],
    advance: Callable[[int], None],
) -> dict[str, Any]:
    """Return source, revision, versions and the SHA-256 of each file, as plain values."""
    return {
        "format": "Hugging Face",
        "source": source,
        "revision": revision,
        "transformers_version": config.transformers_version,
        "sha256": {file.name: hash_section(file, Section(0, _size(file)), advance)["sha256"] for file in files},
    }


def _size(file: Path) -> int:
    with readable(file):
        return file.stat().st_size
