"""Legacy archives: equal logits after conversion, and safe refusal of hostile files."""

from __future__ import annotations

import io
import os
import tarfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from torch import Tensor
from torch.nn.functional import gelu, layer_norm, linear

from bionemo_esm.alphabet import TOKENS
from bionemo_esm.data.collate import pack
from bionemo_esm.data.store import SequenceSplit
from bionemo_esm.errors import UserError
from bionemo_esm.model import legacy
from bionemo_esm.model.archive import read_archive
from bionemo_esm.model.esm1nv import ESM1nvModel
from bionemo_esm.model.legacy import ConversionReport, LegacyArchiveError, convert_legacy
from models import TINY, tiny_model

State = dict[str, Any]

VOCABULARY = ["<unk>", "<s>", "</s>", "<pad>", "<mask>", *"ACDEFGHIKLMNPQRSTVWYXUBZO", "\u2581"]
"""The order of BioNeMo's sentencepiece model as far as its tests show it: unknown, begin, end, pad; then letters."""
LEGACY_NAMES = {"<s>": "<cls>", "</s>": "<eos>"}
VOCAB_NAME = "0f3b_protein_sequence_sentencepiece.vocab"
CONFIG: dict[str, Any] = {
    **{key: TINY[key] for key in ("num_layers", "hidden_size", "num_attention_heads", "ffn_hidden_size")},
    "target": "os.system",
    "seq_length": 512,
    "max_position_embeddings": "${.seq_length}",
    "hidden_dropout": 0.1,
    "layernorm_epsilon": "1e-5",
    "bert_binary_head": False,
    "kv_channels": None,
    "bias_gelu_fusion": False,
    "apply_query_key_layer_scaling": True,
    "tokenizer": {"library": "sentencepiece", "vocab_file": f"nemo:{VOCAB_NAME}"},
}
NEMO_1 = {
    "self_attention.linear_qkv": "self_attention.query_key_value",
    "self_attention.linear_proj": "self_attention.dense",
    "pre_mlp_layernorm": "post_attention_layernorm",
    "mlp.linear_fc1": "mlp.dense_h_to_4h",
    "mlp.linear_fc2": "mlp.dense_4h_to_h",
}


def legacy_state(model: ESM1nvModel, vocabulary: list[str] = VOCABULARY) -> dict[str, Tensor]:
    """Return the weights under NeMo 1's names, with the vocabulary reordered and padded to 128 rows of 77."""
    ours = {name.removeprefix("encoder."): tensor.detach().clone() for name, tensor in model.named_parameters()}
    rows = [TOKENS.index(LEGACY_NAMES.get(token, token)) for token in vocabulary if token != "\u2581"]
    state = {}
    for name, tensor in ours.items():
        if name in ("embedding.word_embeddings.weight", "output_layer.bias"):
            table = torch.full_like(tensor, 77.0)
            table[: len(rows)] = tensor[rows]
            tensor = table
        if name == "output_layer.bias":
            name = "lm_head.bias"
        elif name.startswith("lm_head."):
            name = name.replace("layer_norm", "layernorm")
        else:
            for new, old in NEMO_1.items():
                name = name.replace(new, old)
            name = f"language_model.{name}"
        state[f"model.{name}"] = tensor
    return state


def nemo_1_logits(state: Mapping[str, Tensor], tokens: list[int], heads: int, thirds_first: bool = False) -> Tensor:
    """Return NeMo 1's BERT logits [T, V] of one sequence without dropout, computed from its definition."""

    def part(name: str) -> tuple[Tensor, Tensor]:
        return state[f"{name}.weight"], state[f"{name}.bias"]

    def norm(hidden: Tensor, name: str) -> Tensor:
        return layer_norm(hidden, hidden.shape[-1:], *part(name), eps=1e-5)

    words = state["model.language_model.embedding.word_embeddings.weight"]
    hidden = words[tokens] + state["model.language_model.embedding.position_embeddings.weight"][: len(tokens)]
    for number in range(2):
        layer = f"model.language_model.encoder.layers.{number}"
        mixed = linear(norm(hidden, f"{layer}.input_layernorm"), *part(f"{layer}.self_attention.query_key_value"))
        split = (
            mixed.unflatten(1, (3, heads, -1)).transpose(1, 2) if thirds_first else mixed.unflatten(1, (heads, 3, -1))
        )
        query, key, value = split.permute(2, 1, 0, 3)  # each [heads, T, head size]
        attention = (query @ key.transpose(1, 2) / query.shape[-1] ** 0.5).softmax(-1) @ value
        attended = attention.transpose(0, 1).flatten(1)
        hidden = hidden + linear(attended, *part(f"{layer}.self_attention.dense"))
        inner = linear(norm(hidden, f"{layer}.post_attention_layernorm"), *part(f"{layer}.mlp.dense_h_to_4h"))
        hidden = hidden + linear(gelu(inner), *part(f"{layer}.mlp.dense_4h_to_h"))
    hidden = norm(hidden, "model.language_model.encoder.final_layernorm")
    transformed = norm(gelu(linear(hidden, *part("model.lm_head.dense"))), "model.lm_head.layernorm")
    return linear(transformed, words, state["model.lm_head.bias"])


def pickled(state: Any) -> bytes:
    stream = io.BytesIO()
    torch.save(state, stream)
    return stream.getvalue()


def vocab_file(tokens: list[str] = VOCABULARY) -> bytes:
    return "".join(f"{token}\t{-index}\n" for index, token in enumerate(tokens)).encode()


def members(state: Any = None, config: Mapping[str, Any] | None = None) -> dict[str, bytes]:
    """Return the files of a legacy archive under NeMo 1's names."""
    return {
        f"./{VOCAB_NAME}": vocab_file(),
        "./0f3b_protein_sequence_sentencepiece.model": b"\x0a\x0e",
        "./model_config.yaml": yaml.safe_dump(CONFIG | dict(config or {})).encode(),
        "./model_weights.ckpt": state if isinstance(state, bytes) else pickled(state or {}),
    }


def packed(path: Path, files: Mapping[str, bytes], mode: str = "w") -> Path:
    with tarfile.open(path, mode) as tar:  # type: ignore[call-overload]
        folder = tarfile.TarInfo(".")
        folder.type = tarfile.DIRTYPE
        tar.addfile(folder)
        for name, content in files.items():
            info = tarfile.TarInfo(name)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
    return path


@pytest.fixture(scope="module")
def original() -> ESM1nvModel:
    return tiny_model()


@pytest.fixture(scope="module")
def state(original: ESM1nvModel) -> dict[str, Tensor]:
    return legacy_state(original)


@pytest.fixture
def convert_state(monkeypatch: pytest.MonkeyPatch) -> Callable[..., ConversionReport]:
    """Return a function that converts a state dict without reading a pickle."""

    def convert(
        folder: Path, state: State, config: Mapping[str, Any] | None = None, **files: bytes
    ) -> ConversionReport:
        tensors = {name: value for name, value in state.items() if isinstance(value, Tensor)}
        others = [name for name in state if name not in tensors]
        monkeypatch.setattr(legacy, "_read_weights", lambda *_: (tensors, others))
        source = packed(folder / "legacy.nemo", members(config=config) | {f"./{VOCAB_NAME}": vocab_file()} | files)
        return convert_legacy(source, folder / "converted.nemo")

    return convert


def logits_of(archive: Path, protein: np.ndarray[Any, Any]) -> Tensor:
    model = ESM1nvModel.restore_from(str(archive), map_location="cpu")
    return model.logits(pack(protein, np.array([len(protein)]))).detach()


def translated(protein: np.ndarray[Any, Any]) -> list[int]:
    """Return a protein in the legacy vocabulary with BioNeMo's begin and end tokens."""
    return [1, *(VOCABULARY.index(TOKENS[index]) for index in protein), 2]


# --- equal logits -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("mode", "half"), [("w", False), ("w:gz", True)], ids=["plain", "gzipped-half"])
def test_the_converted_model_gives_the_logits_of_the_legacy_model(
    mode: str, half: bool, original: ESM1nvModel, state: State, tiny_split: SequenceSplit, tmp_path: Path
) -> None:
    weights: State = {name: tensor.half() if half else tensor for name, tensor in state.items()}
    weights["model.language_model.pooler.dense.weight"] = torch.zeros(32, 32)
    weights["model.layers.0._extra_state"] = {"scale": torch.ones(1)}
    source = packed(tmp_path / "esm1nv.nemo", members(weights), mode)
    report = convert_legacy(source, tmp_path / "converted.nemo")
    protein = tiny_split[3]
    converted = logits_of(tmp_path / "converted.nemo", protein)
    rows = [VOCABULARY.index({v: k for k, v in LEGACY_NAMES.items()}.get(token, token)) for token in TOKENS[:29]]
    rows.append(VOCABULARY.index("<mask>"))
    known = {name: weights[name].float() for name in state}
    expected = nemo_1_logits(known, translated(protein), heads=4)[:, rows]
    torch.testing.assert_close(converted[:, [*range(29), 32]], expected, rtol=1e-4, atol=1e-4)
    if not half:
        ours = original.logits(pack(protein, np.array([len(protein)])))
        assert torch.equal(converted[:, :29], ours[:, :29])
    assert report.parameters == sum(parameter.numel() for parameter in original.parameters())
    assert set(report.renamed.values()) == {name for name, _ in original.named_parameters()}
    assert report.dropped == ["model.language_model.pooler.dense.weight", "model.layers.0._extra_state"]
    provenance = read_archive(tmp_path / "converted.nemo").provenance
    assert provenance["converted_from"]["file"] == "esm1nv.nemo"
    assert len(provenance["converted_from"]["sha256"]) == 64
    assert provenance["notes"] == report.notes
    assert sorted(path.name for path in tmp_path.iterdir()) == ["converted.nemo", "esm1nv.nemo"]


def test_query_key_value_weights_of_early_megatron_are_reordered(
    state: State, convert_state: Callable[..., ConversionReport], tiny_split: SequenceSplit, tmp_path: Path
) -> None:
    convert_state(tmp_path, state, {"megatron_legacy": True})
    expected = nemo_1_logits(state, translated(tiny_split[3]), heads=4, thirds_first=True)
    converted = logits_of(tmp_path / "converted.nemo", tiny_split[3])
    torch.testing.assert_close(converted[:, 4], expected[:, VOCABULARY.index("L")], rtol=1e-4, atol=1e-4)


def test_megatron_core_names_are_accepted_under_any_prefix(
    original: ESM1nvModel, state: State, convert_state: Callable[..., ConversionReport], tmp_path: Path
) -> None:
    renamed: State = {"model.module.encoder.layers.0.self_attention.core_attention._extra_state": None}
    for name, tensor in original.named_parameters():
        name = name.removeprefix("encoder.")
        name = name.replace("input_layernorm.", "self_attention.linear_qkv.layer_norm_")
        name = name.replace("pre_mlp_layernorm.", "mlp.linear_fc1.layer_norm_")
        renamed[f"model.module.{name}"] = tensor.detach()
    for token in ("embedding.word_embeddings.weight", "output_layer.bias"):
        nemo_1 = {"embedding.word_embeddings.weight": f"language_model.{token}", "output_layer.bias": "lm_head.bias"}
        renamed[f"model.module.{token}"] = state[f"model.{nemo_1[token]}"]
    report = convert_state(tmp_path, renamed)
    weights = read_archive(tmp_path / "converted.nemo").weights
    for name, parameter in original.named_parameters():
        if "word_embeddings" not in name and "output_layer" not in name:
            assert torch.equal(weights[name], parameter), name
    assert report.dropped == ["model.module.encoder.layers.0.self_attention.core_attention._extra_state"]


def test_tokens_missing_from_the_legacy_vocabulary_get_the_unk_row_with_a_note(
    state: State, convert_state: Callable[..., ConversionReport], tmp_path: Path
) -> None:
    report = convert_state(tmp_path, state)
    archive = read_archive(tmp_path / "converted.nemo")
    words, bias = (archive.weights[f"encoder.{n}"] for n in ("embedding.word_embeddings.weight", "output_layer.bias"))
    legacy_words = state["model.language_model.embedding.word_embeddings.weight"]
    for token in (".", "-", "<null_1>", "<unk>"):
        assert torch.equal(words[TOKENS.index(token)], legacy_words[0])
        assert bias[TOKENS.index(token)] == state["model.lm_head.bias"][0]
    assert not words[33:].any() and not bias[33:].any()  # the legacy padding rows (all 77) are dropped
    assert any("row of its <unk>: . - <null_1>" in note for note in report.notes)
    assert any("'\\u2581'" in note for note in report.notes)
    assert archive.config["encoder"]["layernorm_epsilon"] == 1e-5
    assert archive.config["encoder"]["attention_dropout"] == 0.1  # NeMo 1's default


def test_token_types_are_added_to_positions_and_a_tanh_gelu_is_noted(
    state: State, convert_state: Callable[..., ConversionReport], tmp_path: Path
) -> None:
    types = {"model.language_model.embedding.tokentype_embeddings.weight": torch.tensor([[1.0], [9.0]]).expand(2, 32)}
    report = convert_state(tmp_path, state | types, {"bias_gelu_fusion": None})
    positions = read_archive(tmp_path / "converted.nemo").weights["encoder.embedding.position_embeddings.weight"]
    assert torch.equal(positions, state["model.language_model.embedding.position_embeddings.weight"] + 1)
    assert any("token types" in note for note in report.notes)
    assert any("tanh approximation" in note for note in report.notes)


def test_a_bert_vocab_txt_and_a_shorter_position_table_are_accepted(
    state: State, convert_state: Callable[..., ConversionReport], tmp_path: Path
) -> None:
    spelled = {"<unk>": "[UNK]", "<s>": "[CLS]", "</s>": "[SEP]", "<pad>": "[PAD]", "<mask>": "[MASK]"}
    text = "\r\n".join(spelled.get(token, token) for token in VOCABULARY).encode()
    name = "model.language_model.embedding.position_embeddings.weight"
    shorter = state | {name: state[name][:100]}
    config = {"max_position_embeddings": 100, "tokenizer": {"vocab_file": "nemo:12_vocab.txt"}}
    convert_state(tmp_path, shorter, config, **{"./12_vocab.txt": text})
    archive = read_archive(tmp_path / "converted.nemo")
    assert archive.config["encoder"]["seq_length"] == 100
    words = archive.weights["encoder.embedding.word_embeddings.weight"]
    legacy_words = state["model.language_model.embedding.word_embeddings.weight"]
    assert torch.equal(words[[0, 2, 32]], legacy_words[[1, 2, 4]])


def test_expected_shapes_match_the_model(original: ESM1nvModel) -> None:
    shapes = legacy.expected_shapes(original.encoder_config, 128)
    assert shapes == {name: tuple(parameter.shape) for name, parameter in original.named_parameters()}
    others = legacy.expected_shapes(original.encoder_config, 64)
    differing = {name: shape[0] for name, shape in others.items() if shape != shapes[name]}
    assert differing == dict.fromkeys((legacy._WORDS, legacy._OUTPUT_BIAS), 64)


# --- refusals ---------------------------------------------------------------------------------------------------------


def refused(path: Path, match: str) -> None:
    """Check that the conversion fails with an error that names the file, and leaves no files."""
    before = sorted(path.parent.iterdir())
    with pytest.raises(LegacyArchiveError, match=match) as caught:
        convert_legacy(path, path.parent / "converted.nemo")
    assert isinstance(caught.value, UserError)
    assert str(caught.value).startswith(str(path))
    assert "\n" not in str(caught.value) or "cannot be parsed" in str(caught.value)
    assert sorted(path.parent.iterdir()) == before


@pytest.mark.parametrize(
    ("config", "match"),
    [
        ({"transformer_block_type": "post_ln"}, "transformer_block_type is 'post_ln'"),
        ({"position_embedding_type": "rope"}, "position_embedding_type is 'rope'"),
        ({"normalization": "rmsnorm"}, "normalization is 'rmsnorm'"),
        ({"activation": "swiglu"}, "activation is 'swiglu'"),
        ({"bias": False}, "bias is False"),
        ({"share_embeddings_and_output_weights": False}, "share_embeddings_and_output_weights is False"),
        ({"tensor_model_parallel_size": 2}, "tensor_model_parallel_size is 2"),
        ({"kv_channels": 16}, "kv_channels is 16"),
        ({"hidden_size": None}, "hidden_size is missing"),
        ({"num_layers": "six"}, "num_layers must be a number, not 'six'"),
        ({"num_layers": 2.5}, "num_layers must be an integer"),
        ({"hidden_size": 30}, r"hidden_size \(30\) is not divisible"),
        ({"hidden_dropout": "${trainer.dropout}"}, "hidden_dropout is '.*'; write the value"),
    ],
)
def test_another_architecture_is_refused_with_its_key(config: dict[str, Any], match: str, tmp_path: Path) -> None:
    refused(packed(tmp_path / "model.nemo", members(config=config)), rf"model_config\.yaml: {match}")


@pytest.mark.parametrize(
    ("files", "match"),
    [
        ({"./model_config.yaml": b"a: &x [1]\nb: *x\n"}, "aliases are not allowed"),
        ({"./model_config.yaml": b"a: !!python/object/apply:os.system [ls]\n"}, r"model_config\.yaml cannot be parsed"),
        ({"./model_config.yaml": b"- 1\n"}, "is not a mapping"),
        ({"./model_config.yaml": b"\xff\xfe"}, "cut short"),
        ({f"./{VOCAB_NAME}": vocab_file([*VOCABULARY, "A"])}, "token 'A' is there 2 times"),
        ({f"./{VOCAB_NAME}": vocab_file(["<s>", "</s>", "<mask>", "<unk>", "A"])}, "no token for our 'L'"),
        ({f"./{VOCAB_NAME}": b"<s>\n" + b"x" * (1 << 23)}, r"member .* claims 8388612 bytes"),
        ({"./mp_rank_00/model_weights.ckpt": b"", "./model_weights.ckpt": None}, "split over ranks"),
        ({"./model_weights.safetensors": b"", "./model_weights.ckpt": None}, "archive of bionemo_esm already"),
        ({f"./{VOCAB_NAME}": None}, r"no vocabulary in it; .* \.vocab file or vocab\.txt"),
        ({f"./{VOCAB_NAME}": None, "./a.vocab": b"", "./b.vocab": b""}, "several vocabularies"),
    ],
)
def test_missing_or_invalid_files_are_named(files: dict[str, bytes | None], match: str, tmp_path: Path) -> None:
    merged = {name: content for name, content in (members() | files).items() if content is not None}
    refused(packed(tmp_path / "files.nemo", merged), match)


def test_missing_unexpected_or_invalid_tensors_are_named(
    state: State, convert_state: Callable[..., ConversionReport], tmp_path: Path
) -> None:
    layer = "model.language_model.encoder.layers"
    bias = f"{layer}.1.mlp.dense_4h_to_h.bias"
    cases: dict[str, State] = {
        r"no tensor for our 'encoder\.encoder\.layers\.1\.mlp\.linear_fc2\.bias'": {bias: None},
        r"'model\.language_model\.encoder\.layers\.0\.adapter\.weight' has no place": {
            f"{layer}.0.adapter.weight": torch.zeros(1)
        },
        r"layers\.2\.mlp\.dense_4h_to_h\.bias' has no place": {f"{layer}.2.mlp.dense_4h_to_h.bias": torch.zeros(32)},
        r"'elsewhere\.bias' has no place": {"elsewhere.bias": torch.zeros(1)},
        r"has shape \[3\]; by model_config\.yaml it should be \[32\]": {bias: torch.zeros(3)},
        r"torch\.int64\) is not all finite floats": {bias: torch.zeros(32, dtype=torch.int64)},
        r"torch\.float32\) is not all finite floats": {bias: torch.full((32,), torch.nan)},
        r"are both our": {"model.lm_head.layer_norm.bias": torch.zeros(32)},
        r"'model\.step' is no tensor": {"model.step": 7},
        r"expected one tensor embedding\.word_embeddings\.weight, found 2": {
            "x.embedding.word_embeddings.weight": torch.zeros(1)
        },
    }
    for match, change in cases.items():
        changed = {name: value for name, value in (state | change).items() if value is not None}
        with pytest.raises(LegacyArchiveError, match=rf"legacy\.nemo: model_weights\.ckpt: .*{match}"):
            convert_state(tmp_path, changed)
    with pytest.raises(LegacyArchiveError, match="num_layers is 1000000000; the weights have fewer"):
        convert_state(tmp_path, state, {"num_layers": 1_000_000_000})
    assert [path.name for path in tmp_path.iterdir()] == ["legacy.nemo"]


# --- hostile files ----------------------------------------------------------------------------------------------------


def special(name: str, kind: bytes, target: str = "") -> tarfile.TarInfo:
    info = tarfile.TarInfo(name)
    info.type, info.linkname = kind, target
    return info


@pytest.mark.parametrize(
    ("extra", "match"),
    [
        (special("./x", tarfile.SYMTYPE, "/etc/passwd"), r"member './x' is a link"),
        (special("./x", tarfile.LNKTYPE, "model_config.yaml"), r"member './x' is a link"),
        (special("./x", tarfile.CHRTYPE), r"member './x' is a link, a device"),
        (special("./x", tarfile.FIFOTYPE), r"member './x' is a link, a device"),
        (special("../x", tarfile.REGTYPE), r"member '\.\./x' has a path that leaves"),
        (special("a/../../x", tarfile.REGTYPE), r"leaves the archive"),
        (special("/etc/x", tarfile.REGTYPE), r"leaves the archive"),
        (special("..\\x", tarfile.REGTYPE), r"leaves the archive"),
        (special("model_config.yaml", tarfile.REGTYPE), "member 'model_config.yaml' appears twice"),
    ],
    ids=lambda value: value.name if isinstance(value, tarfile.TarInfo) else value,
)
def test_hostile_tar_members_are_refused_with_their_name(extra: tarfile.TarInfo, match: str, tmp_path: Path) -> None:
    path = packed(tmp_path / "tricks.nemo", members())
    with tarfile.open(path, "a") as tar:
        tar.addfile(extra, io.BytesIO())
    refused(path, match)


def test_sparse_and_oversized_members_and_headers_are_refused(tmp_path: Path) -> None:
    def edited(name: str, info: tarfile.TarInfo) -> Path:
        path = tmp_path / name
        path.write_bytes(info.tobuf(tarfile.GNU_FORMAT) + bytes(10240))
        return path

    sparse = special("model_config.yaml", tarfile.GNUTYPE_SPARSE)
    refused(edited("sparse.nemo", sparse), "a sparse file")
    huge = special("model_weights.ckpt", tarfile.REGTYPE)
    huge.size = 1 << 40
    refused(edited("huge.nemo", huge), "claims 1099511627776 bytes")
    header = special("pax", tarfile.XHDTYPE)
    header.size = 1 << 33  # tarfile would read all of this into memory
    refused(edited("header.nemo", header), "a header asks for")


@pytest.mark.parametrize("mode", ["w", "w:gz"])
@pytest.mark.parametrize("fraction", [0.0, 0.3, 0.9])
def test_a_truncated_archive_is_refused(mode: str, fraction: float, state: State, tmp_path: Path) -> None:
    content = packed(tmp_path / "short.nemo", members(state), mode).read_bytes()
    (tmp_path / "short.nemo").write_bytes(content[: int(len(content) * fraction)])
    refused(tmp_path / "short.nemo", "cut short")


class Payload:
    def __init__(self, target: Path) -> None:
        self.target = target

    def __reduce__(self) -> Any:
        return os.mkdir, (str(self.target),)


def test_a_pickle_that_would_run_code_is_refused_without_running_it(state: State, tmp_path: Path) -> None:
    (tmp_path / "archive").mkdir()
    path = packed(tmp_path / "archive" / "evil.nemo", members(state | {"evil": Payload(tmp_path / "owned")}))
    refused(
        path, r"evil\.nemo: model_weights\.ckpt: it asks for (posix|nt)\.mkdir, which is no tensor; nothing of it was"
    )
    assert not (tmp_path / "owned").exists()
    function, arguments = Payload(tmp_path / "owned").__reduce__()
    function(*arguments)
    assert (tmp_path / "owned").exists()  # the payload works if it runs


def test_weights_that_are_not_a_state_dict_or_expand_too_much_are_refused(tmp_path: Path) -> None:
    refused(packed(tmp_path / "list.nemo", members([1, 2])), r"model_weights\.ckpt: it is no pickle of tensors")
    expanded = {"a": torch.zeros(1).expand(1 << 40)}  # a few bytes that expand to 4 TiB
    refused(packed(tmp_path / "large.nemo", members(expanded)), "it unfolds to more than four times its size")


def test_a_missing_source_or_an_overwritten_source_is_refused(tmp_path: Path) -> None:
    refused(tmp_path / "absent.nemo", "no such file")
    path = packed(tmp_path / "same.nemo", members())
    with pytest.raises(LegacyArchiveError, match="give the output another name"):
        convert_legacy(path, path)


def test_only_the_checkpoint_commands_import_the_converter() -> None:
    package = Path(legacy.__file__).parents[1]
    importers = {path.name for path in package.rglob("*.py") if "model.legacy import" in path.read_text()}
    assert importers == {"checkpoint_commands.py"}  # the file of the command
