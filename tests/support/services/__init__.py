"""Services of guarded children that misbehave, in the place of honest ones."""
