"""A stand-in for a GPU on a machine without one: tensors that are "elsewhere" but keep their values.

Within `Standin()`, what is moved to the device NAME, or made there, becomes an `Elsewhere`: it says that its device is
NAME, computes on a CPU tensor that it hides, and raises RuntimeError where CUDA would, when it meets a tensor of the
CPU that has dimensions. `W2VC_DEVICE=lazy` names it to the switch `best_device()`: of the device types that torch
knows, "lazy" is the one that has no backend of its own but lets gradients be computed.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode, return_and_correct_aliasing
from torch.utils._pytree import tree_leaves, tree_map

NAME = "lazy"
ATEN = torch.ops.aten
MOVES = {ATEN._to_copy, ATEN.copy_, ATEN.to}  # may read from one device and write to another
INDEXED = {ATEN.index.Tensor, ATEN.index_put.default, ATEN.index_put_.default, ATEN._index_put_impl_.default}


def _as_tensors(key: Any) -> Any:
    """Indices with tensors in place of lists and arrays."""
    if isinstance(key, tuple):
        return tuple(_as_tensors(one) for one in key)
    return torch.as_tensor(key) if isinstance(key, (list, range, np.ndarray)) else key


class Elsewhere(Tensor):
    """A tensor on the stand-in device; `held` has its values."""

    held: Tensor

    @staticmethod
    def __new__(cls, held: Tensor) -> Elsewhere:
        return Tensor._make_wrapper_subclass(
            cls,
            held.size(),
            strides=held.stride(),
            storage_offset=held.storage_offset(),
            dtype=held.dtype,
            device=torch.device(NAME),
        )

    def __init__(self, held: Tensor) -> None:
        self.held = held

    def __repr__(self, *, tensor_contents: object = None) -> str:
        """The values, and that they are elsewhere."""
        return f"Elsewhere({self.held!r})"

    def __getitem__(self, key: Any) -> Any:
        """Lists as indices, for which torch looks for a backend."""
        return super().__getitem__(_as_tensors(key))

    def __setitem__(self, key: Any, value: Any) -> None:
        """Lists as indices, for which torch looks for a backend."""
        super().__setitem__(_as_tensors(key), value)

    def __format__(self, spec: str) -> str:
        """One number, as a number."""
        return format(self.item(), spec) if self.dim() == 0 else super().__format__(spec)

    def tolist(self) -> Any:
        """As numbers: allowed on a GPU too."""
        return self.detach().cpu().tolist()

    def numpy(self, *, force: bool = False) -> Any:
        """As a tensor of the GPU: only by force."""
        if not force:
            raise TypeError("can't convert a tensor of the stand-in device to numpy: use .cpu() first")
        return self.detach().cpu().numpy()

    def __array__(self, dtype: Any = None) -> Any:
        """numpy asks by this name."""
        return self.numpy() if dtype is None else self.numpy().astype(dtype)

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Compute, with the device checked first."""
        return compute(func, args, kwargs or {})


def _unwrapped(x: Any) -> Any:
    """What the CPU computes with in place of `x`."""
    if isinstance(x, torch.device):
        return torch.device("cpu")
    return x.held if isinstance(x, Elsewhere) else x


def compute(func: Any, args: Any, kwargs: dict[str, Any]) -> Any:
    """Run an operation on the hidden tensors and say where its result is."""
    leaves = tree_leaves((args, kwargs))
    tensors = [x for x in leaves if isinstance(x, Tensor)]
    away = [x for x in tensors if isinstance(x, Elsewhere)]
    wanted = next((x for x in leaves if isinstance(x, torch.device)), None)
    packet = getattr(func, "overloadpacket", None)
    if wanted is not None:
        result_away = wanted.type == NAME
    elif func is ATEN.copy_.default:
        result_away = isinstance(args[0], Elsewhere)
    else:
        result_away = bool(away)
    if away and packet not in MOVES:
        here = [x for x in tensors if not isinstance(x, Elsewhere) and x.dim()]
        if func in INDEXED and isinstance(args[0], Elsewhere):  # indices may lie on the CPU, values not
            here = [
                x for x in args[2:3] if isinstance(x, Tensor) and not isinstance(x, Elsewhere) and x.dim()
            ]
        if here:
            raise RuntimeError(
                f"{func}: expected all tensors to be on the same device, but found cpu {tuple(here[0].shape)} "
                f"and {NAME} {tuple(away[0].shape)}"
            )
    if (result_away or away) and any(isinstance(x, torch.Generator) for x in leaves):
        raise RuntimeError(f"{func}: expected a generator of the device {NAME}, but found one of the cpu")
    plain = tree_map(_unwrapped, (args, kwargs))
    out = func(*plain[0], **plain[1])
    if packet in {ATEN._to_copy, ATEN.to} or (wanted is not None and not away):
        same = away and result_away and out is away[0].held  # nothing was to be done
        return away[0] if same else Elsewhere(out) if result_away else out
    if not result_away:
        return args[0] if func is ATEN.copy_.default else out
    out = tree_map(lambda x: Elsewhere(x) if isinstance(x, Tensor) else x, out)
    return return_and_correct_aliasing(func, args, kwargs, out)


class Standin(TorchDispatchMode):
    """Sees what is made or moved with `device=`."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Compute, with the device checked first."""
        return compute(func, args, kwargs or {})


class WholeGru(torch.autograd.Function):
    """A GRU as one operation, as on a GPU: step by step in Python it would take minutes."""

    @staticmethod
    def forward(ctx: Any, module: nn.GRU, x: Tensor, *weights: Tensor) -> Tensor:
        if not all(isinstance(t, Elsewhere) for t in (x, *weights)):
            raise RuntimeError("gru: expected all tensors to be on the same device")
        with torch.enable_grad():
            held = [t.held.detach().requires_grad_() for t in (x, *weights)]
            first = torch.zeros(
                module.num_layers * (1 + module.bidirectional), x.shape[0], module.hidden_size
            )
            shape = module.num_layers, 0.0, module.training, module.bidirectional, True
            out = torch._VF.gru(held[0], first, held[1:], module.bias, *shape)[0]
        ctx.held, ctx.out = held, out
        return Elsewhere(out.detach())

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        return None, *map(Elsewhere, torch.autograd.grad(ctx.out, ctx.held, grad.held))


_usual = nn.GRU.forward


def _gru(self: nn.GRU, x: Tensor, hx: Tensor | None = None) -> Any:
    """Take the short way where it gives the same: a batch of equal lengths, no dropout, no state."""
    if not isinstance(x, Elsewhere) or hx is not None or self.dropout or not self.batch_first or x.dim() != 3:
        return _usual(self, x, hx)
    return WholeGru.apply(self, x, *self._flat_weights), None


def _inference_mode(mode: Any = True) -> Any:
    """Plain no_grad: subclasses have no inference tensors."""
    if callable(mode):
        return torch.no_grad()(mode)
    return torch.no_grad() if mode else torch.enable_grad()


def _then_moved(make: Any) -> Any:
    """Make on the CPU, then move: for lists, torch looks for a backend."""

    def made(data: Any, *args: Any, device: Any = None, **kwargs: Any) -> Tensor:
        if device is None or torch.device(device).type != NAME:
            return make(data, *args, device=device, **kwargs)
        return make(data, *args, **kwargs).to(device)

    return made


def start() -> None:
    """Stand in from now on, to the end of this process; best before anything else is imported."""
    usual = torch.autocast.__init__

    def autocast(self: Any, device_type: str, *args: Any, **kwargs: Any) -> None:
        usual(self, "cpu" if device_type == NAME else device_type, *args, **kwargs)

    for name in ("tensor", "as_tensor"):
        setattr(torch, name, _then_moved(getattr(torch, name)))
    torch.inference_mode = _inference_mode  # type: ignore[assignment, misc]
    torch.autocast.__init__ = autocast  # type: ignore[method-assign]
    nn.GRU.forward = _gru  # type: ignore[method-assign]
    Standin().__enter__()
