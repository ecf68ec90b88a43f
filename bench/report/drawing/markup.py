"""Elements of a page or a drawing, serialised by the standard library at the end.

Nothing that a server or an operator wrote can become markup: it comes out as text.
"""

import re
from xml.etree.ElementTree import Element

_NOT_XML = re.compile("[^\t\n\r\u0020-\ud7ff\ue000-\ufffd\U00010000-\U0010ffff]")


def printable(text: str) -> str:
    """Without the characters that no XML document may hold."""
    return _NOT_XML.sub("\ufffd", text)


def node(tag: str, *children: Element | str, **attributes: str | float | None) -> Element:
    """An element; ``class_`` loses its underscore, others become dashes, None is left out."""
    element = Element(tag)
    for name, value in attributes.items():
        if value is not None:
            written = f"{value:.2f}".rstrip("0").rstrip(".") if isinstance(value, float) else value
            element.set(name.rstrip("_").replace("_", "-"), printable(str(written)))
    last: Element | None = None
    for child in children:
        if isinstance(child, Element):
            element.append(child)
            last = child
        elif last is None:
            element.text = (element.text or "") + printable(child)
        else:
            last.tail = (last.tail or "") + printable(child)
    return element
