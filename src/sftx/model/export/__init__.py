"""What a run leaves: weights and tokenizer as plain PEFT and transformers load them."""
