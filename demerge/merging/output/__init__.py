"""What comes out of a merge: files of weights, a LoRA, a model card."""
