"""Conversion of a `.nemo` of NeMo 1 or BioNeMo 1 (a tar that contains a pickle) to our archive format.

Experimental: written from the sources below, not yet tested on a released BioNeMo 1 archive.

A legacy archive is a tar, plain or gzipped, of `model_config.yaml`, `model_weights.ckpt` (a torch pickle) and artifacts
with a hash before their name. Only the pickle is extracted; `bionemo_esm.model.torch_pickle` opens it.

Sources for names and layouts: NVIDIA/NeMo 1.x, `nemo/collections/nlp/`
(`models/language_modeling/megatron/bert_model.py`, `modules/common/megatron/language_model.py`, `attention.py`,
`fused_bias_gelu.py`), Megatron-core's `BertModel`, and BioNeMo 1's ESM-1nv, a `MegatronBertModel` over a sentencepiece
vocabulary.
"""

from __future__ import annotations

import gzip
import math
import re
import shutil
import tarfile
import tempfile
import zlib
from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import Any, BinaryIO

import torch
from torch import Tensor

from bionemo_esm.alphabet import STANDARD_RESIDUES, TOKENS, padded_vocabulary_size
from bionemo_esm.errors import ConfigError, UserError
from bionemo_esm.model.archive import Archive, write_archive
from bionemo_esm.model.config import EncoderConfig
from bionemo_esm.model.safe_serialization import parse_yaml
from bionemo_esm.model.tar_format import Section, hash_section
from bionemo_esm.model.torch_pickle import PickleError, read_pickle

CONFIG, WEIGHTS = "model_config.yaml", "model_weights.ckpt"
_LARGEST_TEXT = 1 << 22  # bytes; a configuration or a vocabulary of amino acids has a few thousand
_LARGEST_MEMBER = 1 << 36  # bytes; ESM-1b's weights have 2.6e9
_LONGEST_READ = 1 << 24  # bytes; a tar header with a larger read is damaged or malicious
_MOST_MEMBERS = 1000


class LegacyArchiveError(UserError):
    """A legacy archive that cannot be converted; the message names the file, the member and what to do."""

    code = "legacy"


# --- the tar --------------------------------------------------------------------------------------------------------


class _BoundedReads:
    """Readable file that refuses very large reads, which a tar header of a few bytes can request."""

    def __init__(self, stream: Any) -> None:
        self._stream = stream
        self.seek, self.tell = stream.seek, stream.tell

    def read(self, size: int = -1) -> bytes:
        if not 0 <= size <= _LONGEST_READ:
            raise tarfile.ReadError(f"a header asks for {size} bytes")
        content: bytes = self._stream.read(size)
        return content


class _LegacyTar:
    """Members of a legacy archive by name, each checked; `stream` is the open file of `path`."""

    def __init__(self, path: Path, stream: BinaryIO) -> None:
        self.path = path
        gzipped = stream.read(2) == b"\x1f\x8b"
        stream.seek(0)
        with self._damage_reported():
            source = _BoundedReads(gzip.GzipFile(fileobj=stream) if gzipped else stream)
            self._tar = tarfile.open(fileobj=source, mode="r:")  # type: ignore[call-overload]  # noqa: SIM115
            self.members = self._checked_members()

    @contextmanager
    def _damage_reported(self) -> Iterator[None]:
        try:
            yield
        except UserError:
            raise
        except (tarfile.TarError, OSError, EOFError, zlib.error, ValueError, OverflowError, RecursionError) as error:
            raise LegacyArchiveError(
                f"{self.path}: not a .nemo archive, or cut short ({error}); copy or download it again"
            ) from error

    def _checked_members(self) -> dict[str, tarfile.TarInfo]:
        found: dict[str, tarfile.TarInfo] = {}
        for count, member in enumerate(self._tar):
            name = str(PurePosixPath(member.name))  # removes a leading ./
            if name.startswith("/") or ".." in PurePosixPath(name).parts or "\\" in name or "\0" in name:
                raise self._refusal(member, "has a path that leaves the archive")
            if not (member.isreg() or member.isdir()) or member.issparse():
                raise self._refusal(member, "is a link, a device or a sparse file")
            if name in found:
                raise self._refusal(member, "appears twice")
            if member.size > _LARGEST_MEMBER:
                raise self._refusal(member, f"claims {member.size} bytes")
            if count >= _MOST_MEMBERS:
                raise self._refusal(member, f"is one of more than {_MOST_MEMBERS}")
            found[name] = member
        return {name: member for name, member in found.items() if member.isreg()}

    def _refusal(self, member: tarfile.TarInfo, fault: str) -> LegacyArchiveError:
        return LegacyArchiveError(
            f"{self.path}: member {member.name!r} {fault}; refused, get the archive from its source"
        )

    def text(self, name: str) -> str:
        """Return a small member as text."""
        member = self._member(name)
        if member.size > _LARGEST_TEXT:
            raise self._refusal(member, f"claims {member.size} bytes, of at most {_LARGEST_TEXT}")
        with self._damage_reported(), self._tar.extractfile(member) as content:  # type: ignore[union-attr]
            text: str = content.read().decode("utf-8")
        return text

    def copy(self, name: str, target: Path) -> Path:
        """Copy a member to a new file and return its path."""
        member = self._member(name)
        with self._damage_reported(), self._tar.extractfile(member) as content, target.open("xb") as out:  # type: ignore[union-attr]
            shutil.copyfileobj(content, out)
            if out.tell() != member.size:
                raise tarfile.ReadError(f"member {member.name} ends early")
        return target

    def _member(self, name: str) -> tarfile.TarInfo:
        if name in self.members:
            return self.members[name]
        reason = "it is cut short, or not a NeMo archive"
        if "model_weights.safetensors" in self.members:
            reason = "it is an archive of bionemo_esm already; use it as it is"
        elif any(re.search(r"(?:mp|tp)_rank_\d+|^model_weights/", other) for other in self.members):
            reason = "its weights are split over ranks; merge them with NeMo's own tools first"
        raise LegacyArchiveError(f"{self.path}: member {name} is missing; {reason}")


# --- configuration, vocabulary, pickle --------------------------------------------------------------------------------


def _read_config(tar: _LegacyTar) -> dict[str, Any]:
    """Return the model's section of `model_config.yaml` as plain values. Class paths in it (`target`) remain text."""
    where, text = f"{tar.path}: {CONFIG}", tar.text(CONFIG)
    try:
        config = parse_yaml(text.encode())
    except ValueError as error:
        raise LegacyArchiveError(f"{where} cannot be parsed ({error}); write plain values there") from error
    config = config.get("model", config) if isinstance(config, dict) else config
    if not isinstance(config, dict):
        raise LegacyArchiveError(f"{where} is not a mapping; the archive is no model of NeMo's")
    return config


def _value(config: Mapping[str, Any], key: str, where: str) -> Any:
    """Return a value. Resolves `${.other}`, OmegaConf's reference to another key of the same mapping."""
    value = config.get(key)
    if isinstance(value, str) and (reference := re.fullmatch(r"\$\{(?:\.|model\.)?(\w+)\}", value)):
        value = config.get(reference[1])
    if isinstance(value, str) and "${" in value:
        raise LegacyArchiveError(f"{where}: {key} is {value!r}; write the value itself there")
    return value


def _number(config: Mapping[str, Any], keys: tuple[str, ...], default: float | None, where: str) -> float:
    """Return the number of the first key with a value, or the default."""
    for key in keys:
        value = _value(config, key, where)
        if value is None:
            continue
        try:
            number = float(value) if not isinstance(value, bool) else math.nan  # YAML 1.1 reads 1e-5 as text
        except (TypeError, ValueError, OverflowError):
            number = math.nan
        if not math.isfinite(number):
            raise LegacyArchiveError(f"{where}: {key} must be a number, not {value!r}")
        return number
    if default is None:
        raise LegacyArchiveError(f"{where}: {' or '.join(keys)} is missing; the archive is no BERT of NeMo's")
    return default


def _read_vocabulary(tar: _LegacyTar, config: Mapping[str, Any]) -> tuple[str, list[str]]:
    """Return the vocabulary's member and its tokens in the order of their ids.

    `.vocab` of sentencepiece has `token<TAB>score` lines. `vocab.txt` of BERT has one token per line.
    """
    tokenizer = config.get("tokenizer")
    named = tokenizer.get("vocab_file") if isinstance(tokenizer, dict) else None
    member = str(named).removeprefix("nemo:")
    if member not in tar.members:
        candidates = [name for name in tar.members if name.endswith((".vocab", "vocab.txt"))]
        if len(candidates) != 1:
            raise LegacyArchiveError(
                f"{tar.path}: {'several vocabularies' if candidates else 'no vocabulary'} in it; the rows of the "
                "embedding have no known order without the tokenizer's .vocab file or vocab.txt (one token a line). "
                f"Add the one that belongs to it to the tar, and name it in tokenizer.vocab_file of {CONFIG}"
            )
        member = candidates[0]
    tokens = [line.split("\t")[0] for line in tar.text(member).split("\n") if line]
    for token, times in Counter(tokens).items():
        if times > 1:
            raise LegacyArchiveError(
                f"{tar.path}: {member}: token {token!r} is there {times} times; ids would be a guess"
            )
    return member, [token.rstrip("\r") for token in tokens]


def _read_weights(tar: _LegacyTar, folder: Path) -> tuple[dict[str, Tensor], list[str]]:
    """Return the tensors of `model_weights.ckpt` in their own dtypes, and the names of other entries."""
    try:
        table, others = read_pickle(tar.copy(WEIGHTS, folder / WEIGHTS))
    except PickleError as error:
        raise LegacyArchiveError(f"{tar.path}: {WEIGHTS}: {error.why}") from error
    dicts = tuple(f"{name}." for name, value in others.items() if isinstance(value, dict))
    return {name: table.load(name) for name in table.infos if not name.startswith(dicts)}, sorted(others)


_SIZES: dict[str, tuple[tuple[str, ...], float | None]] = {
    "num_layers": (("num_layers",), None),
    "hidden_size": (("hidden_size",), None),
    "num_attention_heads": (("num_attention_heads",), None),
    "ffn_hidden_size": (("ffn_hidden_size",), None),
    "seq_length": (("max_position_embeddings", "encoder_seq_length", "seq_length"), None),
    "hidden_dropout": (("hidden_dropout",), 0.1),
    "attention_dropout": (("attention_dropout",), 0.1),
    "layernorm_epsilon": (("layernorm_epsilon",), 1e-5),
    "init_method_std": (("init_method_std",), 0.02),
}
"""Our names, the legacy keys in order of preference, and NeMo 1's default where it has one."""

_REQUIRED: dict[str, Any] = {
    "transformer_block_type": "pre_ln",
    "position_embedding_type": "learned_absolute",
    "normalization": "layernorm",
    "activation": "gelu",
    "bias": True,
    "share_embeddings_and_output_weights": True,
    "normalize_attention_scores": True,
    "headscale": False,
    "multi_query_attention": False,
    "embedding_token_dropout": False,
    "use_esm_attention": False,
    "tensor_model_parallel_size": 1,
    "pipeline_model_parallel_size": 1,
}
"""Required settings, which our encoder has. Each is also NeMo 1's default, so an absent or null key is accepted."""

_SYNONYMS: dict[str, tuple[str, ...]] = {
    "<cls>": ("<s>", "<bos>", "[bos]", "<cls>", "[cls]"),
    "<eos>": ("</s>", "<eos>", "[eos]", "<sep>", "[sep]"),
    "<pad>": ("<pad>", "[pad]"),
    "<unk>": ("<unk>", "[unk]"),
    "<mask>": ("<mask>", "[mask]"),
    "<null_1>": ("<null_1>",),
}
"""Legacy spellings, lower case, by preference: BioNeMo encloses proteins in `<s>` and `</s>`."""
_INDISPENSABLE = ("<cls>", "<eos>", "<unk>", "<mask>", *STANDARD_RESIDUES)

_LAYER_PARTS = {
    "self_attention.query_key_value.": "self_attention.linear_qkv.",
    "self_attention.dense.": "self_attention.linear_proj.",
    "post_attention_layernorm.": "pre_mlp_layernorm.",
    "mlp.dense_h_to_4h.": "mlp.linear_fc1.",
    "mlp.dense_4h_to_h.": "mlp.linear_fc2.",
    "self_attention.linear_qkv.layer_norm_": "input_layernorm.",  # Transformer Engine stores it in the linear layer
    "mlp.linear_fc1.layer_norm_": "pre_mlp_layernorm.",
}
"""Legacy names of parts of a layer, and our names, which are Megatron-core's."""
_OTHER_PARTS = {
    "lm_head.bias": "output_layer.bias",
    "lm_head.layernorm.weight": "lm_head.layer_norm.weight",
    "lm_head.layernorm.bias": "lm_head.layer_norm.bias",
}
_NO_PLACE = re.compile(r"(^|\.)(pooler|binary_head|rotary_pos_emb)\.|inv_freq$|_extra_state$")
_WORDS, _POSITIONS = "encoder.embedding.word_embeddings.weight", "encoder.embedding.position_embeddings.weight"
_TOKEN_TYPES, _OUTPUT_BIAS = "encoder.embedding.tokentype_embeddings.weight", "encoder.output_layer.bias"


@dataclass
class ConversionReport:
    """The result of a conversion."""

    parameters: int = 0  # of the converted model, including padding rows
    renamed: dict[str, str] = field(default_factory=dict)  # legacy tensor name to ours
    dropped: list[str] = field(default_factory=list)  # legacy names without counterpart in our model
    notes: list[str] = field(default_factory=list)  # differences from the legacy model, and default values used


def convert_legacy(source: Path, output: Path) -> ConversionReport:
    """Convert a legacy archive to an `ESM1nvModel` archive with float32 weights.

    Runs no code from the archive. Raises `LegacyArchiveError`, naming the file and the member, key or tensor, for
    anything unsupported, missing or unexpected; then no file is written.
    """
    if not source.is_file():
        raise LegacyArchiveError(f"{source}: no such file; give the path of a legacy .nemo archive")
    if output.exists() and output.samefile(source):
        raise LegacyArchiveError(f"{output}: is the legacy archive itself; give the output another name")
    report = ConversionReport()
    with source.open("rb") as stream, tempfile.TemporaryDirectory(prefix="legacy-nemo-") as folder:
        digest = hash_section(source, Section(0, source.stat().st_size))["sha256"]
        tar = _LegacyTar(source, stream)
        config = _read_config(tar)
        encoder = _encoder_config(config, f"{source}: {CONFIG}", report)
        member, tokens = _read_vocabulary(tar, config)
        rows = _vocabulary_rows(tokens, f"{source}: {member}", report)
        stored, others = _read_weights(tar, Path(folder))
    where = f"{source}: {WEIGHTS}"
    named = _our_names(stored, others, where, report)
    if encoder.num_layers > len(stored):
        raise LegacyArchiveError(f"{source}: {CONFIG}: num_layers is {encoder.num_layers}; the weights have fewer")
    legacy_rows = max(len(tokens), *named[_WORDS][1].shape[:1], 1)  # padded to the tensor-core tile
    shapes = expected_shapes(encoder, legacy_rows)
    _check(named, shapes | ({_TOKEN_TYPES: (2, encoder.hidden_size)} if _TOKEN_TYPES in named else {}), where)
    weights = _our_tensors(named, encoder, rows, config.get("megatron_legacy") is True, report)
    provenance = {"converted_from": {"file": source.name, "sha256": digest}, "notes": report.notes}
    archive_config = {"encoder": encoder.to_dict(), "precision": "32", "seed": 0}
    write_archive(output, Archive("ESM1nvModel", archive_config, weights, provenance))
    report.parameters, report.dropped = encoder.parameters, sorted(report.dropped)
    return report


def _encoder_config(config: Mapping[str, Any], where: str, report: ConversionReport) -> EncoderConfig:
    for key, ours in _REQUIRED.items():
        value = _value(config, key, where)
        if value is not None and str(value).lower() != str(ours).lower():
            raise LegacyArchiveError(
                f"{where}: {key} is {value!r}; only {ours!r} can be converted, our encoder has no other"
            )
    sizes = {name: _number(config, keys, default, where) for name, (keys, default) in _SIZES.items()}
    try:
        encoder = EncoderConfig.from_config(sizes)
    except ConfigError as error:
        raise LegacyArchiveError(f"{where}: {str(error).replace('model.', '')}") from error
    channels = _value(config, "kv_channels", where)
    if channels not in (None, encoder.hidden_size // encoder.num_attention_heads):
        raise LegacyArchiveError(
            f"{where}: kv_channels is {channels!r}; only hidden_size / num_attention_heads can be converted"
        )
    fused = config.get("bias_gelu_fusion", config.get("bias_activation_fusion", True))
    if fused is not False or config.get("openai_gelu") is True:
        report.notes.append(
            "GELU: the legacy MLP computed the tanh approximation (bias_gelu_fusion or openai_gelu), ours is exact; "
            "one activation differs by up to 0.0005"
        )
    return encoder


def _vocabulary_rows(tokens: list[str], where: str, report: ConversionReport) -> list[int]:
    """Return the legacy row of each of our tokens; the row of `<unk>` for tokens that the legacy vocabulary lacks."""
    ids = {token.lower() if re.fullmatch(r"<.*>|\[.*\]", token) else token: row for row, token in enumerate(tokens)}
    found: dict[str, int] = {}
    for token in TOKENS:
        spellings = [name for name in _SYNONYMS.get(token, (token,)) if name in ids]
        if spellings:
            found[token] = ids[spellings[0]]
    for token in _INDISPENSABLE:
        if token not in found:
            names = ", ".join(_SYNONYMS.get(token, (token,)))
            raise LegacyArchiveError(
                f"{where}: no token for our {token!r} (known: {names}); it is no protein vocabulary"
            )
    filled = [token for token in TOKENS if token not in found]
    if filled:
        report.notes.append(f"tokens the legacy vocabulary lacks, given the row of its <unk>: {' '.join(filled)}")
    unused = [token for row, token in enumerate(tokens) if row not in found.values()]
    if unused:
        shown = " ".join(map(ascii, unused[:12])) + (" ..." if len(unused) > 12 else "")
        report.notes.append(f"{len(unused)} legacy tokens that our alphabet lacks, left out: {shown}")
    return [found.get(token, found["<unk>"]) for token in TOKENS]


# --- tensors ----------------------------------------------------------------------------------------------------------


def _our_names(
    stored: Mapping[str, Tensor], others: list[str], where: str, report: ConversionReport
) -> dict[str, tuple[str, Tensor]]:
    """Return our name to (legacy name, tensor), without entries that have no counterpart in our model."""
    words = re.compile(r"(.*?)(?:language_model\.)?embedding\.word_embeddings\.weight")
    prefixes = [match[1] for name in stored if (match := words.fullmatch(name))]
    if len(prefixes) != 1:
        raise LegacyArchiveError(
            f"{where}: expected one tensor embedding.word_embeddings.weight, found {len(prefixes)}"
        )
    named: dict[str, tuple[str, Tensor]] = {}
    for legacy in [*stored, *others]:
        if _NO_PLACE.search(legacy):
            report.dropped.append(legacy)
            continue
        ours = _our_name(legacy.removeprefix(prefixes[0]) if legacy.startswith(prefixes[0]) else legacy)
        if legacy in others:
            raise LegacyArchiveError(f"{where}: {legacy!r} is no tensor; it is no state dict of a model")
        if ours in named:
            raise LegacyArchiveError(f"{where}: {legacy!r} and {named[ours][0]!r} are both our {ours!r}")
        named[ours] = (legacy, stored[legacy])
    return named


def _our_name(legacy: str) -> str:
    """Return the name in our model if the legacy name is known; otherwise a name that our model does not have."""
    rest = legacy.removeprefix("language_model.")
    if layer := re.fullmatch(r"encoder\.layers\.(0|[1-9]\d*)\.(.+[._])(weight|bias)", rest):
        return f"encoder.encoder.layers.{layer[1]}.{_LAYER_PARTS.get(layer[2], layer[2])}{layer[3]}"
    return f"encoder.{_OTHER_PARTS.get(rest, rest)}"


def expected_shapes(encoder: EncoderConfig, vocabulary_rows: int) -> dict[str, tuple[int, ...]]:
    """Return the shape of every parameter of an `ESM1nvModel` of these sizes with this number of vocabulary rows."""
    shapes = dict(encoder.tensors())
    return shapes | {name: (vocabulary_rows, *shapes[name][1:]) for name in (_WORDS, _OUTPUT_BIAS)}


def _check(named: dict[str, tuple[str, Tensor]], shapes: dict[str, tuple[int, ...]], where: str) -> None:
    """Check that the set of tensors is ours, that each has the right shape, and that all values are finite floats."""
    for ours in sorted(shapes.keys() - named.keys()):
        raise LegacyArchiveError(f"{where}: no tensor for our {ours!r}; is num_layers in {CONFIG} right?")
    for ours, (legacy, tensor) in named.items():
        place = f"{where}: tensor {legacy!r}"
        if ours not in shapes:
            raise LegacyArchiveError(f"{place} has no place in our model; it is no ESM-1nv, or one with extra parts")
        if tuple(tensor.shape) != shapes[ours]:
            expected = list(shapes[ours])
            raise LegacyArchiveError(f"{place} has shape {list(tensor.shape)}; by {CONFIG} it should be {expected}")
        if not (tensor.is_floating_point() and tensor.isfinite().all()):
            raise LegacyArchiveError(f"{place} ({tensor.dtype}) is not all finite floats; the weights are damaged")


def _our_tensors(
    named: dict[str, tuple[str, Tensor]],
    encoder: EncoderConfig,
    rows: list[int],
    thirds_first: bool,
    report: ConversionReport,
) -> dict[str, Tensor]:
    """Return our tensors, float32, in our layout and row order.

    Rows of query, key and value are [heads, 3, head size], as ours. NeMo's `megatron_legacy` marks weights
    of the first Megatron-LM, with [3, heads, head size] (`_transpose_last_dim` in NeMo 1's attention.py).
    """
    weights = {}
    for ours, (legacy, tensor) in named.items():
        report.renamed[legacy] = ours
        weights[ours] = tensor.to(torch.float32)
        if thirds_first and ".query_key_value." in legacy:
            thirds = weights[ours].unflatten(0, (3, encoder.num_attention_heads, -1))
            weights[ours] = thirds.transpose(0, 1).flatten(0, 2)
    if _TOKEN_TYPES in weights:
        weights[_POSITIONS] = weights[_POSITIONS] + weights.pop(_TOKEN_TYPES)[0]
        report.notes.append("token types: type 0, which every residue had, was added to the position embeddings")
    for ours in (_WORDS, _OUTPUT_BIAS):
        table = torch.zeros(padded_vocabulary_size(), *weights[ours].shape[1:])
        table[: len(rows)] = weights[ours][rows]
        weights[ours] = table
    assert sum(tensor.numel() for tensor in weights.values()) == encoder.parameters
    return weights
