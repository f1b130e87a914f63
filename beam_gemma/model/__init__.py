"""Description of an exported model: the interface between `export` and the other packages."""
