"""Takes a model elsewhere: python -m src.export run=<run folder or .ckpt> format=<format> [key=value] ..."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from src.cli import command


@dataclass
class ExportConfig:
    """The keys at the root of conf/export.yaml."""

    run: str
    format: Literal["diffusers", "safetensors", "onnx", "torch_export"]
    weights: str
    out: str


def export(config: dict[str, Any], out: Path) -> None:
    """Writes the model into `out`, once it is read back and found the same.

    Raises:
        UserError: for whatever the user can mend, before anything is written.
    """
    from src.files import shown
    from src.interop.export import write
    from src.runs import Run

    run = Run(config["run"])
    written, difference = write(run, config["weights"], config["format"], out)
    print(f"{config['weights']} weights of {shown(run.checkpoint)} as {config['format']}:")
    for path in written:
        print(f"  {shown(path)}")
    print(f"read back and compared: the largest difference of an output is {difference:.1e}")
    if config["format"] == "diffusers" and run.config["model"].get("num_classes") is not None:
        print("note: it takes labels, the number after the last meaning none; DDPMPipeline gives none: call its unet")


main = command("export", ExportConfig, export, lambda run, overrides: [])

if __name__ == "__main__":
    main()
