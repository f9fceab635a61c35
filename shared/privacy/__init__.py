"""What was released, and what it cost: events, the accountant, calibration, noise, and reading a ledger.

The record of what was run (an event) is kept apart from the arithmetic on it (the accountant), so that anyone
can recompute a report from a ledger. Writing a ledger is the site's alone (`client/ledger.py`).
"""
