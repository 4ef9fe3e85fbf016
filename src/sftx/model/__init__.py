"""Models: the embedded one, loading, adapting, saving."""
