"""Tests of command lines: one-line errors with exit code 2, literal values of text keys, help."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from importlib import import_module
from pathlib import Path
from types import SimpleNamespace

import pytest
from omegaconf import OmegaConf

from bionemo_esm import __main__ as program
from bionemo_esm.__main__ import COMMANDS
from bionemo_esm.command_line import ConfiguredCommand, check_command_line, help_text
from bionemo_esm.data.store_commands import main as preprocess
from bionemo_esm.errors import ConfigError
from bionemo_esm.finetuning.finetune_command import main as finetune
from bionemo_esm.inference.embedding.embed_command import main as embed
from bionemo_esm.pretraining.run import main as pretrain
from bionemo_esm.settings import plain_values
from runs import ROOT, composed


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["trainer.max_step=40"], "error: trainer.max_step is not a key; did you mean trainer.max_steps?\n"),
        (["lr=32"], "error: lr is not a key; did you mean optim.lr?\n"),
        (["zebra=1"], "error: zebra is not a key; --help lists every key\n"),
        (
            ["recipe=esm1nv_phase3"],
            "Could not find 'recipe/esm1nv_phase3'; there are adapt, esm1b, esm1nv_phase1, esm1nv_phase2",
        ),
        (["recipe=laptop", "go"], "error: 'go' is not key=value; --help lists every key\n"),
        (["trainer.max_steps=[1"], "error: trainer.max_steps=[1 cannot be read as key=value"),
        (["name=lr=3(1)"], """give it with quotes within quotes: 'name="lr=3(1)"'\n"""),
        (["~trainer"], "error: ~trainer: a key cannot be deleted; set it to another value: trainer=...\n"),
        (["~seed=5"], "error: ~seed=5: a key cannot be deleted; set it to another value: seed=...\n"),
        (["+seed=5"], "error: seed is a key already; set it without the sign before it: seed=5\n"),
        (["--data.fasta", "mine.fa"], "there is no option --data.fasta; settings are key=value, as in data.fasta=..."),
        (["-x"], "there is no option -x"),
        (["-m", "seed=1,2"], "error: -m: one job a command; for several, write a loop in the shell\n"),
        (["seed=1,2", "--multirun", "--cfg", "job"], "error: --multirun: one job a command"),
        (["hydra.mode=MULTIRUN"], "error: hydra.mode=MULTIRUN: one job a command"),
    ],
)
def test_invalid_arguments_are_refused_in_one_line(
    arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as stop:
        check_command_line(pretrain, arguments)
    assert stop.value.code == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1


@pytest.mark.parametrize(
    "arguments",
    [
        [],
        ["recipe=laptop", "+trainer.max_step=1"],
        ["zebra=1", "--cfg", "job"],
        ["--cfg=job", "zebra=1"],
        ['data.fasta="lr=3(1).fa"'],
    ],
)
def test_valid_arguments_and_the_flags_of_hydra_are_accepted(arguments: list[str]) -> None:
    check_command_line(pretrain, arguments)


@pytest.mark.parametrize(
    "text",
    [
        *("my proteins (1).fasta", "a=b.fasta", "x,y.fasta", "[1].fasta", "it's.fasta", 'q"q.fasta', "~tilde.fasta"),
        *(
            "größe.fasta",
            "配列.fa",
            "NAN",
            "TRUE",
            "7",
            "1e3",
            "${oc.env:HOME}.fasta",
            "a\\${model}\\",
            "{x: y}.fa",
            "%d",
        ),
        *("$(ls)", "a\\", "\\'", "#1.fasta", "x: y", "[a,b]", " lead", "x\ty"),
    ],
)
def test_value_of_a_text_key_is_taken_literally(text: str) -> None:
    cfg = composed(embed.for_hydra(f"input={text}"), "model=x.nemo", "output=x.h5", config="embed", part="inference")
    assert plain_values(cfg)["input"] == text


@pytest.mark.parametrize(
    ("given", "value"),
    [
        ("null", None),
        ("~/x.fasta", str(Path.home() / "x.fasta")),
        ('"~/x.fasta"', str(Path.home() / "x.fasta")),
        ('"lr=3(1).fa"', "lr=3(1).fa"),
        (r"""'class=(\S+)'""", r"class=(\S+)"),
        (r'"a\"b"', 'a"b'),
        ("[a.fasta,b.fasta]", ["a.fasta", "b.fasta"]),
        ("[1].fasta", "[1].fasta"),
    ],
)
def test_quotes_lists_null_and_home_in_a_text_value_are_interpreted(given: str, value: object) -> None:
    cfg = composed(preprocess.for_hydra(f"input={given}"), config="preprocess_uniref50")
    assert plain_values(cfg)["input"] == value


def test_input_that_names_an_existing_file_is_not_expanded_as_a_pattern(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("[1].fasta").write_text(">a\nMKT\n")
    with pytest.raises(SystemExit):
        preprocess.job(composed(preprocess.for_hydra("input=[1].fasta"), "output=.", config="preprocess_uniref50"))
    assert capsys.readouterr().err == "error: output: . exists already; remove it or choose another name\n"


@pytest.mark.parametrize("name", [name for name, command in COMMANDS.items() if command.configured])
def test_text_keys_are_keys_of_the_configuration(name: str) -> None:
    command = getattr(import_module(COMMANDS[name].module), COMMANDS[name].function)
    assert isinstance(command, ConfiguredCommand)
    group = ["task=custom"] if name == "finetune" else []
    cfg = composed(*group, config=command.config_name, part=command.part)
    assert command.text_keys
    for key in (*command.text_keys, *command.list_keys):
        parent, _, last = key.rpartition(".")
        assert last in list(OmegaConf.select(cfg, parent) if parent else cfg), key


HELP = {  # of each command: its configuration, a key of its own with its comment, and a key shared by all such commands
    "embed": ("extract_embeddings", "layers: [-1]  # hidden states of these layers", "device: auto  # auto (a GPU"),
    "score": ("score_variants", "offset: 1  # position number", "device: auto  # auto (a GPU"),
    "contacts": ("predict_contacts", "threshold: 0.3  # contacts.csv", "device: auto  # auto (a GPU"),
    "fit-contacts": ("fit_contacts", "train: 20  # structures", "device: auto  # auto (a GPU"),
    "finetune": ("finetune", "seeds: [1, 2, 3]  # a fit", "  level: ???  # residue"),
    "predict": ("predict", "residues: null  # tasks per residue", "device: auto  # auto (a GPU"),
    "preprocess": ("preprocess_uniref50", "release: null  # to download", "  gaps: remove  # - and .: remove"),
    "average": ("average_checkpoints", "checkpoints: ???  # .ckpt or .nemo", "output: "),
    "convert": ("convert_checkpoint", "source: ???  # ", "target: ???  # "),
    "evaluate": ("evaluate", "reference: ", "device: auto  # auto (a GPU"),
    "pretrain": ("pretrain_esm1nv", "  max_steps: 349500  # optimizer steps", "  # laptop: A small ESM-1nv"),
}


@pytest.mark.parametrize("name", HELP)
def test_every_key_in_help_has_a_comment(name: str) -> None:
    """A key's comment is on its line, or, for members of a section, on the section's."""
    command = getattr(import_module(COMMANDS[name].module), COMMANDS[name].function)
    keys = re.findall(r"^ *[\w.]+: .*$", help_text(command.config_name, command.part).split("must be given:")[1], re.M)
    assert len(keys) > 1
    assert [line for line in keys if " # " not in line] == []


@pytest.mark.parametrize("command", HELP)
@pytest.mark.parametrize("is_example", [True, False])
def test_help_lists_every_key_with_its_meaning(command: str, is_example: bool) -> None:
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
    assert done.stdout.count(called) >= 2  # in the example commands at the top


SPELLINGS = {  # of a command: an argument by another command's spelling, and what it sets
    "pretrain": ("devices=3", {"trainer.devices": 3}),
    "pretrain, archive": ("model=a b.nemo", {"restore_from_path": "a b.nemo", "model.of_archive": True}),
    "pretrain, group": ("model=esm1b", {"restore_from_path": None, "model.num_layers": 33}),
    "finetune": ("restore_from_path=a=b.nemo", {"model": "a=b.nemo"}),
    "finetune, device": ("accelerator=cpu", {"trainer.accelerator": "cpu"}),
    "embed": ("trainer.devices=3", {"devices": 3}),
    "evaluate": ("trainer.precision=bf16", {"precision": "bf16"}),
    "score": ("restore_from_path=x.nemo", {"model": "x.nemo"}),
    "contacts": ("restore_from_path=x.nemo", {"model": "x.nemo"}),
    "fit-contacts": ("restore_from_path=x.nemo", {"model": "x.nemo"}),
    "predict": ("restore_from_path=x.nemo", {"model": "x.nemo"}),
}


@pytest.mark.parametrize("name", SPELLINGS)
def test_spellings_of_other_commands_are_accepted_with_one_line_of_notice(
    name: str, capsys: pytest.CaptureFixture[str]
) -> None:
    row = COMMANDS[name.split(",")[0]]
    command = getattr(import_module(row.module), row.function)
    argument, expected = SPELLINGS[name]
    group = ["task=custom"] if name.startswith("finetune") else []
    check_command_line(command, [*group, argument])
    key = argument.partition("=")[0]
    notice = "" if key == "model" else f"note: {key} is called {next(iter(expected))} here\n"
    assert capsys.readouterr() == ("", notice)
    cfg = composed(*group, *command.overrides([argument]), config=command.config_name, part=command.part)
    assert {key: OmegaConf.select(cfg, key) for key in expected} == expected


def test_missing_required_setting_is_named() -> None:
    with pytest.raises(ConfigError, match=r"^target must be given: target=\.\.\.$"):
        plain_values(composed("source=here", config="convert_checkpoint"))


def test_missing_required_group_is_named_with_its_options(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stopped:
        check_command_line(finetune, ["model=x.nemo", "output=out"])
    assert stopped.value.code == 2
    assert capsys.readouterr().err.startswith(
        "error: task must be given: task=NAME; there are conservation, custom, gb1"
    )


def test_misspelt_key_is_named_when_a_group_is_chosen(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        check_command_line(finetune, ["task=gb1", "data.trian=x.csv"])
    assert capsys.readouterr().err == "error: data.trian is not a key; did you mean data.train?\n"


@pytest.mark.parametrize("example", sorted(path.name for path in (ROOT / "examples").glob("*.py")))
def test_every_example_checks_its_arguments_first(example: str) -> None:
    command = [sys.executable, str(ROOT / "examples" / example), "zebra=1"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert done.stderr == "error: zebra is not a key; --help lists every key\n"


@pytest.mark.parametrize(
    ("chosen", "expected"),
    [
        ({}, {"PYTORCH_ALLOC_CONF": "expandable_segments:True", "GOMP_SPINCOUNT": "10000"}),
        ({"PYTORCH_ALLOC_CONF": "mine"}, {"PYTORCH_ALLOC_CONF": "mine", "GOMP_SPINCOUNT": "10000"}),
        ({"PYTORCH_CUDA_ALLOC_CONF": "old"}, {"PYTORCH_ALLOC_CONF": None, "GOMP_SPINCOUNT": "10000"}),
        ({"OMP_WAIT_POLICY": "active"}, {"PYTORCH_ALLOC_CONF": "expandable_segments:True", "GOMP_SPINCOUNT": None}),
        ({"GOMP_SPINCOUNT": "5"}, {"PYTORCH_ALLOC_CONF": "expandable_segments:True", "GOMP_SPINCOUNT": "5"}),
    ],
)
def test_commands_set_allocator_and_waiting_threads_unless_the_user_has_chosen(
    monkeypatch: pytest.MonkeyPatch, chosen: dict[str, str], expected: dict[str, str | None]
) -> None:
    monkeypatch.setitem(program.COMMANDS, "toy", program.Command("toy", configured=False))
    monkeypatch.setattr(program, "import_module", lambda _: SimpleNamespace(main=lambda _: 0))
    for name in (*expected, "PYTORCH_CUDA_ALLOC_CONF", "OMP_WAIT_POLICY"):
        monkeypatch.setenv(name, "")
        monkeypatch.delenv(name)
    for name, value in chosen.items():
        monkeypatch.setenv(name, value)
    program._run("toy")
    assert {name: os.environ.get(name) for name in expected} == expected


def test_openmp_is_not_loaded_before_its_settings_are_made() -> None:
    """GNU's OpenMP reads its variables once, when it is loaded; PyTorch loads it."""
    code = "import bionemo_esm.__main__, sys; print(sorted({'torch', 'numpy', 'hydra'} & sys.modules.keys()))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "[]\n"
