"""Records and tokens on disk, and the processes that tokenise."""
