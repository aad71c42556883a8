"""The checkpoint chapter: weights in and out."""

from __future__ import annotations

import copy
import ctypes
import gc
import importlib
import json
import os
import pickle
import re
import shutil
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from helpers import assert_close, count_and_die, randomise_, tiny_config
from released import stand_in, write_released
from w2vc import AutoProcessor, Wav2Vec2FeatureExtractor, load_speech
from w2vc.config import Wav2Vec2ConformerConfig
from w2vc.files import pretrained
from w2vc.files.pretrained import BASE, PreTrainedModel, best_device, modern_name, read_checkpoint
from w2vc.model.classification import (
    Wav2Vec2ConformerForAudioFrameClassification,
    Wav2Vec2ConformerForSequenceClassification,
)
from w2vc.model.ctc import Wav2Vec2ConformerForCTC
from w2vc.model.pretraining import Wav2Vec2ConformerForPreTraining
from w2vc.model.speaker import Wav2Vec2ConformerForXVector
from w2vc.model.wav2vec2 import Wav2Vec2ConformerModel

KINDS: dict[str, dict[str, Any]] = {
    "relative-group": {},
    "rotary-layer-bias": {
        "position_embeddings_type": "rotary",
        "feat_extract_norm": "layer",
        "conv_bias": True,
    },
    "none-adapter": {"position_embeddings_type": None, "add_adapter": True},
    "wide-adapter-no-mask": {"add_adapter": True, "output_hidden_size": 24, "mask_time_prob": 0.0},
}
kinds = pytest.mark.parametrize("kind", KINDS)
WITHOUT_ADAPTER = [(kind, "Wav2Vec2ConformerForPreTraining") for kind in KINDS if "adapter" not in kind]


def build(cls: type[PreTrainedModel] = Wav2Vec2ConformerModel, seed: int = 0, **knobs: Any) -> Any:
    torch.manual_seed(seed)
    return randomise_(cls(tiny_config(**knobs)), seed).eval()


def same(a: nn.Module, b: nn.Module) -> bool:
    mine, yours = a.state_dict(), b.state_dict()
    return mine.keys() == yours.keys() and all(torch.equal(mine[name], yours[name]) for name in mine)


def edit(folder: Path, change: Callable[[dict[str, Tensor]], dict[str, Tensor] | None]) -> None:
    tensors = load_file(folder / "model.safetensors")
    save_file(change(tensors) or tensors, folder / "model.safetensors", metadata={"format": "pt"})


class WithHead(PreTrainedModel):
    """A stand-in for the heads of later chapters, with their attribute names."""

    def __init__(self, config: Wav2Vec2ConformerConfig) -> None:
        super().__init__(config)
        self.wav2vec2_conformer = Wav2Vec2ConformerModel(config)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size or 1)
        self.layer_weights = nn.Parameter(torch.full((3,), -1.0))
        self.init_weights()


# ---------------------------------------------------------------- there and back


@kinds
def test_save_and_load_gives_the_same_model(kind: str, tmp_path: Path) -> None:
    model = build(**KINDS[kind])
    model.save_pretrained(tmp_path)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["config.json", "model.safetensors"]
    again = Wav2Vec2ConformerModel.from_pretrained(tmp_path)
    assert same(model, again)
    assert not again.training
    assert again.load_report is not None
    assert again.load_report.fits
    assert len(again.load_report.loaded) == len(model.state_dict())
    assert {n: p.requires_grad for n, p in again.named_parameters()} == {
        n: p.requires_grad for n, p in model.named_parameters()
    }
    assert not any(p.requires_grad for n, p in again.named_parameters() if "pos_conv_embed" in n)
    assert not any(
        t.is_meta for part in again.modules() for t in vars(part).values() if isinstance(t, Tensor)
    )
    x = torch.randn(2, 3000)
    assert torch.equal(model(x).last_hidden_state, again(x).last_hidden_state)


def test_a_loaded_model_does_not_hang_on_its_file(tmp_path: Path) -> None:
    build().save_pretrained(tmp_path)
    model = Wav2Vec2ConformerModel.from_pretrained(tmp_path)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    with open(tmp_path / "model.safetensors", "r+b") as file:  # somebody overwrites the file in place
        file.write(b"\xff" * (tmp_path / "model.safetensors").stat().st_size)
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())


@pytest.mark.parametrize("most", [10**9, 20_000])
@pytest.mark.parametrize(
    ("kind", "name"), WITHOUT_ADAPTER + [(kind, "Wav2Vec2ConformerModel") for kind in KINDS]
)
def test_transformers_loads_what_we_save(kind: str, most: int, name: str, tmp_path: Path) -> None:
    import transformers

    cls = {c.__name__: c for c in (Wav2Vec2ConformerModel, Wav2Vec2ConformerForPreTraining)}[name]
    ours = build(cls, **KINDS[kind])
    ours.save_pretrained(tmp_path, max_shard_bytes=most)
    assert (len(list(tmp_path.glob("model-*.safetensors"))) > 1) == (most < 10**9)
    peer, info = getattr(transformers, name).from_pretrained(tmp_path, output_loading_info=True)
    assert not any(info.values()), info
    assert transformers.AutoConfig.from_pretrained(tmp_path).architectures == [name]
    assert {n: t for n, t in peer.state_dict().items() if not torch.equal(t, ours.state_dict()[n])} == {}
    x = torch.randn(2, 3000)
    with torch.no_grad():
        assert_close(f"saved by us, {kind}", ours(x)[0], peer(x)[0])
    assert same(cls.from_pretrained(tmp_path), ours)


@pytest.mark.parametrize("most", ["1GB", "20KB"])
@kinds
def test_we_load_what_transformers_saves(kind: str, most: str, tmp_path: Path) -> None:
    import transformers

    config = transformers.Wav2Vec2ConformerConfig.from_dict(tiny_config(**KINDS[kind]).to_dict())
    peer = randomise_(transformers.Wav2Vec2ConformerModel(config).eval(), 1)
    peer.save_pretrained(tmp_path, max_shard_size=most)
    assert (tmp_path / "model.safetensors.index.json").exists() == (most == "20KB")
    ours = Wav2Vec2ConformerModel.from_pretrained(tmp_path)
    x = torch.randn(2, 3000)
    with torch.no_grad():
        assert_close(f"saved by them, {kind}", ours(x)[0], peer(x)[0])
    ours.save_pretrained(tmp_path)  # over their folder: their shards must go, or they would win
    assert same(Wav2Vec2ConformerModel.from_pretrained(tmp_path), ours)
    assert list(tmp_path.glob("*-of-*")) == []


@pytest.mark.parametrize("sharded", [False, True])
def test_torch_pickles_are_read_as_tensors_only(sharded: bool, tmp_path: Path) -> None:
    model = build()
    model.save_pretrained(tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    (tmp_path / "model.safetensors").unlink()
    if sharded:
        halves = [dict(list(tensors.items())[i::2]) for i in (0, 1)]
        for i, half in enumerate(halves):
            torch.save(half, tmp_path / f"pytorch_model-{i}.bin")
        places = {name: f"pytorch_model-{i}.bin" for i, half in enumerate(halves) for name in half}
        (tmp_path / "pytorch_model.bin.index.json").write_text(json.dumps({"weight_map": places}))
    else:
        torch.save(tensors, tmp_path / "pytorch_model.bin")
    assert same(Wav2Vec2ConformerModel.from_pretrained(tmp_path), model)


@pytest.mark.parametrize("name", ["Wav2Vec2ConformerModel", "Wav2Vec2ConformerForPreTraining"])
def test_both_namings_of_weight_norm(name: str, tmp_path: Path) -> None:
    cls = {c.__name__: c for c in (Wav2Vec2ConformerModel, Wav2Vec2ConformerForPreTraining)}[name]
    model = build(cls)
    model.save_pretrained(tmp_path)

    def old(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        to_old = {
            "parametrizations.weight.original0": "weight_g",
            "parametrizations.weight.original1": "weight_v",
        }
        renamed = {}
        for key, tensor in tensors.items():
            for new_end, old_end in to_old.items():
                key = key.replace(new_end, old_end)  # noqa: PLW2901
            renamed[key] = tensor
        assert len(tensors.keys() - renamed.keys()) == 2
        return renamed

    edit(tmp_path, old)
    assert same(cls.from_pretrained(tmp_path), model)
    edit(tmp_path, lambda t: t | {modern_name(k): v.clone() for k, v in t.items() if k.endswith("weight_g")})
    with pytest.raises(ValueError, match=r"twice.*pos_conv_embed\.conv\.weight_g"):
        cls.from_pretrained(tmp_path)


# ---------------------------------------------------------------- with every head, through the doors of transformers

HEADS: dict[str, type[PreTrainedModel]] = {
    "AutoModel": Wav2Vec2ConformerModel,
    "AutoModelForPreTraining": Wav2Vec2ConformerForPreTraining,
    "AutoModelForCTC": Wav2Vec2ConformerForCTC,
    "AutoModelForAudioClassification": Wav2Vec2ConformerForSequenceClassification,
    "AutoModelForAudioFrameClassification": Wav2Vec2ConformerForAudioFrameClassification,
    "AutoModelForAudioXVector": Wav2Vec2ConformerForXVector,
}
WEIGHTED = {"use_weighted_layer_sum": True, "hidden_states_pre_norm": True}
DOORS = [(door, {}) for door in HEADS] + [(door, WEIGHTED) for door in list(HEADS)[3:]]
doors = pytest.mark.parametrize(("door", "knobs"), DOORS, ids=[d + "-weighted" * bool(k) for d, k in DOORS])
THREE = {"id2label": {0: "yes", 1: "no", 2: "maybe"}, "label2id": {"yes": 0, "no": 1, "maybe": 2}}


def assert_same_outputs(name: str, ours: PreTrainedModel, theirs: Any) -> None:
    x = torch.randn(2, 6000)
    with torch.no_grad():
        mine, yours = ours(x), theirs.eval()(x)
    assert set(mine.keys()) == set(yours.keys())
    for key in mine:
        assert_close(f"{name} {key}", mine[key], yours[key])


@doors
def test_the_auto_classes_of_transformers_open_what_we_save(
    door: str, knobs: dict[str, Any], tmp_path: Path
) -> None:
    import transformers

    ours = build(HEADS[door], **THREE, **knobs)
    ours.save_pretrained(tmp_path)
    theirs, info = getattr(transformers, door).from_pretrained(tmp_path, output_loading_info=True)
    assert not any(info.values()), info
    assert type(theirs).__name__ == type(ours).__name__
    assert theirs.config.id2label == THREE["id2label"]
    assert_same_outputs(f"{door}, saved by us", ours, theirs)


@doors
def test_we_open_every_head_that_transformers_saves(door: str, knobs: dict[str, Any], tmp_path: Path) -> None:
    import transformers

    config = transformers.Wav2Vec2ConformerConfig.from_dict(tiny_config(**THREE, **knobs).to_dict())
    theirs = randomise_(getattr(transformers, HEADS[door].__name__)(config), 3)
    theirs.save_pretrained(tmp_path)
    ours = HEADS[door].from_pretrained(tmp_path)
    assert ours.load_report is not None
    assert len(ours.load_report.loaded) == len(theirs.state_dict())
    assert ours.config.id2label == THREE["id2label"]
    assert_same_outputs(f"{door}, saved by them", ours, theirs)


def test_the_speech_recognition_pipeline_of_transformers(tmp_path: Path) -> None:
    """Model and processor saved by us in one folder are a checkpoint for `transformers.pipeline`."""
    import transformers

    model = stand_in()
    write_released(model, tmp_path / "old")
    processor = AutoProcessor.from_pretrained(tmp_path / "old")
    processor.save_pretrained(tmp_path / "ours")
    model.save_pretrained(tmp_path / "ours")
    sound = [load_speech("builtin")[i].audio for i in (0, 1)]

    peer = transformers.AutoProcessor.from_pretrained(tmp_path / "ours")
    assert type(peer).__name__ == "Wav2Vec2Processor"
    options: dict[str, Any] = {"sampling_rate": 16_000, "padding": True, "return_tensors": "pt"}
    mine, yours = processor(sound, **options), peer(sound, **options)
    assert set(mine) == set(yours) == {"input_values", "attention_mask"}
    assert_close("processor saved by us", mine["input_values"], yours["input_values"])
    assert peer(text="HELLO").input_ids == processor(text="HELLO").input_ids

    listen = transformers.pipeline("automatic-speech-recognition", model=str(tmp_path / "ours"))
    assert type(listen.model).__name__ == "Wav2Vec2ConformerForCTC"
    for audio in sound:
        inputs = processor(audio, sampling_rate=16_000, return_tensors="pt")
        with torch.no_grad():
            text = processor.batch_decode(model(**inputs).logits.argmax(-1))[0]
        assert len(text) > 5
        assert listen({"raw": audio, "sampling_rate": 16_000})["text"] == text


def test_the_audio_classification_pipeline_of_transformers(tmp_path: Path) -> None:
    import transformers

    model = build(Wav2Vec2ConformerForSequenceClassification, **THREE)
    model.save_pretrained(tmp_path)
    Wav2Vec2FeatureExtractor().save_pretrained(tmp_path)
    judge = transformers.pipeline("audio-classification", model=str(tmp_path), top_k=3)
    audio = load_speech("builtin")[0].audio
    inputs = Wav2Vec2FeatureExtractor()(audio, sampling_rate=16_000, return_tensors="pt")
    with torch.no_grad():
        scores = model(**inputs).logits.softmax(-1)[0].tolist()
    for verdict in judge({"raw": audio, "sampling_rate": 16_000}):
        assert verdict["score"] == pytest.approx(scores[THREE["label2id"][verdict["label"]]], abs=1e-5)


# ---------------------------------------------------------------- what must fit, and what need not


def test_the_error_lists_what_is_missing_unexpected_and_misshaped(tmp_path: Path) -> None:
    build().save_pretrained(tmp_path)

    def spoil(tensors: dict[str, Tensor]) -> None:
        del tensors["encoder.layers.0.ffn1.output_dense.bias"]
        tensors["encoder.layers.0.ffn3.weight"] = torch.ones(2)
        tensors["encoder.layer_norm.weight"] = torch.ones(31)

    edit(tmp_path, spoil)
    with pytest.raises(ValueError, match="does not fit Wav2Vec2ConformerModel") as caught:
        Wav2Vec2ConformerModel.from_pretrained(tmp_path)
    message = str(caught.value)
    assert "missing (1): encoder.layers.0.ffn1.output_dense.bias\n" in message
    assert "unexpected (1): encoder.layers.0.ffn3.weight\n" in message
    assert "mis-shaped (1): encoder.layer_norm.weight (file (31,), model (32,))" in message

    with pytest.warns(UserWarning, match=r"newly initialised") as warned:
        model = Wav2Vec2ConformerModel.from_pretrained(tmp_path, strict=False)
    assert Path(warned[0].filename) == Path(__file__)  # the warning points at the caller
    report = model.load_report
    assert report is not None
    assert not report.fits
    assert report.missing == ["encoder.layers.0.ffn1.output_dense.bias"]
    assert report.unexpected == ["encoder.layers.0.ffn3.weight"]
    assert len(report.mismatched) == 1
    assert torch.equal(model.state_dict()["encoder.layers.0.ffn1.output_dense.bias"], torch.zeros(32))
    assert torch.equal(model.state_dict()["encoder.layer_norm.weight"], torch.ones(32))


@pytest.mark.parametrize("name", ["relative-group", "rotary-layer-bias"])
def test_every_single_missing_tensor_is_noticed_and_can_be_started_afresh(name: str, tmp_path: Path) -> None:
    model = build(Wav2Vec2ConformerForPreTraining, **KINDS[name])
    tensors = model.state_dict()
    with torch.device("meta"):
        empty = Wav2Vec2ConformerForPreTraining(model.config)
    for gone in (key for key in tensors if "layers.1" not in key):
        shell = copy.deepcopy(empty)
        rest = {key: tensor for key, tensor in tensors.items() if key != gone}
        if not gone.endswith("masked_spec_embed"):  # an optional part of its own
            with pytest.raises(ValueError, match=rf"missing \(1\): {gone}"):
                pretrained.load_into(shell, dict(rest))
        with pytest.warns(UserWarning, match="newly initialised"):
            report = pretrained.load_into(shell, dict(rest), strict=False)
        assert report.missing + report.newly_initialized == [gone]
        assert torch.isfinite(shell.state_dict()[gone]).all()
        assert sum(not torch.equal(t, tensors[key]) for key, t in shell.state_dict().items()) <= 1


def test_heads_absent_and_foreign(tmp_path: Path) -> None:
    ctc = build(WithHead)
    ctc.save_pretrained(tmp_path / "ctc")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        base = Wav2Vec2ConformerModel.from_pretrained(tmp_path / "ctc")  # the foreign head is ignored
    assert same(base, ctc.wav2vec2_conformer)
    assert base.load_report is not None
    assert sorted(base.load_report.ignored) == ["layer_weights", "lm_head.bias", "lm_head.weight"]

    with pytest.warns(UserWarning, match=r"lacks project_hid, project_q, quantizer: newly initialised"):
        other = Wav2Vec2ConformerForPreTraining.from_pretrained(tmp_path / "ctc")
    assert same(other.wav2vec2_conformer, base)
    assert other.load_report is not None
    assert other.load_report.fits
    assert len(other.load_report.newly_initialized) == 7
    assert 0 <= other.quantizer.codevectors.min() < other.quantizer.codevectors.max() <= 1

    base.save_pretrained(tmp_path / "base")  # a file without the prefix
    with pytest.warns(UserWarning, match=r"lacks layer_weights, lm_head: newly initialised"):
        head = WithHead.from_pretrained(tmp_path / "base", vocab_size=7)
    assert same(head.wav2vec2_conformer, base)
    assert head.lm_head.weight.shape == (7, 32)

    edit(tmp_path / "ctc", lambda t: {k: v for k, v in t.items() if k != "lm_head.bias"})
    with pytest.raises(ValueError, match=r"missing \(1\): lm_head.bias"):  # half a head is no head
        WithHead.from_pretrained(tmp_path / "ctc")
    edit(tmp_path / "ctc", lambda t: {k: v for k, v in t.items() if not k.startswith("lm_head")})
    with pytest.raises(ValueError, match=r"missing \(2\): lm_head.weight, lm_head.bias"):
        WithHead.from_pretrained(tmp_path / "ctc")
    edit(tmp_path / "ctc", lambda t: {k: v for k, v in t.items() if not k.startswith(BASE)})
    with pytest.raises(
        ValueError, match=r"missing \(\d+\): masked_spec_embed|missing \(\d+\): feature_extractor"
    ):
        Wav2Vec2ConformerModel.from_pretrained(tmp_path / "ctc")


def test_adapter_and_mask_vector_come_and_go_with_the_config(tmp_path: Path) -> None:
    plain = build(mask_time_prob=0.0)
    plain.save_pretrained(tmp_path / "plain")
    with pytest.warns(UserWarning, match=r"lacks adapter, masked_spec_embed: newly initialised"):
        model = Wav2Vec2ConformerModel.from_pretrained(
            tmp_path / "plain", add_adapter=True, mask_time_prob=0.1
        )
    assert torch.isfinite(model(torch.randn(1, 3000)).last_hidden_state).all()
    model.save_pretrained(tmp_path / "full")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        again = Wav2Vec2ConformerModel.from_pretrained(
            tmp_path / "full", add_adapter=False, mask_time_prob=0.0
        )
    assert same(again, plain)
    with pytest.raises(ValueError, match=r"(?s)missing.*inv_freq.*unexpected.*linear_pos"):
        Wav2Vec2ConformerModel.from_pretrained(tmp_path / "plain", position_embeddings_type="rotary")
    with pytest.raises(ValueError, match="mis-shaped"):
        Wav2Vec2ConformerModel.from_pretrained(tmp_path / "plain", intermediate_size=48)


# ---------------------------------------------------------------- dtype, device, config


@pytest.mark.parametrize("dtype", [torch.bfloat16, "float16", "torch.float64"])
def test_dtype(dtype: Any, tmp_path: Path) -> None:
    build(Wav2Vec2ConformerForPreTraining, position_embeddings_type="rotary").save_pretrained(tmp_path)
    model = Wav2Vec2ConformerForPreTraining.from_pretrained(tmp_path, dtype=dtype)
    wanted = dtype if isinstance(dtype, torch.dtype) else getattr(torch, dtype.removeprefix("torch."))
    for name, tensor in model.state_dict().items():
        if tensor.is_floating_point():
            assert tensor.dtype == (torch.float32 if name.endswith("inv_freq") else wanted), name
    model.save_pretrained(tmp_path / "again")
    written = json.loads((tmp_path / "again" / "config.json").read_text())
    assert written["dtype"] == str(wanted).removeprefix("torch.")
    again = Wav2Vec2ConformerForPreTraining.from_pretrained(tmp_path / "again")  # None: the file's
    assert again.dtype == wanted
    assert same(again, model)
    if wanted != torch.float64:
        with pytest.warns(UserWarning, match=r"lacks layer_weights, lm_head"):
            head = WithHead.from_pretrained(tmp_path / "again")
        assert head.lm_head.weight.dtype == wanted  # fresh parts follow


def test_rotary_frequencies_are_never_rounded_in_a_file(tmp_path: Path) -> None:
    """Neither by a dtype at loading nor by a cast: other programs compute with what the file holds."""
    model = build(position_embeddings_type="rotary")
    exact = model.encoder.embed_positions.inv_freq.clone()
    model.save_pretrained(tmp_path)
    for half in (Wav2Vec2ConformerModel.from_pretrained(tmp_path, dtype="bfloat16"), model.bfloat16()):
        half.save_pretrained(tmp_path / "half")
        assert torch.equal(
            load_file(tmp_path / "half" / "model.safetensors")["encoder.embed_positions.inv_freq"], exact
        )


def test_rotary_frequencies_of_another_base_are_refused(tmp_path: Path) -> None:
    build(position_embeddings_type="rotary").save_pretrained(tmp_path)
    edit(tmp_path, lambda t: {name: x.bfloat16() if "inv_freq" in name else x for name, x in t.items()})
    Wav2Vec2ConformerModel.from_pretrained(tmp_path)  # rounded to 16 bits they are the same ones
    with pytest.raises(ValueError, match=r"rotary_embedding_base=500.*holds other frequencies"):
        Wav2Vec2ConformerModel.from_pretrained(tmp_path, rotary_embedding_base=500)


def test_bad_dtype_and_overrides(tmp_path: Path) -> None:
    build().save_pretrained(tmp_path)
    for dtype in (torch.int8, "bfloat61", "nn", 16):
        with pytest.raises(ValueError, match=r"^dtype="):
            Wav2Vec2ConformerModel.from_pretrained(tmp_path, dtype=dtype)
    with pytest.raises(ValueError, match="did you mean 'layerdrop'"):
        Wav2Vec2ConformerModel.from_pretrained(tmp_path, layer_drop=0.0)
    model = Wav2Vec2ConformerModel.from_pretrained(
        tmp_path, layerdrop=0.25, attn_implementation="eager", dtype="auto"
    )
    assert (model.config.layerdrop, model.config.attn_implementation, model.dtype) == (
        0.25,
        "eager",
        torch.float32,
    )


def check_device(device: str, folder: Path) -> None:
    build(position_embeddings_type="rotary").save_pretrained(folder)
    with pytest.warns(UserWarning, match=r"lacks adapter"):
        model = Wav2Vec2ConformerModel.from_pretrained(
            folder, device=device, dtype=torch.bfloat16, add_adapter=True
        )
    assert {t.device.type for t in model.state_dict().values()} == {device}
    model.save_pretrained(folder)
    assert same(Wav2Vec2ConformerModel.from_pretrained(folder), model.cpu())


def test_device_cpu(tmp_path: Path) -> None:
    check_device("cpu", tmp_path)


@pytest.mark.gpu
def test_device_cuda(tmp_path: Path) -> None:
    check_device("cuda", tmp_path)


def test_saving_keeps_the_config_files_other_keys(tmp_path: Path) -> None:
    model = build()
    model.config.extra_keys = {
        "torch_dtype": "float16",
        "gradient_checkpointing": True,
        "transformers_version": "4.19.0",
    }
    model.save_pretrained(tmp_path)
    written = json.loads((tmp_path / "config.json").read_text())
    assert written["gradient_checkpointing"] is True
    assert written["transformers_version"] == "4.19.0"
    assert (written["torch_dtype"], written["dtype"]) == ("float32", "float32")  # what the weights are
    assert model.config.extra_keys["torch_dtype"] == "float16"  # the model's own config is not touched
    model.config.hidden_act = torch.sin
    with pytest.raises(ValueError, match=r"^hidden_act="):
        model.save_pretrained(tmp_path)
    assert same(Wav2Vec2ConformerModel.from_pretrained(tmp_path), model)


# ---------------------------------------------------------------- memory


def peak_of(work: Callable[[], Any]) -> tuple[Any, int]:
    """A result, and by how many bytes this process's memory rose at its highest, file pages included."""

    def memory(key: str) -> int:
        return int(re.findall(rf"{key}:\s+(\d+) kB", Path("/proc/self/status").read_text())[0]) * 1024

    gc.collect()
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)  # what earlier tests freed goes back to the system
    if trim:
        trim(0)
    Path("/proc/self/clear_refs").write_text("5")  # forget the highest mark so far
    before = memory("VmRSS")
    result = work()
    return result, memory("VmHWM") - before


@pytest.fixture(scope="module")
def hundred_megabytes(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint of the default width with one layer, written without a model."""
    folder = tmp_path_factory.mktemp("large")
    config = Wav2Vec2ConformerConfig(num_hidden_layers=1)
    with torch.device("meta"):
        shapes = {name: t.shape for name, t in Wav2Vec2ConformerModel(config).state_dict().items()}
    tensors = {name: torch.zeros(shape) for name, shape in shapes.items() if "num_batches" not in name}
    tensors |= {name: torch.tensor(0) for name in shapes if "num_batches" in name}
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    config.save_pretrained(folder)
    return folder


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="reads Linux's memory accounts")
@pytest.mark.parametrize(("dtype", "share"), [(None, 1.0), ("float32", 1.0), ("bfloat16", 0.5)])
def test_no_number_is_in_memory_twice(
    dtype: str | None, share: float, hundred_megabytes: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A load takes the memory of the model as it will be, and one window on the file."""
    monkeypatch.setattr(pretrained, "WINDOW", 8_000_000)
    size = (hundred_megabytes / "model.safetensors").stat().st_size
    assert size > 90e6
    largest = 4 * 768 * 48 * 128
    model, peak = peak_of(lambda: Wav2Vec2ConformerModel.from_pretrained(hundred_megabytes, dtype=dtype))
    assert model.dtype == getattr(torch, dtype or "float32")
    assert share * size * 0.5 < peak < share * size + 8_000_000 + largest + 5_000_000


# ---------------------------------------------------------------- first values


def test_first_values_are_distributed_as_the_peers() -> None:
    """Every parameter: the same constant, or the same mean and deviation within sampling error."""
    import transformers

    sizes = dict(hidden_size=128, intermediate_size=256, num_hidden_layers=1, num_codevectors_per_group=64)
    sizes |= dict(
        codevector_dim=96,
        proj_codevector_dim=80,
        conv_dim=(64,) * 3,
        feat_extract_norm="layer",
        conv_bias=True,
    )
    ours = Wav2Vec2ConformerForPreTraining(tiny_config(**sizes))
    torch.manual_seed(1)
    config = transformers.Wav2Vec2ConformerConfig.from_dict(ours.config.to_dict())
    peer = dict(transformers.Wav2Vec2ConformerForPreTraining(config).named_parameters())
    assert len(peer) == len(list(ours.named_parameters()))
    drawn = 0
    for name, mine in ours.named_parameters():
        a, b = mine.detach().flatten(), peer[name].detach().flatten()
        if b.std() == 0 or len(b) == 1:
            assert torch.equal(a, b), name
            continue
        drawn += 1
        spread = 5 / len(b) ** 0.5  # five standard errors
        assert abs(a.mean() - b.mean()) < spread * b.std() * 1.5, name
        assert abs(a.std() / b.std() - 1) < spread, name
        assert abs(a.abs().max() / b.abs().max() - 1) < 0.5, name  # uniform or normal
    assert drawn == 31


def test_first_values_of_heads_to_come() -> None:
    class XVectorLike(PreTrainedModel):
        def __init__(self, config: Wav2Vec2ConformerConfig) -> None:
            super().__init__(config)
            self.layer_weights = nn.Parameter(torch.zeros(4))
            self.objective = nn.Module()
            self.objective.weight = nn.Parameter(torch.zeros(100, 100))
            self.projector = nn.Linear(100, 100)
            self.init_weights()

    model = XVectorLike(tiny_config(initializer_range=0.5))
    assert torch.equal(model.layer_weights, torch.full((4,), 0.25))
    assert model.objective.weight.std().item() == pytest.approx(1, abs=0.05)
    assert model.projector.weight.std().item() == pytest.approx(0.5, abs=0.03)
    assert not model.projector.bias.any()


def test_dead_positions_start_with_weight_equal_to_direction() -> None:
    conv = Wav2Vec2ConformerModel(tiny_config()).encoder.pos_conv_embed.conv
    length, direction = conv.parametrizations["weight"].values()
    torch.testing.assert_close(
        length, direction.norm(dim=(0, 1), keepdim=True)
    )  # so the kernel is the direction
    assert not conv.bias.any()


def test_nothing_is_initialised_twice(tmp_path: Path) -> None:
    torch.manual_seed(0)
    base = Wav2Vec2ConformerModel(tiny_config())
    torch.manual_seed(0)
    head = Wav2Vec2ConformerForPreTraining(tiny_config())
    assert same(head.wav2vec2_conformer, base)  # not drawn again when the head was
    base.save_pretrained(tmp_path)
    with pytest.warns(UserWarning, match="newly"):
        loaded = Wav2Vec2ConformerForPreTraining.from_pretrained(tmp_path)
    assert same(loaded.wav2vec2_conformer, base)
    assert loaded.load_report is not None
    assert len(loaded.load_report.newly_initialized) == 7  # the head's tensors alone


def test_a_tensor_without_a_rule_is_named(tmp_path: Path) -> None:
    class Strange(WithHead):
        def __init__(self, config: Wav2Vec2ConformerConfig) -> None:
            super().__init__(config)
            self.gain = nn.Parameter(torch.ones(3))

    build().save_pretrained(tmp_path)
    with pytest.raises(RuntimeError, match="gain is not in the file, and there is no rule"):
        Strange.from_pretrained(tmp_path, vocab_size=7)


# ---------------------------------------------------------------- nothing half-written


@pytest.mark.parametrize(("before", "after"), [(10**9, 10**9), (10**9, 150_000), (150_000, 10**9)])
@pytest.mark.filterwarnings("ignore:This process:DeprecationWarning")
def test_a_save_killed_at_any_instant_leaves_the_old_or_the_new_model(
    before: int, after: int, tmp_path: Path
) -> None:
    old, new = build(seed=1), build(seed=2, intermediate_size=48)  # other shapes: a mixture could not load
    old.save_pretrained(tmp_path / "start", max_shard_bytes=before)
    (tmp_path / "start" / "notes.txt").write_text("mine")
    outcomes = []
    for step in range(1, 99):
        folder = tmp_path / f"killed-{step}"
        shutil.copytree(tmp_path / "start", folder)
        died = count_and_die(step, lambda: new.save_pretrained(folder, max_shard_bytes=after))  # noqa: B023
        model = Wav2Vec2ConformerModel.from_pretrained(folder)
        outcomes.append("new" if model.config.intermediate_size == 48 else "old")
        assert same(model, new if outcomes[-1] == "new" else old), step
        model.save_pretrained(folder)  # the folder can be saved to again, and is in order afterwards
        names = {p.name for p in folder.iterdir() if p.name != ".save"}
        assert names == {"config.json", "model.safetensors", "notes.txt"}
        assert same(Wav2Vec2ConformerModel.from_pretrained(folder), model)
        if not died:
            break
    assert outcomes.count("old") >= 4
    assert outcomes.count("new") >= 4
    assert outcomes == sorted(outcomes, reverse=True)  # one instant decides: all old, then all new


def test_a_failed_save_cleans_up(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    old, new = build(seed=1), build(seed=2)
    old.save_pretrained(tmp_path)

    def full(*_: Any, **__: Any) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(pretrained.safetensors.torch, "save_file", full)
        with pytest.raises(OSError, match="No space"):
            new.save_pretrained(tmp_path)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["config.json", "model.safetensors"]
    assert same(Wav2Vec2ConformerModel.from_pretrained(tmp_path), old)


# ---------------------------------------------------------------- files that must not be trusted


def test_truncated_files_are_refused(tmp_path: Path) -> None:
    model = build()
    model.save_pretrained(tmp_path)
    whole = (tmp_path / "model.safetensors").read_bytes()
    for size in (0, 5, 8, 300, len(whole) // 2, len(whole) - 1):
        (tmp_path / "model.safetensors").write_bytes(whole[:size])
        with pytest.raises(ValueError, match=r"model.safetensors is refused: it is damaged or cut short"):
            Wav2Vec2ConformerModel.from_pretrained(tmp_path)
    (tmp_path / "model.safetensors").unlink()
    torch.save(model.state_dict(), tmp_path / "pytorch_model.bin")
    whole = (tmp_path / "pytorch_model.bin").read_bytes()
    for size in (0, 5, len(whole) // 2, len(whole) - 1):
        (tmp_path / "pytorch_model.bin").write_bytes(whole[:size])
        with pytest.raises(ValueError, match=r"pytorch_model.bin is refused"):
            Wav2Vec2ConformerModel.from_pretrained(tmp_path)


class Payload:
    """Unpickling this object creates a file: what a malicious checkpoint could do."""

    def __init__(self, target: Path) -> None:
        self.target = target

    def __reduce__(self) -> Any:
        return (os.mkdir, (str(self.target),))


def test_code_in_a_pickle_is_refused_and_not_run(tmp_path: Path) -> None:
    model = build()
    model.save_pretrained(tmp_path)
    (tmp_path / "model.safetensors").unlink()
    target, path = tmp_path / "owned", tmp_path / "pytorch_model.bin"
    pickle.loads(pickle.dumps(Payload(tmp_path / "proof")))
    assert (tmp_path / "proof").exists()  # the payload works where pickle is trusted
    torch.save({**model.state_dict(), "encoder.layer_norm.weight": Payload(target)}, path)
    with pytest.raises(ValueError, match=r"is refused: it wants to run (posix|nt).mkdir$"):
        Wav2Vec2ConformerModel.from_pretrained(tmp_path)
    path.write_bytes(pickle.dumps(Payload(target), protocol=2))
    with pytest.raises(ValueError, match=r"is refused: it wants to run (posix|nt).mkdir$"):
        Wav2Vec2ConformerModel.from_pretrained(tmp_path, strict=False)
    assert not target.exists()
    for content in ([1, 2], {"a": 1}, torch.ones(2)):
        torch.save(content, path)
        with pytest.raises(ValueError, match="must hold a dict of tensors"):
            Wav2Vec2ConformerModel.from_pretrained(tmp_path)


def test_index_and_shards_must_agree(tmp_path: Path) -> None:
    build().save_pretrained(tmp_path, max_shard_bytes=20_000)
    index = tmp_path / "model.safetensors.index.json"
    good = json.loads(index.read_text())
    assert good["metadata"]["total_size"] == sum(t.nbytes for t in read_checkpoint(tmp_path).values())
    for spoiled in ("{", "[]", "{}", '{"weight_map": 3}', '{"weight_map": {"a": 5}}'):
        index.write_text(spoiled)
        with pytest.raises(ValueError, match="is damaged: it must be JSON with a weight_map"):
            read_checkpoint(tmp_path)
    index.write_text(json.dumps({"weight_map": {"a": "../model.safetensors"}}))
    with pytest.raises(ValueError, match="outside its folder"):
        read_checkpoint(tmp_path)
    first = sorted(set(good["weight_map"].values()))[0]
    index.write_text(json.dumps({"weight_map": good["weight_map"] | {"new.weight": first}}))
    with pytest.raises(ValueError, match=r"lacks tensors that the index promises: new\.weight"):
        read_checkpoint(tmp_path)
    index.write_text(json.dumps(good))
    (tmp_path / first).unlink()
    with pytest.raises(FileNotFoundError, match=f"lacks {first}"):
        read_checkpoint(tmp_path)


def test_nothing_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(FileNotFoundError, match=r"has no config\.json"):
        Wav2Vec2ConformerModel.from_pretrained(tmp_path)
    tiny_config().save_pretrained(tmp_path)
    with pytest.raises(FileNotFoundError, match="has no weights"):
        Wav2Vec2ConformerModel.from_pretrained(tmp_path)
    with pytest.raises(FileNotFoundError, match="neither a folder here nor"):
        Wav2Vec2ConformerModel.from_pretrained(tmp_path / "nowhere")
    hub = pytest.importorskip("huggingface_hub")
    monkeypatch.setattr(hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(hub.constants, "HF_HUB_CACHE", str(tmp_path))
    with pytest.raises(FileNotFoundError, match="outgoing traffic has been disabled"):
        Wav2Vec2ConformerModel.from_pretrained("nobody/nothing")


def test_fairseq_checkpoints_are_sent_to_their_own_door(tmp_path: Path) -> None:
    file = tmp_path / "checkpoint_best.pt"
    torch.save({"model": {}, "cfg": None}, file)
    words = r"checkpoint_best\.pt one of fairseq's checkpoints\? w2vc\.load_fairseq reads those$"
    for cls in (Wav2Vec2ConformerConfig, Wav2Vec2ConformerModel, Wav2Vec2ConformerForCTC, AutoProcessor):
        for place in (file, str(file), tmp_path):
            with pytest.raises(FileNotFoundError, match=words):
                cls.from_pretrained(place)
    assert callable(importlib.import_module("w2vc.files.fairseq").load_fairseq)
    tiny_config().save_pretrained(tmp_path)
    with pytest.raises(FileNotFoundError, match=f"has no weights.*{words}"):
        Wav2Vec2ConformerModel.from_pretrained(tmp_path)
    build().save_pretrained(tmp_path)
    for name in ("model.safetensors", "config.json"):
        with pytest.raises(FileNotFoundError, match=r"is a file, and a checkpoint is a folder$"):
            Wav2Vec2ConformerModel.from_pretrained(tmp_path / name)


def test_the_file_says_format_pt_and_holds_every_tensor(tmp_path: Path) -> None:
    model = build()
    model.save_pretrained(tmp_path)
    with safe_open(tmp_path / "model.safetensors", framework="pt") as file:
        assert file.metadata() == {"format": "pt"}
        assert set(file.keys()) == set(model.state_dict())


# ---------------------------------------------------------------- sizes and small duties


def numbers_of(cls: type[PreTrainedModel], config: Wav2Vec2ConformerConfig) -> tuple[float, int]:
    with torch.device("meta"):
        model = cls(config)
    return round(model.num_parameters() / 1e6, 2), len(model.state_dict())


def test_sizes_of_the_released_models() -> None:
    assert numbers_of(Wav2Vec2ConformerModel, Wav2Vec2ConformerConfig())[0] == 179.73
    large = Wav2Vec2ConformerConfig.large
    assert numbers_of(Wav2Vec2ConformerForPreTraining, large()) == (620.51, 933)
    rotary = large(position_embeddings_type="rotary")
    assert numbers_of(Wav2Vec2ConformerForPreTraining, rotary) == (595.30, 862)
    lm_head = (32 * 1024 + 32) / 1e6  # the CTC head of 32 tokens: one weight, one bias
    for config, millions, tensors in ((large(), 618.59, 928), (rotary, 593.38, 857)):
        base, count = numbers_of(Wav2Vec2ConformerModel, config)
        assert base + lm_head == pytest.approx(millions, abs=0.01)
        assert count + 2 == tensors


def test_small_duties() -> None:
    model = build(Wav2Vec2ConformerForPreTraining)
    base = model.wav2vec2_conformer
    assert model.base_model is base
    assert base.base_model is base
    frozen = sum(p.numel() for p in base.encoder.pos_conv_embed.parameters())
    assert model.num_parameters() - model.num_parameters(only_trainable=True) == frozen
    model.freeze_feature_encoder()
    encoder = sum(p.numel() for p in base.feature_extractor.parameters())
    assert model.num_parameters() - model.num_parameters(only_trainable=True) == frozen + encoder
    model.freeze_base_model()
    assert {n.partition(".")[0] for n, p in model.named_parameters() if p.requires_grad} == {
        "quantizer", "project_hid", "project_q",
    }  # fmt: skip
    model.gradient_checkpointing_enable()
    assert base.encoder.gradient_checkpointing is True
    model.gradient_checkpointing_disable()
    assert base.encoder.gradient_checkpointing is False
    config = tiny_config()
    config.num_attention_heads = 5
    with pytest.raises(ValueError, match=r"^num_attention_heads="):
        Wav2Vec2ConformerModel(config)


def test_saved_files_can_be_read_by_whom_new_files_can(tmp_path: Path) -> None:
    (tmp_path / "new").touch()
    Wav2Vec2ConformerModel(Wav2Vec2ConformerConfig.tiny()).save_pretrained(tmp_path / "model")
    modes = {path.name: path.stat().st_mode for path in (tmp_path / "model").iterdir()}
    assert set(modes.values()) == {(tmp_path / "new").stat().st_mode}, modes


def test_a_head_on_the_encoder_of_another_folder(tmp_path: Path) -> None:
    config = tiny_config(use_weighted_layer_sum=True)
    base = Wav2Vec2ConformerForPreTraining(tiny_config())
    base.save_pretrained(tmp_path / "base")
    whole = Wav2Vec2ConformerForSequenceClassification(config)
    with pytest.raises(ValueError, match=r"encoder='../base' differs from the model's: wav2vec2_conformer\."):
        pretrained.save_head(whole, tmp_path / "head", "../base")
    assert not (tmp_path / "head").exists()
    whole.base_model.load_state_dict(base.base_model.state_dict())
    pretrained.save_head(whole, tmp_path / "head", "../base")
    names = set(load_file(tmp_path / "head" / "model.safetensors"))
    assert names == {name for name in whole.state_dict() if not name.startswith(BASE)}
    joined = Wav2Vec2ConformerForSequenceClassification.from_pretrained(tmp_path / "head")
    assert all(torch.equal(t, whole.state_dict()[name]) for name, t in joined.state_dict().items())
    joined.save_pretrained(tmp_path / "ordinary")  # a folder that needs no other
    shutil.rmtree(tmp_path / "base")
    assert Wav2Vec2ConformerForSequenceClassification.from_pretrained(
        tmp_path / "ordinary"
    ).load_report.loaded
    with pytest.raises(FileNotFoundError, match="base"):
        Wav2Vec2ConformerForSequenceClassification.from_pretrained(tmp_path / "head")


def test_a_head_is_joined_with_one_whole_encoder(tmp_path: Path) -> None:
    base = Wav2Vec2ConformerForPreTraining(tiny_config())
    base.save_pretrained(tmp_path / "base")
    head = Wav2Vec2ConformerForSequenceClassification(tiny_config())
    head.save_pretrained(tmp_path / "both")
    path = tmp_path / "both" / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {pretrained.ENCODER: "../base"}))
    with pytest.raises(ValueError, match="names an encoder's folder and holds an encoder itself"):
        Wav2Vec2ConformerForSequenceClassification.from_pretrained(tmp_path / "both")
    tensors = {name: t for name, t in head.state_dict().items() if not name.startswith(BASE)}
    save_file(tensors, tmp_path / "both" / "model.safetensors")
    save_file({"lm_head.weight": torch.zeros(2, 2)}, tmp_path / "base" / "model.safetensors")
    with pytest.raises(ValueError, match=rf"holds no tensor {BASE}\."):
        Wav2Vec2ConformerForSequenceClassification.from_pretrained(tmp_path / "both")


def test_best_device_is_one_switch(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("W2VC_DEVICE", "cuda:3")
    assert best_device() == torch.device("cuda:3"), "the variable wins, whatever is there"
    monkeypatch.setenv("W2VC_DEVICE", "toaster")
    with pytest.raises(ValueError, match="toaster"):
        best_device()
    monkeypatch.delenv("W2VC_DEVICE")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert best_device().type == "cuda"
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert best_device().type == "cpu"
