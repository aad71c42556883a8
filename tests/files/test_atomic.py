"""Files whole or not at all, several as one, and readers beside a writer."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import pytest

from helpers import count_and_die
from w2vc.files import atomic
from w2vc.files.atomic import finish_saves, read_folder, read_json, replace_folder, write_file

OLD, NEW = {"a": "old", "b": "old", "c": "old"}, {"a": "new", "b": "new", "d": "new"}


def save(folder: Path, files: dict[str, str], remove: tuple[str, ...] = ("[a-d]",)) -> None:
    with replace_folder(folder, remove) as fresh:
        for name, text in files.items():
            (fresh / name).write_text(text)


def content(folder: Path) -> dict[str, str]:
    return {path.name: path.read_text() for path in folder.iterdir() if path.is_file()}


# ---------------------------------------------------------------- one file


def test_a_file_is_written_whole_or_not_at_all(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "new" / "file.bin"
    write_file(path, b"old")
    assert path.read_bytes() == b"old"
    write_file(str(path), "néw")
    assert path.read_text(encoding="utf-8") == "néw"
    (tmp_path / "usual").touch()
    assert path.stat().st_mode == (tmp_path / "usual").stat().st_mode

    def power_cut(*_: Any) -> None:
        raise KeyboardInterrupt

    for function in ("fsync", "replace"):
        with monkeypatch.context() as patch:
            patch.setattr(atomic.os, function, power_cut)
            with pytest.raises(KeyboardInterrupt):
                write_file(path, b"lost")
        assert path.read_text(encoding="utf-8") == "néw"
    assert [p.name for p in path.parent.iterdir()] == ["file.bin"]


def test_json_must_be_one_object(tmp_path: Path) -> None:
    path = tmp_path / "x.json"
    write_file(path, '{"a": [1]}')
    assert read_json(path) == {"a": [1]}
    for text, words in (('{"a": 7', "not valid JSON"), ("[]", "must hold a JSON object, but holds a list")):
        write_file(path, text)
        with pytest.raises(ValueError, match=words):
            read_json(path)
    with pytest.raises(FileNotFoundError):
        read_json(tmp_path / "none.json")


# ---------------------------------------------------------------- several files as one


def test_files_take_their_places_and_others_stay(tmp_path: Path) -> None:
    folder = tmp_path / "made" / "here"
    save(folder, OLD)
    (folder / "notes").write_text("mine")
    (folder / "sub").mkdir()
    (folder / "sub" / "x").write_text("x")
    with replace_folder(folder, remove=["c", "no-such-*"]) as fresh:
        assert list(fresh.iterdir()) == []
        save(fresh, {"a": "new"})  # a save within a save
        (fresh / "sub").mkdir()
        (fresh / "sub" / "y").write_text("y")
    assert content(folder) == {"a": "new", "b": "old", "notes": "mine"}
    assert content(folder / "sub") == {"x": "x", "y": "y"}
    assert sorted(p.name for p in folder.iterdir()) == ["a", "b", "notes", "sub"]


def test_new_files_can_be_read_by_whom_other_files_can(tmp_path: Path) -> None:
    (tmp_path / "usual").touch()
    with replace_folder(tmp_path) as fresh:
        os.close(os.open(fresh / "private", os.O_CREAT, 0o600))
    assert (tmp_path / "private").stat().st_mode == (tmp_path / "usual").stat().st_mode


def test_an_error_changes_nothing(tmp_path: Path) -> None:
    def fail(folder: Path) -> None:
        with replace_folder(folder, ["*"]) as fresh:
            (fresh / "a").write_text("new")
            raise OSError(28, "No space left on device")

    save(tmp_path / "there", OLD)
    for folder in (tmp_path / "there", tmp_path / "not" / "there"):
        with pytest.raises(OSError, match="No space"):
            fail(folder)
    assert content(tmp_path / "there") == OLD
    assert sorted(p.name for p in (tmp_path / "there").iterdir()) == sorted(OLD)
    assert not (tmp_path / "not" / "there").exists()
    save(tmp_path / "there", {"a": "last"}, ("*",))
    assert content(tmp_path / "there") == {"a": "last"}


@pytest.mark.filterwarnings("ignore:This process:DeprecationWarning")
def test_killed_at_any_instant_a_folder_loads_as_old_or_as_new_and_never_holds_both(tmp_path: Path) -> None:
    save(tmp_path / "start", OLD)
    (tmp_path / "start" / "notes").write_text("mine")
    outcomes = []
    for step in range(1, 99):
        folder = tmp_path / f"killed-{step}"
        shutil.copytree(tmp_path / "start", folder)
        died = count_and_die(step, lambda: save(folder, NEW))  # noqa: B023
        seen = content(folder)  # what a program sees that knows nothing of us
        assert seen.pop("notes") == "mine"
        assert seen.items() <= OLD.items() or seen.items() <= NEW.items(), (step, seen)
        if step % 2:  # and killed again while somebody takes it up
            count_and_die(1 + step % 5, lambda: finish_saves(folder))  # noqa: B023
        found = read_folder(folder, content)
        assert found in (OLD | {"notes": "mine"}, NEW | {"notes": "mine"}), step
        outcomes.append(found["a"])
        save(folder, OLD)
        assert content(folder) == OLD | {"notes": "mine"}
        assert {p.name for p in folder.iterdir() if p.name != ".save"} == {*OLD, "notes"}
        if not died:
            break
    assert outcomes.count("old") >= 5
    assert outcomes.count("new") >= 5
    assert outcomes == sorted(outcomes, reverse=True)  # one instant decides


def test_what_a_killed_save_left_goes_after_an_hour(tmp_path: Path) -> None:
    for name, age in (("00c0ffee.new", 4000), ("0badcafe.new", 0)):
        left = tmp_path / ".save" / name
        left.mkdir(parents=True)
        (left / "a").write_text("half")
        time = left.stat().st_mtime - age
        os.utime(left, (time, time))
    save(tmp_path, NEW)
    assert [p.name for p in (tmp_path / ".save").iterdir()] == ["0badcafe.new"]


def test_a_finished_save_is_never_followed_outwards(tmp_path: Path) -> None:
    victim, folder = tmp_path / "victim", tmp_path / "folder"
    victim.write_text("precious")
    (folder / ".save" / "1.done").mkdir(parents=True)
    for name in ("../victim", str(victim)):
        (folder / ".save" / "1.done" / ".old.json").write_text(json.dumps({name: atomic._identity(victim)}))
        with pytest.raises(ValueError, match="outside its folder"):
            read_folder(folder, content)
    assert victim.read_text() == "precious"


def test_a_file_that_came_since_is_not_taken_for_an_old_one(tmp_path: Path) -> None:
    """Two programs finish one save; the slower one comes back when a third has saved again."""
    save(tmp_path, OLD)
    late = {"c": atomic._identity(tmp_path / "c")}
    save(tmp_path, {"c": "newest"})
    (tmp_path / ".save" / "late.done").mkdir(parents=True)
    (tmp_path / ".save" / "late.done" / ".old.json").write_text(json.dumps(late))
    finish_saves(tmp_path)
    assert content(tmp_path) == {"c": "newest"}


# ---------------------------------------------------------------- readers beside a writer


def test_a_save_between_two_files_is_noticed(tmp_path: Path) -> None:
    save(tmp_path, OLD)
    reads = []

    def read(folder: Path) -> tuple[str, str]:
        first = (folder / "a").read_text()
        if not reads:
            save(folder, NEW)
        reads.append(first)
        return first, (folder / "b").read_text()

    assert read_folder(tmp_path, read) == ("new", "new")
    assert reads == ["old", "new"]

    def gone(folder: Path) -> str:  # a file that the new save does not have: an error of the mixture alone
        names = sorted(path.name for path in folder.glob("[a-d]"))
        if "d" in names:
            save(folder, OLD)
        return "".join((folder / name).read_text() for name in names)

    assert read_folder(tmp_path, gone) == "oldoldold"
    with pytest.raises(FileNotFoundError):
        read_folder(tmp_path / "nowhere", lambda folder: (folder / "a").read_text())

    def restless(folder: Path) -> None:
        save(folder, NEW)

    with pytest.raises(OSError, match="changes while it is read"):
        read_folder(tmp_path, restless)


def test_a_reader_beside_a_writer_never_sees_a_mixture(tmp_path: Path) -> None:
    writer = (
        "import sys; from pathlib import Path; from w2vc.files.atomic import replace_folder\n"
        "for i in range(60):\n"
        "    with replace_folder(sys.argv[1], ['x-*']) as fresh:\n"
        "        for name in ('a', 'b', f'x-{i % 3}'): (fresh / name).write_text(str(i))\n"
    )
    save(tmp_path, {"a": "-1", "b": "-1", "x-9": "-1"})
    child = subprocess.Popen([sys.executable, "-c", writer, str(tmp_path)])
    seen, mixed = set(), 0

    def read(folder: Path) -> set[str]:
        nonlocal mixed
        texts = {(folder / name).read_text() for name in ("a", "b", next(iter(folder.glob("x-*"))).name)}
        mixed += len(texts) > 1
        return texts

    while child.poll() is None:
        try:
            texts = read_folder(tmp_path, read)
        except OSError as error:
            if "again and again" not in str(error):  # a writer that never rests
                raise
            continue
        assert len(texts) == 1
        seen |= texts
    assert child.returncode == 0
    assert len(seen) > 1
    assert read_folder(tmp_path, read) == {"59"}


def test_two_readers_finish_one_save(tmp_path: Path) -> None:
    for round_ in range(20):
        folder = tmp_path / str(round_)
        save(folder, OLD)
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(atomic, "finish_saves", lambda folder: None)
            save(folder, NEW)  # stops at the instant at which it has happened
        assert content(folder) == OLD
        results: list[Any] = []

        def read(folder: Path = folder, results: list[Any] = results) -> None:
            results.append(read_folder(folder, content))

        threads = [threading.Thread(target=read) for _ in range(3)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert results == [NEW] * 3
