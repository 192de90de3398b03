"""Row: store to masked batches. Ours against Hugging Face's collator, Megatron's BERT masking, fair-esm's converter.

Ours reads the memory-mapped store in training order, crops, masks and packs in one pass: all the work of a loader. The
other sides get the same windows of the same proteins, cropped beforehand and in memory. Times are CPU seconds of one
process with one thread. Before the timing, each side's batches are unmasked with their labels and compared with the
proteins.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, ClassVar, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from benchmarks.comparison import Row, Setting, Side, Target, best_of
from bionemo_esm.alphabet import CLS_ID, EOS_ID, MASK_ID, PAD_ID, TOKENS, decode
from bionemo_esm.data.collate import PackedBatch, SampleReader
from bionemo_esm.data.dataloader import BatchPlan, TrainingBatches
from bionemo_esm.data.masking import MaskingPolicy
from bionemo_esm.data.preprocess import BuildPolicy, build_store
from bionemo_esm.data.store import ProteinStore

SAMPLE = Path(__file__).parents[2] / "bionemo_esm" / "data" / "sample" / "train.fasta.gz"
MAX_TOKENS = 512
BATCH, QUICK_BATCH = 370, 160  # proteins: ESM-1nv's micro batch
OUR_STEPS, QUICK_STEPS = 200, 2  # batches per turn of ours; the other sides run `THEIR_STEPS`
THEIR_STEPS = 2
POLICY = MaskingPolicy()
IGNORED = -100  # Hugging Face's label of a position without a target


class Shown(NamedTuple):
    """Batches as lists with an int64 [tokens] array per protein: the model's input, and the true tokens."""

    shown: list[NDArray[Any]]
    true: list[NDArray[Any]]
    chosen: list[NDArray[Any]]
    places: int  # positions of the batches, including padding

    @property
    def tokens(self) -> int:
        return sum(map(len, self.true))

    def shares(self) -> NDArray[np.float64]:
        """Return the shares selected of all residues, and <mask> and another residue of the selected: float64 [3]."""
        shown, true, chosen = (np.concatenate(arrays) for arrays in (self.shown, self.true, self.chosen))
        number = max(int(chosen.sum()), 1)
        masked, replaced = chosen & (shown == MASK_ID), chosen & (shown != MASK_ID) & (shown != true)
        return np.array(
            [chosen.sum() / (self.tokens - 2 * len(self.true)), masked.sum() / number, replaced.sum() / number]
        )

    def to_native(self, proteins: Sequence[int]) -> Shown:
        shown, true, chosen = ([column[at] for at in proteins] for column in (self.shown, self.true, self.chosen))
        return Shown(shown, true, chosen, self.places)

    def error(self, ours: Shown) -> float:
        """Return the largest difference of a share; infinity if the proteins or their order differ."""
        same = len(self.true) == len(ours.true) and all(map(np.array_equal, self.true, ours.true))
        outside = any((~c & (s != t)).any() for s, t, c in zip(self.shown, self.true, self.chosen, strict=True))
        return float(np.abs(self.shares() - ours.shares()).max()) if same and not outside else float("inf")


class Peer(NamedTuple):
    """Another implementation that makes batches."""

    name: str
    batches: Sequence[Any]  # inputs of `collate`, in memory before the clock starts
    collate: Callable[[Any], Any]
    read: Callable[[Any], Shown]  # reads the output of `collate`
    settings: str
    libraries: tuple[str, ...]
    expected: Shown  # the same proteins by ours


class Work(NamedTuple):
    """The proteins of the first batches of the stream, as ours reads them."""

    shown: Shown
    batch: int  # proteins in a batch

    def sorted_by_length(self) -> Work:
        order = sorted(range(len(self.shown.true)), key=lambda at: len(self.shown.true[at]))
        return Work(self.shown.to_native(order), self.batch)

    def batches(self) -> list[list[NDArray[np.int64]]]:
        """Return the true tokens with special tokens, batch by batch."""
        return [self.shown.true[at : at + self.batch] for at in range(0, len(self.shown.true), self.batch)]


def rows(setting: Setting) -> Iterator[Row]:
    size, steps = (QUICK_BATCH, QUICK_STEPS) if setting.quick else (BATCH, OUR_STEPS)
    held_out = BuildPolicy(validation_sequences=1, test_sequences=1)
    store = build_store(setting.fasta or SAMPLE, setting.folder / "batches", held_out)
    stream = TrainingBatches(SampleReader(store.split("train"), MAX_TOKENS, POLICY, seed=42), BatchPlan(size, size))
    work = Work(read_packed([stream[step * size].micro_batches[0] for step in range(THEIR_STEPS)]), size)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield _row(stream, work, steps, list(peers(work, store, setting)))
    finally:
        torch.set_num_threads(threads)


def peers(work: Work, store: ProteinStore, setting: Setting) -> Iterator[Peer]:
    yield from hugging_face(work, setting.folder)
    yield megatron(work)
    yield fair_esm(work)


def _row(stream: TrainingBatches, work: Work, steps: int, peers: list[Peer]) -> Row:
    size = work.batch

    def ours() -> None:
        for step in range(steps):
            stream[step * size]

    amount = sum(len(stream[step * size].micro_batches[0].tokens) for step in range(steps))
    sides, efficiencies = [Side("ours", ours, amount, f"{size} at a time")], ["ours 100%"]
    for peer in peers:
        torch.manual_seed(0)
        read = join([peer.read(peer.collate(batch)) for batch in peer.batches])
        sides.append(
            Side(
                peer.name,
                lambda peer=peer: [peer.collate(batch) for batch in peer.batches],  # type: ignore[misc]
                read.tokens,
                peer.settings,
                read.error(peer.expected),
                peer.libraries,
            )
        )
        efficiencies.append(f"{peer.name} {read.tokens / read.places:.0%}")
    return Row(
        key="batches",
        title=f"Store to masked batches of {size} proteins",
        unit="unpadded token",
        precision="-",
        sides=sides,
        parity="residues restored by the labels, exactly; shares chosen, masked and replaced: the largest difference",
        tolerance=0.02,
        targets=[Target(COLLATOR, ratio=500)],
        clock="cpu",
        note=f"At most {MAX_TOKENS} tokens a protein; fair-esm's converter tokenises and pads, and masks nothing. Ours "
        f"reads, orders and crops as well. Tokens that are no padding: {', '.join(efficiencies)}.",
    )


# --- what came out ----------------------------------------------------------------------------------------------------


def join(parts: Sequence[Shown]) -> Shown:
    whole = Shown([], [], [], sum(part.places for part in parts))
    for part in parts:
        whole.shown.extend(part.shown)
        whole.true.extend(part.true)
        whole.chosen.extend(part.chosen)
    return whole


def unmasked(shown: Shown) -> Shown:
    """Return the expected result of a side that masks nothing."""
    return Shown(shown.true, shown.true, [np.zeros_like(chosen) for chosen in shown.chosen], shown.places)


def read_packed(batches: Sequence[PackedBatch]) -> Shown:
    read = Shown([], [], [], sum(len(batch.tokens) for batch in batches))
    for batch in batches:
        true, chosen = batch.tokens.clone(), torch.zeros(len(batch.tokens), dtype=torch.bool)
        true[batch.target_index], chosen[batch.target_index] = batch.targets, True
        for begin, end in itertools.pairwise(batch.cu_seqlens.tolist()):
            for kept, row in zip((read.shown, read.true, read.chosen), (batch.tokens, true, chosen), strict=True):
                kept.append(row[begin:end].numpy())
    return read


def read_padded(shown: Tensor, labels: Tensor, chosen: Tensor, padding: Tensor) -> Shown:
    """Read a padded batch: int64, int64, bool, bool [B, L]; `labels` apply where `chosen`."""
    read = Shown([], [], [], shown.numel())
    for row, label, asked, pad in zip(shown.numpy(), labels.numpy(), chosen.numpy(), padding.numpy(), strict=True):
        read.shown.append(row[~pad])
        read.true.append(np.where(asked, label, row)[~pad])
        read.chosen.append(asked[~pad])
    return read


# --- Hugging Face -----------------------------------------------------------------------------------------------------

COLLATOR = "Hugging Face's collator"
LISTS = ("lists", "lists with special_tokens_mask")
TENSORS = "a tensor each"
"""Input forms of `DataCollatorForLanguageModeling` for tokenised proteins.

Tokenizers and datasets give dictionaries of lists. The collator pads bare tensors four times as fast, but then returns
no attention mask.
"""


def formed(tokens: NDArray[np.int64], form: str) -> Any:
    if form == TENSORS:
        return torch.from_numpy(tokens)
    item = {"input_ids": tokens.tolist()}
    if form == LISTS[1]:
        item["special_tokens_mask"] = [1, *[0] * (len(tokens) - 2), 1]
    return item


def hugging_face(work: Work, folder: Path) -> Iterator[Peer]:
    """Yield the collator on tokenised proteins in its fastest input form with three kinds of padding, and on text."""
    from transformers import DataCollatorForLanguageModeling, EsmTokenizer

    vocabulary = folder / "vocabulary.txt"
    vocabulary.write_text("\n".join(TOKENS))
    tokenizer: Any = EsmTokenizer(str(vocabulary))  # type: ignore[no-untyped-call]
    tokenizer.deprecation_warnings["Asking-to-pad-a-fast-tokenizer"] = True
    to_longest: Any = DataCollatorForLanguageModeling(tokenizer, mlm_probability=POLICY.mlm_probability)
    to_most: Any = DataCollatorForLanguageModeling(
        tokenizer, mlm_probability=POLICY.mlm_probability, pad_to_multiple_of=MAX_TOKENS
    )

    def read(batch: Any) -> Shown:
        chosen = batch["labels"] != IGNORED
        padding = (batch["input_ids"] == PAD_ID) & ~chosen
        return read_padded(batch["input_ids"], batch["labels"], chosen, padding)

    def on_the_fly(sequences: list[str]) -> Any:
        return to_longest([{"input_ids": ids} for ids in tokenizer(sequences)["input_ids"]])

    longest, most = "padded to the longest", f"padded to {MAX_TOKENS}"
    for title, forms, collate, given, padded in (
        (COLLATOR, LISTS, to_longest, work, longest),
        (f"{COLLATOR}, sorted by length", LISTS, to_longest, work.sorted_by_length(), longest),
        (f"{COLLATOR}, {most}", LISTS, to_most, work, most),
        (f"{COLLATOR}, on tensors", (TENSORS,), to_longest, work, longest),
        (f"{COLLATOR}, on tensors, sorted by length", (TENSORS,), to_longest, work.sorted_by_length(), longest),
    ):
        inputs = [[[formed(p, form) for p in batch] for batch in given.batches()] for form in forms]
        best = best_of(range(len(forms)), lambda form, c=collate, i=inputs: [c(batch) for batch in i[form]])  # type: ignore[misc]
        settings = f"{work.batch} at a time, tokenised beforehand into {forms[best]}, {padded}"
        yield Peer(title, inputs[best], collate, read, settings, ("transformers",), given.shown)
    text = [[decode(protein[1:-1]) for protein in batch] for batch in work.batches()]
    settings = f"{work.batch} at a time, padded to the longest"
    yield Peer("Hugging Face's tokenizer and collator", text, on_the_fly, read, settings, ("transformers",), work.shown)


# --- Megatron, fair-esm -----------------------------------------------------------------------------------------------


class _MegatronTokenizer:
    """The attributes of a tokenizer that Megatron's dataset reads."""

    cls, sep, mask, pad = CLS_ID, EOS_ID, MASK_ID, PAD_ID
    inv_vocab: ClassVar = dict(enumerate(TOKENS))


class _MegatronConfig:
    """The configuration keys that Megatron's BERT dataset reads."""

    tokenizer = _MegatronTokenizer()
    sequence_length, random_seed = MAX_TOKENS, 0
    masking_probability, masking_max_ngram = POLICY.mlm_probability, 1
    masking_do_full_word = masking_do_permutation = classification_head = False
    masking_use_longer_ngrams = masking_use_geometric_distribution = False


def megatron(work: Work) -> Peer:
    """Return `BERTMaskedWordPieceDataset` as a peer: its samples and their collation, with a ready sample index."""
    from megatron.core.datasets.bert_dataset import BERTMaskedWordPieceDataset

    proteins = [protein[1:-1].tolist() for protein in work.shown.true]
    data: Any = object.__new__(BERTMaskedWordPieceDataset)
    data.config, data.dataset, data._pad_token_id = _MegatronConfig(), proteins, PAD_ID
    data.token_lookup = list(_MegatronTokenizer.inv_vocab)
    data.sample_index = [(at, at + 1, MAX_TOKENS - 2) for at in range(len(proteins))]

    def collate(samples: range) -> Any:
        return torch.utils.data.default_collate([data[at] for at in samples])

    def read(batch: Any) -> Shown:
        return read_padded(batch["text"], batch["labels"], batch["loss_mask"] == 1, batch["types"] == PAD_ID)

    settings = f"{work.batch} at a time, tokenised beforehand, padded to {MAX_TOKENS}"
    first = range(work.batch)  # one batch only, because it takes seconds
    return Peer(
        "Megatron's BERT masking", [first], collate, read, settings, ("megatron-core",), work.shown.to_native(first)
    )


def fair_esm(work: Work) -> Peer:
    from esm import Alphabet  # type: ignore[import-untyped]

    converter = Alphabet.from_architecture("ESM-1b").get_batch_converter()

    def read(batch: Any) -> Shown:
        _, _, tokens = batch
        return read_padded(tokens, tokens, torch.zeros_like(tokens, dtype=torch.bool), tokens == PAD_ID)

    text = [[("", decode(protein[1:-1])) for protein in batch] for batch in work.batches()]
    settings = f"{work.batch} at a time, padded to the longest; masks nothing"
    return Peer("fair-esm's batch converter", text, converter, read, settings, ("fair-esm",), unmasked(work.shown))
