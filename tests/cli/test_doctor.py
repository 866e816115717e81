"""`demerge doctor`: every line is ok or has one fix."""

from __future__ import annotations

import json
import os
import sys
from collections import namedtuple

import pytest

from demerge.cli import doctor

Usage = namedtuple("Usage", "total used free")


@pytest.fixture
def quick(monkeypatch):
    """Leave out the import of the packages, which takes seconds."""
    monkeypatch.setattr(doctor, "PACKAGES", ("numpy",))
    monkeypatch.setattr(doctor, "EXTRAS", {"no_such_module": "data"})
    monkeypatch.setattr(doctor, "NEED_MEMORY", 0)
    cores = set(range(1000))  # no fewer than torch's threads
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: cores, raising=False)


def test_a_healthy_machine_is_all_ok(run, quick):
    done = run("doctor")
    assert done.code == 0
    assert all(line.startswith("ok  ") for line in done.out.splitlines())
    assert "pip install 'demerge[data]'" in done.out


def test_json_lists_the_findings(run, quick):
    document = json.loads(run("doctor", "--json").out)
    names = [finding["name"] for finding in document["findings"]]
    assert document["ok"]
    assert {"python", "torch", "devices", "threads", "numpy", "disk", "folder"} <= set(names)


def test_a_full_disk_is_one_fix_and_exit_code_4(run, quick, monkeypatch):
    monkeypatch.setattr(doctor.shutil, "disk_usage", lambda _: Usage(10, 10, 0))
    done = run("doctor")
    assert done.code == 4
    assert sum(line.startswith("FIX") for line in done.out.splitlines()) == 1


def test_a_package_that_cannot_be_imported_is_named_with_its_fix(run, quick, monkeypatch):
    monkeypatch.setattr(doctor, "PACKAGES", ("numpy", "einops"))
    monkeypatch.setitem(sys.modules, "einops", None)
    done = run("doctor", "--json")
    broken = [finding for finding in json.loads(done.out)["findings"] if finding["fix"]]
    assert done.code == 4
    assert [finding["name"] for finding in broken] == ["einops"]


def test_a_torchvision_that_breaks_diffusers_is_told_apart(monkeypatch):
    def fail(_: str) -> None:
        raise RuntimeError("operator torchvision::nms does not exist")

    monkeypatch.setattr("importlib.import_module", fail)
    assert doctor._imported("diffusers").fix.startswith("pip uninstall torchvision")


@pytest.mark.parametrize(
    ("cuda", "fix"),
    [(None, "pip install --force-reinstall torch --index-url"), ("13.0", "CUDA 13.0")],
)
def test_a_gpu_that_torch_cannot_use_has_one_fix(run, quick, monkeypatch, tmp_path, cuda, fix):
    driver = tmp_path / "version"
    driver.write_text("NVRM version")
    monkeypatch.setattr(doctor, "DRIVER", driver)
    monkeypatch.setattr("torch.version.cuda", cuda)
    monkeypatch.setattr("torch.cuda.device_count", lambda: 0)
    done = run("doctor", "--json")
    (broken,) = [finding for finding in json.loads(done.out)["findings"] if finding["fix"]]
    assert (done.code, broken["name"]) == (4, "devices")
    assert fix in broken["fix"]
