"""The parts of screens that have several responsibilities, each a class that its screen owns."""
