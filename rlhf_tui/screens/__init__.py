"""The screens: one module each, reached by the keys 1 to 5."""
