"""float32 weights behind a bfloat16 network: what an optimiser adds to them would be lost in bfloat16's 8 bits."""

from collections.abc import Iterable, Iterator

import torch
from torch import Tensor, nn

from src.training.sharding import Shards


class MasterWeights:
    """Casts a network to bfloat16, and keeps its weights in float32 for the optimiser, averages and checkpoints.

    (Micikevicius et al. 2018, "Mixed Precision Training", Sec. 3.1.) A step is: `take_gradients`, clip, the optimiser's
    step on `parameters`, `give_weights`. Gradients of accumulated batches are summed in bfloat16.

    Args:
        net: float32; its first argument is cast to bfloat16 on the way in from now on, times and labels are not.
    """

    def __init__(self, net: nn.Module) -> None:
        self.names = [name for name, _ in net.named_parameters()]
        self.parameters: list[torch.Tensor] = [
            nn.Parameter(p.detach().clone(), p.requires_grad) for p in net.parameters()
        ]
        net.to(torch.bfloat16)
        net.register_forward_pre_hook(lambda _, inputs: (inputs[0].to(torch.bfloat16), *inputs[1:]))
        self.net = net

    def to(self, device: torch.device) -> None:
        """Follows the network to its device."""
        for parameter in self.parameters:
            parameter.data = parameter.data.to(device)  # the same object, which the optimiser knows

    def named(self) -> Iterator[tuple[str, Tensor]]:
        """As the network's `named_parameters`."""
        return zip(self.names, self.parameters, strict=True)

    def take_gradients(self) -> None:
        """Moves the network's gradients here."""
        for master, own in zip(self.parameters, self.net.parameters(), strict=True):
            master.grad = None if own.grad is None else own.grad.float()
            own.grad = None

    @torch.no_grad()
    def give_weights(self) -> None:
        """Rounds the weights into the network."""
        torch._foreach_copy_(list(self.net.parameters()), list(self.parameters))

    def load(self, state: dict[str, Tensor]) -> None:
        """Takes the weights of a network's state_dict."""
        with torch.no_grad():
            for name, parameter in self.named():
                parameter.copy_(state[name])
        self.give_weights()


def full_precision(net: nn.Module, masters: MasterWeights | Shards | None) -> Iterable[tuple[str, Tensor]]:
    """The network's weights as the optimiser has them, with their names."""
    return net.named_parameters() if masters is None else masters.named()
