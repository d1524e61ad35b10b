"""As much of Slurm as a test needs, on one machine: sbatch, srun, scontrol requeue, scancel --signal and sacct.

`install(folder)` puts the commands into a folder for the PATH. They are this file, which needs no package.
"""

import os
import signal
import stat
import subprocess
import sys
import time
from pathlib import Path

COMMANDS = ("sbatch", "srun", "scontrol", "scancel", "sacct")


def install(folder: Path) -> tuple[Path, int]:
    """Writes the commands.

    Returns:
        the folder with the files of each job, <id>.<what happened>, and the id of the first; with other ids the jobs of
        tests at the same time would meet at the same port.
    """
    folder.mkdir()
    (folder / "state").mkdir()
    first = 1000 + 10 * (os.getpid() % 1900)
    (folder / "state" / "first").write_text(str(first))
    for name in COMMANDS:
        path = folder / name
        path.write_text(f"#!{sys.executable}\n{Path(__file__).read_text()}")
        path.chmod(path.stat().st_mode | stat.S_IXUSR)
    return folder / "state", first


def options(arguments: list[str]) -> tuple[dict[str, str], list[str]]:
    """--name=value, --name value and -n value before a command; and the command."""
    short = {"n": "ntasks", "N": "nodes", "K": "kill-on-bad-exit"}
    flags = ("unbuffered", "kill-on-bad-exit", "requeue", "parsable2")
    found: dict[str, str] = {}
    while arguments and arguments[0].startswith("-"):
        name, _, value = arguments.pop(0).lstrip("-").partition("=")
        name = short.get(name, name)
        found[name] = value or ("" if name in flags else arguments.pop(0))
    return found, arguments


def sbatch(state: Path, arguments: list[str]) -> None:
    given, (script, *words) = options(arguments)
    asked = [line.split()[1:] for line in Path(script).read_text().splitlines() if line.startswith("#SBATCH")]
    asked_for: dict[str, str] = {}
    for words_of_line in asked:
        asked_for |= options([word.strip("'\"") for word in words_of_line if not word.startswith("#")])[0]
    asked_for |= given
    first = int((state / "first").read_text())
    assert not (state / f"{first}.script").exists(), "one sbatch a test"
    (state / f"{first}.script").write_text(Path(script).read_text())
    last = asked_for.get("array", "").partition("%")[0].rpartition("-")[2]
    for index in range(int(last) + 1) if last else [None]:
        nodes, per_node = int(asked_for.get("nodes", 1)), int(asked_for.get("ntasks-per-node", 1))
        job = first + (index or 0)
        variables = {
            **{"SLURM_JOB_ID": job, "SLURM_NTASKS": nodes * per_node, "SLURM_NTASKS_PER_NODE": per_node},
            **{"SLURM_NNODES": nodes, "SLURM_JOB_NUM_NODES": nodes, "SLURM_JOB_NAME": asked_for.get("job-name", "x")},
            **{"SLURM_PROCID": 0, "SLURM_LOCALID": 0, "SLURM_NODEID": 0, "ENVIRONMENT": "BATCH"},
            **({} if index is None else {"SLURM_ARRAY_JOB_ID": first, "SLURM_ARRAY_TASK_ID": index}),
        }
        output = asked_for.get("output", "slurm-%j.out").replace("%A", str(first)).replace("%a", str(index))
        runner = [sys.executable, __file__, "run", str(first), output.replace("%j", str(job)).replace("%t", "0")]
        env = {**os.environ, **{name: str(value) for name, value in variables.items()}}
        nothing = subprocess.DEVNULL
        subprocess.Popen([*runner, *words], env=env, stdin=nothing, stdout=nothing, stderr=nothing)
    print(f"Submitted batch job {first}")


def run(state: Path, arguments: list[str]) -> None:
    """The life of a job that sbatch has submitted, from its start to its last attempt's end."""
    first, output, *words = arguments
    job = state / os.environ["SLURM_JOB_ID"]
    # submitit makes the folder of a job's log after sbatch has come back, which the real Slurm is slow enough for.
    while not Path(output).parent.is_dir():
        time.sleep(0.05)
    for attempt in range(5):
        job.with_suffix(".attempts").write_text(str(attempt + 1))
        job.with_suffix(".steps").unlink(missing_ok=True)  # Slurm counts the steps of each attempt from 0
        with Path(output).open("ab") as file:
            env = {**os.environ, "SLURM_RESTART_COUNT": str(attempt)}
            command = ["bash", str(state / f"{first}.script"), *words]
            code = subprocess.run(command, env=env, stdout=file, stderr=subprocess.STDOUT).returncode
        if not job.with_suffix(".requeue").exists():
            break
        job.with_suffix(".requeue").unlink()
    job.with_suffix(".exit").write_text(str(code))


def srun(state: Path, arguments: list[str]) -> None:
    given, command = options(arguments)
    job = os.environ.get("SLURM_JOB_ID", (state / "first").read_text())
    tasks = int(given.get("ntasks") or given.get("ntasks-per-node") or os.environ.get("SLURM_NTASKS", 1))
    steps = state / f"{job}.steps"
    step = len(steps.read_text()) if steps.exists() and "SLURM_JOB_ID" in os.environ else 0
    steps.write_text("x" * (step + 1))
    processes = []
    for task in range(tasks):
        variables = {
            **{"SLURM_JOB_ID": job, "SLURM_STEP_ID": step, "SLURM_NTASKS": tasks, "SLURM_NNODES": 1},
            **{"SLURM_PROCID": task, "SLURM_LOCALID": task, "SLURM_NODEID": 0},
        }
        files = {}
        for name, stream in (("output", "stdout"), ("error", "stderr")):
            if name in given:
                path = given[name].replace("%A", os.environ.get("SLURM_ARRAY_JOB_ID", ""))
                path = path.replace("%a", os.environ.get("SLURM_ARRAY_TASK_ID", ""))
                files[stream] = Path(path.replace("%j", job).replace("%t", str(task))).open("ab")  # noqa: SIM115
        env = {**os.environ, **{name: str(value) for name, value in variables.items()}}
        processes.append(subprocess.Popen(command, env=env, stdin=subprocess.DEVNULL, **files))
    (state / f"{job}.tasks").write_text(" ".join(str(process.pid) for process in processes))
    while any(process.poll() is None for process in processes):
        if "kill-on-bad-exit" in given and any(process.poll() for process in processes):
            time.sleep(5)
            for process in processes:
                process.terminate()
        time.sleep(0.1)
    raise SystemExit(max(process.returncode % 256 for process in processes))


def scontrol(state: Path, arguments: list[str]) -> None:
    verb, job = arguments
    assert verb == "requeue"
    first, _, index = job.partition("_")
    (state / f"{int(first) + int(index or 0)}.requeue").touch()


def scancel(state: Path, arguments: list[str]) -> None:
    given, (job,) = options(arguments)
    for pid in (state / f"{job}.tasks").read_text().split():
        os.kill(int(pid), getattr(signal, f"SIG{given['signal'].removeprefix('SIG')}"))


def sacct(state: Path, arguments: list[str]) -> None:
    print("JobID|State|NodeList")


if __name__ == "__main__":
    name = Path(sys.argv[0]).name
    where, rest = Path(__file__).resolve().parent / "state", sys.argv[1:]
    if rest[:1] == ["run"]:
        run(where, rest[1:])
    else:
        {"sbatch": sbatch, "srun": srun, "scontrol": scontrol, "scancel": scancel, "sacct": sacct}[name](where, rest)
