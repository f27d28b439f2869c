"""markup.py: HTML as text that is safe to put together.

Whatever is not `Html` already is escaped where it meets `tag` or `join`, so text that comes from a
file or a model stays text.
"""

import html
import json
import re


class Html(str):
    """Text that is HTML already."""


def esc(value) -> Html:
    """Any value as HTML text or attribute value.

    Control characters become visible signs, and halves of surrogate pairs become U+FFFD.
    """
    if isinstance(value, Html):
        return value
    text = re.sub("[\ud800-\udfff]", "\ufffd", str(value))
    # Unicode keeps a picture of each control character at U+2400 and of DEL at U+2421.
    text = re.sub("[\\x00-\\x08\\x0b-\\x1f]", lambda match: chr(0x2400 + ord(match[0])), text)
    return Html(html.escape(text.replace("\x7f", "\u2421")))


def join(parts) -> Html:
    """Values one after another, each escaped unless it is HTML."""
    return Html("".join(esc(part) for part in parts))


def tag(name: str, *content, **attributes) -> Html:
    """An element with its content.

    `class_` stands for class and `aria_label` for aria-label. An attribute that is None or False is
    left out, and one that is True has no value.

    >>> tag("td", "1 < 2", tag("b", "!"), class_="good")
    '<td class="good">1 &lt; 2<b>!</b></td>'
    """
    opening = name
    for key, value in attributes.items():
        if value is None or value is False:
            continue
        key = key.rstrip("_").replace("_", "-")
        opening += f' {key}="{"" if value is True else esc(value)}"'
    if name == "img":
        return Html(f"<{opening}>")
    return Html(f"<{opening}>{join(content)}</{name}>")


def table(heads, rows, **attributes) -> Html:
    """A table in a box that scrolls sideways where the table is too wide.

    heads: the columns' heads, possibly none. rows: lists of cells; the first cell of each row is
    its head.
    """
    parts = []
    if heads:
        cells = [tag("th", head, scope="col") for head in heads]
        parts.append(tag("thead", tag("tr", *cells)))
    body = []
    for first, *rest in rows:
        cells = [tag("td", cell) for cell in rest]
        body.append(tag("tr", tag("th", first, scope="row"), *cells))
    parts.append(tag("tbody", *body))
    return tag("div", tag("table", *parts, **attributes), class_="scroll")


def data_block(value) -> Html:
    """JSON that can stand in a script element.

    It is pure ASCII and holds none of the characters that could end the element.
    """
    text = json.dumps(value, separators=(",", ":"), allow_nan=False)
    return Html(text.replace("<", "\\u003c").replace(">", "\\u003e").replace("&", "\\u0026"))
