"""From the command to the first step, and five short runs end to end: whole processes, against diffusers' example.

  ours       python -m src.train: first step until metrics.csv has its row; the sweep is -m seed=0,1,2,3,4, one process
  diffusers  the loop of its train_unconditional example on the same images and a network of the same size, as a script:
             first step until it says so; the sweep is the script five times, one after the other

All train the 8x8 digits in float32; the runs of the sweep have 20 steps and end with a checkpoint and 16 samples of ten
steps each.
"""

import os
import subprocess
import sys
import tempfile
import time
from argparse import Namespace
from collections.abc import Callable
from functools import partial
from pathlib import Path

from benchmarks.timing import arguments, interleave, spread, write_report

SEEDS = (0, 1, 2, 3, 4)
STEPS, SAMPLES, SAMPLE_STEPS = 20, 16, 10
LONG = 2000  # not for ever, should nobody be left to end it
FIRST = "first step"


def main() -> None:
    parser = arguments(__doc__)
    parser.add_argument("--rounds", type=int, default=8)
    parser.add_argument("--sweep-rounds", type=int, default=2)
    parser.add_argument("--script", type=int, nargs=2, metavar=("STEPS", "SEED"), help="be diffusers' script")
    args = parser.parse_args()
    if args.script:
        script(*args.script)
        return
    first = interleave({"ours": ours_first, "diffusers": theirs_first}, "ours", args.rounds)
    sweep = interleave({"ours": ours_sweep, "diffusers": theirs_sweep}, "ours", args.sweep_rounds)
    tables, results = [], {}
    for caption, rounds in (
        ("seconds from the command to the first step", first),
        (f"seconds for five runs of {STEPS} steps, end to end", sweep),
    ):
        rows = [
            (name, f"{rounds.median(name):.1f}", "" if name == "ours" else spread(rounds.ratios(name, "ours")))
            for name in rounds.values
        ]
        tables.append((caption, ("", "seconds", "ours, times as fast"), rows))
        results[caption] = rounds.values
    write_report(args, tables, seconds=results)


def command(*arguments: str) -> list[str]:
    return [sys.executable, "-m", *arguments]


def ours(*overrides: str) -> list[str]:
    shared = (
        *("experiment=digits", "trainer=cpu", "trainer.precision=32-true", "data.batch_size=16"),
        f"callbacks.samples.num_samples={SAMPLES}",
        f"callbacks.samples.sampler.steps={SAMPLE_STEPS}",
    )
    return command("src.train", *shared, *overrides)


def ours_first() -> float:
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        late = f"trainer.max_steps={LONG}", "trainer.log_every_n_steps=1", f"hydra.run.dir={folder}"
        metrics = folder / "metrics.csv"
        return until(
            partial(subprocess.Popen, ours(*late), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL),
            lambda: metrics.is_file() and metrics.read_text().count("\n") > 1,
        )


def theirs_first() -> float:
    with tempfile.TemporaryDirectory() as name:
        said = Path(name, "said")
        with said.open("w") as out:
            start = partial(
                subprocess.Popen,
                command("benchmarks.startup", "--script", str(LONG), "0"),
                stdout=out,
                stderr=subprocess.DEVNULL,
            )
            return until(start, lambda: FIRST in said.read_text())


def until(start: Callable[[], "subprocess.Popen[bytes]"], done: Callable[[], bool]) -> float:
    """Seconds from a process's start until something is true of it; then it is killed."""
    started = time.perf_counter()
    process = start()
    try:
        while not done():
            if process.poll() is not None:
                raise SystemExit(f"{process.args} has ended with {process.returncode} before its first step")
            time.sleep(0.005)
        return time.perf_counter() - started
    finally:
        process.kill()
        process.wait()


def ours_sweep() -> float:
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        seeds = ",".join(map(str, SEEDS))
        short = f"trainer.max_steps={STEPS}", f"trainer.val_every_n_steps={STEPS}", f"seed={seeds}"
        return timed(ours("-m", *short, f"hydra.sweep.dir={folder}"))


def theirs_sweep() -> float:
    return sum(timed(command("benchmarks.startup", "--script", str(STEPS), str(seed))) for seed in SEEDS)


def timed(arguments: list[str]) -> float:
    started = time.perf_counter()
    subprocess.run(arguments, check=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    return time.perf_counter() - started


def script(steps: int, seed: int) -> None:
    """diffusers' example: trains, saves a pipeline, draws samples."""
    import torch
    from diffusers import DDPMPipeline

    from benchmarks.digits_vs_diffusers import ddpm, loop, unet

    torch.manual_seed(seed)
    model = unet()
    settings = Namespace(learning_rate=1e-4, warmup_steps=500, mixed_precision="no", batch_size=16)
    for step, ema in enumerate(loop(settings, model, steps), 1):
        if step == 1:
            print(FIRST, flush=True)
        if step == steps:
            ema.copy_to(model.parameters())
            break
    with tempfile.TemporaryDirectory() as folder:
        pipeline = DDPMPipeline(model, ddpm())
        pipeline.save_pretrained(folder)
        pipeline.set_progress_bar_config(disable=True)
        pipeline(SAMPLES, num_inference_steps=SAMPLE_STEPS)


if __name__ == "__main__":
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    main()
