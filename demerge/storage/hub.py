"""What a user's name of a model stands for: a path, an embedded model, or a Hub id to fetch.

`demerge/assets/README.md` says how the embedded models were made.
"""

from __future__ import annotations

import re
from pathlib import Path

from demerge.errors import InputError

ASSETS = Path(__file__).resolve().parents[1] / "assets"
EMBEDDED = ("digits-base", "digits-early")
HUB_ID = re.compile(r"[\w.-]+/[\w.-]+")
ROOT = ("model_index.json", "config.json", "scheduler_config.json", "adapter_config.json")
NAMES = ("diffusion_pytorch_model", "pytorch_lora_weights", "adapter_model")
WEIGHTS = tuple(f"{name}.safetensors" for name in NAMES)
VARIANTS = ("fp16", "bf16", "non_ema")
PARTS = ("unet", "transformer*", "vae", "scheduler", "text_encoder*", "tokenizer*")


def resolve_model_path(model: str | Path, variant: str | None = None) -> Path:
    """Return the local path of a model; `owner/name` that is not a path is fetched from the Hub.

    An embedded name wins over a folder of that name, which is written `./digits-base`. Of the Hub's
    variants only the wanted one is fetched, next to the plain weights.

    Raises:
        InputError: if the Hub has no such model or cannot be reached, or no path can have this
            name.
    """
    if str(model) in EMBEDDED:
        return ASSETS / str(model)
    path = Path(model)
    try:
        exists = path.exists()
    except OSError as error:  # a name of more than 255 bytes, for example
        what = f"{str(model)[:80]}...: not a path: {error.strerror}"
        raise InputError(what, fix="name a file or a folder") from error
    if exists or path.parent.exists() or not HUB_ID.fullmatch(str(model)):
        return path
    return _fetch(str(model), variant)


def _fetch(model: str, variant: str | None) -> Path:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    patterns = [f"{part}/*{kind}" for part in PARTS for kind in (".json", ".txt", ".safetensors")]
    if variant:
        patterns += [name.replace(".", f".{variant}.") for name in WEIGHTS]
    unwanted = [f"*.{other}*" for other in VARIANTS if other != variant]
    wanted = [*ROOT, *WEIGHTS, *patterns]
    try:
        return Path(snapshot_download(model, allow_patterns=wanted, ignore_patterns=unwanted))
    except (HFValidationError, HfHubHTTPError, LocalEntryNotFoundError, OSError) as error:
        what = f"'{model}' is neither a local file or folder nor a model that the Hub gives"
        fix = "check the spelling and the network, or name a local folder"
        raise InputError(f"{what} ({type(error).__name__})", fix=fix) from error
