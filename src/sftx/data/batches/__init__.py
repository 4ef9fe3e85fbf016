"""From rows to micro-batches: order, packing, collation, streaming."""
