"""Starting ranks by torchrun, on one machine or several."""
