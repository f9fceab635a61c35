"""What runs at the hub: rounds, aggregation, checkpoints."""
