"""A network that is spread over processes: each holds a part of every weight, its gradient, its moments and averages.

A block's weights are gathered before it computes and let go of after; its gradient is averaged and shared out again
(FSDP; Rajbhandari et al. 2020, "ZeRO", stage 3). Every process must therefore call the network equally often, from one
thread. The optimiser and the averages see the parts as plain tensors: whatever they do element by element is right.
"""

from collections.abc import Iterator, Mapping
from typing import Any

import torch
import torch.distributed as dist
from lightning.pytorch.strategies import ModelParallelStrategy
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor

from src.processes import mean


@torch.no_grad()
def local(tensor: Tensor) -> Tensor:
    """This process's part of a sharded tensor, in the same memory; any other as it is."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


@torch.no_grad()
def shard(full: Tensor, like: Tensor) -> Tensor:
    """This process's part of a whole tensor that is cut as `like` is."""
    if not isinstance(like, DTensor):
        return full
    return distribute_tensor(full.to(like.device), like.device_mesh, like.placements, src_data_rank=None).to_local()


@torch.no_grad()
def whole(part: Tensor, like: Tensor) -> Tensor:
    """What all processes' parts make up that are cut as `like` is; all must call it.

    Returns:
        on the CPU of the first process; nothing, (0,), in the others, which need not have room for it.
    """
    if not isinstance(like, DTensor):
        return part
    cut = DTensor.from_local(
        part, like.device_mesh, like.placements, run_check=False, shape=like.shape, stride=like.stride()
    )
    full = cut.full_tensor()
    return full.cpu() if dist.get_rank() == 0 else torch.empty(0)


class Shards:
    """Cuts a network's weights in place, and hands out this process's parts as the optimiser's parameters.

    A step is: `take_gradients`, clip by `norm`, the optimiser's step on `parameters`, which are the network's memory.

    Args:
        net: whole, the same in all processes. Its blocks are the elements of its ModuleLists, whose weights nothing but
            their own forward may use.
        mesh: the processes.
        beside: what learns with the network and stays whole.
    """

    def __init__(self, net: nn.Module, mesh: DeviceMesh, beside: nn.Module | None) -> None:
        for module in [*blocks(net), net]:
            # By default the root keeps its gathered weights after a forward pass, also when an average is swapped out.
            fully_shard(module, mesh=mesh, reshard_after_forward=True)
        self.net = net
        self.names = [name for name, _ in net.named_parameters()]
        self.parameters: list[Tensor] = [nn.Parameter(local(p), p.requires_grad) for p in net.parameters()]
        self.beside = [] if beside is None else list(beside.parameters())

    def to(self, device: torch.device) -> None:
        """Follows the network to where it was moved."""
        for parameter, own in zip(self.parameters, self.net.parameters(), strict=True):
            parameter.data = local(own)

    def named(self) -> Iterator[tuple[str, Tensor]]:
        """As the network's `named_parameters`, of the parts."""
        return zip(self.names, self.parameters, strict=True)

    def cut(self) -> dict[Tensor, Tensor]:
        """The network's sharded parameters by their parts."""
        return dict(zip(self.parameters, self.net.parameters(), strict=True))

    def take_gradients(self) -> None:
        """Moves the network's gradients here, and averages those of what stays whole."""
        for parameter, own in zip(self.parameters, self.net.parameters(), strict=True):
            parameter.grad = None if own.grad is None else local(own.grad)
            own.grad = None
        for parameter in self.beside:
            if parameter.grad is not None:
                mean(parameter.grad)

    def norm(self) -> Tensor:
        """Of the whole gradient, the same in all processes."""
        parts, shared = (
            torch.nn.utils.get_total_norm([p.grad for p in of if p.grad is not None]).double().square()
            for of in (self.parameters, self.beside)
        )
        dist.all_reduce(parts)
        return (parts + shared.to(parts.device)).sqrt().float()

    def give_weights(self) -> None:
        """Nothing to do: they are the network's memory."""


def blocks(module: nn.Module) -> Iterator[nn.Module]:
    """The outermost elements of ModuleLists that have weights."""
    for child in module.children():
        container = isinstance(child, nn.ModuleList | nn.ModuleDict)
        if isinstance(module, nn.ModuleList) and not container and any(True for _ in child.parameters()):
            yield child
        else:
            yield from blocks(child)


class Sharded(ModelParallelStrategy):
    """Lightning's FSDP2, with the checkpoints of any other strategy: whole tensors in one file, by the first process.

    Args:
        processes: over which to shard, all of them.
    """

    restore_checkpoint_after_setup = False
    lightning_restore_optimizer = True

    def __init__(self, processes: int) -> None:
        super().__init__(data_parallel_size=processes, tensor_parallel_size=1, save_distributed_checkpoint=False)

    def lightning_module_state_dict(self) -> dict[str, Any]:
        assert self.lightning_module is not None
        return {name: whole(local(value), value) for name, value in self.lightning_module.state_dict().items()}

    def load_model_state_dict(self, checkpoint: Mapping[str, Any], strict: bool = True) -> None:
        assert self.lightning_module is not None
        state = checkpoint["state_dict"]
        for name, value in self.lightning_module.state_dict().items():
            local(value).copy_(shard(state[name], value))

    def optimizer_state(self, optimizer: Any) -> dict[str, Any]:
        state = optimizer.state_dict()
        return {**state, "state": self._each(optimizer, state["state"], gather=True)}

    def load_optimizer_state_dict(self, checkpoint: Mapping[str, Any]) -> None:
        for optimizer, state in zip(self.optimizers, checkpoint["optimizer_states"], strict=True):
            optimizer.load_state_dict({**state, "state": self._each(optimizer, state["state"], gather=False)})

    def _each(self, optimizer: Any, state: dict[int, dict[str, Any]], gather: bool) -> dict[int, dict[str, Any]]:
        """An optimiser's state by parameter, gathered or shared out: of what has the shape of a sharded parameter."""
        module: Any = self.lightning_module
        cut = module.masters.cut()
        parameters = [p for group in optimizer.param_groups for p in group["params"]]

        def other(value: Any, parameter: Tensor) -> Any:
            like = cut.get(parameter, parameter)
            if not isinstance(value, Tensor) or value.shape != (parameter if gather else like).shape:
                return value
            return whole(value, like) if gather else shard(value, like)

        return {i: {name: other(value, parameters[i]) for name, value in of.items()} for i, of in state.items()}

    def save_checkpoint(self, checkpoint: dict[str, Any], filepath: Any, storage_options: Any | None = None) -> None:
        if self.is_global_zero:
            self.checkpoint_io.save_checkpoint(checkpoint, filepath, storage_options)

    def load_checkpoint(self, checkpoint_path: Any, weights_only: bool | None = None) -> dict[str, Any]:
        return self.checkpoint_io.load_checkpoint(checkpoint_path, weights_only=weights_only)
