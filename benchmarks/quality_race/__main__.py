"""Quality at equal time: this project, diffusers' recipe and lucidrains' recipe with the same minutes of training.

Each entry (see entries.py) trains on MNIST for `--minutes` in its best precision, draws `--samples` samples in 50
evaluations of its network, and is scored by Fréchet distances over two classifiers (see judges.py). The clock counts
training alone (see clock.py). Entries run one at a time, each in a process of its own. A record that is there is not
made again: the race may be stopped, and goes on with the same command. After each record the JSON file, the section of
benchmarks.md beside it, and images/quality_race.png are written.

  python -m benchmarks.quality_race --data /data
  python -m benchmarks.quality_race --data /data --only ours diffusers --seeds 0
  python -m benchmarks.quality_race --data /data --try diffusers lr=5e-4 batch=32 --minutes 3
  python -m benchmarks.quality_race --data /data --try ours samplers=[ddim,unipc,dpmpp_2m,heun]
"""

import argparse
import shutil
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks.quality_race.child import Failed
from benchmarks.quality_race.entries import (
    EVALUATIONS,
    LUCIDRAINS,
    OURS,
    TUNED,
    folder_name,
    our_configuration,
    settings_of,
    with_options,
)
from src.errors import UserError

PACKAGES = ("python", "torch", "lightning", "diffusers", "accelerate", "denoising-diffusion-pytorch")
MINUTES, TRIAL_MINUTES = 10.0, 3.0


def main() -> None:
    try:
        run(parse(sys.argv[1:]))
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        raise SystemExit(2) from None
    except Failed as failed:
        sys.exit(f"error: {failed}")


def parse(arguments: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.quality_race",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    names = ", ".join(repr(name) for name in TUNED)
    parser.add_argument("--data", type=Path, required=True, metavar="DIR", help="folder that holds MNIST/raw")
    parser.add_argument("--minutes", type=float, help=f"of training; default: {MINUTES:g}, {TRIAL_MINUTES:g} of --try")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2], metavar="N", help="--try takes the first")
    parser.add_argument("--only", nargs="+", choices=list(TUNED), default=list(TUNED), metavar="ENTRY", help=names)
    parser.add_argument("--samples", type=int, default=1000, metavar="N", help="scored of each")
    parser.add_argument("--ours", nargs="+", default=[], metavar="key=value", help="of ours, for src.train")
    parser.add_argument("--try", nargs="+", dest="trial", metavar="WHAT", help="an entry and options of it: one trial")
    parser.add_argument("--redo", action="store_true", help="throw away records of other settings")
    parser.add_argument("--work", type=Path, default=Path("outputs/quality_race"), metavar="DIR")
    parser.add_argument("--json", type=Path, default=Path("docs/quality_race.json"), metavar="FILE")
    args = parser.parse_args(arguments)
    if args.minutes is None:
        args.minutes = TRIAL_MINUTES if args.trial else MINUTES
    if args.minutes <= 0:
        raise UserError(f"--minutes {args.minutes:g} must be more than 0")
    if args.samples < 2:
        raise UserError(f"--samples {args.samples} must be at least 2")
    if args.trial and args.trial[0] not in TUNED:
        raise UserError(f"--try {args.trial[0]!r} is no entry; choose one of {names}")
    return args


def run(args: argparse.Namespace) -> None:
    from benchmarks.quality_race import page, records
    from benchmarks.quality_race.judges import Judges

    kept = records.read(args.json)
    of_ours = with_options(OURS, args.ours)
    if args.trial and args.trial[0] == OURS:
        of_ours = with_options(OURS, [*args.ours, *args.trial[1:]])
    options = {name: of_ours if name == OURS else with_options(name, ()) for name in TUNED}
    if args.trial:
        name, *given = args.trial
        options[name] = of_ours if name == OURS else with_options(name, given)
    overrides = of_ours["overrides"]
    settings = {name: settings_of(name, options[name], overrides) for name in args.only}
    our_configuration(overrides)  # whatever is wrong with them is said before the judges are trained
    args.work.mkdir(parents=True, exist_ok=True)
    judges = Judges(args.data, args.work)
    common = {
        "minutes": args.minutes,
        "samples": args.samples,
        "evaluations": EVALUATIONS,
        **stamp(),
        "judges": judges.about,
    }
    real, digits = judges.real(args.samples)

    def make(name: str, seed: int, folder: Path) -> dict[str, Any]:
        return scored(judges, name, options[name], overrides, args, seed, folder)

    def written() -> None:
        records.write(kept, args.json)
        beside = args.json.parent
        if (beside / "benchmarks.md").is_file():
            page.write(kept, args.seeds, beside / "benchmarks.md")

    if args.trial:
        name, *given = args.trial
        trial = make(name, args.seeds[0], args.work / "trial")
        if kept["settings"] is None:
            kept["settings"], kept["real"] = common, real
        kept["tried"].append({"entry": name, "given": given, "minutes": args.minutes, "samples": args.samples, **trial})
        written()
        return
    if args.redo:
        kept = records.without_others(kept, common, settings)
    records.check(kept, common, settings)
    kept["settings"], kept["real"] = common, real
    failed = []
    for name, seed in records.missing(kept, args.only, args.seeds):
        try:
            record = make(name, seed, args.work / folder_name(name) / f"seed={seed}")
        except Failed as error:
            failed.append(str(error))
            continue
        records.keep(kept, name, settings[name], seed, record)
        written()
        page.draw(kept, args.seeds[0], digits, args.work, args.json.parent / "images" / "quality_race.png")
    written()
    if failed:
        sys.exit("\n".join(failed))


def scored(
    judges: Any,
    name: str,
    options: dict[str, Any],
    overrides: list[str],
    args: argparse.Namespace,
    seed: int,
    folder: Path,
) -> dict[str, Any]:
    """A record: what the entry's process tells, its samples' distances, and the sampler that is nearest."""
    from benchmarks.mnist_quality import load_samples
    from benchmarks.quality_race import child

    print(f"\n{name}, seed {seed}: {args.minutes:g} minutes of training", flush=True)
    shutil.rmtree(folder, ignore_errors=True)
    png = args.work / "png"
    if name.startswith(LUCIDRAINS):
        write_pngs(args.data, png)
    place = {"data": args.data, "png": png, "folder": folder}
    where = {key: str(path.resolve()) for key, path in place.items()}
    record = child.run(name, options, overrides, {**where, "seed": seed}, 60 * args.minutes, args.samples)
    for sampler, sampling in record["samplers"].items():
        sampling.update(judges.score(load_samples(folder / f"{sampler}.npz")))
    best = min(record["samplers"], key=lambda sampler: record["samplers"][sampler]["first"])
    return {"seed": seed, **record, "sampler": best, "date": stamp(date=True)["date"]}


def stamp(date: bool = False) -> dict[str, Any]:
    """The machine and versions; they must be the same for all records."""
    from benchmarks.timing import environment

    known = environment()
    versions = {name: version for name, version in known["versions"].items() if name in PACKAGES}
    return {"device": known["device"], "versions": versions, **({"date": known["date"]} if date else {})}


def write_pngs(data: Path, folder: Path) -> None:
    """MNIST's training images as PNG files, once."""
    if folder.is_dir():
        return
    from PIL import Image
    from tqdm import tqdm

    from src.data.sources import MNIST

    images = MNIST().load(data)[0].images[:, 0].numpy()
    unfinished = folder.with_name(f"{folder.name}.unfinished")
    unfinished.mkdir(exist_ok=True)
    for i, image in enumerate(tqdm(images, desc="PNG files", unit="image", dynamic_ncols=True)):
        Image.fromarray(image).save(unfinished / f"{i:05}.png")
    unfinished.rename(folder)


if __name__ == "__main__":
    main()
