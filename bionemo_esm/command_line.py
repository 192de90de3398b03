"""The command line of a job that Hydra configures, looked at before Hydra does.

Hydra answers a misspelt key with lines of its own and exit code 1, which a batch script takes for a crash; and its help
has the keys of a configuration without their meaning.
"""

from __future__ import annotations

import difflib
import re
import shlex
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import yaml
from hydra import compose, initialize_config_dir
from hydra.core.global_hydra import GlobalHydra
from hydra.errors import HydraException
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from bionemo_esm import config_directory
from bionemo_esm.console import is_rank_zero, run_to_exit_code
from bionemo_esm.errors import ConfigError

_HYDRAS_FLAGS = (
    r"--(help|hydra-help|version|cfg|resolve|package|run|shell-completion|config-path|config-name|config-dir|"
    r"experimental-rerun|info)\b|-(h|c|p|r|sc|cp|cn|cd|i)$"
)
_SWEEPS = r"(-m|--multirun)$|\+{0,2}hydra\.mode=(?i:multirun)"
_HELP = ("--help", "-h")
_MUST_BE_CHOSEN = "???"


def check_command_line(config_name: str, part: str = "") -> None:
    """Exits with 2, after one message, for arguments that this configuration cannot be composed with, or a sweep.

    `--help` of a configuration without groups prints its keys with their comments, and exits with 0. Hydra's own flags
    (`--cfg`, `--help` of one with groups, ...) and what follows them are left to Hydra.
    """
    arguments = sys.argv[1:]
    if any(argument in _HELP for argument in arguments) and (text := help_text(config_name, part)):
        if is_rank_zero():
            print(_as_called(text), end="")  # noqa: T201
        raise SystemExit(0)
    run_to_exit_code(lambda: _check_no_sweep(arguments), "Interrupted.", silent=not is_rank_zero())
    if any(re.match(_HYDRAS_FLAGS, argument) for argument in arguments):
        return
    run_to_exit_code(lambda: _check(config_name, part, arguments), "Interrupted.", silent=not is_rank_zero())


def start_ranks_by(module_file: str) -> None:
    """Have Lightning start the other ranks of this node by this file, which runs the job that is called now.

    It would otherwise repeat what it takes for the command line: `-m` and a package, or a name with the job's in it.
    """
    sys.argv[0] = module_file
    sys.modules["__main__"].__spec__ = None


def help_text(config_name: str, part: str = "") -> str:
    """What the files of a configuration say: its header, and all keys with their comments.

    Of a group that must be chosen, its members and the keys of `custom`; "" where there are groups of another kind.
    """
    folder = config_directory(part)
    parts = [config_name]
    blocks: list[str] = []
    while parts:
        name = parts.pop(0)
        text = (folder / f"{name}.yaml").read_text(encoding="utf-8")
        defaults = [each for each in yaml.safe_load(text)["defaults"] if each != "_self_"]
        groups = [next(iter(each.items())) for each in defaults if not isinstance(each, str)]
        groups = [(group, chosen) for group, chosen in groups if not group.startswith("override hydra/")]
        if any(chosen != _MUST_BE_CHOSEN for _, chosen in groups):
            return ""
        parts += [each for each in defaults if isinstance(each, str)]
        chosen_ones = [_group_help(folder / group) for group, _ in groups]
        text = re.sub(r"^(defaults|hydra):\n(?:[ -].*\n)+", "", text, flags=re.MULTILINE)  # Hydra's business
        header = re.match(r"(?:#.*\n)*", text)
        assert header is not None
        if not blocks:
            blocks.append(re.sub(r"^# ?", "", header[0], flags=re.MULTILINE))
            blocks.append("Keys and what they are unless you say otherwise; ??? must be given:\n")
        blocks += [*chosen_ones, text[header.end() :]]
    return re.sub(r"\n{3,}", "\n\n", "\n".join(block.strip("\n") + "\n" for block in blocks))


def _group_help(folder: Path) -> str:
    """The members of a group, and the keys that `custom` leaves to whoever chooses it."""
    names = ", ".join(_members(folder))
    text = (folder / "custom.yaml").read_text(encoding="utf-8")
    keys = re.sub(r"^(?:#.*\n|\n)*", "", text)
    return f"{folder.name}: ???  # {names}; of custom:\n" + re.sub(r"^(?=.)", "  ", keys, flags=re.MULTILINE)


def _members(folder: Path) -> list[str]:
    return sorted(file.stem for file in folder.glob("*.yaml"))


def _as_called(text: str) -> str:
    """Help with the commands in its header as they are where there is no checkout, if that is how it was asked for."""
    program = sys.argv[0] if sys.argv[0].startswith("bionemo-esm ") else f"python {sys.argv[0]}"
    return f"{program} key=value ...\n\n" + re.sub(r"\bpython examples/\w+\.py\b", program, text)


def _check_no_sweep(arguments: list[str]) -> int:
    for argument in arguments:
        if re.match(_SWEEPS, argument):
            raise ConfigError(f"{argument}: one job a command; for several, write a loop in the shell")
    return 0


def _check(config_name: str, part: str, arguments: list[str]) -> int:
    for argument in arguments:
        if argument.startswith("-"):
            key = argument.lstrip("-").split("=")[0]
            raise ConfigError(f"there is no option {argument}; settings are key=value, as in {key}=...")
        if "=" not in argument and not argument.startswith("~"):
            raise ConfigError(f"{argument!r} is not key=value; --help lists every key")
    GlobalHydra.instance().clear()
    with initialize_config_dir(str(config_directory(part)), version_base="1.3"):
        try:
            compose(config_name, overrides=arguments)
        except (HydraException, OmegaConfBaseException) as error:
            raise ConfigError(_explained(config_name, config_directory(part), arguments, error)) from error
    return 0


def _explained(config_name: str, folder: Path, arguments: list[str], error: Exception) -> str:
    """In one line: which argument it is, and what may have been meant."""
    text, override = str(error), getattr(error, "override", None)
    first = next(line for line in text.splitlines() if line.strip()).rstrip(".:")
    if missing := re.match(r"You must specify '(\w+)'", first):
        return _without_group(config_name, folder, arguments, missing[1])
    if names := _choices(text):
        return first.removeprefix(f"In '{config_name}': ") + names
    if isinstance(override, str):
        key, _, value = override.partition("=")
        quoted = shlex.quote(f'{key}="{value}"')
        return f"{override} cannot be read as key=value ({first}); give it with quotes within quotes: {quoted}"
    return _misspelt(config_name, folder, arguments, text) or first


def _without_group(config_name: str, folder: Path, arguments: list[str], group: str) -> str:
    """That a group must be chosen; or what else is wrong, which would be so whatever is chosen."""
    chosen = [*arguments, f"{group}=custom"]
    try:
        compose(config_name, overrides=chosen)
    except (HydraException, OmegaConfBaseException) as error:
        return _explained(config_name, folder, chosen, error)
    return f"{group} must be given: {group}=NAME; there are {', '.join(_members(folder / group))}"


def _misspelt(config_name: str, folder: Path, arguments: list[str], text: str) -> str | None:
    choices = [argument for argument in arguments if (folder / argument.split("=")[0]).is_dir()]
    for argument in arguments:
        key = argument.lstrip("+~").split("=")[0]
        if f"'{key}'" not in text:
            continue
        whole = list(_keys("", OmegaConf.to_container(compose(config_name, overrides=choices))))
        close = difflib.get_close_matches(key, whole, 1, 0.7)
        return f"{key} is not a key; " + (f"did you mean {close[0]}?" if close else "--help lists every key")
    return None


def _choices(text: str) -> str:
    """Hydra's list of the members of a group, where it gave one."""
    _, found, rest = text.partition("Available options in")
    names = [line.strip() for line in rest.partition("Config search path")[0].splitlines()[1:] if line.strip()]
    return f"; there are {', '.join(names)}" if found and names else ""


def _keys(prefix: str, values: Any) -> Iterator[str]:
    for key, value in values.items() if isinstance(values, dict) else ():
        name = f"{prefix}.{key}" if prefix else str(key)
        yield name
        yield from _keys(name, value)
