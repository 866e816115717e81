"""Flux, in the names of Black Forest Labs and of diffusers' FluxTransformer2DModel."""

from demerge.storage.names.family import Family

DOUBLE, SINGLE = "transformer_blocks.{}", "single_transformer_blocks.{}"
FLUX = Family(
    "Flux",
    {
        "img_in": "x_embedder",
        "txt_in": "context_embedder",
        "time_in.in_layer": "time_text_embed.timestep_embedder.linear_1",
        "time_in.out_layer": "time_text_embed.timestep_embedder.linear_2",
        "vector_in.in_layer": "time_text_embed.text_embedder.linear_1",
        "vector_in.out_layer": "time_text_embed.text_embedder.linear_2",
        "guidance_in.in_layer": "time_text_embed.guidance_embedder.linear_1",
        "guidance_in.out_layer": "time_text_embed.guidance_embedder.linear_2",
        "double_blocks.{}.img_mod.lin": f"{DOUBLE}.norm1.linear",
        "double_blocks.{}.txt_mod.lin": f"{DOUBLE}.norm1_context.linear",
        "double_blocks.{}.img_attn.qkv": (
            f"{DOUBLE}.attn.to_q", f"{DOUBLE}.attn.to_k", f"{DOUBLE}.attn.to_v"
        ),
        "double_blocks.{}.txt_attn.qkv": (
            f"{DOUBLE}.attn.add_q_proj", f"{DOUBLE}.attn.add_k_proj", f"{DOUBLE}.attn.add_v_proj"
        ),
        "double_blocks.{}.img_attn.norm.query_norm.scale": f"{DOUBLE}.attn.norm_q.weight",
        "double_blocks.{}.img_attn.norm.key_norm.scale": f"{DOUBLE}.attn.norm_k.weight",
        "double_blocks.{}.txt_attn.norm.query_norm.scale": f"{DOUBLE}.attn.norm_added_q.weight",
        "double_blocks.{}.txt_attn.norm.key_norm.scale": f"{DOUBLE}.attn.norm_added_k.weight",
        "double_blocks.{}.img_attn.proj": f"{DOUBLE}.attn.to_out.0",
        "double_blocks.{}.txt_attn.proj": f"{DOUBLE}.attn.to_add_out",
        "double_blocks.{}.img_mlp.0": f"{DOUBLE}.ff.net.0.proj",
        "double_blocks.{}.img_mlp.2": f"{DOUBLE}.ff.net.2",
        "double_blocks.{}.txt_mlp.0": f"{DOUBLE}.ff_context.net.0.proj",
        "double_blocks.{}.txt_mlp.2": f"{DOUBLE}.ff_context.net.2",
        "single_blocks.{}.modulation.lin": f"{SINGLE}.norm.linear",
        "single_blocks.{}.linear1": (
            f"{SINGLE}.attn.to_q", f"{SINGLE}.attn.to_k", f"{SINGLE}.attn.to_v",
            f"{SINGLE}.proj_mlp",
        ),
        "single_blocks.{}.linear2": f"{SINGLE}.proj_out",
        "single_blocks.{}.norm.query_norm.scale": f"{SINGLE}.attn.norm_q.weight",
        "single_blocks.{}.norm.key_norm.scale": f"{SINGLE}.attn.norm_k.weight",
        "final_layer.adaLN_modulation.1": "norm_out.linear",
        "final_layer.linear": "proj_out",
    },
    swapped=frozenset({"final_layer.adaLN_modulation.1"}),
    widths={"proj_mlp": 4},
)  # fmt: skip
