"""Hostile archives: refused with their name, fast, in little memory, before a model is built, without side effects.

Each case makes one part of the file hostile and runs every reader of that part. All other parts, hashes and checksums
are valid, so only the check under test can find it.
"""

from __future__ import annotations

import gzip
import hashlib
import io
import json
import lzma
import os
import pickle
import random
import resource
import sys
import tarfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import yaml
from nemo.core.classes import ModelPT
from safetensors.torch import load, save

from bionemo_esm.errors import UserError
from bionemo_esm.model import archive as layout
from bionemo_esm.model.archive import CONFIG, MANIFEST, STATE, STATE_TENSORS, WEIGHTS, ArchiveFile, read_archive
from bionemo_esm.model.config import EncoderConfig
from bionemo_esm.model.esm1nv import ESM1nvModel
from bionemo_esm.model.nemo_connector import describe
from bionemo_esm.pretraining.checkpoints import AsyncWriter, Checkpoints, SafeCheckpointIO
from bionemo_esm.pretraining.resume import newest_checkpoint
from models import tiny_model

Members = dict[str, bytes]
END = bytes(1024)
SECONDS, MEMORY_BYTES, MESSAGE_LENGTH = 5, 2**28, 1000
ENCODER = {"num_layers": 1, "hidden_size": 8, "num_attention_heads": 2, "ffn_hidden_size": 8, "seq_length": 8}
POSITIONS = "encoder.embedding.position_embeddings.weight"


class Evil:
    def __reduce__(self) -> Any:
        return os.system, ("exit 3",)


PICKLE = pickle.dumps(Evil())

# --- valid archives and their manipulation ----------------------------------------------------------------------------


def header(name: bytes | str, size: int, changes: dict[int, bytes] | None = None) -> bytes:
    """Return a tar header with bytes replaced at offsets and a valid checksum."""
    block = bytearray(tarfile.TarInfo("x").tobuf(tarfile.GNU_FORMAT))
    raw = name.encode() if isinstance(name, str) else name
    for offset, value in ({0: raw.ljust(100, b"\0"), 124: b"%011o\0" % size} | (changes or {})).items():
        block[offset : offset + len(value)] = value
    block[148:156] = b" " * 8
    block[148:156] = b"%06o\0 " % sum(block)
    return bytes(block)


def entry(name: bytes | str, content: bytes = b"", **fields: Any) -> bytes:
    offsets = {"behind_name": len(CONFIG) + 1, "size": 124, "type": 156, "link": 157, "magic": 257, "tail": 500}
    changes = {offsets[key]: value for key, value in fields.items()}
    return header(name, len(content), changes) + content + bytes(-len(content) % 512)


def tar(members: Members, before: bytes = b"", after: bytes = b"", end: bytes = END) -> bytes:
    return before + b"".join(entry(name, content) for name, content in members.items()) + after + end


def sealed(members: Members, **manifest_changes: Any) -> Members:
    """Return the members with a manifest of valid hashes; the value `...` removes a key."""
    manifest = json.loads(members[MANIFEST]) | manifest_changes
    if "files" not in manifest_changes:
        for name in members.keys() - {MANIFEST}:
            digest = hashlib.sha256(members[name]).hexdigest()
            manifest["files"][name] = {"size": len(members[name]), "sha256": digest}
    manifest = {key: value for key, value in manifest.items() if value is not ... and key != "manifest_sha256"}
    manifest["manifest_sha256"] = layout._self_hash(manifest)
    return members | {MANIFEST: layout._json(manifest)}


@pytest.fixture(scope="module")
def honest(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Members]:
    """Return the members of a small valid `.nemo` and `.ckpt`."""
    folder = tmp_path_factory.mktemp("honest")
    model = tiny_model(**ENCODER)
    model.provenance = {"steps": 7, "lr": 1e-05}
    state = {"steps": 7, "consumed_samples": 3, "identity": {}, "guard": {}, "callbacks": {}, "lr_schedulers": []}
    state |= {"optimizer_states": [{0: torch.ones(3)}]}
    archive = describe(model)
    found = {}
    for kind, content in (("nemo", archive), ("ckpt", replace(archive, state=state))):
        path = layout.write_archive(folder / f"model.{kind}", content)
        with tarfile.open(path) as opened:
            found[kind] = {member.name: opened.extractfile(member).read() for member in opened}  # type: ignore[union-attr]
        assert tar(found[kind]) == path.read_bytes()
    return found


# --- readers and forbidden side effects -------------------------------------------------------------------------------


def load_checkpoint(path: Path) -> Any:
    return SafeCheckpointIO(AsyncWriter(False)).load_checkpoint(path)


NEMO_READERS = (lambda p: ESM1nvModel.restore_from(str(p)), lambda p: ModelPT.restore_from(str(p)))
READERS: dict[str, tuple[Callable[[Path], Any], ...]] = {
    "nemo": (*NEMO_READERS, read_archive),
    "ckpt": (load_checkpoint, lambda p: newest_checkpoint(p.parent)),
}


def checkpoint_name(step: int) -> str:
    return Checkpoints.path(SimpleNamespace(folder=Path()), step).name  # type: ignore[arg-type]


NAMES = {"nemo": "evil.nemo", "ckpt": checkpoint_name(7)}
FORBIDDEN = ("os.", "subprocess.", "socket.", "pickle.find_class", "shutil.", "tempfile.", "pty.", "ctypes.dlopen")
HARMLESS = ("os.listdir", "os.scandir", "os.getxattr", "os.fwalk", "os.walk")
seen: list[str] | None = None


def watch(event: str, args: tuple[Any, ...]) -> None:
    if seen is None:
        return
    written = event == "open" and isinstance(args[2], int) and args[2] & (os.O_WRONLY | os.O_RDWR | os.O_CREAT)
    if written or (event.startswith(FORBIDDEN) and event not in HARMLESS):
        seen.append(f"{event} {args!r:.80}")


sys.addaudithook(watch)


@contextmanager
def watched() -> Iterator[None]:
    """Fail on side effects, on much processor time and on high memory use."""
    global seen
    pages = int(Path("/proc/self/statm").read_text().split()[0]) if sys.platform == "linux" else 0
    limits = resource.getrlimit(resource.RLIMIT_AS)
    start, seen = time.process_time(), []
    if pages:
        resource.setrlimit(resource.RLIMIT_AS, (pages * resource.getpagesize() + MEMORY_BYTES, limits[1]))
    try:
        yield
    finally:
        effects, seen = seen, None
        resource.setrlimit(resource.RLIMIT_AS, limits)
    assert effects == []
    assert time.process_time() - start < SECONDS


def refused(path: Path, content: bytes | None, readers: Any, naming: str) -> None:
    """Check that every reader raises a `UserError` that names the file and the fault."""
    if content is not None:
        path.write_bytes(content)
    for read in readers:
        with watched(), pytest.raises(UserError) as caught:
            read(path)
        message = str(caught.value)
        assert path.name in message
        assert naming in message
        assert message.isprintable(), "a terminal would obey it, or could not show it"
        assert len(message) < MESSAGE_LENGTH


@pytest.fixture
def no_model(monkeypatch: pytest.MonkeyPatch) -> None:
    def build(_: Any) -> None:
        raise AssertionError("a model was built")

    monkeypatch.setattr(ESM1nvModel, "configure_model", build)


def cases(table: dict[str, Any], kinds: tuple[str, ...] = ("nemo", "ckpt")) -> Any:
    return pytest.mark.parametrize(
        ("kind", "case"),
        [pytest.param(kind, case, id=f"{kind}-{name}") for kind in kinds for name, case in table.items()],
    )


@pytest.mark.parametrize("kind", ["nemo", "ckpt"])
def test_the_valid_archive_behind_all_cases_is_read(kind: str, honest: dict[str, Members], tmp_path: Path) -> None:
    path = tmp_path / NAMES[kind]
    path.write_bytes(tar(sealed(honest[kind])))
    for read in READERS[kind]:
        read(path)
    assert kind == "nemo" or newest_checkpoint(tmp_path) == (path, [])


# --- the tar file -----------------------------------------------------------------------------------------------------


def extra(name: bytes | str, content: bytes = b"x", **fields: Any) -> Callable[[Members], bytes]:
    return lambda m: tar(m, after=entry(name, content, **fields))


def first(**fields: Any) -> Callable[[Members], bytes]:
    """Return an archive with a changed header of the first member."""
    return lambda m: entry(CONFIG, m[CONFIG], **fields) + tar({name: m[name] for name in m if name != CONFIG})


def as_pickle(position: str) -> Callable[[Members], bytes]:
    return lambda m: tar(sealed(m | {position: PICKLE}))


def size_field(text: bytes) -> bytes:
    return text.ljust(12, b"\0")


PLAIN_NAMES = ("/etc/passwd", "../evil", f"./{CONFIG}", "model_weights.ckpt", CONFIG.upper(), f"{CONFIG}/")
ODD_NAMES = ("", "model_config\u200b.yaml", "m\u043edel_config.yaml", b"\xff\xfe", "\x1b[2J")
TYPES = "1234567SV"  # links, devices, a folder, a pipe, and rare types
PAX = {"path": b"28 path=../model_config.yaml\n", "size": b"12 size=9999\n", "sparse": b"26 GNU.sparse.size=123456\n"}
CONTAINERS: dict[str, tuple[str, Callable[[Members], bytes]]] = {
    **{f"name-{n!a}": (n, extra(n)) for n in PLAIN_NAMES},
    **{f"name-{n!a}": ("unexpected member", extra(n)) for n in ODD_NAMES},
    **{f"type-{t}": ("unexpected member", extra("a", b"", type=t.encode(), link=b"/etc/passwd")) for t in TYPES},
    **{f"linked-{t}": (CONFIG, first(type=t.encode(), link=b"/etc/passwd")) for t in TYPES},
    **{f"pax-{n}": ("an extended header", lambda m, c=c: tar(m, entry("pax", c, type=b"x"))) for n, c in PAX.items()},
    **{f"pax-{n}-of-all": ("an extended", lambda m, c=c: tar(m, entry("pax", c, type=b"g"))) for n, c in PAX.items()},
    "long-name": ("@LongLink", lambda m: tar(m, entry("././@LongLink", b"a" * 5000 + b"\0", type=b"L"))),
    "long-link": ("@LongLink", lambda m: tar(m, entry("././@LongLink", b"a" * 5000 + b"\0", type=b"K"))),
    "twice": (CONFIG, lambda m: tar(m, after=entry(CONFIG, m[CONFIG]))),
    "missing": (MANIFEST, lambda m: tar({name: m[name] for name in m if name != MANIFEST})),
    "size-of-2**38": (WEIGHTS, lambda m: tar({n: m[n] for n in m if n != WEIGHTS}, after=header(WEIGHTS, 2**33 - 1))),
    "size-of-2**38-base-256": (CONFIG, first(size=b"\x80" + (2**38).to_bytes(11, "big"))),
    "size-negative-base-256": (CONFIG, first(size=b"\xff" * 12)),
    "size-negative-octal": (CONFIG, first(size=size_field(b"-0000000001"))),
    "size-in-base-256-without-need": (CONFIG, lambda m: first(size=b"\x80" + len(m[CONFIG]).to_bytes(11, "big"))(m)),
    "size-with-an-underscore": (CONFIG, lambda m: first(size=size_field(b"0_%09o" % len(m[CONFIG])))(m)),
    "bytes-behind-the-name": (CONFIG, first(behind_name=b"evil")),
    "bytes-as-a-link": (CONFIG, first(link=b"/etc/passwd")),
    "bytes-behind-the-header": (CONFIG, first(tail=b"evil")),
    "not-ustar": (CONFIG, first(magic=b"EVILEVIL")),
    "no-end": ("cut short", lambda m: tar(m, end=b"")),
    "half-an-end": ("cut short", lambda m: tar(m, end=bytes(512))),
    "bytes-after-the-end": ("behind the last member", lambda m: tar(m) + b"x"),
    "a-second-tar": ("behind the last member", lambda m: tar(m) + tar(m)),
    "bytes-in-the-padding": (CONFIG, lambda m: tar(m)[: 512 + len(m[CONFIG])] + b"x" + tar(m)[513 + len(m[CONFIG]) :]),
    "gzip": ("", lambda m: gzip.compress(tar(m))),
    "xz": ("", lambda m: lzma.compress(tar(m))),
    "gzip-bomb": ("", lambda m: gzip.compress(bytes(2**24))),
    "empty": ("cut short", lambda m: b""),
    "a-pickle": ("", lambda m: PICKLE),
    **{f"pickle-in-{n}": (n, as_pickle(n)) for n in (CONFIG, WEIGHTS)},
    f"pickle-in-{MANIFEST}": (MANIFEST, lambda m: tar(m | {MANIFEST: PICKLE})),
}  # fmt: skip


@cases(CONTAINERS)
def test_a_hostile_tar_file_is_refused(
    kind: str, case: Any, honest: dict[str, Members], tmp_path: Path, no_model: None
) -> None:
    path, (naming, build) = tmp_path / NAMES[kind], case
    path.write_bytes(content := build(honest[kind]))
    readers = READERS[kind]
    if kind == "nemo" and not layout.is_our_archive(path):
        readers = (readers[0], readers[2])  # `ModelPT` passes it to NeMo
    refused(path, content, readers, naming)


def test_a_gigabyte_of_zeros_after_the_end_is_refused(honest: dict[str, Members], tmp_path: Path) -> None:
    path = tmp_path / "evil.nemo"
    path.write_bytes(tar(honest["nemo"]))
    os.truncate(path, 2**30)
    refused(path, None, READERS["nemo"], "behind the last member")


@pytest.mark.parametrize("kind", ["nemo", "ckpt"])
def test_every_flipped_bit_is_found(kind: str, honest: dict[str, Members], tmp_path: Path) -> None:
    content, path, generator = tar(honest[kind]), tmp_path / NAMES[kind], random.Random(0)
    bits = generator.sample(range(8 * len(content)), 300)
    manifest = content.index(honest[kind][MANIFEST])
    bits += range(8 * 148, 8 * 156)  # the checksum of the first header
    bits += [8 * (manifest + honest[kind][MANIFEST].index(b"1e-05") + 1) + 5]  # "E": the same number in JSON
    unnoticed = []
    for bit in bits:
        flipped = bytearray(content)
        flipped[bit // 8] ^= 1 << bit % 8
        path.write_bytes(flipped)
        try:
            ArchiveFile.open(path).verify()
        except UserError as error:
            assert path.name in str(error)  # noqa: PT017 - hundreds of cases in one
        else:
            unnoticed.append(divmod(bit, 8))
    assert unnoticed == []


@pytest.mark.parametrize("kind", ["nemo", "ckpt"])
def test_a_file_truncated_at_any_point_is_refused(kind: str, honest: dict[str, Members], tmp_path: Path) -> None:
    content, path = tar(honest[kind]), tmp_path / NAMES[kind]
    lengths = [*random.Random(0).sample(range(len(content)), 50), *(len(content) - n for n in (1, 511, 512, 513, 1024))]
    unnoticed = []
    for length in lengths:
        path.write_bytes(content[:length])
        try:
            ArchiveFile.open(path).verify()
        except UserError as error:
            assert path.name in str(error)  # noqa: PT017
        else:
            unnoticed.append(len(content) - length)
    assert unnoticed == [], "bytes cut off the end"


# --- the manifest -----------------------------------------------------------------------------------------------------


def says(**changes: Any) -> Callable[[Members], Members]:
    return lambda m: sealed(m, **changes)


def says_of_weights(**changes: Any) -> Callable[[Members], Members]:
    """Return a function that changes the entry of the weights; the value `...` removes a key."""

    def build(m: Members) -> Members:
        files = json.loads(m[MANIFEST])["files"]
        entry = {key: value for key, value in (files[WEIGHTS] | changes).items() if value is not ...}
        return sealed(m, files=files | {WEIGHTS: entry})

    return build


def reads(old: bytes, new: bytes) -> Callable[[Members], Members]:
    return lambda m: m | {MANIFEST: m[MANIFEST].replace(old, new, 1)}


def many_keys(count: int) -> bytes:
    keys = [f'"{number}":1' for number in [*range(count), count - 1]]
    return ("{" + ",".join(keys) + "}").encode()


def wide(name: str) -> bytes:
    """Return the largest allowed member, in the form most expensive to parse."""
    return b"[" + b"[]," * (min(layout._SIZE_LIMITS[name], 2**24) // 3 - 2) + b"1]"


MANIFESTS: dict[str, Callable[[Members], Members]] = {
    "another-alphabet": says(alphabet="A C D"),
    "another-version": says(format_version=3),
    "no-class": says(model_class=...),
    "no-provenance": says(provenance=[]),
    "other-members": lambda m: sealed(m, files=json.loads(m[MANIFEST])["files"] | {"\x1b[2J\ud800": {}}),
    "many-other-members": lambda m: sealed(m, files={str(number): {} for number in range(10**5)}),
    "wrong-size": says_of_weights(size=1),
    "no-hash": says_of_weights(sha256=None),
    "no-fast-hash": says_of_weights(blake3=[]),
    "unknown-hash": says_of_weights(sha256=..., blake3=..., md5="0" * 32),
    "files-is-a-list": says(files=[]),
    "wrong-hash-of-itself": reads(b'"steps": 7', b'"steps": 8'),
    "another-spelling-of-itself": reads(b"1e-05", b"1E-05"),
    "another-white-space": reads(b": ", b":  "),
    "a-byte-order-mark": lambda m: m | {MANIFEST: b"\xef\xbb\xbf" + m[MANIFEST]},
    "utf-16": lambda m: m | {MANIFEST: m[MANIFEST].decode().encode("utf-16")},
    "key-twice": reads(b"{", b'{"alphabet": "A", '),
    "thousands-of-keys-one-twice": lambda m: m | {MANIFEST: many_keys(20_000)},
    "huge-integer": reads(b'"steps": 7', b'"steps": ' + b"7" * 5000),
    "depth": lambda m: m | {MANIFEST: b"[" * 10**6},
    "depth-that-json-bears": lambda m: m | {MANIFEST: b'{"format_version": 2, "a": ' + b"[" * 900 + b"]" * 900 + b"}"},
    "nan": lambda m: m | {MANIFEST: b"NaN"},
    "lone-surrogate": lambda m: m | {MANIFEST: b'"\\ud800"'},
    "long-and-wide": lambda m: m | {MANIFEST: wide(MANIFEST)},
}  # fmt: skip


@cases(MANIFESTS)
def test_a_hostile_manifest_is_refused(
    kind: str, case: Any, honest: dict[str, Members], tmp_path: Path, no_model: None
) -> None:
    refused(tmp_path / NAMES[kind], tar(case(honest[kind])), READERS[kind], "")


@pytest.mark.parametrize("steps", [float("inf"), float("nan"), 10**4000, "x", None, [], {}])
def test_an_invalid_step_count_does_not_break_the_search_for_the_newest_checkpoint(
    steps: Any, honest: dict[str, Members], tmp_path: Path
) -> None:
    path, good = tmp_path / checkpoint_name(9), tmp_path / NAMES["ckpt"]
    path.write_bytes(tar(sealed(honest["ckpt"], provenance={"steps": steps})))
    good.write_bytes(tar(honest["ckpt"]))
    with watched():
        assert newest_checkpoint(tmp_path)[0] in (path, good)


def test_an_unknown_model_class_is_refused(honest: dict[str, Members], tmp_path: Path, no_model: None) -> None:
    for name in ("os.system", "ModelPT", ["ESM1nvModel"], "\x1b[2J" * 10_000):
        content = tar(sealed(honest["nemo"], model_class=name))
        refused(tmp_path / "evil.nemo", content, NEMO_READERS, "class")


# --- the configuration ------------------------------------------------------------------------------------------------


def seed(text: str) -> bytes:
    return f"encoder: {json.dumps(ENCODER)}\nprecision: '32'\nseed: {text}\n".encode()


def encoder(**changes: Any) -> bytes:
    plain: bytes = yaml.safe_dump({"encoder": ENCODER | changes, "precision": "32", "seed": 1}).encode()
    return plain


HEX = b"0x" + b"f" * 5000  # more digits than Python prints
TAGGED = (
    "!!set {a, b}", "!!binary aGk=", "!!timestamp x", "2024-12-05", "2024-13-45", "!!int ''", "!!float ''", "!!bool x",
    "!!omap [a: 1]", "!!int 1", "!evil 1", "=", "!!null ''",
)  # fmt: skip
TEXTS: dict[str, bytes] = {
    **{f"key-{key}": encoder(**{key: "os.system"}) for key in ("_target_", "target", "TARGET", "cls", "_Target_")},
    "key-in-lists": encoder(hidden_size=[[{"a": [{"_target_": "os.system"}]}]]),
    **{f"text-{text}": seed(text) for text in ("${oc.env:HOME}", "'a ${encoder}'", "nemo:../..", "NeMo:x")},
    **{f"tag-{text}": seed(text) for text in TAGGED},
    "tag-python": seed("!!python/object/apply:os.system ['exit 3']"),
    "tag-python-name": seed("!!python/name:os.system"),
    "anchor": seed("&a 1"),
    "alias": seed("[&a 1, *a]"),
    "billion-laughs": b"a: &a [x, x]\n" + b"".join(b"%c: &%c [*%c, *%c]\n" % (c, c, c - 1, c - 1) for c in b"bcdef"),
    "merge-key": b"<<: {precision: '32', seed: 1}\nencoder: {}\n",
    "key-twice": seed("1") + b"seed: 1\n",
    "key-of-a-number": b"1: a\n",
    "key-of-a-list": b"? [a]\n: b\n",
    "documents": seed("1") + b"---\n" + seed("1"),
    "depth": b"[" * 10**6,
    "depth-of-mappings": b"{a: " * 200_000,
    "not-utf-8": b"\xff\xfe\xff",
    "zero-byte": seed("1") + b"\0",
    "not-a-mapping": b"- 1\n",
    "empty": b"",
    "huge-integer": seed("9" * 5000),
    "not-a-number": encoder(layernorm_epsilon=float("nan")),
    "infinite": encoder(layernorm_epsilon=float("inf")),
    "long": b"[" + b"a," * (layout._SIZE_LIMITS[CONFIG] // 2 - 2) + b"a]",
    "sexagesimal": b"seed: 1" + b":0" * (layout._SIZE_LIMITS[CONFIG] // 2 - 8),
}  # fmt: skip


@cases(TEXTS)
def test_a_hostile_configuration_is_refused(
    kind: str, case: bytes, honest: dict[str, Members], tmp_path: Path, no_model: None
) -> None:
    refused(tmp_path / NAMES[kind], tar(sealed(honest[kind] | {CONFIG: case})), READERS[kind], CONFIG)


MODELS: dict[str, bytes] = {
    "a-terabyte": encoder(num_layers=10**12),
    "a-negative-size": encoder(hidden_size=-8),
    "an-infinite-size": encoder(num_layers=float("inf")),
    "a-size-not-a-number": encoder(num_layers=float("nan")),
    "an-infinite-width": encoder(init_method_std=float("inf")),
    "a-width-not-a-number": encoder(init_method_std=float("nan")),
    "a-size-that-cannot-be-printed": encoder(num_layers="HEX").replace(b"HEX", HEX),
    "a-negative-one": encoder(num_layers="HEX").replace(b"HEX", b"-" + HEX),
    "a-rate-beyond-floats": encoder(hidden_dropout="HEX").replace(b"HEX", HEX),
    "a-precision-that-cannot-be-printed": seed("1").replace(b"'32'", HEX),
    "a-seed-beyond-64-bits": seed(str(2**100)),
    "a-seed-below-64-bits": seed(str(-(2**70))),
    "a-missing-key": seed("1").replace(b"seed", b"other"),
    "a-class": seed("1") + b"class_path: os.system\n",
}


@pytest.mark.parametrize("text", MODELS.values(), ids=MODELS.keys())
def test_a_configuration_of_an_impossible_model_is_refused(
    text: bytes, honest: dict[str, Members], tmp_path: Path, no_model: None
) -> None:
    refused(tmp_path / "evil.nemo", tar(sealed(honest["nemo"] | {CONFIG: text})), NEMO_READERS, CONFIG)


def test_a_small_file_with_60_000_layers_is_refused_before_building(
    honest: dict[str, Members], tmp_path: Path, no_model: None
) -> None:
    sizes = ENCODER | {"num_layers": 60_000, "hidden_size": 1, "num_attention_heads": 1, "ffn_hidden_size": 1}
    weights = save({"a": torch.zeros(EncoderConfig(**sizes).parameters)})  # as many values as the model has parameters
    members = honest["nemo"] | {CONFIG: encoder(**sizes), WEIGHTS: weights}
    refused(tmp_path / "evil.nemo", tar(sealed(members)), NEMO_READERS, "")


# --- weights and state ------------------------------------------------------------------------------------------------


def tensors(entries: Any, data: int = 4) -> bytes:
    """Return a safetensors file: a header from `entries` (bytes are used unchanged) and `data` zero bytes."""
    text = entries if isinstance(entries, bytes) else json.dumps(entries).encode()
    return len(text).to_bytes(8, "little") + text + bytes(data)


def one(dtype: Any = "F32", shape: Any = (1,), offsets: Any = (0, 4), **more: Any) -> dict[str, Any]:
    return {"dtype": dtype, "shape": shape, "data_offsets": offsets, **more}


OFFSETS = ([-4, 0], [0.0, 4.0], [False, 4], ["0", "4"], [0], [4, 0], 4)
SHAPES = ([-1], [1.0], [True], ["1"], 1, [2**60], [1] * 100, [2**47] * 8)
TENSORS: dict[str, bytes] = {
    "header-of-2**63": (2**63).to_bytes(8, "little") + bytes(8),
    "header-larger-than-the-member": (100).to_bytes(8, "little") + bytes(8),
    **{f"{size}-bytes": b"\2" + bytes(size - 1) for size in (1, 7, 8)},
    **{f"header-{text[:9]!r}": tensors(text, 0) for text in (b"{", b"[]", b"1", b"NaN", PICKLE, b"[" * 10**6)},
    "key-twice": tensors(b'{"a":%b,"a":%b}' % ((json.dumps(one()).encode(),) * 2)),
    "thousands-of-keys-one-twice": tensors(many_keys(20_000)),
    "overlap": tensors({"a": one(), "b": one()}, 8),
    "gap": tensors({"a": one(offsets=(4, 8))}),
    "past-the-end": tensors({"a": one()}, 0),
    "bytes-at-the-end": tensors({"a": one()}, 5),
    **{f"offsets-{o}": tensors({"a": one(offsets=o)}) for o in OFFSETS},
    **{f"shape-{s}": tensors({"a": one(shape=s)}) for s in SHAPES},
    **{f"empty-{s}": tensors({"a": one(shape=s, offsets=(0, 0))}, 0) for s in ([0, 2**47, 2**47], [2**47, 2**47, 0])},
    **{f"dtype-{d}": tensors({"a": one(d)}) for d in ("F8_E4M3", "U16", "f32", "", 1, [], None)},
    "dtype-of-a-megabyte": tensors({"a": one("X" * 10**6)}),
    "name-of-a-megabyte": tensors({"\x1b[2J" * 10**6: one("X")}),
    "more-than-three-facts": tensors({"a": one(evil=1)}),
    **{f"metadata-{m}": tensors({"__metadata__": m, "a": one()}) for m in ([], {"a": 1}, {"a": [[1]]})},
    "utf-16": tensors(json.dumps({"a": one()}).encode("utf-16")),
}  # fmt: skip


@cases(TENSORS)
def test_hostile_tensors_are_refused(
    kind: str, case: bytes, honest: dict[str, Members], tmp_path: Path, no_model: None
) -> None:
    path = tmp_path / NAMES[kind]
    refused(path, tar(sealed(honest[kind] | {WEIGHTS: case})), READERS[kind], WEIGHTS)
    if kind == "ckpt":
        refused(path, tar(sealed(honest[kind] | {STATE_TENSORS: case})), [load_checkpoint], STATE_TENSORS)


Weights = dict[str, torch.Tensor]
OTHER_TYPES = (torch.float64, torch.half, torch.int8)
WEIGHT_CASES: dict[str, tuple[str, Callable[[Weights], Weights]]] = {
    "nan": (POSITIONS, lambda w: w | {POSITIONS: w[POSITIONS] * float("nan")}),
    "infinite": (POSITIONS, lambda w: w | {POSITIONS: w[POSITIONS] / 0}),
    **{f"{t}": (POSITIONS, lambda w, t=t: w | {POSITIONS: w[POSITIONS].to(t)}) for t in OTHER_TYPES},
    "missing": ("", lambda w: {name: w[name] for name in w if name != POSITIONS}),
    "extra": ("", lambda w: w | {"evil": torch.zeros(1)}),
    "extra-and-empty": ("evil", lambda w: w | {"evil": torch.zeros(0)}),
    "another-name": (POSITIONS, lambda w: {name.replace(POSITIONS, "evil"): w[name] for name in w}),
    "another-shape": (POSITIONS, lambda w: w | {POSITIONS: w[POSITIONS].flatten()}),
    "more-embedding-rows": ("", lambda w: {n: torch.zeros(256, 8) if "word_emb" in n else w[n] for n in w}),
    "mixed-precision": ("BF16", lambda w: w | {POSITIONS: w[POSITIONS].bfloat16()}),
    "another-precision": ("BF16", lambda w: {name: w[name].bfloat16() for name in w}),
}  # fmt: skip


@pytest.mark.parametrize(("naming", "change"), WEIGHT_CASES.values(), ids=WEIGHT_CASES.keys())
def test_weights_of_another_model_are_refused(
    naming: str, change: Any, honest: dict[str, Members], tmp_path: Path
) -> None:
    members = honest["nemo"] | {WEIGHTS: save(change(load(honest["nemo"][WEIGHTS])))}
    refused(tmp_path / "evil.nemo", tar(sealed(members)), NEMO_READERS, naming)


ODD_STATES = (
    b"[]", b"true", b"", b"NaN", b"{", b'{"a": 1, "a": 2}', b'{"a": ' + b"7" * 5000 + b"}", b'{"$items": 5}',
    b'{"$items": [[1, 2, 3]]}', b'{"$items": [[[1], 2]]}', b'{"$tuple": 5}', b'{"$tensor": "no"}', b'{"$tensor": []}',
    b'{"a": {"$tuple": "abc"}}', b'{"a": {"$evil": 1}}',
)  # fmt: skip
STATES = {
    "a-pickle": PICKLE,
    **{text.decode()[:40]: text for text in ODD_STATES},
    **{f"depth-{d}": b'{"a": ' + b"[" * d + b"]" * d + b"}" for d in (800, 900, 10**6)},
    "thousands-of-keys-one-twice": many_keys(20_000),
    "long-and-wide": wide(STATE),
}  # fmt: skip


@pytest.mark.parametrize("text", STATES.values(), ids=[name[:40] for name in STATES])
def test_a_hostile_training_state_is_refused(
    text: bytes, honest: dict[str, Members], tmp_path: Path, no_model: None
) -> None:
    refused(tmp_path / NAMES["ckpt"], tar(sealed(honest["ckpt"] | {STATE: text})), [load_checkpoint], STATE)


def test_a_pickle_in_a_nemo_archive_of_another_class_runs_no_code(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """NeMo's connector reads such archives; torch's weights-only unpickler prevents code execution."""
    weights = io.BytesIO()
    torch.save({"a": Evil()}, weights)
    path, ran = tmp_path / "theirs.nemo", []
    path.write_bytes(tar({"model_weights.ckpt": weights.getvalue(), CONFIG: b"a: 1\n"}))
    monkeypatch.setattr(os, "system", ran.append)
    monkeypatch.delenv("TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD", raising=False)
    with pytest.raises(UserError, match=r"theirs\.nemo: unexpected member"):
        ESM1nvModel.restore_from(str(path))
    unpacks = hasattr(tarfile, "data_filter")  # Python before 3.11.4 lacks the filter that NeMo uses to unpack
    with pytest.raises(pickle.UnpicklingError if unpacks else TypeError, match=r"Weights only|filter"):
        Theirs.restore_from(str(path))
    monkeypatch.setenv("TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD", "1")
    with pytest.raises(UserError, match=r"theirs\.nemo: is not an archive of bionemo_esm, and TORCH_FORCE_NO_WEIGHTS"):
        Theirs.restore_from(str(path))
    assert ran == []


class Theirs(ModelPT):
    """Model class that is not in our registry."""

    setup_training_data = setup_validation_data = None
    list_available_models = classmethod(lambda cls: [])
