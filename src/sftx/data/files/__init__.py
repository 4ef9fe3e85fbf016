"""From a corpus's name to its files, and from bytes to rows with their line."""
