"""Chat templates of others run in a sandbox with limits; each problem is one error."""

import copy
import gc
import os
import signal
import time
from typing import Any

import pytest

from lit_gpt_scratch.errors import UserError
from lit_gpt_scratch.text import template_process
from lit_gpt_scratch.text.template_process import TemplateProcess

MESSAGES = [{"role": "user", "content": " hi é "}]


def render(template: str, **variables: Any) -> str:
    (text,) = TemplateProcess(template).render([{"messages": MESSAGES, **variables}])
    return text


@pytest.mark.parametrize(
    ("template", "expected"),
    [
        ("{{ messages[0].content | trim }}", "hi é"),
        ("{% for m in messages %}{% if true %}{% continue %}{% endif %}x{% endfor %}y", "y"),
        ("{% generation %}{{ messages[0]['role'] }}{% endgeneration %}!", "user!"),
        ("{{ messages | tojson }}", '[{"role": "user", "content": " hi é "}]'),
        ("{% set ns = namespace(a=1) %}{% set ns.a = ns.a + 1 %}{{ ns.a }}", "2"),
        ("{{ dict(a='b')['a'] }}{{ tools is none }}", "bTrue"),
        ("{{ strftime_now is defined }}{{ unknown_token }}", "False"),
        ("  {% if true %}\n  a\n  {% endif %}\n", "  a\n"),
    ],
)
def test_the_syntax_of_published_templates(template: str, expected: str) -> None:
    assert render(template, tools=None) == expected


@pytest.mark.parametrize(
    ("template", "message"),
    [
        ("{% for %}", "Expected an expression"),
        ("{{ x.y.z }}", "'x' is undefined"),
        ("{{ ''.__class__.__mro__ }}{{ cycler.__init__.__globals__ }}", "unsafe"),
        ("{{ messages.append(1) }}", "unsafe"),
        ("{% include '/etc/passwd' %}", "no loader"),
        ("{% import 'os' as os %}", "no loader"),
        ("{% set ns = namespace() %}{% set ns.__class__ = 1 %}", "underscore"),
        ("{{ strftime_now('%d') }}", "'strftime_now' is undefined"),
        ("{{ '\\ud800' }}", "must be text"),
        ("{{ 'a' * 10**8 }}", "more than 16,777,216 characters"),
        ("{{ 'a' * 10**11 }}", "MemoryError"),
        ("{% set n = namespace(a='a') %}{% for i in range(60) %}{% set n.a = n.a ~ n.a %}{% endfor %}", "MemoryError"),
        ("{% for x in range(99999) %}{% for y in range(99999) %}{% endfor %}{% endfor %}", "too much time or memory"),
        ("{% macro f() %}{{ f() }}{{ f() }}{% endmacro %}{{ f() }}", "recursion"),
        ("x" * 300_000, "more than 262,144 characters"),
    ],
)  # fmt: skip
def test_problems_are_one_line(template: str, message: str) -> None:
    began = time.monotonic()
    with pytest.raises(UserError, match=message) as error:
        render(template)
    assert str(error.value).startswith("the chat template of the model cannot be used: ")
    assert "\n" not in str(error.value)
    assert len(str(error.value)) < 500
    assert time.monotonic() - began < 60


def test_messages_that_a_template_rejects() -> None:
    template = TemplateProcess("{% if messages %}{{ raise_exception('no\nsystem') }}{% endif %}ok")
    with pytest.raises(UserError, match="rejects the messages: no system; change the messages"):
        template.render([{"messages": MESSAGES}])
    assert template.render([{"messages": []}] * 2) == ["ok", "ok"]


def test_a_template_that_never_ends(monkeypatch: pytest.MonkeyPatch) -> None:
    """The time of a request is limited also where CPU time is not."""
    monkeypatch.setattr(template_process, "RENDER_SECONDS", 1000)
    monkeypatch.setattr(template_process, "RENDER_TIMEOUT", 1)
    with pytest.raises(UserError, match="too much time or memory"):
        render("{% for x in range(99999) %}{% for y in range(99999) %}{% endfor %}{% endfor %}")


def test_a_killed_process_is_reported_and_replaced() -> None:
    template = TemplateProcess("ok")
    assert template.render([{}]) == ["ok"]
    assert template._process is not None
    os.kill(template._process.pid, signal.SIGKILL)
    with pytest.raises(UserError, match="too much time or memory"):
        template.render([{}])
    assert template.render([{}]) == ["ok"]


def test_a_fork_does_not_end_the_process() -> None:
    template = TemplateProcess("ok")
    template.render([{}])
    if (child := os.fork()) == 0:
        del template
        gc.collect()
        os._exit(0)
    os.waitpid(child, 0)
    assert template.render([{}]) == ["ok"]


def test_the_process_ends_with_its_object() -> None:
    template = TemplateProcess("ok")
    template.render([{}])
    process = template._process
    assert process is not None
    other = copy.copy(template)
    assert other.render([{}]) == ["ok"]
    assert other._process is not process
    del template
    gc.collect()
    assert process.returncode is not None
