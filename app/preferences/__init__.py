"""Room `app.preferences`."""
