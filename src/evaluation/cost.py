"""What a network costs, before it is built: computed on tensors that have shapes and no memory."""

from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.flop_counter import FlopCounterMode

from src.build import build
from src.models.dropout import Dropout, give_keys


class Cost(NamedTuple):
    """Of a network.

    Attributes:
        parameters: numbers that are trained.
        flops_per_image: operations of a forward pass, a multiply-add counted as two.
        activation_bytes: what a training step's forward pass keeps for its backward pass, in float32 and without the
            weights, at a batch size; by torch's operations, which keep more than what `src.models.kernel` compiles.
    """

    parameters: int
    flops_per_image: int
    activation_bytes: int


def cost(node: dict[str, Any], image_shape: tuple[int, int, int], batch_size: int) -> Cost:
    """The cost of the network that a node of conf/model describes.

    Args:
        image_shape: (C, H, W).
        batch_size: images of a training step.

    Raises:
        UserError: when the network refuses its settings.
    """
    with FakeTensorMode(allow_non_fake_inputs=True):
        net: nn.Module = build(node, "model")
        parameters = sum(p.numel() for p in net.parameters() if p.requires_grad)
        with FlopCounterMode(display=False) as counter, torch.no_grad():
            net.eval()(*inputs(net, image_shape, 1))
        return Cost(parameters, int(counter.get_total_flops()), _kept(net.train(), image_shape, batch_size))


def _kept(net: nn.Module, image_shape: tuple[int, int, int], batch_size: int) -> int:
    """Bytes of the tensors that autograd saves, each memory counted once."""
    give_keys([m for m in net.modules() if isinstance(m, Dropout)], torch.zeros(batch_size, dtype=torch.int32))
    kept: dict[int, torch.UntypedStorage] = {}  # holding them keeps their numbers from being given again

    def keep(v: Tensor) -> Tensor:
        storage = v.untyped_storage()
        kept[storage._cdata] = storage
        return v

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda v: v):
        out = net(*inputs(net, image_shape, batch_size))
    weights = {v.untyped_storage()._cdata for v in (*net.parameters(), *net.buffers())}
    del out
    return sum(storage.nbytes() for number, storage in kept.items() if number not in weights)


def inputs(net: nn.Module, image_shape: tuple[int, int, int], rows: int) -> tuple[Tensor, ...]:
    """What a network takes: images, times and, of one with labels, labels; zeros all."""
    channels, height, width = image_shape
    x = torch.zeros(rows, channels * (1 + getattr(net, "self_conditioning", False)), height, width)
    labels = () if getattr(net, "num_classes", None) is None else (torch.zeros(rows, dtype=torch.int64),)
    return (x, torch.zeros(rows), *labels)
