"""Reading `config.json` of a Hugging Face ESM: every key is applied or refused with its name."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pytest
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from transformers import EsmConfig

from bionemo_esm.alphabet import TOKENS
from bionemo_esm.model.config import EncoderConfig
from bionemo_esm.model.interchange.huggingface import read_config
from bionemo_esm.model.interchange.state_dict_adapter import InterchangeError

PUBLISHED = {  # from the Hub, written by transformers 4.2x
    "architectures": ["EsmForMaskedLM"],
    "classifier_dropout": None,
    "esmfold_config": None,
    "hidden_act": "gelu",
    "initializer_range": 0.02,
    "is_folding_model": False,
    "layer_norm_eps": 1e-05,
    "mask_token_id": 32,
    "max_position_embeddings": 1026,
    "model_type": "esm",
    "pad_token_id": 1,
    "token_dropout": True,
    "torch_dtype": "float32",
    "transformers_version": "4.25.0.dev0",
    "use_cache": True,
    "vocab_list": None,
    "vocab_size": 33,
}


@pytest.mark.parametrize(
    ("published", "expected"),
    [
        (
            {"position_embedding_type": "absolute", "emb_layer_norm_before": True, "num_hidden_layers": 33}
            | {"num_attention_heads": 20, "hidden_size": 1280, "intermediate_size": 5120}
            | {"hidden_dropout_prob": 0.1, "attention_probs_dropout_prob": 0.1},
            EncoderConfig(
                num_layers=33,
                hidden_size=1280,
                num_attention_heads=20,
                ffn_hidden_size=5120,
                seq_length=1024,
                hidden_dropout=0.1,
                attention_dropout=0.1,
                embedding_layernorm=True,
                token_dropout=True,
            ),
        ),
        (
            {"position_embedding_type": "absolute", "emb_layer_norm_before": False, "num_hidden_layers": 33}
            | {"num_attention_heads": 20, "hidden_size": 1280, "intermediate_size": 5120}
            | {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0},
            EncoderConfig(
                num_layers=33,
                hidden_size=1280,
                num_attention_heads=20,
                ffn_hidden_size=5120,
                seq_length=1024,
                hidden_dropout=0.0,
                attention_dropout=0.0,
                token_dropout=True,
            ),
        ),
        (
            {"position_embedding_type": "rotary", "emb_layer_norm_before": False, "num_hidden_layers": 6}
            | {"num_attention_heads": 20, "hidden_size": 320, "intermediate_size": 1280}
            | {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0},
            EncoderConfig(
                num_layers=6,
                hidden_size=320,
                num_attention_heads=20,
                ffn_hidden_size=1280,
                seq_length=1024,
                hidden_dropout=0.0,
                attention_dropout=0.0,
                token_dropout=True,
                position_embedding="rotary",
            ),
        ),
    ],
    ids=["facebook/esm1b_t33_650M_UR50S", "facebook/esm1v_t33_650M_UR90S_1", "facebook/esm2_t6_8M_UR50D"],
)
def test_published_configurations_are_read(tmp_path: Path, published: dict[str, Any], expected: EncoderConfig) -> None:
    (tmp_path / "config.json").write_text(json.dumps(PUBLISHED | published))
    (tmp_path / "vocab.txt").write_text("\n".join(TOKENS))
    found = read_config(tmp_path)
    assert found.encoder == expected
    assert found.transformers_version == "4.25.0.dev0"


@pytest.fixture
def values(tmp_path: Path) -> dict[str, Any]:
    """Return a valid configuration of a small ESM-1b, written by the installed transformers."""
    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 64}
    ids = {"vocab_size": 33, "mask_token_id": 32, "pad_token_id": 1, "layer_norm_eps": 1e-5}
    config = EsmConfig(**sizes, **ids, emb_layer_norm_before=True, architectures=["EsmForMaskedLM"])
    config.save_pretrained(tmp_path)
    assert read_config(tmp_path).encoder == EncoderConfig(
        num_layers=2,
        hidden_size=32,
        num_attention_heads=4,
        ffn_hidden_size=64,
        seq_length=1024,
        embedding_layernorm=True,
    )
    written: dict[str, Any] = json.loads((tmp_path / "config.json").read_text())
    return written


ABSENT = object()
CONFIGURATIONS: dict[str, tuple[dict[str, Any], tuple[str, ...]]] = {
    "BERT": ({"model_type": "bert", "architectures": ["BertForMaskedLM"]}, ("'bert'", "ESM-1b, ESM-1v and ESM-2")),
    "T5": ({"model_type": "t5"}, ("model_type is 't5'", "ProtT5")),
    "NVIDIA's own ESM": ({"model_type": "nv_esm"}, ("'nv_esm'", "facebook/esm2_*")),
    "ESM++": ({"model_type": "ESMplusplus"}, ("'ESMplusplus'", "Cambrian")),
    "no type at all": ({"model_type": ABSENT}, ("model_type is null",)),
    "a type that is no text": ({"model_type": ["esm"]}, ('model_type is ["esm"]',)),
    "without output head": ({"architectures": ["EsmModel"]}, ('["EsmModel"]', "lm_head")),
    "classifier": (
        {"architectures": ["EsmForSequenceClassification"]},
        ("only EsmForMaskedLM", "lm_head", "it was fine-tuned from"),
    ),
    "tagger": ({"architectures": ["EsmForTokenClassification"]}, ("lm_head", "it was fine-tuned from")),
    "two architectures": ({"architectures": ["EsmForMaskedLM", "EsmModel"]}, ("architectures",)),
    "ESMFold": ({"is_folding_model": True}, ("is_folding_model is true", "esm2_t36_3B")),
    "folding configuration": ({"esmfold_config": {"trunk": {}}}, ("esmfold_config", "ESMFold")),
    "remote code": ({"auto_map": {"AutoModel": "evil.Model"}}, ("auto_map", "never run")),
    "quantized": ({"quantization_config": {"load_in_8bit": True}}, ("quantization_config", "quantized")),
    "relative positions": ({"position_embedding_type": "relative_key"}, ("'relative_key'", "'absolute'")),
    "relative query positions": ({"position_embedding_type": "relative_key_query"}, ("'relative_key_query'",)),
    "Nucleotide Transformer": ({"vocab_size": 4105}, ("vocab_size is 4105", "Nucleotide")),
    "padding id": ({"pad_token_id": 0}, ("pad_token_id is 0",)),
    "padding id true": ({"pad_token_id": True}, ("pad_token_id is true",)),
    "mask id": ({"mask_token_id": None}, ("mask_token_id is null",)),
    "end id": ({"eos_token_id": 3}, ("eos_token_id is 3",)),
    "another activation": ({"hidden_act": "gelu_new"}, ("hidden_act is 'gelu_new'",)),
    "another rotation": ({"rope_theta": 500000.0}, ("rope_theta is 500000.0",)),
    "scaled rotation": ({"rope_scaling": {"type": "linear", "factor": 2.0}}, ("rope_scaling",)),
    "nested rotation": ({"rope_parameters": {"rope_type": "yarn", "rope_theta": 10000.0}}, ("rope_parameters",)),
    "untied output": ({"tie_word_embeddings": False}, ("tie_word_embeddings is false",)),
    "decoder": ({"is_decoder": True}, ("is_decoder is true",)),
    "cross attention": ({"add_cross_attention": True}, ("add_cross_attention is true",)),
    "pruned heads": ({"pruned_heads": {"1": [0]}}, ("pruned_heads",)),
    "layers of several kinds": ({"per_layer_config": {"1": {"hidden_size": 8}}}, ("per_layer_config",)),
    "another alphabet": ({"vocab_list": [*TOKENS[1:], "J"]}, ("vocab_list",)),
    "unknown key": ({"use_bias": False}, ("'use_bias' is false", "remove the key")),
    "key for terminals": ({"\x1b[2J": 1}, ("'\\x1b[2J'",)),
    "missing size": ({"num_attention_heads": ABSENT}, ("num_attention_heads is missing",)),
    "missing alphabet": ({"vocab_size": ABSENT}, ("vocab_size is missing",)),
    "missing epsilon": ({"layer_norm_eps": ABSENT}, ("layer_norm_eps is missing",)),
    "size in words": ({"hidden_size": "32"}, ("hidden_size is '32'",)),
    "size with a fraction": ({"hidden_size": 32.5}, ("hidden_size is 32.5",)),
    "no layers": ({"num_hidden_layers": 0}, ("num_hidden_layers is 0",)),
    "layers without end": ({"num_hidden_layers": 10**30}, ("num_hidden_layers",)),
    "heads that do not divide": ({"num_attention_heads": 5}, ("config.json", "not divisible")),
    "no positions": ({"max_position_embeddings": 2}, ("config.json", "seq_length")),
    "epsilon that is none": ({"layer_norm_eps": float("nan")}, ("layer_norm_eps is NaN",)),
    "epsilon of zero": ({"layer_norm_eps": 0}, ("layernorm_epsilon must be positive",)),
    "dropout of everything": ({"hidden_dropout_prob": 1.0}, ("hidden_dropout",)),
    "flag that is none": ({"token_dropout": "yes"}, ("token_dropout is 'yes'",)),
    "version that is none": ({"transformers_version": "${oc.env:HOME}"}, ("transformers_version",)),
}


@pytest.mark.parametrize("name", CONFIGURATIONS)
def test_an_unsupported_configuration_is_refused_with_its_key(
    tmp_path: Path, values: dict[str, Any], name: str
) -> None:
    changes, parts = CONFIGURATIONS[name]
    kept = {key: value for key, value in (values | changes).items() if value is not ABSENT}
    (tmp_path / "config.json").write_text(json.dumps(kept))
    with pytest.raises(InterchangeError) as caught:
        read_config(tmp_path)
    message = str(caught.value)
    assert "\n" not in message
    assert all(part in message for part in (str(tmp_path / "config.json"), *parts)), message


@pytest.mark.parametrize(
    "changes",
    [
        {"key_of_a_later_version": None},
        {"_name_or_path": "x", "id2label": {"0": "A"}, "tokenizer_class": "EsmTokenizer", "dtype": "bfloat16"},
        {"architectures": ABSENT},
        {"rope_theta": ABSENT, "tie_word_embeddings": ABSENT, "is_decoder": ABSENT},
        {"rope_parameters": {"rope_theta": 10000.0, "rope_type": "default"}, "rope_theta": 10000},
        {"hidden_act": "gelu", "cls_token_id": 0, "bos_token_id": 0, "eos_token_id": [2]},
        {"vocab_list": list(TOKENS), "pruned_heads": {}, "chunk_size_feed_forward": 4},
    ],
    ids=["null", "about the file", "no architecture", "older", "newer", "as ours", "empty"],
)
def test_keys_without_effect_are_accepted(tmp_path: Path, values: dict[str, Any], changes: dict[str, Any]) -> None:
    (tmp_path / "vocab.txt").write_text("\n".join(TOKENS))
    before = read_config(tmp_path)
    kept = {key: value for key, value in (values | changes).items() if value is not ABSENT}
    (tmp_path / "config.json").write_text(json.dumps(kept))
    assert read_config(tmp_path) == before


# --- the alphabet -----------------------------------------------------------------------------------------------------


def tokenizer(folder: Path, tokens: Iterable[str], special: tuple[str, ...] = ()) -> None:
    """Write tokenizer.json as the library does, without vocab.txt."""
    made = Tokenizer(WordLevel({token: index for index, token in enumerate(tokens)}, unk_token="<unk>"))
    made.add_special_tokens(list(special))
    made.save(str(folder / "tokenizer.json"))


@pytest.mark.usefixtures("values")
def test_a_folder_without_an_alphabet_is_accepted_with_a_note(tmp_path: Path) -> None:
    (note,) = read_config(tmp_path).notes
    assert note.startswith("taken for granted: the alphabet is ESM's, as neither vocab.txt nor tokenizer.json")
    tokenizer(tmp_path, TOKENS)
    assert read_config(tmp_path).notes == ()
    (tmp_path / "tokenizer.json").unlink()
    (tmp_path / "vocab.txt").write_text("\n".join(TOKENS))
    assert read_config(tmp_path).notes == ()


def test_an_alphabet_in_the_configuration_gives_no_note(tmp_path: Path, values: dict[str, Any]) -> None:
    (tmp_path / "config.json").write_text(json.dumps(values | {"vocab_list": list(TOKENS)}))
    assert read_config(tmp_path).notes == ()


@pytest.mark.usefixtures("values")
@pytest.mark.parametrize(
    ("tokens", "special", "part"),
    [
        (("<pad>", "<cls>", *TOKENS[2:]), (), "token 0 is '<pad>', in ESM's alphabet it is '<cls>'"),
        (TOKENS[:-1], (), "token 32 is missing, in ESM's alphabet it is '<mask>'"),
        ((*TOKENS, "J"), (), "token 33 is 'J', in ESM's alphabet it is 'none'"),
        (TOKENS, ("|",), "token 33 is '|'"),
        (TOKENS[:-1], ("|",), "token 32 is '|'"),
    ],
    ids=["another order", "one short", "one more", "one added", "another added"],
)
def test_without_vocab_txt_the_tokenizer_must_have_our_alphabet(
    tmp_path: Path, tokens: tuple[str, ...], special: tuple[str, ...], part: str
) -> None:
    tokenizer(tmp_path, tokens, special)
    with pytest.raises(InterchangeError) as caught:
        read_config(tmp_path)
    for wanted in (
        f"{tmp_path / 'tokenizer.json'}: ",
        part.replace("'none'", "none"),
        "put the vocab.txt of facebook/",
    ):
        assert wanted in str(caught.value)


@pytest.mark.usefixtures("values")
def test_special_tokens_may_be_listed_outside_the_vocabulary(tmp_path: Path) -> None:
    tokenizer(tmp_path, TOKENS[:-1], ("<cls>", "<mask>"))
    assert read_config(tmp_path).notes == ()
    made = json.loads((tmp_path / "tokenizer.json").read_text())
    made["model"]["vocab"] = [[token, 0.0] for token in TOKENS[:-1]]  # the form of models with scores
    (tmp_path / "tokenizer.json").write_text(json.dumps(made))
    assert read_config(tmp_path).notes == ()


ODD_TOKENIZERS: dict[str, Any] = {
    "a list": [],
    "no model": {"model": None},
    "a vocabulary that is none": {"model": {"vocab": "L A G"}},
    "ids that are none": {"model": {"vocab": {token: str(index) for index, token in enumerate(TOKENS)}}},
    "tokens that are none": {"model": {"vocab": [[[token]] for token in TOKENS]}},
    "added ids that are none": {"model": {"vocab": list(TOKENS)}, "added_tokens": [{"content": "<cls>", "id": None}]},
    "added tokens that are none": {"model": {"vocab": list(TOKENS)}, "added_tokens": ["<cls>"]},
}


@pytest.mark.usefixtures("values")
@pytest.mark.parametrize("name", ODD_TOKENIZERS)
def test_a_tokenizer_without_a_vocabulary_is_refused(tmp_path: Path, name: str) -> None:
    (tmp_path / "tokenizer.json").write_text(json.dumps(ODD_TOKENIZERS[name]))
    with pytest.raises(InterchangeError, match=r"tokenizer\.json: .*copy or download it again"):
        read_config(tmp_path)


def test_null_flags_are_off_as_in_transformers(tmp_path: Path, values: dict[str, Any]) -> None:
    (tmp_path / "config.json").write_text(json.dumps(values | {"emb_layer_norm_before": None, "token_dropout": None}))
    found = read_config(tmp_path).encoder
    assert (found.embedding_layernorm, found.token_dropout) == (False, False)
