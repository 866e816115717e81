#!/usr/bin/env python3
"""Captioned emoji and a small text-to-image model of random weights, for the recipe in README.md.

    examples/emoji/prepare.py --emoji emoji --text minilm --autoencoder taef2 --out runs/emoji

It writes OUT/data, images on white with metadata.jsonl; OUT/random, a StableDiffusionPipeline; and
OUT/train.yaml, the options that all trainings share.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from pathlib import Path

import diffusers
import torch
import transformers
from PIL import Image

from demerge.data import load_images
from demerge.diffusion.families.taef2 import AutoencoderTAEF2

LEFT_OUT = ("Flags", "Component")  # their names say little of what is to be seen
TOKENS = 16  # of a caption
BATCH = 64
TRAIN = """\
data: data
cache_latents: cache
train_batch_size: 32
consistency: 0
ema_decay: 0.9
"""


def write_data(emoji: Path, out: Path) -> int:
    """Write the images on white, with the names as captions; return their number."""
    out.mkdir(parents=True, exist_ok=True)
    lines = []
    for entry in json.loads((emoji / "emoji.json").read_text(encoding="utf-8")):
        file = emoji / "images" / entry["image"]
        if entry["category"] in LEFT_OUT or not file.is_file():
            continue
        image = Image.open(file).convert("RGBA")
        white = Image.new("RGBA", image.size, "white")
        Image.alpha_composite(white, image).convert("RGB").save(out / entry["image"])
        lines.append(json.dumps({"file_name": entry["image"], "text": entry["name"].lower()}))
    (out / "metadata.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")
    return len(lines)


def load_autoencoder(folder: Path, data: Path) -> AutoencoderTAEF2:
    """Load TAEF2's two files; give it the mean and deviation of the training images' latents."""
    state = {}
    for part in ("encoder", "decoder"):
        weights = torch.load(folder / f"taef2_{part}.pth", weights_only=True)
        state.update({f"{part}.{name}": tensor.float() for name, tensor in weights.items()})
    width, channels = state["decoder.1.weight"].shape[:2]
    autoencoder = AutoencoderTAEF2(latent_channels=channels, block_out_channels=(width,) * 4)
    autoencoder.load_state_dict(state)
    images = load_images(data, split="train")
    starts = range(0, len(images), BATCH)
    batches = [images.images(range(i, min(i + BATCH, len(images)))) for i in starts]
    with torch.no_grad():
        latents = [autoencoder.encode(batch / 127.5 - 1).latents for batch in batches]
    std, mean = torch.std_mean(torch.cat(latents), dim=(0, 2, 3))
    autoencoder.register_to_config(latents_mean=mean.tolist(), latents_std=std.tolist())
    return autoencoder


def write_pipeline(text: Path, autoencoder: AutoencoderTAEF2, asked: argparse.Namespace) -> int:
    """Write the pipeline with a UNet of random weights; return its number of parameters."""
    tokenizer = transformers.AutoTokenizer.from_pretrained(text, model_max_length=TOKENS)
    encoder = transformers.BertModel.from_pretrained(text)
    encoder.config.use_attention_mask = True
    factor = 2 ** (len(autoencoder.config.block_out_channels) - 1)
    levels, channels = len(asked.widths), autoencoder.config.latent_channels
    torch.manual_seed(asked.seed)
    unet = diffusers.UNet2DConditionModel(
        sample_size=asked.side // factor,
        in_channels=channels,
        out_channels=channels,
        block_out_channels=asked.widths,
        down_block_types=("DownBlock2D", *["CrossAttnDownBlock2D"] * (levels - 1)),
        up_block_types=(*["CrossAttnUpBlock2D"] * (levels - 1), "UpBlock2D"),
        layers_per_block=1,
        norm_num_groups=8,
        attention_head_dim=4,  # in a UNet2DConditionModel this is the number of heads
        cross_attention_dim=encoder.config.hidden_size,
    )
    scheduler = diffusers.DDIMScheduler(
        beta_start=1e-4,
        beta_end=0.02,
        beta_schedule="linear",
        prediction_type="v_prediction",
        clip_sample=False,
        steps_offset=1,
    )
    pipeline = diffusers.StableDiffusionPipeline(
        vae=autoencoder,
        text_encoder=encoder,
        tokenizer=tokenizer,
        unet=unet,
        scheduler=scheduler,
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    pipeline.save_pretrained(asked.out / "random")
    return int(unet.num_parameters())


def main(words: Sequence[str] | None = None) -> None:
    """Write the folders and the options."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--emoji", type=Path, required=True, help="folder with emoji.json, images/")
    parser.add_argument("--text", type=Path, required=True, help="folder of a BertModel")
    parser.add_argument("--autoencoder", type=Path, required=True, help="folder of taef2_*.pth")
    parser.add_argument("--out", type=Path, default=Path("runs/emoji"))
    parser.add_argument("--side", type=int, default=64, help="of the images in pixels")
    parser.add_argument("--widths", type=int, nargs="+", default=[64, 96], help="of the UNet")
    parser.add_argument("--seed", type=int, default=0, help="of the UNet's weights")
    asked = parser.parse_args(words)
    count = write_data(asked.emoji, asked.out / "data")
    (asked.out / "train.yaml").write_text(TRAIN, encoding="utf-8")
    autoencoder = load_autoencoder(asked.autoencoder, asked.out / "data")
    parameters = write_pipeline(asked.text, autoencoder, asked)
    print(f"{count:,} captioned images; a UNet of {parameters:,} parameters: {asked.out}")


if __name__ == "__main__":
    main()
