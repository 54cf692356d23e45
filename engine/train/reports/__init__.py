"""What a step leaves for people: samples, probes and TensorBoard files."""
