"""Table in, table out: de-duplication, shards, resume, records and estimates."""
