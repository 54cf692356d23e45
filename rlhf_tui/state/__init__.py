"""The state of a session in the app, and the threads that read and write it."""
