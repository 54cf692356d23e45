"""Forms of the app: check and complete what is typed, and turn it into commands."""
