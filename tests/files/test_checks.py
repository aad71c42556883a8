"""What is refused: labels, texts that are too long, negatives; and that no value is read where reading costs."""

from __future__ import annotations

import re
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import helpers
from w2vc.checks import (
    MANY_LABELS,
    ONE_LABEL,
    REGRESSION,
    check_feasible,
    check_label_form,
    check_label_values,
    check_labels,
    check_long_enough,
    check_pretraining,
    check_speakers,
    readable,
)
from w2vc.config import Wav2Vec2ConformerConfig
from w2vc.model.pretraining import Wav2Vec2ConformerForPreTraining

V = 32


def compiled(check: Any, *arguments: Any) -> Tensor:
    """Run a check inside one graph; a read value would break the graph, and that raises."""

    class Checked(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            check(*arguments)
            return x + 1

    torch._dynamo.reset()
    return torch.compile(Checked(), backend="eager", fullgraph=True)(torch.zeros(1))


# ---- what may be read


def test_readable_is_the_cpu_and_no_graph(monkeypatch: pytest.MonkeyPatch) -> None:
    assert readable(torch.zeros(1))
    assert not readable(torch.zeros(1, device="meta"))
    monkeypatch.setattr(torch.compiler, "is_compiling", lambda: True)
    assert not readable(torch.zeros(1))


# ---- token ids


@pytest.mark.parametrize(
    ("labels", "message"),
    [
        (torch.full((3, 2), V), rf"labels\[0, 0\] = {V} .*0\.\.{V - 1}.*vocab_size={V}"),
        (torch.tensor([[1, 2], [3, 99], [1, 1]]), r"labels\[1, 1\] = 99"),
        (torch.tensor([[1, 2], [3, -1], [1, 1]]), r"labels\[1, 1\] = -1 .*-100"),
        (torch.ones(2, 2, dtype=torch.long), r"shape \(2, 2\).*batch = 3"),
        (torch.ones(3, dtype=torch.long), r"shape \(3,\)"),
        (torch.ones(3, 2), r"dtype torch\.float32"),
        (torch.ones(3, 2, dtype=torch.bool), r"dtype torch\.bool"),
        (torch.ones(3, 2, dtype=torch.cfloat), r"dtype torch\.complex64"),
        ([[1], [2], [3]], "labels is a list"),
    ],
    ids=str,
)
def test_wrong_labels_are_named(labels: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        check_labels(labels, 3, V)


@pytest.mark.parametrize("dtype", [torch.int16, torch.int32, torch.int64, torch.uint8])
def test_good_labels_pass(dtype: torch.dtype) -> None:
    labels = torch.tensor([[0, V - 1], [3, 100 if dtype == torch.uint8 else -100]], dtype=dtype)
    check_labels(labels, 2, V if dtype != torch.uint8 else 101)
    check_labels(torch.zeros(2, 0, dtype=dtype), 2, V)


# ---- frames that are too few


def test_rows_too_long_for_their_audio_are_named() -> None:
    needed, n_labels, n_frames = torch.tensor([3, 9, 4]), torch.tensor([3, 7, 4]), torch.tensor([3, 8, 9])
    with pytest.raises(
        ValueError,
        match=r"1 of 3 rows.*row 1 has 8 frames and needs 9 \(7 labels, 2 of them repeated\)\. Leave",
    ):
        check_feasible(needed, n_labels, n_frames)
    check_feasible(needed, n_labels, n_frames.clamp(min=9))
    with pytest.raises(ValueError, match=r"7 of 7 rows.*row 4 has .*; …\. Leave them out"):
        check_feasible(torch.full((7,), 5), torch.full((7,), 3), torch.full((7,), 4))
    check_feasible(torch.full((7,), 5), torch.full((7,), 3), torch.full((7,), 5))


def test_lengths_on_a_device_are_not_read() -> None:
    """A meta tensor has no values: reading one would raise something else."""
    many, few = torch.full((2,), 9), torch.full((2,), 2)
    check_feasible(many.to("meta"), many.to("meta"), few.to("meta"))
    check_feasible(many, many, few.to("meta"))
    check_long_enough(few.to("meta"), 9, 9)
    with pytest.raises(ValueError, match=r"row 0 has 2 .*row 1 has 2"):
        check_long_enough(few, 9, 9)


# ---- speakers and classes


def test_a_column_of_speakers_is_read_as_a_row() -> None:
    check_speakers(torch.tensor([[0], [4]]), 2, 5)
    with pytest.raises(ValueError, match=r"labels\[1\] = 5 .*0\.\.4 \(num_labels=5\)"):
        check_speakers(torch.tensor([[0], [5]]), 2, 5)
    with pytest.raises(ValueError, match=r"shape \(2, 2\), expected a tensor \(2,\)"):
        check_speakers(torch.zeros(2, 2, dtype=torch.long), 2, 5)


@pytest.mark.parametrize(
    ("shape", "came", "kind", "left"),
    [
        ((3, 4), (3,), ONE_LABEL, (3,)),
        ((3, 4), (3, 1), ONE_LABEL, (3,)),
        ((3, 7, 4), (3, 7), ONE_LABEL, (3, 7)),
        ((3, 7, 4), (3, 7, 4), ONE_LABEL, (3, 7, 4)),
        ((3, 7, 1), (3, 7), REGRESSION, (3, 7, 1)),
        ((3, 1), (3,), REGRESSION, (3, 1)),
        ((3, 4), (3, 4), REGRESSION, (3, 4)),
        ((3, 7, 4), (3, 7, 4), MANY_LABELS, (3, 7, 4)),
        ((3, 1), (3,), MANY_LABELS, (3, 1)),
    ],
)
def test_every_form_of_class_labels_has_one_shape_behind(
    shape: tuple[int, ...], came: tuple[int, ...], kind: str, left: tuple[int, ...]
) -> None:
    labels = check_label_form(torch.zeros(came, dtype=torch.int16), shape, kind)
    assert tuple(labels.shape) == left
    assert labels.dtype == torch.long


def test_only_labels_that_count_are_judged() -> None:
    labels, counted = torch.tensor([[1, 77]]), torch.tensor([[True, False]])
    check_label_values(labels, counted, 4, ONE_LABEL)
    with pytest.raises(ValueError, match=r"labels\[0, 1\] = 77"):
        check_label_values(labels, ~counted, 4, ONE_LABEL)
    with pytest.raises(ValueError, match=r"labels\[0, 1\] = nan"):  # NaN is neither below 0 nor above 1
        check_label_values(torch.tensor([[0.0, torch.nan]]), counted | True, 2, MANY_LABELS)


# ---- masks and negatives

B, T, N = 2, 9, 3
MASK = torch.ones(B, T, dtype=torch.bool)
NEGATIVES = torch.arange(B * T).view(B, T, 1).repeat(1, 1, N)  # each frame is its own negative: allowed here


def with_value(row: int, frame: int, k: int, value: int) -> Tensor:
    negatives = NEGATIVES.clone()
    negatives[row, frame, k] = value
    return negatives


@pytest.mark.parametrize("dtype", [torch.bool, torch.int32, torch.float32])
@pytest.mark.parametrize("of", [torch.int16, torch.int32, torch.int64])
def test_good_negatives_pass(dtype: torch.dtype, of: torch.dtype) -> None:
    check_pretraining(MASK.to(dtype), NEGATIVES.to(of), (B, T), helpers.tiny_config())
    check_pretraining(MASK, NEGATIVES[..., :0], (B, T), helpers.tiny_config())


@pytest.mark.parametrize(
    ("mask", "negatives", "message"),
    [
        (None, NEGATIVES, "sampled_negative_indices came without mask_time_indices"),
        (MASK[:, 1:], NEGATIVES, rf"mask_time_indices has shape \(2, 8\), .*\({B}, {T}\)"),
        (MASK[0], NEGATIVES, r"mask_time_indices has shape \(9,\)"),
        (MASK, NEGATIVES[:, 1:], r"sampled_negative_indices has shape \(2, 8, 3\), .*\(2, 9\)"),
        (MASK, NEGATIVES[..., 0], r"sampled_negative_indices has shape \(2, 9\)"),
        (MASK, NEGATIVES.tolist(), "sampled_negative_indices is a list"),
        (MASK, NEGATIVES > 0, r"sampled_negative_indices has dtype torch\.bool, expected integers"),
        (MASK, NEGATIVES.float(), r"dtype torch\.float32"),
        (
            MASK,
            with_value(0, 4, 2, T),
            r"sampled_negative_indices\[0, 4, 2\] = 9 .*frames of the utterance itself",
        ),
        (MASK, with_value(1, 0, 1, T - 1), r"sampled_negative_indices\[1, 0, 1\] = 8 .*row \* 9 \+ 0\.\.8"),
        (MASK, with_value(1, 8, 0, B * T), r"sampled_negative_indices\[1, 8, 0\] = 18"),
        (MASK, with_value(0, 0, 0, -1), r"sampled_negative_indices\[0, 0, 0\] = -1"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_wrong_masks_and_negatives_are_named(mask: Any, negatives: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        check_pretraining(mask, negatives, (B, T), helpers.tiny_config())


def test_an_adapter_has_no_loss() -> None:
    with pytest.raises(ValueError, match="add_adapter=True"):
        check_pretraining(MASK, NEGATIVES, (B, T), Wav2Vec2ConformerConfig(add_adapter=True))


def test_negatives_of_frames_that_are_not_scored_may_be_anything() -> None:
    negatives, mask = with_value(0, 4, 2, 999), MASK.clone()
    mask[0, 4] = False
    check_pretraining(mask, negatives, (B, T), helpers.tiny_config())


def test_the_head_refuses_negatives_of_another_utterance() -> None:
    """The loss takes them modulo T: without the check they would silently be frames of the row itself."""
    model = Wav2Vec2ConformerForPreTraining(helpers.tiny_config()).eval()
    values = torch.randn(B, 4000)
    frames = int(model._get_feat_extract_output_lengths(4000))
    mask = torch.ones(B, frames, dtype=torch.bool)
    negatives = torch.arange(B * frames).view(B, frames, 1).roll(1, dims=1)
    inputs = {"input_values": values, "mask_time_indices": mask}
    assert model(**inputs, sampled_negative_indices=negatives).loss.isfinite()
    with pytest.raises(ValueError, match=re.escape(f"sampled_negative_indices[0, 0, 0] = {2 * frames - 1}")):
        model(**inputs, sampled_negative_indices=negatives.flip(0))


# ---- inside a graph


@pytest.mark.parametrize(
    ("check", "arguments"),
    [
        (check_pretraining, (MASK, NEGATIVES.flip(0), (B, T), helpers.tiny_config())),
        (check_speakers, (torch.tensor([1, 99]), 2, 5)),
        (check_label_values, (torch.tensor([9]), torch.tensor([True]), 4, ONE_LABEL)),
        (check_long_enough, (torch.tensor([9, 1]), 9, 5)),
    ],
    ids=lambda value: getattr(value, "__name__", ""),
)
def test_while_a_graph_is_compiled_no_value_is_read(check: Any, arguments: tuple[Any, ...]) -> None:
    with pytest.raises(ValueError, match=r"\[" if check is not check_long_enough else "row 1"):
        check(*arguments)
    assert compiled(check, *arguments).item() == 1
