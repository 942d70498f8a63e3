from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from rest_shim.ollama.go_template import UnsupportedTemplateError, render

FIELDS = {"System": "S", "Prompt": "P", "Suffix": ""}


@pytest.mark.parametrize(
    ("template", "prompt"),
    [
        # Expected texts are those of Go's text/template.
        ("", ""),
        ("as it is", "as it is"),
        ("{{ .System }} | {{ .Prompt }}", "S | P"),
        ("{{.Prompt}}", "P"),
        ("[INST] {{ if .System }}<<{{ .System }}>>{{ end }}{{ .Prompt }} [/INST]", "[INST] <<S>>P [/INST]"),
        ("{{ if .Suffix }}a{{ else }}b{{ end }}", "b"),
        ("{{ if .Suffix }}a{{ else if .System }}b{{ else }}c{{ end }}", "b"),
        ("{{ if .System }}a{{ else if .Prompt }}b{{ else }}c{{ end }}", "a"),
        ("{{ if not .Suffix }}a{{ end }}", "a"),
        ("{{ if .Suffix }}{{ if .System }}a{{ else }}b{{ end }}{{ else }}c{{ end }}", "c"),
        ("a \n {{- .Prompt -}} \n b", "aPb"),
        ("a {{- /* nothing */ -}} b", "ab"),
        ("{{/* nothing */}}a", "a"),
        ("a {{ .Prompt }} b", "a P b"),
        ("{{ if .System -}} a {{- end }} b", "a b"),
        ("{{ .Prompt }}</s>{{ .Response }}</s>", "P</s>"),
        ("{{ if .Response }}a{{ end }}{{ .Prompt }}", "P"),
    ],
)
def test_what_templates_make(template: str, prompt: str) -> None:
    assert render(template, FIELDS) == prompt


@pytest.mark.parametrize(
    "template",
    [
        "{{ range .Messages }}{{ .Content }}{{ end }}", "{{ .Messages }}", "{{ $x := 1 }}", "{{ .Prompt",
        "{{ end }}", "{{ else }}", "{{ if .System }}", "{{ if .System }}{{ else }}{{ else }}{{ end }}",
        "{{ if .System }}{{ else }}{{ else if .Prompt }}{{ end }}", "{{ if and .System .Prompt }}{{ end }}",
        "{{ }}", "{{ printf .Prompt }}", "{{ if }}{{ end }}", "{{ .prompt }}",
    ],
)  # fmt: skip
def test_other_templates_are_refused(template: str) -> None:
    with pytest.raises(UnsupportedTemplateError):
        render(template, FIELDS)


@given(st.lists(st.sampled_from(("{{", "}}", "-", " ", "if", "else", "end", ".Prompt", "a", "{", "}"))))
def test_any_text_is_run_or_refused(parts: list[str]) -> None:
    template = "".join(parts)
    try:
        made = render(template, FIELDS)
    except UnsupportedTemplateError:
        assert "{{" in template
    else:
        assert "{{" not in made


@pytest.mark.parametrize("template", ["{{" * 30_000, "{{ .Prompt" * 6_000, "{{ if .System }}" * 4_000])
def test_long_templates_take_linear_time(template: str) -> None:
    with pytest.raises(UnsupportedTemplateError):
        render(template, FIELDS)


def test_a_value_is_not_a_template() -> None:
    assert render("{{ .Prompt }}", {"Prompt": "{{ .System }}"}) == "{{ .System }}"
