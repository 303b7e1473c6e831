"""The page: whole, balanced, escaped, and complete without anything from outside."""

import base64
import io
import re
from html.parser import HTMLParser

import numpy as np
import pytest
from PIL import Image

from hpcai_cli.engine.reports import comparison, page, plots, report
from hpcai_cli.errors import printable
from hpcai_cli.recipe import Recipe

VOID = {"meta", "img", "br", "link", "input"}
HOSTILE = ('<script>alert("x")</script>', "\"><img src=http://evil.example/x onerror=alert(1)>")


class Reader(HTMLParser):
    """Reads a page as a browser would: its tags, which must be balanced, its attributes and its text."""

    def __init__(self, text: str):
        super().__init__()
        self.open, self.tags, self.words = [], [], []
        self.feed(text)
        self.close()
        assert not self.open

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.words.append(data)

    def all(self, name: str) -> list[dict]:
        return [attributes for tag, attributes in self.tags if tag == name]


def document(names=("cat", "dog"), **more) -> tuple[dict, dict]:
    """Return a report of two classes, with a comparison, and its pictures."""
    source = np.random.default_rng(1)
    recipe = Recipe(name="two", summary="", num_classes=2, class_names=tuple(names))
    scores, labels = source.normal(size=(60, 2)).astype(np.float32), source.integers(0, 2, 60)
    found = report.report(recipe, scores, labels)
    other = source.normal(size=(60, 2)).astype(np.float32)
    pictures = {"confusion": plots.confusion(found["confusion"], names), "curves": plots.curves(found["curves"])}
    return {"model": f"runs/{names[0]}", "data": f"{names[1]}.h5", "split": "test", "examples": 60, "format": "keras",
            "decision_threshold": 0.25, **found, "by": names[0],
            "comparison": {"model": names[1], **comparison.compare(recipe, labels, (scores, None), (other, None))},
            "slices": [{"name": names[0], "count": 60, "metrics": {"accuracy": 0.5, "loss": 1.0},
                        "intervals": {"accuracy": [0.4, 0.6], "loss": [0.9, 1.1]}}], **more}, pictures


@pytest.mark.parametrize("names", [
    ("cat", "dog"), HOSTILE, ("</title></style><b>", "&amp;&#60;"), ("猫", "\0\x1b[31m")])
def test_the_page_is_whole_and_holds_nothing_foreign(names):
    text = page.page(*document(names))
    found = Reader(text)
    assert text.startswith("<!doctype html>") and found.tags[0] == ("html", {"lang": "en"})
    assert found.all("meta")[0] == {"charset": "utf-8"}
    assert len(found.all("title")) == 1
    assert {tag for tag, _ in found.tags} <= {
        "html", "head", "meta", "title", "style", "body", "h1", "h2", "dl", "dt", "dd", "div", "table", "caption",
        "thead", "tbody", "tr", "th", "td", "p", "figure", "img", "figcaption", "footer"}
    attributes = {name for _, given in found.tags for name in given}
    assert attributes <= {"lang", "charset", "http-equiv", "content", "name", "class", "scope", "src", "alt"}
    assert all(image["src"].startswith("data:image/png;base64,") for image in found.all("img"))
    style = text[text.index("<style>"):text.index("</style>")]
    assert "url(" not in style and "@import" not in style
    assert text.replace("\n", "").isprintable()
    assert sum(printable(names[0]) in words for words in found.words) >= 3


def test_the_pictures_are_inside_and_described():
    given, pictures = document()
    shown = Reader(page.page(given, pictures)).all("img")
    assert [image["alt"] for image in shown] == [page.CAPTIONS[name] for name in pictures]
    for image, content in zip(shown, pictures.values(), strict=True):
        kind, _, text = image["src"].partition(",")
        assert kind == "data:image/png;base64" and base64.b64decode(text) == content
        with Image.open(io.BytesIO(content)) as picture:
            picture.load()


def test_all_figures_are_there():
    given, pictures = document()
    words = Reader(page.page(given, pictures)).words
    for name in given["metrics"]:
        assert name in words
    low, high = given["intervals"]["accuracy"]
    assert f"{low:.4f} to {high:.4f}" in words
    assert any("McNemar" in word for word in words)
    assert "0.2500" in words and "0.4000 to 0.6000" in words


def test_each_table_says_what_it_is_and_its_rows_are_full():
    text = page.page(*document())
    tables = re.findall(r"<table>.*?</table>", text, re.S)
    assert len(tables) >= 5
    for table in tables:
        assert "<caption>" in table
        heads = table.count('<th scope="col">')
        for row in re.findall(r'<tr><th scope="row">.*?</tr>', table):
            assert 1 + row.count("<td>") == heads


def test_a_thousand_rows_are_cut_and_that_is_said():
    given, pictures = document()
    row = given["classes"][0]
    text = page.page({**given, "classes": [row] * 1000}, pictures)
    assert "(the first 100 of 1,000)" in text


def test_a_regression_has_a_page_too():
    labels = np.arange(9, dtype=np.float32)
    found = report.report(Recipe(name="n", summary="", task="regression"), labels[:, None] + 1, labels)
    text = page.page({"model": "m", "data": "d", "split": "test", "examples": 9, "format": "onnx",
                             "decision_threshold": None, **found}, {})
    assert "root_mean_squared_error" in Reader(text).words
    assert "threshold" not in text
