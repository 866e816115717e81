"""LoRA files in the base's place: their deltas, not their factors, are merged into a LoRA."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from demerge.errors import InputError, UsageError
from demerge.lora import Adapter, NoBase, open_expert
from demerge.merging import MergeSession, Recipe, merge, merge_tensors, verify
from demerge.merging import plan as plan_merge
from demerge.storage.checkpoint import Checkpoint

SHAPES = {
    "down_blocks.0.attentions.0.to_q": (8, 6),
    "down_blocks.1.resnets.0.conv1": (5, 4, 3, 3),
    "conv_in": (6, 3, 3, 3),
}
Tensors = dict[str, Tensor]


def factors(
    rank: int, seed: int, modules: dict[str, tuple[int, ...]] = SHAPES
) -> dict[str, tuple[Tensor, Tensor, float]]:
    """A, B and alpha of each module."""
    g = torch.Generator().manual_seed(seed)
    return {
        m: (
            torch.randn(rank, *s[1:], generator=g),
            torch.randn(s[0], rank, *(1,) * (len(s) - 2), generator=g),
            1.0 + seed,
        )
        for m, s in modules.items()
    }


def deltas(found: dict[str, tuple[Tensor, Tensor, float]]) -> Tensors:
    """s B A in float64, by the names of weights."""
    return {
        f"{m}.weight": ((B.double().flatten(1) @ A.double().flatten(1)) * (alpha / len(A))).view(
            B.shape[0], *A.shape[1:]
        )
        for m, (A, B, alpha) in found.items()
    }


def save(
    path: Path, found: dict[str, tuple[Tensor, Tensor, float]], form: str = "diffusers"
) -> Path:
    stems = {
        "diffusers": "unet.{}",
        "kohya": "lora_unet_{}",
        "peft": "base_model.model.{}",
        "bare": "{}",
    }
    down, up = ("lora_down", "lora_up") if form == "kohya" else ("lora_A", "lora_B")
    held: Tensors = {}
    for module, (A, B, alpha) in found.items():
        stem = stems[form].format(module.replace(".", "_") if form == "kohya" else module)
        held |= {
            f"{stem}.{down}.weight": A,
            f"{stem}.{up}.weight": B,
            f"{stem}.alpha": torch.tensor(alpha),
        }
    save_file(held, path)
    return path


def read(path: Path) -> Tensors:
    """The deltas of a merged LoRA, opened on a model of the shapes."""
    adapter = open_expert(path, {f"{m}.weight": torch.zeros(s) for m, s in SHAPES.items()})
    assert isinstance(adapter, Adapter) and not adapter.notes
    return dict(adapter)


def close(found: Tensors, expected: Tensors) -> None:
    assert set(found) == set(expected)
    for name, tensor in expected.items():
        torch.testing.assert_close(found[name].double(), tensor.double(), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("method", ["average", "task_arithmetic", "ties"])
@pytest.mark.parametrize("second", ["diffusers", "kohya", "peft", "bare"])
def test_two_lora_files_merge_their_deltas(method: str, second: str, tmp_path: Path) -> None:
    one, other = factors(2, 0), factors(3, 1)
    paths = [save(tmp_path / "a.safetensors", one), save(tmp_path / "b.safetensors", other, second)]
    rank = 5 if method != "ties" else 27
    merge(paths[0], [paths[1]], tmp_path / "o.safetensors", method=method, lora_rank=rank)
    zeros = {f"{m}.weight": torch.zeros(s, dtype=torch.float64) for m, s in SHAPES.items()}
    expected = merge_tensors(zeros, [deltas(one), deltas(other)], method)
    if method != "ties":
        a, b = deltas(one), deltas(other)
        close(expected, {n: (a[n] + b[n]) / 2 for n in a})
    close(read(tmp_path / "o.safetensors"), expected)
    held = load_file(tmp_path / "o.safetensors")
    assert all(name.startswith("unet.") and ".lora_" in name for name in held)


def test_factors_averaged_apart_would_be_another_model(tmp_path: Path) -> None:
    one, other = factors(2, 0), factors(2, 1)
    paths = [save(tmp_path / "a.safetensors", one), save(tmp_path / "b.safetensors", other)]
    merge(paths[0], [paths[1]], tmp_path / "o.safetensors", method="average")
    mean = {n: (deltas(one)[n] + deltas(other)[n]) / 2 for n in deltas(one)}
    apart = deltas(
        {m: tuple((x + y) / 2 for x, y in zip(one[m], other[m], strict=True)) for m in one}
    )  # type: ignore[misc]
    assert all(float((apart[n] - mean[n]).norm() / mean[n].norm()) > 0.3 for n in mean)
    close(read(tmp_path / "o.safetensors"), mean)


def test_the_rank_is_the_sum_of_the_ranks_unless_it_is_asked_for(tmp_path: Path) -> None:
    paths = [save(tmp_path / f"{i}.safetensors", factors(2 + i, i)) for i in range(3)]
    plan = plan_merge(Recipe.of(paths[0], paths[1:]))
    assert plan.recipe.lora_rank == 2 + 3 + 4 and [e.path for e in plan.recipe.experts] == list(
        map(str, paths)
    )
    assert any(
        "no base: the deltas of 3 LoRA files are merged, into a LoRA of rank 9" in n
        for n in plan.notes
    )
    assert (
        plan.recipe.no_base
        and plan_merge(Recipe.of(paths[0], paths[1:], no_base=True)).recipe == plan.recipe
    )
    result = plan_merge(
        Recipe.of(paths[0], paths[1:], lora_rank=2), tmp_path / "small.safetensors"
    ).run()
    assert result.adapter is not None and result.adapter.rank == 2 and 0 < result.adapter.share < 1


def test_one_file_alone_is_refused_unless_a_rank_is_asked_for(tmp_path: Path) -> None:
    path = save(tmp_path / "0.safetensors", factors(4, 0))
    with pytest.raises(UsageError, match="a LoRA alone"):
        plan_merge(Recipe.of(path, []))
    assert plan_merge(Recipe.of(path, [], lora_rank=2)).recipe.lora_rank == 2


def test_files_of_kohya_give_a_file_of_kohya(tmp_path: Path) -> None:
    one, other = factors(2, 0), factors(2, 1)
    paths = [save(tmp_path / f"{i}.safetensors", f, "kohya") for i, f in enumerate((one, other))]
    merge(paths[0], [paths[1]], tmp_path / "o.safetensors", weights=[0.7, 0.2])
    close(
        read(tmp_path / "o.safetensors"),
        {n: 0.7 * deltas(one)[n] + 0.2 * deltas(other)[n] for n in deltas(one)},
    )
    held = load_file(tmp_path / "o.safetensors")
    assert all(
        name.startswith("lora_unet_") and "." not in name.split(".lora_")[0].removesuffix(".alpha")
        for name in held
    )
    assert {float(t) for n, t in held.items() if n.endswith(".alpha")} == {4.0}


def test_a_module_that_one_file_lacks_has_no_delta_there(tmp_path: Path) -> None:
    shapes = dict(list(SHAPES.items())[:1])
    one, other = factors(2, 0), factors(2, 1, shapes)
    paths = [save(tmp_path / "b.safetensors", other), save(tmp_path / "a.safetensors", one)]
    merge(paths[0], [paths[1]], tmp_path / "o.safetensors")
    second = deltas(other)
    close(
        read(tmp_path / "o.safetensors"),
        {n: (t + second.get(n, 0)) / 2 for n, t in deltas(one).items()},
    )


def test_the_recipe_makes_the_same_bytes_again(tmp_path: Path) -> None:
    paths = [save(tmp_path / f"{i}.safetensors", factors(2, i)) for i in range(2)]
    merge(paths[0], [paths[1]], tmp_path / "out", method="average")
    out = tmp_path / "out" / "pytorch_lora_weights.safetensors"
    assert verify(tmp_path / "out", Recipe.read(tmp_path / "out")).files
    with safe_open(out, "pt") as file:
        assert file.metadata()["lora_alpha"] == "4"
    assert "adapter of rank 4" in (tmp_path / "out" / "README.md").read_text().lower()


def test_experts_of_unlike_bases_are_refused(tmp_path: Path) -> None:
    for i in range(2):
        (tmp_path / str(i)).mkdir()
        save(tmp_path / str(i) / "pytorch_lora_weights.safetensors", factors(2, i))
        text = '{"format": "demerge.expert/1", "range": [0, 500], "base_sha256": "%s"}' % (
            str(i) * 64
        )
        (tmp_path / str(i) / "expert.json").write_text(text)
    with pytest.raises(InputError, match="was finetuned from a base"):
        merge(tmp_path / "0", [tmp_path / "1"], tmp_path / "o.safetensors")


def test_what_needs_a_base_is_refused_with_the_command(tmp_path: Path) -> None:
    one = save(tmp_path / "a.safetensors", factors(2, 0))
    dora = load_file(one) | {"unet.conv_in.lora_magnitude_vector": torch.ones(6)}
    save_file(dora, tmp_path / "dora.safetensors")
    with pytest.raises(InputError, match="depends on its base") as caught:
        merge(one, [tmp_path / "dora.safetensors"], tmp_path / "o.safetensors")
    assert "demerge merge BASE" in caught.value.fix
    save_file(
        {f"{m}.weight": torch.zeros(s) for m, s in SHAPES.items()}, tmp_path / "model.safetensors"
    )
    with pytest.raises(UsageError, match="is a LoRA in the base's place") as usage:
        merge(one, [tmp_path / "model.safetensors"], tmp_path / "o.safetensors")
    assert f"demerge merge {tmp_path / 'model.safetensors'} {one}" in usage.value.fix
    with pytest.raises(InputError, match="cannot stand in the base's place"):
        MergeSession(one, [one])
    half = {
        "unet.conv_in.lora_A.weight": torch.ones(1, 3, 3, 3),
        "unet.conv_out.lora_B.weight": torch.ones(1, 1, 1, 1),
    }
    save_file(half, tmp_path / "half.safetensors")
    with pytest.raises(InputError, match="lacks one of its factors"):
        merge(one, [tmp_path / "half.safetensors"], tmp_path / "o.safetensors")
    odd = {
        "unet.conv_in.lora_A.weight": torch.ones(1, 3),
        "unet.conv_in.lora_B.weight": torch.ones(4, 2),
    }
    save_file(odd, tmp_path / "odd.safetensors")
    with pytest.raises(InputError, match=r"\[4, 2\] times \[1, 3\]"):
        merge(one, [tmp_path / "odd.safetensors"], tmp_path / "o.safetensors")
    other = save(tmp_path / "c.safetensors", factors(2, 0, {"conv_in": (6, 4, 3, 3)}))
    with pytest.raises(InputError, match="of the base is"):
        merge(one, [other], tmp_path / "o.safetensors")
    assert not (tmp_path / "o.safetensors").exists()


def test_zeros_take_no_memory_and_few_words(tmp_path: Path) -> None:
    base = NoBase([Checkpoint.open(save(tmp_path / "a.safetensors", factors(2, 0)))])
    assert (
        all(t.untyped_storage().nbytes() == 4 for t in base.values())
        and repr(base) == "NoBase(3 weights, rank 2)"
    )
