"""Runs the benchmarks one after the other and writes docs/benchmarks.md and docs/benchmarks.json as they end.

In the page, what stands between <!-- name --> and <!-- /name --> is made here, and the rest is written by hand. On a
machine with a GPU those run that can use it, and their names end in " on a GPU".
"""

import argparse
import json
import re
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from benchmarks.turns import ON_GPU
from src.files import replacing

NAMES = (
    *("training", "step_profile", "operations", "sampling", "sampler_step", "loop_tax"),
    *("data_path", "prepare", "shards", "mapped", "startup"),
)
NAMES_ON_GPU = ("training", "sampling")
PAGE, DATA = Path("docs/benchmarks.md"), Path("docs/benchmarks.json")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    names = NAMES_ON_GPU if ON_GPU else NAMES
    parser.add_argument(
        "--only", nargs="+", choices=names, default=names, metavar="NAME", help=f"of {', '.join(names)}"
    )
    args = parser.parse_args()
    began, failed = time.perf_counter(), []
    for i, name in enumerate(args.only, 1):
        print(f"[{i} of {len(args.only)}] {name}, after {(time.perf_counter() - began) / 60:.0f} minutes", flush=True)
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder, "result.json")
            code = subprocess.run([sys.executable, "-m", f"benchmarks.{name}", "--json", str(path)]).returncode
            if code == 0:
                keep(f"{name} on a GPU" if ON_GPU else name, json.loads(path.read_text()))
            else:
                failed.append(name)
    print(f"written: {PAGE} and {DATA}, in {(time.perf_counter() - began) / 60:.0f} minutes")
    if failed:
        sys.exit(f"failed, and not written: {', '.join(failed)}")


def keep(name: str, result: dict[str, Any]) -> None:
    """Puts a benchmark's result in the place of its last one."""
    everything = json.loads(DATA.read_text()) if DATA.is_file() else {}
    result["command"] = f"python -m benchmarks.{name.split()[0]}"
    with replacing(DATA) as temporary:
        temporary.write_text(json.dumps({**everything, name: result}, indent=1) + "\n")
    write_section(name, section(result), PAGE)


def write_section(name: str, text: str, path: Path) -> None:
    """Puts text between the marks of this name on a page, in the place of what stood there."""
    begin, end = f"<!-- {name} -->", f"<!-- /{name} -->"
    page = path.read_text()
    made, found = re.subn(f"{begin}.*?{end}", lambda _: f"{begin}\n{text}\n{end}", page, count=1, flags=re.DOTALL)
    if not found:
        raise ValueError(f"{path} has no place for {name!r}: put {begin} and {end} where it belongs")
    with replacing(path) as temporary:
        temporary.write_text(made)


def section(result: dict[str, Any]) -> str:
    """The tables of a result, and where and when they came about, as Markdown."""
    parts = []
    for caption, header, rows in result["tables"]:
        lines = [header, ["---"] * len(header), *rows]
        parts.append(
            f"{caption[:1].upper()}{caption[1:]}:\n\n" + "\n".join(f"| {' | '.join(line)} |" for line in lines)
        )
    versions = ", ".join(f"{name} {version}" for name, version in result["versions"].items())
    parts.append(f"*{result['date'][:10]}, {result['device']}; {versions}.*")
    return "\n\n".join(parts)


if __name__ == "__main__":
    main()
