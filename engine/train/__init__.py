"""What a rank runs; the only package that imports torch, transformers, accelerate and datasets."""
