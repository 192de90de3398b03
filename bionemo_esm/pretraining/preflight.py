"""Preflight checks: what a run needs of machine and files, and whether all of its ranks agree.

torchrun and Slurm start every process at once, on every node. Each rank checks its own requirements (a store may be
missing on one node). Then the ranks exchange their results, settings and versions: a problem of one rank ends all of
them with one message. Without this, one rank that stops leaves the others waiting for it.
"""

from __future__ import annotations

import gc
import json
import os
import platform
import shlex
import socket
import sys
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from importlib.metadata import version
from typing import TYPE_CHECKING, Any, TypeVar

import torch
from torch import distributed
from torch.distributed.rendezvous import rendezvous

from bionemo_esm.errors import ConfigError, UserError
from bionemo_esm.model.backends import parameter_dtype
from bionemo_esm.pretraining.plan import Storage, free_space
from bionemo_esm.pretraining.probe_config import read_probe
from bionemo_esm.pretraining.recipe import Recipe, TrainerConfig
from bionemo_esm.pretraining.resolve_model import check_encoder_of_archive, import_advice
from bionemo_esm.pretraining.resume import find_parent_run

if TYPE_CHECKING:
    from lightning.fabric.plugins.environments.slurm import SLURMEnvironment

T = TypeVar("T")
_PACKAGES = ("bionemo_esm", "torch", "megatron-core", "nemo_toolkit", "lightning", "numpy")
_RENDEZVOUS_TIMEOUT = timedelta(minutes=10)
_RANK_0_TIMEOUT = timedelta(days=1)  # rank 0 may build a store; in training `HangWatch` ends a hang
_MOST_NAMED = 4  # ranks, or differences, in one message
_LAPTOP = "\nTo see the whole path at work on this machine: bionemo-esm pretrain recipe=laptop"


def check_requirements(recipe: Recipe, launched: int | None = None) -> None:
    """Raise `ConfigError` with all missing requirements in one message, or for a parent run that does not fit.

    launched: world size that torchrun or Slurm started; None: neither did. Raises `ArchiveError` for a damaged archive
    to start from, and another `UserError` for wrong labels of a probe.
    """
    parameter_dtype(recipe.trainer.precision, "cpu")
    missing = [
        *_missing_processes(recipe.trainer, launched),
        *_missing_gpus(recipe),
        *_missing_files(recipe),
        *_missing_parent_run(recipe),
        *_missing_space(recipe),
    ]
    if missing:
        raise ConfigError(
            f"recipe {recipe.name} cannot run here:\n  - "
            + "\n  - ".join(missing)
            + (_LAPTOP if recipe.name != "laptop" else "")
        )
    if recipe.restore_from_path is not None:
        check_encoder_of_archive(recipe.model, recipe.restore_from_path)
    if not _has_checkpoints(recipe):
        find_parent_run(recipe)
    if recipe.probe is not None:
        read_probe(recipe.probe, recipe.model)  # report wrong labels before a store is built


def _missing_processes(trainer: TrainerConfig, launched: int | None) -> list[str]:
    product = f"trainer.num_nodes x trainer.devices are {trainer.num_nodes} x {trainer.devices}"
    if launched is None and trainer.num_nodes > 1:
        return [
            f"{product}: srun or torchrun must start a process for every device, on every node (docs/slurm.md); on one "
            "machine alone: trainer.num_nodes=1, and trainer.devices as it has"
        ]
    if launched is not None and launched != trainer.world_size:
        return [f"{product}, but {launched} processes were launched: set both to the numbers of the launcher"]
    return []


def _missing_gpus(recipe: Recipe) -> list[str]:
    wanted, found = recipe.trainer.devices, torch.cuda.device_count()
    if recipe.trainer.accelerator != "gpu" or found >= wanted:
        return []
    return [f"trainer.devices asks for {wanted} GPUs a node; this machine has {found}"]


def _missing_files(recipe: Recipe) -> list[str]:
    missing = []
    if recipe.data.store is not None and not (recipe.data.store / "manifest.json").is_file():
        missing.append(
            f"data.store: {recipe.data.store} is not a store (no manifest.json); build it with "
            f"`bionemo-esm preprocess output={shlex.quote(str(recipe.data.store))}`, or name the folder of one"
        )
    if (fasta := recipe.data.fasta) is not None and not fasta.is_file():
        missing.append(f"data.fasta: {fasta} is not a file")
    if (archive := recipe.restore_from_path) is not None and not archive.is_file():
        missing.append(f"restore_from_path: {import_advice(archive) or f'{archive} is not a file'}")
    return missing


def _missing_parent_run(recipe: Recipe) -> list[str]:
    """Check the parent run, which only the first start needs."""
    origin, before = recipe.continue_from_path, recipe.published and recipe.published.continues
    if _has_checkpoints(recipe):
        return []
    if origin is None and before is not None:
        return [f"continue_from_path: {recipe.name} continues a run of {before}; name its folder, or a .ckpt of it"]
    if origin is not None and not origin.exists():
        return [f"continue_from_path: there is no {origin}; name a run's folder, or a .ckpt"]
    return []


def _has_checkpoints(recipe: Recipe) -> bool:
    return any((recipe.run_folder / "checkpoints").glob("step-*.ckpt"))


def _missing_space(recipe: Recipe) -> list[str]:
    """Check the disk space of a new run: checkpoints, snapshots for the average, and archives."""
    if recipe.run_folder.exists():
        return []
    needed = Storage.of(recipe).peak_bytes
    existing, free = free_space(recipe.run_folder)
    if free >= needed:
        return []
    return [
        f"exp_manager.exp_dir: the run's checkpoints will take {needed / 1e9:,.1f} GB, {free / 1e9:,.1f} GB are free "
        f"in {existing}; choose another place, or lower exp_manager.checkpoints.keep_last or average_last"
    ]


@contextmanager
def large_imports() -> Iterator[None]:
    """Disable garbage collection while large libraries are imported, which saves a third of the time.

    Lightning, NeMo and Megatron create millions of objects that stay alive; each collection would visit all of them.
    """
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_enabled:
            gc.enable()


# --- agreement of all ranks -------------------------------------------------------------------------------------------


class RankAgreementError(UserError):
    """A rank that cannot start or differs from the others. Every rank raises the same message."""


@dataclass(frozen=True)
class RankAgreement:
    """The ranks that a launcher started together, or a single process."""

    rank: int = 0
    size: int = 1
    group: Any = None  # gloo, so that no tensor has to be on a GPU

    @property
    def launched(self) -> int | None:
        """The world size that torchrun or Slurm started; None if neither did."""
        return self.size if self.group is not None else None

    def on_every_rank(self, work: Callable[[], T], must_agree: Callable[[T], Mapping[str, Any]] = lambda _: {}) -> T:
        """Call `work` on every rank and return its result once every rank has succeeded. Collective.

        must_agree: maps the result to named plain values that must be equal on all ranks. Raises the `UserError` of
        `work` if this is the only rank or all ranks raised the same; else `RankAgreementError`, naming the ranks.
        """
        result, error = None, None
        try:
            result = work()
            values = dict(must_agree(result))
        except UserError as met:
            error, values = met, {}
        if self.size > 1:
            notes = self._exchange({"host": socket.gethostname(), "error": error and str(error), "values": values})
            _compare(notes)
        if error is not None:
            raise error
        return result  # type: ignore[return-value]

    def on_rank_zero(self, work: Callable[[], T]) -> T:
        """Call `work` on rank 0 and return its result, which must be plain JSON, on every rank. Collective.

        If `work` raises a `UserError`, every rank raises.
        """
        if self.size == 1:
            return work()
        result, error = None, None
        if self.rank == 0:
            try:
                result = work()
            except UserError as met:
                error = met
        sent = self._exchange({"result": result, "error": error and str(error)})[0]
        if error is not None:
            raise error
        if sent["error"] is not None:
            raise RankAgreementError(sent["error"])
        return sent["result"]  # type: ignore[no-any-return]

    def _exchange(self, note: dict[str, Any]) -> list[dict[str, Any]]:
        """Return the notes of all ranks. They are sent as JSON, so that no rank unpickles data of another."""
        try:
            return self._gather(json.dumps(note, default=str).encode())
        except RuntimeError as error:  # of gloo: a connection is gone
            raise RankAgreementError("a rank ended before the first step; its own messages say why") from error

    def _gather(self, text: bytes) -> list[dict[str, Any]]:
        mine = torch.frombuffer(bytearray(text), dtype=torch.uint8)
        lengths = [torch.zeros(1, dtype=torch.int64) for _ in range(self.size)]
        distributed.all_gather(lengths, torch.tensor([len(mine)]), group=self.group)
        longest = max(int(length) for length in lengths)
        pages = [torch.zeros(longest, dtype=torch.uint8) for _ in range(self.size)]
        page = torch.zeros(longest, dtype=torch.uint8)
        page[: len(mine)] = mine
        distributed.all_gather(pages, page, group=self.group)
        texts = [bytes(page[: int(length)].tolist()) for page, length in zip(pages, lengths, strict=True)]
        return [json.loads(text) for text in texts]


@contextmanager
def launched_ranks() -> Iterator[RankAgreement]:
    """Initialise the process group of a launched run for the duration of the block. One process needs none.

    Raises `RankAgreementError` if other ranks do not arrive in time, and `ConfigError` in a Slurm job of several tasks
    whose processes were not started by srun.
    """
    place = _rank_and_size()
    if place is None:
        yield RankAgreement()
        return
    rank, size = place
    backend = "cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo"
    try:
        store, rank, size = next(rendezvous("env://", rank, size, timeout=_RENDEZVOUS_TIMEOUT))
        distributed.init_process_group(backend, store=store, rank=rank, world_size=size, timeout=_RANK_0_TIMEOUT)
    except (distributed.DistError, RuntimeError, ValueError) as error:
        where = f"{os.environ.get('MASTER_ADDR')}:{os.environ.get('MASTER_PORT')}"
        message = (
            f"rank {rank} of {size} timed out waiting for the other ranks at {where} ({str(error).splitlines()[0]}); "
            "look for a process that ended early, and whether nodes reach each other there"
        )
        if rank:
            print(f"error: {message}", file=sys.stderr)  # noqa: T201 - rank 0, which prints errors, may be missing
        raise RankAgreementError(message) from error
    try:
        yield RankAgreement(rank, size, distributed.new_group(backend="gloo", timeout=_RANK_0_TIMEOUT))
    finally:
        if distributed.is_initialized():
            distributed.destroy_process_group()


def versions() -> dict[str, str]:
    """Return the versions that must be equal on all ranks."""
    return {"python": platform.python_version(), **{package: version(package) for package in _PACKAGES}}


def _rank_and_size() -> tuple[int, int] | None:
    """Return rank and world size if torchrun or srun started this process. Under Slurm, set MASTER_ADDR and _PORT."""
    if "TORCHELASTIC_RUN_ID" in os.environ:
        return int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    if "LOCAL_RANK" in os.environ:  # started by Lightning; the parent process has done the checks
        return None
    environment = slurm_environment()
    if environment is None:
        return None
    _ = environment.main_address, environment.main_port  # reading them sets MASTER_ADDR and MASTER_PORT
    return environment.global_rank(), environment.world_size()


def slurm_environment() -> SLURMEnvironment | None:
    """Return the ranks and the rendezvous of a Slurm job; None outside Slurm.

    Lightning's requeue handler is off: it would resume from a checkpoint of Lightning's own. The batch script requeues
    (examples/slurm/pretrain.sbatch). Raises `ConfigError` for several tasks that srun did not start, or that Slurm did
    not count per node.
    """
    with large_imports():
        from lightning.fabric.plugins.environments.slurm import SLURMEnvironment  # seconds

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that srun is installed and was not used
        if not SLURMEnvironment.detect():
            return None
    tasks = os.environ["SLURM_NTASKS"]
    if tasks != "1" and "SLURM_STEP_ID" not in os.environ:
        raise ConfigError(
            f"this Slurm job has {tasks} tasks, but the process was not started by srun: put srun before the command "
            "(examples/slurm/pretrain.sbatch does)"
        )
    try:
        return SLURMEnvironment(auto_requeue=False)
    except RuntimeError as error:
        raise ConfigError(f"Slurm: {error}") from error


def _compare(notes: list[dict[str, Any]]) -> None:
    """Raise `RankAgreementError` if some ranks failed, or if their values differ."""
    failed = [(rank, note) for rank, note in enumerate(notes) if note["error"] is not None]
    if failed:
        if len({note["error"] for note in notes}) == 1:
            return  # equal on all ranks: each raises its own error
        lines = [f"rank {rank} ({note['host']}): {note['error']}" for rank, note in failed]
        raise RankAgreementError(f"{len(failed)} of {len(notes)} ranks cannot start:\n  - {_listed(lines)}")
    first, lines = notes[0]["values"], []
    for rank, note in enumerate(notes):
        for key in sorted(first.keys() | note["values"].keys()):
            theirs, ours = note["values"].get(key), first.get(key)
            if theirs != ours:
                lines.append(f"rank {rank} ({note['host']}) has {key} = {theirs}; rank 0 has {ours}")
    if lines:
        raise RankAgreementError(f"ranks differ, and must not:\n  - {_listed(lines)}\nStart all with the same command.")


def _listed(lines: list[str]) -> str:
    more = [f"and {len(lines) - _MOST_NAMED} more"] if len(lines) > _MOST_NAMED else []
    return "\n  - ".join([*lines[:_MOST_NAMED], *more])
