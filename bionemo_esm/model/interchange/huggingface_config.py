"""`config.json` and the vocabulary of a Hugging Face ESM: what they say of our encoder, and a refusal of anything else.

Every key is used, or compared with what our encoder does, or known to leave what the model computes alone; any other is
an error that names it, unless its value is null, which is how transformers writes that a key says nothing. The keys and
their defaults: `transformers/models/esm/configuration_esm.py` and `transformers/configuration_utils.py`, 4.2x to 5.x.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bionemo_esm.alphabet import CLS_ID, EOS_ID, MASK_ID, PAD_ID, TOKENS, UNK_ID, VOCABULARY_SIZE
from bionemo_esm.errors import ConfigError
from bionemo_esm.model.config import LEARNED, ROTARY, EncoderConfig
from bionemo_esm.model.container import quoted, readable
from bionemo_esm.model.interchange.translation import UNUSED_POSITIONS, InterchangeError
from bionemo_esm.model.plain import parse_json

CONFIG, VOCABULARY, TOKENIZER = "config.json", "vocab.txt", "tokenizer.json"
ARCHITECTURE = "EsmForMaskedLM"
_LARGEST_TEXT = 2**24  # bytes of a JSON file; the index of ESM-2 15B has 2**16
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
"""A key of ours in what we export: a table begins with so many unused rows, though they are zeros."""

_HARMLESS = frozenset(
    (
        # where it comes from, and in which type it is to be loaded; the files themselves say what they hold
        "_name_or_path", "name_or_path", "_commit_hash", "transformers_version", "torch_dtype", "dtype", "use_bfloat16",
        # what a call returns, and with which kernels it is computed
        "use_cache", "return_dict", "output_attentions", "output_hidden_states", "torchscript", "tf_legacy_loss",
        "chunk_size_feed_forward", "gradient_checkpointing", "attn_implementation", "_attn_implementation",
        "_attn_implementation_autoset",
        # heads for other tasks, which `EsmForMaskedLM` does not have
        "classifier_dropout", "id2label", "label2id", "num_labels", "problem_type", "finetuning_task",
        "task_specific_params", "tokenizer_class",
        # writing text token by token, which it does not do
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
    """What a key may say, null being one of them where it is listed, and what to tell whoever says otherwise."""

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
    """What `config.json` says that matters here."""

    encoder: EncoderConfig
    transformers_version: str | None  # that wrote it
    notes: tuple[str, ...] = ()  # what was taken for granted


def read_config(folder: Path) -> HuggingFaceConfig:
    """The encoder that `config.json` and `vocab.txt` of a folder describe; its dropouts are those of the file.

    Where `vocab.txt` is missing, `tokenizer.json` answers for the alphabet; without both, the ids in `config.json` do,
    and a note says so. Raises `InterchangeError`, naming file, key and value, for a model that our encoder is not.
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
    """A small JSON file. Raises `InterchangeError` for one that is missing, large, ambiguous or none."""
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
    """Raises for another model than ESM, before its other keys are looked at: they would be strange as well."""
    kind = values.get("model_type")
    if kind != "esm":
        hint = _OTHER_TYPES.get(kind.lower() if isinstance(kind, str) else "")
        raise InterchangeError(
            f"{path}: model_type is {_shown(kind)}; those of type 'esm' can be taken in, which are "
            f"ESM-1b, ESM-1v and ESM-2{'. ' + hint if hint else ''}"
        )
    if (architectures := values.get("architectures")) in (None, [], [ARCHITECTURE]):
        return  # where it is silent, the tensors will tell
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
    """Equal, and of one type: true is not 1."""
    return type(value) is type(expected) and bool(value == expected)


def _shown(value: Any) -> str:
    """A value as the file spells it, fit for a terminal."""
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
        return EncoderConfig.from_mapping(
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
    return bool(value)  # null counts as false in transformers


def _check_vocabulary(folder: Path) -> bool:
    """Whether the folder says which tokens the model has. Raises unless they are our alphabet in our order."""
    if (path := folder / VOCABULARY).exists():
        _check_alphabet(path, _listed_tokens(path))
    elif (path := folder / TOKENIZER).exists():
        _check_alphabet(path, _tokens_of_tokenizer(path))
    else:
        return False
    return True


def _listed_tokens(path: Path) -> list[str | None]:
    """Those of a `vocab.txt`, one a line."""
    try:
        return [line.strip() for line in _small_file(path).decode("utf-8").splitlines()]
    except UnicodeDecodeError as error:
        raise InterchangeError(f"{path}: is no text ({error.reason}); copy or download it again") from error


def _tokens_of_tokenizer(path: Path) -> list[str | None]:
    """Those of a `tokenizer.json`, by id, None for an id of ESM's alphabet that no token has.

    `model.vocab` gives ids to tokens, or lists tokens with a score each; `added_tokens` may give some ids anew.
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
    """Raises, naming the first token that differs, unless these are our alphabet in our order."""
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
