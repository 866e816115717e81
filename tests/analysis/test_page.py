"""The page of an analysis: it loads nothing, escapes what it is told, says what is known, and its commands are commands."""

from __future__ import annotations

import re
import shlex
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from demerge.analysis.next import Names, steps
from demerge.analysis.page import CAPTIONS, page, refuse_to_replace, write_page
from demerge.analysis.report import summary, taken
from demerge.conflict import ConflictMap
from demerge.errors import UsageError
from demerge.pages import Exhibit

SHOWN = {name: Exhibit(caption, b"<svg/>", dark=b"<svg/>") for name, caption in CAPTIONS.items()}
HOSTILE = "</pre><script>alert(1)</script>'\"; rm -rf ~ #"


class Reader(HTMLParser):
    """Collects the tags that a page opens and closes, and its visible text."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: set[str] = set()
        self.text = ""
        self.feed(html)

    def handle_starttag(self, tag: str, attrs: Any) -> None:
        self.tags.add(tag)
        if tag not in ("meta", "img", "source", "br"):
            self.open.append(tag)
        for name, value in attrs:
            assert name not in ("src", "srcset", "href") or value.startswith("data:image/"), (name, value[:80])

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text += data


def read(map: ConflictMap, said: dict[str, Any], names: Names = Names()) -> Reader:
    found = Reader(page(map, taken(map, said), said, SHOWN, names))
    assert not found.open and not found.tags & {"script", "link", "iframe", "object"}
    return found


def test_a_promise_is_said_first_then_the_map_the_numbers_and_what_to_do(planted: Any) -> None:
    map = planted([0, 2, 4, 6, 16])
    text = read(map, summary(map, 4)).text
    order = [
        "Separate experts promise a gain",
        "cut at 125, 250 and 375 into 4 ranges, the gradient cut: on held-out groups",
        "A joint first step misses",
        "The map",
        "16 of 16",
        "The ranges",
        "What to do next",
        "How it was measured",
    ]
    places = [text.index(words) for words in order]
    assert places == sorted(places)


def test_noise_is_no_promise_and_more_groups_come_first(map_of: Any) -> None:
    map = map_of(np.random.default_rng(0).standard_normal((8, 6, 200)))
    said = summary(map, 4)
    text = read(map, said).text
    assert "No promise" in text and "0 of 8" in text and "none is resolved" in text and "Separate" not in text
    why, commands = steps(map, taken(map, said), said, Names())[0]
    assert "8 of 8 bins are unresolved" in why and f"--groups {said['groups_needed']}" in commands[0]


def test_one_range_gives_nothing_to_train(planted: Any) -> None:
    map = planted([0, 8])
    said = summary(map, 1)
    assert "stay in one range" in read(map, said).text
    assert not any("finetune" in command for _, run in steps(map, taken(map, said), said, Names()) for command in run)


def test_what_was_asked_for_against_the_advice_is_told(planted: Any) -> None:
    map = planted([0, 4, 8, 12, 16], noise=0.15)
    text = read(map, summary(map, 4, method="gradient")).text
    assert "the gradient cut: as was asked; advised is uniform, as" in text


def test_hostile_names_stay_text_and_one_word(planted: Any) -> None:
    map = planted([0, 2, 4, 6, 16])
    said = summary(map, 4)
    names = Names(HOSTILE, HOSTILE, "test", Path(HOSTILE), Path(HOSTILE))
    assert HOSTILE in read(map, said, names).text
    (_, commands), *_ = steps(map, taken(map, said), said, names)
    assert shlex.split(commands[0])[:4] == ["demerge", "finetune", HOSTILE, "--data"]
    assert shlex.split(commands[0])[4:9] == [HOSTILE, "--split", "test", "--ranges", HOSTILE]


def test_commands_know_their_options(planted: Any) -> None:
    from typer.main import get_command

    from demerge.cli.main import app

    map = planted([0, 2, 4, 6, 16], noise=0.5)
    sketched = ConflictMap(map.bins, map.gram, map.log_snr, map.origin, {"a": 10}, np.ones((16, 8, 10), dtype=np.float32))
    said = summary(sketched, 4)
    assert 0 < len(said["unresolved"]) < 16
    seen, known = set(), get_command(app)
    for _, commands in steps(sketched, taken(map, said), said, Names(map=Path("run/conflict"), partition=Path("p.json"))):
        for command in commands:
            program, name, *words = shlex.split(command)
            options = {option for parameter in known.commands[name].params for option in parameter.opts}  # type: ignore[attr-defined]
            assert program == "demerge" and {word for word in words if word.startswith("-")} <= options, command
            seen.add(name)
    assert seen == {"analyze", "finetune", "layers", "transfer"}


def test_the_page_is_written_whole_and_replaces_only_itself(planted: Any, tmp_path: Path) -> None:
    map, path = planted([0, 2, 4]), tmp_path / "new" / "conflict.html"
    said = summary(map, 2)
    html = write_page(map, taken(map, said), said, path, Names()).read_text(encoding="utf-8")
    assert not Reader(html).open
    assert len(re.findall("<picture>", html)) == len(CAPTIONS) and "prefers-color-scheme: dark" in html
    refuse_to_replace(path)
    path.write_text("<html>mine</html>")
    for place in (path, tmp_path):
        with pytest.raises(UsageError, match="is no page of a conflict map"):
            refuse_to_replace(place)
