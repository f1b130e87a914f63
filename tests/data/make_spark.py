"""Write `spark.parquet` beside this file with Spark.

Run `python tests/data/make_spark.py` where pyspark and Java are installed.
"""

import shutil
import tempfile
from pathlib import Path

from pyspark.sql import SparkSession

HERE = Path(__file__).parent
TABLE = """
SELECT
    id,
    concat('row ', id) AS text,
    CASE id
        WHEN 0 THEN TIMESTAMP '0001-01-01 00:00:00'
        WHEN 1 THEN TIMESTAMP '1969-12-31 23:59:59.999999'
        WHEN 2 THEN TIMESTAMP '2024-02-29 12:34:56.789012'
        WHEN 3 THEN TIMESTAMP '9999-12-31 23:59:59.999999'
    END AS at,
    DATE '0001-01-01' AS day,
    CAST(id AS DECIMAL(20, 3)) AS money,
    array(id, NULL) AS list,
    named_struct('a', id, 'b', array('x')) AS record,
    map('k', id) AS pairs,
    CAST('raw' AS BINARY) AS raw,
    CAST(id AS TINYINT) AS tiny
FROM range(5)
"""


def main() -> None:
    """Write the file with Spark's default settings, in which timestamps have 96 bits."""
    spark = (
        SparkSession.builder.master("local[1]")
        .config("spark.sql.session.timeZone", "UTC")
        .config("spark.ui.enabled", "false")
        .config("spark.sql.parquet.datetimeRebaseModeInWrite", "CORRECTED")
        .config("spark.sql.parquet.int96RebaseModeInWrite", "CORRECTED")
        .config("spark.sql.parquet.outputTimestampType", "INT96")
        .getOrCreate()
    )
    with tempfile.TemporaryDirectory() as folder:
        spark.sql(TABLE).coalesce(1).write.parquet(f"{folder}/t")
        (file,) = Path(folder, "t").glob("*.parquet")
        shutil.copy(file, HERE / "spark.parquet")
    spark.stop()


if __name__ == "__main__":
    main()
