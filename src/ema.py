"""Rebuilds an average of another length after training: python -m src.ema run=<run folder> length=<length> ..."""

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from src.cli import command
from src.overrides import as_override, plain_value
from src.runs import LAST

if TYPE_CHECKING:
    from torch import Tensor

    from src.runs import Run
    from src.training.averages import Power

FAR = 0.05  # residual from which a profile is not the one that was wanted


@dataclass
class EmaConfig:
    """The keys at the root of conf/ema.yaml."""

    run: str
    length: float | list[float]
    step: int | None
    out: str


def ema(config: dict[str, Any], out: Path) -> None:
    """Writes length=<length>.ckpt into `out` for each length: the run's checkpoint with another average under "ema".

    Raises:
        UserError: for whatever the user can mend, before anything is written.
    """
    from src.errors import UserError
    from src.files import save, shown
    from src.runs import Run
    from src.training.averages import Power
    from src.training.snapshots import POSTHOC, find_snapshots

    given = config["length"]
    lengths = list(dict.fromkeys(given if isinstance(given, list) else [given]))
    if not lengths:
        raise UserError("length=[] names nothing to rebuild; give a length such as length=0.075")
    try:
        wanted = [Power(length) for length in lengths]
    except ValueError as error:
        raise UserError(str(error)) from error
    run = Run(config["run"])
    snapshots = find_snapshots(run.folder)
    if not snapshots:
        raise UserError(f"{run.folder} has no snapshots to rebuild an average from; train with averages=edm2")
    step = max(snapshots) if config["step"] is None else config["step"]
    if step not in snapshots:
        near = sorted(sorted(snapshots, key=lambda n: abs(n - step))[:2])
        raise UserError(
            f"step={step} has no snapshot in {run.folder}; of the {len(snapshots)} from step {min(snapshots)} to "
            f"{max(snapshots)}, the nearest are at {' and '.join(map(str, near))}"
        )
    used = {n: path for n, path in snapshots.items() if n <= step}
    checkpoint = run.load_checkpoint()
    rebuilt = _rebuild(run, used, wanted, step)

    print(f"{len(used)} snapshots of {shown(run.folder)}, steps {min(used)} to {step}")
    suffix = "" if step == max(snapshots) else f"_step={step}"
    for length, (state, residual) in zip(lengths, rebuilt, strict=True):
        path = out / f"length={length}{suffix}.ckpt"
        how = {"length": length, "step": step, "residual": residual}
        save({**checkpoint, "ema": state, POSTHOC: how}, path)
        far = "; far from it: a length nearer to the stored ones, or more snapshots, come closer"
        print(f"length {length}: {residual:.2%} of the profile missed{far if residual > FAR else ''}\n  {shown(path)}")
    print(f"samples: python -m src.sample {as_override('run', shown(path))}")


def _rebuild(
    run: "Run", snapshots: dict[int, Path], wanted: "list[Power]", step: int
) -> "list[tuple[dict[str, Tensor], float]]":
    """For each wanted average of `step`, the network's state with it, and the residual of its profile.

    Snapshots are read one after another: first what they are of, then their weights.
    """
    import torch
    from tqdm import tqdm

    from src.runs import build_net, check_architecture
    from src.training.averages import Power
    from src.training.posthoc import coefficients
    from src.training.snapshots import read_snapshot

    headers = {n: read_snapshot(path, whole=False)["lengths"] for n, path in snapshots.items()}
    stored = [(n, name, Power(length).gamma) for n, lengths in headers.items() for name, length in lengths.items()]
    times, _, gammas = (list(column) for column in zip(*stored, strict=True))
    float64 = torch.float64
    x, residuals = coefficients(
        torch.tensor(gammas, dtype=float64),
        torch.tensor(times, dtype=float64),
        torch.tensor([average.gamma for average in wanted], dtype=float64),
        step,
    )
    shares = {(n, name): row for (n, name, _), row in zip(stored, x.tolist(), strict=True)}

    net = build_net(run.config).requires_grad_(False)
    sums = [{name: torch.zeros_like(p, dtype=float64) for name, p in net.named_parameters()} for _ in wanted]
    for n, path in tqdm(snapshots.items(), desc="rebuilding", unit="snapshot", dynamic_ncols=True):
        weights = read_snapshot(path)["weights"]
        for average in headers[n]:
            state = weights[average]
            check_architecture(net, state, path)
            for name in sums[0]:
                w = state[name].double()  # once: adding float32 to float64 converts an element at a time
                for total, share in zip(sums, shares[n, average], strict=True):
                    total[name].add_(w, alpha=share)
    states = [{**state, **{name: w.float() for name, w in total.items()}} for total in sums]  # buffers: of the last
    return list(zip(states, residuals.tolist(), strict=True))


def inherit(run: dict[str, Any], overrides: list[str]) -> list[str]:
    """Beside the run's own checkpoints, where nothing else is asked for."""
    return [f"out={plain_value(str(Path(run['run_dir']) / LAST.parent))}"]


main = command("ema", EmaConfig, ema, inherit)

if __name__ == "__main__":
    main()
