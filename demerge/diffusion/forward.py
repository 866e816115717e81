"""The denoiser's forward passes while images are drawn: all samples share one t.

On a GPU the pass is captured as a CUDA graph, one for each batch shape, and replayed over the
steps, because a small model is bound by the launches of its kernels. In a routed ensemble the
expert of t is looked up on the host, and each expert has graphs of its own.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from demerge.diffusion.adapters import share_weights
from demerge.diffusion.conditioning import Condition
from demerge.diffusion.cuda_graph import capture
from demerge.diffusion.model import Diffusion
from demerge.diffusion.numerics import DTYPES
from demerge.diffusion.routing import RoutedDenoiser

Compute = Callable[[Tensor, Tensor, Condition], Tensor]


class Forward:
    """The predictions of a model: in float32, with weights in bf16, or in fp16 by autocast.

    Weights in bf16 are a copy, unless the model has them already. They are faster than autocast,
    which casts them at each pass, and nearly as exact; fp16 needs autocast, which keeps what may
    overflow in float32.
    """

    def __init__(self, model: Diffusion, mixed_precision: str = "no") -> None:
        self.model, self.dtype = model, DTYPES[mixed_precision]
        self.captures = model.device.type == "cuda"
        self._models: dict[nn.Module, Diffusion] = {}
        self._graphs: dict[tuple[object, ...], CapturedForward] = {}
        self._pool: Any = None

    @torch.inference_mode()
    def __call__(self, x: Tensor, t: Tensor, condition: Condition | None = None) -> Tensor:
        """Return f(x, t, c) [B *] in the dtype of x, for one t, a scalar on the CPU.

        The returned tensor holds until the next call.
        """
        condition = {} if condition is None else condition
        model = self._model_at(t)
        graph = self._graph(model, x, t, condition) if self.captures else None
        if graph is None:
            return self._compute(model, x, t, condition)
        return graph(x, t, condition)

    def _compute(self, model: Diffusion, x: Tensor, t: Tensor, condition: Condition) -> Tensor:
        if self.dtype is None:
            return model.predict(x, t, condition)
        if self.dtype == torch.bfloat16:
            own = {
                name: tensor.to(self.dtype) if tensor.is_floating_point() else tensor
                for name, tensor in condition.items()
            }
            return model.predict(x.to(self.dtype), t, own).to(x.dtype)
        # autocast caches no weight that needs no gradient, and a graph wants no cache
        with torch.autocast(x.device.type, self.dtype, cache_enabled=False):
            return model.predict(x, t, condition).to(x.dtype)

    def _model_at(self, t: Tensor) -> Diffusion:
        """Return the model, or that of the expert whose range holds t, in the dtype of its pass."""
        denoiser = self.model.denoiser
        if isinstance(denoiser, RoutedDenoiser):
            denoiser = denoiser.expert_at(t.item())
        if denoiser not in self._models:
            own = denoiser
            if self.dtype == torch.bfloat16:
                own = share_weights(denoiser, self.dtype).to(self.dtype)
            self._models[denoiser] = self.model.with_denoiser(own)
        return self._models[denoiser]

    def _graph(
        self, model: Diffusion, x: Tensor, t: Tensor, condition: Condition
    ) -> CapturedForward | None:
        """Return the graph of this model and shape; None if it cannot be captured, said once."""
        shapes = tuple(tensor.shape for tensor in condition.values())
        key = (model.denoiser, x.shape, x.dtype, t.dtype, shapes)
        if key in self._graphs:
            return self._graphs[key]

        def compute(x: Tensor, t: Tensor, condition: Condition) -> Tensor:
            return self._compute(model, x, t, condition)

        try:
            # graphs of one pool share memory; no two of them run at the same time
            self._pool = self._pool or torch.cuda.graph_pool_handle()
            self._graphs[key] = CapturedForward(compute, x, t, condition, self._pool)
        except torch.OutOfMemoryError:
            raise
        except RuntimeError as error:
            reason = str(error).partition("\n")[0]
            what = f"the denoiser cannot be captured as a CUDA graph: {reason}"
            warnings.warn(what, RuntimeWarning, stacklevel=2)
            self.captures = False
        return self._graphs.get(key)


class CapturedForward:
    """One denoiser on one batch shape, replayed; it reads its arguments from buffers of its own.

    Raises:
        RuntimeError: if a module cannot be captured.
    """

    def __init__(
        self,
        compute: Compute,
        x: Tensor,
        t: Tensor,
        condition: Condition,
        pool: Any,
    ) -> None:
        self.x, self.t = x.clone(), t.to(x.device).expand(len(x)).clone()
        self.condition = {name: tensor.clone() for name, tensor in condition.items()}
        self._source = condition
        self.graph, self.prediction = capture(
            lambda: compute(self.x, self.t, self.condition), x.device, pool
        )

    def __call__(self, x: Tensor, t: Tensor, condition: Condition) -> Tensor:
        """Replay the pass; the returned tensor holds until the next call."""
        self.x.copy_(x)
        self.t.fill_(t.item())
        if condition is not self._source:
            for name, tensor in condition.items():
                self.condition[name].copy_(tensor)
            self._source = condition
        self.graph.replay()
        return self.prediction
