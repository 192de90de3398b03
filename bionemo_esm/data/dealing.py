"""How a global batch is dealt: every rank finds its own part of it, of equal work, and asks no other rank.

Sequences differ in length, so equal numbers of them are unequal work, and a step takes as long as its slowest rank.
Each rank therefore sees the lengths of the whole global batch (not its residues) and deals it like cards.
"""

from __future__ import annotations

from dataclasses import dataclass, fields

import numpy as np
from numpy.typing import NDArray

IntArray = NDArray[np.int64]


@dataclass(frozen=True)
class BatchPlan:
    """How large a global batch is, and how it is dealt to ranks and then into micro batches.

    The global batch is `global_batch_size` sequences, or as many as come to at most `global_batch_tokens` tokens. A
    micro batch is `micro_batch_size` sequences, or any number of at most `micro_batch_tokens` tokens. Raises
    `ValueError` when a number of sequences does not come out even; tokens always do.
    """

    global_batch_size: int | None = None
    micro_batch_size: int | None = None
    rank: int = 0
    world_size: int = 1
    global_batch_tokens: int | None = None
    micro_batch_tokens: int | None = None

    def __post_init__(self) -> None:
        for name in (item.name for item in fields(self) if item.name != "rank"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"{name} must be at least 1, not {value}")
        if not 0 <= self.rank < self.world_size:
            raise ValueError(f"rank {self.rank} is not one of {self.world_size}")
        for whole in ("global_batch", "micro_batch"):
            if (getattr(self, f"{whole}_size") is None) == (getattr(self, f"{whole}_tokens") is None):
                raise ValueError(f"{whole}_size (sequences) or {whole}_tokens must be given, and not both")
        self._check_that_it_comes_out_even()

    def _check_that_it_comes_out_even(self) -> None:
        size, micro = self.global_batch_size, self.micro_batch_size
        if size is None:
            return
        if micro is None:
            if size < self.world_size:
                raise ValueError(f"a global batch of {size} sequences leaves some of {self.world_size} ranks idle")
            return
        if size % (micro * self.world_size) == 0:
            return
        raise ValueError(
            f"a global batch of {size} sequences cannot be dealt evenly to {self.world_size} ranks in micro batches of "
            f"{micro}; {_even_ways(size, micro, self.world_size)}. Or set micro_batch_tokens in place of "
            "micro_batch_size: then any number of ranks will do"
        )

    @property
    def accumulation(self) -> int | None:
        """Micro batches of a rank's share of a step; None where their number follows from the sequences' lengths."""
        if self.global_batch_size is None or self.micro_batch_size is None:
            return None
        return self.global_batch_size // (self.micro_batch_size * self.world_size)

    def share(self, tokens: IntArray, rank: int | None = None) -> list[IntArray]:
        """A rank's micro batches (this plan's rank, if none is given) of a global batch of sequences of these lengths.

        tokens: int64 [n]. Each micro batch is int64 [k], indices into `tokens`, ascending.
        """
        rank = self.rank if rank is None else rank
        if self.accumulation is not None:
            hands = deal(tokens, self.world_size * self.accumulation)
            return hands[rank * self.accumulation : (rank + 1) * self.accumulation]
        own = deal(tokens, self.world_size)[rank]
        return [own[hand] for hand in self._micro_batches(tokens[own])]

    def _micro_batches(self, tokens: IntArray) -> list[IntArray]:
        """As few as keep within the limit, and alike."""
        if self.micro_batch_size is not None:
            return deal(tokens, -(-len(tokens) // self.micro_batch_size))
        assert self.micro_batch_tokens is not None
        number = max(-(-int(tokens.sum()) // self.micro_batch_tokens), 1)
        while True:
            hands = deal(tokens, number)
            if number >= len(tokens) or max(int(tokens[hand].sum()) for hand in hands) <= self.micro_batch_tokens:
                return hands
            number += 1


def deal(tokens: IntArray, hands: int) -> list[IntArray]:
    """Deal sequences of these lengths (int64 [n]) so that the hands hold like numbers of sequences and of tokens.

    Longest first, there and back, as captains choose teams. Each hand is int64 [k], ascending indices; numbers of
    sequences differ by one at most.
    """
    if hands == 1:
        return [np.arange(len(tokens), dtype=np.int64)]
    longest_first = np.argsort(_descending_key(tokens), kind="stable")
    turn, place = np.divmod(np.arange(len(tokens), dtype=np.int64), hands)
    holder = np.empty(len(tokens), dtype=np.int32)
    holder[longest_first] = np.where(turn % 2, hands - 1 - place, place)
    by_hand = np.argsort(holder, kind="stable").astype(np.int64)
    return np.split(by_hand, np.cumsum(np.bincount(holder, minlength=hands))[:-1])


def _descending_key(tokens: IntArray) -> NDArray[np.uint16] | IntArray:
    """A key that sorts long sequences first; of 16 bits where it fits, which sorts ten times as fast."""
    longest = int(tokens.max(initial=0))
    return (longest - tokens).astype(np.uint16) if longest < 2**16 else longest - tokens


def _even_ways(size: int, micro: int, world_size: int) -> str:
    """What comes out even, with each of the three changed alone."""
    ways = [f"make it a multiple of {micro * world_size}"]
    if size % micro == 0:
        ranks = [str(divisor) for divisor in divisors(size // micro)]
        ways.append(f"or the ranks one of {_some(ranks)}")
    if size % world_size == 0:
        ways.append(f"or the micro batch one of {_some([str(divisor) for divisor in divisors(size // world_size)])}")
    return ", ".join(ways)


def _some(names: list[str], most: int = 24) -> str:
    return ", ".join(names) if len(names) <= most else ", ".join([*names[: most // 2], "...", *names[-most // 2 :]])


def divisors(number: int) -> list[int]:
    """All of them, ascending."""
    small = [candidate for candidate in range(1, int(number**0.5) + 1) if number % candidate == 0]
    return sorted({*small, *(number // candidate for candidate in small)})
