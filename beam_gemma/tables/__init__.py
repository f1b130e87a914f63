"""Where rows live: Parquet, JSON lines and BigQuery, read and written."""
