"""Starting engines: a new run, a resume, a fork; in the background; the environment of ranks."""
