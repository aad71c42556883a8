"""Tiny stand-ins in the layout of what was released: checkpoints, a data set, and a hub that serves them.

A released checkpoint is an older one: its weights are a torch pickle with the old names of weight norm, and its config
holds keys that mean nothing any more.
"""

from __future__ import annotations

import hashlib
import json
import re
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import unquote

import torch

from helpers import randomise_, tiny_config
from w2vc.data.corpus import load_speech
from w2vc.files.pretrained import PreTrainedModel
from w2vc.model.ctc import Wav2Vec2ConformerForCTC

LETTERS = ["<pad>", "<s>", "</s>", "<unk>", *"|ETAONIHSRDLUMWCFGYPBVK'XJQZ"]
OLD_NAMES = {
    "parametrizations.weight.original0": "weight_g",
    "parametrizations.weight.original1": "weight_v",
}
OLD_KEYS: dict[str, Any] = {  # from the config.json of the years of the release
    "do_stable_layer_norm": True,
    "gradient_checkpointing": False,
    "torch_dtype": "float32",
    "transformers_version": "4.19.0.dev0",
}
EXTRACTOR = {
    "do_normalize": True,
    "feature_extractor_type": "Wav2Vec2FeatureExtractor",
    "feature_size": 1,
    "padding_side": "right",
    "padding_value": 0,
    "return_attention_mask": True,
    "sampling_rate": 16000,
}
SPECIAL = {"bos_token": "<s>", "eos_token": "</s>", "pad_token": "<pad>", "unk_token": "<unk>"}
TOKENIZER = {
    **SPECIAL,
    "do_lower_case": False,
    "replace_word_delimiter_char": " ",
    "tokenizer_class": "Wav2Vec2CTCTokenizer",
    "word_delimiter_token": "|",
}


def old_name(name: str) -> str:
    """A tensor's name as it was when the models were released."""
    for new, old in OLD_NAMES.items():
        name = name.replace(new, old)
    return name


def stand_in(cls: type[PreTrainedModel] = Wav2Vec2ConformerForCTC, seed: int = 0, **knobs: Any) -> Any:
    """A tiny model with the switches of the released ones."""
    torch.manual_seed(seed)
    settings = {"feat_extract_norm": "layer", "conv_bias": True, "hidden_act": "swish"}
    return randomise_(cls(tiny_config(**(settings | knobs))), seed).eval()


def write_released(model: PreTrainedModel, folder: Path, *, text: bool = True) -> Path:
    """Write a checkpoint as it was released: older names, older keys, and with `text` a vocabulary."""
    folder.mkdir(parents=True, exist_ok=True)
    config = {**model.config.to_dict(), **OLD_KEYS, "architectures": [type(model).__name__]}
    files: dict[str, Any] = {"config.json": config, "preprocessor_config.json": EXTRACTOR}
    if text:
        vocab = {letter: i for i, letter in enumerate(LETTERS)}
        files |= {"vocab.json": vocab, "tokenizer_config.json": TOKENIZER, "special_tokens_map.json": SPECIAL}
    for name, content in files.items():
        (folder / name).write_text(json.dumps(content, indent=2), encoding="utf-8")
    torch.save({old_name(name): t for name, t in model.state_dict().items()}, folder / "pytorch_model.bin")
    return folder


def write_corpus(folder: Path, ids: list[str], samples: list[int]) -> Path:
    """Write a data set as LibriSpeech's test set was released: one table with the columns of `librispeech_asr`.

    Args:
        folder: Where to.
        ids: Of the utterances, in the order of the table.
        samples: Their lengths at 16 kHz.
    """
    import io

    import numpy as np
    import pyarrow
    import pyarrow.parquet
    import soundfile

    rows, spoken = [], load_speech("builtin", "all").filter(kind="sentence")
    for name, size, utterance in zip(ids, samples, spoken, strict=False):
        buffer = io.BytesIO()
        soundfile.write(buffer, np.resize(utterance.audio, size), 16_000, format="FLAC", subtype="PCM_16")
        speaker, chapter, _ = name.split("-")
        path = f"{name}.flac"
        rows.append(
            {
                "file": path,
                "audio": {"bytes": buffer.getvalue(), "path": path},
                "text": utterance.text.upper(),
                "speaker_id": int(speaker),
                "chapter_id": int(chapter),
                "id": name,
            }
        )
    value = {
        key: {"dtype": "int64" if key.endswith("_id") else "string", "_type": "Value"} for key in rows[0]
    }
    features = value | {"audio": {"sampling_rate": 16000, "_type": "Audio"}}
    table = pyarrow.Table.from_pylist(rows).replace_schema_metadata(
        {"huggingface": json.dumps({"info": {"features": features}})}
    )
    (folder / "clean").mkdir(parents=True)
    pyarrow.parquet.write_table(table, folder / "clean" / "validation-00000-of-00001.parquet")
    card = (
        "configs:\n- config_name: clean\n  data_files:\n  - split: validation\n    path: clean/validation-*\n"
    )
    (folder / "README.md").write_text(f"---\n{card}---\n", encoding="utf-8")
    return folder


class Hub:
    """Enough of the Hugging Face hub for its client: files by revision, a store for large ones, and refusals.

    Attributes:
        repositories: Repository -> branch or tag -> commit.
        commits: (Repository, commit) -> file name -> content.
        gated: Repositories that need permission.
        asked: Every request for a file, as "METHOD path".
    """

    def __init__(self) -> None:
        self.repositories: dict[str, dict[str, str]] = {}
        self.commits: dict[tuple[str, str], dict[str, bytes]] = {}
        self.gated: set[str] = set()
        self.asked: list[str] = []
        self.url = ""

    def push(self, repository: str, files: Path | Mapping[str, bytes], *branches: str) -> str:
        """Add a commit, and let branches ("main" if none is named) point at it."""
        if isinstance(files, Path):
            files = {p.name: p.read_bytes() for p in sorted(files.iterdir())}
        commit = hashlib.sha1(repr((repository, sorted(files.items()))).encode()).hexdigest()
        self.commits[repository, commit] = dict(files)
        for branch in branches or ("main",):
            self.repositories.setdefault(repository, {})[branch] = commit
        return commit

    def answer(self, path: str) -> tuple[int, dict[str, str], bytes]:  # noqa: PLR0911
        """Status, headers and body for a path."""
        if path.startswith("/store/"):  # large files live elsewhere
            digest = path.removeprefix("/store/")
            for files in self.commits.values():
                for content in files.values():
                    if hashlib.sha256(content).hexdigest() == digest:
                        return 200, {"ETag": f'"{digest}"'}, content
            return 404, {}, b""
        path, api = path.partition("?")[0].removeprefix("/api/models"), path.startswith("/api/models/")
        repository, question, rest = re.split(r"/(resolve|revision|tree)/", path.strip("/"), maxsplit=1)
        revision, _, name = (unquote(rest), "", "") if api else rest.partition("/")
        branches = self.repositories.get(repository)
        if branches is None:
            return 401, {"X-Error-Code": "RepoNotFound", "X-Error-Message": "Repository not found"}, b""
        if repository in self.gated:
            return 403, {"X-Error-Code": "GatedRepo", "X-Error-Message": "Access is restricted"}, b""
        commit = branches.get(unquote(revision), revision)
        if (repository, commit) not in self.commits:
            return 404, {"X-Error-Code": "RevisionNotFound", "X-Error-Message": "Invalid rev id"}, b""
        files = self.commits[repository, commit]
        if question == "revision":
            return 200, {}, json.dumps({"id": repository, "sha": commit, "siblings": []}).encode()
        if question == "tree":
            return (
                200,
                {},
                json.dumps([self.entry(name, content) for name, content in files.items()]).encode(),
            )
        head, content = {"X-Repo-Commit": commit}, files.get(unquote(name))
        if content is None:
            return 404, head | {"X-Error-Code": "EntryNotFound", "X-Error-Message": "Entry not found"}, b""
        if name.endswith((".safetensors", ".bin")):
            digest = hashlib.sha256(content).hexdigest()
            elsewhere = self.url.replace("127.0.0.1", "localhost")
            linked = {"X-Linked-Etag": f'"{digest}"', "X-Linked-Size": str(len(content))}
            return 302, head | linked | {"Location": f"{elsewhere}/store/{digest}"}, b""
        return 200, head | {"ETag": f'"{hashlib.sha1(content).hexdigest()}"'}, content

    def entry(self, name: str, content: bytes) -> dict[str, Any]:
        """How a commit's list of files names one of them."""
        large = {
            "lfs": {"oid": hashlib.sha256(content).hexdigest(), "size": len(content), "pointerSize": 100}
        }
        known = large if name.endswith((".safetensors", ".bin")) else {}
        return {
            "type": "file",
            "path": name,
            "size": len(content),
            "oid": hashlib.sha1(content).hexdigest(),
        } | known

    @contextmanager
    def serving(self) -> Iterator[str]:
        """Serve on a free port of this machine; gives the address."""
        hub = self

        class Handler(BaseHTTPRequestHandler):
            def reply(self, body: bool) -> None:
                if not self.path.startswith("/api/agent"):  # small talk of the client
                    hub.asked.append(f"{self.command} {self.path}")
                status, headers, content = hub.answer(self.path)
                self.send_response(status)
                for key, value in (headers | {"Content-Length": str(len(content))}).items():
                    self.send_header(key, value)
                self.end_headers()
                if body:
                    self.wfile.write(content)

            def do_HEAD(self) -> None:
                self.reply(body=False)

            def do_GET(self) -> None:
                self.reply(body=True)

            def log_message(self, format: str, *args: Any) -> None:
                pass

        with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
            server.daemon_threads = True
            self.url = f"http://127.0.0.1:{server.server_address[1]}"
            thread = threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True)
            thread.start()
            try:
                yield self.url
            finally:
                server.shutdown()
                thread.join()


def released_dataset(root: Path) -> Path:
    """A data set in the layout in which it is published: a README with the configuration, parquet with the files inside."""
    import datasets

    from w2vc.data import corpus as S

    rows = [
        {
            "id": f"1272-{3 - i}",
            "audio": {"bytes": S._encode(u.audio), "path": f"{i}.flac"},
            "text": u.text.upper(),
        }
        for i, u in enumerate(S.load_speech()[:3])
    ]
    features = datasets.Features(
        {"id": datasets.Value("string"), "audio": datasets.Audio(16000), "text": datasets.Value("string")}
    )
    (root / "clean").mkdir(parents=True)
    datasets.Dataset.from_list(rows).cast(features).to_parquet(
        str(root / "clean/validation-00000-of-00001.parquet")
    )
    config = (
        "configs:\n- config_name: clean\n  data_files:\n  - split: validation\n    path: clean/validation-*\n"
    )
    (root / "README.md").write_text(f"---\n{config}---\n")
    return root
