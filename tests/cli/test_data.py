"""`demerge data check`: what it tells and how it ends."""

from __future__ import annotations

import json

import numpy as np
from PIL import Image


def test_a_good_source_ends_with_0_and_a_verdict(run):
    done = run("data", "check", "digits")
    assert done.code == 0
    assert "images    1,797, 1,797 readable" in done.out
    assert "splits    train (1,297), test (500)" in done.out
    assert done.out.splitlines()[-1] == "verdict   usable"


def test_broken_files_are_named_and_end_with_3(run, image_folder):
    (image_folder / "cut.png").write_bytes((image_folder / "0.png").read_bytes()[:-200])
    (image_folder / "\x1b[31mred.png").write_bytes(b"")
    done = run("data", "check", image_folder)
    assert done.code == 3
    assert "cut.png: truncated image" in done.out
    assert "red.png: empty file" in done.out
    assert "captions  6 of 6" in done.out
    assert "\x1b" not in done.out + done.err
    assert "2 of 8 files are broken" in done.out


def test_json_is_one_document_on_stdout(run, image_folder):
    (image_folder / "bad.png").write_bytes(b"<html>")
    done = run("data", "check", image_folder, "--json")
    document = json.loads(done.out)
    assert done.code == 3
    assert document["broken"] == [{"file": "bad.png", "reason": "a web page, not an image"}]
    assert (document["images"], document["readable"], document["sizes"]) == (7, 6, {"20x16": 6})


def test_many_sizes_are_summed_up(run, tmp_path):
    for i in range(8):
        Image.fromarray(np.zeros((4 + i, 20, 3), dtype=np.uint8)).save(tmp_path / f"{i}.png")
    done = run("data", "check", tmp_path)
    assert "8 sizes, shorter side 4 to 11, longer side 20 to 20" in done.out


def test_no_such_source_is_one_message_and_3(run, tmp_path):
    done = run("data", "check", tmp_path / "nowhere")
    assert done.code == 3
    assert done.err.splitlines()[-1].startswith("  fix: give digits")
    assert run("data", "check").code == 2
