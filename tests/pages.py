"""The page of a report, parsed and checked."""

from html.parser import HTMLParser
from pathlib import Path

from PIL import Image


class Page(HTMLParser):
    """The files that a page names, its ids, and that what is opened is closed."""

    VOID = {"meta", "link", "img", "br", "input"}

    def __init__(self, path: Path):
        super().__init__()
        self.files, self.open, self.texts = [], [], []
        self.feed(path.read_text(encoding="utf-8"))
        assert not self.open, self.open

    def handle_starttag(self, tag, attributes):
        for name, value in attributes:
            if name in ("src", "href") and not value.startswith("#"):
                self.files.append(value)
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attributes):
        pass

    def handle_endtag(self, tag):
        if tag not in ("html", "body", "head", "p", "li"):
            assert self.open.count(tag), tag
        if tag in self.open:
            while self.open.pop() != tag:
                pass

    def handle_data(self, text):
        self.texts.append(text)


def check_page(path: Path) -> Page:
    """Whatever it names is beside it, and nothing of a network."""
    page = Page(path)
    assert page.files
    for file in page.files:
        assert "/" not in file and ":" not in file
        assert Image.open(path.parent / file).size[0] <= 1600
    assert set(page.files) == {file.name for file in path.parent.iterdir()} - {"index.html"}
    return page
