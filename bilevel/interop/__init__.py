"""Ways in for the users of other libraries."""
