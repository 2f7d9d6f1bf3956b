"""One HTML file that opens anywhere: styles, script and pictures inline, nothing loaded.

A content security policy says so to the browser: nothing may be fetched, and no style or script
may run but the page's own two, which it knows by their SHA-256. Texts from models, critics and data
sets are escaped by jinja, and where HTML is built by hand, by `escaped`; a mistake there could show
wrongly, but could not run.
"""

from __future__ import annotations

import base64
import hashlib
import html
import re
import xml.etree.ElementTree as ElementTree
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fastsd.errors import FastsdError
from fastsd.runtime.files import replace_text

if TYPE_CHECKING:
    import jinja2
    from markupsafe import Markup

_SVG = "http://www.w3.org/2000/svg"
_XLINK = "http://www.w3.org/1999/xlink"
_LONG_NUMBER = re.compile(r"-?[0-9]+\.[0-9]{3,}")
_COORDINATES = {"d", "x", "y", "points", "transform"}
_FONT_SIZE = re.compile(r"[\d.]+px")


class PageError(FastsdError):
    """A page that cannot be written where it should be."""


def environment() -> jinja2.Environment:
    """The page's templates, every value in them escaped; `md` escapes for a Markdown line."""
    import jinja2

    templates = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent / "templates"),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    templates.filters["md"] = _markdown
    return templates


def write_page(path: Path, template: str, **values: Any) -> Path:
    """Renders a template that extends page.html.j2 and writes it, whole or not at all.

    Raises PageError naming the file where that fails.
    """
    from markupsafe import Markup

    templates = environment()
    parts = {}
    for part, source in (("style", "page.css.j2"), ("script", "tokens.js.j2")):
        # Markup: our own files, no value of anybody else's in them
        text = Markup(templates.get_template(source).render(**_constants()))
        parts |= {part: text, f"{part}_hash": _hash(text)}
    page = templates.get_template(template).render(**parts, **values)
    # A lone surrogate, which JSON can smuggle in, has no place in UTF-8.
    text = page.encode("utf-8", "replace").decode()
    try:
        replace_text(path, text)
    except OSError as error:
        raise PageError(f"cannot write {path}: {error.strerror}; choose another file") from error
    return path


def _constants() -> dict[str, Any]:
    """What style and script must agree on with the data."""
    from fastsd.reporting import token_data

    tags = {level: token_data.TAGS[level] for level in sorted(token_data.TAGS)}
    return {
        "tags": tags,
        "edges": list(token_data.EDGES),
        "unit": token_data.UNIT,
        "not_finite": token_data.NOT_FINITE,
        "digits": token_data.DIGITS,
    }


def _hash(text: str) -> str:
    return "sha256-" + base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()


def escaped(text: str) -> str:
    """Text as HTML text whose characters a script will count: a carriage return is kept, and the
    one character that HTML drops is replaced."""
    text = html.escape(text, quote=False).replace("\0", "\ufffd")
    return text.replace("\r", "&#13;")


def inline_picture(svg: str) -> Markup:
    """An <svg> drawn by us, with presentation attributes in place of styles, which the policy would
    not let through, and the page's own font."""
    from markupsafe import Markup

    ElementTree.register_namespace("", _SVG)
    ElementTree.register_namespace("xlink", _XLINK)
    root = ElementTree.fromstring(svg)
    for parent in list(root.iter()):
        for child in [c for c in parent if c.tag in (f"{{{_SVG}}}style", f"{{{_SVG}}}metadata")]:
            parent.remove(child)
        for declaration in (parent.attrib.pop("style", "") or "").split(";"):
            name, _, value = declaration.partition(":")
            name = name.strip()
            if name == "font" and (size := _FONT_SIZE.search(value)):
                parent.set("font-size", size[0])
            elif value and not name.startswith("font-family"):
                parent.set(name, value.strip())
        for name in _COORDINATES & parent.attrib.keys():
            short = _LONG_NUMBER.sub(lambda found: f"{float(found[0]):.2f}", parent.attrib[name])
            parent.set(name, " ".join(short.split()))
    return Markup(ElementTree.tostring(root, encoding="unicode"))


def _markdown(value: object) -> Markup:
    """Text as text in a Markdown line: HTML escaped, Markdown's own signs backslashed."""
    from markupsafe import Markup

    line = html.escape(" ".join(str(value).split()), quote=False)
    return Markup(re.sub(r"([\\`*_\[\]#|~$])", r"\\\1", line))
