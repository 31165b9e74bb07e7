"""What comes in: preference records, captioned images, prompts, pictures, and where they lie."""
