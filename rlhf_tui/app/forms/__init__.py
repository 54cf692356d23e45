"""What is typed into the dialogs of the app: checked, completed, and made into commands."""
