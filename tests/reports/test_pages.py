"""What every page must be: checked by the tests of each of them."""

import base64
import hashlib
import re
from html.parser import HTMLParser
from pathlib import Path


class Page(HTMLParser):
    """What a page refers to, and whether its tags close."""

    VOID = ("meta", "link", "img", "br", "circle", "rect", "path", "line")

    def __init__(self, text: str) -> None:
        super().__init__()
        self.addresses: list[str] = []
        self.ids: list[str] = []
        self.tags: list[str] = []
        self.images: list[dict[str, str | None]] = []
        self.open: list[str] = []
        self.faults: list[str] = []
        self.feed(text)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        found = dict(attrs)
        self.tags.append(tag)
        if tag not in self.VOID:
            self.open.append(tag)
        for name in ("src", "href", "srcset", "poster", "data", "action"):
            if name in found:
                self.addresses.append(found[name] or "")
        if tag == "img":
            self.images.append(found)
        if found.get("id"):
            self.ids.append(str(found["id"]))
        self.faults += [f"{tag} {name}" for name in found if name.startswith("on")]

    def handle_endtag(self, tag: str) -> None:
        if tag in self.VOID:
            return
        if not self.open or self.open.pop() != tag:
            self.faults.append(f"</{tag}> closes another tag")


def check_page(path: Path) -> Page:
    """Check that nothing is fetched, images are named, tags closed, and one script is allowed."""
    text = path.read_text()
    page = Page(text)
    assert page.faults == [] and page.open == []
    (script,) = re.findall(r"<script>(.*?)</script>", text, re.DOTALL)
    assert page.tags.count("script") == 1
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    assert f"script-src 'sha256-{digest}'\"" in text
    outside = [a for a in page.addresses if not a.startswith(("data:", "#"))]
    assert all(not re.match(r"[a-z]*:|//|/", address) for address in outside), outside
    # The namespace of SVG is a name, not a request.
    bare = text.replace('xmlns="http://www.w3.org/2000/svg"', "")
    assert "http://" not in bare and "https://" not in bare and "url(" not in bare
    assert all(image.get("alt") for image in page.images)
    inside = {address[1:] for address in page.addresses if address.startswith("#")}
    assert inside <= set(page.ids)
    assert len(page.ids) == len(set(page.ids))
    assert path.stat().st_size < 30_000_000
    return page
