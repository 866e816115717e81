"""Real checkpoints: known differences merge with a note, or are refused with a fix that works."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from demerge.errors import InputError, UsageError
from demerge.merging import Recipe, merge
from demerge.merging import plan as plan_merge

UNET, IDS = (
    "model.diffusion_model.",
    "cond_stage_model.transformer.text_model.embeddings.position_ids",
)
CONV, PROJ = f"{UNET}input_blocks.0.0.weight", f"{UNET}input_blocks.4.1.proj_in.weight"
VAE, COUNT = "first_stage_model.encoder.conv_in.weight", "model_ema.num_updates"
Tensors = dict[str, Tensor]
Save = Callable[[str, Tensors], Path]


def tensors(seed: int = 0) -> Tensors:
    """A checkpoint in the LDM layout: UNet, VAE, position ids and a running average."""
    g = torch.Generator().manual_seed(seed)
    shapes = {CONV: (8, 4, 3, 3), PROJ: (8, 8), VAE: (8, 3, 3, 3)}
    floats = {name: torch.randn(shape, generator=g).half() for name, shape in shapes.items()}
    count = torch.tensor(470_000 + seed, dtype=torch.int32)
    return floats | {IDS: torch.arange(77)[None], COUNT: count, "model_ema.a": torch.ones(2) * seed}


def without(held: Tensors, *names: str) -> Tensors:
    return {name: tensor for name, tensor in held.items() if name not in names}


@pytest.fixture
def save(tmp_path: Path) -> Save:
    def write(name: str, held: Tensors) -> Path:
        save_file({n: t.contiguous() for n, t in held.items()}, tmp_path / f"{name}.safetensors")
        return tmp_path / f"{name}.safetensors"

    return write


EXPERT = tensors(1)
BETAS = {"betas": torch.linspace(0.00085**0.5, 0.012**0.5, 1000) ** 2}
ABAR = {"alphas_cumprod": (1 - BETAS["betas"]).cumprod(0)}
MERGED: Mapping[str, tuple[Tensors, str]] = {
    "equal keys": (EXPERT, "1 tensors|2 tensors"),
    "no position_ids": (without(EXPERT, IDS), "buffers are kept: .*position_ids"),
    "position_ids in half precision": (EXPERT | {IDS: torch.arange(77)[None].half()}, ""),
    "broken position_ids": (EXPERT | {IDS: torch.zeros(1, 77)}, "buffers are kept: .*position_ids"),
    "position_ids of another shape": (EXPERT | {IDS: torch.arange(77)}, ""),
    "no running average": (without(EXPERT, COUNT, "model_ema.a"), "base.*model_ema"),
    "schedule buffers": (EXPERT | BETAS | ABAR, "buffers are dropped: alphas_cumprod, betas"),
    "an empty schedule": (
        EXPERT | {"alphas_cumprod": torch.empty(0)},
        "buffers are dropped: alphas_cumprod",
    ),
    "no VAE": (without(EXPERT, VAE), "has no VAE: the base's is kept"),
    "the UNet alone": ({n: EXPERT[n] for n in (CONV, PROJ)}, "has no VAE"),
    "bare keys of the UNet": (
        {n.removeprefix(UNET): EXPERT[n] for n in (CONV, PROJ)},
        "has no VAE",
    ),
    "torch.compile": ({f"_orig_mod.{n}": t for n, t in EXPERT.items()}, ""),
    "torch.compile of the UNet": (
        {n.replace(UNET, f"{UNET}_orig_mod."): t for n, t in EXPERT.items()},
        "",
    ),
    "DataParallel": ({f"module.{n}": t for n, t in EXPERT.items()}, ""),
}


@pytest.mark.parametrize("what", MERGED)
def test_known_differences_merge_and_are_told(save: Save, tmp_path: Path, what: str) -> None:
    held, note = MERGED[what]
    base = tensors()
    out = tmp_path / "out.safetensors"
    plan = plan_merge(Recipe.of(save("base", base), [save("e", held)], weights=[1]), out)
    plan.run()
    merged = load_file(out)
    assert set(merged) == {
        CONV,
        PROJ,
        VAE,
        IDS,
    }  # no running average of weights that are no longer there
    has_vae = any(n.endswith(VAE) for n in held)
    assert torch.equal(merged[CONV], EXPERT[CONV]) and torch.equal(merged[PROJ], EXPERT[PROJ])
    assert torch.equal(merged[VAE], (EXPERT if has_vae else base)[VAE]) and torch.equal(
        merged[IDS], base[IDS]
    )
    assert re.search(note, "\n".join(plan.notes)) and plan.notes == plan.document()["notes"]


def test_position_ids_of_a_base_in_half_precision_are_never_averaged(
    save: Save, tmp_path: Path
) -> None:
    held = without(tensors(), COUNT, "model_ema.a") | {IDS: torch.arange(77)[None].half()}
    broken = held | {IDS: torch.zeros(1, 77).half()}
    merge(
        save("base", held),
        [save("e", broken), save("f", broken)],
        tmp_path / "o.safetensors",
        method="average",
    )
    assert torch.equal(load_file(tmp_path / "o.safetensors")[IDS], held[IDS])


@pytest.mark.parametrize("method", ["average", "ties", "model_stock", "slerp"])
def test_what_one_expert_lacks_counts_as_the_base_with_every_method(
    save: Save, tmp_path: Path, method: str
) -> None:
    base, one, other = tensors(), tensors(1), tensors(2)
    filled = other | {VAE: base[VAE]}
    paths = [
        save("base", base),
        save("one", one),
        save("other", without(other, VAE)),
        save("filled", filled),
    ]
    for name, last in (("lacking", paths[2]), ("filled-out", paths[3])):
        merge(paths[0], [paths[1], last], tmp_path / f"o-{name}.safetensors", method=method)
    a, b = (load_file(tmp_path / f"o-{name}.safetensors") for name in ("lacking", "filled-out"))
    assert all(torch.equal(a[n], b[n]) for n in a)


# -- refused, with a fix that works ----------------------------------------------------------------

NINE = EXPERT | {CONV: torch.cat([EXPERT[CONV], torch.zeros(8, 5, 3, 3).half()], 1)}
MARKED = EXPERT | {"v_pred": torch.empty(0), "ztsnr": torch.empty(0)}
OTHER_BETAS = {"betas": torch.linspace(1e-4, 0.02, 1000)}
REFUSED: Mapping[str, tuple[Tensors, Tensors, str, dict[str, object]]] = {
    "v_pred": ({}, MARKED, "only .*e.safetensors is marked v_pred, ztsnr", {"extra": "drop"}),
    "no v_pred": (
        {"v_pred": torch.empty(0)},
        EXPERT,
        "only .*base.safetensors is marked v_pred",
        {"missing": "base"},
    ),
    "inpainting": (
        {},
        NINE,
        r"takes 9 input channels \(an inpainting model\)",
        {"only": ["down.4", "first_stage_model"]},
    ),
    "a key less": ({}, without(EXPERT, PROJ), f"1 missing: {re.escape(PROJ)}", {"missing": "base"}),
    "a key more": (
        {},
        EXPERT | {f"{UNET}x.weight": torch.ones(2)},
        "1 extra: .*x.weight",
        {"extra": "drop"},
    ),
    "zero SNR": (
        {},
        EXPERT | {"alphas_cumprod": torch.linspace(1, 0, 1000)},
        "marked ztsnr",
        {"extra": "drop"},
    ),
}


@pytest.mark.parametrize("what", REFUSED)
def test_others_are_refused_and_the_fix_merges(save: Save, tmp_path: Path, what: str) -> None:
    more, held, message, fix = REFUSED[what]
    base, expert = save("base", tensors() | more), save("e", held)
    with pytest.raises(InputError, match=message) as error:
        merge(base, [expert], tmp_path / "out.safetensors")
    options = [
        f"--{name} {value}"
        for name, given in fix.items()
        for value in (given if isinstance(given, list) else [given])
    ]
    assert all(option in error.value.fix for option in options)
    merge(base, [expert], tmp_path / "out.safetensors", weights=[1], **fix)  # type: ignore[arg-type]
    assert (tmp_path / "out.safetensors").is_file()


def test_another_schedule_is_refused_and_a_rounded_one_is_not(save: Save, tmp_path: Path) -> None:
    base = save("base", tensors() | BETAS)
    with pytest.raises(InputError, match="another noise schedule: betas differ"):
        merge(base, [save("e", EXPERT | OTHER_BETAS)], tmp_path / "a.safetensors")
    merge(
        base,
        [save("f", EXPERT | {"betas": BETAS["betas"].bfloat16()})],
        tmp_path / "b.safetensors",
        weights=[1],
    )


def test_a_difference_outside_of_only_does_not_matter(save: Save, tmp_path: Path) -> None:
    base, held = (
        tensors(),
        without(EXPERT, IDS, COUNT) | {VAE: torch.ones(3), "first_stage_model.more": torch.ones(1)},
    )
    with pytest.raises(InputError, match="of another shape"):
        merge(save("base", base), [save("e", held)], tmp_path / "out.safetensors", extra="drop")
    merge(
        save("base", base),
        [save("e", held)],
        tmp_path / "out.safetensors",
        only=[f"{UNET}**"],
        weights=[1],
    )
    merged = load_file(tmp_path / "out.safetensors")
    assert torch.equal(merged[VAE], base[VAE]) and torch.equal(merged[CONV], EXPERT[CONV])


def test_a_full_checkpoint_on_a_bare_unet_says_what_the_base_has_not(
    save: Save, tmp_path: Path
) -> None:
    base = save(
        "base", {n.removeprefix(UNET): t for n, t in tensors().items() if n.startswith(UNET)}
    )
    with pytest.raises(InputError, match="the base has no VAE"):
        merge(base, [save("e", EXPERT)], tmp_path / "out.safetensors")
    merge(base, [save("e", EXPERT)], tmp_path / "out.safetensors", extra="drop", weights=[1])
    assert torch.equal(
        load_file(tmp_path / "out.safetensors")["input_blocks.4.1.proj_in.weight"], EXPERT[PROJ]
    )


def test_unknown_words_are_usage_errors(save: Save, tmp_path: Path) -> None:
    path = save("base", tensors())
    for option in ("missing", "extra"):
        with pytest.raises(UsageError, match=f"{option} is 'maybe'"):
            merge(path, [path], tmp_path / "out.safetensors", **{option: "maybe"})  # type: ignore[arg-type]


def test_the_recipe_holds_what_was_allowed_and_verifies(save: Save, tmp_path: Path) -> None:
    from demerge.merging import verify

    path = save("base", tensors())
    merge(
        path,
        [save("e", without(EXPERT, PROJ))],
        tmp_path / "out.safetensors",
        weights=[1],
        missing="base",
    )
    recipe = Recipe.read(tmp_path / "out.safetensors")
    assert recipe.missing == "base" and "extra" not in recipe.document()
    assert verify(tmp_path / "out.safetensors", recipe).files
