"""What autograd keeps of a forward pass: moved to the host, or computed again."""
