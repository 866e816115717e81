"""Diffusion: agreement with diffusers' own formulas, stock folders in and out, errors by name."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import diffusers
import pytest
import torch

from demerge.diffusion.model import Diffusion
from demerge.errors import InputError, UsageError

MakeTiny = Callable[..., Path]


@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction", "sample"])
def test_noise_and_target_are_those_of_diffusers(make_tiny: MakeTiny, prediction_type: str) -> None:
    model = Diffusion.load(make_tiny(prediction_type=prediction_type))
    stock = diffusers.DDPMScheduler.from_config(model.scheduler.config)
    x0, noise, t = torch.randn(4, 1, 8, 8), torch.randn(4, 1, 8, 8), torch.tensor([0, 10, 500, 999])
    torch.testing.assert_close(model.add_noise(x0, noise, t), stock.add_noise(x0, noise, t))
    expected = {"epsilon": noise, "sample": x0, "v_prediction": stock.get_velocity(x0, noise, t)}[
        prediction_type
    ]
    torch.testing.assert_close(model.target(x0, noise, t), expected)


def test_loss_is_the_mean_squared_error_of_each_sample(tiny: Path) -> None:
    model = Diffusion.load(tiny)
    x0, noise, t = torch.randn(3, 1, 8, 8), torch.randn(3, 1, 8, 8), torch.tensor([1, 300, 900])
    with torch.no_grad():
        loss = model.loss(x0, noise, t)
        each = [
            (
                (model.denoiser(model.add_noise(x0, noise, t)[i : i + 1], t[i]).sample - noise[i])
                ** 2
            ).mean()
            for i in range(3)
        ]
    torch.testing.assert_close(loss, torch.stack(each))


def test_saved_folder_is_a_stock_pipeline_with_the_same_weights(tiny: Path, tmp_path: Path) -> None:
    model = Diffusion.load(tiny)
    model.save(tmp_path)
    stock = diffusers.DiffusionPipeline.from_pretrained(tmp_path)
    assert type(stock) is diffusers.DDPMPipeline
    assert Diffusion.load(tmp_path).sha256 == model.sha256
    assert stock.scheduler.config.beta_schedule == model.scheduler.config.beta_schedule


def test_component_folder_stands_for_its_pipeline(tiny: Path) -> None:
    assert Diffusion.load(tiny / "unet").sha256 == Diffusion.load(tiny).sha256


def test_older_pipelines_keep_their_parts_in_the_root(make_tiny: MakeTiny, tmp_path: Path) -> None:
    """The layout of google/ddpm-cifar10-32: config, weights and scheduler next to model_index.json."""
    from demerge.merging import merge

    folder, expert = make_tiny(), make_tiny(seed=1)
    whole = Diffusion.load(folder)
    for part in ("unet", "scheduler"):
        for file in (folder / part).iterdir():
            file.rename(folder / file.name)
        (folder / part).rmdir()
    assert Diffusion.load(folder).sha256 == whole.sha256
    (tmp_path / "saved").mkdir()
    Diffusion.load(folder).save(tmp_path / "saved")
    assert Diffusion.load(tmp_path / "saved").sha256 == whole.sha256
    merge(folder, [expert], tmp_path / "merged", method="task_arithmetic", weights=[1.0])
    assert (
        type(diffusers.DiffusionPipeline.from_pretrained(tmp_path / "merged"))
        is diffusers.DDPMPipeline
    )
    assert Diffusion.load(tmp_path / "merged").sha256 == Diffusion.load(expert).sha256


def test_schedule_is_the_bases_own(make_tiny: MakeTiny) -> None:
    folder = make_tiny()
    file = folder / "scheduler" / "scheduler_config.json"
    file.write_text(
        json.dumps({**json.loads(file.read_text()), "beta_schedule": "squaredcos_cap_v2"})
    )
    expected = diffusers.DDPMScheduler(beta_schedule="squaredcos_cap_v2").alphas_cumprod
    torch.testing.assert_close(Diffusion.load(folder).alphas_cumprod, expected.double())


def test_missing_weight_is_refused_and_not_filled_at_random(tiny: Path, tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    folder = tmp_path / "m"
    shutil.copytree(tiny, folder)
    file = next((folder / "unet").glob("*.safetensors"))
    tensors = load_file(file)
    tensors.pop("conv_in.weight")
    save_file(tensors, file)
    with pytest.raises(InputError, match=r"conv_in\.weight"):
        Diffusion.load(folder)


def test_foreign_class_in_the_index_is_refused(tiny: Path, tmp_path: Path) -> None:
    folder = tmp_path / "m"
    shutil.copytree(tiny, folder)
    file = folder / "model_index.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "unet": ["evil", "Payload"]}))
    with pytest.raises(InputError, match="Payload"):
        Diffusion.load(folder)


def test_unknown_name_says_what_was_looked_for(tmp_path: Path) -> None:
    with pytest.raises(
        InputError, match="neither a local file or folder nor a model that the Hub gives"
    ):
        Diffusion.load("nobody/nothing")
    with pytest.raises(InputError, match="no such folder"):
        Diffusion.load(tmp_path / "none")


def test_wrong_image_size_names_both_shapes(tiny: Path) -> None:
    with pytest.raises(UsageError, match=r"\(1, 16, 16\).*\(1, 8, 8\)"):
        Diffusion.load(tiny).encode(torch.zeros(1, 1, 16, 16))


def test_text_to_image_pipeline_loads_encodes_and_saves(tiny_text: Path, tmp_path: Path) -> None:
    model = Diffusion.load(tiny_text)
    x0, condition = model.encode(torch.zeros(2, 3, 16, 16), ["a cat", "a dog"])
    assert x0.shape == (2, *model.sample_shape)
    assert [len(tensor) for tensor in condition.values()] == [2]
    with torch.no_grad():
        assert model.loss(x0, torch.randn_like(x0), torch.tensor([5, 700]), condition).shape == (2,)
    model.save(tmp_path)
    assert Diffusion.load(tmp_path).sha256 == model.sha256
    stock = diffusers.DiffusionPipeline.from_pretrained(tmp_path)
    assert type(stock) is diffusers.StableDiffusionPipeline


def test_dit_loads_encodes_and_saves_as_a_stock_pipeline(tiny_dit: Path, tmp_path: Path) -> None:
    model = Diffusion.load(tiny_dit)
    x0, condition = model.encode(torch.zeros(2, 3, 16, 16), labels=[3, 10])
    labels = condition["class_labels"]
    assert (x0.shape, labels.tolist()) == ((2, 4, 8, 8), [3, 10])
    with torch.no_grad():
        noise, t = torch.randn_like(x0), torch.tensor([5, 700])
        output = model.denoiser(model.add_noise(x0, noise, t), t, class_labels=labels).sample
        assert output.shape[1] == 8  # half of it is the learned variance
        torch.testing.assert_close(
            model.loss(x0, noise, t, condition), (output[:, :4] - noise).square().mean((1, 2, 3))
        )
    model.save(tmp_path)
    assert Diffusion.load(tmp_path / "transformer").sha256 == model.sha256
    stock = diffusers.DiffusionPipeline.from_pretrained(tmp_path)
    assert type(stock) is diffusers.DiTPipeline
    assert (
        len(
            stock(
                class_labels=[1], num_inference_steps=2, guidance_scale=1.0, output_type="np"
            ).images
        )
        == 1
    )


def test_dit_under_its_old_class_name(tiny_dit: Path, tmp_path: Path) -> None:
    """The files of facebook/DiT-XL-2-256 name the class Transformer2DModel, which was several models in one."""
    folder = tmp_path / "old"
    shutil.copytree(tiny_dit, folder)
    index, config = folder / "model_index.json", folder / "transformer" / "config.json"
    index.write_text(
        json.dumps(
            {**json.loads(index.read_text()), "transformer": ["diffusers", "Transformer2DModel"]}
        )
    )
    config.write_text(
        json.dumps({**json.loads(config.read_text()), "_class_name": "Transformer2DModel"})
    )
    assert Diffusion.load(folder).sha256 == Diffusion.load(tiny_dit).sha256
    config.write_text(
        json.dumps({**json.loads(config.read_text()), "norm_type": "ada_norm_single"})
    )
    with pytest.raises(InputError, match=r"transformer/config\.json: cannot be loaded"):
        Diffusion.load(folder)


def test_an_index_without_denoiser_says_so(tiny: Path, tmp_path: Path) -> None:
    folder = tmp_path / "m"
    shutil.copytree(tiny, folder)
    file = folder / "model_index.json"
    file.write_text(
        json.dumps(
            {name: value for name, value in json.loads(file.read_text()).items() if name != "unet"}
        )
    )
    with pytest.raises(InputError, match="no component 'unet'"):
        Diffusion.load(folder)
