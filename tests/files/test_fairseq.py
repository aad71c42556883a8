"""Checkpoints of fairseq: read without running, translated, compared with a plain model in fairseq's own layout.

The fixtures do not pass through our key map. `Plain` is typed out from fairseq's module tree, so its state dict has
fairseq's names and shapes, and its forward is written in fairseq's order, time first, with slow explicit loops. The
settings are pickled as OmegaConf pickles them, by stand-in classes that exist while a fixture is written and not after.
"""

from __future__ import annotations

import argparse
import collections
import contextlib
import io
import json
import math
import operator
import os
import pickle
import subprocess
import sys
import types
import typing
import warnings
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

import w2vc.files.fairseq
from helpers import assert_close, randomise_
from w2vc.files.fairseq import (
    _HEAD_MAP,
    _KEY_MAP,
    _make_tokenizer,
    _map_key,
    _plain_data,
    _read_conv_layers,
    _read_dictionary,
    _read_pickle,
    _Stub,
    convert_fairseq,
    load_fairseq,
    read_fairseq,
    read_torch_file,
)
from w2vc.model.ctc import Wav2Vec2ConformerForCTC
from w2vc.model.pretraining import Wav2Vec2ConformerForPreTraining
from w2vc.text.tokenizer import AutoProcessor, Wav2Vec2Processor


def unpickle(program: bytes) -> Any:
    """What the restricted reader makes of a pickle."""
    return _read_pickle(io.BytesIO(program), len(program))[0]


CONV = "[(12, 10, 5)] + [(12, 3, 2)] * 2 + [(12,2,2)]"
SYMBOLS = ["<s>", "<pad>", "</s>", "<unk>", "|", "E", "T", "A", "O"]


# ---------------------------------------------------------------- a model in fairseq's module tree


class Turn(nn.Module):
    """Swap the last two axes."""

    def forward(self, x: Tensor) -> Tensor:
        return x.transpose(1, 2)


class FeatureModel(nn.Module):
    def __init__(self, layers: list[tuple[int, int, int]], mode: str, bias: bool) -> None:
        super().__init__()
        self.conv_layers, before = nn.ModuleList(), 1
        for i, (channels, kernel, stride) in enumerate(layers):
            parts: list[nn.Module] = [nn.Conv1d(before, channels, kernel, stride, bias=bias), nn.Dropout(0.0)]
            if mode == "layer_norm":
                parts.append(nn.Sequential(Turn(), nn.LayerNorm(channels), Turn()))
            elif i == 0:
                parts.append(nn.GroupNorm(channels, channels))
            self.conv_layers.append(nn.Sequential(*parts, nn.GELU()))
            before = channels

    def forward(self, x: Tensor) -> Tensor:
        x = x[:, None]
        for layer in self.conv_layers:
            x = layer(x)
        return x


class FeedForwardPart(nn.Module):
    def __init__(self, width: int, inner: int) -> None:
        super().__init__()
        self.layer_norm = nn.LayerNorm(width)
        self.w_1, self.w_2 = nn.Linear(width, inner), nn.Linear(inner, width)

    def forward(self, x: Tensor) -> Tensor:
        return self.w_2(nn.functional.silu(self.w_1(self.layer_norm(x))))


class ConvolutionPart(nn.Module):
    def __init__(self, width: int, taps: int) -> None:
        super().__init__()
        self.layer_norm = nn.LayerNorm(width)
        self.pointwise_conv1 = nn.Conv1d(width, 2 * width, 1, bias=False)
        self.depthwise_conv = nn.Conv1d(width, width, taps, padding=taps // 2, groups=width, bias=False)
        self.batch_norm = nn.BatchNorm1d(width)
        self.pointwise_conv2 = nn.Conv1d(width, width, 1, bias=False)

    def forward(self, x: Tensor) -> Tensor:  # [T, B, D], as everywhere in fairseq's encoder
        y = self.pointwise_conv1(self.layer_norm(x).permute(1, 2, 0))
        value, gate = y.chunk(2, 1)
        y = nn.functional.silu(self.batch_norm(self.depthwise_conv(value * gate.sigmoid())))
        return self.pointwise_conv2(y).permute(2, 0, 1)


def sinusoid(distance: int, width: int) -> Tensor:
    """The vector of one distance: sines on even places, cosines on odd ones."""
    speeds = [10000 ** (-2 * i / width) for i in range(width // 2)]
    return torch.tensor([f(distance * speed) for speed in speeds for f in (math.sin, math.cos)])


class Attention(nn.Module):
    def __init__(self, width: int, heads: int, positions: str) -> None:
        super().__init__()
        self.h, self.k = heads, width // heads
        self.linear_q, self.linear_k = nn.Linear(width, width), nn.Linear(width, width)
        self.linear_v, self.linear_out = nn.Linear(width, width), nn.Linear(width, width)
        if positions == "rel_pos":
            self.linear_pos = nn.Linear(width, width, bias=False)
            self.pos_bias_u, self.pos_bias_v = (nn.Parameter(torch.randn(heads, self.k)) for _ in range(2))
        else:
            self.rotary_emb = nn.Module()
            self.rotary_emb.register_buffer("inv_freq", 10000.0 ** (-torch.arange(0, self.k, 2) / self.k))

    def turned(self, x: Tensor) -> Tensor:
        """Rotary positions, on the input of the projections: channel i and i + K/2 of a head turn together."""
        T, B, D = x.shape
        a, b = x.view(T, B, self.h, 2, self.k // 2).unbind(3)
        angle = torch.arange(T)[:, None] * self.rotary_emb.inv_freq
        turned = torch.complex(a, b) * torch.polar(torch.ones_like(angle), angle)[:, None, None]
        return torch.stack([turned.real, turned.imag], 3).reshape(T, B, D)

    def forward(self, x: Tensor, padding: Tensor | None) -> Tensor:
        T, B, D = x.shape
        relative = hasattr(self, "linear_pos")
        turned = x if relative else self.turned(x)
        q, k, v = (
            f(y).view(T, B, self.h, self.k)
            for f, y in ((self.linear_q, turned), (self.linear_k, turned), (self.linear_v, x))
        )
        scores = torch.empty(B, self.h, T, T)
        for i in range(T):
            for j in range(T):
                scores[:, :, i, j] = (q[i] * k[j]).sum(-1)
                if relative:
                    p = self.linear_pos(sinusoid(i - j, D)).view(self.h, self.k)
                    scores[:, :, i, j] = ((q[i] + self.pos_bias_u) * k[j] + (q[i] + self.pos_bias_v) * p).sum(
                        -1
                    )
        scores = scores / math.sqrt(self.k)
        if padding is not None:
            scores = scores.masked_fill(padding[:, None, None], float("-inf"))
        return self.linear_out(torch.einsum("bhij,jbhk->ibhk", scores.softmax(-1), v).reshape(T, B, D))


class Layer(nn.Module):
    def __init__(self, c: dict[str, Any]) -> None:
        super().__init__()
        width, inner = c["encoder_embed_dim"], c["encoder_ffn_embed_dim"]
        self.ffn1 = FeedForwardPart(width, inner)
        self.self_attn_layer_norm = nn.LayerNorm(width)
        self.self_attn = Attention(width, c["encoder_attention_heads"], c["pos_enc_type"])
        self.conv_module = ConvolutionPart(width, c["depthwise_conv_kernel_size"])
        self.ffn2 = FeedForwardPart(width, inner)
        self.final_layer_norm = nn.LayerNorm(width)

    def forward(self, x: Tensor, padding: Tensor | None) -> Tensor:
        x = x + 0.5 * self.ffn1(x)
        x = x + self.self_attn(self.self_attn_layer_norm(x), padding)
        x = x + self.conv_module(x)
        return self.final_layer_norm(x + 0.5 * self.ffn2(x))


class Encoder(nn.Module):
    def __init__(self, c: dict[str, Any]) -> None:
        super().__init__()
        width, groups = c["encoder_embed_dim"], c["conv_pos_groups"]
        unused = nn.Module()  # a convolution under weight norm, which no conformer of fairseq calls
        unused.bias = nn.Parameter(torch.randn(width))
        unused.weight_g = nn.Parameter(torch.rand(1, 1, c["conv_pos"]))
        unused.weight_v = nn.Parameter(torch.randn(width, width // groups, c["conv_pos"]))
        self.pos_conv = nn.Sequential(unused, nn.Identity(), nn.GELU())
        self.layers = nn.ModuleList(Layer(c) for _ in range(c["encoder_layers"]))
        self.layer_norm = nn.LayerNorm(width)

    def forward(self, x: Tensor, padding: Tensor | None) -> Tensor:
        if padding is not None:
            x = x.masked_fill(padding[..., None], 0.0)
        x = x.transpose(0, 1)
        for layer in self.layers:
            x = layer(x, padding)
        return self.layer_norm(x.transpose(0, 1))


class Quantizer(nn.Module):
    def __init__(self, channels: int, codes: int, groups: int, width: int) -> None:
        super().__init__()
        self.vars = nn.Parameter(torch.rand(1, groups * codes, width // groups))
        self.weight_proj = nn.Linear(channels, groups * codes)
        self.groups, self.codes = groups, codes

    def forward(self, x: Tensor) -> Tensor:
        best = self.weight_proj(x).unflatten(-1, (self.groups, self.codes)).argmax(-1)
        books = self.vars[0].view(self.groups, self.codes, -1)
        return torch.cat([books[g][best[..., g]] for g in range(self.groups)], -1)


class Plain(nn.Module):
    """fairseq's Wav2Vec2Model with conformer layers, as far as it runs in eval mode."""

    def __init__(self, c: dict[str, Any], pretraining: bool = True) -> None:
        super().__init__()
        layers = eval(c["conv_feature_layers"])  # as fairseq does; the text is ours
        channels, width = layers[-1][0], c["encoder_embed_dim"]
        self.mask_emb = nn.Parameter(torch.rand(width))
        self.feature_extractor = FeatureModel(layers, c["extractor_mode"], c["conv_bias"])
        self.post_extract_proj = nn.Linear(channels, width) if channels != width else None
        if pretraining:
            final = c["final_dim"] or width
            codes = c["latent_dim"] or final
            self.quantizer = Quantizer(channels, c["latent_vars"], c["latent_groups"], codes)
            self.project_q = nn.Linear(codes, final)
        self.encoder = Encoder(c)
        self.layer_norm = nn.LayerNorm(channels)
        if pretraining:
            self.final_proj = nn.Linear(width, final)
        self.layers = layers

    def forward(self, source: Tensor, lengths: list[int] | None = None) -> dict[str, Tensor]:
        features = self.layer_norm(self.feature_extractor(source).transpose(1, 2))
        padding = None
        if lengths is not None:
            for _, kernel, stride in self.layers:
                lengths = [(n - kernel) // stride + 1 for n in lengths]
            padding = torch.arange(features.shape[1]) >= torch.tensor(lengths)[:, None]
        x = features if self.post_extract_proj is None else self.post_extract_proj(features)
        out = {"features": features, "last": self.encoder(x, padding)}
        if hasattr(self, "quantizer"):
            out |= {"codes": self.project_q(self.quantizer(features)), "states": self.final_proj(out["last"])}
        return out


class PlainCtc(nn.Module):
    """fairseq's Wav2VecCtc around it."""

    def __init__(self, c: dict[str, Any], outputs: int) -> None:
        super().__init__()
        self.w2v_encoder = nn.Module()
        self.w2v_encoder.w2v_model = Plain(c, pretraining=False)
        self.w2v_encoder.proj = nn.Linear(c["encoder_embed_dim"], outputs)

    def forward(self, source: Tensor, lengths: list[int] | None = None) -> Tensor:
        return self.w2v_encoder.proj(self.w2v_encoder.w2v_model(source, lengths)["last"])


# ---------------------------------------------------------------- settings, pickled as fairseq's are


def model_settings(positions: str = "rel_pos", **more: Any) -> dict[str, Any]:
    return {
        "_name": "wav2vec2", "extractor_mode": "layer_norm", "encoder_layers": 2, "encoder_embed_dim": 16,
        "encoder_ffn_embed_dim": 20, "encoder_attention_heads": 2, "activation_fn": "gelu", "layer_type": "conformer",
        "dropout": 0.03, "attention_dropout": 0.4, "activation_dropout": 0.5, "encoder_layerdrop": 0.02,
        "dropout_input": 0.04, "dropout_features": 0.06, "final_dim": 8, "layer_norm_first": True,
        "conv_feature_layers": CONV, "conv_bias": True, "logit_temp": 0.2, "quantize_targets": True,
        "quantize_input": False, "same_quantizer": False, "target_glu": False, "feature_grad_mult": 1.0,
        "quantizer_depth": 1, "quantizer_factor": 3, "latent_vars": 6, "latent_groups": 2, "latent_dim": 0,
        "mask_length": 7, "mask_prob": 0.6, "mask_selection": "static", "mask_other": 0, "no_mask_overlap": False,
        "mask_min_space": 1, "mask_channel_length": 3, "mask_channel_prob": 0.1, "num_negatives": 9,
        "negatives_from_everywhere": False, "cross_sample_negatives": 0, "codebook_negatives": 0, "conv_pos": 8,
        "conv_pos_groups": 4, "latent_temp": [2.0, 0.1, 0.999995], "max_positions": 100000, "attn_type": "espnet",
        "pos_enc_type": positions, "depthwise_conv_kernel_size": 5, "crop_seq_to_multiple": 1,
        "fp16": "${common.fp16}", **more,
    }  # fmt: skip


def pretraining_cfg(model: dict[str, Any]) -> dict[str, Any]:
    return {
        "_name": None,
        "common": {"fp16": True, "seed": 1},
        "task": {"_name": "audio_pretraining", "data": "/manifest", "normalize": True, "labels": None},
        "criterion": {"_name": "wav2vec", "infonce": True, "loss_weights": [0.3, 0]},
        "model": model,
    }


def ctc_cfg(model: dict[str, Any], **head: Any) -> dict[str, Any]:
    tuned = {
        "_name": "wav2vec_ctc", "w2v_path": "/before.pt", "apply_mask": True, "mask_prob": 0.5, "mask_length": 10,
        "mask_channel_prob": 0.25, "mask_channel_length": 6, "layerdrop": 0.15, "dropout": 0.0, "dropout_input": 0.0,
        "final_dropout": 0.07, "activation_dropout": 0.1, "feature_grad_mult": 0.0, "normalize": "${task.normalize}",
        "blank_weight": 0.0, "w2v_args": pretraining_cfg(model) | {"criterion": None}, **head,
    }  # fmt: skip
    task = {"_name": "audio_finetuning", "data": "/manifest", "normalize": True, "labels": "ltr"}
    return {
        "common": {"fp16": True},
        "task": task,
        "criterion": {"_name": "ctc", "zero_infinity": True},
        "model": tuned,
    }


CLASSES = {
    "omegaconf.dictconfig": "DictConfig", "omegaconf.listconfig": "ListConfig", "omegaconf.nodes": "AnyNode",
    "omegaconf.base": "ContainerMetadata", "fairseq.data.dictionary": "Dictionary",
}  # fmt: skip


@contextlib.contextmanager
def stand_ins() -> Iterator[dict[str, type]]:
    """Classes under the names of OmegaConf's and fairseq's, importable only inside the `with`."""
    made, found = {}, {}
    for module, name in CLASSES.items():
        found[name] = type(name, (), {"__module__": module})
        for part in (module.partition(".")[0], module.rpartition(".")[0], module):
            made.setdefault(part, types.ModuleType(part))
        setattr(made[module], name, found[name])
    real = {name: sys.modules[name] for name in made if name in sys.modules}  # OmegaConf, if it is installed
    sys.modules.update(made)
    try:
        yield found
    finally:
        for name in made:
            del sys.modules[name]
        sys.modules.update(real)


def node(value: Any, classes: dict[str, type], parent: Any = None) -> Any:
    """Wrap plain data as OmegaConf keeps it: a node for each value, which knows its parent."""
    kind = {dict: "DictConfig", list: "ListConfig"}.get(type(value), "AnyNode")
    made: Any = classes[kind]()
    made._metadata = classes["ContainerMetadata"]()
    made._metadata.__dict__ |= {"ref_type": typing.Any, "object_type": dict, "flags": {}, "key": None}
    made._metadata.resolver_cache = collections.defaultdict(dict)
    made._parent = parent
    if kind == "AnyNode":
        made._val = value
    elif kind == "ListConfig":
        made._content = [node(entry, classes, made) for entry in value]
    else:
        made._content = {key: node(entry, classes, made) for key, entry in value.items()}
    return made


def save(
    path: Path,
    model: dict[str, Tensor],
    cfg: dict[str, Any],
    form: str = "omegaconf",
    *,
    symbols: list[str] | None = None,
    legacy: bool = False,
    **more: Any,
) -> Path:
    """Write a checkpoint with the entries that fairseq writes."""
    with stand_ins() as classes:
        task_state = {}
        if symbols:
            task_state["target_dictionary"] = dictionary = classes["Dictionary"]()
            dictionary.__dict__ |= {"symbols": symbols, "count": [1] * len(symbols), "bos_word": "<s>"}
        content = {
            "args": None,
            "cfg": node(cfg, classes) if form == "omegaconf" else cfg,
            "model": model,
            "criterion": None,
            "optimizer_history": [
                {"optimizer_name": "FairseqAdam", "lr_scheduler_state": {}, "num_updates": 5}
            ],
            "task_state": task_state,
            "extra_state": {"metrics": collections.OrderedDict(default=[]), "previous_training_time": 1.5},
            "last_optimizer_state": {"state": {0: {"step": 5, "exp_avg": torch.ones(3)}}},
        }
        if form == "namespace":
            content |= {"cfg": None, "args": argparse.Namespace(**cfg)}
        torch.save(content | more, path, _use_new_zipfile_serialization=not legacy)
    return path


def built(positions: str, kind: str, **more: Any) -> tuple[nn.Module, dict[str, Any]]:
    """A plain model with weights that hide nothing, and its settings."""
    torch.manual_seed(3)
    c = model_settings(positions, **more)
    plain = randomise_(Plain(c) if kind == "pretraining" else PlainCtc(c, len(SYMBOLS)), seed=4)
    return plain.eval(), pretraining_cfg(c) if kind == "pretraining" else ctc_cfg(c)


def quietly(call: Callable[..., Any], *args: Any, **options: Any) -> Any:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        return call(*args, **options)


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> dict[tuple[str, str], tuple[nn.Module, Path]]:
    """One checkpoint of each kind: rel_pos and rope, pre-trained and fine-tuned."""
    made = {}
    for positions in ("rel_pos", "rope"):
        for kind in ("pretraining", "ctc"):
            plain, cfg = built(positions, kind)
            path = tmp_path_factory.mktemp("pt") / f"{kind}.pt"
            made[positions, kind] = (
                plain,
                save(path, plain.state_dict(), cfg, symbols=SYMBOLS if kind == "ctc" else None),
            )
    return made


SOUND = torch.randn(2, 900, generator=torch.Generator().manual_seed(1))
LENGTHS = [900, 610]
MASK = (torch.arange(900) < torch.tensor(LENGTHS)[:, None]).long()
POSITIONS = pytest.mark.parametrize("positions", ["rel_pos", "rope"])


# ---------------------------------------------------------------- the same numbers


@POSITIONS
@torch.no_grad()
def test_a_pretrained_model_gives_fairseqs_numbers(files: dict[Any, Any], positions: str) -> None:
    plain, path = files[positions, "pretraining"]
    model = load_fairseq(path, padding_invariant=False)  # fairseq's convolutions see the padding
    assert isinstance(model, Wav2Vec2ConformerForPreTraining)
    assert not model.training
    for mask, lengths in ((None, None), (MASK, LENGTHS)):
        theirs = plain(SOUND, lengths)
        base = model.wav2vec2_conformer(SOUND, attention_mask=mask)
        ours = model(SOUND, attention_mask=mask)
        name = f"fairseq {positions}"
        assert_close(f"{name} features", base.extract_features, theirs["features"])
        assert_close(f"{name} last_hidden_state", base.last_hidden_state, theirs["last"])
        assert_close(f"{name} projected_states", ours.projected_states, theirs["states"])
        assert_close(f"{name} projected_quantized_states", ours.projected_quantized_states, theirs["codes"])
    assert model.load_report is not None
    assert model.load_report.fits
    assert len(model.load_report.loaded) == len(model.state_dict())


@POSITIONS
@torch.no_grad()
def test_a_fine_tuned_model_gives_fairseqs_numbers(files: dict[Any, Any], positions: str) -> None:
    plain, path = files[positions, "ctc"]
    model = quietly(load_fairseq, path, padding_invariant=False)
    assert isinstance(model, Wav2Vec2ConformerForCTC)
    for mask, lengths in ((None, None), (MASK, LENGTHS)):
        logits = model(SOUND, attention_mask=mask).logits
        assert_close(f"fairseq {positions} logits", logits, plain(SOUND, lengths))


@torch.no_grad()
def test_group_norm_without_projection_gets_an_identity(tmp_path: Path) -> None:
    same = {
        "extractor_mode": "default",
        "conv_bias": False,
        "encoder_embed_dim": 12,
        "encoder_attention_heads": 3,
    }
    plain, cfg = built("rel_pos", "pretraining", **same)
    assert "post_extract_proj.weight" not in plain.state_dict()
    path = save(tmp_path / "base.pt", plain.state_dict(), cfg)
    with pytest.warns(UserWarning, match="post_extract_proj is not in the file"):
        model = load_fairseq(path)
    assert model.config.feat_extract_norm == "group"
    assert_close(
        "fairseq group norm", model.wav2vec2_conformer(SOUND).last_hidden_state, plain(SOUND)["last"]
    )
    assert read_fairseq(path).feature_extractor.return_attention_mask is False
    del (state := plain.state_dict())["layer_norm.weight"]  # what is lacking besides is still missed
    with pytest.raises(
        ValueError, match=r"missing \(1\): wav2vec2_conformer.feature_projection.layer_norm.weight"
    ):
        quietly(load_fairseq, save(path, state, cfg))


def test_every_name_of_the_module_tree_is_in_the_map(files: dict[Any, Any]) -> None:
    names = {name for plain, _ in files.values() for name in plain.state_dict()}
    assert all(_map_key(name) for name in names)
    group = built("rel_pos", "pretraining", extractor_mode="default")[0].state_dict()
    ends = ("", ".weight", ".bias", ".inv_freq")
    reached = {_map_key(name) for name in names}
    for theirs in [*_KEY_MAP, *_HEAD_MAP]:  # no line of the map is idle
        assert reached & {_map_key(theirs.replace("*", "0") + end) for end in ends}, theirs
    assert _map_key("feature_extractor.conv_layers.0.2.weight") in {_map_key(n) for n in group}
    for foreign in ("encoder.layers.0.fc1.weight", "label_embs_concat", "encoder.layers.0.final_layer_norm.weights",
                    "w2v_encoder.w2v_model.w2v_encoder.proj.weight.weight", "encoder.layers.x.ffn1.w_1.bias", ""):  # fmt: skip
        assert _map_key(foreign) is None


# ---------------------------------------------------------------- settings


def test_settings_become_knobs(files: dict[Any, Any]) -> None:
    checkpoint = read_fairseq(files["rope", "pretraining"][1])
    wanted = {
        "conv_dim": (12, 12, 12, 12), "conv_kernel": (10, 3, 3, 2), "conv_stride": (5, 2, 2, 2), "conv_bias": True,
        "feat_extract_norm": "layer", "feat_proj_dropout": 0.04, "feat_quantizer_dropout": 0.06, "hidden_size": 16,
        "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 20, "hidden_act": "swish",
        "hidden_dropout": 0.03, "activation_dropout": 0.03, "attention_dropout": 0.03, "conformer_conv_dropout": 0.03,
        "layerdrop": 0.02, "conv_depthwise_kernel_size": 5, "position_embeddings_type": "rotary",
        "num_conv_pos_embeddings": 8, "num_conv_pos_embedding_groups": 4, "mask_time_prob": 0.6, "mask_time_length": 7,
        "mask_time_min_masks": 2, "mask_feature_prob": 0.1, "mask_feature_length": 3, "num_codevectors_per_group": 6,
        "num_codevector_groups": 2, "codevector_dim": 8, "proj_codevector_dim": 8, "num_negatives": 9,
        "contrastive_logits_temperature": 0.2, "diversity_loss_weight": 0.3,
    }  # fmt: skip
    assert {name: getattr(checkpoint.config, name) for name in wanted} == wanted
    assert checkpoint.kind == "pretraining"
    assert checkpoint.notes == checkpoint.unused == []
    assert checkpoint.normalize is True
    assert checkpoint.settings["model"]["latent_temp"] == [2.0, 0.1, 0.999995]
    assert (
        checkpoint.feature_extractor.do_normalize,
        checkpoint.feature_extractor.return_attention_mask,
    ) == (True, True)


def test_settings_of_a_fine_tuned_model(files: dict[Any, Any]) -> None:
    checkpoint = read_fairseq(files["rel_pos", "ctc"][1])
    wanted = {
        "vocab_size": 9, "pad_token_id": 0, "ctc_zero_infinity": True, "apply_spec_augment": True, "mask_time_prob": 0.5,
        "mask_time_length": 10, "mask_feature_prob": 0.25, "mask_feature_length": 6, "layerdrop": 0.15,
        "final_dropout": 0.07, "hidden_dropout": 0.0, "feat_proj_dropout": 0.0, "position_embeddings_type": "relative",
    }  # fmt: skip
    assert {name: getattr(checkpoint.config, name) for name in wanted} == wanted
    assert checkpoint.symbols == SYMBOLS
    assert len(checkpoint.notes) == 1
    assert "freeze_feature_encoder" in checkpoint.notes[0]
    with pytest.warns(UserWarning, match=r"carried over, but:\n  - feature_grad_mult=0.0"):
        load_fairseq(checkpoint)


def test_all_forms_of_settings_say_the_same(files: dict[Any, Any], tmp_path: Path) -> None:
    plain, path = files["rel_pos", "pretraining"]
    _, cfg = built("rel_pos", "pretraining")
    flat = cfg["model"] | {
        "arch": "wav2vec2",
        "normalize": True,
        "task": "audio_pretraining",
        "loss_weights": [0.3, 0],
    }
    del flat["_name"]
    sparse = {k: v for k, v in cfg["model"].items() if k not in {"crop_seq_to_multiple", "same_quantizer"}}
    sparse |= {
        "quantizer_depth": "???",
        "target_glu": "${task.glu}",
        "quantize_input": None,
    }  # all mean: the default
    first = read_fairseq(path)
    for form, content in (("dict", cfg), ("namespace", flat), ("dict", cfg | {"model": sparse})):
        other = read_fairseq(save(tmp_path / "other.pt", plain.state_dict(), content, form))
        assert other.config.to_dict() == first.config.to_dict()
        assert other.normalize is True
    tuned, cfg = built("rel_pos", "ctc")
    one = read_fairseq(save(tmp_path / "one.pt", tuned.state_dict(), cfg, "dict"))
    cfg["model"]["w2v_args"] = argparse.Namespace(**cfg["model"]["w2v_args"]["model"], normalize=True)
    two = read_fairseq(save(tmp_path / "two.pt", tuned.state_dict(), cfg, "dict"))
    assert two.config.to_dict() == one.config.to_dict()
    assert one.symbols is None


def test_overrides_and_half_precision(files: dict[Any, Any], tmp_path: Path) -> None:
    plain, path = files["rope", "pretraining"]
    assert load_fairseq(path, layerdrop=0.25).config.layerdrop == 0.25
    with pytest.raises(ValueError, match="layerdrp"):
        load_fairseq(path, layerdrp=0.25)
    _, cfg = built("rope", "pretraining")
    half = {name: t.half() if t.is_floating_point() else t for name, t in plain.state_dict().items()}
    model = load_fairseq(save(tmp_path / "half.pt", half, cfg))
    assert model.dtype == torch.float16
    speeds = model.wav2vec2_conformer.encoder.embed_positions.inv_freq
    assert speeds.dtype == torch.float32
    assert torch.equal(speeds, half["encoder.layers.0.self_attn.rotary_emb.inv_freq"].float())
    assert load_fairseq(tmp_path / "half.pt", dtype="float32").dtype == torch.float32


CANNOT = {
    "layer_type": "transformer", "attn_type": "", "layer_norm_first": False, "quantize_input": True,
    "crop_seq_to_multiple": 2, "quantize_targets": False, "target_glu": True, "quantizer_depth": 3,
    "extractor_mode": "mean", "encoder_ffn_embed_dim": "wide", "conv_feature_layers": "__import__('os')", "num_negatives": 0,
    "encoder_attention_heads": 3, "_name": "data2vec_audio", "mask_prob": 1.5,
}  # fmt: skip


def test_all_reasons_to_reject_come_at_once(files: dict[Any, Any], tmp_path: Path) -> None:
    plain, path = files["rel_pos", "pretraining"]
    cfg = pretraining_cfg(model_settings("rel_pos", **CANNOT))
    with pytest.raises(ValueError, match="cannot be carried over") as failure:
        read_fairseq(save(path.with_name("all.pt"), plain.state_dict(), cfg, "dict"))
    text = str(failure.value)
    for name in CANNOT.keys() - {"_name", "encoder_attention_heads"}:
        assert f"- {name}=" in text or f"- {name.replace('mask_prob', 'mask_time_prob')}=" in text, name
    assert "'data2vec_audio'" in text
    assert text.count("\n") == len(CANNOT)
    for name, value in CANNOT.items():  # each is reason enough
        cfg = pretraining_cfg(model_settings("rel_pos", **{name: value}))
        with pytest.raises(ValueError, match="cannot be carried over") as failure:
            read_fairseq(save(path.with_name("one.pt"), plain.state_dict(), cfg, "dict"))
        assert str(failure.value).count("\n") == 1, name


def test_settings_and_tensors_must_tell_one_story(files: dict[Any, Any], tmp_path: Path) -> None:
    rope, _ = files["rope", "pretraining"]
    tuned, _ = files["rel_pos", "ctc"]
    cfg, path = pretraining_cfg(model_settings("rel_pos")), tmp_path / "x.pt"

    def rejected(state: dict[str, Tensor], cfg: dict[str, Any], why: str) -> None:
        with pytest.raises(ValueError, match=why):
            read_fairseq(save(path, state, cfg, "dict"))

    rejected(rope.state_dict(), cfg, "pos_enc_type='rel_pos': but the tensors are those of rope")
    rejected(rope.state_dict(), pretraining_cfg(model_settings("abs")), "pos_enc_type='abs'")
    uneven = rope.state_dict()
    uneven["encoder.layers.1.self_attn.rotary_emb.inv_freq"] = torch.ones(4)
    rejected(
        uneven, pretraining_cfg(model_settings("rope")), "layers.1.self_attn.rotary_emb.inv_freq differs"
    )
    rejected(tuned.state_dict(), ctc_cfg({}) | {"model": {"_name": "wav2vec_ctc"}}, r"w2v_args")
    rejected(tuned.state_dict(), ctc_cfg(model_settings(), blank_weight=2.0), "blank_weight=2.0")
    headless = {name: t for name, t in tuned.state_dict().items() if ".proj." not in name}
    rejected(headless, ctc_cfg(model_settings()), "no w2v_encoder.proj")
    flat = tuned.state_dict() | {"w2v_encoder.proj.weight": torch.tensor(1.0)}
    assert read_fairseq(save(path, flat, ctc_cfg(model_settings()), "dict")).config.vocab_size is None
    deeper = pretraining_cfg(model_settings("rope", encoder_layers=10**9))  # would be built for years
    rejected(rope.state_dict(), deeper, "encoder_layers=1000000000: but there are tensors of 2")
    rejected({"decoder.x": torch.ones(1)}, cfg, "it has a decoder")
    rejected(
        files["rel_pos", "pretraining"][0].state_dict()
        | {"encoder.pos_conv.0.parametrizations.weight.original0": torch.ones(1, 1, 8)},
        cfg,
        "is a second",
    )
    rejected(tuned.state_dict(), {"epoch": 3}, "cannot be carried over")
    for empty in (None, {}, 3, "x"):
        rejected(tuned.state_dict(), empty, "holds no settings")


def test_what_changes_training_alone_is_said(files: dict[Any, Any], tmp_path: Path) -> None:
    plain, _ = files["rel_pos", "pretraining"]
    odd = {
        "feature_grad_mult": 0.1, "mask_selection": "poisson", "mask_other": 2.0, "no_mask_overlap": True,
        "mask_dropout": 0.1, "mask_channel_selection": "normal", "mask_channel_other": 1, "mask_channel_before": True,
        "no_mask_channel_overlap": True, "negatives_from_everywhere": True, "cross_sample_negatives": 5,
        "codebook_negatives": 3,
    }  # fmt: skip
    assert odd.keys() == w2vc.files.fairseq._TRAINING_ONLY.keys()
    cfg = pretraining_cfg(model_settings("rel_pos", **odd))
    cfg["criterion"]["loss_weights"] = [0.1, 10]
    with pytest.warns(UserWarning, match="carried over, but") as told:
        load_fairseq(save(tmp_path / "odd.pt", plain.state_dict(), cfg))
    assert all(f"- {name}=" in str(told[0].message) for name in [*odd, "loss_weights"])


# ---------------------------------------------------------------- an account of every tensor


def test_weight_norm_under_both_names(files: dict[Any, Any], tmp_path: Path) -> None:
    plain, path = files["rel_pos", "pretraining"]
    _, cfg = built("rel_pos", "pretraining")
    new = {"weight_g": "parametrizations.weight.original0", "weight_v": "parametrizations.weight.original1"}
    state = {
        n if (end := n.rpartition(".")[2]) not in new else n.removesuffix(end) + new[end]: t
        for n, t in plain.state_dict().items()
    }
    assert state.keys() != plain.state_dict().keys()
    one, two = (
        load_fairseq(path).state_dict(),
        load_fairseq(save(tmp_path / "new.pt", state, cfg)).state_dict(),
    )
    assert one.keys() == two.keys()
    assert all(torch.equal(one[name], two[name]) for name in one)


def test_missing_unexpected_and_misshaped_tensors_are_listed(files: dict[Any, Any], tmp_path: Path) -> None:
    plain, _ = files["rel_pos", "pretraining"]
    _, cfg = built("rel_pos", "pretraining")
    state = dict(plain.state_dict())
    del state["encoder.layers.1.ffn2.w_1.bias"]
    state["encoder.layers.0.conv_module.depthwise_conv.weight"] = torch.ones(16, 1, 7)
    state["label_embs_concat"] = torch.ones(2)
    state["encoder.layers.2.ffn1.w_1.bias"] = torch.ones(20)
    path = save(tmp_path / "holes.pt", state, cfg)
    with pytest.raises(ValueError, match="does not fit Wav2Vec2ConformerForPreTraining") as failure:
        load_fairseq(path)
    text, base = str(failure.value), "wav2vec2_conformer."
    assert f"missing (1): {base}encoder.layers.1.ffn2.intermediate_dense.bias" in text
    assert (
        f"unexpected (2): {base}encoder.layers.2.ffn1.intermediate_dense.bias, {base}label_embs_concat"
        in text
    )
    assert "depthwise_conv.weight (file (16, 1, 7), model (16, 1, 5))" in text
    assert read_fairseq(path).unused == ["label_embs_concat"]
    with pytest.warns(UserWarning, match="newly initialised"):
        model = load_fairseq(path, strict=False)
    report = model.load_report
    assert report is not None
    assert (len(report.missing), len(report.unexpected), len(report.mismatched)) == (1, 2, 1)
    kept = model.wav2vec2_conformer.encoder.layers[0].ffn1.intermediate_dense.weight
    assert torch.equal(kept, state["encoder.layers.0.ffn1.w_1.weight"])
    with pytest.raises(ValueError, match="does not fit"):
        convert_fairseq(path, tmp_path / "out")
    assert not (tmp_path / "out").exists()


# ---------------------------------------------------------------- conversion


@POSITIONS
@torch.no_grad()
def test_transformers_and_we_load_the_converted_folder(
    files: dict[Any, Any], positions: str, tmp_path: Path
) -> None:
    transformers = pytest.importorskip("transformers")
    transformers.utils.logging.disable_progress_bar()
    plain, path = files[positions, "ctc"]
    quietly(convert_fairseq, path, tmp_path / "ctc")
    theirs, info = transformers.AutoModelForCTC.from_pretrained(tmp_path / "ctc", output_loading_info=True)
    assert not any(info.values()), info
    logits = plain(SOUND)
    assert_close(f"fairseq {positions} in transformers", theirs(SOUND).logits, logits)
    assert_close(
        f"fairseq {positions} again",
        Wav2Vec2ConformerForCTC.from_pretrained(tmp_path / "ctc")(SOUND).logits,
        logits,
    )
    processor, peer = (
        AutoProcessor.from_pretrained(tmp_path / "ctc"),
        transformers.AutoProcessor.from_pretrained(tmp_path / "ctc"),
    )
    assert isinstance(processor, Wav2Vec2Processor)
    path_of_ids = [0, 0, 5, 5, 0, 5, 4, 0, 6, 8, 8, 0]  # blank is 0, whatever fairseq calls it
    assert processor.decode(path_of_ids) == peer.decode(path_of_ids) == "EE TO"
    inputs, same = (
        p([SOUND[0].numpy()], sampling_rate=16000, return_tensors="pt") for p in (processor, peer)
    )
    assert inputs.keys() == same.keys() == {"input_values", "attention_mask"}
    assert_close("fairseq inputs", inputs["input_values"], same["input_values"])
    plain, path = files[positions, "pretraining"]
    convert_fairseq(path, tmp_path / "ctc")  # over the other one: no file of it stays
    assert {p.name for p in (tmp_path / "ctc").iterdir()} == {
        "config.json",
        "model.safetensors",
        "preprocessor_config.json",
    }
    theirs = transformers.AutoModelForPreTraining.from_pretrained(tmp_path / "ctc")
    assert_close(
        "fairseq pre-trained in transformers", theirs(SOUND).projected_states, plain(SOUND)["states"]
    )


def test_blank_and_padding_change_names(files: dict[Any, Any], tmp_path: Path) -> None:
    _, path = files["rel_pos", "ctc"]
    quietly(convert_fairseq, path, tmp_path / "a")
    vocab = json.loads((tmp_path / "a" / "vocab.json").read_text())
    assert vocab == {"<pad>": 0, "<s>": 1, "</s>": 2, "<unk>": 3, "|": 4, "E": 5, "T": 6, "A": 7, "O": 8}
    assert json.loads((tmp_path / "a" / "config.json").read_text())["pad_token_id"] == 0
    letters = tmp_path / "dict.ltr.txt"
    letters.write_text("| 9\nT 8\nE 7\nO 3 #fairseq:overwrite\nA 1\n")
    assert _read_dictionary(letters) == ["<s>", "<pad>", "</s>", "<unk>", "|", "T", "E", "O", "A"]
    quietly(
        convert_fairseq, path, tmp_path / "b", letters
    )  # the file wins over the dictionary in the checkpoint
    assert json.loads((tmp_path / "b" / "vocab.json").read_text())["T"] == 5
    for lines, why in (
        ("| 9\nT\n", r"line 2: 'T' must be"),
        ("T 1\nT 2\n", r"line 2: 'T' is there twice"),
        ("| x\n", "line 1"),
    ):
        letters.write_text(lines)
        with pytest.raises(ValueError, match=why):
            _read_dictionary(letters)
    letters.write_text("| 9\n")
    with pytest.raises(ValueError, match="5 symbols with the special ones; the model has 9 outputs"):
        quietly(convert_fairseq, path, tmp_path / "c", letters)
    with pytest.warns(UserWarning, match=r"'\|' is not in the vocabulary"):
        _make_tokenizer([*SYMBOLS[:4], "a"], 5)
    assert not (tmp_path / "c").exists()


def test_a_fine_tuned_model_needs_a_dictionary(tmp_path: Path) -> None:
    plain, cfg = built("rope", "ctc")
    path = save(tmp_path / "no.pt", plain.state_dict(), cfg)
    with pytest.raises(ValueError, match=r"dictionary=None: .* holds none"):
        quietly(convert_fairseq, path, tmp_path / "out")
    assert not (tmp_path / "out").exists()
    assert quietly(load_fairseq, path).config.vocab_size == 9


def test_a_conversion_that_fails_leaves_nothing(
    files: dict[Any, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    _, path = files["rel_pos", "ctc"]

    def full(*_: Any, **__: Any) -> None:
        raise OSError("no space left on device")

    monkeypatch.setattr(Wav2Vec2Processor, "save_pretrained", full)  # the weights are written by then
    with pytest.raises(OSError, match="no space"):
        quietly(convert_fairseq, path, tmp_path / "out")
    assert not (tmp_path / "out").exists()


# ---------------------------------------------------------------- the reader runs nothing


class Call:
    """Pickles as the call of a function; unpickling it elsewhere makes the call."""

    def __init__(self, function: Any, *args: Any) -> None:
        self.parts = function, args

    def __reduce__(self) -> Any:
        return self.parts


def with_pickle(source: Path, target: Path, program: bytes) -> Path:
    """A copy of a checkpoint with another pickle inside."""
    with zipfile.ZipFile(source) as old, zipfile.ZipFile(target, "w") as new:
        for entry in old.infolist():
            new.writestr(entry.filename, program if entry.filename.endswith("/data.pkl") else old.read(entry))
    return target


def hostile(canary: str) -> dict[str, bytes]:
    """Programs that make a folder where pickle is trusted, each in its own way."""
    text = b"\x8c" + bytes([len(canary)]) + canary.encode()
    mkdir = f"__import__('os').mkdir({canary!r})"
    return {
        "call": pickle.dumps(Call(os.mkdir, canary), 2),
        "eval": pickle.dumps(Call(eval, mkdir), 0),
        "exec": pickle.dumps(Call(exec, mkdir), 4),
        "nested": pickle.dumps(Call(operator.methodcaller("mkdir", canary), Call(__import__, "os")), 4),
        "stack global": b"\x80\x04\x8c\x02os\x8c\x05mkdir\x93" + text + b"\x85R.",
        "inst": b"(S'" + canary.encode() + b"'\nios\nmkdir\n.",
        "obj": b"(cos\nmkdir\n" + text + b"o.",
        "newobj": b"\x80\x04cpathlib\nPath\n)\x81.",
        "build": b"\x80\x02ctypes\nSimpleNamespace\n)R}(X\x01\x00\x00\x00aK\x01ub.",
        "bytes": pickle.dumps(Call(torch.storage._load_from_bytes, pickle.dumps(Call(os.mkdir, canary))), 2),
        "loads": pickle.dumps(Call(pickle.loads, pickle.dumps(Call(os.mkdir, canary))), 2),
    }  # fmt: skip


HARMLESS = {"newobj", "build", "bytes"}  # these make no folder even where pickle is trusted


@pytest.mark.parametrize("name", list(hostile("x")))
def test_hostile_programs_do_nothing(name: str, files: dict[Any, Any], tmp_path: Path) -> None:
    canary = tmp_path / "canary"
    program = hostile(str(canary))[name]
    if name not in HARMLESS:
        with contextlib.suppress(Exception):
            pickle.loads(program)
        assert canary.is_dir(), "the program is not hostile: the test proves nothing"
        canary.rmdir()
    with contextlib.suppress(TypeError):  # a stub cannot be called
        assert isinstance(unpickle(program), _Stub)
    assert not canary.exists()
    path = with_pickle(files["rel_pos", "ctc"][1], tmp_path / "a.pt", program)
    with pytest.raises(ValueError, match=r"is rejected: it (holds no dict with the key 'model'|is damaged)"):
        read_fairseq(path)
    with pytest.raises(ValueError, match="is rejected"):
        quietly(convert_fairseq, path, tmp_path / "out")
    assert not canary.exists()
    assert not (tmp_path / "out").exists()


def test_hostile_objects_inside_a_good_checkpoint(tmp_path: Path) -> None:
    plain, cfg = built("rel_pos", "pretraining")
    canary = tmp_path / "canary"
    evil = Call(os.mkdir, str(canary))
    path = save(
        tmp_path / "x.pt", plain.state_dict(), cfg | {"job": evil}, "dict", extra_state=evil, task_state=evil
    )
    checkpoint = read_fairseq(path)  # nothing needs these entries: they stay inert
    assert checkpoint.settings["job"] == str(canary)
    load_fairseq(checkpoint)
    state: dict[str, Any] = dict(plain.state_dict())
    state["layer_norm.weight"] = evil
    with pytest.raises(
        ValueError, match=r"is rejected: layer_norm.weight is no tensor, but <stub of (posix|nt).mkdir>"
    ):
        read_fairseq(save(path, state, cfg, "dict"))
    for wrong in (evil, [1], {"a": 1}, {3: torch.ones(1)}, {"\x1b[2J": torch.ones(1)}, None):
        with pytest.raises(ValueError, match="is rejected"):
            read_fairseq(save(path, wrong, cfg, "dict"))
    with pytest.raises(ValueError, match=r"is rejected|no settings"):
        read_fairseq(save(path, plain.state_dict(), evil, "dict"))
    assert not canary.exists()


WATCHER = """
import sys, json
import w2vc.files.fairseq
import encodings.cp437, encodings.unicode_escape, encodings.raw_unicode_escape
seen, watching = [], False
def watch(event, args):
    if watching:
        seen.append([event, str(args[0]) if args else ""])
sys.addaudithook(watch)
results = []
for path in sys.argv[1:]:
    watching = True
    try:
        tensors = w2vc.files.fairseq.read_fairseq(path).tensors
        result = [len(tensors), sum(t.double().sum().item() for t in tensors.values())]
    except ValueError as error:
        result = "rejected"
    watching = False
    results.append(result)
print(json.dumps([results, seen]))
"""


def test_nothing_is_imported_opened_or_called(files: dict[Any, Any], tmp_path: Path) -> None:
    """In a process of its own, which never had the stand-ins, watched by Python's audit hooks."""
    paths = [path for _, path in files.values()]
    bad = [
        with_pickle(paths[0], tmp_path / f"{name}.pt", program)
        for name, program in hostile(str(tmp_path / "canary")).items()
    ]
    command = [sys.executable, "-c", WATCHER, *map(str, [*paths, *bad])]
    run = subprocess.run(command, capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stderr
    results, seen = json.loads(run.stdout)
    assert {event for event, _ in seen} == {
        "open",
        "compile",
    }  # no import, no exec, no os.…, no pickle.find_class
    assert {what for event, what in seen if event == "open"} == {str(path) for path in [*paths, *bad]}
    # what is "compiled" is the list of convolutions, by `ast.parse`, which makes a tree and no code
    assert {what for event, what in seen if event == "compile"} == {str(CONV.encode())}
    assert not (tmp_path / "canary").exists()
    for (plain, _), result in zip(files.values(), results, strict=False):
        state = {
            n: t for n, t in plain.state_dict().items() if not n.endswith(".1.self_attn.rotary_emb.inv_freq")
        }
        assert result == [len(state), pytest.approx(sum(t.double().sum().item() for t in state.values()))]
    assert results[len(paths) :] == ["rejected"] * len(bad)


# ---------------------------------------------------------------- damaged files, and files made to hurt


def test_damaged_files_are_rejected(files: dict[Any, Any], tmp_path: Path) -> None:
    _, good = files["rel_pos", "pretraining"]
    whole, path = good.read_bytes(), tmp_path / "cut.pt"
    for size in (0, 1, 2, 100, len(whole) // 3, len(whole) // 2, len(whole) - 30, len(whole) - 1):
        path.write_bytes(whole[:size])
        with pytest.raises(ValueError, match=r"cut.pt is rejected: "):
            read_fairseq(path)
    with zipfile.ZipFile(good) as archive:
        entry = max(archive.infolist(), key=lambda e: e.file_size if "/data/" in e.filename else 0)
    spoiled = bytearray(whole)
    spoiled[entry.header_offset + entry.file_size // 2 + 150] ^= 1  # one bit inside the numbers
    path.write_bytes(spoiled)
    with pytest.raises(ValueError, match=r"is rejected: it is damaged or cut short \(BadZipFile: Bad CRC"):
        read_fairseq(path)
    with pytest.raises(FileNotFoundError, match="is no file"):
        read_fairseq(tmp_path / "nowhere.pt")
    with pytest.raises(FileNotFoundError, match="is no file"):
        read_fairseq(tmp_path)


def test_files_of_another_kind_are_rejected(files: dict[Any, Any], tmp_path: Path) -> None:
    plain, good = files["rel_pos", "pretraining"]
    path = tmp_path / "other.pt"

    def rejected(why: str) -> None:
        with pytest.raises(ValueError, match=f"other.pt is rejected: {why}"):
            read_fairseq(path)

    path.write_bytes(pickle.dumps({"model": {}}))
    rejected("it is a bare pickle, no torch checkpoint")
    path.write_text("a text")
    rejected("it is no torch checkpoint")
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("a.txt", "hello")
    rejected("it is an archive of another kind")
    torch.save(plain.state_dict(), path)
    rejected("it holds no dict with the key 'model'")
    torch.save({"model": {"a": torch.ones(2)}}, path)
    rejected("it holds no settings")
    with zipfile.ZipFile(good) as old, zipfile.ZipFile(path, "w") as new:
        for entry in old.infolist():
            new.writestr(entry.filename, b"big" if entry.filename.endswith("byteorder") else old.read(entry))
    rejected("its numbers are in the byte order of another kind of machine")
    with zipfile.ZipFile(good) as old, zipfile.ZipFile(path, "w") as new:
        for entry in old.infolist():
            new.writestr(entry.filename, old.read(entry))
        new.writestr("x/constants.pkl".replace("x", old.infolist()[0].filename.partition("/")[0]), b"")
    rejected("it is a TorchScript program")


def tensor_program(
    count: int, offset: int, size: tuple[int, ...], strides: tuple[int, ...], key: str = "0"
) -> bytes:
    """The pickle of a checkpoint with one tensor, described by these numbers."""

    class Address:
        pass

    class Pickler(pickle.Pickler):
        def persistent_id(self, thing: Any) -> Any:
            return ("storage", torch.FloatStorage, key, "cpu", count) if isinstance(thing, Address) else None

    out = io.BytesIO()
    rebuild = Call(torch._utils._rebuild_tensor_v2, Address(), offset, size, strides, False, {})
    Pickler(out, 2).dump({"model": {"a": rebuild, "b": rebuild}})
    return out.getvalue()


@pytest.fixture
def ten(tmp_path: Path) -> Path:
    """A checkpoint whose one row of numbers, "0", is 0..9."""
    torch.save({"model": {"a": torch.arange(10.0)}}, tmp_path / "ten.pt")
    return tmp_path / "ten.pt"


def test_tensors_must_fit_what_is_stored(ten: Path, tmp_path: Path) -> None:
    good = with_pickle(ten, tmp_path / "good.pt", tensor_program(10, 1, (2, 3), (1, 3)))
    a, b = read_torch_file(good)[1].values()
    assert a.tolist() == [[1.0, 4.0, 7.0], [2.0, 5.0, 8.0]]
    a.zero_()
    assert b.sum() == 27  # a copy of its own
    small: list[Any] = [
        (10, 0, (10**12,), (0,)),  # a terabyte out of one number
        (10, 0, (4, 4), (3, 1)), (10, 6, (5,), (1,)), (10, -1, (5,), (1,)), (10, 0, (-5,), (1,)), (10, 9, (5,), (-1,)),
        (10, 0, (5,), (1, 1)), (10, 0, (2,) * 9, (0,) * 9),
    ]  # fmt: skip
    for numbers in small:
        with pytest.raises(ValueError, match="is rejected: a does not fit into its 10 stored numbers"):
            read_torch_file(with_pickle(ten, tmp_path / "bad.pt", tensor_program(*numbers)))
    for program, why in (
        (tensor_program(10**15, 0, (10**15,), (1,)), "its tensors are larger than the file"),
        (tensor_program(9, 0, (9,), (1,)), "a has 40 bytes for 9 numbers"),
        (tensor_program(10, 0, (10,), (1,), key="1"), "it is damaged or cut short"),
        (tensor_program(10, 0, (10,), (1,), key="../ten"), "it is damaged or cut short"),
    ):
        with pytest.raises(ValueError, match=f"is rejected: {why}"):
            read_torch_file(with_pickle(ten, tmp_path / "bad.pt", program))
    empty = with_pickle(ten, tmp_path / "empty.pt", tensor_program(10, 0, (0, 5), (1, 1)))
    assert read_torch_file(empty)[1]["a"].shape == (0, 5)


@pytest.mark.parametrize("kind", ["pretraining", "ctc"])
def test_torchs_format_before_1_6_too(files: dict[Any, Any], kind: str, tmp_path: Path) -> None:
    plain, _ = files["rope", kind]
    _, cfg = built("rope", kind)
    symbols = SYMBOLS if kind == "ctc" else None
    good, path = tmp_path / "new.pt", tmp_path / "old.pt"
    save(good, plain.state_dict(), cfg, symbols=symbols)
    save(path, plain.state_dict(), cfg, symbols=symbols, legacy=True)
    new, old = read_fairseq(good), read_fairseq(path)
    assert old.config.to_dict() == new.config.to_dict()
    assert old.symbols == new.symbols == symbols
    assert old.tensors.keys() == new.tensors.keys()
    assert all(torch.equal(old.tensors[name], new.tensors[name]) for name in new.tensors)
    whole = path.read_bytes()
    for size in (2, 100, len(whole) // 2, len(whole) - 1):
        path.write_bytes(whole[:size])
        with pytest.raises(ValueError, match=r"old.pt is rejected: "):
            read_fairseq(path)
    canary = tmp_path / "canary"
    torch.save({"model": {}, "x": Call(os.mkdir, str(canary))}, path, _use_new_zipfile_serialization=False)
    with pytest.raises(ValueError, match="holds no settings"):
        read_fairseq(path)
    assert not canary.exists()


def test_small_files_cannot_grow_large(ten: Path, tmp_path: Path) -> None:
    with zipfile.ZipFile(ten) as old, zipfile.ZipFile(tmp_path / "z.pt", "w", zipfile.ZIP_DEFLATED) as new:
        for entry in old.infolist():
            new.writestr(entry.filename, old.read(entry) + bytes(10**7))
    with pytest.raises(ValueError, match="it is compressed"):
        read_torch_file(tmp_path / "z.pt")
    many: list[dict[str, Tensor]] = [{}, {}]
    numbers = torch.ones(20_000)
    many[0] = {str(i): numbers for i in range(50)}
    torch.save({"model": many[0]}, tmp_path / "many.pt")
    with pytest.raises(ValueError, match="its tensors are larger than the file"):
        read_torch_file(tmp_path / "many.pt")
    with zipfile.ZipFile(ten) as old:
        entries = [(e.filename, old.read(e)) for e in old.infolist()]
    with zipfile.ZipFile(tmp_path / "o.pt", "w") as new:
        for name, content in entries:
            new.writestr(name, content)
        large = next(e for e in new.infolist() if e.filename.endswith("/data/0"))
        large.file_size = large.compress_size = 10**9
    with pytest.raises(ValueError, match="its parts overlap"):
        read_torch_file(tmp_path / "o.pt")


def test_programs_that_would_take_for_ever_are_rejected_at_once() -> None:
    keys: Any = ()
    for _ in range(60):
        keys = (keys, keys)  # 2 ** 60 empty tuples to hash
    with pytest.raises(ValueError, match="its tuples or its memo would grow"):
        unpickle(pickle.dumps(keys, 2)[:-1] + b"q\xff}h\xffNs.")
    with pytest.raises(ValueError, match="its tuples or its memo would grow"):
        unpickle(b"Nr\xff\xff\xff\xff.")  # place 2 ** 32 - 1 of the memo
    tree: Any = {}
    for _ in range(40):
        tree = {"a": tree, "b": tree}
    with pytest.raises(ValueError, match="nested too deep, or are too many"):
        _plain_data(unpickle(pickle.dumps(tree)))
    with pytest.raises(ValueError, match="nested too deep"):
        _plain_data(unpickle(b"]" * 200 + b"a" * 199 + b"."))
    loop: list[Any] = []
    loop.append(loop)
    with pytest.raises(ValueError, match="nested too deep"):
        _plain_data(unpickle(pickle.dumps(loop)))
    deep = unpickle(b"]" * 100_000 + b"a" * 99_999 + b".")
    assert len(deep) == 1
    for program in (
        b"\x80\x02\x82\x01.",
        b"\x80\x02\x84\x01\x00\x00\x00.",
        b"\x97.",
        b"\x98.",
    ):  # EXT, buffers
        with pytest.raises(ValueError, match="it uses the opcode"):
            unpickle(program)
    for program in (b"K\x01K\x02a.", b"K\x01(K\x02e.", b"}]Ns.", b"\x8f(]\x90.", b".", b"a.", b"R.", b"h\x05.", b"t.",
                    b"\x86.", b"N\x87.", b"0.", b"N(."):  # fmt: skip
        with pytest.raises(BROKEN):
            unpickle(program)


BROKEN = (ValueError, LookupError, TypeError, AttributeError, OverflowError, EOFError, pickle.UnpicklingError)
plain_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text() | st.binary(),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text() | st.integers(), inner, max_size=4)
    | st.tuples(inner, inner) | st.tuples(inner, inner, inner, inner) | st.sets(st.integers(), max_size=3),
    max_leaves=12,
)  # fmt: skip


@given(plain_values, st.integers(4, 5))
@settings(max_examples=40, deadline=None)
def test_plain_data_is_read_as_pickle_reads_it(value: Any, protocol: int) -> None:
    assert unpickle(pickle.dumps(value, protocol)) == value
    assert unpickle(pickle.dumps([value, value, {"a": (value,)}], protocol)) == [
        value,
        value,
        {"a": (value,)},
    ]


def without_bytes(value: Any) -> Any:
    """Older protocols have no opcodes for bytes and sets: they call a function to make them."""
    if isinstance(value, bytes | set):
        return None
    if isinstance(value, list | tuple):
        return type(value)(without_bytes(entry) for entry in value)
    return {k: without_bytes(v) for k, v in value.items()} if isinstance(value, dict) else value


@given(plain_values.map(without_bytes), st.integers(0, 3))
@settings(max_examples=40, deadline=None)
def test_older_protocols_too(value: Any, protocol: int) -> None:
    assert unpickle(pickle.dumps(value, protocol)) == value


SETTINGS_PROGRAM = pickle.dumps(
    {
        "model": {},
        "args": argparse.Namespace(a=1, b=[2.5, None, "x"]),
        "o": collections.OrderedDict(a=(1, 2)),
    },
    2,
)


@given(
    st.lists(
        st.tuples(st.integers(0, len(SETTINGS_PROGRAM) - 1), st.integers(0, 255)), min_size=1, max_size=6
    )
)
@settings(max_examples=150, deadline=None)
def test_scrambled_programs_end_in_data_or_a_plain_error(changes: list[tuple[int, int]]) -> None:
    program = bytearray(SETTINGS_PROGRAM)
    for place, byte in changes:
        program[place] = byte
    before = set(sys.modules)
    with contextlib.suppress(*BROKEN):
        _plain_data(unpickle(bytes(program)))
    assert set(sys.modules) <= before | {"encodings.unicode_escape", "encodings.raw_unicode_escape"}


# ---------------------------------------------------------------- the list of convolutions


@pytest.mark.parametrize(
    "text",
    [
        "[(512, 10, 5)] + [(512, 3, 2)] * 4 + [(512,2,2)] + [(512,2,2)]",
        "[(512, 10, 5), (512, 8, 4)] + [(512, 4, 2)] * 3 + [(512, 1, 1)]",
        " 2 * [(4, 3, 2)] + ([(5,2,1)] * 2) * 3 ",
    ],
)
def test_convolutions_are_read_as_fairseq_does(text: str) -> None:
    assert _read_conv_layers(text) == eval(text)


@pytest.mark.parametrize(
    "text",
    [
        "", "[]", "[(1, 2)]", "[(1, 2, 3, 4)]", "[1, 2, 3]", "(1, 2, 3)", "[(0, 2, 3)]", "[(-1, 2, 3)]", "[(1.5, 2, 3)]",
        "[('a', 2, 3)]", "3", "__import__('os').mkdir('x')", "[(512, 10, 5)] * 101", "[(512, 10, 5)] * 10 ** 9",
        "[(512, 10, 5)] * 100 * 100 * 100", "[(1, 2, 3)] - [(1, 2, 3)]", "[(1, 2, 3) for _ in '12']", "f(1)", "(" * 900,
        "[" * 500 + "]" * 500, "+".join(["[(1,2,3)]"] * 150), "x" * 5000, "[(1,2,3)]*" + "9" * 400,
    ],
)  # fmt: skip
def test_other_expressions_are_rejected(text: str) -> None:
    with pytest.raises(ValueError, match=r"^conv_feature_layers="):
        _read_conv_layers(text)
