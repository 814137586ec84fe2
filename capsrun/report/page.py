"""Pages that need nothing beside them: templates filled in, pictures embedded."""

import base64
import re
from pathlib import Path
from typing import Any

import markdown
from jinja2 import Environment, FileSystemLoader, select_autoescape

from capsrun.terminal import counted

# What is put into a template whose name ends in .html is escaped.
TEMPLATES = Environment(
    loader=FileSystemLoader(Path(__file__).parent / "templates"),
    autoescape=select_autoescape(),
    trim_blocks=True,
    lstrip_blocks=True,
    keep_trailing_newline=True,
)

TEMPLATES.filters["counted"] = counted


def render(template: str, **values: Any) -> str:
    """A template of `templates/`, filled in."""
    return TEMPLATES.get_template(template).render(values)


def to_html(text: str, folder: Path) -> str:
    """A page with the content of some Markdown, its pictures, of `folder`, inside it."""
    # A number and its spread stay on one line.
    kept = text.replace(" ± ", "\u00a0±\u00a0").replace("not run yet", "not\u00a0run\u00a0yet")
    converter = markdown.Markdown(extensions=["tables", "toc", "sane_lists"])
    # No HTML of anybody else's: names come from users.
    converter.preprocessors.deregister("html_block")
    converter.inlinePatterns.deregister("html")
    body = re.sub(
        r'src="(pictures/[^"]+)"',
        lambda found: f'src="{embedded(folder / found[1])}"',
        converter.convert(kept),
    )
    return render("base.html", title=text.partition("\n")[0].removeprefix("# "), body=body)


def plain(values: Any) -> Any:
    """Plain data, a result say, whose texts are Markdown that shows just them.

    They may be somebody else's, and hold markup, or what a terminal obeys.
    """
    if isinstance(values, dict):
        return {plain(key): plain(value) for key, value in values.items()}
    if isinstance(values, list):
        return [plain(value) for value in values]
    if not isinstance(values, str):
        return values
    text = "".join(sign if sign.isprintable() else " " for sign in values)
    return re.sub(r"[&<>*`|\[\]\\~$]", lambda sign: f"&#{ord(sign[0])};", " ".join(text.split()))


def embedded(picture: Path) -> str:
    """A picture as the source of an image."""
    kind = "gif" if picture.suffix == ".gif" else "png"
    return f"data:image/{kind};base64,{base64.b64encode(picture.read_bytes()).decode()}"
