"""Names of the columns that go with rows between steps and are no part of a table."""

REQUEST_KEY = "__request_key"
"""Names what a row asks of the model: rows that ask the same have the same."""
POSITIONS = "__positions"
"""Where in the table the rows are that ask it."""
ROW_KEY = "__row_key"
"""Names a row for its random draws."""
