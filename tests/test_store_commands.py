"""Commands on a store: `preprocess`, `inspect` and `check-leakage`, their output, and their error messages."""

from __future__ import annotations

import gzip
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import NamedTuple

import pytest
import yaml
from hydra import compose, initialize_config_dir

from bionemo_esm import __main__ as command_line
from bionemo_esm import config_directory
from bionemo_esm.data import store_commands as jobs
from bionemo_esm.data.fasta import read_fasta
from bionemo_esm.data.store import SPLITS, ProteinStore
from bionemo_esm.data.uniprot_release import FetchedRelease, ReleaseError
from conftest import SAMPLE, needs_mmseqs
from runs import ROOT, run_here

FILES = {name: SAMPLE / f"{name}.fasta.gz" for name in SPLITS}
PNG = b"\x89PNG\r\n\x1a\n"
IN_TWENTY = ("split.validation=null", "split.test=null")
HBB_CODING = "ATGGTGCATCTGACTCCTGAGGAGAAGTCTGCCGTTACTGCCCTGTGGGGCAAGGTGAACGTGGATGAAGTTGGTGGTGAGGCCCTGGGCAG"


class Said(NamedTuple):
    """Exit code and output of a command."""

    code: int
    out: str
    err: str


class Shell:
    """Run commands in this process, in a folder of their own."""

    def __init__(self, folder: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
        self.folder, self._capfd, self._monkeypatch = folder, capfd, monkeypatch

    def preprocess(self, *overrides: str) -> Said:
        """Run `preprocess` with these overrides, composed as on the command line."""
        with initialize_config_dir(str(config_directory()), version_base="1.3"):
            cfg = compose("preprocess_uniref50", overrides=list(overrides))
        return self._finish(lambda: jobs.preprocess(cfg))

    def command(self, *arguments: str) -> Said:
        """Run `bionemo-esm` with these arguments."""
        self._monkeypatch.setattr(sys, "argv", ["bionemo-esm", *arguments])
        return self._finish(command_line.main)

    def _finish(self, job) -> Said:  # type: ignore[no-untyped-def]
        self._capfd.readouterr()
        code = 0
        try:
            job()
        except SystemExit as stop:
            code = stop.code if isinstance(stop.code, int) else 1
        return Said(code, *self._capfd.readouterr())

    def files(self) -> list[str]:
        return sorted(path.name for path in self.folder.iterdir())


@pytest.fixture
def shell(tmp_path: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Shell:
    folder = tmp_path / "work"
    folder.mkdir()
    monkeypatch.chdir(folder)
    return Shell(folder, capfd, monkeypatch)


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A store of the 200 proteins of the sample's test part, built by `preprocess`; read-only."""
    output = tmp_path_factory.mktemp("finished") / "store"
    with initialize_config_dir(str(config_directory()), version_base="1.3"):
        cfg = compose("preprocess_uniref50", overrides=[f"input={FILES['test']}", f"output={output}", *IN_TWENTY])
    jobs.preprocess(cfg)
    return output


def write_clusters(path: Path) -> Path:
    """Write 100 clusters: pairs of the proteins of the sample's test part."""
    names = [record.id for record in read_fasta(FILES["test"])]
    pairs = zip(names[::2], names[1::2], strict=True)
    path.write_text("".join(f"UniRef50_{first}\t{first},{second}\n" for first, second in pairs))
    return path


# Building


def test_preprocess_builds_a_store_and_prints_its_summary(shell: Shell) -> None:
    said = shell.preprocess(f"input={FILES['test']}", "output=data/store", "split.validation=20", "split.test=30")
    assert (said.code, said.err) == (0, "")
    store = ProteinStore.open("data/store")
    store.verify()
    assert [len(store.split(name)) for name in SPLITS] == [150, 20, 30]
    assert store.manifest["policy"]["seed"] == 42
    assert (shell.folder / "data" / "store" / "card.png").read_bytes().startswith(PNG)
    lines = said.out.splitlines()
    assert lines[0] == f"Building data/store from {FILES['test']}"
    for row in ("sequences 150 20 30", "length in residues", "store data/store", "picture data/store/card.png"):
        assert any(line.split()[: len(row.split())] == row.split() for line in lines), row
    assert re.search(r"Done in \d+:\d\d", said.out)
    assert "split.by=identity keeps them apart" in said.out
    assert lines[-1].split() == ["train", "bionemo-esm", "pretrain", "recipe=laptop", "data.store=data/store"]
    assert shell.files() == ["data"]
    assert [path.name for path in Path("data").iterdir()] == ["store"]


def test_glob_pattern_and_list_select_the_same_files(shell: Shell) -> None:
    for name, path in FILES.items():
        shutil.copy(path, shell.folder / f"{name}.fasta.gz")
    (shell.folder / "plain.fasta").write_bytes(gzip.decompress(FILES["test"].read_bytes()))
    listed = "input=[" + ",".join(f"{name}.fasta.gz" for name in sorted(SPLITS)) + "]"
    manifests = []
    for output, given in (("one", "input='*.fasta.gz'"), ("two", listed)):
        said = shell.preprocess(given, f"output={output}", *IN_TWENTY)
        assert said.code == 0, said.err
        assert "from test.fasta.gz, train.fasta.gz, validation.fasta.gz" in said.out
        manifests.append(ProteinStore.open(output).manifest)
    assert manifests[0] == manifests[1]
    assert manifests[0]["counts"]["records_kept"] == 3_000
    mixed = shell.preprocess("input=[plain.fasta,'v*.gz']", "output=three", *IN_TWENTY)
    assert "from plain.fasta, validation.fasta.gz" in mixed.out
    assert ProteinStore.open("three").manifest["counts"]["records_kept"] == 400


def test_policy_seed_and_threads_of_the_configuration_are_used(shell: Shell) -> None:
    policy = ("policy.max_residues=100", "policy.long_sequences=drop", "policy.duplicate_sequences=keep", "seed=7")
    said = shell.preprocess(f"input={FILES['test']}", "output=store", "threads=1", "licence=CC0", *policy, *IN_TWENTY)
    assert said.code == 0, said.err
    manifest = ProteinStore.open("store").manifest
    assert (manifest["policy"]["long_sequences"], manifest["policy"]["seed"], manifest["licence"]) == ("drop", 7, "CC0")
    assert 0 < manifest["counts"]["records_kept"] < 100
    assert max(entry["longest"] for entry in manifest["splits"].values()) <= 100


def test_clustered_store_is_built_from_a_cluster_table(shell: Shell) -> None:
    write_clusters(shell.folder / "clusters.tsv")
    sizes = ("split.validation=10", "split.test=20")
    said = shell.preprocess(f"input={FILES['test']}", "clusters.map=clusters.tsv", "output=store", *sizes)
    assert said.code == 0, said.err
    store = ProteinStore.open("store")
    assert [store.split(name).num_clusters for name in SPLITS] == [70, 10, 20]
    assert [len(store.split(name)) for name in SPLITS] == [140, 10, 20]
    assert any(line.split() == ["clusters", "70", "10", "20"] for line in said.out.splitlines())
    assert "clusters.tsv" in said.out
    assert (shell.folder / "store" / "card.png").exists()


@pytest.mark.parametrize("given", ["release=2022_05", "release='2022_05'", "release=202205", "release=current"])
def test_release_name_is_kept_even_if_yaml_parses_it_as_a_number(shell: Shell, given: str) -> None:
    assert shell.preprocess(f"input={FILES['test']}", "output=store", given, *IN_TWENTY).code == 0
    expected = "current" if "current" in given else "2022_05"
    assert ProteinStore.open("store").manifest["release"] == expected


def test_defaults_match_the_model_card() -> None:
    values = yaml.safe_load((config_directory() / "preprocess_uniref50.yaml").read_text())
    assert values["split"] == {"by": "random", "identity": 0.3, "validation": 5_000, "test": 1_000_000}
    assert (values["policy"]["max_residues"], values["policy"]["long_sequences"]) == (1024, "truncate")
    with initialize_config_dir(str(config_directory()), version_base="1.3"):
        job = jobs.PreprocessConfig.load(compose("preprocess_uniref50"))
    assert job.input == ()
    assert jobs.MODEL_CARD_RELEASE == "2022_05"


# Downloading


@pytest.mark.parametrize(
    ("overrides", "asked"), [((), "2022_05"), (("release=2023_01",), "2023_01"), (("release=current",), "current")]
)
def test_release_is_downloaded_if_no_input_is_given(
    shell: Shell, monkeypatch: pytest.MonkeyPatch, overrides: tuple[str, ...], asked: str
) -> None:
    def fetch(name: str, folder: Path, progress: object) -> FetchedRelease:
        assert (name, folder) == (asked, Path("downloads"))
        assert callable(progress)
        progress(10, 100)
        return FetchedRelease(FILES["test"], "2024_03", "https://example.org/uniref50.fasta.gz", "0" * 32, "CC BY 4.0")

    monkeypatch.setattr(jobs, "fetch_release", fetch)
    said = shell.preprocess("download_folder=downloads", "output=store", *IN_TWENTY, *overrides)
    assert said.code == 0, said.err
    manifest = ProteinStore.open("store").manifest
    assert (manifest["release"], manifest["licence"]) == ("2024_03", "CC BY 4.0")
    assert "2024_03" in said.out


def test_failed_download_gives_one_error_line(shell: Shell, monkeypatch: pytest.MonkeyPatch) -> None:
    def fetch(name: str, folder: Path, progress: object) -> FetchedRelease:
        raise ReleaseError("https://example.org: does not answer; try again later")

    monkeypatch.setattr(jobs, "fetch_release", fetch)
    said = shell.preprocess("output=store")
    assert (said.code, said.err) == (2, "error: https://example.org: does not answer; try again later\n")
    assert shell.files() == []


def test_existing_store_is_detected_before_any_download(
    shell: Shell, monkeypatch: pytest.MonkeyPatch, finished: Path
) -> None:
    monkeypatch.setattr(jobs, "fetch_release", lambda *_, **__: pytest.fail("downloads"))
    said = shell.preprocess(f"output={finished}")
    assert said.code == 2
    assert f"error: output: {finished} exists already" in said.err


# Errors

TEST = f"input={FILES['test']}"


@pytest.mark.parametrize(
    ("overrides", "names"),
    [
        ([TEST, "+foo=1"], "unknown key foo; known are: clusters, "),
        ([TEST, "+policy.gap=drop"], "unknown key policy.gap; known are: "),
        ([TEST, "+split.dev=1"], "unknown key split.dev; known are: by, identity, test, validation"),
        ([TEST, "split=5"], "split must be a mapping"),
        ([TEST, "policy=null"], "policy must be a mapping, not None"),
        ([TEST, "+policy.seed=1"], "unknown key policy.seed; known are: "),
        ([TEST, "policy.gaps=drp"], "policy.gaps must be one of remove, drop, error, not 'drp'"),
        ([TEST, "policy.max_residues=0"], "policy.max_residues must be at least 1, not 0"),
        ([TEST, "policy.max_residues=many"], "policy.max_residues must be an integer, not 'many'"),
        ([TEST, "split.validation=-1"], "split.validation must not be negative, but is -1"),
        ([TEST, "split.test=1.5"], "split.test must be an integer, not 1.5"),
        ([TEST, "split.test=200"], "200 distinct sequences are too few"),
        ([TEST, "split.test=1000000"], "1,000,000 in test and at least one in train; ask for fewer"),
        ([TEST, "seed=-1"], "seed must not be negative, but is -1"),
        ([TEST, "threads=0"], "threads must be at least 1, or null, not 0"),
        ([TEST, "threads=two"], "threads must be an integer, not 'two'"),
        ([TEST, "output=null"], "output must be a path, not None"),
        (["input=absent.fasta"], "absent.fasta: no such file; check the path"),
        (["input=."], ".: is a folder; name a file in it"),
        (["input='absent/*.fasta'"], "input: no file matches absent/*.fasta; check the pattern"),
        ([f"input=[{FILES['test']},{FILES['test']}]"], "input: names a file twice"),
        (["release=2022-05"], "no release '2022-05': give a number such as 2022_05, or 'current'"),
        ([TEST, "clusters.map=absent.tsv"], "absent.tsv: no such file"),
        ([f"input=[{FILES['test']},{FILES['train']}]", "clusters.map=c.tsv"], "clusters.map needs one `input`"),
        (["clusters.map=c.tsv"], "clusters.map needs one `input`, the FASTA file of the clusters' members"),
    ],
)
def test_mistake_gives_one_error_line_and_leaves_nothing(shell: Shell, overrides: list[str], names: str) -> None:
    said = shell.preprocess("output=store", "split.validation=null", "split.test=null", *overrides)
    assert said.code == 2
    assert said.err.startswith("error: ")
    assert names in said.err
    assert said.err.count("\n") == 1
    assert shell.files() == []


@pytest.mark.parametrize(
    ("content", "names"),
    [
        (FILES["test"].read_bytes()[:-9_000], "in.fasta, record 1"),
        (f">hbb\n{HBB_CODING}\n".encode() * 20, "in.fasta: looks like DNA or RNA"),
        (b"", "in.fasta: the file is empty"),
        (b"protein\nMKV\n", "in.fasta, record 1, byte 0: text before the first '>'"),
    ],
)
def test_unusable_file_is_named(shell: Shell, content: bytes, names: str) -> None:
    (shell.folder / "in.fasta").write_bytes(content)
    said = shell.preprocess("input=in.fasta", "output=store", *IN_TWENTY)
    assert said.code == 2
    assert said.err.startswith("error: ")
    assert names in said.err
    assert said.err.count("\n") == 1
    assert shell.files() == ["in.fasta"]


def test_existing_store_is_left_unchanged(shell: Shell, finished: Path) -> None:
    before = {path.name: path.stat().st_mtime_ns for path in finished.iterdir()}
    said = shell.preprocess(TEST, f"output={finished}", *IN_TWENTY)
    assert (said.code, said.out) == (2, "")
    assert said.err == f"error: output: {finished} exists already; remove it or choose another name\n"
    assert {path.name: path.stat().st_mtime_ns for path in finished.iterdir()} == before


@pytest.mark.parametrize("kind", ["folder", "file"])
def test_existing_output_that_is_not_a_store_is_left_unchanged(shell: Shell, kind: str) -> None:
    (shell.folder / "taken").mkdir() if kind == "folder" else (shell.folder / "taken").write_text("notes")
    said = shell.preprocess(TEST, "output=taken", *IN_TWENTY)
    assert said.code == 2
    assert said.err.startswith("error: ")
    assert "taken" in said.err
    assert said.err.count("\n") == 1
    assert shell.files() == ["taken"]


@pytest.mark.parametrize("kind", ["folder", "file"])
def test_error_does_not_call_another_existing_output_a_store(shell: Shell, kind: str) -> None:
    (shell.folder / "taken").mkdir() if kind == "folder" else (shell.folder / "taken").write_text("notes")
    said = shell.preprocess(TEST, "output=taken", *IN_TWENTY)
    assert "output" in said.err
    assert "no such folder" not in said.err
    assert "build the store again" not in said.err


def test_file_given_by_two_paths_is_reported_as_named_twice(shell: Shell) -> None:
    shutil.copy(FILES["test"], shell.folder / "in.fasta.gz")
    said = shell.preprocess("input=[in.fasta.gz,./in.fasta.gz]", "output=store", *IN_TWENTY)
    assert "input: names a file twice" in said.err


def test_tilde_is_expanded(shell: Shell, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(shell.folder))
    shutil.copy(FILES["test"], shell.folder / "in.fasta.gz")
    assert shell.preprocess("input='~/in.fasta.gz'", "output='~/store'", *IN_TWENTY).code == 0


# inspect


def test_inspect_prints_the_summary(shell: Shell, finished: Path) -> None:
    said = shell.command("inspect", str(finished))
    assert (said.code, said.err) == (0, "")
    assert any(line.split() == ["sequences", "180", "10", "10"] for line in said.out.splitlines())
    assert "Every file matches" not in said.out


def test_inspect_json_prints_only_json(shell: Shell, finished: Path) -> None:
    said = shell.command("inspect", str(finished), "--json", "--verify")
    card = json.loads(said.out)
    assert (card["sequences"], card["splits"]["train"]["sequences"], card["residues"]) == (200, 180, 77_237)
    assert card["manifest"]["source"][0]["file"] == "test.fasta.gz"


def test_inspect_draws_a_picture(shell: Shell, finished: Path) -> None:
    assert shell.command("inspect", str(finished), "--picture", "mine.png").code == 0
    assert (shell.folder / "mine.png").read_bytes() == (finished / "card.png").read_bytes()


def test_inspect_verify_checks_every_byte(shell: Shell, finished: Path) -> None:
    said = shell.command("inspect", str(finished), "--verify")
    assert said.out.endswith("\nEvery file matches its hash in the manifest.\n")
    shutil.copytree(finished, "damaged")
    tokens = bytearray(Path("damaged/train.bin").read_bytes())
    tokens[12_345] ^= 1
    Path("damaged/train.bin").write_bytes(tokens)
    assert shell.command("inspect", "damaged").code == 0
    said = shell.command("inspect", "damaged", "--verify")
    assert said.code == 2
    assert said.err.count("\n") == 1
    assert "damaged/train.bin: does not match splits.train.bin_sha256" in said.err


@pytest.mark.parametrize(
    ("arguments", "names"),
    [
        (["absent"], "absent: no such folder"),
        (["."], ".: is not a store (no manifest.json)"),
        (["STORE", "--picture", "/proc/card.png"], "/proc/card.png: cannot be written (No such file or directory)"),
    ],
)
def test_inspect_gives_one_error_line(shell: Shell, finished: Path, arguments: list[str], names: str) -> None:
    said = shell.command("inspect", *(str(finished) if word == "STORE" else word for word in arguments))
    assert said.code == 2
    assert said.err.startswith("error: ")
    assert names in said.err
    assert said.err.count("\n") == 1


def test_help_lists_commands_and_unknown_commands_are_rejected(shell: Shell) -> None:
    said = shell.command("--help")
    for name in ("pretrain", "preprocess", "inspect", "check-leakage"):
        assert f"bionemo-esm {name} " in said.out
    assert shell.command("inspekt").code == 2
    assert shell.command("inspect").code == 2
    assert "--verify" in shell.command("inspect", "--help").out


# check-leakage


@needs_mmseqs
def test_check_leakage_reports_and_writes_pairs(shell: Shell, finished: Path) -> None:
    said = shell.command(
        "check-leakage", str(finished), "--identity", "0.9", "--max-queries", "5", "--output", "pairs.tsv"
    )
    assert (said.code, said.err) == (0, "")
    assert "90%" in said.out
    assert "All pairs: pairs.tsv" in said.out
    assert (shell.folder / "pairs.tsv").read_text().count("\n") >= 1
    assert shell.files() == ["pairs.tsv"]


def test_check_leakage_gives_one_error_line(shell: Shell, finished: Path) -> None:
    for arguments, names in (
        (["absent"], "absent: no such folder"),
        ([str(finished), "--identity", "2"], "identity is 2"),
    ):
        said = shell.command("check-leakage", *arguments)
        assert said.code == 2
        assert said.err.startswith("error: ")
        assert names in said.err
        assert said.err.count("\n") == 1


# Subprocesses


def process(folder: Path, *overrides: str) -> subprocess.Popen[bytes]:
    command = [sys.executable, str(ROOT / "examples" / "preprocess_uniref50.py"), *overrides]
    return subprocess.Popen(command, cwd=folder, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE)


def test_script_builds_a_store_from_standard_input(tmp_path: Path) -> None:
    job = process(tmp_path, "input=-", "output=store", "release=2022_05", *IN_TWENTY)
    out, err = job.communicate(FILES["test"].read_bytes(), timeout=120)
    assert (job.returncode, err) == (0, b"")
    assert out.startswith(b"Building store from standard input\n")
    store = ProteinStore.open(tmp_path / "store")
    assert store.manifest["release"] == "2022_05"
    assert store.manifest["source"][0]["file"] == "standard input"
    assert [len(store.split(name)) for name in SPLITS] == [180, 10, 10]
    assert [path.name for path in tmp_path.iterdir()] == ["store"]  # no output folder of Hydra


def test_ctrl_c_while_a_pipe_is_open_leaves_nothing(tmp_path: Path) -> None:
    job = process(tmp_path, "input=-", "output=store", *IN_TWENTY)
    assert job.stdin is not None
    job.stdin.write(gzip.decompress(FILES["train"].read_bytes()))
    job.stdin.flush()
    until = time.monotonic() + 60
    while not (tmp_path / ".store.partial").exists() and time.monotonic() < until:
        time.sleep(0.02)
    time.sleep(0.3)  # let it block on the pipe
    assert job.poll() is None
    os.kill(job.pid, signal.SIGINT)
    assert job.wait(timeout=60) == 130  # although the pipe is still open
    out, err = job.communicate(timeout=60)
    assert err == b"\nInterrupted; no store was made. A download goes on next time.\n"
    assert b"Done" not in out
    assert list(tmp_path.iterdir()) == []


def test_installed_command_runs_the_same_job(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "bionemo_esm", "preprocess"]
    done = subprocess.run(
        [*command, TEST, "output=store", *IN_TWENTY], cwd=tmp_path, capture_output=True, text=True, check=False
    )
    assert (done.returncode, done.stderr) == (0, "")
    assert len(ProteinStore.open(tmp_path / "store").split("train")) == 180
    again = subprocess.run([*command, TEST, "output=store"], cwd=tmp_path, capture_output=True, text=True, check=False)
    assert again.returncode == 2
    assert again.stderr == "error: output: store exists already; remove it or choose another name\n"


# Training on the built store


@pytest.mark.slow  # imports dominate if this is the first training test
@pytest.mark.parametrize("clustered", [False, True])
def test_pretraining_runs_on_the_built_store(shell: Shell, tmp_path: Path, clustered: bool) -> None:
    given = [f"clusters.map={write_clusters(shell.folder / 'clusters.tsv')}"] if clustered else []
    said = shell.preprocess(TEST, "output=store", "split.validation=20", "split.test=20", *given)
    assert said.code == 0, said.err
    store = shell.folder / "store"
    summary = run_here(tmp_path / "run", f"data.store={store}", "trainer.max_steps=3", "trainer.val_check_interval=3")
    assert (summary["steps"], summary["consumed_samples"]) == (3, 48)
    assert (summary["train_sequences"], summary["validation_sequences"]) == (120 if clustered else 160, 20)
    assert summary["epochs"] == pytest.approx(48 / (60 if clustered else 160))
    ProteinStore.open(store).verify()
