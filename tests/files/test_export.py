"""Export: one program and one file for every batch and length, equal to the model, whole on the disk or not there."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import w2vc.files.export
from w2vc import Wav2Vec2ConformerConfig, Wav2Vec2ConformerForCTC, Wav2Vec2Processor, load_demo, load_speech
from w2vc.files.export import _CTCProgram, export_model, export_onnx, onnx_difference, onnx_session
from w2vc.training.demo import demo_folder

NORMS = ("group", "layer")
KINDS = ("relative", "rotary", None)
SHAPES = ((1, 720), (1, 5000), (3, 9001))


def tiny(norm: str = "group", kind: str | None = "relative") -> Wav2Vec2ConformerForCTC:
    """A model of two layers whose norms and running statistics are not 0 and 1."""
    config = Wav2Vec2ConformerConfig.tiny(
        vocab_size=12, num_hidden_layers=2, feat_extract_norm=norm, position_embeddings_type=kind
    )
    torch.manual_seed(0)
    model = Wav2Vec2ConformerForCTC(config)
    with torch.no_grad():
        for name, tensor in model.state_dict().items():
            if "norm" in name and tensor.is_floating_point():
                tensor.add_(0.1 * torch.rand_like(tensor))
    return model.eval()


def batch(rows: int, samples: int) -> tuple[Tensor, Tensor]:
    audio = torch.randn(rows, samples, generator=torch.Generator().manual_seed(rows + samples))
    mask = torch.ones(rows, samples, dtype=torch.int64)
    for row in range(1, rows):
        mask[row, samples * (rows - row) // rows :] = 0
    return audio, mask


def gap(got: Tensor, want: Tensor) -> float:
    return float((got - want).abs().max() / want.abs().max())


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("kind", KINDS)
@torch.no_grad()
def test_one_program_takes_any_batch_and_length(norm: str, kind: str | None) -> None:
    model = tiny(norm, kind)
    program = export_model(model)
    assert not any("pos_conv_embed" in name for name in program.state_dict)
    run: Any = program.module()
    for shape in SHAPES:
        audio, mask = batch(*shape)
        assert gap(run(audio, mask), model(audio, mask).logits) <= 1e-5
    audio[:] += 100 * (1 - mask)  # what stands in the padding is nobody's business
    together = run(audio, mask)
    for row, n in enumerate(mask.sum(1).tolist()):
        alone = run(audio[row : row + 1, :n], mask[row : row + 1, :n])
        assert gap(together[row : row + 1, : alone.shape[1]], alone) <= 1e-5


@torch.no_grad()
def test_without_a_mask_and_with_one_shape() -> None:
    model = tiny()
    run: Any = export_model(model, with_mask=False).module()
    audio, _ = batch(3, 4000)
    assert gap(run(audio), model(audio).logits) <= 1e-5
    fixed: Any = export_model(model, seconds=0.25, dynamic=False).module()
    audio, mask = batch(2, 4000)
    assert gap(fixed(audio, mask), model(audio, mask).logits) <= 1e-5
    with pytest.raises(Exception, match=r"(?i)guard|size|shape"):
        fixed(*batch(2, 4001))


def test_the_model_is_left_alone_and_weight_norms_are_folded() -> None:
    model = tiny().train()
    torch.nn.utils.parametrizations.weight_norm(model.lm_head)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    stripped = _CTCProgram(model)
    assert model.training
    assert model.config.attn_implementation == "sdpa"
    after = model.state_dict()
    assert before.keys() == after.keys()
    assert all(torch.equal(after[name], tensor) for name, tensor in before.items())
    assert not any("parametrizations" in name for name in stripped.state_dict())
    torch.testing.assert_close(stripped.model.lm_head.weight, model.lm_head.weight)
    assert not any(p.requires_grad for p in stripped.parameters())


def test_wrong_arguments_are_errors() -> None:
    with pytest.raises(ValueError, match="Wav2Vec2ConformerModel"):
        export_model(tiny().wav2vec2_conformer)
    with pytest.raises(ValueError, match=r"seconds=0\.01.*0\.045"):
        export_model(tiny(), seconds=0.01)


def test_the_file_says_what_the_model_says(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny("group", "relative")
    path = export_onnx(model, tmp_path / "new" / "model.onnx")
    assert [file.name for file in path.parent.iterdir()] == ["model.onnx"]
    assert onnx_difference(path, model, SHAPES) <= 1e-5
    with torch.no_grad():
        model.lm_head.weight[3, 5] += 1.0
    assert onnx_difference(path, model, SHAPES) > 1e-3  # the comparison can fail
    facts = onnx_session(path, 1).get_modelmeta().custom_metadata_map
    assert (facts["sampling_rate"], facts["samples_per_frame"], facts["receptive_field"]) == (
        "16000",
        "320",
        "400",
    )

    before = path.read_bytes()
    monkeypatch.setattr(w2vc.files.export.torch.onnx, "export", lambda *a, **k: FullDisk())
    with pytest.raises(OSError, match="no space"):
        export_onnx(model, path)
    assert [file.name for file in path.parent.iterdir()] == ["model.onnx"]
    assert path.read_bytes() == before


class FullDisk:
    """Stands for a converted program that cannot be written to its end."""

    class model:  # noqa: N801
        metadata_props: dict[str, str] = {}  # noqa: RUF012

    def save(self, path: Path, external_data: bool) -> None:
        path.write_bytes(b"half")
        raise OSError("no space left")


@pytest.mark.slow
@pytest.mark.parametrize(
    ("norm", "kind"),
    [("layer", "relative"), ("group", "rotary"), ("layer", "rotary"), ("group", None), ("layer", None)],
)
def test_every_kind_of_model_becomes_a_file(norm: str, kind: str | None, tmp_path: Path) -> None:
    model = tiny(norm, kind)
    assert onnx_difference(export_onnx(model, tmp_path / "m.onnx"), model, SHAPES) <= 1e-5


@pytest.mark.slow
def test_large_models_keep_their_weights_in_a_second_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(w2vc.files.export, "_LARGEST_FILE", 10)
    model = tiny("layer", None)
    path = export_onnx(model, tmp_path / "m.onnx", with_mask=False)
    assert {file.name for file in tmp_path.iterdir()} == {"m.onnx", "m.onnx.data"}
    assert onnx_difference(path, model, SHAPES) <= 1e-5


@pytest.mark.slow
@torch.no_grad()
def test_the_demo_checkpoint(tmp_path: Path) -> None:
    model: Any = load_demo("ctc")
    processor = Wav2Vec2Processor.from_pretrained(demo_folder("ctc"))
    run: Any = export_model(model).module()
    for shape in SHAPES:
        assert gap(run(*batch(*shape)), model(*batch(*shape)).logits) <= 1e-4
    path = export_onnx(model, tmp_path / "demo.onnx", processor=processor)
    assert onnx_difference(path, model, SHAPES) <= 1e-4
    session = onnx_session(path, 1)
    vocabulary = json.loads(session.get_modelmeta().custom_metadata_map["vocabulary"])
    assert vocabulary == [
        processor.tokenizer.convert_ids_to_tokens(k) for k in range(len(processor.tokenizer))
    ]
    u = load_speech("builtin", "test")[0]
    inputs = processor(u.audio, sampling_rate=16000, return_tensors="pt")
    feeds = {
        "input_values": inputs.input_values.numpy(),
        "attention_mask": inputs.attention_mask.numpy().astype("int64"),
    }
    said = processor.batch_decode(torch.from_numpy(session.run(None, feeds)[0]).argmax(-1))
    assert said == processor.batch_decode(model(**inputs).logits.argmax(-1))
