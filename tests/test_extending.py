"""What docs/extending.md shows works: its blocks are applied to a copy of the library and used."""

from __future__ import annotations

import os
import re
import shutil
import sys
from collections.abc import Iterator
from contextlib import redirect_stdout
from multiprocessing.context import ForkProcess
from pathlib import Path

import pytest

from demerge.merging.registry import find_method
from demerge.testing import check_method

ROOT = Path(__file__).resolve().parents[1]
PAGE = (ROOT / "docs" / "extending.md").read_text(encoding="utf-8")
NEW = re.findall(r"^```python\n# (\S+)\n(.*?)^```", PAGE, re.DOTALL | re.MULTILINE)
CHANGES = re.findall(r"^```diff\n--- (\S+)\n(.*?)^```", PAGE, re.DOTALL | re.MULTILINE)

USE = """
import sys
import numpy as np
import torch
from demerge import ConflictMap, Diffusion, FinetuneOptions, Partition, partition
from demerge.cli.main import app
from demerge.conflict import Origin
from demerge.diffusion.families import DENOISERS
from demerge.evaluation.features.nets import make_feature_net
from demerge.evaluation.metrics.distances import Reference, evaluate_images
from demerge.evaluation.report.tables import LABELS
from demerge.finetuning.objective import loss_weights
from demerge.merging import merge_tensors
from demerge.merging.blocks import block_of

base, experts = {"w": torch.ones(2)}, [{"w": torch.ones(2) + n} for n in (1, 5)]
assert merge_tensors(base, experts, "median")["w"].tolist() == [4, 4]

net = make_feature_net("digits-cnn")
images = torch.randint(0, 256, (12, 1, 8, 8), generator=torch.manual_seed(0), dtype=torch.uint8)
metrics = evaluate_images(images[6:], Reference.from_images(net, images[:6]), net)
assert metrics["means"] > 0 and LABELS["means"] == "distance of means"

origin = Origin("model", "data", 10, "exact", "shared", False, "euclid", 4, 0)
gram = np.eye(20).reshape(4, 5, 4, 5)
map = ConflictMap(Partition.uniform(700, 4), gram, np.linspace(9, -10, 700), origin)
assert partition(map, 3, "doubling").cuts == [100, 300]

assert block_of("time_caption_embed.0.weight") == "time"
assert "PixArtTransformer2DModel" in DENOISERS
model = Diffusion.load("digits-early")
assert torch.equal(
    loss_weights(model, FinetuneOptions(loss_weight="snr")), torch.ones(1000).double()
)
options = FinetuneOptions(note="a line")
assert "note" in options.binding() and "note" not in options.binding(step=3)

Partition.uniform(10, 2).save("partition.json")
app(["widths", "partition.json"], standalone_mode=False)
"""


def test_the_method_of_the_page_passes_every_property(tmp_path: Path) -> None:
    (code,) = [text for name, text in NEW if name.endswith("median.py")]
    file = tmp_path / "median.py"
    file.write_text(code.replace('@method("median"', '@method("median of the page"'))
    method = find_method(f"{file}:median")
    assert list(method.options) == ["scale"]
    check_method(method.function)


def hunks(change: str) -> Iterator[tuple[str, str]]:
    """The text before and after each part of a change; `...` stands for the rest of a last line."""
    for hunk in change.split("@@\n"):
        lines = hunk.splitlines(keepends=True)
        before = "".join(line[1:] or "\n" for line in lines if not line.startswith("+"))
        after = "".join(line[1:] or "\n" for line in lines if not line.startswith("-"))
        yield before.removesuffix("...\n"), after.removesuffix("...\n")


@pytest.mark.parametrize(("name", "change"), CHANGES, ids=[name for name, _ in CHANGES])
def test_each_change_finds_its_lines(name: str, change: str) -> None:
    text = (ROOT / name).read_text(encoding="utf-8")
    assert [text.count(before) for before, _ in hunks(change)] == [1] * len([*hunks(change)])


@pytest.fixture
def extended(tmp_path: Path) -> Path:
    """A folder with a copy of the library as it is after all changes of the page."""
    package = tmp_path / "demerge"
    skip = shutil.ignore_patterns("__pycache__", "assets")
    for source, target in (("demerge", "."), ("analysis", "analysis"), ("cli", "cli")):
        shutil.copytree(ROOT / source, package / target, ignore=skip, dirs_exist_ok=True)
    (package / "assets").symlink_to(ROOT / "demerge" / "assets")
    texts = [(name, ("", text)) for name, text in NEW]
    texts += [(name, hunk) for name, change in CHANGES for hunk in hunks(change)]
    for name, (before, after) in texts:
        file = package / name.removeprefix("demerge/")
        if name.startswith("tests/"):
            continue
        old = file.read_text(encoding="utf-8") if before else ""
        file.write_text(old.replace(before, after) if before else after, encoding="utf-8")
    return tmp_path


def use(library: Path) -> None:
    """Use a copy of the library in this process, which has loaded another one."""
    for name in [name for name in sys.modules if name.partition(".")[0] == "demerge"]:
        del sys.modules[name]
    sys.path.insert(0, str(library))
    os.chdir(library)
    with open("printed", "w", encoding="utf-8") as file, redirect_stdout(file):
        exec(USE, {})
    assert Path(sys.modules["demerge"].__file__ or "").parent == library / "demerge"


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_what_the_page_adds_works(extended: Path) -> None:
    """In a fork: a new process would import torch once more."""
    fork = ForkProcess(target=use, args=(extended,))
    fork.start()
    fork.join()
    assert fork.exitcode == 0
    assert (extended / "printed").read_text().split() == ["0000-0005", "5", "0005-0010", "5"]
