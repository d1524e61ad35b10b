"""Networks that a GPU runs from a recording: a small batch is computed sooner than the CPU can launch its kernels."""

import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

MOST = 8  # recordings that one network keeps; each holds an input and an output, and all share the memory between
WARM_UP = 2  # calls beside a recording, in which libraries choose their kernels


def recorded(net: nn.Module) -> nn.Module:
    """The network, which from the second call without gradients on replays what it did as a CUDA graph.

    Each shape and type of its inputs has a graph of its own. What a graph does must depend on its inputs and weights
    alone, and weights be changed in place. Of networks that wait for the device, nothing is recorded.

    Args:
        net: in evaluation, on its GPU; called as net(x, t) or net(x, t, y).
    """
    net.forward = _Recorder(net.forward)
    return net


class _Recorder:
    """The forward pass of a network, and its recordings."""

    def __init__(self, forward: Callable[..., Tensor]) -> None:
        self.forward = forward
        self.known: dict[Any, Callable[..., Tensor] | None] = {}  # who answers; None after the first call
        self.pool: Any = None
        self.most = MOST

    def __call__(self, *inputs: Tensor, **named: Tensor) -> Tensor:
        if named or torch.is_grad_enabled() or torch.is_inference_mode_enabled():
            return self.forward(*inputs, **named)
        try:
            return self._answer(inputs)
        except torch.OutOfMemoryError:
            if self.pool is None:
                raise
        self.known, self.pool, self.most = {}, None, 0  # recordings hold what is wanted
        torch.cuda.empty_cache()
        return self.forward(*inputs)

    def _answer(self, inputs: tuple[Tensor, ...]) -> Tensor:
        dtype = torch.get_autocast_dtype("cuda") if torch.is_autocast_enabled("cuda") else None
        key = (dtype, *((v.shape, v.dtype, v.stride()) for v in inputs))
        if key not in self.known:
            self.known[key] = None if len(self.known) < self.most else self.forward
            return self.forward(*inputs)
        answer = self.known[key]
        if answer is None:
            pool = self.pool or torch.cuda.graph_pool_handle()
            stream = torch.cuda.current_stream()
            try:
                answer = _Graph(self.forward, inputs, dtype, pool)
                self.pool = pool
            except RuntimeError:  # a forward pass that waits for the device, or one that does not fit in twice
                torch.cuda.set_stream(stream)
                answer = self.forward
            self.known[key] = answer
        return answer(*inputs)


class _Graph:
    """One recording."""

    def __init__(
        self, forward: Callable[..., Tensor], inputs: tuple[Tensor, ...], dtype: torch.dtype | None, pool: Any
    ) -> None:
        self.inputs = [v.clone() for v in inputs]
        self.graph = torch.cuda.CUDAGraph()
        # Weights that autocast has cast and kept would be freed with its block: here each replay casts them.
        with torch.autocast("cuda", dtype, enabled=dtype is not None, cache_enabled=False):
            stream = torch.cuda.Stream()
            stream.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(stream), _no_waiting():
                for _ in range(WARM_UP):
                    forward(*self.inputs)
            torch.cuda.current_stream().wait_stream(stream)
            with torch.cuda.graph(self.graph, pool=pool):
                self.output = forward(*self.inputs)

    def __call__(self, *inputs: Tensor) -> Tensor:
        for own, given in zip(self.inputs, inputs, strict=True):
            own.copy_(given)
        self.graph.replay()
        return self.output.clone()  # which the next call overwrites


@contextmanager
def _no_waiting() -> Iterator[None]:
    """Raises RuntimeError where the CPU would wait for the device: in a recording that could not be undone."""
    before = torch.cuda.get_sync_debug_mode()
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Synchronization debug mode")
        torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode(before)
