"""Images in files that are decoded later: a source a file, whose catalogues other processes read without torch."""
