"""Arguments that Hydra cannot compose: one line of ours, exit code 2, before Hydra answers in its own way."""

from __future__ import annotations

import subprocess
import sys

import pytest

from bionemo_esm.command_line import check_command_line
from bionemo_esm.errors import ConfigError
from bionemo_esm.settings import plain_values
from runs import ROOT, composed


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["trainer.max_step=40"], "error: trainer.max_step is not a key; did you mean trainer.max_steps?\n"),
        (["zebra=1"], "error: zebra is not a key; --help lists every key\n"),
        (
            ["recipe=esm1nv_phase3"],
            "Could not find 'recipe/esm1nv_phase3'; there are adapt, esm1b, esm1nv_phase1, esm1nv_phase2",
        ),
        (["recipe=laptop", "go"], "error: 'go' is not key=value; --help lists every key\n"),
        (["trainer.max_steps=[1"], "error: trainer.max_steps=[1 cannot be read as key=value"),
        (["data.fasta=lr=3(1).fa"], """give it with quotes within quotes: 'data.fasta="lr=3(1).fa"'\n"""),
        (["--data.fasta", "mine.fa"], "there is no option --data.fasta; settings are key=value, as in data.fasta=..."),
        (["-x"], "there is no option -x"),
        (["-m", "seed=1,2"], "error: -m: one job a command; for several, write a loop in the shell\n"),
        (["seed=1,2", "--multirun", "--cfg", "job"], "error: --multirun: one job a command"),
        (["hydra.mode=MULTIRUN"], "error: hydra.mode=MULTIRUN: one job a command"),
    ],
)
def test_what_cannot_be_composed_is_said_in_one_line(
    arguments: list[str], message: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["pretrain", *arguments])
    with pytest.raises(SystemExit) as stop:
        check_command_line("pretrain_esm1nv")
    assert stop.value.code == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1


@pytest.mark.parametrize(
    "arguments",
    [
        [],
        ["recipe=laptop", "+trainer.max_step=1"],
        ["--help"],
        ["-h"],
        ["zebra=1", "--cfg", "job"],
        ["--cfg=job", "zebra=1"],
        ['data.fasta="lr=3(1).fa"'],
    ],
)
def test_what_can_be_composed_and_hydras_own_flags_pass(arguments: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", ["pretrain", *arguments])
    check_command_line("pretrain_esm1nv")


HELP = {  # of each command a key of its own with what it means, and one that every such job has
    "embed": ("extract_embeddings", "layers: [-1]  # whose hidden states", "device: auto  # auto (a GPU"),
    "score": ("score_variants", "offset: 1  # the number", "device: auto  # auto (a GPU"),
    "contacts": ("predict_contacts", "threshold: 0.3  # contacts.csv", "device: auto  # auto (a GPU"),
    "fit-contacts": ("fit_contacts", "train: 20  # structures", "device: auto  # auto (a GPU"),
    "finetune": ("finetune", "seeds: [1, 2, 3]  # a fit", "  level: ???  # residue"),
    "predict": ("predict", "residues: null  # of a task", "device: auto  # auto (a GPU"),
    "preprocess": ("preprocess_uniref50", "release: null  # to download", "  gaps: remove  # - and .: remove"),
    "average": ("average_checkpoints", "checkpoints: ???  # .ckpt or .nemo", "output: "),
    "convert": ("convert_checkpoint", "source: ???  # ", "target: ???  # "),
}


@pytest.mark.parametrize("command", HELP)
@pytest.mark.parametrize("is_example", [True, False])
def test_help_is_every_key_with_its_meaning(command: str, is_example: bool) -> None:
    example, *keys = HELP[command]
    program = [str(ROOT / "examples" / f"{example}.py")] if is_example else ["-m", "bionemo_esm", command]
    done = subprocess.run(
        [sys.executable, *program, "-h" if is_example else "--help"], capture_output=True, text=True, check=False
    )
    assert (done.returncode, done.stderr) == (0, "")
    for key in keys:
        assert f"\n{key}" in done.stdout
    assert "defaults:" not in done.stdout
    assert "hydra" not in done.stdout
    called = f"python {program[0]}" if is_example else f"bionemo-esm {command}"
    assert done.stdout.startswith(f"{called} key=value ...\n")
    assert done.stdout.count(called) >= 2  # in the commands to begin with


def test_a_setting_that_must_be_given_is_named() -> None:
    with pytest.raises(ConfigError, match=r"^target must be given: target=\.\.\.$"):
        plain_values(composed("source=here", config="convert_checkpoint"))


def test_a_group_that_must_be_chosen_is_named_with_its_members(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["finetune", "restore_from_path=x.nemo", "output=out"])
    with pytest.raises(SystemExit) as stopped:
        check_command_line("finetune", "finetuning")
    assert stopped.value.code == 2
    assert capsys.readouterr().err.startswith(
        "error: task must be given: task=NAME; there are conservation, custom, gb1"
    )


def test_a_misspelt_key_is_told_where_a_group_was_chosen(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["finetune", "task=gb1", "data.trian=x.csv"])
    with pytest.raises(SystemExit):
        check_command_line("finetune", "finetuning")
    assert capsys.readouterr().err == "error: data.trian is not a key; did you mean data.train?\n"


@pytest.mark.parametrize("example", sorted(path.name for path in (ROOT / "examples").glob("*.py")))
def test_every_example_looks_first(example: str) -> None:
    command = [sys.executable, str(ROOT / "examples" / example), "zebra=1"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert done.stderr == "error: zebra is not a key; --help lists every key\n"
