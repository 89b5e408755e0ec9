"""Where the model that ships with the package lies."""
