"""The roll-call of a run's processes before its first step: what hinders one of them ends all, in one message.

torchrun and Slurm start every process at once, on every node. Each checks what it needs for itself (a store may be
missing on one node), and then they compare notes: which of them cannot go on, and whether all were told the same and
run the same versions. Without this, one rank that stops leaves the others waiting for it.

Large libraries imported in less time.
"""

from __future__ import annotations

import gc
import json
import os
import platform
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


@contextmanager
def large_imports() -> Iterator[None]:
    """Import within this without Python's search for garbage in cycles, which it is to go on with afterwards.

    Lightning, NeMo and Megatron make millions of objects that stay: to look through them again and again is a third of
    the time that their import takes.
    """
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_enabled:
            gc.enable()


if TYPE_CHECKING:
    from lightning.fabric.plugins.environments.slurm import SLURMEnvironment

T = TypeVar("T")
_PACKAGES = ("bionemo_esm", "torch", "megatron-core", "nemo_toolkit", "lightning", "numpy")
_TO_COME_TOGETHER = timedelta(minutes=10)
_TO_WAIT_FOR_RANK_0 = timedelta(days=1)  # that builds a store; in training `HangWatch` ends what stands still
_MOST_NAMED = 4  # ranks, or differences, in one message


class RankAgreementError(UserError):
    """Some process of the run cannot go on, or differs from the others; the same message on every rank."""


@dataclass(frozen=True)
class RankAgreement:
    """The processes that a launcher has started together; of one alone, where none did."""

    rank: int = 0
    size: int = 1
    group: Any = None  # of gloo, so that nothing has to lie on a GPU

    @property
    def launched(self) -> int | None:
        """How many processes torchrun or Slurm started together; None where neither did."""
        return self.size if self.group is not None else None

    def together(self, work: Callable[[], T], tell: Callable[[T], Mapping[str, Any]] = lambda _: {}) -> T:
        """Do something on every rank; its result, once all have done it and their accounts agree.

        `tell` gives what must be equal on all ranks: names and plain values. Raises the `UserError` that this rank met
        where it is alone or all met the same, else `RankAgreementError` on every rank, naming ranks. Collective.
        """
        result, error = None, None
        try:
            result = work()
            account = dict(tell(result))
        except UserError as met:
            error, account = met, {}
        if self.size > 1:
            notes = self._exchange({"host": socket.gethostname(), "error": error and str(error), "account": account})
            _compare(notes)
        if error is not None:
            raise error
        return result  # type: ignore[return-value]

    def first(self, work: Callable[[], T]) -> T:
        """Do something on rank 0 alone, and give every rank its result, which JSON must be able to hold.

        Raises on every rank what it raises there. Collective.
        """
        if self.size == 1:
            return work()
        result, error = None, None
        if self.rank == 0:
            try:
                result = work()
            except UserError as met:
                error = met
        told = self._exchange({"result": result, "error": error and str(error)})[0]
        if error is not None:
            raise error
        if told["error"] is not None:
            raise RankAgreementError(told["error"])
        return told["result"]  # type: ignore[no-any-return]

    def _exchange(self, note: dict[str, Any]) -> list[dict[str, Any]]:
        """Every rank's note, as JSON: nothing that is unpickled travels between them."""
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
def assembled() -> Iterator[RankAgreement]:
    """Bring up the process group of a launched run, for the whole of it; one process alone needs none.

    Raises `RankAgreementError` where the others do not come, and `ConfigError` in a Slurm job of several tasks whose
    processes were not started by srun.
    """
    place = _launched_place()
    if place is None:
        yield RankAgreement()
        return
    rank, size = place
    backend = "cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo"
    try:
        store, rank, size = next(rendezvous("env://", rank, size, timeout=_TO_COME_TOGETHER))
        distributed.init_process_group(backend, store=store, rank=rank, world_size=size, timeout=_TO_WAIT_FOR_RANK_0)
    except (distributed.DistError, RuntimeError, ValueError) as error:
        where = f"{os.environ.get('MASTER_ADDR')}:{os.environ.get('MASTER_PORT')}"
        message = (
            f"rank {rank} of {size} waited in vain for the others at {where} ({str(error).splitlines()[0]}); look for "
            "a process that ended early, and whether nodes reach each other there"
        )
        if rank:
            print(f"error: {message}", file=sys.stderr)  # noqa: T201 - rank 0, who speaks for all, may not be there
        raise RankAgreementError(message) from error
    try:
        yield RankAgreement(rank, size, distributed.new_group(backend="gloo", timeout=_TO_WAIT_FOR_RANK_0))
    finally:
        if distributed.is_initialized():
            distributed.destroy_process_group()


def versions() -> dict[str, str]:
    """What all ranks must run in the same version."""
    return {"python": platform.python_version(), **{package: version(package) for package in _PACKAGES}}


def _launched_place() -> tuple[int, int] | None:
    """Rank and number of processes, where torchrun or srun started them; sets the rendezvous that Slurm implies."""
    if "TORCHELASTIC_RUN_ID" in os.environ:
        return int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    if "LOCAL_RANK" in os.environ:  # Lightning has started this process; the one that told it to has done the checks
        return None
    environment = slurm_environment()
    if environment is None:
        return None
    _ = environment.main_address, environment.main_port  # left in MASTER_ADDR and MASTER_PORT
    return environment.global_rank(), environment.world_size()


def slurm_environment() -> SLURMEnvironment | None:
    """What Slurm's variables say of ranks and rendezvous, if the process runs under Slurm.

    Without Lightning's own handler that requeues a job: it would go on from a checkpoint of Lightning's. The batch
    script requeues (examples/slurm/pretrain.sbatch). Raises `ConfigError` for a job of several tasks that were not
    started by srun, or not by number a node.
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
    """Raises `RankAgreementError` for ranks that met an error others did not, or that gave another account."""
    unwell = [(rank, note) for rank, note in enumerate(notes) if note["error"] is not None]
    if unwell:
        if len({note["error"] for note in notes}) == 1:
            return  # the same on all: each raises its own
        lines = [f"rank {rank} ({note['host']}): {note['error']}" for rank, note in unwell]
        raise RankAgreementError(f"{len(unwell)} of {len(notes)} ranks cannot start:\n  - {_listed(lines)}")
    first, lines = notes[0]["account"], []
    for rank, note in enumerate(notes):
        for key in sorted(first.keys() | note["account"].keys()):
            theirs, ours = note["account"].get(key), first.get(key)
            if theirs != ours:
                lines.append(f"rank {rank} ({note['host']}) has {key} = {theirs}; rank 0 has {ours}")
    if lines:
        raise RankAgreementError(f"ranks differ, and must not:\n  - {_listed(lines)}\nStart all with the same command.")


def _listed(lines: list[str]) -> str:
    more = [f"and {len(lines) - _MOST_NAMED} more"] if len(lines) > _MOST_NAMED else []
    return "\n  - ".join([*lines[:_MOST_NAMED], *more])
