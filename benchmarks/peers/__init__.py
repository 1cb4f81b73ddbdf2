"""How other systems serve a reward model, written anew from their described behaviour."""
