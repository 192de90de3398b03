"""Command lines of the jobs that Hydra configures.

Arguments are checked before Hydra reads them: Hydra answers a misspelt key with several lines and exit code 1, which a
batch script takes for a crash. Its help lists keys without their meaning, and its grammar reads file names such as
`a=b.fasta` or `[1].fasta` as something else.
"""

from __future__ import annotations

import difflib
import re
import shlex
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import wraps
from pathlib import Path
from typing import Any

import hydra
import yaml
from hydra import compose, initialize_config_dir
from hydra.core.global_hydra import GlobalHydra
from hydra.core.override_parser.types import Quote, QuotedString
from hydra.errors import HydraException
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from bionemo_esm import config_directory
from bionemo_esm.console import Console, is_rank_zero, run_to_exit_code
from bionemo_esm.errors import ConfigError
from bionemo_esm.settings import expand_home

_HYDRAS_FLAGS = (
    r"--(help|hydra-help|version|cfg|resolve|package|run|shell-completion|config-path|config-name|config-dir|"
    r"experimental-rerun|info)\b|-(h|c|p|r|sc|cp|cn|cd|i)$"
)
_SWEEPS = r"(-m|--multirun)$|\+{0,2}hydra\.mode=(?i:multirun)"
_HELP = ("--help", "-h")
_SYNTAX = "command-line.syntax"
_MUST_BE_CHOSEN = "???"
_ARCHIVES = (".nemo", ".ckpt")
TRAINER_SPELLINGS = {key: f"trainer.{key}" for key in ("accelerator", "devices", "num_nodes", "precision")}
"""For commands that train: keys that other commands have without a section."""
INFERENCE_SPELLINGS = {"restore_from_path": "model", "trainer.precision": "precision"}
"""For commands that use a model: keys of the commands that train."""
_PROGRAM = "bionemo-esm "
"""The prefix of the program's name if no file started it."""


@dataclass(frozen=True)
class ConfiguredCommand:
    """A command whose settings are a Hydra configuration, `conf/<part>/<config_name>.yaml`.

    The values of `text_keys` and `list_keys` (paths, ids, sequences, names of columns, patterns) are text: neither
    Hydra's grammar nor interpolation applies to them. `null` is none, quotes around the whole value are removed, and a
    leading `~/` is the home directory. For a key of `list_keys`, `[a,b]` is a list, read by Hydra's grammar.

    `other_spellings` maps keys that other commands use, or that this one used before, to its own: they are accepted,
    with one line of notice. `archive_keys`: the settings that `model=x.nemo` stands for, where `model` is a group.
    """

    job: Callable[[DictConfig], None]
    config_name: str
    part: str = ""
    text_keys: tuple[str, ...] = ()
    list_keys: tuple[str, ...] = ()
    other_spellings: Mapping[str, str] = field(default_factory=dict)
    archive_keys: tuple[str, ...] = ()  # {} is the archive's path
    open_sections: tuple[str, ...] = ()  # with a dot at the end: parts from other packages may have keys there
    rank_file: str = ""  # the file by which Lightning starts other ranks, of a command that may have any

    def __call__(self) -> None:
        """Compose the configuration from the command line, and run the job with it. Exits with 2 after one line."""
        arguments = sys.argv[1:]
        check_command_line(self, arguments)
        if self.rank_file and sys.argv[0].startswith(_PROGRAM):  # else Lightning repeats the command line, as it should
            sys.argv[0] = self.rank_file
            sys.modules["__main__"].__spec__ = None

        @wraps(self.job)
        def job(cfg: DictConfig) -> None:
            sys.argv[1:] = arguments  # as they were given: a run records them, and Lightning starts other ranks by them
            self.job(cfg)

        sys.argv[1:] = [f"hydra.job.name={self.config_name}", *self.overrides(arguments)]
        folder = str(config_directory(self.part))
        hydra.main(version_base="1.3", config_path=folder, config_name=self.config_name)(job)()

    def overrides(self, arguments: Sequence[str]) -> list[str]:
        """The arguments as Hydra reads them, each key by its own spelling, and values of text keys literally."""
        return [self.for_hydra(each) for argument in arguments for each in self._respelt(argument)]

    def notices(self, arguments: Sequence[str]) -> list[str]:
        """A line for each argument by another spelling."""
        keys = [argument.partition("=")[0] for argument in arguments]
        return [
            f"note: {key} is called {self.other_spellings[key]} here" for key in keys if key in self.other_spellings
        ]

    def _respelt(self, argument: str) -> list[str]:
        key, equals, value = argument.partition("=")
        if self.archive_keys and key == "model" and _without_quotes(value).endswith(_ARCHIVES):
            return [setting.replace("{}", value) for setting in self.archive_keys]
        return [f"{self.other_spellings.get(key, key)}{equals}{value}"]

    def for_hydra(self, argument: str) -> str:
        """The argument such that Hydra takes the value of a text key literally."""
        key, _, value = argument.partition("=")
        name = key.lstrip("+")
        if key.startswith(self.open_sections or ("=",)):
            return f"++{argument}"  # sets the key, or adds it
        is_list = name in self.list_keys and re.fullmatch(r"\[.*\]", value, re.DOTALL)
        if not (name in self.text_keys or name in self.list_keys) or is_list or value in ("", "null"):
            return argument
        text = _without_quotes(value)
        text = str(expand_home(text)) if text.startswith("~") else text
        text = re.sub(r"(\\*)\$\{", r"\1\1\\${", text)  # OmegaConf would interpolate
        return f"{key}={QuotedString(text, Quote.single).with_quotes()}"


def check_command_line(command: ConfiguredCommand, arguments: list[str]) -> None:
    """Exit with 2, after one message, for arguments that the configuration cannot be composed with, or a sweep.

    `--help` prints all keys with their comments, and exits with 0. Hydra's own flags (`--cfg`, ...) and what follows
    them are left to Hydra.
    """
    if any(argument in _HELP for argument in arguments):
        text = help_text(command.config_name, command.part)
        Console(sys.stdout, silent=not is_rank_zero()).print_line(_as_called(text).rstrip("\n"))
        raise SystemExit(0)
    run_to_exit_code(lambda: _check_no_sweep(arguments), "Interrupted.", silent=not is_rank_zero())
    if any(re.match(_HYDRAS_FLAGS, argument) for argument in arguments):
        return
    run_to_exit_code(lambda: _check(command, arguments), "Interrupted.", silent=not is_rank_zero())


def _without_quotes(value: str) -> str:
    """The text of a value that is quoted as a whole, by Hydra's rules for backslashes; any other value as it is."""
    quote = value[:1]
    if not quote or quote not in "'\"" or not re.fullmatch(rf"{quote}(?:[^{quote}\\]|\\.)*{quote}", value, re.DOTALL):
        return value
    return re.sub(rf"(\\+)({quote}|$)", lambda found: "\\" * (len(found[1]) // 2) + found[2], value[1:-1])


def help_text(config_name: str, part: str = "") -> str:
    """The header of a configuration, and all keys with their comments.

    A group is shown by its members and the keys of its default; one that must be chosen, by those of `custom`; one
    whose members set keys of other groups, as recipes do, by the first sentences of its members.
    """
    folder = config_directory(part)
    parts = [config_name]
    blocks: list[str] = []
    while parts:
        header, defaults, keys = _parsed(folder / f"{parts.pop(0)}.yaml")
        parts += [each for each in defaults if isinstance(each, str)]
        groups = [next(iter(each.items())) for each in defaults if not isinstance(each, str)]
        if not blocks:
            blocks.append(re.sub(r"^# ?", "", header, flags=re.MULTILINE))
            blocks.append("Keys and their defaults; ??? must be given:\n")
        blocks += [
            _group_help(folder / group, chosen) for group, chosen in groups if not group.startswith("override hydra/")
        ]
        blocks.append(keys)
    return re.sub(r"\n{3,}", "\n\n", "\n".join(block.strip("\n") + "\n" for block in blocks))


def _parsed(file: Path) -> tuple[str, list[Any], str]:
    """Return the comments at the head of a configuration, its defaults list, and its keys with their comments."""
    text = file.read_text(encoding="utf-8")
    defaults = (yaml.safe_load(text) or {}).get("defaults", [])
    text = re.sub(r"^(defaults|hydra):\n(?:[ -].*\n)+", "", text, flags=re.MULTILINE)  # settings of Hydra itself
    header = re.match(r"(?:#.*\n)*", text)
    assert header is not None
    return header[0], [each for each in defaults if each != "_self_"], text[header.end() :].lstrip("\n")


def _group_help(folder: Path, chosen: str) -> str:
    """The members of a group, and the keys of the chosen one; of `custom`, where one must be chosen."""
    names = ", ".join(_members(folder))
    header, _, keys = _parsed(folder / f"{'custom' if chosen == _MUST_BE_CHOSEN else chosen}.yaml")
    if header.startswith("# @package _global_"):
        lines = "".join(f"  # {_first_sentence(folder / f'{name}.yaml')}\n" for name in _members(folder))
        return f"{folder.name}: {chosen}  # sets keys of all sections; there are:\n{lines}"
    shown = "custom" if chosen == _MUST_BE_CHOSEN else chosen
    return f"{folder.name}: {chosen}  # {names}; of {shown}:\n" + re.sub(r"^(?=.)", "  ", keys, flags=re.MULTILINE)


def _first_sentence(file: Path) -> str:
    """The name of a recipe, and the first sentence of its header."""
    lines = [line.strip("# ") for line in _parsed(file)[0].splitlines()[1:]]
    paragraph = " ".join(lines[: lines.index("")] if "" in lines else lines)
    return f"{file.stem}: {paragraph.split('. ')[0].rstrip('.')}"


def _members(folder: Path) -> list[str]:
    return sorted(file.stem for file in folder.glob("*.yaml"))


def _as_called(text: str) -> str:
    """The help with the commands of its header as this program was called: by the example's file, or `bionemo-esm`."""
    program = sys.argv[0] if sys.argv[0].startswith(_PROGRAM) else f"python {sys.argv[0]}"
    return f"{program} key=value ...\n\n" + re.sub(r"\bpython examples/\w+\.py\b", program, text)


def _check_no_sweep(arguments: list[str]) -> int:
    for argument in arguments:
        if re.match(_SWEEPS, argument):
            raise ConfigError(
                f"{argument}: one job a command; for several, write a loop in the shell", code="command-line.sweep"
            )
    return 0


def _check(command: ConfiguredCommand, arguments: list[str]) -> int:
    for argument in arguments:
        if argument.startswith("-"):
            key = argument.lstrip("-").split("=")[0]
            raise ConfigError(f"there is no option {argument}; settings are key=value, as in {key}=...", code=_SYNTAX)
        if argument.startswith("~"):
            key = argument[1:].split("=")[0]
            raise ConfigError(f"{argument}: a key cannot be deleted; set it to another value: {key}=...", code=_SYNTAX)
        if "=" not in argument:
            raise ConfigError(f"{argument!r} is not key=value; --help lists every key", code=_SYNTAX)
    GlobalHydra.instance().clear()
    folder, overrides = config_directory(command.part), command.overrides(arguments)
    with initialize_config_dir(str(folder), version_base="1.3"):
        try:
            compose(command.config_name, overrides=overrides)
        except (HydraException, OmegaConfBaseException) as error:
            message = _explained(command.config_name, folder, overrides, error)
            raise ConfigError(message, code="command-line.override") from error
    for notice in command.notices(arguments):
        Console(sys.stderr, silent=not is_rank_zero()).print_line(notice)
    return 0


def _explained(config_name: str, folder: Path, arguments: list[str], error: Exception) -> str:
    """In one line: the argument at fault, and what may have been meant."""
    text, override = str(error), getattr(error, "override", None)
    first = next(line for line in text.splitlines() if line.strip()).rstrip(".:")
    if missing := re.match(r"You must specify '(\w+)'", first):
        return _without_group(config_name, folder, arguments, missing[1])
    if names := _choices(text):
        return first.removeprefix(f"In '{config_name}': ") + names
    if isinstance(override, str):
        key, _, value = override.partition("=")
        quoted = shlex.quote(f"{key}={QuotedString(value, Quote.double).with_quotes()}")
        return f"{override} cannot be read as key=value ({first}); give it with quotes within quotes: {quoted}"
    return _misspelt(config_name, folder, arguments, text) or first


def _without_group(config_name: str, folder: Path, arguments: list[str], group: str) -> str:
    """That a group must be chosen; or another fault, which every member of the group would meet."""
    chosen = [*arguments, f"{group}=custom"]
    try:
        compose(config_name, overrides=chosen)
    except (HydraException, OmegaConfBaseException) as error:
        return _explained(config_name, folder, chosen, error)
    return f"{group} must be given: {group}=NAME; there are {', '.join(_members(folder / group))}"


def _misspelt(config_name: str, folder: Path, arguments: list[str], text: str) -> str | None:
    choices = [argument for argument in arguments if (folder / argument.split("=")[0]).is_dir()]
    for argument in arguments:
        key = argument.lstrip("+").split("=")[0]
        if f"'{key}'" not in text:
            continue
        whole = list(_keys("", OmegaConf.to_container(compose(config_name, overrides=choices))))
        if key in whole:
            return f"{key} is a key already; set it without the sign before it: {argument.lstrip('+')}"
        in_a_section = [name for name in whole if name.endswith(f".{key}")]
        close = in_a_section[:1] or difflib.get_close_matches(key, whole, 1, 0.7)
        return f"{key} is not a key; " + (f"did you mean {close[0]}?" if close else "--help lists every key")
    return None


def _choices(text: str) -> str:
    """The members of a group, where Hydra's message lists them."""
    _, found, rest = text.partition("Available options in")
    names = [line.strip() for line in rest.partition("Config search path")[0].splitlines()[1:] if line.strip()]
    return f"; there are {', '.join(names)}" if found and names else ""


def _keys(prefix: str, values: Any) -> Iterator[str]:
    for key, value in values.items() if isinstance(values, dict) else ():
        name = f"{prefix}.{key}" if prefix else str(key)
        yield name
        yield from _keys(name, value)
