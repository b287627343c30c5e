"""Benchmarks: speed as a ratio to a named rival on the same work in the same run, never as a timed test."""
