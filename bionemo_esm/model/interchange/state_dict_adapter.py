"""Conversion of weights between the names and layouts of other libraries and ours, with a check of the set of tensors.

The same list of rules serves both directions, so an imported model can be exported again bit for bit. Sources for
Hugging Face's names: `transformers/models/esm/modeling_esm.py`, `transformers/conversion_mapping.py`. Sources for
fair-esm's names: `esm/model/esm1.py`, `esm/model/esm2.py`, `esm/modules.py`, and `esm/pretrained.py` for the prefixes
in its files.

Shape suffixes: V rows of the alphabet, R rows of the position table, N heads, D size of a head, H hidden size.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from bionemo_esm.alphabet import PAD_ID, VOCABULARY_SIZE, padded_vocabulary_size
from bionemo_esm.errors import ConfigError, UserError
from bionemo_esm.model.attention import rotary_frequencies
from bionemo_esm.model.config import LEARNED, ROTARY, EncoderConfig
from bionemo_esm.model.tar_format import quoted
from bionemo_esm.model.tensor_io import LazyTensors, TensorInfo, TensorTable

UNUSED_POSITIONS = PAD_ID + 1
"""Unused rows at the top of the position tables of fairseq and Hugging Face: positions start after the padding id."""
_DTYPES = {"F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float32}
"""Dtype after import, by the dtype of the source; float32 holds every float16 exactly."""


class InterchangeError(UserError):
    """A model that cannot be imported or exported; the message names the file and the tensor or key."""


# --- key mappings -----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class KeyMapping:
    """Parameter names of another library without `.weight` and `.bias`; `{}` is the layer number, from 0."""

    library: str  # display name of the library
    word_embeddings: str
    tied_output: str  # output weight, equal to the word embeddings; present in some files only
    position_embeddings: str
    output_bias: str  # full name
    contact_head: str
    parts: Mapping[str, str]  # ours to theirs, of parts outside the layers
    layer_parts: Mapping[str, str]  # ours to theirs, of parts of each layer
    query_key_value: tuple[str, str, str]  # per layer; three tensors there, one tensor here
    frequencies: tuple[str, ...]  # full names of rotary frequencies; export writes the first with a {}
    renamed: tuple[tuple[str, str], ...]  # regular expressions for names in files, and their replacement
    position_ids: str | None = None  # a buffer 0, 1, 2, ... in old files

    def name_of(self, stored: str) -> str:
        """Return the name in this mapping for a tensor name in a file."""
        for pattern, replacement in self.renamed:
            stored = re.sub(pattern, replacement, stored)
        return stored


HUGGING_FACE = KeyMapping(
    library="Hugging Face",
    word_embeddings="esm.embeddings.word_embeddings",
    tied_output="lm_head.decoder",
    position_embeddings="esm.embeddings.position_embeddings",
    output_bias="lm_head.bias",
    contact_head="esm.contact_head.regression",
    parts={
        "embedding_layernorm": "esm.embeddings.layer_norm",
        "encoder.final_layernorm": "esm.encoder.emb_layer_norm_after",
        "lm_head.dense": "lm_head.dense",
        "lm_head.layer_norm": "lm_head.layer_norm",
    },
    layer_parts={
        "input_layernorm": "esm.encoder.layer.{}.attention.LayerNorm",
        "self_attention.linear_proj": "esm.encoder.layer.{}.attention.output.dense",
        "pre_mlp_layernorm": "esm.encoder.layer.{}.LayerNorm",
        "mlp.linear_fc1": "esm.encoder.layer.{}.intermediate.dense",
        "mlp.linear_fc2": "esm.encoder.layer.{}.output.dense",
    },
    query_key_value=(
        "esm.encoder.layer.{}.attention.self.query",
        "esm.encoder.layer.{}.attention.self.key",
        "esm.encoder.layer.{}.attention.self.value",
    ),
    frequencies=(
        "esm.encoder.layer.{}.attention.self.rotary_embeddings.inv_freq",
        "esm.encoder.layer.*.attention.self.rotary_embeddings.inv_freq",  # transformers 5 writes a literal star
        "esm.rotary_embeddings.inv_freq",
    ),
    renamed=((r"LayerNorm\.gamma$", "LayerNorm.weight"), (r"LayerNorm\.beta$", "LayerNorm.bias")),  # transformers 5
    position_ids="esm.embeddings.position_ids",
)

FAIR_ESM = KeyMapping(
    library="fair-esm",
    word_embeddings="embed_tokens",
    tied_output="lm_head",
    position_embeddings="embed_positions",
    output_bias="lm_head.bias",
    contact_head="contact_head.regression",
    parts={
        "embedding_layernorm": "emb_layer_norm_before",
        "encoder.final_layernorm": "emb_layer_norm_after",
        "lm_head.dense": "lm_head.dense",
        "lm_head.layer_norm": "lm_head.layer_norm",
    },
    layer_parts={
        "input_layernorm": "layers.{}.self_attn_layer_norm",
        "self_attention.linear_proj": "layers.{}.self_attn.out_proj",
        "pre_mlp_layernorm": "layers.{}.final_layer_norm",
        "mlp.linear_fc1": "layers.{}.fc1",
        "mlp.linear_fc2": "layers.{}.fc2",
    },
    query_key_value=(
        "layers.{}.self_attn.q_proj",
        "layers.{}.self_attn.k_proj",
        "layers.{}.self_attn.v_proj",
    ),
    frequencies=("layers.{}.self_attn.rot_emb.inv_freq",),
    renamed=((r"^encoder\.(sentence_encoder\.)?", ""),),
)


# --- source models ----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class SourceTensors:
    """Tensors of another library's model. Names, dtypes and shapes are in memory; contents are read on demand."""

    where: str  # the model's path, for messages
    places: Mapping[str, tuple[TensorTable, str]]  # by name in the key mapping: the file, and the name in the file
    erased_rows: Mapping[str, int] = field(default_factory=dict)  # by name: a row that the library zeroes on loading

    @classmethod
    def of(cls, where: str, tables: Sequence[TensorTable], key_mapping: KeyMapping) -> SourceTensors:
        """Collect the tensors of some files. Raises `InterchangeError` for a duplicate name."""
        places: dict[str, tuple[TensorTable, str]] = {}
        for table in tables:
            for stored in table.infos:
                if (name := key_mapping.name_of(stored)) in places:
                    first, other = places[name]
                    raise InterchangeError(
                        f"{table.path}: tensor {quoted(stored)} is there twice, as {quoted(other)} in {first.path.name}"
                    )
                places[name] = table, stored
        return cls(where, places)

    def info(self, name: str) -> TensorInfo:
        table, stored = self.places[name]
        return table.infos[stored]

    def load(self, name: str) -> Tensor:
        """Return one tensor, float32 or bfloat16. Raises `InterchangeError` if it holds NaN or infinity."""
        table, stored = self.places[name]
        tensor = table.load(stored).to(_DTYPES[self.info(name).dtype])
        if not tensor.isfinite().all():
            raise InterchangeError(f"{self.place(name)} holds NaN or infinity; the model is of no use")
        if name in self.erased_rows:
            tensor[self.erased_rows[name]] = 0
        return tensor

    def layers(self, key_mapping: KeyMapping) -> int:
        """Return the number of layers, from the highest layer number in the names."""
        start = re.escape(next(iter(key_mapping.layer_parts.values())).split("{}")[0])
        numbers = (re.match(start + r"([0-9]{1,9})\.", name) for name in self.places)
        return 1 + max((int(number[1]) for number in numbers if number), default=-1)

    def place(self, name: str) -> str:
        """Return file and name of a tensor, for error messages."""
        table, stored = self.places[name]
        return f"{table.path}: tensor {quoted(stored)}"


@dataclass(frozen=True)
class TensorRule:
    """One of our tensors and the tensors of another library that correspond to it."""

    ours: str
    theirs: tuple[str, ...]
    shape: tuple[int, ...]  # of each of their tensors
    to_native: Callable[[list[Tensor]], Tensor]  # from theirs to ours
    from_native: Callable[[Tensor], list[Tensor]]  # from ours to theirs


@dataclass(frozen=True)
class ImportedWeights:
    """A model of another library in our names and layouts; each lookup of a weight reads and converts it."""

    config: EncoderConfig
    precision: str  # of the weights: "32" or "bf16"
    weights: LazyTensors
    notes: tuple[str, ...]  # omitted and added tensors, as messages for the user


def to_native(tensors: SourceTensors, config: EncoderConfig, key_mapping: KeyMapping) -> ImportedWeights:
    """Convert a model of another library to our names and layouts, and check that every tensor is used.

    The tensors determine `contact_head` and `position_offset`, whatever `config` says. Exception: if rows of zeros
    precede the first position, `config` determines whether they belong to the table. Raises `InterchangeError`, naming
    the file and the tensor, for a missing or unexpected tensor or a wrong shape or dtype, if the output is not tied to
    the embedding, and if layers differ in their rotary frequencies.
    """
    notes: list[str] = []
    learned, declares_unused = config.position_embedding == LEARNED, config.position_offset == UNUSED_POSITIONS
    config = config.replace(contact_head=_has_contact_head(tensors, key_mapping, notes))
    config = config.replace(position_offset=UNUSED_POSITIONS if learned else 0)
    frequencies = _frequencies_there(tensors, config, key_mapping, notes)
    _account(tensors, list(rules(config, key_mapping, frequencies)), config, key_mapping, notes)
    if learned and not declares_unused:
        table = tensors.load(f"{key_mapping.position_embeddings}.weight")
        if not table[:UNUSED_POSITIONS].any():
            config = config.replace(position_offset=0)
    return _imported(tensors, config, list(rules(config, key_mapping, frequencies)), notes)


def from_native(
    config: EncoderConfig, dtypes: Mapping[str, torch.dtype], load: Callable[[str], Tensor], key_mapping: KeyMapping
) -> LazyTensors:
    """Return our weights in the names and layouts of another library; each lookup converts a tensor.

    dtypes: by our tensor name; `load` reads one of our tensors by its name.
    """
    outline, places = {}, {}
    for rule in rules(config, key_mapping):
        for index, name in enumerate(rule.theirs):
            outline[name] = torch.empty(rule.shape, dtype=dtypes[rule.ours], device="meta")
            places[name] = rule, index

    def make(name: str) -> Tensor:
        rule, index = places[name]
        return rule.from_native(load(rule.ours))[index]

    return LazyTensors(outline, make)


# --- rules --------------------------------------------------------------------------------------------------------


def rules(
    config: EncoderConfig, key_mapping: KeyMapping, frequencies: tuple[str, ...] | None = None
) -> Iterator[TensorRule]:
    """Yield the rule of each tensor of an encoder of these sizes.

    frequencies: names of the rotary frequencies in the source; None for the names that export writes.
    """
    yield _vocabulary("encoder.embedding.word_embeddings.weight", f"{key_mapping.word_embeddings}.weight", config)
    yield _vocabulary("encoder.output_layer.bias", key_mapping.output_bias)
    if config.position_embedding == LEARNED:
        yield _positions(f"{key_mapping.position_embeddings}.weight", config)
    else:
        names = _each_layer(key_mapping.frequencies[0], config) if frequencies is None else frequencies
        yield _frequencies(names, config)
    shapes = dict([*config.tensors(), *config.fixed_tensors()])
    once = {**key_mapping.parts, "contact_head": key_mapping.contact_head}
    for part, theirs in once.items():
        for kind in ("weight", "bias"):
            if (ours := f"encoder.{part}.{kind}") in shapes:
                yield _same(ours, f"{theirs}.{kind}", shapes)
    for layer in range(config.num_layers):
        ours = f"encoder.encoder.layers.{layer}"
        for kind in ("weight", "bias"):
            names = tuple(f"{name.format(layer)}.{kind}" for name in key_mapping.query_key_value)
            yield _query_key_value(f"{ours}.self_attention.linear_qkv.{kind}", names, shapes, config)
            for part, theirs in key_mapping.layer_parts.items():
                yield _same(f"{ours}.{part}.{kind}", f"{theirs.format(layer)}.{kind}", shapes)


def _same(ours: str, theirs: str, shapes: Mapping[str, tuple[int, ...]]) -> TensorRule:
    return TensorRule(ours, (theirs,), shapes[ours], lambda tensors: tensors[0], lambda tensor: [tensor])


def _vocabulary(ours: str, theirs: str, config: EncoderConfig | None = None) -> TensorRule:
    """Rule for a table of the alphabet: [V, ...] there; padded here with zero rows to the tensor-core tile."""
    columns = (config.hidden_size,) if config else ()

    def to_native(tensors: list[Tensor]) -> Tensor:
        table = tensors[0].new_zeros(padded_vocabulary_size(), *columns)
        table[:VOCABULARY_SIZE] = tensors[0]
        return table

    return TensorRule(ours, (theirs,), (VOCABULARY_SIZE, *columns), to_native, lambda table: [table[:VOCABULARY_SIZE]])


def _positions(theirs: str, config: EncoderConfig) -> TensorRule:
    """Rule for positions: [R + 2, H] there; here without the first two (zero) rows if `position_offset` is 0."""
    left_out = UNUSED_POSITIONS - config.position_offset

    def from_native(table: Tensor) -> list[Tensor]:
        return [torch.cat([table.new_zeros(left_out, config.hidden_size), table])]

    shape = (config.position_rows + left_out, config.hidden_size)
    name = "encoder.embedding.position_embeddings.weight"
    return TensorRule(name, (theirs,), shape, lambda tables: tables[0][left_out:], from_native)


def _frequencies(theirs: tuple[str, ...], config: EncoderConfig) -> TensorRule:
    """Rule for rotary frequencies, [D / 2]: once here, per layer there; from the formula if no layer has them."""

    def to_native(tensors: list[Tensor]) -> Tensor:
        return tensors[0].float() if tensors else rotary_frequencies(config.head_size)

    shape = (config.head_size // 2,)
    return TensorRule("encoder.rotary.frequencies", theirs, shape, to_native, lambda tensor: [tensor] * len(theirs))


def _query_key_value(
    ours: str, theirs: tuple[str, ...], shapes: Mapping[str, tuple[int, ...]], config: EncoderConfig
) -> TensorRule:
    """Rule for query, key and value: three of [N D, ...] there; one of [N 3 D, ...] here, adjacent per head."""
    heads, (_, *columns) = config.num_attention_heads, shapes[ours]

    def to_native(tensors: list[Tensor]) -> Tensor:
        return torch.stack([tensor.unflatten(0, (heads, -1)) for tensor in tensors], dim=1).flatten(0, 2)

    def from_native(tensor: Tensor) -> list[Tensor]:
        return [part.flatten(0, 1) for part in tensor.unflatten(0, (heads, 3, -1)).unbind(1)]

    return TensorRule(ours, theirs, (config.hidden_size, *columns), to_native, from_native)


# --- checks ------------------------------------------------------------------------------------------------------


def _has_contact_head(tensors: SourceTensors, key_mapping: KeyMapping, notes: list[str]) -> bool:
    if any(f"{key_mapping.contact_head}.{kind}" in tensors.places for kind in ("weight", "bias")):
        return True
    notes.append("no contact head came with it; contacts need one fitted")
    return False


def _frequencies_there(
    tensors: SourceTensors, config: EncoderConfig, key_mapping: KeyMapping, notes: list[str]
) -> tuple[str, ...]:
    """Return the names of the rotary frequencies of all layers in the source; empty if it has none."""
    if config.position_embedding == LEARNED:
        return ()
    for pattern in key_mapping.frequencies:
        names = _each_layer(pattern, config)
        if any(name in tensors.places for name in names):
            return names
    notes.append("no rotary frequencies came with it; those of the formula, 10000^(-2i / head size), are used")
    return ()


def _each_layer(pattern: str, config: EncoderConfig) -> tuple[str, ...]:
    return tuple(dict.fromkeys(pattern.format(layer) for layer in range(config.num_layers)))


def _account(
    tensors: SourceTensors, table: list[TensorRule], config: EncoderConfig, key_mapping: KeyMapping, notes: list[str]
) -> None:
    """Check that the source has each tensor of the rules in its shape, and that all other tensors are redundant."""
    wanted = {name: rule.shape for rule in table for name in rule.theirs}
    for name in sorted(wanted):
        if name not in tensors.places:
            raise InterchangeError(f"{tensors.where}: tensor {name!r} is missing; the model is not whole")
        _check(tensors, name, wanted[name])
    for rule in table:
        if rule.ours == "encoder.rotary.frequencies" and rule.theirs:
            _check_equal(tensors, rule.theirs, "the encoder has one set of rotary frequencies for all layers")
    for name in sorted(tensors.places.keys() - wanted.keys()):
        if name == f"{key_mapping.tied_output}.weight":
            words = f"{key_mapping.word_embeddings}.weight"
            _check(tensors, name, wanted[words])
            _check_equal(tensors, (words, name), "the encoder ties its output to the word embeddings")
        elif name == f"{key_mapping.position_embeddings}.weight" and config.position_embedding == ROTARY:
            notes.append(f"left out: {name}, which a model with rotary positions does not use")
        elif name != key_mapping.position_ids:
            raise InterchangeError(
                f"{tensors.place(name)} has no place in an ESM of these sizes; does it belong to another model?"
            )


def _check(tensors: SourceTensors, name: str, shape: tuple[int, ...]) -> None:
    info = tensors.info(name)
    if info.shape != shape:
        raise InterchangeError(
            f"{tensors.place(name)} has shape {list(info.shape)}; by the configuration it should be {list(shape)}"
        )
    if info.dtype not in _DTYPES:
        raise InterchangeError(f"{tensors.place(name)} has dtype {info.dtype}; known are {', '.join(_DTYPES)}")


def _check_equal(tensors: SourceTensors, names: tuple[str, ...], why: str) -> None:
    first = tensors.load(names[0])
    for other in names[1:]:
        if not torch.equal(first, tensors.load(other)):
            raise InterchangeError(f"{tensors.place(other)} differs from {quoted(names[0])}; {why}")


def _imported(
    tensors: SourceTensors, config: EncoderConfig, table: list[TensorRule], notes: list[str]
) -> ImportedWeights:
    fixed = dict(config.fixed_tensors())
    trained = [name for rule in table if rule.ours not in fixed for name in rule.theirs]
    is_bf16 = all(tensors.info(name).dtype == "BF16" for name in trained)
    shapes = dict(config.tensors()) | fixed
    by_name = {rule.ours: rule for rule in table}
    assert by_name.keys() == shapes.keys()
    dtypes = {name: torch.bfloat16 if is_bf16 and name not in fixed else torch.float32 for name in shapes}

    def make(name: str) -> Tensor:
        rule = by_name[name]
        tensor = rule.to_native([tensors.load(theirs) for theirs in rule.theirs]).to(dtypes[name])
        assert tensor.shape == shapes[name]
        return tensor

    outline = {name: torch.empty(shape, dtype=dtypes[name], device="meta") for name, shape in shapes.items()}
    return ImportedWeights(config, "bf16" if is_bf16 else "32", LazyTensors(outline, make), tuple(notes))


@dataclass(frozen=True)
class SourceModel:
    """A model of another library before the conversion."""

    key_mapping: KeyMapping
    config: EncoderConfig  # `to_native` decides `contact_head` and `position_offset`
    tensors: SourceTensors
    provenance: dict[str, Any]  # plain values: {"imported_from": {format, source, revision, sha256 by file, ...}}
    notes: tuple[str, ...] = ()  # ignored contents, as messages for the user


_POSITIONS = "encoder.embedding.position_embeddings.weight"


def resize_positions(imported: ImportedWeights, seq_length: int | None, stretch_positions: bool) -> ImportedWeights:
    """Return the model for sequences of up to `seq_length` tokens; None returns it unchanged.

    A learned table is cut to fewer rows. It is interpolated to more rows only with `stretch_positions`. Rotary
    positions have no table and permit any length. Raises `ConfigError` for an impossible length.
    """
    old = imported.config
    if seq_length is None or seq_length == old.seq_length:
        if stretch_positions:
            raise ConfigError(
                f"stretch_positions: there is nothing to stretch; give a seq_length over the model's {old.seq_length:,}"
            )
        return imported
    new = old.replace(seq_length=seq_length)
    if old.position_embedding == ROTARY:
        if stretch_positions:
            raise ConfigError("stretch_positions: the model has rotary positions, and no table to be stretched")
        return replace(
            imported,
            config=new,
            notes=(*imported.notes, f"longest sequence set from {old.seq_length:,} to {seq_length:,} tokens"),
        )
    _check_direction(old, seq_length, stretch_positions)
    did = "stretched by linear interpolation" if stretch_positions else "cut"
    note = f"position table {did} from {old.seq_length:,} to {seq_length:,} tokens"
    weights = imported.weights

    def make(name: str) -> Tensor:
        tensor = weights[name]
        if name != _POSITIONS:
            return tensor
        used = tensor[old.position_offset :]
        rows = interpolate_positions(used, seq_length) if stretch_positions else used[:seq_length]
        return torch.cat([tensor[: old.position_offset], rows])

    dtype, shape = weights.outline[_POSITIONS].dtype, (new.position_rows, new.hidden_size)
    outline = {**weights.outline, _POSITIONS: torch.empty(shape, dtype=dtype, device="meta")}
    return replace(imported, config=new, weights=LazyTensors(outline, make), notes=(*imported.notes, note))


def _check_direction(old: EncoderConfig, seq_length: int, stretch_positions: bool) -> None:
    if seq_length > old.seq_length and not stretch_positions:
        raise ConfigError(
            f"seq_length: the model has positions for {old.seq_length:,} tokens, not for {seq_length:,}; give at most "
            "that many, or stretch_positions=true to interpolate its table (and train it further)"
        )
    if seq_length < old.seq_length and stretch_positions:
        raise ConfigError(
            f"stretch_positions: {seq_length:,} tokens are fewer than the model's {old.seq_length:,}; leave it out, "
            "and the table is cut"
        )


def interpolate_positions(table_RH: Tensor, rows: int) -> Tensor:
    """Interpolate a table of R rows to [rows, H] in its own dtype; first and last row do not change.

    Row i is the linear interpolation of the table at i (R - 1) / (rows - 1), computed in float64 and rounded once.
    """
    last = len(table_RH) - 1
    places = torch.arange(rows, dtype=torch.float64) * last / (rows - 1)
    below = places.long().clamp(max=last - 1)
    share = (places - below)[:, None]
    table = table_RH.double()
    return (table[below] * (1 - share) + table[below + 1] * share).to(table_RH.dtype)
