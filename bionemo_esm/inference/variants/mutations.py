"""Variants in the usual notation (`A108D`, `A108D,N144D`), checked against the wild type.

A position counts from `offset`, the number of the first residue in the user's table; a site counts from 0.
"""

from __future__ import annotations

import os
import re
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from bionemo_esm.alphabet import (
    ENCODING_TABLE,
    STANDARD_RESIDUES,
    TOKEN_IDS,
    TOKENS,
    UNK_ID,
    VOCABULARY_SIZE,
    encode,
)
from bionemo_esm.data.fasta import refuse_nucleotides
from bionemo_esm.errors import UserError
from bionemo_esm.inference.inputs import Protein, read_proteins

REPLACEMENTS = STANDARD_RESIDUES + "UO"
"""Amino acids that can replace a residue. B, Z and X stand for several, and cannot."""
_WILD_TYPE_WORDS = ("", "wt", "_wt", "wildtype", "wild-type", "wild type")
_SEPARATORS = re.compile(r"[,:;/+\s]+")
_SUBSTITUTION = re.compile(r"([A-Z])(-?[0-9]{1,9})([A-Z=])")
_NO_SUBSTITUTION = re.compile(r"del|ins|dup|fs|ter|stop|[*-]$|^[*-]", re.IGNORECASE)
_LONGEST_NAME = 255  # bytes, of a file
_OFFSETS_TOLD = 3  # with more offsets that fit, none is suggested
_PAIRS_AGAINST_CHANCE = 5  # fewer distinct (position, residue) pairs may fit at another offset by chance
_THREE_LETTERS = re.compile(r"(?:[pP]\.)?\(?([A-Za-z]{1,3})(-?[0-9]{1,9})([A-Za-z]{1,3}|=)\)?")
_THREE = "AlaArgAsnAspCysGlnGluGlyHisIleLeuLysMetPheProSerThrTrpTyrValSecPyl"
_AMINO_ACIDS = {_THREE[3 * at : 3 * at + 3].upper(): letter for at, letter in enumerate("ARNDCQEGHILKMFPSTWYVUO")}


class VariantError(UserError):
    """A variant that cannot be scored; the message names it, its row, and what is wrong."""


class MisfitError(VariantError):
    """A substitution that does not fit the wild type: outside it, or of another residue."""


class Substitution(NamedTuple):
    """One residue replaced by another."""

    site: int  # 0 is the first residue
    wildtype: int  # token ids
    mutant: int


Variant = tuple[Substitution, ...]
"""Substitutions by ascending site; () is the wild type."""


@dataclass(frozen=True)
class WildType:
    """The reference protein of variants."""

    name: str
    tokens: NDArray[np.uint8]  # [R]: token ids, without <cls> and <eos>
    offset: int = 1  # position of the first residue

    @property
    def last(self) -> int:
        """Position of the last residue."""
        return self.offset + len(self.tokens) - 1

    def variant(self, text: str) -> Variant:
        """Parse a variant: substitutions separated by `,` `:` `;` `/` `+` or spaces, or a word for the wild type (WT,
        or an empty text). A residue replaced by itself (A10A, A10=) is dropped.

        Raises `VariantError` for invalid notation, a site outside the sequence, and another residue than the one there.
        """
        if text.strip().lower() in _WILD_TYPE_WORDS:
            return ()
        found = [self._substitution(word) for word in _SEPARATORS.split(text.strip()) if word]
        sites = [substitution.site for substitution in found]
        for site in sites:
            if sites.count(site) > 1:
                raise VariantError(f"{_shortened(text)}: position {site + self.offset} is mutated twice")
        return tuple(sorted(substitution for substitution in found if substitution.mutant != substitution.wildtype))

    def write(self, variant: Variant) -> str:
        """Return a variant as text: `A108D,N144D`, or `WT`."""
        return ",".join(TOKENS[wt] + str(site + self.offset) + TOKENS[mt] for site, wt, mt in variant) or "WT"

    def mutated(self, variant: Variant) -> NDArray[np.uint8]:
        """Return the token ids of the variant, [R]."""
        tokens = self.tokens.copy()
        for substitution in variant:
            tokens[substitution.site] = substitution.mutant
        return tokens

    def _substitution(self, word: str) -> Substitution:
        parts = _SUBSTITUTION.fullmatch(word.upper())
        if parts is None:
            what = "is no substitution of a residue; deletions, insertions and stops cannot be scored"
            if not _NO_SUBSTITUTION.search(word):
                what = "is not written like A108D: residue of the wild type, position, residue of the mutant"
                what += _one_letter_hint(word)
            raise VariantError(f"{_shortened(word)}: {what}")
        wildtype, position, mutant = parts[1], int(parts[2]), parts[3].replace("=", parts[1])
        site = position - self.offset
        if not 0 <= site < len(self.tokens):
            raise MisfitError(
                f"{word}: position {position} is outside {self.name}, whose {len(self.tokens):,} residues are "
                f"{self.offset} to {self.last} by offset={self.offset}"
            )
        found = TOKENS[self.tokens[site]]
        if found != wildtype:
            raise MisfitError(
                f"{word}: position {position} of {self.name} is {found}, not {wildtype}, by offset={self.offset}"
            )
        if mutant not in REPLACEMENTS and mutant != wildtype:
            raise VariantError(f"{word}: {mutant} is no amino acid; one of {REPLACEMENTS} can take a residue's place")
        return Substitution(site, TOKEN_IDS[wildtype], TOKEN_IDS[mutant])


def read_variants(
    texts: Sequence[str],
    wild_type: WildType,
    where: Callable[[int], str],
    skipped: Callable[[str], None] | None = None,
) -> list[Variant | None]:
    """Return the variants of a table's rows; `where` gives the name of a row in messages.

    A bad variant raises `VariantError`; if `skipped` is given, it is called with the problem instead, and the variant
    is None. If all substitutions fit at another offset, or most do not fit at this one, the offset or the sequence is
    wrong: that raises in any case.
    """
    variants: list[Variant | None] = []
    hinted = False
    for index, text in enumerate(texts):
        try:
            variants.append(wild_type.variant(text))
        except VariantError as error:
            problem, hint = f"{where(index)}: {error}", ""
            if isinstance(error, MisfitError) and not hinted:
                hint, hinted = _table_misfit(texts, wild_type, skipped is not None), True
            if hint or skipped is None:
                hint = hint or "; correct it, or leave such rows without a score by bad_rows=skip"
                raise VariantError(problem + hint) from None
            skipped(problem)
            variants.append(None)
    return variants


def variants_at_hand(values: Iterable[object], wild_type: WildType) -> list[Variant]:
    """Return the variants that a Python program passes: text; None and NaN (an empty cell) are the wild type.

    Raises `VariantError`, naming the index, for a bad one; also for a lone text, which would be taken letter by letter.
    """
    if isinstance(values, str):
        raise VariantError(f"variants: give a list, as in [{_shortened(values)!r}]")
    if not isinstance(values, Iterable):
        raise VariantError(f"variants: give a list of texts like 'A108D', not {_shortened(repr(values))}")
    texts: list[str] = []
    for index, value in enumerate(values):
        empty = value is None or (isinstance(value, float) and np.isnan(value))
        if not empty and not isinstance(value, str):
            raise VariantError(f"variants[{index}]: {_shortened(repr(value))} is no text like 'A108D'")
        texts.append("" if empty else str(value))
    variants: list[Variant] = []
    for index, text in enumerate(texts):
        try:
            variants.append(wild_type.variant(text))
        except VariantError as error:
            hint = _table_misfit(texts, wild_type, False) if isinstance(error, MisfitError) else ""
            raise VariantError(f"variants[{index}]: {error}{hint}") from None
    return variants


def read_wild_type(sequence: str, identifier: str | None = None, offset: int = 1) -> WildType:
    """Return the wild type: residues as letters, a file of one record, or the record of this id in a file.

    Raises `VariantError` for the wrong number of records and for arguments of another type, `InputError` and
    `SourceError` for a file that cannot be read.
    """
    if not isinstance(sequence, str | os.PathLike):
        raise VariantError(f"sequence must be text, not {_shortened(repr(sequence))}", code="variants.type")
    if isinstance(offset, bool) or not isinstance(offset, int | np.integer):
        raise VariantError(f"offset must be an integer, not {_shortened(repr(offset))}", code="variants.type")
    sequence, offset = os.fspath(sequence), int(offset)
    bare = "".join(sequence.split()).removesuffix("*")
    if not bare:
        raise VariantError("sequence: no residue in it; it must be the wild type's residues, or the name of a file")
    if bare.isalpha():
        if identifier is not None:
            raise VariantError(f"sequence_id={identifier}: is for a file, and {_shortened(sequence)} is none")
        if len(sequence) <= _LONGEST_NAME and Path(sequence).exists():
            raise VariantError(
                f"sequence: {sequence} can be residues and is the name of a file or folder here; write ./{sequence} "
                "for the file, or residues with a * at the end"
            )
        return WildType("the sequence", _typed_residues(bare), offset)
    if not Path(sequence).exists():
        raise VariantError(
            f"{sequence}: no such file, and not residues, which are letters alone; check the path (the working folder "
            f"is {Path.cwd()})"
        )
    protein = _one_record(sequence, identifier)
    return WildType(protein.id, protein.tokens, offset)


def _typed_residues(letters: str) -> NDArray[np.uint8]:
    tokens = encode(letters.encode("ascii", "replace"))
    if (tokens == UNK_ID).any():
        site = int(np.flatnonzero(tokens == UNK_ID)[0])
        raise VariantError(f"sequence: residue {site + 1} is {letters[site]!r}, no letter of a protein; put X there")
    refuse_nucleotides("sequence", np.bincount(tokens, minlength=VOCABULARY_SIZE))
    return tokens


def _one_record(file: str, identifier: str | None) -> Protein:
    proteins = read_proteins(file)
    if identifier is not None:
        for protein in proteins:
            if protein.id == identifier:
                return protein
        raise VariantError(f"{file}: no record has the id {identifier}, as sequence_id says")
    found = list(islice(proteins, 2))
    if len(found) != 1:
        what = "it has several records; say by sequence_id=... which one is" if found else "no record in it is"
        raise VariantError(f"{file}: {what} the wild type")
    return found[0]


def all_single(wild_type: WildType, region: tuple[int, int] | None = None) -> list[Variant]:
    """Return each residue replaced by each of the other 19 standard ones, by site, mutants in alphabetical order.

    `region`: the first and the last position; None for all. Residues outside the standard 20 (X, U, ...) are left out.
    Raises `VariantError` for a region outside the sequence, and for one without standard residues.
    """
    if region is not None and (len(np.shape(region)) != 1 or len(region) != 2 or np.asarray(region).dtype.kind != "i"):
        raise VariantError(f"scan_region: {region!r} is not the first and the last position", code="variants.type")
    first, last = (wild_type.offset, wild_type.last) if region is None else region
    if not wild_type.offset <= first <= last <= wild_type.last:
        raise VariantError(f"scan_region: {first} to {last} is not within {wild_type.offset} to {wild_type.last}, the "
                           f"residues of {wild_type.name} by offset={wild_type.offset}")  # fmt: skip
    standard = {TOKEN_IDS[letter] for letter in STANDARD_RESIDUES}
    variants: list[Variant] = [
        (Substitution(site, int(wild_type.tokens[site]), TOKEN_IDS[letter]),)
        for site in range(first - wild_type.offset, last - wild_type.offset + 1)
        for letter in sorted(STANDARD_RESIDUES)
        if int(wild_type.tokens[site]) in standard and TOKEN_IDS[letter] != wild_type.tokens[site]
    ]
    if not variants:
        raise VariantError(f"{wild_type.name}: none of residues {first} to {last} is one of the 20 standard ones")
    return variants


def scan_columns(wild_type: WildType, variants: Sequence[Variant]) -> dict[str, list[str] | list[int]]:
    """Return the columns of a scan's table without the scores: mutant, position, wildtype, mutant_residue."""
    single = [variant[0] for variant in variants]
    return {
        "mutant": [wild_type.write(variant) for variant in variants],
        "position": [one.site + wild_type.offset for one in single],
        "wildtype": [TOKENS[one.wildtype] for one in single],
        "mutant_residue": [TOKENS[one.mutant] for one in single],
    }


def offsets_that_fit(
    texts: Iterable[str], tokens: NDArray[np.uint8], fewest: int = _PAIRS_AGAINST_CHANCE
) -> NDArray[np.int64]:
    """Return the offsets at which every substitution lies inside the sequence and names the residue there: int64,
    ascending.

    Texts that are not written as substitutions are ignored. No offset is returned if the texts name fewer than `fewest`
    distinct pairs of position and residue.
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
    """Return the offset at which most substitutions name the right residue, and their number; the smallest of equals.

    (0, 0) if none fits anywhere.
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
    """Count the pairs of position and wild-type residue that substitutions name."""
    words = (word for text in texts for word in _SEPARATORS.split(text.strip().upper()))
    return Counter((int(parts[2]), parts[1]) for word in words if (parts := _SUBSTITUTION.fullmatch(word)))


def _table_misfit(texts: Sequence[str], wild_type: WildType, skips: bool) -> str:
    """Return what is wrong with a table of which one substitution does not fit; "" if nothing points to the table.

    That is another offset at which all substitutions fit. When bad rows are skipped, a few pairs may fit elsewhere by
    chance, so at least five count; there it is also that most substitutions do not fit.
    """
    offsets = offsets_that_fit(texts, wild_type.tokens, _PAIRS_AGAINST_CHANCE if skips else 1)
    most = _OFFSETS_TOLD if len(set(_named(texts))) > 1 else 1
    if 0 < len(offsets) <= most and wild_type.offset not in offsets:
        return f"; every substitution fits with {' or '.join(f'offset={offset}' for offset in offsets)}"
    if not skips:
        return ""
    named = _named(texts)
    total = sum(named.values())
    fitting = sum(count for pair, count in named.items() if _fits(pair, wild_type))
    if 2 * fitting >= total:
        return ""
    best, most = most_fitting_offset(texts, wild_type.tokens)
    fault = f"; {total - fitting:,} of {total:,} substitutions do not fit the wild type, too many to skip: "
    return fault + (
        f"offset={best} would fit {most:,}" if most > fitting else "is it the protein that the table is of?"
    )


def _fits(pair: tuple[int, str], wild_type: WildType) -> bool:
    position, letter = pair
    site = position - wild_type.offset
    return 0 <= site < len(wild_type.tokens) and bool(wild_type.tokens[site] == ENCODING_TABLE[ord(letter)])


def _one_letter_hint(word: str) -> str:
    """Return how a substitution in HGVS or three-letter notation is written here; "" for anything else."""
    parts = _THREE_LETTERS.fullmatch(word)
    letters = [_AMINO_ACIDS.get(part.upper(), part.upper()) for part in parts.group(1, 3)] if parts else []
    if parts is None or any(len(letter) != 1 for letter in letters):
        return ""
    return f"; write {letters[0]}{parts[2]}{letters[1]}"


def _shortened(text: str) -> str:
    return text if len(text) <= 40 else text[:37] + "..."
