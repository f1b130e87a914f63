"""Read and write tables of rows: Parquet, JSON lines and BigQuery."""
