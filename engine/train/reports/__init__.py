"""Reports for people: samples of a step, probes, and TensorBoard files."""
