"""Quantised storage: scaled fp8 is read as the numbers that it stands for, every other kind of codes is refused by its name."""

from __future__ import annotations

import contextlib
import json
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from demerge.errors import DemergeError, InputError, NumericalError
from demerge.inspection import inspect_model
from demerge.lora import open_expert
from demerge.merging import MergeSession, Recipe, merge, merge_tensors, verify
from demerge.merging import plan as plan_merge
from demerge.merging.engine.reader import CHUNK
from demerge.merging.engine.validation import round_chunk
from demerge.storage.checkpoint import Checkpoint, content_sha256
from demerge.storage.scaled import Scaled

FP8 = torch.float8_e4m3fn
LINEAR, CONV, PLAIN = "blocks.0.to_q.weight", "blocks.1.conv.weight", "blocks.0.norm.weight"
BF16 = torch.bfloat16
Tensors = dict[str, Tensor]


def packed(weight: Tensor, dtype: torch.dtype = FP8, rows: bool = False) -> tuple[Tensor, Tensor]:
    """Codes and scale (one, or one for each output) of a weight."""
    largest = weight.flatten(1).abs().amax(1) if rows else weight.abs().max()
    scale = (largest / torch.finfo(dtype).max).float()
    return (weight / (scale.view(-1, *[1] * (weight.ndim - 1)) if rows else scale)).to(dtype), scale


def true_values(codes: Tensor, scale: Tensor) -> Tensor:
    return codes.float() * (
        scale.reshape(-1, *[1] * (codes.ndim - 1)) if scale.numel() > 1 else scale.reshape(())
    )


def scaled_file(
    path: Path, weights: Tensors, name: str = "scale_weight", rows: bool = False, **other: Any
) -> Path:
    """Save linear layers and convolutions in scaled fp8, all else in bfloat16, as ComfyUI writes it."""
    held: Tensors = (
        {} if other.pop("unmarked", False) else {"scaled_fp8": torch.empty(0, dtype=FP8)}
    )
    for key, weight in weights.items():
        if weight.ndim > 1:
            held[key], held[key.removesuffix("weight") + name] = packed(weight, rows=rows, **other)
        else:
            held[key] = weight.to(BF16)
    save_file(held, path)
    return path


def plain_file(path: Path, file: Path) -> Path:
    """Save what a scaled file stands for, from its keys alone: independent of the code under test."""
    held = load_file(file)
    scales = {n: t for n, t in held.items() if "scale" in n}
    found = {}
    for name, tensor in held.items():
        if name not in scales:
            scale = next(
                (
                    s
                    for key, s in scales.items()
                    if key.rpartition(".")[0] == name.rpartition(".")[0]
                ),
                None,
            )
            found[name] = (
                tensor if scale is None or tensor.ndim == 1 else true_values(tensor, scale)
            )
    save_file(found, path)
    return path


@pytest.fixture
def models() -> list[Tensors]:
    """A base and two experts, the second with an outlier, which changes its scale."""
    g = torch.Generator().manual_seed(0)

    def random(scale: float) -> Tensors:
        shapes = {LINEAR: (24, 20), CONV: (8, 6, 3, 3), PLAIN: (20,)}
        return {n: torch.randn(shape, generator=g) * scale for n, shape in shapes.items()}

    base = random(0.02)
    experts = [
        {n: t + d for (n, t), d in zip(base.items(), random(0.003).values(), strict=True)}
        for _ in range(2)
    ]
    experts[1][LINEAR][0, 0] = 0.5
    return [base, *experts]


FORMS: dict[str, dict[str, Any]] = {
    "ComfyUI": {},
    "weight_scale": {"name": "weight_scale", "unmarked": True},
    "a scale for each output": {"name": "weight_scale", "rows": True},
    "e5m2": {"dtype": torch.float8_e5m2},
}


@pytest.fixture(params=FORMS.values(), ids=FORMS)
def files(request: pytest.FixtureRequest, models: list[Tensors], tmp_path: Path) -> list[Path]:
    return [
        scaled_file(tmp_path / f"{i}.safetensors", model, **request.param)
        for i, model in enumerate(models)
    ]


def plain(files: list[Path]) -> list[Path]:
    return [plain_file(file.with_name(f"plain-{file.name}"), file) for file in files]


# -- reading ----------------------------------------------------------------------------------------------------------


def test_scaled_fp8_is_read_as_the_numbers_that_it_stands_for(files: list[Path]) -> None:
    checkpoint, expected = Checkpoint.open(files[0]), load_file(plain(files)[0])
    assert set(checkpoint) == set(expected) == {LINEAR, CONV, PLAIN}
    for name, tensor in expected.items():
        assert checkpoint[name].dtype == tensor.dtype and checkpoint[name].shape == tensor.shape
        assert torch.equal(checkpoint[name] + 0, tensor)
    assert content_sha256(checkpoint) == content_sha256(expected)
    assert checkpoint.parameters == sum(t.numel() for t in expected.values())
    assert (
        "float8" in repr(checkpoint)
        and "scaled" in repr(checkpoint)
        and len(repr(checkpoint)) < 300
    )
    assert inspect_model(files[0]).tensors == 3 and inspect_model(files[0]).dtypes[0].endswith(
        " scaled"
    )


@pytest.mark.parametrize("rows", [False, True])
def test_spans_are_made_of_their_own_codes(rows: bool) -> None:
    codes, scale = packed(torch.randn(5, 7), rows=rows)
    tensor, values = Scaled.of(codes, scale), true_values(codes, scale).reshape(-1)
    flat = tensor.detach().reshape(-1)
    for span in (slice(0, 4), slice(3, 20), slice(8, 9), slice(30, None)):
        assert isinstance(flat[span], Scaled) and flat[span].codes.numel() == len(values[span])
        made = flat[span].to("cpu", torch.float32)
        assert type(made) is Tensor and torch.equal(made, values[span])
    assert torch.equal(torch.stack([tensor, tensor])[1], values.view(5, 7))
    assert (tensor.double().numpy() == values.view(5, 7).double().numpy()).all()


def test_a_session_and_a_lora_see_numbers(files: list[Path], tmp_path: Path) -> None:
    true = [load_file(file) for file in plain(files)]
    w = torch.tensor([0.5, 0.25])
    session = MergeSession(files[0], list(files[1:]))
    assert session.names == list(Checkpoint.open(files[0]))
    expected = merge_tensors(true[0], true[1:], weights=w.tolist())
    for name, theta in session.theta(w).items():
        torch.testing.assert_close(theta, expected[name], rtol=1e-6, atol=1e-8)
    A, B = torch.randn(2, 20), torch.randn(24, 2)
    save_file(
        {"blocks.0.to_q.lora_A.weight": A, "blocks.0.to_q.lora_B.weight": B},
        tmp_path / "lora.safetensors",
    )
    base = Checkpoint.open(files[0])
    merged = merge_tensors(base, [open_expert(tmp_path / "lora.safetensors", base)], weights=[1.0])
    torch.testing.assert_close(
        merged[LINEAR].double(), true[0][LINEAR].double() + B.double() @ A.double()
    )
    assert torch.equal(merged[CONV], true[0][CONV])


def test_a_lora_in_scaled_fp8_is_dequantised(tmp_path: Path) -> None:
    (A, a), (B, b) = packed(torch.randn(2, 6)), packed(torch.randn(4, 2))
    held = {
        "x.lora_A.weight": A,
        "x.lora_A.scale_weight": a,
        "x.lora_B.weight": B,
        "x.lora_B.scale_weight": b,
    }
    save_file(held, tmp_path / "lora.safetensors")
    delta = open_expert(tmp_path / "lora.safetensors", {"x.weight": torch.zeros(4, 6)})["x.weight"]
    assert torch.equal(delta, (true_values(B, b).double() @ true_values(A, a).double()).float())


# -- merging ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", ["average", "ties"])
def test_merges_like_the_dequantised_files(method: str, files: list[Path], tmp_path: Path) -> None:
    for dtype in ("float32", "bfloat16"):
        outs = [tmp_path / f"{dtype}-{what}.safetensors" for what in ("scaled", "plain")]
        for given, out in zip((files, plain(files)), outs, strict=True):
            merge(given[0], given[1:], out, method=method, save_dtype=dtype)
        one, other = (load_file(out) for out in outs)
        assert set(one) == {LINEAR, CONV, PLAIN} and all(
            torch.equal(one[n], other[n]) for n in other
        )


@pytest.mark.parametrize("method", ["average", "ties"])
def test_keeps_the_layout_of_the_base_with_scales_that_hold_the_merge(
    method: str, files: list[Path], tmp_path: Path
) -> None:
    out = tmp_path / "out.safetensors"
    result = merge(files[0], files[1:], out, method=method)
    true = [load_file(file) for file in plain(files)]
    base, held, exact = (
        load_file(files[0]),
        load_file(out),
        merge_tensors(true[0], true[1:], method),
    )
    assert {n: (t.dtype, t.shape) for n, t in held.items()} == {
        n: (t.dtype, t.shape) for n, t in base.items()
    }
    merged = Checkpoint.open(out)
    step = torch.finfo(held[LINEAR].dtype).eps / 2
    for name in (LINEAR, CONV):
        worst = (
            (merged[name] - exact[name]).abs()
            / exact[name].abs().clamp(min=1e-3 * float(exact[name].abs().max()))
        ).max()
        assert float(worst) <= step * 1.001
        grown = [
            held[k] / base[k]
            for k in held
            if "scale" in k and k.rpartition(".")[0] == name.rpartition(".")[0]
        ]
        assert all(
            torch.equal(ratio.log2().round().exp2(), ratio) and bool((ratio >= 1).all())
            for ratio in grown
        )
    assert torch.equal(merged[PLAIN], exact[PLAIN].to(BF16))
    errors = [
        ((merged[n] - exact[n]).double().square().sum(), exact[n].double().square().sum())
        for n in (LINEAR, CONV)
    ]
    assert (
        f"{float(sum(e for e, _ in errors) / sum(w for _, w in errors)) ** 0.5:.2%} of the weights"
        in result.tally.rounding
    )


def test_what_a_merge_leaves_alone_keeps_codes_and_scale_to_the_bit(
    files: list[Path], tmp_path: Path
) -> None:
    merge(files[0], files[1:], tmp_path / "a.safetensors", only=["blocks.1.**"])
    merge(files[0], files[1:], tmp_path / "b.safetensors", weights=[0.0, 0.0])
    base, only, none = (
        load_file(path)
        for path in (files[0], tmp_path / "a.safetensors", tmp_path / "b.safetensors")
    )
    assert all(
        torch.equal(none[n].view(torch.uint8), base[n].view(torch.uint8))
        for n in base
        if base[n].ndim
    )
    assert all(
        torch.equal(only[n].float(), base[n].float()) for n in base if n.startswith("blocks.0.")
    )
    assert not torch.equal(only[CONV].float(), base[CONV].float())


def test_chunks_and_workers_change_nothing_and_verify_agrees(tmp_path: Path) -> None:
    g = torch.Generator().manual_seed(1)
    big = {LINEAR: torch.randn(700, 600, generator=g), PLAIN: torch.randn(600, generator=g)}
    assert big[LINEAR].numel() > CHUNK
    paths = [
        scaled_file(tmp_path / f"{i}.safetensors", {n: t * s for n, t in big.items()}, rows=True)
        for i, s in enumerate((1, 3))
    ]
    one, two = tmp_path / "one.safetensors", tmp_path / "two.safetensors"
    merge(paths[0], paths[1:], one, weights=[1.0], num_workers=1)
    merge(paths[0], paths[1:], two, weights=[1.0], num_workers=2)
    assert one.read_bytes() == two.read_bytes()
    assert verify(one, Recipe.read(one)).files
    assert float((Checkpoint.open(one)[LINEAR] / big[LINEAR]).mean()) == pytest.approx(3, rel=0.01)
    plan = plan_merge(Recipe.of(paths[0], paths[1:], weights=[1.0]))
    assert any("fp8" in line for line in plan.measure().lines())


def test_an_output_larger_than_any_code_of_the_base_and_a_base_of_zeros_fit(tmp_path: Path) -> None:
    zero = {LINEAR: torch.zeros(4, 4), "scaled_fp8": torch.empty(0, dtype=FP8)}
    for scale in (0.0, 1e-4):
        held = zero | {
            LINEAR: zero[LINEAR].to(FP8),
            "blocks.0.to_q.scale_weight": torch.tensor(scale),
        }
        save_file(held, tmp_path / "base.safetensors")
        expert = scaled_file(tmp_path / "expert.safetensors", {LINEAR: torch.full((4, 4), 7.0)})
        merge(
            tmp_path / "base.safetensors",
            [expert],
            tmp_path / f"{scale}.safetensors",
            weights=[1.0],
        )
        assert (Checkpoint.open(tmp_path / f"{scale}.safetensors")[LINEAR] - 7).abs().max() < 7 / 16


def test_float8_without_a_scale_is_a_float_that_may_be_too_small_for_a_merge(
    tmp_path: Path,
) -> None:
    for i, value in enumerate((1.0, 2.0)):
        save_file({"a.weight": torch.full((2, 2), value).to(FP8)}, tmp_path / f"{i}.safetensors")
    merge(
        tmp_path / "0.safetensors",
        [tmp_path / f"{i}.safetensors" for i in (0, 1)],
        tmp_path / "o.safetensors",
    )
    assert load_file(tmp_path / "o.safetensors")["a.weight"].float().unique().tolist() == [1.5]
    assert round_chunk(torch.tensor([448.0]), FP8, "a").item() == 448
    with pytest.raises(NumericalError, match="float8"):
        round_chunk(torch.tensor([1.0, -600.0]), FP8, "a")


def test_float8_without_a_scale_is_rounded_again_if_that_is_asked_for(tmp_path: Path) -> None:
    g = torch.Generator().manual_seed(0)
    models = []
    for i in range(2):
        weight = torch.randn(16, 16, generator=g)
        models.append({"a.weight": weight.to(FP8), "a.bias": weight[0].bfloat16()})
        save_file(models[i], tmp_path / f"{i}.safetensors")
    paths = [tmp_path / f"{i}.safetensors" for i in range(2)]
    mean = (models[0]["a.weight"].float() + models[1]["a.weight"].float()) / 2
    for dtype, expected in (
        ("keep", torch.bfloat16),
        ("float8_e4m3fn", FP8),
        ("float8_e5m2", torch.float8_e5m2),
        ("float16", torch.float16),
    ):
        recipe = Recipe.of(paths[0], paths, save_dtype=dtype, weights=[0.5, 0.5])
        result = plan_merge(recipe, tmp_path / f"{dtype}.safetensors").run()
        held = load_file(tmp_path / f"{dtype}.safetensors")
        assert held["a.weight"].dtype == expected
        assert held["a.bias"].dtype == (torch.float16 if dtype == "float16" else torch.bfloat16)
        assert torch.equal(held["a.weight"].float(), mean.to(expected).float())
        has_note = any(
            "1 merged tensors in float8 are stored in bfloat16" in n for n in result.plan.notes
        )
        assert has_note == (dtype == "keep")
        error = float((held["a.weight"].float() - mean).norm() / mean.norm())
        is_printed = any(f"in fp8: rounding errs by {error:.2%}" in line for line in result.lines())
        assert is_printed == dtype.startswith("float8")


def test_a_wider_base_is_stored_in_float8_if_that_is_asked_for(
    models: list[Tensors], tmp_path: Path
) -> None:
    paths = []
    for i, tensors in enumerate(models[:2]):
        paths.append(tmp_path / f"{i}.safetensors")
        save_file(tensors, paths[i])
    merge(paths[0], paths[1:], tmp_path / "o.safetensors", weights=[1], save_dtype="float8_e5m2")
    held = load_file(tmp_path / "o.safetensors")
    for name, tensor in load_file(paths[1]).items():
        is_matrix = name.endswith(".weight") and tensor.ndim > 1
        assert held[name].dtype == (torch.float8_e5m2 if is_matrix else tensor.dtype), name


def test_a_pipeline_in_scaled_fp8_loads_and_merges_as_numbers(
    make_tiny: Callable[..., Path], tmp_path: Path
) -> None:
    from demerge.diffusion.model import Diffusion

    folders = [make_tiny(seed=seed) for seed in range(2)]
    for folder in folders:
        scaled_file(
            folder / "unet" / "diffusion_pytorch_model.safetensors",
            Diffusion.load(folder).denoiser.state_dict(),
        )
    plain_file(
        tmp_path / "plain.safetensors", folders[0] / "unet" / "diffusion_pytorch_model.safetensors"
    )
    loaded = Diffusion.load(folders[0]).denoiser.state_dict()
    for name, tensor in load_file(tmp_path / "plain.safetensors").items():
        assert torch.equal(loaded[name], tensor.float()), name
    merge(folders[0], folders[1:], tmp_path / "out", weights=[0.5])
    assert "in fp8: rounding errs by" in (tmp_path / "out" / "README.md").read_text()
    assert Diffusion.load(tmp_path / "out").denoiser.conv_in.weight.isfinite().all()


def test_a_merge_of_a_part_copies_float8_as_it_is(tmp_path: Path) -> None:
    codes = torch.arange(16, dtype=torch.uint8).view(FP8).view(4, 4)
    for i in range(2):
        save_file(
            {"mid.weight": codes, "up.weight": torch.full((2, 2), float(i)).to(FP8)},
            tmp_path / f"{i}.safetensors",
        )
    merge(
        tmp_path / "0.safetensors",
        [tmp_path / "1.safetensors"],
        tmp_path / "o.safetensors",
        only=["up.**"],
        weights=[1.0],
    )
    held = load_file(tmp_path / "o.safetensors")
    assert (
        torch.equal(held["mid.weight"].view(torch.uint8), codes.view(torch.uint8))
        and held["up.weight"].float().min() == 1
    )


@pytest.mark.parametrize("seed", range(4))
def test_mutated_files_are_read_or_refused(seed: int, tmp_path: Path) -> None:
    g, chance = torch.Generator().manual_seed(seed), random.Random(seed)
    models = {LINEAR: torch.randn(6, 4, generator=g), PLAIN: torch.randn(4, generator=g)}
    good = scaled_file(tmp_path / "good.safetensors", models, rows=seed % 2 == 0)
    content, bad, out = (
        good.read_bytes(),
        tmp_path / "bad.safetensors",
        tmp_path / "out.safetensors",
    )
    length = int.from_bytes(content[:8], "little")
    words = [
        b"F8_E4M3",
        b"F8_E5M2",
        b"F32",
        b"U8",
        b"scale_weight",
        b"weight_scale",
        b"weight",
        b"[6]",
        b"[]",
        b"[6,4]",
        b"[4]",
    ]
    for _ in range(25):
        if chance.random() < 0.5:
            header = content[8 : 8 + length].replace(*chance.sample(words, 2), 1).rstrip()
            header += b" " * (-len(header) % 8)
            bad.write_bytes(len(header).to_bytes(8, "little") + header + content[8 + length :])
        else:
            position = chance.randrange(len(content))
            bad.write_bytes(
                content[:position] + bytes([chance.randrange(256)]) + content[position + 1 :]
            )
        for base, expert in ((good, bad), (bad, good)):
            out.unlink(missing_ok=True)
            with contextlib.suppress(DemergeError):
                merge(base, [expert], out, weights=[0.5], num_workers=1)
                assert all(
                    bool((tensor + 0).isfinite().all()) for tensor in Checkpoint.open(out).values()
                )


def test_what_comfyui_writes_next_to_a_layer_is_kept(tmp_path: Path) -> None:
    def save(name: str, value: float) -> Path:
        codes, scale = packed(torch.randn(4, 4, generator=torch.Generator().manual_seed(0)) * value)
        text = b'{"format": "float8_e4m3fn", "full_precision_matrix_mult": true}'
        beside = {
            "a.weight_scale": scale,
            "a.input_scale": torch.tensor(0.5),
            "a.comfy_quant": torch.tensor(list(text), dtype=torch.uint8),
        }
        layers = {
            "_quantization_metadata": json.dumps({"layers": {"a": {"format": "float8_e4m3fn"}}})
        }
        save_file({"a.weight": codes, **beside}, tmp_path / name, layers)
        return tmp_path / name

    base = save("base.safetensors", 1)
    assert list(Checkpoint.open(base)) == ["a.weight"]
    merge(base, [save("expert.safetensors", 3)], tmp_path / "out.safetensors", weights=[1.0])
    held, before = load_file(tmp_path / "out.safetensors"), load_file(base)
    assert set(held) == set(before) and all(
        torch.equal(held[f"a.{n}"], before[f"a.{n}"]) for n in ("input_scale", "comfy_quant")
    )
    with safe_open(tmp_path / "out.safetensors", "pt") as file:
        assert "float8_e4m3fn" in file.metadata()["_quantization_metadata"]


def test_nan_in_scaled_fp8_is_named(models: list[Tensors], tmp_path: Path) -> None:
    paths = [scaled_file(tmp_path / f"{i}.safetensors", model) for i, model in enumerate(models)]
    held = load_file(paths[1])
    for broken in (
        {LINEAR: torch.full((24, 20), torch.nan).to(FP8)},
        {"blocks.0.to_q.scale_weight": torch.tensor(torch.inf)},
    ):
        save_file(held | broken, paths[1])
        with pytest.raises(InputError, match=r"1\.safetensors.*to_q"):
            merge(paths[0], paths[1:], tmp_path / "out.safetensors")


# -- refusals ---------------------------------------------------------------------------------------------------------

U8, I8 = torch.zeros(4, 1, dtype=torch.uint8), torch.zeros(4, 4, dtype=torch.int8)
CODES = torch.zeros(4, 4).to(FP8)
BAD: dict[str, tuple[Tensors, str]] = {
    "nf4": (
        {"a.weight": U8, "a.weight.absmax": torch.ones(1), "a.weight.quant_map": torch.ones(16)},
        "bitsandbytes",
    ),
    "nf4 state": ({"a.weight": U8, "a.weight.quant_state.bitsandbytes__nf4": U8}, "bitsandbytes"),
    "int8 of bitsandbytes": ({"a.weight": I8, "a.SCB": torch.ones(4)}, "bitsandbytes"),
    "int8 with a scale": ({"a.weight": I8, "a.scale_weight": torch.ones(())}, "I8"),
    "int8 alone": ({"a.weight": I8}, "I8"),
    "packs of a GGUF": ({"a.weight": U8, "b.weight": torch.ones(2)}, "U8"),
    "GPTQ": (
        {"a.qweight": torch.zeros(2, 2, dtype=torch.int32), "a.scales": torch.ones(2, 2)},
        "GPTQ",
    ),
    "torchao": ({"a._weight_qdata": I8, "a._weight_scale": torch.ones(4, 1)}, "torchao"),
    "quanto": ({"a.weight._data": I8, "a.weight._scale": torch.ones(4, 1)}, "quanto"),
    "compressed-tensors": (
        {"a.weight_packed": I8, "a.weight_scale": torch.ones(4, 1)},
        "compressed-tensors",
    ),
    "NVFP4": (
        {"a.weight": U8, "a.weight_scale": CODES, "a.weight_scale_2": torch.ones(())},
        "NVFP4",
    ),
    "blocks": ({"a.weight": CODES, "a.weight_scale_inv": torch.ones(1, 1)}, "blocks"),
    "SVDQuant": ({"a.qweight": I8, "a.wscales": torch.ones(1, 4)}, "quantised"),
    "scale of another shape": (
        {"a.weight": CODES, "a.weight_scale": torch.ones(1, 2)},
        r"\[1, 2\]",
    ),
    "scale for each input": (
        {"a.weight": CODES[:2], "a.weight_scale": torch.ones(1, 4)},
        r"\[1, 4\]",
    ),
    "two scales": (
        {"a.weight": CODES, "a.weight_scale": torch.ones(()), "a.scale_weight": torch.ones(())},
        "scale_weight and",
    ),
    "scale of integers": (
        {"a.weight": CODES, "a.weight_scale": torch.ones((), dtype=torch.int64)},
        "I64",
    ),
    "scale without a weight": (
        {"scaled_fp8": CODES[:0], "a.scale_weight": torch.ones(())},
        "without a float8 weight",
    ),
    "scale of a wide weight": (
        {"scaled_fp8": CODES[:0], "a.weight": torch.ones(2, 2), "a.scale_weight": torch.ones(())},
        "without",
    ),
    "another format": (
        {
            "a.weight": CODES,
            "a.weight_scale": torch.ones(()),
            "a.comfy_quant": torch.tensor(list(b'{"format": "mxfp8"}'), dtype=torch.uint8),
        },
        "mxfp8",
    ),
}


@pytest.mark.parametrize(("tensors", "words"), BAD.values(), ids=BAD)
def test_refuses_codes_by_name(tensors: Tensors, words: str, tmp_path: Path) -> None:
    save_file({n: t.clone() for n, t in tensors.items()}, tmp_path / "bad.safetensors")
    with pytest.raises(InputError, match=rf"bad\.safetensors: .*{words}") as caught:
        Checkpoint.open(tmp_path / "bad.safetensors")
    assert "name the float32" in caught.value.fix


@pytest.mark.parametrize("where", ["base", "expert", "lora target"])
def test_codes_are_refused_wherever_they_stand(where: str, tmp_path: Path) -> None:
    save_file({"a.weight": torch.ones(4, 4)}, tmp_path / "good.safetensors")
    save_file({"a.weight": I8, "a.SCB": torch.ones(4)}, tmp_path / "bad.safetensors")
    save_file(
        {"a.lora_A.weight": torch.ones(1, 4), "a.lora_B.weight": torch.ones(4, 1)},
        tmp_path / "lora.safetensors",
    )
    base, expert = {
        "base": ("bad", "good"),
        "expert": ("good", "bad"),
        "lora target": ("bad", "lora"),
    }[where]
    with pytest.raises(InputError, match="bitsandbytes"):
        merge(
            tmp_path / f"{base}.safetensors",
            [tmp_path / f"{expert}.safetensors"],
            tmp_path / "out.safetensors",
        )


def test_dtypes_of_quantised_layers_and_other_tables_are_named(tmp_path: Path) -> None:
    header = json.dumps({"a": {"dtype": "F4", "shape": [2], "data_offsets": [0, 1]}}).encode()
    (tmp_path / "a.safetensors").write_bytes(len(header).to_bytes(8, "little") + header + b"\0")
    with pytest.raises(InputError, match="quantised"):
        Checkpoint.open(tmp_path / "a.safetensors")
    for table in (
        "{",
        "[]",
        '{"layers": {"a": {"format": "int8_tensorwise"}}}',
        '{"layers": {"a": {"format": "float8_e4m3fn", "convrot": 1}}}',
    ):
        save_file(
            {"a.weight": torch.ones(1)},
            tmp_path / "b.safetensors",
            {"_quantization_metadata": table},
        )
        with pytest.raises(InputError, match=r"b\.safetensors"):
            Checkpoint.open(tmp_path / "b.safetensors")


def test_names_that_look_like_scales_are_tensors_where_nothing_is_scaled(tmp_path: Path) -> None:
    save_file(
        {"a.weight": torch.ones(2, 2), "a.weight_scale": torch.ones(1)}, tmp_path / "a.safetensors"
    )
    assert set(Checkpoint.open(tmp_path / "a.safetensors")) == {"a.weight", "a.weight_scale"}
