"""Adapters to train: LoRA, DoRA, and frozen layers in 4 bits under them."""
