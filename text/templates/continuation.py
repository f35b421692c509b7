"""Prompt that ends within its last message: it is rendered with a tag after the message's text, and cut at the tag."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from ...core.errors import InvalidRequest

# Private use characters: no text has them by chance. If the space after the tag is gone, the template trims messages.
_TAG = "\ue0c7CONTINUE\ue0c7"
_TAG_AND_SPACE = _TAG + " "
_FIELD = "continue_final_message"


def with_tag(message: Mapping[str, Any]) -> dict[str, Any]:
    """Copy of the message with the tag after its text, or after its last text part.

    Raises:
        InvalidRequest: it has no text.
    """
    content = message.get("content")
    if isinstance(content, str):
        return {**message, "content": content + _TAG_AND_SPACE}
    if not isinstance(content, Sequence) or not content:
        raise InvalidRequest(f"{_FIELD} is true, but the last message has no text; give it content", param=_FIELD)
    last = {**content[-1], "text": content[-1]["text"] + _TAG_AND_SPACE}
    return {**message, "content": [*content[:-1], last]}


def cut_at_tag(prompt: str, content: str | Sequence[Mapping[str, Any]]) -> str:
    """Prompt up to the tag. If the template trims the message, the end of the prompt is trimmed too.

    Raises:
        InvalidRequest: the template does not show the message unchanged.
    """
    text = content if isinstance(content, str) else content[-1]["text"]
    place = prompt.rfind(_TAG)
    if place < 0 or text.strip() not in prompt:
        raise InvalidRequest(
            f"{_FIELD} is true, but the model's chat template does not show the last message as it is; set it to false",
            param=_FIELD,
        )
    if prompt.startswith(_TAG_AND_SPACE, place):
        return prompt[:place]
    return prompt[:place].rstrip()
