"""Conversations made from sources and help topics: questions whose answers are in the text. Knows no tokenizer.

Every choice is drawn from a generator seeded with the document's path, so the same Python gives the same conversations.
"""

import ast
import inspect
import random
import warnings
from collections.abc import Iterator
from typing import NamedTuple


class Message(NamedTuple):
    """One turn; `role` is system, user or assistant."""

    role: str
    content: str


Conversation = tuple[Message, ...]

_LONGEST_ANSWER = 1_500  # characters
_LONGEST_FUNCTION = 45  # lines
_MOST_PER_FILE = 14

_SYSTEM = (
    "You are a helpful assistant.",
    "You answer questions about Python.",
    "You are a concise assistant for Python programmers.",
    "You know Python's standard library.",
)
_ABOUT_MODULE = (
    "What is the {name} module for?",
    "What does the module {name} do?",
    "Tell me about {name}.",
    "What is {name}?",
)
_LIST_MODULE = (
    "Which functions and classes does {name} have?",
    "What is in the module {name}?",
    "List the public names of {name}.",
)
_ABOUT_OBJECT = (
    "What does {name} do?",
    "Explain {name}.",
    "What is {name}?",
    "Can you explain what {name} does?",
    "Tell me what {name} is for.",
)
_SIGNATURE = (
    "How do I call {name}?",
    "What are the arguments of {name}?",
    "What is the signature of {name}?",
)
_SHOW_SOURCE = (
    "Write a function like {name}.",
    "Show me the code of {name}.",
    "How is {name} written?",
    "Write {name} in Python.",
    "How would you implement {name}?",
)
_ABOUT_TOPIC = (
    "Explain {name}.",
    "What does the Python reference say about {name}?",
    "Tell me about {name} in Python.",
    "How does {name} work in Python?",
)
_STATEMENTS = frozenset(
    (
        *("assert", "break", "class", "continue", "del", "for", "global", "if", "import"),
        *("nonlocal", "pass", "raise", "return", "try", "while", "with", "yield"),
    )
)
_THANKS = ("Thank you.", "Thanks!", "Thanks, that helps.", "Great, thank you.")
_WELCOME = ("You are welcome.", "You are welcome. Ask me about another module.", "Glad to help.")
_GREETINGS = (
    "Hello!",
    "Hi",
    "Hello",
    "Hey there",
    "Good morning",
    "Hi, who are you?",
    "Who are you?",
    "What can you do?",
)
_INTRODUCTION = (
    "Hello! I am a small model that has read Python's standard library. Ask me about a module or a function.",
    "Hi! Ask me about Python: a module, a function or a statement.",
)


class _Subject(NamedTuple):
    """Documented function, class or method of a module."""

    name: str
    doc: str
    signature: str | None
    code: str | None


def from_source(path: str, text: str) -> list[Conversation]:
    """Make conversations about one module: its purpose, its names, and use and source of some of them."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            tree = ast.parse(text)
    except (SyntaxError, ValueError):
        return []
    module = path.removesuffix(".py").removesuffix("/__init__").replace("/", ".")
    rng = random.Random(path)
    subjects = list(_subjects(module, tree, text))
    rng.shuffle(subjects)
    made: list[Conversation] = []
    about = _about_module(module, tree, rng)
    if about:
        follow_up = [turn for subject in subjects[:1] for turn in _about_object(subject, rng)[:2]]
        made.append(_opened(rng, (*about, *follow_up, *_goodbye(rng))))
    for subject in subjects[: _MOST_PER_FILE - len(made)]:
        turns = _about_object(subject, rng)
        wanted = rng.choice((2, 2, 4, 4, 6))
        made.append(_opened(rng, (*turns[:wanted], *_goodbye(rng))))
    return made


def from_topic(name: str, text: str) -> list[Conversation]:
    """Make conversations about one topic of `help()`; the second turn continues the text of the first one."""
    rng = random.Random(name)
    called = f"the {name} statement" if name in _STATEMENTS else name.replace("-", " ")
    paragraphs = [part for part in text.split("\n\n") if part.strip(" *-=\n")]
    if len(paragraphs) > 1 and set(paragraphs[0].rsplit("\n", 1)[-1]) <= {"*", "=", "-"}:
        paragraphs = paragraphs[1:]
    made: list[Conversation] = []
    for _ in range(2):
        first, used = _join_paragraphs(paragraphs, 0)
        turns = [Message("user", rng.choice(_ABOUT_TOPIC).format(name=called)), Message("assistant", first)]
        second, _ = _join_paragraphs(paragraphs, used)
        if second:
            turns += [
                Message("user", rng.choice(("Go on.", "Tell me more.", "And then?"))),
                Message("assistant", second),
            ]
        made.append(_opened(rng, (*turns, *_goodbye(rng))))
    return made


def small_talk() -> list[Conversation]:
    """Make conversations of greetings and thanks, which usual chats begin and end with."""
    rng = random.Random(0)
    made = []
    for greeting in _GREETINGS:
        for introduction in _INTRODUCTION:
            turns = (Message("user", greeting), Message("assistant", introduction))
            made.append(_opened(rng, (*turns, *_goodbye(rng))))
    return made


def _subjects(module: str, tree: ast.Module, text: str) -> Iterator[_Subject]:
    lines = text.splitlines()
    for node in tree.body:
        yield from _subject(module, node, lines)
        if isinstance(node, ast.ClassDef):
            for child in node.body:
                yield from _subject(f"{module}.{node.name}", child, lines)


def _subject(prefix: str, node: ast.stmt, lines: list[str]) -> Iterator[_Subject]:
    if not isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef) or node.name.startswith("_"):
        return
    doc = _docstring(node)
    if not doc:
        return
    signature = code = None
    if not isinstance(node, ast.ClassDef):
        signature = f"{node.name}({ast.unparse(node.args)})"
        own_lines = lines[node.lineno - 1 : node.end_lineno]
        if len(own_lines) <= _LONGEST_FUNCTION:
            code = inspect.cleandoc("\n".join(["", *own_lines]))
    yield _Subject(f"{prefix}.{node.name}", doc, signature, code)


def _docstring(node: ast.Module | ast.stmt) -> str:
    doc = (
        ast.get_docstring(node)
        if isinstance(node, ast.Module | ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef)
        else None
    )
    return _join_paragraphs((doc or "").split("\n\n"), 0)[0]


def _about_module(module: str, tree: ast.Module, rng: random.Random) -> list[Message]:
    turns: list[Message] = []
    if doc := _docstring(tree):
        turns += [Message("user", rng.choice(_ABOUT_MODULE).format(name=module)), Message("assistant", doc)]
    names = [
        node.name
        for node in tree.body
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef) and not node.name.startswith("_")
    ]
    if names:
        listing = "\n".join(f"- {name}" for name in names[:30])
        turns += [Message("user", rng.choice(_LIST_MODULE).format(name=module)), Message("assistant", listing)]
    return turns


def _about_object(subject: _Subject, rng: random.Random) -> list[Message]:
    """Make up to three questions with their answers, in random order."""
    pairs: list[tuple[tuple[str, ...], str]] = [(_ABOUT_OBJECT, subject.doc)]
    if subject.signature:
        pairs.append((_SIGNATURE, f"```python\n{subject.signature}\n```"))
    if subject.code:
        pairs.append((_SHOW_SOURCE, f"```python\n{subject.code}\n```"))
    rng.shuffle(pairs)
    turns: list[Message] = []
    for questions, answer in pairs:
        turns += [Message("user", rng.choice(questions).format(name=subject.name)), Message("assistant", answer)]
    return turns


def _opened(rng: random.Random, turns: Conversation) -> Conversation:
    if rng.random() < 0.4:
        return (Message("system", rng.choice(_SYSTEM)), *turns)
    return turns


def _goodbye(rng: random.Random) -> Conversation:
    if rng.random() < 0.15:
        return (Message("user", rng.choice(_THANKS)), Message("assistant", rng.choice(_WELCOME)))
    return ()


def _join_paragraphs(paragraphs: list[str], start: int) -> tuple[str, int]:
    """Join paragraphs from `start` on, up to the length of an answer. Also returns the index after the last one."""
    taken: list[str] = []
    size = 0
    for index in range(start, len(paragraphs)):
        size += len(paragraphs[index])
        if taken and size > _LONGEST_ANSWER:
            return "\n\n".join(taken).strip(), index
        taken.append(paragraphs[index][:_LONGEST_ANSWER])
    return "\n\n".join(taken).strip(), len(paragraphs)
