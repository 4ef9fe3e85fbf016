"""LoRA layers: their arithmetic, dropout, which layers get one, and which adapter each token uses."""
