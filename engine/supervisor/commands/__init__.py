"""Commands of the operators: checked, carried out here or passed on to the ranks."""
