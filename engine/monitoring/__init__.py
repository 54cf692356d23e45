"""Guard rails, notifications and telemetry."""
