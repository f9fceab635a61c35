"""Many virtual sites on one machine: the same ServerApp and ClientApp, the same files, no network."""
