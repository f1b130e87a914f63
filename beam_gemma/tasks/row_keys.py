"""Names of internal columns that accompany rows between steps and are not in any table."""

REQUEST_KEY = "__request_key"
"""Column with the key of a row's request; rows with equal requests have equal keys."""
POSITIONS = "__positions"
"""Column with the table positions of all rows that make a request."""
ROW_KEY = "__row_key"
"""Column with the key of a row's random draws."""
POSITION = "__position"
"""Column with the table position of one row."""
KEY_BYTES = 16
"""Bytes of a request key; among 10**12 requests, two collide with a chance of 1 in 10**15."""
