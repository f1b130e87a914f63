"""Parse command line flags, and plan and run the job that they describe."""
