"""The page of an analysis: it loads nothing, escapes what it is told, says what is known, and its commands are commands."""

from __future__ import annotations

import os
import re
import shlex
import subprocess
import sys
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from demerge.analysis import write_report
from demerge.analysis.partitioning.map_reading import Reading
from demerge.analysis.report.next_steps import CommandNames, next_steps
from demerge.analysis.report.page import CAPTIONS, conflict_page, write_page
from demerge.analysis.report.summary import ConflictSummary, summarize
from demerge.analysis.report.verdict import HEADLINES
from demerge.conflict import ConflictMap
from demerge.reporting.html import PageFigure
from demerge.reporting.theme import Pictures

SHOWN = {name: PageFigure(caption, b"<svg/>", dark=b"<svg/>") for name, caption in CAPTIONS.items()}
DRAWN = dict.fromkeys(CAPTIONS, Pictures(b"<svg/>", b"<svg/>", b""))
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


def summary(map: ConflictMap, n: int, method: str = "gradient") -> ConflictSummary:
    return summarize(Reading(map), n, method)


def read(summary: ConflictSummary, names: CommandNames = CommandNames()) -> Reader:
    found = Reader(conflict_page(summary, SHOWN, names))
    assert not found.open and not found.tags & {"script", "link", "iframe", "object"}
    return found


def test_a_promise_is_said_first_then_the_map_the_numbers_and_what_to_do(planted: Any) -> None:
    map = planted([0, 2, 4, 6, 16])
    text = read(summary(map, 4)).text
    order = [
        "The timesteps conflict: train an expert for each range",
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
    text = read(said).text
    assert (
        "Too little is resolved: measure more" in text
        and "0 of 8" in text
        and "none is resolved" in text
        and "promise a gain" not in text
    )
    why, commands = next_steps(said, CommandNames())[0]
    assert "8 of 8 bins are unresolved" in why and f"--groups {said.groups_needed}" in commands[0]


def test_one_range_gives_nothing_to_train(planted: Any) -> None:
    map = planted([0, 8])
    said = summary(map, 1)
    assert "stay in one range" in read(said).text
    assert not any(
        "finetune" in command for _, run in next_steps(said, CommandNames()) for command in run
    )


def test_what_was_asked_for_against_the_advice_is_told(planted: Any) -> None:
    map = planted([0, 4, 8, 12, 16], noise=0.15)
    text = read(summary(map, 4)).text
    assert "the gradient cut: as was asked; advised is uniform, as" in text


def test_hostile_names_stay_text_and_one_word(planted: Any) -> None:
    map = planted([0, 2, 4, 6, 16])
    said = summary(map, 4)
    names = CommandNames(HOSTILE, HOSTILE, ("--split", HOSTILE), Path(HOSTILE), Path(HOSTILE))
    assert HOSTILE in read(said, names).text
    (_, commands), *_ = next_steps(said, names)
    assert shlex.split(commands[0])[:4] == ["demerge", "finetune", HOSTILE, "--data"]
    assert shlex.split(commands[0])[4:9] == [
        HOSTILE,
        "--split",
        HOSTILE,
        "--ranges",
        str(Path(HOSTILE)),
    ]


def commands(said: ConflictSummary, names: CommandNames) -> list[list[str]]:
    """Return the commands of a page as words, each held against the program's own parser."""
    from typer.main import get_command

    from demerge.cli.main import app

    known, found = get_command(app), []
    for _, run in next_steps(said, names):
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
    assert 0 < len(said.unresolved) < 16
    names = CommandNames(
        model,
        "my data",
        ("--split", "test", "--skip-broken"),
        stored,
        Path("run/conflict/partition.json"),
    )
    found = commands(said, names)
    assert {name for name, *_ in found} == {"analyze", "finetune", "layers", "transfer"}
    for name, *words in found:
        if name in ("analyze", "finetune"):
            assert words[:6] == [model, "--data", "my data", "--split", "test", "--skip-broken"], (
                words
            )
        if "-o" in words:
            assert words[words.index("-o") + 1].startswith("run/"), words
    (more,) = (words for name, *words in found if name == "analyze" and "--layers" not in words)
    assert more[-2:] == ["-o", "run/conflict"] and f"{said.groups_needed}" in more, (
        "the map is extended"
    )
    (moved,) = (words for name, *words in found if name == "transfer")
    assert all(word.startswith("run/experts/") for word in moved[1:5])


def test_a_map_that_cannot_hold_as_many_groups_gets_larger_batches(map_of: Any) -> None:
    map = map_of(np.random.default_rng(0).standard_normal((8, 6, 200)))
    said = replace(summary(map, 4), groups_needed=60_000)
    (analyze, *words), *_ = commands(said, CommandNames(map=Path("run/conflict")))
    assert (
        analyze == "analyze"
        and words[-2:] == ["-o", "run/conflict-more"]
        and "--batch-size" in words
    )


def test_layers_are_kept_where_the_map_has_them(planted: Any) -> None:
    map = planted([0, 2, 4, 6, 16], noise=0.5)
    kept = np.ones((16, 8, 10), dtype=np.float32)
    layered = ConflictMap(map.bins, map.gram, map.log_snr, map.origin, {"a.w": 10}, kept, kept)
    found = commands(summary(layered, 4), CommandNames(map=Path("run/conflict")))
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
    analysed = summary(map, 4)
    ranges = summarize(Reading(map), None, "advised", with_counts=True)
    verdict = analysed.verdict
    assert verdict == ranges.verdict and verdict.kind == kind
    first = f"verdict       {verdict.finding} {verdict.advice}"
    assert analysed.lines()[0] == ranges.lines()[0] == first
    for said in (analysed, ranges, summary(map, 2, "uniform")):
        page = read(said)
        body = page.text.split("}")[-1]
        assert body.strip().startswith(HEADLINES[kind]), "what was found and what to do, first"
        assert body.index(verdict.finding) < body.index("The map")
        promised = [
            each for each in said.lines() if "misses" in each and "no gain is predicted" not in each
        ]
        assert said.expected_gain.is_promised <= verdict.is_promised == bool(promised)
    assert ranges.partition == verdict.partition


def test_equal_runs_make_equal_files(
    planted: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In another process, with another hash seed, of a map in memory and of its file."""
    stored = planted([0, 1, 2, 4], M=5).save(tmp_path / "map.safetensors")
    code = """
import sys, numpy as np
from pathlib import Path
from demerge.analysis import Reading, summarize, write_report
from demerge.conflict import ConflictMap
map = ConflictMap.load(Path(sys.argv[1]))  # and now as a measurement leaves it
gram = np.ascontiguousarray(map.gram.transpose(1, 0, 3, 2)).transpose(1, 0, 3, 2)
map = ConflictMap(map.bins, gram, map.log_snr, map.origin)
write_report(summarize(Reading(map)), "out")
"""
    ours, theirs = tmp_path / "ours", tmp_path / "theirs"
    ours.mkdir()
    theirs.mkdir()
    environment = {
        **os.environ,
        "PYTHONHASHSEED": "2" if os.environ.get("PYTHONHASHSEED") == "1" else "1",
    }
    command = [sys.executable, "-c", code, str(stored)]
    subprocess.run(command, cwd=theirs, env=environment, check=True)
    monkeypatch.chdir(ours)
    write_report(summarize(Reading(ConflictMap.load(stored))), "out")
    written = [
        {path.name: path.read_bytes() for path in (folder / "out").iterdir()}
        for folder in (ours, theirs)
    ]
    assert written[0].keys() == written[1].keys() and "conflict.html" in written[0]
    assert [name for name in written[0] if written[0][name] != written[1][name]] == []


def test_the_page_is_written_whole(planted: Any, tmp_path: Path) -> None:
    path = tmp_path / "new" / "conflict.html"
    said = summary(planted([0, 2, 4]), 2)
    html = write_page(said, path, CommandNames(), DRAWN).read_text(encoding="utf-8")
    assert not Reader(html).open
    assert (
        len(re.findall("<picture>", html)) == len(CAPTIONS) and "prefers-color-scheme: dark" in html
    )
