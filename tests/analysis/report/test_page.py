"""The page of an analysis: it loads nothing, escapes what it is told, says what is known, and its commands are commands."""

from __future__ import annotations

import os
import re
import shlex
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from demerge.analysis.report.next_steps import Names, steps
from demerge.analysis.report.page import CAPTIONS, EYEBROWS, check_replaceable, page, write_page
from demerge.analysis.report.text import lines, summary, taken
from demerge.analysis.stages.ranges import lines as range_lines
from demerge.analysis.stages.ranges import ranges
from demerge.conflict import ConflictMap
from demerge.errors import UsageError
from demerge.reporting.html import PageFigure

SHOWN = {name: PageFigure(caption, b"<svg/>", dark=b"<svg/>") for name, caption in CAPTIONS.items()}
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
            assert name not in ("src", "srcset", "href") or value.startswith("data:image/"), (
                name,
                value[:80],
            )

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
        "The timesteps conflict: in 4 ranges cut at 125, 250 and 375 a joint AdamW step misses",
        "Train an expert for each range",
        "cut at 125, 250 and 375 into 4 ranges, the gradient cut: on held-out groups",
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
    assert (
        "No promise" in text
        and "0 of 8" in text
        and "none is resolved" in text
        and "Separate" not in text
    )
    why, commands = steps(map, taken(map, said), said, Names())[0]
    assert (
        "8 of 8 bins are unresolved" in why and f"--groups {said['groups_needed']}" in commands[0]
    )


def test_one_range_gives_nothing_to_train(planted: Any) -> None:
    map = planted([0, 8])
    said = summary(map, 1)
    assert "stay in one range" in read(map, said).text
    assert not any(
        "finetune" in command
        for _, run in steps(map, taken(map, said), said, Names())
        for command in run
    )


def test_what_was_asked_for_against_the_advice_is_told(planted: Any) -> None:
    map = planted([0, 4, 8, 12, 16], noise=0.15)
    text = read(map, summary(map, 4, method="gradient")).text
    assert "the gradient cut: as was asked; advised is uniform, as" in text


def test_hostile_names_stay_text_and_one_word(planted: Any) -> None:
    map = planted([0, 2, 4, 6, 16])
    said = summary(map, 4)
    names = Names(HOSTILE, HOSTILE, ("--split", HOSTILE), Path(HOSTILE), Path(HOSTILE))
    assert HOSTILE in read(map, said, names).text
    (_, commands), *_ = steps(map, taken(map, said), said, names)
    assert shlex.split(commands[0])[:4] == ["demerge", "finetune", HOSTILE, "--data"]
    assert shlex.split(commands[0])[4:9] == [
        HOSTILE,
        "--split",
        HOSTILE,
        "--ranges",
        str(Path(HOSTILE)),
    ]


def commands(map: ConflictMap, said: dict[str, Any], names: Names) -> list[list[str]]:
    """Return the commands of a page as words, each held against the program's own parser."""
    from typer.main import get_command

    from demerge.cli.main import app

    known, found = get_command(app), []
    for _, run in steps(map, taken(map, said), said, names):
        for line in run:
            program, name, *words = shlex.split(line)
            assert program == "demerge"
            known.commands[name].make_context(name, list(words))  # type: ignore[attr-defined]
            found.append([name, *words])
    return found


@pytest.mark.parametrize(
    "stored", [Path("run/conflict"), Path("run/conflict/conflict.safetensors")]
)
@pytest.mark.parametrize("model", ["models/my base", "../base", "owner/name"])
def test_commands_parse_repeat_the_data_and_stay_in_the_run(
    planted: Any, stored: Path, model: str
) -> None:
    map = planted([0, 2, 4, 6, 16], noise=0.5)
    sketched = ConflictMap(
        map.bins,
        map.gram,
        map.log_snr,
        map.origin,
        {"a": 10},
        np.ones((16, 8, 10), dtype=np.float32),
    )
    said = summary(sketched, 4)
    assert 0 < len(said["unresolved"]) < 16
    names = Names(
        model,
        "my data",
        ("--split", "test", "--skip-broken"),
        stored,
        Path("run/conflict/partition.json"),
    )
    found = commands(sketched, said, names)
    assert {name for name, *_ in found} == {"analyze", "finetune", "layers", "transfer"}
    for name, *words in found:
        if name in ("analyze", "finetune"):
            assert words[:6] == [model, "--data", "my data", "--split", "test", "--skip-broken"], (
                words
            )
        if "-o" in words:
            assert words[words.index("-o") + 1].startswith("run/"), words
    (more,) = (words for name, *words in found if name == "analyze" and "--layers" not in words)
    assert more[-2:] == ["-o", "run/conflict"] and f"{said['groups_needed']}" in more, (
        "the map is extended"
    )
    (moved,) = (words for name, *words in found if name == "transfer")
    assert all(word.startswith("run/experts/") for word in moved[1:5])


def test_a_map_that_cannot_hold_as_many_groups_gets_larger_batches(map_of: Any) -> None:
    map = map_of(np.random.default_rng(0).standard_normal((8, 6, 200)))
    said = {**summary(map, 4), "groups_needed": 60_000}
    (analyze, *words), *_ = commands(map, said, Names(map=Path("run/conflict")))
    assert (
        analyze == "analyze"
        and words[-2:] == ["-o", "run/conflict-more"]
        and "--batch-size" in words
    )


def test_layers_are_kept_where_the_map_has_them(planted: Any) -> None:
    map = planted([0, 2, 4, 6, 16], noise=0.5)
    kept = np.ones((16, 8, 10), dtype=np.float32)
    layered = ConflictMap(map.bins, map.gram, map.log_snr, map.origin, {"a.w": 10}, kept, kept)
    found = commands(layered, summary(layered, 4), Names(map=Path("run/conflict")))
    assert ["--layers" in words for name, *words in found if name == "analyze"] == [True]


# -- one verdict ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("edges", "noise", "kind"),
    [
        ([0, 2, 4, 6, 16], 0.1, "conflict"),
        ([0, 4, 8, 12, 16], 0.15, "conflict"),  # uniform is as good
        ([0, 8], 0.1, "alike"),
        ([0, 4, 8], 30.0, "unresolved"),
    ],
)
def test_analyze_ranges_and_the_page_have_one_verdict(
    planted: Any, edges: list[int], noise: float, kind: str
) -> None:
    map = planted(edges, noise=noise)
    analysed, cut = summary(map, 4), ranges(map)
    verdict = analysed["verdict"]
    assert (
        verdict == cut["verdict"]
        and verdict["kind"] == kind
        and verdict["promised"] == (kind == "conflict")
    )
    first = f"verdict       {verdict['found']} {verdict['do']}"
    assert lines(analysed)[0] == range_lines(cut)[0] == first
    for said in (analysed, cut, summary(map, 2, method="uniform")):
        text = read(map, said).text
        assert text.index(EYEBROWS[kind]) < text.index(verdict["found"]) < text.index("The map")
        promised = [line for line in lines(said) if "misses" in line and "no promise" not in line]
        assert (
            said["benefit"]["promised"] <= verdict["promised"]
            and bool(promised) == verdict["promised"]
        )
    assert (
        cut["ranges"] == verdict["ranges"] and cut["cuts"][cut["taken"]]["cuts"] == verdict["cuts"]
    )


def test_equal_runs_make_equal_files(planted: Any, tmp_path: Path) -> None:
    """In processes of their own, with other hash seeds, of a map in memory and of its file."""
    stored = planted([0, 1, 2, 4], M=5).save(tmp_path / "map.safetensors")
    code = """
import sys, numpy as np
from pathlib import Path
from demerge.analysis import summary, write
from demerge.conflict import ConflictMap
map = ConflictMap.load(Path(sys.argv[1]))
if sys.argv[2] == "strided":  # as a measurement leaves it
    gram = np.ascontiguousarray(map.gram.transpose(1, 0, 3, 2)).transpose(1, 0, 3, 2)
    map = ConflictMap(map.bins, gram, map.log_snr, map.origin)
write(map, Path("out"), summary(map, 4))
"""
    written = []
    for seed, memory in (("1", "file"), ("2", "strided")):
        folder = tmp_path / seed
        folder.mkdir()
        environment = {**os.environ, "PYTHONHASHSEED": seed}
        subprocess.run(
            [sys.executable, "-c", code, str(stored), memory],
            cwd=folder,
            env=environment,
            check=True,
        )
        written.append({path.name: path.read_bytes() for path in (folder / "out").iterdir()})
    assert written[0].keys() == written[1].keys() and "conflict.html" in written[0]
    assert [name for name in written[0] if written[0][name] != written[1][name]] == []


def test_the_page_is_written_whole_and_replaces_only_itself(planted: Any, tmp_path: Path) -> None:
    map, path = planted([0, 2, 4]), tmp_path / "new" / "conflict.html"
    said = summary(map, 2)
    html = write_page(map, taken(map, said), said, path, Names()).read_text(encoding="utf-8")
    assert not Reader(html).open
    assert (
        len(re.findall("<picture>", html)) == len(CAPTIONS) and "prefers-color-scheme: dark" in html
    )
    check_replaceable(path)
    path.write_text("<html>mine</html>")
    for place in (path, tmp_path):
        with pytest.raises(UsageError, match="is not a page of a conflict map"):
            check_replaceable(place)
