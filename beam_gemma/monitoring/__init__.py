"""What a run did: progress while it runs, counts and charts afterwards."""
