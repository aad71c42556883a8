"""Reports that fit the model's class, each figure with its interval; sets by name."""

from __future__ import annotations

import itertools
import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from helpers import tiny_config
from w2vc.config import Wav2Vec2ConformerConfig
from w2vc.data.audio import Wav2Vec2FeatureExtractor
from w2vc.data.batches import data_loader, turn_order
from w2vc.data.corpus import KEYWORDS, Speech, Utterance, frame_activity, load_speech
from w2vc.evaluation import measures as M
from w2vc.evaluation import reports as E
from w2vc.files.pretrained import demo_folder
from w2vc.model.classification import (
    SequenceClassifierOutput,
    TokenClassifierOutput,
    Wav2Vec2ConformerForAudioFrameClassification,
    Wav2Vec2ConformerForSequenceClassification,
)
from w2vc.model.ctc import Wav2Vec2ConformerForCTC
from w2vc.model.features import receptive_field
from w2vc.model.pretraining import Wav2Vec2ConformerForPreTraining
from w2vc.model.speaker import Wav2Vec2ConformerForXVector, XVectorOutput
from w2vc.model.wav2vec2 import Wav2Vec2ConformerModel
from w2vc.text.tokenizer import Wav2Vec2CTCTokenizer, Wav2Vec2Processor, build_vocabulary
from w2vc.text.transcription import transcribe
from w2vc.training.objectives import PretrainingObjective
from w2vc.training.recipes import Recipe

pytest.importorskip("jiwer")
pytest.importorskip("scipy")


# ------------------------------------------------------------------------------------------ probe and contrast


@pytest.fixture(scope="module")
def some() -> Speech:
    """A few utterances of four speakers."""
    speech = load_speech("builtin", "test").filter(speaker=["f11", "f12", "m11", "m12"])
    return speech.filter(lambda u: u.kind == "keyword" and u.text in KEYWORDS[:4])


def pretraining_model(**knobs: Any) -> Wav2Vec2ConformerForPreTraining:
    torch.manual_seed(0)
    return Wav2Vec2ConformerForPreTraining(tiny_config(num_negatives=5, **knobs)).eval()


@pytest.mark.parametrize("crop", [{}, {"crop_seconds": 0.5, "crop": "shortest"}])
def test_contrastive_report_is_the_training_log(some: Speech, crop: dict[str, Any]) -> None:
    """The same set in the same batches gives the figures that a run would log for it."""
    recipe = Recipe.from_dict({"data": {"batch_seconds": 6.0, **crop}, "pretraining": {"mask_length": 3}})
    model, extractor = pretraining_model(), Wav2Vec2FeatureExtractor(return_attention_mask=True)
    model.train()
    ours = E.contrastive_report(model, some, extractor, recipe)
    assert model.training
    objective = PretrainingObjective(recipe, model.eval().config, extractor)
    sums: dict[str, torch.Tensor] = {}
    with torch.no_grad():
        for batch in data_loader(some, objective.collator(False), max_seconds=6.0, seed=0):
            _, result = objective.forward(model, batch)
            for key, value in objective.measure(batch, result).items():
                sums[key] = sums.get(key, 0) + value
    theirs = objective.summarise(sums)
    assert sums["questions"] > 100
    for key, value in ours.items():
        assert value == pytest.approx(theirs[key], rel=1e-5), key


# ------------------------------------------------------------------------------------------ reports


def folder_of(model: Any, folder: Path) -> Path:
    model.save_pretrained(folder)
    Wav2Vec2FeatureExtractor(return_attention_mask=True).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A CTC checkpoint with its processor."""
    folder = tmp_path_factory.mktemp("ctc")
    vocabulary = build_vocabulary(["abcdefghijklmnopqrstuvwxyz '"])
    torch.manual_seed(0)
    Wav2Vec2ConformerForCTC(tiny_config(vocab_size=len(vocabulary))).save_pretrained(folder)
    Wav2Vec2Processor(
        Wav2Vec2FeatureExtractor(return_attention_mask=True), Wav2Vec2CTCTokenizer(vocabulary)
    ).save_pretrained(folder)
    return folder


def test_ctc_report(written: Path) -> None:
    speech = load_speech("builtin", "test")
    speech = Speech(
        [
            *speech.filter(kind="keyword")[:4],
            *speech.filter(kind="digits")[:2],
            Utterance("silent", np.zeros(8000, np.float32)),
        ],
        "mine",
    )
    report = E.evaluate(written, speech, draws=50)
    model, processor = (
        Wav2Vec2ConformerForCTC.from_pretrained(written),
        Wav2Vec2Processor.from_pretrained(written),
    )
    said = [t.text for t in transcribe(speech[:6], model, processor, chunk_seconds=None)]
    wer = M.word_error_rate([u.text for u in speech[:6]], said, normalise=M.plain_text)
    assert report["WER"].value == wer.rate
    assert list(report) == ["WER", "CER", "WER digits", "CER digits", "WER keyword", "CER keyword"]
    assert f"{wer.errors:,} errors in {wer.length:,}" in report["WER"].note
    assert report["CER"].low <= report["CER"].value <= report["CER"].high
    assert any("1 of 7 utterances left out" in note for note in report.notes)
    rows = report.details["transcripts"]
    assert [row["hypothesis"] for row in rows] == said
    assert sum(row["word_errors"] for row in rows) == wer.errors
    assert len(report.table().splitlines()) == 2 + len(report) + len(report.notes)
    plain = json.loads(json.dumps(report.to_dict()))
    assert plain["measures"]["WER"]["value"] == wer.rate
    again = E.evaluate(model, speech, processor, draws=50)
    assert again.to_dict() == report.to_dict()
    with pytest.raises(ValueError, match="no text is known"):
        E.evaluate(model, speech[6:], processor)


def test_texts_are_compared_plainly_unless_asked(written: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    u = load_speech("builtin", "test")[0]
    loud = Speech([Utterance("loud", u.audio, text=u.text.upper() + "!")])
    monkeypatch.setattr(
        E, "transcribe", lambda sounds, *a, **k: [type("T", (), {"text": u.text})() for _ in sounds]
    )
    assert E.evaluate(written, loud)["WER"].value == 0
    assert E.evaluate(written, loud, normalise=None)["WER"].value == 1


class Oracle(Wav2Vec2ConformerForSequenceClassification):
    """Knows each utterance by its length, and lies about one of them."""

    answers: dict[int, int]

    def forward(self, input_values: torch.Tensor, attention_mask: torch.Tensor, **_: Any) -> Any:
        known = [self.answers[int(n)] for n in attention_mask.sum(1)]
        return SequenceClassifierOutput(logits=torch.eye(self.config.num_labels)[known])


def test_sequence_report() -> None:
    speech = load_speech("builtin", "test").filter(kind=["keyword", "sentence"], speaker=["f11", "m11"])
    model = Oracle(tiny_config(id2label=dict(enumerate(KEYWORDS)))).train()
    asked = [u for u in speech if u.text in KEYWORDS]
    assert len({u.n_samples for u in asked}) == len(asked)
    model.answers = {u.n_samples: KEYWORDS.index(u.text) for u in asked}
    report = E.evaluate(model, speech, draws=50)
    assert model.training
    assert report["accuracy"].value == 1
    assert report.details["target"] == "text"
    assert (np.diag(report.details["confusion"]) == report.details["confusion"].sum(1)).all()
    assert any(
        f"{len(speech) - len(asked)} of {len(speech)} utterances left out" in note for note in report.notes
    )
    model.answers[asked[0].n_samples] = (KEYWORDS.index(asked[0].text) + 1) % 10
    assert E.evaluate(model, speech, draws=50)["accuracy"].value == pytest.approx(1 - 1 / len(asked))
    with pytest.raises(ValueError, match="that is a label of the model"):
        E.evaluate(Oracle(tiny_config(num_labels=3)), speech)
    with pytest.raises(ValueError, match="regression"):
        E.evaluate(Oracle(tiny_config(num_labels=1)), speech)


class FrameOracle(Wav2Vec2ConformerForAudioFrameClassification):
    """Knows the true turns of each utterance by its length, with the two names swapped."""

    truth: dict[int, np.ndarray]

    def forward(self, input_values: torch.Tensor, attention_mask: torch.Tensor, **_: Any) -> Any:
        n_frames = int(self._get_feat_extract_output_lengths(input_values.shape[1]))
        logits = torch.full((len(input_values), n_frames, self.config.num_labels), -1.0)
        for row, size in zip(logits, attention_mask.sum(1).tolist(), strict=True):
            on = torch.from_numpy(self.truth[size])
            row[: len(on)][on] = 1.0
        return TokenClassifierOutput(logits=logits)


def test_frame_reports() -> None:
    mixes = load_speech("builtin-mixes", "test")[:4]
    labels = {0: "speaker 1", 1: "speaker 2"}
    config = Wav2Vec2ConformerConfig.tiny(id2label=labels, problem_type="multi_label_classification")
    model = FrameOracle(config)
    grid = {"hop": 0.02, "middle": receptive_field(config.conv_kernel, config.conv_stride)[0] / 32_000}
    counts = {u.id: int(model._get_feat_extract_output_lengths(u.n_samples)) for u in mixes}
    truth = {
        u.n_samples: frame_activity(turn_order(u), list(labels.values()), counts[u.id], **grid) for u in mixes
    }
    model.truth = truth
    report = E.evaluate(model, mixes, draws=50)
    assert report["frame accuracy"].value == 1
    assert 0 < report["DER"].value < 0.02  # turns end between frames
    model.truth = {size: on[:, ::-1].copy() for size, on in truth.items()}
    report = E.evaluate(model, mixes, draws=50)
    assert report["frame accuracy"].value < 0.7
    assert report["DER"].value < 0.02  # names do not matter
    model.truth = {size: np.zeros_like(on) for size, on in truth.items()}
    assert E.evaluate(model, mixes, draws=50)["DER"].value == 1
    u = load_speech("builtin", "test")[0]
    phones = sorted({p.label for p in u.phones})[:-1]  # one label is missing: its frames do not count
    single = FrameOracle(Wav2Vec2ConformerConfig.tiny(id2label=dict(enumerate(phones))))
    n = int(single._get_feat_extract_output_lengths(u.n_samples))
    single.truth = {u.n_samples: frame_activity(u.phones, phones, n, **grid)}
    report = E.evaluate(single, Speech([u]))
    assert list(report) == ["frame accuracy"]
    assert report["frame accuracy"].value == 1
    with pytest.raises(ValueError, match="no phones are known"):
        E.evaluate(single, Speech([Utterance("x", u.audio)]))


class VoiceOracle(Wav2Vec2ConformerForXVector):
    """A vector for each speaker, found by the length of the utterance."""

    vectors: dict[int, torch.Tensor]

    def forward(self, input_values: torch.Tensor, attention_mask: torch.Tensor, **_: Any) -> Any:
        return XVectorOutput(embeddings=torch.stack([self.vectors[int(n)] for n in attention_mask.sum(1)]))


def test_speaker_report() -> None:
    speech = load_speech("builtin", "test").filter(kind="sentence")
    names = sorted(speech.speakers)
    model = VoiceOracle(tiny_config())
    model.vectors = {
        u.n_samples: torch.eye(8)[names.index(u.speaker)] + 0.01 * torch.randn(8) for u in speech
    }
    report = E.evaluate(model, speech, draws=30)
    assert list(report) == ["EER", "minDCF 0.01", "minDCF 0.05"]
    assert all(m.value == 0 for m in report.values())
    model.vectors = {u.n_samples: torch.randn(8) for u in speech}
    report = E.evaluate(model, speech, draws=30)
    assert 0.35 < report["EER"].value < 0.65
    assert report["EER"].low < report["EER"].value < report["EER"].high
    assert (
        f"{sum(a.speaker == b.speaker for a, b in itertools.combinations(speech, 2)):,} pairs of one speaker"
        in report["EER"].note
    )
    wide = E.evaluate(model, speech, draws=30, by="speaker")
    assert wide["EER"].value == report["EER"].value
    assert (wide["EER"].low, wide["EER"].high) != (report["EER"].low, report["EER"].high)
    vectors = torch.stack([model.vectors[u.n_samples] for u in speech])
    scores, same = (
        table[np.triu_indices(len(speech), 1)]
        for table in M.score_pairs(vectors, [u.speaker for u in speech])
    )
    assert report["EER"].value == pytest.approx(M.equal_error_rate(scores, same).value)
    for p in (0.01, 0.05):
        assert report[f"minDCF {p}"].value == pytest.approx(M.min_dcf(scores, same, p).value)
    assert "over speakers" in wide.table()
    with pytest.raises(ValueError, match="both kinds are needed"):
        E.evaluate(model, speech.filter(speaker="f11"))


def test_real_heads_do_not_depend_on_the_batch(some: Speech, tmp_path: Path) -> None:
    torch.manual_seed(0)
    knobs = {"tdnn_dim": (6, 6), "tdnn_kernel": (3, 1), "tdnn_dilation": (1, 1), "xvector_output_dim": 6}
    for model in (
        Wav2Vec2ConformerForSequenceClassification(tiny_config(id2label=dict(enumerate(KEYWORDS)))),
        Wav2Vec2ConformerForXVector(tiny_config(**knobs)),
        Wav2Vec2ConformerModel(tiny_config()),
        pretraining_model(),
    ):
        folder = folder_of(model, tmp_path / type(model).__name__)
        assert E.model_class(folder) is type(model)
        reports = [E.evaluate(model.train(), some, draws=20, batch_seconds=s) for s in (2, 60)]
        assert all(module.training for module in model.modules())
        loaded = E.evaluate(folder, some, draws=20)
        for name, measure in reports[0].items():
            assert measure.value == pytest.approx(reports[1][name].value, abs=1e-6), name
            assert measure.value == pytest.approx(loaded[name].value, abs=1e-6), name
    assert {
        "contrastive accuracy",
        "codes in use",
        "twins",
        "I(code; phone) / H(phone)",
        "phone probe",
    } <= set(loaded)
    assert set(loaded.details) == {"contrastive", "codes", "probe"}
    for name in ("contrastive accuracy", "codes in use", "I(code; phone) / H(phone)", "phone probe"):
        assert loaded[name].low < loaded[name].value < loaded[name].high, name
    contrast = E.contrastive_report(pretraining_model(), some)
    for name, key in (("contrastive accuracy", "accuracy"), ("codes in use", "used"), ("twins", "twins")):
        assert loaded[name].value == pytest.approx(contrast[key], rel=1e-5)
    assert math.isnan(loaded["phone purity"].low)
    assert loaded.to_dict()["measures"]["phone purity"]["low"] is None


@pytest.mark.gpu
def test_figures_are_the_same_on_a_device(some: Speech) -> None:
    model = pretraining_model()
    here, there = (E.evaluate(model.to(device), some, draws=5) for device in ("cpu", "cuda"))
    for name, measure in here.items():
        assert measure.value == pytest.approx(there[name].value, abs=0.02), name


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_small_types_are_measured_too(some: Speech, dtype: torch.dtype) -> None:
    report = E.evaluate(pretraining_model().to(dtype), some[:6], draws=5)
    exact = E.evaluate(pretraining_model(), some[:6], draws=5)
    for name in ("contrastive accuracy", "codes in use", "twins"):
        assert report[name].value == pytest.approx(exact[name].value, abs=0.1), name


def test_pretraining_report_without_phones(some: Speech) -> None:
    nameless = Speech([Utterance(u.id, u.audio) for u in some[:4]])
    report = E.evaluate(pretraining_model(), nameless, draws=20)
    assert list(report) == ["contrastive accuracy", "codes in use", "twins"]
    assert any("no phones are known" in note for note in report.notes)
    with pytest.raises(ValueError, match="measured by its phones"):
        E.evaluate(Wav2Vec2ConformerModel(tiny_config()), nameless)


def test_what_evaluate_refuses(some: Speech) -> None:
    for model, speech, options, message in (
        (torch.nn.Linear(1, 1), some, {}, "model is a Linear: allowed are Wav2Vec2ConformerForCTC"),
        (pretraining_model(), some[:0], {}, "speech has 0 utterances"),
        (pretraining_model(), some, {"by": "word"}, "by='word' must be"),
    ):
        with pytest.raises(ValueError, match=message):
            E.evaluate(model, speech, **options)
    with pytest.raises(TypeError, match="drawz"):
        E.evaluate(pretraining_model(), some, drawz=3)
    with pytest.raises(FileNotFoundError):
        E.evaluate("no/such-checkpoint-here", some)
    with pytest.raises(ValueError, match=r"4 utterances.*each its own id"):
        E.evaluate(pretraining_model(), Speech([*some[:3], some[0]]))


def test_an_utterance_without_a_hidden_frame_asks_nothing(some: Speech) -> None:
    short = Utterance("short", some[0].audio[:1600])  # 4 or 5 frames, and a span has 10
    model = pretraining_model()
    sums = E.contrastive_sums(model, Speech([*some[:2], short]))
    assert [float(sums[name]["questions"]) > 0 for name in (some[0].id, "short")] == [True, False]
    reports = [E.contrastive_report(model, Speech([*some[:2], *more])) for more in ([], [short])]
    for key in ("accuracy", "used", "twins"):
        assert reports[0][key] == pytest.approx(reports[1][key], abs=1e-6)


# ------------------------------------------------------------------------------------------ sets


def librispeech_like(root: Path) -> Path:
    """Two utterances as LibriSpeech is released: speaker/chapter/*.flac and a file of transcripts."""
    sf = pytest.importorskip("soundfile")
    chapter = root / "test-clean" / "1089" / "134686"
    chapter.mkdir(parents=True)
    lines = []
    for i, u in enumerate(load_speech("builtin", "test")[:2]):
        sf.write(chapter / f"1089-134686-{i:04}.flac", u.audio, 16_000)
        lines.append(f"1089-134686-{i:04} {u.text.upper()}\n")
    (chapter / "1089-134686.trans.txt").write_text("".join(lines))
    return root


def test_librispeech_from_disk(written: Path, tmp_path: Path) -> None:
    report = E.evaluate(written, librispeech_like(tmp_path), split="test-clean")
    assert report.about["utterances"] == 2
    assert report.about["speakers"] == 1
    assert report["WER"].note.endswith("too many")


CHAPTER = Path(__file__).resolve().parents[2] / "nbs" / "evaluation" / "reports.ipynb"


def test_documented_commands_measure_what_they_say(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The lines of the evaluation chapter: those with a network are read as meant, the one on a folder runs with the demo checkpoint."""
    cli = pytest.importorskip("w2vc.cli")
    cells = json.loads(CHAPTER.read_text(encoding="utf-8"))["cells"]
    text = "\n".join("".join(cell["source"]) for cell in cells if cell["cell_type"] == "markdown")
    lines = [line.split()[1:] for line in text.splitlines() if line.startswith("w2vc evaluate")]
    *released, local = lines
    asked: list[Any] = []

    def streamed(name: str, config: str | None, **options: Any) -> Any:
        asked.append((name, config, options["split"], options["streaming"]))
        return type("Rows", (), {"cast_column": lambda *_: []})()

    with monkeypatch.context() as patch:
        patch.setattr(pytest.importorskip("datasets"), "load_dataset", streamed)
        for words in released:
            assert cli.main(words) == 1  # nothing in it
            assert "there is no utterance in it" in capsys.readouterr().err
    assert asked == [("openslr/librispeech_asr", kind, "test", True) for kind in ("clean", "other")]
    with monkeypatch.context() as patch:
        opened: list[Any] = []
        patch.setattr(cli, "open_speech", lambda *names: names)

        def noted(model: str, *_: Any, **options: Any) -> Any:
            opened.append((model, options["device"]))
            return E.Report({}, {})

        patch.setattr(cli, "evaluate", noted)
        patch.setattr(E.Report, "__repr__", lambda self: "")
        for words in released:
            assert cli.main(words) == 0
        models = [f"facebook/wav2vec2-conformer-{kind}-large-960h-ft" for kind in ("rel-pos", "rope")]
        assert opened == [(model, "cuda") for model in models]
        capsys.readouterr()

    places = {"./my-model": str(demo_folder("ctc")), "LibriSpeech/": str(librispeech_like(tmp_path))}
    assert set(places) <= set(local)
    assert cli.main([places.get(word, word) for word in local]) == 0
    table = capsys.readouterr().out.splitlines()
    assert table[0].startswith("Wav2Vec2ConformerForCTC on")
    assert "test-clean: 2 utterances" in table[0]
    name, rate, *_ = table[2].split()
    assert name == "WER"
    assert float(rate) < 30  # upper case in the folder, lower case from the model: compared plainly


def test_librispeech_from_the_hub(written: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The offline sibling: a folder in the layout of openslr/librispeech_asr."""
    datasets = pytest.importorskip("datasets")
    from released import released_dataset

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path / "cache"))
    root = released_dataset(tmp_path / "librispeech_asr")
    report = E.evaluate(written, f"hf:{root}:clean:validation")
    assert report["WER"].value > 0
    assert report.about["speech"] == f"{root}:clean validation"


@pytest.mark.network
def test_released_checkpoint_on_librispeech(tmp_path: Path) -> None:
    """A handful of test-clean through the relative-position checkpoint: 1.85 % on all of it."""
    report = E.evaluate(
        "facebook/wav2vec2-conformer-rel-pos-large-960h-ft", "hf:openslr/librispeech_asr:clean:test", limit=16
    )
    assert report["WER"].value < 0.08
