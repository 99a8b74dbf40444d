"""The training side: connection, verified cache, feed. Stands on errors, order, model and settings alone."""
