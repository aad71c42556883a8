"""The views of the heads: what they draw is what the models say, and wrong checkpoints are refused."""

from __future__ import annotations

import math
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from helpers import tiny_config
from w2vc.config import Wav2Vec2ConformerConfig
from w2vc.data.audio import Wav2Vec2FeatureExtractor
from w2vc.data.corpus import Segment, Speech, Utterance, load_speech
from w2vc.explore import views
from w2vc.explore.views import (
    Track,
    codes_view,
    ctc_tracks,
    ctc_view,
    error_stretches,
    explore_page,
    open_checkpoint,
    read_ctc,
    speaker_vectors,
    speaker_view,
    trellis_view,
    turns_view,
    viterbi_scores,
    wrong_words,
)
from w2vc.model.classification import (
    Wav2Vec2ConformerForAudioFrameClassification,
    Wav2Vec2ConformerForSequenceClassification,
)
from w2vc.model.ctc import Wav2Vec2ConformerForCTC
from w2vc.model.features import FrameClock
from w2vc.model.pretraining import Wav2Vec2ConformerForPreTraining
from w2vc.model.speaker import Wav2Vec2ConformerForXVector
from w2vc.model.wav2vec2 import Wav2Vec2ConformerModel
from w2vc.text.alignment import viterbi
from w2vc.text.tokenizer import Wav2Vec2CTCTokenizer, Wav2Vec2Processor, build_vocabulary
from w2vc.text.transcription import transcribe

VOCABULARY = build_vocabulary(["abcdefghijklmnopqrstuvwxyz '"])


def shaken(model: Any) -> Any:
    """A model whose answers differ from frame to frame."""
    torch.manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return model.eval()


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("ctc")
    shaken(Wav2Vec2ConformerForCTC(tiny_config(vocab_size=len(VOCABULARY)))).save_pretrained(path)
    Wav2Vec2Processor(Wav2Vec2FeatureExtractor(), Wav2Vec2CTCTokenizer(VOCABULARY)).save_pretrained(path)
    return path


@pytest.fixture(scope="module")
def utterance() -> Utterance:
    return min(load_speech("builtin", "test").filter(kind="sentence"), key=lambda u: u.seconds)


@pytest.fixture
def no_pictures(monkeypatch: pytest.MonkeyPatch) -> None:
    """Drawing takes longer than all the rest."""
    still = views.Picture(b"\x89PNG\r\n\x1a\n", "A picture that says enough about itself", 100)
    monkeypatch.setattr(views, "plot_tracks", lambda *_, **__: None)
    monkeypatch.setattr(views, "render", lambda *_: still)


def test_a_reading_agrees_with_the_transcript_and_its_tracks_with_the_probabilities(
    folder: Path, utterance: Utterance
) -> None:
    reading = read_ctc(folder, utterance)
    assert reading.text == transcribe(utterance, str(folder), chunk_seconds=None).text
    assert [w.label for w in reading.aligned] == utterance.text.split()
    assert torch.allclose(reading.log_probs.exp().sum(-1), torch.ones(len(reading.path)), atol=1e-5)
    tracks = ctc_tracks(reading, least=0.05)
    heat = tracks[-1]
    assert heat.labels[-1] == "blank"
    places = [reading.symbols.index(label) for label in heat.labels]
    assert np.array_equal(heat.heat, reading.log_probs.exp()[:, places].T.numpy())
    left_out = [i for i in range(len(reading.symbols)) if i not in places]
    assert (reading.log_probs.exp()[:, left_out] < 0.05).all()
    first = [int((row >= 0.5 * row.max()).argmax()) for row in heat.heat[:-1]]
    assert first == sorted(first), "in the order of the first peak"


def test_the_text_may_be_given_or_unknown(folder: Path, utterance: Utterance) -> None:
    assert [w.label for w in read_ctc(folder, utterance.audio).aligned] == []
    assert [w.label for w in read_ctc(folder, utterance.audio, text="a dog").aligned] == ["a", "dog"]
    with pytest.raises(ValueError, match="too long a text"):
        read_ctc(folder, utterance.audio[:4000], text="a very long text indeed")


def test_words_are_wrong_where_they_do_not_match() -> None:
    assert wrong_words(["a", "dgo", "barks"], ["a", "dog", "barks"]) == [False, True, False]
    assert wrong_words(["the", "a", "dog"], ["a", "dog"]) == [True, False, False]
    assert wrong_words([], ["a"]) == []


def test_the_explorer_says_what_the_frame_says(folder: Path, utterance: Utterance, no_pictures: None) -> None:
    reading, data = read_ctc(folder, utterance), ctc_view(folder, utterance).data
    assert len(data["said"]) == len(reading.path) == data["frames"]
    for t in (0, 31, len(reading.path) - 1):
        best = reading.symbols[int(reading.path[t])]
        share = 100 * float(reading.log_probs[t].max().exp())
        assert data["said"][t].startswith(f"Frame {t}, {t * 0.02:.2f} s: {best} {share:.0f} %")
    word = reading.aligned[2]
    t = round(((word.start + word.end) / 2 - reading.clock.middle()) / reading.clock.step)
    assert f"“{word.label}”" in data["said"][t]
    assert data["facts"].startswith(f"Read: {reading.text}\nKnown text: {utterance.text}\n")
    assert "hatched: wrong" in data["key"].lower()
    assert data["clip"]["sound"].startswith("data:audio/")


def test_the_viterbi_has_the_score_of_the_trellis() -> None:
    torch.manual_seed(1)
    log_probs = torch.randn(12, 5, dtype=torch.float64).log_softmax(-1)
    states = torch.tensor([0, 1, 0, 2, 0, 2, 0])  # two equal labels
    bars = torch.tensor([-math.inf, -math.inf, -math.inf, 0.0, -math.inf, -math.inf, -math.inf]).double()
    walk, scores = viterbi(log_probs, states, bars), viterbi_scores(log_probs, states, bars)
    along = log_probs.gather(1, states[walk][:, None])[:, 0].cumsum(0)
    assert torch.allclose(scores[torch.arange(12), walk], along)
    assert torch.allclose(scores[-1, -2:].max(), along[-1])
    assert (scores[0, 2:] == -math.inf).all(), "a walk starts on one of the first two states"


def test_the_trellis_is_drawn_for_the_chosen_words(folder: Path, utterance: Utterance) -> None:
    words = utterance.text.split()
    picture = trellis_view(folder, utterance, words=slice(1, 3))
    assert picture.alt.startswith(f"The trellis of {words[1]} {words[2]}:")
    assert picture.png.startswith(b"\x89PNG")
    with pytest.raises(ValueError, match="text"):
        trellis_view(folder, utterance.audio)
    with pytest.raises(ValueError, match="text"):
        trellis_view(folder, utterance, words=slice(50, 60))


def test_hypotheses_over_time_end_with_those_of_the_whole(folder: Path, utterance: Utterance) -> None:
    data = views.beam_view(folder, utterance, beam_width=4, n_best=2, every=0.6).data
    reading = read_ctc(folder, utterance)
    _, processor = open_checkpoint(folder)
    found = views.CTCDecoder(processor, beam_width=4).decode(reading.log_probs, n_best=2)
    name, _, alt, _ = data["pages"][-1]
    assert name == f"{len(reading.path) * 0.02:.2f} s"
    assert found[0].text in alt
    assert len(data["pages"]) == math.ceil(len(reading.path) / 30)
    with pytest.raises(ValueError, match="every"):
        views.beam_view(folder, utterance, every=0.001)


def test_errors_are_named_frame_by_frame() -> None:
    truth = torch.tensor([[0, 0], [1, 0], [1, 0], [1, 1], [0, 0], [1, 0]]).bool()
    found = torch.tensor([[0, 0], [1, 0], [0, 1], [1, 0], [0, 1], [1, 0]]).bool()
    stretches = error_stretches(truth, found, 0.02)
    expected = [(2, 3, "confused"), (3, 4, "missed"), (4, 5, "false alarm")]
    assert [(round(a / 0.02), round(b / 0.02), sign) for _, a, b, sign in stretches] == expected
    assert error_stretches(truth, truth, 0.02) == []


def test_turns_are_those_of_the_model_in_the_order_of_the_truth(no_pictures: None) -> None:
    config = tiny_config(
        num_labels=2, problem_type="multi_label_classification", id2label={0: "speaker 1", 1: "speaker 2"}
    )
    model = shaken(Wav2Vec2ConformerForAudioFrameClassification(config))
    mix = min(load_speech("builtin-mixes", "test"), key=lambda u: u.seconds)
    data = turns_view(model, mix).data
    tracks = {track["name"]: track for track in data["tracks"]}
    assert [s[0] for s in tracks["true"]["stretches"]] == ["speaker 1"] * len(tracks["true"]["stretches"])
    assert len(tracks["chance 1"]["values"]) == data["frames"]
    assert {s[3] for s in tracks["errors"]["stretches"]} <= {"missed", "false alarm", "confused"}
    total = float(re.search(r"% of ([\d.]+) s", data["facts"])[1])
    assert total == pytest.approx(sum(t.end - t.start for t in mix.turns), abs=0.06)
    alone = turns_view(model, mix.audio[:32_000]).data
    assert "errors" not in {track["name"] for track in alone["tracks"]}, "no truth, no errors"


def test_codes_are_those_of_the_model(utterance: Utterance, no_pictures: None) -> None:
    model = shaken(Wav2Vec2ConformerForPreTraining(tiny_config()))
    reference = load_speech("builtin", "dev").filter(kind="keyword")[:6]
    data = codes_view(model, utterance, reference=reference).data
    codes = views.collect_codes(model, Speech([utterance])).codes
    row = next(track for track in data["tracks"] if track["name"] == "group 1")
    told = [label for label, start, end, _ in row["stretches"] for _ in range(round((end - start) / 0.02))]
    assert told == [str(code) for code in codes[:, 1]]
    assert f"group 0 code {codes[7, 0]}" in data["said"][7]


def test_vectors_come_in_the_order_of_the_speech() -> None:
    config = tiny_config(tdnn_dim=(16, 16, 32), tdnn_kernel=(3, 3, 1), tdnn_dilation=(1, 2, 1))
    model = shaken(Wav2Vec2ConformerForXVector(config))
    speech = load_speech("builtin", "test").filter(kind="sentence", speaker=["f11", "m11"])[:6]
    vectors = speaker_vectors(model, speech)
    assert not torch.allclose(vectors, vectors.flip(0), atol=1e-3)
    backwards = speaker_vectors(model, speech[::-1])
    assert torch.allclose(vectors, backwards.flip(0), atol=1e-5)
    picture = speaker_view(model, speech)
    assert f"{len(speech.speakers)} voices, 6 utterances" in picture.alt
    with pytest.raises(ValueError, match="two speakers or more"):
        speaker_view(model, speech[:1])


@pytest.mark.parametrize("view", [ctc_view, codes_view, turns_view])
def test_another_head_is_refused(view: Any, utterance: Utterance) -> None:
    with pytest.raises(ValueError, match=r"^model=.*is refused"):
        view(Wav2Vec2ConformerModel(tiny_config()), utterance)


def test_a_ctc_model_without_a_processor_is_refused(folder: Path, utterance: Utterance) -> None:
    with pytest.raises(ValueError, match="processor="):
        ctc_view(Wav2Vec2ConformerForCTC(Wav2Vec2ConformerConfig.from_pretrained(folder)), utterance)


def test_tracks_need_a_frame() -> None:
    u = Utterance("x", np.zeros(100, np.float32))
    with pytest.raises(ValueError, match="one frame"):
        views.track_explorer("x", u, [], [], FrameClock(), facts="", alt="nothing at all is to be seen here")


def test_a_picture_has_a_pattern_for_each_error() -> None:
    u = Utterance("x", np.zeros(16_000, np.float32))
    tracks = [Track("errors", [("", 0.1, 0.2, "missed"), ("", 0.3, 0.4, "false alarm"), ("", 0.5, 0.6, "")])]
    fig = views.plot_tracks(u, tracks, 0.02)
    assert [p.get_hatch() for p in fig.axes[2].patches] == [
        views.SIGNS["missed"],
        views.SIGNS["false alarm"],
        None,
    ]


# ------------------------------------------------------------------------------------------ the page


def test_a_page_holds_what_the_class_has(folder: Path, utterance: Utterance, tmp_path: Path) -> None:
    page = explore_page(utterance, folder, tmp_path / "p.html")
    text = page.read_text(encoding="utf-8")
    assert [
        h for h in ("Letters", "Codes", "Turns", "Answers", "Attention", "Shapes") if f"<h2>{h}</h2>" in text
    ] == [
        "Letters",
        "Attention",
        "Shapes",
    ]
    assert "Wav2Vec2ConformerForCTC" in text
    assert not re.search(r"""(?:src|href)=["'](?!data:)""", text), "everything is in the file"
    assert len(re.findall(r"<img[^>]*alt=\"[^\"]{25,}\"", text)) >= 2
    words = tiny_config(num_labels=2, id2label={0: "yes", 1: "no"}, label2id={"yes": 0, "no": 1})
    sequence = Wav2Vec2ConformerForSequenceClassification(words)
    text = explore_page(utterance, sequence, tmp_path / "q.html", end=1.0).read_text(encoding="utf-8")
    assert "<h2>Answers</h2>" in text
    assert "1.00 s of sound" in text


def test_a_large_model_is_cut_to_a_few_maps() -> None:
    model = Wav2Vec2ConformerModel(tiny_config(num_hidden_layers=6))
    assert views._few_maps(model, 2.0, None, None) == {"layers": None, "heads": None}
    few = views._few_maps(model, 12.0, None, None)
    assert few["layers"] == [0, 2, 3, 5]
    assert len(few["heads"]) <= 4
    assert views._few_maps(model, 12.0, [1], None) == {"layers": [1], "heads": None}, "a choice is kept"


@pytest.mark.parametrize(("start", "end"), [(5.0, None), (-1.0, None), (1.0, 0.5)])
def test_a_stretch_outside_is_refused(
    folder: Path, utterance: Utterance, tmp_path: Path, start: float, end: float | None
) -> None:
    with pytest.raises(ValueError, match="start="):
        explore_page(utterance, folder, tmp_path / "p.html", start=start, end=end)
    assert not list(tmp_path.iterdir()), "nothing is left behind"


def test_segments_track() -> None:
    assert views.plain_track("words", [Segment("a", 0.0, 0.5)]).stretches == [("a", 0.0, 0.5, "")]
