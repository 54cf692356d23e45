"""What needs a GPU: a check of correctness and a benchmark of speed, one command each."""
