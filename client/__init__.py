"""What runs at a hospital: its data, its training, its ledger, its policy."""
