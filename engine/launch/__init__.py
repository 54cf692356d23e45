"""Starts engines: new, resumed or forked runs, in the background; the environment of ranks."""
