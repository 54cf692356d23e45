"""What a rank runs: the only place that imports torch, transformers, accelerate and datasets."""
