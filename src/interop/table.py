"""A peer's weights as a table of entries, each one of our tensors and those of the peer's that it is made of.

Reading a peer's file and writing one are the same table, once from the right and once from the left.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from src.build import build
from src.errors import UserError, reason
from src.models.blocks import Stage
from src.models.unet import UNet

NAMED = 3  # keys that a refusal names


class Entry(NamedTuple):
    """One of our tensors.

    Attributes:
        ours: its key.
        theirs: the keys of what it is made of.
        read: makes ours of theirs.
        write: makes theirs of ours; of a tensor without memory, one without memory.
    """

    ours: str
    theirs: tuple[str, ...]
    read: Callable[..., Tensor]
    write: Callable[[Tensor], tuple[Tensor, ...]]


def same(ours: str, theirs: str) -> list[Entry]:
    """Weight and bias of a layer that is the same in both."""
    return [Entry(f"{ours}.{part}", (f"{theirs}.{part}",), lambda v: v, lambda v: (v,)) for part in ("weight", "bias")]


def renamed(ours: str, block: nn.Module, theirs: str, names: Mapping[str, str]) -> list[Entry]:
    """The layers of a block that it has, which are the same in both but for their names: ours to theirs."""
    return [
        entry
        for name, their_name in names.items()
        if not isinstance(getattr(block, name), nn.Identity)
        for entry in same(f"{ours}.{name}", f"{theirs}.{their_name}")
    ]


def pointwise(ours: str, theirs: str, ndim: int) -> list[Entry]:
    """A 1x1 convolution of ours, whose weight has `ndim` dimensions there: 2 of a linear layer, 3 of a 1d one."""

    def write(v: Tensor) -> tuple[Tensor, ...]:
        return (v.reshape(*v.shape[:2], *[1] * (ndim - 2)),)

    weight, bias = same(ours, theirs)
    return [weight._replace(read=lambda v: v.reshape(*v.shape[:2], 1, 1), write=write), bias]


def permuted(entries: list[Entry], heads: int, order: tuple[int, int, int]) -> list[Entry]:
    """Entries of a qkv layer whose output channels, here (3, heads, d), have these dimensions in another order."""
    back = (order.index(0), order.index(1), order.index(2))

    def to_theirs(v: Tensor) -> Tensor:
        return v.reshape(3, heads, -1, *v.shape[1:]).permute(*order, *range(3, v.ndim + 2)).reshape(v.shape)

    def to_ours(v: Tensor) -> Tensor:
        sizes = (3, heads, v.shape[0] // (3 * heads))
        shuffled = v.reshape(*(sizes[i] for i in order), *v.shape[1:])
        return shuffled.permute(*back, *range(3, v.ndim + 2)).reshape(v.shape)

    def changed(entry: Entry) -> Entry:
        return entry._replace(
            read=lambda v: to_ours(entry.read(v)),
            write=lambda v: (entry.write(to_theirs(v))[0],),
        )

    return [changed(entry) for entry in entries]


def split(ours: str, theirs: Iterable[str], linear: bool = False) -> list[Entry]:
    """A layer of ours whose output channels belong to several of theirs; with `linear`, a 1x1 convolution of ours."""
    names = tuple(theirs)

    def entry(part: str) -> Entry:
        flat = linear and part == "weight"

        def read(*parts: Tensor) -> Tensor:
            whole = torch.cat(parts)
            return whole[:, :, None, None] if flat else whole

        def write(v: Tensor) -> tuple[Tensor, ...]:
            return (v[:, :, 0, 0] if flat else v).chunk(len(names))

        return Entry(f"{ours}.{part}", tuple(f"{name}.{part}" for name in names), read, write)

    return [entry("weight"), entry("bias")]


def labels(ours: str, theirs: str, with_none: bool) -> list[Entry]:
    """The table of labels, which holds "none" last; without it there, "none" adds nothing to the time here."""

    def read(v: Tensor) -> Tensor:
        return v if with_none else torch.cat([v, torch.zeros_like(v[:1])])

    return [Entry(f"{ours}.table.weight", (f"{theirs}.weight",), read, lambda v: (v if with_none else v[:-1],))]


class Shapes(dict[str, tuple[int, ...]]):
    """The shapes of a file's tensors; one that it should have and has not is a UserError."""

    def __init__(self, theirs: Mapping[str, Tensor], path: Path) -> None:
        super().__init__((key, tuple(v.shape)) for key, v in theirs.items())
        self.path = path

    def __missing__(self, key: str) -> tuple[int, ...]:
        raise UserError(f"{self.path} lacks {key}, without which its network cannot be told; save or download it again")


def read_table(entries: list[Entry], theirs: dict[str, Tensor], net: nn.Module, path: Path) -> dict[str, Tensor]:
    """Our state of a peer's, float32.

    Args:
        net: the network that it is for, which may be without memory.

    Raises:
        UserError: naming the first keys, or the first shape, that differ.
    """
    check_table(entries, {key: tuple(v.shape) for key, v in theirs.items()}, net, path)
    return {e.ours: e.read(*(theirs[key].float() for key in e.theirs)).contiguous() for e in entries}


def check_table(entries: list[Entry], shapes: dict[str, tuple[int, ...]], net: nn.Module, path: Path) -> None:
    """Compares a file's keys and shapes with what the network needs.

    Raises:
        UserError: naming the first that differ.
    """
    state = {key: torch.empty_like(v, device="meta") for key, v in net.state_dict().items()}
    expected = {key: tuple(v.shape) for e in entries for key, v in zip(e.theirs, e.write(state[e.ours]), strict=True)}
    missing = [key for key in expected if key not in shapes]
    unknown = [key for key in shapes if key not in expected]
    if missing or unknown:
        parts = [f"lacks {_some(missing)}"] if missing else []
        parts += [f"has {_some(unknown)}, which the network has no place for"] if unknown else []
        raise UserError(
            f"{path} is not what its configuration says: it {' and '.join(parts)}; check that the file and the "
            "settings of model belong together"
        )
    for key, shape in expected.items():
        if shapes[key] != shape:
            raise UserError(
                f"{path} is not what its configuration says: {key} is {list(shapes[key])} there and {list(shape)} in "
                "the network; check that the file and the settings of model belong together"
            )


def write_table(entries: list[Entry], state: dict[str, Tensor]) -> dict[str, Tensor]:
    """A peer's state of ours; each tensor with memory of its own."""
    return {
        key: v.contiguous().clone() for e in entries for key, v in zip(e.theirs, e.write(state[e.ours]), strict=True)
    }


def _some(keys: list[str]) -> str:
    more = len(keys) - NAMED
    return ", ".join(keys[:NAMED]) + (f" and {more} more" if more > 0 else "")


class Place(NamedTuple):
    """Where a layer of a U-Net stands.

    Attributes:
        name: its key.
        level: 0 is the full resolution.
        number: among the stages of its level, from 0; of what resamples, the number of stages before it.
        layer: a Stage, or what resamples.
    """

    name: str
    level: int
    number: int
    layer: nn.Module


def places(net: UNet) -> tuple[list[Place], list[Place]]:
    """The layers down and up, in their order; of what resamples, the level that it leaves."""
    found: list[list[Place]] = []
    for side, start, step in (("down", 0, 1), ("up", None, -1)):
        layers: list[nn.Module] = list(getattr(net, side))
        level = sum(not isinstance(layer, Stage) for layer in layers) if start is None else start
        number, own = 0, []
        for i, layer in enumerate(layers):
            own.append(Place(f"{side}.{i}", level, number, layer))
            level, number = (level, number + 1) if isinstance(layer, Stage) else (level + step, 0)
        found.append(own)
    down, up = found
    return down, up


def without_memory(model: Mapping[str, Any]) -> nn.Module:
    """The network of a node of conf/model, whose tensors have shapes alone."""
    with torch.device("meta"):
        net: nn.Module = build(model, "model")
    return net


@contextmanager
def infers(path: Path) -> Iterator[None]:
    """Turns what goes wrong in a block that tells a network from what a file says into a UserError."""
    try:
        yield
    except UserError:
        raise
    except (LookupError, ValueError, TypeError, AttributeError, ZeroDivisionError) as error:
        raise UserError(
            f"{path} describes no network that can be read ({reason(error)}); save or download it again"
        ) from error
