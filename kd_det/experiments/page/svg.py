"""Charts as SVG inside a page: text as text, colours those of the page, light or dark."""

import io
import re
import warnings
from collections.abc import Callable

from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.backends.backend_svg import FigureCanvasSVG
from matplotlib.figure import Figure

from kd_det.experiments.page.markup import Html, tag, text

# Drawn in these, shown in what the style sheet says.
INK, SOFT, LINE = "#010101", "#020202", "#030303"
SERIES = tuple(f"#0400{i:02x}" for i in range(7))
_VARIABLES = {
    INK: "--ink",
    SOFT: "--soft",
    LINE: "--line",
    **{colour: f"--c{i}" for i, colour in enumerate(SERIES)},
}
_WIDTH = 4.6  # inches: at the width of a phone, letters have their own size
_SETTINGS = {
    "svg.fonttype": "none",
    "text.parse_math": False,
    "font.size": 9,
    "axes.edgecolor": LINE,
    "axes.labelcolor": SOFT,
    "axes.titlesize": 10,
    "axes.titlecolor": INK,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": LINE,
    "text.color": INK,
    "xtick.color": LINE,
    "ytick.color": LINE,
    "xtick.labelcolor": SOFT,
    "ytick.labelcolor": SOFT,
}


def series_place(arm: int) -> int:
    """Return the colour of the arm at a place; 0 is the baseline's, the others repeat."""
    return 0 if arm == 0 else 1 + (arm - 1) % (len(SERIES) - 1)


def series_colour(arm: int) -> str:
    """Return what the arm at a place is drawn in."""
    return SERIES[series_place(arm)]


def series_variable(arm: int) -> str:
    """Return the style sheet's name of that colour."""
    return f"--c{series_place(arm)}"


def chart(name: str, draw: Callable[[Axes], None], *, caption: str, height: float = 3.0) -> Html:
    """
    Draw a chart.

    Args:
        name: distinct in the page; equal charts under equal names are equal files.
        draw: draws on the axes it is given, in the colours of this module.
        caption: what is seen, below the chart and for those who do not see it.
        height: inches, of 4.6 inches of width.
    """
    with rc_context({**_SETTINGS, "svg.hashsalt": name}), warnings.catch_warnings():
        # Letters that matplotlib's font lacks are drawn by the browser's.
        warnings.filterwarnings("ignore", message="Glyph")
        figure = Figure(figsize=(_WIDTH, height), layout="constrained")
        FigureCanvasSVG(figure)
        draw(figure.subplots())
        file = io.StringIO()
        figure.savefig(file, format="svg", transparent=True, metadata={"Date": None})
    content = file.getvalue()
    content = content[content.index("<svg") :]
    content = re.sub(r"<metadata>.*?</metadata>", "", content, flags=re.S)
    content = re.sub(r'(<svg[^>]*?) width="[^"]*"', r"\1", content, count=1)
    content = re.sub(r'(<svg[^>]*?) height="[^"]*"', r"\1", content, count=1)
    content = content.replace("<svg", f'<svg role="img" aria-label="{text(caption)}"', 1)
    for colour, variable in _VARIABLES.items():
        content = content.replace(colour, f"var({variable})")
    # Ids are the whole page's.
    content = re.sub(r'(id="|url\(#|href="#)', rf"\g<1>{name}-", content)
    return tag("figure", Html(content), tag("figcaption", caption))
