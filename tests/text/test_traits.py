"""What a template can show, found by rendering: one test per trait, over templates in the styles of the families."""

from __future__ import annotations

import pytest
from support.checkpoints.template_styles import SPECIAL, STYLES

from twostroke.text.templates.sandbox import Limits
from twostroke.text.templates.template import ChatTemplate
from twostroke.text.templates.traits import CallForm, ContentForm, NoContent, TemplateTraits

TRAITS = {name: ChatTemplate({"default": source}, SPECIAL).traits for name, source in STYLES.items()}


def styles_with(has: object) -> set[str]:
    return {name for name, traits in TRAITS.items() if has(traits)}  # type: ignore[operator]


def test_a_developer_is_known_where_he_is_treated_unlike_a_role_that_nobody_knows():
    assert styles_with(lambda traits: traits.knows_developer) == {"developer"}


def test_roles_that_are_left_out_in_silence_are_found():
    assert {name: set(traits.vanishing_roles) for name, traits in TRAITS.items() if traits.vanishing_roles} == {
        "silent": {"tool"},
    }


def test_how_many_system_messages_a_template_takes():
    assert styles_with(lambda traits: traits.takes_one_system) == {"strict", "text_calls", "no_system", "developer"}
    assert styles_with(lambda traits: traits.drops_late_system) == {"text_calls", "developer"}


@pytest.mark.parametrize(
    ("form", "styles"),
    [
        (ContentForm.PARTS, {"parts"}),
        (ContentForm.PART, {"first_part"}),
        (ContentForm.EITHER, {"either"}),
        (ContentForm.TEXT, set(STYLES) - {"parts", "first_part", "either"}),
    ],
)
def test_content_is_text_or_parts_as_the_template_reads_it(form, styles):
    assert styles_with(lambda traits: traits.content_forms["user"] is form) == styles


def test_parts_of_which_only_the_first_is_read_become_text():
    source = "{% for m in messages %}{{ m.content if m.content is string else m.content[0].text }}{% endfor %}"
    assert ChatTemplate({"default": source}).traits.content_forms["user"] is ContentForm.TEXT


def test_the_form_is_found_for_each_role():
    source = STYLES["either"].replace(
        "text(m.content)", "(m.content | tojson if m.role == 'tool' else text(m.content))"
    )
    forms = ChatTemplate({"default": source}).traits.content_forms
    assert (forms["user"], forms["tool"]) == (ContentForm.EITHER, ContentForm.TEXT)


def test_how_tool_calls_reach_the_prompt():
    assert styles_with(lambda traits: traits.call_form is None) == {
        "turns",
        "silent",
        "no_system",
        "parts",
        "first_part",
    }
    forms = {name: traits.call_form for name, traits in TRAITS.items() if traits.call_form is not None}
    assert forms == {
        "json_calls": CallForm(),
        "either": CallForm(),
        "one_call": CallForm(shows_text=False),
        "strict": CallForm(shows_text=False),
        "text_calls": CallForm(NoContent.NULL, arguments_as_text=True, beside_empty_text=False, shows_text=False),
        "developer": CallForm(shows_several=False),
    }


def test_arguments_are_text_where_an_object_would_be_printed_in_pythons_way():
    calls = "{% for c in m.tool_calls %}{{ c.function.arguments }}{% endfor %}"
    source = "{% for m in messages %}{{ m.content }}" + calls + "{% endfor %}"
    form = ChatTemplate({"default": source}).traits.call_form
    assert form is not None
    assert form.arguments_as_text
    either = source.replace("{{ c.function.arguments }}", "{{ c.function.arguments | tojson }}")
    form = ChatTemplate({"default": either}).traits.call_form
    assert form is not None
    assert not form.arguments_as_text


def test_a_template_that_shows_the_time_does_not_confuse_the_probes():
    source = "{{ strftime_now('%f') }}" + STYLES["either"]
    assert ChatTemplate({"default": source}).traits.content_forms["user"] is not ContentForm.PARTS


def test_a_template_that_burns_the_machine_is_probed_once():
    burning = "{% for a in range(90000) %}{% for b in range(90000) %}{% endfor %}{% endfor %}"
    renders = 0

    class Counting(ChatTemplate):
        def render_traced(self, *args, **kwargs):
            nonlocal renders
            renders += 1
            return super().render_traced(*args, **kwargs)

    traits = Counting({"default": burning}, limits=Limits(max_work=10_000)).traits
    assert renders == 1
    assert traits.call_form == TemplateTraits().call_form


def test_probes_end_within_less_work_than_a_request_may_take():
    source = "{% for a in range(90000) %}{% endfor %}" * 3
    template = ChatTemplate({"default": source + STYLES["turns"]})
    assert template.render([{"role": "user", "content": "hi"}])
    assert template.traits.content_forms["user"] is ContentForm.TEXT  # nothing found; the usual
