"""The models of examples/smollm2.yaml, from packages that pip can download (docs/smollm2.md)."""
