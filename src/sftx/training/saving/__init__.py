"""The run folder and what is saved in it: metrics, checkpoints, and whether there is room for them."""
