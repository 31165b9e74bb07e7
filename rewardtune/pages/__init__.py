"""What the pages of `compare`, `rewards calibrate` and `rewards probe` share: look, policy, pictures, curves."""
