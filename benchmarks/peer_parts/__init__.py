"""What `benchmarks/peers.py` is made of: its cases, its records, and a child script for each trainer."""
