"""Parts of the larger screens, each a class with one responsibility that its screen owns."""
