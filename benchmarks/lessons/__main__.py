"""Runs the lessons, or reads those that were run, and writes docs/lessons.md and its pictures.

What is done is kept, and a lesson that was stopped goes on where it was. --fresh begins anew. With --out, a page of
few steps or few seeds may be looked at elsewhere: python -m benchmarks.lessons --out page trainer.max_steps=50
"""

import argparse
from pathlib import Path

from benchmarks.lessons import page, pictures
from benchmarks.lessons.run import NAMES, ROOT, learn


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--only", nargs="+", choices=NAMES, default=NAMES, metavar="NAME", help=f"of {', '.join(NAMES)}"
    )
    parser.add_argument("--fresh", action="store_true", help="forget what was done before")
    parser.add_argument("--out", type=Path, default=Path("docs"), metavar="DIR", help="of the page; default: docs")
    parser.add_argument("--runs", type=Path, default=ROOT, metavar="DIR", help=f"of the runs; default: {ROOT}")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="for src.train")
    args = parser.parse_args()

    images = args.out / "images" / "lessons"
    images.mkdir(parents=True, exist_ok=True)
    results = []
    for name in args.only:
        results.append(learn(name, args.overrides, args.fresh, args.runs))
        pictures.draw(results[-1], images / f"{name}.png")
    page.write(args.out / "lessons.md", results)
    print(f"written: {args.out / 'lessons.md'}")


if __name__ == "__main__":
    main()
