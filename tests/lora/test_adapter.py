"""LoRA files as experts: every family of names gives the exact delta; others are refused."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor
from torch.nn import functional as F

from demerge.errors import InputError
from demerge.lora import Adapter, open_expert
from demerge.merging import MergeSession, merge_tensors
from demerge.storage.atomic import sha256
from demerge.storage.checkpoint import Checkpoint

TO_Q = "down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_q"
TO_OUT = "mid_block.attentions.0.transformer_blocks.0.attn2.to_out.0"
CONV = "down_blocks.0.resnets.0.conv1"
SHORTCUT = "down_blocks.1.resnets.0.conv_shortcut"
R = 3
Tensors = dict[str, Tensor]
Save = Callable[..., Path]


@pytest.fixture(scope="module")
def model() -> torch.nn.Module:
    """A UNet of Stable Diffusion's shape: four blocks of two resnets, attention in the first three."""
    import diffusers

    with torch.random.fork_rng():
        torch.manual_seed(0)
        return diffusers.UNet2DConditionModel(
            sample_size=8,
            block_out_channels=(4, 8, 8, 8),
            norm_num_groups=2,
            attention_head_dim=2,
            cross_attention_dim=6,
        )


@pytest.fixture(scope="module")
def base(model: torch.nn.Module) -> Tensors:
    return dict(model.state_dict())


@pytest.fixture
def save(tmp_path: Path) -> Save:
    def write(tensors: Tensors, name: str = "lora.safetensors", **metadata: str) -> Path:
        save_file({n: t.clone() for n, t in tensors.items()}, tmp_path / name, metadata or None)
        return tmp_path / name

    return write


def factors(weight: Tensor, seed: int = 0, r: int = R) -> tuple[Tensor, Tensor]:
    """A [r in *] and B [out r *] for a weight."""
    g = torch.Generator().manual_seed(seed)
    ones = (1,) * (weight.ndim - 2)
    return torch.randn(r, *weight.shape[1:], generator=g), torch.randn(
        weight.shape[0], r, *ones, generator=g
    )


def product(A: Tensor, B: Tensor, shape: torch.Size) -> Tensor:
    return (B.double().flatten(1) @ A.double().flatten(1)).view(shape)


def opened(path: Path, base: Tensors, **options: Any) -> Adapter:
    adapter = open_expert(path, base, **options)
    assert isinstance(adapter, Adapter)
    return adapter


def only(path: Path, base: Tensors, module: str) -> Tensor:
    """The delta of the only module that a file changes."""
    adapter = opened(path, base)
    assert list(adapter) == [f"{module}.weight"] and adapter.holds_deltas
    delta = adapter[f"{module}.weight"]
    assert delta.shape == base[f"{module}.weight"].shape and delta.dtype == torch.float32
    return delta


# -- names -----------------------------------------------------------------------------------------

FORMS = {
    "diffusers": ("unet.{}.lora_A.weight", "unet.{}.lora_B.weight"),
    "bare": ("{}.lora_A.weight", "{}.lora_B.weight"),
    "peft": ("base_model.model.{}.lora_A.weight", "base_model.model.{}.lora_B.weight"),
    "peft, adapter's name": (
        "base_model.model.{}.lora_A.default.weight",
        "base_model.model.{}.lora_B.default.weight",
    ),
    "diffusers 0.2x": ("unet.{}.lora.down.weight", "unet.{}.lora.up.weight"),
    "linear layer": (
        "unet.{}.lora_linear_layer.down.weight",
        "unet.{}.lora_linear_layer.up.weight",
    ),
    "dotted kohya": ("{}.lora_down.weight", "{}.lora_up.weight"),
}


@pytest.mark.parametrize(
    "module", [TO_Q, TO_OUT, CONV, SHORTCUT, "conv_in", "time_embedding.linear_1"]
)
@pytest.mark.parametrize("form", FORMS.values(), ids=FORMS)
def test_reads_the_names_of_diffusers_and_peft(
    form: tuple[str, str], module: str, base: Tensors, save: Save
) -> None:
    weight = base[f"{module}.weight"]
    A, B = factors(weight)
    path = save({form[0].format(module): A, form[1].format(module): B})
    assert torch.equal(only(path, base, module), product(A, B, weight.shape).float())


@pytest.mark.parametrize(("module", "key"), [(TO_Q, "to_q_lora"), (TO_OUT, "to_out_lora")])
def test_reads_the_names_of_attention_processors(
    module: str, key: str, base: Tensors, save: Save
) -> None:
    stem = module.removesuffix(".0").rpartition(".")[0]
    A, B = factors(base[f"{module}.weight"])
    path = save(
        {f"unet.{stem}.processor.{key}.down.weight": A, f"unet.{stem}.processor.{key}.up.weight": B}
    )
    assert torch.equal(
        only(path, base, module), product(A, B, base[f"{module}.weight"].shape).float()
    )


KOHYA = {
    "down_blocks_0_attentions_0_transformer_blocks_0_attn1_to_q": TO_Q,
    "mid_block_attentions_0_transformer_blocks_0_attn2_to_out_0": TO_OUT,
    "down_blocks_2_attentions_1_transformer_blocks_0_ff_net_2": "down_blocks.2.attentions.1.transformer_blocks.0.ff.net.2",
    "up_blocks_1_upsamplers_0_conv": "up_blocks.1.upsamplers.0.conv",
    "input_blocks_0_0": "conv_in",
    "out_2": "conv_out",
    "time_embed_2": "time_embedding.linear_2",
    "input_blocks_1_1_transformer_blocks_0_attn1_to_q": TO_Q,
    "input_blocks_1_0_in_layers_2": CONV,
    "input_blocks_3_0_op": "down_blocks.0.downsamplers.0.conv",
    "input_blocks_4_0_skip_connection": SHORTCUT,
    "input_blocks_8_1_proj_out": "down_blocks.2.attentions.1.proj_out",
    "input_blocks_11_0_out_layers_3": "down_blocks.3.resnets.1.conv2",
    "middle_block_0_emb_layers_1": "mid_block.resnets.0.time_emb_proj",
    "middle_block_1_proj_in": "mid_block.attentions.0.proj_in",
    "middle_block_2_in_layers_2": "mid_block.resnets.1.conv1",
    "output_blocks_0_0_in_layers_2": "up_blocks.0.resnets.0.conv1",
    "output_blocks_2_1_conv": "up_blocks.0.upsamplers.0.conv",
    "output_blocks_5_1_proj_in": "up_blocks.1.attentions.2.proj_in",
    "output_blocks_5_2_conv": "up_blocks.1.upsamplers.0.conv",
    "output_blocks_11_1_proj_in": "up_blocks.3.attentions.2.proj_in",
}  # fmt: skip


@pytest.mark.parametrize(("name", "module"), KOHYA.items(), ids=KOHYA)
def test_reads_the_names_of_kohya(name: str, module: str, base: Tensors, save: Save) -> None:
    weight = base[f"{module}.weight"]
    A, B = factors(weight)
    stem = f"lora_unet_{name}"
    path = save(
        {
            f"{stem}.lora_down.weight": A,
            f"{stem}.lora_up.weight": B,
            f"{stem}.alpha": torch.tensor(1.5),
        }
    )
    assert torch.equal(only(path, base, module), (product(A, B, weight.shape) * (1.5 / R)).float())


@pytest.fixture(scope="module")
def original(base: Tensors) -> dict[str, str]:
    """Diffusers' names of some modules, by those of a single file of the original Stable Diffusion."""
    words = ("input_blocks", "middle_block", "output_blocks", "time_embed", "in_layers", "out_layers", "emb_layers",
             "skip_connection", "transformer_blocks", "proj_in", "proj_out", "to_q", "to_out")  # fmt: skip
    dotted = {}
    for flat, module in KOHYA.items():
        if flat.startswith(("input", "middle", "output", "out_", "time")):
            for word in words:
                flat = flat.replace(word, word.replace("_", "-"))
            dotted[flat.replace("_", ".").replace("-", "_")] = module
    return dotted


def test_lora_of_kohya_and_diffusers_find_the_names_of_a_single_file(
    original: dict[str, str], base: Tensors, save: Save
) -> None:
    single = {
        f"model.diffusion_model.{name}.weight": base[f"{module}.weight"]
        for name, module in original.items()
    }
    single["first_stage_model.encoder.conv_in.weight"] = torch.zeros(4, 3, 3, 3)
    single["model_ema.diffusion_modelinput_blocks41proj_inweight"] = torch.zeros(4, 4)
    assert len(single) == len(original) + 2 > 15
    for name, module in original.items():
        weight = base[f"{module}.weight"]
        A, B = factors(weight)
        stems = [f"lora_unet_{name.replace('.', '_')}", f"lora_unet_{module.replace('.', '_')}", f"unet.{module}",
                 f"diffusion_model.{name}", f"base_model.model.{module}"]  # fmt: skip
        for stem in stems:
            path = save(
                {
                    f"{stem}.lora_down.weight": A,
                    f"{stem}.lora_up.weight": B,
                    f"{stem}.alpha": torch.tensor(1.5),
                }
            )
            adapter = opened(path, single)
            assert list(adapter) == [f"model.diffusion_model.{name}.weight"], stem
            expected = (product(A, B, weight.shape) * (1.5 / R)).float()
            assert torch.equal(adapter[f"model.diffusion_model.{name}.weight"], expected)


def test_modules_that_are_not_in_the_base_are_counted(base: Tensors, save: Save) -> None:
    others = {
        f"lora_unet_x_{i}.lora_{side}.weight": torch.ones(2, 2)
        for i in range(3)
        for side in ("down", "up")
    }
    with pytest.raises(InputError, match="3 of 4 modules are not in the base"):
        open_expert(save(PAIR | others), base)


def test_linear_factors_fit_a_convolution_of_one_pixel_and_the_other_way(
    base: Tensors, save: Save
) -> None:
    A, B = factors(base[f"{SHORTCUT}.weight"])
    path = save(
        {f"{SHORTCUT}.lora_A.weight": A.flatten(1), f"{SHORTCUT}.lora_B.weight": B.flatten(1)}
    )
    assert torch.equal(
        only(path, base, SHORTCUT), product(A, B, base[f"{SHORTCUT}.weight"].shape).float()
    )
    A, B = factors(base[f"{TO_Q}.weight"])
    path = save(
        {f"{TO_Q}.lora_A.weight": A[..., None, None], f"{TO_Q}.lora_B.weight": B[..., None, None]}
    )
    assert torch.equal(only(path, base, TO_Q), product(A, B, base[f"{TO_Q}.weight"].shape).float())


def test_old_names_of_attention_in_the_base_are_found(save: Save) -> None:
    base = {
        "mid.attentions.0.query.weight": torch.zeros(4, 4),
        "mid.attentions.0.proj_attn.weight": torch.zeros(4, 4),
    }
    A, B = factors(torch.zeros(4, 4))
    names = {"mid.attentions.0.to_q": 1, "mid.attentions.0.to_out.0": 2}
    tensors = {f"{n}.lora_A.weight": A * i for n, i in names.items()} | {
        f"{n}.lora_B.weight": B for n in names
    }
    adapter = opened(save(tensors), base)
    assert list(adapter) == list(base)
    assert torch.equal(
        adapter["mid.attentions.0.proj_attn.weight"], product(2 * A, B, torch.Size([4, 4])).float()
    )


# -- scale -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("config", "scale"),
    [
        ({}, 1.0),
        ({"lora_alpha": 6}, 6 / R),
        ({"r": R, "lora_alpha": 6, "use_rslora": True}, 6 / math.sqrt(R)),
        ({"use_rslora": True}, R / math.sqrt(R)),
        (
            {
                "r": 8,
                "lora_alpha": 8,
                "rank_pattern": {"to_q": R},
                "alpha_pattern": {"attn1.to_q": 5},
            },
            5 / R,
        ),
        ({"lora_alpha": 8, "alpha_pattern": {f"^{TO_Q}": 5, "to_q": 9}}, 5 / R),
        ({"lora_alpha": 8, "alpha_pattern": {"^to_q": 5, "o_q": 7}}, 8 / R),
        ({"peft_type": "LORA", "r": R, "lora_alpha": 0}, 0.0),
    ],
)
def test_alpha_comes_from_the_configuration(
    config: dict[str, Any], scale: float, base: Tensors, save: Save, tmp_path: Path
) -> None:
    A, B = factors(base[f"{TO_Q}.weight"])
    tensors = {f"unet.{TO_Q}.lora_A.weight": A, f"unet.{TO_Q}.lora_B.weight": B}
    expected = (product(A, B, base[f"{TO_Q}.weight"].shape) * scale).float()
    flat = json.dumps({f"unet.{key}": value for key, value in config.items()})
    assert torch.equal(only(save(tensors, lora_adapter_metadata=flat), base, TO_Q), expected)
    save(tensors, "adapter_model.safetensors")
    (tmp_path / "adapter_config.json").write_text(json.dumps(config))
    adapter = opened(tmp_path / "adapter_model.safetensors", base)
    assert torch.equal(adapter[f"{TO_Q}.weight"], expected)
    assert [f.name for f in adapter.place.files] == [
        "adapter_model.safetensors",
        "adapter_config.json",
    ]


def test_a_folder_that_peft_wrote_is_an_expert(base: Tensors, save: Save, tmp_path: Path) -> None:
    A, B = factors(base[f"{TO_Q}.weight"])
    save(
        {f"base_model.model.{TO_Q}.lora_A.weight": A, f"base_model.model.{TO_Q}.lora_B.weight": B},
        "adapter_model.safetensors",
    )
    (tmp_path / "adapter_config.json").write_text(
        json.dumps({"peft_type": "LORA", "r": R, "lora_alpha": 6})
    )
    assert opened(tmp_path, base).ranks == {f"{TO_Q}.weight": R}


@pytest.mark.parametrize("name", ["my_style.safetensors", "adapter_model.safetensors"])
def test_the_configuration_in_the_folder_is_that_of_a_renamed_file(
    name: str, base: Tensors, save: Save, tmp_path: Path
) -> None:
    A, B = factors(base[f"{TO_Q}.weight"])
    path = save(
        {f"base_model.model.{TO_Q}.lora_A.weight": A, f"base_model.model.{TO_Q}.lora_B.weight": B},
        name,
    )
    config = {
        "peft_type": "LORA",
        "r": R,
        "lora_alpha": 16,
        "use_rslora": True,
        "target_modules": ["to_q"],
        "lora_dropout": 0.1,
    }
    (tmp_path / "adapter_config.json").write_text(json.dumps(config))
    for given in (path, tmp_path):
        adapter = opened(given, base)
        expected = product(A, B, base[f"{TO_Q}.weight"].shape) * (16 / math.sqrt(R))
        assert torch.equal(adapter[f"{TO_Q}.weight"], expected.float()) and not adapter.notes
        assert [file.name for file in adapter.place.files] == [name, "adapter_config.json"]


@pytest.mark.parametrize(
    ("metadata", "scale"),
    [
        ({"lora_alpha": "6"}, 6 / R),
        ({"lora_alpha": "16", "use_rslora": "true"}, 16 / math.sqrt(R)),
        ({"lora_alpha": "16.0", "use_rslora": "True", "r": "3"}, 16 / math.sqrt(R)),
        ({"ss_network_alpha": "1.5", "ss_network_dim": "3", "ss_tag": "{"}, 0.5),
        ({"ss_network_alpha": "None", "network_alpha": "6"}, 6 / R),
        ({"alpha_pattern": '{"to_q": 9}', "lora_alpha": "1"}, 9 / R),
    ],
)
def test_alpha_comes_from_the_metadata_of_the_file(
    metadata: dict[str, str], scale: float, base: Tensors, save: Save
) -> None:
    A, B = factors(base[f"{TO_Q}.weight"])
    path = save({f"{TO_Q}.lora_A.weight": A, f"{TO_Q}.lora_B.weight": B}, **metadata)
    assert torch.equal(
        only(path, base, TO_Q), (product(A, B, base[f"{TO_Q}.weight"].shape) * scale).float()
    )
    assert not opened(path, base).notes


def test_an_alpha_that_nothing_gives_is_told(base: Tensors, save: Save, tmp_path: Path) -> None:
    (note,) = opened(save(PAIR), base).notes
    assert "lora.safetensors" in note and "alpha not given: taken as r, so the scale is 1" in note
    (note,) = opened(save(PAIR, use_rslora="true"), base).notes
    assert "sqrt(r)" in note
    assert MergeSession(base, [opened(save(PAIR), base)]).notes == list(
        opened(save(PAIR), base).notes
    )
    more = {
        f"{TO_OUT}.lora_A.weight": torch.ones(R, 8),
        f"{TO_OUT}.lora_B.weight": torch.ones(8, R),
    }
    (note,) = opened(save(PAIR | more | {f"{TO_OUT}.alpha": torch.tensor(2.0)}), base).notes
    assert "alpha not given for 1 of 2 modules" in note
    assert not opened(save(PAIR | {f"{TO_Q}.alpha": torch.tensor(2.0)}), base).notes
    kohya = {
        n.replace("lora_A", "lora_down").replace("lora_B", "lora_up"): t for n, t in PAIR.items()
    }
    (tmp_path / "adapter_config.json").write_text(
        '{"lora_alpha": 16}'
    )  # of another file: these are not peft's names
    assert "alpha not given" in opened(save(kohya), base).notes[0]


def test_two_configurations_that_differ_are_refused(
    base: Tensors, save: Save, tmp_path: Path
) -> None:
    path = save(PAIR, lora_alpha="8")
    (tmp_path / "adapter_config.json").write_text('{"lora_alpha": 16, "r": 3}')
    with pytest.raises(
        InputError, match=r"lora_alpha is 16 in .*adapter_config\.json, 8 in its metadata"
    ):
        open_expert(path, base)


def test_adapters_are_short_in_words(base: Tensors, save: Save) -> None:
    assert repr(opened(save(PAIR), base)).endswith("lora.safetensors', 1 deltas, rank 3)")


# -- other shapes of a LoRA ------------------------------------------------------------------------


def test_a_convolution_is_two_convolutions_in_a_row(base: Tensors, save: Save) -> None:
    weight = base[f"{CONV}.weight"]
    A, B = (t.double() for t in factors(weight))
    delta = only(save({f"{CONV}.lora_A.weight": A, f"{CONV}.lora_B.weight": B}), base, CONV)
    x = torch.randn(2, weight.shape[1], 5, 5, dtype=torch.float64)
    torch.testing.assert_close(
        F.conv2d(x, delta.double(), padding=1),
        F.conv2d(F.conv2d(x, A, padding=1), B),
        rtol=1e-4,
        atol=1e-5,
    )


def test_a_middle_factor_is_a_convolution_in_between(base: Tensors, save: Save) -> None:
    weight, g = base[f"{CONV}.weight"], torch.Generator().manual_seed(0)
    A = torch.randn(2, weight.shape[1], 1, 1, generator=g)
    M = torch.randn(R, 2, 3, 3, generator=g)
    B = torch.randn(weight.shape[0], R, 1, 1, generator=g)
    stem = "lora_unet_" + CONV.replace(".", "_")
    path = save(
        {f"{stem}.lora_down.weight": A, f"{stem}.lora_mid.weight": M, f"{stem}.lora_up.weight": B}
    )
    x = torch.randn(2, weight.shape[1], 5, 5)
    three = F.conv2d(F.conv2d(F.conv2d(x, A), M, padding=1), B)
    torch.testing.assert_close(
        F.conv2d(x, only(path, base, CONV), padding=1), three, rtol=1e-4, atol=1e-4
    )


@pytest.mark.parametrize("module", [TO_Q, CONV])
@pytest.mark.parametrize(
    "key", ["lora_magnitude_vector", "lora_magnitude_vector.weight", "dora_scale"]
)
def test_dora_sets_the_length_of_each_output(
    module: str, key: str, base: Tensors, save: Save
) -> None:
    weight = base[f"{module}.weight"]
    A, B = factors(weight)
    m = torch.rand(weight.shape[0]) + 0.5
    path = save({f"{module}.lora_A.weight": A, f"{module}.lora_B.weight": B, f"{module}.{key}": m})
    merged = weight + only(path, base, module)
    V = weight + product(A, B, weight.shape).float()
    torch.testing.assert_close(merged.flatten(1).norm(dim=1), m, rtol=1e-4, atol=1e-5)
    assert (F.cosine_similarity(merged.flatten(1), V.flatten(1)) > 1 - 1e-5).all()


def test_a_dora_scale_of_a_row_is_for_the_inputs(base: Tensors, save: Save) -> None:
    weight = base[f"{CONV}.weight"]
    A, B = factors(weight)
    m = torch.rand(1, weight.shape[1], 1, 1) + 0.5
    path = save({f"{CONV}.lora_A.weight": A, f"{CONV}.lora_B.weight": B, f"{CONV}.dora_scale": m})
    merged = weight + only(path, base, CONV)
    torch.testing.assert_close(
        merged.transpose(0, 1).flatten(1).norm(dim=1), m.view(-1), rtol=1e-4, atol=1e-5
    )


def test_a_dora_row_of_zeros_stays_zero(save: Save) -> None:
    tensors = {
        "x.lora_A.weight": torch.zeros(1, 2),
        "x.lora_B.weight": torch.zeros(2, 1),
        "x.dora_scale": torch.ones(2),
    }
    delta = opened(save(tensors), {"x.weight": torch.tensor([[0.0, 0.0], [0.0, 2.0]])})["x.weight"]
    assert delta.tolist() == [[0, 0], [0, -1]]


# -- refusals --------------------------------------------------------------------------------------

PAIR = {f"{TO_Q}.lora_A.weight": torch.ones(R, 4), f"{TO_Q}.lora_B.weight": torch.ones(4, R)}
BAD: dict[str, tuple[Tensors, str]] = {
    "half a LoHa": ({"lora_unet_conv_in.hada_w1_a": torch.ones(2, 2)}, "without hada_w1_b"),
    "half a LoKr": ({"unet.conv_in.lokr_w1": torch.ones(2, 2)}, "without lokr_w2_a"),
    "LoKr of another size": (
        {"unet.conv_in.lokr_w1": torch.ones(2, 2), "unet.conv_in.lokr_w2": torch.ones(2, 2)},
        "the LoKr of unet.conv_in is [4, 4]",
    ),
    "LoHa and LoRA": (
        PAIR | {f"{TO_Q}.hada_w1_a": torch.ones(2, 2)},
        "factors of LoRA and LoHa",
    ),
    "LoKr's first core": ({"unet.conv_in.lokr_t1": torch.ones(2, 2)}, "LoKr with a core"),
    "IA3": ({"base_model.model.conv_in.ia3_l": torch.ones(2)}, "IA3"),
    "OFT": ({"lora_unet_conv_in.oft_blocks": torch.ones(2)}, "OFT"),
    "bias": (PAIR | {f"{TO_Q}.lora_B.bias": torch.ones(4)}, "trained biases"),
    "difference of another shape": (PAIR | {"conv_in.diff": torch.ones(4)}, "the difference of"),
    "set weight": (PAIR | {"conv_in.set_weight": torch.ones(4)}, "in place of the base's"),
    "other keys": (PAIR | {"base_model.model.conv_norm_out.weight": torch.ones(4)}, "not factors"),
    "text encoder": (
        PAIR | {"lora_te_text_model_q.lora_down.weight": torch.ones(2, 2)},
        "text encoder",
    ),
    "text encoder alone": ({"text_encoder.q.lora_A.weight": torch.ones(2, 2)}, "text encoder"),
    "unknown module": (
        {"lora_unet_double_blocks_0_img_attn_qkv.lora_down.weight": torch.ones(2, 2)},
        "double_blocks_0",
    ),
    "no up": ({f"{TO_Q}.lora_A.weight": torch.ones(R, 4)}, "without up"),
    "only alpha of a module": (PAIR | {f"{TO_OUT}.alpha": torch.ones(())}, "without down and up"),
    "rank differs": (PAIR | {f"{TO_Q}.lora_B.weight": torch.ones(4, 2)}, "times"),
    "other width": (PAIR | {f"{TO_Q}.lora_A.weight": torch.ones(R, 5)}, "of the base is"),
    "rank 0": (
        {f"{TO_Q}.lora_A.weight": torch.ones(0, 4), f"{TO_Q}.lora_B.weight": torch.ones(4, 0)},
        "times",
    ),
    "scalar factor": (PAIR | {f"{TO_Q}.lora_A.weight": torch.ones(())}, "times"),
    "integers": (PAIR | {f"{TO_Q}.lora_A.weight": torch.ones(R, 4, dtype=torch.int64)}, "I64"),
    "two alphas": (PAIR | {f"{TO_Q}.alpha": torch.ones(2)}, "not one number"),
    "alpha of NaN": (PAIR | {f"{TO_Q}.alpha": torch.tensor(math.nan)}, "nan"),
    "magnitude of another length": (PAIR | {f"{TO_Q}.dora_scale": torch.ones(3)}, "dora_scale"),
    "twice": (PAIR | {f"unet.{n}": t for n, t in PAIR.items()}, "two deltas"),
}


@pytest.mark.parametrize(("tensors", "words"), BAD.values(), ids=BAD)
def test_refuses_by_name(tensors: Tensors, words: str, base: Tensors, save: Save) -> None:
    with pytest.raises(InputError) as caught:
        open_expert(save(tensors), base)
    assert (
        words in caught.value.what and "lora.safetensors" in caught.value.what and caught.value.fix
    )


@pytest.mark.parametrize(
    ("config", "words"),
    [
        ({"peft_type": "OFT"}, "OFT"),
        ({"use_dora": True}, "magnitude"),
        ({"fan_in_fan_out": True}, "fan_in_fan_out"),
        ({"init_lora_weights": "pissa_niter_4"}, "pissa"),
        ({"lora_alpha": "many"}, "lora_alpha"),
        ({"lora_alpha": float("nan")}, "NaN"),
        ({"use_rslora": "maybe"}, "use_rslora"),
        ({"bias": "lora_only"}, "bias lora_only"),
        ({"modules_to_save": ["conv_out"]}, "modules_to_save"),
        ({"layer_replication": [[0, 2], [1, 3]]}, "layer_replication"),
        ({"target_parameters": ["x"]}, "target_parameters"),
        ({"use_newer_math": True}, "use_newer_math"),
        ({"r": 5}, "rank 3"),
        ({"alpha_pattern": {"(a+)+$": 2}}, "regular expression"),
        ({"alpha_pattern": [1]}, "alpha_pattern"),
    ],
)
def test_refuses_configurations_by_name(
    config: dict[str, Any], words: str, base: Tensors, save: Save, tmp_path: Path
) -> None:
    path = save(PAIR, "adapter_model.safetensors")
    (tmp_path / "adapter_config.json").write_text(json.dumps(config))
    with pytest.raises(InputError, match="adapter_") as caught:
        open_expert(path, base)
    assert words in caught.value.what


@pytest.mark.parametrize("text", ["{", "[1]", '{"unet.r": "x"}'])
def test_refuses_damaged_metadata(text: str, base: Tensors, save: Save) -> None:
    with pytest.raises(InputError, match=r"lora\.safetensors"):
        open_expert(save(PAIR, lora_adapter_metadata=text), base)


def test_a_text_encoder_is_left_out_where_that_is_allowed(base: Tensors, save: Save) -> None:
    extra = "lora_te1_text_model_encoder_layers_0_mlp_fc1.lora_down.weight"
    adapter = opened(save(PAIR | {extra: torch.ones(2, 2)}), base, skip_text=True)
    assert list(adapter) == [f"{TO_Q}.weight"] and adapter.skipped == (extra,)


def test_values_that_are_not_finite_are_named_when_they_are_read(base: Tensors, save: Save) -> None:
    adapter = opened(save(PAIR | {f"{TO_Q}.lora_A.weight": torch.full((R, 4), math.inf)}), base)
    with pytest.raises(InputError, match=r"lora_A\.weight holds NaN"):
        adapter[f"{TO_Q}.weight"].sum()


# -- as an expert ----------------------------------------------------------------------------------


def test_merges_like_the_model_that_it_makes_of_the_base(base: Tensors, save: Save) -> None:
    A, B = factors(base[f"{TO_Q}.weight"])
    adapter = opened(save({f"{TO_Q}.lora_A.weight": A * 0.01, f"{TO_Q}.lora_B.weight": B}), base)
    fused = base | {n: base[n] + d for n, d in adapter.items()}
    g = torch.Generator().manual_seed(1)
    other = {n: t + 0.01 * torch.randn(t.shape, generator=g) for n, t in base.items()}
    for method in ("task_arithmetic", "ties"):
        merged = merge_tensors(base, [adapter, other], method)
        expected = merge_tensors(base, [fused, other], method)
        for name in base:
            torch.testing.assert_close(merged[name], expected[name], rtol=1e-5, atol=1e-6)


def test_a_model_is_opened_as_a_model_under_the_names_of_the_base(save: Save) -> None:
    old = {
        "mid.attentions.0.query.weight": torch.ones(2, 2),
        "mid.attentions.0.proj_attn.bias": torch.ones(2),
    }
    new = {
        "mid.attentions.0.to_q.weight": torch.ones(2, 2),
        "mid.attentions.0.to_out.0.bias": torch.ones(2),
    }
    for base, other in ((old, new), (new, old), (new, new)):
        expert = open_expert(save(other), base)
        assert isinstance(expert, Checkpoint) and set(expert) == set(base)
        assert (
            expert[
                "mid.attentions.0.query.weight" if base is old else "mid.attentions.0.to_q.weight"
            ].sum()
            == 4
        )


@pytest.mark.parity
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"use_rslora": True},
        {"use_dora": True},
        {"rank_pattern": {"to_q": 2}, "alpha_pattern": {"conv1": 3}},
    ],
)
def test_agrees_with_peft(options: dict[str, Any], model: torch.nn.Module, tmp_path: Path) -> None:
    peft = pytest.importorskip("peft")
    import copy

    config = peft.LoraConfig(
        r=R, lora_alpha=6, target_modules=["to_q", "to_out.0", "conv1", "conv_shortcut"], **options
    )
    before = {n: t.clone() for n, t in model.state_dict().items()}
    wrapped = peft.get_peft_model(copy.deepcopy(model), config)
    g = torch.Generator().manual_seed(0)
    for name, parameter in wrapped.named_parameters():
        if "lora_" in name and "magnitude" not in name:
            parameter.data = torch.randn(parameter.shape, generator=g)
    wrapped.save_pretrained(tmp_path)
    adapter = opened(tmp_path, before)
    after = wrapped.merge_and_unload().state_dict()
    changed = [n for n in before if not torch.equal(before[n], after[n])]
    assert changed and set(changed) == set(adapter)
    for name in changed:
        torch.testing.assert_close(before[name] + adapter[name], after[name], rtol=1e-4, atol=1e-4)
    assert sha256(adapter.place.files[1]) == sha256(tmp_path / "adapter_config.json")


@pytest.mark.parity
@pytest.mark.parametrize(
    ("kind", "options"),
    [
        ("LoHa", {}),
        ("LoHa", {"use_effective_conv2d": True}),
        ("LoKr", {}),
        ("LoKr", {"decompose_both": True, "r": 1, "alpha": 4}),
        ("LoKr", {"use_effective_conv2d": True, "r": 1, "alpha": 3}),
        ("LoKr", {"decompose_factor": 2, "r": 99}),
    ],
)
def test_loha_and_lokr_agree_with_peft(
    kind: str, options: dict[str, Any], model: torch.nn.Module, tmp_path: Path
) -> None:
    import copy

    peft = pytest.importorskip("peft")
    wanted = {"r": R, "alpha": 5, "target_modules": ["to_q", "conv1", "proj_in"], **options}
    config = getattr(peft, f"{kind}Config")(**wanted, init_weights=False)
    before = {n: t.clone() for n, t in model.state_dict().items()}
    wrapped = peft.get_peft_model(copy.deepcopy(model), config)
    wrapped.save_pretrained(tmp_path)
    adapter = opened(tmp_path, before)
    after = wrapped.merge_and_unload().state_dict()
    changed = [n for n in before if not torch.equal(before[n], after[n])]
    assert changed and set(changed) == set(adapter) and not adapter.notes
    for name in changed:
        delta = after[name] - before[name]
        torch.testing.assert_close(adapter[name], delta, rtol=1e-4, atol=1e-5)


@pytest.mark.parity
@pytest.mark.parametrize("module", [TO_Q, CONV])
@pytest.mark.parametrize("tucker", [False, True])
def test_loha_and_lokr_of_lycoris_have_its_scale(
    module: str, tucker: bool, base: Tensors, save: Save
) -> None:
    """LyCORIS divides alpha by the rank; factors that it stores whole it does not scale."""
    weight, g = base[f"{module}.weight"], torch.Generator().manual_seed(0)
    out, inputs, *kernel = weight.shape
    stem = "lora_unet_" + module.replace(".", "_")

    def random(*shape: int) -> Tensor:
        return torch.randn(shape, generator=g)

    if not kernel and tucker:
        return
    n = inputs if tucker else inputs * math.prod(kernel)
    sides = {i: (random(R, out) if tucker else random(out, R), random(R, n)) for i in (1, 2)}
    held = {f"{stem}.hada_w{i}_a": a for i, (a, _) in sides.items()}
    held |= {f"{stem}.hada_w{i}_b": b for i, (_, b) in sides.items()}
    cores = {i: random(R, R, *kernel) for i in (1, 2)} if tucker else {}
    held |= {f"{stem}.hada_t{i}": core for i, core in cores.items()}
    products = []
    for i, (a, b) in sides.items():
        if tucker:
            products.append(torch.einsum("i j k l, j r, i p -> p r k l", cores[i], b, a))
        else:
            products.append(a @ b)
    path = save(held | {f"{stem}.alpha": torch.tensor(3.0)})
    expected = (products[0] * products[1]).view(weight.shape) * (3 / R)
    torch.testing.assert_close(only(path, base, module), expected, rtol=1e-4, atol=1e-4)

    w1, w2 = random(2, 2), random(out // 2, inputs // 2, *kernel)
    whole = {f"{stem}.lokr_w1": w1, f"{stem}.lokr_w2": w2, f"{stem}.alpha": torch.tensor(9e9)}
    expected = torch.kron(w1.view(2, 2, *(1 for _ in kernel)), w2)
    torch.testing.assert_close(only(save(whole), base, module), expected)
