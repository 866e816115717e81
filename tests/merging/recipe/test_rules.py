"""Rules: what a pattern matches, which rule wins, what ramps give, and what is refused."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from demerge.errors import InputError, UsageError
from demerge.merging import Recipe, find_method, merge_tensors
from demerge.merging import plan as plan_merge
from demerge.merging.blocks import block_of, is_kind, sort_blocks, with_block
from demerge.merging.recipe.rules import Ramp, Rule, compile_pattern, resolve_rules, select
from demerge.merging.recipe.weight_files import check_order, read_weight_file

UNET = (
    "conv_in.weight",
    "time_embedding.linear_1.weight",
    "down_blocks.0.resnets.0.conv1.weight",
    "down_blocks.0.resnets.0.norm1.weight",
    "down_blocks.1.attentions.0.transformer_blocks.0.attn1.to_q.weight",
    "down_blocks.1.attentions.0.transformer_blocks.0.ff.net.0.proj.weight",
    "down_blocks.1.attentions.0.proj_in.weight",
    "mid_block.attentions.0.to_q.weight",
    "mid_block.resnets.1.conv2.bias",
    "up_blocks.0.resnets.0.conv_shortcut.weight",
    "up_blocks.1.upsamplers.0.conv.weight",
    "conv_norm_out.weight",
    "conv_out.weight",
)
FLUX = (
    "x_embedder.weight",
    "context_embedder.weight",
    "time_text_embed.timestep_embedder.linear_1.weight",
    "transformer_blocks.0.attn.to_q.weight",
    "transformer_blocks.1.ff.net.0.proj.weight",
    "single_transformer_blocks.0.proj_mlp.weight",
    "norm_out.linear.weight",
    "proj_out.weight",
)
WAN = (
    "patch_embedding.weight",
    "blocks.0.attn1.to_q.weight",
    "blocks.10.ffn.net.0.proj.weight",
    "blocks.9.norm2.weight",
    "scale_shift_table",
)
Found = dict[str, tuple[list[float], object]]


@pytest.mark.parametrize(
    ("name", "block"),
    [
        ("conv_in.weight", "in"),
        ("time_embedding.linear_1.weight", "time"),
        ("add_embedding.linear_1.bias", "time"),
        ("down_blocks.3.resnets.0.conv1.weight", "down.3"),
        ("mid_block.resnets.1.conv2.bias", "mid"),
        ("up_blocks.0.resnets.0.conv1.weight", "up.0"),
        ("conv_norm_out.weight", "out"),
        ("x_embedder.weight", "in"),
        ("pos_embed.proj.weight", "in"),
        ("context_embedder.weight", "text"),
        ("condition_embedder.text_embedder.linear_1.weight", "text"),
        ("condition_embedder.time_proj.weight", "time"),
        ("transformer_blocks.11.attn.to_q.weight", "blocks.11"),
        ("blocks.3.ffn.net.0.proj.weight", "blocks.3"),
        ("single_transformer_blocks.4.proj_mlp.weight", "single.4"),
        ("scale_shift_table", "out"),
        ("model.diffusion_model.output_blocks.3.0.weight", "up.3"),
        ("model.diffusion_model.double_blocks.3.img_attn.qkv.weight", "blocks.3"),
        ("encoder.layers.12.weight", "encoder.layers.12"),
        ("outer.weight", "outer"),
    ],
)
def test_each_tensor_has_a_block(name: str, block: str) -> None:
    assert block_of(name) == block
    assert with_block(name).startswith(block)


def test_blocks_are_ordered_from_input_to_output() -> None:
    assert sort_blocks(reversed(UNET)) == [
        "in",
        "time",
        "down.0",
        "down.1",
        "mid",
        "up.0",
        "up.1",
        "out",
    ]
    assert sort_blocks(reversed(WAN)) == ["in", "blocks.0", "blocks.9", "blocks.10", "out"]
    assert sort_blocks(["layers.10.w", "layers.9.w"]) == ["layers.9", "layers.10"]


@pytest.mark.parametrize(
    ("pattern", "names", "count"),
    [
        ("conv_in.weight", UNET, 1),
        ("conv_in", UNET, 1),
        ("down_blocks.*.attentions.**", UNET, 3),
        ("down_blocks.*", UNET, 5),
        ("**.conv*", UNET, 7),
        ("**.weight", UNET, 12),
        ("*", UNET, 13),
        ("**.transformer_blocks.**.to_q.weight", UNET, 1),
        ("down", UNET, 5),
        ("down.1", UNET, 3),
        ("up.*.resnets.**", UNET, 1),
        ("in", UNET, 1),
        ("out", UNET, 2),
        ("mid", UNET, 2),
        ("time", UNET, 1),
        ("attn", UNET, 3),
        ("ff", UNET, 1),
        ("conv", UNET, 6),
        ("norm", UNET, 2),
        ("resnet", UNET, 4),
        ("down.attn", UNET, 2),
        ("down.0.conv", UNET, 1),
        ("down.*.attn", UNET, 2),
        ("blocks", FLUX, 2),
        ("blocks.1", FLUX, 1),
        ("single", FLUX, 1),
        ("attn", FLUX, 1),
        ("ff", FLUX, 2),
        ("text", FLUX, 1),
        ("blocks.10", WAN, 1),
        ("blocks.0.attn", WAN, 1),
    ],
)
def test_what_patterns_match(pattern: str, names: tuple[str, ...], count: int) -> None:
    assert len(select(pattern, names, "rule")) == count


def test_a_part_of_a_name_is_no_match() -> None:
    assert not compile_pattern("down_blocks.1")("down_blocks.10.resnets.0.conv1.weight")
    assert not compile_pattern("conv")("conv_norm_out.weight")
    assert not compile_pattern("*.weight")("time_embedding.linear_1.weight")
    assert not is_kind("attn", "down_blocks.1.attentions.0.transformer_blocks.0.norm1.weight")


def setting(rules: list[str]) -> Found:
    settings, _ = resolve_rules(
        [Rule.parse(r) for r in rules], UNET, find_method("task_arithmetic"), {}, [0.5, 0.5]
    )
    return {name: (list(s.weights), s.options.get("scale")) for name, s in settings.items()}


def test_the_first_rule_that_matches_wins() -> None:
    found = setting(["mid weights=0.1,0.2", "** scale=0.5 weights=1,0"])
    assert found["mid_block.resnets.1.conv2.bias"] == ([0.1, 0.2], 1.0)
    assert found["conv_in.weight"] == ([1.0, 0.0], 0.5)
    assert set(found) == set(UNET)
    assert set(setting(["mid scale=2"])) == {n for n in UNET if n.startswith("mid")}
    assert setting(["mid scale=2"])["mid_block.resnets.1.conv2.bias"] == ([0.5, 0.5], 2.0)


def test_a_ramp_is_linear_over_the_blocks_it_matches() -> None:
    found = setting(["** scale=0..7 weights=1..0,-1e-1..6.9"])
    assert [
        found[n][1] for n in ("conv_in.weight", "mid_block.resnets.1.conv2.bias", "conv_out.weight")
    ] == [0, 4, 7]
    assert found["conv_out.weight"][0] == [0, 6.9]
    assert (
        found["down_blocks.0.resnets.0.conv1.weight"]
        == found["down_blocks.0.resnets.0.norm1.weight"]
    )
    assert setting(["mid scale=0..1"])["mid_block.resnets.1.conv2.bias"][1] == 0.5
    later = setting(["mid scale=9", "** scale=0..7"])
    assert later["conv_out.weight"][1] == 7 and later["mid_block.resnets.1.conv2.bias"][1] == 9


def test_what_each_rule_took_is_told() -> None:
    _, taken = resolve_rules(
        [Rule.parse("attn scale=2"), Rule.parse("down scale=3")],
        UNET,
        find_method("task_arithmetic"),
        {},
        [1.0],
    )
    assert [(str(t.rule), len(t.names)) for t in taken] == [
        ("attn scale=2", 3),
        ("down scale=3", 3),
    ]


def test_a_rule_survives_its_text_and_its_document() -> None:
    rule = Rule.parse("up.attn weights=0.2..0.8,0.5 scale=0.1..1.0")
    assert rule.weights == (Ramp(0.2, 0.8), 0.5) and rule.options == {"scale": Ramp(0.1, 1.0)}
    assert Rule.parse(str(rule)) == rule
    document = rule.document()
    assert Rule.of(document["match"], document["weights"], document["options"]) == rule


def test_rules_change_the_merge(tmp_path: Path) -> None:
    base = {n: torch.zeros(4) for n in ("conv_in.weight", "mid_block.a.weight", "conv_out.weight")}
    experts = [{n: torch.full((4,), float(i + 1)) for n in base} for i in range(2)]
    for name, tensors in (("base", base), ("a", experts[0]), ("b", experts[1])):
        save_file(tensors, tmp_path / f"{name}.safetensors")
    paths = [tmp_path / f"{name}.safetensors" for name in ("base", "a", "b")]
    rules = ["mid weights=0,1", "in scale=0.5"]
    plan_merge(
        Recipe.of(paths[0], paths[1:], rules=rules, only=["mid", "in"]),
        tmp_path / "out.safetensors",
    ).run()
    merged = load_file(tmp_path / "out.safetensors")
    assert merged["mid_block.a.weight"].tolist() == [2.0] * 4
    assert merged["conv_in.weight"].tolist() == [0.75] * 4
    assert merged["conv_out.weight"].tolist() == [0.0] * 4
    plain = merge_tensors(base, experts)
    assert plain["conv_out.weight"].tolist() == [1.5] * 4


def test_a_pattern_that_selects_nothing_is_refused() -> None:
    assert select("mid", UNET, "--only 'mid'") == [n for n in UNET if n.startswith("mid")]
    with pytest.raises(UsageError, match="--only 'middle' matches no tensor"):
        select("middle", UNET, "--only 'middle'")


# -- what is refused -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("rules", "message", "fix"),
    [
        (
            ["down_blocks.7 scale=1"],
            "rule 'down_blocks.7 scale=1' matches no tensor",
            "down_blocks.0",
        ),
        (["atn scale=1"], "matches no tensor", "did you mean attn"),
        (["upp.1 scale=1"], "matches no tensor", "up.1"),
        (["zzz scale=1"], "matches no tensor", "the blocks are in, time, down.0"),
        (
            ["down scale=1", "down.1.attn scale=2"],
            "rule 'down.1.attn scale=2' is hidden: all 2",
            "put it before",
        ),
        (["mid scale=1", "mid scale=1"], "belong to 'mid scale=1'", "put it before"),
        (["mid weights=1"], "has 1 weights for 2 experts", "one per expert"),
        (["mid weights=1,nan"], "are not 2 finite numbers", ""),
        (["mid weights=1,x"], "the weights of rule 'mid' are not numbers", "PATTERN"),
        (["mid density=0.1"], "has no option 'density'", ""),
        (["mid scale=high"], "option scale=high is not float", ""),
        (["mid"], "rule 'mid' sets nothing", "PATTERN"),
        (["mid scale"], "cannot be read", "PATTERN"),
        (["mid scale=1 scale=2"], "cannot be read", "PATTERN"),
        (["mid..x scale=1"], "'mid..x' is not a pattern", "dots"),
        (["(mid scale=1"], "'(mid' is not a pattern", "dots"),
    ],
)
def test_wrong_rules_are_refused(rules: list[str], message: str, fix: str) -> None:
    with pytest.raises(UsageError) as error:
        setting(rules)
    assert message in error.value.what and fix in error.value.fix


def test_an_option_of_the_whole_model_is_no_option_of_a_part() -> None:
    with pytest.raises(
        UsageError, match="sets density for some tensors, but ties uses it over the whole model"
    ) as error:
        resolve_rules([Rule.parse("mid density=0.5")], UNET, find_method("ties"), {}, [0.5, 0.5])
    assert "scope=tensor" in error.value.fix
    with pytest.raises(UsageError, match="over the whole model"):
        resolve_rules(
            [Rule.parse("mid scope=model")],
            UNET,
            find_method("ties"),
            {"scope": "tensor"},
            [0.5, 0.5],
        )
    for rule, options in (
        ("mid density=0.5", {"scope": "tensor"}),
        ("mid density=0.5 scope=tensor", {}),
        ("mid scale=2", {}),
    ):
        settings, _ = resolve_rules(
            [Rule.parse(rule)], UNET, find_method("ties"), options, [0.5, 0.5]
        )
        assert len(settings) == 2


def test_a_ramp_needs_a_number() -> None:
    with pytest.raises(UsageError, match="scope takes no ramp"):
        resolve_rules(
            [Rule.of("mid", None, {"scope": "0..1"})], UNET, find_method("ties"), {}, [1.0]
        )


# -- files of weights ------------------------------------------------------------------------------

TABLE = {
    "c.json": '{"weights": [1, 0], "tensors": {"conv_in.weight": [0, 1]}, "blocks": {"in": [0.5, 0.5], "up": ["0..1", 0.5]}}',
    "c.yaml": "weights: [1, 0]\ntensors: {conv_in.weight: [0, 1]}\nblocks:\n  in: [0.5, 0.5]\n  up: [0..1, 0.5]\n",
    "c.csv": "name,a,b\nconv_in.weight,0,1\nin,0.5,0.5\nup,0..1,0.5\n*,1,0\n",
}


@pytest.mark.parametrize("name", TABLE)
def test_files_of_weights_are_rules(name: str, tmp_path: Path) -> None:
    (tmp_path / name).write_text(TABLE[name])
    whole, rules = read_weight_file(tmp_path / name)
    assert whole == [1, 0]
    assert [str(rule) for rule in rules] == [
        "conv_in.weight weights=0.0,1.0",
        "in weights=0.5,0.5",
        "up weights=0.0..1.0,0.5",
    ]


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("c.json", '{"weight": [1]}', "unknown key 'weight'"),
        ("c.json", '{"weights": 1}', "weights is '1'"),
        ("c.json", '{"weights": ["a"]}', "could not convert"),
        ("c.json", '{"blocks": {"mid": ["a"]}}', "are not numbers"),
        ("c.csv", "name,a\n*,1\n*,2\n", "more than one row \\*"),
        ("c.csv", "name,a\nmid,x\n", "are not numbers"),
        ("c.yaml", "weights: [1\n", "not valid YAML"),
        ("none.csv", None, "cannot be read"),
    ],
)
def test_damaged_files_of_weights_are_refused(
    name: str, text: str | None, message: str, tmp_path: Path
) -> None:
    if text is not None:
        (tmp_path / name).write_text(text)
    with pytest.raises(InputError, match=message):
        read_weight_file(tmp_path / name)


def test_weights_of_the_same_experts_in_another_order_are_refused(tmp_path: Path) -> None:
    record = {"inputs": {"experts": [{"path": "a"}, {"path": "b"}]}}
    (file := tmp_path / "w.json").write_text(json.dumps({"weights": [0.2, 0.8], "record": record}))
    check_order(file, ["a", "b"])
    check_order(file, ["c", "d"])
    with pytest.raises(UsageError, match="another order") as raised:
        check_order(file, ["b", "a"])
    assert "a b" in raised.value.fix


# -- the community's names -------------------------------------------------------------------------

SD = ["conv_in.weight", "mid_block.attentions.0.proj_in.weight"]
SD += [f"down_blocks.{b}.resnets.{i}.conv1.weight" for b in range(4) for i in range(2)]
SD += [f"down_blocks.{b}.attentions.{i}.proj_in.weight" for b in range(3) for i in range(2)]
SD += [f"down_blocks.{b}.downsamplers.0.conv.weight" for b in range(3)]
SD += [f"up_blocks.{b}.resnets.{i}.conv1.weight" for b in range(4) for i in range(3)]
SD += [f"up_blocks.{b}.upsamplers.0.conv.weight" for b in range(3)]
LDM = [
    "input_blocks.0.0.weight",
    "input_blocks.4.1.proj_in.weight",
    "middle_block.1.proj_in.weight",
    "output_blocks.11.0.x",
]


@pytest.mark.parametrize(
    ("pattern", "expected"),
    [
        ("IN00", ["conv_in.weight"]),
        (
            "in04",
            ["down_blocks.1.resnets.0.conv1.weight", "down_blocks.1.attentions.0.proj_in.weight"],
        ),
        ("IN_04.attn", ["down_blocks.1.attentions.0.proj_in.weight"]),
        ("IN06", ["down_blocks.1.downsamplers.0.conv.weight"]),
        ("IN11", ["down_blocks.3.resnets.1.conv1.weight"]),
        ("M00", ["mid_block.attentions.0.proj_in.weight"]),
        ("MID", ["mid_block.attentions.0.proj_in.weight"]),
        ("OUT02", ["up_blocks.0.resnets.2.conv1.weight", "up_blocks.0.upsamplers.0.conv.weight"]),
        ("OUT11", ["up_blocks.3.resnets.2.conv1.weight"]),
    ],
)
def test_blocks_as_the_community_counts_them(pattern: str, expected: list[str]) -> None:
    assert select(pattern, SD, "rule") == expected
    numbers = [select(f"IN{i:02d}", SD, "rule") for i in range(12)] + [
        select(f"OUT{i:02d}", SD, "rule") for i in range(12)
    ]
    assert sorted(name for found in numbers for name in found) == sorted(
        n for n in SD if not n.startswith("mid")
    )


def test_blocks_of_single_files_are_counted_as_they_are_named() -> None:
    full = [f"model.diffusion_model.{name}" for name in LDM]
    assert [select(pattern, full, "rule") for pattern in ("IN00", "in04", "MID", "OUT11")] == [
        [name] for name in full
    ]
    assert select("Mid", full, "rule") == [full[2]] and select("UP.11", full, "rule") == [full[3]]


def test_counted_blocks_of_a_model_with_other_layers_are_refused() -> None:
    with pytest.raises(UsageError, match="counts two layers per block"):
        select("IN04", [f"down_blocks.0.resnets.{i}.conv1.weight" for i in range(3)], "rule 'IN04'")
    with pytest.raises(UsageError) as error:
        select("IN12", SD, "rule")
    assert error.value.fix
