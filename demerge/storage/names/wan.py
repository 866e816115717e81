"""Wan 2.1 and 2.2, in the names of Alibaba and of diffusers' WanTransformer3DModel."""

from demerge.storage.names.family import Family

TIME, TEXT, IMAGE = (f"condition_embedder.{part}_embedder" for part in ("time", "text", "image"))
PROJECTIONS = {
    "q": "to_q", "k": "to_k", "v": "to_v", "o": "to_out.0", "k_img": "add_k_proj",
    "v_img": "add_v_proj", "norm_q": "norm_q", "norm_k": "norm_k", "norm_k_img": "norm_added_k",
}  # fmt: skip
ATTENTION = {
    f"blocks.{{}}.{original}.{name}": f"blocks.{{}}.{attention}.{renamed}"
    for original, attention in (("self_attn", "attn1"), ("cross_attn", "attn2"))
    for name, renamed in PROJECTIONS.items()
}
WAN = Family(
    "Wan",
    {
        "patch_embedding": "patch_embedding",
        "time_embedding.0": f"{TIME}.linear_1",
        "time_embedding.2": f"{TIME}.linear_2",
        "text_embedding.0": f"{TEXT}.linear_1",
        "text_embedding.2": f"{TEXT}.linear_2",
        "time_projection.1": "condition_embedder.time_proj",
        "img_emb.proj.0": f"{IMAGE}.norm1",
        "img_emb.proj.1": f"{IMAGE}.ff.net.0.proj",
        "img_emb.proj.3": f"{IMAGE}.ff.net.2",
        "img_emb.proj.4": f"{IMAGE}.norm2",
        **ATTENTION,
        "blocks.{}.norm3": "blocks.{}.norm2",
        "blocks.{}.ffn.0": "blocks.{}.ffn.net.0.proj",
        "blocks.{}.ffn.2": "blocks.{}.ffn.net.2",
        "blocks.{}.modulation": "blocks.{}.scale_shift_table",
        "head.modulation": "scale_shift_table",
        "head.head": "proj_out",
    },
)
