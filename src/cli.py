"""What all commands share: Hydra around a function, and a user's mistake as one sentence with exit code 2.

A command is a function of its resolved configuration (plain containers) and the folder it may write to:

    main = command("train", schema)(function)

`run=<folder>` makes the settings of that run the defaults of the command: see `inherit`.
"""

import contextlib
import functools
import os
import re
import sys
import tempfile
from collections.abc import Callable
from dataclasses import fields
from pathlib import Path
from typing import Any, ClassVar

import hydra
from hydra.core.hydra_config import HydraConfig
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.errors import HydraException, MissingConfigException, OverrideParseException
from hydra.experimental.callback import Callback
from hydra.types import RunMode
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import ConfigAttributeError, ConfigKeyError, OmegaConfBaseException

from src.build import check, check_arguments, check_seed, unknown_key
from src.data.packed import described
from src.devices import claim_gpu
from src.errors import UserError, printable
from src.failures import forget_failure, note_failure
from src.launch import launched, rank, stamp
from src.overrides import INHERITED, plain_value
from src.training.units import share

CONF = Path(__file__).resolve().parents[1] / "conf"


def _options(*groups: str) -> str:
    """The named groups with their options, a line each, for --help; of "-name", all groups but that."""
    hidden = ("hydra", *(group.removeprefix("-") for group in groups if group.startswith("-")))
    names = [path.name for path in sorted(CONF.iterdir()) if path.is_dir() and path.name not in hidden]
    chosen = [name for name in names if name in groups] or names
    return "\n".join(f"{name}: {', '.join(options(name))}" for name in chosen)


def options(group: str) -> list[str]:
    """The options of a group, those in folders of it by their path: lessons/schedule."""
    return sorted(p.relative_to(CONF / group).with_suffix("").as_posix() for p in (CONF / group).rglob("*.yaml"))


def _stamp(time_format: str, resume: str | None = None) -> str:
    """${stamp:<time format>,${resume}} in a configuration is Hydra's ${now:...}, but one for all processes of a job."""
    return stamp(time_format, resumes=resume == "auto")


OmegaConf.register_new_resolver("options", _options, replace=True)
OmegaConf.register_new_resolver("share", share, replace=True)
OmegaConf.register_new_resolver("packed", described, replace=True)
OmegaConf.register_new_resolver("basename", lambda path: Path(path).name, replace=True)
OmegaConf.register_new_resolver("stamp", _stamp, replace=True, use_cache=True)
Task = Callable[[dict[str, Any], Path], Any]
Inherit = Callable[[dict[str, Any], list[str]], list[str]]


def command(name: str, schema: type, task: Task, inherit: Inherit | None) -> Callable[[], None]:
    """The entry point of `python -m src.<name>`.

    Args:
        name: of the primary configuration, conf/<name>.yaml.
        schema: a class whose constructor names and types the keys at the configuration's root.
        task: is called once a job with the configuration and the job's folder, which exists.
        inherit: the overrides to put before the user's, given the configuration of the run that `run=` names and
            the user's overrides; None where `run=` names something to look at, which brings no settings along.
    """
    job = functools.partial(_job, task, schema)
    functools.update_wrapper(job, task)

    def main() -> None:
        os.environ["HYDRA_FULL_ERROR"] = "1"  # Hydra then raises what it would print and exit 1 for
        _job.started = False  # type: ignore[attr-defined]
        try:
            flags = [argument for argument in sys.argv[1:] if argument in ("-m", "--multirun")]
            others = [argument for argument in sys.argv[1:] if argument not in flags]
            if flags or _says_sweep(others):
                _refuse_a_sweep_of_each_process()
                _register_plugins()
                others += _one_sweep_folder(others)
            elif "hydra/sweeper=optuna" in others:
                raise UserError("hydra/sweeper=optuna runs many jobs: say so with -m")
            sys.argv[1:] = flags + _with_inherited(others, inherit)  # argparse takes -m only before the overrides
            hydra.main(version_base="1.3", config_path=str(CONF), config_name=name)(job)()
        except UserError as error:
            _fail(str(error))
        except KeyboardInterrupt:
            print("\nstopped", file=sys.stderr)
            raise SystemExit(130) from None
        except OverrideParseException as error:
            _fail(_unreadable(error.override))
        except (HydraException, OmegaConfBaseException) as error:
            _fail(_explain(error))
        except OSError as error:
            if _job.started:  # type: ignore[attr-defined]
                raise
            _fail(f"the output folder cannot be made: {error}; choose another with {_key(schema)}=<folder>")
        except ValueError as error:  # of Hydra, for a group that was set to null
            if _job.started:  # type: ignore[attr-defined]
                raise
            _fail(f"{' '.join(str(error).split())}; choose an option of its group, --help names them")

    return main


def _job(task: Task, schema: type, cfg: DictConfig) -> Any:
    _job.started = True  # type: ignore[attr-defined]
    run_dir = Path(HydraConfig.get().runtime.output_dir)
    sweep = HydraConfig.get().mode == RunMode.MULTIRUN
    if sweep and HydraConfig.get().runtime.choices["hydra/launcher"] == "joblib":
        claim_gpu()
    try:
        try:
            plain: Any = OmegaConf.to_container(cfg, resolve=True)
        except OmegaConfBaseException as error:
            raise UserError(_explain(error)) from error
        for key in ("run", "out"):  # a folder may be called 2026
            if type(plain.get(key)) in (int, float):
                plain[key] = str(plain[key])
        check_arguments(schema, plain, "")
        check(plain, "")
        if "seed" in plain:
            check_seed("seed", plain["seed"])
        _check_writable(run_dir, _key(schema))
        result = task(plain, run_dir)
    except Exception as error:
        if sweep:
            note_failure(run_dir, error)
            raise  # the sweep goes on, and ends with this error
        if not isinstance(error, UserError):
            raise
        _fail(str(error))
    else:
        if sweep:
            forget_failure()
        return result
    finally:
        RememberFolders.remove()


def _says_sweep(arguments: list[str]) -> bool:
    """Whether a sweep is asked for without -m: by hydra.mode on the command line, or in the file of the experiment."""
    settings = dict(argument.split("=", 1) for argument in arguments if "=" in argument)
    if "hydra.mode" in settings:
        return settings["hydra.mode"] == RunMode.MULTIRUN.name
    for folder in (settings.get("--config-dir"), CONF):
        path = Path(folder or CONF, "experiment", f"{settings.get('experiment')}.yaml")
        if path.is_file():
            return OmegaConf.select(OmegaConf.load(path), "hydra.mode") == RunMode.MULTIRUN.name
    return False


def _register_plugins() -> None:
    """Makes the project's sweeper and launchers known to Hydra, which takes plugins from one package alone."""
    from src import launchers, search

    sys.modules["hydra_plugins.src"] = sys.modules["src"]
    launchers.register()
    search.register()


def _refuse_a_sweep_of_each_process() -> None:
    launch = launched()
    if launch is not None and launch.world_size > 1:
        raise UserError(
            f"{launch.launcher} started {launch.world_size} processes and each would start the whole sweep: start it "
            f"once, without {launch.launcher}; jobs of several processes come with hydra/launcher=submitit_slurm "
            f"hydra.launcher.tasks_per_node={launch.local_world_size}"
        )


def _key(schema: type) -> str:
    """The setting that names the output folder."""
    return "out" if "out" in {f.name for f in fields(schema)} else "hydra.run.dir"


def _check_writable(folder: Path, key: str) -> None:
    if folder == Path.cwd():
        raise UserError(f"the output folder is the working directory; choose another with {key}=<folder>")
    try:
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise UserError(f"{folder} cannot be written to ({error}); choose another with {key}=<folder>") from error


def _one_sweep_folder(overrides: list[str]) -> list[str]:
    """A sweep over experiments would put each job into another experiment's folder: it gets one of its own."""
    several = any(o.startswith("experiment=") and "," in o for o in overrides)
    if not several or any(o.startswith("hydra.sweep.dir=") for o in overrides):
        return []
    return ["hydra.sweep.dir=outputs/multirun/experiments/${now:%Y-%m-%d_%H-%M-%S-%f}"]


def _with_inherited(argv: list[str], inherit: Inherit | None) -> list[str]:
    """argv with the overrides that `run=` brings put in front.

    Raises:
        UserError: when `run=` names nothing that holds a run.
    """
    INHERITED.clear()
    overrides = [argument for argument in argv if not argument.startswith("-")]
    texts = [override for override in overrides if override.lstrip("+").startswith("run=")]
    if not texts or inherit is None:
        return argv
    try:
        override = OverridesParser.create().parse_override(texts[-1].lstrip("+"))
    except HydraException as error:
        raise UserError(_unreadable(texts[-1])) from error
    if override.is_sweep_override():
        if not any(o.startswith("sampler=") for o in overrides):
            raise UserError(
                "several runs at once may differ in their sampler: to sample, choose one; to train, continue one run"
            )
        return argv
    value = override.value()
    if value is None or str(value) == "":
        return argv
    from src.runs import CONFIG, Run

    resumes = any(override.lstrip("+") == "resume=auto" for override in overrides)
    if resumes and not Path(str(value), CONFIG).is_file():  # nothing there yet: begin it there
        return [*(a for a in argv if a not in texts), f"hydra.run.dir={plain_value(str(value))}"]
    run = Run(str(value))
    inherited = inherit({"run_dir": str(run.folder), "in_folder": run.in_folder, **run.config}, overrides)
    INHERITED.extend(override for override in inherited if not override.lstrip("+~").startswith("hydra"))
    return inherited + argv


def _unreadable(override: str) -> str:
    return (
        f"{override!r} is not a setting that Hydra can read; key=value, and a value with special characters in two "
        "pairs of quotes: \"key='value'\""
    )


def _explain(error: BaseException) -> str:
    """One sentence for what Hydra or OmegaConf refused."""
    if isinstance(error, MissingConfigException) and error.options is not None:
        folder, _, option = str(error.missing_cfg_file).rpartition("/")
        group, _, below = folder.partition("/") if not folder.startswith("hydra") else (folder, "", "")
        option = f"{below}/{option}" if below else option
        names = sorted({*(str(name).removesuffix(".yaml") for name in error.options if not below), *options(group)})
        return unknown_key(f"{group}={option}", option, names).replace("there is no setting", "there is no option")
    refused: BaseException | None = error
    while refused is not None and not isinstance(refused, UserError):
        refused = refused.__context__
    if refused is not None:  # by a resolver
        return str(refused)
    cause = error
    while cause is not None and not isinstance(cause, ConfigAttributeError | ConfigKeyError):
        cause = cause.__cause__  # type: ignore[assignment]
    if cause is not None and cause.parent_node is not None and OmegaConf.is_dict(cause.parent_node):
        names = [str(name) for name in cause.parent_node if name != "hydra"]
        return unknown_key(str(cause.full_key), str(cause.key), names)
    sentence = " ".join(str(error).split())
    foreign = re.match(r"Could not override '([^']+)'", sentence)
    if foreign:
        return f"this command has no group or setting {foreign[1]}; --help names those that there are"
    return sentence


class RememberFolders(Callback):
    """Notes which folders Hydra is about to make for a job, so that a refused job can take them away again."""

    made: ClassVar[list[Path]] = []  # innermost first

    def on_run_start(self, config: DictConfig, **_: Any) -> None:
        RememberFolders.made = []
        if rank() != 0:
            return
        try:
            folder = Path(config.hydra.run.dir).absolute()
        except OmegaConfBaseException:  # which Hydra meets again, and reports
            return
        shared = launched() is not None  # with processes that may have been quicker to make the folder
        ours = Path("outputs").absolute()
        RememberFolders.made = [
            path
            for path in (folder, *folder.parents)
            if not path.exists() or (shared and (path == folder or path.is_relative_to(ours)))
        ]

    def on_job_start(self, config: DictConfig, **_: Any) -> None:
        if HydraConfig.get().mode == RunMode.MULTIRUN:  # jobs of a sweep have new folders of their own
            RememberFolders.made = [Path(HydraConfig.get().runtime.output_dir)] if rank() == 0 else []

    @staticmethod
    def remove() -> None:
        """Removes those that hold nothing."""
        for folder in RememberFolders.made:
            with contextlib.suppress(OSError):  # it holds something, or is gone
                folder.rmdir()


def _fail(sentence: str) -> None:
    if rank() == 0:  # the others fail as it does
        print(f"error: {printable(sentence)}", file=sys.stderr)
    raise SystemExit(2)
