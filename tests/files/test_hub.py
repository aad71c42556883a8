"""Checkpoints from the hub: fetched once, found again without it, pinned to one commit, and clear words when it fails.

The hub is a small one on this machine that speaks the protocol of the real one; the client is huggingface_hub itself.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from released import Hub, stand_in, write_released
from w2vc import AutoFeatureExtractor, AutoProcessor, Wav2Vec2CTCTokenizer, Wav2Vec2FeatureExtractor
from w2vc.config import Wav2Vec2ConformerConfig
from w2vc.files.hub import find_folder
from w2vc.model.ctc import Wav2Vec2ConformerForCTC
from w2vc.model.wav2vec2 import Wav2Vec2ConformerModel
from w2vc.text.tokenizer import Wav2Vec2Processor

pytest.importorskip("huggingface_hub")
from huggingface_hub import constants, errors
from huggingface_hub.utils import disable_progress_bars, enable_progress_bars

NAME = "somebody/conformer-960h"


def same(a: torch.nn.Module, b: torch.nn.Module) -> bool:
    mine, yours = a.state_dict(), b.state_dict()
    return mine.keys() == yours.keys() and all(torch.equal(mine[name], yours[name]) for name in mine)


@pytest.fixture(scope="module")
def old(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint as released: a torch pickle, a vocabulary."""
    return write_released(stand_in(), tmp_path_factory.mktemp("old"))


@pytest.fixture(scope="module")
def new(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same with other weights, as safetensors in shards."""
    folder = write_released(stand_in(seed=1), tmp_path_factory.mktemp("new"))
    (folder / "pytorch_model.bin").unlink()
    stand_in(seed=1).save_pretrained(folder, max_shard_bytes=60_000)
    return folder


def point_at(url: str, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Send the hub's client to an address, as HF_ENDPOINT and HF_HUB_CACHE do when it starts."""
    monkeypatch.setattr(constants, "ENDPOINT", url)
    template = url + "/{repo_id}/resolve/{revision}/{filename}"
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(cache))


@pytest.fixture
def hub(old: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    """A hub that runs, has the old checkpoint under `NAME`, and is the one that the client asks."""
    disable_progress_bars()
    server = Hub()
    server.push(NAME, old, "main", "v1")
    with server.serving() as url:
        point_at(url, tmp_path / "cache", monkeypatch)
        yield server
    enable_progress_bars()


def offline(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)


def stopped(monkeypatch: pytest.MonkeyPatch) -> None:
    """No switch is set, but nobody answers, as on a train."""
    url = "http://127.0.0.1:9"  # the port of "discard": nobody listens
    monkeypatch.setattr(constants, "ENDPOINT", url)
    template = url + "/{repo_id}/resolve/{revision}/{filename}"
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)


silences = pytest.mark.parametrize("silence", [offline, stopped])


def load_everything(name: Any, **options: Any) -> dict[str, Any]:
    """Whatever a checkpoint can be opened as."""
    classes = (Wav2Vec2ConformerConfig, Wav2Vec2ConformerModel, Wav2Vec2ConformerForCTC)
    classes += (Wav2Vec2FeatureExtractor, AutoFeatureExtractor, Wav2Vec2CTCTokenizer, Wav2Vec2Processor)
    return {cls.__name__: cls.from_pretrained(name, **options) for cls in (*classes, AutoProcessor)}


def alike(mine: dict[str, Any], yours: dict[str, Any]) -> bool:
    return all(
        same(thing, yours[name]) if isinstance(thing, torch.nn.Module) else repr(thing) == repr(yours[name])
        for name, thing in mine.items()
    )


# ---------------------------------------------------------------- fetched once


@silences
def test_the_first_load_fetches_and_the_second_needs_no_hub(
    hub: Hub, old: Path, monkeypatch: pytest.MonkeyPatch, silence: Any
) -> None:
    here = load_everything(old)
    assert alike(load_everything(NAME), here)
    fetched = [line for line in hub.asked if line.startswith("GET") and "/api/" not in line]
    assert len(fetched) == len(set(fetched)) == len(list(old.iterdir()))  # each file once
    silence(monkeypatch)
    hub.asked.clear()
    assert alike(load_everything(NAME), here)
    assert hub.asked == []


def test_a_shard_at_a_time(hub: Hub, new: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert len(list(new.glob("model-*-of-*.safetensors"))) > 2
    hub.push("somebody/shards", new)
    here = Wav2Vec2ConformerForCTC.from_pretrained(new)
    assert same(Wav2Vec2ConformerForCTC.from_pretrained("somebody/shards"), here)
    offline(monkeypatch)
    assert same(Wav2Vec2ConformerForCTC.from_pretrained("somebody/shards"), here)


def test_a_second_load_asks_one_question(hub: Hub) -> None:
    """Has the branch moved? Everything else is known by the name of the commit."""
    load_everything(NAME)
    for load in (Wav2Vec2ConformerForCTC, Wav2Vec2FeatureExtractor, Wav2Vec2CTCTokenizer, AutoProcessor):
        hub.asked.clear()
        load.from_pretrained(NAME)
        assert len(hub.asked) == 1, hub.asked
        assert hub.asked[0].startswith(f"GET /api/models/{NAME}/revision/main")


# ---------------------------------------------------------------- revisions


def test_a_revision_picks_another_commit(
    hub: Hub, old: Path, new: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first, second = load_everything(old), load_everything(new)
    before = hub.repositories[NAME]["main"]
    after = hub.push(NAME, new)  # "main" moves on, "v1" stays
    assert alike(load_everything(NAME), second)
    assert alike(load_everything(NAME, revision="v1"), first)
    assert alike(load_everything(NAME, revision=before), first)
    assert alike(load_everything(NAME, revision=after), second)
    offline(monkeypatch)
    for revision, wanted in ((None, second), ("main", second), ("v1", first), (before, first)):
        assert alike(load_everything(NAME, revision=revision), wanted)


def test_a_branch_that_moves_is_followed(hub: Hub, old: Path, new: Path) -> None:
    assert alike(load_everything(NAME), load_everything(old))
    hub.push(NAME, new)
    assert alike(load_everything(NAME), load_everything(new))


def test_files_of_one_load_are_of_one_commit(
    hub: Hub, old: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whichever file was fetched last when the branch moved on: the model is the old one, never a mixture.

    The two differ in shape, so the config of one with the weights of the other would be an error.
    """
    wide = write_released(stand_in(intermediate_size=48), tmp_path / "wide")
    answer = hub.answer
    for last in ("config.json", "pytorch_model.bin"):
        name = f"somebody/{last}"
        hub.push(name, old)

        def moving(path: str) -> Any:
            reply = answer(path)
            if path.endswith(last):  # noqa: B023
                hub.push(name, wide)  # noqa: B023
            return reply

        monkeypatch.setattr(hub, "answer", moving)
        assert Wav2Vec2ConformerForCTC.from_pretrained(name).config.intermediate_size == 64
        monkeypatch.setattr(hub, "answer", answer)
        assert Wav2Vec2ConformerForCTC.from_pretrained(name).config.intermediate_size == 48


def test_a_commit_needs_no_question(hub: Hub, old: Path) -> None:
    commit = hub.repositories[NAME]["main"]
    folder = find_folder(NAME, "v1")
    assert folder.name == commit
    assert not list(folder.glob("*.bin"))  # only what was asked for
    hub.asked.clear()
    assert find_folder(NAME, commit) == folder
    assert hub.asked == []
    assert (find_folder(NAME, commit, ["*.bin"]) / "pytorch_model.bin").is_file()
    assert find_folder(old) == old


# ---------------------------------------------------------------- what can go wrong, in one line each


def complaint(
    *args: Any, cls: Any = Wav2Vec2ConformerModel, kind: type[Exception] = FileNotFoundError, **options: Any
) -> str:
    with pytest.raises(kind) as caught:
        cls.from_pretrained(*args, **options)
    return str(caught.value)


ANY = pytest.mark.parametrize(
    "cls", [Wav2Vec2ConformerConfig, Wav2Vec2ConformerModel, Wav2Vec2FeatureExtractor, AutoProcessor]
)


@ANY
def test_each_failure_has_the_words_of_the_client(hub: Hub, cls: Any) -> None:
    assert "Repository Not Found" in complaint("nobody/nothing", cls=cls, kind=errors.RepositoryNotFoundError)
    assert "Revision Not Found" in complaint(NAME, revision="v9", cls=cls, kind=errors.RevisionNotFoundError)
    hub.push("somebody/closed", {"config.json": b"{}"})
    hub.gated.add("somebody/closed")
    assert "Access is restricted" in complaint("somebody/closed", cls=cls, kind=errors.GatedRepoError)
    hub.push("somebody/empty", {"README.md": b""})
    assert "'somebody/empty' has no " in complaint("somebody/empty", cls=cls)
    assert "Cannot have --" in complaint("some--body/x", cls=cls, kind=ValueError)
    assert issubclass(errors.HfHubHTTPError, OSError)


def test_a_missing_file_is_named(hub: Hub, old: Path) -> None:
    files = {path.name: path.read_bytes() for path in old.iterdir()}
    for gone, cls, words in (
        ("config.json", Wav2Vec2ConformerModel, "has no config.json"),
        ("pytorch_model.bin", Wav2Vec2ConformerModel, "has no weights"),
        ("preprocessor_config.json", AutoProcessor, "has no preprocessor_config.json"),
        ("vocab.json", Wav2Vec2CTCTokenizer, "has no vocab.json"),
    ):
        hub.push("somebody/gaps", {name: content for name, content in files.items() if name != gone})
        assert words in complaint("somebody/gaps", cls=cls)


@silences
def test_that_a_file_does_not_exist_is_remembered(
    hub: Hub, old: Path, monkeypatch: pytest.MonkeyPatch, silence: Any
) -> None:
    """A checkpoint for pre-training has no vocabulary; without a network too, its processor is the extractor alone."""
    hub.push("somebody/mute", {p.name: p.read_bytes() for p in old.iterdir() if p.name != "vocab.json"})
    for _ in range(2):
        assert type(AutoProcessor.from_pretrained("somebody/mute")) is Wav2Vec2FeatureExtractor
        silence(monkeypatch)


@ANY
@silences
def test_without_a_network_the_message_says_what_to_do(
    hub: Hub, cls: Any, monkeypatch: pytest.MonkeyPatch, silence: Any
) -> None:
    cls.from_pretrained(NAME)
    silence(monkeypatch)
    cls.from_pretrained(NAME)
    for name, options in (
        ("somebody/else", {}),
        ("somebody/else", {"revision": "v1"}),
        (NAME, {"revision": "v1"}),
    ):
        message = complaint(name, cls=cls, **options)
        assert (
            "outgoing traffic has been disabled" if silence is offline else "check your internet connection"
        ) in message


def test_a_fetch_that_breaks_off_leaves_nothing_behind(hub: Hub, old: Path) -> None:
    """The cache never holds half a file."""
    answer = hub.answer

    def short(path: str) -> Any:
        status, headers, content = answer(path)
        cut = content[: len(content) // 2] if path.startswith("/store/") else content
        return status, headers, cut

    hub.answer = short
    complaint(NAME, kind=OSError)
    hub.answer = answer
    assert same(Wav2Vec2ConformerModel.from_pretrained(NAME), Wav2Vec2ConformerModel.from_pretrained(old))


def test_a_folder_wins_over_the_hub(
    hub: Hub, new: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "somebody").mkdir()
    (tmp_path / NAME).symlink_to(new)
    monkeypatch.chdir(tmp_path)
    assert find_folder(NAME) == Path(NAME)
    assert hub.asked == []


# ---------------------------------------------------------------- by the real switches, in processes of their own

SCRIPT = """
import sys
from w2vc import AutoProcessor, Wav2Vec2ConformerForCTC
name, *revisions = sys.argv[1:]
for revision in revisions:
    try:
        processor = AutoProcessor.from_pretrained(name, revision=revision)
        model = Wav2Vec2ConformerForCTC.from_pretrained(name, revision=revision)
        print(len(processor.tokenizer), round(model.lm_head.weight.sum().item(), 4))
    except FileNotFoundError as error:
        print(error)
"""


def run(*args: str, **env: str) -> list[str]:
    command = [sys.executable, "-W", "ignore", "-c", SCRIPT, *args]
    clean = {key: value for key, value in os.environ.items() if not key.startswith("HF_")}
    done = subprocess.run(command, env=clean | env, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stdout.splitlines()


def test_the_environment_rules(old: Path, new: Path, tmp_path: Path) -> None:
    """HF_ENDPOINT, HF_HOME and HF_HUB_OFFLINE, as a user sets them."""
    model = Wav2Vec2ConformerForCTC.from_pretrained(new)
    wanted = f"32 {round(model.lm_head.weight.sum().item(), 4)}"
    hub, home = Hub(), str(tmp_path)
    hub.push(NAME, old, "v1")
    hub.push(NAME, new)
    with hub.serving() as url:
        assert run(NAME, "main", HF_ENDPOINT=url, HF_HOME=home) == [wanted]
        hub.asked.clear()
        here, message = run(NAME, "main", "v1", HF_ENDPOINT=url, HF_HOME=home, HF_HUB_OFFLINE="1")
    assert hub.asked == []
    assert here == wanted
    assert "outgoing traffic has been disabled" in message
    cached = tmp_path / "hub" / f"models--{NAME.replace('/', '--')}"
    assert (cached / "refs" / "main").read_text() == hub.repositories[NAME]["main"]
    assert [p.name for p in (cached / "snapshots").iterdir()] == [hub.repositories[NAME]["main"]]


def test_transformers_and_w2vc_share_the_cache(hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    """What one has fetched, the other finds."""
    import transformers

    ours = Wav2Vec2ConformerForCTC.from_pretrained(NAME)
    offline(monkeypatch)
    theirs = transformers.Wav2Vec2ConformerForCTC.from_pretrained(NAME, local_files_only=True)
    assert json.loads(theirs.config.to_json_string())["architectures"] == ["Wav2Vec2ConformerForCTC"]
    assert same(ours, theirs)


# ---------------------------------------------------------------- names


def test_folders_files_and_what_is_neither(tmp_path: Path) -> None:
    (tmp_path / "a.json").write_text("{}")
    assert find_folder(tmp_path) == find_folder(str(tmp_path)) == tmp_path
    for missing in (tmp_path / "nowhere", "./nowhere", "/nowhere", "a/b/c", "https://x/y", ""):
        with pytest.raises(FileNotFoundError, match="neither a folder here nor"):
            find_folder(missing)
    with pytest.raises(FileNotFoundError, match="is a file, and a checkpoint is a folder"):
        find_folder(tmp_path / "a.json")


def test_without_huggingface_hub_the_extra_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    with pytest.raises(ImportError, match=re.escape('pip install "w2vc[hub]"')):
        find_folder("who/what")
