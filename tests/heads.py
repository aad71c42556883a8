"""The five heads, as data for the tests that they share: quiet configs, models that hide nothing, batches with labels."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import one_hot

import helpers
from w2vc.config import Wav2Vec2ConformerConfig
from w2vc.model import classification, ctc, pretraining, speaker
from w2vc.model.masking import compute_mask_indices
from w2vc.model.negatives import sample_negative_indices

SAMPLES, T = 8_000, 24  # half a second, and its frames
V, N = 32, 5  # tokens; classes or speakers
DENSE: dict[str, Any] = {"tdnn_dilation": (1, 1, 1)}  # without gaps the peer counts a TDNN's frames correctly
SHARED = ("hidden_states", "attentions")  # the fields that come if they are asked for


@dataclass(frozen=True, eq=False)
class Head:
    """A head, and what its contract tests need to know.

    Attributes:
        cls: The class.
        output: What it returns.
        fields: Of the output, with labels, in the documented order.
        parts: First words of the names of its own parameters.
        labels: Makes labels from a generator and the frames of each row.
        loss: Computes the loss once more from an output and its inputs; None where that takes more.
        weights: Shares of the rows in the loss of a batch, from their frames.
        knobs: Of its config.
        mixes: It can read a mixture of layers.
    """

    cls: Any
    output: type
    fields: tuple[str, ...]
    parts: set[str]
    labels: Callable[[torch.Generator, Tensor], dict[str, Tensor]]
    loss: Callable[[Any, Any, dict[str, Tensor]], Tensor] | None
    weights: Callable[[Tensor], Tensor]
    knobs: dict[str, Any] = field(default_factory=dict)
    mixes: bool = True

    def config(self, **knobs: Any) -> Wav2Vec2ConformerConfig:
        """A tiny config without any randomness (but the Gumbel noise in training)."""
        return helpers.quiet_config(**{**self.knobs, **knobs})

    def build(self, training: bool = False, **knobs: Any) -> Any:
        """A model whose norms, biases and statistics are random, so that nothing hides behind 0 or 1."""
        torch.manual_seed(0)
        model = self.cls(self.config(**knobs))
        helpers.randomise_(model)
        if (
            self is SPEAKER
        ):  # with the small first weights frames hardly differ, and gradients vanish in the pooling
            tdnn = [layer.kernel for layer in model.tdnn]
            for layer in (model.projector, *tdnn, model.feature_extractor, model.classifier):
                torch.nn.init.normal_(layer.weight, 0, 1.5 / math.sqrt(layer.in_features))
        return model.train(training)

    def batch(self, padded: bool = False) -> dict[str, Tensor]:
        """Three utterances with labels; `padded` makes the second and the third shorter, and adds the mask."""
        g = torch.Generator().manual_seed(3)
        lengths = torch.tensor([SAMPLES, 6_400 if padded else SAMPLES, 4_800 if padded else SAMPLES])
        mask = (torch.arange(SAMPLES) < lengths[:, None]).long()
        inputs = {"input_values": torch.randn(3, SAMPLES, generator=g) * mask}
        if padded:
            inputs["attention_mask"] = mask
        return {**inputs, **self.labels(g, torch.tensor([24, 19, 14]) if padded else torch.full((3,), T))}

    def row(self, inputs: dict[str, Tensor], row: int) -> tuple[dict[str, Tensor], int]:
        """An utterance of a padded batch alone, without padding; and its frames."""
        size = int(inputs["attention_mask"][row].sum())
        n = int(self.build()._get_feat_extract_output_lengths(size))
        one = {key: value[row : row + 1] for key, value in inputs.items() if key != "attention_mask"}
        one["input_values"] = one["input_values"][:, :size]
        for key, value in one.items():
            if value.shape[1:2] == (T,):  # labels, a mask or negatives of frames
                one[key] = value[:, :n]
        if "sampled_negative_indices" in one:
            one["sampled_negative_indices"] = one["sampled_negative_indices"] - row * T
        return one, n

    def audio(self, inputs: dict[str, Tensor]) -> dict[str, Tensor]:
        """A batch without its labels."""
        return {key: inputs[key] for key in ("input_values", "attention_mask") if key in inputs}


def _texts(g: torch.Generator, frames: Tensor) -> dict[str, Tensor]:
    labels = torch.randint(1, V, (3, 6), generator=g)
    labels[0, 2] = labels[0, 1]  # a repeated letter
    labels[1, 4:] = -100
    labels[2, 3:] = 0  # padded with the blank, as a tokenizer without labels in mind does
    return {"labels": labels}


def _negatives(g: torch.Generator, frames: Tensor) -> dict[str, Tensor]:
    valid = torch.arange(T) < frames[:, None]
    mask = compute_mask_indices((3, T), 0.5, 3, valid, min_masks=2, generator=g)
    negatives = sample_negative_indices((3, T), 10, mask, generator=g)
    return {"mask_time_indices": mask, "sampled_negative_indices": negatives}


def _class_loss(model: Any, output: Any, inputs: dict[str, Tensor]) -> Tensor:
    mask = None
    if output.logits.dim() == 3 and "attention_mask" in inputs:
        mask = model._get_feature_vector_attention_mask(T, inputs["attention_mask"])
    kind = classification.resolve_problem_type(model.config)
    return classification.classification_loss(output.logits.float(), inputs["labels"], kind, mask)


def _ctc_loss(model: Any, output: Any, inputs: dict[str, Tensor]) -> Tensor:
    frames = model._get_feat_extract_output_lengths(inputs["attention_mask"].sum(1))
    return ctc.ctc_loss(output.logits, inputs["labels"], frames).sum()


PRETRAINING = Head(
    pretraining.Wav2Vec2ConformerForPreTraining,
    pretraining.Wav2Vec2ConformerForPreTrainingOutput,
    (
        "loss",
        "projected_states",
        "projected_quantized_states",
        "codevector_perplexity",
        *SHARED,
        "contrastive_loss",
        "diversity_loss",
    ),
    {"quantizer", "project_hid", "project_q"},
    _negatives,
    None,
    torch.ones_like,
    {"mask_time_prob": 0.05, "contrastive_logits_temperature": 0.2, "diversity_loss_weight": 0.3},
    mixes=False,
)
CTC = Head(
    ctc.Wav2Vec2ConformerForCTC,
    ctc.CausalLMOutput,
    ("loss", "logits", *SHARED),
    {"lm_head"},
    _texts,
    _ctc_loss,
    torch.ones_like,
    {"vocab_size": V},
    mixes=False,
)
SEQUENCE = Head(
    classification.Wav2Vec2ConformerForSequenceClassification,
    classification.SequenceClassifierOutput,
    ("loss", "logits", *SHARED),
    {"projector", "classifier"},
    lambda g, frames: {"labels": torch.randint(N, (3,), generator=g)},
    _class_loss,
    lambda frames: torch.full((3,), 1 / 3),
    {"num_labels": N},
)
FRAMES = Head(
    classification.Wav2Vec2ConformerForAudioFrameClassification,
    classification.TokenClassifierOutput,
    ("loss", "logits", *SHARED),
    {"classifier"},
    lambda g, frames: {"labels": one_hot(torch.randint(N, (3, T), generator=g), N)},
    _class_loss,
    lambda frames: frames / frames.sum(),
    {"num_labels": N},
)
SPEAKER = Head(
    speaker.Wav2Vec2ConformerForXVector,
    speaker.XVectorOutput,
    ("loss", "logits", "embeddings", *SHARED),
    {"projector", "tdnn", "feature_extractor", "classifier", "objective"},
    lambda g, frames: {"labels": torch.tensor([4, 0, 2])},
    lambda model, output, inputs: model.objective(output.logits, inputs["labels"]),
    lambda frames: torch.full((3,), 1 / 3),
    {"num_labels": N, "xvector_output_dim": 9, "tdnn_dim": (12, 10, 14), "tdnn_kernel": (3, 3, 1)}
    | {"tdnn_dilation": (1, 3, 1)},
)
HEADS = {
    "pretraining": PRETRAINING,
    "ctc": CTC,
    "sequence": SEQUENCE,
    "frames": FRAMES,
    "speaker": SPEAKER,
}
