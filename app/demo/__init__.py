"""Room `app.demo`."""
