"""The supervisor process: one live session, its commands, its ranks and its clients."""
