"""What a finetune is told: one frozen value, checked once, recorded in every checkpoint and expert."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from typing import Any

from demerge.errors import UsageError
from demerge.reprs import stated

CHOICES: dict[str, tuple[str, ...]] = {
    "sampling": ("mixture", "paper"),
    "consistency_schedule": ("constant", "linear", "cosine"),
    "loss_weight": ("one", "min-snr", "truncated-snr", "snr+1", "p2"),
    "projection": ("foldable", "none"),
    "lr_scheduler": ("constant", "linear", "cosine"),
    "mixed_precision": ("no", "bf16"),
    "save_dtype": ("float32", "float16", "bfloat16"),
}


@dataclass(frozen=True, slots=True)
class FinetuneOptions:
    """Options of one finetune; the names are those of diffusers' training scripts where these have one.

    Objective (see `demerge.finetuning.objective`): `p` is the share of timesteps drawn from all of [0, T), `consistency`
    the weight lambda of the frozen base's prediction, `consistency_schedule` how lambda decays over the run.
    `caption_dropout` is the share of captions that become "", the text that guidance sets against a caption. With
    `fisher_samples`, each expert gets a fisher.safetensors of its range, which merging by `fisher` takes.

    Raises:
        UsageError: where a value breaks its rule.
    """

    max_train_steps: int = 1000
    train_batch_size: int = 64
    gradient_accumulation_steps: int = 1
    learning_rate: float = 5e-5
    lr_scheduler: str = "constant"
    lr_warmup_steps: int = 0
    adam_beta1: float = 0.95
    adam_beta2: float = 0.999
    adam_weight_decay: float = 1e-6
    adam_epsilon: float = 1e-8
    max_grad_norm: float = 1.0
    p: float = 0.3
    sampling: str = "mixture"
    consistency: float = 1.0
    consistency_schedule: str = "constant"
    loss_weight: str = "one"
    snr_gamma: float = 5.0
    projection: str = "foldable"
    use_ema: bool = True
    ema_decay: float = 0.9999
    random_flip: bool = False
    caption_dropout: float = 0.1
    mixed_precision: str = "no"
    save_dtype: str = "float32"
    fisher_samples: int = 0
    checkpointing_steps: int = 500
    logging_steps: int = 50
    seed: int = 0

    __repr__ = stated

    def __post_init__(self) -> None:
        for name in (
            "max_train_steps",
            "train_batch_size",
            "gradient_accumulation_steps",
            "checkpointing_steps",
        ):
            self._require(name, getattr(self, name) >= 1, "at least 1")
        self._require("logging_steps", self.logging_steps >= 1, "at least 1")
        self._require("fisher_samples", self.fisher_samples >= 0, "0 or more")
        self._require("learning_rate", 0 < self.learning_rate <= 1, "above 0 and at most 1")
        for name in ("adam_beta1", "adam_beta2", "ema_decay"):
            self._require(name, 0 <= getattr(self, name) < 1, "in [0, 1)")
        for name in ("adam_weight_decay", "consistency"):
            self._require(name, 0 <= getattr(self, name) < math.inf, "finite, 0 or more")
        self._require("adam_epsilon", 0 < self.adam_epsilon <= 1, "above 0 and at most 1")
        self._require("max_grad_norm", self.max_grad_norm > 0, "above 0")
        self._require("p", 0 <= self.p <= 1, "in [0, 1]")
        self._require("caption_dropout", 0 <= self.caption_dropout <= 1, "in [0, 1]")
        self._require("snr_gamma", 0 < self.snr_gamma < math.inf, "finite and above 0")
        self._require("lr_warmup_steps", self.lr_warmup_steps >= 0, "0 or more")
        for name, choices in CHOICES.items():
            self._require(name, getattr(self, name) in choices, "one of " + ", ".join(choices))

    def _require(self, name: str, holds: bool, rule: str) -> None:
        if not holds:
            raise UsageError(f"{name} is {getattr(self, name)!r}", fix=f"it must be {rule}")

    def document(self) -> dict[str, Any]:
        """Return the options as JSON values."""
        return asdict(self)

    def binding(self, step: int | None = None) -> dict[str, Any]:
        """Return the options that must agree with the recorded ones for recorded work to be taken up.

        How often a run logs and saves may always change. `step` is where an unfinished run stopped. What only the end
        of a run needs may then change too, and so may the number of steps if the steps taken stay the same.
        """
        free = {"checkpointing_steps", "logging_steps"}
        if step is not None:
            free |= {"fisher_samples", "save_dtype"}
            constant = self.lr_scheduler == self.consistency_schedule == "constant"
            if constant and self.max_train_steps >= step:
                free.add("max_train_steps")
        return {name: value for name, value in asdict(self).items() if name not in free}
