"""The sections of a configuration: every key, its type, its range and its default.

The docstrings of sections and keys are user documentation: docs/configuration.md is made of them.
"""
