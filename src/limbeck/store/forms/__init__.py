"""The forms a store keeps distributions in, one per file."""
