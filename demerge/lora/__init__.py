"""LoRA files as experts: `names` what the keys mean, `settings` alpha and rank, `adapter` the deltas."""

from demerge.lora.adapter import Adapter, open_expert

__all__ = ["Adapter", "open_expert"]
