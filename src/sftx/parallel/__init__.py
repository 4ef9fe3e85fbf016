"""One process or several; the only importer of Accelerate."""
