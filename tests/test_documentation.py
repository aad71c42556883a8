"""The documentation of Wav2Vec2-Conformer in transformers, kept word for word.

First its examples, in its order, each in the docstring of a test that is named after its section, and changed in the
import lines alone. Then every class, argument, default, output field and shape that it lists.

The examples run twice. Offline, in a folder that holds tiny stand-ins under the names of the checkpoints and data sets
(a folder goes before the hub): there every printed result is compared that does not depend on the released weights, and
where transformers runs the same lines, its results too. And with the released weights, where the hub can be reached.
"""

from __future__ import annotations

import contextlib
import doctest
import inspect
import io
import re
import sys
import urllib.request
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import w2vc
from helpers import assert_close, tiny_config
from released import stand_in, write_corpus, write_released
from w2vc.model.pretraining import Wav2Vec2ConformerForPreTraining

# ---------------------------------------------------------------- stand-ins

TINY_STACK = {
    "conv_dim": (16,) * 7,
    "conv_stride": (5, 2, 2, 2, 2, 2, 2),
    "conv_kernel": (10, 3, 3, 3, 3, 2, 2),
}
WIDE: dict[str, Any] = {  # the width that the documentation prints, and little else
    **TINY_STACK,
    "hidden_size": 1024,
    "num_attention_heads": 16,
    "num_hidden_layers": 1,
    "position_embeddings_type": "rotary",
}


@pytest.fixture(scope="module")
def shelf(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with stand-ins for everything that the examples load, under the same names."""
    folder = tmp_path_factory.mktemp("shelf")
    write_released(stand_in(**WIDE), folder / "facebook" / "wav2vec2-conformer-rope-large-960h-ft")
    write_released(
        stand_in(Wav2Vec2ConformerForPreTraining, **TINY_STACK),
        folder / "facebook" / "wav2vec2-conformer-rel-pos-large",
        text=False,
    )
    ids = ["1272-128104-0002", "1272-128104-0000", "1272-128104-0001"]  # not sorted: `sort("id")` must do it
    samples = [
        40_000,
        93_680,
        77_000,
    ]  # the first in order is as long as that of the documentation: 292 frames
    for name in ("librispeech_asr_demo", "librispeech_asr_dummy"):
        write_corpus(folder / "hf-internal-testing" / name, ids, samples)
    return folder


@pytest.fixture(params=["stand-ins", pytest.param("released", marks=pytest.mark.network)])
def place(
    request: pytest.FixtureRequest, shelf: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> str:
    """Work where the names of the examples mean the stand-ins, or where they mean what was released."""
    import datasets

    if request.param == "released":
        from huggingface_hub import constants

        try:
            urllib.request.urlopen(constants.ENDPOINT, timeout=10).close()
        except OSError as error:
            pytest.skip(f"the hub cannot be reached: {error}")
    else:
        monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "datasets")
    monkeypatch.chdir(shelf if request.param == "stand-ins" else tmp_path)
    return str(request.param)


# ---------------------------------------------------------------- how an example runs


def example_of(test: Callable[..., Any]) -> str:
    """The example in a test's docstring, from its first prompt on."""
    lines = inspect.cleandoc(test.__doc__ or "").splitlines()
    return "\n".join(lines[next(i for i, line in enumerate(lines) if line.startswith(">>>")) :])


def documented(test: Callable[..., Any]) -> list[str]:
    """The results that the documentation prints in an example."""
    return [e.want.strip() for e in doctest.DocTestParser().get_examples(example_of(test)) if e.want]


def run(test: Callable[..., Any], *, by_transformers: bool = False) -> tuple[dict[str, Any], dict[str, str]]:
    """Execute a test's example line by line.

    Args:
        test: Whose docstring it is.
        by_transformers: Take the model and its processor from transformers, as the documentation does.

    Returns:
        The names that the example leaves behind, and what each of its lines printed.
    """
    text = example_of(test)
    if by_transformers:
        text = text.replace(">>> from w2vc import Auto", ">>> from transformers import Auto", 1)
    names: dict[str, Any] = {}
    printed: dict[str, str] = {}
    for example in doctest.DocTestParser().get_examples(text):
        with contextlib.redirect_stdout(io.StringIO()) as out:
            exec(compile(example.source, test.__name__, "single", dont_inherit=True), names)
        if out.getvalue():
            printed[example.source.strip()] = out.getvalue().strip()
    return names, printed


# ---------------------------------------------------------------- the examples

newly = pytest.mark.filterwarnings(
    "ignore:.*newly initialised"
)  # the checkpoint has no such head, as documented


def test_wav2vec2_conformer_config() -> None:
    """Wav2Vec2ConformerConfig.

    >>> from w2vc import Wav2Vec2ConformerConfig, Wav2Vec2ConformerModel

    >>> # Initializing a Wav2Vec2Conformer facebook/wav2vec2-conformer-rel-pos-large style configuration
    >>> configuration = Wav2Vec2ConformerConfig()

    >>> # Initializing a model (with random weights) from the facebook/wav2vec2-conformer-rel-pos-large style configuration
    >>> model = Wav2Vec2ConformerModel(configuration)

    >>> # Accessing the model configuration
    >>> configuration = model.config
    """
    names, _ = run(test_wav2vec2_conformer_config)
    assert names["configuration"] is names["model"].config
    assert names["configuration"].hidden_size == 768
    assert round(names["model"].num_parameters() / 1e6, 2) == 179.73


def test_wav2vec2_conformer_model(place: str) -> None:
    """Wav2Vec2ConformerModel.

    >>> from w2vc import AutoProcessor, Wav2Vec2ConformerModel
    >>> import torch
    >>> from w2vc import load_dataset

    >>> dataset = load_dataset("hf-internal-testing/librispeech_asr_demo", "clean", split="validation")
    >>> dataset = dataset.sort("id")
    >>> sampling_rate = dataset.features["audio"].sampling_rate

    >>> processor = AutoProcessor.from_pretrained("facebook/wav2vec2-conformer-rope-large-960h-ft")
    >>> model = Wav2Vec2ConformerModel.from_pretrained("facebook/wav2vec2-conformer-rope-large-960h-ft")

    >>> # audio file is decoded on the fly
    >>> inputs = processor(dataset[0]["audio"]["array"], sampling_rate=sampling_rate, return_tensors="pt")
    >>> with torch.no_grad():
    ...     outputs = model(**inputs)

    >>> last_hidden_states = outputs.last_hidden_state
    >>> list(last_hidden_states.shape)
    [1, 292, 1024]
    """
    names, printed = run(test_wav2vec2_conformer_model)
    assert list(printed.values()) == documented(
        test_wav2vec2_conformer_model
    )  # [1, 292, 1024] in both places
    if place == "stand-ins":
        peer, _ = run(test_wav2vec2_conformer_model, by_transformers=True)
        assert type(peer["model"]).__module__.startswith("transformers.")
        assert_close(
            "the documentation's base model", names["last_hidden_states"], peer["last_hidden_states"]
        )


def test_wav2vec2_conformer_for_ctc(place: str) -> None:
    """Wav2Vec2ConformerForCTC.

    >>> from w2vc import AutoProcessor, Wav2Vec2ConformerForCTC
    >>> from w2vc import load_dataset
    >>> import torch

    >>> dataset = load_dataset("hf-internal-testing/librispeech_asr_demo", "clean", split="validation")
    >>> dataset = dataset.sort("id")
    >>> sampling_rate = dataset.features["audio"].sampling_rate

    >>> processor = AutoProcessor.from_pretrained("facebook/wav2vec2-conformer-rope-large-960h-ft")
    >>> model = Wav2Vec2ConformerForCTC.from_pretrained("facebook/wav2vec2-conformer-rope-large-960h-ft")

    >>> # audio file is decoded on the fly
    >>> inputs = processor(dataset[0]["audio"]["array"], sampling_rate=sampling_rate, return_tensors="pt")
    >>> with torch.no_grad():
    ...     logits = model(**inputs).logits
    >>> predicted_ids = torch.argmax(logits, dim=-1)

    >>> # transcribe speech
    >>> transcription = processor.batch_decode(predicted_ids)
    >>> transcription[0]
    'MISTER QUILTER IS THE APOSTLE OF THE MIDDLE CLASSES AND WE ARE GLAD TO WELCOME HIS GOSPEL'

    >>> inputs["labels"] = processor(text=dataset[0]["text"], return_tensors="pt").input_ids

    >>> # compute loss
    >>> loss = model(**inputs).loss
    >>> round(loss.item(), 2)
    64.21
    """
    names, printed = run(test_wav2vec2_conformer_for_ctc)
    assert names["logits"].shape == (1, 292, 32)
    assert names["inputs"].keys() == {"input_values", "attention_mask", "labels"}
    if place == "stand-ins":
        assert len(names["transcription"][0]) > 10
        peer, theirs = run(test_wav2vec2_conformer_for_ctc, by_transformers=True)
        assert type(peer["processor"]).__module__.startswith("transformers.")
        assert_close("the documentation's CTC logits", names["logits"], peer["logits"])
        assert_close("the documentation's CTC loss", names["loss"], peer["loss"])
        assert printed == theirs
    else:
        assert list(printed.values()) == documented(test_wav2vec2_conformer_for_ctc)


@newly
def test_wav2vec2_conformer_for_sequence_classification(place: str) -> None:
    """Wav2Vec2ConformerForSequenceClassification.

    >>> from w2vc import AutoFeatureExtractor, Wav2Vec2ConformerForSequenceClassification
    >>> from w2vc import load_dataset
    >>> import torch

    >>> dataset = load_dataset("hf-internal-testing/librispeech_asr_demo", "clean", split="validation")
    >>> dataset = dataset.sort("id")
    >>> sampling_rate = dataset.features["audio"].sampling_rate

    >>> feature_extractor = AutoFeatureExtractor.from_pretrained("facebook/wav2vec2-conformer-rope-large-960h-ft")
    >>> model = Wav2Vec2ConformerForSequenceClassification.from_pretrained("facebook/wav2vec2-conformer-rope-large-960h-ft")

    >>> # audio file is decoded on the fly
    >>> inputs = feature_extractor(dataset[0]["audio"]["array"], sampling_rate=sampling_rate, return_tensors="pt")

    >>> with torch.no_grad():
    ...     logits = model(**inputs).logits

    >>> predicted_class_ids = torch.argmax(logits, dim=-1).item()
    >>> predicted_label = model.config.id2label[predicted_class_ids]

    >>> # compute loss - target_label is e.g. "down"
    >>> target_label = model.config.id2label[0]
    >>> inputs["labels"] = torch.tensor([model.config.label2id[target_label]])
    >>> loss = model(**inputs).loss
    """
    names, _ = run(test_wav2vec2_conformer_for_sequence_classification)
    assert names["logits"].shape == (1, 2)
    assert names["predicted_label"] == f"LABEL_{names['predicted_class_ids']}"
    assert names["target_label"] == "LABEL_0"
    wanted = torch.nn.functional.cross_entropy(names["logits"], torch.tensor([0]))
    assert_close("the documentation's classification loss", names["loss"], wanted)


@newly
def test_wav2vec2_conformer_for_audio_frame_classification(place: str) -> None:
    """Wav2Vec2ConformerForAudioFrameClassification.

    >>> from w2vc import AutoFeatureExtractor, Wav2Vec2ConformerForAudioFrameClassification
    >>> from w2vc import load_dataset
    >>> import torch

    >>> dataset = load_dataset("hf-internal-testing/librispeech_asr_demo", "clean", split="validation")
    >>> dataset = dataset.sort("id")
    >>> sampling_rate = dataset.features["audio"].sampling_rate

    >>> feature_extractor = AutoFeatureExtractor.from_pretrained("facebook/wav2vec2-conformer-rope-large-960h-ft")
    >>> model = Wav2Vec2ConformerForAudioFrameClassification.from_pretrained("facebook/wav2vec2-conformer-rope-large-960h-ft")

    >>> # audio file is decoded on the fly
    >>> inputs = feature_extractor(dataset[0]["audio"]["array"], return_tensors="pt", sampling_rate=sampling_rate)
    >>> with torch.no_grad():
    ...     logits = model(**inputs).logits

    >>> probabilities = torch.sigmoid(logits[0])
    >>> # labels is a one-hot array of shape (num_frames, num_speakers)
    >>> labels = (probabilities > 0.5).long()
    """
    names, _ = run(test_wav2vec2_conformer_for_audio_frame_classification)
    assert names["logits"].shape == (1, 292, 2)
    assert names["labels"].shape == (292, 2)  # (num_frames, num_speakers)
    assert torch.equal(names["labels"], (names["logits"][0] > 0).long())


@newly
def test_wav2vec2_conformer_for_x_vector(place: str) -> None:
    """Wav2Vec2ConformerForXVector.

    >>> from w2vc import AutoFeatureExtractor, Wav2Vec2ConformerForXVector
    >>> from w2vc import load_dataset
    >>> import torch

    >>> dataset = load_dataset("hf-internal-testing/librispeech_asr_demo", "clean", split="validation")
    >>> dataset = dataset.sort("id")
    >>> sampling_rate = dataset.features["audio"].sampling_rate

    >>> feature_extractor = AutoFeatureExtractor.from_pretrained("facebook/wav2vec2-conformer-rope-large-960h-ft")
    >>> model = Wav2Vec2ConformerForXVector.from_pretrained("facebook/wav2vec2-conformer-rope-large-960h-ft")

    >>> # audio file is decoded on the fly
    >>> inputs = feature_extractor(
    ...     [d["array"] for d in dataset[:2]["audio"]], sampling_rate=sampling_rate, return_tensors="pt", padding=True
    ... )
    >>> with torch.no_grad():
    ...     embeddings = model(**inputs).embeddings

    >>> embeddings = torch.nn.functional.normalize(embeddings, dim=-1).cpu()

    >>> # the resulting embeddings can be used for cosine similarity-based retrieval
    >>> cosine_sim = torch.nn.CosineSimilarity(dim=-1)
    >>> similarity = cosine_sim(embeddings[0], embeddings[1])
    >>> threshold = 0.7  # the optimal threshold is dataset-dependent
    >>> if similarity < threshold:
    ...     print("Speakers are not the same!")
    """
    names, printed = run(test_wav2vec2_conformer_for_x_vector)
    assert names["embeddings"].shape == (2, names["model"].config.xvector_output_dim)
    assert_close("the length of an embedding", names["embeddings"].norm(dim=-1), torch.ones(2))
    assert -1 <= names["similarity"] <= 1
    assert list(printed.values()) == ["Speakers are not the same!"] * bool(names["similarity"] < 0.7)


def test_wav2vec2_conformer_for_pre_training(place: str) -> None:
    """Wav2Vec2ConformerForPreTraining.

    >>> import torch
    >>> from w2vc import AutoFeatureExtractor, Wav2Vec2ConformerForPreTraining
    >>> from w2vc import compute_mask_indices as _compute_mask_indices, sample_negative_indices as _sample_negative_indices
    >>> from w2vc import load_dataset

    >>> feature_extractor = AutoFeatureExtractor.from_pretrained("facebook/wav2vec2-conformer-rel-pos-large")
    >>> model = Wav2Vec2ConformerForPreTraining.from_pretrained("facebook/wav2vec2-conformer-rel-pos-large")

    >>> ds = load_dataset("hf-internal-testing/librispeech_asr_dummy", "clean", split="validation")
    >>> input_values = feature_extractor(ds[0]["audio"]["array"], return_tensors="pt").input_values  # Batch size 1

    >>> # compute masked indices
    >>> batch_size, raw_sequence_length = input_values.shape
    >>> sequence_length = model._get_feat_extract_output_lengths(raw_sequence_length).item()
    >>> mask_time_indices = _compute_mask_indices(
    ...     shape=(batch_size, sequence_length), mask_prob=0.2, mask_length=2
    ... )
    >>> sampled_negative_indices = _sample_negative_indices(
    ...     features_shape=(batch_size, sequence_length),
    ...     num_negatives=model.config.num_negatives,
    ...     mask_time_indices=mask_time_indices,
    ... )
    >>> mask_time_indices = torch.tensor(data=mask_time_indices, device=input_values.device, dtype=torch.long)
    >>> sampled_negative_indices = torch.tensor(
    ...     data=sampled_negative_indices, device=input_values.device, dtype=torch.long
    ... )

    >>> with torch.no_grad():
    ...     outputs = model(input_values, mask_time_indices=mask_time_indices)

    >>> # compute cosine similarity between predicted (=projected_states) and target (=projected_quantized_states)
    >>> cosine_sim = torch.cosine_similarity(outputs.projected_states, outputs.projected_quantized_states, dim=-1)

    >>> # show that cosine similarity is much higher than random
    >>> cosine_sim[mask_time_indices.to(torch.bool)].mean() > 0.5
    tensor(True)

    >>> # for contrastive loss training model should be put into train mode
    >>> model = model.train()
    >>> loss = model(
    ...     input_values, mask_time_indices=mask_time_indices, sampled_negative_indices=sampled_negative_indices
    ... ).loss
    """
    names, printed = run(test_wav2vec2_conformer_for_pre_training)
    T, config = names["sequence_length"], names["model"].config
    assert names["mask_time_indices"].shape == (1, T)
    assert 0 < names["mask_time_indices"].sum() < T
    assert names["sampled_negative_indices"].shape == (1, T, config.num_negatives)
    assert names["outputs"].projected_states.shape == (1, T, config.proj_codevector_dim)
    assert names["cosine_sim"].shape == (1, T)
    assert names["model"].training
    assert torch.isfinite(names["loss"])
    assert names["loss"].requires_grad
    assert (
        list(printed.values()) == documented(test_wav2vec2_conformer_for_pre_training) or place == "stand-ins"
    )


# ---------------------------------------------------------------- the examples are all there

SECTIONS = [
    "Config", "Model", "ForCTC", "ForSequenceClassification", "ForAudioFrameClassification", "ForXVector", "ForPreTraining",
]  # fmt: skip


def test_every_class_has_its_example_and_imports_from_w2vc_alone() -> None:
    tests = [
        t
        for t in vars(sys.modules[__name__]).values()
        if inspect.isfunction(t) and ">>> " in (t.__doc__ or "")
    ]
    assert {(test.__doc__ or "").split(".")[0] for test in tests} == {
        f"Wav2Vec2Conformer{s}" for s in SECTIONS
    }
    for test in tests:
        imports = [line for line in example_of(test).splitlines() if re.match(r">>> (from|import) ", line)]
        assert imports
        assert all(re.match(r">>> (from w2vc import |import torch$)", line) for line in imports), imports


# ---------------------------------------------------------------- every class, argument, default, field and shape

KNOBS: dict[str, Any] = dict(
    vocab_size=None, hidden_size=768, num_hidden_layers=12, num_attention_heads=12, intermediate_size=3072,
    hidden_act="gelu", hidden_dropout=0.1, activation_dropout=0.1, attention_dropout=0.1, feat_proj_dropout=0.0,
    feat_quantizer_dropout=0.0, final_dropout=0.1, layerdrop=0.1, initializer_range=0.02, layer_norm_eps=1e-05,
    feat_extract_norm="group", feat_extract_activation="gelu", conv_dim=(512, 512, 512, 512, 512, 512, 512),
    conv_stride=(5, 2, 2, 2, 2, 2, 2), conv_kernel=(10, 3, 3, 3, 3, 2, 2), conv_bias=False,
    num_conv_pos_embeddings=128, num_conv_pos_embedding_groups=16, apply_spec_augment=True, mask_time_prob=0.05,
    mask_time_length=10, mask_time_min_masks=2, mask_feature_prob=0.0, mask_feature_length=10,
    mask_feature_min_masks=0, num_codevectors_per_group=320, num_codevector_groups=2,
    contrastive_logits_temperature=0.1, num_negatives=100, codevector_dim=256, proj_codevector_dim=256,
    diversity_loss_weight=0.1, ctc_loss_reduction="sum", ctc_zero_infinity=False, use_weighted_layer_sum=False,
    classifier_proj_size=256, tdnn_dim=(512, 512, 512, 512, 1500), tdnn_kernel=(5, 3, 3, 1, 1),
    tdnn_dilation=(1, 2, 3, 1, 1), xvector_output_dim=512, pad_token_id=0, bos_token_id=1, eos_token_id=2,
    add_adapter=False, adapter_kernel_size=3, adapter_stride=2, num_adapter_layers=3, output_hidden_size=None,
    position_embeddings_type="relative", rotary_embedding_base=10000, max_source_positions=5000,
    conv_depthwise_kernel_size=31, conformer_conv_dropout=0.1,
)  # fmt: skip
CHOICES: dict[str, list[Any]] = {  # values that the documentation names, and one of each kind that it allows
    "hidden_act": ["gelu", "relu", "selu", "gelu_new", torch.tanh],
    "feat_extract_activation": ["gelu", "relu", "selu", "gelu_new", torch.tanh],
    "feat_extract_norm": ["group", "layer"],
    "position_embeddings_type": ["relative", "rotary", None],
    "ctc_loss_reduction": ["sum", "mean"],
    "conv_dim": [[16] * 7, (16,) * 7],
    "conv_stride": [[5, 2, 2, 2, 2, 2, 2]],
    "conv_kernel": [[10, 3, 3, 3, 3, 2, 2]],
    "tdnn_dim": [[8, 8, 8, 8, 8]],
    "tdnn_kernel": [[5, 3, 3, 1, 1]],
    "tdnn_dilation": [[1, 2, 3, 1, 1]],
}


def test_every_documented_knob_has_its_default() -> None:
    config = w2vc.Wav2Vec2ConformerConfig()
    signature = inspect.signature(w2vc.Wav2Vec2ConformerConfig).parameters
    for name, default in KNOBS.items():
        assert signature[name].default == default, name
        expected = (
            768 if name == "output_hidden_size" else default
        )  # "if not defined, this defaults to hidden-size"
        assert getattr(config, name) == expected, name
        assert f"    {name}: " in (w2vc.Wav2Vec2ConformerConfig.__doc__ or ""), f"{name} is not explained"
        assert name in config.to_dict()
    assert len(KNOBS) == 58


@pytest.mark.parametrize("knob", CHOICES)
def test_every_documented_choice_builds_a_model_that_runs(knob: str) -> None:
    for choice in CHOICES[knob]:
        knobs = (TINY_STACK if knob.startswith("conv_") else {}) | {knob: choice}
        model = w2vc.Wav2Vec2ConformerModel(tiny_config(**knobs)).eval()
        with torch.no_grad():
            assert torch.isfinite(model(torch.randn(1, 6000)).last_hidden_state).all(), choice


FORWARD = "input_values attention_mask {} output_attentions output_hidden_states return_dict {}"
CLASSES: dict[
    str, tuple[str, str, str]
] = {  # class -> arguments of forward, output class, fields with their shapes
    "Wav2Vec2ConformerModel": (
        FORWARD.format("mask_time_indices", ""),
        "Wav2Vec2BaseModelOutput",
        "last_hidden_state:BTD extract_features:BTC hidden_states attentions",
    ),
    "Wav2Vec2ConformerForCTC": (
        FORWARD.format("", "labels"),
        "CausalLMOutput",
        "loss logits:BTV hidden_states attentions",
    ),
    "Wav2Vec2ConformerForSequenceClassification": (
        FORWARD.format("", "labels"),
        "SequenceClassifierOutput",
        "loss logits:BN hidden_states attentions",
    ),
    "Wav2Vec2ConformerForAudioFrameClassification": (
        FORWARD.format("labels", ""),
        "TokenClassifierOutput",
        "loss logits:BTN hidden_states attentions",
    ),
    "Wav2Vec2ConformerForXVector": (
        FORWARD.format("", "labels"),
        "XVectorOutput",
        "loss logits:BX embeddings:BX hidden_states attentions",
    ),
    "Wav2Vec2ConformerForPreTraining": (
        FORWARD.format("mask_time_indices sampled_negative_indices", ""),
        "Wav2Vec2ConformerForPreTrainingOutput",
        "loss projected_states:BTP projected_quantized_states:BTP codevector_perplexity hidden_states attentions "
        "contrastive_loss diversity_loss",
    ),
}
SIZES = {"B": 2, "T": 18, "D": 32, "C": 16, "V": 32, "N": 3, "X": 16, "P": 16}
classes = pytest.mark.parametrize("name", CLASSES)


def a_head(name: str, **knobs: Any) -> Any:
    torch.manual_seed(0)
    labels = {"id2label": {0: "a", 1: "b", 2: "c"}, "label2id": {"a": 0, "b": 1, "c": 2}}
    return getattr(w2vc, name)(tiny_config(**labels, **knobs)).eval()


def teaching(name: str) -> dict[str, Any]:
    """The arguments that make a head return a loss."""
    T = SIZES["T"]
    mask = w2vc.compute_mask_indices((2, T), 0.5, 2, min_masks=2)
    return {
        "Wav2Vec2ConformerModel": {},
        "Wav2Vec2ConformerForCTC": {"labels": torch.tensor([[5, 6, 7], [8, 9, -100]])},
        "Wav2Vec2ConformerForSequenceClassification": {"labels": torch.tensor([0, 2])},
        "Wav2Vec2ConformerForAudioFrameClassification": {
            "labels": torch.eye(3).long()[torch.arange(T) % 3].expand(2, T, 3)
        },
        "Wav2Vec2ConformerForXVector": {"labels": torch.tensor([0, 2])},
        "Wav2Vec2ConformerForPreTraining": {
            "mask_time_indices": mask,
            "sampled_negative_indices": w2vc.sample_negative_indices((2, T), 10, mask),
        },
    }[name]


@classes
def test_arguments_stand_in_the_documented_order(name: str) -> None:
    cls = getattr(w2vc, name)
    forward = inspect.signature(cls.forward).parameters
    documented_arguments = CLASSES[name][0].split()
    assert list(forward)[1 : 1 + len(documented_arguments)] == documented_arguments
    for argument, parameter in list(forward.items())[2:]:
        assert parameter.default is None, argument
    told = cls.forward.__doc__ or ""
    for argument in documented_arguments:
        explained = re.search(rf"`{argument}`|\b{argument}:", told)
        assert explained or re.search(r"the base|`Wav2Vec2ConformerModel`", told), (
            f"{argument} is not explained here, nor is the reader sent to the base model"
        )
    constructor = list(inspect.signature(cls).parameters)
    assert constructor == ["config", "target_lang"] if name.endswith("CTC") else constructor[0] == "config"


@classes
def test_outputs_have_the_documented_fields_and_shapes(name: str) -> None:
    model, (_, output_name, fields) = a_head(name), CLASSES[name]
    x = torch.randn(2, 400 + 320 * (SIZES["T"] - 1))
    everything = {"output_attentions": True, "output_hidden_states": True}
    with torch.no_grad():
        output = model(x, **teaching(name), **everything)
    assert type(output) is getattr(w2vc, output_name)
    names = [field.partition(":")[0] for field in fields.split()]
    assert list(output.keys()) == names
    for field in fields.split():
        key, _, letters = field.partition(":")
        if letters:
            assert list(output[key].shape) == [SIZES[letter] for letter in letters], key
        elif "loss" in key or "perplexity" in key:
            assert output[key].numel() == 1
    layers, (B, T, D) = model.config.num_hidden_layers, (SIZES[letter] for letter in "BTD")
    assert [tuple(h.shape) for h in output.hidden_states] == [(B, T, D)] * (layers + 1)
    heads = model.config.num_attention_heads
    assert [tuple(a.shape) for a in output.attentions] == [(B, heads, T, T)] * layers
    for map_ in output.attentions:  # "after the attention softmax"
        assert_close("rows of an attention map", map_.sum(-1), torch.ones(B, heads, T))


@classes
def test_a_plain_tuple_on_request(name: str) -> None:
    """ "if return_dict=False is passed or when config.return_dict=False" """
    model, x = a_head(name), torch.randn(2, 6000)
    with torch.no_grad():
        output = model(x)
        for plain in (model(x, return_dict=False), output.to_tuple()):
            assert type(plain) is tuple
            assert len(plain) == len(output)
            assert all(torch.equal(mine, output[i]) for i, mine in enumerate(plain))
        model.config.return_dict = False
        assert type(model(x)) is tuple
        assert type(model(x, return_dict=True)) is type(output)
        model.config.return_dict = True
        for switch in ("output_attentions", "output_hidden_states"):
            setattr(model.config, switch, True)
            assert output.__class__ is type(model(x))
            assert model(x)[switch.removeprefix("output_")]


@classes
def test_the_generic_methods_of_a_pretrained_model(name: str, tmp_path: Path) -> None:
    """ "(such as downloading or saving etc.)", and "a PyTorch nn.Module sub-class" """
    model = a_head(name)
    assert isinstance(model, torch.nn.Module)
    model.save_pretrained(tmp_path)
    again = getattr(w2vc, name).from_pretrained(tmp_path)
    assert all(torch.equal(t, again.state_dict()[key]) for key, t in model.state_dict().items())
    assert again.config.to_dict().items() >= model.config.to_dict().items()


def test_classes_of_the_library_that_the_documentation_leans_on(tmp_path: Path) -> None:
    """The processor, "for padding and conversion into a tensor of type torch.FloatTensor"."""
    write_released(stand_in(), tmp_path)
    processor = w2vc.AutoProcessor.from_pretrained(tmp_path)
    assert type(processor) is w2vc.Wav2Vec2Processor
    assert type(processor.feature_extractor) is w2vc.Wav2Vec2FeatureExtractor
    assert type(processor.tokenizer) is w2vc.Wav2Vec2CTCTokenizer
    assert type(w2vc.AutoFeatureExtractor.from_pretrained(tmp_path)) is w2vc.Wav2Vec2FeatureExtractor
    sound = [[0.1, -0.2] * 500, [0.3, -0.1] * 400]  # "an array of type List[float]"
    batch = processor(sound, sampling_rate=16_000, padding=True, return_tensors="pt")
    assert (batch["input_values"].dtype, batch["attention_mask"].dtype) == (torch.float32, torch.int64)
    assert batch["attention_mask"].sum(1).tolist() == [
        1000,
        800,
    ]  # 1 for tokens that are not masked, 0 for masked
    assert processor.batch_decode(processor(text=["HI"], return_tensors="pt").input_ids) == ["HI"]
    for name in [*CLASSES, *(output for _, output, _ in CLASSES.values()), "Wav2Vec2ConformerConfig"]:
        assert name in w2vc.__all__, f"from w2vc import {name} must work"
