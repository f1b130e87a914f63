"""Run jobs from table to table: de-duplication, shards, resume, records and estimates."""
