"""A chat template that an operator gives: from a file or as itself, checked when the configuration is read."""

from pathlib import Path

import pytest

from twostroke.core.config import load_section
from twostroke.core.errors import ConfigError
from twostroke.router.config import RouterConfig
from twostroke.text.templates.template import ChatTemplate

SOURCE = "{% for m in messages %}{{ bos_token }}{{ m.content }}{% endfor %}"
BUNDLED = Path(__file__).resolve().parents[2] / "model" / "bundled"


def given(value: str) -> str | None:
    return load_section(RouterConfig, {"chat_template": value}, "router").chat_template


def test_a_file_is_read_and_a_source_stays(tmp_path):
    path = tmp_path / "template.jinja"
    path.write_text(SOURCE)
    assert given(str(path)) == given(SOURCE) == SOURCE
    read = RouterConfig(chat_template=str(path))
    path.unlink()
    assert RouterConfig.model_validate(read.model_dump(mode="json")) == read  # as a member on another machine has it


def test_it_gets_the_checkpoints_special_tokens(tmp_path):
    template = ChatTemplate.load(BUNDLED, given=SOURCE)
    assert template is not None
    assert template.render([{"role": "user", "content": "hi"}]) == "<|bos|>hi"


@pytest.mark.parametrize(
    ("value", "said"),
    [
        ("chatml", r"router.chat_template is 'chatml': cannot be read \(No such file or directory\)"),
        ("/", "cannot be read"),
        ("{% for m in messages %}", "chat template 'default', line 1"),
        ("{{ 'x' }}" + " " * 300_000, "has 300009 characters; at most"),
    ],
)
def test_what_is_no_template_is_refused(value, said):
    with pytest.raises(ConfigError, match=said) as caught:
        given(value)
    assert len(str(caught.value)) < 600


def test_a_file_that_is_no_text_is_refused(tmp_path):
    path = tmp_path / "template.jinja"
    path.write_bytes(b"\xff\xfe{{ x }}")
    with pytest.raises(ConfigError, match="is no text in UTF-8"):
        given(str(path))
