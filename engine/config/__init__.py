"""The run's configuration: its schema, rules between keys, files and live settings."""
