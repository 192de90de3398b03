"""The summary of an archive or a checkpoint: its numbers, unusual files, and what it imports."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Mapping
from importlib.metadata import version
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch

from bionemo_esm import __main__ as command_line
from bionemo_esm.data.store import ProteinStore
from bionemo_esm.model import archive as archive_module
from bionemo_esm.model.archive import MANIFEST, STATE_TENSORS, WEIGHTS, Archive, ArchiveFile, write_archive
from bionemo_esm.model.config import EncoderConfig
from bionemo_esm.model.summary import ArchiveSummary
from bionemo_esm.model.tar_format import Member, find_members, read_section, write_container
from models import TINY, tiny_model

HASH = "0123456789abcdef" * 4
PROVENANCE = {
    "recipe": "laptop",
    "seed": 1234,
    "steps": 1500,
    "consumed_samples": 24_000,
    "data": "Müller's proteins",
    "data_release": "2022_05",
    "data_manifest_sha256": HASH,
    "data_sequences": {"test": 200, "train": 2600, "validation": 150},
    "data_samples_of_an_epoch": 1200,  # clusters
    "restored_from": "models/before.nemo",
    "package_versions": {"bionemo_esm": version("bionemo_esm"), "torch": "1.0.0", "no-such-package": "3.1"},
}
STATE = {
    "identity": {"samples of an epoch": 1200},
    "lr_schedulers": [{"_last_lr": [0.00015, 0.00015]}],
    "callbacks": {"Checkpoints": {"best_loss": 2.71828, "best_step": 1400}},
    "optimizer_states": [{"state": {0: {"exp_avg": torch.ones(3)}}}],
}
SCHEDULE = {"on_schedule": True, "every_n_train_steps": 500}
WEIGHTS_AT_REST = {"a": torch.zeros(10, 4), "b": torch.zeros(6, dtype=torch.bfloat16)}


class Said(NamedTuple):
    """Exit code and output of a command."""

    code: int
    out: str
    err: str


class Inspect:
    """Run `bionemo-esm inspect` in this process."""

    def __init__(self, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
        self._capfd, self._monkeypatch = capfd, monkeypatch

    def __call__(self, *arguments: str | Path) -> Said:
        self._monkeypatch.setattr(sys, "argv", ["bionemo-esm", "inspect", *map(str, arguments)])
        self._capfd.readouterr()
        code = 0
        try:
            command_line.main()
        except SystemExit as stop:
            code = stop.code if isinstance(stop.code, int) else int(stop.code is not None)
        return Said(code, *self._capfd.readouterr())


@pytest.fixture
def inspect(capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Inspect:
    return Inspect(capfd, monkeypatch)


def written(path: Path, provenance: Mapping[str, Any] = PROVENANCE, state: Mapping[str, Any] | None = None) -> Path:
    """Write a real archive (a checkpoint if `state` is given) with two small tensors."""
    config = {"encoder": TINY, "precision": "32", "seed": 1234}
    return write_archive(path, Archive("ESM1nvModel", config, WEIGHTS_AT_REST, provenance, state))


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    return written(tmp_path / "step=000001500.ckpt", PROVENANCE | {"checkpoint": SCHEDULE}, STATE)


def rows(text: str) -> dict[str, str]:
    """Return the aligned lines of a summary, label to value."""
    return {line[:26].strip(): line[26:] for line in text.splitlines()[2:] if line[:26].strip() and len(line) > 26}


def flipped(path: Path, member: str) -> None:
    """Flip one bit in the middle of a member."""
    section = ArchiveFile.open(path).sections[member]
    content = bytearray(path.read_bytes())
    content[section.start + section.size - 3] ^= 1
    path.write_bytes(content)


def resigned(path: Path, **changes: Any) -> Path:
    """Change the manifest of an archive and update its hash; the value `...` removes a key."""
    sections = find_members(path, archive_module._SIZE_LIMITS)
    members = {name: read_section(path, section) for name, section in sections.items()}
    manifest = {key: value for key, value in json.loads(members[MANIFEST]).items() if key != "manifest_sha256"}
    manifest = {key: value for key, value in (manifest | changes).items() if value is not ...}
    manifest["manifest_sha256"] = archive_module._self_hash(manifest)
    members[MANIFEST] = archive_module._json(manifest)
    write_container(path, {name: Member.of(content) for name, content in members.items()})
    return path


# contents


def test_summary_of_a_saved_model(tmp_path: Path, inspect: Inspect) -> None:
    model, path = tiny_model(), tmp_path / "model.nemo"
    model.provenance = {key: value for key, value in PROVENANCE.items() if key != "package_versions"}
    model.save_to(str(path))
    said = inspect(path)
    parameters = sum(parameter.numel() for parameter in model.parameters())
    assert (said.code, said.err) == (0, "")
    title, totals, *_ = said.out.splitlines()
    assert title == "model.nemo"
    assert totals == f"model archive, {parameters:,} parameters, {path.stat().st_size:,} bytes"
    told = rows(said.out)
    assert told["class"] == "ESM1nvModel"
    assert [told[key] for key in ("layers", "hidden size", "attention heads", "FFN size")] == ["2", "32", "4", "64"]
    assert [told["longest sequence, tokens"], told["dropout, hidden"], told["dropout, attention"]] == ["512", "0", "0"]
    assert told["parameters"] == f"{parameters:,} in float32"
    assert told["SHA-256 of the weights"] == ArchiveFile.open(path).weights_sha256
    assert told["seed"] == "1234"
    assert told["steps"] == "1,500"
    assert told["consumed samples"] == "24,000, 20.00 epochs of 1,200"
    assert told["data"] == "Müller's proteins"
    assert told["data release"] == "2022_05"
    assert told["data sequences"] == "train 2,600, validation 150, test 200"
    assert told["data manifest sha256"] == HASH
    assert told["restored from"] == "models/before.nemo"
    assert f"torch {version('torch')}" in told["written with"]
    assert "differs here" not in told  # written by the installed packages
    assert not {"saved", "next learning rate", "averaged from", "converted from"} & told.keys()


def test_parameters_are_counted_per_stored_dtype(tmp_path: Path) -> None:
    card = ArchiveSummary.of(ArchiveFile.open(written(tmp_path / "two.nemo")))
    assert card.parameters_by_dtype == {"float32": 40, "bfloat16": 6}
    assert rows(card.text())["parameters"] == "40 in float32, 6 in bfloat16"


@pytest.mark.parametrize("precision", ["32", "bf16"])
def test_fixed_tensors_are_not_counted_as_parameters(precision: str, tmp_path: Path) -> None:
    model = tiny_model(precision, position_embedding="rotary", token_dropout=True, contact_head=True)
    model.save_to(str(tmp_path / "model.nemo"))
    card = ArchiveSummary.of(ArchiveFile.open(tmp_path / "model.nemo"))
    stored = "float32" if precision == "32" else "bfloat16"
    sizes = EncoderConfig.from_config(card.config["encoder"])
    assert len(list(sizes.fixed_tensors())) == 3
    assert (card.parameters, card.parameters_by_dtype) == (sizes.parameters, {stored: sizes.parameters})


@pytest.mark.parametrize("encoder", [None, [1], {"num_layers": 0}, {"no": 1}])
def test_without_an_encoder_config_all_tensors_are_counted(encoder: Any, tmp_path: Path) -> None:
    weights = {"encoder.contact_head.bias": torch.ones(1), "a": torch.ones(3)}
    path = write_archive(tmp_path / "odd.nemo", Archive("ESM1nvModel", {"encoder": encoder}, weights))
    assert ArchiveSummary.of(ArchiveFile.open(path)).parameters == 4


def test_packages_that_differ_from_the_installed_ones_are_listed(tmp_path: Path) -> None:
    told = rows(ArchiveSummary.of(ArchiveFile.open(written(tmp_path / "old.nemo"))).text())
    assert "torch 1.0.0" in told["written with"]
    assert told["differs here"] == f"no-such-package is not installed, torch {version('torch')}"


def test_checkpoint_summary_describes_its_training(checkpoint: Path, inspect: Inspect) -> None:
    said = inspect(checkpoint)
    assert said.out.splitlines()[1].startswith("checkpoint of a training, 46 parameters")
    told = rows(said.out)
    assert told["saved"] == "on the schedule of every 500 steps"
    assert told["next learning rate"] == "0.00015"
    assert told["lowest validation loss"] == "2.7183, at step 1,400"
    assert told["consumed samples"] == "24,000, 20.00 epochs of 1,200"


def test_checkpoint_off_the_schedule_is_marked(tmp_path: Path) -> None:
    provenance = {"checkpoint": {"on_schedule": False, "every_n_train_steps": 1}}
    path = written(tmp_path / "stopped.ckpt", provenance, {"callbacks": {"Checkpoints": {"best_loss": float("inf")}}})
    told = rows(ArchiveSummary.of(ArchiveFile.open(path)).text())
    assert told["saved"] == "off the schedule of every 1 step: at a stop or a good validation"
    assert "lowest validation loss" not in told  # there was no validation yet


def averaged_from(count: int) -> list[dict[str, Any]]:
    return [
        {"file": f"step={500 * i:09d}.ckpt", "steps": 500 * i, "weights_sha256": f"{i:04d}{HASH[4:]}"}
        for i in range(1, count + 1)
    ]


def test_averaged_model_lists_its_sources(tmp_path: Path) -> None:
    path = written(tmp_path / "average.nemo", PROVENANCE | {"averaged_from": averaged_from(3)})
    lines = ArchiveSummary.of(ArchiveFile.open(path)).text().splitlines()
    start = lines.index("averaged from             3 files, steps 500 to 1,500")
    indent = " " * 26
    assert lines[start + 1 : start + 5] == [
        f"{indent}step 500, SHA-256 0001456789ab…, step=000000500.ckpt",
        f"{indent}step 1,000, SHA-256 0002456789ab…, step=000001000.ckpt",
        f"{indent}step 1,500, SHA-256 0003456789ab…, step=000001500.ckpt",
        "",
    ]


def test_long_source_list_is_shortened_in_text_and_complete_in_json(tmp_path: Path, inspect: Inspect) -> None:
    path = written(tmp_path / "average.nemo", PROVENANCE | {"averaged_from": averaged_from(47)})
    text = inspect(path).out
    assert "averaged from             47 files, steps 500 to 23,500" in text
    assert [text.count(f"step={500 * i:09d}.ckpt") for i in (1, 4, 5, 43, 44, 47)] == [1, 1, 0, 0, 1, 1]
    assert "… 39 more; --json has all" in text
    assert json.loads(inspect(path, "--json").out)["averaged_from"] == averaged_from(47)
    nine, eight = averaged_from(9), averaged_from(8)
    assert "… 1 more" in ArchiveSummary.of(ArchiveFile.open(written(path, {"averaged_from": nine}))).text()
    assert "more" not in ArchiveSummary.of(ArchiveFile.open(written(path, {"averaged_from": eight}))).text()


def test_unrecorded_values_are_left_out(tmp_path: Path) -> None:
    nothing = dict.fromkeys(PROVENANCE) | {"averaged_from": [], "notes": "", "converted_from": {}}
    for provenance in ({}, nothing):
        text = ArchiveSummary.of(ArchiveFile.open(written(tmp_path / "bare.nemo", provenance))).text()
        assert "None" not in text
        assert "null" not in text
        assert rows(text).keys() == {
            *("class", "layers", "hidden size", "attention heads", "FFN size", "longest sequence, tokens"),
            *("dropout, hidden", "dropout, attention", "parameters", "SHA-256 of the weights"),
        }


def test_converted_model_shows_its_source_and_notes(tmp_path: Path) -> None:
    provenance = {"converted_from": {"file": "esm1nv.nemo", "sha256": HASH}, "notes": ["one was padded", "no dropout"]}
    told = rows(ArchiveSummary.of(ArchiveFile.open(written(tmp_path / "converted.nemo", provenance))).text())
    assert told["converted from"] == "file esm1nv.nemo, sha256"  # the hash is on the next line
    assert told["notes"] == "one was padded; no dropout"


def test_fitted_contact_head_shows_its_structures_and_held_out_precision(tmp_path: Path) -> None:
    precision = {"model": [{"range": "long", "top": "P@L", "mean": 0.412, "low": 0.3, "high": 0.5}]}
    head = {"fitted_on": ["1ubq_A", "2gb1_A"], "contact": "CA < 8", "C": 0.15, "held_out_structures": 7}
    path = written(tmp_path / "x.nemo", {"contact_head": head | {"precision": precision}})
    told = ArchiveSummary.of(ArchiveFile.open(path)).text().partition("contact head fitted on")[2]
    assert "2 structures: 1ubq_A; 2gb1_A" in told
    assert "contact CA < 8" in told and "C 0.15" in told
    assert "on 7 others: long P@L 0.412" in told


def test_no_line_is_wider_than_112_columns(tmp_path: Path) -> None:
    path = written(tmp_path / f"{'x' * 200}.nemo", PROVENANCE | {"data": "a b " * 5000, "restored_from": "/" * 400})
    text = ArchiveSummary.of(ArchiveFile.open(path)).text()
    assert max(map(len, text.splitlines())) <= 112
    assert len(text) < 4000


# JSON


def test_json_has_the_same_keys_for_every_file(tmp_path: Path, checkpoint: Path, inspect: Inspect) -> None:
    bare, whole = (
        json.loads(inspect(path, "--json").out) for path in (written(tmp_path / "bare.nemo", {}), checkpoint)
    )
    assert [*bare] == [*whole]
    for key in ("architecture", "training", "checkpoint"):
        assert [*bare[key]] == [*whole[key]]
    assert [*bare] == [
        *("name", "kind", "bytes", "model_class", "architecture", "parameters", "parameters_by_dtype", "training"),
        *("averaged_from", "checkpoint", "packages", "weights_sha256", "provenance", "config"),
    ]
    assert set(bare["training"].values()) == {None}
    assert bare["averaged_from"] == []


def test_json_contains_the_numbers(checkpoint: Path, inspect: Inspect) -> None:
    said = inspect(checkpoint, "--json", "--verify")
    assert said.code == 0
    card = json.loads(said.out)  # fails if anything else is printed
    assert (card["name"], card["kind"], card["bytes"]) == (checkpoint.name, "checkpoint", checkpoint.stat().st_size)
    assert card["architecture"] == {key: value for key, value in TINY.items() if key != "init_method_std"}
    assert (card["parameters"], card["parameters_by_dtype"]) == (46, {"float32": 40, "bfloat16": 6})
    assert card["training"]["epochs"] == 20.0
    assert card["training"]["data_sequences"] == PROVENANCE["data_sequences"]
    assert card["checkpoint"] == {
        **SCHEDULE,
        "next_learning_rate": 0.00015,
        "lowest_validation_loss": 2.71828,
        "lowest_validation_step": 1400,
    }
    assert card["packages"]["torch"] == {"recorded": "1.0.0", "installed": version("torch")}
    assert card["packages"]["no-such-package"]["installed"] is None
    assert card["weights_sha256"] == ArchiveFile.open(checkpoint).weights_sha256
    assert card["provenance"] == PROVENANCE | {"checkpoint": SCHEDULE}
    assert card["config"]["encoder"] == TINY


# files that were tampered with, or are unusual


@pytest.mark.parametrize("member", [WEIGHTS, STATE_TENSORS])
def test_verify_finds_a_flipped_bit(member: str, checkpoint: Path, inspect: Inspect) -> None:
    said = inspect(checkpoint, "--verify")
    assert said.code == 0
    assert said.out.endswith("\nEvery member matches its hash in the manifest.\n")
    flipped(checkpoint, member)
    assert inspect(checkpoint).code == 0  # without --verify, this member is not read
    for arguments in ([], ["--json"]):
        said = inspect(checkpoint, "--verify", *arguments)
        assert said.code == 2
        assert said.err == (
            f"error: {checkpoint}: {member} does not match its BLAKE3 in manifest.json; the file is damaged\n"
        )
        assert "Every member" not in said.out


def test_damaged_state_is_found_without_verify(checkpoint: Path, inspect: Inspect) -> None:
    flipped(checkpoint, archive_module.STATE)
    said = inspect(checkpoint)
    assert (said.code, said.out) == (2, "")
    assert "state.json does not match its BLAKE3" in said.err


HOSTILE = "red\x1b[31m\x9b2J\r\n\x07\x7f\u202egnp\u2028\ud800 end"
ESCAPED = r"red\x1b[31m\x9b2J\r\n\x07\x7f\u202egnp\u2028\ud800 end"


def test_file_contents_cannot_send_terminal_escapes(tmp_path: Path, inspect: Inspect) -> None:
    provenance = dict.fromkeys(PROVENANCE, HOSTILE) | {
        HOSTILE: [HOSTILE, {HOSTILE: HOSTILE}],
        "data_sequences": {HOSTILE: HOSTILE},
        "package_versions": {HOSTILE: HOSTILE},
        "averaged_from": [{"file": HOSTILE, "steps": HOSTILE, "weights_sha256": "\x1b[31m"}, HOSTILE],
        "checkpoint": HOSTILE,
    }
    path = resigned(written(tmp_path / "evil\x1b[2J.nemo", provenance), model_class=HOSTILE)
    said = inspect(path)
    assert (said.code, said.err) == (0, "")
    assert all(character.isprintable() or character == "\n" for character in said.out)
    told = rows(said.out)
    assert (told["class"], told["recipe"], told["saved"]) == (ESCAPED, ESCAPED, ESCAPED)
    said = inspect(path, "--json")
    assert all(" " <= character < "\x7f" or character == "\n" for character in said.out)
    assert json.loads(said.out)["training"]["recipe"] == HOSTILE


def test_error_that_quotes_a_file_cannot_send_terminal_escapes(tmp_path: Path, inspect: Inspect) -> None:
    path = resigned(written(tmp_path / "evil.nemo"), files={"\x1b[31m\n": {}})
    said = inspect(path)
    assert (said.code, said.out) == (2, "")
    assert said.err.count("\n") == 1
    assert said.err.rstrip("\n").isprintable()
    assert "x1b[31m" in said.err


ODD_VALUES = [
    *([], {}, [[]], ["a", ["b"]], {"a": {"b": None}}, "", "  \n", "text", True, -1, 0, 10**400, 1.5, -0.0),
    *(float("nan"), float("inf"), [None], [{"steps": "x", "file": [1], "weights_sha256": 5}], {"train": 10**400}),
    *({"train": []}, {"train": 0}, {"on_schedule": "yes"}, {"on_schedule": True, "every_n_train_steps": "2"}, 2**62),
]


@pytest.mark.parametrize("odd", ODD_VALUES, ids=lambda odd: repr(odd)[:40])
def test_values_of_any_type_are_displayed(odd: Any, tmp_path: Path, inspect: Inspect) -> None:
    keys = [*PROVENANCE, "averaged_from", "checkpoint", "converted_from", "contact_head", "notes"]
    states = (
        *(dict.fromkeys(STATE, odd), {"identity": {"samples of an epoch": odd}, "lr_schedulers": [odd]}),
        {"lr_schedulers": [{"_last_lr": [odd]}], "callbacks": {"Checkpoints": {"best_loss": odd, "best_step": odd}}},
    )
    for provenance in (dict.fromkeys(keys, odd), PROVENANCE | {"checkpoint": odd, "consumed_samples": odd}):
        for state in states:
            path = written(tmp_path / "odd.ckpt", provenance, state)
            said = inspect(path)
            assert (said.code, said.err) == (0, "")
            assert "None" not in said.out
            said = inspect(path, "--json")
            assert said.code == 0
            assert "NaN" not in said.out
            assert "Infinity" not in said.out
            assert json.loads(said.out)["parameters"] == 46


@pytest.mark.parametrize("config", [{}, {"encoder": [1, 2]}, {"encoder": {"num_layers": ["x"], "hidden_size": None}}])
def test_unexpected_encoder_config_is_displayed(config: dict[str, Any], tmp_path: Path, inspect: Inspect) -> None:
    path = write_archive(tmp_path / "odd.nemo", Archive("ESM1nvModel", config, WEIGHTS_AT_REST, PROVENANCE))
    assert inspect(path).code == 0
    assert json.loads(inspect(path, "--json").out)["architecture"]["hidden_size"] is None


def test_deeply_nested_manifest_is_rejected(tmp_path: Path, inspect: Inspect) -> None:
    deep: Any = []
    for _ in range(400):
        deep = [deep]
    limit = sys.getrecursionlimit()
    sys.setrecursionlimit(10_000)
    try:
        path = written(tmp_path / "deep.nemo", {"data": deep})
    finally:
        sys.setrecursionlimit(limit)
    said = inspect(path)
    assert (said.code, said.out, said.err.count("\n")) == (2, "", 1)
    assert "nested more than 32 deep" in said.err


# choice of summary


def test_folder_gets_the_store_summary(sample_store: ProteinStore, inspect: Inspect) -> None:
    card = json.loads(inspect(sample_store.folder, "--json").out)
    assert card["splits"]["train"]["sequences"] == 2600


@pytest.mark.parametrize("kind", ["absent", "pipe", "closed"])
def test_path_that_is_neither_folder_nor_file_gives_one_error_that_names_both(
    kind: str, tmp_path: Path, inspect: Inspect, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / kind
    if kind == "pipe":
        os.mkfifo(path)
    if kind == "closed":  # mocked, because root may read any folder
        monkeypatch.setattr(
            Path, "is_dir", lambda self: (_ for _ in ()).throw(PermissionError(13, "Permission denied"))
        )
    said = inspect(path)
    assert (said.code, said.out, said.err.count("\n")) == (2, "", 1)
    assert said.err.startswith(f"error: {path}: ")
    if kind != "closed":
        for name in ("the folder of a store", "a model (.nemo)", "checkpoint (.ckpt)"):
            assert name in said.err


@pytest.mark.parametrize("content", [b"", b"no archive\n" * 100, b"\0" * 2048])
def test_file_that_is_not_an_archive_gives_one_error(content: bytes, tmp_path: Path, inspect: Inspect) -> None:
    path = tmp_path / "other.nemo"
    path.write_bytes(content)
    said = inspect(path)
    assert (said.code, said.out, said.err.count("\n")) == (2, "", 1)
    assert said.err.startswith(f"error: {path}: ")


def test_unreadable_file_gives_one_error(tmp_path: Path, inspect: Inspect, monkeypatch: pytest.MonkeyPatch) -> None:
    path = written(tmp_path / "secret.nemo")

    def refused(*_: Any, **__: Any) -> None:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(Path, "open", refused)  # mocked, because root may read any file
    said = inspect(path)
    assert (said.code, said.err) == (2, f"error: {path}: cannot be read (Permission denied)\n")


def test_help_names_both_kinds_and_a_picture_needs_a_store(tmp_path: Path, inspect: Inspect) -> None:
    said = inspect("--help")
    assert said.code == 0
    for name in ("store", "a model", "a checkpoint", "--verify", "--json", "--picture"):
        assert name in said.out
    said = inspect(written(tmp_path / "model.nemo"), "--picture", "card.png")
    assert said.code == 2
    assert "--picture" in said.err


# imports and progress


def test_summary_imports_neither_torch_nor_nemo_nor_hydra(checkpoint: Path) -> None:
    code = (
        "import sys; from bionemo_esm.__main__ import main\n"
        f"sys.argv = ['bionemo-esm', 'inspect', {str(checkpoint)!r}, '--verify']\n"
        "try: main()\n"
        "except SystemExit as stop: assert not stop.code, stop.code\n"
        "heavy = ('torch', 'nemo', 'megatron', 'lightning', 'hydra', 'numba', 'matplotlib')\n"
        "print([name for name in heavy if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "[]"


def test_verify_reports_progress(checkpoint: Path, inspect: Inspect, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("bionemo_esm.console._SECONDS_BETWEEN_LINES", 0.0)
    assert "(100%)" in inspect(checkpoint, "--verify").out
    json.loads(inspect(checkpoint, "--verify", "--json").out)
