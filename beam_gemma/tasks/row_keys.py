"""Names of internal columns that rows carry between pipeline steps; no table contains them."""

REQUEST_KEY = "__request_key"
"""Column with the key of a row's request; rows with equal requests have equal keys."""
POSITIONS = "__positions"
"""Column with the table positions of all rows that share a request."""
ROW_KEY = "__row_key"
"""Column with the key that seeds a row's random draws."""
POSITION = "__position"
"""Column with the table position of one row."""
ENCODED = "__encoded"
"""Column with the request that a row was encoded to; see `tasks/encoded_rows.py`."""
KEY_BYTES = 16
"""Size of a request key in bytes; 10**12 requests have a collision with a chance of 1 in 10**15."""
