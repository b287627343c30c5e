"""Room `app.evaluation`."""
