"""The command line: results on standard output, one line per error, honest exit codes, nothing overwritten."""

from __future__ import annotations

import io
import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from w2vc import (
    Wav2Vec2ConformerForCTC,
    Wav2Vec2ConformerForPreTraining,
    Wav2Vec2ConformerModel,
    Wav2Vec2CTCTokenizer,
    Wav2Vec2FeatureExtractor,
    Wav2Vec2Processor,
    load_speech,
)
from w2vc.cli import app, describe_checkpoint, main
from w2vc.config import Wav2Vec2ConformerConfig
from w2vc.evaluation.reports import evaluate, model_class
from w2vc.text.tokenizer import build_vocabulary
from w2vc.text.transcription import transcribe
from w2vc.training.recipes import Recipe

sf = pytest.importorskip("soundfile")


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("checkpoint") / "tiny"
    vocabulary = build_vocabulary(["abcdefghijklmnopqrstuvwxyz '"])
    torch.manual_seed(0)
    Wav2Vec2ConformerForCTC(Wav2Vec2ConformerConfig.tiny(vocab_size=len(vocabulary))).save_pretrained(folder)
    extractor = Wav2Vec2FeatureExtractor(return_attention_mask=True)
    Wav2Vec2Processor(extractor, Wav2Vec2CTCTokenizer(vocabulary)).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def talks(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("talks")
    for name, u in zip(("b.wav", "a.flac"), load_speech("builtin", "dev"), strict=False):
        sf.write(folder / name, u.audio[:24_000], 16_000)
    (folder / "notes.md").write_text("no sound")
    return folder


def run(capsys: pytest.CaptureFixture[str], *words: str | Path) -> tuple[int, str, str]:
    code = main([str(word) for word in words])
    out = capsys.readouterr()
    return code, out.out, out.err


def one_line(err: str) -> str:
    assert err.startswith("w2vc: "), err
    assert err.count("\n") == 1, err
    return err


# ------------------------------------------------------------------------------------------ calls


def test_every_command_has_help_with_examples(capsys: pytest.CaptureFixture[str]) -> None:
    names = [c.name or c.callback.__name__ for c in app.registered_commands if c.callback]
    assert {"transcribe", "evaluate", "convert", "info", "pretrain", "finetune", "recipes"} <= set(names)
    for name in names:
        code, out, err = run(capsys, name, "--help")
        assert (code, err) == (0, "")
        if name != "recipes":
            assert f"\n    w2vc {name} " in out.split("Examples:")[1]


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["inof"], "Did you mean 'info'"),
        (["info"], "Missing argument"),
        (["info", ".", "--key"], "No such option: --key"),
        (["evaluate", "m"], "Missing argument"),
        (["evaluate", "m", "builtin", "--limit", "0"], "greater than or equal to 1"),
        (["transcribe", "a.wav", "-m", "x", "--format", "doc"], "'doc' is not one of"),
        (["transcribe", "a.wav", "-m", "x", "--beam-width", "0"], "greater than or equal to 1"),
    ],
)
def test_wrong_calls_are_one_line_and_exit_2(
    capsys: pytest.CaptureFixture[str], words: list[str], said: str
) -> None:
    code, out, err = run(capsys, *words)
    assert (code, out) == (2, "")
    assert said in one_line(err)
    assert "--help" in err


def test_no_words_show_the_help(capsys: pytest.CaptureFixture[str]) -> None:
    code, out, err = run(capsys)
    assert code == 2
    assert "Usage: w2vc" in out + err


def test_mistakes_of_ours_are_not_hidden(monkeypatch: pytest.MonkeyPatch, model: Path) -> None:
    monkeypatch.setattr("w2vc.cli.describe_checkpoint", lambda *a, **k: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        main(["info", str(model)])


def test_debug_shows_the_traceback(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("W2VC_DEBUG", "1")
    with pytest.raises(FileNotFoundError):
        main(["info", str(tmp_path / "nothing")])


def test_interruption_is_130(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], model: Path
) -> None:
    def interrupted(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("w2vc.cli.describe_checkpoint", interrupted)
    assert run(capsys, "info", model) == (130, "", "")


# ------------------------------------------------------------------------------------------ info and convert


def test_info_counts_what_the_model_has(capsys: pytest.CaptureFixture[str], model: Path) -> None:
    loaded = Wav2Vec2ConformerForCTC.from_pretrained(model)
    code, out, err = run(capsys, "info", model, "--json")
    facts = json.loads(out)
    assert (code, err) == (0, "")
    assert facts["architecture"] == "Wav2Vec2ConformerForCTC"
    assert facts["parameters"] == loaded.num_parameters() == sum(facts["parts"].values())
    assert set(facts["tensors"]) == set(loaded.state_dict())
    assert facts["settings"]["hidden_size"] == 32
    assert "layer_norm_eps" not in facts["settings"]  # the default
    assert facts["vocabulary"][loaded.config.pad_token_id] == "<pad>"
    assert facts["notes"] == []
    code, out, _ = run(capsys, "info", model, "--keys")
    assert "lm_head.weight  [" in out
    assert f"{loaded.num_parameters():,} parameters" in out


def test_info_says_what_does_not_fit(capsys: pytest.CaptureFixture[str], model: Path, tmp_path: Path) -> None:
    config = json.loads((model / "config.json").read_text()) | {"num_hidden_layers": 3}
    (tmp_path / "config.json").write_text(json.dumps(config))
    (tmp_path / "model.safetensors").write_bytes((model / "model.safetensors").read_bytes())
    code, out, _ = run(capsys, "info", tmp_path)
    assert code == 0
    assert "note: missing (" in out


@pytest.mark.parametrize(
    "cls", [Wav2Vec2ConformerModel, Wav2Vec2ConformerForPreTraining, Wav2Vec2ConformerForCTC]
)
def test_class_is_found_without_its_name(cls: type, tmp_path: Path) -> None:
    cls(Wav2Vec2ConformerConfig.tiny()).save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    assert model_class(str(tmp_path)) is cls
    del config["architectures"]
    (tmp_path / "config.json").write_text(json.dumps(config))
    assert model_class(str(tmp_path)) is cls
    assert describe_checkpoint(str(tmp_path))["architecture"] == cls.__name__


def test_convert_keeps_weights_and_processor(
    capsys: pytest.CaptureFixture[str], model: Path, tmp_path: Path
) -> None:
    old = Wav2Vec2ConformerForCTC.from_pretrained(model)
    source = tmp_path / "bin"
    source.mkdir()
    for file in model.iterdir():
        if file.suffix == ".json":
            (source / file.name).write_bytes(file.read_bytes())
    torch.save(old.state_dict(), source / "pytorch_model.bin")
    code, out, err = run(capsys, "convert", source, tmp_path / "new", "--dtype", "float16")
    assert (code, out) == (0, "")
    assert "float16" in err
    new = Wav2Vec2ConformerForCTC.from_pretrained(tmp_path / "new")
    for name, tensor in old.state_dict().items():
        torch.testing.assert_close(new.state_dict()[name].to(tensor.dtype), tensor, atol=1e-3, rtol=1e-3)
    assert Wav2Vec2Processor.from_pretrained(tmp_path / "new").tokenizer.get_vocab()
    before = (tmp_path / "new" / "config.json").read_bytes()
    code, _, err = run(capsys, "convert", source, tmp_path / "new")
    assert code == 1
    assert "--force" in one_line(err)
    assert (tmp_path / "new" / "config.json").read_bytes() == before
    assert run(capsys, "convert", source, tmp_path / "new", "--force")[0] == 0
    assert Wav2Vec2ConformerForCTC.from_pretrained(tmp_path / "new").dtype == torch.float32


def test_convert_refuses_a_wrong_class(
    capsys: pytest.CaptureFixture[str], model: Path, tmp_path: Path
) -> None:
    code, _, err = run(capsys, "convert", model, tmp_path / "x", "--architecture", "Wav2Vec2ForCTC")
    assert code == 1
    assert "allowed are" in one_line(err)
    assert not (tmp_path / "x").exists()


# ------------------------------------------------------------------------------------------ transcribe


def test_recordings_that_are_not_there(
    capsys: pytest.CaptureFixture[str], model: Path, talks: Path, tmp_path: Path
) -> None:
    for words, said in (
        ([tmp_path], "holds no audio"),
        ([tmp_path / "gone.wav"], "no such file"),
        (["-", talks, "-"], "only once"),
    ):
        code, out, err = run(capsys, "transcribe", *words, "-m", model)
        assert (code, out) == (1, "")
        assert said in one_line(err)


def test_transcribe_prints_what_the_library_returns(
    capsys: pytest.CaptureFixture[str], model: Path, talks: Path
) -> None:
    expected = transcribe([talks / "a.flac", talks / "b.wav"], model=str(model))
    code, out, err = run(capsys, "transcribe", talks, "-m", model)
    assert (code, err) == (0, "")
    assert out == "".join(
        f"{talks / n}\t{t.text}\n" for n, t in zip(("a.flac", "b.wav"), expected, strict=True)
    )
    code, out, _ = run(capsys, "transcribe", talks / "b.wav", "-m", model)
    assert out == expected[1].text + "\n"
    code, out, _ = run(capsys, "transcribe", talks, "-m", model, "-t", "json", "--timestamps", "char")
    rows = [json.loads(line) for line in out.splitlines()]
    assert [row["file"] for row in rows] == [str(talks / "a.flac"), str(talks / "b.wav")]
    assert rows[1]["text"] == expected[1].text
    assert rows[1]["chars"][0]["start"] >= 0
    assert rows[1]["words"][-1]["end"] <= rows[1]["duration"] == 1.5


def test_beam_and_hot_words_reach_the_decoder(
    capsys: pytest.CaptureFixture[str], model: Path, talks: Path
) -> None:
    texts = {
        run(capsys, "transcribe", talks / "b.wav", "-m", model, *more)[1]
        for more in ([], ["--beam-width", "8"], ["--hotword", "zq", "--beam-width", "50"])
    }
    assert len(texts) >= 2
    code, _, err = run(capsys, "transcribe", talks / "b.wav", "-m", model, "--lm", "gone.arpa")
    assert code == 1
    one_line(err)


def test_one_bad_recording_does_not_stop_the_others(
    capsys: pytest.CaptureFixture[str], model: Path, talks: Path, tmp_path: Path
) -> None:
    (tmp_path / "bad.wav").write_bytes(b"RIFF and then nothing")
    code, out, err = run(capsys, "transcribe", talks / "a.flac", tmp_path, talks / "b.wav", "-m", model)
    assert code == 1
    assert [line.split("\t")[0] for line in out.splitlines()] == [str(talks / "a.flac"), str(talks / "b.wav")]
    assert "bad.wav" in one_line(err)


def test_subtitles_go_to_files(
    capsys: pytest.CaptureFixture[str], model: Path, talks: Path, tmp_path: Path
) -> None:
    code, _, err = run(capsys, "transcribe", talks, "-m", model, "-t", "srt")
    assert code == 1
    assert "--output" in one_line(err)
    out = tmp_path / "new" / "subtitles"
    assert run(capsys, "transcribe", talks, "-m", model, "-t", "srt", "-o", out)[:2] == (0, "")
    assert sorted(p.name for p in out.iterdir()) == ["a.srt", "b.srt"]
    assert (out / "a.srt").read_text().startswith("1\n00:00:0")
    (out / "a.srt").write_text("mine")
    assert run(capsys, "transcribe", talks, "-m", model, "-t", "srt", "-o", out)[0] == 1
    assert (out / "a.srt").read_text() == "mine"
    code, _, err = run(
        capsys, "transcribe", talks / "a.flac", talks / "a.flac", "-m", model, "-o", tmp_path / "twice"
    )
    assert code == 0  # the same recording twice is one file
    (tmp_path / "a.wav").write_bytes((talks / "b.wav").read_bytes())
    code, _, err = run(
        capsys, "transcribe", talks / "a.flac", tmp_path / "a.wav", "-m", model, "-o", tmp_path / "clash"
    )
    assert code == 1
    assert "another recording" in one_line(err)


def test_standard_input_and_the_program_itself(model: Path, talks: Path) -> None:
    sound = (talks / "b.wav").read_bytes()
    done = subprocess.run(
        [sys.executable, "-m", "w2vc.cli", "transcribe", "-", "-m", str(model), "-t", "json"],
        input=sound, capture_output=True, timeout=120, check=False,
    )  # fmt: skip
    assert (done.returncode, done.stderr) == (0, b"")
    row = json.loads(done.stdout)
    audio, _ = sf.read(io.BytesIO(sound), dtype="float32")
    assert (row["file"], row["text"]) == (
        "-",
        transcribe(np.asarray(audio), str(model), sampling_rate=16_000).text,
    )


# ------------------------------------------------------------------------------------------ evaluate


def test_evaluate_prints_the_librarys_report(
    capsys: pytest.CaptureFixture[str], model: Path, tmp_path: Path
) -> None:
    pytest.importorskip("jiwer")
    report = evaluate(str(model), "builtin", limit=5, draws=30)
    words = ("evaluate", model, "builtin", "--limit", "5", "--draws", "30")
    code, out, err = run(capsys, *words)
    assert (code, err) == (0, "")
    assert out == f"{report}\n"
    assert "WER" in out.splitlines()[2]
    code, out, _ = run(capsys, *words, "--json")
    assert json.loads(out) == report.to_dict()
    code, out, _ = run(capsys, *words, "--show", "2")
    assert out.startswith(f"{report}\n")
    errors = sorted((row["char_errors"] for row in report.details["transcripts"]), reverse=True)
    shown = [line.split(":")[0] for line in out.splitlines() if "words wrong" in line]
    by_id = {row["id"]: row["char_errors"] for row in report.details["transcripts"]}
    assert [by_id[name] for name in shown] == errors[:2]


def test_evaluate_takes_folders_and_a_beam(
    capsys: pytest.CaptureFixture[str], model: Path, tmp_path: Path
) -> None:
    pytest.importorskip("jiwer")
    u = load_speech("builtin", "dev")[0]
    sf.write(tmp_path / "a.wav", u.audio, 16_000)
    (tmp_path / "a.txt").write_text(u.text.upper() + ".")
    reports = []
    for more in ([], ["--beam-width", "20"], ["--as-written"]):
        code, out, err = run(capsys, "evaluate", model, tmp_path, "--json", *more)
        assert (code, err) == (0, "")
        reports.append(json.loads(out))
    plain, beam, written = reports
    assert plain["about"]["utterances"] == 1
    assert plain["details"]["transcripts"][0]["reference"] == u.text.upper() + "."
    assert beam["details"]["transcripts"][0]["hypothesis"] != plain["details"]["transcripts"][0]["hypothesis"]
    assert written["measures"]["CER"]["value"] > plain["measures"]["CER"]["value"]
    code, _, err = run(capsys, "evaluate", model, tmp_path, "--split", "test")
    assert (code, "no subfolder of that name" in one_line(err)) == (1, True)
    code, _, err = run(capsys, "evaluate", model, "biultin")
    assert (code, "known sets" in one_line(err)) == (1, True)


def test_evaluate_pretraining_with_a_recipe(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    pytest.importorskip("scipy")
    torch.manual_seed(0)
    Wav2Vec2ConformerForPreTraining(Wav2Vec2ConformerConfig.tiny(num_negatives=5)).save_pretrained(tmp_path)
    words = ("evaluate", tmp_path, "builtin", "--limit", "10", "--draws", "20", "--by", "speaker", "--json")
    code, out, err = run(capsys, *words, "--recipe", "demo_pretrain", "--probe-split", "dev")
    assert (code, err) == (0, "")
    facts = json.loads(out)
    options = {"recipe": Recipe.load("demo_pretrain"), "probe_speech": load_speech("builtin", "dev")}
    report = evaluate(tmp_path, "builtin", limit=10, draws=20, by="speaker", **options)
    assert facts == report.to_dict()
    assert facts["measures"]["phone probe"]["value"] > 0
    assert facts["about"]["interval"] == "bootstrap over speakers, 20 draws"


# ------------------------------------------------------------------------------------------ training


def test_recipes_are_listed_and_run(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    code, out, _ = run(capsys, "recipes")
    assert code == 0
    assert {"demo_pretrain", "librispeech_base"} <= {line.split()[0] for line in out.splitlines()}
    code, out, _ = run(capsys, "pretrain", "demo_pretrain", tmp_path / "run", "run.steps=7", "--dry-run")
    assert code == 0
    assert "steps: 7" in out
    assert not (tmp_path / "run").exists()
    code, _, err = run(capsys, "finetune", "demo_pretrain", tmp_path / "run")
    assert (code, "w2vc pretrain" in one_line(err)) == (1, True)
    code, _, err = run(capsys, "pretrain", "demo_pretrain", tmp_path / "run", "run.stepz=3")
    assert (code, "did you mean" in one_line(err).lower()) == (1, True)


# ------------------------------------------------------------------------------------------ explore


def test_explore_writes_one_page(
    capsys: pytest.CaptureFixture[str], model: Path, talks: Path, tmp_path: Path
) -> None:
    page = tmp_path / "page.html"
    words = ("explore", talks / "b.wav", "-m", model, "-o", page, "--text", "a dog", "--layer", "1")
    code, out, err = run(capsys, *words)
    assert (code, err) == (0, "")
    assert out == f"{page}: {page.stat().st_size / 1e6:.2f} MB\n"
    before = page.read_bytes()
    assert b"Known text: a dog" in before
    assert b"layer 1, head 0" in before
    code, _, err = run(capsys, *words)
    assert (code, "--force" in one_line(err)) == (1, True)
    code, _, err = run(capsys, *words, "--force", "--layer", "9")
    assert (code, "layers=" in one_line(err)) == (1, True)
    assert page.read_bytes() == before, "a failure leaves the old page"
    assert run(capsys, *words, "--force", "--end", "1")[0] == 0
    assert page.read_bytes() != before
    assert [p.name for p in tmp_path.iterdir()] == ["page.html"]


def test_explore_says_what_is_missing(
    capsys: pytest.CaptureFixture[str],
    model: Path,
    talks: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    for words, said in (
        ((tmp_path / "gone.wav", "-m", model), "no such file"),
        ((talks / "b.wav", "-m", tmp_path / "nothing"), "nothing"),
        ((talks / "notes.md", "-m", model), "notes.md"),
        ((talks / "b.wav", "-m", model, "--start", "7"), "start="),
    ):
        code, out, err = run(capsys, "explore", *words)
        assert (code, out) == (1, "")
        assert said in one_line(err)
    assert not list(tmp_path.iterdir())


def test_explore_takes_the_demo_checkpoint_and_keeps_the_page_small(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    speech = load_speech("builtin", "test").filter(kind="sentence")
    sf.write(tmp_path / "five.wav", np.concatenate([speech[0].audio, speech[1].audio])[: 5 * 16_000], 16_000)
    page = tmp_path / "five.html"
    code, _, err = run(capsys, "explore", tmp_path / "five.wav", "-o", page)
    assert code == 0
    assert "demo checkpoint" in one_line(err)
    assert page.stat().st_size < 4_000_000
    text = page.read_text(encoding="utf-8")
    for heading in ("Letters", "Codes", "Attention", "Shapes"):
        assert f"<h2>{heading}</h2>" in text
