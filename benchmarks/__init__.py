"""Benchmarks of speed, memory and cost; see benchmarks/README.md."""
