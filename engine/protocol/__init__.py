"""What processes say to each other: frames, messages, commands, and a client."""
