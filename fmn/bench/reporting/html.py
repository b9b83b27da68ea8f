"""A summary as one HTML file that needs nothing else: no script, no network.

Names in patches and suites are untrusted. The template (``assets/report.html.j2``) escapes all
text, and the page's own rules forbid it to load or run anything.
"""

import base64
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from ...text import printable
from ..names import UNTOUCHED
from .columns import GROUPS, Column
from .summary import Summary
from .tables import (
    Body,
    bodies_of_means,
    bodies_of_targets,
    columns_of,
    facts,
    lead,
    to_cell,
)

if TYPE_CHECKING:
    from .plots import Plot

ASSETS = Path(__file__).parents[2] / "assets"
PLOTS = {"erased-vs-kept": ("main",), "bars": ("main",), "probes": ("beyond", "text")}
"""Name of a plot -> groups of columns; it stands with the first that was measured."""


class Section(NamedTuple):
    """What the page says of a group of columns."""

    name: str
    heading: str
    about: str
    columns: list[Column]
    means: list[Body]
    targets: list[Body]
    figures: list[tuple["Plot", str]]  # with the PNG as base64


def page(summary: Summary, figures: Sequence[tuple["Plot", bytes]]) -> str:
    """The whole page.

    Args:
        figures: plots and their PNG files.
    """
    from jinja2 import Environment, FileSystemLoader, StrictUndefined

    environment = Environment(
        loader=FileSystemLoader(ASSETS),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters["printable"] = lambda text: printable(str(text))
    return environment.get_template("report.html.j2").render(
        summary=summary,
        lead=lead(summary),
        facts=facts(summary),
        sections=_sections(summary, figures),
        stages=[
            (stage, [to_cell(stage["UA"], "%"), to_cell(stage["IRA"], "%")])
            for stage in summary["scale"]
        ],
        target_counts={mean["kind"]: len(mean["targets"]) for mean in summary["means"]},
        untouched=UNTOUCHED,
    )


def _sections(summary: Summary, figures: Sequence[tuple["Plot", bytes]]) -> list[Section]:
    """Groups of which anything was measured."""
    sections = []
    for group, (heading, about) in GROUPS.items():
        if columns := columns_of(summary, group):
            means, targets = bodies_of_means(summary, columns), bodies_of_targets(summary, columns)
            sections.append(Section(group, heading, about, columns, means, targets, []))
    by_group = {section.name: section for section in sections}
    for plot, png in figures:
        place = next(group for group in PLOTS[plot.name] if group in by_group)
        by_group[place].figures.append((plot, base64.b64encode(png).decode()))
    return sections
