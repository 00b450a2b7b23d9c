"""A training step as one CUDA graph."""

from __future__ import annotations

from collections.abc import Callable

import torch

Step = Callable[[torch.Tensor], torch.Tensor]


class GraphedStep:
    """The first ``eager`` calls of ``step`` are as they come, all others are replays of a graph.

    ``step`` takes tokens of one shape, that of ``example``, and returns the loss; its optimizer is
    capturable. The graph is captured by the first call that replays it.
    """

    def __init__(self, step: Step, example: torch.Tensor, eager: int) -> None:
        assert eager > 0, "what a step allocates once must not be part of the graph"
        self._step, self._eager = step, eager
        self._tokens = torch.empty_like(example)
        # As torch.cuda.graph captures on a stream of its own: what autograd and the optimizer keep
        # from one step to the next belongs to such a one.
        self._stream = torch.cuda.Stream()
        self._graph: torch.cuda.CUDAGraph | None = None

    def __call__(self, tokens: torch.Tensor) -> torch.Tensor:
        self._tokens.copy_(tokens)
        if self._eager > 0:
            self._eager -= 1
            current = torch.cuda.current_stream()
            self._stream.wait_stream(current)
            with torch.cuda.stream(self._stream):
                loss = self._step(self._tokens)
            current.wait_stream(self._stream)
            return loss
        if self._graph is None:
            self._graph = torch.cuda.CUDAGraph()
            # "thread_local": other threads, such as NCCL's watchdog, may call CUDA meanwhile.
            with torch.cuda.graph(self._graph, capture_error_mode="thread_local"):
                self._loss = self._step(self._tokens)
        self._graph.replay()
        return self._loss.clone()
