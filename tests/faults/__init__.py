"""What happens to a job when something breaks: rows are conserved, or it fails and can go on.

`docs/reliability.md` has the table of all that is tried here, and what happens.
"""

NUM_HELD = 2
"""Pieces that a worker writes before `tests.faults.held` has it wait."""
HOLDER = "holder"
"""Name of the file beside the pieces with the id of the process that waits. Without it, the
process goes on."""
