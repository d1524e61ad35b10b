"""How this process was started: alone, or by torchrun, srun or another process of ours as one of several.

Each of several processes is a whole application of its own that reads the same command line. What they must agree on,
such as the run's folder, has to come from what they share: the launcher's name for the job.
"""

import os
import re
import subprocess
import sys
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any, Literal

from src.errors import UserError

INTERACTIVE_JOBS = ("bash", "sh", "zsh", "interactive")  # what Slurm calls the job of a shell


@dataclass(frozen=True)
class Launch:
    """One of the processes that a launcher started; all nodes have as many."""

    launcher: Literal["torchrun", "srun", "start"]  # see `src.start`
    rank: int
    world_size: int
    local_rank: int
    local_world_size: int  # processes of this node
    num_nodes: int

    @property
    def threads(self) -> int:
        """Cores that are this process's: more threads than cores are slower by far than fewer."""
        cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
        if self.launcher == "srun":
            return min(cores, int(os.environ.get("SLURM_CPUS_PER_TASK", 1)))
        return max(1, cores // self.local_world_size)


def launched() -> Launch | None:
    """Which of a launcher's processes this one is; None for a process of its own.

    A Slurm job of one task is a process of its own, and so is the script of a batch job that does not call srun.

    Raises:
        UserError: when nodes have different numbers of processes.
    """
    env = os.environ
    if env.keys() >= {"RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE"}:
        launcher: Any = "torchrun" if "TORCHELASTIC_RUN_ID" in env else "start"
        world, local = int(env["WORLD_SIZE"]), int(env["LOCAL_WORLD_SIZE"])
        launch = Launch(launcher, int(env["RANK"]), world, int(env["LOCAL_RANK"]), local, max(1, world // local))
    elif _in_slurm_step() and int(env.get("SLURM_NTASKS", 1)) > 1:
        tasks = int(env["SLURM_NTASKS"])
        nodes = int(env.get("SLURM_STEP_NUM_NODES") or env.get("SLURM_NNODES") or env.get("SLURM_JOB_NUM_NODES") or 1)
        process, local = int(env["SLURM_PROCID"]), max(1, tasks // nodes)
        launch = Launch("srun", process, tasks, int(env.get("SLURM_LOCALID", process % local)), local, nodes)
    else:
        return None
    if launch.num_nodes * launch.local_world_size != launch.world_size:
        raise UserError(
            f"{launch.launcher} started {launch.world_size} processes, not as many on each node; ask for the number a "
            "node (--ntasks-per-node, --nproc-per-node)"
        )
    return launch


def meeting_point() -> tuple[str, str]:
    """Address and port at which the processes of a launcher meet, which are put into the environment for torch.

    torchrun sets them. Of srun they are the first of its nodes, where process 0 is, and a port that belongs to the job
    and its step; MASTER_ADDR and MASTER_PORT, where they are set, come before both.
    """
    env = os.environ
    nodes = env.get("SLURM_STEP_NODELIST") or env.get("SLURM_NODELIST") or env.get("SLURM_JOB_NODELIST")
    address = env.setdefault("MASTER_ADDR", _first_host(nodes) if nodes else "127.0.0.1")
    number = int(env.get("SLURM_JOB_ID", 0)) + 997 * int(env.get("SLURM_STEP_ID", 0))
    return address, env.setdefault("MASTER_PORT", str(20000 + number % 20000))


def _first_host(nodes: str) -> str:
    """node07 of node[07-09,12],other3, which is how Slurm writes names."""
    match = re.match(r"([^,\[]*)(?:\[(\d+)[^\]]*\])?([^,\[]*)", nodes)
    assert match is not None  # it takes anything
    return "".join(part or "" for part in match.groups())


def rank() -> int:
    """0 for the process that speaks and writes."""
    launch = launched()
    return 0 if launch is None else launch.rank


def stamp(time_format: str, resumes: bool) -> str:
    """The name of a job's folder: the time, or what all processes of the job, and its next attempts, share.

    Args:
        time_format: of strftime.
        resumes: whether the job goes on in its folder when Slurm starts it again, so that one process that Slurm
            started is named by its job too. Without it, a script may call a command again and again in one job.

    Raises:
        UserError: when processes on several nodes have nothing in common.
    """
    launch = launched()
    if launch is None:
        name = _slurm_name() if resumes and _is_batch_job() else None
    elif launch.launcher == "torchrun":
        name = _torchrun_name(launch, time_format)
    else:
        name = _slurm_name()
    return name or datetime.now().strftime(time_format)


def is_named() -> bool:
    """Whether the folder of a job that resumes has a name that its next attempt has, too."""
    return launched() is not None or _is_batch_job()


def is_restart() -> bool:
    """Whether torchrun or Slurm started this job before, with the same command."""
    return any(int(os.environ.get(name, 0)) > 0 for name in ("TORCHELASTIC_RESTART_COUNT", "SLURM_RESTART_COUNT"))


def _is_batch_job() -> bool:
    return "SLURM_JOB_ID" in os.environ and not _is_interactive() and "SUBMITIT_EXECUTOR" not in os.environ


def _in_slurm_step() -> bool:
    """Whether srun started this process: not a batch script itself, nor a shell that a person types into."""
    env = os.environ
    is_script = env.get("ENVIRONMENT") == "BATCH" and "SLURM_STEP_ID" not in env
    return "SLURM_PROCID" in env and not is_script and not _is_interactive()


def _is_interactive() -> bool:
    return os.environ.get("SLURM_JOB_NAME") in INTERACTIVE_JOBS and sys.stdin is not None and sys.stdin.isatty()


def _slurm_name() -> str | None:
    """slurm-<job>, the same when the job is requeued, with what tells array tasks and later srun calls apart."""
    env = os.environ
    if "SLURM_JOB_ID" not in env:
        return None
    name = f"slurm-{env['SLURM_JOB_ID']}"
    if "SLURM_ARRAY_JOB_ID" in env:
        name = f"slurm-{env['SLURM_ARRAY_JOB_ID']}_{env['SLURM_ARRAY_TASK_ID']}"
    step = env.get("SLURM_STEP_ID", "0")
    return name if step == "0" or len(step) > 6 else f"{name}.{step}"  # the script's own step has a huge number


def _torchrun_name(launch: Launch, time_format: str) -> str:
    run_id = os.environ["TORCHELASTIC_RUN_ID"]
    random = re.fullmatch(r"[0-9a-f]{8}(-[0-9a-f]{4}){3}-[0-9a-f]{12}", run_id)  # of --standalone
    if run_id != "none" and not random:
        return re.sub(r"[^\w.-]", "_", run_id)
    slurm = _slurm_name()
    if slurm is not None:
        return slurm
    if launch.num_nodes > 1:
        raise UserError(
            "torchrun on several nodes needs a name for the run that all share: add --rdzv-id=<name> before -m, or "
            "hydra.run.dir=<folder>"
        )
    return _start_time(os.getppid()).strftime(time_format)  # torchrun's: it is the parent of all on its node


def _start_time(pid: int) -> datetime:
    """When a process started, to the same digit for whoever asks."""
    if Path("/proc/stat").exists():
        boot = re.search(r"^btime (\d+)$", Path("/proc/stat").read_text(), re.MULTILINE)
        ticks = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[19]  # field 22, starttime
        return datetime.fromtimestamp(int(boot[1]) + int(ticks) / os.sysconf("SC_CLK_TCK"))  # type: ignore[index]
    command = ["ps", "-o", "lstart=", "-p", str(pid)]
    text = subprocess.run(command, env={**os.environ, "LC_ALL": "C"}, check=True, capture_output=True, text=True).stdout
    return datetime.strptime(text.strip(), "%a %b %d %H:%M:%S %Y")
