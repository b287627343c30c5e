"""Signals to pairs: reading files and feedback, judging quality, writing pair snapshots."""
