"""Draws the page of `alignment.compare`: one file without scripts, fonts or network, as report.html is."""

from alignment.charts import SIZE, line_chart
from alignment.report_page import page_template
from alignment.run_comparison import Comparison


def render(comparison: Comparison) -> str:
    """The whole page."""
    charts = [
        line_chart(f"curve-{number}", title, "RS step", "mean", lines)
        for number, (title, lines) in enumerate(comparison.curves.items())
        if any(lines.values())
    ]
    return page_template("compare.html.jinja").render(c=comparison, charts=charts, size=SIZE)
