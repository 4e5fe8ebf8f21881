"""Models whose circuits are known, because each weight was set for a reason."""
