"""A gradient step that the host starts with one launch."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from tensordict import TensorDictBase
from torch import Tensor

_NUM_WARM_UPS = 3
"""Calls before recording: kernels are compiled and chosen, and the optimizer makes its state."""


class Recorded:
    """Work on a CUDA device, recorded as a CUDA graph at the fourth call and replayed from then on.

    The work must do the same at each call but for the contents of its argument and of tensors that live between calls:
    no reading back, no other shapes. On the CPU, which has no graphs, each call does the work, on the same copies.

    Args:
        work (callable): of at most one TensorDict; it returns a tensor or TensorDict.
        device (torch.device): where it runs.
    """

    def __init__(self, work: Callable[..., Any], device: torch.device) -> None:
        self._work = work
        self._device = device
        self._stream = torch.cuda.Stream(device) if device.type == "cuda" else None
        self._graph: torch.cuda.CUDAGraph | None = None
        self._num_calls = 0
        self._inputs: tuple[TensorDictBase, ...] = ()
        self._result: Tensor | TensorDictBase | None = None

    def __call__(self, *inputs: TensorDictBase) -> Any:
        """The work's result, which later calls leave alone.

        Raises:
            ValueError: for another batch size or other entries than at the first call.
        """
        self._receive(inputs)
        self._num_calls += 1
        if self._stream is None:
            return self._run().clone()
        if self._num_calls <= _NUM_WARM_UPS:
            present = torch.cuda.current_stream(self._device)
            self._stream.wait_stream(present)  # gradients belong to the stream that is recorded later
            with torch.cuda.stream(self._stream):
                result = self._run()
            present.wait_stream(self._stream)
            return result.clone()
        if self._graph is None:
            self._graph = torch.cuda.CUDAGraph()
            # Of this thread only: those that read batches may allocate and copy meanwhile.
            with torch.cuda.graph(self._graph, stream=self._stream, capture_error_mode="thread_local"):
                self._result = self._run()
        self._graph.replay()
        assert self._result is not None
        return self._result.clone()

    def _receive(self, inputs: tuple[TensorDictBase, ...]) -> None:
        """Copy to where the graph reads."""
        if self._num_calls == 0:
            self._inputs = tuple(batch.clone() for batch in inputs)
            return
        for copy, batch in zip(self._inputs, inputs, strict=True):
            there, here = ((list(value.batch_size), sorted(value.keys(True, True), key=str)) for value in (copy, batch))
            if there != here:
                raise ValueError(f"batches must have the size and entries of the first, {there}, got {here}")
            copy.update_(batch)

    def _run(self) -> Any:
        return self._work(*(batch.copy() for batch in self._inputs))  # losses write into their batch
