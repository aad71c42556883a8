"""The config chapter: knobs, rules, files."""

from __future__ import annotations

import copy
import inspect
import json
import pickle
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn.functional import gelu

from w2vc.config import (
    ACTIVATIONS,
    Wav2Vec2ConformerConfig,
    get_activation,
)

FIXTURE = Path(__file__).parents[1] / "fixtures" / "config_legacy.json"

# The constructor's documentation, word for word: name = default.
DOCUMENTED = """vocab_size = None hidden_size = 768 num_hidden_layers = 12 num_attention_heads = 12
intermediate_size = 3072 hidden_act = 'gelu' hidden_dropout = 0.1 activation_dropout = 0.1 attention_dropout = 0.1
feat_proj_dropout = 0.0 feat_quantizer_dropout = 0.0 final_dropout = 0.1 layerdrop = 0.1 initializer_range = 0.02
layer_norm_eps = 1e-05 feat_extract_norm = 'group' feat_extract_activation = 'gelu'
conv_dim = (512, 512, 512, 512, 512, 512, 512) conv_stride = (5, 2, 2, 2, 2, 2, 2)
conv_kernel = (10, 3, 3, 3, 3, 2, 2) conv_bias = False num_conv_pos_embeddings = 128
num_conv_pos_embedding_groups = 16 apply_spec_augment = True mask_time_prob = 0.05 mask_time_length = 10
mask_time_min_masks = 2 mask_feature_prob = 0.0 mask_feature_length = 10 mask_feature_min_masks = 0
num_codevectors_per_group = 320 num_codevector_groups = 2 contrastive_logits_temperature = 0.1 num_negatives = 100
codevector_dim = 256 proj_codevector_dim = 256 diversity_loss_weight = 0.1 ctc_loss_reduction = 'sum'
ctc_zero_infinity = False use_weighted_layer_sum = False classifier_proj_size = 256
tdnn_dim = (512, 512, 512, 512, 1500) tdnn_kernel = (5, 3, 3, 1, 1) tdnn_dilation = (1, 2, 3, 1, 1)
xvector_output_dim = 512 pad_token_id = 0 bos_token_id = 1 eos_token_id = 2 add_adapter = False
adapter_kernel_size = 3 adapter_stride = 2 num_adapter_layers = 3 output_hidden_size = None
position_embeddings_type = 'relative' rotary_embedding_base = 10000 max_source_positions = 5000
conv_depthwise_kernel_size = 31 conformer_conv_dropout = 0.1"""
DEFAULTS = {name: eval(value) for name, value in re.findall(r"(\w+) = (\([^)]*\)|\S+)", DOCUMENTED)}


def test_every_documented_knob_with_its_default() -> None:
    assert len(DEFAULTS) == 58
    signature = inspect.signature(Wav2Vec2ConformerConfig)
    config = Wav2Vec2ConformerConfig()
    for name, default in DEFAULTS.items():
        assert signature.parameters[name].default == default, name
        assert getattr(config, name) == (768 if name == "output_hidden_size" else default), name
    for name in Wav2Vec2ConformerConfig.options:
        assert re.search(rf"\b{name}: .+ \(default ", Wav2Vec2ConformerConfig.__doc__), name
    assert (config.num_feat_extract_layers, config.inputs_to_logits_ratio) == (7, 320)


def test_defaults_equal_the_peer() -> None:
    from transformers import Wav2Vec2ConformerConfig as Peer

    ours, peer = Wav2Vec2ConformerConfig().to_dict(), Peer().to_dict()
    shared = {name for name in peer if name in ours}
    assert (
        len(shared) == 58 + 8
    )  # and model_type, num_feat_extract_layers, both label maps, problem_type, three outputs
    plain = json.loads(json.dumps({name: peer[name] for name in shared}))
    assert json.loads(json.dumps({name: ours[name] for name in shared})) == plain


BAD: list[tuple[dict[str, Any], str]] = [
    ({"hidden_size": 0}, "hidden_size"),
    ({"hidden_size": -768}, "hidden_size"),
    ({"hidden_size": True}, "hidden_size"),
    ({"hidden_size": 768.0}, "hidden_size"),
    ({"hidden_size": "768"}, "hidden_size"),
    ({"hidden_size": None}, "hidden_size"),
    ({"hidden_size": 770}, "num_attention_heads"),
    ({"num_hidden_layers": 0}, "num_hidden_layers"),
    ({"num_attention_heads": 7}, "num_attention_heads"),
    ({"hidden_size": 33, "num_attention_heads": 3, "num_conv_pos_embedding_groups": 1}, "hidden_size"),
    (
        {"hidden_size": 48, "num_attention_heads": 16, "position_embeddings_type": "rotary"},
        "num_attention_heads",
    ),
    ({"conv_depthwise_kernel_size": 30}, "conv_depthwise_kernel_size"),
    ({"conv_dim": (512, 512)}, "conv_stride"),
    ({"conv_kernel": (10, 3)}, "conv_kernel"),
    ({"conv_stride": ()}, "conv_stride"),
    ({"conv_stride": (5, 2, 2, 2, 2, 2, 0)}, "conv_stride"),
    ({"conv_dim": 512}, "conv_dim"),
    ({"conv_dim": (512.0,) * 7}, "conv_dim"),
    ({"tdnn_kernel": (5, 3)}, "tdnn_kernel"),
    ({"tdnn_dilation": (1,)}, "tdnn_dilation"),
    ({"hidden_dropout": 1.5}, "hidden_dropout"),
    ({"layerdrop": -0.1}, "layerdrop"),
    ({"layerdrop": "0.1"}, "layerdrop"),
    ({"layerdrop": False}, "layerdrop"),
    ({"attention_dropout": float("nan")}, "attention_dropout"),
    ({"mask_time_prob": 65}, "mask_time_prob"),
    ({"mask_time_length": 0}, "mask_time_length"),
    ({"mask_time_min_masks": -1}, "mask_time_min_masks"),
    ({"mask_feature_prob": 0.1, "mask_feature_length": 769}, "mask_feature_length"),
    ({"layer_norm_eps": 0.0}, "layer_norm_eps"),
    ({"layer_norm_eps": float("inf")}, "layer_norm_eps"),
    ({"initializer_range": -1}, "initializer_range"),
    ({"contrastive_logits_temperature": 0}, "contrastive_logits_temperature"),
    ({"num_codevector_groups": 3}, "num_codevector_groups"),
    ({"num_conv_pos_embedding_groups": 5}, "num_conv_pos_embedding_groups"),
    ({"position_embeddings_type": "absolute"}, "position_embeddings_type"),
    ({"feat_extract_norm": "batch"}, "feat_extract_norm"),
    ({"hidden_act": "gleu"}, "hidden_act"),
    ({"feat_extract_activation": 3}, "feat_extract_activation"),
    ({"ctc_loss_reduction": "max"}, "ctc_loss_reduction"),
    ({"problem_type": "binary"}, "problem_type"),
    ({"problem_type": "single_label_classification", "num_labels": 1}, "problem_type"),
    ({"attn_implementation": "flash"}, "attn_implementation"),
    ({"conv_bias": 1}, "conv_bias"),
    ({"return_dict": None}, "return_dict"),
    ({"padding_invariant": "yes"}, "padding_invariant"),
    ({"vocab_size": 0}, "vocab_size"),
    ({"vocab_size": 10, "pad_token_id": 10}, "pad_token_id"),
    ({"pad_token_id": -1}, "pad_token_id"),
    ({"num_labels": 0}, "num_labels"),
    ({"num_labels": 3, "id2label": {0: "a", 1: "b"}}, "num_labels"),
    ({"id2label": {0: "a", 2: "b"}}, "id2label"),
    ({"id2label": {0: "a", 1: "a"}}, "id2label"),
    ({"id2label": {0: 1, 1: 2}}, "id2label"),
    ({"id2label": ["a", "b"]}, "id2label"),
    ({"label2id": {"a": 1, "b": 2}}, "label2id"),
    ({"id2label": {0: "a", 1: "b"}, "label2id": {"b": 0, "a": 1}}, "label2id"),
]


@pytest.mark.parametrize(("knobs", "named"), BAD, ids=[str(k)[1:-1] for k, _ in BAD])
def test_a_bad_knob_is_refused_by_name_with_value_and_rule(knobs: dict[str, Any], named: str) -> None:
    with pytest.raises(ValueError, match=rf"^{named}=.* is refused: it must be ") as caught:
        Wav2Vec2ConformerConfig(**knobs)
    value = knobs.get(named, getattr(Wav2Vec2ConformerConfig(), named))
    assert repr(value) in str(caught.value)


def test_every_rule_refuses_what_is_no_value_at_all() -> None:
    for name in Wav2Vec2ConformerConfig.options:
        with pytest.raises(ValueError, match=f"^{name}="):
            Wav2Vec2ConformerConfig.checked(name, [object()])


def test_an_unknown_knob_names_the_nearest() -> None:
    with pytest.raises(ValueError, match=r"'hiden_size' is no option of.*did you mean 'hidden_size'"):
        Wav2Vec2ConformerConfig(hiden_size=64)
    config = Wav2Vec2ConformerConfig()
    with pytest.raises(ValueError, match="did you mean 'mask_time_prob'"):
        config.mask_times_prob = 0.1
    with pytest.raises(AttributeError, match="did you mean 'layerdrop'"):
        _ = config.layer_drop
    with pytest.raises(ValueError, match="did you mean 'layerdrop'"):
        Wav2Vec2ConformerConfig.from_dict({}, layer_drop=0.5)
    assert not hasattr(config, "no_such_thing")


def test_a_later_change_is_checked_at_once_and_rules_between_knobs_on_validate() -> None:
    config = Wav2Vec2ConformerConfig()
    with pytest.raises(ValueError, match=r"^layerdrop=2 "):
        config.layerdrop = 2
    assert config.layerdrop == 0.1  # unchanged
    config.num_attention_heads = 10  # half of a change of two knobs
    with pytest.raises(ValueError, match=r"^num_attention_heads=10 .*hidden_size=768"):
        config.validate()
    config.hidden_size = 800
    config.validate()
    config.id2label[0] = "other"  # behind the config's back
    with pytest.raises(ValueError, match=r"^label2id="):
        config.validate()


def test_values_take_their_normal_form() -> None:
    config = Wav2Vec2ConformerConfig(
        hidden_size=np.int64(64),
        num_attention_heads=4,
        layerdrop=0,
        layer_norm_eps=np.float32(1),
        conv_dim=[8] * 7,
    )
    assert type(config.hidden_size) is int
    assert type(config.layerdrop) is float
    assert type(config.layer_norm_eps) is float
    assert config.conv_dim == (8,) * 7
    json.dumps(config.to_dict())


def test_output_hidden_size_follows_until_it_differs() -> None:
    config = Wav2Vec2ConformerConfig.tiny()
    config.hidden_size = 64
    assert config.output_hidden_size == 64
    config.output_hidden_size = 48
    config.hidden_size = 32
    assert config.output_hidden_size == 48
    config.output_hidden_size = None
    assert config.output_hidden_size == 32


def test_labels_stay_consistent() -> None:
    config = Wav2Vec2ConformerConfig(id2label={"1": "b", "0": "a", "2": "c"})
    assert (config.num_labels, config.id2label, config.label2id) == (
        3, {0: "a", 1: "b", 2: "c"}, {"a": 0, "b": 1, "c": 2},
    )  # fmt: skip
    config.num_labels = 3  # no change: the names stay
    assert config.id2label[2] == "c"
    config.num_labels = 2
    assert (config.id2label, config.label2id) == ({0: "LABEL_0", 1: "LABEL_1"}, {"LABEL_0": 0, "LABEL_1": 1})
    config.label2id = {"no": 1, "yes": 0, "well": 2}
    assert (config.num_labels, config.id2label) == (3, {0: "yes", 1: "no", 2: "well"})
    config.id2label = {0: "one"}
    assert (config.num_labels, config.label2id) == (1, {"one": 0})
    assert Wav2Vec2ConformerConfig(label2id={"x": 0, "y": 1, "z": 2, "w": 3}).num_labels == 4
    assert Wav2Vec2ConformerConfig(num_labels=5).id2label[4] == "LABEL_4"


knob_changes = st.fixed_dictionaries(
    {},
    optional={
        "hidden_size": st.sampled_from([16, 32, 48]),
        "position_embeddings_type": st.sampled_from(["relative", "rotary", None]),
        "layerdrop": st.floats(0, 1),
        "vocab_size": st.none() | st.integers(1, 99),
        "num_labels": st.integers(1, 9),
        "conv_bias": st.booleans(),
        "padding_invariant": st.booleans(),
        "hidden_states_pre_norm": st.booleans(),
        "output_attentions": st.booleans(),
        "attn_implementation": st.sampled_from(["eager", "sdpa"]),
        "output_hidden_size": st.integers(1, 64),
        "hidden_act": st.sampled_from(sorted(ACTIVATIONS)),
        "problem_type": st.sampled_from([None, "regression", "multi_label_classification"]),
    },
)


@settings(max_examples=25, deadline=None)
@given(knob_changes)
def test_round_trips(knobs: dict[str, Any]) -> None:
    config = Wav2Vec2ConformerConfig.tiny(**knobs)
    assert Wav2Vec2ConformerConfig.from_dict(config.to_dict()) == config
    assert Wav2Vec2ConformerConfig.from_dict(json.loads(config.to_json_string())) == config
    assert eval(repr(config)) == config
    assert copy.deepcopy(config) == config
    assert pickle.loads(pickle.dumps(config)) == config


def test_to_dict_is_a_copy() -> None:
    config = Wav2Vec2ConformerConfig.from_dict({"note": [1]})
    config.to_dict()["note"].append(2)
    config.to_dict()["id2label"][0] = "x"
    assert config.note == [1]
    assert config.id2label[0] == "LABEL_0"


@pytest.mark.parametrize("size", ["tiny", "large"])
def test_transformers_reads_our_folder_and_we_read_theirs(tmp_path: Path, size: str) -> None:
    from transformers import AutoConfig
    from transformers import Wav2Vec2ConformerConfig as Peer

    ours = getattr(Wav2Vec2ConformerConfig, size)(
        vocab_size=40,
        num_labels=3,
        layerdrop=0,
        output_attentions=True,
        problem_type="regression",
        padding_invariant=False,
    )
    ours.save_pretrained(tmp_path / "ours")
    peer = Peer.from_pretrained(tmp_path / "ours")
    assert AutoConfig.from_pretrained(tmp_path / "ours").model_type == "wav2vec2-conformer"
    for name in ours.options:
        if name not in ("padding_invariant", "hidden_states_pre_norm", "attn_implementation"):
            theirs = getattr(peer, name)
            assert getattr(ours, name) == (tuple(theirs) if isinstance(theirs, list) else theirs), name
    peer.save_pretrained(tmp_path / "theirs")
    again = Wav2Vec2ConformerConfig.from_pretrained(tmp_path / "theirs")
    again.extra_keys = {}
    assert again == ours


def test_legacy_file_keeps_every_key_unchanged(tmp_path: Path) -> None:
    from transformers import Wav2Vec2ConformerConfig as Peer

    data = json.loads(FIXTURE.read_text())
    assert {
        "do_stable_layer_norm",
        "gradient_checkpointing",
        "torch_dtype",
        "dtype",
        "num_beams",
        "my_note",
    } <= data.keys()
    config = Wav2Vec2ConformerConfig.from_pretrained(FIXTURE)
    assert (config.hidden_act, config.num_labels, config.do_stable_layer_norm) == ("swish", 3, True)
    config.save_pretrained(tmp_path)
    written = json.loads((tmp_path / "config.json").read_text())
    assert {name: written[name] for name in data} == data
    assert written.keys() - data.keys() == {"padding_invariant", "hidden_states_pre_norm"}
    assert Wav2Vec2ConformerConfig.from_pretrained(tmp_path) == config
    assert Peer.from_pretrained(tmp_path).do_stable_layer_norm is True
    with pytest.raises(ValueError, match="did you mean 'do_stable_layer_norm'"):
        config.do_stable_layernorm = True
    config.do_stable_layer_norm = False  # a kept key can be changed
    assert config.to_dict()["do_stable_layer_norm"] is False


def test_overrides_win_over_the_file(tmp_path: Path) -> None:
    Wav2Vec2ConformerConfig.tiny(num_labels=3).save_pretrained(tmp_path)
    config = Wav2Vec2ConformerConfig.from_pretrained(tmp_path, hidden_size=64, num_labels=5, layerdrop=0.0)
    assert (config.hidden_size, config.output_hidden_size, config.num_labels, config.layerdrop) == (
        64,
        64,
        5,
        0.0,
    )
    assert len(config.label2id) == 5
    assert Wav2Vec2ConformerConfig.from_pretrained(tmp_path, id2label={0: "a"}).label2id == {"a": 0}
    with pytest.raises(ValueError, match="did you mean 'hidden_size'"):
        Wav2Vec2ConformerConfig.from_pretrained(tmp_path, hiddensize=64)


def test_files_that_cannot_be_read(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=re.escape("config.json")):
        Wav2Vec2ConformerConfig.from_pretrained(tmp_path)
    (tmp_path / "config.json").write_text('{"hidden_size": 7')
    with pytest.raises(ValueError, match="not valid JSON"):
        Wav2Vec2ConformerConfig.from_pretrained(tmp_path)
    (tmp_path / "config.json").write_text("[]")
    with pytest.raises(ValueError, match="JSON object"):
        Wav2Vec2ConformerConfig.from_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"^model_type='bert'"):
        Wav2Vec2ConformerConfig.from_dict({"model_type": "bert"})


def test_callable_activations_work_and_saving_them_is_a_clear_error(tmp_path: Path) -> None:
    config = Wav2Vec2ConformerConfig.tiny(hidden_act=torch.sin)
    assert get_activation(config.hidden_act) is torch.sin
    assert Wav2Vec2ConformerConfig.from_dict(config.to_dict()) == config
    with pytest.raises(ValueError, match=r"^hidden_act=.*name of an activation"):
        config.save_pretrained(tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_activations_equal_the_peers() -> None:
    from transformers.activations import ACT2FN

    x = torch.linspace(-12, 12, 2001)
    for name, function in ACTIVATIONS.items():
        if name != "selu":  # documented by the peer, and missing there
            torch.testing.assert_close(function(x), ACT2FN[name](x), atol=2e-6, rtol=1e-5, msg=name)
    assert "selu" not in ACT2FN
    torch.testing.assert_close(get_activation("selu")(x), torch.nn.SELU()(x))
    assert get_activation("gelu") is gelu
    with pytest.raises(ValueError, match="did you mean 'gelu_new'"):
        get_activation("gelunew")


def test_sizes() -> None:
    tiny = Wav2Vec2ConformerConfig.tiny()
    width, hop = 1, 1
    for kernel, stride in zip(tiny.conv_kernel, tiny.conv_stride, strict=True):
        width, hop = width + (kernel - 1) * hop, hop * stride
    assert (width, hop) == (400, 320)  # the time grid of the large model
    large = Wav2Vec2ConformerConfig.large(vocab_size=32)
    assert (large.hidden_size, large.num_hidden_layers, large.hidden_act, large.conv_bias) == (
        1024,
        24,
        "swish",
        True,
    )


@pytest.mark.parametrize("kernel", ["flex_attention", "flash_attention_2", None])
def test_a_kernel_that_another_program_chose_is_passed_over(kernel: str | None) -> None:
    data = Wav2Vec2ConformerConfig.tiny().to_dict() | {"attn_implementation": kernel}
    assert Wav2Vec2ConformerConfig.from_dict(data) == Wav2Vec2ConformerConfig.tiny()
    with pytest.raises(ValueError, match="attn_implementation='flex' is refused"):
        Wav2Vec2ConformerConfig.tiny(attn_implementation="flex")
