"""Results of the programs that the command line runs in processes of their own."""
