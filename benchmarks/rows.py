"""What is measured: a row builds one side of a piece of work. All sides get the same weights and the same inputs."""

from __future__ import annotations

import math
import subprocess
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn

import w2vc
from w2vc import (
    Wav2Vec2ConformerConfig,
    Wav2Vec2ConformerForCTC,
    Wav2Vec2ConformerForPreTraining,
    Wav2Vec2ConformerModel,
)


@dataclass(frozen=True)
class Setting:
    """Where and how large a row runs; "tiny" is for tests and shows only that it runs."""

    device: str = "cpu"
    threads: int = 1
    size: str = "full"
    folder: str = "."  # for the outputs that are compared
    limit: float = (
        12.0  # gigabytes that the peer and our plain forms may take above what they hold at the start
    )


@dataclass
class Work:
    """One side of a row, built and ready to run."""

    call: Callable[[], dict[str, Any]]  # what is timed; it may give its own "seconds" and "cpu"
    check: Callable[[], dict[str, Tensor]] | None = None  # what is compared; None: what `call` gives
    modes: Sequence[str] = ("sdpa",)  # ways to do it
    switch: Callable[[str], None] = lambda mode: None  # chooses one
    dtype: torch.dtype = torch.float32
    about: dict[str, float] = field(default_factory=dict)  # other figures


def build(cls: type[Any], config: Wav2Vec2ConformerConfig, side: str, s: Setting) -> Any:
    """Make the model of one side, "plain", "fast" or "peer", with norms and statistics moved away from 0 and 1."""
    torch.manual_seed(0)
    model, g = cls(config), torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, p in [*model.named_parameters(), *model.named_buffers()]:
            if p.dim() == 1 and p.is_floating_point() and not name.endswith("inv_freq"):
                p.add_(
                    torch.rand(p.shape, generator=g) - 0.5, alpha=0.1 if name.endswith("running_var") else 0.2
                )
    if side == "peer":
        import transformers

        known = transformers.Wav2Vec2ConformerConfig().to_dict()
        same = {name: value for name, value in config.to_dict().items() if name in known}
        theirs = getattr(transformers, cls.__name__)(transformers.Wav2Vec2ConformerConfig(**same))
        theirs.load_state_dict(model.state_dict(), strict=True)
        model = theirs
    if side == "fast" and hasattr(w2vc, "speed_up"):  # an older version may have none
        model = w2vc.speed_up(model)
    return model.to(s.device)


class Switchable:
    """A model whose attention kernel can be chosen between two calls; the peer also tries its own, and to be compiled."""

    def __init__(self, model: Any, side: str, compiled: bool = False) -> None:
        self.model, self.run = model, model
        self.modes = ["eager", "sdpa", *["sdpa, compiled"] * compiled] if side == "peer" else ["sdpa"]

    def switch(self, mode: str) -> None:
        """Choose one of the modes."""
        kernel, _, compiled = mode.partition(", ")
        if len(self.modes) > 1:
            self.model.set_attn_implementation(kernel)
        self.run = torch.compile(self.model) if compiled else self.model

    def __call__(self, *args: Any, **options: Any) -> Any:
        """Run the model as it was last chosen."""
        return self.run(*args, **options)


def choose_config(
    s: Setting, make: Callable[..., Wav2Vec2ConformerConfig], **options: Any
) -> Wav2Vec2ConformerConfig:
    """The config of a row; a tiny one keeps what does not change its size."""
    if s.size != "full":
        sizes = ("num_hidden_layers", *SMALL)
        make, options = (
            Wav2Vec2ConformerConfig.tiny,
            {k: v for k, v in options.items() if k not in sizes} | {"num_negatives": 5},
        )
    return make(**options)


def count_frames(config: Wav2Vec2ConformerConfig, samples: int) -> int:
    """Count the latent frames of so many samples."""
    for kernel, stride in zip(config.conv_kernel, config.conv_stride, strict=True):
        samples = (samples - kernel) // stride + 1
    return samples


def draw_task(config: Wav2Vec2ConformerConfig, frames: Sequence[int], device: str) -> dict[str, Tensor]:
    """Frames to mask and negatives, the same on all sides, for utterances of so many frames."""
    g = torch.Generator().manual_seed(2)
    shape, length = (len(frames), max(frames)), min(10, min(frames) // 2)
    real = torch.arange(max(frames)) < torch.tensor(frames)[:, None]
    mask = w2vc.compute_mask_indices(shape, 0.65, length, real, min_masks=2, generator=g)
    negatives = w2vc.sample_negative_indices(shape, config.num_negatives, mask, generator=g)
    return {"mask_time_indices": mask.to(device), "sampled_negative_indices": negatives.to(device)}


def loss_head(side: str, s: Setting, *, n_rows: int, seconds: float) -> Work:
    """Quantizer and contrastive loss, forward and backward; the encoder's states are given."""
    config = choose_config(s, Wav2Vec2ConformerConfig, num_hidden_layers=1)
    n_rows, seconds = (n_rows, seconds) if s.size == "full" else (2, 0.5)
    model = build(Wav2Vec2ConformerForPreTraining, config, side, s).train()
    model.dropout_features.p = 0.0
    T, g = count_frames(config, round(16_000 * seconds)), torch.Generator().manual_seed(3)
    widths = config.hidden_size, config.conv_dim[-1]
    states, features = (torch.randn(n_rows, T, w, generator=g).to(s.device).requires_grad_() for w in widths)
    given = SimpleNamespace(
        last_hidden_state=states, extract_features=features, hidden_states=None, attentions=None
    )
    model.wav2vec2_conformer = nn.Module()
    model.wav2vec2_conformer.forward = lambda *args, **options: given
    inputs = draw_task(config, [T] * n_rows, s.device)
    leaves = [states, features, *model.parameters()]

    def call() -> dict[str, Tensor]:
        torch.manual_seed(4)  # all draw Gumbel noise alike
        for leaf in leaves:
            leaf.grad = None
        out = model(None, **inputs)
        out.loss.backward()
        names = ("loss", "projected_states", "projected_quantized_states", "codevector_perplexity")
        return {name: out[name].detach() for name in names}

    def check() -> dict[str, Tensor]:
        return call() | {
            "gradients": torch.cat([leaf.grad.flatten() for leaf in leaves if leaf.grad is not None])
        }

    return Work(call, check)


def some_gradients(model: nn.Module) -> Tensor:
    """Up to 64 entries of every parameter's gradient, evenly spread, in the order of the names."""
    grads = [torch.zeros_like(p) if p.grad is None else p.grad for _, p in sorted(model.named_parameters())]
    return torch.cat([g.flatten()[:: max(1, g.numel() // 64)][:64].float() for g in grads])


def training_step(
    side: str, s: Setting, *, lengths: Sequence[float] = (5.0,) * 4, ctc: bool = False, large: bool = False,
    dtype: torch.dtype = torch.float32, compiled: bool = False, checkpointing: bool = False, **options: Any,
) -> Work:  # fmt: skip
    """Forward, loss and backward of a batch; the optimiser's update is the same code on both sides and left out."""
    make = Wav2Vec2ConformerConfig.large if large else Wav2Vec2ConformerConfig
    config = choose_config(s, make, mask_time_prob=0.05, vocab_size=32, layerdrop=0.0, **options)
    if s.size != "full":
        lengths = (0.3, 0.5) if len(set(lengths)) > 1 else (0.5, 0.5)
    sizes, g = [round(16_000 * x) for x in lengths], torch.Generator().manual_seed(3)
    real = torch.arange(max(sizes)) < torch.tensor(sizes)[:, None]
    batch: dict[str, Tensor] = {"input_values": torch.randn(real.shape, generator=g) * real}
    if not real.all():
        batch["attention_mask"] = real.long()
    if ctc:
        model = build(Wav2Vec2ConformerForCTC, config, side, s).train()
        model.config.apply_spec_augment = False  # its spans are drawn from other generators
        model.freeze_feature_encoder()
        batch["labels"] = torch.randint(
            1, 32, (len(sizes), count_frames(config, min(sizes)) // 5), generator=g
        )
    else:
        model = build(Wav2Vec2ConformerForPreTraining, config, side, s).train()
        batch |= draw_task(config, [count_frames(config, n) for n in sizes], s.device)
    if checkpointing:
        model.gradient_checkpointing_enable()
    batch, chosen = {name: x.to(s.device) for name, x in batch.items()}, Switchable(model, side, compiled)

    def call() -> dict[str, Tensor]:
        model.zero_grad(set_to_none=True)
        torch.manual_seed(4)
        with torch.autocast(s.device, dtype, enabled=dtype != torch.float32):
            loss = chosen(**batch).loss
        loss.backward()
        return {"loss": loss.detach()}

    def check() -> dict[str, Tensor]:
        model.eval()  # without dropout, so that two sides can be compared
        found = call() | {"gradients": some_gradients(model)}
        model.train()
        return found

    return Work(call, check, chosen.modes, chosen.switch, dtype, {"seconds of audio": sum(lengths)})


def inference(
    side: str, s: Setting, *, lengths: Sequence[float] = (10.0,), layers: int = 4, dtype: torch.dtype = torch.float32,
    compiled: bool = False, **options: Any,
) -> Work:  # fmt: skip
    """One forward of a batch at the width of the released checkpoints.

    Compared are the real frames, with those that the peer gives for each recording alone: in its padded batch, what stands
    behind the end leaks into them.
    """
    config = choose_config(s, Wav2Vec2ConformerConfig.large, num_hidden_layers=layers, **options)
    if s.size != "full":
        lengths = [max(0.2, x / 20 if max(lengths) < 100 else x / 60) for x in lengths]
    sizes, g = [round(16_000 * x) for x in lengths], torch.Generator().manual_seed(3)
    clips = [torch.randn(n, generator=g).to(s.device, dtype) for n in sizes]
    batch = nn.utils.rnn.pad_sequence(clips, batch_first=True)
    mask = (
        (torch.arange(max(sizes)) < torch.tensor(sizes)[:, None]).long().to(s.device)
        if min(sizes) < max(sizes)
        else None
    )
    chosen = Switchable(build(Wav2Vec2ConformerModel, config, side, s).eval().to(dtype), side, compiled)

    @torch.no_grad()
    def call() -> dict[str, Tensor]:
        return {"states": chosen(batch, attention_mask=mask).last_hidden_state}

    @torch.no_grad()
    def check() -> dict[str, Tensor]:
        if mask is None:
            return call()
        if side == "peer":
            return {"states": torch.cat([chosen(clip[None]).last_hidden_state[0] for clip in clips])}
        frames = [count_frames(config, n) for n in sizes]
        return {"states": torch.cat([row[:n] for row, n in zip(call()["states"], frames, strict=True)])}

    about = {"padding": 1 - sum(sizes) / (len(sizes) * max(sizes)), "seconds of audio": sum(lengths)}
    return Work(call, check, chosen.modes, chosen.switch, dtype, about)


def importing(side: str, s: Setting) -> Work:
    """Import in a fresh interpreter: w2vc beside torch, which it needs anyway."""
    name = "torch" if side == "peer" else "w2vc"
    clocks = "time.perf_counter(), time.process_time()"
    code = f"import time; a, b = {clocks}; import {name}; c, d = {clocks}; print(c - a, d - b)"

    def call() -> dict[str, Any]:
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
        return dict(zip(("seconds", "cpu"), map(float, done.stdout.split()), strict=True))

    return Work(call)


@dataclass(frozen=True)
class Goal:
    """What a row should reach; None: nothing is asked."""

    text: str = "measured"
    ratio: float | None = None  # peer's time over that of the fast forms, at least
    memory: float | None = None  # memory of the fast forms over the peer's, at most
    plain_ratio: float | None = None
    plain_memory: float | None = None
    share: float | None = None  # of the machine's product rate, at least
    gigabytes: float | None = None  # the fast forms hold at most so much above the weights


@dataclass(frozen=True)
class Row:
    """A row of the table; `make(side, setting)` builds a side, and a ratio is reported up to a difference of `tolerance`."""

    name: str
    title: str
    goal: Goal
    make: Callable[[str, Setting], Work]
    repeats: int = 3
    tolerance: float = 5e-5
    device: str = "cpu"
    peer: str = "transformers"
    sides: tuple[str, ...] = ("plain", "fast")


STEP = Goal("plain: no slower, <= 0.8x memory; fast: >= 1.3x faster, <= 0.65x memory", 1.3, 0.65, 1.0, 0.8)
MIXED = Goal("fast: >= 2.5x faster, <= 0.2x memory", 2.5, 0.2)
LONG = Goal("fast: <= 4 GB above the weights", gigabytes=4)
CARD, BF16 = Goal(">= 15 % of the product rate", share=0.15), torch.bfloat16
SMALL: dict[str, Any] = {
    "hidden_size": 256,
    "num_attention_heads": 4,
    "intermediate_size": 1024,
    "conv_dim": [256] * 7,
    "feat_extract_norm": "group",
    "conv_bias": False,
    "layers": 2,
}
FOUR: dict[str, Any] = {"num_hidden_layers": 4}
EIGHT = (2, 3.2, 4.3, 5.5, 6.6, 8.0, 12.0, 16.0)  # seconds; 55 % of the padded batch is padding
TABLE = [
    Row("loss-8x10", "quantizer + contrastive loss, forward and backward, 8 x 10 s", Goal(">= 25x faster, <= 0.04x memory", 25, 0.04), partial(loss_head, n_rows=8, seconds=10.0), sides=("fast",)),
    Row("step", "pre-training step, default config, 4 x 5 s", STEP, training_step),
    Row("step-4", "pre-training step, 4 layers, 4 x 5 s", STEP, partial(training_step, compiled=True, **FOUR)),
    Row("step-4-checkpointing", "pre-training step, 4 layers, gradient checkpointing", Goal(), partial(training_step, checkpointing=True, **FOUR)),
    Row("step-4-mixed", "pre-training step, 4 layers, 4 utterances of 2-11 s", Goal("fast: >= 2x faster", 2.0), partial(training_step, lengths=(2.0, 5.0, 8.0, 11.0), **FOUR), 2, math.inf),
    Row("ctc-step", "CTC fine-tuning step, 4 layers, 4 x 5 s", Goal(), partial(training_step, ctc=True, **FOUR)),
    Row("utterance", "one 10 s utterance, large width, 4 layers, relative", Goal("fast: >= 1.15x faster", 1.15), partial(inference, compiled=True), 7),
    Row("utterance-rotary", "one 10 s utterance, large width, 4 layers, rotary", Goal("fast: >= 1.15x faster", 1.15), partial(inference, position_embeddings_type="rotary"), 7),
    Row("utterance-bf16", "one 10 s utterance, large width, 4 layers, bf16", Goal(), partial(inference, dtype=BF16), 7, 0.1),
    Row("mixed-8", "8 utterances of 2-16 s, 55 % padding", MIXED, partial(inference, lengths=EIGHT)),
    Row("minutes-1", "1 minute in one forward, relative, large width, 4 layers", LONG, partial(inference, lengths=(60.0,)), 2),
    Row("minutes-10", "10 minutes in one forward, relative, large width, 4 layers", LONG, partial(inference, lengths=(600.0,)), 1),
    *(Row(f"length-{n}", f"{n} s through two layers of width 256", Goal(), partial(inference, lengths=(float(n),), **SMALL)) for n in (1, 3, 10, 30, 60)),
    *(Row(f"batch-{n}", f"{n} x 2 s through two layers of width 256", Goal(), partial(inference, lengths=(2.0,) * n, **SMALL)) for n in (1, 4, 8)),
    Row("import", "import w2vc, beside import torch", Goal("<= 1.3x", 1 / 1.3), importing, 5, peer="torch", sides=("fast",)),
    Row("gpu-inference", "GPU, bf16, large config: inference, 16 x 10 s", CARD, partial(inference, dtype=BF16, layers=24, lengths=(10.0,) * 16, compiled=True), 10, 0.1, "cuda"),
    Row("gpu-step", "GPU, bf16, large config: pre-training step, 8 x 10 s", CARD, partial(training_step, large=True, lengths=(10.0,) * 8, dtype=BF16, compiled=True), 5, 0.2, "cuda"),
    Row("gpu-minutes", "GPU, bf16, large config: 10 minutes in one forward", Goal(), partial(inference, lengths=(600.0,), layers=24, dtype=BF16), 3, 0.1, "cuda"),
]  # fmt: skip
ROWS = {row.name: row for row in TABLE}
