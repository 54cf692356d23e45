"""Reports to the user: samples of a step, probes, TensorBoard files, trackers and tables."""
