"""Results of the programs that the command line runs in separate processes."""
