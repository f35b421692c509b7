"""The chat template that an operator gives in place of the checkpoint's: a file's name, or the source itself."""

from __future__ import annotations

from pathlib import Path

from ...core.errors import CheckpointError


def chat_template_of(value: str) -> str:
    """Source of a template that is given by name or as itself; it compiles. A source has braces, or several lines.

    Raises:
        ValueError: the file cannot be read, or the sandbox refuses the template.
    """
    from .template import ChatTemplate  # nobody else who reads a configuration needs jinja2

    is_source = "{" in value or "\n" in value
    try:
        source = value if is_source else Path(value).expanduser().read_text(encoding="utf-8")
        ChatTemplate({"default": source})
    except OSError as error:
        raise ValueError(
            f"cannot be read ({error.strerror}); give the name of a file, or a template in Jinja's words"
        ) from None
    except UnicodeDecodeError:
        raise ValueError("is no text in UTF-8; give a file with a template in Jinja's words") from None
    except CheckpointError as error:
        raise ValueError(error.message) from None
    return source
