"""The W&B dashboard as code: which charts there are, and the command that creates them."""
