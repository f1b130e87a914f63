"""Names of the columns that go with rows between steps and are no part of a table."""

REQUEST_KEY = "__request_key"
"""Names what a row asks of the model: rows that ask the same have the same."""
POSITIONS = "__positions"
"""Where in the table the rows are that ask it."""
ROW_KEY = "__row_key"
"""Names a row for its random draws."""
POSITION = "__position"
"""Where in the table one row is."""
KEY_BYTES = 16
"""Of a request's key: two of a trillion requests have the same with a chance of 1 in 10**15."""
