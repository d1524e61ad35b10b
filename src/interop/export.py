"""A run's network in a format of others, read back and compared before it takes its place."""

import io
import json
import logging
import tempfile
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from src.errors import UserError, reason
from src.interop import diffusers, own
from src.randomness import generator
from src.runs import Run, build_diffusion, image_shape
from src.trust import check_known

Network = Callable[..., Tensor]
LIMIT = 1e-4  # the largest difference, over the largest output where that is more than 1
TOLD = (0.1, 0.5, 0.9)  # of the schedule's length, where outputs are compared
LARGEST = 2**30  # bytes of weights inside model.onnx, which can hold 2 GiB; larger ones lie beside it
CARRYING = ("safetensors", "diffusers")  # the configuration, which is held to this project when it is read
ORACLE = "src.evaluation.oracle.Oracle"


def write(run: Run, weights: str, kind: str, out: Path) -> tuple[list[Path], float]:
    """The files that were written, and the largest difference between the network and what was read back.

    Args:
        weights: see `Run.load_net`.
        kind: diffusers, safetensors, onnx or torch_export.

    Raises:
        UserError: for what the format cannot hold, or when the two are not the same; nothing is left then.
    """
    if run.config["model"]["_target_"] == ORACLE:
        raise UserError(f"run={run.folder} is an oracle, which has no weights; export a network that was trained")
    if kind in CARRYING:
        check_known(run.config, f"run={run.folder}")
    net = run.load_net(weights)
    inputs = _inputs(net, run.config, rows=len(TOLD))
    with tempfile.TemporaryDirectory(dir=out, prefix=".export_", ignore_cleanup_errors=True) as folder:
        written, read_back = FORMATS[kind](net, run.config, Path(folder))
        with torch.no_grad():
            expected, found = net(*inputs), read_back(*inputs)
        difference = float((expected - found).abs().max())
        limit = LIMIT * max(1.0, float(expected.abs().max()))
        if not difference <= limit:  # or NaN
            raise UserError(
                f"what was written as {kind} is not the network: outputs differ by {difference:.1e}, more than "
                f"{limit:.1e}; nothing is kept, use format=safetensors"
            )
        return [_moved(path, Path(folder), out) for path in written], difference


def _safetensors(net: nn.Module, config: dict[str, Any], folder: Path) -> tuple[list[Path], Network]:
    path = folder / "model.safetensors"
    own.write(net.state_dict(), config, path)
    return [path], Run(path).load_net("ema")


def _diffusers(net: nn.Module, config: dict[str, Any], folder: Path) -> tuple[list[Path], Network]:
    diffusers.write(net, config, folder)
    return sorted(path for path in folder.rglob("*") if path.is_file()), Run(folder).load_net("ema")


def _torch_export(net: nn.Module, config: dict[str, Any], folder: Path) -> tuple[list[Path], Network]:
    path, inputs = folder / "model.pt2", _inputs(net, config, rows=2)
    with _expressed(net, "torch.export"):
        program = torch.export.export(net, inputs, dynamic_shapes=_any_batch(inputs))
        torch.export.save(program, path, extra_files={own.CONFIG: json.dumps(config)})
    return [path], torch.export.load(path).module()


def _onnx(net: nn.Module, config: dict[str, Any], folder: Path) -> tuple[list[Path], Network]:
    import onnx
    import onnxruntime

    path, inputs = folder / "model.onnx", _inputs(net, config, rows=2)
    names = ["x", "t", "y"][: len(inputs)]
    with _expressed(net, "ONNX"):
        torch.onnx.export(
            net,
            inputs,
            path,
            input_names=names,
            output_names=["F"],
            dynamo=True,
            dynamic_shapes=_any_batch(inputs),
            verbose=False,
            external_data=sum(p.nbytes for p in net.state_dict().values()) > LARGEST,
        )
    model = onnx.load(path, load_external_data=False)
    model.metadata_props.add(key=own.CONFIG, value=json.dumps(config))
    onnx.save(model, path)
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])

    def read_back(*inputs: Tensor) -> Tensor:
        (out,) = session.run(None, {name: v.numpy() for name, v in zip(names, inputs, strict=True)})
        return torch.from_numpy(out)

    return sorted(p for p in folder.iterdir() if p.is_file()), read_back


FORMATS: dict[str, Callable[[nn.Module, dict[str, Any], Path], tuple[list[Path], Network]]] = {
    "diffusers": _diffusers,
    "safetensors": _safetensors,
    "onnx": _onnx,
    "torch_export": _torch_export,
}


def _inputs(net: nn.Module, config: dict[str, Any], rows: int) -> tuple[Tensor, ...]:
    """Noise, times and labels as sampling has them; of the labels the first, and "none" last."""
    channels, height, width = image_shape(config)
    channels *= 1 + getattr(net, "self_conditioning", False)
    x = torch.randn(rows, channels, height, width, generator=generator(0, 0))
    schedule = build_diffusion(config).schedule
    t = schedule.condition(schedule.time(torch.tensor(TOLD[:rows]))).float()
    classes = getattr(net, "num_classes", None)
    return (x, t) if classes is None else (x, t, torch.tensor([0] * (rows - 1) + [classes]))


def _any_batch(inputs: tuple[Tensor, ...]) -> dict[str, dict[int, Any]]:
    batch = torch.export.Dim("batch")
    return {name: {0: batch} for name, _ in zip(("x", "t", "y"), inputs, strict=False)}


@contextmanager
def _expressed(net: nn.Module, format: str) -> Iterator[None]:
    """Says in a sentence what an exporter says in pages.

    Raises:
        UserError: when the block raises anything.
    """
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings(), redirect_stdout(io.StringIO()), redirect_stderr(io.StringIO()):
            warnings.simplefilter("ignore")
            yield
    except Exception as error:  # exporters raise anything
        cause = error
        while cause.__cause__ is not None:
            cause = cause.__cause__  # type: ignore[assignment]
        raise UserError(
            f"{format} cannot express {type(net).__name__} ({reason(cause)}); use format=safetensors, which holds any "
            "network"
        ) from error
    finally:
        logging.disable(logging.NOTSET)


def _moved(path: Path, source: Path, target: Path) -> Path:
    name = target / path.relative_to(source)
    name.parent.mkdir(parents=True, exist_ok=True)
    return path.replace(name)
