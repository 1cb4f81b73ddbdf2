"""Torch code: the policy, the reward model, losses, decoding and checkpoints."""
