"""`demerge ema`: what it writes and says, and how it refuses."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file, save_file

FAST = ("--data", "digits", "--max-train-steps", 8, "--train-batch-size", 2, "--device", "cpu")


@pytest.fixture
def expert(run: Any, tiny: Path, tmp_path: Path) -> Path:
    lengths = ("--ema-lengths", "0.1", "--ema-lengths", "0.05", "--ema-snapshot-steps", 4)
    done = run("finetune", tiny, "--ranges", "joint", "-o", tmp_path / "e", *lengths, *FAST)
    assert done.code == 0, done.err
    return tmp_path / "e" / "0000-1000"


def test_ema_writes_an_expert_and_says_how_near_it_is(
    run: Any, expert: Path, tmp_path: Path
) -> None:
    names = {path.name for path in (expert / "ema").iterdir()}
    assert names == {
        f"{length}-0000000{step}.safetensors" for length in ("0.05", "0.1") for step in (4, 8)
    }
    out = tmp_path / "made"
    done = run("ema", expert, "--sigma-rel", 0.07, "-o", out)
    assert (done.code, done.out.strip()) == (0, str(out))
    assert "4 averages, sigma_rel 0.05 0.1" in done.err and "error of its profile" in done.err
    assert json.loads((out / "expert.json").read_text())["sigma_rel"] == 0.07
    far = run("ema", expert, "--sigma-rel", 0.28, "-o", tmp_path / "far", "--json")
    assert "stay near the stored lengths" in far.err
    document = json.loads(far.out)
    assert sum(each["weight"] for each in document["weights"]) == pytest.approx(1)
    again = run("ema", expert, "--sigma-rel", 0.07, "-o", out)
    assert again.code == 2 and "exists already" in again.err


def test_ema_refuses_in_one_sentence(run: Any, tiny: Path, expert: Path, tmp_path: Path) -> None:
    out = tmp_path / "made"
    for length in (0, -1, 0.29, "nan"):
        done = run("ema", expert, "--sigma-rel", length, "-o", out)
        assert done.code == 2 and "sigma_rel is" in done.err, done
    done = run("ema", tiny, "--sigma-rel", 0.05, "-o", out)
    assert done.code == 3 and "expert.json" in done.err
    plain = shutil.copytree(expert, tmp_path / "plain", ignore=shutil.ignore_patterns("ema"))
    done = run("ema", plain, "--sigma-rel", 0.05, "-o", out)
    assert done.code == 3 and "has no stored averages" in done.err and "--ema-lengths" in done.err
    file = expert / "ema" / "0.1-00000004.safetensors"
    tensors = load_file(file)
    save_file(tensors, file)
    done = run("ema", expert, "--sigma-rel", 0.05, "-o", out)
    assert done.code == 3 and "of which length and step" in done.err
    save_file({"conv_in.bias": tensors["conv_in.bias"]}, file, {"sigma_rel": "0.1", "step": "4"})
    done = run("ema", expert, "--sigma-rel", 0.05, "-o", out)
    assert done.code == 3 and "its parameters are not those" in done.err
    file.write_bytes(file.read_bytes()[:-9])
    assert run("ema", expert, "--sigma-rel", 0.05, "-o", out).code == 3
    assert not out.exists()


@pytest.mark.parametrize("lengths", ["0.3", "0", "a", "0.05,,0.1"])
def test_lengths_that_are_none_are_refused(
    run: Any, tiny: Path, tmp_path: Path, lengths: str
) -> None:
    done = run("finetune", tiny, "-o", tmp_path / "e", "--ema-lengths", lengths, *FAST)
    assert done.code == 2 and "ema" in done.err and not (tmp_path / "e").exists()


def test_a_base_from_a_random_start_keeps_its_kind(run: Any, tmp_path: Path) -> None:
    unet = {"sample_size": 8, "in_channels": 1, "out_channels": 1, "layers_per_block": 1}
    unet |= {"block_out_channels": [8], "norm_num_groups": 4}
    unet |= {"down_block_types": ["DownBlock2D"], "up_block_types": ["UpBlock2D"]}
    document = {"unet": unet, "scheduler": {"num_train_timesteps": 100}}
    (tmp_path / "c.json").write_text(json.dumps(document))
    fast = ("--data", "digits", "--max-train-steps", 4, "--train-batch-size", 2, "--device", "cpu")
    done = run(
        *("finetune", tmp_path / "c.json", "--init", "random", "-o", tmp_path / "run"),
        *("--ema-lengths", "0.05,0.1", *fast),
    )
    assert done.code == 0, done.err
    made = tmp_path / "made"
    done = run("ema", tmp_path / "run" / "0000-0100", "--sigma-rel", 0.1, "-o", made)
    assert done.code == 0, done.err
    assert json.loads((made / "base.json").read_text())["sigma_rel"] == 0.1
    assert not (made / "expert.json").exists()
