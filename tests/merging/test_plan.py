"""Files in, files out: what is written, and what is refused before anything is written."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from demerge.errors import InputError, ResourceError, UsageError
from demerge.merging import Recipe, merge, merge_tensors
from demerge.merging import plan as plan_merge
from demerge.merging.output.model_card import escape
from demerge.storage.atomic import sha256
from demerge.storage.checkpoint import Checkpoint, content_sha256

WEIGHTS = Path("unet") / "diffusion_pytorch_model.safetensors"
Tune = Callable[..., Path]


@pytest.fixture
def tune(tiny: Path, tmp_path: Path) -> Tune:
    """tune(i) -> a copy of the tiny pipeline with other weights, like an expert."""

    def make(i: int, scale: float = 0.01, record: dict[str, Any] | None = None) -> Path:
        folder = tmp_path / f"expert{i}"
        shutil.copytree(tiny, folder)
        g = torch.Generator().manual_seed(i)
        tensors = load_file(folder / WEIGHTS)
        moved = {n: t + scale * torch.randn(t.shape, generator=g) for n, t in tensors.items()}
        save_file(moved, folder / WEIGHTS, {"format": "pt"})
        if record is not None:
            (folder / "expert.json").write_text(json.dumps(record))
        return folder

    return make


def test_a_pipeline_gives_a_pipeline_that_stock_diffusers_loads(
    tiny: Path, tune: Tune, tmp_path: Path
) -> None:
    from diffusers import DiffusionPipeline

    record = {"range": [0, 500], "base_sha256": content_sha256(Checkpoint.open(tiny))}
    experts = [tune(0, record=record), tune(1)]
    result = merge(
        tiny, experts, tmp_path / "out", method="task_arithmetic", weights=[0.3, 0.4], seed=3
    )
    base, *tensors = (load_file(p / WEIGHTS) for p in (tiny, *experts))
    expected = merge_tensors(base, tensors, "task_arithmetic", weights=[0.3, 0.4])
    loaded = DiffusionPipeline.from_pretrained(tmp_path / "out").unet.state_dict()
    assert set(loaded) == set(expected)
    assert all(torch.equal(loaded[n], expected[n]) for n in expected)
    names = sorted(
        p.relative_to(tmp_path / "out").as_posix()
        for p in (tmp_path / "out").rglob("*")
        if p.is_file()
    )
    assert names == [
        "README.md",
        "demerge.json",
        "model_index.json",
        "scheduler/scheduler_config.json",
        "unet/config.json",
        WEIGHTS.as_posix(),
    ]
    assert result.tally.share == 1.0 and result.tally.changed > 10_000


def test_every_kind_of_input_gives_the_same_file(tiny: Path, tune: Tune, tmp_path: Path) -> None:
    experts = [tune(0), tune(1)]
    shards = tmp_path / "shards"
    shards.mkdir()
    tensors = list(load_file(experts[1] / WEIGHTS).items())
    save_file(dict(tensors[:9]), shards / "x-1.safetensors")
    save_file(dict(tensors[9:]), shards / "x-2.safetensors")
    weight_map = {n: f"x-{1 if i < 9 else 2}.safetensors" for i, (n, _) in enumerate(tensors)}
    (shards / "x.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    merge(tiny, experts, tmp_path / "a.safetensors", method="ties")
    merge(tiny / "unet", [experts[0] / WEIGHTS, shards], tmp_path / "component", method="ties")
    merge(
        tiny / WEIGHTS,
        [experts[0] / "unet", shards / "x.safetensors.index.json"],
        tmp_path / "c.safetensors",
        method="ties",
    )
    places = [tmp_path / "a.safetensors", tmp_path / "component", tmp_path / "c.safetensors"]
    assert len({content_sha256(Checkpoint.open(p)) for p in places}) == 1
    assert (tmp_path / "component" / "config.json").is_file()


def test_the_same_merge_gives_the_same_bytes(tiny: Path, tune: Tune, tmp_path: Path) -> None:
    experts = [tune(0), tune(1)]
    for out in ("a", "b"):
        merge(tiny, experts, tmp_path / out, method="dare", seed=5)
    merge(tiny, experts, tmp_path / "c", method="dare", seed=6)
    hashes = [
        [sha256(p) for p in sorted((tmp_path / out).rglob("*")) if p.is_file()] for out in "abc"
    ]
    assert hashes[0] == hashes[1] != hashes[2]


def test_the_recipe_is_in_three_places(tiny: Path, tune: Tune, tmp_path: Path) -> None:
    experts = [tune(0, record={"range": [0, 500]}), tune(1, record={"range": [500, 1000]})]
    merge(
        tiny,
        experts,
        tmp_path / "out",
        method="ties",
        options={"density": "0.5"},
        save_dtype="bfloat16",
    )
    text = (tmp_path / "out" / "demerge.json").read_text().rstrip("\n")
    recipe = json.loads(text)
    assert text == json.dumps(recipe, sort_keys=True, separators=(",", ":"))
    assert (
        recipe["options"].items()
        >= {"density": 0.5, "scope": "model", "elect": "mass", "scale": 1.0}.items()
    )
    assert recipe["weights"] == [0.5, 0.5] and recipe["experts"][1]["range"] == [500, 1000]
    assert recipe["base"]["files"] == {
        "diffusion_pytorch_model.safetensors": sha256(tiny / WEIGHTS)
    }
    with safe_open(tmp_path / "out" / WEIGHTS, "pt") as file:
        metadata = file.metadata()
    assert metadata["format"] == "pt"
    assert json.loads(metadata["demerge.recipe"]) == {
        key: value for key, value in recipe.items() if key != "output"
    }
    assert recipe["output"] == {WEIGHTS.as_posix(): sha256(tmp_path / "out" / WEIGHTS)}
    assert metadata["modelspec.timestep_range"] == "0,1000"
    card = (tmp_path / "out" / "README.md").read_text()
    assert "base_model_relation: " in card and '"merge"' in card and "0500-1000" in card


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
def test_the_save_dtype_is_one_rounding_and_its_loss_is_counted(
    tiny: Path, tune: Tune, tmp_path: Path, dtype: str
) -> None:
    experts = [tune(0, scale=1e-4)]
    result = merge(
        tiny,
        experts,
        tmp_path / "m.safetensors",
        method="task_arithmetic",
        weights=[0.7],
        save_dtype=dtype,
    )
    base, expert = load_file(tiny / WEIGHTS), load_file(experts[0] / WEIGHTS)
    exact = merge_tensors(base, [expert], weights=[0.7])
    merged, kind = load_file(tmp_path / "m.safetensors"), getattr(torch, dtype)
    assert all(torch.equal(merged[n], exact[n].to(kind)) for n in exact)
    survived = sum(int((merged[n] != base[n].to(kind)).count_nonzero()) for n in exact)
    changed = sum(int((exact[n] != base[n]).count_nonzero()) for n in exact)
    assert (result.tally.survived, result.tally.changed) == (survived, changed)
    assert result.tally.share == 1.0 if dtype == "float32" else result.tally.share < 0.9


def test_fisher_is_found_beside_the_experts_or_given(
    tiny: Path, tune: Tune, tmp_path: Path
) -> None:
    experts = [tune(0), tune(1)]
    base = load_file(tiny / WEIGHTS)
    for i, expert in enumerate(experts):
        save_file(
            {n: torch.full_like(t, 1.0 + i) for n, t in base.items()}, expert / "fisher.safetensors"
        )
    merge(tiny, experts, tmp_path / "found", method="fisher")
    given = ",".join(str(e / "fisher.safetensors") for e in experts)
    merge(tiny, experts, tmp_path / "given", method="fisher", options={"fisher": given})
    assert sha256(tmp_path / "found" / WEIGHTS) == sha256(tmp_path / "given" / WEIGHTS)
    expected = merge_tensors(
        base, [load_file(e / WEIGHTS) for e in experts], "average", weights=[1, 2]
    )
    merged = load_file(tmp_path / "found" / WEIGHTS)
    for name in base:
        torch.testing.assert_close(merged[name], expected[name])
    recipe = json.loads((tmp_path / "found" / "demerge.json").read_text())
    assert list(recipe["experts"][0]["inputs"]["fisher"].values()) == [
        sha256(experts[0] / "fisher.safetensors")
    ]


def test_a_survey_counts_what_a_run_counts_and_writes_nothing(
    tiny: Path, tune: Tune, tmp_path: Path
) -> None:
    recipe = Recipe.of(tiny, [tune(0)], method="ties", save_dtype="float16")
    plan = plan_merge(recipe, tmp_path / "out")
    before = sorted(tmp_path.iterdir())
    survey = plan.measure()
    document, tally = survey.document(), survey.tally
    assert sorted(tmp_path.iterdir()) == before
    assert json.loads(json.dumps(document))["surviving_share"] == tally.share
    assert document["tensors_by_dtype"] == {"float16": document["tensors"]}
    result = plan.run()
    assert result.tally == tally
    taken = sum(p.stat().st_size for p in (tmp_path / "out").rglob("*") if p.is_file())
    assert taken <= document["disk_bytes"]


def test_integer_buffers_are_copied(tmp_path: Path) -> None:
    base = {"w": torch.zeros(2), "n": torch.arange(3), "m": torch.tensor([True, False, True])}
    save_file(base, tmp_path / "base.safetensors")
    save_file(base | {"w": torch.ones(2)}, tmp_path / "e.safetensors")
    merge(
        tmp_path / "base.safetensors",
        [tmp_path / "e.safetensors"],
        tmp_path / "o.safetensors",
        method="average",
        weights=[1],
    )
    merged = load_file(tmp_path / "o.safetensors")
    assert {n: t.tolist() for n, t in merged.items()} == {
        "w": [1, 1],
        "n": [0, 1, 2],
        "m": [True, False, True],
    }


# -- what is refused -------------------------------------------------------------------------------


def test_an_expert_of_another_base_is_refused(tiny: Path, tune: Tune, tmp_path: Path) -> None:
    expert = tune(0, record={"range": [0, 500], "base_sha256": "0" * 64})
    with pytest.raises(
        InputError, match="expert0 was finetuned from a base of sha256 0000000000000000"
    ):
        merge(tiny, [expert], tmp_path / "out", method="average", weights=[1])


def test_an_expert_that_predicts_something_else_is_refused(
    make_tiny: Callable[..., Path], tmp_path: Path
) -> None:
    base, other = make_tiny(), make_tiny(prediction_type="v_prediction")
    with pytest.raises(InputError, match="prediction type v_prediction"):
        merge(base, [other], tmp_path / "out", method="average", weights=[1])


def test_a_damaged_record_is_refused(tiny: Path, tune: Tune, tmp_path: Path) -> None:
    for i, record in enumerate(({"range": [5, 2]}, {"range": "0-250"}, {})):
        with pytest.raises(InputError, match=r"expert\.json"):
            merge(tiny, [tune(i, record=record)], tmp_path / "out", method="average")


def test_an_output_that_exists_is_refused(tiny: Path, tune: Tune, tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine").touch()
    (tmp_path / "o.safetensors").touch()
    for out in ("out", "o.safetensors"):
        with pytest.raises(UsageError, match="exists already"):
            merge(tiny, [tiny], tmp_path / out, method="average", weights=[1])


@pytest.mark.parametrize("name", ["merged.ckpt", "merged.pt", "merged.bin"])
def test_an_output_with_the_name_of_a_pickle_is_refused(
    tiny: Path, tmp_path: Path, name: str
) -> None:
    with pytest.raises(UsageError, match=f"{name} has the name of a pickle"):
        merge(tiny, [tiny], tmp_path / name, method="average", weights=[1])


def test_a_folder_needs_a_config(tiny: Path, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="without a config"):
        merge(tiny / WEIGHTS, [tiny / WEIGHTS], tmp_path / "out", method="average", weights=[1])
    with pytest.raises(UsageError, match="save_dtype is 'float8'"):
        merge(tiny, [tiny], tmp_path / "out", method="average", weights=[1], save_dtype="float8")


def test_a_component_that_links_out_is_not_copied(tiny: Path, tmp_path: Path) -> None:
    base, secret = tmp_path / "base", tmp_path / "secret"
    shutil.copytree(tiny, base)
    secret.write_text("secret")
    (base / "scheduler" / "more.json").symlink_to(secret)
    with pytest.raises(InputError, match="leads out"):
        merge(base, [tiny], tmp_path / "out", method="average", weights=[1])
    assert not (tmp_path / "out").exists()


def test_a_disk_too_small_is_refused_before_the_work(
    tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda path: type("Usage", (), {"free": 1000})())
    with pytest.raises(ResourceError, match="1,000 are free"):
        merge(tiny, [tiny], tmp_path / "out", method="average", weights=[1])
    assert not (tmp_path / "out").exists()


def test_a_fault_midway_leaves_nothing(tiny: Path, tune: Tune, tmp_path: Path) -> None:
    expert = tune(0)
    tensors = load_file(expert / WEIGHTS)
    last = list(tensors)[-1]
    save_file(tensors | {last: tensors[last] * float("nan")}, expert / WEIGHTS)
    before = sorted(p.name for p in tmp_path.iterdir())
    for out in ("out", "o.safetensors"):
        with pytest.raises(InputError, match=f"expert0: tensor {last} holds NaN or Inf"):
            merge(tiny, [expert], tmp_path / out, method="average", weights=[1])
    assert sorted(p.name for p in tmp_path.iterdir()) == before


# -- house rules -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "text", ["<script>alert(1)</script>", "a|b", "[x](http://y)", "`a`\n# b", "\x1b[31m", "&lt;"]
)
def test_names_are_escaped_in_the_card(text: str) -> None:
    assert not set(escape(text)) & set("<>|[]()`\n\x1b")


def test_weights_of_a_method_that_has_none_are_refused(
    tiny: Path, tune: Tune, tmp_path: Path
) -> None:
    code = "def middle(base, deltas):\n    return base + deltas.median(0).values\n"
    (tmp_path / "middle.py").write_text(code)
    method, experts = f"{tmp_path / 'middle.py'}:middle", [tune(0), tune(1)]
    with pytest.raises(UsageError, match="method middle has no weights"):
        merge(tiny, experts, tmp_path / "out", method=method, weights=[0, 1])
    merge(tiny, experts, tmp_path / "out", method=method)
