"""Templates become one self-contained file: styles and scripts inside, and a policy that lets the page load nothing."""

from __future__ import annotations

import base64
import hashlib
import json
from functools import cache
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader
from markupsafe import Markup

from minimind_dpo.report.curves import Chart, figure

_HERE = Path(__file__).parent
_STYLES = ("vendor/uPlot.min.css", "templates/page.css")
_SCRIPTS = ("vendor/uPlot.iife.min.js", "templates/page.js")


def render(template: str, charts: list[Chart], **values: Any) -> str:
    """A template of `templates/` as a page.

    Styles and scripts are allowed by their digests alone, so that no text of a run can bring in another.

    Args:
        template: its name.
        charts: drawn where the template places them.
        **values: what else it shows; text is escaped.
    """
    css = "\n".join(map(_read, _STYLES))
    scripts = list(map(_read, _SCRIPTS))
    return (
        _templates()
        .get_template(template)
        .render(
            charts=charts,
            drawn=embedded([chart.drawn() for chart in charts]),
            css=Markup(css),
            css_hash=_digest(css),
            scripts=list(map(Markup, scripts)),
            script_hashes=list(map(_digest, scripts)),
            **values,
        )
    )


def embedded(value: Any) -> Markup:
    """JSON for a script element: nothing in it can end the element."""
    text = json.dumps(value, ensure_ascii=False, separators=(",", ":"), allow_nan=False)
    return Markup(text.replace("<", "\\u003c").replace("\u2028", "\\u2028").replace("\u2029", "\\u2029"))


@cache
def _templates() -> Environment:
    loader = FileSystemLoader(_HERE / "templates")
    environment = Environment(loader=loader, autoescape=True, trim_blocks=True, lstrip_blocks=True)
    environment.filters["figure"] = lambda value: figure(value) if value is not None else "–"
    return environment


@cache
def _read(name: str) -> str:
    return (_HERE / name).read_text("utf-8").strip()


def _digest(text: str) -> str:
    """As a Content-Security-Policy names an inline script or style."""
    return "sha256-" + base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()
