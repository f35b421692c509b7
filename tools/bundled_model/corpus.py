"""The training text: what every Python installation carries. Knows no tokenizer and no model.

Three kinds of document: the standard library's sources (without its tests), the topics of `help()`, and conversations
made from both by `conversations.py`. A document belongs to the held-out part by the hash of its path alone, and a
conversation follows the file it was made from, so that nothing in the held-out part was ever seen in training.
"""

import hashlib
import sysconfig
from dataclasses import dataclass
from pathlib import Path
from pydoc_data.topics import topics
from typing import Literal

from .conversations import Message, from_source, from_topic, small_talk

Kind = Literal["source", "topic", "conversation"]

HELD_OUT_OF = 20
"""One file in this many is held out."""

_SKIPPED_FOLDERS = frozenset(
    {"test", "tests", "idle_test", "site-packages", "dist-packages", "__pycache__", "_bundled"}
)
_GENERATED_TABLE = "decoding_table = ("
_LARGEST_FILE_BYTES = 400_000


@dataclass(frozen=True, slots=True)
class Document:
    """One text, or one conversation; exactly one of `text` and `messages` is filled."""

    path: str
    kind: Kind
    held_out: bool
    text: str = ""
    messages: tuple[Message, ...] = ()


def is_held_out(path: str) -> bool:
    """Whether the file at this path, relative to the library's root, is in the held-out part."""
    digest = hashlib.blake2b(path.encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big") % HELD_OUT_OF == 0


def source_files(root: Path) -> list[tuple[str, str]]:
    """Every readable module below `root` as (path relative to it, text), in a fixed order.

    Left out: tests, installed packages, character tables and files written by the build of one particular Python.
    """
    found: list[tuple[str, str]] = []
    for file in sorted(root.rglob("*.py")):
        path = file.relative_to(root)
        if _SKIPPED_FOLDERS.intersection(path.parts[:-1]) or path.parts[0].startswith("config-"):
            continue
        if path.name.startswith("_sysconfigdata") or path.as_posix() == "pydoc_data/topics.py":
            continue
        raw = file.read_bytes()
        if len(raw) > _LARGEST_FILE_BYTES:
            continue
        try:
            text = raw.decode("utf-8")
        except UnicodeDecodeError:
            continue
        text = text.replace("\r\n", "\n")
        if text.strip() and _GENERATED_TABLE not in text:
            found.append((path.as_posix(), text))
    return found


def collect(root: Path | None = None) -> list[Document]:
    """All documents of this machine's Python, conversations included, in a fixed order."""
    root = root or Path(sysconfig.get_path("stdlib"))
    documents: list[Document] = []
    for path, text in source_files(root):
        held_out = is_held_out(path)
        documents.append(Document(path, "source", held_out, text=text))
        documents.extend(
            Document(path, "conversation", held_out, messages=messages) for messages in from_source(path, text)
        )
    for name, text in sorted(topics.items()):
        path = f"topics/{name}"
        held_out = is_held_out(path)
        documents.append(Document(path, "topic", held_out, text=text))
        documents.extend(
            Document(path, "conversation", held_out, messages=messages) for messages in from_topic(name, text)
        )
    documents.extend(Document("small-talk", "conversation", False, messages=messages) for messages in small_talk())
    return documents
