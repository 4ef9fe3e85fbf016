"""From rows to conversations: schemas, checks, selection, split, audit."""
