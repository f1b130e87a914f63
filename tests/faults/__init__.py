"""What happens to a job when something breaks: rows are conserved, or it fails and can go on.

`docs/reliability.md` has the table of all that is tried here, and what happens.
"""
