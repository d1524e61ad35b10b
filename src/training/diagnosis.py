"""Where a bad step began: the worst image, and the layer that broke first."""

from typing import Any

import torch
from torch import Tensor, nn

from src.data.loader import Batch
from src.training.compiling import not_compiled
from src.training.sharding import Sharded, local


def diagnose(module: Any, batch: Batch, batch_idx: int) -> str:
    """Computes the batch again, which draws the same noise, and says in words what was wrong.

    Of a sharded network all processes ask, and are told of their own images and layers' outputs; gradients, which would
    have to be whole to be told apart, are left out.

    Args:
        module: the TrainingModule after the step.
    """
    part = batch_idx % module.accumulated
    sharded = isinstance(module.trainer.strategy, Sharded)
    finite = torch.stack([torch.isfinite(local(p)).all() for p in module.net.parameters()])
    broken = module.trainer.strategy.reduce((~finite).float(), reduce_op="sum") if sharded else ~finite
    weights = [name for (name, _), bad in zip(module.net.named_parameters(), broken.tolist(), strict=True) if bad]
    outputs: list[str] = []  # of layers whose output is not finite, in order
    names = {layer: name for name, layer in module.net.named_modules() if name and not list(layer.children())}

    def look(layer: nn.Module, _: Any, output: Any) -> None:
        if isinstance(output, Tensor) and not torch.isfinite(output).all():
            outputs.append(names[layer])

    hooks = [layer.register_forward_hook(look) for layer in names]
    try:
        precision = module.trainer.precision_plugin.forward_context()
        with torch.set_grad_enabled(not sharded), precision, not_compiled():
            losses, u = module.losses(batch, part, module.global_step - 1)
    finally:
        for hook in hooks:
            hook.remove()
    worst = module.worst(losses.detach(), u)
    if weights:
        return f"{worst}; the weights {weights[0]} are not finite"
    if outputs:
        return f"{worst}; the layer {outputs[0]} is the first whose output is not finite"
    if sharded:
        return worst
    parameters = [(name, p) for name, p in module.net.named_parameters() if p.requires_grad]
    found = torch.autograd.grad(losses.mean(), [p for _, p in parameters], allow_unused=True)
    gradients = [(name, g) for (name, _), g in zip(parameters, found, strict=True) if g is not None]
    for name, gradient in reversed(gradients):  # backward comes from the end
        if not torch.isfinite(gradient).all():
            return f"{worst}; the gradient of {name} is the first that is not finite"
    name, gradient = max(gradients, key=lambda pair: float(pair[1].norm()))
    return f"{worst}; the gradient of {name} is the largest, {float(gradient.norm()):.3g}"
