"""Methods beside plain LoRA, a file each: its equation, its paper, and what of it is here."""
