"""The page of healthy and sick runs has the alerts of the runs that its pictures show."""

import json
import re

import pytest

from engine.config.sections.supervision import GuardrailConfig
from engine.monitoring.guardrails import Guardrails
from scripts.pictures.operating import PAGE, RECORDED, commands


def first_alerts(name):
    """The step of each rule's first alert, by today's rules on the recorded metrics."""
    run = json.loads((RECORDED / f"{name}.json").read_text(encoding="utf-8"))
    rails = Guardrails(GuardrailConfig(), run["judges"])
    first = {}
    for step, values in enumerate(zip(*run["metrics"].values(), strict=True), start=1):
        found = zip(run["metrics"], values, strict=True)
        metrics = {name: value for name, value in found if value is not None}
        for alert in rails.check(step, metrics, run["settings"]):
            first.setdefault(alert.rule, step)
    return first


def alerts_on_the_page(name):
    """The rows of the table in the section of a run."""
    text = PAGE.read_text(encoding="utf-8")
    section = re.split(rf"--name {name}\s", text)[1].split("\n## ")[0]
    found = {}
    for steps, rules in re.findall(r"^\| ([\d, ]+) \| ([^|]+) \|$", section, re.MULTILINE):
        names = re.findall(r"`(\w+)`", rules)
        found |= dict(zip(names, map(int, steps.split(", ")), strict=True))
    return found


@pytest.mark.parametrize("name", commands())
def test_the_page_has_the_first_alerts_of_the_run_in_its_picture(name):
    assert alerts_on_the_page(name) == first_alerts(name)
