"""Images in a folder: an interrupted one ends in the same bytes; what is refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from demerge.diffusion import drawing
from demerge.diffusion.drawing import plan_images, read_captions
from demerge.diffusion.model import Diffusion
from demerge.diffusion.options import SampleOptions
from demerge.errors import InputError, UsageError


@pytest.fixture
def model(tiny: Path) -> Diffusion:
    return Diffusion.load(tiny)


def draw(folder: Path, model: Diffusion, n: int, **changes: Any) -> int:
    """Draw images into a folder and return how many are new."""
    options = SampleOptions(num_images=n, **{"seed": 3, "steps": 2, "batch_size": 3, **changes})
    return plan_images(folder, model, options).run().drawn


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


@pytest.mark.parametrize("after", [0, 1, 4, 6])
def test_an_interrupted_folder_keeps_its_images_and_ends_in_the_same_bytes(
    model: Diffusion, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, after: int
) -> None:
    assert draw(tmp_path / "whole", model, 7) == 7
    written = 0
    commit = drawing.commit_bytes

    def interrupted(path: Path, data: bytes) -> Path:
        nonlocal written
        if written == after:
            raise KeyboardInterrupt
        written += 1
        return commit(path, data)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(drawing, "commit_bytes", interrupted)
        draw(tmp_path / "cut", model, 7)
    kept = contents(tmp_path / "cut")
    assert len(kept) == after + 1
    times = {path.name: path.stat().st_mtime_ns for path in (tmp_path / "cut").iterdir()}
    assert draw(tmp_path / "cut", model, 7) == 7 - after
    assert contents(tmp_path / "cut") == contents(tmp_path / "whole")
    assert all((tmp_path / "cut" / name).stat().st_mtime_ns == time for name, time in times.items())
    assert draw(tmp_path / "cut", model, 7) == 0


def test_images_of_other_options_or_of_another_model_are_refused(
    model: Diffusion, tmp_path: Path
) -> None:
    folder = tmp_path / "images"
    draw(folder, model, 2)
    before = contents(folder)
    for name, value in {"seed": 4, "steps": 3, "batch_size": 2, "sampler": "base"}.items():
        with pytest.raises(UsageError, match=f"{name} was"):
            draw(folder, model, 2, **{name: value})
    with pytest.raises(UsageError, match="num_images was 2, now 3"):
        draw(folder, model, 3)
    with torch.no_grad():
        model.denoiser.conv_out.bias.add_(1.0)
    with pytest.raises(UsageError, match="model was"):
        draw(folder, model, 2)
    assert contents(folder) == before


def test_a_foreign_folder_is_refused_and_a_stray_is_not(model: Diffusion, tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "mine.png").write_bytes(b"")
    (tmp_path / "file").write_bytes(b"")
    for place in ("a", "file"):
        with pytest.raises(UsageError, match="exists already"):
            draw(tmp_path / place, model, 1)
    (tmp_path / "b").mkdir()
    (tmp_path / "b" / ".sample.json.999999999.tmp").write_bytes(b"{")
    assert draw(tmp_path / "b", model, 1) == 1
    assert sorted(contents(tmp_path / "b")) == ["000000.png", "sample.json"]
    (tmp_path / "b" / "sample.json").write_text("{}{")
    with pytest.raises(InputError, match=r"sample\.json"):
        draw(tmp_path / "b", model, 1)


def test_captions_that_are_no_text_are_named(tmp_path: Path) -> None:
    (tmp_path / "c.txt").write_bytes(b"\xff\xfe")
    with pytest.raises(InputError, match=r"c\.txt: cannot be read as UTF-8"):
        read_captions(tmp_path / "c.txt")
