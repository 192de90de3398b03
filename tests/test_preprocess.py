"""Building a store from FASTA: cleaning, deduplication, splits, and rejected input."""

from __future__ import annotations

import gzip
import hashlib
import random
from collections.abc import Sequence
from pathlib import Path

import pytest

from bionemo_esm.alphabet import decode
from bionemo_esm.data import fasta
from bionemo_esm.data import fasta as sources
from bionemo_esm.data import preprocess as uniref50
from bionemo_esm.data.fasta import FastaError, SourceError
from bionemo_esm.data.preprocess import BuildPolicy, build_store, build_store_from_splits
from bionemo_esm.data.store import SPLITS, ProteinStore, StoreError
from errors import refused

PROTEIN_FASTA = """
>ubiquitin
MQIFVKTLTGKTITLEVEPSDTIENVKAKIQDKEGIPPDQQRLIFAGKQLEDGRTLSDYNIQKESTLHLVLRLRGG
>insulin
MALWMRLLPLLALLALWGPDPAAAFVNQHLCGSHLVEALYLVCGERGFFYTPKTRREAEDLQVGQVELGGGPGAGSLQPLALEGSLQKRGIVEQCCTSIC
SLYQLENYCN
>lysozyme
KVFGRCELAAAMKRHGLDNYRGYSLGNWVCAAKFESNFNTQATNRNTDGSTDYGILQINSRWWCNDGRTPGSRNLCNIPCSALLSSDITASVNCAKKIVS
DGNGMNAWVAWRNRCKGTDVQAWIRGCRL
>trp_cage
NLYIQWLKDGGPSSGRPPPS
>protein_g_b1
MTYKLILNGKTLKGETTTEAVDAATAEKVFKQYANDNGVDGEWTYDDATKTFTVTE
>villin_hp35
LSDEDFKAVFGMTRSAFANLPLWKQQNLKKEKGLF
>bpti
RPDFCLEPPYTGPCKARIIRYFYNAKAGLCQTFVYGGCRAKRNNFKSAEDCMRTCGGA
>myoglobin
VLSEGEWQLVLHVWAKVEADVAGHGQDILIRLFKSHPETLEKFDRFKHLKTEAEMKASEDLKKHGVTVLTALGAILKKKGHHEAELKPLAQSHATKHKIP
IKYLEFISEAIIHVLHSRHPGDFGADAQGAMNKALELFRKDIAAKYKELGYQG
>haemoglobin_a
MVLSPADKTNVKAAWGKVGAHAGEYGAEALERMFLSFPTTKTYFPHFDLSHGSAQVKGHGKKVADALTNAVAHVDDMPNALSALSDLHAHKLRVDPVNFK
LLSHCLLVTLAAHLPAEFTPAVHASLDKFLASVSTVLTSKYR
>haemoglobin_b
MVHLTPEEKSAVTALWGKVNVDEVGGEALGRLLVVYPWTQRFFESFGDLSTPDAVMGNPKVKAHGKKVLGAFSDGLAHLDNLKGTFATLSELHCDKLHVD
PENFRLLGNVLVCVLAHHFGKEFTPPVQAAYQKVVAGVANALAHKYH
>cytochrome_c
MGDVEKGKKIFIMKCSQCHTVEKGGKHKTGPNLHGLFGRKTGQAPGYSYTAANKNKGIIWGEDTLMEYLENPKKYIPGTKMIFVGIKKKEERADLIAYLK
KATNE
>thioredoxin
MSDKIIHLTDDSFDTDVLKADGAILVDFWAEWCGPCKMIAPILDEIADEYQGKLTVAKLNIDQNPGTAPKYGIRGIPTLLLFKNGEVAATKVGALSKGQL
KEFLDANLA
>crambin
TTCCPSIVARSNFNVCRLPGTPEALCATYTGCIIIPGATCPGDYAN
>melittin
GIGAVLKVLTTGLPALISWIKRKRQQ
>glucagon
HSQGTFTSDYSKYLDSRRAQDFVQWLMNT
>amyloid_beta
DAEFRHDSGYEVHHQKLVFFAEDVGSNKGAIIGLMVGGVVIA
>barnase
AQVINTFDGVADYLQTYHKLPDNYITKSEAQALGWVASKGNLADVAPGKSIGGDIFSNREGKLPGKSGRTWREADINYTSGFRNSDRILYSSDWLIYKTT
DHYQTFTKIR
>ci2
MKTEWPELVGKSVEEAKKVILQDKPEAQIIVLPVGTIVTMEYRIDRVRLFVDKLDNIAQVPRVG
>ll37
LLGDFFRKSKEKIGKEFKRIVQRIKDFLRNLVPRTES
>magainin
GIGKFLHSAKKFGKAFVGEIMNS
>synuclein
MDVFMKGLSKAKEGVVAAAEKTKQGVAEAAGKTKEGVLYVGSKTKEGVVHGVATVAEKTKEQVTNVGGAVVTGVTAVAQKTVEGAGSIAAATGFVKKDQL
GKNEEGAPQEGILEDMPVDPDNEAYEMPSEEGYQDYEPEA
>ribonuclease
KETAAAKFERQHMDSSTSAASSSNYCNQMMKSRNLTKDRCKPVNTFVHESLADVQAVCSQKNVACKNGQTNCYQSYSTMSITDCRETGSSKYPNCAYKTT
QANKHIIVACEGNPYVPVHFDASV
"""
PROTEINS = {
    name: residues.replace("\n", "")
    for name, _, residues in (record.partition("\n") for record in PROTEIN_FASTA.split(">")[1:])
}
GLOBINS = [PROTEINS[name] for name in ("myoglobin", "haemoglobin_a", "haemoglobin_b")]
OTHERS = [sequence for sequence in PROTEINS.values() if sequence not in GLOBINS]
HBB_CODING = "ATGGTGCATCTGACTCCTGAGGAGAAGTCTGCCGTTACTGCCCTGTGGGGCAAGGTGAACGTGGATGAAGTTGGTGGTGAGGCCCTGGGCAG"


def write_fasta(path: Path, sequences: Sequence[str]) -> Path:
    path.write_text("".join(f">protein_{number}\n{sequence}\n" for number, sequence in enumerate(sequences)))
    return path


def texts(store: ProteinStore, name: str) -> list[str]:
    split = store.split(name)
    return [decode(split[index]) for index in range(len(split))]


def build(folder: Path, sequences: Sequence[str], policy: BuildPolicy | None = None) -> ProteinStore:
    """Build a store of these sequences in `folder`."""
    folder.mkdir(parents=True, exist_ok=True)
    return build_store(write_fasta(folder / "in.fasta", sequences), folder / "store", policy or BuildPolicy())


def counts_without_zeros(store: ProteinStore) -> dict[str, int]:
    return {key: count for key, count in store.manifest["counts"].items() if count}


# Splitting one file at random


def test_every_sequence_is_in_exactly_one_split(tmp_path: Path) -> None:
    store = build(tmp_path, list(PROTEINS.values()), BuildPolicy(validation_sequences=5, test_sequences=3))
    assert [len(store.split(name)) for name in SPLITS] == [14, 5, 3]
    stored = [sequence for name in SPLITS for sequence in texts(store, name)]
    assert sorted(stored) == sorted(PROTEINS.values())
    store.verify()


def test_split_does_not_depend_on_record_order_or_repeats(tmp_path: Path) -> None:
    policy = BuildPolicy(validation_sequences=5, test_sequences=3, seed=11)
    sequences = list(PROTEINS.values())
    reference = build(tmp_path / "reference", sequences, policy)
    for trial in range(3):
        shuffled = sequences + sequences[trial::3]
        random.Random(trial).shuffle(shuffled)
        store = build(tmp_path / str(trial), shuffled, policy)
        for name in SPLITS:
            assert set(texts(store, name)) == set(texts(reference, name))


def test_split_depends_on_the_seed(tmp_path: Path) -> None:
    sequences = list(PROTEINS.values())
    held_out = set()
    for seed in range(8):
        policy = BuildPolicy(validation_sequences=1, test_sequences=1, seed=seed)
        held_out.update(texts(build(tmp_path / str(seed), sequences, policy), "validation"))
    assert len(held_out) >= 4  # eight draws of one from 22


def test_splits_of_a_small_file_keep_its_order(tmp_path: Path) -> None:
    sequences = list(PROTEINS.values())
    store = build(tmp_path, sequences, BuildPolicy(validation_sequences=5, test_sequences=3))
    for name in SPLITS:
        positions = [sequences.index(sequence) for sequence in texts(store, name)]
        assert positions == sorted(positions)


def test_block_sizes_do_not_change_the_store(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    sequences = list(PROTEINS.values())
    whole = build(tmp_path / "whole", sequences)
    monkeypatch.setattr(uniref50, "_SPLIT_SEQUENCES", 3)
    monkeypatch.setattr(fasta, "_BLOCK_BYTES", 300)
    monkeypatch.setattr(sources, "_UNPACKED_BYTES", 100)
    blocks = build(tmp_path / "blocks", sequences)
    assert whole.manifest == blocks.manifest  # including the hashes


@pytest.mark.parametrize(("sequences", "expected"), [(3, 1), (22, 1), (60, 3)])
def test_default_validation_and_test_splits_are_one_in_twenty_each(
    tmp_path: Path, sequences: int, expected: int
) -> None:
    pieces = [sequence[start:] for start in range(3) for sequence in PROTEINS.values()][:sequences]
    store = build(tmp_path, pieces)
    held_out = [len(store.split(name)) for name in SPLITS]
    assert held_out == [sequences - 2 * expected, expected, expected]


def test_split_can_be_empty(tmp_path: Path) -> None:
    store = build(tmp_path, GLOBINS, BuildPolicy(validation_sequences=0, test_sequences=0))
    assert [len(store.split(name)) for name in SPLITS] == [3, 0, 0]


# Cleaning

ALL_TO_TRAIN = BuildPolicy(validation_sequences=0, test_sequences=0)


@pytest.mark.parametrize(
    ("given", "stored", "counts"),
    [
        ("MKTEWPEL*", ["MKTEWPEL"], {"trailing_stops_stripped": 1}),
        ("MKTEWPEL**", ["MKTEWPEL"], {"trailing_stops_stripped": 1}),
        ("MKTE*WPEL", [], {"dropped_internal_stop": 1, "records_with_internal_stop": 1}),
        ("MKTE*WPEL*", [], {"dropped_internal_stop": 1, "records_with_internal_stop": 1, "trailing_stops_stripped": 1}),
        ("--MKTE..WPEL-", ["MKTEWPEL"], {"gap_symbols": 5}),
        ("MKTEWPEL*--", ["MKTEWPEL"], {"gap_symbols": 2, "trailing_stops_stripped": 1}),
        ("MKJEW1PEL\xe9", ["MKXEWXPELXX"], {"unknown_letters": 4}),  # é is two bytes of UTF-8
        ("MKXxTEJ", ["MKXXTEX"], {"unknown_letters": 1}),
        ("mktewpel", ["MKTEWPEL"], {}),
        ("MKBUZOX", ["MKBUZOX"], {}),
        ("", [], {"dropped_empty": 1}),
        ("*", [], {"dropped_empty": 1, "trailing_stops_stripped": 1}),
        ("-.-", [], {"dropped_empty": 1, "gap_symbols": 3}),
    ],
)
def test_record_is_cleaned_and_the_changes_are_counted(
    tmp_path: Path, given: str, stored: list[str], counts: dict[str, int]
) -> None:
    store = build(tmp_path, [GLOBINS[0], given, GLOBINS[1]], ALL_TO_TRAIN)
    assert texts(store, "train") == [GLOBINS[0], *stored, GLOBINS[1]]
    assert counts_without_zeros(store) == {"records_read": 3, "records_kept": 2 + len(stored), **counts}


def test_long_sequences_are_truncated_at_the_end(tmp_path: Path) -> None:
    policy = BuildPolicy(max_residues=110, validation_sequences=0, test_sequences=0)
    store = build(tmp_path, list(PROTEINS.values()), policy)
    assert texts(store, "train") == [sequence[:110] for sequence in PROTEINS.values()]
    assert store.manifest["counts"]["truncated"] == sum(len(sequence) > 110 for sequence in PROTEINS.values()) > 0
    assert store.manifest["splits"]["train"]["longest"] == 110


def test_duplicates_are_stored_once_at_their_first_position(tmp_path: Path) -> None:
    first, second, third = GLOBINS
    store = build(tmp_path, [first, second, first.lower(), third, f"{second}*", first], ALL_TO_TRAIN)
    assert texts(store, "train") == [first, second, third]
    assert store.manifest["counts"]["dropped_duplicate"] == 3


def test_sequences_equal_after_truncation_are_duplicates(tmp_path: Path) -> None:
    policy = BuildPolicy(max_residues=20, validation_sequences=0, test_sequences=0)
    store = build(tmp_path, [GLOBINS[0], GLOBINS[0][:40], GLOBINS[1]], policy)
    assert texts(store, "train") == [GLOBINS[0][:20], GLOBINS[1][:20]]


def test_every_record_is_kept_or_counted_as_dropped(tmp_path: Path) -> None:
    store = build(tmp_path, [*PROTEINS.values(), GLOBINS[0], "", "MK*M", "---", OTHERS[3], "M" * 2000])
    counts = store.manifest["counts"]
    dropped = sum(count for key, count in counts.items() if key.startswith("dropped_"))
    assert counts["records_read"] == len(PROTEINS) + 6 == counts["records_kept"] + dropped
    assert counts["records_kept"] == sum(len(store.split(name)) for name in SPLITS)


# The manifest, and progress


def test_manifest_records_source_policy_and_licence(tmp_path: Path) -> None:
    fasta = tmp_path / "uniref50.fasta.gz"
    fasta.write_bytes(gzip.compress(write_fasta(tmp_path / "plain", list(PROTEINS.values())).read_bytes()))
    policy = BuildPolicy(test_sequences=2, seed=3)
    store = build_store(fasta, tmp_path / "store", policy, release="2022_02", licence="CC BY 4.0")
    sha256 = hashlib.sha256(fasta.read_bytes()).hexdigest()
    assert store.manifest["source"] == [{"file": "uniref50.fasta.gz", "bytes": fasta.stat().st_size, "sha256": sha256}]
    assert (store.manifest["release"], store.manifest["licence"]) == ("2022_02", "CC BY 4.0")
    assert store.manifest["policy"] == policy.model_dump()


def test_equal_input_gives_equal_bytes(tmp_path: Path) -> None:
    stores = [build(tmp_path / name, list(PROTEINS.values())) for name in ("one", "two")]
    for file in sorted(stores[0].folder.iterdir()):
        assert file.read_bytes() == (stores[1].folder / file.name).read_bytes()
    assert len(list(stores[0].folder.iterdir())) == 7  # no temporary file is left


def test_progress_reports_records_bytes_and_total_size(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fasta, "_BLOCK_BYTES", 500)
    monkeypatch.setattr(sources, "_UNPACKED_BYTES", 500)
    calls: list[tuple[int, int, int | None]] = []
    path = write_fasta(tmp_path / "in.fasta", list(PROTEINS.values()))
    build_store(path, tmp_path / "store", BuildPolicy(), progress=lambda *told: calls.append(told))
    size = path.stat().st_size
    assert len(calls) > 3
    assert calls == sorted(calls)
    assert calls[-1] == (22, size, size)


# Splits given as files


def build_from_splits(folder: Path, train: list[str], validation: list[str], test: list[str]) -> ProteinStore:
    return build_store_from_splits(
        write_fasta(folder / "train.fasta", train),
        write_fasta(folder / "validation.fasta", validation),
        write_fasta(folder / "test.fasta", test),
        folder / "store",
        BuildPolicy(),
        release="2021_04",
    )


def test_given_splits_are_kept(tmp_path: Path) -> None:
    store = build_from_splits(tmp_path, OTHERS[5:], GLOBINS, OTHERS[:5])
    assert texts(store, "train") == OTHERS[5:]
    assert texts(store, "validation") == GLOBINS
    assert texts(store, "test") == OTHERS[:5]
    sources = [(entry["split"], entry["file"]) for entry in store.manifest["source"]]
    assert sources == [(name, f"{name}.fasta") for name in SPLITS]
    assert store.manifest["release"] == "2021_04"


def test_held_out_sequences_are_dropped_from_the_other_splits(tmp_path: Path) -> None:
    in_all, in_two, repeated = GLOBINS
    train = [in_all, OTHERS[0], in_two, repeated, repeated.lower()]
    store = build_from_splits(tmp_path, train, [in_all, in_two, OTHERS[1]], [OTHERS[2], in_all])
    assert texts(store, "train") == [OTHERS[0], repeated]
    assert texts(store, "validation") == [in_two, OTHERS[1]]
    assert texts(store, "test") == [OTHERS[2], in_all]
    assert counts_without_zeros(store) == {
        **{"records_read": 10, "records_kept": 6},
        **{"dropped_duplicate": 1, "dropped_in_other_split": 3, "duplicate_sequences": 4, "duplicate_ids": 5},
    }


def test_given_split_without_remaining_sequences_is_rejected(tmp_path: Path) -> None:
    with pytest.raises(StoreError, match=r"train\.fasta: every sequence is in another split too"):
        build_from_splits(tmp_path, GLOBINS[:1], GLOBINS[:2], OTHERS)


def test_given_splits_and_split_sizes_are_mutually_exclusive(tmp_path: Path) -> None:
    fasta = write_fasta(tmp_path / "in.fasta", GLOBINS)
    with pytest.raises(ValueError, match=r"test_sequences is 5, but the splits are given.*set it to null"):
        build_store_from_splits(fasta, fasta, fasta, tmp_path / "store", BuildPolicy(test_sequences=5))


# Rejected input


@pytest.mark.parametrize(
    ("sequences", "policy", "message"),
    [
        (["", "MK*M", "*"], BuildPolicy(), r"in\.fasta: 0 of 3 records usable \(2 empty, 1 internal stop\)"),
        (
            GLOBINS[:2],
            BuildPolicy(),
            r"2 distinct sequences are too few for 1 in validation, .*train; give at least three distinct sequences$",
        ),
        (GLOBINS * 9, BuildPolicy(validation_sequences=2), "3 distinct sequences are too few for 2 in validation"),
        (GLOBINS, BuildPolicy(test_sequences=9), r"ask for fewer \(split\.validation, .*or set both to null"),
        ([HBB_CODING] * 3, BuildPolicy(), r"in\.fasta: looks like DNA or RNA \(100\.0%.*translate it first"),
        ([HBB_CODING.lower().replace("t", "u")] * 3, BuildPolicy(), "looks like DNA or RNA"),
        ([HBB_CODING + "N" * 50 + "RYRY"] * 3, BuildPolicy(), r"looks like DNA or RNA \(97"),
    ],
)
def test_unusable_input_is_rejected_and_leaves_no_store(
    tmp_path: Path, sequences: list[str], policy: BuildPolicy, message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        build(tmp_path, sequences, policy)
    assert [path.name for path in tmp_path.iterdir()] == ["in.fasta"]


def test_nucleotides_are_detected_before_a_long_file_is_read(tmp_path: Path) -> None:
    late_damage = write_fasta(tmp_path / "in.fasta", [HBB_CODING] * 1000)
    with late_damage.open("a") as stream:
        stream.write(">binary\n\0\n")
    with pytest.raises(FastaError, match="looks like DNA"):
        build_store(late_damage, tmp_path / "store", BuildPolicy())


def test_a_few_genes_among_proteins_are_accepted(tmp_path: Path) -> None:
    store = build(tmp_path, [HBB_CODING, *PROTEINS.values()])
    assert store.manifest["counts"]["records_kept"] == 23


def test_unreadable_file_leaves_nothing(tmp_path: Path) -> None:
    with pytest.raises(SourceError, match="no such file"):
        build_store(tmp_path / "absent.fasta", tmp_path / "store", BuildPolicy())
    with pytest.raises(FastaError, match="the file is empty"):
        build_store("/dev/null", tmp_path / "store", BuildPolicy())
    assert list(tmp_path.iterdir()) == []


def test_existing_output_is_rejected_before_input_is_read(tmp_path: Path) -> None:
    (tmp_path / "store").mkdir()
    with pytest.raises(StoreError, match="exists already"):
        build_store(tmp_path / "absent.fasta", tmp_path / "store", BuildPolicy())


@pytest.mark.parametrize(
    ("key", "value"),
    [("max_residues", 0), ("validation_sequences", -1), ("test_sequences", -1), ("seed", -1), ("seed", 2**64)],
)
def test_policy_value_out_of_range_is_rejected_by_key(key: str, value: int) -> None:
    with refused("config.value", key, value):
        BuildPolicy(**{key: value})
