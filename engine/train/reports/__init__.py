"""Reports for people: samples of a step, probes, TensorBoard files, trackers and tables."""
