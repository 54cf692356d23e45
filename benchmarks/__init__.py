"""Measurements of speed, memory and cost; benchmarks/README.md says what each is for."""
