"""`demerge inspect`: whether files merge and why not, and bases that take more than x_t."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from demerge.diffusion.model import Diffusion
from demerge.errors import UsageError
from demerge.inspection import find_other_input


def test_two_files_merge_or_it_says_why_not(run: Any, tmp_path: Path) -> None:
    conv, count = (
        "model.diffusion_model.input_blocks.0.0.weight",
        {"model_ema.num_updates": torch.ones(1)},
    )
    base, good, bad = (tmp_path / f"{name}.safetensors" for name in ("base", "good", "bad"))
    save_file({conv: torch.zeros(8, 4, 3, 3)} | count, base)
    save_file({f"_orig_mod.{conv}": torch.ones(8, 4, 3, 3)}, good)
    save_file({conv: torch.zeros(8, 9, 3, 3)}, bad)
    done = run("inspect", base, good)
    assert done.code == 0 and f"{good}  merges into {base}" in done.out and "model_ema" in done.out
    done = run("inspect", base, good, bad, "--json")
    found = json.loads(done.out)
    assert done.code == 3 and found["merges"] is False
    assert [each["merges"] for each in found["experts"]] == [True, False]
    assert "an inpainting model" in found["experts"][1]["why"] and found["experts"][1]["fix"]
    done = run("inspect", base, bad)
    assert done.code == 3 and "does not merge" in done.out and "fix" in done.out


def test_a_pipeline_with_another_schedule_does_not_merge(
    run: Any, tiny: Path, make_tiny: Any
) -> None:
    done = run("inspect", tiny, make_tiny(prediction_type="v_prediction"))
    assert done.code == 3 and "the prediction type v_prediction, not epsilon" in done.out
    assert run("inspect", tiny, make_tiny(seed=3)).code == 0


@pytest.mark.parametrize(
    ("taken", "given", "latents", "message"),
    [
        (9, 4, 4, "takes 9 input channels (an inpainting model: x_t, a mask and a masked image), the latents"),
        (8, 4, 4, "takes 8 input channels (x_t and an image)"),
        (5, 4, 4, "takes 5 input channels (x_t and something else)"),
        (6, 3, None, "takes 6 input channels (x_t and something else), its images have 3"),
        (4, 5, 4, "takes 4 input channels and gives 5"),
        (4, 4, 4, ""), (4, 8, 4, ""), (3, 6, None, ""), (1, 1, None, ""), (4, None, 4, ""),
    ],
)  # fmt: skip
def test_what_takes_more_than_x_t_is_told(
    taken: int, given: int | None, latents: int | None, message: str
) -> None:
    found = find_other_input({"in_channels": taken, "out_channels": given}, latents)
    assert message in found and bool(message) == bool(found)


def test_an_inpainting_base_is_refused_by_name(run: Any, tiny_text: Path, tmp_path: Path) -> None:
    import diffusers

    base = tmp_path / "inpainting"
    shutil.copytree(tiny_text, base)
    config = dict(diffusers.UNet2DConditionModel.load_config(base / "unet")) | {"in_channels": 9}
    diffusers.UNet2DConditionModel.from_config(config).save_pretrained(base / "unet")
    with pytest.raises(UsageError, match=r"takes 9 input channels \(an inpainting model"):
        Diffusion.load(base)
    (tmp_path / "captions.txt").write_text("a cat\n")
    done = run(
        "sample",
        base,
        "--num-images",
        1,
        "--steps",
        2,
        "--captions",
        tmp_path / "captions.txt",
        "-o",
        tmp_path / "out",
    )
    assert done.code == 2 and "an inpainting model" in done.err and "fix:" in done.err
    assert "do not take it: it takes 9 input channels" in run("inspect", base).out
