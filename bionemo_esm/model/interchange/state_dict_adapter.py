"""Other lengths for a model: its table of learned positions cut, or stretched where that was asked for.

Weights from one library's names and layouts to another's, every tensor accounted for on both sides.

One list of rules serves both directions, so what is taken in can be given back bit for bit. Shape suffixes: V rows of
the alphabet, R rows of the position table, N heads, D size of a head, H hidden size.

What the readers of other libraries' files hand over.
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
from bionemo_esm.model.interchange.key_mapping import KeyMapping
from bionemo_esm.model.tar_format import quoted
from bionemo_esm.model.tensor_io import LazyTensors, TensorInfo, TensorTable

UNUSED_POSITIONS = PAD_ID + 1
"""Rows that fairseq's position tables begin with, and Hugging Face's: positions count from the padding id on."""
_DTYPES = {"F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float32}
"""What becomes of the types that foreign weights have; float32 holds every float16 exactly."""


class InterchangeError(UserError):
    """A model that cannot be taken in or given out as it is; the message names the file and the tensor or key."""


@dataclass(frozen=True)
class SourceTensors:
    """The tensors of another library's model: what they are at hand, contents on demand, one at a time."""

    where: str  # the model's path, for messages
    places: Mapping[str, tuple[TensorTable, str]]  # by its name in a dialect: a file, and the name it has there
    erased_rows: Mapping[str, int] = field(default_factory=dict)  # by name: a row that the library zeroes as it loads

    @classmethod
    def of(cls, where: str, tables: Sequence[TensorTable], dialect: KeyMapping) -> SourceTensors:
        """Those of some files. Raises `InterchangeError` for one that is there twice."""
        places: dict[str, tuple[TensorTable, str]] = {}
        for table in tables:
            for stored in table.infos:
                if (name := dialect.name_of(stored)) in places:
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
        """One tensor, float32 or bfloat16. Raises `InterchangeError` where it holds NaN or infinity."""
        table, stored = self.places[name]
        tensor = table.load(stored).to(_DTYPES[self.info(name).dtype])
        if not tensor.isfinite().all():
            raise InterchangeError(f"{self.place(name)} holds NaN or infinity; the model is of no use")
        if name in self.erased_rows:
            tensor[self.erased_rows[name]] = 0
        return tensor

    def layers(self, dialect: KeyMapping) -> int:
        """How many layers they are of, by the highest number of one in their names."""
        start = re.escape(next(iter(dialect.layer_parts.values())).split("{}")[0])
        numbers = (re.match(start + r"([0-9]{1,9})\.", name) for name in self.places)
        return 1 + max((int(number[1]) for number in numbers if number), default=-1)

    def place(self, name: str) -> str:
        """Where a tensor is, for messages."""
        table, stored = self.places[name]
        return f"{table.path}: tensor {quoted(stored)}"


@dataclass(frozen=True)
class TensorRule:
    """One tensor of ours, and the one, or the several, that another library keeps in its place."""

    ours: str
    theirs: tuple[str, ...]
    shape: tuple[int, ...]  # of each of theirs
    to_native: Callable[[list[Tensor]], Tensor]  # from theirs to ours
    to_foreign: Callable[[Tensor], list[Tensor]]  # from ours to theirs


@dataclass(frozen=True)
class ImportedWeights:
    """A foreign model in our terms: its weights are read and turned one at a time, when they are asked for."""

    config: EncoderConfig
    precision: str  # "32" or "bf16": of the weights
    weights: LazyTensors
    notes: tuple[str, ...]  # what was left out or filled in, for people


def to_native(tensors: SourceTensors, config: EncoderConfig, dialect: KeyMapping) -> ImportedWeights:
    """A foreign model of these sizes in our terms, after every one of its tensors has been accounted for.

    `contact_head` follows from the tensors, whatever `config` says; so does `position_offset`, but where rows of zeros
    stand before the first position, `config` says whether they are rows of the table. Raises `InterchangeError`,
    naming the file and the tensor: for one that is missing, left over, of another shape or type, for an output that is
    not tied to the embedding, and for layers that turn by different rotary frequencies.
    """
    notes: list[str] = []
    learned, says_unused = config.position_embedding == LEARNED, config.position_offset == UNUSED_POSITIONS
    config = config.replace(contact_head=_has_contact_head(tensors, dialect, notes))
    config = config.replace(position_offset=UNUSED_POSITIONS if learned else 0)
    frequencies = _frequencies_there(tensors, config, dialect, notes)
    _account(tensors, list(rules(config, dialect, frequencies)), config, dialect, notes)
    if learned and not says_unused:
        table = tensors.load(f"{dialect.position_embeddings}.weight")
        if not table[:UNUSED_POSITIONS].any():
            config = config.replace(position_offset=0)
    return _taken(tensors, config, list(rules(config, dialect, frequencies)), notes)


def to_foreign(
    config: EncoderConfig, dtypes: Mapping[str, torch.dtype], load: Callable[[str], Tensor], dialect: KeyMapping
) -> LazyTensors:
    """Our weights in another library's names and layouts, each made when it is asked for.

    `dtypes`: of each of our tensors; `load` reads one by its name.
    """
    outline, places = {}, {}
    for rule in rules(config, dialect):
        for index, name in enumerate(rule.theirs):
            outline[name] = torch.empty(rule.shape, dtype=dtypes[rule.ours], device="meta")
            places[name] = rule, index

    def make(name: str) -> Tensor:
        rule, index = places[name]
        return rule.to_foreign(load(rule.ours))[index]

    return LazyTensors(outline, make)


# --- the rules --------------------------------------------------------------------------------------------------------


def rules(
    config: EncoderConfig, dialect: KeyMapping, frequencies: tuple[str, ...] | None = None
) -> Iterator[TensorRule]:
    """How each tensor of an encoder of these sizes corresponds to those of another library.

    `frequencies`: the names that the rotary frequencies have there; without it, those that files are written with.
    """
    yield _vocabulary("encoder.embedding.word_embeddings.weight", f"{dialect.word_embeddings}.weight", config)
    yield _vocabulary("encoder.output_layer.bias", dialect.output_bias)
    if config.position_embedding == LEARNED:
        yield _positions(f"{dialect.position_embeddings}.weight", config)
    else:
        names = _each_layer(dialect.frequencies[0], config) if frequencies is None else frequencies
        yield _frequencies(names, config)
    shapes = dict([*config.tensors(), *config.fixed_tensors()])
    once = {**dialect.parts, "contact_head": dialect.contact_head}
    for part, theirs in once.items():
        for kind in ("weight", "bias"):
            if (ours := f"encoder.{part}.{kind}") in shapes:
                yield _same(ours, f"{theirs}.{kind}", shapes)
    for layer in range(config.num_layers):
        ours = f"encoder.encoder.layers.{layer}"
        for kind in ("weight", "bias"):
            names = tuple(f"{name.format(layer)}.{kind}" for name in dialect.query_key_value)
            yield _query_key_value(f"{ours}.self_attention.linear_qkv.{kind}", names, shapes, config)
            for part, theirs in dialect.layer_parts.items():
                yield _same(f"{ours}.{part}.{kind}", f"{theirs.format(layer)}.{kind}", shapes)


def _same(ours: str, theirs: str, shapes: Mapping[str, tuple[int, ...]]) -> TensorRule:
    return TensorRule(ours, (theirs,), shapes[ours], lambda tensors: tensors[0], lambda tensor: [tensor])


def _vocabulary(ours: str, theirs: str, config: EncoderConfig | None = None) -> TensorRule:
    """[V, ...] there, and here with rows of zeros that fill a tensor core's tile."""
    columns = (config.hidden_size,) if config else ()

    def to_native(tensors: list[Tensor]) -> Tensor:
        table = tensors[0].new_zeros(padded_vocabulary_size(), *columns)
        table[:VOCABULARY_SIZE] = tensors[0]
        return table

    return TensorRule(ours, (theirs,), (VOCABULARY_SIZE, *columns), to_native, lambda table: [table[:VOCABULARY_SIZE]])


def _positions(theirs: str, config: EncoderConfig) -> TensorRule:
    """[R + 2, H] there; here without the first two rows where `position_offset` is 0, as they are zeros."""
    left_out = UNUSED_POSITIONS - config.position_offset

    def to_foreign(table: Tensor) -> list[Tensor]:
        return [torch.cat([table.new_zeros(left_out, config.hidden_size), table])]

    shape = (config.position_rows + left_out, config.hidden_size)
    name = "encoder.embedding.position_embeddings.weight"
    return TensorRule(name, (theirs,), shape, lambda tables: tables[0][left_out:], to_foreign)


def _frequencies(theirs: tuple[str, ...], config: EncoderConfig) -> TensorRule:
    """[D / 2], once here, in every layer there; where no layer has them, those of the formula."""

    def to_native(tensors: list[Tensor]) -> Tensor:
        return tensors[0].float() if tensors else rotary_frequencies(config.head_size)

    shape = (config.head_size // 2,)
    return TensorRule("encoder.rotary.frequencies", theirs, shape, to_native, lambda tensor: [tensor] * len(theirs))


def _query_key_value(
    ours: str, theirs: tuple[str, ...], shapes: Mapping[str, tuple[int, ...]], config: EncoderConfig
) -> TensorRule:
    """Three of [N D, ...] there; here one of [N 3 D, ...]: a head's query, key and value lie together."""
    heads, (_, *columns) = config.num_attention_heads, shapes[ours]

    def to_native(tensors: list[Tensor]) -> Tensor:
        return torch.stack([tensor.unflatten(0, (heads, -1)) for tensor in tensors], dim=1).flatten(0, 2)

    def to_foreign(tensor: Tensor) -> list[Tensor]:
        return [part.flatten(0, 1) for part in tensor.unflatten(0, (heads, 3, -1)).unbind(1)]

    return TensorRule(ours, theirs, (config.hidden_size, *columns), to_native, to_foreign)


# --- the account ------------------------------------------------------------------------------------------------------


def _has_contact_head(tensors: SourceTensors, dialect: KeyMapping, notes: list[str]) -> bool:
    if any(f"{dialect.contact_head}.{kind}" in tensors.places for kind in ("weight", "bias")):
        return True
    notes.append("no contact head came with it; contacts need one fitted")
    return False


def _frequencies_there(
    tensors: SourceTensors, config: EncoderConfig, dialect: KeyMapping, notes: list[str]
) -> tuple[str, ...]:
    """The names under which there are rotary frequencies; of all layers, if of any."""
    if config.position_embedding == LEARNED:
        return ()
    for pattern in dialect.frequencies:
        names = _each_layer(pattern, config)
        if any(name in tensors.places for name in names):
            return names
    notes.append("no rotary frequencies came with it; those of the formula, 10000^(-2i / head size), are used")
    return ()


def _each_layer(pattern: str, config: EncoderConfig) -> tuple[str, ...]:
    return tuple(dict.fromkeys(pattern.format(layer) for layer in range(config.num_layers)))


def _account(
    tensors: SourceTensors, table: list[TensorRule], config: EncoderConfig, dialect: KeyMapping, notes: list[str]
) -> None:
    """Every tensor that the rules ask for is there, of its shape; every other one is known to say nothing new."""
    wanted = {name: rule.shape for rule in table for name in rule.theirs}
    for name in sorted(wanted):
        if name not in tensors.places:
            raise InterchangeError(f"{tensors.where}: tensor {name!r} is missing; the model is not whole")
        _check(tensors, name, wanted[name])
    for rule in table:
        if rule.ours == "encoder.rotary.frequencies" and rule.theirs:
            _check_equal(tensors, rule.theirs, "the encoder has one set of rotary frequencies for all layers")
    for name in sorted(tensors.places.keys() - wanted.keys()):
        if name == f"{dialect.tied_output}.weight":
            words = f"{dialect.word_embeddings}.weight"
            _check(tensors, name, wanted[words])
            _check_equal(tensors, (words, name), "the encoder ties its output to the word embeddings")
        elif name == f"{dialect.position_embeddings}.weight" and config.position_embedding == ROTARY:
            notes.append(f"left out: {name}, which a model with rotary positions does not use")
        elif name != dialect.position_ids:
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


def _taken(tensors: SourceTensors, config: EncoderConfig, table: list[TensorRule], notes: list[str]) -> ImportedWeights:
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
    """Another library's model as it was read: nothing translated yet."""

    dialect: KeyMapping
    config: EncoderConfig  # sizes; `contact_head` and `position_offset` are settled by `to_native`
    tensors: SourceTensors
    provenance: dict[str, Any]  # plain values: {"imported_from": {format, source, revision, sha256 by file, ...}}
    notes: tuple[str, ...] = ()  # what was left aside, for people


_POSITIONS = "encoder.embedding.position_embeddings.weight"


def resize_positions(taken: ImportedWeights, seq_length: int | None, stretch_positions: bool) -> ImportedWeights:
    """The model for sequences of up to `seq_length` tokens; None: as it is.

    A learned table is cut to fewer rows; to more it is stretched only if `stretch_positions` says so. Rotary positions
    have no table, and any length. Raises `ConfigError` for a length that cannot be, or a stretch of nothing.
    """
    old = taken.config
    if seq_length is None or seq_length == old.seq_length:
        if stretch_positions:
            raise ConfigError(
                f"stretch_positions: there is nothing to stretch; give a seq_length over the model's {old.seq_length:,}"
            )
        return taken
    new = replace(old, seq_length=seq_length)
    if old.position_embedding == ROTARY:
        if stretch_positions:
            raise ConfigError("stretch_positions: the model has rotary positions, and no table to be stretched")
        return replace(
            taken,
            config=new,
            notes=(*taken.notes, f"longest sequence set from {old.seq_length:,} to {seq_length:,} tokens"),
        )
    _check_direction(old, seq_length, stretch_positions)
    did = "stretched by linear interpolation" if stretch_positions else "cut"
    note = f"position table {did} from {old.seq_length:,} to {seq_length:,} tokens"
    weights = taken.weights

    def make(name: str) -> Tensor:
        tensor = weights[name]
        if name != _POSITIONS:
            return tensor
        used = tensor[old.position_offset :]
        rows = interpolate_positions(used, seq_length) if stretch_positions else used[:seq_length]
        return torch.cat([tensor[: old.position_offset], rows])

    dtype, shape = weights.outline[_POSITIONS].dtype, (new.position_rows, new.hidden_size)
    outline = {**weights.outline, _POSITIONS: torch.empty(shape, dtype=dtype, device="meta")}
    return replace(taken, config=new, weights=LazyTensors(outline, make), notes=(*taken.notes, note))


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
    """A table of R rows on a finer grid [rows, H], first row on first and last on last, in its own dtype.

    Row i is the table at i (R - 1) / (rows - 1), linear between neighbours; computed in float64, rounded once.
    """
    last = len(table_RH) - 1
    places = torch.arange(rows, dtype=torch.float64) * last / (rows - 1)
    below = places.long().clamp(max=last - 1)
    share = (places - below)[:, None]
    table = table_RH.double()
    return (table[below] * (1 - share) + table[below + 1] * share).to(table_RH.dtype)
