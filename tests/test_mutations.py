"""Variant parsing: accepted notations, rejected variants, and their error messages."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from bionemo_esm.alphabet import STANDARD_RESIDUES, TOKENS, decode, encode
from bionemo_esm.errors import UserError
from bionemo_esm.inference.variants.mutations import (
    Substitution,
    VariantError,
    WildType,
    all_single,
    offsets_that_fit,
    read_variants,
    read_wild_type,
    variants_at_hand,
)
from bionemo_esm.inference.variants.table import FEWER_MUTATIONS, SUBSTITUTION_MATRIX, baselines

UBIQUITIN = "MQIFVKTLTGKTITLEVEPSDTIENVKAKIQDKEGIPPDQQRLIFAGKQLEDGRTLSDYNIQKESTLHLVLRLRGG"


def wild_type(sequence: str = UBIQUITIN, offset: int = 1) -> WildType:
    return WildType("ubiquitin", encode(sequence), offset)


def texts_at(*places: int, offset: int) -> list[str]:
    return [f"{UBIQUITIN[place]}{place + offset}W" for place in places]


def where(index: int) -> str:
    return f"mutants.csv, row {index + 2}"


def test_variant_is_sorted_by_position_with_any_separator() -> None:
    told = wild_type().variant("K6R,Q2A,L8W")
    assert [(one.site, TOKENS[one.wildtype], TOKENS[one.mutant]) for one in told] == [
        (1, "Q", "A"), (5, "K", "R"), (7, "L", "W"),
    ]  # fmt: skip
    for separator in (",", ":", ";", "/", "+", " ", ", ", "\t"):
        assert wild_type().variant(separator.join(("K6R", "Q2A", "L8W"))) == told
    assert wild_type().variant(" k6r,q2a ,l8w,") == told
    assert wild_type().write(told) == "Q2A,K6R,L8W"
    assert decode(wild_type().mutated(told))[:9] == "MAIFVRTWT"


@pytest.mark.parametrize("text", ["", " ", "WT", "wt", "_wt", "WildType", "M1M", "M1=", "M1M,Q2Q"])
def test_wild_type_is_accepted_in_many_notations(text: str) -> None:
    assert wild_type().variant(text) == ()
    assert wild_type().write(()) == "WT"


def test_synonymous_substitution_is_dropped() -> None:
    assert wild_type().variant("M1M,Q2A") == wild_type().variant("Q2A")


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("A2G", r"A2G: position 2 of ubiquitin is Q, not A, by offset=1"),
        ("G77A", r"position 77 is outside ubiquitin, whose 76 residues are 1 to 76 by offset=1"),
        ("M0A", r"position 0 is outside"),
        ("M-3A", r"position -3 is outside"),
        ("Q2*", r"Q2\*: .*deletions, insertions and stops cannot be scored"),
        ("Q2del", r"deletions, insertions"),
        ("Q2_I3insG", r"deletions, insertions"),
        ("Gln2Ala", r"not written like A108D.*; write Q2A$"),
        ("p.Lys6Arg", r"not written like A108D.*; write K6R$"),
        ("p.(Q2A)", r"; write Q2A$"),
        ("p.Foo6Arg", r"residue of the mutant$"),
        ("2A", r"not written like A108D"),
        ("Q2A,Q2C", r"position 2 is mutated twice"),
        ("Q2X", r"X is no amino acid"),
        ("Q2J", r"J is no amino acid"),
        ("Q" + "9" * 5000 + "A", r"not written like A108D"),
        ("Q٢A", r"not written like A108D"),
    ],
)
def test_invalid_variant_is_rejected_with_its_text(text: str, said: str) -> None:
    with pytest.raises(VariantError, match=said) as caught:
        wild_type().variant(text)
    assert isinstance(caught.value, UserError)
    assert len(str(caught.value)) < 200


def test_offset_is_the_number_of_the_first_residue() -> None:
    assert wild_type(offset=24).variant("M24A") == wild_type().variant("M1A")
    assert wild_type(offset=0).variant("M0A") == wild_type().variant("M1A")
    assert wild_type(offset=-2).variant("M-2A") == wild_type().variant("M1A")
    assert wild_type(offset=-2).write(wild_type().variant("M1A,Q2C")) == "M-2A,Q-1C"
    with pytest.raises(VariantError, match="24 to 99 by offset=24"):
        wild_type(offset=24).variant("M1A")


def test_bad_row_is_reported_with_file_and_row_number() -> None:
    with pytest.raises(VariantError, match=r"^mutants.csv, row 4: A2G: .*is Q, not A.*bad_rows=skip"):
        read_variants(["M1A", "WT", "A2G", "A3G"], wild_type(), where)


def test_bad_rows_can_be_skipped_and_are_reported() -> None:
    told: list[str] = []
    read = read_variants(["M1A", "A2G", "Q2*", "Q2A"], wild_type(), where, told.append)
    assert [variant is None for variant in read] == [False, True, True, False]
    assert [problem.split(":")[0] for problem in told] == ["mutants.csv, row 3", "mutants.csv, row 4"]


@pytest.mark.parametrize("skips", [False, True])
def test_table_with_another_numbering_gets_an_offset_suggestion(skips: bool) -> None:
    texts = texts_at(0, 5, 20, 40, 41, 42, 75, offset=24)
    with pytest.raises(VariantError, match=r"every substitution fits with offset=24$"):
        read_variants([*texts, "Q25*", "WT"], wild_type(), where, print if skips else None)
    assert None not in read_variants(texts, wild_type(offset=24), where)


def test_no_offset_is_suggested_if_none_fits_or_one_residue_fits_several() -> None:
    for texts in (["A2G"], ["Q24A", "Q24C"], [*texts_at(0, 5, 20, 40, 75, offset=24), "W30A"]):
        with pytest.raises(VariantError) as caught:
            read_variants(texts, wild_type(), where)
        assert "fits with" not in str(caught.value)


def test_short_table_gets_the_only_offset_that_fits_every_row() -> None:
    with pytest.raises(VariantError, match=r"row 2: M24W: .*every substitution fits with offset=24$"):
        read_variants(texts_at(0, 58, 67, offset=24), wild_type(), where)


def test_single_substitution_gets_an_offset_suggestion_if_only_one_fits() -> None:
    short = WildType("short", encode("MKTV"))
    with pytest.raises(VariantError, match=r"row 2: K25A: .*every substitution fits with offset=24$"):
        read_variants(["K25A"], short, where)
    with pytest.raises(VariantError, match=r"variants\[0\]: K25A: .*every substitution fits with offset=24$"):
        variants_at_hand(["K25A"], short)


@pytest.mark.parametrize(("wrong", "message"), [
    ({"sequence": None}, "sequence must be text, not None"),
    ({"sequence": "MKTV", "offset": "2"}, "offset must be an integer, not '2'"),
    ({"sequence": "MKTV", "offset": True}, "offset must be an integer, not True"),
])  # fmt: skip
def test_arguments_of_the_wrong_type_are_rejected_by_name(wrong: dict[str, Any], message: str) -> None:
    with pytest.raises(VariantError, match=message):
        read_wild_type(**wrong)
    for region in (5, "AB", (1, 2, 3), (1.5, 2)):
        with pytest.raises(VariantError, match="is not the first and the last position"):
            all_single(WildType("short", encode("MKTV")), region)  # type: ignore[arg-type]
    with pytest.raises(VariantError, match="give a list of texts like 'A108D', not None"):
        variants_at_hand(None, WildType("short", encode("MKTV")))  # type: ignore[arg-type]


def test_rows_are_not_skipped_if_most_do_not_fit() -> None:
    stray = ["W30A", "W31A"]  # the protein has no tryptophan, so no offset fits all
    texts = [*texts_at(0, 5, 20, 40, 41, 42, 75, offset=24), *stray]
    with pytest.raises(VariantError, match=r"8 of 9 substitutions do not fit .*offset=24 would fit 7$"):
        read_variants(texts, wild_type(), where, print)
    with pytest.raises(VariantError, match="is it the protein that the table is of"):
        read_variants(["W30A", "W31A", "W32A", "M1A"], wild_type(), where, print)
    read = read_variants([*texts_at(0, 5, offset=1), *stray], wild_type(), where, [].append)
    assert [variant is None for variant in read] == [False, False, True, True]


def test_variants_in_python_are_text_or_empty_and_reported_by_index() -> None:
    read = variants_at_hand(np.array(["Q2A", None, float("nan"), "WT"], dtype=object), wild_type())
    assert read == [wild_type().variant("Q2A"), (), (), ()]
    for wrong, said in ((["Q2A", "A2G"], r"variants\[1\]: A2G: position 2"), ([3], r"variants\[0\]: 3 is no text"),
                        ("Q2A", r"give a list, as in \['Q2A'\]")):  # fmt: skip
        with pytest.raises(VariantError, match=said):
            variants_at_hand(wrong, wild_type())


@pytest.mark.parametrize(
    ("sequence", "said"), [("", "no residue in it"), (" *", "no residue"), ("MKJ", "residue 3 is 'J'")]
)
def test_invalid_wild_type_is_rejected(sequence: str, said: str) -> None:
    with pytest.raises(VariantError, match=said) as caught:
        read_wild_type(sequence)
    assert "bad_records" not in str(caught.value)


@given(st.integers(-3000, 3000), st.lists(st.integers(0, 75), min_size=12, unique=True))
def test_offset_of_a_table_is_among_the_fitting_offsets(offset: int, places: list[int]) -> None:
    texts = texts_at(*places, offset=offset)
    found = offsets_that_fit(texts, encode(UBIQUITIN))
    assert offset in found
    for other in found:
        assert None not in read_variants(texts, wild_type(offset=int(other)), where)


def test_scan_replaces_each_residue_by_each_of_the_other_19() -> None:
    every = all_single(wild_type(offset=10))
    assert len(every) == len(set(every)) == 19 * len(UBIQUITIN)
    assert {wild_type().write(variant)[-1] for variant in every if variant[0].site == 0} == set(STANDARD_RESIDUES) - {
        "M"
    }
    some = all_single(wild_type(offset=10), (11, 12))
    assert [wild_type(offset=10).write(variant) for variant in some[:3]] == ["Q11A", "Q11C", "Q11D"]
    assert {variant[0].site for variant in some} == {1, 2}


def test_scan_skips_nonstandard_residues_and_rejects_a_region_outside() -> None:
    assert {variant[0].site for variant in all_single(wild_type("MXKUA"))} == {0, 2, 4}
    for region in ((0, 3), (3, 77), (5, 4)):
        with pytest.raises(VariantError, match="scan_region"):
            all_single(wild_type(), region)
    with pytest.raises(VariantError, match="none of residues 1 to 2"):
        all_single(wild_type("XX"))


def test_wild_type_is_a_sequence_or_a_fasta_record(tmp_path: Path) -> None:
    one, two = tmp_path / "one.fasta", tmp_path / "two.fasta"
    one.write_text(f">sp|P0CG48 ubiquitin\n{UBIQUITIN[:40]}\n{UBIQUITIN[40:].lower()}*\n")
    two.write_text(f">a\nMKV\n>b\n{UBIQUITIN}\n")
    assert decode(read_wild_type(f" {UBIQUITIN[:30]} {UBIQUITIN[30:]}* ").tokens) == UBIQUITIN
    assert decode(read_wild_type(str(one)).tokens) == UBIQUITIN
    assert read_wild_type(str(one), offset=7).name == "sp|P0CG48"
    assert read_wild_type(str(one), offset=7).last == 82
    assert decode(read_wild_type(str(two), "b").tokens) == UBIQUITIN
    for arguments, said in (
        ((str(two),), "several records; say by sequence_id"),
        ((str(two), "c"), "no record has the id c"),
        ((UBIQUITIN, "c"), "sequence_id=c"),
        (("MKJV",), "residue 3 is 'J'"),
        ((str(tmp_path / "none.fasta"),), "none.fasta: no such file, and not residues"),
        (("ATGGTGCATCTGACTCCTGAGGAG",), "sequence: looks like DNA"),
    ):
        with pytest.raises(UserError, match=said):
            read_wild_type(*arguments)


def test_residues_that_are_also_the_name_of_a_folder_are_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "MKV").mkdir()
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match="MKV can be residues and is the name of a file or folder here"):
        read_wild_type("MKV")
    assert decode(read_wild_type("MKV*").tokens) == "MKV"


def test_baselines_equal_blosum62_and_mutation_counts() -> None:
    read = [wild_type().variant(text) for text in ("M1L", "M1W", "M1L,K6R", "")]
    found = baselines([*read, None, (Substitution(0, 24, 4),)])
    np.testing.assert_array_equal(found[SUBSTITUTION_MATRIX], [2 - 5, -1 - 5, 2 - 5 + 2 - 5, 0, np.nan, np.nan])
    np.testing.assert_array_equal(found[FEWER_MUTATIONS], [-1, -1, -2, 0, np.nan, -1])
    assert FEWER_MUTATIONS not in baselines(read[:2])
