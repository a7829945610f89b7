"""Other engines: exports to their formats, and int8."""
