"""Room `app.training`."""
