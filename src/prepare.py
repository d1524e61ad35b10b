"""Packs images once: python -m src.prepare data=folder data.dir=... size=64 out=... [key=value] ..."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from src.cli import command
from src.data.geometry import Size


@dataclass
class PrepareConfig:
    """The keys at the root of conf/prepare.yaml."""

    data: dict
    size: int | Size | list[int]
    crop: Literal["center", "none", "random"]
    resize: Literal["lanczos", "area"]
    seed: int
    processes: int | None
    out: str


def prepare(config: dict[str, Any], out: Path) -> None:
    """Writes a store into `out` that data=packed trains from, or goes on with one that was begun there.

    Raises:
        UserError: for whatever the user can mend; what was packed stays, and is gone on from.
        SystemExit: after Ctrl-C, likewise.
    """
    from src.build import build, refusals
    from src.data.geometry import Geometry, parse_size
    from src.data.packed import VAL
    from src.data.packing import pack
    from src.errors import UserError
    from src.files import shown

    data = config["data"]
    if config["processes"] is not None and config["processes"] < 1:
        raise UserError(f"processes={config['processes']} must be at least 1, or null for one a core")
    if "source" not in data:
        raise UserError(
            "shards are read while training goes on, and are not prepared; train with data=webdataset as they are, or "
            "unpack them into a folder and prepare that with data=folder"
        )
    later = [f"data.{key}={data[key]}" for key in ("limit", "classes", "val_list") if data.get(key) is not None]
    if later:
        raise UserError(
            f"a store holds all images, and {later[0]} belongs to a training from it: give it with data=packed"
        )
    source = build(data["source"], "data.source")
    if not hasattr(source, "catalogues"):
        raise UserError(
            "these images need no preparing, train from them as they are; data=folder, zip, npz, parquet and hub do"
        )
    with refusals("size"):
        geometry = Geometry(parse_size(config["size"]), config["crop"], config["resize"], config["seed"])
    train, val = source.catalogues(Path(data["dir"]), data.get("labels"))
    try:
        for catalogue, folder in ((train, out), (val, out / VAL)):
            if catalogue is not None:
                channels, broken = data.get("channels"), data.get("max_broken", 0)
                manifest = pack(catalogue, geometry, folder, channels, broken, config["processes"])
                _report(manifest, folder)
    except KeyboardInterrupt:
        print(f"stopped; the same command goes on from what {shown(out)} holds")
        raise SystemExit(130) from None
    print(f"train from it: python -m src.train data=packed data.dir={shown(out)}")


def _report(manifest: Any, folder: Path) -> None:
    from src.files import shown

    channels, height, width = manifest.shape
    print(
        f"{manifest.count:,} images, {height}x{width} with {channels} channel{'s' * (channels > 1)} of "
        f"{manifest.dtype}, {manifest.nbytes / 2**20:,.1f} MiB, in {shown(folder)}"
    )
    if manifest.skipped:
        name, reason = manifest.skipped[0]
        were = "was" if len(manifest.skipped) == 1 else "were"
        print(f"note: {len(manifest.skipped)} {were} left out, which manifest.json lists; the first, {name}, {reason}")


main = command("prepare", PrepareConfig, prepare, lambda run, overrides: [])

if __name__ == "__main__":
    main()
