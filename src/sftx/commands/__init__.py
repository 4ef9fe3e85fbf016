"""The subcommands of `sftx`: each module adds its own to the parser, and imports what it needs when it runs."""
