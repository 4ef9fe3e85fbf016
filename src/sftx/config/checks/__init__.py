"""What a configuration may hold: types, rules, settings without effect."""
