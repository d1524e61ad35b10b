"""One entry with one seed, in a process of its own: measures its pace, plans, trains, and draws its samples."""

import gc
import json
import os
import subprocess
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from benchmarks.quality_race.entries import Options
from src.errors import UserError
from src.files import replacing

ROOT = Path(__file__).resolve().parents[2]
RESULT = "result.json"
ATTEMPTS, ENOUGH = 2, 0.97  # trainings, of which one that ends before this share of its time is made again


class Failed(Exception):  # noqa: N818
    """An entry's process has, and has said why."""


def run(
    name: str,
    options: Options,
    overrides: list[str],
    place: Mapping[str, Any],
    budget: float,
    number: int,
) -> dict[str, Any]:
    """What came of an entry, from a fresh process; <sampler>.npz in its folder hold the samples, arr_0 as src.sample's.

    Args:
        options: of the entry; those that TUNED has.
        overrides: of ours, whose network the entries with the same network take.
        place: of `Place`, paths as text.
        budget: seconds of training.
        number: of samples.

    Raises:
        Failed: when the process fails.
    """
    plan = {
        "name": name,
        "options": options,
        "overrides": overrides,
        "place": dict(place),
        "budget": budget,
        "number": number,
    }
    on_cpu = {"CUDA_VISIBLE_DEVICES": "", "ACCELERATE_USE_CPU": "true", "TOKENIZERS_PARALLELISM": "false"}
    command = [sys.executable, "-m", "benchmarks.quality_race.child", json.dumps(plan)]
    code = subprocess.run(command, cwd=ROOT, env={**os.environ, **on_cpu}).returncode
    if code:
        raise Failed(f"{name}, seed {place['seed']}, has failed with exit code {code}")
    return dict(json.loads(Path(place["folder"], RESULT).read_text()))


def main(plan: dict[str, Any]) -> None:
    import numpy as np
    import torch

    from benchmarks.ours import FOREVER
    from benchmarks.prepare import peak
    from benchmarks.quality_race.clock import PACE_SECONDS, Clock, Pace, planned_steps
    from benchmarks.quality_race.contenders import Place, contender, precision

    told = plan["place"]
    place = Place(Path(told["data"]), Path(told["png"]), Path(told["folder"]), told["seed"])
    place.folder.mkdir(parents=True, exist_ok=True)
    budget = plan["budget"]
    entry = contender(plan["name"], plan["options"], plan["overrides"], place)
    pace = Pace(min(PACE_SECONDS, budget))
    torch.manual_seed(place.seed)
    entry.train(pace, FOREVER)
    gc.collect()
    seconds_a_step = pace.seconds_a_step
    for _ in range(ATTEMPTS):
        steps = planned_steps(budget, seconds_a_step) if entry.plans else FOREVER
        planned = f"{steps:,} steps planned" if entry.plans else "trained until the time is over"
        print(f"{plan['name']}: {seconds_a_step:.3f} s a step, {planned}", flush=True)
        clock = Clock(budget)
        torch.manual_seed(place.seed)
        entry.train(clock, steps)
        gc.collect()  # a loader's workers end
        seconds_a_step = clock.seconds / (clock.done - 1) if clock.done > 1 else seconds_a_step
        if clock.seconds >= ENOUGH * budget:
            break  # if not, the machine was slow when the pace was taken, and the steps were too few
    held = round(peak() * 2**30)
    sampling = {}
    for sampler in plan["options"]["samplers"]:
        began = time.perf_counter()
        samples = entry.draw(sampler, plan["number"])
        sampling[sampler] = {"seconds": time.perf_counter() - began}
        with replacing(place.folder / f"{sampler}.npz") as temporary, temporary.open("wb") as file:
            np.savez_compressed(file, arr_0=samples.permute(0, 2, 3, 1).numpy())
    result = {
        "parameters": entry.parameters,
        "batch": entry.batch,
        "planned_steps": steps if entry.plans else clock.done,
        "steps": clock.done,
        "images": clock.done * entry.batch,
        "seconds": clock.seconds,
        "pace_seconds_a_step": pace.seconds_a_step,
        "peak_bytes": held,
        "precision": {"bf16": "bfloat16", "no": "float32"}[precision()],
        "samplers": sampling,
    }
    with replacing(place.folder / RESULT) as temporary:
        temporary.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    try:
        main(json.loads(sys.argv[1]))
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        raise SystemExit(2) from None
