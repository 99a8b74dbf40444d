"""From a recipe to a version: map tasks per input, fits over keys in between, one commit at the end."""
