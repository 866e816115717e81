r"""The models that ship in the package, by the names that commands and functions take in place of a path.

`digits-base` is a UNet of 0.2 M parameters trained from a random start on the train split of scikit-learn's digits by

    demerge finetune demerge/assets/digits-base.json --init random --data digits --ranges joint -o runs/digits-base \
        --max-train-steps 5000 --train-batch-size 64 --learning-rate 1e-3 --lr-scheduler cosine --lr-warmup-steps 200 \
        --adam-beta1 0.9 --p 1 --ema-decay 0.999 --save-dtype float16 --seed 0

and is what that command leaves in runs/digits-base/0000-1000, less its records.
"""

from __future__ import annotations

from pathlib import Path

ASSETS = Path(__file__).resolve().parent / "assets"
NAMES = ("digits-base",)


def embedded(name: str | Path) -> Path:
    """Return the folder of an embedded model, or the path itself; a folder of the same name is written `./digits-base`."""
    return ASSETS / str(name) if str(name) in NAMES else Path(name)
