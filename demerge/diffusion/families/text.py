"""Frozen text encoders of transformers, and their tokenizers, by allowed stock classes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from demerge.diffusion.components import (
    built,
    checked_folder,
    class_name,
    find_class,
    load_component,
    running,
)
from demerge.diffusion.configs import TextConfig
from demerge.errors import InputError, UsageError

CLIP = ("CLIPTextModel",)
CLIP_PROJECTED = ("CLIPTextModelWithProjection",)
T5 = ("T5EncoderModel", "UMT5EncoderModel")
BERT = ("BertModel",)
TOKENIZERS = (
    "CLIPTokenizer", "CLIPTokenizerFast", "T5Tokenizer", "T5TokenizerFast", "BertTokenizer",
    "BertTokenizerFast",
)  # fmt: skip


@dataclass(frozen=True, slots=True)
class Encoder:
    """A tokenizer and a text model, frozen; texts are padded or cut to `length` tokens."""

    tokenizer: Any
    model: nn.Module
    length: int
    where: str

    @torch.no_grad()
    def __call__(self, captions: Sequence[str], **options: Any) -> Any:
        """Return the model's output for B captions, and the mask of their tokens [B L]."""
        how = {"padding": "max_length", "max_length": self.length, "truncation": True}
        device = next(self.model.parameters()).device
        with running(self.where):
            tokens = self.tokenizer(list(captions), return_tensors="pt", **how).to(device)
            mask: Tensor = tokens.attention_mask
            if options.pop("masked", False):
                options["attention_mask"] = mask
            return self.model(tokens.input_ids, **options), mask


def load_encoder(
    folder: Path,
    component: str,
    tokenizer: str,
    classes: Sequence[str],
    length: int | None = None,
) -> Encoder | None:
    """Load a text encoder in float32 with its tokenizer; None if the pipeline has none.

    Args:
        length: of the tokens of a text; the tokenizer's own by default.

    Raises:
        UsageError: if transformers is not installed.
        InputError: if a class is not supported, the weights do not fit the config, or the tokenizer
            does not fit the encoder.
    """
    name = find_class(folder, component, classes)
    if name is None:
        return None
    try:
        import transformers
    except ImportError as error:
        what = "the base takes text, which needs transformers"
        raise UsageError(what, fix="pip install 'demerge[sd]'") from error
    kind = getattr(transformers, name)

    def build(config: dict[str, Any]) -> Any:
        return kind(kind.config_class.from_dict(config))

    model = load_component(folder, component, TextConfig, build)
    where, own = checked_folder(folder, tokenizer), class_name(folder, tokenizer)
    if own not in TOKENIZERS:
        what = f"{folder}: {tokenizer} is of class '{own}', which is not supported"
        raise InputError(what, fix=f"use one of {', '.join(TOKENIZERS)}")
    loaded = built(lambda: getattr(transformers, own).from_pretrained(where), str(where))
    length = loaded.model_max_length if length is None else length
    most = getattr(model.config, "max_position_embeddings", None)
    is_short = type(length) is int and length > 0 and (most is None or length <= most)
    if not is_short or len(loaded) > model.config.vocab_size:
        texts = f"{len(loaded):,} tokens in texts of up to {str(length)[:40]}"
        limit = "" if most is None else f" in {most:,}"
        encoder = f"the text encoder takes {model.config.vocab_size:,}{limit}"
        fix = "use the tokenizer of this text encoder"
        raise InputError(f"{where}: {texts}; {encoder}", fix=fix)
    return Encoder(loaded, model, length, f"{folder}/{component}")
