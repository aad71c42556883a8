"""The checks chapter: the input contract, which every head checks first."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import helpers
from w2vc.checks import check_inputs
from w2vc.config import Wav2Vec2ConformerConfig
from w2vc.model.features import frame_mask, receptive_field

GOOD = torch.randn(3, 1000, generator=torch.Generator().manual_seed(0))


def mask_of(*lengths: int, dtype: torch.dtype = torch.long) -> torch.Tensor:
    return frame_mask(torch.tensor(lengths), 1000).to(dtype)


@pytest.mark.parametrize("dtype", [torch.bool, torch.int32, torch.int64, torch.float32, torch.uint8])
def test_good_inputs_pass(dtype):
    config = Wav2Vec2ConformerConfig()
    check_inputs(GOOD, None, config)
    check_inputs(GOOD.bfloat16(), mask_of(1000, 400, 777, dtype=dtype), config)


def with_value(value: float, *rows: int) -> torch.Tensor:
    x = GOOD.clone()
    x[list(rows), 5] = value
    return x


@pytest.mark.parametrize(
    ("audio", "mask", "says"),
    [
        ([[0.0] * 1000], None, "list.*float tensor"),
        (GOOD[0], None, r"\(1000,\).*\[None\]"),
        (GOOD[:2][None], None, r"2 channels.*mean\(1\)"),
        (GOOD[:2].T[None], None, r"2 channels.*mean\(2\)"),
        (GOOD[:, None, None], None, r"must be \[B, S\]"),
        (torch.tensor(0.5), None, r"must be \[B, S\]"),
        ((GOOD * 9000).short(), None, "int16.*PCM.*32768"),
        ((GOOD * 9000).int(), None, "int32.*PCM.*2147483648"),
        ((GOOD * 9000).long(), None, "int64.*floating"),
        (GOOD.to(torch.complex64), None, "complex64.*floating"),
        (GOOD[:0], None, "empty"),
        (GOOD[:, :0], None, "empty"),
        (GOOD[:, :399], None, "399 samples.*400"),
        (with_value(float("nan"), 1), None, "NaN or Inf in row 1:"),
        (with_value(float("inf"), 0, 2), None, "NaN or Inf in rows 0, 2:"),
        (GOOD, [[1] * 1000] * 3, "attention_mask is a list"),
        (GOOD, mask_of(1000, 500), r"attention_mask.*\(2, 1000\).*\(3, 1000\)"),
        (GOOD, mask_of(1000, 500, 500)[:, :2], "per sample, not per frame"),
        (GOOD, mask_of(1000, 500, 500).to(torch.complex64), "complex64"),
        (GOOD, mask_of(1000, 500, 500) * 2, "other than 0 and 1 in rows 0, 1, 2"),
        (GOOD, mask_of(1000, 500, 500) * -1, "other than 0 and 1"),
        (GOOD, mask_of(1000, 500, 500).flip(-1), "1 after a 0 in rows 1, 2: pad on the right"),
        (GOOD, mask_of(1000, 399, 500), "fewer than 400 valid samples in row 1 "),
        (GOOD, mask_of(0, 500, 500), "fewer than 400 valid samples in row 0 "),
    ],
)
def test_wrong_inputs_are_named(audio, mask, says):
    with pytest.raises(ValueError, match=says):
        check_inputs(audio, mask, Wav2Vec2ConformerConfig())


def test_only_the_first_five_rows_are_listed():
    with pytest.raises(ValueError, match=r"rows 0, 1, 2, 3, 4, …:"):
        check_inputs(torch.full((9, 400), float("nan")), None, Wav2Vec2ConformerConfig())


def test_off_the_cpu_no_value_is_read():
    """A meta tensor has no values: reading one would raise something else."""
    config = Wav2Vec2ConformerConfig()
    check_inputs(GOOD.to("meta"), mask_of(1, 2, 3).to("meta"), config)
    with pytest.raises(ValueError, match="399"):
        check_inputs(GOOD[:, :399].to("meta"), None, config)
    with pytest.raises(ValueError, match=r"attention_mask is on meta.*leave it on the CPU"):
        check_inputs(GOOD, mask_of(500, 500, 500).to("meta"), config)


def test_the_mask_may_stay_on_the_host():
    """Then its values are read, wherever the sound is."""
    config = helpers.tiny_config()
    check_inputs(GOOD.to("meta"), mask_of(1000, 500, 400), config)
    with pytest.raises(ValueError, match="1 after a 0 in row 1:"):
        check_inputs(GOOD.to("meta"), mask_of(1000, 500, 1000).flip(-1), config)
    width, _ = receptive_field(config.conv_kernel, config.conv_stride)
    with pytest.raises(ValueError, match=r"fewer than .* in row 2 "):
        check_inputs(GOOD.to("meta"), mask_of(1000, 500, width - 1), config)


def test_compiling_and_exporting_skip_the_values():
    config = helpers.tiny_config()

    class Checked(nn.Module):
        def forward(self, x, mask):
            check_inputs(x, mask, config)
            return x + mask

    mask = mask_of(1000, 900, 800)
    # fullgraph: reading a value would break the graph, and that raises
    compiled = torch.compile(Checked(), backend="eager", fullgraph=True)
    assert torch.equal(compiled(GOOD, mask), GOOD + mask)
    samples = torch.export.Dim("samples", min=1000, max=5000)
    exported = torch.export.export(Checked(), (GOOD, mask), dynamic_shapes=[{1: samples}, {1: samples}])
    assert torch.equal(exported.module()(GOOD, mask), GOOD + mask)


@pytest.mark.gpu
def test_on_the_gpu_no_value_is_read():
    x = torch.randn(2, 1000).cuda()
    mask = frame_mask(torch.tensor([1000, 600], device="cuda"), 1000)
    torch.cuda.set_sync_debug_mode("error")  # a host synchronisation raises
    try:
        check_inputs(x, mask, helpers.tiny_config())
    finally:
        torch.cuda.set_sync_debug_mode("default")
