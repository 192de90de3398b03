"""Collate samples of the memory-mapped store into packed rows: sequences end to end, without padding.

`SampleReader.collate` crops, copies and masks in one compiled pass: every token is read once and written where it
stays. Inner loops have no branch and no dependency between iterations, so that the compiler vectorises them. The tests
compare the pass with a NumPy reference bit for bit.

Shape suffixes: T tokens of the row, S sequences, M masked positions.
"""

from __future__ import annotations

from dataclasses import dataclass, field, fields
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from bionemo_esm.alphabet import CLS_ID, EOS_ID, PAD_ID, SPECIAL_TOKENS_PER_SEQUENCE, VOCABULARY_SIZE
from bionemo_esm.data.hashing import UInt64Array, derive_key, derived, drawn, scaled
from bionemo_esm.data.kernels import compiled
from bionemo_esm.data.masking import NO_ROOM, MaskedResidues, MaskingPolicy, mask_row, residue_positions
from bionemo_esm.data.store import SequenceSplit

IntArray = NDArray[np.int64]

CROP_STREAM, MEMBER_STREAM = 2, 6  # streams of draws, apart from those of masking and of the epoch permutation
UNKNOWN_TOKEN = -2  # NO_ROOM is -1

_U = np.uint64
_CACHE_LINE_BYTES = 64
_FIRST_BIT_BEYOND = 64  # no token id of the alphabet, all below 33, has this bit or a higher one


@dataclass(frozen=True)
class PackedBatch:
    """One micro batch: a row of tokens, and the positions that the model predicts.

    `cu_seqlens` are cumulative lengths, from 0 to T: sequence i is `tokens[cu_seqlens[i]:cu_seqlens[i + 1]]`.
    """

    tokens: Tensor  # int64 [T], <cls> residues <eos>, sequence after sequence
    positions: Tensor  # int64 [T], 0 at every <cls>
    cu_seqlens: Tensor  # int32 [S + 1]
    max_seqlen: int  # tokens of the longest sequence
    target_index: Tensor  # int64 [M], positions in `tokens`
    targets: Tensor  # int64 [M], the true residues there

    @property
    def sequences(self) -> int:
        return len(self.cu_seqlens) - 1

    @property
    def residues(self) -> int:
        return len(self.tokens) - SPECIAL_TOKENS_PER_SEQUENCE * self.sequences

    def to(self, device: torch.device | str, non_blocking: bool = False) -> PackedBatch:
        return self._map(lambda tensor: tensor.to(device, non_blocking=non_blocking))

    def pin_memory(self) -> PackedBatch:
        return self._map(Tensor.pin_memory)

    def __reduce__(self) -> tuple[Any, tuple[bytes, ...]]:
        """Pickle only what the rest follows from: two bytes a token instead of twenty."""
        narrow = (self.tokens.byte(), self.cu_seqlens, self.target_index.int(), self.targets.byte())
        return _unpickled, tuple(tensor.numpy().tobytes() for tensor in narrow)

    def _map(self, function: Any) -> PackedBatch:
        values = {field.name: getattr(self, field.name) for field in fields(self)}
        return PackedBatch(**{k: function(v) if isinstance(v, Tensor) else v for k, v in values.items()})


def pack(residues: NDArray[np.uint8], lengths: NDArray[np.int64], masked: MaskedResidues | None = None) -> PackedBatch:
    """Pack concatenated sequences, adding `<cls>` and `<eos>` to each.

    residues: uint8 [residues], the true ones; lengths: int64 [S], residues of each sequence. With `masked` the row
    shows its tokens, and `targets` are the true residues at its chosen positions; without it there are no targets.
    """
    lengths = np.asarray(lengths, dtype=np.int64)
    boundaries = np.zeros(len(lengths) + 1, dtype=np.int64)
    np.cumsum(lengths + SPECIAL_TOKENS_PER_SEQUENCE, out=boundaries[1:])
    positions = residue_positions(lengths)

    tokens = np.empty(boundaries[-1], dtype=np.int64)
    tokens[boundaries[:-1]] = CLS_ID
    tokens[boundaries[1:] - 1] = EOS_ID
    tokens[positions] = residues if masked is None else masked.tokens
    chosen = np.zeros(0, dtype=np.int64) if masked is None else np.flatnonzero(masked.chosen)
    return PackedBatch(
        tokens=torch.from_numpy(tokens),
        positions=torch.from_numpy(np.arange(len(tokens)) - np.repeat(boundaries[:-1], np.diff(boundaries))),
        cu_seqlens=torch.from_numpy(boundaries.astype(np.int32)),
        max_seqlen=int(np.diff(boundaries).max(initial=0)),
        target_index=torch.from_numpy(positions[chosen]),
        targets=torch.from_numpy(residues[chosen].astype(np.int64)),
    )


def _unpickled(tokens: bytes, cu_seqlens: bytes, target_index: bytes, targets: bytes) -> PackedBatch:
    """Return the batch that `PackedBatch.__reduce__` stored."""
    boundaries = np.frombuffer(cu_seqlens, dtype=np.int32).copy()
    lengths = np.diff(boundaries)
    return PackedBatch(
        tokens=torch.from_numpy(np.frombuffer(tokens, dtype=np.uint8).astype(np.int64)),
        positions=torch.from_numpy(np.arange(boundaries[-1]) - np.repeat(boundaries[:-1].astype(np.int64), lengths)),
        cu_seqlens=torch.from_numpy(boundaries),
        max_seqlen=int(lengths.max(initial=0)),
        target_index=torch.from_numpy(np.frombuffer(target_index, dtype=np.int32).astype(np.int64)),
        targets=torch.from_numpy(np.frombuffer(targets, dtype=np.uint8).astype(np.int64)),
    )


def unpack(row_T: Tensor, cu_seqlens: Tensor, padding: float = PAD_ID) -> Tensor:
    """Return a padded batch [S, longest, ...] of a packed row [T, ...], for inspection and padded models."""
    pieces = row_T.split(torch.diff(cu_seqlens).tolist())
    return torch.nn.utils.rnn.pad_sequence(list(pieces), batch_first=True, padding_value=padding)


@dataclass(frozen=True)
class SampleReader:
    """Collate samples of one split: cropped to `max_tokens` (special tokens counted), masked and packed.

    A sample is a sequence. In a clustered split it is a cluster, of which each epoch shows one member, drawn at random.
    """

    split: SequenceSplit
    max_tokens: int
    policy: MaskingPolicy
    seed: int
    _root: UInt64Array = field(init=False, repr=False, compare=False)  # [1], the key of the seed
    _thresholds: UInt64Array = field(init=False, repr=False, compare=False)  # [3], of the policy

    def __post_init__(self) -> None:
        object.__setattr__(self, "_root", derive_key(self.seed))
        object.__setattr__(self, "_thresholds", self.policy.thresholds)

    @property
    def num_samples(self) -> int:
        """Samples of an epoch."""
        return self.split.num_clusters

    def collate(self, epochs: IntArray, samples: IntArray) -> PackedBatch:
        """Return one micro batch of the samples (int64 [S]) as they appear in the epochs (int64 [S]).

        Raises `IndexError` for a sample outside the split, `StoreError` for token ids or offsets that a store must not
        hold.
        """
        epochs, samples = _contiguous(epochs), _contiguous(samples)
        begins, keys = np.empty(len(samples), dtype=np.int64), np.empty(len(samples), dtype=np.uint64)
        cu_seqlens = np.empty(len(samples) + 1, dtype=np.int32)
        files = self.split.lengths, self.split.offsets, self.split.cluster_starts, self.split.residues
        most = self.max_tokens - SPECIAL_TOKENS_PER_SEQUENCE
        longest = crop(*files, self._root, epochs, samples, most, begins, keys, cu_seqlens)
        if longest < 0:
            self._raise_for(epochs[-1 - longest], samples[-1 - longest])
        assert longest >= 0, "the compiled pass refuses a sample that the slow check accepts"
        size = int(cu_seqlens[-1])
        room = self.policy.capacity(size, longest)
        while True:
            # One allocation for all arrays: a loader worker transfers one block.
            row = np.empty(2 * (size + room), dtype=np.int64)
            parts = row[:size], row[size : 2 * size], row[2 * size : 2 * size + room], row[2 * size + room :]
            count = fill(self.split.tokens, begins, keys, cu_seqlens, self._thresholds, *parts)
            if count >= 0:
                break
            if count == UNKNOWN_TOKEN:
                for epoch, sample in zip(epochs, samples, strict=True):
                    self._raise_for(epoch, sample)
            assert count == NO_ROOM
            room = size
        tokens, positions, target_index, targets = torch.from_numpy(row).split([size, size, room, room])
        boundaries = torch.from_numpy(cu_seqlens)
        return PackedBatch(tokens, positions, boundaries, longest, target_index[:count], targets[:count])

    def token_counts(self, epochs: IntArray, samples: IntArray) -> IntArray:
        """Return the length of each sample as it appears in its epoch, cropped, special tokens counted: int64 [S]."""
        epochs, samples, tokens = _contiguous(epochs), _contiguous(samples), np.empty(len(samples), dtype=np.int64)
        lengths, clusters = self.split.lengths, self.split.cluster_starts
        unknown = measure(lengths, clusters, self._root, epochs, samples, self.max_tokens, tokens)
        if unknown >= 0:
            self._raise_for(epochs[unknown], samples[unknown])
        assert unknown < 0, "the compiled pass refuses a sample that the slow check accepts"
        return tokens

    def _raise_for(self, epoch: np.int64, sample: np.int64) -> None:
        """Check one sample slowly and raise what is wrong with it."""
        if not 0 <= sample < self.num_samples:
            raise IndexError(f"sample {sample} of {self.split.prefix}, which has {self.num_samples}")
        sequence = sample
        if self.num_samples != len(self.split):
            first, after = self.split.cluster_starts[sample : sample + 2]
            sequence = draw_member(first, after, derived(derived(self._root[0], epoch), sample))
        self.split.gather([sequence], [0], [0])  # refuses a sequence outside the split
        self.split.gather([sequence], [0], [self.split.lengths[sequence]])


def _contiguous(numbers: IntArray) -> IntArray:
    return np.ascontiguousarray(numbers, dtype=np.int64)


@compiled
def draw_member(first: Any, after: Any, key: Any) -> Any:
    """Draw the member of a cluster, the sequences `first` to `after` - 1, that an epoch shows: int64."""
    return first if after - first == 1 else first + scaled(drawn(key, MEMBER_STREAM), after - first)


@compiled
def measure(lengths: Any, clusters: Any, root: Any, epochs: Any, samples: Any, most: Any, tokens: Any) -> Any:
    """Fill tokens int64 [S] with the length of each sample in its epoch, special tokens counted, at most `most`.

    lengths int32 [sequences]; clusters int64 [clusters + 1]; root uint64 [1], the key of the seed; epochs, samples
    int64 [S]. Returns the index of the first sample outside the split, or -1.
    """
    plain = clusters.size - 1 == lengths.size  # each sequence is its own cluster
    for at in range(samples.size):
        sequence = samples[at]
        if sequence < 0 or sequence >= clusters.size - 1:
            return at
        if not plain:
            key = derived(derived(root[0], epochs[at]), sequence)
            sequence = draw_member(clusters[_U(sequence)], clusters[_U(sequence) + _U(1)], key)
            if sequence < 0 or sequence >= lengths.size:
                return at
        tokens[at] = min(np.int64(lengths[_U(sequence)]) + SPECIAL_TOKENS_PER_SEQUENCE, most)
    return -1


@compiled
def crop(
    lengths: Any, offsets: Any, clusters: Any, residues: Any, root: Any, epochs: Any, samples: Any, most: Any,
    begins: Any, keys: Any, cu_seqlens: Any,
) -> Any:  # fmt: skip
    """Find the sequence of each sample in its epoch, and crop it to a random window.

    lengths int32, offsets int64 [sequences]; clusters int64 [clusters + 1]; residues: their number in the split;
    root uint64 [1], the key of the seed; epochs, samples int64 [S]; most: residues of a window.
    Filled: begins int64 [S], the window's offset in the split's tokens; keys uint64 [S], the hash of (seed, epoch,
    sample); cu_seqlens int32 [S + 1]. Every window of a longer sequence is equally likely. Returns the tokens of the
    longest window, or -1 - i, where sample i is the first that lies outside the split or its file.
    """
    plain = clusters.size - 1 == lengths.size  # each sequence is its own cluster
    longest, cu_seqlens[0] = 0, 0
    for at in range(samples.size):
        sequence = samples[at]
        if sequence < 0 or sequence >= clusters.size - 1:
            return -1 - at
        key = derived(derived(root[0], epochs[at]), sequence)
        if not plain:
            sequence = draw_member(clusters[_U(sequence)], clusters[_U(sequence) + _U(1)], key)
            if sequence < 0 or sequence >= lengths.size:
                return -1 - at
        length, begin = np.int64(lengths[_U(sequence)]), offsets[_U(sequence)]
        window = min(length, most)
        if length > window:
            begin += scaled(drawn(key, CROP_STREAM), length - window + 1)
        if window < 0 or begin < 0 or begin > residues - window:
            return -1 - at
        begins[at], keys[at], cu_seqlens[at + 1] = begin, key, cu_seqlens[at] + window + SPECIAL_TOKENS_PER_SEQUENCE
        longest = max(longest, window + SPECIAL_TOKENS_PER_SEQUENCE)
    return longest


@compiled
def _copy(content: Any, begins: Any, cu_seqlens: Any, tokens: Any, positions: Any) -> Any:
    """Copy the sequences between special tokens, and fill positions; return whether all token ids are known."""
    seen = np.uint8(0)
    for at in range(begins.size):  # touch all cache lines first, so that the loads overlap
        begin, residues = _U(begins[at]), _U(cu_seqlens[at + 1] - cu_seqlens[at] - SPECIAL_TOKENS_PER_SEQUENCE)
        for place in range(begin, begin + residues, _U(_CACHE_LINE_BYTES)):
            seen |= content[place]
    over = seen >= _FIRST_BIT_BEYOND
    for at in range(begins.size):
        begin, first, last = _U(begins[at]), _U(cu_seqlens[at]), _U(cu_seqlens[at + 1])
        for place in range(last - first):
            positions[first + place] = place
        tokens[first] = CLS_ID
        tokens[last - _U(1)] = EOS_ID
        for place in range(last - first - _U(SPECIAL_TOKENS_PER_SEQUENCE)):
            token = content[begin + place]
            tokens[first + _U(1) + place] = token
            over |= token >= VOCABULARY_SIZE
    return not over


@compiled
def fill(
    content: Any, begins: Any, keys: Any, cu_seqlens: Any, thresholds: Any, tokens: Any,
    positions: Any, index: Any, targets: Any,
) -> Any:  # fmt: skip
    """Write the masked row of the windows that `crop` found.

    content: uint8 [residues of the split]; begins int64 [S], keys uint64 [S], cu_seqlens int32 [S + 1]; thresholds
    uint64 [3], of the masking policy. Filled: tokens, positions int64 [T]; index, targets int64 [room], by `mask_row`.
    Returns the number of targets, `NO_ROOM`, or `UNKNOWN_TOKEN` where the content has other ids than the alphabet.
    """
    if not _copy(content, begins, cu_seqlens, tokens, positions):
        return UNKNOWN_TOKEN
    return mask_row(keys, cu_seqlens, thresholds, tokens, index, targets)
