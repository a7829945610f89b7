"""How one weight is held while it is trained and cut."""
