"""What Lumiere does, from Python: `import lumiere` offers it (docs/python.md), and the command line prints it."""
