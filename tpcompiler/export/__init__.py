"""A plan in the words of other libraries, where they have words for it."""
