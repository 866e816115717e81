"""`demerge data check`: what it tells and how it ends."""

from __future__ import annotations

import json
import os

import numpy as np
from PIL import Image

from demerge.data import load_images


def test_a_good_source_ends_with_0_and_a_verdict(run):
    done = run("data", "check", "digits")
    assert done.code == 0
    assert "images    1,797, 1,797 readable" in done.out
    assert "splits    train (1,297), test (500)" in done.out
    assert done.out.splitlines()[-1] == "verdict   usable: 1,797 of 1,797 images were read"


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


def test_what_is_read_in_part_is_never_called_usable(run, tmp_path):
    Image.new("RGB", (4, 4)).save(tmp_path / "a.png")
    (tmp_path / "notes.pdf").write_bytes(b"x")
    done = run("data", "check", tmp_path)
    assert done.code == 0
    assert "others    .pdf (1)" in done.out
    assert (
        done.out.splitlines()[-1]
        == "verdict   usable: 1 of 1 images were read; 1 other files are passed over"
    )
    (tmp_path / "b.heic").write_bytes(b"\0\0\0\x18ftypheic")
    (tmp_path / "c.jxl").write_bytes(b"\xff\x0a")
    done = run("data", "check", tmp_path)
    assert done.code == 3
    last = done.out.splitlines()[-1]
    assert last.startswith(
        "verdict   cannot be used as it is: 1 of 3 images can be read; 2 of 3 files are broken (heic 1, jxl 1)"
    )
    assert (
        "broken    b.heic: not an image in a format that can be read (heic); convert it to PNG"
        in done.out
    )


def test_names_that_are_no_utf8_and_names_of_255_bytes_are_printed(run, tmp_path):
    """As their codes, in text and in JSON."""
    folder = tmp_path / "d"
    folder.mkdir()
    long = "é" * 125 + ".png"
    assert len(os.fsencode(long)) == 254
    for name in (b"bad-\xff\xfe.png", b"x" * 251 + b".png", os.fsencode(long)):
        with open(os.path.join(os.fsencode(folder), name), "wb") as stream:
            stream.write(b"nothing")
    good = os.path.join(os.fsencode(folder), b"good-\xff.png")
    with open(good, "wb") as stream:
        Image.new("RGB", (4, 4)).save(stream, "PNG")
    done = run("data", "check", folder)
    assert done.code == 3
    assert "broken    bad-\\xff\\xfe.png: " in done.out
    assert "1 of 4 images can be read" in done.out
    document = json.loads(run("data", "check", folder, "--json").out)
    assert "bad-\\xff\\xfe.png" in [entry["file"] for entry in document["broken"]]
    assert len(load_images(folder, skip_broken=True)) == 1


def test_a_csv_that_cannot_be_read_is_one_sentence_with_file_and_line(run, image_folder):
    (image_folder / "metadata.jsonl").unlink()
    (image_folder / "metadata.csv").write_text(
        'file_name,text\n0.png,a\n1.png,"5 inch cat\n2.png,c\n'
    )
    done = run("data", "check", image_folder)
    assert done.code == 3
    assert "a bug" not in done.err
    assert (
        f"captions cannot be read: {image_folder}/metadata.csv, line 3: the row that begins here"
        in done.out
    )


def test_no_such_source_is_one_message_and_3(run, tmp_path):
    done = run("data", "check", tmp_path / "nowhere")
    assert done.code == 3
    assert done.err.splitlines()[-1].startswith("  fix: give digits")
    assert run("data", "check").code == 2
