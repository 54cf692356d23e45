"""Code run by ranks; the only package that imports torch, transformers, accelerate and datasets."""
