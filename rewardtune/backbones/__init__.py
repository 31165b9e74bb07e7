"""Frozen networks that several rewards stand on, differentiable in the pixels, and the way pixels reach them."""
