"""From conversations to token ids: chat templates, special tokens, truncation."""
