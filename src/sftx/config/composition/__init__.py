"""From files and the command line to one composed configuration."""
