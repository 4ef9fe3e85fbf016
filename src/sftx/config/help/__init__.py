"""`--help`, docs/parameters.md, and the names of other trainers."""
