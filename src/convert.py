"""Makes a run of weights of others: python -m src.convert source=<folder or file> format=<format> [key=value] ..."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from src.cli import command
from src.overrides import as_override
from src.train import TrainConfig

OWN = ("source", "format", "qkv_order", "out")  # settings of this command alone


@dataclass
class ConvertConfig(TrainConfig):
    """The keys at the root of conf/convert.yaml: those of a training, and a few more."""

    source: str
    format: Literal["diffusers", "improved_diffusion", "guided_diffusion", "edm_state_dict", "safetensors"] | None
    qkv_order: Literal["legacy", "new"] | None
    out: str


def convert(config: dict[str, Any], out: Path) -> None:
    """Writes config.yaml and checkpoints/last.ckpt into `out`.

    Raises:
        UserError: for whatever the user can mend, before anything is written.
    """
    from src.files import shown
    from src.interop.convert import assemble, write

    overrides = [o for o in config["overrides"] if o.lstrip("+").partition("=")[0] not in OWN]
    settings = {key: config.pop(key) for key in OWN}
    run_config, state, weights = assemble(config, overrides, settings)
    write(run_config, state, out)
    shape = "x".join(map(str, _shape(run_config)))
    count = sum(v.numel() for v in state.values())
    print(f"{shown(weights)}: {count:,} weights, images of {shape}\n  {shown(out)}")
    labels = " labels=all" if run_config["model"].get("num_classes") is not None else ""
    print(f"samples: python -m src.sample {as_override('run', shown(out))}{labels}")
    print(f"fine-tuning: python -m src.train {as_override('init_from', shown(out))} data=...")


def _shape(config: dict[str, Any]) -> tuple[int, int, int]:
    from src.runs import image_shape

    channels, height, width = image_shape(config)
    return height, width, channels


main = command("convert", ConvertConfig, convert, lambda run, overrides: [])

if __name__ == "__main__":
    main()
