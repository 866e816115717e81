"""LoRA files: `names` of keys, `settings` alpha and rank, `adapter` deltas, `no_base` no base."""

from demerge.lora.adapter import Adapter, notes_of, open_expert
from demerge.lora.no_base import NoBase, is_lora

__all__ = ["Adapter", "NoBase", "is_lora", "notes_of", "open_expert"]
