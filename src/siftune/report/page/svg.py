"""Elements of SVG, with whatever stands in them escaped."""

from markupsafe import Markup, escape

Child = str | Markup


def tag(name: str, *children: Child, **attributes: object) -> Markup:
    """An element; `class_` stands for `class`, and hyphens in names of attributes are underscores here.

    Example:
        >>> tag("text", "a < b", x=1.25, class_="tick")
        Markup('<text x="1.2" class="tick">a &lt; b</text>')
    """
    pairs = ((key.rstrip("_").replace("_", "-"), value) for key, value in attributes.items() if value is not None)
    given = Markup("").join(Markup(' {}="{}"').format(Markup(key), _text(value)) for key, value in pairs)
    inner = Markup("").join(escape(child) for child in children)
    return Markup("<{0}{1}>{2}</{0}>").format(Markup(name), given, inner)


def path(points: list[tuple[float, float]]) -> str:
    """A line through points, as the attribute `d` of a path."""
    return "M" + "L".join(f"{number(x)} {number(y)}" for x, y in points)


def number(value: float) -> str:
    """A coordinate, to a tenth of a pixel."""
    text = f"{value:.1f}"
    return text[:-2] if text.endswith(".0") else text


def _text(value: object) -> str:
    return number(value) if isinstance(value, float) else str(value)
