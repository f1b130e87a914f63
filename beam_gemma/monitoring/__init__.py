"""Monitoring of a run: progress while it runs, counts and charts afterwards."""
