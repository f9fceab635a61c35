"""Pages for people: the report of a run, and the report of a site's ledger. Self-contained, offline, printable."""
