"""What the app knows of a session, and the threads that read and write it."""
