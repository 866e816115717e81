"""The recipe of README.md at toy size: random weights, drawn discs, and one step per training.

Tests and the notebook use it where the real files are not at hand.
"""

from __future__ import annotations

import contextlib
import itertools
import json
import re
import shlex
from pathlib import Path

import torch
import transformers
from PIL import Image, ImageDraw
from prepare import main as prepare

from demerge.cli.main import app
from demerge.diffusion.families.taef2 import AutoencoderTAEF2

README = Path(__file__).with_name("README.md")
SIDE, WIDTH = 16, 16
COLOURS = ("red", "green", "blue", "yellow", "black")
SHAPES = ("disc", "ring", "square", "frame")
SMALL = {
    "finetune": "--max-train-steps 1 --train-batch-size 2",
    "evaluate": "--num-images 2 --loss-samples 16 --steps 1 --guidance-scale 1",
}


def write_assets(folder: Path) -> None:
    """Write folders emoji, minilm and taef2 that look like the real ones."""
    images = folder / "emoji" / "images"
    images.mkdir(parents=True)
    entries = []
    for colour, shape in itertools.product(COLOURS, SHAPES):
        image = Image.new("RGBA", (SIDE, SIDE))
        pen, box = ImageDraw.Draw(image), (3, 3, SIDE - 4, SIDE - 4)
        draw = pen.ellipse if shape in ("disc", "ring") else pen.rectangle
        draw(box, fill=colour if shape in ("disc", "square") else None, outline=colour)
        image.save(images / f"{colour}-{shape}.png")
        name = f"{colour} {shape}".upper()
        entries.append({"name": name, "image": f"{colour}-{shape}.png", "category": "Symbols"})
    (folder / "emoji" / "emoji.json").write_text(json.dumps(entries))

    text = folder / "minilm"
    text.mkdir()
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *COLOURS, *SHAPES]
    (text / "vocab.txt").write_text("\n".join(words))
    transformers.BertTokenizer(str(text / "vocab.txt")).save_pretrained(text)
    config = transformers.BertConfig(
        vocab_size=len(words),
        hidden_size=WIDTH,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=WIDTH,
    )
    transformers.BertModel(config).save_pretrained(text)

    (folder / "taef2").mkdir()
    autoencoder = AutoencoderTAEF2(latent_channels=4, block_out_channels=(8,) * 4)
    for part in ("encoder", "decoder"):
        state = getattr(autoencoder, part).state_dict()
        torch.save(state, folder / "taef2" / f"taef2_{part}.pth")


def run(folder: Path) -> Path:
    """Run the commands of README.md in an empty folder; return the folder of their results."""
    out = folder / "runs" / "emoji"
    with torch.random.fork_rng():
        torch.manual_seed(0)
        write_assets(folder)
    (block,) = re.findall(r"```\n(.*?)```", README.read_text(encoding="utf-8"), re.DOTALL)
    first, _, *commands = (shlex.split(line) for line in block.strip().splitlines())
    small = ["--side", str(SIDE), "--widths", "8", "16"]
    with contextlib.chdir(folder):
        prepare([*first[2:], *small])
    with contextlib.chdir(out):
        for _, *words in commands:
            app([*words, *SMALL.get(words[0], "").split()], standalone_mode=False)
    return out
