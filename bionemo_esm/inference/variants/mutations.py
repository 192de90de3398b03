"""Variants of a protein as people write them (`A108D`, `A108D,N144D`), held against the wild type.

A position counts from `offset`, the number that the table gives to the first residue; a place counts from 0.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from bionemo_esm.alphabet import (
    ENCODING_TABLE,
    NUM_STANDARD_RESIDUES,
    STANDARD_RESIDUES,
    TOKEN_IDS,
    TOKENS,
    UNK_ID,
    encode,
)
from bionemo_esm.errors import UserError
from bionemo_esm.inference.inputs import read_proteins

REPLACEMENTS = STANDARD_RESIDUES + "UO"
"""What a residue can be replaced by: amino acids. B, Z and X stand for several."""
_WILD_TYPE_WORDS = ("", "wt", "_wt", "wildtype", "wild-type", "wild type")
_SEPARATORS = re.compile(r"[,:;/+\s]+")
_SUBSTITUTION = re.compile(r"([A-Z])(-?[0-9]{1,9})([A-Z=])")
_NO_SUBSTITUTION = re.compile(r"del|ins|dup|fs|ter|stop|[*-]$|^[*-]", re.IGNORECASE)
_OFFSETS_TOLD = 3  # more offsets that fit say nothing
_PAIRS_THAT_TELL = 5  # fewer residues fit at many an offset, be it by chance
_PAIRS_FOR_A_HINT = 2
_THREE_LETTERS = re.compile(r"(?:[pP]\.)?\(?([A-Za-z]{1,3})(-?[0-9]{1,9})([A-Za-z]{1,3}|=)\)?")
_THREE = "AlaArgAsnAspCysGlnGluGlyHisIleLeuLysMetPheProSerThrTrpTyrValSecPyl"
_AMINO_ACIDS = {_THREE[3 * at : 3 * at + 3].upper(): letter for at, letter in enumerate("ARNDCQEGHILKMFPSTWYVUO")}


class VariantError(UserError):
    """A variant that cannot be scored; the message names it, where it stands, and what is wrong."""


class MisfitError(VariantError):
    """A substitution that does not go with the wild type: outside it, or another residue stands there."""


class Substitution(NamedTuple):
    """One residue in place of another."""

    place: int  # 0 is the first residue
    wildtype: int  # token ids
    mutant: int


Variant = tuple[Substitution, ...]
"""What differs from the wild type, by ascending place; () is the wild type itself."""


@dataclass(frozen=True)
class WildType:
    """The protein that variants are variants of."""

    name: str
    tokens: NDArray[np.uint8]  # [R]: token ids, without <cls> and <eos>
    offset: int = 1  # the number of the first residue

    @property
    def last(self) -> int:
        """The number of the last residue."""
        return self.offset + len(self.tokens) - 1

    def variant(self, text: str) -> Variant:
        """A variant as it is written: substitutions with `,` `:` `;` `/` `+` or spaces between, or a word for the wild
        type (WT, or nothing). Of a residue by itself (A10A, A10=) nothing is left.

        Raises `VariantError` for what is no substitution, outside the sequence, or not the residue that stands there.
        """
        if text.strip().lower() in _WILD_TYPE_WORDS:
            return ()
        found = [self._substitution(word) for word in _SEPARATORS.split(text.strip()) if word]
        places = [substitution.place for substitution in found]
        for place in places:
            if places.count(place) > 1:
                raise VariantError(f"{_shown(text)}: position {place + self.offset} is mutated twice")
        return tuple(sorted(substitution for substitution in found if substitution.mutant != substitution.wildtype))

    def write(self, variant: Variant) -> str:
        """A variant as text: `A108D,N144D`, or `WT`."""
        return ",".join(TOKENS[wt] + str(place + self.offset) + TOKENS[mt] for place, wt, mt in variant) or "WT"

    def mutated(self, variant: Variant) -> NDArray[np.uint8]:
        """The token ids of the variant, [R]."""
        tokens = self.tokens.copy()
        for substitution in variant:
            tokens[substitution.place] = substitution.mutant
        return tokens

    def _substitution(self, word: str) -> Substitution:
        parts = _SUBSTITUTION.fullmatch(word.upper())
        if parts is None:
            what = "is no substitution of a residue; deletions, insertions and stops cannot be scored"
            if not _NO_SUBSTITUTION.search(word):
                what = "is not written like A108D: residue of the wild type, position, residue of the mutant"
                what += _one_letter_hint(word)
            raise VariantError(f"{_shown(word)}: {what}")
        wildtype, position, mutant = parts[1], int(parts[2]), parts[3].replace("=", parts[1])
        place = position - self.offset
        if not 0 <= place < len(self.tokens):
            raise MisfitError(
                f"{word}: position {position} is outside {self.name}, whose {len(self.tokens):,} residues are "
                f"{self.offset} to {self.last} by offset={self.offset}"
            )
        found = TOKENS[self.tokens[place]]
        if found != wildtype:
            raise MisfitError(
                f"{word}: position {position} of {self.name} is {found}, not {wildtype}, by offset={self.offset}"
            )
        if mutant not in REPLACEMENTS and mutant != wildtype:
            raise VariantError(f"{word}: {mutant} is no amino acid; one of {REPLACEMENTS} can take a residue's place")
        return Substitution(place, TOKEN_IDS[wildtype], TOKEN_IDS[mutant])


def read_variants(
    texts: Sequence[str],
    wild_type: WildType,
    where: Callable[[int], str],
    skipped: Callable[[str], None] | None = None,
) -> list[Variant | None]:
    """All variants of a table; `where` says in which row the one of an index stands.

    Raises `VariantError` for the first bad one; or tells `skipped` of each, if it is given, and leaves None in its
    place. Where every substitution would fit at another offset, or most of them do not fit at this one, it is the
    offset or the sequence that is wrong: this is raised in any case.
    """
    variants: list[Variant | None] = []
    looked = False
    for index, text in enumerate(texts):
        try:
            variants.append(wild_type.variant(text))
        except VariantError as error:
            problem, hint = f"{where(index)}: {error}", ""
            if isinstance(error, MisfitError) and not looked:
                hint, looked = _misfit_of_the_table(texts, wild_type, skipped is not None), True
            if hint or skipped is None:
                hint = hint or "; correct it, or leave such rows without a score by bad_rows=skip"
                raise VariantError(problem + hint) from None
            skipped(problem)
            variants.append(None)
    return variants


def variants_at_hand(values: Iterable[object], wild_type: WildType) -> list[Variant]:
    """What a notebook has of variants: text; None and NaN, an empty cell of a table, are the wild type.

    Raises `VariantError`, naming the index, for a bad one; for a lone text, which would be taken letter by letter.
    """
    if isinstance(values, str):
        raise VariantError(f"variants: give a list, as in [{_shown(values)!r}]")
    read: list[Variant] = []
    for index, value in enumerate(values):
        empty = value is None or (isinstance(value, float) and np.isnan(value))
        if not empty and not isinstance(value, str):
            raise VariantError(f"variants[{index}]: {_shown(repr(value))} is no text like 'A108D'")
        try:
            read.append(() if empty else wild_type.variant(str(value)))
        except VariantError as error:
            raise VariantError(f"variants[{index}]: {error}") from None
    return read


def read_wild_type(sequence: str, identifier: str | None = None, offset: int = 1) -> WildType:
    """The wild type: its residues, which are letters alone, or a file of one record, or that with an id in a file.

    Raises `InputError`, `SourceError` for what cannot be read, `VariantError` for the wrong number of records.
    """
    bare = "".join(sequence.split()).removesuffix("*")
    if not bare:
        raise VariantError("sequence: no residue in it; it must be the wild type's residues, or the name of a file")
    if bare.isalpha():
        if identifier is not None:
            raise VariantError(f"sequence_id={identifier}: is for a file, and {_shown(sequence)} is none")
        tokens = encode(bare.encode("ascii", "replace"))
        if (tokens == UNK_ID).any():
            place = int(np.flatnonzero(tokens == UNK_ID)[0])
            raise VariantError(f"sequence: residue {place + 1} is {bare[place]!r}, no letter of a protein; put X there")
        return WildType("the sequence", tokens, offset)
    proteins = read_proteins(sequence)
    if identifier is not None:
        found = [protein for protein in proteins if protein.id == identifier]
        if not found:
            raise VariantError(f"{sequence}: no record has the id {identifier}, as sequence_id says")
    else:
        found = list(islice(proteins, 2))
        if len(found) != 1:
            what = "it has several records; say by sequence_id=... which one is" if found else "no record in it is"
            raise VariantError(f"{sequence}: {what} the wild type")
    return WildType(found[0].id, found[0].tokens, offset)


def all_single(wild_type: WildType, region: tuple[int, int] | None = None) -> list[Variant]:
    """Each residue replaced by each of the other 19 standard ones, from the first on, letters in alphabetical order.

    `region`: the first and the last position; None for all. Residues that are none of the 20 (X, U, ...) are left out.
    Raises `VariantError` for a region that is not within the sequence, or has none of the 20.
    """
    first, last = (wild_type.offset, wild_type.last) if region is None else region
    if not wild_type.offset <= first <= last <= wild_type.last:
        raise VariantError(f"scan_region: {first} to {last} is not within {wild_type.offset} to {wild_type.last}, the "
                           f"residues of {wild_type.name} by offset={wild_type.offset}")  # fmt: skip
    standard = {TOKEN_IDS[letter] for letter in STANDARD_RESIDUES}
    variants: list[Variant] = [
        (Substitution(place, int(wild_type.tokens[place]), TOKEN_IDS[letter]),)
        for place in range(first - wild_type.offset, last - wild_type.offset + 1)
        for letter in sorted(STANDARD_RESIDUES)
        if int(wild_type.tokens[place]) in standard and TOKEN_IDS[letter] != wild_type.tokens[place]
    ]
    if not variants:
        raise VariantError(f"{wild_type.name}: none of residues {first} to {last} is one of the 20 standard ones")
    return variants


def scan_columns(wild_type: WildType, variants: Sequence[Variant]) -> dict[str, list[str] | list[int]]:
    """The table of a scan, but for the scores: mutant, position, wildtype, mutant_residue."""
    single = [variant[0] for variant in variants]
    return {
        "mutant": [wild_type.write(variant) for variant in variants],
        "position": [one.place + wild_type.offset for one in single],
        "wildtype": [TOKENS[one.wildtype] for one in single],
        "mutant_residue": [TOKENS[one.mutant] for one in single],
    }


def offsets_that_fit(
    texts: Iterable[str], tokens: NDArray[np.uint8], fewest: int = _PAIRS_THAT_TELL
) -> NDArray[np.int64]:
    """At which offsets every substitution lies inside the sequence and names the residue there: int64, ascending.

    What is not written as a substitution is passed over; where fewer than `fewest` residues are named, no offset is
    told.
    """
    pairs = set(_named(texts))
    if len(pairs) < fewest:
        return np.empty(0, dtype=np.int64)
    positions = [position for position, _ in pairs]
    offsets = np.arange(max(positions) - len(tokens) + 1, min(positions) + 1, dtype=np.int64)
    for position, letter in sorted(pairs):
        offsets = offsets[tokens[position - offsets] == ENCODING_TABLE[ord(letter)]]
    return offsets


def most_fitting_offset(texts: Iterable[str], tokens: NDArray[np.uint8]) -> tuple[int, int]:
    """The offset at which most substitutions name the residue that stands there, and how many; of several the least.

    (0, 0) where none fits anywhere.
    """
    offsets, times = [], []
    for (position, letter), count in _named(texts).items():
        found = position - np.flatnonzero(tokens == ENCODING_TABLE[ord(letter)])
        offsets.append(found)
        times.append(np.full(len(found), count))
    if not sum(map(len, offsets)):
        return 0, 0
    distinct, which = np.unique(np.concatenate(offsets), return_inverse=True)
    fits = np.bincount(which.ravel(), weights=np.concatenate(times)).astype(np.int64)
    return int(distinct[fits.argmax()]), int(fits.max())


def _named(texts: Iterable[str]) -> Counter[tuple[int, str]]:
    """The positions and the residues of the wild type that substitutions name, and how often each is named."""
    words = (word for text in texts for word in _SEPARATORS.split(text.strip().upper()))
    return Counter((int(parts[2]), parts[1]) for word in words if (parts := _SUBSTITUTION.fullmatch(word)))


def _misfit_of_the_table(texts: Sequence[str], wild_type: WildType, skips: bool) -> str:
    """What is wrong with a table as a whole, one substitution of which does not fit; "" where nothing seems to be.

    Another offset at which every one fits; fewer than five residues fit somewhere by chance, so that rows that are
    skipped are not held against the offset by them. If rows are skipped, also that most do not fit.
    """
    offsets = offsets_that_fit(texts, wild_type.tokens, _PAIRS_THAT_TELL if skips else _PAIRS_FOR_A_HINT)
    if 0 < len(offsets) <= _OFFSETS_TOLD and wild_type.offset not in offsets:
        return f"; every substitution fits with {' or '.join(f'offset={offset}' for offset in offsets)}"
    if not skips:
        return ""
    named = _named(texts)
    total = sum(named.values())
    fitting = sum(count for pair, count in named.items() if _stands(pair, wild_type))
    if 2 * fitting >= total:
        return ""
    best, most = most_fitting_offset(texts, wild_type.tokens)
    told = f"; {total - fitting:,} of {total:,} substitutions do not fit the wild type, too many to skip: "
    return told + (f"offset={best} would fit {most:,}" if most > fitting else "is it the protein that the table is of?")


def _stands(pair: tuple[int, str], wild_type: WildType) -> bool:
    position, letter = pair
    place = position - wild_type.offset
    return 0 <= place < len(wild_type.tokens) and bool(wild_type.tokens[place] == ENCODING_TABLE[ord(letter)])


def _one_letter_hint(word: str) -> str:
    """How what is written by HGVS, or in three letters, is to be written here; "" for anything else."""
    parts = _THREE_LETTERS.fullmatch(word)
    letters = [_AMINO_ACIDS.get(part.upper(), part.upper()) for part in parts.group(1, 3)] if parts else []
    if parts is None or any(len(letter) != 1 for letter in letters):
        return ""
    return f"; write {letters[0]}{parts[2]}{letters[1]}"


def _shown(text: str) -> str:
    return text if len(text) <= 40 else text[:37] + "..."


assert len(REPLACEMENTS) == NUM_STANDARD_RESIDUES + 2
