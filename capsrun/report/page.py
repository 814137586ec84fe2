"""Turns Markdown into one HTML page that needs nothing beside it."""

import base64
import html
import re
from pathlib import Path
from urllib.parse import unquote

import markdown

PAGE = """<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta http-equiv="Content-Security-Policy"
  content="default-src 'none'; style-src 'unsafe-inline'; img-src data:">
<title>{title}</title>
<style>
:root {{ color-scheme: light dark; --line: #d0d7de; --soft: #f6f8fa; }}
@media (prefers-color-scheme: dark) {{ :root {{ --line: #444c56; --soft: #22272e; }} }}
body {{ font: 15px/1.5 system-ui, sans-serif; }}
body {{ max-width: 72rem; margin: 2rem auto; padding: 0 1rem; }}
table {{ border-collapse: collapse; display: block; overflow-x: auto; margin: 1rem 0; }}
th, td {{ border: 1px solid var(--line); padding: .3rem .6rem; }}
th, td {{ text-align: left; vertical-align: top; }}
th {{ background: var(--soft); }}
thead:not(:has(th:not(:empty))) {{ display: none; }}
img {{ max-width: 100%; height: auto; background: white; border-radius: 4px; }}
code {{ background: var(--soft); padding: .1rem .25rem; border-radius: 3px; font-size: .9em; }}
pre {{ background: var(--soft); padding: .6rem; border-radius: 4px; overflow-x: auto; }}
pre code {{ padding: 0; }}
h2 {{ margin-top: 2.5rem; border-bottom: 1px solid var(--line); }}
</style>
</head>
<body>
{body}
</body>
</html>
"""


def to_html(text: str, folder: Path) -> str:
    """A page with the content of some Markdown, its pictures, of `folder`, inside it."""
    # A number and its spread stay on one line.
    kept = re.sub(
        r"(?<=\d) ± (?=\d)|(?<=not) (?=run)|(?<=run) (?=yet)",
        lambda f: f[0].replace(" ", "\u00a0"),
        text,
    )
    # No HTML of anybody else's; what is indented is code, which Markdown itself escapes.
    kept = re.sub(r"^(?!    ).*$", lambda line: line[0].replace("<", "&lt;"), kept, flags=re.M)
    body = markdown.markdown(kept, extensions=["tables", "toc", "sane_lists"])
    body = re.sub(
        r'src="([^":]+\.(?:png|gif|apng))"', lambda found: _inside(folder / unquote(found[1])), body
    )
    title = re.search(r"^# (.+)$", text, re.MULTILINE)
    return PAGE.format(
        title=html.escape(html.unescape(title[1] if title else "capsrun")), body=body
    )


def plain(text: str) -> str:
    """The text as Markdown that shows just that: names come from users, and may hold markup."""
    return re.sub(r"[&<>\"'*`#|\[\]()!\\{}~$]", lambda sign: f"&#{ord(sign[0])};", text)


def _inside(picture: Path) -> str:
    data = base64.b64encode(picture.read_bytes()).decode()
    kind = "gif" if picture.suffix == ".gif" else "png"
    return f'src="data:image/{kind};base64,{data}"'
