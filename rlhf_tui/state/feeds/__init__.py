"""What reads a session in a thread and posts updates of what is shown of it."""
