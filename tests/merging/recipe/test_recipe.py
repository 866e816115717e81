"""Recipes from flags, YAML, JSON and merged files; what is refused; merges can be repeated."""

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

from demerge.diffusion.schedule import snr_of
from demerge.errors import DemergeError, InputError, NumericalError, UsageError
from demerge.merging import Recipe, merge, verify
from demerge.merging import plan as plan_merge
from demerge.merging.recipe.source import read_path, write_path
from demerge.storage.atomic import sha256
from demerge.timesteps import TimestepRange

WEIGHTS = Path("unet") / "diffusion_pytorch_model.safetensors"
YAML = """
base: ./base
experts:
  - {path: ./expert0, weight: 0.25, range: [0, 500]}
  - path: expert1
    weight: 0.5
    range: "0500-1000"
method: ties
options: {density: 0.5, scope: tensor}
rules:
  - up weights=0.2..0.8,0.5
  - {match: mid, options: {density: 1.0}}
only: [mid, up]
seed: 3
save_dtype: float16
"""


@pytest.fixture
def models(tiny: Path, tmp_path: Path) -> Path:
    """A folder with a base and two experts."""
    shutil.copytree(tiny, tmp_path / "base")
    for i in range(2):
        shutil.copytree(tiny, tmp_path / f"expert{i}")
        g = torch.Generator().manual_seed(i)
        tensors = load_file(tmp_path / "base" / WEIGHTS)
        moved = {n: t + 0.01 * torch.randn(t.shape, generator=g) for n, t in tensors.items()}
        save_file(moved, tmp_path / f"expert{i}" / WEIGHTS, {"format": "pt"})
    return tmp_path


def write(folder: Path, text: str, name: str = "recipe.yaml") -> Path:
    (folder / name).write_text(text)
    return folder / name


def flip(path: Path) -> None:
    """Change one byte in the middle of a file's data."""
    data = bytearray(path.read_bytes())
    data[-1000] ^= 1
    path.write_bytes(data)


# -- reading ---------------------------------------------------------------------------------------


def test_yaml_and_flags_give_one_recipe(models: Path) -> None:
    read = Recipe.read(write(models, YAML))
    asked = Recipe.of(
        models / "base",
        [models / "expert0", models / "expert1"],
        method="ties",
        weights=[0.25, 0.5],
        options={"density": 0.5, "scope": "tensor"},
        rules=["up weights=0.2..0.8,0.5", "mid density=1.0"],
        only=["mid", "up"],
        ranges=[TimestepRange(0, 500), TimestepRange(500, 1000)],
        seed=3,
        save_dtype="float16",
    )
    one, other = plan_merge(read, models / "a").run(), plan_merge(asked, models / "b").run()
    assert (models / "a" / "demerge.json").read_bytes() == (
        models / "b" / "demerge.json"
    ).read_bytes()
    assert sha256(models / "a" / WEIGHTS) == sha256(models / "b" / WEIGHTS)
    assert one.recipe == other.recipe
    document = json.loads((models / "a" / "demerge.json").read_text())
    assert document["rules"] == [
        {"match": "up", "weights": ["0.2..0.8", 0.5]},
        {"match": "mid", "options": {"density": 1.0}},
    ]
    assert document["only"] == ["mid", "up"] and document["experts"][1]["range"] == [500, 1000]
    card = (models / "a" / "README.md").read_text()
    assert "up weights=0.2..0.8,0.5" in card and "0500-1000" in card
    with safe_open(models / "a" / WEIGHTS, "pt") as file:
        assert file.metadata()["modelspec.timestep_range"] == "0,1000"


def test_every_form_of_a_finished_recipe_reads_alike(models: Path) -> None:
    merge(
        models / "base",
        [models / "expert0"],
        models / "out",
        method="ties",
        rules=["mid scale=0..1"],
    )
    forms = [models / "out", models / "out" / "demerge.json", models / "out" / WEIGHTS]
    folder, document, metadata = (Recipe.read(form) for form in forms)
    assert folder == document and document.output and not metadata.output
    assert (
        folder.base == metadata.base
        and folder.rules == metadata.rules
        and folder.experts == metadata.experts
    )
    assert Path(folder.base.path) == models / "base"
    merge(models / "base", [models / "expert0"], models / "one.safetensors", method="ties")
    assert Path(Recipe.read(models / "one.safetensors").experts[0].path) == models / "expert0"


def test_what_is_asked_beside_a_recipe_wins(models: Path) -> None:
    recipe = Recipe.read(write(models, YAML)).changed(
        seed=7, options={"density": "0.1"}, weights=[1, 1]
    )
    assert (recipe.seed, recipe.weights, recipe.options) == (
        7,
        [1, 1],
        {"density": "0.1", "scope": "tensor"},
    )
    assert len(recipe.rules) == 2


def test_weights_may_be_a_file(models: Path) -> None:
    write(models, "name,a,b\nmid,1,0\n*,0.5,0.25\n", "c.csv")
    recipe = Recipe.read(write(models, "base: base\nexperts: [expert0, expert1]\nweights: c.csv\n"))
    assert recipe.weights == [0.5, 0.25] and [str(rule) for rule in recipe.rules] == [
        "mid weights=1.0,0.0"
    ]


@pytest.mark.parametrize(
    ("text", "message", "fix"),
    [
        ("base: b\nexperts: [e]\nmehtod: ties\n", "unknown key 'mehtod'", "did you mean 'method'"),
        ("base: b\nexperts: [e]\nzzz: 1\n", "unknown key 'zzz'", "known are"),
        ("base: b\nexperts: [{path: e, wieght: 1}]\n", "expert 0: unknown key 'wieght'", "weight"),
        ("base: b\n", "names no base and experts", "experts: [PATH"),
        ("base: b\nexperts: e\n", "experts is 'e'", "a list"),
        ("base: b\nexperts: [{weight: 1}]\n", "expert 0 names no path", "PATH"),
        ("base: b\nexperts: [e]\nseed: one\n", "seed is 'one'", "a whole number"),
        ("base: b\nexperts: [e]\nseed: true\n", "seed is 'True'", "a whole number"),
        ("base: b\nexperts: [e]\nseed: -1\n", "seed is -1", "at least 0"),
        ("base: b\nexperts: [e]\nout_rank: 0\n", "lora_rank is 0", "at least 1"),
        ("base: b\nexperts: [e]\nonly: mid\n", "only is 'mid'", "a list"),
        (
            "base: b\nexperts: [e]\nformat: demerge.recipe/9\n",
            "has the format demerge.recipe/9",
            "reads",
        ),
        (
            "base: b\nexperts: [{path: e, weight: 1}, f]\n",
            "weights are given twice or in part",
            "each expert",
        ),
        ("base: b\nexperts: [{path: e, weight: 1}]\nweights: [1]\n", "twice or in part", ""),
        ("base: b\nexperts: [{path: e, weight: x}]\n", "weights are not numbers", ""),
        ("base: b\nexperts: [e]\nweights: [true]\n", "weights are not numbers", ""),
        ("base: b\nexperts: [{path: e, range: 10:50}]\n", "range is 650", "[start, stop]"),
        ("base: b\nexperts: [{path: e, range: [500, 0]}]\n", "is empty", ""),
        ("base: b\nexperts: [e]\nrules: [{weights: [1]}]\n", "a rule names no pattern", "match"),
        (
            "base: b\nexperts: [e]\nrules: [{match: mid, wieghts: [1]}]\n",
            "unknown key 'wieghts'",
            "weights",
        ),
        (
            "base: b\nexperts: [e]\nmethod: evil.py:run\n",
            "names the file of a method",
            "--method evil.py:run",
        ),
    ],
)
def test_wrong_recipes_are_refused(text: str, message: str, fix: str, tmp_path: Path) -> None:
    with pytest.raises(UsageError) as error:
        Recipe.read(write(tmp_path, text))
    assert message in error.value.what and fix in error.value.fix


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a: &x [1]\nb: [*x, *x]\n", "anchors and aliases"),
        ("a: !!python/object/apply:os.system [true]\n", "the tag"),
        ("a: " + "[" * 40 + "]" * 40, "levels deep"),
        ("base: a\nbase: b\n", "a key occurs twice"),
        ("? [a, b]\n: 1\n", "not plain text"),
        ("- a\n- b\n", "it is not a table"),
        ("", "it is not a table"),
        ("a: [1\n", "not valid YAML"),
        ("a: " + "9" * 5000, "not valid YAML"),
        ("a: " + "x" * (1 << 20), "larger than 1 MB"),
        ("a: \x00", "not valid YAML"),
    ],
)
def test_hostile_yaml_is_refused(text: str, message: str, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=message) as error:
        Recipe.read(write(tmp_path, text))
    assert "1 MB" in message or "write plain values" in error.value.fix


def test_files_without_a_recipe_are_refused(models: Path) -> None:
    with pytest.raises(InputError, match="holds no recipe"):
        Recipe.read(models / "base" / WEIGHTS)
    with pytest.raises(InputError, match="cannot be read"):
        Recipe.read(models / "base")
    (models / "latin.yaml").write_bytes(b"a: \xff\n")
    with pytest.raises(InputError, match="not UTF-8"):
        Recipe.read(models / "latin.yaml")


# -- paths and ranges ------------------------------------------------------------------------------


def test_paths_name_no_home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Path, "home", lambda: Path("/home/ann"))
    monkeypatch.setenv("HOME", "/home/ann")
    for path, folder, text in [
        ("/home/ann/m/base", Path("/home/ann/runs/out"), "../../m/base"),
        ("/home/ann/base", Path("/data/out"), "~/base"),
        ("/data/base", Path("/home/ann/out"), "/data/base"),
        ("/data/base.safetensors", Path("/data"), "./base.safetensors"),
        ("owner/name", Path("/data"), "owner/name"),
        ("digits-base", Path("/data"), "digits-base"),
    ]:
        assert write_path(path, folder) == text
        assert read_path(text, folder) == path


def test_models_and_output_moved_together_give_the_same_bytes(
    models: Path, tmp_path_factory: pytest.TempPathFactory
) -> None:
    elsewhere = tmp_path_factory.mktemp("else") / "deeper"
    shutil.copytree(models, elsewhere)
    for folder in (models, elsewhere):
        merge(folder / "base", [folder / "expert0"], folder / "out", method="dare", seed=1)
    assert sha256(models / "out" / WEIGHTS) == sha256(elsewhere / "out" / WEIGHTS)
    assert (models / "out" / "demerge.json").read_bytes() == (
        elsewhere / "out" / "demerge.json"
    ).read_bytes()
    assert str(models) not in (models / "out" / "demerge.json").read_text()


def test_ranges_of_experts(models: Path) -> None:
    (models / "expert0" / "expert.json").write_text('{"range": [0, 500]}')
    experts, spans = [models / "expert0", models / "expert1"], [None, TimestepRange(500, 1000)]
    plan = plan_merge(Recipe.of(models / "base", experts, ranges=spans))
    assert [str(e.range) for e in plan.recipe.experts] == ["0000-0500", "0500-1000"]
    assert list(plan.parts[0].job.ranges) == [TimestepRange(0, 500), TimestepRange(500, 1000)]
    snr = plan.parts[0].job.snr
    assert snr is not None and snr.shape == (1000,)
    with pytest.raises(
        UsageError, match=r"was trained on 0000-0500 as its expert\.json says, not on 0000-0250"
    ):
        plan_merge(Recipe.of(models / "base", experts, ranges=[TimestepRange(0, 250), None]))
    with pytest.raises(UsageError, match="1 ranges for 2 experts"):
        Recipe.of(models / "base", experts, ranges=[None])


# -- once more -------------------------------------------------------------------------------------

Remade = Callable[..., Any]


@pytest.mark.parametrize("out", ["out", "out.safetensors"])
def test_a_merge_can_be_made_again(models: Path, out: str) -> None:
    experts = [models / "expert0", models / "expert1"]
    asked: dict[str, Any] = {
        "method": "dare",
        "rules": ["mid weights=0,1"],
        "only": ["mid", "up"],
        "seed": 4,
    }
    result = merge(models / "base", experts, models / out, **asked)
    path = models / out / "demerge.json" if out == "out" else models / out
    verified = verify(path, Recipe.read(path))
    assert list(verified.files.values()) == [
        sha256(models / out / WEIGHTS if out == "out" else models / out)
    ]
    assert not verified.versions and "equal" in verified.lines()[0]
    again = merge(models / "base", experts, models / f"again-{out}", **asked)
    assert result.recipe.canonical() == again.recipe.canonical()
    plan_merge(Recipe.read(path), models / f"third-{out}").run()
    assert verify(path, Recipe.read(path), models / f"third-{out}").files == verified.files


def test_the_recipe_alone_is_enough_to_verify(models: Path) -> None:
    merge(models / "base", [models / "expert0"], models / "out", method="average", weights=[1])
    (models / "kept").mkdir()
    shutil.copy(models / "out" / "demerge.json", models / "kept" / "demerge.json")
    assert verify(models / "kept", Recipe.read(models / "kept")).files


def test_a_changed_input_is_named(models: Path) -> None:
    merge(
        models / "base", [models / "expert0", models / "expert1"], models / "out", method="average"
    )
    flip(models / "expert1" / WEIGHTS)
    recipe = Recipe.read(models / "out")
    for call in (lambda: verify(models / "out", recipe), lambda: plan_merge(recipe)):
        with pytest.raises(
            InputError,
            match=r"expert1: diffusion_pytorch_model.safetensors is not what the recipe names",
        ):
            call()


def test_the_tensors_a_method_needs_are_inputs_too(models: Path) -> None:
    base = load_file(models / "base" / WEIGHTS)
    for i in range(2):
        save_file(
            {n: torch.full_like(t, 1.0 + i) for n, t in base.items()},
            models / f"fisher-{i}.safetensors",
        )
    text = "base: base\nexperts: [expert0, expert1]\nmethod: fisher\n"
    listed = write(
        models, text + "options: {fisher: [fisher-0.safetensors, fisher-1.safetensors]}\n"
    )
    plan_merge(Recipe.read(listed), models / "out").run()
    each = "[{path: expert0, inputs: {fisher: fisher-0.safetensors}}, {path: expert1, inputs: {fisher: fisher-1.safetensors}}]"
    named = write(models, text.replace("[expert0, expert1]", each), "named.yaml")
    plan_merge(Recipe.read(named), models / "same").run()
    assert (models / "out" / "demerge.json").read_bytes() == (
        models / "same" / "demerge.json"
    ).read_bytes()
    recipe = Recipe.read(models / "out")
    assert verify(models / "out", recipe).files
    flip(models / "fisher-1.safetensors")
    with pytest.raises(InputError, match=r"fisher-1\.safetensors is not what the recipe names"):
        verify(models / "out", recipe)


def test_a_changed_output_is_told(models: Path) -> None:
    merge(models / "base", [models / "expert0"], models / "out", method="average", weights=[1])
    flip(models / "out" / WEIGHTS)
    last = list(load_file(models / "base" / WEIGHTS))
    with pytest.raises(NumericalError, match="differs in 1 of 144 tensors") as error:
        verify(models / "out", Recipe.read(models / "out"))
    assert any(name in error.value.what for name in last)


def test_other_versions_are_told(models: Path) -> None:
    merge(models / "base", [models / "expert0"], models / "out", method="average", weights=[1])
    text = (models / "out" / "demerge.json").read_text()
    document = json.loads(text)
    document["versions"]["torch"] = "1.0"
    (models / "out" / "demerge.json").write_text(json.dumps(document))
    with pytest.raises(NumericalError, match=r"torch was 1\.0"):
        verify(models / "out", Recipe.read(models / "out"))


def test_there_must_be_something_to_verify(models: Path) -> None:
    path = write(models, YAML)
    with pytest.raises(UsageError, match="names no SHA-256"):
        verify(path, Recipe.read(path))
    merge(
        models / "base",
        [models / "expert0"],
        models / "one.safetensors",
        method="average",
        weights=[1],
    )
    document = json.loads(Recipe.read(models / "one.safetensors").relative_to(models).canonical())
    write(models, json.dumps(document), "bare.json")
    with pytest.raises(UsageError, match="no output lies next to"):
        verify(models / "bare.json", Recipe.read(models / "bare.json"))
    with pytest.raises(InputError, match="has no"):
        verify(models / "bare.json", Recipe.read(models / "bare.json"), models / "nowhere")


def test_a_method_of_a_file_is_named_again(models: Path, tmp_path: Path) -> None:
    code = "def halve(base, deltas, *, scale: float = 0.5):\n    return base + scale * deltas.mean(0)\n"
    (tmp_path / "halve.py").write_text(code)
    merge(
        models / "base",
        [models / "expert0"],
        models / "out",
        method=f"{tmp_path / 'halve.py'}:halve",
    )
    recipe = Recipe.read(models / "out")
    with pytest.raises(UsageError, match="unknown merge method 'halve'"):
        verify(models / "out", recipe)
    assert verify(models / "out", recipe.changed(method=f"{tmp_path / 'halve.py'}:halve")).files


# -- the schedule ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "config",
    [
        {"beta_schedule": "linear"},
        {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012},
        {"beta_schedule": "squaredcos_cap_v2"},
        {"beta_schedule": "sigmoid"},
        {"beta_schedule": "linear", "rescale_betas_zero_snr": True},
        {"trained_betas": [0.1, 0.2, 0.3], "num_train_timesteps": 3},
    ],
)
def test_the_snr_is_that_of_diffusers(config: dict[str, Any]) -> None:
    from diffusers import DDPMScheduler

    scheduler = DDPMScheduler(**config)
    abar = scheduler.alphas_cumprod.double()
    snr = snr_of(dict(scheduler.config))
    assert snr is not None and snr.dtype == torch.float64
    torch.testing.assert_close(snr, abar / (1 - abar), rtol=2e-3, atol=1e-9)


def test_the_snr_of_flow_matching_and_of_what_is_not_known() -> None:
    from diffusers import FlowMatchEulerDiscreteScheduler

    scheduler = FlowMatchEulerDiscreteScheduler(shift=3.0)
    snr = snr_of({**scheduler.config, "_class_name": type(scheduler).__name__})
    sigma = (torch.arange(1000).double() + 0.5) / 1000  # t is T sigma, after any shift
    assert snr is not None
    torch.testing.assert_close(snr, ((1 - sigma) / sigma) ** 2, rtol=1e-3, atol=1e-9)
    unknown: list[dict[str, Any]] = [
        {},
        {"beta_schedule": "laplace"},
        {"beta_schedule": "linear"},
        {"num_train_timesteps": "x"},
    ]
    assert all(snr_of(config) is None for config in unknown)
    dynamic = {"_class_name": "FlowMatchEulerDiscreteScheduler", "use_dynamic_shifting": True}
    assert torch.equal(snr_of(dynamic), snr)


def test_errors_are_ours(models: Path) -> None:
    pairs = [('"b"', "[[]]"), ('{"path": 1}', '["e"]'), ('"b\\u0000"', '["e"]'), ('"b"', '["e"]')]
    for base, experts in pairs:
        path = write(models, f'{{"base": {base}, "experts": {experts}}}', "r.json")
        with pytest.raises(DemergeError):
            plan_merge(Recipe.read(path))


# -- as other programs write it --------------------------------------------------------------------


def one_tensor(folder: Path, **values: float) -> None:
    for name, value in values.items():
        save_file({"w": torch.tensor([float(value), 2.0 * value])}, folder / f"{name}.safetensors")


MERGEKIT = """
models:
  - {model: base.safetensors}
  - {model: a.safetensors, parameters: {weight: 0.5, density: 1.0}}
  - {model: b.safetensors, parameters: {weight: 1.5, density: 1.0}}
base_model: base.safetensors
"""


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("merge_method: task_arithmetic\n", [0.5 * 2 + 1.5 * 4, 2 * 7.0]),
        ("merge_method: task_arithmetic\nparameters: {normalize: true}\n", [3.5, 7.0]),
        ("merge_method: ties\n", [3.5, 7.0]),
        ("merge_method: ties\nparameters: {normalize: false, lambda: 0.5}\n", [3.5, 7.0]),
        ("merge_method: dare_linear\n", [7.0, 14.0]),
        ("merge_method: dare_ties\nparameters: {normalize: true}\ndtype: float16\n", [3.5, 7.0]),
        ("merge_method: breadcrumbs\n", [7.0, 14.0]),
    ],
)
def test_a_recipe_of_mergekit_is_read(tmp_path: Path, text: str, expected: list[float]) -> None:
    one_tensor(tmp_path, base=0, a=2, b=4)
    recipe = Recipe.read(write(tmp_path, MERGEKIT + text, "m.yaml"))
    plan_merge(recipe, tmp_path / "out.safetensors").run()
    merged = load_file(tmp_path / "out.safetensors")["w"]
    assert merged.tolist() == expected and (merged.dtype == torch.float16) == ("float16" in text)
    assert verify(tmp_path / "out.safetensors", Recipe.read(tmp_path / "out.safetensors")).files


def test_recipes_of_mergekit_without_a_base(tmp_path: Path) -> None:
    one_tensor(tmp_path, a=2, b=4)
    models = "models: [{model: a.safetensors, parameters: {weight: 1}}, {model: b.safetensors, parameters: {weight: 3}}]\n"
    for name, text in (("l", models + "merge_method: linear\n"), ("s", "base_model: a.safetensors\n" + models
                       + "merge_method: slerp\nparameters: {t: 0.75}\n")):  # fmt: skip
        plan_merge(
            Recipe.read(write(tmp_path, text, f"{name}.yaml")), tmp_path / f"{name}.safetensors"
        ).run()
        assert load_file(tmp_path / f"{name}.safetensors")["w"].tolist() == [3.5, 7.0]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("slices: []\nmerge_method: slerp\n", "slices of mergekit"),
        (
            "models: []\nmerge_method: passthrough\n",
            "mergekit's method 'passthrough' does not exist",
        ),
        ("models: [{model: a}]\nmerge_method: ties\n", "ties needs a base_model"),
        (
            "models: [{model: a, parameters: {weight: [0, 1]}}]\nbase_model: b\nmerge_method: ties\n",
            "differs from layer to layer",
        ),
        (
            "models: []\nbase_model: b\nmerge_method: ties\nparameters: {normalize: 'yes'}\n",
            "normalize is yes, not a number, true or false",
        ),
        ("models: [{model: a}]\nbase_model: b\nmerge_method: ties\n", "a has no weight"),
        (
            "models: [{model: a}]\nbase_model: b\nmerge_method: ties\ntokenizer_source: union\n",
            "unknown key 'tokenizer_source'",
        ),
        (
            "models: [{model: a, parameters: {weight: 1, density: 0.5}}, {model: c, parameters: {weight: 1}}]\nbase_model: b\n"
            "merge_method: ties\n",
            "density differs between models",
        ),
    ],
)
def test_what_mergekit_has_and_demerge_has_not_is_refused(
    tmp_path: Path, text: str, message: str
) -> None:
    with pytest.raises(UsageError, match=message) as error:
        Recipe.read(write(tmp_path, text, "m.yaml"))
    assert error.value.fix


def test_names_of_methods_as_the_community_writes_them(tmp_path: Path) -> None:
    one_tensor(tmp_path, a=2, b=4, c=1)
    a, b, c = (tmp_path / f"{name}.safetensors" for name in "abc")
    for i, (experts, asked, expected) in enumerate(
        [
            ([b], {"method": "Weighted Sum", "options": {"alpha": 0.25}}, [2.5, 5.0]),
            ([b], {"method": "weighted-sum"}, [3.0, 6.0]),
            ([b], {"method": "weighted_sum", "weights": [1]}, [4.0, 8.0]),
            ([b, c], {"method": "add_difference"}, [5.0, 10.0]),
            ([b, c], {"method": "Add Difference", "options": {"multiplier": "0.5"}}, [3.5, 7.0]),
            ([b, c], {"method": "DARE_TIES", "options": {"density": 1}}, [3.5, 7.0]),
        ]
    ):
        out = tmp_path / f"{i}.safetensors"
        merge(a, experts, str(out), **asked)  # type: ignore[arg-type]
        if "TIES" not in str(asked["method"]):
            assert load_file(out)["w"].tolist() == expected
    with pytest.raises(UsageError, match="add_difference takes the models A B C"):
        merge(a, [b], tmp_path / "x.safetensors", method="add_difference")
    for method, near in (
        ("tise", "ties"),
        ("add_diference", "add_difference"),
        ("taskarithmetic", "task_arithmetic"),
    ):
        with pytest.raises(UsageError) as error:
            merge(a, [b], tmp_path / "x.safetensors", method=method)
        assert f"did you mean {near}" in str(error.value.fix)
    with pytest.raises(UsageError) as error:
        merge(a, [b], tmp_path / "x.safetensors", method="ties", options={"Densty": 1})
    assert "did you mean density?" in str(error.value.fix)


def test_a_folder_of_experts_stands_for_them(
    tiny: Path, tmp_path: Path, add_expert: Callable[..., Path]
) -> None:
    for start, stop in ((500, 1000), (0, 500)):
        add_expert(tmp_path / "experts" / f"{start:04d}-{stop:04d}", start, stop)
    paths = [str(tmp_path / "experts" / name) for name in ("0000-0500", "0500-1000")]
    assert [expert.path for expert in Recipe.of(tiny, [tmp_path / "experts"]).experts] == paths
    written = write(
        tmp_path, f"base: {tiny}\nexperts: [./experts]\nweights: [0.25, 0.75]\n", "r.yaml"
    )
    assert [expert.path for expert in Recipe.read(written).experts] == paths
    plan = plan_merge(Recipe.of(tiny, [tmp_path / "experts"], weights=[0.5, 0.5]))
    assert [str(expert.range) for expert in plan.recipe.experts] == ["0000-0500", "0500-1000"]
