"""Parts of the store's benchmark: what others keep, what is compared, and how."""
