"""A template and figures -> a page: one file, no network, no script but its own.

What is shown is text from outside (prompts, names of files, what a reward's code says): templates escape it, and the
content security policy names the one style sheet and the one script by hash, so that nothing else runs.
"""

from __future__ import annotations

import base64
import hashlib
import io
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rewardtune.data.rows import counted
from rewardtune.pages.files import plain

if TYPE_CHECKING:
    from PIL.Image import Image

_HERE = Path(__file__).parent
_PIXELATED = 160
"""Pictures up to this side are enlarged without smoothing, so that their pixels can be judged."""
_LARGEST = 768
"""Longer sides are scaled down for the page; the folder beside it has the originals. Ours."""
CHART = (240, 90)
"""Width and height of a chart of a curve, in its own units."""
MARGIN = 8
"""Around the points, in the same units: room for the mark of a chosen one."""


def render_page(
    template: Path, values: Mapping[str, Any], *, script: str = "", filters: Mapping[str, Callable[..., Any]]
) -> str:
    """The HTML of a Jinja template with the shared look, and the style sheet of the same name where there is one.

    values: what the template names, beside `style`, `script` and `policy`. filters: beside `plain`, `number` and
    `counted`.
    """
    from jinja2 import Environment, FileSystemLoader, StrictUndefined
    from markupsafe import Markup

    environment = Environment(
        loader=FileSystemLoader([template.parent, _HERE]), autoescape=True, undefined=StrictUndefined,
        trim_blocks=True, lstrip_blocks=True,
    )  # fmt: skip
    environment.filters |= {"plain": plain, "number": number, "counted": counted, **filters}
    style = (_HERE / "page.css").read_text(encoding="utf-8")
    own = template.parent / template.name.replace(".html.j2", ".css")
    if own.is_file():
        style += own.read_text(encoding="utf-8")
    scripts = f"script-src '{_hash(script)}'; " if script else ""
    return environment.get_template(template.name).render(
        **values,
        policy=Markup(
            f"default-src 'none'; img-src data:; style-src '{_hash(style)}'; {scripts}"
            "base-uri 'none'; form-action 'none'"
        ),
        style=Markup(style),
        script=Markup(script),
    )


def number(value: float) -> str:
    """A score for people: three significant digits, no exponent for everyday sizes, no sign where it rounds to zero."""
    return f"{value:z.3f}" if abs(value) < 10 else f"{value:.4g}"


def picture(image: Image) -> dict[str, Any]:
    """A picture as a data URI: small ones exactly, large ones scaled down."""
    from PIL import Image as Pillow

    pixelated = max(image.size) <= _PIXELATED
    buffer = io.BytesIO()
    if pixelated:
        image.save(buffer, "WEBP", lossless=True, quality=50, method=2)
    else:
        if max(image.size) > _LARGEST:
            image = image.copy()
            image.thumbnail((_LARGEST, _LARGEST), Pillow.Resampling.LANCZOS)
        image.save(buffer, "WEBP", quality=88, method=4)
    return {
        "source": "data:image/webp;base64," + base64.b64encode(buffer.getvalue()).decode(),
        "pixelated": pixelated,
        "width": image.width,
        "height": image.height,
    }


def curve(steps: Sequence[float], values: Sequence[float], limits: tuple[float, float] | None = None) -> dict[str, Any]:
    """Points of a polyline in a frame of CHART, and the values that are its lower and upper end.

    steps: rising from 0; the last lies at the right end. limits: those ends, where several lines share a frame; else
    the smallest and largest value.
    """
    width, height = (side - 2 * MARGIN for side in CHART)
    low, high = limits or (min(values), max(values))
    span, last = (high - low) or 1.0, steps[-1] or 1
    points = [
        (round(MARGIN + width * step / last, 1), round(MARGIN + height * (high - value) / span, 1))
        for step, value in zip(steps, values, strict=True)
    ]
    return {"points": points, "low": low, "high": high}


def _hash(text: str) -> str:
    return "sha256-" + base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()
