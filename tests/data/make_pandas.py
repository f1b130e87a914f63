"""Write `pandas.parquet` beside this file: `python tests/data/make_pandas.py`.

Needs pandas, which the project does without: Beam would load it wherever it is installed.
"""

import decimal
from pathlib import Path

import numpy as np
import pandas as pd

FRAME = pd.DataFrame(
    {
        "text": ["a", None, "ü"],
        "small": pd.array([1, None, 3], "Int16"),
        "flag": pd.array([True, None, False], "boolean"),
        "kind": pd.Categorical(["x", "y", "x"]),
        "at": pd.to_datetime(["2024-01-01", None, "2024-03-01"]).tz_localize("Asia/Tokyo"),
        "wait": pd.to_timedelta([1, 2, None], "h"),
        "money": [decimal.Decimal("1.50"), None, decimal.Decimal("-3.25")],
        "list": [[1, 2], [], None],
        "number": np.array([1.5, np.nan, -0.0], "float32"),
    },
    index=pd.Index([10, 20, 30], name="id"),
)

if __name__ == "__main__":
    FRAME.to_parquet(Path(__file__).with_name("pandas.parquet"), row_group_size=2)
