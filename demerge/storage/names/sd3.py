"""Stable Diffusion 3 and 3.5, in the names of Stability AI and of SD3Transformer2DModel."""

from demerge.storage.names.family import Family

BLOCK = "transformer_blocks.{}"
X, CONTEXT = "joint_blocks.{}.x_block", "joint_blocks.{}.context_block"
SD3 = Family(
    "SD3",
    {
        "pos_embed": "pos_embed.pos_embed",
        "context_embedder": "context_embedder",
        "x_embedder.proj": "pos_embed.proj",
        "t_embedder.mlp.0": "time_text_embed.timestep_embedder.linear_1",
        "t_embedder.mlp.2": "time_text_embed.timestep_embedder.linear_2",
        "y_embedder.mlp.0": "time_text_embed.text_embedder.linear_1",
        "y_embedder.mlp.2": "time_text_embed.text_embedder.linear_2",
        f"{X}.adaLN_modulation.1": f"{BLOCK}.norm1.linear",
        f"{CONTEXT}.adaLN_modulation.1": f"{BLOCK}.norm1_context.linear",
        f"{X}.attn.qkv": (f"{BLOCK}.attn.to_q", f"{BLOCK}.attn.to_k", f"{BLOCK}.attn.to_v"),
        f"{CONTEXT}.attn.qkv": (
            f"{BLOCK}.attn.add_q_proj", f"{BLOCK}.attn.add_k_proj", f"{BLOCK}.attn.add_v_proj"
        ),
        f"{X}.attn2.qkv": (f"{BLOCK}.attn2.to_q", f"{BLOCK}.attn2.to_k", f"{BLOCK}.attn2.to_v"),
        f"{X}.attn.ln_q": f"{BLOCK}.attn.norm_q",
        f"{X}.attn.ln_k": f"{BLOCK}.attn.norm_k",
        f"{CONTEXT}.attn.ln_q": f"{BLOCK}.attn.norm_added_q",
        f"{CONTEXT}.attn.ln_k": f"{BLOCK}.attn.norm_added_k",
        f"{X}.attn2.ln_q": f"{BLOCK}.attn2.norm_q",
        f"{X}.attn2.ln_k": f"{BLOCK}.attn2.norm_k",
        f"{X}.attn.proj": f"{BLOCK}.attn.to_out.0",
        f"{CONTEXT}.attn.proj": f"{BLOCK}.attn.to_add_out",
        f"{X}.attn2.proj": f"{BLOCK}.attn2.to_out.0",
        f"{X}.mlp.fc1": f"{BLOCK}.ff.net.0.proj",
        f"{X}.mlp.fc2": f"{BLOCK}.ff.net.2",
        f"{CONTEXT}.mlp.fc1": f"{BLOCK}.ff_context.net.0.proj",
        f"{CONTEXT}.mlp.fc2": f"{BLOCK}.ff_context.net.2",
        "final_layer.adaLN_modulation.1": "norm_out.linear",
        "final_layer.linear": "proj_out",
    },
    swapped=frozenset({"final_layer.adaLN_modulation.1", f"{CONTEXT}.adaLN_modulation.1"}),
)  # fmt: skip
