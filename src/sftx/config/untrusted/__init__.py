"""What a configuration from anybody may not do."""
