"""What several test modules share: small configurations, the peer's twin, and one way to compare numbers."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from w2vc.config import Wav2Vec2ConformerConfig
from w2vc.files.pretrained import PreTrainedModel

PARITY = 1e-5  # the largest relative difference allowed in fp32 (design: outputs, losses and gradients alike)
worst: dict[str, float] = {}  # largest difference seen per name; conftest prints it after the run


def remember(gaps: Mapping[str, float]) -> None:
    """Keep the largest difference of each name."""
    for name, gap in gaps.items():
        worst[name] = max(worst.get(name, 0.0), gap)


def tiny_config(**knobs: Any) -> Wav2Vec2ConformerConfig:
    """A config small enough that a whole model runs in milliseconds."""
    return Wav2Vec2ConformerConfig.tiny(**knobs)


def quiet_config(**knobs: Any) -> Wav2Vec2ConformerConfig:
    """A tiny config without dropout, LayerDrop or SpecAugment."""
    names = ["hidden", "activation", "attention", "feat_proj", "conformer_conv", "final", "feat_quantizer"]
    quiet = {f"{name}_dropout": 0.0 for name in names}
    quiet |= {"layerdrop": 0.0, "mask_time_prob": 0.0, "mask_feature_prob": 0.0}
    return tiny_config(**{**quiet, **knobs})


def peer_config(config: Wav2Vec2ConformerConfig, **knobs: Any) -> Any:
    """The same sizes for transformers; eager attention, so that it returns its maps."""
    from transformers import Wav2Vec2ConformerConfig as PeerConfig

    ours = {
        k: v for k, v in config.to_dict().items() if k not in {"attn_implementation", "padding_invariant"}
    }
    ours.pop("hidden_states_pre_norm", None)
    peer = PeerConfig(**ours, **knobs)
    peer._attn_implementation = "eager"
    return peer


def twin(ours: PreTrainedModel) -> Any:
    """transformers' model of the same name with the same weights, loaded strictly in both directions."""
    import transformers

    theirs = getattr(transformers, type(ours).__name__)(peer_config(ours.config))
    theirs.load_state_dict(ours.state_dict(), strict=True)
    ours.load_state_dict(theirs.state_dict(), strict=True)
    return theirs.train(ours.training)


@torch.no_grad()
def randomise_(module: nn.Module, seed: int = 0) -> nn.Module:
    """Give norm weights, biases and running statistics random values, so that nothing hides behind 0 or 1."""
    g = torch.Generator().manual_seed(seed)
    for name, p in sorted(module.named_parameters()):
        if p.dim() <= 1 or "bias" in name or "norm" in name:
            noise = torch.randn(p.shape, generator=g) * 0.2
            p.copy_(noise + (1.0 if "norm" in name and name.endswith("weight") else 0.0))
    for name, b in sorted(module.named_buffers()):
        if name.endswith("running_mean"):
            b.copy_(torch.randn(b.shape, generator=g) * 0.3)
        elif name.endswith("running_var"):
            b.copy_(torch.rand(b.shape, generator=g) + 0.5)
    return module


def difference(ours: Tensor, theirs: Tensor) -> float:
    """Relative difference: max|a-b| / max|b|."""
    assert ours.shape == theirs.shape, f"shapes differ: {tuple(ours.shape)} and {tuple(theirs.shape)}"
    ours, theirs = ours.detach().double(), theirs.detach().double()
    gap = (ours - theirs).abs().max().item() if ours.numel() else 0.0
    scale = theirs.abs().max().item() if theirs.numel() else 0.0
    return gap / scale if scale > 0 else gap


def assert_close(name: str, ours: Tensor, theirs: Tensor, tol: float = PARITY) -> float:
    """Assert that two tensors agree to `tol` relative, and remember the largest difference for the summary."""
    gap = difference(ours, theirs)
    remember({name: gap})
    assert gap <= tol, f"{name}: relative difference {gap:.2e} > {tol:.0e}"  # also fails on NaN
    return gap


def grad_difference(ours: nn.Module, theirs: nn.Module) -> float:
    """Largest gradient difference over all parameters together, relative to the largest gradient of the peer.

    Some true gradients are 0, so a ratio per parameter would compare rounding noise.
    """
    mine, peers = dict(ours.named_parameters()), dict(theirs.named_parameters())
    assert mine.keys() == peers.keys(), sorted(mine.keys() ^ peers.keys())
    gap = scale = 0.0
    for name, p in mine.items():
        a = torch.zeros_like(p) if p.grad is None else p.grad
        b = torch.zeros_like(p) if peers[name].grad is None else peers[name].grad
        gap, scale = max(gap, (a - b).abs().max().item()), max(scale, b.abs().max().item())
    assert scale > 0, "the peer has no gradient at all: nothing was compared"
    return gap / scale


def count_and_die(at: int, work: Callable[[], Any]) -> bool:
    """Run `work` in a child that dies without a word at its `at`-th step on disk; True if it died."""
    child = os.fork()
    if child == 0:  # no clean-up, no exit handlers: as if the power went
        steps = 0

        def dying(real: Any) -> Any:
            def step(*args: Any, **kwargs: Any) -> Any:
                nonlocal steps
                steps += 1
                if steps == at:
                    os._exit(9)
                return real(*args, **kwargs)

            return step

        for name in ("replace", "rename", "fsync", "unlink", "mkdir", "rmdir", "chmod"):
            setattr(os, name, dying(getattr(os, name)))
        try:
            work()
        except BaseException:
            os._exit(1)
        os._exit(0)
    _, status = os.waitpid(child, 0)
    assert os.WEXITSTATUS(status) in (0, 9)
    return os.WEXITSTATUS(status) == 9


def sound(n: int, seed: int = 0, scale: float = 0.1) -> np.ndarray:
    return (scale * np.random.default_rng(seed).standard_normal(n)).astype(np.float32)


def tone(hz: float, rate: int, seconds: float = 1.0) -> np.ndarray:
    return np.sin(2 * np.pi * hz * np.arange(round(rate * seconds)) / rate)
