"""Long recordings: the cuts proved harmless on a model of known reach, then every source, edge, error and format."""

from __future__ import annotations

import io
import itertools
import json
import math
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

import helpers
import w2vc
from w2vc.config import Wav2Vec2ConformerConfig
from w2vc.data.audio import Wav2Vec2FeatureExtractor
from w2vc.data.corpus import load_speech
from w2vc.data.sound import normalise
from w2vc.files.pretrained import PreTrainedModel
from w2vc.model.ctc import Wav2Vec2ConformerForCTC
from w2vc.model.features import FeatureEncoder, FrameClock, conv_output_lengths, frame_mask, valid_lengths
from w2vc.text.alignment import TimedText
from w2vc.text.decoding import CTCDecoder
from w2vc.text.tokenizer import Wav2Vec2CTCTokenizer, Wav2Vec2Processor, build_vocabulary
from w2vc.text.transcription import (
    Transcript,
    frame_logits,
    plan_chunks,
    read_transcript,
    transcribe,
)

HOP, WIDTH, RATE = 320, 400, 16_000
REACH = 3  # frames that the stand-in hears to each side of its own


class Ears(PreTrainedModel):
    """Convolutions alone: each frame hears its 400 samples and those of `REACH` neighbours on each side."""

    def __init__(self, config: Wav2Vec2ConformerConfig) -> None:
        super().__init__(config)
        self.encoder = FeatureEncoder(config)
        self.head = nn.Conv1d(config.conv_dim[-1], config.vocab_size or 0, 2 * REACH + 1, padding=REACH)
        self.shapes: list[tuple[int, int]] = []

    def _get_feat_extract_output_lengths(self, input_lengths: Any, add_adapter: bool | None = None) -> Tensor:
        return conv_output_lengths(
            torch.as_tensor(input_lengths), self.config.conv_kernel, self.config.conv_stride
        )

    def forward(self, input_values: Tensor, attention_mask: Tensor, return_dict: bool | None = None) -> Any:
        self.shapes.append((input_values.shape[0], input_values.shape[1]))
        lengths = valid_lengths(attention_mask)
        hidden = self.encoder(input_values, lengths)
        real = frame_mask(self._get_feat_extract_output_lengths(lengths), hidden.shape[1])
        hidden = hidden.masked_fill(~real[..., None], 0)  # zeros after the end, as a lone row has
        return SimpleNamespace(logits=self.head(hidden.transpose(1, 2)).transpose(1, 2))


def ears(**knobs: Any) -> Any:
    torch.manual_seed(0)
    model = Ears(helpers.tiny_config(**{"feat_extract_norm": "layer", "vocab_size": 6, **knobs}))
    for p in model.parameters():
        nn.init.normal_(p, std=0.5)
    return model.eval()


def noise(n: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal(n).astype(np.float32)


def single_pass(model: Any, audio: np.ndarray) -> Tensor:
    """What the model says of a whole recording, normalised as the feature extractor does it."""
    with torch.no_grad():
        row = torch.from_numpy(normalise(audio))[None]
        return model(row, torch.ones(row.shape, dtype=torch.long)).logits[0].float()


def frames_of(n: int) -> int:
    return max((n - WIDTH) // HOP + 1, 0)


def seconds_of(frames: int) -> float:
    """Length of a chunk of so many frames."""
    return (HOP * (frames - 1) + WIDTH) / RATE


# ---- the plan


@settings(max_examples=200, deadline=None)
@given(T=st.integers(0, 90), rest=st.integers(0, HOP - 1), chunk=st.integers(1, 30), data=st.data())
def test_each_frame_comes_from_the_chunk_that_shows_most_around_it(
    T: int, rest: int, chunk: int, data: st.DataObject
) -> None:
    context = data.draw(st.integers(0, (chunk - 1) // 2))
    S = HOP * (T - 1) + WIDTH + rest if T else rest
    plan = plan_chunks(S, T, chunk, context)
    taken = [t for c in plan for t in range(c.first, c.last)]
    assert taken == list(range(T))
    spans = []
    for c in plan:
        assert c.start % HOP == 0
        assert 0 <= c.start < c.end <= S
        n = frames_of(c.end - c.start)
        assert n <= max(chunk, 1)
        assert c.skip == c.first - c.start // HOP
        assert c.last - c.first + c.skip <= n
        assert c.last > c.first
        spans.append((c.start // HOP, c.start // HOP + n))
    if plan:
        assert plan[-1].end == S

    def around(t: int, span: tuple[int, int]) -> float:
        """Frames on the worse side; the recording's own ends are no loss. Below 0: the chunk does not have the frame."""
        left = math.inf if span[0] == 0 and t >= 0 else t - span[0]
        right = math.inf if span[1] == T else span[1] - 1 - t
        return min(left, right)

    for c, span in zip(plan, spans, strict=True):
        for t in range(c.first, c.last):
            assert around(t, span) == max(around(t, other) for other in spans)
            assert around(t, span) >= context


def test_plan_edges() -> None:
    assert plan_chunks(0, 0, 10, 2) == plan_chunks(399, 0, 10, 2) == []
    assert plan_chunks(400, 1, 10, 2) == [(0, 400, 0, 0, 1)]
    S = HOP * 9 + WIDTH
    assert plan_chunks(S, 10, 10, 2) == plan_chunks(S, 10, None, 0) == [(0, S, 0, 0, 10)]
    assert plan_chunks(S + HOP, 11, 10, 2) == [(0, S, 0, 0, 5), (HOP, S + HOP, 4, 5, 11)]
    for chunk, context in ((4, 2), (0, 0), (5, -1)):
        with pytest.raises(ValueError, match="must be longer than its context"):
            plan_chunks(S, 10, chunk, context)


# ---- stitching is exact


@settings(max_examples=40, deadline=None)
@given(S=st.integers(0, 30_000), chunk=st.integers(2 * REACH + 1, 40), data=st.data(), rows=st.integers(1, 5))
def test_stitched_equals_a_single_pass(S: int, chunk: int, data: st.DataObject, rows: int) -> None:
    """Any length, chunk and batch; context at least as wide as the model's reach."""
    context = data.draw(st.integers(REACH, (chunk - 1) // 2))
    model, audio = ears(), noise(S)
    settings_ = {"chunk_seconds": seconds_of(chunk), "context_seconds": context * HOP / RATE}
    (logits,) = frame_logits([audio], model, **settings_, batch_seconds=rows * seconds_of(chunk))
    assert logits.shape == (frames_of(S), 6)
    assert logits.dtype == torch.float32
    if S >= WIDTH:
        helpers.assert_close("stitched logits", logits, single_pass(model, audio))


@pytest.mark.parametrize("context", range(REACH))
def test_with_less_context_it_is_not_exact(context: int) -> None:
    """The test above can fail: it does, at the frames beside the borders alone."""
    model, audio = ears(), noise(HOP * 99 + WIDTH)
    chunk = 20
    (logits,) = frame_logits(
        [audio], model, chunk_seconds=seconds_of(chunk), context_seconds=context * HOP / RATE
    )
    wrong = ((logits - single_pass(model, audio)).abs().amax(1) > 1e-3).nonzero()[:, 0].tolist()
    borders = [c.first for c in plan_chunks(len(audio), 100, chunk, context)][1:]
    missing = REACH - context
    assert set(wrong) <= {t for b in borders for t in range(b - missing, b + missing)}
    assert all(b in wrong and b - 1 in wrong for b in borders[:-1])  # the last one may have more context


def test_group_norm_sees_chunks() -> None:
    """Said in the documentation: statistics over time are those of a chunk, so nothing is exact."""
    model, audio = (
        ears(feat_extract_norm="group"),
        noise(HOP * 99 + WIDTH) * np.linspace(0.1, 2, HOP * 99 + WIDTH),
    )
    audio = audio.astype(np.float32)
    (logits,) = frame_logits([audio], model, chunk_seconds=1.0, context_seconds=0.2)
    assert helpers.difference(logits, single_pass(model, audio)) > 1e-2
    (whole,) = frame_logits([audio], model, chunk_seconds=None)
    helpers.assert_close("one chunk", whole, single_pass(model, audio))


def test_a_conformer_in_one_chunk_and_with_an_adapter() -> None:
    audio = noise(20_000)
    for knobs in ({}, {"add_adapter": True}):
        torch.manual_seed(0)
        model = Wav2Vec2ConformerForCTC(helpers.tiny_config(**knobs)).eval()
        (whole,) = frame_logits([audio], model, chunk_seconds=None)
        helpers.assert_close("transcription, one pass", whole, single_pass(model, audio))
        (cut,) = frame_logits([audio], model, chunk_seconds=0.8, context_seconds=0.2)
        assert cut.shape == whole.shape
        assert cut.abs().sum(1).min() > 0  # each frame was filled


@settings(max_examples=30, deadline=None)
@given(S=st.integers(400, 60_000), chunk=st.floats(0.35, 2), layers=st.integers(1, 3))
def test_an_adapters_frames_lie_on_its_own_grid(S: int, chunk: float, layers: int) -> None:
    """With an adapter a chunk has exactly the frames that the plan takes from it."""
    config = helpers.tiny_config(add_adapter=True, num_adapter_layers=layers)
    model = w2vc.Wav2Vec2ConformerModel(config)
    hop, width, _ = clock = FrameClock.of(config, adapter=True)
    T = int(model._get_feat_extract_output_lengths(S))
    frames = max(int(chunk * RATE) - width, 0) // hop + 1
    for c in plan_chunks(S, T, frames, (frames - 1) // 4, clock):
        assert int(model._get_feat_extract_output_lengths(c.end - c.start)) >= c.skip + c.last - c.first
        assert c.start % hop == 0


# ---- normalisation


def test_each_recording_is_normalised_once_and_not_per_chunk() -> None:
    """A quiet half and a loud half: normalised per chunk they would look alike."""
    model, audio = ears(), noise(HOP * 60 + WIDTH)
    audio[: len(audio) // 2] *= 0.01
    (logits,) = frame_logits([audio], model, chunk_seconds=0.4, context_seconds=0.1)
    helpers.assert_close("loud and quiet", logits, single_pass(model, audio))
    (raw,) = frame_logits([audio], model, normalise=False)
    assert helpers.difference(raw, logits) > 1e-2


def test_a_feature_extractor_that_does_not_normalise_is_obeyed() -> None:
    model, audio = conformer(feat_extract_norm="layer"), noise(20_000) * np.float32(0.01) + np.float32(0.02)
    raw = transcribe(audio, model, processor(do_normalize=False), sampling_rate=RATE)
    (logits,) = frame_logits([audio], model, normalise=False)
    assert said(raw) == said(read_transcript(logits, processor(), config=model.config, seconds=20_000 / RATE))
    assert said(raw) != said(transcribe(audio, model, processor(), sampling_rate=RATE))


# ---- batches


def conformer(**knobs: Any) -> Wav2Vec2ConformerForCTC:
    torch.manual_seed(0)
    model = Wav2Vec2ConformerForCTC(
        helpers.tiny_config(**{"vocab_size": len(processor().tokenizer), **knobs})
    )
    helpers.randomise_(model)
    with torch.no_grad():
        model.lm_head.weight.mul_(40)  # so that it babbles: an untrained model says one symbol only
    return model.eval()


def processor(**knobs: Any) -> Wav2Vec2Processor:
    tokenizer = Wav2Vec2CTCTokenizer(build_vocabulary(["the quick brown fox jumps over a lazy dog"]))
    return Wav2Vec2Processor(Wav2Vec2FeatureExtractor(**knobs), tokenizer)


def said(transcript: Transcript) -> Any:
    """Everything that rounding does not touch: all but the confidence."""
    return transcript.text, transcript.duration, [(w.label, w.start, w.end) for w in transcript.words]


LENGTHS = (30_000, 399, 9_000, 50_000, 400, 12_345, 30_001)


def test_results_do_not_depend_on_the_batch_and_keep_their_order() -> None:
    model = conformer()
    audios = [noise(n, n) for n in LENGTHS]
    options: dict[str, Any] = {"chunk_seconds": 1.0, "context_seconds": 0.2}
    alone = [frame_logits([a], model, **options)[0] for a in audios]
    for order, batch in (
        (range(7), 1.0),
        (range(7), 3.3),
        (reversed(range(7)), 60.0),
        ((3, 0, 6, 2, 5, 1, 4), 2.0),
    ):
        these = list(order)
        for i, logits in zip(
            these,
            frame_logits([audios[i] for i in these], model, **options, batch_seconds=batch),
            strict=True,
        ):
            helpers.assert_close("alone or in a batch", logits, alone[i])
    texts = [transcribe(a, model, processor(), sampling_rate=RATE, **options) for a in audios]
    together = transcribe(audios, model, processor(), sampling_rate=RATE, **options)
    assert [said(t) for t in together] == [said(t) for t in texts]
    assert len({t.text for t in texts}) > 3  # it does say something, and not the same


def test_memory_is_bounded_by_the_batch() -> None:
    model = ears()
    audios = [noise(n, n) for n in LENGTHS]
    frame_logits(audios, model, chunk_seconds=1.0, context_seconds=0.2, batch_seconds=2.5)
    assert max(rows * samples for rows, samples in model.shapes) <= 2.5 * RATE
    assert max(rows for rows, _ in model.shapes) > 1
    model.shapes.clear()
    frame_logits(audios, model, chunk_seconds=1.0, context_seconds=0.2, batch_seconds=0)  # at least one chunk
    assert {rows for rows, samples in model.shapes if samples > 8_000} == {1}


def test_a_model_that_is_not_padding_invariant_gets_one_row_at_a_time() -> None:
    model = ears(padding_invariant=False)
    frame_logits([noise(n, n) for n in LENGTHS], model, chunk_seconds=1.0)
    assert {rows for rows, _ in model.shapes} == {1}


def test_sound_is_decoded_a_few_batches_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    """A long list is not in memory as a whole: the model runs before the last files are read."""
    read: list[int] = []
    model = conformer()
    seen: list[int] = []
    model.register_forward_pre_hook(lambda *_: seen.append(len(read)))

    utterance = load_speech("builtin").sort("seconds")[0]

    def sources() -> Any:
        for i in range(12):
            read.append(i)
            yield utterance

    monkeypatch.setattr("w2vc.text.transcription._AHEAD", 2)
    assert len(transcribe(sources(), model, processor(), batch_seconds=0.8, timestamps=None)) == 12
    assert 0 < seen[0] < 8


# ---- the model is left as it was


def test_modes_come_back_part_by_part() -> None:
    model = conformer(mask_time_prob=0.5, hidden_dropout=0.5).train()
    model.wav2vec2_conformer.feature_extractor.eval()
    before = [m.training for m in model.modules()]
    one, two = (frame_logits([noise(9_000)], model)[0] for _ in range(2))
    assert torch.equal(one, two)  # no dropout, no masks
    assert [m.training for m in model.modules()] == before
    with pytest.raises(ValueError, match="NaN"):
        frame_logits([np.full(9_000, np.nan, np.float32)], model)
    assert [m.training for m in model.modules()] == before
    model(torch.randn(1, 9_000)).logits.sum().backward()  # nothing was left that refuses gradients
    one.requires_grad_()  # an ordinary tensor


def test_types_and_inference_mode() -> None:
    model, audio = conformer(), noise(9_000)
    (full,) = frame_logits([audio], model)
    (half,) = frame_logits([audio], model.to(torch.bfloat16))
    assert half.dtype == torch.float32
    assert model.dtype == torch.bfloat16
    assert 0 < helpers.difference(half, full) < 0.2
    with torch.inference_mode():
        assert transcribe(audio, model, processor(), sampling_rate=RATE).duration == 9_000 / RATE


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_on_the_gpu(dtype: torch.dtype) -> None:
    model, audios = conformer(), [noise(n, n) for n in LENGTHS]
    here = frame_logits(audios, model, chunk_seconds=1.0, context_seconds=0.2)
    there = frame_logits(audios, model.to("cuda", dtype), chunk_seconds=1.0, context_seconds=0.2)
    assert model.device.type == "cuda"
    for a, b in zip(there, here, strict=True):
        assert a.device.type == "cpu"
        if b.numel():
            assert helpers.difference(a, b) < (1e-3 if dtype == torch.float32 else 0.2)


# ---- sources


def test_every_kind_of_source(tmp_path: Path) -> None:
    import soundfile

    utterance = load_speech("builtin")[1]
    audio, path = utterance.audio, tmp_path / "speech.wav"
    soundfile.write(path, audio, RATE, subtype="FLOAT")
    data = path.read_bytes()
    model, proc = conformer(), processor()
    want = transcribe(utterance, model, proc)
    assert want.text
    sources: list[Any] = [
        path,
        str(path),
        data,
        bytearray(data),
        io.BytesIO(data),
        utterance,
        {"array": audio, "sampling_rate": RATE},
        {"bytes": data, "path": None},
    ]
    for source in sources:
        assert transcribe(source, model, proc) == want
    for source in (audio, torch.from_numpy(audio), audio.tolist(), np.stack([audio, audio])):
        assert transcribe(source, model, proc, sampling_rate=RATE).text == want.text
    many = [path, audio, utterance]
    for these in (many, tuple(many), iter(many)):
        assert [said(t) for t in transcribe(these, model, proc, sampling_rate=RATE)] == [said(want)] * 3
    assert [t.duration for t in transcribe(load_speech("builtin")[:3], model, proc)] == [
        u.seconds for u in load_speech("builtin")[:3]
    ]
    assert transcribe([], model, proc) == []
    soundfile.write(tmp_path / "fast.wav", np.repeat(audio, 3), 48_000)
    assert transcribe(tmp_path / "fast.wav", model, proc).duration == pytest.approx(want.duration)


def test_from_a_folder(tmp_path: Path) -> None:
    model, proc = conformer(), processor()
    model.save_pretrained(tmp_path)
    proc.save_pretrained(tmp_path)
    utterance = load_speech("builtin")[0]
    want = transcribe(utterance, model, proc)
    assert (
        transcribe(utterance, tmp_path)
        == transcribe(utterance, str(tmp_path), str(tmp_path))
        == transcribe(utterance, model, tmp_path)
        == want
    )


def test_too_short_and_empty() -> None:
    model, proc = conformer(), processor()
    nothing = transcribe(noise(399), model, proc, sampling_rate=RATE)
    assert nothing == Transcript("", 399 / RATE)
    assert nothing.to_srt() == ""
    assert nothing.to_vtt() == "WEBVTT\n"
    assert nothing.to_dict() == {"text": "", "duration": 399 / RATE, "confidence": 0.0}
    assert transcribe(noise(400), model, proc, sampling_rate=RATE).duration == 400 / RATE
    with pytest.raises(ValueError, match="empty") as caught:
        transcribe([noise(400), np.zeros(0, np.float32)], model, proc, sampling_rate=RATE)
    assert caught.value.__notes__ == ["this was audio[1]"]


def test_refusals(tmp_path: Path) -> None:
    model, proc = conformer(), processor()
    audio = noise(9_000)

    def refused(message: str, *args: Any, **knobs: Any) -> None:
        with pytest.raises(ValueError, match=message):
            transcribe(*args, **knobs)

    refused("processor is missing", audio, model)
    refused("processor is a Wav2Vec2FeatureExtractor", audio, model, proc.feature_extractor)
    refused("sampling_rate is missing", audio, model, proc)
    refused("timestamps='words'", audio, model, proc, sampling_rate=RATE, timestamps="words")
    refused("chunk_seconds=-1", audio, model, proc, sampling_rate=RATE, chunk_seconds=-1)
    refused("batch_seconds=nan", audio, model, proc, sampling_rate=RATE, batch_seconds=math.nan)
    refused(
        "must be longer than its context",
        audio,
        model,
        proc,
        sampling_rate=RATE,
        chunk_seconds=1,
        context_seconds=0.5,
    )
    refused("NaN|nan", np.full(9_000, np.nan), model, proc, sampling_rate=RATE)
    model.config.pad_token_id = 3
    refused(
        r"do not belong together: their blanks are \(3, 0\)",
        audio,
        model,
        proc,
        sampling_rate=RATE,
    )
    with pytest.raises(FileNotFoundError):
        transcribe(tmp_path / "nothing.wav", conformer(), proc)


# ---- what is read from the logits


def spoken(text: str, proc: Wav2Vec2Processor, sure: float = 0.9) -> Tensor:
    """Logits that say a text, two frames a symbol and a blank after each."""
    ids = [i for s in proc.tokenizer.encode(text) for i in (s, s, 0)]
    V = len(proc.tokenizer)
    return torch.full((len(ids), V), (1 - sure) / (V - 1)).scatter(1, torch.tensor(ids)[:, None], sure).log()


@settings(max_examples=40, deadline=None)
@given(T=st.integers(0, 60), rest=st.integers(0, HOP - 1), seed=st.integers(0, 999))
def test_times_are_inside_the_audio_and_in_order(T: int, rest: int, seed: int) -> None:
    proc = processor()
    g = torch.Generator().manual_seed(seed)
    logits = torch.randn(T, len(proc.tokenizer), generator=g)
    logits[:, proc.tokenizer.word_delimiter_token_id] += 1
    seconds = (HOP * (T - 1) + WIDTH + rest) / RATE if T else rest / RATE
    found = read_transcript(logits, proc, seconds=seconds, timestamps="char")
    plain = proc.tokenizer.decode(logits.argmax(-1) if T else [])
    assert found.text == " ".join(plain.split())
    assert found.text == " ".join(w.label for w in found.words)
    assert "".join(c.label for c in found.chars) == found.text.replace(" ", "")
    for items in (found.words, found.chars):
        assert all(0 <= i.start < i.end <= seconds and 0 < i.confidence <= 1 for i in items)
        assert all(a.end <= b.start for a, b in itertools.pairwise(items))
    assert 0 < found.confidence <= 1 or not found.words
    assert read_transcript(logits, proc, seconds=seconds, timestamps=None) == Transcript(
        found.text, seconds, found.confidence
    )
    assert read_transcript(logits, proc, seconds=seconds) == Transcript(
        found.text, seconds, found.confidence, found.words
    )


def test_confidence_of_a_transcript() -> None:
    proc = processor()
    assert read_transcript(spoken("the fox", proc, 0.8), proc, seconds=9.0).confidence == pytest.approx(
        0.8, abs=1e-6
    )


@pytest.mark.parametrize("answer", ["the fox", SimpleNamespace(text="the fox")])
def test_a_decoder_finds_the_text_and_alignment_its_times(answer: Any) -> None:
    proc = processor()
    logits = spoken("the box", proc)
    given_: list[Tensor] = []
    decoder = SimpleNamespace(decode=lambda x: given_.append(x) or answer)
    found = read_transcript(logits, proc, seconds=9.0, decoder=decoder)
    assert given_[0] is logits
    assert found.text == "the fox"
    assert found.words[0] == read_transcript(logits, proc, seconds=9.0).words[0]
    assert found.words[1].confidence < found.words[0].confidence
    model = conformer()
    assert transcribe(noise(30_000), model, proc, sampling_rate=RATE, decoder=decoder).text == "the fox"


def test_a_decoder_that_knows_its_path_gives_the_times() -> None:
    proc = processor()
    path = proc.tokenizer.convert_tokens_to_ids([*"thhe", "|", "<pad>", *"foox"])
    logits = torch.randn(len(path), len(proc.tokenizer), generator=torch.Generator().manual_seed(0))
    decoder = SimpleNamespace(decode=lambda _: SimpleNamespace(path=path, text="never read"))
    found = read_transcript(logits, proc, seconds=9.0, decoder=decoder)
    assert found.text == "the fox"
    times = [t for w in found.words for t in (w.start, w.end)]
    assert times == pytest.approx([(320 * t + 40) / RATE for t in (0, 4, 6, 10)])
    said_ = logits.log_softmax(-1)[torch.arange(10), torch.tensor(path)]
    assert found.words[0].confidence == pytest.approx(said_[:4].mean().exp().item())


def test_the_beam_search_as_decoder() -> None:
    proc, model = processor(), conformer()
    g = torch.Generator().manual_seed(1)
    logits = spoken("the quick fox", proc, 0.6) + 0.3 * torch.randn(39, len(proc.tokenizer), generator=g)
    found = read_transcript(logits, proc, seconds=9.0, decoder=CTCDecoder(proc))
    assert found.text == "the quick fox"
    assert found == read_transcript(
        logits, proc, seconds=9.0
    )  # as sure as this, the beam agrees with the best path
    hot = CTCDecoder(proc, hotwords=["fog"], hotword_weight=9.0)
    other = read_transcript(logits, proc, seconds=9.0, decoder=hot, timestamps="char")
    assert other.text == "the quick fog" == hot.decode(logits).text
    assert other.words[2].confidence < found.words[2].confidence
    said_ = transcribe(noise(30_000), model, proc, sampling_rate=RATE, decoder=CTCDecoder(proc))
    assert [w.label for w in said_.words] == said_.text.split()
    assert all(0 <= w.start < w.end <= said_.duration for w in said_.words)


# ---- formats


def sample() -> Transcript:
    words = [
        ("the", 0.02, 0.3),
        ("quick", 0.32, 0.9),
        ("<fox>", 1.0, 1.4996),
        ("jumps", 3.0, 3.5),
        ("3661", 3661.5, 3661.9999),
    ]
    return Transcript(" ".join(w for w, _, _ in words), 3662.0, 0.5, tuple(TimedText(*w, 0.5) for w in words))


def test_subtitles() -> None:
    assert sample().to_srt() == (
        "1\n00:00:00,020 --> 00:00:01,499\nthe quick <fox>\n\n2\n00:00:03,000 --> 00:00:03,500\njumps\n\n"
        "3\n01:01:01,500 --> 01:01:01,999\n3661\n"
    )
    assert sample().to_vtt(max_chars=5, max_gap=9) == (
        "WEBVTT\n\n00:00:00.020 --> 00:00:00.300\nthe\n\n00:00:00.320 --> 00:00:00.900\nquick\n\n"
        "00:00:01.000 --> 00:00:01.499\n&lt;fox&gt;\n\n00:00:03.000 --> 00:00:03.500\njumps\n\n"
        "01:01:01.500 --> 01:01:01.999\n3661\n"
    )
    assert [line.label for line in sample().lines(max_gap=9)] == ["the quick <fox> jumps", "3661"]
    assert [line.label for line in sample().lines(max_gap=9, max_seconds=1)] == [
        "the quick",
        "<fox>",
        "jumps",
        "3661",
    ]
    assert [line.label for line in sample().lines(max_chars=9)] == ["the quick", "<fox>", "jumps", "3661"]
    assert [line.label for line in sample().lines(max_chars=8)] == ["the", "quick", "<fox>", "jumps", "3661"]
    with pytest.raises(ValueError, match="timestamps='word'"):
        Transcript("a", 1.0).to_srt()


def test_json() -> None:
    proc = processor()
    found = read_transcript(spoken("the fox", proc), proc, seconds=9.0, timestamps="char").to_dict()
    again = json.loads(json.dumps(found))
    assert again == found
    assert list(again) == ["text", "duration", "confidence", "words", "chars"]
    assert again["words"][1]["word"] == "fox"
    assert [c["char"] for c in again["chars"]] == [*"thefox"]
    assert set(again["words"][0]) == {"word", "start", "end", "confidence"}


# ---- a trained model: within 1 % CER of the single pass on ten joined minutes


def join(seconds: float) -> tuple[np.ndarray, str]:
    """Sentences of the built-in corpus, one after the other, until there is enough; and what they say."""
    speech = load_speech("builtin", "all").filter(kind="sentence")
    audio, texts, total = [], [], 0.0
    for utterance in itertools.cycle(speech):
        if total >= seconds:
            break
        audio.append(utterance.audio)
        texts.append(utterance.text)
        total += utterance.seconds
    return np.concatenate(audio), " ".join(texts)


def measure(folder: str | Path, minutes: float = 10.0, **options: Any) -> dict[str, float]:
    """Compare chunks with one pass, for any CTC folder: `python tests/test_transcription.py FOLDER [MINUTES]`."""
    import jiwer

    model = Wav2Vec2ConformerForCTC.from_pretrained(folder, dtype=torch.float32)  # a CPU is slow in fp16
    proc = Wav2Vec2Processor.from_pretrained(folder)
    audio, text = join(60 * minutes)
    facts: dict[str, Any] = {"sampling_rate": RATE, "timestamps": None}
    whole = transcribe(audio, model, proc, chunk_seconds=None, **facts).text.lower()
    cut = transcribe(audio, model, proc, **options, **facts).text.lower()
    return {
        "minutes": len(audio) / RATE / 60,
        "CER of one pass": jiwer.cer(text, whole),
        "CER in chunks": jiwer.cer(text, cut),
        "CER of chunks against one pass": jiwer.cer(whole, cut),
    }


DEMO = Path(w2vc.__file__).parent / "assets" / "demo" / "ctc"


@pytest.mark.slow
def test_ten_minutes_in_chunks_are_written_as_well_as_in_one_pass(capsys: pytest.CaptureFixture[str]) -> None:
    """To one point of the error rate. The texts may differ: the demo model, which learned from short clips, is better in chunks."""
    found = measure(DEMO)
    with capsys.disabled():
        print("\n", {key: round(value, 4) for key, value in found.items()})
    assert found["minutes"] >= 10
    assert found["CER in chunks"] <= found["CER of one pass"] + 0.01


def test_the_measurement_itself(tmp_path: Path) -> None:
    """On an untrained model, a few seconds: that it runs, and that it can tell chunks from one pass."""
    conformer().save_pretrained(tmp_path)
    processor().save_pretrained(tmp_path)
    same = measure(tmp_path, 0.1, chunk_seconds=30)
    assert same["CER of chunks against one pass"] == 0
    assert same["CER of one pass"] == same["CER in chunks"] > 0.5
    assert measure(tmp_path, 0.1, chunk_seconds=0.5, context_seconds=0)["CER of chunks against one pass"] > 0


def test_a_loaded_model_knows_where_its_processor_lies(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from w2vc.evaluation.reports import evaluate
    from w2vc.explore.views import open_checkpoint

    clip = load_speech("builtin", "test").filter(kind="digits")[:2]
    model = w2vc.load_demo("ctc")
    assert transcribe(clip[0], model).text == transcribe(clip[0]).text
    assert evaluate(model, clip, draws=10).measures["CER"].value < 0.5
    assert open_checkpoint(model)[1].tokenizer.pad_token_id == model.config.pad_token_id

    conformer().save_pretrained(tmp_path / "bare")
    monkeypatch.chdir(tmp_path)
    bare = Wav2Vec2ConformerForCTC.from_pretrained("bare")
    monkeypatch.chdir("/")
    assert bare.name_or_path == str(tmp_path / "bare")
    with pytest.raises(FileNotFoundError, match=r"has no preprocessor_config\.json"):
        transcribe(clip[0], bare)
    assert open_checkpoint(bare)[1] is None


if __name__ == "__main__":
    print(measure(sys.argv[1], *map(float, sys.argv[2:3])))
